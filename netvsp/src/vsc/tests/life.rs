//! What happens to an adapter in its life: channels, tables and MTU change, it is suspended, it is taken away, its guest
//! is slow.

use std::collections::BTreeSet;
use std::sync::mpsc::{Receiver, Sender, channel};

use vmq::frame::{Accepts, Burst};
use vmq::worker::{Nanos, Wait};
use vswitch::DropReason;
use vswitch::backend::{BackendFault, FrameSink, FrameSource};
use vswitch::spec::{Attachment, PortSpec};
use vswitch::tally::Tally;

use super::*;

/// A rig with `queues` queues per port, and two guests on it.
fn wide(queues: u16, config: &Config) -> (Rig, Guest, Guest) {
    let mut rig = Rig::new(vec![0, 1]).unwrap();
    let mut guest = |number: u8| {
        let change = |spec: &mut PortSpec| {
            let (vm, nic) = (format!("vm{number}"), format!("nic{number}"));
            spec.attachment = Attachment::Synthetic { vm, nic, queues };
        };
        rig.guest(number, change, config.clone()).unwrap()
    };
    let (one, two) = (guest(1), guest(2));
    (rig, one, two)
}

/// A UDP datagram, of which each port makes another flow.
pub(super) fn datagram(to: u8, from: u8, port: u16) -> Vec<u8> {
    let mut frame = [address(to).0, address(from).0].concat();
    frame.extend([8, 0, 0x45, 0, 0, 46, 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, from, 10, 0, 0, to]);
    frame.extend(port.to_be_bytes());
    frame.extend([0, 80, 0, 0, 1, 0, 0, 0, 2, 0, 0x50, 0x10, 1, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6]);
    frame
}

/// Sends a flow of each port, and says which channel each came on.
fn channels_of(one: &mut Guest, two: &mut Guest, ports: std::ops::Range<u16>) -> Vec<usize> {
    ports
        .map(|port| {
            let queue = usize::from(port) % one.queues();
            assert!(
                one.send(&datagram(2, 1, port), &Transmit { queue, ..Transmit::default() }).unwrap(),
                "{port}"
            );
            one.flush();
            one.poll().unwrap();
            // What was flooded before is of no interest.
            loop {
                let received = next(two, 1);
                if received.frame == datagram(2, 1, port) {
                    return received.queue;
                }
            }
        })
        .collect()
}

fn drops(rig: &Rig, port: &str, reason: DropReason) -> u64 {
    let report = rig.fabric().report();
    let port = report.switches[0].ports.iter().find(|known| known.name == port).unwrap();
    port.sent.drops.get(&reason).copied().unwrap_or(0)
}

#[test]
fn one_four_and_64_channels_carry_frames_both_ways() {
    for queues in [1, 4, 64] {
        let config = Config { queues, receive_pages: 2048, ..Config::default() };
        let (_rig, mut one, mut two) = wide(64, &config);
        assert_eq!((one.queues(), two.queues()), (queues.into(), queues.into()));
        let used: BTreeSet<_> = channels_of(&mut one, &mut two, 1000..1400).into_iter().collect();
        // 400 flows over a table of 128 entries leave none of 64 channels out, in this case.
        assert_eq!(used.len(), usize::from(queues));
        for queue in 0..two.queues() {
            let sent = frame(1, 2, 60 + queue);
            two.send(&sent, &Transmit { queue, ..Transmit::default() }).unwrap();
            two.flush();
            assert_eq!(next(&mut one, 2).frame, sent);
        }
    }
}

#[test]
fn guest_that_wants_more_channels_than_there_are_gets_what_there_is() {
    let config = Config { queues: 64, ..Config::default() };
    let (_rig, one, _two) = wide(3, &config);
    assert_eq!(one.queues(), 3);
}

#[test]
fn channels_change_under_traffic_and_every_transmit_is_completed() {
    let (_rig, mut one, mut two) = wide(64, &Config { queues: 64, receive_pages: 2048, ..Config::default() });
    for queues in [4, 1, 8, 2] {
        let before: usize = (0..one.queues())
            .map(|queue| {
                let transmit = Transmit { queue, ..Transmit::default() };
                (0..3).filter(|at| one.send(&frame(2, 1, 60 + at), &transmit).unwrap()).count()
            })
            .sum();
        one.flush();
        // Waits until all is completed.
        one.restart(Config { queues, receive_pages: 256, ..Config::default() }).unwrap();
        assert_eq!(one.queues(), usize::from(queues));
        one.wait("completions", |guest| (guest.outstanding == 0).then_some(())).unwrap();
        for _ in 0..before {
            next(&mut two, 1);
        }
        assert_eq!(channels_of(&mut one, &mut two, 1..20).len(), 19);
        two.send(&datagram(1, 2, 9), &Transmit::default()).unwrap();
        two.flush();
        next(&mut one, 2);
    }
}

#[test]
fn table_changed_under_traffic_moves_flows_at_once() {
    let (_rig, mut one, mut two) = wide(4, &Config { queues: 4, ..Config::default() });
    let spread: BTreeSet<_> = channels_of(&mut one, &mut two, 1..60).into_iter().collect();
    assert_eq!(spread.len(), 4);
    for only in [2u32, 0, 3] {
        two.spread(&[only; TABLE]).unwrap();
        // The switch's plan follows in a moment.
        while channels_of(&mut one, &mut two, 1..5) != [only as usize; 4] {}
        let used: BTreeSet<_> = channels_of(&mut one, &mut two, 1..60).into_iter().collect();
        assert_eq!(used, [only as usize].into());
    }
    // A channel that there is not is refused, and changes nothing.
    two.spread(&[4; TABLE]).unwrap_err();
    assert_eq!(channels_of(&mut one, &mut two, 1..2), [3]);
}

#[test]
fn every_version_of_the_protocol_carries_frames() {
    let (_rig, mut one, mut two) = two(Config::default(), Config::default());
    for version in [Version::V1, Version::V2, Version::V4, Version::V5, Version::V6, Version::V61] {
        for ndis in [(5, 1), (6, 1), (6, 30)] {
            let config = Config { version, ndis, queues: 3, mtu: 1500, ..Config::default() };
            one.restart(Config { receive_pages: 64, send_pages: 30, ..config }).unwrap();
            let queues = if version >= Version::V5 { 3 } else { 1 };
            assert_eq!(one.queues(), queues, "{version:?}");
            // The driver checks that one of NDIS 5 gets one range a packet.
            for len in [60, 61, 62, 1514] {
                two.send(&frame(1, 2, len), &Transmit::default()).unwrap();
            }
            two.flush();
            for len in [60, 61, 62, 1514] {
                assert_eq!(next(&mut one, 2).frame.len(), len, "{version:?} {ndis:?}");
            }
            one.send(&frame(2, 1, 99), &Transmit::default()).unwrap();
            one.flush();
            assert_eq!(next(&mut two, 1).frame.len(), 99);
        }
    }
}

#[test]
fn suspended_adapter_gets_nothing_and_comes_back() {
    let (rig, mut one, mut two) = two(Config::default(), Config::default());
    for _ in 0..3 {
        two.detach().unwrap();
        let before = drops(&rig, "nic2", DropReason::NotReady);
        for _ in 0..50 {
            one.send(&frame(2, 1, 100), &Transmit::default()).unwrap();
        }
        one.flush();
        one.wait("completions", |guest| (guest.outstanding == 0).then_some(())).unwrap();
        assert_eq!(drops(&rig, "nic2", DropReason::NotReady), before + 50);
        two.resume(Config { mtu: 4000, ..Config::default() }).unwrap();
        assert_eq!(two.waiting(), 0);
        let sent = frame(2, 1, 100);
        one.send(&sent, &Transmit::default()).unwrap();
        one.flush();
        assert_eq!(next(&mut two, 1).frame, sent);
    }
}

#[test]
fn adapter_removed_under_traffic_leaves_the_others_going() {
    let (mut rig, mut one, mut two) = two(Config { queues: 4, ..Config::default() }, Config::default());
    let mut three = rig.guest(3, |_| (), Config { queues: 4, ..Config::default() }).unwrap();
    for round in 0..20 {
        for queue in 0..4 {
            let transmit = Transmit { queue, ..Transmit::default() };
            three.send(&frame(2, 3, 1000), &transmit).unwrap();
            one.send(&frame(3, 1, 1000), &transmit).unwrap();
        }
        one.flush();
        three.flush();
        if round == 5 {
            // From under the guest, in the middle of its frames.
            three.vmm().remove().unwrap();
        }
        one.poll().unwrap();
        two.poll().unwrap();
    }
    rig.unplug("nic3").unwrap();
    assert!(rig.fabric().port_state("lan", "nic3").is_err());
    assert_eq!(channels_of(&mut one, &mut two, 1..10).len(), 9);
    // Another takes its place.
    let mut three = rig.guest(3, |_| (), Config { queues: 2, ..Config::default() }).unwrap();
    one.wait("completions", |guest| (guest.outstanding == 0).then_some(())).unwrap();
    one.send(&frame(3, 1, 77), &Transmit::default()).unwrap();
    one.flush();
    assert_eq!(next(&mut three, 1).frame.len(), 77);
}

#[test]
fn guest_that_completes_nothing_loses_its_frames_and_stalls_nobody() {
    let (mut rig, mut one, mut two) =
        two(Config::default(), Config { receive_pages: 64, ..Config::default() });
    let mut three = rig.guest(3, |_| (), Config::default()).unwrap();
    // The switch learns where they are, and floods nothing.
    one.send(&frame(2, 1, 60), &Transmit::default()).unwrap();
    one.flush();
    next(&mut two, 1);
    for (guest, number) in [(&mut two, 2), (&mut three, 3)] {
        guest.send(&frame(1, number, 60), &Transmit::default()).unwrap();
        guest.flush();
        next(&mut one, number);
    }
    two.withhold(true).unwrap();
    for _ in 0..300 {
        one.send(&frame(2, 1, 1000), &Transmit::default()).unwrap();
        one.send(&frame(3, 1, 1000), &Transmit::default()).unwrap();
        one.flush();
        next(&mut three, 1);
        one.poll().unwrap();
        two.poll().unwrap();
    }
    one.wait("completions", |guest| (guest.outstanding == 0).then_some(())).unwrap();
    two.poll().unwrap();
    let (came, lost) = (two.waiting() as u64, drops(&rig, "nic2", DropReason::QueueFull));
    assert!(came < 64 && lost > 200, "{came} {lost}");
    assert_eq!(came + lost, 300);
    // It may ask, and be answered, nevertheless: some sections are for that.
    let no_buffer = two.query(Oid::GEN_RCV_NO_BUFFER).unwrap();
    assert_eq!(u32::from_le_bytes(no_buffer[..4].try_into().unwrap()), u32::try_from(lost).unwrap());
    two.withhold(false).unwrap();
    // The answer comes when all is given back.
    two.query(Oid::GEN_LINK_SPEED).unwrap();
    while two.receive().is_some() {}
    for _ in 0..200 {
        one.send(&frame(2, 1, 77), &Transmit::default()).unwrap();
        one.flush();
        one.poll().unwrap();
        next(&mut two, 1);
    }
}

/// A device model whose frames wait at a gate.
#[derive(Debug)]
pub(super) struct Silent;

impl FrameSource for Silent {
    fn receive<'m>(&'m mut self, _: &mut Burst<'m>, _: Nanos, _: &mut Tally) -> Result<(), BackendFault> {
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

#[derive(Debug)]
struct Gate {
    arrived: Sender<usize>,
    open: Receiver<()>,
}

impl FrameSink for Gate {
    fn accepts(&self) -> Accepts {
        Accepts::all()
    }

    fn put(&mut self, _: Nanos, _: &Burst<'_>, list: &[u8], _: &mut Tally) -> Result<bool, BackendFault> {
        let _ = self.arrived.send(list.len());
        let _ = self.open.recv_timeout(TIMEOUT);
        Ok(false)
    }
}

#[test]
fn send_section_is_given_back_only_after_delivery() {
    let mut rig = Rig::new(vec![0]).unwrap();
    let mut one = rig.guest(1, |_| (), Config { send_pages: 3, ..Config::default() }).unwrap();
    rig.port(2, |_| ()).unwrap();
    let (arrived, arrival) = channel();
    let (opener, open) = channel();
    let port = rig.fabric().backend("lan", "nic2").unwrap();
    port.connect(0, Box::new(Silent), Box::new(Gate { arrived, open }));
    // The switch learns of the port in its own time; meanwhile frames go nowhere.
    while arrival.try_recv().is_err() {
        if one.send(&frame(2, 1, 1000), &Transmit::default()).unwrap() {
            one.flush();
        }
        let _ = opener.send(());
        one.poll().unwrap();
    }
    while arrival.recv_timeout(Duration::from_millis(50)).is_ok() {
        let _ = opener.send(());
    }
    one.wait("completions", |guest| (guest.outstanding == 0).then_some(())).unwrap();
    while arrival.try_recv().is_ok() {}
    // Fresh tokens are needed from here on: what was sent too much is used up.
    drop(opener);
    let (arrived, arrival) = channel();
    let (opener, open) = channel();
    port.connect(0, Box::new(Silent), Box::new(Gate { arrived, open }));
    for form in [Form::Usual, Form::Direct] {
        assert!(one.send(&frame(2, 1, 1000), &Transmit { form, ..Transmit::default() }).unwrap());
        one.flush();
        assert_eq!(arrival.recv_timeout(TIMEOUT).unwrap(), 1);
        for _ in 0..20 {
            one.poll().unwrap();
            assert_eq!(one.outstanding, 1, "completed before it was delivered");
        }
        opener.send(()).unwrap();
        one.wait("completion", |guest| (guest.outstanding == 0).then_some(())).unwrap();
    }
}

/// A value that OIDs of the kind return.
fn count(guest: &mut Guest, oid: Oid) -> u64 {
    let value = guest.query(oid).unwrap();
    value.first_chunk().map_or_else(
        || u32::from_le_bytes(value[..4].try_into().unwrap()).into(),
        |bytes| u64::from_le_bytes(*bytes),
    )
}

#[test]
fn statistics_are_what_was_moved_over_restarts_and_successors() {
    let mut rig = Rig::new(vec![0]).unwrap();
    let mut one = rig.guest(1, |_| (), Config { queues: 2, ..Config::default() }).unwrap();
    let mut two = rig.guest(2, |_| (), Config { queues: 2, ..Config::default() }).unwrap();
    let mut broadcast = frame(2, 1, 60);
    broadcast[..6].fill(0xff);
    for queue in 0..2 {
        let transmit = Transmit { queue, ..Transmit::default() };
        for sent in [&broadcast, &frame(2, 1, 60), &frame(2, 1, 1000)] {
            one.send(sent, &transmit).unwrap();
            one.flush();
            next(&mut two, 1);
        }
    }
    let check = |one: &mut Guest, two: &mut Guest| {
        assert_eq!([count(one, Oid::GEN_XMIT_OK), count(one, Oid::GEN_RCV_OK)], [6, 0]);
        assert_eq!([count(two, Oid::GEN_XMIT_OK), count(two, Oid::GEN_RCV_OK)], [0, 6]);
        for (guest, octets, frames) in [(two, 24, 32), (one, 56, 64)] {
            let all = guest.query(Oid::GEN_STATISTICS).unwrap();
            let word = |at: usize| u64::from_le_bytes(all[at..at + 8].try_into().unwrap());
            assert_eq!(word(octets), 2 * (60 + 60 + 1000), "{all:?}");
            assert_eq!([word(frames), word(frames + 8), word(frames + 16)], [4, 0, 2]);
        }
    };
    check(&mut one, &mut two);
    // Channels come and go, the operator restarts, the switch dies: the adapter has moved what it has.
    two.restart(Config::default()).unwrap();
    rig.fabric().restart_port("lan", "nic1").unwrap();
    check(&mut one, &mut two);
    for (guest, name) in [(&mut one, "nic1"), (&mut two, "nic2")] {
        rig.cut(name);
        let switch = guest.vmm().reconnect().unwrap();
        rig.serve(name, switch).unwrap();
    }
    check(&mut one, &mut two);
}

#[test]
fn adapter_is_quiet_once_its_guest_has_read_everything() {
    let (rig, mut one, mut two) = two(Config::default(), Config::default());
    let mut send = |count: usize| {
        for _ in 0..count {
            one.send(&frame(2, 1, 100), &Transmit::default()).unwrap();
        }
        one.flush();
        while one.outstanding > 0 {
            one.poll().unwrap();
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    send(10);
    two.vmm().quiesce().unwrap();
    std::thread::sleep(Duration::from_millis(600));
    assert!(!two.vmm().is_told(), "quiet with frames that are not read");
    for _ in 0..10 {
        next(&mut two, 1);
    }
    // Nothing new is given to it.
    let before = drops(&rig, "nic2", DropReason::NotReady);
    send(1);
    while !two.vmm().is_told() {
        two.poll().unwrap();
        std::thread::sleep(Duration::from_millis(1));
    }
    two.vmm().quiet().unwrap();
    assert_eq!(drops(&rig, "nic2", DropReason::NotReady), before + 1);
    assert!(two.receive().is_none());
}

#[test]
fn adapter_without_its_cable_gets_nothing() {
    let (rig, mut one, mut two) = two(Config::default(), Config::default());
    let plug = |up| assert!(rig.link("nic2").unwrap().set_link("nic2", up));
    let before = drops(&rig, "nic2", DropReason::NotReady);
    plug(false);
    one.send(&frame(2, 1, 100), &Transmit::default()).unwrap();
    one.flush();
    while drops(&rig, "nic2", DropReason::NotReady) == before {
        one.poll().unwrap();
        std::thread::sleep(Duration::from_millis(1));
    }
    plug(true);
    let sent = frame(2, 1, 200);
    one.send(&sent, &Transmit::default()).unwrap();
    one.flush();
    assert_eq!(next(&mut two, 1).frame, sent);
}
