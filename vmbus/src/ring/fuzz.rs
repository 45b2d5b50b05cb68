//! Body of the fuzz target for rings: a guest that does anything, and a host that must not mind.
//!
//! An input is a header that shapes the rings, then a script of the host's calls and the guest's writes, then the rings'
//! memory. Every byte string is an input.

use std::sync::Arc;

use vmq::memory::{GuestMemory, Mapping, Region};

use super::{
    GuestOutgoing, Incoming, Mark, Outgoing, Packet, PacketBuffer, PacketHeader, PacketKind, TransferRange,
};
use crate::pages::Pages;

/// Most pages in one ring.
const PAGES: u64 = 6;

/// Calls in one script. More find nothing new.
const STEPS: usize = 512;

/// The host's side of both rings against `data`.
///
/// # Panics
/// A ring broke a promise.
pub fn fuzz(data: &[u8]) {
    let mut input = Input(data);
    let [shape, up, down] = input.bytes();
    let steps = usize::from(u16::from_le_bytes(input.bytes())) % STEPS;
    let (script, contents) = input.0.split_at(steps.min(input.0.len()));
    let Some(rings) = Rings::new(contents, shape, up, down) else { return };
    // Rings whose indices make no sense are refused; the guest may make sense of them and open again.
    let fresh = shape & 1 != 0;
    let incoming = Incoming::new(&rings.up, fresh);
    let outgoing = Outgoing::new(&rings.down, fresh);
    if let (Ok(incoming), Ok(outgoing)) = (incoming, outgoing) {
        Play::new(rings, incoming, outgoing).run(Input(script));
    }
}

/// Takes numbers off the input; zeroes once it is used up.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let count = N.min(self.0.len());
        bytes[..count].copy_from_slice(&self.0[..count]);
        self.0 = &self.0[count..];
        bytes
    }
}

struct Rings {
    up: Pages,
    down: Pages,
}

impl Rings {
    fn new(contents: &[u8], shape: u8, up: u8, down: u8) -> Option<Self> {
        let mapping = Arc::new(Mapping::memfd("fuzz", usize::try_from((2 * PAGES) << 12).ok()?).ok()?.0);
        let region = Region::new(0, 0, (2 * PAGES) << 12, mapping, 0).ok()?;
        let memory = Arc::new(GuestMemory::new(vec![region], None).ok()?);
        // Pages in order, backwards, or both rings over the same ones.
        let page = |first: u64, i: u64| match shape >> 1 & 3 {
            0 | 1 => first + i,
            2 => 2 * PAGES - 1 - first - i,
            _ => i,
        };
        let ring = |first: u64, count: u8| {
            let pfns: Vec<u64> = (0..u64::from(count) % (PAGES + 1)).map(|i| page(first, i)).collect();
            Pages::new(&memory, &pfns).ok()
        };
        let rings = Self { up: ring(0, up)?, down: ring(PAGES, down)? };
        for ring in [&rings.up, &rings.down] {
            let len = usize::try_from(ring.len()).ok()?;
            let bytes: Vec<u8> = contents.iter().copied().cycle().take(len).collect();
            ring.write(0, &bytes);
            if shape & 8 != 0 {
                super::clear(ring);
            }
        }
        Some(rings)
    }
}

/// A host that follows a script.
struct Play {
    rings: Rings,
    incoming: Incoming,
    outgoing: Outgoing,
    buffer: PacketBuffer,
    mark: Option<Mark>,
    /// Bytes read since the last commit: never more than the ring has.
    taken: usize,
}

impl Play {
    fn new(rings: Rings, incoming: Incoming, outgoing: Outgoing) -> Self {
        Self { rings, incoming, outgoing, buffer: PacketBuffer::with_limit(9000), mark: None, taken: 0 }
    }

    fn run(&mut self, mut script: Input<'_>) {
        while !script.0.is_empty() {
            let [step] = script.bytes();
            let count = usize::from(step >> 4) + 1;
            match step & 15 {
                0..=2 => self.read(count),
                3 => {
                    self.incoming.commit();
                    (self.mark, self.taken) = (None, 0);
                }
                4 => {
                    self.incoming.arm();
                }
                5 => self.incoming.disarm(),
                6 => self.mark = Some(self.incoming.mark()),
                7 => {
                    if let Some(mark) = self.mark {
                        self.incoming.rewind(mark);
                        self.taken = 0;
                    }
                }
                8 | 9 => self.write(count, &mut script),
                10 => {
                    self.outgoing.publish();
                }
                11 => {
                    self.outgoing.wait_for_room(count * 700);
                }
                12 => self.guest_writes(count, &mut script),
                13 => self.poke(&mut script, true),
                _ => self.poke(&mut script, false),
            }
        }
    }

    fn read(&mut self, count: usize) {
        for _ in 0..count {
            // A fault ends a ring; the script goes on, since a faulted ring must stay safe to touch.
            let Ok(Some(packet)) = self.incoming.next(&mut self.buffer) else { return };
            self.taken += check(&packet);
            assert!(self.taken < self.incoming.size() as usize, "more was read than the ring holds");
        }
    }

    fn write(&mut self, count: usize, script: &mut Input<'_>) {
        let [len, kind] = script.bytes();
        let payload = vec![0x5a; usize::from(len) * count];
        let ranges = [TransferRange::new(1, 2), TransferRange::new(3, 4)];
        let kind = match kind & 3 {
            0 => PacketKind::TransferPages { pageset: 7, ranges: &ranges },
            1 => PacketKind::Completion,
            _ => PacketKind::InBand,
        };
        let header = PacketHeader { kind, completion_requested: len & 1 != 0, transaction: 9 };
        let (head, tail) = payload.split_at(payload.len() / 3);
        let _ = self.outgoing.write(&header, &[head, &[], tail]);
    }

    /// The guest writes packets as it should, if the ring is in a state that lets it.
    fn guest_writes(&mut self, count: usize, script: &mut Input<'_>) {
        let Ok(mut guest) = GuestOutgoing::new(&self.rings.up, false) else { return };
        let [len] = script.bytes();
        for transaction in 0..count as u64 {
            let _ = guest.write(&PacketHeader::in_band(transaction), &[&vec![1; usize::from(len)]]);
        }
        guest.publish();
    }

    /// The guest writes four bytes anywhere, or to the control words.
    fn poke(&mut self, script: &mut Input<'_>, control: bool) {
        let ([ring, low, high], bytes) = (script.bytes(), script.bytes::<4>());
        let ring = if ring & 1 == 0 { &self.rings.up } else { &self.rings.down };
        let at = u32::from(u16::from_le_bytes([low, high]));
        let at = if control { at % 5 * 4 } else { at % ring.len().max(1) };
        ring.write(at, &bytes);
    }
}

/// A packet has a sane shape; returns its bytes in the ring.
fn check(packet: &Packet<'_>) -> usize {
    let header = match packet.kind {
        PacketKind::InBand | PacketKind::Completion => 16,
        PacketKind::TransferPages { ranges, .. } => 24 + size_of_val(ranges),
        PacketKind::GpaDirect { ranges } => {
            let mut bytes = 24;
            for range in ranges.iter() {
                bytes += 8 + size_of_val(range.pfns);
                let reach = u64::from(range.byte_count) + u64::from(range.byte_offset);
                assert_eq!(range.pfns.len() as u64, reach.div_ceil(4096));
                let pieces = range.pieces().map(|(_, len)| u64::from(len));
                assert_eq!(pieces.sum::<u64>(), u64::from(range.byte_count), "pieces make up the range");
            }
            assert_eq!(ranges.iter().count(), ranges.len());
            bytes
        }
    };
    let len = header + packet.payload.len();
    assert!(len <= 9000);
    len + 8
}

#[cfg(test)]
mod tests {
    use super::*;

    /// splitmix64
    fn random(state: &mut u64) -> u64 {
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = *state;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn input(seed: u64) -> Vec<u8> {
        let mut state = seed;
        let len = usize::try_from(random(&mut state) % 3000).unwrap();
        let mut bytes: Vec<u8> = (0..len / 8 + 1).flat_map(|_| random(&mut state).to_le_bytes()).collect();
        bytes.truncate(len);
        // Most inputs get rings that can be opened.
        if !seed.is_multiple_of(4) && len > 3 {
            bytes[0] |= 8;
            bytes[1] = bytes[1] % 5 + 2;
            bytes[2] = bytes[2] % 5 + 2;
        }
        bytes
    }

    #[test]
    fn random_inputs_break_no_promise() {
        for seed in 0..4000 {
            fuzz(&input(seed));
        }
    }

    #[test]
    fn short_inputs_break_no_promise() {
        for byte in 0..=255 {
            for len in [0, 1, 2, 3, 5, 7, 64, 600] {
                fuzz(&vec![byte; len]);
            }
        }
    }

    #[test]
    fn inputs_reach_packets_in_both_directions() {
        let rings = Rings::new(&[], 8, 2, 2).unwrap();
        let incoming = Incoming::new(&rings.up, true).unwrap();
        let outgoing = Outgoing::new(&rings.down, true).unwrap();
        let mut play = Play::new(rings, incoming, outgoing);
        play.run(Input(&[0x2c, 40, 0x20, 8, 9, 0, 10]));
        assert_eq!(play.taken, 3 * 64);
        assert_eq!(
            play.rings.down.word(0).unwrap().load(std::sync::atomic::Ordering::Acquire),
            24 + 16 + 16 + 8
        );
    }
}
