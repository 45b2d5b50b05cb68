//! Machines that go wrong: what a VMM may cost the switch that it is connected to.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{Receiver, channel};

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use vmbus::guid::{Guid, interface};
use vmbus::handover::{self, FromSwitch, FromVmm, MemoryRegion, STATE_BYTES, VmmConnection};
use vmq::memory::Mapping;

use super::*;
use crate::control::NicConfig;
use crate::service::{Link, LinkError};

const MEMORY: usize = 1 << 20;

/// A VMM's end of a link to a switch with one port, and what becomes of the link.
fn machine() -> (Rig, Link, VmmConnection, Receiver<Option<LinkError>>) {
    let mut rig = Rig::new(vec![0]).unwrap();
    rig.port(1, |_| ()).unwrap();
    let port = rig.fabric().backend("lan", "nic1").unwrap();
    let config = NicConfig {
        mac: address(1),
        mtu: 1500,
        queues: 8,
        offloads: true,
        rsc: true,
        link_mbps: 10_000,
        name: "nic1".into(),
        spoofing: false,
    };
    let (vmm, switch) = handover::pair().unwrap();
    let (ended, outcome) = channel();
    let resolve = move |_: &str| Some((port.clone(), config.clone()));
    let end = move |reason| ended.send(reason).unwrap();
    let link = Link::start(switch, Box::new(resolve), Box::new(end)).unwrap();
    vmm.send(&FromVmm::Hello { version: handover::VERSION }).unwrap();
    let fd = Mapping::memfd("machine", MEMORY).unwrap().1;
    let regions = vec![MemoryRegion { gpa: 0, len: MEMORY as u64, offset: 0 }];
    vmm.send(&FromVmm::Memory { regions, fd }).unwrap();
    (rig, link, vmm, outcome)
}

fn introduce(vmm: &VmmConnection, device: u32, name: &str, state: OwnedFd) {
    let (interface, instance) = (interface::NIC, Guid::default());
    let name = name.into();
    vmm.send(&FromVmm::Device { device, interface, instance, name, state, resumed: false }).unwrap();
}

fn state() -> OwnedFd {
    Mapping::memfd("state", STATE_BYTES).unwrap().1
}

fn grant(vmm: &VmmConnection, device: u32, gpadl: u32, pages: u32) -> bool {
    let (byte_count, pfns) = (pages * 4096, vec![1; pages as usize]);
    vmm.send(&FromVmm::Gpadl { device, gpadl, byte_count, byte_offset: 0, pfns }).unwrap();
    match vmm.receive().unwrap() {
        Some(FromSwitch::GpadlAccepted { device: to, gpadl: it, ok }) if (to, it) == (device, gpadl) => ok,
        other => panic!("{other:?}"),
    }
}

#[test]
fn pages_of_all_adapters_together_are_limited() {
    const PAGES: u32 = 8000;
    let (_rig, _link, vmm, _outcome) = machine();
    let mut accepted = Vec::new();
    for device in 0..4 {
        introduce(&vmm, device, &format!("nic{device}"), state());
        accepted
            .extend((0..20).filter(|&gpadl| grant(&vmm, device, gpadl, PAGES)).map(|gpadl| (device, gpadl)));
    }
    assert_eq!(accepted.len(), (1 << 18) / PAGES as usize);
    // What is given back, or goes with its adapter, may be granted again; what never was there counts for nothing.
    let (device, gpadl) = accepted[0];
    for gpadl in [gpadl, 999] {
        vmm.send(&FromVmm::GpadlTeardown { device, gpadl }).unwrap();
        assert!(matches!(vmm.receive().unwrap(), Some(FromSwitch::GpadlReleased { .. })));
    }
    assert!(grant(&vmm, 3, 100, PAGES));
    assert!(!grant(&vmm, 3, 101, PAGES));
    vmm.send(&FromVmm::Gone { device: 1 }).unwrap();
    let again = (200..240).filter(|&gpadl| grant(&vmm, 2, gpadl, PAGES)).count();
    assert_eq!(again, accepted.iter().filter(|(device, _)| *device == 1).count());
}

#[test]
fn adapter_under_two_numbers_ends_the_link() {
    let (_rig, _link, vmm, outcome) = machine();
    introduce(&vmm, 1, "nic1", state());
    introduce(&vmm, 2, "nic1", state());
    assert!(matches!(outcome.recv_timeout(TIMEOUT), Ok(Some(LinkError::DeviceTwice(2)))));
}

#[test]
fn adapter_that_is_gone_may_come_back_under_another_number() {
    let (_rig, _link, vmm, _outcome) = machine();
    introduce(&vmm, 1, "nic1", state());
    vmm.send(&FromVmm::Gone { device: 1 }).unwrap();
    introduce(&vmm, 2, "nic1", state());
    assert!(grant(&vmm, 2, 1, 1));
}

#[test]
fn machine_that_does_not_read_is_not_heard_and_misses_nothing() {
    let (_rig, _link, vmm, _outcome) = machine();
    introduce(&vmm, 1, "nic1", state());
    set_socket_timeout(vmm.as_fd(), Timeout::Send, Some(Duration::from_millis(200))).unwrap();
    let asked = (0..200_000).find(|&gpadl| vmm.send(&FromVmm::GpadlTeardown { device: 1, gpadl }).is_err());
    let asked = asked.expect("heard, whatever it costs");
    for expected in 0..asked {
        match vmm.receive().unwrap() {
            Some(FromSwitch::GpadlReleased { gpadl, .. }) => assert_eq!(gpadl, expected),
            other => panic!("{other:?}"),
        }
    }
}
