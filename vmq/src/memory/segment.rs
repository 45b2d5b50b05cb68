//! Checked ranges of memory: [`Segment`] to read from, [`Room`] to write to.

use std::marker::PhantomData;
use std::ptr::NonNull;

use super::{DirtyLog, copy, sum};

/// Bytes to be read, somewhere in a guest's memory or in a buffer of our own. May change while it is read.
#[derive(Debug, Clone, Copy)]
pub struct Segment<'m> {
    ptr: *const u8,
    len: u32,
    memory: PhantomData<&'m [u8]>,
}

// SAFETY: a segment is a borrow of shared memory; reading it from another thread is as sound as from this one.
unsafe impl Send for Segment<'_> {}

impl<'m> From<&'m [u8]> for Segment<'m> {
    /// Bytes of our own. Only the first 4 GiB of a longer slice are taken.
    #[inline]
    fn from(bytes: &'m [u8]) -> Self {
        let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        Self { ptr: bytes.as_ptr(), len, memory: PhantomData }
    }
}

impl<'m> Segment<'m> {
    /// # Safety
    /// `ptr..ptr + len` must be mapped for `'m`.
    #[inline]
    pub(super) unsafe fn from_raw(ptr: *const u8, len: u32) -> Self {
        Self { ptr, len, memory: PhantomData }
    }

    /// Bytes.
    #[inline]
    pub fn len(&self) -> u32 {
        self.len
    }

    /// True if there is nothing to read.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where the bytes are, for a system call that reads them.
    #[inline]
    pub(crate) fn as_ptr(&self) -> *const u8 {
        self.ptr
    }

    /// The segment without its first `count` bytes (empty if it has fewer).
    #[inline]
    #[must_use]
    pub fn skip(self, count: u32) -> Self {
        let count = count.min(self.len);
        // SAFETY: `count <= len`, so the result lies inside the same range.
        Self { ptr: unsafe { self.ptr.add(count as usize) }, len: self.len - count, ..self }
    }

    /// The first `count` bytes of the segment (all of it if it has fewer).
    #[inline]
    #[must_use]
    pub fn take(self, count: u32) -> Self {
        Self { len: count.min(self.len), ..self }
    }

    /// Brings the lines of the first `count` bytes (up to two lines) near: they are about to be read.
    #[inline]
    pub fn prefetch(&self, count: usize) {
        copy::prefetch_read(self.ptr);
        copy::prefetch_read(self.ptr.wrapping_add(count));
    }

    /// The one's-complement sum of the bytes as big-endian words, an odd last byte padded with 0 (RFC 1071).
    #[inline]
    pub fn sum(&self) -> u16 {
        // SAFETY: `len` bytes are mapped.
        unsafe { sum::words(self.ptr, self.len as usize) }
    }

    /// Copies the segment's first `N` bytes out. `None` if it is shorter.
    #[inline]
    pub fn read<const N: usize>(&self) -> Option<[u8; N]> {
        if (self.len as usize) < N {
            return None;
        }
        let mut bytes = [0; N];
        // SAFETY: `N <= len` bytes are mapped; the destination is our own.
        unsafe { copy::small(bytes.as_mut_ptr(), self.ptr, N) };
        Some(bytes)
    }

    /// Copies the segment's first `N` bytes to `into`. False, and nothing is copied, if it is shorter.
    #[inline(always)]
    pub fn read_array<const N: usize>(&self, into: &mut [u8; N]) -> bool {
        if (self.len as usize) < N {
            return false;
        }
        // SAFETY: `N <= len` bytes are mapped; the destination is our own.
        unsafe { copy::any(into.as_mut_ptr(), self.ptr, N) };
        true
    }

    /// The little-endian word at the segment's start and the half word behind it, if it has ten bytes.
    ///
    /// Two loads into registers: a header that is looked at once need not go through memory.
    #[inline(always)]
    pub fn read_words(&self) -> Option<(u64, u16)> {
        if self.len < 10 {
            return None;
        }
        // SAFETY: ten bytes are mapped.
        unsafe {
            let low = self.ptr.cast::<u64>().read_unaligned();
            let high = self.ptr.add(8).cast::<u16>().read_unaligned();
            Some((u64::from_le(low), u16::from_le(high)))
        }
    }

    /// Copies as many bytes as both have into `into`, and says how many.
    #[inline]
    pub fn read_into(&self, into: &mut [u8]) -> usize {
        let count = (self.len as usize).min(into.len());
        // SAFETY: `count` bytes are mapped and `into` has as many.
        unsafe { copy::small(into.as_mut_ptr(), self.ptr, count) };
        count
    }
}

/// Bytes to be written, somewhere in a guest's memory.
#[derive(Debug, Clone, Copy)]
pub struct Room<'m> {
    ptr: NonNull<u8>,
    len: u32,
    gpa: u64,
    log: Option<&'m DirtyLog>,
}

impl<'m> Room<'m> {
    /// # Safety
    /// `ptr..ptr + len` must be mapped, and shared memory of a guest, for `'m`.
    #[inline]
    pub(super) unsafe fn from_raw(ptr: *mut u8, len: u32, gpa: u64, log: Option<&'m DirtyLog>) -> Self {
        // SAFETY: a mapped address is not null.
        let ptr = unsafe { NonNull::new_unchecked(ptr) };
        Self { ptr, len, gpa, log }
    }

    /// Bytes.
    #[inline]
    pub fn len(&self) -> u32 {
        self.len
    }

    /// True if nothing fits.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Brings the lines of the first `count` bytes (up to two lines) near, to be written.
    #[inline]
    pub fn prefetch(&self, count: usize) {
        copy::prefetch_write(self.ptr.as_ptr());
        copy::prefetch_write(self.ptr.as_ptr().wrapping_add(count));
    }

    /// The room behind the first `count` bytes (empty if it has fewer).
    #[inline]
    #[must_use]
    pub fn skip(self, count: u32) -> Self {
        let count = count.min(self.len);
        // SAFETY: `count <= len`, so the result lies inside the same range.
        let ptr = unsafe { self.ptr.add(count as usize) };
        Self { ptr, len: self.len - count, gpa: self.gpa + u64::from(count), log: self.log }
    }

    /// Writes `N` bytes at the room's start; returns what is left of it. As [`Room::write`] if it is shorter.
    #[inline(always)]
    pub fn write_array<const N: usize>(self, bytes: &[u8; N]) -> Self {
        if (self.len as usize) < N {
            return self.write(bytes);
        }
        // SAFETY: `N <= len` bytes are mapped; guest memory never overlaps our own.
        unsafe { copy::any(self.ptr.as_ptr(), bytes.as_ptr(), N) };
        self.written(N)
    }

    /// Writes `low` and then `high`, little-endian, at the room's start: 12 bytes, or the first 10 of them if not
    /// `whole`. Returns what is left of the room, or all of it, untouched, if it is shorter.
    ///
    /// Two stores from registers. Building the bytes in memory first and copying them would make the copy wait until
    /// all earlier stores, misses among them, have left the store buffer; that alone cost 50 cycles a packet.
    #[inline(always)]
    pub fn write_words(self, low: u64, high: u32, whole: bool) -> Self {
        let len = if whole { 12 } else { 10 };
        if (self.len as usize) < len {
            return self;
        }
        // SAFETY: `len` bytes are mapped.
        unsafe {
            self.ptr.cast::<u64>().write_unaligned(low.to_le());
            if whole {
                self.ptr.add(8).cast::<u32>().write_unaligned(high.to_le());
            } else {
                self.ptr.add(8).cast::<u16>().write_unaligned(((high & 0xffff) as u16).to_le());
            }
        }
        self.written(len)
    }

    /// Writes `bytes`, as many as fit, at the room's start; returns what is left of the room.
    #[inline]
    pub fn write(self, bytes: &[u8]) -> Self {
        let count = bytes.len().min(self.len as usize);
        // SAFETY: `count` bytes of both are valid; guest memory never overlaps our own.
        unsafe { copy::small(self.ptr.as_ptr(), bytes.as_ptr(), count) };
        self.written(count)
    }

    /// Writes the segment's bytes, as many as fit, at the room's start; returns what is left of the room.
    ///
    /// `next` names the copy that follows: its lines are fetched while these are moved.
    #[inline]
    pub fn copy(self, segment: Segment<'_>, next: Next) -> Self {
        let count = segment.len.min(self.len) as usize;
        // SAFETY: `count` bytes of both are mapped.
        unsafe { copy::bulk(self.ptr.as_ptr(), segment.ptr, count, next) };
        self.written(count)
    }

    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "`count <= len`, a u32, in all callers")]
    fn written(self, count: usize) -> Self {
        if let Some(log) = self.log {
            log.mark(self.gpa, count as u64);
        }
        self.skip(count as u32)
    }
}

/// Where the next copy will read and write. A hint: the addresses are only ever prefetched.
#[derive(Debug, Clone, Copy)]
pub struct Next {
    pub(super) from: *const u8,
    pub(super) to: *const u8,
    pub(super) len: usize,
}

impl Next {
    /// Nothing follows.
    pub const NONE: Self = Self { from: std::ptr::null(), to: std::ptr::null(), len: 0 };

    /// `segment` will be copied into `room`.
    #[inline]
    pub fn new(segment: Segment<'_>, room: Room<'_>) -> Self {
        Self { from: segment.ptr, to: room.ptr.as_ptr(), len: segment.len.min(room.len) as usize }
    }
}
