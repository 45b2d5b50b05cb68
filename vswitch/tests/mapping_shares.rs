//! Mappings are scarce and every vhost-user port needs some. A test binary of its own with one test, as it takes all
//! that the process has.

#![allow(clippy::unwrap_used, reason = "a test binary")]

mod support;

use std::os::fd::OwnedFd;

use vmq::memory::{Mapping, Share};
use vswitch::ports::vhost_user::features::Protocol;
use vswitch::ports::vhost_user::message::{Header, Incoming, LogArea, MemoryRegion, Request};
use vswitch::ports::vhost_user::session::{Session, SessionConfig};
use zerocopy::FromBytes;

use support::NoRings;

struct Peer(Session);

impl Peer {
    /// `None` if the process has no share left for one more port.
    fn new() -> Option<Self> {
        let config = SessionConfig { config_space: true, ..SessionConfig::default() };
        let mut peer = Self(Session::new(config, Some(Share::new()?)));
        assert!(peer.tell(&Request::SetProtocolFeatures(Protocol::all().bits()), Vec::new()));
        Some(peer)
    }

    /// False if the request is refused. The session must not end.
    fn tell(&mut self, request: &Request, fds: Vec<OwnedFd>) -> bool {
        let bytes = request.encode(true);
        let (header, payload) = bytes.split_at(Header::LEN);
        let header = Header::read_from_bytes(header).unwrap();
        let reply = self.0.handle(Incoming { header, payload: payload.to_vec(), fds }, &mut NoRings).unwrap();
        reply.is_none_or(|reply| reply.payload().iter().all(|&byte| byte == 0))
    }

    /// Shows region `n`, in a file of its own.
    fn add(&mut self, n: u64) -> bool {
        self.tell(&Request::AddMemReg(region(n)), vec![file()])
    }

    /// Shows region `n` at the end of a file of `size` bytes.
    fn add_end_of(&mut self, n: u64, size: u64) -> bool {
        let file = file();
        rustix::fs::ftruncate(&file, size).unwrap();
        let region = MemoryRegion { offset: (size - 0x1000).into(), ..region(n) };
        self.tell(&Request::AddMemReg(region), vec![file])
    }

    /// Shows eight regions in place of all others, and a dirty log.
    fn has_its_promise(&mut self) -> bool {
        let log = LogArea { size: 0x1000.into(), offset: 0.into() };
        self.tell(&Request::SetMemTable((0..8).map(region).collect()), (0..8).map(|_| file()).collect())
            && self.tell(&Request::SetLogBase(log), vec![file()])
    }
}

fn region(n: u64) -> MemoryRegion {
    let at = 0x1000 * n;
    MemoryRegion { guest: at.into(), size: 0x1000.into(), user: at.into(), offset: 0.into() }
}

fn file() -> OwnedFd {
    let fd = rustix::fs::memfd_create("peer", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, 0x1000).unwrap();
    fd
}

#[test]
fn ports_that_take_every_mapping_or_all_addresses_leave_the_others_theirs() {
    addresses();
    mappings();
}

/// Files cost nothing but addresses.
fn addresses() {
    let (promised, most) = (Share::PROMISED_BYTES as u64, Share::MOST_BYTES as u64);
    let mut honest = Peer::new().unwrap();
    let mut greedy: Vec<Peer> = (0..16).map(|_| Peer::new().unwrap()).collect();
    assert!(!greedy[0].add_end_of(0, 64 << 40), "64 TiB for one peer");
    assert!(greedy[0].add_end_of(0, most));
    assert!(!greedy[0].add_end_of(1, 0x1000), "a page beyond the most");
    let got = greedy[1..].iter_mut().filter_map(|peer| peer.add_end_of(0, most).then_some(())).count();
    assert!((8..12).contains(&got), "{got} more peers got the most");
    assert!(honest.add_end_of(0, promised / 2) && honest.add_end_of(1, promised / 2));
    assert!(!honest.add_end_of(2, most - promised), "beyond the promise there is not so much left");
    assert!(Mapping::memfd("a machine's memory", 1 << 40).is_ok());
    greedy.clear();
    assert!(honest.add_end_of(2, most - promised));
}

fn mappings() {
    let mut honest: Vec<Peer> = (0..384).map(|_| Peer::new().unwrap()).collect();
    assert!(honest[0].has_its_promise());
    let mut greedy = Vec::new();
    while let Some(mut peer) = Peer::new() {
        let shown = (0..509).take_while(|&n| peer.add(n)).count();
        assert!(shown >= Share::PROMISED, "{shown} regions");
        let starved = shown < 509;
        greedy.push(peer);
        if starved {
            break;
        }
    }
    assert!(greedy.len() > 1, "one port took everything");
    assert!(Peer::new().is_none(), "something is left");
    assert!(Mapping::memfd("a machine's memory", 0x1000).is_ok());
    for peer in &mut honest {
        assert!(peer.has_its_promise() && peer.has_its_promise());
    }
    // What the greedy ones had is everybody's again.
    greedy.clear();
    assert!((8..509).all(|n| honest[1].add(n)));
    assert!(Peer::new().is_some());
}
