//! Guest memory: mappings of a guest's memory files, address translation, and copies in and out.
//!
//! A guest can change its memory at any instant, so it is never a `&[u8]` here. What leaves this module is either a
//! private copy, a [`Segment`] (bytes to be read once) or a [`Room`] (bytes to be written), both bounds-checked when
//! they were made and both borrowed from the [`GuestMemory`] that keeps the mapping alive.
//!
//! Cost: a translation is one compare against the region that was hit last time, so a few cycles; a miss is a binary
//! search. There is no cache that can go stale and no list that is walked per packet.

// UNSAFETY: maps files of other processes and copies bytes through raw pointers into those mappings.
#![allow(unsafe_code)]

mod copy;
mod dirty;
mod mapping;
mod pages;
mod segment;
mod share;
mod sigbus;
mod sum;
mod table;
mod word;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

pub use copy::prefetch;
pub(crate) use copy::prefetch_write;
pub use dirty::{DirtyLog, PAGE};
pub use mapping::{Mapping, MappingError};
pub use pages::{MAX_PAGES, Pages, PagesError};
pub use segment::{Next, Room, Segment};
pub use share::Share;
pub use table::{prefer_huge_pages, table};
pub use word::SharedWord;

/// One contiguous range of guest-physical addresses backed by a mapping.
#[derive(Debug, Clone)]
pub struct Region {
    /// First guest-physical address.
    pub guest: u64,
    /// The same byte's address in the peer's own process (what ring addresses of vhost-user refer to).
    pub user: u64,
    /// Bytes.
    pub len: u64,
    mapping: Arc<Mapping>,
    offset: usize,
}

/// Why a set of regions is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum RegionError {
    /// A region's end exceeds 2^64 or the mapping behind it.
    #[error("region at guest address {guest:#x} with {len} bytes exceeds its file or the address space")]
    OutOfBounds {
        /// First guest-physical address.
        guest: u64,
        /// Bytes claimed.
        len: u64,
    },
    /// Two regions share addresses.
    #[error("regions at guest addresses {first:#x} and {second:#x} overlap")]
    Overlap {
        /// The lower region.
        first: u64,
        /// The higher region.
        second: u64,
    },
}

impl Region {
    /// A region of `len` bytes that begins `offset` bytes into `mapping`.
    ///
    /// # Errors
    /// [`RegionError::OutOfBounds`] if any sum wraps or the mapping is too short.
    pub fn new(
        guest: u64,
        user: u64,
        len: u64,
        mapping: Arc<Mapping>,
        offset: u64,
    ) -> Result<Self, RegionError> {
        let out_of_bounds = RegionError::OutOfBounds { guest, len };
        let end = offset.checked_add(len).ok_or(RegionError::OutOfBounds { guest, len })?;
        if len == 0
            || guest.checked_add(len).is_none()
            || user.checked_add(len).is_none()
            || end > mapping.len() as u64
        {
            return Err(out_of_bounds);
        }
        let offset = usize::try_from(offset).map_err(|_| out_of_bounds)?;
        Ok(Self { guest, user, len, mapping, offset })
    }

    /// The mapping behind the region.
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    #[expect(clippy::cast_possible_truncation, reason = "addresses have 64 bits here")]
    fn host(&self, inside: u64) -> *mut u8 {
        debug_assert!(inside < self.len);
        // SAFETY: `offset + inside < offset + len <= mapping.len()` was checked in `new`, by every caller for `inside`.
        unsafe { self.mapping.as_ptr().add(self.offset + inside as usize) }
    }
}

/// All memory of one guest that its port may touch, and optionally a log of the pages written.
///
/// Immutable: a changed memory table is a new value. Every [`Segment`] and [`Room`] borrows from it.
#[derive(Debug, Default)]
pub struct GuestMemory {
    regions: Vec<Region>,
    last: AtomicUsize,
    log: Option<DirtyLog>,
}

impl GuestMemory {
    /// Memory made of `regions`, in any order.
    ///
    /// # Errors
    /// [`RegionError::Overlap`] if two regions share a guest address.
    pub fn new(mut regions: Vec<Region>, log: Option<DirtyLog>) -> Result<Self, RegionError> {
        regions.sort_by_key(|region| region.guest);
        for pair in regions.windows(2) {
            if pair[0].guest + pair[0].len > pair[1].guest {
                return Err(RegionError::Overlap { first: pair[0].guest, second: pair[1].guest });
            }
        }
        Ok(Self { regions, last: AtomicUsize::new(0), log })
    }

    /// The regions, sorted by guest address.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The dirty-page log, while the peer asks for one.
    pub fn log(&self) -> Option<&DirtyLog> {
        self.log.as_ref()
    }

    /// True once any byte of any region or of the log turned out to be gone (the peer cut its file short).
    #[inline]
    pub fn lost(&self) -> bool {
        self.regions.iter().any(|region| region.mapping.lost())
            || self.log.as_ref().is_some_and(DirtyLog::lost)
    }

    #[inline]
    fn find(&self, gpa: u64) -> Option<&Region> {
        let hint = self.last.load(Ordering::Relaxed);
        if let Some(region) = self.regions.get(hint)
            && gpa.wrapping_sub(region.guest) < region.len
        {
            return Some(region);
        }
        self.find_slow(gpa)
    }

    #[cold]
    fn find_slow(&self, gpa: u64) -> Option<&Region> {
        let index = self.regions.partition_point(|region| region.guest <= gpa).checked_sub(1)?;
        let region = &self.regions[index];
        if gpa - region.guest >= region.len {
            return None;
        }
        self.last.store(index, Ordering::Relaxed);
        Some(region)
    }

    /// The host address of `len` bytes at `gpa` if one region holds them all.
    #[inline]
    fn resolve(&self, gpa: u64, len: u32) -> Option<*mut u8> {
        let region = self.find(gpa)?;
        let inside = gpa - region.guest;
        (u64::from(len) <= region.len - inside).then(|| region.host(inside))
    }

    /// `len` bytes at `gpa`, to be read. `None` if they are not all inside one region: see [`GuestMemory::pieces`].
    #[inline]
    pub fn segment(&self, gpa: u64, len: u32) -> Option<Segment<'_>> {
        // SAFETY: `resolve` proved the range to lie inside a mapping that `self`, borrowed for the result's life, owns.
        self.resolve(gpa, len).map(|ptr| unsafe { Segment::from_raw(ptr, len) })
    }

    /// `len` bytes at `gpa`, to be written. `None` if they are not all inside one region.
    #[inline]
    pub fn room(&self, gpa: u64, len: u32) -> Option<Room<'_>> {
        // SAFETY: as for `segment`.
        self.resolve(gpa, len).map(|ptr| unsafe { Room::from_raw(ptr, len, gpa, self.log.as_ref()) })
    }

    /// Splits a range that may cross region borders into pieces that do not.
    ///
    /// Returns false if any byte of it lies in no region (what was visited until then is to be discarded).
    pub fn pieces(&self, mut gpa: u64, mut len: u32, mut visit: impl FnMut(u64, u32)) -> bool {
        while len > 0 {
            let Some(region) = self.find(gpa) else { return false };
            let left = region.len - (gpa - region.guest);
            let piece = u32::try_from(left).unwrap_or(u32::MAX).min(len);
            visit(gpa, piece);
            len -= piece;
            let Some(next) = gpa.checked_add(u64::from(piece)) else { return len == 0 };
            gpa = next;
        }
        true
    }

    /// Finds `len` bytes at `user`, an address in the peer's own process, aligned to `align` bytes.
    ///
    /// Used for rings, whose memory stays mapped for as long as the returned [`RingMemory`] lives.
    pub fn ring_memory(&self, user: u64, len: usize, align: usize) -> Option<RingMemory> {
        let region = self.regions.iter().find(|region| user.wrapping_sub(region.user) < region.len)?;
        let inside = user - region.user;
        if len as u64 > region.len - inside {
            return None;
        }
        let ptr = region.host(inside);
        let gpa = region.guest + inside;
        ((ptr as usize).is_multiple_of(align)).then(|| RingMemory {
            ptr,
            len,
            gpa,
            _keep: Arc::clone(&region.mapping),
        })
    }
}

/// A ring's bytes, kept mapped by this value. Only the `ring` module reads or writes through it.
#[derive(Debug)]
pub struct RingMemory {
    ptr: *mut u8,
    len: usize,
    gpa: u64,
    _keep: Arc<Mapping>,
}

// SAFETY: the pointer refers to a shared mapping, which is owned (`_keep`) and valid on every thread.
unsafe impl Send for RingMemory {}
// SAFETY: as above; all access goes through atomics or volatile copies in the `ring` module.
unsafe impl Sync for RingMemory {}

impl RingMemory {
    pub(crate) fn ptr(&self) -> *mut u8 {
        self.ptr
    }

    /// Bytes.
    #[expect(clippy::len_without_is_empty, reason = "a ring is never empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Guest-physical address of the first byte, for the dirty log.
    pub fn gpa(&self) -> u64 {
        self.gpa
    }
}

#[cfg(test)]
mod tests;
