//! What a guest receives: a burst's frames into sections, one packet and one interrupt for all of them.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vmbus::ring::TransferRange;
use vmq::frame::{Accepts, Burst, Frame};
use vmq::worker::Nanos;
use vswitch::DropReason;
use vswitch::backend::{BackendFault, FrameSink};
use vswitch::tally::Tally;

use super::{Channel, Half, QueueFault, ReceivePath};
use crate::nic::Device;
use crate::sections::MAX_CHAIN;

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
            return Ok(false);
        };
        let put = half.put(receive, burst, list, tally);
        if receive.pages.lost() {
            return Err(self.device.faulted(QueueFault::MemoryLost));
        }
        put.map_err(|fault| self.device.faulted(fault))?;
        Ok(self.channel.show(&mut half))
    }
}

/// What the frames of a packet in the making come to.
#[derive(Debug, Default, Clone, Copy)]
struct Count {
    frames: u64,
    bytes: u64,
}

impl Half {
    fn put(
        &mut self,
        receive: &ReceivePath,
        burst: &Burst<'_>,
        list: &[u8],
        tally: &mut Tally,
    ) -> Result<(), QueueFault> {
        let mut count = Count::default();
        for &index in list {
            let Some(frame) = burst.frames().get(usize::from(index)) else { continue };
            if !receive.form.wants(frame) {
                tally.drop(DropReason::NotReady);
                continue;
            }
            let Some(layout) = receive.form.layout(frame) else {
                tally.drop(DropReason::NoBuffer);
                continue;
            };
            if self.chain.len() + layout.sections > MAX_CHAIN {
                self.finish_packet(receive, &mut count, tally)?;
            }
            if layout.sections > MAX_CHAIN {
                tally.drop(DropReason::NoBuffer);
            } else if receive.sections.fill(&mut self.stock, layout.sections) {
                self.add(receive, burst, frame, &layout, &mut count);
            } else {
                tally.drop(DropReason::QueueFull);
            }
        }
        self.finish_packet(receive, &mut count, tally)
    }

    #[inline]
    fn add(
        &mut self,
        receive: &ReceivePath,
        burst: &Burst<'_>,
        frame: &Frame,
        layout: &crate::receive::Layout,
        count: &mut Count,
    ) {
        let before = self.chain.len();
        let at = self.stock.len() - layout.sections;
        self.chain.extend(self.stock.drain(at..).rev());
        let Self { chain, ranges, .. } = self;
        let range = |len, at| ranges.push(TransferRange::new(len, at));
        // It can only fail if the buffer is not there, and that it is was checked when it was mapped.
        receive.form.write(burst, frame, layout, &receive.pages, &chain[before..], range);
        count.frames += 1;
        count.bytes += u64::from(frame.len);
    }

    fn finish_packet(
        &mut self,
        receive: &ReceivePath,
        count: &mut Count,
        tally: &mut Tally,
    ) -> Result<(), QueueFault> {
        let Count { frames, bytes } = std::mem::take(count);
        if self.write_packet(receive, false)? {
            tally.frames += frames;
            tally.bytes += bytes;
        } else {
            tally.drop_many(DropReason::QueueFull, usize::try_from(frames).unwrap_or(usize::MAX));
        }
        Ok(())
    }
}
