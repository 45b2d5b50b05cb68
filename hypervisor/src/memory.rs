//! A guest's memory: one sealed memfd, mapped once for checked access and once for KVM.
//!
//! Guest-physical layout: memory from 0 up to [`HOLE`], and what is left from [`HIGH`] on. The file has the guest's *maximum*;
//! the first bytes of it, as many as the guest starts with, are announced at boot, and the rest is there to be hot-added. Pages
//! that nobody touched cost nothing. Unless memory is dynamic, huge ones are asked for: each costs an exit when it is touched first.

// UNSAFETY: none here; host addresses are handed out as integers, and `kvm` registers them.
#![forbid(unsafe_code)]

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{FallocateFlags, SealFlags};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmq::memory::{GuestMemory, Mapping, MappingError, Region, RegionError, prefer_huge_pages};

use crate::control;

/// Where low memory ends at most: above it lie the addresses of devices.
pub const HOLE: u64 = 3 << 30;

/// Where memory goes on.
pub const HIGH: u64 = 4 << 30;

/// Sizes are multiples of this: a huge page.
pub const GRAIN: u64 = 2 << 20;

/// Why there is no memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Sizes that make no sense together.
    #[error(
        "memory sizes: minimum {minimum}, startup {startup} and maximum {maximum} bytes must be multiples of 2 MiB in this order"
    )]
    Sizes {
        /// Least.
        minimum: u64,
        /// At start.
        startup: u64,
        /// Most.
        maximum: u64,
    },
    /// The file cannot be made or mapped; with huge pages the pool may be too small.
    #[error(transparent)]
    Mapping(#[from] MappingError),
    /// The regions are refused.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// KVM's mapping fails.
    #[error("cannot map guest memory for the processors: {0}")]
    Processors(String),
    /// An operation on the file fails.
    #[error("cannot {what} guest memory")]
    File {
        /// What was to be done.
        what: &'static str,
        /// The kernel's reason.
        #[source]
        source: rustix::io::Errno,
    },
}

/// A range for KVM to map into the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// First guest-physical address.
    pub guest: u64,
    /// Bytes.
    pub len: u64,
    /// First address in this process.
    pub host: u64,
}

/// The memory of one guest. Lives longer than the virtual machines that use it (a reset makes a new one).
#[derive(Debug)]
pub struct Memory {
    fd: OwnedFd,
    guest: Arc<GuestMemory>,
    processors: GuestMemoryMmap,
    startup: u64,
    maximum: u64,
    /// All of its pages are set aside, so that none is missing when it is touched.
    whole: bool,
}

impl Memory {
    /// Memory of the given sizes, all zero.
    ///
    /// # Errors
    /// See [`MemoryError`].
    pub fn new(name: &str, sizes: control::Memory) -> Result<Self, MemoryError> {
        let control::Memory { minimum, startup, maximum, huge } = sizes;
        let wrong = MemoryError::Sizes { minimum, startup, maximum };
        let aligned = [minimum, startup, maximum].iter().all(|size| size.is_multiple_of(GRAIN));
        if !aligned || minimum == 0 || minimum > startup || startup > maximum {
            return Err(wrong);
        }
        let len = usize::try_from(maximum).map_err(|_| wrong)?;
        let (mapping, fd) = if huge { Mapping::huge_memfd(name, len) } else { Mapping::memfd(name, len) }?;
        // Whoever maps it can rely on its size.
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        let failed = |what| move |source| MemoryError::File { what, source };
        rustix::fs::fcntl_add_seals(&fd, seals).map_err(failed("seal"))?;

        let mapping = Arc::new(mapping);
        let ranges = ranges(maximum);
        let regions = ranges
            .iter()
            .map(|&(guest, len, offset)| Region::new(guest, guest, len, Arc::clone(&mapping), offset));
        let guest = Arc::new(GuestMemory::new(regions.collect::<Result<_, _>>()?, None)?);
        let processors = for_processors(&fd, &ranges)?;
        if sizes.asks_for_huge_pages() {
            mapping.prefer_huge_pages();
            processors.iter().for_each(|region| prefer_huge_pages(region.as_ptr(), region.size()));
        }
        Ok(Self { fd, guest, processors, startup, maximum, whole: huge })
    }

    /// Checked access.
    pub fn guest(&self) -> &Arc<GuestMemory> {
        &self.guest
    }

    /// The file, to be handed to the switch.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The whole of it as (guest-physical address, bytes, offset in the file).
    pub fn regions(&self) -> Vec<(u64, u64, u64)> {
        ranges(self.maximum)
    }

    /// What the guest is told of at boot, as (guest-physical address, bytes).
    pub fn at_boot(&self) -> Vec<(u64, u64)> {
        ranges(self.startup).into_iter().map(|(guest, len, _)| (guest, len)).collect()
    }

    /// What can be hot-added, as (guest-physical address, bytes).
    pub fn to_add(&self) -> Vec<(u64, u64)> {
        let mut rest = Vec::new();
        for (guest, len, offset) in ranges(self.maximum) {
            let taken = self.startup.saturating_sub(offset).min(len);
            if taken < len {
                rest.push((guest + taken, len - taken));
            }
        }
        rest
    }

    /// Bytes at start.
    pub fn startup(&self) -> u64 {
        self.startup
    }

    /// What KVM maps into the guest.
    pub fn slots(&self) -> Vec<Slot> {
        let host = |guest| self.processors.get_host_address(GuestAddress(guest)).ok();
        ranges(self.maximum)
            .into_iter()
            .filter_map(|(guest, len, _)| Some(Slot { guest, len, host: host(guest)? as u64 }))
            .collect()
    }

    /// For the loader of kernels.
    pub(crate) fn loader(&self) -> &GuestMemoryMmap {
        &self.processors
    }

    /// Gives the pages of a range back to the host; they read as zero when they are touched again.
    ///
    /// # Errors
    /// The range is not inside one part of the memory, or the kernel refuses.
    pub fn discard(&self, guest: u64, len: u64) -> Result<(), MemoryError> {
        let offset = ranges(self.maximum).into_iter().find_map(|(first, bytes, offset)| {
            let inside = guest.checked_sub(first)?;
            (inside < bytes && len <= bytes - inside).then_some(offset + inside)
        });
        let failed = |source| MemoryError::File { what: "give back", source };
        let offset = offset.ok_or(failed(rustix::io::Errno::INVAL))?;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&self.fd, flags, offset, len).map_err(failed)
    }

    /// Forgets everything: a guest is about to be started anew.
    ///
    /// # Errors
    /// The kernel refuses; or others took huge pages meanwhile, and the pool is too small.
    pub fn clear(&self) -> Result<(), MemoryError> {
        ranges(self.maximum).into_iter().try_for_each(|(guest, len, _)| self.discard(guest, len))?;
        if self.whole {
            let failed = |source| MemoryError::File { what: "set aside huge pages for", source };
            rustix::fs::fallocate(&self.fd, FallocateFlags::empty(), 0, self.maximum).map_err(failed)?;
        }
        Ok(())
    }
}

/// The first `size` bytes of the layout as (guest-physical address, bytes, offset in the file).
fn ranges(size: u64) -> Vec<(u64, u64, u64)> {
    let low = size.min(HOLE);
    let mut ranges = vec![(0, low, 0)];
    if size > low {
        ranges.push((HIGH, size - low, low));
    }
    ranges
}

fn for_processors(fd: &OwnedFd, ranges: &[(u64, u64, u64)]) -> Result<GuestMemoryMmap, MemoryError> {
    let refused = |error: &dyn std::fmt::Display| MemoryError::Processors(error.to_string());
    let mut parts = Vec::new();
    for &(guest, len, offset) in ranges {
        let len = usize::try_from(len).map_err(|error| refused(&error))?;
        let file = File::from(fd.try_clone().map_err(|error| refused(&error))?);
        parts.push((GuestAddress(guest), len, Some(FileOffset::new(file, offset))));
    }
    GuestMemoryMmap::from_ranges_with_files(parts).map_err(|error| refused(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn sizes(minimum: u64, startup: u64, maximum: u64) -> control::Memory {
        control::Memory { minimum, startup, maximum, huge: false }
    }

    #[test]
    fn memory_above_three_gib_goes_on_at_four() {
        let memory = Memory::new("guest", sizes(2 * MIB, 3 << 30, 5 << 30)).unwrap();
        assert_eq!(memory.regions(), [(0, 3 << 30, 0), (4 << 30, 2 << 30, 3 << 30)]);
        assert_eq!(memory.at_boot(), [(0, 3 << 30)]);
        assert_eq!(memory.to_add(), [(4 << 30, 2 << 30)]);
        let slots = memory.slots();
        assert_eq!((slots[0].guest, slots[1].guest), (0, 4 << 30));
        assert!(memory.guest().segment(HOLE, 1).is_none());
        assert!(memory.guest().segment((6 << 30) - 1, 1).is_some());
    }

    #[test]
    fn rest_of_a_part_can_be_added() {
        let memory = Memory::new("guest", sizes(64 * MIB, 128 * MIB, 256 * MIB)).unwrap();
        assert_eq!(memory.to_add(), [(128 * MIB, 128 * MIB)]);
        let all = Memory::new("guest", sizes(64 * MIB, 64 * MIB, 64 * MIB)).unwrap();
        assert!(all.to_add().is_empty());
    }

    #[test]
    fn sizes_out_of_order_or_unaligned_are_refused() {
        for (minimum, startup, maximum) in [
            (0, 2 * MIB, 2 * MIB),
            (4 * MIB, 2 * MIB, 4 * MIB),
            (2 * MIB, 4 * MIB, 2 * MIB),
            (1, 2 * MIB, 4 * MIB),
        ] {
            let result = Memory::new("guest", sizes(minimum, startup, maximum));
            assert!(matches!(result, Err(MemoryError::Sizes { .. })), "{minimum} {startup} {maximum}");
        }
    }

    #[test]
    fn discarded_pages_read_as_zero_through_every_mapping() {
        use vm_memory::Bytes;
        let memory = Memory::new("guest", sizes(2 * MIB, 2 * MIB, 2 * MIB)).unwrap();
        memory.loader().write_obj(7u64, GuestAddress(MIB)).unwrap();
        assert_eq!(memory.guest().segment(MIB, 8).unwrap().read(), Some(7u64.to_le_bytes()));
        memory.discard(MIB, 4096).unwrap();
        assert_eq!(memory.guest().segment(MIB, 8).unwrap().read(), Some([0; 8]));
        assert!(memory.discard(2 * MIB - 4096, 8192).is_err());
        assert!(memory.discard(4 * MIB, 4096).is_err());
    }

    #[test]
    fn cleared_memory_is_zero_and_has_its_pages_if_it_had_all() {
        use vm_memory::Bytes;
        let mut memory = Memory::new("guest", sizes(2 * MIB, 2 * MIB, 2 * MIB)).unwrap();
        for whole in [false, true] {
            // As with huge pages, which a machine for tests may not have.
            memory.whole = whole;
            memory.loader().write_obj(7u64, GuestAddress(MIB)).unwrap();
            memory.clear().unwrap();
            let blocks = rustix::fs::fstat(memory.fd()).unwrap().st_blocks;
            assert_eq!(blocks * 512, if whole { 2 << 20 } else { 0 });
            assert_eq!(memory.guest().segment(MIB, 8).unwrap().read(), Some([0; 8]));
        }
    }

    /// Whether the kernel was asked for huge pages, for each mapping of the memfd `name`.
    fn asked(name: &str) -> Vec<bool> {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let (mut ours, mut asked) = (false, Vec::new());
        for line in maps.lines() {
            match line.split_once(':') {
                Some(("VmFlags", flags)) if ours => asked.push(flags.contains(" hg")),
                Some((key, _)) if !key.contains('-') => {}
                // A mapping's first line has a range of addresses, and colons in its device.
                _ => ours = line.contains(&format!("/memfd:{name} ")),
            }
        }
        asked
    }

    #[test]
    fn both_mappings_ask_for_huge_pages_unless_memory_is_dynamic() {
        if !std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists() {
            eprintln!("skipped: no transparent huge pages here");
            return;
        }
        let _fixed = Memory::new("fixed", sizes(4 * MIB, 4 * MIB, 4 * MIB)).unwrap();
        let _dynamic = Memory::new("dynamic", sizes(2 * MIB, 4 * MIB, 4 * MIB)).unwrap();
        assert_eq!((asked("fixed"), asked("dynamic")), (vec![true; 2], vec![false; 2]));
    }

    #[test]
    fn file_cannot_be_cut() {
        let memory = Memory::new("guest", sizes(2 * MIB, 2 * MIB, 2 * MIB)).unwrap();
        assert!(rustix::fs::ftruncate(memory.fd(), MIB).is_err());
    }
}
