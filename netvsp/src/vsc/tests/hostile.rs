//! Guests that break the protocol: each stops its own adapter, with a reason, and nobody else's.

use vmbus::ring::{PacketHeader, PacketKind};

use super::*;
use crate::protocol::packet::{Lso, TxChecksum, TxChecksums, TxHeader};

/// Lets the first guest do something, and returns why its adapter stopped. The other two go on meanwhile.
pub(super) fn fault_of(act: impl FnOnce(&mut Guest)) -> String {
    let (mut rig, mut one, mut two) = two(Config::default(), Config::default());
    let mut three = rig.guest(3, |_| (), Config::default()).unwrap();
    act(&mut one);
    one.flush();
    let reason = one.vmm().fault().unwrap();
    two.send(&frame(3, 2, 100), &Transmit::default()).unwrap();
    two.flush();
    assert_eq!(next(&mut three, 2).frame.len(), 100);
    let state = rig.fabric().port_state("lan", "nic1").unwrap();
    assert!(matches!(state, vswitch::report::PortState::Faulted(_)), "{state:?}");
    // What is closed and opened anew after the operator's restart works again.
    rig.fabric().restart_port("lan", "nic1").unwrap();
    reason
}

pub(super) fn asked(transaction: u64) -> PacketHeader<'static> {
    PacketHeader { completion_requested: true, ..PacketHeader::in_band(transaction) }
}

pub(super) fn announce(section: u32, bytes: u32) -> [u8; nvsp::MESSAGE_BYTES] {
    let fields =
        nvsp::RndisPacket { channel: nvsp::DATA.into(), section: section.into(), bytes: bytes.into() };
    nvsp::message(Kind::SendRndisPacket, &fields)
}

/// Sends `message` in a send section.
fn in_section(guest: &mut Guest, message: &[u8]) {
    guest.send.as_ref().unwrap().pages.write(0, message);
    let used = u32::try_from(message.len()).unwrap();
    assert!(guest.send_raw(0, &asked(1 << 32), &announce(0, used)).unwrap());
}

pub(super) fn packet(header: &TxHeader, frame: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 256];
    let len = header.write(&mut bytes, u32::try_from(frame.len()).unwrap()).unwrap();
    bytes.truncate(len);
    bytes.extend(frame);
    bytes
}

#[test]
fn section_past_the_end_faults() {
    assert!(
        fault_of(|guest| {
            guest.send_raw(0, &asked(5), &announce(170, 100)).unwrap();
        })
        .contains("send section 170")
    );
    assert!(
        fault_of(|guest| {
            guest.send_raw(0, &asked(5), &announce(0, 6145)).unwrap();
        })
        .contains("6145 bytes")
    );
}

#[test]
fn ring_packet_longer_than_any_driver_makes_faults() {
    let reason = fault_of(|guest| {
        let message = [&announce(0, 100)[..], &[0; 8192]].concat();
        guest.send_raw(0, &asked(5), &message).unwrap();
    });
    assert!(reason.contains("8192"), "{reason}");
}

#[test]
fn completion_of_what_is_not_outstanding_faults() {
    let message = nvsp::rndis_complete(nvsp::Status::Success);
    for transaction in [0, 7, 1 << 20, u64::MAX] {
        let reason = fault_of(|guest| {
            guest.send_raw(0, &PacketHeader::completion(transaction), &message).unwrap();
        });
        assert!(reason.contains("not outstanding"), "{reason}");
    }
}

#[test]
fn range_outside_memory_faults() {
    let reason = fault_of(|guest| {
        guest.ranges.clear();
        guest.ranges.push(100, 0, &[1 << 30]);
        let ranges = guest.ranges.clone();
        let header = PacketHeader { kind: PacketKind::GpaDirect { ranges: ranges.ranges() }, ..asked(9) };
        guest.send_raw(0, &header, &announce(nvsp::NO_SECTION, 0)).unwrap();
    });
    assert!(reason.contains("not guest memory"), "{reason}");
}

#[test]
fn rndis_length_past_the_end_faults() {
    for (at, value) in
        [(0, 2u32), (4, 4000), (4, 43), (4, 0), (8, 4000), (12, 4000), (28, 4000), (32, 77), (12, u32::MAX)]
    {
        let reason = fault_of(|guest| {
            let vlan = Some(crate::protocol::packet::Vlan { id: 1, priority: 0, dei: false });
            let mut message = packet(&TxHeader { vlan, ..TxHeader::default() }, &frame(2, 1, 60));
            message[at..at + 4].copy_from_slice(&value.to_le_bytes());
            in_section(guest, &message);
        });
        assert!(reason.contains("RNDIS"), "{reason}");
    }
}

#[test]
fn large_send_that_does_not_fit_its_frame_faults() {
    for lso in [
        Lso { mss: 0, tcp_offset: 34, ipv6: false },
        Lso { mss: 100, tcp_offset: 35, ipv6: false },
        Lso { mss: 100, tcp_offset: 1000, ipv6: false },
        Lso { mss: 100, tcp_offset: 34, ipv6: true },
        Lso { mss: 1 << 17, tcp_offset: 34, ipv6: false },
    ] {
        let reason = fault_of(|guest| {
            guest.send(&frame(2, 1, 600), &Transmit::default().large(lso)).unwrap();
        });
        assert!(reason.contains("large send"), "{reason}");
    }
}

#[test]
fn checksum_past_the_frame_faults() {
    let checksum = TxChecksum { what: TxChecksums::TCP, transport_offset: 60 };
    let reason = fault_of(|guest| {
        guest.send(&frame(2, 1, 70), &Transmit::default().checksum(checksum)).unwrap();
    });
    assert!(reason.contains("checksum"), "{reason}");
}

#[test]
fn more_packets_than_agreed_fault() {
    let reason = fault_of(|guest| {
        let short = frame(2, 1, 20);
        let many = vec![short.as_slice(); 17];
        guest.send_together(&many, &Transmit::default()).unwrap();
    });
    assert!(reason.contains("more than 16"), "{reason}");
}

#[test]
fn guest_that_reads_nothing_loses_frames_and_stops_nobody() {
    let (mut rig, mut one, mut two) =
        two(Config::default(), Config { receive_pages: 16, ..Config::default() });
    let mut three = rig.guest(3, |_| (), Config::default()).unwrap();
    for _ in 0..500 {
        one.send(&frame(2, 1, 1000), &Transmit::default()).unwrap();
        one.send(&frame(3, 1, 1000), &Transmit::default()).unwrap();
        one.flush();
        next(&mut three, 1);
        one.poll().unwrap();
    }
    // Then it reads, and all is as before.
    let end = Instant::now() + TIMEOUT;
    let mut arrived = false;
    while !arrived {
        assert!(Instant::now() < end, "no frame");
        one.send(&frame(2, 1, 77), &Transmit::default()).unwrap();
        one.flush();
        one.poll().unwrap();
        two.poll().unwrap();
        while let Some(received) = two.receive() {
            arrived |= received.frame.len() == 77;
        }
    }
    let report = rig.fabric().report();
    let port = report.switches[0].ports.iter().find(|port| port.name == "nic2").unwrap();
    assert!(port.sent.drops[&vswitch::DropReason::QueueFull] > 0);
}

#[test]
fn requests_of_a_guest_that_holds_all_sections_of_frames_are_answered_at_once() {
    let (_rig, mut one, mut two) = two(Config::default(), Config { receive_pages: 16, ..Config::default() });
    two.withhold(true).unwrap();
    // An answer takes a section of those that frames may not have, and gives it back to them.
    for _ in 0..60 {
        for _ in 0..5 {
            one.send(&frame(2, 1, 1000), &Transmit::default()).unwrap();
        }
        one.flush();
        one.wait("completions", |guest| (guest.outstanding == 0).then_some(())).unwrap();
        two.query(Oid::GEN_LINK_SPEED).unwrap();
    }
    two.withhold(false).unwrap();
    // The answer comes when all is given back.
    two.query(Oid::GEN_LINK_SPEED).unwrap();
    two.received.clear();
    one.send(&frame(2, 1, 77), &Transmit::default()).unwrap();
    one.flush();
    assert_eq!(next(&mut two, 1).frame.len(), 77);
}

#[test]
fn requests_whose_answers_have_no_section_are_taken_and_answered_when_there_is_one() {
    let mut rig = Rig::new(vec![0]).unwrap();
    let mut one = rig.guest(1, |_| (), Config { receive_pages: 16, ..Config::default() }).unwrap();
    let read = rounds::read_index(&one);
    // There are 15 sections, and none is given back meanwhile.
    for request in 0..20 {
        let before = read.load(std::sync::atomic::Ordering::SeqCst);
        one.carry(&rndis::access(rndis::Kind::Query, 1000 + request, Oid::GEN_LINK_SPEED, &[])).unwrap();
        let end = Instant::now() + TIMEOUT;
        while read.load(std::sync::atomic::Ordering::SeqCst) == before {
            assert!(Instant::now() < end, "request {request} is not taken");
            std::thread::yield_now();
        }
    }
    one.wait("answers", |guest| (guest.replies.len() == 20).then_some(())).unwrap();
    one.wait("completions", |guest| (guest.outstanding == 0).then_some(())).unwrap();
}

#[test]
fn guest_that_reads_no_completions_stops_itself_and_loses_none() {
    let (_rig, mut one, mut two) = two(Config { send_pages: 15, ..Config::default() }, Config::default());
    let mut sent = 0;
    // Its ring to the host is 508 KiB; completions of 64 bytes each fill the other one.
    for _ in 0..20_000 {
        let section = PacketHeader { completion_requested: true, ..PacketHeader::in_band(1 << 32 | 5) };
        one.send.as_ref().unwrap().pages.write(0, &packet(&TxHeader::default(), &frame(2, 1, 60)));
        if one.channels[0].write(&section, &announce(0, 104)).unwrap() {
            sent += 1;
        }
        one.flush();
        two.poll().unwrap();
        while two.receive().is_some() {}
    }
    one.outstanding += sent;
    one.wait("completions", |guest| (guest.outstanding == 0).then_some(())).unwrap();
    assert!(sent > 8000, "{sent}");
}
