//! A word that a guest and we both change: ring indices, masks, event flags.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::{DirtyLog, GuestMemory, Mapping};

/// A little-endian 32-bit word in guest memory, kept mapped by this value.
///
/// Every access is atomic, and every change is marked in the dirty log that the memory had when the word was made.
#[derive(Debug, Clone)]
pub struct SharedWord {
    cell: NonNull<AtomicU32>,
    gpa: u64,
    log: Option<DirtyLog>,
    _keep: Arc<Mapping>,
}

// SAFETY: the cell lies in a shared mapping, which is owned (`_keep`) and valid on every thread.
unsafe impl Send for SharedWord {}
// SAFETY: as above; all access is atomic.
unsafe impl Sync for SharedWord {}

impl GuestMemory {
    /// The word at `gpa`. `None` if it is not in memory or not aligned to 4 bytes.
    pub fn word(&self, gpa: u64) -> Option<SharedWord> {
        let cell = NonNull::new(self.resolve(gpa, 4)?.cast::<AtomicU32>())?;
        let keep = Arc::clone(self.find(gpa)?.mapping());
        cell.is_aligned().then(|| SharedWord { cell, gpa, log: self.log.clone(), _keep: keep })
    }
}

impl SharedWord {
    #[inline]
    fn cell(&self) -> &AtomicU32 {
        // SAFETY: aligned and in bounds since it was made; the mapping lives as long as `self`.
        unsafe { self.cell.as_ref() }
    }

    #[inline]
    fn changed(&self) {
        if let Some(log) = &self.log {
            log.mark(self.gpa, 4);
        }
    }

    /// Guest-physical address.
    pub fn gpa(&self) -> u64 {
        self.gpa
    }

    /// Reads the word.
    #[inline]
    pub fn load(&self, order: Ordering) -> u32 {
        u32::from_le(self.cell().load(order))
    }

    /// Writes the word.
    #[inline]
    pub fn store(&self, value: u32, order: Ordering) {
        self.cell().store(value.to_le(), order);
        self.changed();
    }

    /// Writes the word and returns what stood there.
    #[inline]
    pub fn swap(&self, value: u32, order: Ordering) -> u32 {
        let before = self.cell().swap(value.to_le(), order);
        self.changed();
        u32::from_le(before)
    }

    /// Sets bits and returns the word as it was before.
    #[inline]
    pub fn fetch_or(&self, bits: u32, order: Ordering) -> u32 {
        let before = self.cell().fetch_or(bits.to_le(), order);
        self.changed();
        u32::from_le(before)
    }

    /// Keeps only `bits` and returns the word as it was before.
    #[inline]
    pub fn fetch_and(&self, bits: u32, order: Ordering) -> u32 {
        let before = self.cell().fetch_and(bits.to_le(), order);
        self.changed();
        u32::from_le(before)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Region;

    #[test]
    fn word_is_little_endian_aligned_in_bounds_and_logged() {
        let mapping = Arc::new(Mapping::memfd("guest", 0x4000).unwrap().0);
        let bitmap = Arc::new(Mapping::memfd("log", 0x1000).unwrap().0);
        let log = DirtyLog::new(Arc::clone(&bitmap), 0, 8);
        let region = Region::new(0x1000, 0, 0x4000, mapping, 0).unwrap();
        let memory = GuestMemory::new(vec![region], log).unwrap();
        for gpa in [0, 0xffc, 0x1001, 0x1002, 0x4ffe, 0x5000, u64::MAX] {
            assert!(memory.word(gpa).is_none(), "{gpa:#x}");
        }
        let word = memory.word(0x4ffc).unwrap();
        word.store(0x0102_0304, Ordering::Release);
        assert_eq!(memory.segment(0x4ffc, 4).unwrap().read(), Some([4, 3, 2, 1]));
        assert_eq!(word.fetch_or(0x10, Ordering::SeqCst), 0x0102_0304);
        assert_eq!(word.fetch_and(0xff, Ordering::SeqCst), 0x0102_0314);
        assert_eq!(word.swap(7, Ordering::AcqRel), 0x14);
        drop(memory);
        assert_eq!(word.load(Ordering::Acquire), 7);
        let log = GuestMemory::new(vec![Region::new(0, 0, 0x1000, bitmap, 0).unwrap()], None).unwrap();
        assert_eq!(log.segment(0, 2).unwrap().read(), Some([0b1_0000, 0]));
    }
}
