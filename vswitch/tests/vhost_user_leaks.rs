//! Nothing a front-end sends, however often, may cost descriptors, mappings or memory (the classes of CVE-2019-14818
//! and CVE-2020-10726). A test binary of its own with one test, as it counts what the whole process holds.

#![allow(clippy::unwrap_used, reason = "a test binary")]

use std::os::fd::{AsFd, OwnedFd};

use vmq::doorbell::Doorbell;
use vmq::memory::Mapping;
use vswitch::ports::vhost_user::features::{Features, Negotiated, Protocol};
use vswitch::ports::vhost_user::message::{
    ConfigArea, Header, Incoming, InflightArea, Kind, LogArea, MemoryRegion, Request, VringAddress, VringFd,
    VringState,
};
use vswitch::ports::vhost_user::queue::ActiveRing;
use vswitch::ports::vhost_user::session::{Rings, Session, SessionConfig};
use zerocopy::FromBytes;

const ROUNDS: usize = 10_000;
const MEMORY: usize = 1 << 20;

#[derive(Default)]
struct Port([Option<ActiveRing>; 2]);

impl Rings for Port {
    fn install(&mut self, index: usize, ring: ActiveRing, _: bool) {
        assert!(self.0[index].replace(ring).is_none());
    }

    fn remove(&mut self, index: usize) -> Option<ActiveRing> {
        self.0[index].take()
    }

    fn set_enabled(&mut self, _: usize, _: bool) {}

    fn set_call(&mut self, index: usize, call: Option<Doorbell>) {
        self.0[index].as_mut().unwrap().call = call;
    }

    fn negotiated(&mut self, _: &Negotiated) {}
}

/// What a process holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Holdings {
    descriptors: usize,
    /// Mappings of files that came over a session.
    mappings: usize,
}

fn holdings() -> Holdings {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    Holdings {
        descriptors: std::fs::read_dir("/proc/self/fd").unwrap().count(),
        mappings: maps.lines().filter(|line| line.contains("memfd:")).count(),
    }
}

/// Kilobytes of memory that are the process's own.
fn own_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn region() -> MemoryRegion {
    MemoryRegion { guest: 0.into(), size: (MEMORY as u64).into(), user: 0x1000_0000.into(), offset: 0.into() }
}

/// A good request of `kind` for ring 1 of a running session, or the kind's number without a payload.
fn request(kind: Kind) -> Request {
    let state = |num: u32| VringState { index: 1.into(), num: num.into() };
    let fd = VringFd { index: 1, polled: false };
    let area = InflightArea {
        size: 0x1000.into(),
        offset: 0.into(),
        rings: 2.into(),
        ring_size: 16.into(),
        padding: 0.into(),
    };
    match kind {
        Kind::SetFeatures => Request::SetFeatures((Features::VERSION_1 | Features::LOG_ALL).bits()),
        Kind::SetProtocolFeatures => Request::SetProtocolFeatures(Protocol::all().bits()),
        Kind::SetMemTable => Request::SetMemTable(vec![region()]),
        Kind::SetLogBase => Request::SetLogBase(LogArea { size: 0x800.into(), offset: 0x10.into() }),
        Kind::SetVringNum => Request::SetVringNum(state(16)),
        Kind::SetVringAddr => Request::SetVringAddr(VringAddress {
            index: 1.into(),
            flags: 0.into(),
            descriptors: 0x1000_0000.into(),
            used: 0x1000_1000.into(),
            available: 0x1000_2000.into(),
            log: 0.into(),
        }),
        Kind::SetVringBase => Request::SetVringBase(state(0)),
        Kind::GetVringBase => Request::GetVringBase(state(0)),
        Kind::SetVringKick => Request::SetVringKick(fd),
        Kind::SetVringCall => Request::SetVringCall(fd),
        Kind::SetVringErr => Request::SetVringErr(fd),
        Kind::SetVringEnable => Request::SetVringEnable(state(1)),
        Kind::NetSetMtu => Request::NetSetMtu(1500),
        Kind::GetConfig => {
            Request::GetConfig(ConfigArea { offset: 0.into(), size: 12.into(), flags: 0.into() })
        }
        Kind::GetInflightFd => Request::GetInflightFd(area),
        Kind::SetInflightFd => Request::SetInflightFd(area),
        Kind::AddMemReg => {
            Request::AddMemReg(MemoryRegion { user: 0.into(), guest: (1 << 40).into(), ..region() })
        }
        Kind::RemMemReg => {
            Request::RemMemReg(MemoryRegion { user: 0.into(), guest: (1 << 40).into(), ..region() })
        }
        Kind::SetStatus => Request::SetStatus(7),
        plain => Request::parse(plain, &[]).unwrap_or(Request::Foreign(plain)),
    }
}

/// The descriptors that go with a good request of `kind`.
fn needed(kind: Kind, file: &OwnedFd, bell: &Doorbell) -> Vec<OwnedFd> {
    let fd = match kind {
        Kind::SetMemTable | Kind::SetLogBase | Kind::SetInflightFd | Kind::AddMemReg => file.as_fd(),
        Kind::SetVringKick | Kind::SetVringCall | Kind::SetVringErr => bell.as_fd(),
        _ => return Vec::new(),
    };
    vec![fd.try_clone_to_owned().unwrap()]
}

struct Peer {
    port: Port,
    session: Session,
    file: OwnedFd,
    bell: Doorbell,
}

impl Peer {
    fn new() -> Self {
        let (_, file) = Mapping::memfd("peer", MEMORY).unwrap();
        let config = SessionConfig { config_space: true, ..SessionConfig::default() };
        let session = Session::new(config, None);
        Self { port: Port::default(), session, file, bell: Doorbell::new().unwrap() }
    }

    /// Sends a request with what it needs and `surplus` descriptors more.
    fn send(&mut self, kind: Kind, surplus: usize) -> bool {
        let bytes = request(kind).encode(true);
        let (header, payload) = bytes.split_at(Header::LEN);
        let mut fds = needed(kind, &self.file, &self.bell);
        fds.extend((0..surplus).map(|_| self.file.try_clone().unwrap()));
        let header = Header::read_from_bytes(header).unwrap();
        self.session.handle(Incoming { header, payload: payload.to_vec(), fds }, &mut self.port).is_ok()
    }

    fn run(&mut self) {
        use Kind::*;
        for kind in [
            SetProtocolFeatures,
            SetFeatures,
            SetMemTable,
            SetVringNum,
            SetVringAddr,
            SetVringCall,
            SetVringKick,
        ] {
            assert!(self.send(kind, 0), "{kind:?}");
        }
        assert!(self.session.is_running(1));
    }
}

#[test]
fn each_request_ten_thousand_times_with_0_to_16_surplus_descriptors_costs_nothing() {
    // One round of everything, so that what is kept for good (buffers, names) is there before the count.
    for kind in Kind::ALL {
        let mut peer = Peer::new();
        peer.run();
        peer.send(kind, 0);
        peer.session.close(&mut peer.port);
    }
    let before = holdings();
    let memory = own_memory();
    for kind in Kind::ALL {
        let mut peer = Peer::new();
        peer.run();
        let running = holdings();
        for round in 0..ROUNDS {
            // Every other time a good one, for it goes deepest.
            let surplus = if round % 2 == 0 { 0 } else { round / 2 % 17 };
            peer.send(kind, surplus);
        }
        // A session may hold what its last good message gave it, never what the ones before did.
        let after = holdings();
        assert!(after.descriptors <= running.descriptors + 1, "{kind:?}: {running:?} became {after:?}");
        assert!(after.mappings <= running.mappings + 2, "{kind:?}: {running:?} became {after:?}");
        peer.session.close(&mut peer.port);
        drop(peer);
        assert_eq!(holdings(), before, "{kind:?}");
    }
    let grown = own_memory().saturating_sub(memory);
    assert!(grown < 2048, "{grown} KiB more than before");
}
