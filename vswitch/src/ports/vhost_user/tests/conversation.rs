//! A session and a front-end that means well.

use std::os::fd::AsFd;

use vmq::Mac;
use vmq::doorbell::Doorbell;
use vmq::driver::Form;
use zerocopy::little_endian::U32;

use super::rig::*;
use crate::ports::vhost_user::features::{Features, Protocol};
use crate::ports::vhost_user::frontend::{FrontendError, RingSetup};
use crate::ports::vhost_user::message::{ConfigArea, Kind, MemoryRegion, Request, VringFd};
use crate::ports::vhost_user::session::SessionConfig;

const FORMS: [Form; 2] = [Form::Split, Form::Packed];

#[test]
fn frames_pass_in_both_ring_forms() {
    for form in FORMS {
        let mut guest = Guest::new(form, 1);
        let mut lab = Lab::new(pairs(1));
        guest.start(&mut lab.front, Protocol::REPLY_ACK, guest.fresh());
        assert_eq!(lab.port.enabled(), 2);
        for _ in 0..20 {
            guest.round_trip(0, &lab.port, 7);
        }
        lab.leave().unwrap();
    }
}

#[test]
fn every_pair_of_a_port_with_several_carries_its_own_frames() {
    let mut guest = Guest::new(Form::Split, 4);
    let mut lab = Lab::new(pairs(4));
    assert_eq!(lab.front.ask(&Request::GetQueueNum).unwrap(), 4);
    guest.start(&mut lab.front, Protocol::REPLY_ACK | Protocol::MQ, 0);
    for pair in 0..4 {
        guest.round_trip(pair, &lab.port, 5);
    }
    lab.leave().unwrap();
}

#[test]
fn port_learns_what_was_negotiated() {
    let mut lab = Lab::new(pairs(1));
    let wanted = Features::VERSION_1 | Features::CSUM | Features::HOST_TSO4 | Features::PROTOCOL_FEATURES;
    let got = lab.front.negotiate(wanted, Protocol::all()).unwrap();
    assert_eq!(got.features, wanted);
    assert_eq!(got.protocol, Protocol::all() - Protocol::CONFIG);
    wait_for("the port to know", || lab.port.0.lock().unwrap().negotiated == Some(got));
    lab.leave().unwrap();
}

#[test]
fn ring_without_protocol_features_is_enabled_from_the_start() {
    let guest = Guest::new(Form::Split, 1);
    let mut lab = Lab::new(pairs(1));
    lab.front.negotiate(guest.features() - Features::PROTOCOL_FEATURES, Protocol::REPLY_ACK).unwrap();
    lab.front.show_memory(&[guest.region()], &[guest.arena.fd()]).unwrap();
    start_without_enabling(&guest, &mut lab);
    assert_eq!(lab.port.enabled(), 1);
    lab.leave().unwrap();
}

#[test]
fn ring_with_protocol_features_waits_for_enable() {
    let guest = Guest::new(Form::Split, 1);
    let mut lab = Lab::new(pairs(1));
    lab.front.negotiate(guest.features(), Protocol::REPLY_ACK).unwrap();
    lab.front.show_memory(&[guest.region()], &[guest.arena.fd()]).unwrap();
    start_without_enabling(&guest, &mut lab);
    assert_eq!((lab.port.installed(), lab.port.enabled()), (1, 0));
    lab.front.enable_ring(0, true).unwrap();
    assert_eq!(lab.port.enabled(), 1);
    lab.front.enable_ring(0, false).unwrap();
    assert_eq!((lab.port.installed(), lab.port.enabled()), (1, 0));
    lab.leave().unwrap();
}

fn start_without_enabling(guest: &Guest, lab: &mut Lab) {
    let ring = &guest.pairs[0].receive;
    let setup =
        RingSetup { size: ring.size(), addresses: Guest::addresses(ring), base: 0, kick: None, call: None };
    lab.front.start_ring(0, &setup).unwrap();
}

/// DPDK's virtio-user: call descriptors first, then features and memory, no acknowledgements.
#[test]
fn call_before_features_and_memory_is_kept() {
    let mut guest = Guest::new(Form::Split, 1);
    let mut lab = Lab::new(pairs(1));
    for index in 0..2 {
        let call = Request::SetVringCall(VringFd { index, polled: false });
        lab.front.tell(&call, &[guest.pairs[0].calls[usize::from(index)].as_fd()]).unwrap();
    }
    lab.front.negotiate(guest.features(), Protocol::REPLY_ACK).unwrap();
    lab.front.show_memory(&[guest.region()], &[guest.arena.fd()]).unwrap();
    for index in 0..2u8 {
        let ring = [&guest.pairs[0].receive, &guest.pairs[0].transmit][usize::from(index)];
        let state = |num: u32| crate::ports::vhost_user::message::VringState {
            index: U32::new(index.into()),
            num: U32::new(num),
        };
        lab.front.tell(&Request::SetVringNum(state(ENTRIES.into())), &[]).unwrap();
        lab.front.tell(&Request::SetVringBase(state(0)), &[]).unwrap();
        lab.front.set_addresses(index, &Guest::addresses(ring)).unwrap();
        let kick = Request::SetVringKick(VringFd { index, polled: false });
        lab.front.tell(&kick, &[guest.pairs[0].kicks[usize::from(index)].as_fd()]).unwrap();
        lab.front.enable_ring(index, true).unwrap();
        assert!(guest.pairs[0].calls[usize::from(index)].clear(), "a started ring interrupts once");
    }
    guest.round_trip(0, &lab.port, 3);
    lab.leave().unwrap();
}

#[test]
fn ring_goes_on_where_get_vring_base_stopped_it() {
    for form in FORMS {
        let mut guest = Guest::new(form, 1);
        let mut lab = Lab::new(pairs(1));
        guest.start(&mut lab.front, Protocol::REPLY_ACK, guest.fresh());
        for round in 1..6u32 {
            guest.round_trip(0, &lab.port, 11);
            let bases: Vec<u32> = (0..2).map(|index| lab.front.stop_ring(index).unwrap()).collect();
            assert_eq!(lab.port.installed(), 0);
            if form == Form::Split {
                assert_eq!(bases, [11 * round; 2]);
            } else {
                let place = 11 * round;
                let wrap = if place / 16 % 2 == 0 { 0x8000 } else { 0 };
                let both = ((place % 16) | wrap) * 0x1_0001;
                assert_eq!(bases, [both; 2]);
            }
            // DPDK's client sends the low half alone.
            let low: Vec<u32> = bases.iter().map(|base| base & 0xffff).collect();
            guest.start_rings(&mut lab.front, if round % 2 == 0 { &bases } else { &low });
        }
        lab.leave().unwrap();
    }
}

#[test]
fn split_ring_resumes_at_its_used_index_whatever_base_the_front_end_has_left() {
    let mut guest = Guest::new(Form::Split, 1);
    let mut lab = Lab::new(pairs(1));
    guest.start(&mut lab.front, Protocol::REPLY_ACK, 0);
    guest.round_trip(0, &lab.port, 9);
    lab.leave().unwrap();
    let mut lab = Lab::new(pairs(1));
    guest.start(&mut lab.front, Protocol::REPLY_ACK, 0);
    assert!(guest.pairs[0].calls.iter().all(Doorbell::clear), "one interrupt after a reconnect");
    guest.round_trip(0, &lab.port, 9);
    lab.leave().unwrap();
}

#[test]
fn memory_regions_come_and_go_one_by_one_under_running_rings() {
    let mut guest = Guest::new(Form::Split, 1);
    let mut lab = Lab::new(pairs(1));
    lab.front.negotiate(guest.features(), Protocol::REPLY_ACK | Protocol::CONFIGURE_MEM_SLOTS).unwrap();
    assert_eq!(lab.front.ask(&Request::GetMaxMemSlots).unwrap(), 509);
    lab.front.tell(&Request::AddMemReg(guest.region()), &[guest.arena.fd()]).unwrap();
    guest.start_rings(&mut lab.front, &[0, 0]);
    let file = memfd(0x4000);
    let extra = |n: u64| MemoryRegion {
        guest: (0x4000_0000 + n * 0x1000).into(),
        size: 0x1000.into(),
        user: (0x1000_0000 + n * 0x1000).into(),
        offset: (n % 4 * 0x1000).into(),
    };
    for n in 0..508 {
        lab.front.tell(&Request::AddMemReg(extra(n)), &[file.as_fd()]).unwrap();
    }
    guest.round_trip(0, &lab.port, 4);
    for n in 0..508 {
        lab.front.tell(&Request::RemMemReg(extra(n)), &[]).unwrap();
    }
    guest.round_trip(0, &lab.port, 4);
    lab.leave().unwrap();
}

#[test]
fn memory_region_added_once_per_queue_pair_stays_until_removed_as_often() {
    let mut guest = Guest::new(Form::Split, 1);
    let mut lab = Lab::new(pairs(1));
    lab.front.negotiate(guest.features(), Protocol::REPLY_ACK | Protocol::CONFIGURE_MEM_SLOTS).unwrap();
    for _ in 0..2 {
        lab.front.tell(&Request::AddMemReg(guest.region()), &[guest.arena.fd()]).unwrap();
    }
    guest.start_rings(&mut lab.front, &[0, 0]);
    lab.front.tell(&Request::RemMemReg(guest.region()), &[]).unwrap();
    guest.round_trip(0, &lab.port, 4);
    lab.leave().unwrap();
}

/// QEMU, when it reshapes the region that a running ring lies in: all removals come before all additions.
#[test]
fn rings_stop_while_their_memory_is_away_and_go_on_where_they_were() {
    for form in FORMS {
        let mut guest = Guest::new(form, 1);
        let mut lab = Lab::new(pairs(1));
        let protocol = Protocol::REPLY_ACK | Protocol::CONFIGURE_MEM_SLOTS;
        guest.start(&mut lab.front, protocol, guest.fresh());
        for _ in 0..3 {
            guest.round_trip(0, &lab.port, 7);
            lab.front.tell(&Request::RemMemReg(guest.region()), &[]).unwrap();
            assert_eq!(lab.port.installed(), 0);
            guest.send(0, b"sent while the memory is away");
            // Half of it is not enough.
            let half = MEMORY as u64 / 2;
            let high = MemoryRegion {
                guest: (GUEST + half).into(),
                size: half.into(),
                user: (GUEST + USER + half).into(),
                offset: half.into(),
            };
            lab.front.tell(&Request::AddMemReg(high), &[guest.arena.fd()]).unwrap();
            assert_eq!(lab.port.installed(), 0);
            lab.front.tell(&Request::RemMemReg(high), &[]).unwrap();
            lab.front.tell(&Request::AddMemReg(guest.region()), &[guest.arena.fd()]).unwrap();
            assert_eq!(lab.port.enabled(), 2);
            let calls = &guest.pairs[0].calls;
            assert!(calls.iter().all(Doorbell::clear), "what was missed meanwhile is made up for");
            guest.post(0, 1);
            assert_eq!(lab.port.echo(0), 1);
            assert_eq!(guest.received(0), [b"sent while the memory is away"]);
            assert_eq!(guest.reclaim(0), 1);
        }
        lab.front.tell(&Request::RemMemReg(guest.region()), &[]).unwrap();
        // Stopped for good, it does not come back by itself.
        lab.front.stop_ring(0).unwrap();
        lab.front.tell(&Request::AddMemReg(guest.region()), &[guest.arena.fd()]).unwrap();
        assert_eq!(lab.port.installed(), 1);
        lab.leave().unwrap();
    }
}

#[test]
fn memory_region_beyond_the_last_slot_ends_the_session() {
    let mut lab = Lab::new(pairs(1));
    lab.front.negotiate(Features::empty(), Protocol::REPLY_ACK | Protocol::CONFIGURE_MEM_SLOTS).unwrap();
    let file = memfd(0x1000);
    let extra = |n: u64| MemoryRegion {
        guest: (n * 0x1000).into(),
        size: 0x1000.into(),
        user: (n * 0x1000).into(),
        offset: 0.into(),
    };
    for n in 0..509 {
        lab.front.tell(&Request::AddMemReg(extra(n)), &[file.as_fd()]).unwrap();
    }
    assert!(lab.front.tell(&Request::AddMemReg(extra(509)), &[file.as_fd()]).is_err());
    assert!(lab.ended().contains("more than 509"));
}

#[test]
fn new_memory_table_under_running_rings_loses_no_frame_and_keeps_the_mapping() {
    let mut guest = Guest::new(Form::Packed, 1);
    let mut lab = Lab::new(pairs(1));
    guest.start(&mut lab.front, Protocol::REPLY_ACK, 0x8000);
    let mapping = |port: &Port| {
        let state = port.0.lock().unwrap();
        let ring = &state.rings[0].as_ref().unwrap().ring;
        std::sync::Arc::as_ptr(ring.memory.regions()[0].mapping())
    };
    let before = mapping(&lab.port);
    let other = memfd(0x2000);
    let region = MemoryRegion {
        guest: 0x8000_0000.into(),
        size: 0x1000.into(),
        user: 1.into(),
        offset: 0x1000.into(),
    };
    for _ in 0..5 {
        guest.post(0, 1);
        guest.send(0, b"sent before the table changed");
        let installs = lab.port.installs();
        lab.front.show_memory(&[guest.region(), region], &[guest.arena.fd(), other.as_fd()]).unwrap();
        assert_eq!(lab.port.installs(), installs + 2);
        assert_eq!(lab.port.echo(0), 1);
        assert_eq!(guest.received(0), [b"sent before the table changed"]);
        assert_eq!(guest.reclaim(0), 1);
        guest.round_trip(0, &lab.port, 3);
    }
    assert_eq!(mapping(&lab.port), before);
    lab.leave().unwrap();
}

#[test]
fn region_at_an_offset_inside_its_file_shows_the_right_bytes() {
    let mut guest = Guest::new(Form::Split, 1);
    let mut lab = Lab::new(pairs(1));
    lab.front.negotiate(guest.features(), Protocol::REPLY_ACK).unwrap();
    let whole = guest.region();
    let half = MEMORY as u64 / 2;
    let low = MemoryRegion { size: half.into(), ..whole };
    let high = MemoryRegion {
        guest: (GUEST + half).into(),
        size: half.into(),
        user: (GUEST + USER + half).into(),
        offset: half.into(),
    };
    lab.front.show_memory(&[high, low], &[guest.arena.fd(), guest.arena.fd()]).unwrap();
    guest.start_rings(&mut lab.front, &[0, 0]);
    for _ in 0..200 {
        guest.round_trip(0, &lab.port, 2);
    }
    lab.leave().unwrap();
}

#[test]
fn mtu_up_to_the_ports_is_accepted_and_a_larger_one_refused_without_ending_the_session() {
    let mut lab = Lab::new(SessionConfig { mtu: 9000, ..pairs(1) });
    lab.front.negotiate(Features::MTU, Protocol::REPLY_ACK | Protocol::NET_MTU).unwrap();
    for (mtu, good) in [(1500, true), (9000, true), (9001, false), (67, false), (u64::MAX, false), (68, true)]
    {
        let told = lab.front.tell(&Request::NetSetMtu(mtu), &[]);
        assert_eq!(told.is_ok(), good, "mtu {mtu}");
        assert!(good || matches!(told, Err(FrontendError::Refused(Kind::NetSetMtu))));
    }
    lab.leave().unwrap();
}

#[test]
fn configuration_holds_address_link_pairs_and_mtu() {
    let mac = Some(Mac([2, 0, 0, 0, 0, 7]));
    let mut lab = Lab::new(SessionConfig { queues: 3, mtu: 9000, mac, config_space: true, offloads: true });
    let got = lab.front.negotiate(Features::all(), Protocol::all()).unwrap();
    assert!(got.features.contains(Features::MAC | Features::STATUS));
    let mut ask = |offset: u32, size: u32| {
        let area = ConfigArea { offset: offset.into(), size: size.into(), flags: 0.into() };
        lab.front.send_raw(&Request::GetConfig(area).encode(false), &[]).unwrap();
        lab.front.answer(Kind::GetConfig).unwrap().0
    };
    let whole = ask(0, 12);
    assert_eq!(&whole[12..], [2, 0, 0, 0, 0, 7, 1, 0, 3, 0, 0x28, 0x23]);
    assert_eq!(&ask(10, 2)[12..], [0x28, 0x23]);
    assert_eq!(ask(255, 1).len(), 13);
    assert!(ask(256, 1).is_empty(), "an empty payload is an error");
    assert!(ask(u32::MAX, 1).is_empty());
    lab.leave().unwrap();
}

#[test]
fn status_reads_back_as_written_and_zero_stops_the_rings() {
    let guest = Guest::new(Form::Split, 1);
    let mut lab = Lab::new(pairs(1));
    guest.start(&mut lab.front, Protocol::REPLY_ACK | Protocol::STATUS, 0);
    lab.front.tell(&Request::SetStatus(15), &[]).unwrap();
    assert_eq!(lab.front.ask(&Request::GetStatus).unwrap(), 15);
    assert_eq!(lab.port.installed(), 2);
    lab.front.tell(&Request::SetStatus(0), &[]).unwrap();
    assert_eq!(lab.port.installed(), 0);
    lab.leave().unwrap();
}

#[test]
fn device_starts_again_after_a_reset() {
    let mut guest = Guest::new(Form::Split, 1);
    let mut lab = Lab::new(pairs(1));
    guest.start(&mut lab.front, Protocol::REPLY_ACK | Protocol::RESET_DEVICE, 0);
    guest.round_trip(0, &lab.port, 2);
    lab.front.tell(&Request::ResetDevice, &[]).unwrap();
    assert_eq!(lab.port.installed(), 0);
    lab.front.tell(&Request::SetFeatures(guest.features().bits()), &[]).unwrap();
    guest.start_rings(&mut lab.front, &[2, 2]);
    guest.round_trip(0, &lab.port, 2);
    lab.leave().unwrap();
}

#[test]
fn swapped_call_descriptor_is_the_one_that_rings() {
    let guest = Guest::new(Form::Split, 1);
    let mut lab = Lab::new(pairs(1));
    guest.start(&mut lab.front, Protocol::REPLY_ACK, 0);
    let call = Doorbell::new().unwrap();
    lab.front.tell(&Request::SetVringCall(VringFd { index: 0, polled: false }), &[call.as_fd()]).unwrap();
    assert!(call.clear(), "what was missed during the swap is made up for");
    lab.port.0.lock().unwrap().rings[0].as_ref().unwrap().ring.call.as_ref().unwrap().ring();
    assert!(call.clear());
    lab.front.tell(&Request::SetVringCall(VringFd { index: 0, polled: true }), &[]).unwrap();
    assert!(lab.port.0.lock().unwrap().rings[0].as_ref().unwrap().ring.call.is_none());
    lab.leave().unwrap();
}

#[test]
fn migrated_guest_is_announced() {
    let mut lab = Lab::new(pairs(1));
    lab.front.negotiate(Features::empty(), Protocol::REPLY_ACK | Protocol::RARP).unwrap();
    lab.front.tell(&Request::SendRarp(Mac([2, 0, 0, 0, 0, 9])), &[]).unwrap();
    assert_eq!(lab.port.0.lock().unwrap().announced, [Mac([2, 0, 0, 0, 0, 9])]);
    lab.leave().unwrap();
}
