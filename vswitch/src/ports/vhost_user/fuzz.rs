//! A front-end that sends anything, for the fuzz target and its replayed corpus.
//!
//! The input is a program: each step names a request, how its payload is made (raw bytes, or plausible values with a
//! few bits from the input), and what descriptors go along. The session may answer, refuse or end; after each step
//! what it says and what the port has must agree, and at the end the port must have nothing.

use std::os::fd::{AsFd, OwnedFd};

use vmq::doorbell::Doorbell;
use vmq::frame::{Burst, FrameStore};
use vmq::memory::Mapping;
use zerocopy::FromBytes;
use zerocopy::little_endian::{U16, U32, U64};

use super::features::{Features, Negotiated, Protocol};
use super::message::{
    ConfigArea, Header, Incoming, InflightArea, Kind, LogArea, MAX_FDS, MemoryRegion, Request, VringAddress,
    VringFd, VringState,
};
use super::queue::ActiveRing;
use super::session::{Rings, Session, SessionConfig};
use crate::tally::Tally;

/// Bytes of the file that the input's memory regions lie in.
const FILE: usize = 1 << 18;

/// Steps of one input, so that no input takes long.
const STEPS: usize = 200;

/// A port that keeps rings and looks at what is in them.
#[derive(Debug, Default)]
struct Port {
    rings: Vec<Option<ActiveRing>>,
}

impl Port {
    fn poll(&mut self) {
        for (index, ring) in self.rings.iter_mut().enumerate() {
            let Some(ring) = ring else { continue };
            let mut store = FrameStore::default();
            let mut tally = Tally::default();
            if index % 2 == 1 {
                let _ = ring.receive(&mut Burst::new(&mut store), &mut tally);
            } else {
                let mut burst = Burst::new(&mut store);
                burst.push((&[7; 64][..]).into(), vmq::frame::Offload::default());
                let _ = ring.put(&burst, &[0], &mut tally);
            }
            let _ = ring.complete();
        }
    }
}

impl Rings for Port {
    fn install(&mut self, index: usize, ring: ActiveRing, _enabled: bool) {
        if self.rings.len() <= index {
            self.rings.resize_with(index + 1, || None);
        }
        assert!(self.rings[index].is_none(), "ring {index} installed twice");
        self.rings[index] = Some(ring);
    }

    fn remove(&mut self, index: usize) -> Option<ActiveRing> {
        self.rings.get_mut(index)?.take()
    }

    fn set_enabled(&mut self, index: usize, _enabled: bool) {
        assert!(self.rings[index].is_some(), "ring {index} is not there to be enabled");
    }

    fn set_call(&mut self, index: usize, call: Option<Doorbell>) {
        self.rings[index].as_mut().expect("a ring with a new call is installed").call = call;
    }

    fn negotiated(&mut self, _: &Negotiated) {}
}

/// Takes bytes off the input; zeroes once it is used up.
struct Input<'d>(&'d [u8]);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        let (&first, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        first
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        taken.to_vec()
    }

    /// Small numbers, edges, and now and then anything.
    fn number(&mut self) -> u64 {
        let choice = self.byte();
        match choice {
            0..=127 => u64::from(choice) << (self.byte() % 12),
            128..=159 => 1 << (choice % 64),
            160..=175 => u64::MAX - u64::from(self.byte()),
            176..=191 => 0x1_0000 * u64::from(self.byte()),
            _ => u64::read_from_bytes(&[self.bytes(8), vec![0; 8]].concat()[..8]).unwrap_or(0),
        }
    }

    fn u32(&mut self) -> U32 {
        U32::new(u32::try_from(self.number() & 0xffff_ffff).unwrap_or(0))
    }

    fn u64(&mut self) -> U64 {
        U64::new(self.number())
    }

    fn index(&mut self) -> U32 {
        let choice = self.byte();
        if choice < 240 { U32::new(u32::from(choice % 4)) } else { self.u32() }
    }

    fn state(&mut self) -> VringState {
        VringState { index: self.index(), num: self.u32() }
    }

    fn fd(&mut self) -> VringFd {
        let choice = self.byte();
        VringFd { index: if choice < 240 { choice % 4 } else { choice }, polled: choice & 16 != 0 }
    }

    fn region(&mut self) -> MemoryRegion {
        let page = |byte: u8| U64::new(u64::from(byte % 16) * 0x4000);
        let guest = page(self.byte());
        match self.byte() {
            0..=31 => {
                MemoryRegion { guest: self.u64(), size: self.u64(), user: self.u64(), offset: self.u64() }
            }
            choice => MemoryRegion { guest, size: page(choice), user: guest, offset: page(self.byte()) },
        }
    }

    fn request(&mut self, kind: Kind) -> Request {
        match kind {
            Kind::SetFeatures => Request::SetFeatures(match self.byte() {
                0..=63 => self.number(),
                choice => u64::from(choice & 1) << 26 | u64::from(choice & 2) << 33 | 1 << 32 | 1 << 30,
            }),
            Kind::SetProtocolFeatures => Request::SetProtocolFeatures(match self.byte() {
                0..=63 => self.number(),
                _ => 0x1_b01f,
            }),
            Kind::SetMemTable => Request::SetMemTable((0..self.byte() % 10).map(|_| self.region()).collect()),
            Kind::SetLogBase => Request::SetLogBase(LogArea { size: self.u64(), offset: self.u64() }),
            Kind::SetVringNum => Request::SetVringNum(self.state()),
            Kind::SetVringAddr => Request::SetVringAddr(VringAddress {
                index: self.index(),
                flags: self.u32(),
                descriptors: self.u64(),
                used: self.u64(),
                available: self.u64(),
                log: self.u64(),
            }),
            Kind::SetVringBase => Request::SetVringBase(self.state()),
            Kind::GetVringBase => Request::GetVringBase(self.state()),
            Kind::SetVringKick => Request::SetVringKick(self.fd()),
            Kind::SetVringCall => Request::SetVringCall(self.fd()),
            Kind::SetVringErr => Request::SetVringErr(self.fd()),
            Kind::SetVringEnable => Request::SetVringEnable(self.state()),
            Kind::NetSetMtu => Request::NetSetMtu(self.number()),
            Kind::GetConfig => {
                Request::GetConfig(ConfigArea { offset: self.u32(), size: self.u32(), flags: U32::ZERO })
            }
            Kind::GetInflightFd => Request::GetInflightFd(self.inflight()),
            Kind::SetInflightFd => Request::SetInflightFd(self.inflight()),
            Kind::AddMemReg => Request::AddMemReg(self.region()),
            Kind::RemMemReg => Request::RemMemReg(self.region()),
            Kind::SetStatus => Request::SetStatus(self.number()),
            plain => Request::parse(plain, &[]).unwrap_or(Request::Foreign(plain)),
        }
    }

    fn inflight(&mut self) -> InflightArea {
        let small = |number: u64| U16::new(u16::try_from(number & 0x1ff).unwrap_or(0));
        InflightArea {
            size: self.u64(),
            offset: self.u64(),
            rings: small(self.number()),
            ring_size: small(self.number()),
            padding: U32::ZERO,
        }
    }

    fn message(&mut self) -> (u32, Vec<u8>) {
        let choice = self.byte();
        let number = u32::from(choice & 63);
        match Kind::from_number(number) {
            Some(kind) if choice < 192 => {
                let bytes = self.request(kind).encode(false);
                (number, bytes.get(Header::LEN..).unwrap_or_default().to_vec())
            }
            _ => {
                let len = usize::from(self.byte());
                (number, self.bytes(len))
            }
        }
    }

    /// Usually the descriptors a request needs.
    fn descriptors(&mut self, number: u32, payload: &[u8], file: &OwnedFd) -> Vec<OwnedFd> {
        let choice = self.byte();
        let count = match Kind::from_number(number) {
            _ if choice >= 240 => usize::from(choice - 240),
            Some(Kind::SetMemTable) => usize::from(payload.first().copied().unwrap_or(0)).min(MAX_FDS),
            Some(Kind::SetVringKick | Kind::SetVringCall | Kind::SetVringErr) => {
                usize::from(payload.get(1).is_some_and(|high| high & 1 == 0))
            }
            Some(kind) => *kind.fds().end(),
            None => 0,
        };
        let doorbell = matches!(number, 12..=14) != (choice % 16 == 15);
        (0..count)
            .filter_map(|_| {
                if doorbell {
                    Doorbell::new().ok()?.as_fd().try_clone_to_owned().ok()
                } else {
                    file.try_clone().ok()
                }
            })
            .collect()
    }
}

fn header(number: u32, flags: u32, payload: &[u8]) -> Header {
    let size = U32::new(u32::try_from(payload.len()).unwrap_or(0));
    Header { request: U32::new(number), flags: U32::new(flags), size }
}

/// What a well-behaved front-end sends to get two rings running, so that inputs need not find that out.
fn prologue(packed: bool, config: &SessionConfig) -> Vec<Request> {
    let features = Features::offered(config) & !Features::OFFLOADS & !Features::LOG_ALL;
    let features = if packed { features } else { features - Features::RING_PACKED };
    let whole = MemoryRegion { size: U64::new(FILE as u64), ..MemoryRegion::default() };
    let mut requests = vec![
        Request::SetProtocolFeatures(Protocol::offered(config).bits()),
        Request::SetFeatures(features.bits()),
        Request::SetMemTable(vec![whole]),
    ];
    for index in 0..2u8 {
        let at = U64::new(0x4000 * u64::from(index));
        let wire = U32::new(index.into());
        let fd = VringFd { index, polled: false };
        requests.extend([
            Request::SetVringNum(VringState { index: wire, num: U32::new(16) }),
            Request::SetVringAddr(VringAddress {
                index: wire,
                flags: U32::ZERO,
                descriptors: at,
                used: at + U64::new(0x1000),
                available: at + U64::new(0x2000),
                log: U64::ZERO,
            }),
            Request::SetVringCall(fd),
            Request::SetVringKick(fd),
            Request::SetVringEnable(VringState { index: wire, num: U32::new(1) }),
        ]);
    }
    requests
}

/// Runs one input.
///
/// # Panics
/// If an invariant is broken: that is the point.
pub fn fuzz(data: &[u8]) {
    let mut input = Input(data);
    let Ok((_, file)) = Mapping::memfd("fuzz", FILE) else { return };
    let head = input.byte();
    let config = SessionConfig { queues: 2, config_space: head & 1 == 1, ..SessionConfig::default() };
    let mut known =
        if head & 2 == 2 { prologue(head & 4 == 4, &config).into_iter() } else { Vec::new().into_iter() };
    let mut port = Port::default();
    let mut session = Session::new(config.clone(), None);
    for _ in 0..STEPS {
        if let Some(request) = known.next() {
            let bytes = request.encode(false);
            let payload = bytes.get(Header::LEN..).unwrap_or_default().to_vec();
            let number = request.kind() as u32;
            // With no input of its own, it gets the descriptors it needs.
            let fds = Input(&[]).descriptors(number, &payload, &file);
            let header = header(number, 1, &payload);
            session
                .handle(Incoming { header, payload, fds }, &mut port)
                .expect("the prologue is well-behaved");
            continue;
        }
        if input.0.is_empty() {
            break;
        }
        let (number, payload) = input.message();
        let fds = input.descriptors(number, &payload, &file);
        let flags = 1 | if input.byte() & 1 == 1 { 8 } else { 0 };
        let header = header(number, flags, &payload);
        let outcome = session.handle(Incoming { header, payload, fds }, &mut port);
        for index in 0..config.rings() {
            let installed = port.rings.get(index).is_some_and(Option::is_some);
            assert!(
                session.is_running(index) == installed || outcome.is_err(),
                "ring {index} is lost or doubled"
            );
        }
        port.poll();
        match input.byte() {
            0 => drop(rustix::fs::ftruncate(&file, 0)),
            1 => drop(rustix::fs::ftruncate(&file, FILE as u64)),
            _ => {}
        }
        if outcome.is_err() {
            session.close(&mut port);
            assert!(port.rings.iter().all(Option::is_none), "a ring outlives its session");
            session = Session::new(config.clone(), None);
        }
    }
    session.close(&mut port);
    assert!(port.rings.iter().all(Option::is_none), "a ring outlives its session");
}
