//! Counters: gathered in plain numbers during a burst, then added to a queue's own cells, which nobody else writes.
//!
//! **Each frame is counted once in each direction.** Where frames come in, *frames + drops* is what the port offered: a
//! frame is moved if at least one other port is to have it, however many, and else dropped, by its queue or by the pipeline.
//! Where frames leave, *frames + drops* is what was to be handed to the port, in the form it takes: segments of a large
//! frame count each, as does a large frame made of several. So what a receiver drops is not counted at the sender.

use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam_utils::CachePadded;
use serde::Serialize;

use crate::drops::DropReason;

/// What happened to one burst.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tally {
    /// Frames moved, without those that were dropped.
    pub frames: u64,
    /// Their bytes.
    pub bytes: u64,
    /// True if `drops` has anything but zeroes.
    dropped: bool,
    drops: [u32; DropReason::COUNT],
}

impl Tally {
    /// One frame of `len` bytes was moved.
    #[inline]
    pub fn moved(&mut self, len: u32) {
        self.frames += 1;
        self.bytes += u64::from(len);
    }

    /// `count` frames were dropped.
    #[cold]
    pub fn drop_many(&mut self, reason: DropReason, count: usize) {
        self.dropped |= count > 0;
        let cell = &mut self.drops[reason as usize];
        *cell = cell.saturating_add(u32::try_from(count).unwrap_or(u32::MAX));
    }

    /// One frame was dropped.
    #[cold]
    pub fn drop(&mut self, reason: DropReason) {
        self.drop_many(reason, 1);
    }

    /// Adds the drops of another burst.
    #[cold]
    pub fn absorb(&mut self, other: &Self) {
        for (index, &count) in other.drops.iter().enumerate() {
            self.drops[index] = self.drops[index].saturating_add(count);
        }
        self.dropped |= other.dropped;
    }

    /// Frames dropped for `reason`.
    pub fn dropped(&self, reason: DropReason) -> u32 {
        self.drops[reason as usize]
    }

    /// Why a frame was dropped since the tally was `before`, if one was.
    pub fn dropped_since(&self, before: &Self) -> Option<DropReason> {
        DropReason::ALL.iter().copied().find(|&reason| self.dropped(reason) > before.dropped(reason))
    }

    /// Frames dropped for any reason.
    pub fn dropped_total(&self) -> u64 {
        self.drops.iter().map(|&count| u64::from(count)).sum()
    }
}

/// A queue's counters. One writer at a time: whoever holds the queue.
#[derive(Debug, Default)]
pub struct Counters(CachePadded<Cells>);

#[derive(Debug, Default)]
struct Cells {
    frames: AtomicU64,
    bytes: AtomicU64,
    bursts: AtomicU64,
    /// Interrupts sent to the guest (sinks and sources alike).
    calls: AtomicU64,
    /// Nanoseconds spent on bursts that were not empty.
    busy: AtomicU64,
    drops: [AtomicU64; DropReason::COUNT],
}

/// Adds without a locked operation: there is one writer.
#[inline]
fn add(cell: &AtomicU64, by: u64) {
    cell.store(cell.load(Ordering::Relaxed).wrapping_add(by), Ordering::Relaxed);
}

impl Counters {
    /// Adds a burst.
    #[inline]
    pub fn add(&self, tally: &Tally) {
        if tally.frames > 0 {
            add(&self.0.frames, tally.frames);
            add(&self.0.bytes, tally.bytes);
            add(&self.0.bursts, 1);
        }
        if tally.dropped {
            for (cell, &count) in self.0.drops.iter().zip(&tally.drops) {
                add(cell, u64::from(count));
            }
        }
    }

    /// The guest was interrupted.
    #[inline]
    pub fn called(&self) {
        add(&self.0.calls, 1);
    }

    /// `nanos` were spent on a burst.
    #[inline]
    pub fn busy(&self, nanos: u64) {
        add(&self.0.busy, nanos);
    }

    /// Nanoseconds spent on bursts that were not empty.
    pub fn busy_nanos(&self) -> u64 {
        self.0.busy.load(Ordering::Relaxed)
    }

    /// The values now.
    pub fn snapshot(&self) -> CounterValues {
        let get = |cell: &AtomicU64| cell.load(Ordering::Relaxed);
        CounterValues {
            frames: get(&self.0.frames),
            bytes: get(&self.0.bytes),
            bursts: get(&self.0.bursts),
            calls: get(&self.0.calls),
            busy_nanos: get(&self.0.busy),
            drops: DropReason::ALL
                .iter()
                .map(|&reason| (reason, get(&self.0.drops[reason as usize])))
                .filter(|&(_, count)| count > 0)
                .collect(),
        }
    }
}

/// A queue's counters at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct CounterValues {
    /// Frames moved, without those that were dropped.
    pub frames: u64,
    /// Bytes moved, from the destination address on.
    pub bytes: u64,
    /// Bursts that moved anything.
    pub bursts: u64,
    /// Interrupts sent to the guest.
    pub calls: u64,
    /// Nanoseconds spent on bursts that were not empty.
    pub busy_nanos: u64,
    /// Frames dropped, by reason; reasons that never occurred are absent.
    pub drops: std::collections::BTreeMap<DropReason, u64>,
}

impl CounterValues {
    /// Frames dropped for any reason.
    pub fn dropped(&self) -> u64 {
        self.drops.values().sum()
    }

    /// Adds another queue's counters.
    pub fn merge(&mut self, other: &Self) {
        self.frames += other.frames;
        self.bytes += other.bytes;
        self.bursts += other.bursts;
        self.calls += other.calls;
        self.busy_nanos += other.busy_nanos;
        for (&reason, &count) in &other.drops {
            *self.drops.entry(reason).or_default() += count;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn burst_of_frames_and_drops_adds_up() {
        let counters = Counters::default();
        let mut tally = Tally::default();
        tally.moved(64);
        tally.moved(1518);
        tally.drop(DropReason::Runt);
        counters.add(&tally);
        counters.add(&tally);
        let values = counters.snapshot();
        assert_eq!((values.frames, values.bytes, values.bursts), (4, 2 * 1582, 2));
        assert_eq!(values.drops, [(DropReason::Runt, 2)].into());
    }
}
