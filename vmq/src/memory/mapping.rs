//! A shared mapping of a file that somebody else may hold, too.

use std::ffi::c_void;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use rustix::fs::MemfdFlags;

use super::share::{Place, Share};
use super::sigbus;
use super::table::prefer_huge_pages;

/// A file mapped for reading and writing, shared with whoever else maps it. Unmapped when dropped.
///
/// If the other side cuts the file short, touching a page beyond its end does not kill the process: the range is
/// replaced by zeroes and [`Mapping::lost`] turns true.
#[derive(Debug)]
pub struct Mapping {
    ptr: NonNull<u8>,
    len: usize,
    /// Whole pages of the file's own size: huge ones are neither unmapped nor replaced in part.
    whole: usize,
    guard: sigbus::Guard,
    /// Given back last, when the range is watched no longer.
    _place: Place,
}

// SAFETY: a shared mapping is valid on every thread; bytes are only touched through raw copies and atomics.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

/// Why a file could not be mapped.
#[derive(Debug, thiserror::Error)]
pub enum MappingError {
    /// The kernel refused.
    #[error("cannot map {len} bytes at offset {offset}")]
    Map {
        /// Bytes asked for.
        len: usize,
        /// Offset in the file.
        offset: u64,
        /// The kernel's reason.
        #[source]
        source: rustix::io::Errno,
    },
    /// The file is shorter than what is to be mapped, so some of it would fault.
    #[error("file has {size} bytes, {needed} are to be mapped")]
    Short {
        /// The file's size.
        size: u64,
        /// What was to be mapped.
        needed: u64,
    },
    /// Nothing to map.
    #[error("mapping of 0 bytes")]
    Empty,
    /// A file whose pages somebody may have to fetch first.
    #[error("file is not in memory (a memfd, shared memory or huge pages)")]
    NotInMemory,
    /// The process keeps track of so many, and all are in use or promised to others.
    #[error("none is left of {0} mappings, which all ports share")]
    TooMany(usize),
    /// More addresses than a peer may have, or than the process has for all of them.
    #[error("no addresses are left for {0} bytes: a peer gets at most {MOST} TiB, and all ports share 96", MOST = Share::MOST_BYTES >> 40)]
    TooMuch(usize),
}

/// The largest pages there are.
const LARGEST_PAGE: usize = 1 << 30;

impl Mapping {
    /// As [`Mapping::shared`], of a file that a peer sent. Only files in memory know seals; a page of any other may be a
    /// page fault that some server, of the peer's choice, answers when it likes.
    ///
    /// # Errors
    /// As [`Mapping::shared`], or the file is not in memory.
    pub fn from_peer(fd: BorrowedFd<'_>, offset: u64, len: usize) -> Result<Self, MappingError> {
        Self::from_peer_in(None, fd, offset, len)
    }

    /// As [`Mapping::from_peer`], of the peer that has `share`.
    ///
    /// # Errors
    /// As [`Mapping::from_peer`].
    pub fn from_peer_in(
        share: Option<&Arc<Share>>,
        fd: BorrowedFd<'_>,
        offset: u64,
        len: usize,
    ) -> Result<Self, MappingError> {
        if rustix::fs::fcntl_get_seals(fd).is_err() {
            return Err(MappingError::NotInMemory);
        }
        Self::map(share, fd, offset, len)
    }

    /// Maps `len` bytes of `fd` from `offset`, which must be a multiple of the page size.
    ///
    /// # Errors
    /// The file is shorter than `offset + len`, or the kernel refuses.
    pub fn shared(fd: BorrowedFd<'_>, offset: u64, len: usize) -> Result<Self, MappingError> {
        Self::map(None, fd, offset, len)
    }

    fn map(
        share: Option<&Arc<Share>>,
        fd: BorrowedFd<'_>,
        offset: u64,
        len: usize,
    ) -> Result<Self, MappingError> {
        if len == 0 {
            return Err(MappingError::Empty);
        }
        let source = |source| MappingError::Map { len, offset, source };
        let needed = offset.checked_add(len as u64).ok_or(source(rustix::io::Errno::OVERFLOW))?;
        let stat = rustix::fs::fstat(fd).map_err(source)?;
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        if size < needed {
            return Err(MappingError::Short { size, needed });
        }
        let page = usize::try_from(stat.st_blksize).ok().filter(|page| (1..=LARGEST_PAGE).contains(page));
        let page = page.unwrap_or(1);
        let whole = len.checked_next_multiple_of(page);
        let whole = whole.ok_or(source(rustix::io::Errno::OVERFLOW))?;
        let place = Place::take(share, whole)?;
        use rustix::mm::{MapFlags, ProtFlags, mmap};
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: a fresh address range chosen by the kernel; nothing of ours is replaced.
        let ptr = unsafe { mmap(std::ptr::null_mut(), whole, prot, flags, fd, offset) }.map_err(source)?;
        Self::guarded(ptr, len, (whole, page), place)
    }

    fn guarded(
        ptr: *mut c_void,
        len: usize,
        (whole, page): (usize, usize),
        place: Place,
    ) -> Result<Self, MappingError> {
        match (NonNull::new(ptr.cast::<u8>()), sigbus::watch(ptr as usize, whole, page)) {
            (Some(ptr), Some(guard)) => Ok(Self { ptr, len, whole, guard, _place: place }),
            _ => {
                // SAFETY: the mapping was made by the caller just now and is not used by anyone.
                let _ = unsafe { rustix::mm::munmap(ptr, whole) };
                Err(MappingError::TooMany(sigbus::SLOTS))
            }
        }
    }

    /// Makes a memfd of `len` bytes and maps it: memory that can be handed to another process.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn memfd(name: &str, len: usize) -> Result<(Self, OwnedFd), MappingError> {
        Self::memfd_with(name, len, MemfdFlags::empty())
    }

    /// As [`Mapping::memfd`], in huge pages of 2 MiB, of which `len` is a multiple.
    ///
    /// # Errors
    /// The kernel refuses, most likely because no huge pages are set aside.
    pub fn huge_memfd(name: &str, len: usize) -> Result<(Self, OwnedFd), MappingError> {
        Self::memfd_with(name, len, MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB)
    }

    fn memfd_with(name: &str, len: usize, more: MemfdFlags) -> Result<(Self, OwnedFd), MappingError> {
        let source = |source| MappingError::Map { len, offset: 0, source };
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | more;
        let fd = rustix::fs::memfd_create(name, flags).map_err(source)?;
        rustix::fs::ftruncate(&fd, len as u64).map_err(source)?;
        // Pages are set aside now, so that touching one later cannot fail.
        if more.contains(MemfdFlags::HUGETLB) {
            rustix::fs::fallocate(&fd, rustix::fs::FallocateFlags::empty(), 0, len as u64).map_err(source)?;
        }
        let mapping = Self::shared(fd.as_fd(), 0, len)?;
        Ok((mapping, fd))
    }

    /// Asks for huge pages where this mapping touches memory first.
    pub fn prefer_huge_pages(&self) {
        prefer_huge_pages(self.as_ptr(), self.whole);
    }

    /// Bytes mapped.
    #[expect(clippy::len_without_is_empty, reason = "an empty mapping cannot be made")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// True once a page turned out to be missing from the file.
    #[inline]
    pub fn lost(&self) -> bool {
        self.guard.lost()
    }

    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.ptr.as_ptr()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.guard.release();
        let mut at = 0;
        while at < self.whole {
            // In steps of the largest page, so that other threads' mappings need not wait for all of a large guest's memory.
            let step = LARGEST_PAGE.min(self.whole - at);
            // SAFETY: this value owns the range; segments, rooms and rings that point into it borrow or share this value.
            let unmap = |len| unsafe { rustix::mm::munmap(self.ptr.as_ptr().add(at).cast(), len) };
            if unmap(step).is_err() {
                // A process with all the mappings it may have cannot split one.
                let _ = unmap(self.whole - at);
                return;
            }
            at += step;
        }
    }
}
