//! What a channel has moved in one direction, as NDIS counts it.

use std::sync::atomic::{AtomicU64, Ordering};

use vmq::frame::Frame;

/// Counters of one direction. One thread writes, whoever holds the queue; any may read.
#[derive(Debug, Default)]
pub(crate) struct Traffic {
    frames: [AtomicU64; 3],
    bytes: AtomicU64,
    dropped: AtomicU64,
}

/// What a burst adds.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Moved {
    /// Frames: unicast, multicast, broadcast.
    pub(crate) frames: [u64; 3],
    pub(crate) bytes: u64,
    pub(crate) dropped: u64,
}

impl Moved {
    /// Counts `frame`.
    #[inline]
    pub(crate) fn count(&mut self, frame: &Frame) {
        let [a, b, c, d, e, f, ..] = frame.head;
        let kind = match [a, b, c, d, e, f] {
            [0xff, 0xff, 0xff, 0xff, 0xff, 0xff] => 2,
            _ => usize::from(a & 1),
        };
        self.frames[kind] += 1;
        self.bytes += u64::from(frame.len);
    }

    /// Frames of any kind.
    pub(crate) fn total(&self) -> u64 {
        self.frames.iter().sum()
    }
}

/// Adds without a locked operation: there is one writer.
#[inline]
fn add(cell: &AtomicU64, by: u64) {
    if by > 0 {
        cell.store(cell.load(Ordering::Relaxed).wrapping_add(by), Ordering::Relaxed);
    }
}

impl Traffic {
    /// Adds a burst.
    #[inline]
    pub(crate) fn add(&self, moved: &Moved) {
        for (cell, &by) in self.frames.iter().zip(&moved.frames) {
            add(cell, by);
        }
        add(&self.bytes, moved.bytes);
        add(&self.dropped, moved.dropped);
    }

    /// All so far.
    pub(crate) fn read(&self) -> Moved {
        let get = |cell: &AtomicU64| cell.load(Ordering::Relaxed);
        Moved {
            frames: self.frames.each_ref().map(get),
            bytes: get(&self.bytes),
            dropped: get(&self.dropped),
        }
    }
}
