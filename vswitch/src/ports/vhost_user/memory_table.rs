//! The guest memory a front-end has shown us, region by region.
//!
//! Front-ends name a region by a file and an offset. The file is mapped from its start, as the offset need not be a
//! multiple of a huge page; regions of one file share the mapping; and a file that is mapped already stays mapped when
//! the table changes, so that adding a region costs one region.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::fstat;
use vmq::memory::{DirtyLog, GuestMemory, Mapping, MappingError, Region, RegionError, Share};
use zerocopy::IntoBytes;

use super::message::{LogArea, MemoryRegion};

/// Regions that a guest may have: what KVM had for slots when the number was agreed on, and what QEMU asks for.
pub const MAX_SLOTS: usize = 509;

/// Why a memory region is refused.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// More descriptors than regions, or the reverse.
    #[error("{regions} memory regions with {fds} descriptors")]
    Descriptors {
        /// Regions named.
        regions: usize,
        /// Descriptors that came.
        fds: usize,
    },
    /// More than [`MAX_SLOTS`].
    #[error("more than {MAX_SLOTS} memory regions")]
    TooMany,
    /// A sum exceeds 2^64.
    #[error("{size:#x} bytes at offset {offset:#x} are no part of any file")]
    Overflow {
        /// Where it was to begin.
        offset: u64,
        /// Bytes.
        size: u64,
    },
    /// The kernel does not tell about the file.
    #[error("cannot examine the file of a memory region")]
    Examine(#[source] rustix::io::Errno),
    /// The file is too short, or cannot be mapped.
    #[error("cannot map guest memory")]
    Mapping(#[from] MappingError),
    /// The regions contradict one another.
    #[error("memory regions make no sense")]
    Region(#[from] RegionError),
    /// Two regions share addresses of the peer's process.
    #[error("memory regions at user addresses {first:#x} and {second:#x} overlap")]
    UserOverlap {
        /// The lower region.
        first: u64,
        /// The higher region.
        second: u64,
    },
    /// The region to be removed is not there.
    #[error("no memory region of {size:#x} bytes at guest address {guest:#x}")]
    Absent {
        /// Guest-physical address asked for.
        guest: u64,
        /// Bytes.
        size: u64,
    },
}

/// A file's identity. It names no other file for as long as the file is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct FileId {
    device: u64,
    inode: u64,
}

/// A mapped file.
#[derive(Debug, Clone)]
struct File {
    id: FileId,
    mapping: Arc<Mapping>,
}

#[derive(Debug, Clone)]
struct Slot {
    wire: MemoryRegion,
    file: File,
    /// How often the front-end added it and has yet to remove it.
    shown: u32,
}

impl Slot {
    fn new(wire: &MemoryRegion, file: File) -> Self {
        Self { wire: *wire, file, shown: 1 }
    }
}

/// All regions of one guest.
#[derive(Debug, Default)]
pub struct MemoryTable {
    slots: Vec<Slot>,
    log: Option<DirtyLog>,
    memory: Arc<GuestMemory>,
    /// What is mapped is of this share.
    share: Option<Arc<Share>>,
}

impl MemoryTable {
    /// No memory yet. The mappings to come are of `share`.
    pub fn new(share: Option<Arc<Share>>) -> Self {
        Self { share, ..Self::default() }
    }

    /// The memory, as rings use it.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// True if the front-end has shown no memory.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Puts `regions` in place of all others (`SET_MEM_TABLE`). On an error nothing changes, as for the next ones.
    ///
    /// # Errors
    /// [`TableError`]
    pub fn replace(&mut self, regions: &[MemoryRegion], fds: &[OwnedFd]) -> Result<(), TableError> {
        if regions.len() != fds.len() {
            return Err(TableError::Descriptors { regions: regions.len(), fds: fds.len() });
        }
        let extents =
            regions.iter().zip(fds).map(|(wire, fd)| Extent::of(wire, fd)).collect::<Result<Vec<_>, _>>()?;
        let mut files: Vec<File> = self.slots.iter().map(|slot| slot.file.clone()).collect();
        let mut slots = Vec::new();
        for (wire, extent) in regions.iter().zip(&extents) {
            let longest = extents.iter().filter(|other| other.id == extent.id).max_by_key(|other| other.len);
            let file = longest.unwrap_or(extent).map(&mut files, self.share.as_ref())?;
            slots.push(Slot::new(wire, file));
        }
        self.install(slots, self.log.clone())
    }

    /// Adds a region (`ADD_MEM_REG`).
    ///
    /// QEMU before 8.2 adds, and removes, each region once per queue pair, so the same one may come again.
    ///
    /// # Errors
    /// [`TableError`]
    pub fn add(&mut self, wire: &MemoryRegion, fd: &OwnedFd) -> Result<(), TableError> {
        let extent = Extent::of(wire, fd)?;
        let same = |slot: &&mut Slot| slot.wire.as_bytes() == wire.as_bytes() && slot.file.id == extent.id;
        if let Some(slot) = self.slots.iter_mut().find(same) {
            slot.shown = slot.shown.saturating_add(1);
            return Ok(());
        }
        if self.slots.len() >= MAX_SLOTS {
            return Err(TableError::TooMany);
        }
        let mut files: Vec<File> = self.slots.iter().map(|slot| slot.file.clone()).collect();
        let file = extent.map(&mut files, self.share.as_ref())?;
        let mut slots = self.slots.clone();
        slots.push(Slot::new(wire, file));
        self.install(slots, self.log.clone())
    }

    /// Removes the region with the guest address, user address and size of `wire` (`REM_MEM_REG`), if it was not added
    /// more often.
    ///
    /// # Errors
    /// [`TableError::Absent`]
    pub fn remove(&mut self, wire: &MemoryRegion) -> Result<(), TableError> {
        let same = |slot: &Slot| {
            slot.wire.guest == wire.guest && slot.wire.user == wire.user && slot.wire.size == wire.size
        };
        let absent = TableError::Absent { guest: wire.guest.get(), size: wire.size.get() };
        let at = self.slots.iter().position(same).ok_or(absent)?;
        if let Some(slot) = self.slots.get_mut(at).filter(|slot| slot.shown > 1) {
            slot.shown -= 1;
            return Ok(());
        }
        let mut slots = self.slots.clone();
        slots.remove(at);
        self.install(slots, self.log.clone())
    }

    /// Starts or ends the logging of writes.
    ///
    /// # Errors
    /// None that a table which was accepted could cause.
    pub fn set_log(&mut self, log: Option<DirtyLog>) -> Result<(), TableError> {
        self.install(self.slots.clone(), log)
    }

    /// Maps the dirty log (`SET_LOG_BASE`).
    ///
    /// # Errors
    /// [`TableError`] if size and offset do not fit the file.
    pub fn map_log(&self, area: &LogArea, fd: &OwnedFd) -> Result<DirtyLog, TableError> {
        let (offset, size) = (area.offset.get(), area.size.get());
        let mapping = self.map_file(offset, size, fd)?;
        DirtyLog::new(mapping, offset, size).ok_or(TableError::Overflow { offset, size })
    }

    /// Maps a file that is no guest memory from its start to `offset + size`.
    ///
    /// # Errors
    /// [`TableError`] if size and offset do not fit the file.
    pub fn map_file(&self, offset: u64, size: u64, fd: &OwnedFd) -> Result<Arc<Mapping>, TableError> {
        let extent = Extent::new(offset, size, fd)?;
        Ok(Arc::new(Mapping::from_peer_in(self.share.as_ref(), fd.as_fd(), 0, extent.len)?))
    }

    /// Bytes of regions of `before` whose file is mapped no longer.
    pub fn bytes_gone(&self, before: &GuestMemory) -> u64 {
        let kept = |mapping| self.slots.iter().any(|slot| Arc::ptr_eq(&slot.file.mapping, mapping));
        before.regions().iter().filter(|region| !kept(region.mapping())).map(|region| region.len).sum()
    }

    fn install(&mut self, slots: Vec<Slot>, log: Option<DirtyLog>) -> Result<(), TableError> {
        let regions = slots
            .iter()
            .map(|Slot { wire, file, .. }| {
                let mapping = Arc::clone(&file.mapping);
                Region::new(wire.guest.get(), wire.user.get(), wire.size.get(), mapping, wire.offset.get())
            })
            .collect::<Result<Vec<_>, _>>()?;
        check_user_addresses(&regions)?;
        self.memory = Arc::new(GuestMemory::new(regions, log.clone())?);
        (self.slots, self.log) = (slots, log);
        Ok(())
    }
}

fn check_user_addresses(regions: &[Region]) -> Result<(), TableError> {
    let mut ranges: Vec<(u64, u64)> = regions.iter().map(|region| (region.user, region.len)).collect();
    ranges.sort_unstable();
    match ranges.windows(2).find(|pair| pair[1].0 - pair[0].0 < pair[0].1) {
        Some(pair) => Err(TableError::UserOverlap { first: pair[0].0, second: pair[1].0 }),
        None => Ok(()),
    }
}

/// The part of a file, from its start, that a region needs.
struct Extent<'f> {
    id: FileId,
    fd: &'f OwnedFd,
    len: usize,
    /// The file is as long as it has to be.
    is_whole: bool,
}

impl<'f> Extent<'f> {
    fn of(wire: &MemoryRegion, fd: &'f OwnedFd) -> Result<Self, TableError> {
        Self::new(wire.offset.get(), wire.size.get(), fd)
    }

    fn new(offset: u64, size: u64, fd: &'f OwnedFd) -> Result<Self, TableError> {
        let overflow = TableError::Overflow { offset, size };
        let end = offset.checked_add(size).and_then(|end| usize::try_from(end).ok());
        let Some(len) = end else { return Err(overflow) };
        // Who has a file elsewhere could let us wait for its length.
        if rustix::fs::fcntl_get_seals(fd).is_err() {
            return Err(MappingError::NotInMemory.into());
        }
        let stat = fstat(fd).map_err(TableError::Examine)?;
        let is_whole = usize::try_from(stat.st_size).is_ok_and(|size| size >= len);
        Ok(Self { id: FileId { device: stat.st_dev, inode: stat.st_ino }, fd, len, is_whole })
    }

    /// The mapping of the extent's file: one of `files` if it is long enough, else a new one that joins them.
    fn map(&self, files: &mut Vec<File>, share: Option<&Arc<Share>>) -> Result<File, TableError> {
        let usable =
            |file: &&File| file.id == self.id && file.mapping.len() >= self.len && !file.mapping.lost();
        if let Some(file) = files.iter().find(usable).filter(|_| self.is_whole) {
            return Ok(file.clone());
        }
        let mapping = Arc::new(Mapping::from_peer_in(share, self.fd.as_fd(), 0, self.len)?);
        let file = File { id: self.id, mapping };
        files.push(file.clone());
        Ok(file)
    }
}
