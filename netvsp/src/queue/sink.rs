//! What a guest receives: a burst's frames into sections, one packet and one interrupt for all of them.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vmbus::ring::TransferRange;
use vmq::frame::{Accepts, Burst, Frame};
use vmq::memory::Next;
use vmq::worker::Nanos;
use vswitch::DropReason;
use vswitch::backend::{BackendFault, FrameSink};
use vswitch::tally::Tally;

use super::{Channel, Half, Moved, QueueFault, ReceivePath};
use crate::nic::Device;
use crate::receive::{Layout, Target};

/// The ring to the guest.
#[derive(Debug)]
pub(crate) struct Sink {
    device: Arc<Device>,
    channel: Arc<Channel>,
}

impl Sink {
    pub(crate) fn new(device: Arc<Device>, channel: Arc<Channel>) -> Self {
        Self { device, channel }
    }
}

impl FrameSink for Sink {
    fn accepts(&self) -> Accepts {
        Accepts::from_bits_truncate(self.channel.accepts.load(Ordering::Relaxed))
    }

    fn put(
        &mut self,
        _now: Nanos,
        burst: &Burst<'_>,
        list: &[u8],
        tally: &mut Tally,
    ) -> Result<bool, BackendFault> {
        let mut half = self.channel.half();
        let path = Arc::clone(&half.path);
        let Some(receive) = path.receive.as_ref().filter(|receive| !receive.form.filter.is_empty()) else {
            tally.drop_many(DropReason::NotReady, list.len());
            self.channel.received.add(&Moved { dropped: list.len() as u64, ..Moved::default() });
            return Ok(false);
        };
        let mut moved = Moved::default();
        let put = half.put(receive, burst, list, tally, &mut moved);
        // Each frame was moved or dropped.
        moved.dropped = (list.len() as u64).saturating_sub(moved.total());
        self.channel.received.add(&moved);
        if receive.pages.lost() {
            return Err(self.device.faulted(QueueFault::MemoryLost));
        }
        put.map_err(|fault| self.device.faulted(fault))?;
        let signal = half.publish();
        // An interrupt may make us wait: nobody else, then.
        drop(half);
        let interrupted = self.channel.interrupt_if(signal);
        interrupted.map(|()| signal).map_err(|fault| self.device.faulted(fault))
    }
}

/// So many sections before one is written, its first lines are fetched from the guest's processor.
const AHEAD: usize = 5;

/// Where about the tail of a frame begins in its section: behind the RNDIS header and the frame's head.
const TAIL_AT: u32 = 44 + 64;

impl ReceivePath {
    /// Fetches the first lines of `section`, to be written soon.
    #[inline]
    fn fetch(&self, section: u32) {
        let at = section.checked_mul(self.form.section_size);
        let rooms = at.and_then(|at| self.pages.rooms(at, self.form.section_size));
        if let Some(room) = rooms.and_then(|mut rooms| rooms.next()) {
            room.prefetch(64);
        }
    }

    /// Where the copy after this one reads and writes, if `next` goes to `section`.
    #[inline]
    fn next(&self, burst: &Burst<'_>, next: &Frame, section: u32) -> Option<Next> {
        let tail = *burst.tail(next).first()?;
        let at = section.checked_mul(self.form.section_size)?.checked_add(TAIL_AT)?;
        let room =
            self.pages.rooms(at, tail.len().min(self.form.section_size.saturating_sub(TAIL_AT)))?.next()?;
        Some(Next::new(tail, room))
    }
}

impl Half {
    fn put(
        &mut self,
        receive: &ReceivePath,
        burst: &Burst<'_>,
        list: &[u8],
        tally: &mut Tally,
        moved: &mut Moved,
    ) -> Result<(), QueueFault> {
        let mut count = Moved::default();
        let mut following =
            list.iter().filter_map(|&index| burst.frames().get(usize::from(index))).peekable();
        while let Some(frame) = following.next() {
            if !receive.form.wants(frame) {
                tally.drop(DropReason::NotReady);
                continue;
            }
            let Some(layout) = receive.form.layout(frame) else {
                tally.drop(DropReason::NoBuffer);
                continue;
            };
            if self.chain.len() + layout.sections > receive.most {
                self.finish_packet(receive, &mut count, tally, moved)?;
            }
            if layout.sections > receive.most {
                tally.drop(DropReason::NoBuffer);
            } else if receive.sections.fill(&mut self.stock, layout.sections) {
                let next = following.peek().copied();
                self.add(receive, burst, frame, next, &layout, &mut count);
            } else {
                tally.drop(DropReason::QueueFull);
            }
        }
        self.finish_packet(receive, &mut count, tally, moved)
    }

    #[inline]
    fn add(
        &mut self,
        receive: &ReceivePath,
        burst: &Burst<'_>,
        frame: &Frame,
        next: Option<&Frame>,
        layout: &Layout,
        count: &mut Moved,
    ) {
        if let Some(&later) = self.stock.len().checked_sub(AHEAD).and_then(|at| self.stock.get(at)) {
            receive.fetch(later);
        }
        let before = self.chain.len();
        let at = self.stock.len() - layout.sections;
        self.chain.extend(self.stock.drain(at..).rev());
        let next =
            next.zip(self.stock.last()).and_then(|(next, section)| receive.next(burst, next, *section));
        let Self { chain, ranges, .. } = self;
        let range = |len, at| ranges.push(TransferRange::new(len, at));
        // It can only fail if the buffer is not there, and that it is was checked when it was mapped.
        let target =
            Target { pages: &receive.pages, sections: &chain[before..], next: next.unwrap_or(Next::NONE) };
        receive.form.write(burst, frame, layout, &target, range);
        count.count(frame);
    }

    fn finish_packet(
        &mut self,
        receive: &ReceivePath,
        count: &mut Moved,
        tally: &mut Tally,
        moved: &mut Moved,
    ) -> Result<(), QueueFault> {
        let count = std::mem::take(count);
        if self.write_packet(receive, false)? {
            tally.frames += count.total();
            tally.bytes += count.bytes;
            moved.bytes += count.bytes;
            moved.frames.iter_mut().zip(count.frames).for_each(|(sum, more)| *sum += more);
        } else {
            tally.drop_many(DropReason::QueueFull, usize::try_from(count.total()).unwrap_or(usize::MAX));
        }
        Ok(())
    }
}
