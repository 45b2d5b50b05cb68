//! A switch is killed where a round of a queue ends, and another goes on. A guest that must not send does.

use std::sync::atomic::Ordering;

use vmbus::pages::SharedWord;
use vswitch::DropReason;

use super::life::Silent;
use super::succession::{Killer, succeed};
use super::*;

/// How far the switch has read what comes from the guest.
pub(super) fn read_index(guest: &Guest) -> SharedWord {
    index(guest, 4)
}

/// How far the guest has written it.
pub(super) fn write_index(guest: &Guest) -> SharedWord {
    index(guest, 0)
}

fn index(guest: &Guest, at: u32) -> SharedWord {
    let pfn = guest.vmm.pfn(guest.channels[0].gpadl, 0).unwrap();
    Pages::new(guest.vmm.memory(), &[pfn]).unwrap().word(at).unwrap()
}

/// The guest's switch dies after it has shown the guest the answer to what `act` has the guest do, and before it gives
/// the room of that back; another takes over.
fn killed_before_the_room_is_given_back(rig: &mut Rig, guest: &mut Guest, act: impl FnOnce(&mut Guest)) {
    let (written, read) = (write_index(guest), read_index(guest));
    // One round: what was before is done with.
    guest.wait("answers", |guest| (guest.outstanding == 0).then_some(())).unwrap();
    while read.load(Ordering::SeqCst) != written.load(Ordering::SeqCst) {
        std::thread::yield_now();
    }
    let before = read.load(Ordering::SeqCst);
    act(guest);
    while read.load(Ordering::SeqCst) == before {
        std::thread::yield_now();
    }
    rig.cut("nic1");
    let after = read.swap(before, Ordering::SeqCst);
    let switch = guest.vmm.reconnect().unwrap();
    rig.serve("nic1", switch).unwrap();
    assert_eq!(guest.vmm.taken_over().unwrap(), [true]);
    let end = Instant::now() + TIMEOUT;
    while read.load(Ordering::SeqCst) != after {
        assert!(Instant::now() < end, "it is not taken");
        std::thread::yield_now();
    }
}

#[test]
fn successor_does_nothing_twice_that_the_guest_has_the_answer_to() {
    let (mut rig, mut one, mut two) = two(Config::default(), Config::default());
    for round in 0..10 {
        killed_before_the_room_is_given_back(&mut rig, &mut one, |one| {
            for at in 0..5 {
                assert!(one.send(&frame(2, 1, 100 + at), &Transmit::default()).unwrap());
            }
            one.flush();
            one.wait("completions", |guest| (guest.outstanding == 0).then_some(())).unwrap();
        });
        killed_before_the_room_is_given_back(&mut rig, &mut one, |one| {
            one.carry(&rndis::access(rndis::Kind::Query, 1000, Oid::GEN_LINK_SPEED, &[])).unwrap();
        });
        killed_before_the_room_is_given_back(&mut rig, &mut one, |one| {
            // One that is refused when it is made twice.
            let operation = U32::new(nvsp::ALLOCATE_SUBCHANNELS);
            let fields = nvsp::SubchannelRequest { operation, count: 1.into() };
            let answer = one.call(&nvsp::message(Kind::Subchannel, &fields), "SUBCHANNEL").unwrap();
            let fields = answered::<nvsp::SubchannelComplete>(&answer, Kind::Subchannel).unwrap();
            assert_eq!(fields.status.get() == nvsp::Status::Success as u32, round == 0);
        });
        one.query(Oid::GEN_LINK_SPEED).unwrap();
        assert_eq!((one.replies.len(), one.answers.len()), (1, 0), "answered once");
        one.replies.clear();
        let last = frame(2, 1, 77);
        let mut seen = Vec::new();
        let end = Instant::now() + TIMEOUT;
        while seen.last() != Some(&last.len()) {
            assert!(Instant::now() < end, "no frame");
            one.send(&last, &Transmit::default()).unwrap();
            one.flush();
            two.sleep(Duration::from_millis(5)).unwrap();
            // A completion too many is an error.
            one.poll().unwrap();
            two.poll().unwrap();
            seen.extend(std::iter::from_fn(|| two.receive()).map(|received| received.frame.len()));
        }
        seen.retain(|len| *len != 77);
        assert_eq!(seen, [100, 101, 102, 103, 104]);
        while two.receive().is_some() {}
    }
}

#[test]
fn request_behind_frames_that_kill_the_switch_is_answered_by_its_successor_only() {
    let mut rig = Rig::new(vec![0]).unwrap();
    let mut one = rig.guest(1, |_| (), Config::default()).unwrap();
    rig.port(3, |_| ()).unwrap();
    rig.fabric().backend("lan", "nic3").unwrap().connect(0, Box::new(Silent), Box::new(Killer));
    // Until it is in the switch's plan.
    std::thread::sleep(Duration::from_millis(300));
    let mut group = frame(3, 1, 100);
    group[..6].fill(0xff);
    assert!(one.send(&group, &Transmit::default()).unwrap());
    one.carry(&rndis::access(rndis::Kind::Query, 1000, Oid::GEN_LINK_SPEED, &[])).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    one.poll().unwrap();
    assert!(one.replies.is_empty() && one.outstanding == 2);
    let mut predecessor = std::mem::replace(&mut rig, Rig::new(vec![0]).unwrap());
    predecessor.cut("nic1");
    succeed(&mut rig, 1, &mut one);
    one.wait("an answer", |guest| (guest.outstanding == 0).then_some(())).unwrap();
    one.query(Oid::GEN_LINK_SPEED).unwrap();
    assert_eq!(one.replies.len(), 1);
}

#[test]
fn frames_without_cable_or_after_halt_are_completed_and_go_nowhere() {
    let (rig, mut one, mut two) = two(Config::default(), Config::default());
    let dropped = |count: u64| {
        let counted = || {
            let report = rig.fabric().report();
            let port = report.switches[0].ports.iter().find(|known| known.name == "nic1").unwrap();
            port.received.drops.get(&DropReason::NotReady).copied().unwrap_or(0)
        };
        let end = Instant::now() + TIMEOUT;
        while counted() < count && Instant::now() < end {
            std::thread::yield_now();
        }
        assert_eq!(counted(), count);
    };
    let send = |one: &mut Guest, len: usize, form: Form| {
        let together = [frame(2, 1, len), frame(2, 1, len)];
        for frame in &together {
            one.send(frame, &Transmit { form, ..Transmit::default() }).unwrap();
        }
        one.flush();
        one.wait("completions", |guest| (guest.outstanding == 0).then_some(())).unwrap();
    };
    assert!(rig.link("nic1").unwrap().set_link("nic1", false));
    send(&mut one, 100, Form::Usual);
    send(&mut one, 101, Form::Direct);
    dropped(4);
    assert!(rig.link("nic1").unwrap().set_link("nic1", true));
    one.carry(&rndis::request(rndis::Kind::Halt, 1000)).unwrap();
    one.wait("HALT", |guest| (guest.outstanding == 0).then_some(())).unwrap();
    send(&mut one, 102, Form::Direct);
    dropped(6);
    one.rndis_up().unwrap();
    send(&mut one, 77, Form::Usual);
    dropped(6);
    assert_eq!(next(&mut two, 1).frame.len(), 77);
}
