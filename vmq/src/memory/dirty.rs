//! The dirty-page log: one bit per 4 KiB page of guest memory that the switch wrote.
//!
//! Live migration needs it, since KVM's own log cannot see writes of another process. Marks are exact (never rounded
//! up beyond the pages touched), because over-marking keeps a migration from converging.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use super::Mapping;

/// Bytes per bit of the log (`VHOST_LOG_PAGE` of the vhost-user specification).
pub const PAGE: u64 = 4096;

/// A bitmap shared with the process that migrates the guest.
#[derive(Debug, Clone)]
pub struct DirtyLog {
    mapping: Arc<Mapping>,
    offset: usize,
    len: usize,
}

impl DirtyLog {
    /// A log of `len` bytes that begins `offset` bytes into `mapping`; `None` if the mapping is shorter.
    pub fn new(mapping: Arc<Mapping>, offset: u64, len: u64) -> Option<Self> {
        let end = offset.checked_add(len)?;
        (end <= mapping.len() as u64).then_some(())?;
        Some(Self { mapping, offset: usize::try_from(offset).ok()?, len: usize::try_from(len).ok()? })
    }

    /// True if the peer cut the log's file short.
    pub fn lost(&self) -> bool {
        self.mapping.lost()
    }

    /// Marks the pages of `len` bytes at `gpa`. Pages beyond the log's end are ignored: the peer chose its size.
    pub fn mark(&self, gpa: u64, len: u64) {
        let Some(last) = len.checked_sub(1).and_then(|rest| gpa.checked_add(rest)) else { return };
        for page in gpa / PAGE..=last / PAGE {
            let Ok(byte) = usize::try_from(page / 8) else { return };
            if byte >= self.len {
                return;
            }
            // SAFETY: `offset + byte < offset + len <= mapping.len()`; the mapping lives as long as `self`.
            let cell = unsafe { AtomicU8::from_ptr(self.mapping.as_ptr().add(self.offset + byte)) };
            let bit = 1u8 << (page % 8);
            // A locked operation even if the bit is set: it orders the data before the mark, so that a reader who
            // clears the bit afterwards and copies the page finds the data.
            cell.fetch_or(bit, Ordering::SeqCst);
        }
    }
}
