//! A switch dies and another takes its channels over: nothing that it took is lost, nothing that was agreed is forgotten.

use std::collections::BTreeSet;

use vmq::frame::{Accepts, Burst};
use vmq::worker::Nanos;
use vswitch::backend::{BackendFault, FrameSink};
use vswitch::tally::Tally;

use super::life::{Silent, datagram};
use super::*;
use crate::protocol::packet::Lso;

/// Kills the worker that delivers to it.
#[derive(Debug)]
pub(super) struct Killer;

impl FrameSink for Killer {
    fn accepts(&self) -> Accepts {
        Accepts::all()
    }

    fn put(&mut self, _: Nanos, _: &Burst<'_>, _: &[u8], _: &mut Tally) -> Result<bool, BackendFault> {
        panic!("killed, as the test wants");
    }
}

/// A guest's link to another switch, which has the same port.
pub(super) fn succeed(rig: &mut Rig, number: u8, guest: &mut Guest) {
    let name = rig.port(number, |_| ()).unwrap();
    let switch = guest.vmm().reconnect().unwrap();
    rig.serve(&name, switch).unwrap();
}

#[test]
fn switch_killed_in_the_middle_of_a_burst_loses_nothing_that_it_took() {
    const FRAMES: usize = 40;
    let mut rig = Rig::new(vec![0]).unwrap();
    let config = Config { queues: 2, receive_pages: 128, ..Config::default() };
    let mut one = rig.guest(1, |_| (), config.clone()).unwrap();
    let mut two = rig.guest(2, |_| (), config).unwrap();
    rig.port(3, |_| ()).unwrap();
    for _ in 0..3 {
        let port = rig.fabric().backend("lan", "nic3").unwrap();
        port.connect(0, Box::new(Silent), Box::new(Killer));
        // Groups go to the second guest first, then to the third port: the burst is delivered in part.
        let group = |at: usize| {
            let mut frame = frame(2, 1, 100 + at);
            frame[..6].fill(0xff);
            frame
        };
        for at in 0..FRAMES {
            let transmit = Transmit { queue: at % 2, ..Transmit::default() };
            assert!(one.send(&group(at), &transmit).unwrap());
        }
        one.flush();
        // The port is in the switch's plan soon, if it is not yet; then the worker dies and nothing moves any more.
        let mut seen = BTreeSet::new();
        let mut collect = |two: &mut Guest| {
            two.poll().unwrap();
            while let Some(received) = two.receive() {
                if received.frame[0] == 0xff {
                    assert_eq!(received.frame, group(received.frame.len() - 100));
                    seen.insert(received.frame.len());
                }
            }
            seen.len()
        };
        for _ in 0..20 {
            collect(&mut two);
            std::thread::sleep(Duration::from_millis(2));
        }
        let successor = Rig::new(vec![0]).unwrap();
        let mut predecessor = std::mem::replace(&mut rig, successor);
        predecessor.cut("nic1");
        predecessor.cut("nic2");
        // The receiver first, and in the switch's plan: frames to a port that is not ready are dropped, as ever.
        succeed(&mut rig, 2, &mut two);
        std::thread::sleep(Duration::from_millis(200));
        succeed(&mut rig, 1, &mut one);
        rig.port(3, |_| ()).unwrap();
        let end = Instant::now() + TIMEOUT;
        while collect(&mut two) < FRAMES {
            assert!(Instant::now() < end, "a frame is lost");
            two.sleep(Duration::from_millis(5)).unwrap();
        }
        // Each is completed, once: the driver checks.
        one.wait("completions", |guest| (guest.outstanding == 0).then_some(())).unwrap();
        // No section is lost either: there are not so many that a few could be missed.
        for at in 0..400 {
            one.send(&frame(2, 1, 60 + at), &Transmit::default()).unwrap();
            one.flush();
            one.poll().unwrap();
            while next(&mut two, 1).frame != frame(2, 1, 60 + at) {}
        }
    }
}

#[test]
fn successor_knows_what_was_agreed() {
    let mut rig = Rig::new(vec![0]).unwrap();
    let config = Config { queues: 4, mtu: 4000, ..Config::default() };
    let mut one = rig.guest(1, |_| (), config.clone()).unwrap();
    let mut two = rig.guest(2, |_| (), config).unwrap();
    let mut table = [1; TABLE];
    table[64..].fill(3);
    two.spread(&table).unwrap();
    assert!(rig.link("nic2").unwrap().set_link("nic2", false));
    let data = |guest: &mut Guest, oids: &[Oid]| -> Vec<Vec<u8>> {
        oids.iter().map(|oid| guest.query(*oid).unwrap()).collect()
    };
    let asked = [
        Oid::GEN_MAXIMUM_FRAME_SIZE,
        Oid::GEN_CURRENT_PACKET_FILTER,
        Oid::OFFLOAD_CURRENT_CONFIG,
        Oid::GEN_MEDIA_CONNECT_STATUS,
        Oid::GEN_RECEIVE_BUFFER_SPACE,
        Oid::GEN_TRANSMIT_BUFFER_SPACE,
    ];
    let before = data(&mut two, &asked);
    let large = {
        let mut frame = datagram(2, 1, 4000);
        // For a large send lengths are left empty.
        frame[16..18].fill(0);
        frame.resize(30_000, 7);
        frame
    };
    let lso = Lso { mss: 1448, tcp_offset: 34, ipv6: false };
    let mut parts = BTreeSet::new();
    for _ in 0..3 {
        assert_eq!(data(&mut two, &asked), before);
        assert!(rig.link("nic2").unwrap().set_link("nic2", true));
        // The table, as soon as it is in the switch's plan, and the hash.
        std::thread::sleep(Duration::from_millis(200));
        let used: BTreeSet<_> = (0..60)
            .map(|port| {
                let transmit = Transmit { queue: usize::from(port) % 4, ..Transmit::default() };
                one.send(&datagram(2, 1, port), &transmit).unwrap();
                one.flush();
                one.poll().unwrap();
                let received = next(&mut two, 1);
                assert!(received.hash.is_some());
                received.queue
            })
            .collect();
        assert_eq!(used, [1, 3].into());
        // Large sends, coalesced segments: one frame, in parts.
        one.send(&large, &Transmit::default().large(lso)).unwrap();
        one.flush();
        let received = next(&mut two, 1);
        assert_eq!(received.frame.len(), large.len());
        parts.insert(received.parts);
        assert!(rig.link("nic2").unwrap().set_link("nic2", false));
        for (guest, name) in [(&mut one, "nic1"), (&mut two, "nic2")] {
            rig.cut(name);
            let switch = guest.vmm().reconnect().unwrap();
            rig.serve(name, switch).unwrap();
        }
    }
    assert!(parts.len() == 1 && parts.first() > Some(&1), "{parts:?}");
}

#[test]
fn link_changed_before_all_is_told_leaves_the_guest_the_sections_it_has() {
    let (mut rig, mut one, mut two) = two(Config::default(), Config::default());
    two.withhold(true).unwrap();
    for _ in 0..10 {
        one.send(&frame(2, 1, 100), &Transmit::default()).unwrap();
    }
    one.flush();
    for _ in 0..10 {
        next(&mut two, 1);
    }
    rig.cut("nic2");
    let switch = two.vmm().tell_again().unwrap();
    rig.serve("nic2", switch).unwrap();
    for up in [false, true] {
        while !rig.link("nic2").unwrap().set_link("nic2", up) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    two.vmm().ready().unwrap();
    // The successor knows of what is completed now.
    two.withhold(false).unwrap();
    let sent = frame(2, 1, 200);
    // Frames to a port that is not in the switch's plan yet are dropped, as ever.
    let end = Instant::now() + TIMEOUT;
    while two.receive().is_none_or(|received| received.frame != sent) {
        assert!(Instant::now() < end, "no frame");
        one.send(&sent, &Transmit::default()).unwrap();
        one.flush();
        std::thread::sleep(Duration::from_millis(5));
        one.poll().unwrap();
        two.poll().unwrap();
    }
}
