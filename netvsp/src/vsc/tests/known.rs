//! Faults that other device models had, and abuse that a guest may try, each played against ours.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vmbus::ring::{PacketHeader, PacketKind};

use super::hostile::{announce, asked, fault_of, packet};
use super::*;
use crate::protocol::packet::{TxHeader, Vlan};

/// Writes `bytes` at the start of the guest's scratch page, and returns where that is.
fn scratch(guest: &mut Guest, bytes: &[u8]) -> u64 {
    let pages = Pages::new(guest.vmm.memory(), &guest.scratch).unwrap();
    assert!(pages.write(0, bytes));
    guest.scratch[0]
}

/// Sends what lies in `ranges` of the scratch page, as length and offset.
fn send_ranges(guest: &mut Guest, page: u64, ranges: &[(u32, u32)]) {
    let mut list = GpaRangeList::default();
    ranges.iter().for_each(|&(len, offset)| list.push(len, offset, &[page]));
    let header = PacketHeader { kind: PacketKind::GpaDirect { ranges: list.ranges() }, ..asked(1 << 33) };
    guest.outstanding += 1;
    assert!(guest.send_raw(0, &header, &announce(nvsp::NO_SECTION, 0)).unwrap());
}

#[test]
fn header_in_two_pieces_cut_at_any_byte_is_taken() {
    let (_rig, mut one, mut two) = two(Config::default(), Config::default());
    let vlan = Some(Vlan { id: 9, priority: 0, dei: false });
    let sent = frame(2, 1, 100);
    let message = packet(&TxHeader { vlan, ..TxHeader::default() }, &sent);
    let len = u32::try_from(message.len()).unwrap();
    for cut in 1..len {
        let page = scratch(&mut one, &message);
        send_ranges(&mut one, page, &[(cut, 0), (len - cut, cut)]);
        let received = next(&mut two, 1);
        assert_eq!((received.frame, received.vlan), (sent.clone(), vlan), "{cut}");
        one.wait("completion", |guest| (guest.outstanding == 0).then_some(())).unwrap();
    }
    let page = scratch(&mut one, &message);
    let bytes: Vec<(u32, u32)> = (0..len).map(|at| (1, at)).collect();
    send_ranges(&mut one, page, &bytes);
    assert_eq!(next(&mut two, 1).frame, sent);
}

#[test]
fn second_packet_of_a_message_that_is_bad_faults_and_nothing_is_completed_twice() {
    let reason = fault_of(|guest| {
        let good = packet(&TxHeader::default(), &frame(2, 1, 60));
        let mut both = good.clone();
        both.extend(&good);
        // The second one's data begins behind its end.
        both[good.len() + 8..good.len() + 12].copy_from_slice(&500u32.to_le_bytes());
        both[4..8].copy_from_slice(&u32::try_from(good.len()).unwrap().to_le_bytes());
        guest.send.as_ref().unwrap().pages.write(0, &both);
        let used = u32::try_from(both.len()).unwrap();
        guest.send_raw(0, &asked(1 << 32), &announce(0, used)).unwrap();
    });
    assert!(reason.contains("RNDIS"), "{reason}");
}

#[test]
fn frames_of_every_short_length_and_of_the_longest_are_taken_or_dropped() {
    let (_rig, mut one, mut two) = two(Config::default(), Config::default());
    for form in [Form::Usual, Form::Direct, Form::Partial] {
        for len in (0..14).chain([15, 1515, 9014, 9015, 30_000, 65_550, 65_557]) {
            let mut bytes = frame(2, 1, len);
            bytes.truncate(len);
            assert!(one.send(&bytes, &Transmit { form, ..Transmit::default() }).unwrap(), "{form:?} {len}");
            one.flush();
            one.wait("completion", |guest| (guest.outstanding == 0).then_some(())).unwrap();
        }
        one.send(&frame(2, 1, 64), &Transmit { form, ..Transmit::default() }).unwrap();
        one.flush();
        while next(&mut two, 1).frame.len() != 64 {}
    }
}

#[test]
fn fault_on_a_subchannel_stops_the_adapter() {
    let mut rig = Rig::new(vec![0, 1]).unwrap();
    let mut one = rig.guest(1, |_| (), Config { queues: 4, ..Config::default() }).unwrap();
    one.send_raw(3, &asked(5), &announce(170, 100)).unwrap();
    assert!(one.vmm().fault().unwrap().contains("send section 170"));
    // A guest that opens it anew is refused, and does not wait for an answer for ever.
    one.vmm().close(3).unwrap();
    let gpadl = one.channels[3].gpadl;
    assert!(matches!(one.vmm().open(3, gpadl, channel::RING_PAGES), Err(VscError::Refused(_))));
}

/// What a guest hears of a request on channel 1: the answer, or why its adapter stopped.
fn answer_on_subchannel(one: &mut Guest, message: &[u8]) -> Result<Vec<u8>, String> {
    const TRANSACTION: u64 = 1 << 41;
    one.send_raw(1, &asked(TRANSACTION), message).unwrap();
    let end = Instant::now() + TIMEOUT;
    loop {
        // Whatever else the host says to it breaks the protocol, and is an error here.
        one.poll().unwrap();
        let answers = std::mem::take(&mut one.answers);
        if let Some((transaction, answer)) = answers.into_iter().next() {
            assert_eq!(transaction, TRANSACTION);
            return Ok(answer);
        }
        if one.vmm.is_told() {
            return Err(one.vmm.fault().unwrap());
        }
        assert!(Instant::now() < end, "neither an answer nor a fault");
        one.sleep(Duration::from_millis(5)).unwrap();
    }
}

#[test]
fn control_message_on_a_subchannel_is_answered_or_faults_and_nothing_hangs() {
    let mut rig = Rig::new(vec![0]).unwrap();
    let mut two = rig.guest(2, |_| (), Config::default()).unwrap();
    rig.port(1, |_| ()).unwrap();
    for kind in [Kind::Init, Kind::SendNdisVersion, Kind::RevokeReceiveBuffer, Kind::Subchannel] {
        let mut one = rig.start("nic1", Config { queues: 2, ..Config::default() }).unwrap();
        let mut message = [0; nvsp::MESSAGE_BYTES];
        message[..4].copy_from_slice(&kind.number().to_le_bytes());
        let answer = answer_on_subchannel(&mut one, &message);
        let state = rig.fabric().port_state("lan", "nic1").unwrap();
        match answer {
            // Some have no answer of their own; the others are refused.
            Ok(answer) if matches!(kind, Kind::SendNdisVersion | Kind::RevokeReceiveBuffer) => {
                assert!(answer.is_empty(), "{kind}: {answer:?}");
            }
            Ok(answer) => {
                let status = if kind == Kind::Init { 12 } else { 4 };
                assert_eq!(
                    nvsp::split(&answer).unwrap().0,
                    if kind == Kind::Init { Kind::InitComplete } else { kind }
                );
                assert_ne!(answer[status], nvsp::Status::Success as u8, "{kind}");
            }
            Err(reason) => {
                assert!(
                    matches!(state, vswitch::report::PortState::Faulted(_)),
                    "{kind}: {reason} and {state:?}"
                );
            }
        }
        one.vmm.close(1).unwrap();
        one.vmm.close(0).unwrap();
        // Another guest's adapter is as before.
        two.query(Oid::GEN_LINK_SPEED).unwrap();
        rig.cut("nic1");
    }
}

#[test]
fn guest_of_ndis_5_gets_each_frame_in_a_packet_of_its_own() {
    use crate::protocol::packet::Lso;
    let old = Config { ndis: (5, 1), ..Config::default() };
    let (_rig, mut one, mut two) = two(Config::default(), old);
    for len in 60..90 {
        one.send(&frame(2, 1, len), &Transmit::default()).unwrap();
    }
    one.flush();
    // The driver breaks off if two come together.
    for len in 60..90 {
        assert_eq!(next(&mut two, 1).frame.len(), len);
    }
    // A large one comes as segments: its parts would have to be in one packet.
    let mut large = life::datagram(2, 1, 7);
    large[16..18].fill(0);
    large.resize(54 + 3000, 7);
    one.send(&large, &Transmit::default().large(Lso { mss: 1000, tcp_offset: 34, ipv6: false })).unwrap();
    one.flush();
    for _ in 0..3 {
        let received = next(&mut two, 1);
        assert_eq!((received.frame.len(), received.parts), (1054, 1));
    }
}

#[test]
fn ring_index_outside_the_ring_faults() {
    for (word, value) in [(0, 1u32), (0, 4), (0, u32::MAX), (0, 0x7ff_fff8)] {
        let reason = fault_of(|guest| {
            let gpadl = guest.channels[0].gpadl;
            let page = guest.vmm.pfn(gpadl, 0).unwrap();
            guest.vmm.memory().room(page * 4096 + word, 4).unwrap().write(&value.to_le_bytes());
            guest.channels[0].ring();
        });
        assert!(reason.contains("index"), "{reason}");
    }
}

#[test]
fn message_rewritten_while_it_is_read_harms_nobody() {
    let (mut rig, mut one, mut two) = two(Config::default(), Config::default());
    let mut three = rig.guest(3, |_| (), Config::default()).unwrap();
    let pages = one.send.as_ref().unwrap().pages.clone();
    let stop = Arc::new(AtomicBool::new(false));
    let mutator = {
        let (pages, stop) = (pages.clone(), Arc::clone(&stop));
        std::thread::spawn(move || {
            let mut random = 0x2545_f491_4f6c_dd1d_u64;
            while !stop.load(Ordering::Relaxed) {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                // Lengths, offsets and headers; mostly small values, so that some are taken.
                let at = u32::try_from(random % 30).unwrap() * 4;
                pages.write(at, &u32::try_from(random >> 40 & 0xff).unwrap().to_le_bytes());
            }
        })
    };
    let message = packet(&TxHeader::default(), &frame(2, 1, 60));
    let used = u32::try_from(message.len()).unwrap();
    for _ in 0..3000 {
        pages.write(0, &message);
        if one.channels[0].write(&asked(1 << 32), &announce(0, used)).is_err() {
            break;
        }
        one.flush();
    }
    stop.store(true, Ordering::Relaxed);
    mutator.join().unwrap();
    // What was flooded meanwhile fills the others' buffers until they read it.
    let end = Instant::now() + TIMEOUT;
    let mut arrived = false;
    while !arrived {
        assert!(Instant::now() < end, "no frame");
        two.send(&frame(3, 2, 100), &Transmit::default()).unwrap();
        two.flush();
        two.poll().unwrap();
        three.poll().unwrap();
        while let Some(received) = three.receive() {
            arrived |= received.frame == frame(3, 2, 100);
        }
    }
    // Answered, whether it faulted or not.
    match one.vmm().close(0) {
        Ok(()) | Err(VscError::Faulted(_)) => {}
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn memory_granted_without_end_is_refused_at_a_limit() {
    let (_rig, mut one, _two) = two(Config::default(), Config::default());
    let pfns = one.vmm.allocate(1).unwrap();
    let granted = (0..400).take_while(|_| one.vmm.grant(&pfns).is_ok()).count();
    assert!((100..256).contains(&granted), "{granted}");
}

#[test]
fn buffer_revoked_under_traffic_is_not_touched_any_more() {
    let (_rig, mut one, mut two) = two(Config::default(), Config::default());
    for _ in 0..50 {
        one.send(&frame(2, 1, 1000), &Transmit::default()).unwrap();
    }
    one.flush();
    let (gpadl, pages) = two.receive.as_ref().map(|buffer| (buffer.gpadl, buffer.pages.clone())).unwrap();
    two.vmm().revoke(gpadl).unwrap();
    let zeroes = vec![0; 64 << 10];
    assert!(pages.write(0, &zeroes));
    for _ in 0..50 {
        one.send(&frame(2, 1, 1000), &Transmit::default()).unwrap();
    }
    one.flush();
    one.wait("completions", |guest| (guest.outstanding == 0).then_some(())).unwrap();
    let mut seen = vec![1; 64 << 10];
    assert!(pages.read(0, &mut seen));
    assert!(seen == zeroes);
}

#[test]
fn guest_that_begins_anew_in_the_middle_is_told_no() {
    let (_rig, mut one, _two) = two(Config::default(), Config::default());
    for version in [Version::V1, Version::V61] {
        let number = U32::new(version.number());
        let init = nvsp::message(Kind::Init, &nvsp::Init { min: number, max: number });
        let answer = one.call(&init, "INIT").unwrap();
        let fields = answered::<nvsp::InitComplete>(&answer, Kind::InitComplete).unwrap();
        assert_ne!(fields.status.get(), nvsp::Status::Success as u32);
    }
    one.query(Oid::GEN_LINK_SPEED).unwrap();
}

/// The worker that finds the fault tells the port of it; the operator may restart the port at that very moment.
#[test]
fn fault_does_not_outlive_the_operators_restart() {
    let mut rig = Rig::new(vec![0]).unwrap();
    rig.port(1, |_| ()).unwrap();
    let config = Config { receive_pages: 64, send_pages: 24, ..Config::default() };
    for _ in 0..500 {
        let (vmm, switch) = Vmm::new("nic1", 8 << 20).unwrap();
        rig.serve("nic1", switch).unwrap();
        let mut guest = Guest::start(vmm, config.clone()).unwrap();
        guest.send_raw(0, &asked(5), &announce(170, 100)).unwrap();
        guest.vmm().fault().unwrap();
        rig.cut("nic1");
        rig.fabric().restart_port("lan", "nic1").unwrap();
    }
}
