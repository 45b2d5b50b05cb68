//! From a burst into a guest's receive queue.

use arrayvec::ArrayVec;
use vmq::frame::{BURST_FRAMES, Burst, Frame, HEAD_BYTES};
use vmq::memory::{GuestMemory, Next, Room, Segment};
use vmq::ring::{Chain, Mark, RingFault, Virtqueue};

use super::{AHEAD, NEAR, NetFeatures, STEP};
use crate::drops::DropReason;
use crate::ports::vnet;
use crate::tally::Tally;

/// Mergeable buffers that one frame may fill: 64 KiB in pieces of 64 bytes.
const MAX_BUFFERS: usize = 1024;

/// Where a frame's tail begins in a buffer.
const NEAR_END: u32 = 76;
const _: () = assert!(NEAR_END as usize == NEAR + 1);

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

    /// How many are waiting.
    #[inline]
    fn waiting(&self) -> usize {
        self.taken.len() - self.at
    }

    /// Takes buffers until `ahead` are waiting, if the guest has so many.
    #[inline(never)]
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

#[inline(never)]
pub(super) fn put<R: Virtqueue>(
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
    // Short frames, the costliest by the byte, are spared all that concerns tails.
    let tails = burst.longest() as usize > HEAD_BYTES;
    ring.prefetch_used(list.len());
    for (done, &index) in list.iter().enumerate() {
        let ahead = AHEAD.min(list.len() - done);
        if buffers.waiting() == 0 || buffers.waiting() + STEP <= ahead {
            buffers.fill(ring, memory, ahead)?;
        }
        let Some(&(mark, ref chain, room)) = buffers.peek() else {
            tally.drop_many(DropReason::QueueFull, list.len() - done);
            return Ok(());
        };
        let Some(frame) = frames.get(usize::from(index)) else { continue };
        let header = vnet::emit(&frame.offload, features.accepts, 1);
        match room {
            Some(room) if u64::from(room.len()) >= u64::from(frame.len) + header_len as u64 => {
                let room = room.write_words(header.low, header.high, features.full_header);
                let room = write_head(room, frame);
                if tails {
                    let next = list.get(done + 1).and_then(|&next| frames.get(usize::from(next)));
                    let next = next.map_or(Next::NONE, |next| next_copy(burst, next, &buffers));
                    write_tail(room, burst, frame, next);
                }
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
fn write_head<'m>(room: Room<'m>, frame: &Frame) -> Room<'m> {
    // The usual small frame: a copy of constant size.
    if frame.len as usize >= HEAD_BYTES { room.write_array(&frame.head) } else { room.write(frame.head()) }
}

#[inline]
fn write_tail(mut room: Room<'_>, burst: &Burst<'_>, frame: &Frame, next: Next) {
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
