//! Who gets which frames of a burst.

use std::ops::Range;

use arrayvec::ArrayVec;
use vmq::frame::{BURST_FRAMES, Frame};

use crate::drops::DropReason;
use crate::fdb::PortIndex;
use crate::tally::Tally;

/// Frames of one burst that go to the same port, by their index in the burst.
pub type List = ArrayVec<u8, BURST_FRAMES>;

/// Who gets which frames of a burst. Kept and reused by a worker.
#[derive(Debug, Default)]
pub struct Plan {
    lists: Vec<List>,
    touched: Vec<PortIndex>,
    dropped: ArrayVec<(u8, DropReason), BURST_FRAMES>,
}

impl Plan {
    pub(super) fn reset(&mut self, ports: usize) {
        for &port in &self.touched {
            self.lists[usize::from(port)].clear();
        }
        self.touched.clear();
        self.dropped.clear();
        if self.lists.len() < ports {
            self.lists.resize_with(ports, List::new);
        }
    }

    #[inline]
    pub(super) fn deliver(&mut self, port: PortIndex, frames: Range<u8>) {
        let list = &mut self.lists[usize::from(port)];
        if list.is_empty() {
            self.touched.push(port);
        }
        // Each frame is listed at most once per port, so there is room.
        let room = list.remaining_capacity();
        list.extend(frames.take(room));
    }

    /// Frames of `run` go `way`, if there is one.
    #[inline]
    pub(super) fn hand_over(
        &mut self,
        way: Option<Way>,
        run: Range<u8>,
        frames: &[Frame],
        tally: &mut Tally,
    ) {
        let Some(way) = way else { return };
        for frame in &frames[usize::from(run.start)..usize::from(run.end)] {
            tally.moved(frame.len);
        }
        self.deliver(way.port, run);
    }

    #[cold]
    pub(super) fn refuse(&mut self, index: u8, reason: DropReason, tally: &mut Tally) {
        tally.drop(reason);
        let _ = self.dropped.try_push((index, reason));
    }

    /// Receiving ports with the frames they get, each in the order of the burst.
    #[inline]
    pub fn deliveries(&self) -> impl Iterator<Item = (PortIndex, &List)> {
        self.touched.iter().map(|&port| (port, &self.lists[usize::from(port)]))
    }

    /// Frames that nobody gets, and why.
    pub fn dropped(&self) -> &[(u8, DropReason)] {
        &self.dropped
    }
}

/// The port that a destination was seen on, and its VLAN.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Way {
    pub port: PortIndex,
    pub vlan: u16,
}
