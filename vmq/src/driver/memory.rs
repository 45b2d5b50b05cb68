//! Memory of the guest that is played: one file, handed out piece by piece.

// UNSAFETY: reads and writes a shared mapping through raw pointers, as the guest's own processor would.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use crate::memory::{Mapping, MappingError, prefetch_write};

/// A guest's memory in one memfd, which can be handed over a socket, and an allocator of guest-physical addresses in
/// it. Clones share the memory.
///
/// Every accessor takes a guest-physical address and panics, as a slice does, if it lies outside or is not aligned:
/// addresses are the player's own, never the device's. Loads acquire and stores release.
#[derive(Debug, Clone)]
pub struct Arena {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    mapping: Arc<Mapping>,
    fd: OwnedFd,
    guest: u64,
    /// Bytes handed out.
    taken: AtomicU64,
}

impl Arena {
    /// `len` bytes of zeroes whose first has the guest-physical address `guest`.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn new(guest: u64, len: usize) -> Result<Self, MappingError> {
        Ok(Self::over(Mapping::memfd("guest", len)?, guest))
    }

    /// As [`Arena::new`], in huge pages of 2 MiB; `len` is rounded up to them.
    ///
    /// # Errors
    /// The kernel refuses, most likely because no huge pages are set aside.
    pub fn huge(guest: u64, len: usize) -> Result<Self, MappingError> {
        Ok(Self::over(Mapping::huge_memfd("guest", len.next_multiple_of(2 << 20))?, guest))
    }

    fn over((mapping, fd): (Mapping, OwnedFd), guest: u64) -> Self {
        let taken = AtomicU64::new(0);
        Self { shared: Arc::new(Shared { mapping: Arc::new(mapping), fd, guest, taken }) }
    }

    /// The file behind the memory, to be mapped by a device in another process.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.shared.fd.as_fd()
    }

    /// The mapping, for a device in this process.
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.shared.mapping
    }

    /// Guest-physical address of the first byte.
    pub fn guest(&self) -> u64 {
        self.shared.guest
    }

    /// Bytes.
    #[expect(clippy::len_without_is_empty, reason = "an empty mapping cannot be made")]
    pub fn len(&self) -> u64 {
        self.shared.mapping.len() as u64
    }

    /// Guest-physical address of `len` bytes that nobody else gets, a multiple of `align`, itself a power of two.
    /// `None` once the memory is used up. There is no way to give a piece back.
    pub fn alloc(&self, len: u64, align: u64) -> Option<u64> {
        let guest = self.guest();
        let place = |taken: u64| guest.checked_add(taken)?.checked_next_multiple_of(align);
        let end = |taken| Some(place(taken)?.checked_add(len)? - guest).filter(|&end| end <= self.len());
        let taken = self.shared.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, end).ok()?;
        place(taken)
    }

    /// The byte at `gpa`, of which `len` bytes are checked to be there.
    #[inline]
    fn at(&self, gpa: u64, len: usize) -> *mut u8 {
        let offset = usize::try_from(gpa.wrapping_sub(self.shared.guest)).unwrap_or(usize::MAX);
        let mapped = self.shared.mapping.len();
        assert!(offset <= mapped && len <= mapped - offset, "{len} bytes at {gpa:#x} are outside the arena");
        // SAFETY: `offset` is within the mapping.
        unsafe { self.shared.mapping.as_ptr().add(offset) }
    }

    #[inline]
    fn u16_at(&self, gpa: u64) -> &AtomicU16 {
        // SAFETY: `at` checked the bounds and `aligned` the alignment.
        unsafe { AtomicU16::from_ptr(aligned(self.at(gpa, 2).cast())) }
    }

    #[inline]
    fn u32_at(&self, gpa: u64) -> &AtomicU32 {
        // SAFETY: `at` checked the bounds and `aligned` the alignment.
        unsafe { AtomicU32::from_ptr(aligned(self.at(gpa, 4).cast())) }
    }

    #[inline]
    fn u64_at(&self, gpa: u64) -> &AtomicU64 {
        // SAFETY: `at` checked the bounds and `aligned` the alignment.
        unsafe { AtomicU64::from_ptr(aligned(self.at(gpa, 8).cast())) }
    }

    /// Reads a little-endian u16.
    #[inline]
    pub fn read_u16(&self, gpa: u64) -> u16 {
        u16::from_le(self.u16_at(gpa).load(Ordering::Acquire))
    }

    /// Reads a little-endian u32.
    #[inline]
    pub fn read_u32(&self, gpa: u64) -> u32 {
        u32::from_le(self.u32_at(gpa).load(Ordering::Acquire))
    }

    /// Reads a little-endian u64.
    #[inline]
    pub fn read_u64(&self, gpa: u64) -> u64 {
        u64::from_le(self.u64_at(gpa).load(Ordering::Acquire))
    }

    /// Writes a little-endian u16.
    #[inline]
    pub fn write_u16(&self, gpa: u64, value: u16) {
        self.u16_at(gpa).store(value.to_le(), Ordering::Release);
    }

    /// Writes a little-endian u32.
    #[inline]
    pub fn write_u32(&self, gpa: u64, value: u32) {
        self.u32_at(gpa).store(value.to_le(), Ordering::Release);
    }

    /// Writes a little-endian u64.
    #[inline]
    pub fn write_u64(&self, gpa: u64, value: u64) {
        self.u64_at(gpa).store(value.to_le(), Ordering::Release);
    }

    /// Fetches the line at `gpa`, to be written soon.
    #[inline]
    pub fn prefetch_write(&self, gpa: u64) {
        prefetch_write(self.at(gpa, 1));
    }

    /// Copies the bytes at `gpa` into `into`.
    #[inline]
    pub fn read(&self, gpa: u64, into: &mut [u8]) {
        let from = self.at(gpa, into.len());
        // SAFETY: `at` checked that as many bytes are mapped; `into` is memory of our own.
        unsafe { from.copy_to_nonoverlapping(into.as_mut_ptr(), into.len()) };
    }

    /// Copies `bytes` to `gpa`.
    #[inline]
    pub fn write(&self, gpa: u64, bytes: &[u8]) {
        let to = self.at(gpa, bytes.len());
        // SAFETY: `at` checked that as many bytes are mapped; `bytes` is memory of our own.
        unsafe { to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }
}

#[inline]
fn aligned<T>(ptr: *mut T) -> *mut T {
    assert!(ptr.is_aligned(), "address is not aligned to {}", align_of::<T>());
    ptr
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_aligned_disjoint_and_end_with_the_memory() {
        let arena = Arena::new(0x1_0000, 0x1000).unwrap();
        assert_eq!(arena.alloc(3, 1), Some(0x1_0000));
        assert_eq!(arena.alloc(16, 16), Some(0x1_0010));
        assert_eq!(arena.alloc(0xfe1, 1), None);
        assert_eq!(arena.alloc(u64::MAX, 1), None);
        assert_eq!(arena.alloc(0xfe0, 1), Some(0x1_0020));
        assert_eq!(arena.alloc(1, 1), None);
    }

    #[test]
    fn fields_are_little_endian() {
        let arena = Arena::new(0, 64).unwrap();
        arena.write_u64(8, 0x0807_0605_0403_0201);
        assert_eq!((arena.read_u16(10), arena.read_u32(12)), (0x0403, 0x0807_0605));
        let mut bytes = [0; 2];
        arena.read(8, &mut bytes);
        assert_eq!(bytes, [1, 2]);
    }

    #[test]
    #[should_panic(expected = "outside the arena")]
    fn address_past_the_end_is_refused() {
        Arena::new(0, 64).unwrap().read_u16(64);
    }
}
