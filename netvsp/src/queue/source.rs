//! What a guest sends: frames into bursts, control messages to the adapter, completions of what it received.
//!
//! A control request ends its burst, and is carried out when the frames before it are delivered. The adapter stays locked
//! from then on until the guest has the answer, so that nobody else saves what was not answered.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vmbus::ring::{Incoming, Packet, PacketBuffer, PacketHeader, PacketKind};
use vmq::frame::{BURST_FRAMES, Burst};
use vmq::memory::GuestMemory;
use vmq::worker::{Nanos, Wait};
use vswitch::DropReason;
use vswitch::backend::{BackendFault, FrameSource};
use vswitch::tally::Tally;

use super::{COMPLETION_BYTES, Channel, Half, Moved, Path, QueueFault, Written, ring_bytes};
use crate::journal::Ends;
use crate::message::Message;
use crate::nic::{Answer, Device};
use crate::protocol::{nvsp, rndis};
use crate::sections::Sections;
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
    /// Sections that the guest gave back, and the buffer's that they are of.
    back: Vec<u32>,
    owner: Option<Arc<Sections>>,
    /// What ended the burst, and what is to come of it once there is room.
    request: Option<Request>,
    answer: Option<Answer>,
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
            owner: None,
            request: None,
            answer: None,
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
        let Self { device, channel, incoming, memory, buffer, slots, path, done, back, owner, taken, .. } =
            self;
        let (request, most) = (&mut self.request, self.most);
        let path: &'m Path = path.insert(Arc::clone(&channel.half().path));
        let limit = path.max_packets.clamp(1, BURST_FRAMES);
        let mut work = Work { path, memory, slots: &mut slots[..], limit, done, pieces: 0 };
        let before = tally.dropped_total();
        let mut packets = || {
            let mut bytes = 0;
            for count in 0..most {
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
                        *request = work.message(&packet, burst, tally)?;
                        if request.is_some() {
                            // It may change the path.
                            break;
                        }
                    }
                    PacketKind::TransferPages { .. } => return Err(QueueFault::Kind),
                }
            }
            if memory.lost() { Err(QueueFault::MemoryLost) } else { Ok(()) }
        };
        let outcome = packets();
        if !back.is_empty() {
            *owner = path.receive.as_ref().map(|receive| Arc::clone(&receive.sections));
        }
        if !path.transmit {
            tally.drop_many(DropReason::NotReady, burst.len());
            burst.clear();
        }
        let mut moved = Moved::default();
        burst.frames().iter().for_each(|frame| moved.count(frame));
        moved.dropped = tally.dropped_total() - before;
        channel.sent.add(&moved);
        outcome.map_err(|fault| device.faulted(fault))
    }

    fn give_back(&mut self) -> Result<bool, QueueFault> {
        let Self { device, channel, incoming, memory, path, done, back, owner, answer, taken, .. } = self;
        *path = None;
        if !*taken && !channel.pending.load(Ordering::Relaxed) {
            return Ok(false);
        }
        let mut adapter = (self.request.is_some() || answer.is_some()).then(|| device.lock());
        if let (Some(request), Some(adapter)) = (self.request.take(), &mut adapter) {
            *answer = Some(adapter.request(channel, request, self.now)?);
        }
        let mut half = channel.half();
        // All of them or none: a successor that takes the packets again must find none completed. An answer that waits for
        // a section must not be waited for: what gives a section back may be among these packets, or behind them.
        let replies = answer.as_mut().map(|answer| &mut answer.replies);
        let all = half.flush()? != Written::NoRoom && half.fits(replies.as_deref(), done.len());
        if all && *taken {
            replies
                .into_iter()
                .flat_map(|replies| replies.drain(..))
                .for_each(|reply| half.outbox.push(reply));
            half.flush()?;
            let message = nvsp::rndis_complete(nvsp::Status::Success);
            for &transaction in &*done {
                half.outgoing.write(&PacketHeader::completion(transaction), &[&message])?;
            }
            done.clear();
            half.begin_round(incoming.mark().index(), back, owner.as_ref());
            if let Some(adapter) = &mut adapter {
                // A successor that finds it saved and not answered takes the request again: right before the answer.
                adapter.keep(half.waiting());
            }
        }
        let mut signal = half.publish();
        if all && *taken {
            signal |= incoming.commit();
            half.outbox.end_round();
            *taken = false;
            half.release(back, owner.take());
            half.flush()?;
            signal |= half.publish();
        }
        channel.note_pending(&half);
        drop(half);
        drop(adapter);
        let interrupted = channel.interrupt_if(signal);
        if let Some(answered) = answer.take_if(|_| !*taken) {
            device.answered(&answered);
        }
        if memory.lost() { Err(QueueFault::MemoryLost) } else { interrupted.map(|()| signal) }
    }
}

impl Half {
    /// Bytes that the first message that waits, `replies` and so many completions take in the ring.
    pub(super) fn wanted(&self, replies: Option<&Vec<Message>>, completions: usize) -> usize {
        let replies = replies.into_iter().flatten();
        let messages = self.outbox.first().into_iter().chain(replies).map(ring_bytes);
        messages.sum::<usize>() + completions * COMPLETION_BYTES
    }

    /// True if `replies` and so many completions fit the ring, with the first message that waits, if one does.
    fn fits(&mut self, replies: Option<&Vec<Message>>, completions: usize) -> bool {
        let wanted = self.wanted(replies, completions);
        wanted == 0 || self.outgoing.room(wanted)
    }

    /// All up to `read` is taken, with the guest's completions for the sections in `back`, of `owner`: what is published
    /// next is the answer.
    pub(super) fn begin_round(&mut self, read: u32, back: &[u32], owner: Option<&Arc<Sections>>) {
        let write = self.position.load(Ordering::Relaxed);
        self.journal.begin_round(self.index, Ends { write, read });
        self.outbox.begin_round();
        if let Some(owner) = owner.filter(|owner| self.uses(owner)) {
            owner.returned(back);
        }
    }

    /// The guest's completions will not be read again: what they gave back is free, if its buffer is still in use.
    pub(super) fn release(&mut self, back: &mut Vec<u32>, owner: Option<Arc<Sections>>) {
        if let Some(owner) = owner.filter(|owner| self.uses(owner)) {
            owner.release(back, &mut self.stock);
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
        let again = self.now + RETRY;
        let doorbell = || Arc::clone(&self.channel.doorbell) as _;
        if self.taken {
            let mut half = self.channel.half();
            let wanted = half.wanted(self.answer.as_ref().map(|answer| &answer.replies), self.done.len());
            let room = half.outgoing.wait_for_room(wanted);
            return if room { Wait::Nothing } else { Wait::ReadableUntil(doorbell(), again) };
        }
        if let Some(then) = self.device.throttled(self.now) {
            return Wait::Until(then);
        }
        if self.incoming.arm() {
            Wait::Nothing
        } else if self.channel.pending.load(Ordering::Relaxed) {
            // Another channel may give back what a message waits for.
            Wait::ReadableUntil(doorbell(), again)
        } else {
            Wait::Readable(doorbell())
        }
    }

    fn disarm(&mut self) {
        self.incoming.disarm();
    }
}
