//! What a guest sends: frames into bursts, control messages to the adapter, completions of what it received.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vmbus::ring::{Incoming, Packet, PacketBuffer, PacketHeader, PacketKind};
use vmq::frame::{BURST_FRAMES, Burst};
use vmq::memory::GuestMemory;
use vmq::worker::{Nanos, Wait};
use vswitch::backend::{BackendFault, FrameSource};
use vswitch::tally::Tally;

use super::{Channel, Half, Moved, Path, QueueFault, Written};
use crate::nic::Device;
use crate::protocol::{nvsp, rndis};
use crate::transmit::{self, Bytes, PIECES, Slot};

/// Ring packets taken at once, so that a flood of completions or control messages is no burst without end.
const MAX_PACKETS: usize = 4 * BURST_FRAMES;

/// Bytes of ring packets taken at once: a guest can fill its ring with long packets that say nothing, for nothing but the
/// price of an index, and each is copied twice.
const MAX_BYTES: usize = 64 * 1024;

/// Longest ring packet taken. Linux's have 32 ranges of memory at most, and so less than 1 KiB.
const MAX_PACKET: usize = 8 * 1024;

/// Pieces of memory taken at once: a burst takes 1024 and wants room for the longest frame at any time.
const MAX_PIECES: usize = 1024 - 2 * PIECES;

/// Ring packets that are looked at before they are taken, so that the lines which they point at are on their way from the
/// guest's processor meanwhile: without it, waiting for them is most of what a small frame costs.
const AHEAD: usize = 8;

/// Bytes of a message's beginning that are fetched: RNDIS header and the headers of the frame.
const NEAR: usize = 112;

/// Bytes that a completion takes in the ring: its descriptor, the message, the trailer.
const COMPLETION_BYTES: usize = 16 + nvsp::MESSAGE_BYTES + 8;

/// How soon a ring that was full is looked at again, should the guest not say that there is room.
const RETRY: Nanos = 1_000_000;

/// The ring from the guest.
#[derive(Debug)]
pub(crate) struct Source {
    device: Arc<Device>,
    channel: Arc<Channel>,
    incoming: Incoming,
    memory: Arc<GuestMemory>,
    buffer: PacketBuffer,
    slots: Box<[Slot; BURST_FRAMES]>,
    /// Held from a burst's beginning to its end.
    path: Option<Arc<Path>>,
    /// Transactions to be completed.
    done: Vec<u64>,
    /// Sections that the guest gave back.
    back: Vec<u32>,
    /// Packets were taken and their room is not given back.
    taken: bool,
    /// Packets taken at once, so that half the ring to the guest holds their completions.
    most: usize,
    now: Nanos,
}

impl Source {
    pub(crate) fn new(
        device: Arc<Device>,
        channel: Arc<Channel>,
        incoming: Incoming,
        memory: Arc<GuestMemory>,
    ) -> Self {
        let most = (channel.ring_bytes() / (2 * COMPLETION_BYTES)).clamp(1, MAX_PACKETS);
        Self {
            most,
            device,
            channel,
            incoming,
            memory,
            buffer: PacketBuffer::with_limit(MAX_PACKET),
            slots: transmit::slots(),
            path: None,
            done: Vec::with_capacity(MAX_PACKETS),
            back: Vec::new(),
            taken: false,
            now: 0,
        }
    }

    fn take<'m>(&'m mut self, burst: &mut Burst<'m>, tally: &mut Tally) -> Result<(), BackendFault> {
        if self.taken {
            // The last burst's completions are not all in the ring: nothing more until they are.
            return Ok(());
        }
        let now = self.now;
        if self.device.throttled(now).is_some() {
            return Ok(());
        }
        let Self { device, channel, incoming, memory, buffer, slots, path, done, back, taken, most, .. } =
            self;
        let path: &'m Path = path.insert(Arc::clone(&channel.half().path));
        let limit = path.max_packets.clamp(1, BURST_FRAMES);
        let mut work = Work { path, memory, slots: &mut slots[..], limit, done, pieces: 0 };
        let before = tally.dropped_total();
        let mut packets = || {
            let mut bytes = 0;
            for count in 0..*most {
                if bytes > MAX_BYTES || !work.has_room(burst) {
                    break;
                }
                if count.is_multiple_of(AHEAD) {
                    work.look_ahead(incoming, buffer);
                }
                let Some(packet) = incoming.next(buffer)? else { break };
                bytes += packet.bytes;
                *taken = true;
                match packet.kind {
                    PacketKind::Completion => {
                        if let Some(receive) = &path.receive {
                            receive.sections.finish(channel.index, packet.transaction, back)?;
                        }
                    }
                    PacketKind::InBand | PacketKind::GpaDirect { .. } => {
                        if let Some(request) = work.message(&packet, burst, tally)? {
                            device.request(channel, request, now)?;
                            // It may have changed the path.
                            break;
                        }
                    }
                    PacketKind::TransferPages { .. } => return Err(QueueFault::Kind),
                }
            }
            if memory.lost() { Err(QueueFault::MemoryLost) } else { Ok(()) }
        };
        let outcome = packets();
        let mut moved = Moved::default();
        burst.frames().iter().for_each(|frame| moved.count(frame));
        moved.dropped = tally.dropped_total() - before;
        channel.sent.add(&moved);
        outcome.map_err(|fault| device.faulted(fault))
    }

    fn give_back(&mut self) -> Result<bool, QueueFault> {
        let Self { device, channel, incoming, memory, path, done, back, taken, .. } = self;
        let path = path.take();
        if !*taken && !channel.pending.load(Ordering::Relaxed) {
            return Ok(false);
        }
        let mut half = channel.half();
        // All of them or none: a successor that takes the packets again must find none completed. An answer that waits for
        // a section must not be waited for: what gives a section back may be among these packets.
        let all = half.flush()? != Written::NoRoom && half.fits(done.len());
        if all {
            let message = nvsp::rndis_complete(nvsp::Status::Success);
            for &transaction in &*done {
                half.outgoing.write(&PacketHeader::completion(transaction), &[&message])?;
            }
            done.clear();
        }
        let mut signal = half.publish();
        if all && *taken {
            drop(half);
            device.keep();
            half = channel.half();
            signal |= incoming.commit();
            *taken = false;
            half.release(back, path.as_deref());
            half.flush()?;
            signal |= half.publish();
        }
        channel.note_pending(&half);
        drop(half);
        if signal {
            channel.interrupt.signal();
        }
        if memory.lost() { Err(QueueFault::MemoryLost) } else { Ok(signal) }
    }
}

impl Half {
    /// True if so many completions fit the ring.
    fn fits(&mut self, completions: usize) -> bool {
        completions == 0 || self.outgoing.room(completions * COMPLETION_BYTES)
    }

    /// The guest's completions will not be read again: what they gave back is free, if the buffer is still the one of
    /// `path`. After a retry nobody knows; then it is the one there is, if any.
    fn release(&mut self, back: &mut Vec<u32>, path: Option<&Path>) {
        let same = path.is_none_or(|path| self.same_sections(path));
        if same && let Some(receive) = &self.path.receive {
            receive.sections.release(back, &mut self.stock);
        }
        back.clear();
    }
}

/// A control message that the adapter has to look at.
#[derive(Debug)]
pub(crate) enum Request {
    /// An NVSP message, its transaction, and whether a completion is wanted.
    Nvsp(Vec<u8>, u64, bool),
    /// An RNDIS control message. Its carrier is completed as any other.
    Rndis(Vec<u8>),
}

/// A burst in the making.
struct Work<'w, 'm> {
    path: &'m Path,
    memory: &'m GuestMemory,
    slots: &'m mut [Slot],
    limit: usize,
    done: &'w mut Vec<u64>,
    pieces: usize,
}

impl<'m> Work<'_, 'm> {
    fn has_room(&self, burst: &Burst<'_>) -> bool {
        burst.room() >= self.limit && self.slots.len() >= self.limit && self.pieces <= MAX_PIECES
    }

    /// Fetches what the next ring packets point at. They are looked at only: each is read again, and checked, when it is
    /// taken.
    fn look_ahead(&self, incoming: &mut Incoming, buffer: &mut PacketBuffer) {
        let mark = incoming.mark();
        for _ in 0..AHEAD {
            let Ok(Some(packet)) = incoming.next(buffer) else { break };
            match packet.kind {
                PacketKind::InBand => {
                    let section =
                        nvsp::announced(packet.payload).ok().and_then(|announced| announced.section);
                    let place = section.zip(self.path.send.as_ref()).and_then(|((index, used), send)| {
                        send.pages.segments(send.section(index, used).ok()?, used)?.next()
                    });
                    if let Some(segment) = place {
                        segment.prefetch(NEAR);
                    }
                }
                PacketKind::GpaDirect { ranges } => {
                    for (gpa, len) in ranges.iter().flat_map(|range| range.pieces()).take(2) {
                        if let Some(segment) = self.memory.segment(gpa, len) {
                            segment.prefetch(NEAR.min(len as usize));
                        }
                    }
                }
                PacketKind::Completion | PacketKind::TransferPages { .. } => {}
            }
        }
        incoming.rewind(mark);
    }

    /// Takes the frames of a message; gives back what is for the adapter.
    #[inline]
    fn message(
        &mut self,
        packet: &Packet<'_>,
        burst: &mut Burst<'m>,
        tally: &mut Tally,
    ) -> Result<Option<Request>, QueueFault> {
        let (kind, _) = nvsp::split(packet.payload)?;
        if kind != nvsp::Kind::SendRndisPacket {
            let request =
                Request::Nvsp(packet.payload.to_vec(), packet.transaction, packet.completion_requested);
            return Ok(Some(request));
        }
        let announced = nvsp::announced(packet.payload)?;
        let mut bytes = Bytes::default();
        if let Some((index, used)) = announced.section {
            self.section(index, used, &mut bytes)?;
        }
        if let PacketKind::GpaDirect { ranges } = packet.kind {
            for (gpa, len) in ranges.iter().flat_map(|range| range.pieces()) {
                self.range(gpa, len, &mut bytes)?;
            }
        }
        if packet.completion_requested {
            self.done.push(packet.transaction);
        }
        if announced.control {
            return Ok(Some(Request::Rndis(bytes.copy(rndis::MAX_CONTROL_BYTES + 1))));
        }
        self.pieces += bytes.pieces();
        transmit::frames(&bytes, self.limit, &mut self.slots, burst, tally)?;
        Ok(None)
    }

    fn section(&self, index: u32, used: u32, bytes: &mut Bytes<'m>) -> Result<(), QueueFault> {
        let nothing = QueueFault::Section { index, bytes: used, sections: 0, size: 0 };
        let send = self.path.send.as_ref().ok_or(nothing)?;
        let at = send.section(index, used)?;
        let wrong = QueueFault::Section { index, bytes: used, sections: send.count, size: send.size };
        for segment in send.pages.segments(at, used).ok_or(wrong)? {
            bytes.push(segment)?;
        }
        Ok(())
    }

    #[inline]
    fn range(&self, gpa: u64, len: u32, bytes: &mut Bytes<'m>) -> Result<(), QueueFault> {
        if let Some(segment) = self.memory.segment(gpa, len) {
            return Ok(bytes.push(segment)?);
        }
        if len > vmq::frame::MAX_FRAME + 4096 {
            // No honest range, and it may cross any number of regions.
            return Err(QueueFault::Memory { gpa, len });
        }
        let mut pushed = Ok(());
        let mapped = self.memory.pieces(gpa, len, |gpa, len| {
            if let Some(segment) = self.memory.segment(gpa, len)
                && pushed.is_ok()
            {
                pushed = bytes.push(segment);
            }
        });
        pushed?;
        if mapped { Ok(()) } else { Err(QueueFault::Memory { gpa, len }) }
    }
}

impl FrameSource for Source {
    fn receive<'m>(
        &'m mut self,
        burst: &mut Burst<'m>,
        now: Nanos,
        tally: &mut Tally,
    ) -> Result<(), BackendFault> {
        self.now = now;
        self.take(burst, tally)
    }

    fn complete(&mut self) -> Result<bool, BackendFault> {
        self.give_back().map_err(|fault| self.device.faulted(fault))
    }

    fn arm(&mut self) -> Wait {
        if self.taken {
            let wanted = self.done.len().max(1) * COMPLETION_BYTES;
            let room = self.channel.half().outgoing.wait_for_room(wanted);
            return if room { Wait::Nothing } else { Wait::Until(self.now + RETRY) };
        }
        if let Some(then) = self.device.throttled(self.now) {
            return Wait::Until(then);
        }
        if self.channel.pending.load(Ordering::Relaxed) {
            // Another channel may give back what a message waits for.
            return Wait::Until(self.now + RETRY);
        }
        if self.incoming.arm() {
            Wait::Nothing
        } else {
            Wait::Readable(Arc::clone(&self.channel.doorbell) as _)
        }
    }

    fn disarm(&mut self) {
        self.incoming.disarm();
    }
}
