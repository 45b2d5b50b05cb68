//! From a guest's transmit queue into a burst.

use arrayvec::ArrayVec;
use vmq::frame::{BURST_FRAMES, Burst, FRAME_SEGMENTS, MAX_FRAME, Offload};
use vmq::memory::{GuestMemory, Segment};
use vmq::ring::{Chain, Descriptor, RingFault, Virtqueue};

use super::{AHEAD, NEAR, NetFeatures, STEP};
use crate::drops::DropReason;
use crate::ports::vnet::{self, Words};
use crate::tally::Tally;

/// Frames of a disabled ring that are dropped at a time. With chains of 256 pieces they stay within what a ring keeps between
/// two publications.
const DISCARDED: usize = 64;

pub(super) fn receive<'m, R: Virtqueue>(
    ring: &mut R,
    memory: &'m GuestMemory,
    features: &NetFeatures,
    burst: &mut Burst<'m>,
    tally: &mut Tally,
) -> Result<(), RingFault> {
    ring.refresh()?;
    let mut sent =
        SentFrames { taken: ArrayVec::new(), wanted: burst.room(), segments: burst.segment_room() };
    ring.prefetch_used(sent.wanted);
    let mut done = 0;
    loop {
        if sent.wanted > 0 && sent.taken.len() <= done + AHEAD - STEP {
            sent.take(ring, memory, features, done + AHEAD)?;
        }
        let Some(frame) = sent.taken.get(done) else { return Ok(()) };
        done += 1;
        match frame {
            Sent::Whole(segment) => {
                // It is longer than its header.
                let (low, high) = segment.read_words().unwrap_or_default();
                let header = Words { low, high: high.into() };
                receive_whole(header, segment.skip(features.header_u32()), features, burst, tally);
            }
            Sent::Pieces(chain) => receive_pieces(ring, chain, memory, features, burst, tally)?,
        }
    }
}

/// A frame taken from the ring.
enum Sent<'m> {
    /// Header and frame are in one piece. The chain is not kept: copied as it is made, it would have the copy wait until all earlier
    /// stores, misses among them, have left the store buffer.
    Whole(Segment<'m>),
    /// In several descriptors, across regions, or too short.
    Pieces(Chain),
}

/// Frames taken from the ring ahead of their turn.
struct SentFrames<'m> {
    taken: ArrayVec<Sent<'m>, BURST_FRAMES>,
    /// How many more the burst has room for.
    wanted: usize,
    /// And how many segments.
    segments: usize,
}

impl<'m> SentFrames<'m> {
    /// Takes frames until there are `count`, if the guest has so many and the burst the room.
    #[inline(never)]
    fn take<R: Virtqueue>(
        &mut self,
        ring: &mut R,
        memory: &'m GuestMemory,
        features: &NetFeatures,
        count: usize,
    ) -> Result<(), RingFault> {
        while self.wanted > 0 && self.taken.len() < count {
            let Some(chain) = ring.pop(memory)? else {
                self.wanted = 0;
                break;
            };
            if chain.first.is_writable() {
                return Err(RingFault::Direction);
            }
            ring.push_used(&chain, 0);
            self.wanted -= 1;
            let whole =
                chain.is_single().then(|| memory.segment(chain.first.addr, chain.first.len)).flatten();
            match whole {
                Some(segment) if segment.len() > features.header_u32() => {
                    segment.prefetch(NEAR);
                    self.taken.push(Sent::Whole(segment));
                }
                _ => {
                    self.segments = self.segments.saturating_sub(most_segments(ring, &chain, memory));
                    if self.segments < FRAME_SEGMENTS + BURST_FRAMES {
                        // The next one might find no room. Those in one piece take a segment each and are not counted.
                        self.wanted = 0;
                    }
                    self.taken.push(Sent::Pieces(chain));
                }
            }
        }
        Ok(())
    }
}

/// Tail segments that the frame in `chain` may take.
#[cold]
fn most_segments<R: Virtqueue>(ring: &R, chain: &Chain, memory: &GuestMemory) -> usize {
    let descriptors = ring.descriptors(chain);
    let in_one_piece = |descriptor: &Descriptor| memory.segment(descriptor.addr, descriptor.len).is_some();
    if descriptors.iter().all(in_one_piece) { descriptors.len().min(FRAME_SEGMENTS) } else { FRAME_SEGMENTS }
}

pub(super) fn discard<R: Virtqueue>(
    ring: &mut R,
    memory: &GuestMemory,
    tally: &mut Tally,
) -> Result<(), RingFault> {
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
