//! A guest with memory, rings and a front-end, and a port that keeps the rings it is given.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use vmq::Mac;
use vmq::doorbell::Doorbell;
use vmq::driver::{Arena, Buffer, DriverRing, Features as RingFeatures, Form};
use vmq::frame::{Burst, FrameStore};
use vmq::ring::RingAddresses;

use crate::ports::vhost_user::features::{Features, Negotiated, Protocol};
use crate::ports::vhost_user::frontend::{Frontend, RingSetup};
use crate::ports::vhost_user::message::{MemoryRegion, Request};
use crate::ports::vhost_user::queue::ActiveRing;
use crate::ports::vhost_user::session::{Rings, Session, SessionConfig};
use crate::ports::vhost_user::socket::{Connection, Received};
use crate::tally::Tally;

/// What the guest's process adds to guest-physical addresses.
pub const USER: u64 = 0x7f00_0000_0000;
pub const GUEST: u64 = 0x10_0000;
pub const MEMORY: usize = 4 << 20;
pub const ENTRIES: u16 = 16;
const HEADER: usize = 12;
pub const BUFFER: u32 = 2048;

/// Waits until `done`, or fails.
pub fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(20), "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A client that was not refused. A socket has a name before it listens.
pub fn connect(path: &Path) -> Frontend {
    let mut front = None;
    wait_for("a connection", || {
        front = UnixStream::connect(path).ok().map(Frontend::from);
        front.as_mut().is_some_and(|front| front.ask(&Request::GetFeatures).is_ok())
    });
    front.unwrap()
}

#[derive(Debug)]
pub struct Installed {
    pub ring: ActiveRing,
    pub enabled: bool,
}

#[derive(Debug, Default)]
pub struct PortState {
    pub rings: Vec<Option<Installed>>,
    pub negotiated: Option<Negotiated>,
    pub announced: Vec<Mac>,
    pub installs: usize,
}

/// A port, shared with the thread that runs its session.
#[derive(Debug, Clone, Default)]
pub struct Port(pub Arc<Mutex<PortState>>);

impl Rings for Port {
    fn install(&mut self, index: usize, ring: ActiveRing, enabled: bool) {
        let state = &mut *self.0.lock().unwrap();
        if state.rings.len() <= index {
            state.rings.resize_with(index + 1, || None);
        }
        assert!(state.rings[index].is_none(), "ring {index} is installed already");
        state.rings[index] = Some(Installed { ring, enabled });
        state.installs += 1;
    }

    fn remove(&mut self, index: usize) -> Option<ActiveRing> {
        Some(self.0.lock().unwrap().rings.get_mut(index)?.take()?.ring)
    }

    fn set_enabled(&mut self, index: usize, enabled: bool) {
        self.0.lock().unwrap().rings[index].as_mut().unwrap().enabled = enabled;
    }

    fn set_call(&mut self, index: usize, call: Option<Doorbell>) {
        self.0.lock().unwrap().rings[index].as_mut().unwrap().ring.call = call;
    }

    fn negotiated(&mut self, negotiated: &Negotiated) {
        self.0.lock().unwrap().negotiated = Some(*negotiated);
    }

    fn announce(&mut self, mac: Mac) {
        self.0.lock().unwrap().announced.push(mac);
    }
}

impl Port {
    pub fn installed(&self) -> usize {
        self.0.lock().unwrap().rings.iter().flatten().count()
    }

    pub fn enabled(&self) -> usize {
        self.0.lock().unwrap().rings.iter().flatten().filter(|ring| ring.enabled).count()
    }

    pub fn installs(&self) -> usize {
        self.0.lock().unwrap().installs
    }

    /// Hands what pair `pair` sends back to it; returns how many frames moved.
    pub fn echo(&self, pair: usize) -> u64 {
        let state = &mut *self.0.lock().unwrap();
        let [Some(receive), Some(transmit)] = &mut state.rings[2 * pair..2 * pair + 2] else {
            panic!("pair {pair} is not installed")
        };
        let (mut store, mut tally, mut put) = (FrameStore::default(), Tally::default(), Tally::default());
        {
            let mut burst = Burst::new(&mut store);
            transmit.ring.receive(&mut burst, &mut tally).unwrap();
            let list: Vec<u8> = (0..u8::try_from(burst.len()).unwrap()).collect();
            receive.ring.put(&burst, &list, &mut put).unwrap();
        }
        transmit.ring.complete().unwrap();
        put.frames
    }

    /// Takes what pair `pair` sends and crashes before it is done with.
    pub fn take_and_crash(&self, pair: usize) -> u64 {
        let state = &mut *self.0.lock().unwrap();
        let transmit = state.rings[2 * pair + 1].as_mut().unwrap();
        let mut store = FrameStore::default();
        let mut burst = Burst::new(&mut store);
        transmit.ring.receive(&mut burst, &mut Tally::default()).unwrap();
        burst.len() as u64
    }
}

/// Runs a session until the front-end leaves or goes too far; returns why it ended.
pub fn serve(stream: UnixStream, config: SessionConfig, port: &Port) -> JoinHandle<Result<(), String>> {
    let mut port = port.clone();
    std::thread::spawn(move || {
        let mut connection = Connection::new(stream.into()).unwrap();
        let mut session = Session::new(config, None);
        let end = loop {
            match connection.receive() {
                Ok(Received::Closed) => break Ok(()),
                Ok(Received::Message(message)) => match session.handle(message, &mut port) {
                    Ok(Some(reply)) => connection.send(reply).unwrap(),
                    Ok(None) => {}
                    Err(error) => break Err(error.report()),
                },
                Ok(Received::Pending) => {
                    poll(&mut [PollFd::new(&connection, PollFlags::IN)], None).unwrap();
                }
                Err(error) => break Err(error.to_string()),
            }
        };
        session.close(&mut port);
        end
    })
}

/// One queue pair of the guest.
#[derive(Debug)]
pub struct Pair {
    pub receive: DriverRing,
    pub transmit: DriverRing,
    pub kicks: [Doorbell; 2],
    pub calls: [Doorbell; 2],
    posted: Vec<(vmq::driver::Token, u64)>,
}

/// A guest: survives its back-end, and gets a new front-end for each connection.
#[derive(Debug)]
pub struct Guest {
    pub arena: Arena,
    pub pairs: Vec<Pair>,
}

impl Guest {
    pub fn new(form: Form, pairs: usize) -> Self {
        let arena = Arena::new(GUEST, MEMORY).unwrap();
        let features = RingFeatures { event_idx: false, indirect: false, in_order: false };
        let ring = || {
            // Each ring has a page of its own, so that the dirty log tells them apart.
            arena.alloc(1, 4096).unwrap();
            arena.alloc(4095, 1).unwrap();
            DriverRing::new(&arena, form, ENTRIES, features).unwrap()
        };
        let bells = || [Doorbell::new().unwrap(), Doorbell::new().unwrap()];
        let pairs = (0..pairs)
            .map(|_| Pair {
                receive: ring(),
                transmit: ring(),
                kicks: bells(),
                calls: bells(),
                posted: Vec::new(),
            })
            .collect();
        arena.alloc(1, 4096).unwrap();
        arena.alloc(4095, 1).unwrap();
        Self { arena, pairs }
    }

    pub fn region(&self) -> MemoryRegion {
        MemoryRegion {
            guest: GUEST.into(),
            size: self.arena.len().into(),
            user: (GUEST + USER).into(),
            offset: 0.into(),
        }
    }

    pub fn features(&self) -> Features {
        let packed = self.pairs[0].receive.form() == Form::Packed;
        let base = Features::VERSION_1 | Features::PROTOCOL_FEATURES | Features::MRG_RXBUF;
        if packed { base | Features::RING_PACKED } else { base }
    }

    pub fn addresses(ring: &DriverRing) -> RingAddresses {
        let at = ring.addresses();
        RingAddresses {
            descriptors: at.descriptors + USER,
            driver: at.driver + USER,
            device: at.device + USER,
            log: None,
        }
    }

    /// Negotiates, shows memory, starts and enables every ring at `base`.
    pub fn start(&self, front: &mut Frontend, protocol: Protocol, base: u32) {
        front.negotiate(self.features(), protocol).unwrap();
        front.show_memory(&[self.region()], &[self.arena.fd()]).unwrap();
        self.start_rings(front, &vec![base; 2 * self.pairs.len()]);
    }

    pub fn start_rings(&self, front: &mut Frontend, bases: &[u32]) {
        for (index, &base) in (0u8..).zip(bases) {
            let (pair, way) = (&self.pairs[usize::from(index / 2)], usize::from(index % 2));
            let ring = [&pair.receive, &pair.transmit][way];
            let setup = RingSetup {
                size: ring.size(),
                addresses: Self::addresses(ring),
                base,
                kick: Some(pair.kicks[way].as_fd()),
                call: Some(pair.calls[way].as_fd()),
            };
            front.start_ring(index, &setup).unwrap();
            front.enable_ring(index, true).unwrap();
        }
    }

    /// The base of a ring nothing happened in.
    pub fn fresh(&self) -> u32 {
        if self.pairs[0].receive.form() == Form::Packed { 0x8000 } else { 0 }
    }

    /// Posts `count` receive buffers in pair `pair`; returns where they lie.
    pub fn post(&mut self, pair: usize, count: usize) -> Vec<u64> {
        let Pair { receive, posted, .. } = &mut self.pairs[pair];
        let mut addresses = Vec::new();
        for _ in 0..count {
            let addr = self.arena.alloc(BUFFER.into(), 4096).unwrap();
            let token = receive.add(&[Buffer { addr, len: BUFFER, writable: true }], false).unwrap();
            posted.push((token, addr));
            addresses.push(addr);
        }
        receive.publish();
        addresses
    }

    pub fn send(&mut self, pair: usize, frame: &[u8]) {
        let bytes = [&[0; HEADER], frame].concat();
        let addr = self.arena.alloc(bytes.len() as u64, 64).unwrap();
        self.arena.write(addr, &bytes);
        let len = u32::try_from(bytes.len()).unwrap();
        let transmit = &mut self.pairs[pair].transmit;
        transmit.add(&[Buffer { addr, len, writable: false }], false).unwrap();
        transmit.publish();
    }

    /// Takes back what was sent; returns how many.
    pub fn reclaim(&mut self, pair: usize) -> usize {
        std::iter::from_fn(|| self.pairs[pair].transmit.poll_used().unwrap()).count()
    }

    pub fn received(&mut self, pair: usize) -> Vec<Vec<u8>> {
        let Pair { receive, posted, .. } = &mut self.pairs[pair];
        let mut frames = Vec::new();
        while let Some(used) = receive.poll_used().unwrap() {
            let at = posted.iter().position(|(token, _)| *token == used.token).unwrap();
            let (_, addr) = posted.remove(at);
            let mut bytes = vec![0; used.len as usize];
            self.arena.read(addr, &mut bytes);
            frames.push(bytes.split_off(HEADER));
        }
        frames
    }

    /// Sends `count` distinct frames, has the port echo them, and checks each.
    pub fn round_trip(&mut self, pair: usize, port: &Port, count: u8) {
        self.post(pair, count.into());
        let frames: Vec<Vec<u8>> = (0..count).map(|n| vec![n + 1; 60 + usize::from(n)]).collect();
        frames.iter().for_each(|frame| self.send(pair, frame));
        assert_eq!(port.echo(pair), u64::from(count));
        assert_eq!(self.received(pair), frames);
        assert_eq!(self.reclaim(pair), usize::from(count));
    }
}

/// A guest's front-end connected to a session.
pub struct Lab {
    pub front: Frontend,
    pub port: Port,
    session: JoinHandle<Result<(), String>>,
}

impl Lab {
    pub fn new(config: SessionConfig) -> Self {
        Self::with_port(config, Port::default())
    }

    pub fn with_port(config: SessionConfig, port: Port) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let session = serve(theirs, config, &port);
        Self { front: ours.into(), port, session }
    }

    /// The front-end leaves.
    pub fn leave(self) -> Result<(), String> {
        drop(self.front);
        let end = self.session.join().unwrap();
        assert_eq!(self.port.installed(), 0, "rings outlive their session");
        end
    }

    /// The session must end of its own accord.
    pub fn ended(self) -> String {
        let end = self.session.join().unwrap();
        assert_eq!(self.port.installed(), 0, "rings outlive their session");
        drop(self.front);
        end.unwrap_err()
    }
}

pub fn pairs(queues: u16) -> SessionConfig {
    SessionConfig { queues, ..SessionConfig::default() }
}

pub fn memfd(len: usize) -> OwnedFd {
    vmq::memory::Mapping::memfd("test", len).unwrap().1
}
