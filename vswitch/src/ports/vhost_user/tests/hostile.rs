//! A front-end that means harm. Each test names the fault it stands for; see also `tests/vhost_user_leaks.rs`.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;
use vmq::doorbell::Doorbell;
use vmq::driver::Form;
use vmq::frame::{Burst, FrameStore};
use vmq::ring::RingFault;
use zerocopy::little_endian::{U16, U32, U64};

use super::rig::*;
use crate::ports::vhost_user::features::{Features, Protocol};
use crate::ports::vhost_user::frontend::{Frontend, RingSetup};
use crate::ports::vhost_user::fuzz::fuzz;
use crate::ports::vhost_user::message::{
    Header, Incoming, InflightArea, Kind, LogArea, MemoryRegion, Request, VringAddress, VringFd, VringState,
};
use crate::ports::vhost_user::session::Session;
use crate::tally::Tally;

/// A front-end that got as far as `protocol` features, for one request that must end the session.
fn ends(protocol: Protocol, act: impl FnOnce(&mut Frontend)) -> String {
    let mut lab = Lab::new(pairs(1));
    lab.front.negotiate(Features::VERSION_1 | Features::PROTOCOL_FEATURES, protocol).unwrap();
    act(&mut lab.front);
    lab.ended()
}

fn region(guest: u64, size: u64, offset: u64) -> MemoryRegion {
    MemoryRegion { guest: guest.into(), size: size.into(), user: guest.into(), offset: offset.into() }
}

/// Sums near 2^64 (the class of CVE-2020-10722).
const EDGES: [u64; 10] =
    [0, 1, 0xfff, 0x1000, 0x10_0000, 1 << 47, 1 << 63, u64::MAX - 0xfff, u64::MAX - 1, u64::MAX];

#[test]
fn log_whose_size_and_offset_wrap_or_exceed_the_file_is_refused() {
    for size in EDGES {
        for offset in EDGES {
            let fits = size.checked_add(offset).is_some_and(|end| end <= 0x1000) && size > 0;
            let area = LogArea { size: size.into(), offset: offset.into() };
            let mut lab = Lab::new(pairs(1));
            lab.front.negotiate(Features::LOG_ALL, Protocol::LOG_SHMFD).unwrap();
            let told = lab.front.tell(&Request::SetLogBase(area), &[memfd(0x1000).as_fd()]);
            assert_eq!(
                told.is_ok(),
                fits || size == 0 && (1..=0x1000).contains(&offset),
                "{size:#x} at {offset:#x}"
            );
        }
    }
}

#[test]
fn memory_region_whose_sums_wrap_or_exceed_the_file_is_refused() {
    for guest in EDGES {
        for size in EDGES {
            for offset in EDGES {
                let fits = size > 0
                    && size.checked_add(offset).is_some_and(|end| end <= 0x1000)
                    && guest.checked_add(size).is_some();
                let mut lab = Lab::new(pairs(1));
                lab.front.negotiate(Features::empty(), Protocol::REPLY_ACK).unwrap();
                let told = lab.front.show_memory(&[region(guest, size, offset)], &[memfd(0x1000).as_fd()]);
                assert_eq!(told.is_ok(), fits, "{size:#x} at {guest:#x} offset {offset:#x}");
            }
        }
    }
}

#[test]
fn ring_addresses_near_the_end_of_the_address_space_are_refused() {
    let guest = Guest::new(Form::Split, 1);
    let good = Guest::addresses(&guest.pairs[0].receive);
    for edge in EDGES.into_iter().chain([good.device + 2, good.device + MEMORY as u64, GUEST + USER - 1]) {
        for part in 0..3 {
            let mut addresses = good;
            *[&mut addresses.descriptors, &mut addresses.driver, &mut addresses.device][part] = edge;
            let mut lab = Lab::new(pairs(1));
            lab.front.negotiate(guest.features(), Protocol::REPLY_ACK).unwrap();
            lab.front.show_memory(&[guest.region()], &[guest.arena.fd()]).unwrap();
            let setup = RingSetup { size: ENTRIES, addresses, base: 0, kick: None, call: None };
            // A shifted available ring may still be well formed.
            if part == 1 && edge == good.device + 2 {
                continue;
            }
            assert!(lab.front.start_ring(0, &setup).is_err(), "part {part} at {edge:#x}");
            assert!(lab.ended().contains("not in guest memory"));
        }
    }
}

#[test]
fn inflight_record_whose_sums_wrap_or_do_not_fit_is_refused() {
    let try_area = |size: u64, offset: u64, rings: u16, entries: u16| {
        let area = InflightArea {
            size: size.into(),
            offset: offset.into(),
            rings: rings.into(),
            ring_size: entries.into(),
            padding: 0.into(),
        };
        let mut lab = Lab::new(pairs(1));
        lab.front.negotiate(Features::VERSION_1, Protocol::INFLIGHT_SHMFD | Protocol::REPLY_ACK).unwrap();
        lab.front.tell(&Request::SetInflightFd(area), &[memfd(0x1000).as_fd()]).is_ok()
    };
    assert!(try_area(0x1000, 0, 2, 16));
    assert!(try_area(0x800, 0x800, 2, 16));
    for size in EDGES {
        for offset in EDGES {
            let fits =
                size >= 640 && size.checked_add(offset).is_some_and(|end| end <= 0x1000) && offset % 8 == 0;
            assert_eq!(try_area(size, offset, 2, 16), fits, "{size:#x} at {offset:#x}");
        }
    }
    for (rings, entries) in [(0, 16), (3, 16), (u16::MAX, 16), (2, 0), (2, u16::MAX), (2, 32769), (2, 1024)] {
        assert!(!try_area(0x1000, 0, rings, entries), "{rings} rings of {entries}");
    }
}

/// The class of CVE-2020-10723: an index cut to 16 bits after its check.
#[test]
fn ring_index_beyond_the_ports_rings_is_refused_however_large() {
    for index in [2u32, 255, 256, 0x1_0000, 0x1_0001, 0x8000_0000, 0xffff_0000, u32::MAX] {
        let state = VringState { index: index.into(), num: 1.into() };
        let address = VringAddress { index: index.into(), ..VringAddress::default() };
        for request in [
            Request::SetVringNum(state),
            Request::SetVringBase(state),
            Request::GetVringBase(state),
            Request::SetVringEnable(state),
            Request::SetVringAddr(address),
        ] {
            let reason =
                ends(Protocol::REPLY_ACK, |front| front.send_raw(&request.encode(true), &[]).unwrap());
            assert!(reason.contains(&format!("ring {index} of a port with 2")), "{reason}");
        }
    }
    for index in [2u8, 255] {
        for polled in [false, true] {
            let fd = VringFd { index, polled };
            for request in [Request::SetVringKick(fd), Request::SetVringCall(fd), Request::SetVringErr(fd)] {
                let bell = Doorbell::new().unwrap();
                let fds = if polled { vec![] } else { vec![bell.as_fd()] };
                let reason =
                    ends(Protocol::REPLY_ACK, |front| front.send_raw(&request.encode(true), &fds).unwrap());
                assert!(reason.contains("of a port with 2"), "{reason}");
            }
        }
    }
}

#[test]
fn ring_size_zero_odd_or_huge_is_refused() {
    let guest = Guest::new(Form::Split, 1);
    for size in [0, 3, 24, 32769, 65535, 65536, 0xffff_0010] {
        let mut lab = Lab::new(pairs(1));
        lab.front.negotiate(guest.features(), Protocol::empty()).unwrap();
        lab.front.show_memory(&[guest.region()], &[guest.arena.fd()]).unwrap();
        let state = VringState { index: 0.into(), num: size.into() };
        lab.front.tell(&Request::SetVringNum(state), &[]).unwrap();
        let _ = lab.front.set_addresses(0, &Guest::addresses(&guest.pairs[0].receive));
        let _ = lab.front.tell(&Request::SetVringKick(VringFd { index: 0, polled: true }), &[]);
        let reason = lab.ended();
        assert!(reason.contains("size") || reason.contains("value"), "{reason}");
    }
}

#[test]
fn features_that_were_not_offered_are_refused() {
    for bit in (0..64).filter(|bit| Features::from_bits(1 << bit).is_none()) {
        let reason = ends(Protocol::REPLY_ACK, |front| {
            front.send_raw(&Request::SetFeatures(1 << bit).encode(true), &[]).unwrap();
        });
        assert!(reason.contains(&format!("bit {bit}")), "{reason}");
        let reason = ends(Protocol::REPLY_ACK, |front| {
            front.send_raw(&Request::SetProtocolFeatures(1 << bit | 1 << 63).encode(true), &[]).unwrap();
        });
        assert!(reason.contains("bit 63"), "{reason}");
    }
}

#[test]
fn features_changed_under_running_rings_are_refused() {
    let guest = Guest::new(Form::Split, 1);
    let mut lab = Lab::new(pairs(1));
    guest.start(&mut lab.front, Protocol::REPLY_ACK, 0);
    lab.front.tell(&Request::SetFeatures(guest.features().bits()), &[]).unwrap();
    let other = guest.features() | Features::RING_PACKED;
    lab.front.send_raw(&Request::SetFeatures(other.bits()).encode(true), &[]).unwrap();
    assert!(lab.ended().contains("ring_packed"));
}

#[test]
fn doorbell_that_is_a_file_or_a_pipe_is_refused() {
    let (reader, writer) = std::io::pipe().unwrap();
    for fd in [memfd(8), reader.into(), writer.into()] {
        let kick = Request::SetVringKick(VringFd { index: 0, polled: false });
        let reason =
            ends(Protocol::REPLY_ACK, |front| front.send_raw(&kick.encode(true), &[fd.as_fd()]).unwrap());
        assert!(reason.contains("not an eventfd"), "{reason}");
    }
}

#[test]
fn memory_that_is_no_file_is_refused() {
    let bell = Doorbell::new().unwrap();
    let (reader, _writer) = std::io::pipe().unwrap();
    for fd in [bell.as_fd(), reader.as_fd()] {
        let table = Request::SetMemTable(vec![region(0, 0x1000, 0)]);
        let reason = ends(Protocol::REPLY_ACK, |front| front.send_raw(&table.encode(true), &[fd]).unwrap());
        assert!(reason.contains("not in memory"), "{reason}");
    }
}

#[test]
fn overlapping_regions_are_refused_in_guest_and_in_user_addresses() {
    let file = memfd(0x4000);
    let moved = MemoryRegion { user: 0x10_0800.into(), ..region(0x20_0000, 0x1000, 0) };
    for second in [region(0x10_0fff, 1, 0), moved] {
        let table = Request::SetMemTable(vec![region(0x10_0000, 0x1000, 0), second]);
        let reason = ends(Protocol::REPLY_ACK, |front| {
            front.send_raw(&table.encode(true), &[file.as_fd(), file.as_fd()]).unwrap();
        });
        assert!(reason.contains("overlap"), "{reason}");
    }
}

/// Has whoever rings `call` wait, though it was handed over as one that does not.
fn block(call: &Doorbell) {
    call.clear();
    rustix::io::write(call, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    rustix::io::ioctl_fionbio(call, false).unwrap();
}

#[test]
fn interrupt_that_makes_the_switch_wait_faults_its_ring() {
    let mut guest = Guest::new(Form::Split, 1);
    let mut lab = Lab::new(pairs(1));
    guest.start(&mut lab.front, Protocol::REPLY_ACK, 0);
    guest.post(0, 1);
    guest.send(0, &[1; 60]);
    guest.pairs[0].calls.iter().for_each(block);
    let state = &mut *lab.port.0.lock().unwrap();
    let [Some(receive), Some(transmit)] = &mut state.rings[..] else { panic!("not installed") };
    let (mut store, mut tally) = (FrameStore::default(), Tally::default());
    let mut burst = Burst::new(&mut store);
    transmit.ring.receive(&mut burst, &mut tally).unwrap();
    assert_eq!(receive.ring.put(&burst, &[0], &mut tally), Err(RingFault::DoorbellBlocks));
    drop(burst);
    assert_eq!(transmit.ring.complete(), Err(RingFault::DoorbellBlocks));
}

#[test]
fn interrupt_that_makes_the_control_thread_wait_ends_the_session() {
    let guest = Guest::new(Form::Split, 1);
    let mut lab = Lab::new(pairs(1));
    guest.start(&mut lab.front, Protocol::REPLY_ACK, 0);
    let (call, over) = (Doorbell::new().unwrap(), AtomicBool::new(false));
    block(&call);
    std::thread::scope(|scope| {
        // The switch takes it, sets it as it should be, and rings it.
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                rustix::io::ioctl_fionbio(&call, false).unwrap();
            }
        });
        let set = Request::SetVringCall(VringFd { index: 0, polled: false });
        while lab.front.tell(&set, &[call.as_fd()]).is_ok() {}
        over.store(true, Ordering::Relaxed);
    });
    assert!(lab.ended().contains("full and blocking"));
}

/// Item 6: the peer cuts its memory file while the switch copies.
#[test]
fn memory_file_cut_short_is_noticed_and_the_successor_starts_afresh() {
    let mut guest = Guest::new(Form::Split, 1);
    let mut lab = Lab::new(pairs(1));
    guest.start(&mut lab.front, Protocol::REPLY_ACK, 0);
    guest.round_trip(0, &lab.port, 3);
    rustix::fs::ftruncate(guest.arena.fd(), 0x1000).unwrap();
    let lost = {
        let state = &mut *lab.port.0.lock().unwrap();
        let ring = &mut state.rings[1].as_mut().unwrap().ring;
        let mut store = FrameStore::default();
        let _ = ring.receive(&mut Burst::new(&mut store), &mut Tally::default());
        ring.complete().unwrap();
        ring.lost()
    };
    assert!(lost);
    // A table that names the file as it was is refused.
    assert!(lab.front.show_memory(&[guest.region()], &[guest.arena.fd()]).is_err());
    assert!(lab.ended().contains("file has 4096 bytes"));
    let mut fresh = Guest::new(Form::Split, 1);
    let mut lab = Lab::new(pairs(1));
    fresh.start(&mut lab.front, Protocol::REPLY_ACK, 0);
    fresh.round_trip(0, &lab.port, 3);
    lab.leave().unwrap();
}

#[test]
fn surplus_descriptors_end_the_session_for_every_request() {
    let file = memfd(0x1000);
    for kind in Kind::ALL {
        for surplus in [1, 2, 7, 8, 9, 16] {
            let count = kind.fds().end() + surplus;
            let fds = vec![file.as_fd(); count];
            let bytes = Request::parse(kind, &[]).unwrap_or(Request::Foreign(kind)).encode(true);
            let reason = ends(Protocol::all(), |front| front.send_raw(&bytes, &fds).unwrap());
            assert!(reason.contains("descriptors"), "{kind:?} with {count}: {reason}");
        }
    }
}

#[test]
fn descriptors_with_every_byte_of_a_message_are_not_hoarded() {
    let file = memfd(0x1000);
    let reason = ends(Protocol::REPLY_ACK, |front| {
        for byte in Request::GetFeatures.encode(false) {
            if front.send_raw(&[byte], &[file.as_fd()]).is_err() {
                break;
            }
        }
    });
    assert!(reason.contains("more than 8 descriptors"), "{reason}");
}

#[test]
fn unknown_request_is_refused_politely_if_an_answer_is_wanted_and_ends_the_session_if_not() {
    let unknown = |flags: u32| -> Vec<u8> {
        [45u32, flags, 3].iter().flat_map(|word| word.to_le_bytes()).chain([1, 2, 3]).collect()
    };
    let mut lab = Lab::new(pairs(1));
    lab.front.negotiate(Features::empty(), Protocol::REPLY_ACK).unwrap();
    lab.front.send_raw(&unknown(9), &[]).unwrap();
    let mut answer = [0; 20];
    let mut filled = 0;
    wait_for("the refusal", || {
        filled += rustix::io::read(&lab.front, &mut answer[filled..]).unwrap();
        filled == answer.len()
    });
    assert_eq!(answer, [45, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    lab.front.ask(&Request::GetFeatures).unwrap();
    lab.front.send_raw(&unknown(1), &[]).unwrap();
    assert!(lab.ended().contains("request 45 is unknown"));
}

// Every request in every state.

/// How far a session has come.
const STATES: [&str; 10] = [
    "fresh",
    "negotiated",
    "memory",
    "configured",
    "running",
    "logging",
    "recorded",
    "packed",
    "stopped",
    "reset",
];

struct Bench {
    guest: Guest,
    port: Port,
    session: Session,
}

impl Bench {
    fn reach(state: &str) -> Self {
        let form = if state == "packed" { Form::Packed } else { Form::Split };
        let (guest, port) = (Guest::new(form, 2), Port::default());
        let mut bench = Self { guest, port, session: Session::new(pairs(2), None) };
        let steps = STATES.iter().position(|name| *name == state).unwrap();
        if steps == 0 {
            return bench;
        }
        let features = bench.guest.features();
        bench.must(Request::SetProtocolFeatures((Protocol::all() - Protocol::CONFIG).bits()), vec![]);
        bench.must(Request::SetFeatures(features.bits()), vec![]);
        if steps >= 2 {
            let file = bench.guest.arena.fd().try_clone_to_owned().unwrap();
            bench.must(Request::SetMemTable(vec![bench.guest.region()]), vec![file]);
        }
        if state == "recorded" {
            let area =
                InflightArea { rings: 4.into(), ring_size: 16.into(), size: 0x1000.into(), ..inflight() };
            bench.must(Request::SetInflightFd(area), vec![memfd(0x1000)]);
        }
        if steps >= 3 {
            bench.start(state != "configured");
        }
        match state {
            "logging" => {
                let area = LogArea { size: 0x800.into(), offset: 0x800.into() };
                bench.must(Request::SetLogBase(area), vec![memfd(0x1000)]);
                bench.must(Request::SetFeatures((features | Features::LOG_ALL).bits()), vec![]);
            }
            "stopped" => {
                for index in 0..4u32 {
                    bench.must(
                        Request::GetVringBase(VringState { index: index.into(), num: U32::ZERO }),
                        vec![],
                    );
                }
            }
            "reset" => bench.must(Request::ResetDevice, vec![]),
            _ => {}
        }
        bench
    }

    fn start(&mut self, kick: bool) {
        for index in 0..4u8 {
            let pair = &self.guest.pairs[usize::from(index / 2)];
            let addresses = Guest::addresses([&pair.receive, &pair.transmit][usize::from(index % 2)]);
            let state = |num: u32| VringState { index: U32::new(index.into()), num: U32::new(num) };
            let fd = VringFd { index, polled: false };
            self.must(Request::SetVringNum(state(ENTRIES.into())), vec![]);
            self.must(Request::SetVringAddr(address(index, &addresses)), vec![]);
            self.must(Request::SetVringCall(fd), vec![eventfd()]);
            if kick {
                self.must(Request::SetVringKick(fd), vec![eventfd()]);
                self.must(Request::SetVringEnable(state(1)), vec![]);
            }
        }
    }

    fn must(&mut self, request: Request, fds: Vec<OwnedFd>) {
        self.send(&request.encode(false), fds).unwrap();
    }

    /// Gives the session one message, and checks that it and the port agree afterwards.
    fn send(&mut self, bytes: &[u8], fds: Vec<OwnedFd>) -> Result<(), String> {
        let (header, payload) = bytes.split_at(Header::LEN);
        let header = zerocopy::FromBytes::read_from_bytes(header).unwrap();
        let incoming = Incoming { header, payload: payload.to_vec(), fds };
        let outcome = self.session.handle(incoming, &mut self.port.clone());
        if outcome.is_ok() {
            let running = (0..4).filter(|&index| self.session.is_running(index)).count();
            assert_eq!(running, self.port.installed());
        }
        outcome.map(drop).map_err(|error| error.report())
    }
}

fn eventfd() -> OwnedFd {
    Doorbell::new().unwrap().as_fd().try_clone_to_owned().unwrap()
}

fn inflight() -> InflightArea {
    InflightArea::default()
}

fn address(index: u8, at: &vmq::ring::RingAddresses) -> VringAddress {
    VringAddress {
        index: U32::new(index.into()),
        flags: U32::new(u32::from(at.log.is_some())),
        descriptors: U64::new(at.descriptors),
        used: U64::new(at.device),
        available: U64::new(at.driver),
        log: U64::new(at.log.unwrap_or(0)),
    }
}

/// Requests of `kind` with good and bad values, and raw payloads of every length that is near a good one.
fn variants(kind: Kind, guest: &Guest) -> Vec<Vec<u8>> {
    let mut requests = Vec::new();
    let numbers = EDGES.into_iter().chain([0x1_0000, 0xffff_0000, 256, 32768]);
    let states = || {
        let indices = [0u32, 3, 4, 0x1_0000, 0xffff_0000];
        indices.into_iter().flat_map(|index| [0u32, 1, 16, 0x8000, u32::MAX].map(|num| (index, num)))
    };
    for (index, num) in states() {
        let state = VringState { index: index.into(), num: num.into() };
        requests.extend([
            Request::SetVringNum(state),
            Request::SetVringBase(state),
            Request::GetVringBase(state),
            Request::SetVringEnable(state),
        ]);
    }
    for number in numbers {
        requests.extend([
            Request::SetFeatures(number),
            Request::SetProtocolFeatures(number),
            Request::NetSetMtu(number),
            Request::SetStatus(number),
            Request::SetLogBase(LogArea { size: number.into(), offset: 0x10.into() }),
            Request::AddMemReg(region(number, 0x1000, 0)),
            Request::RemMemReg(region(number, 0x1000, 0)),
            Request::SetMemTable(vec![region(number, 0x1000, 0)]),
        ]);
        let area = InflightArea {
            size: number.into(),
            offset: U64::ZERO,
            rings: U16::new(4),
            ring_size: U16::new(u16::try_from(number & 0xffff).unwrap()),
            padding: U32::ZERO,
        };
        requests.extend([Request::GetInflightFd(area), Request::SetInflightFd(area)]);
        let mut addresses = Guest::addresses(&guest.pairs[0].transmit);
        requests.push(Request::SetVringAddr(address(1, &addresses)));
        addresses.log = Some(number);
        requests.push(Request::SetVringAddr(address(1, &addresses)));
        addresses.device = number;
        requests.push(Request::SetVringAddr(address(1, &addresses)));
    }
    for polled in [false, true] {
        for index in [0, 3, 4, 255] {
            let fd = VringFd { index, polled };
            requests.extend([Request::SetVringKick(fd), Request::SetVringCall(fd), Request::SetVringErr(fd)]);
        }
    }
    requests.extend([Request::SetMemTable(vec![]), Request::SetMemTable(vec![guest.region()])]);
    requests.extend([Request::AddMemReg(guest.region()), Request::RemMemReg(guest.region())]);
    requests.push(Request::SetFeatures(guest.features().bits()));
    requests.push(Request::SetFeatures((guest.features() | Features::LOG_ALL).bits()));
    requests.push(Request::SetProtocolFeatures(Protocol::REPLY_ACK.bits()));
    let mut messages: Vec<Vec<u8>> = requests
        .into_iter()
        .filter(|request| request.kind() == kind)
        .flat_map(|request| [request.encode(false), request.encode(true)])
        .collect();
    for len in [0u32, 1, 8, 16, 20, 24, 40, 256] {
        let header = Header { request: (kind as u32).into(), flags: 9.into(), size: len.into() };
        messages.push([zerocopy::IntoBytes::as_bytes(&header), &vec![0xa5; len as usize]].concat());
    }
    messages
}

#[test]
fn every_request_in_every_state_is_answered_refused_or_ends_the_session_with_all_rings_back() {
    let mut cells = 0;
    let probe = Guest::new(Form::Split, 2);
    for state in STATES {
        for kind in Kind::ALL {
            let mut bench = Bench::reach(state);
            for message in variants(kind, &probe) {
                for with in ["nothing", "file", "eventfd"] {
                    let fds = match with {
                        "file" => vec![bench.guest.arena.fd().try_clone_to_owned().unwrap()],
                        "eventfd" => vec![eventfd()],
                        _ => vec![],
                    };
                    if bench.send(&message, fds).is_err() {
                        bench.session.close(&mut bench.port.clone());
                        assert_eq!(bench.port.installed(), 0, "{kind:?} in state {state}");
                        bench = Bench::reach(state);
                    }
                }
            }
            cells += 1;
            bench.session.close(&mut bench.port.clone());
            assert_eq!(bench.port.installed(), 0, "{kind:?} in state {state}");
        }
    }
    assert_eq!(cells, STATES.len() * Kind::ALL.len());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn random_programs_break_no_invariant(data in prop::collection::vec(any::<u8>(), 0..2000)) {
        fuzz(&data);
    }
}
