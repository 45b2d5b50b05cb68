//! virtio-net over a ring: frames out of a guest's transmit queue, frames into its receive queue.
//!
//! Both directions run ahead of themselves: a descriptor is taken, its address translated and the lines behind it
//! fetched [`AHEAD`] frames before those lines are touched, so that misses overlap with each other and with the moving
//! of bytes. Fetching for the whole burst first is worse: it fills the processor's miss buffers and waits for them. Cost per frame of 64 bytes, both directions: two descriptor reads, two used entries, one
//! copy of 64 bytes into the burst and one out of it, 12 bytes of header read and written.

use std::sync::Arc;

use arrayvec::ArrayVec;
use vmq::doorbell::Doorbell;
use vmq::frame::{Accepts, BURST_FRAMES, Burst, FRAME_SEGMENTS, Frame, HEAD_BYTES, MAX_FRAME, Offload};
use vmq::memory::{GuestMemory, Next, Room, Segment};
use vmq::ring::{Chain, Descriptor, Mark, Ring, RingFault, Virtqueue};
use vmq::with_ring;

use crate::drops::DropReason;
use crate::ports::vnet::{self, Words};
use crate::tally::Tally;

/// What was negotiated for a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct NetFeatures {
    /// Header of 12 bytes (virtio 1.x or mergeable buffers), else 10.
    pub full_header: bool,
    /// `VIRTIO_NET_F_MRG_RXBUF`: a frame may fill several buffers.
    pub mergeable: bool,
    /// What the guest may ask of us (`VIRTIO_NET_F_CSUM`, `HOST_TSO4`, …).
    pub offered: Accepts,
    /// What the guest takes (`VIRTIO_NET_F_GUEST_CSUM`, `GUEST_TSO4`, …).
    pub accepts: Accepts,
}

impl NetFeatures {
    #[inline]
    fn header_len(&self) -> usize {
        if self.full_header { vnet::FULL } else { vnet::SHORT }
    }

    #[inline]
    fn header_u32(&self) -> u32 {
        if self.full_header { 12 } else { 10 }
    }
}

/// A ring in use, with all that goes with it.
#[derive(Debug)]
pub struct ActiveRing {
    /// The ring.
    pub ring: Ring,
    /// The memory its descriptors point into.
    pub memory: Arc<GuestMemory>,
    /// What was negotiated.
    pub features: NetFeatures,
    /// What the guest sends goes on its way; else it is discarded.
    pub enabled: bool,
    /// The guest's doorbell; without one the ring is polled.
    pub kick: Option<Arc<Doorbell>>,
    /// The guest's interrupt; without one the guest polls.
    pub call: Option<Doorbell>,
}

impl ActiveRing {
    /// Takes up to a burst of frames that the guest sends. They are given back by [`ActiveRing::complete`].
    ///
    /// # Errors
    /// The ring is unusable.
    #[inline]
    pub fn receive<'m>(&'m mut self, burst: &mut Burst<'m>, tally: &mut Tally) -> Result<(), RingFault> {
        let (memory, features) = (&*self.memory, &self.features);
        with_ring!(&mut self.ring, ring => receive(ring, memory, features, burst, tally))
    }

    /// Hands the frames of `list` to the guest, as many as it has buffers for. True if it was interrupted.
    ///
    /// # Errors
    /// The ring is unusable.
    #[inline]
    pub fn put(&mut self, burst: &Burst<'_>, list: &[u8], tally: &mut Tally) -> Result<bool, RingFault> {
        let (memory, features) = (&*self.memory, &self.features);
        let put = with_ring!(&mut self.ring, ring => put(ring, memory, features, burst, list, tally));
        // What is read from memory that is gone is nonsense, and not the fault to tell of.
        if self.memory.lost() {
            return Err(RingFault::MemoryLost);
        }
        put.and_then(|()| self.complete())
    }

    /// Shows the guest what is done with. True if it was interrupted.
    ///
    /// # Errors
    /// The guest cannot be interrupted without waiting for it.
    #[inline]
    pub fn complete(&mut self) -> Result<bool, RingFault> {
        let wanted = with_ring!(&mut self.ring, ring => ring.publish());
        if wanted && let Some(call) = &self.call {
            call.ring();
            if call.is_broken() {
                return Err(RingFault::DoorbellBlocks);
            }
        }
        Ok(wanted)
    }

    /// True if the memory behind the ring turned out to be gone.
    #[inline]
    pub fn lost(&self) -> bool {
        self.memory.lost()
    }

    /// Takes up to [`DISCARDED`] frames that the guest has sent and drops them: its ring is disabled. True if the guest
    /// was interrupted.
    ///
    /// # Errors
    /// The ring is unusable.
    #[cold]
    pub fn discard(&mut self, tally: &mut Tally) -> Result<bool, RingFault> {
        let memory = &*self.memory;
        let discarded = with_ring!(&mut self.ring, ring => discard(ring, memory, tally));
        if self.memory.lost() {
            return Err(RingFault::MemoryLost);
        }
        discarded.and_then(|()| self.complete())
    }

    /// Asks for doorbells; true if there is work already.
    pub fn arm(&mut self) -> bool {
        with_ring!(&mut self.ring, ring => ring.arm())
    }

    /// Says that doorbells are not needed.
    pub fn disarm(&mut self) {
        with_ring!(&mut self.ring, ring => ring.disarm());
    }

    /// Where a successor resumes.
    pub fn base(&self) -> u32 {
        with_ring!(&self.ring, ring => ring.base())
    }
}

/// Frames of a disabled ring that are dropped at a time. With chains of 256 pieces they stay within what a ring keeps between
/// two publications.
const DISCARDED: usize = 64;

/// Mergeable buffers that one frame may fill: 64 KiB in pieces of 64 bytes.
const MAX_BUFFERS: usize = 1024;

/// How many frames descriptors and lines are fetched ahead.
///
/// 8 to 64 were tried: 8 and 64 cost 3 to 5 %, there is little between the others.
const AHEAD: usize = 32;

/// Bytes at a buffer's start that hold header and head.
const NEAR: usize = vnet::FULL + HEAD_BYTES - 1;

/// Where a frame's tail begins in a buffer.
const NEAR_END: u32 = 76;
const _: () = assert!(NEAR_END as usize == NEAR + 1);

fn receive<'m, R: Virtqueue>(
    ring: &mut R,
    memory: &'m GuestMemory,
    features: &NetFeatures,
    burst: &mut Burst<'m>,
    tally: &mut Tally,
) -> Result<(), RingFault> {
    ring.refresh()?;
    let mut taken = ArrayVec::<(Chain, Segment<'m>), BURST_FRAMES>::new();
    let (mut wanted, mut segments) = (burst.room(), burst.segment_room());
    ring.prefetch_used(wanted);
    let mut done = 0;
    loop {
        while wanted > 0 && taken.len() < done + AHEAD {
            let Some(chain) = ring.pop(memory)? else {
                wanted = 0;
                break;
            };
            if chain.first.is_writable() {
                return Err(RingFault::Direction);
            }
            let whole =
                chain.is_single().then(|| memory.segment(chain.first.addr, chain.first.len)).flatten();
            let segment = whole.unwrap_or_else(|| {
                segments = segments.saturating_sub(most_segments(ring, &chain, memory));
                if segments < FRAME_SEGMENTS + BURST_FRAMES {
                    // The next one might find no room. Those in one piece take a segment each and are not counted.
                    wanted = 1;
                }
                // What is not in one piece is looked at when its turn comes; an empty segment marks it.
                Segment::from(&[][..])
            });
            segment.prefetch(NEAR);
            ring.push_used(&chain, 0);
            taken.push((chain, segment));
            wanted -= 1;
        }
        let Some((chain, segment)) = taken.get(done) else { return Ok(()) };
        done += 1;
        match segment.read_words() {
            Some((low, high)) if segment.len() > features.header_u32() => {
                let header = Words { low, high: high.into() };
                receive_whole(header, segment.skip(features.header_u32()), features, burst, tally);
            }
            _ => receive_pieces(ring, chain, memory, features, burst, tally)?,
        }
    }
}

/// Tail segments that the frame in `chain` may take.
#[cold]
fn most_segments<R: Virtqueue>(ring: &R, chain: &Chain, memory: &GuestMemory) -> usize {
    let descriptors = ring.descriptors(chain);
    let in_one_piece = |descriptor: &Descriptor| memory.segment(descriptor.addr, descriptor.len).is_some();
    if descriptors.iter().all(in_one_piece) { descriptors.len().min(FRAME_SEGMENTS) } else { FRAME_SEGMENTS }
}

fn discard<R: Virtqueue>(ring: &mut R, memory: &GuestMemory, tally: &mut Tally) -> Result<(), RingFault> {
    ring.refresh()?;
    for _ in 0..DISCARDED {
        let Some(chain) = ring.pop(memory)? else { break };
        ring.push_used(&chain, 0);
        tally.drop(DropReason::Disabled);
    }
    Ok(())
}

/// A frame in one piece.
#[inline(always)]
fn receive_whole<'m>(
    header: Words,
    frame: Segment<'m>,
    features: &NetFeatures,
    burst: &mut Burst<'m>,
    tally: &mut Tally,
) {
    // Spelled out for the usual frame, so that its constant metadata is stored as constants.
    if !header.is_plain() || !burst.push(frame, Offload::NONE) {
        receive_with_offload(header, frame, features, burst, tally);
    }
}

#[inline(never)]
fn receive_with_offload<'m>(
    header: Words,
    frame: Segment<'m>,
    features: &NetFeatures,
    burst: &mut Burst<'m>,
    tally: &mut Tally,
) {
    match vnet::parse(header, features.offered) {
        Ok(offload) if burst.push(frame, offload) => {}
        Ok(_) => tally.drop(DropReason::Malformed),
        Err(_) => tally.drop(DropReason::BadHeader),
    }
}

/// A frame in several descriptors, or one that crosses regions: the header may be split anywhere.
#[cold]
fn receive_pieces<'m, R: Virtqueue>(
    ring: &R,
    chain: &Chain,
    memory: &'m GuestMemory,
    features: &NetFeatures,
    burst: &mut Burst<'m>,
    tally: &mut Tally,
) -> Result<(), RingFault> {
    let mut pieces = ArrayVec::<Segment<'m>, { FRAME_SEGMENTS + 1 }>::new();
    let mut header = [0; vnet::FULL];
    let mut filled = 0;
    let mut fits = true;
    for descriptor in ring.descriptors(chain) {
        if descriptor.is_writable() {
            return Err(RingFault::Direction);
        }
        if descriptor.len > MAX_FRAME + features.header_u32() {
            // No honest buffer, and it may cross any number of regions: not walked through.
            return Err(RingFault::BadAddress { addr: descriptor.addr, len: descriptor.len });
        }
        let mapped = memory.pieces(descriptor.addr, descriptor.len, |gpa, len| {
            let Some(piece) = memory.segment(gpa, len) else { return };
            let taken = piece.read_into(&mut header[filled..features.header_len()]);
            filled += taken;
            let rest = piece.skip(u32::try_from(taken).unwrap_or(u32::MAX));
            fits &= rest.is_empty() || pieces.try_push(rest).is_ok();
        });
        if !mapped {
            return Err(RingFault::BadAddress { addr: descriptor.addr, len: descriptor.len });
        }
    }
    if filled < features.header_len() && fits {
        tally.drop(DropReason::BadHeader);
        return Ok(());
    }
    let mut short = [0; vnet::SHORT];
    short.copy_from_slice(&header[..vnet::SHORT]);
    match vnet::parse(Words::from_bytes(short), features.offered) {
        Err(_) => tally.drop(DropReason::BadHeader),
        Ok(offload) if fits && burst.push_pieces(pieces.iter().copied(), offload) => {}
        Ok(_) => tally.drop(DropReason::Malformed),
    }
    Ok(())
}

/// A receive buffer taken from the ring: where to go back to, the chain, and its room if it is in one piece.
type Taken<'m> = (Mark, Chain, Option<Room<'m>>);

/// Buffers taken ahead of the frames that will fill them.
struct Buffers<'m> {
    taken: ArrayVec<Taken<'m>, BURST_FRAMES>,
    at: usize,
}

impl<'m> Buffers<'m> {
    fn new() -> Self {
        Self { taken: ArrayVec::new(), at: 0 }
    }

    /// Takes buffers until `ahead` are waiting, if the guest has so many.
    #[inline(always)]
    fn fill<R: Virtqueue>(
        &mut self,
        ring: &mut R,
        memory: &'m GuestMemory,
        ahead: usize,
    ) -> Result<(), RingFault> {
        if self.at == self.taken.len() {
            self.taken.clear();
            self.at = 0;
        }
        while self.taken.len() < self.at + ahead && !self.taken.is_full() {
            let mark = ring.mark();
            let Some(chain) = ring.pop(memory)? else { break };
            if !chain.first.is_writable() {
                return Err(RingFault::Direction);
            }
            let room = chain.is_single().then(|| memory.room(chain.first.addr, chain.first.len)).flatten();
            if let Some(room) = room {
                room.prefetch(NEAR);
            }
            self.taken.push((mark, chain, room));
        }
        Ok(())
    }

    #[inline]
    fn peek(&self) -> Option<&Taken<'m>> {
        self.taken.get(self.at)
    }

    /// The room behind header and head of the buffer after the current one.
    #[inline]
    fn next_tail(&self, near: u32) -> Option<Room<'m>> {
        self.taken.get(self.at + 1).and_then(|(_, _, room)| *room).map(|room| room.skip(near))
    }
}

fn put<R: Virtqueue>(
    ring: &mut R,
    memory: &GuestMemory,
    features: &NetFeatures,
    burst: &Burst<'_>,
    list: &[u8],
    tally: &mut Tally,
) -> Result<(), RingFault> {
    ring.refresh()?;
    let frames = burst.frames();
    let header_len = features.header_len();
    let mut buffers = Buffers::new();
    ring.prefetch_used(list.len());
    for (done, &index) in list.iter().enumerate() {
        buffers.fill(ring, memory, AHEAD.min(list.len() - done))?;
        let Some(&(mark, ref chain, room)) = buffers.peek() else {
            tally.drop_many(DropReason::QueueFull, list.len() - done);
            return Ok(());
        };
        let Some(frame) = frames.get(usize::from(index)) else { continue };
        let header = vnet::emit(&frame.offload, features.accepts, 1);
        match room {
            Some(room) if u64::from(room.len()) >= u64::from(frame.len) + header_len as u64 => {
                let next = match list.get(done + 1).and_then(|&next| frames.get(usize::from(next))) {
                    Some(next) => next_copy(burst, next, &buffers),
                    None => Next::NONE,
                };
                let room = room.write_words(header.low, header.high, features.full_header);
                write_frame(room, burst, frame, next);
                ring.push_used(chain, frame.len + features.header_u32());
                buffers.at += 1;
            }
            _ => match put_pieces(ring, memory, features, burst, frame, &mut buffers)? {
                Pieces::Written => {}
                Pieces::QueueFull => {
                    ring.rewind(mark);
                    tally.drop_many(DropReason::QueueFull, list.len() - done);
                    return Ok(());
                }
                Pieces::TooSmall => {
                    tally.drop(DropReason::NoBuffer);
                    continue;
                }
            },
        }
        tally.moved(frame.len);
    }
    if let Some(&(mark, ..)) = buffers.peek() {
        ring.rewind(mark);
    }
    Ok(())
}

/// What the copy after this one will touch, if both are long enough for the hint to pay.
#[inline]
fn next_copy(burst: &Burst<'_>, next: &Frame, buffers: &Buffers<'_>) -> Next {
    match (burst.tail(next).first(), buffers.next_tail(NEAR_END)) {
        (Some(&segment), Some(room)) => Next::new(segment, room),
        _ => Next::NONE,
    }
}

#[inline(always)]
fn write_frame(room: Room<'_>, burst: &Burst<'_>, frame: &Frame, next: Next) {
    // The usual small frame: a copy of constant size.
    let mut room = if frame.len as usize >= HEAD_BYTES {
        room.write_array(&frame.head)
    } else {
        room.write(frame.head())
    };
    for &segment in burst.tail(frame) {
        room = room.copy(segment, next);
    }
}

/// A frame's bytes in order, header first, to be spread over rooms of any size.
struct Source<'a, 'm> {
    pieces: [Segment<'a>; 2],
    tail: &'a [Segment<'m>],
    at: usize,
    offset: u32,
}

impl<'a, 'm> Source<'a, 'm> {
    fn fill(&mut self, mut room: Room<'_>) -> u32 {
        let before = room.len();
        while !room.is_empty() {
            let Some(piece) = self.piece() else { break };
            let rest = piece.skip(self.offset);
            let count = rest.len().min(room.len());
            room = room.copy(rest, Next::NONE);
            self.offset += count;
            if self.offset == piece.len() {
                (self.at, self.offset) = (self.at + 1, 0);
            }
        }
        before - room.len()
    }

    fn piece(&self) -> Option<Segment<'a>> {
        match self.pieces.get(self.at) {
            Some(&piece) => Some(piece),
            None => self.tail.get(self.at - self.pieces.len()).copied(),
        }
    }
}

/// How it went with a frame that does not fit one piece of memory.
enum Pieces {
    /// The frame is in the guest's buffers.
    Written,
    /// Not enough buffers; those it had begun to take are the caller's to give back.
    QueueFull,
    /// The frame fits no buffer. A single buffer stays for the next frame; useless mergeable ones were returned empty.
    TooSmall,
}

/// Writes a frame that does not fit one piece of memory: a chain of descriptors, or several mergeable buffers.
#[cold]
fn put_pieces<'m, R: Virtqueue>(
    ring: &mut R,
    memory: &'m GuestMemory,
    features: &NetFeatures,
    burst: &Burst<'_>,
    frame: &Frame,
    buffers: &mut Buffers<'m>,
) -> Result<Pieces, RingFault> {
    let needed = u64::from(frame.len) + features.header_len() as u64;
    let (mut room, mut chains) = (0, ArrayVec::<Chain, MAX_BUFFERS>::new());
    while room < needed {
        if !chains.is_empty() && !features.mergeable {
            buffers.at -= 1;
            return Ok(Pieces::TooSmall);
        }
        buffers.fill(ring, memory, 1)?;
        let Some(&(_, chain, _)) = buffers.peek() else { return Ok(Pieces::QueueFull) };
        let before = room;
        room += writable_bytes(ring, memory, &chain, needed - room)?;
        buffers.at += 1;
        let full = chains.try_push(chain).is_err();
        // The header must lie whole in the first buffer (5.1.6.3.1), and a buffer of nothing leads nowhere.
        let useless = room == before || room < features.header_len() as u64;
        if features.mergeable && (full || useless) {
            buffers.at -= usize::from(full);
            chains.iter().for_each(|chain| ring.push_used(chain, 0));
            return Ok(Pieces::TooSmall);
        }
    }
    let count = u16::try_from(chains.len()).unwrap_or(u16::MAX);
    let header = vnet::emit(&frame.offload, features.accepts, count).bytes();
    let pieces = [Segment::from(&header[..features.header_len()]), Segment::from(frame.head())];
    let mut source = Source { pieces, tail: burst.tail(frame), at: 0, offset: 0 };
    for chain in &chains {
        let mut written = 0;
        for descriptor in ring.descriptors(chain) {
            let len = u32::try_from(needed).unwrap_or(u32::MAX).min(descriptor.len);
            memory.pieces(descriptor.addr, len, |gpa, len| {
                written += memory.room(gpa, len).map_or(0, |room| source.fill(room));
            });
        }
        ring.push_used(chain, written);
    }
    Ok(Pieces::Written)
}

/// Bytes that `chain` can take, up to `needed`, all of them checked to be guest memory.
fn writable_bytes<R: Virtqueue>(
    ring: &R,
    memory: &GuestMemory,
    chain: &Chain,
    needed: u64,
) -> Result<u64, RingFault> {
    let mut bytes = 0u64;
    for descriptor in ring.descriptors(chain) {
        if !descriptor.is_writable() {
            return Err(RingFault::Direction);
        }
        if bytes >= needed {
            break;
        }
        // What lies behind the frame's end is not looked at: it may cross any number of regions.
        let len = u32::try_from(needed - bytes).unwrap_or(u32::MAX).min(descriptor.len);
        if !memory.pieces(descriptor.addr, len, |_, _| ()) {
            return Err(RingFault::BadAddress { addr: descriptor.addr, len: descriptor.len });
        }
        bytes += u64::from(len);
    }
    Ok(bytes)
}
