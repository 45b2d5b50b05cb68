//! Queues of a switch, polled by hand.

use std::sync::mpsc;

use arc_swap::ArcSwap;
use proptest::prelude::*;
use vmq::driver::{Arena, Buffer, DriverRing, Features, Form};
use vmq::memory::{GuestMemory, Region};
use vmq::ring::{Ring, RingAddresses};

use super::*;
use crate::backend::{BackendFault, FrameSink as BackendSink, FrameSource};
use crate::fdb::{Config, Fdb};
use crate::offload::translate::TagForm;
use crate::port::PortId;
use crate::ports::vhost_user::queue::NetFeatures;
use crate::spec::VlanMode;
use crate::topology::{Rules, Topology};

/// Sends its frames in one burst, and drops empty ones itself.
#[derive(Debug)]
struct Feed(Vec<Vec<u8>>, usize);

impl FrameSource for Feed {
    fn receive<'m>(
        &'m mut self,
        burst: &mut Burst<'m>,
        _: Nanos,
        tally: &mut Tally,
    ) -> Result<(), BackendFault> {
        let Self(frames, at) = self;
        for frame in frames.iter().skip(std::mem::replace(at, frames.len())) {
            assert!(frame.is_empty() || burst.push(frame.as_slice().into(), Offload::NONE));
            if frame.is_empty() {
                tally.drop(DropReason::BadHeader);
            }
        }
        Ok(())
    }

    fn complete(&mut self) -> Result<bool, BackendFault> {
        Ok(false)
    }

    fn arm(&mut self) -> Wait {
        Wait::Nudge
    }

    fn disarm(&mut self) {}
}

/// Takes so many frames, is full then, and fails at one more.
#[derive(Debug)]
struct Taker {
    room: usize,
    fails: bool,
}

impl BackendSink for Taker {
    fn accepts(&self) -> Accepts {
        Accepts::empty()
    }

    fn put(
        &mut self,
        _: Nanos,
        burst: &Burst<'_>,
        list: &[u8],
        tally: &mut Tally,
    ) -> Result<bool, BackendFault> {
        for &index in list {
            if self.room > 0 {
                self.room -= 1;
                tally.moved(burst.frames()[usize::from(index)].len);
            } else if self.fails {
                return Err("enough".into());
            } else {
                tally.drop(DropReason::QueueFull);
            }
        }
        Ok(false)
    }
}

/// Ports 0, 1, … of one queue, of which the first sends and the others take.
struct Rig {
    source: SourceQueue,
    sinks: Vec<Arc<SinkQueue>>,
    _events: mpsc::Receiver<crate::port::PortEvent>,
}

impl Rig {
    fn new(source: Source, takers: Vec<Taker>, own: Option<[u8; 6]>) -> Self {
        let (events, inbox) = mpsc::channel();
        let fdb = Arc::new(Fdb::new(Config::default(), [1, 2]));
        let topology = Topology::new(Vec::new(), Arc::clone(&fdb));
        let snapshot = Arc::new(ArcSwap::from_pointee(Snapshot { topology, outlets: Vec::new() }));
        let core = |index: u16| {
            let names = (Arc::from("lan"), Arc::from("port"));
            let waits = String::new();
            Arc::new(PortCore::new(PortId(0), names, index, Arc::clone(&snapshot), waits, events.clone()))
        };
        let queue = SourceQueue::new(core(0), 0);
        queue.swap(source);
        let sinks: Vec<_> = takers.iter().map(|_| Arc::new(SinkQueue::new(0))).collect();
        let outlet = |(sink, index): (&Arc<SinkQueue>, u16)| Outlet {
            port: core(index),
            sinks: vec![Arc::clone(sink)],
            steering: None,
            tag: TagForm::AsIs,
            longest: 1514,
            coalesce: false,
        };
        let mut outlets = vec![None];
        outlets.extend(sinks.iter().zip(1..).map(|sink| Some(outlet(sink))));
        for (sink, taker) in sinks.iter().zip(takers) {
            sink.swap(Sink::Backend(Box::new(taker)));
        }
        let rules =
            |source| Rules { source, vlan: (&VlanMode::Passthrough).into(), private: None, mtu: 9000 };
        let ports = (0..outlets.len()).map(|port| Some(rules(own.filter(|_| port == 0)))).collect();
        snapshot.store(Arc::new(Snapshot { topology: Topology::new(ports, fdb), outlets }));
        Self { source: queue, sinks, _events: inbox }
    }

    fn poll(&self) {
        self.source.poll(&mut Scratch::default(), 1);
    }
}

const OWN: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// Frames that are to be dropped at every place where one can be, and some that are not.
fn any_frame() -> impl Strategy<Value = Vec<u8>> {
    let to = prop_oneof![
        3 => Just([0xff; 6]),
        2 => Just([2, 0, 0, 0, 0, 7]),
        1 => Just([1, 0x80, 0xc2, 0, 0, 0]),
        1 => Just(OWN),
    ];
    let from = prop_oneof![5 => Just(OWN), 1 => Just([2, 0, 0, 0, 0, 2]), 1 => Just([3; 6])];
    let len = prop_oneof![8 => 14..1514usize, 1 => 0..14usize, 1 => 1515..9100usize];
    (to, from, len).prop_map(|(to, from, len)| {
        let mut frame = [to, from].concat();
        frame.extend([8, 0]);
        frame.resize(len, 0);
        frame
    })
}

proptest! {
    #[test]
    fn frames_and_drops_add_up_to_what_was_offered_on_both_sides(
        frames in proptest::collection::vec(any_frame(), 0..=BURST_FRAMES),
        takers in proptest::collection::vec((0..80usize, any::<bool>()), 0..4),
    ) {
        let offered = frames.len() as u64;
        let takers: Vec<_> = takers.into_iter().map(|(room, fails)| Taker { room, fails }).collect();
        let rig = Rig::new(Source::Backend(Box::new(Feed(frames, 0))), takers, Some(OWN));
        rig.poll();
        let received = rig.source.counters.snapshot();
        prop_assert_eq!(received.frames + received.dropped(), offered);
        for sink in &rig.sinks {
            // Nobody's address is known: each frame that is moved goes to all.
            let sent = sink.counters.snapshot();
            prop_assert_eq!(sent.frames + sent.dropped(), received.frames);
        }
        prop_assert!(!rig.sinks.is_empty() || received.frames == 0);
    }
}

/// What a guest sent while its ring was disabled may be more descriptors than a ring keeps between two publications.
#[test]
fn ring_with_a_long_backlog_of_long_chains_is_emptied_when_it_is_enabled() {
    const GUEST: u64 = 0x10_0000;
    for form in [Form::Split, Form::Packed] {
        let (size, chains) = (32_768, 160);
        let arena = Arena::new(GUEST, 4 << 20).unwrap();
        let mut driver = DriverRing::new(&arena, form, size, Features::default()).unwrap();
        let region = Region::new(GUEST, GUEST, arena.len(), Arc::clone(arena.mapping()), 0).unwrap();
        let memory = Arc::new(GuestMemory::new(vec![region], None).unwrap());
        let at = driver.addresses();
        let at =
            RingAddresses { descriptors: at.descriptors, driver: at.driver, device: at.device, log: None };
        let packed = form == Form::Packed;
        let ring = Ring::new(&memory, packed, size, at, if packed { 0x8000_8000 } else { 0 }, false).unwrap();
        let features = NetFeatures { full_header: true, ..NetFeatures::default() };
        let ring = ActiveRing { ring, memory, features, enabled: false, kick: None, call: None };
        let rig = Rig::new(Source::Ring(Box::new(ring)), Vec::new(), None);
        let buffer = Buffer { addr: arena.alloc(64, 64).unwrap(), len: 64, writable: false };
        for _ in 0..chains {
            driver.add(&[buffer; 200], false).unwrap();
        }
        driver.publish();
        rig.source.set_enabled(true);
        let back = std::iter::from_fn(|| driver.poll_used().unwrap()).count();
        rig.poll();
        assert!(!rig.source.port.is_faulted(), "{:?}", rig.source.port.state());
        assert_eq!((back, rig.source.counters.snapshot().drops), (160, [(DropReason::Disabled, 160)].into()));
    }
}
