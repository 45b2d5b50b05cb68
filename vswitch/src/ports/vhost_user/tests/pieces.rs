//! Frames in many descriptors.

use std::sync::Arc;

use vmq::driver::{Arena, Buffer, DriverRing, Features, Form};
use vmq::frame::{Burst, FrameStore};
use vmq::memory::{GuestMemory, Region};
use vmq::ring::Ring;

use super::rig::{GUEST, Guest, USER};
use crate::offload::testing::flatten;
use crate::ports::vhost_user::queue::{ActiveRing, NetFeatures};
use crate::tally::Tally;

const SIZE: u16 = 2048;
const HEADER: usize = 12;

/// A guest's transmit ring, both sides.
struct Sender {
    arena: Arena,
    driver: DriverRing,
    ring: ActiveRing,
}

impl Sender {
    /// The guest's memory in regions of `region` bytes.
    fn new(form: Form, region: u64) -> Self {
        let arena = Arena::new(GUEST, 16 << 20).unwrap();
        let driver = DriverRing::new(&arena, form, SIZE, Features::default()).unwrap();
        let regions = (0..arena.len() / region).map(|n| {
            let at = GUEST + n * region;
            Region::new(at, at + USER, region, Arc::clone(arena.mapping()), n * region).unwrap()
        });
        let memory = Arc::new(GuestMemory::new(regions.collect(), None).unwrap());
        let packed = form == Form::Packed;
        let base = if packed { 0x8000_8000 } else { 0 };
        let ring = Ring::new(&memory, packed, SIZE, Guest::addresses(&driver), base, false).unwrap();
        let features = NetFeatures { full_header: true, ..NetFeatures::default() };
        let ring = ActiveRing { ring, memory, features, enabled: true, kick: None, call: None };
        Self { arena, driver, ring }
    }

    /// Puts `bytes` into the ring in pieces of `piece` bytes.
    fn send(&mut self, bytes: &[u8], piece: usize) {
        let at = self.arena.alloc(bytes.len() as u64, 4096).unwrap();
        self.arena.write(at, bytes);
        let buffers = (0..bytes.len()).step_by(piece).map(|from| Buffer {
            addr: at + from as u64,
            len: u32::try_from(piece.min(bytes.len() - from)).unwrap(),
            writable: false,
        });
        self.driver.add(&buffers.collect::<Vec<_>>(), false).unwrap();
        self.driver.publish();
    }

    /// One burst, frame by frame.
    fn burst(&mut self, tally: &mut Tally) -> Vec<Vec<u8>> {
        let mut store = FrameStore::default();
        let mut burst = Burst::new(&mut store);
        self.ring.receive(&mut burst, tally).unwrap();
        let frames = burst.frames().iter().map(|frame| flatten(&burst, frame)).collect();
        drop(burst);
        self.ring.complete().unwrap();
        frames
    }
}

#[test]
fn burst_of_large_frames_in_many_pieces_ends_early_and_loses_none() {
    // The second kind of memory has a border in every frame.
    for (form, region) in [(Form::Split, 16 << 20), (Form::Packed, 16 << 20), (Form::Split, 1 << 15)] {
        let mut sender = Sender::new(form, region);
        let sent: Vec<Vec<u8>> =
            (0..64u8).map(|n| [&[0; HEADER], &vec![n; 64_000 + usize::from(n)][..]].concat()).collect();
        sent.iter().for_each(|frame| sender.send(frame, 3700));
        let (mut tally, mut got, mut bursts) = (Tally::default(), Vec::new(), 0);
        while got.len() < sent.len() {
            let burst = sender.burst(&mut tally);
            assert!(!burst.is_empty(), "{} frames came, {} were dropped", got.len(), tally.dropped_total());
            got.extend(burst);
            bursts += 1;
        }
        assert!(bursts > 1);
        assert!(got.iter().zip(&sent).all(|(got, sent)| *got == sent[HEADER..]));
        assert_eq!(tally.dropped_total(), 0);
    }
}
