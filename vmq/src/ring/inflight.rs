//! The in-flight record of vhost-user (`VHOST_USER_GET/SET_INFLIGHT_FD`): where a successor resumes after a crash.
//!
//! Our queues complete buffers in the order in which they were taken, so what is in flight is exactly the stretch
//! between the used and the available position, and a successor resumes at the used position. The per-buffer entries
//! of the record are therefore left "not in flight": whoever takes over finds those buffers still available. A split
//! ring's used index stands in the ring itself; a packed ring's stands only here, guarded by the old/new pair that the
//! specification gives for a crash between the two writes.
//!
//! Source: vhost-user protocol, "Inflight I/O tracking" (`QueueRegionSplit`, `QueueRegionPacked`).

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};

use crate::memory::Mapping;

const VERSION: usize = 8;
const DESC_NUM: usize = 10;
/// Split: `last_batch_head` at 12, `used_idx` at 14.
const SPLIT_USED: usize = 14;
/// Packed: `free_head` 12, `old_free_head` 14, then one aligned word of `used_idx`, `old_used_idx`,
/// `used_wrap_counter`, `old_used_wrap_counter` and two bytes of padding. It is read and written whole, so that no
/// crash leaves a position with another one's wrap counter.
const PACKED_POSITIONS: usize = 16;

/// A position in a packed ring and its wrap counter.
type Position = (u16, bool);

/// Where tests let the process end, in effect. Between any two points lies one store that a successor can see.
#[cfg(not(test))]
#[inline(always)]
fn crash_point() {}

#[cfg(test)]
use super::tests::crash_point;

/// One queue's part of the record.
#[derive(Debug)]
pub struct Inflight {
    mapping: Arc<Mapping>,
    offset: usize,
    packed: bool,
}

impl Inflight {
    /// Bytes that the record of a queue with `size` entries takes, a multiple of 64.
    pub fn len_for(size: u16, packed: bool) -> usize {
        let (header, entry) = if packed { (32, 32) } else { (16, 16) };
        (header + entry * usize::from(size)).next_multiple_of(64)
    }

    /// The record of a queue with `size` entries, `offset` bytes into `mapping`; `None` if it does not fit.
    pub fn new(mapping: Arc<Mapping>, offset: usize, size: u16, packed: bool) -> Option<Self> {
        let end = offset.checked_add(Self::len_for(size, packed))?;
        (end <= mapping.len() && offset.is_multiple_of(8)).then_some(Self { mapping, offset, packed })
    }

    fn u16_at(&self, at: usize) -> &AtomicU16 {
        debug_assert!(at + 2 <= 32 && at.is_multiple_of(2));
        // SAFETY: the record, at least 64 bytes from an offset that is a multiple of 8, lies inside the mapping.
        unsafe { AtomicU16::from_ptr(self.mapping.as_ptr().add(self.offset + at).cast()) }
    }

    fn positions(&self) -> &AtomicU64 {
        // SAFETY: as `u16_at`; the word starts 16 bytes into the record, so it is aligned to 8.
        unsafe { AtomicU64::from_ptr(self.mapping.as_ptr().add(self.offset + PACKED_POSITIONS).cast()) }
    }

    /// The position at which to resume a packed ring of `size` entries (with its wrap counter), if the record was in
    /// use before. `is_available` tells whether the descriptor at a position is still as the driver made it
    /// available in the round of that wrap counter.
    pub fn resume_packed(&self, size: u16, is_available: impl Fn(u16, bool) -> bool) -> Option<Position> {
        if self.u16_at(VERSION).load(Ordering::Relaxed) != 1
            || self.u16_at(DESC_NUM).load(Ordering::Relaxed) != size
        {
            return None;
        }
        let [n0, n1, o0, o1, n_wrap, o_wrap, ..] = self.positions().load(Ordering::Relaxed).to_le_bytes();
        let new = (u16::from_le_bytes([n0, n1]), n_wrap != 0);
        let old = (u16::from_le_bytes([o0, o1]), o_wrap != 0);
        if new.0 >= size || old.0 >= size {
            return None;
        }
        // Crashed between the record and the ring: the ring tells whether the step became visible. Not "is it marked
        // used": the driver may have taken the buffer back and made the slot available for the next round.
        Some(if new != old && is_available(old.0, old.1) { old } else { new })
    }

    /// Starts the record for a ring of `size` entries that is at `used` now.
    pub(super) fn start(&self, size: u16, used: u16, wrap: bool) {
        self.u16_at(DESC_NUM).store(size, Ordering::Relaxed);
        self.settle(used, wrap);
        self.u16_at(VERSION).store(1, Ordering::Release);
    }

    /// A packed ring is about to move from `old` to `new`.
    #[inline]
    pub(super) fn prepare(&self, old: Position, new: Position) {
        let ([o0, o1], [n0, n1]) = (old.0.to_le_bytes(), new.0.to_le_bytes());
        let word = [n0, n1, o0, o1, u8::from(new.1), u8::from(old.1), 0, 0];
        crash_point();
        self.positions().store(u64::from_le_bytes(word), Ordering::Release);
        crash_point();
    }

    /// The ring has shown the driver everything up to `used`.
    #[inline]
    pub(super) fn settle(&self, used: u16, wrap: bool) {
        if self.packed {
            self.prepare((used, wrap), (used, wrap));
        } else {
            self.u16_at(SPLIT_USED).store(used, Ordering::Release);
        }
    }
}
