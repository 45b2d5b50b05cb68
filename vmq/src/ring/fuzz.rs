//! Bodies of the fuzz targets for rings: a guest that does anything, and a device that must not mind.
//!
//! An input is a header that shapes the ring, then a script of the device's calls and the guest's writes, then the
//! guest's memory. Every byte string is an input.

use std::sync::Arc;

use super::{Chain, Inflight, MAX_CHAIN, Mark, Ring, RingAddresses, Virtqueue};
use crate::memory::{DirtyLog, GuestMemory, Mapping, Region};
use crate::with_ring;

/// Guest-physical regions as (address, bytes, offset in the file): two that follow one another in the guest but not in
/// the file, a hole, and one more.
const REGIONS: [(u64, u64, u64); 3] =
    [(0x1000, 0x3000, 0x4000), (0x4000, 0x2000, 0x1000), (0x8000, 0x1000, 0x8000)];
const FILE: usize = 0xa000;
const USER: u64 = 0x7000_0000;

/// Calls in one script. More find nothing new.
const STEPS: usize = 512;

/// A split ring against `data`.
///
/// # Panics
/// The ring broke a promise.
pub fn split(data: &[u8]) {
    run(data, false);
}

/// A packed ring against `data`.
///
/// # Panics
/// The ring broke a promise.
pub fn packed(data: &[u8]) {
    run(data, true);
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

    fn u8(&mut self) -> u8 {
        let [byte] = self.bytes();
        byte
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.bytes())
    }
}

/// How an input wants its ring.
struct Shape {
    size: u16,
    event_idx: bool,
    logged: bool,
    tracked: bool,
    /// Descriptors are bent towards sense, so that chains get longer.
    tame: bool,
    base: u32,
    at: RingAddresses,
}

impl Shape {
    fn read(input: &mut Input<'_>, packed: bool) -> Self {
        let flags = input.u8();
        let on = |bit: u8| flags & 1 << bit != 0;
        let size = u16::from(input.u8());
        let size = match (on(4), packed) {
            (true, _) => input.u16(),
            (false, true) => size,
            (false, false) => size.next_power_of_two(),
        };
        let base = if on(5) { u32::from_le_bytes(input.bytes()) } else { u32::from(packed) * 0x8000_8000 };
        let at = if on(6) {
            let mut near = || USER + u64::from(input.u16());
            RingAddresses { descriptors: near(), driver: near(), device: near(), log: None }
        } else {
            let [descriptors, driver, device] = [0x1000, 0x4000, 0x4800].map(|at| USER + at);
            RingAddresses { descriptors, driver, device, log: None }
        };
        let at = RingAddresses { log: on(1).then(|| u64::from(input.u16())), ..at };
        Self { size, event_idx: on(0), logged: on(1), tracked: on(2), tame: on(3), base, at }
    }
}

fn run(data: &[u8], packed: bool) {
    let mut input = Input(data);
    let shape = Shape::read(&mut input, packed);
    let steps = usize::from(input.u16()) % STEPS;
    let (script, contents) = input.0.split_at(steps.min(input.0.len()));
    let Some(memory) = guest(contents, &shape) else { return };
    if let Ok(ring) = Ring::new(&memory, packed, shape.size, shape.at, shape.base, shape.event_idx) {
        let record = shape.tracked.then(|| inflight(shape.size, packed)).flatten();
        with_ring!(ring, ring => Play::new(ring, &memory, shape.size, record).run(Input(script)));
    }
}

fn guest(contents: &[u8], shape: &Shape) -> Option<GuestMemory> {
    let mapping = Arc::new(Mapping::memfd("fuzz", FILE).ok()?.0);
    let log = if shape.logged { DirtyLog::new(Arc::clone(&mapping), 0, 2) } else { None };
    let regions =
        REGIONS.iter().map(|&(gpa, len, at)| Region::new(gpa, gpa + USER, len, Arc::clone(&mapping), at));
    let memory = GuestMemory::new(regions.collect::<Result<_, _>>().ok()?, log).ok()?;
    // The contents lie end to end over all regions; what is short of them repeats.
    let mut contents: Vec<u8> = contents.iter().copied().cycle().take(0x6000).collect();
    contents.resize(0x6000, 0);
    if shape.tame {
        contents.chunks_exact_mut(16).take(2 * usize::from(shape.size)).for_each(tame);
    }
    let mut rest = contents.as_slice();
    for (gpa, len, _) in REGIONS {
        memory.room(gpa, u32::try_from(len).ok()?)?.write(rest);
        rest = &rest[usize::try_from(len).ok()?..];
    }
    Some(memory)
}

/// Bends a descriptor towards addresses, lengths and indices that may be valid.
fn tame(descriptor: &mut [u8]) {
    descriptor[1] %= 0xa0;
    descriptor[2..8].fill(0);
    descriptor[9] %= 8;
    descriptor[10..12].fill(0);
    descriptor[13] &= 0x80;
    descriptor[15] &= 0x80;
}

fn inflight(size: u16, packed: bool) -> Option<Inflight> {
    let len = Inflight::len_for(size, packed);
    Inflight::new(Arc::new(Mapping::memfd("record", len).ok()?.0), 0, size, packed)
}

/// A device that follows a script.
struct Play<'m, R> {
    ring: R,
    memory: &'m GuestMemory,
    size: u16,
    taken: Vec<(Mark, Chain)>,
    /// Chains popped since the last look (split) or since the ring last changed (packed).
    popped: usize,
}

impl<'m, R: Virtqueue> Play<'m, R> {
    fn new(mut ring: R, memory: &'m GuestMemory, size: u16, record: Option<Inflight>) -> Self {
        if let Some(record) = record {
            ring.track(record);
        }
        Self { ring, memory, size, taken: Vec::new(), popped: 0 }
    }

    fn run(&mut self, mut script: Input<'_>) {
        while !script.0.is_empty() {
            let step = script.u8();
            let count = usize::from(step >> 4) + 1;
            match step & 7 {
                0 | 1 => {
                    // A fault ends a ring; the script goes on, since a faulted ring must stay safe to touch.
                    let _ = self.ring.refresh();
                    self.popped = 0;
                    self.take(count * count);
                }
                2 => self.take(count),
                3 => self.give_back(count),
                4 => {
                    self.ring.publish();
                    // Their descriptors are gone with the burst.
                    self.taken.clear();
                    self.popped = 0;
                }
                5 => self.rewind(count),
                6 if step & 8 == 0 => {
                    self.ring.arm();
                }
                6 => self.ring.disarm(),
                _ => self.poke(&mut script),
            }
        }
        self.ring.publish();
        self.ring.base();
    }

    fn take(&mut self, count: usize) {
        for _ in 0..count {
            let mark = self.ring.mark();
            let Ok(Some(chain)) = self.ring.pop(self.memory) else { return };
            self.popped += 1;
            assert!(self.popped <= usize::from(self.size), "more chains than the ring has entries");
            self.check(&chain);
            self.taken.push((mark, chain));
        }
    }

    /// A chain has a sane shape, and every piece of it lies in memory or is refused.
    fn check(&self, chain: &Chain) {
        assert!(chain.id < self.size && (1..=self.size).contains(&chain.slots));
        let descriptors = self.ring.descriptors(chain);
        assert!((1..=MAX_CHAIN).contains(&descriptors.len()));
        assert_eq!(chain.is_single(), descriptors.len() == 1);
        assert_eq!(descriptors[0], chain.first);
        for descriptor in descriptors {
            let (mut at, mut total) = (descriptor.addr, 0);
            let mapped = self.memory.pieces(descriptor.addr, descriptor.len, |gpa, len| {
                assert_eq!(gpa, at, "pieces follow one another");
                let segment = self.memory.segment(gpa, len).map(|segment| segment.len());
                assert_eq!(segment, Some(len), "a piece is in memory");
                at = gpa.wrapping_add(u64::from(len));
                total += u64::from(len);
            });
            assert!(!mapped || total == u64::from(descriptor.len));
            let whole = self.memory.segment(descriptor.addr, descriptor.len);
            assert!(whole.is_none() || mapped, "a whole segment is one piece");
        }
    }

    /// Uses up the oldest chains that are taken, writing into their buffers first.
    fn give_back(&mut self, count: usize) {
        for (_, chain) in self.taken.drain(..count.min(self.taken.len())) {
            let mut written = 0;
            for descriptor in self.ring.descriptors(&chain).iter().filter(|it| it.is_writable()) {
                if let Some(room) = self.memory.room(descriptor.addr, descriptor.len) {
                    written += room.len() - room.write(&[0xa5; 64]).len();
                }
            }
            self.ring.push_used(&chain, written);
        }
        self.popped = 0;
    }

    fn rewind(&mut self, count: usize) {
        let keep = self.taken.len().saturating_sub(count);
        if let Some(&(mark, _)) = self.taken.get(keep) {
            self.ring.rewind(mark);
            self.popped = self.popped.saturating_sub(self.taken.len() - keep);
            self.taken.truncate(keep);
        }
    }

    /// The guest writes two bytes anywhere.
    fn poke(&mut self, script: &mut Input<'_>) {
        let (gpa, bytes) = (u64::from(script.u16()) % 0xa000, script.bytes::<2>());
        if let Some(room) = self.memory.room(gpa, 2) {
            room.write(&bytes);
            self.popped = 0;
        }
    }
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
        // Most inputs get a ring that can be set up.
        if !seed.is_multiple_of(4) && len > 0 {
            bytes[0] &= 0x0f;
        }
        bytes
    }

    #[test]
    fn random_inputs_break_no_promise() {
        for seed in 0..3000 {
            let input = input(seed);
            split(&input);
            packed(&input);
        }
    }

    #[test]
    fn short_inputs_break_no_promise() {
        for byte in 0..=255 {
            for len in [0, 1, 2, 7, 64] {
                split(&vec![byte; len]);
                packed(&vec![byte; len]);
            }
        }
    }

    #[test]
    fn inputs_reach_long_chains_and_used_ones() {
        // A packed ring whose descriptors all are available: the body must get somewhere, or it tests nothing.
        let descriptor = [0, 0x20, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 1, 0, 0x82, 0];
        let memory = guest(&descriptor, &Shape::read(&mut Input(&[0, 16]), true)).unwrap();
        let at = Shape::read(&mut Input(&[0, 16]), true).at;
        let ring = Ring::new(&memory, true, 16, at, 0x8000_8000, false).unwrap();
        let Ring::Packed(ring) = ring else { panic!("a split ring") };
        let mut play = Play::new(ring, &memory, 16, inflight(16, true));
        play.run(Input(&[0x70, 0x13, 0x14]));
        let mut used = [0; 4];
        memory.segment(0x1000 + 8, 4).unwrap().read_into(&mut used);
        assert_eq!(used, [16, 0, 0, 0]);
        assert_eq!(memory.segment(0x2000, 2).unwrap().read(), Some([0xa5; 2]));
    }
}
