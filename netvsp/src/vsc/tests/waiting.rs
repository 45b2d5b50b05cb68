//! Messages that wait for a section when the switch is killed: its successor writes them, once.

use std::sync::atomic::Ordering;

use super::*;

/// A guest whose receive buffer has 15 sections.
fn small(rig: &mut Rig) -> Guest {
    rig.guest(1, |_| (), Config { receive_pages: 16, ..Config::default() }).unwrap()
}

/// The guest makes requests and reads nothing; all of them are taken.
fn ask(guest: &mut Guest, requests: std::ops::Range<u32>) {
    for request in requests {
        guest.carry(&rndis::access(rndis::Kind::Query, request, Oid::GEN_LINK_SPEED, &[])).unwrap();
        all_is_taken(guest);
    }
}

fn all_is_taken(guest: &Guest) {
    let (written, read) = (rounds::write_index(guest), rounds::read_index(guest));
    let end = Instant::now() + TIMEOUT;
    while read.load(Ordering::SeqCst) != written.load(Ordering::SeqCst) {
        assert!(Instant::now() < end, "a request is not taken");
        std::thread::yield_now();
    }
}

/// The switch is killed, which saves nothing in the end, and another takes over.
fn kill(rig: &mut Rig, guest: &mut Guest) {
    let saved = guest.vmm.saved();
    rig.cut("nic1");
    guest.vmm.put_back(&saved);
    let switch = guest.vmm.reconnect().unwrap();
    rig.serve("nic1", switch).unwrap();
    assert!(guest.vmm.taken_over().unwrap().iter().all(|taken| *taken));
}

/// Which requests are answered, in order; then as many as ever may be made.
fn answered(guest: &mut Guest, count: usize) -> Vec<u32> {
    guest.wait("replies", |guest| (guest.replies.len() >= count).then_some(())).unwrap();
    guest.wait("completions", |guest| (guest.outstanding == 0).then_some(())).unwrap();
    // No section is lost either: there are 15.
    for _ in 0..40 {
        guest.query(Oid::ETHERNET_PERMANENT_ADDRESS).unwrap();
    }
    let number = |reply: Vec<u8>| u32::from_le_bytes(reply[8..12].try_into().unwrap());
    std::mem::take(&mut guest.replies).into_iter().map(number).collect()
}

#[test]
fn replies_that_wait_when_the_switch_is_killed_come_from_its_successor_once() {
    let mut rig = Rig::new(vec![0]).unwrap();
    let mut one = small(&mut rig);
    for round in 1..4 {
        ask(&mut one, 1000..1020);
        for _ in 0..round {
            kill(&mut rig, &mut one);
        }
        // Behind those that wait.
        ask(&mut one, 1020..1023);
        kill(&mut rig, &mut one);
        assert_eq!(answered(&mut one, 23), (1000..1023).collect::<Vec<_>>());
        kill(&mut rig, &mut one);
    }
}

#[test]
fn replies_that_wait_when_the_switch_ends_or_the_operator_restarts_the_port_come_once() {
    let mut rig = Rig::new(vec![0]).unwrap();
    let mut one = small(&mut rig);
    for restart in [false, true, false] {
        ask(&mut one, 1000..1020);
        for _ in 0..2 {
            if restart {
                rig.fabric().restart_port("lan", "nic1").unwrap();
            } else {
                rig.cut("nic1");
                let switch = one.vmm.reconnect().unwrap();
                rig.serve("nic1", switch).unwrap();
            }
        }
        ask(&mut one, 1020..1023);
        assert_eq!(answered(&mut one, 23), (1000..1023).collect::<Vec<_>>());
    }
}

#[test]
fn completion_behind_a_reply_that_waits_comes_from_the_successor_once() {
    const TRANSACTION: u64 = REQUEST + (1 << 20);
    let mut rig = Rig::new(vec![0]).unwrap();
    let mut one = small(&mut rig);
    ask(&mut one, 1000..1016);
    // It would be refused if it were taken twice.
    let operation = U32::new(nvsp::ALLOCATE_SUBCHANNELS);
    let fields = nvsp::SubchannelRequest { operation, count: 1.into() };
    one.post(&hostile::asked(TRANSACTION), &nvsp::message(Kind::Subchannel, &fields)).unwrap();
    all_is_taken(&one);
    kill(&mut rig, &mut one);
    assert_eq!(answered(&mut one, 16), (1000..1016).collect::<Vec<_>>());
    assert_eq!(one.answers.len(), 1);
    let (transaction, answer) = one.answers.pop_front().unwrap();
    let fields = super::answered::<nvsp::SubchannelComplete>(&answer, Kind::Subchannel).unwrap();
    assert_eq!((transaction, fields.status.get()), (TRANSACTION, nvsp::Status::Success as u32));
    assert_eq!(one.vmm.offered().unwrap(), 1);
}

#[test]
fn link_event_that_waits_when_the_switch_is_killed_comes_from_its_successor_once() {
    let mut rig = Rig::new(vec![0]).unwrap();
    let mut one = small(&mut rig);
    one.indications.clear();
    ask(&mut one, 1000..1015);
    assert!(rig.link("nic1").unwrap().set_link("nic1", false));
    kill(&mut rig, &mut one);
    let event = one.wait("event", |guest| guest.indications.pop_front()).unwrap();
    assert_eq!(event, rndis::Event::MediaDisconnect.number());
    answered(&mut one, 15);
    assert!(one.indications.is_empty());
}

#[test]
fn link_event_from_before_all_is_told_to_a_successor_reaches_the_guest() {
    let mut rig = Rig::new(vec![0]).unwrap();
    let mut one = small(&mut rig);
    one.indications.clear();
    rig.cut("nic1");
    let switch = one.vmm.tell_again().unwrap();
    rig.serve("nic1", switch).unwrap();
    while !rig.link("nic1").unwrap().set_link("nic1", false) {
        std::thread::sleep(Duration::from_millis(1));
    }
    one.vmm.ready().unwrap();
    let event = one.wait("event", |guest| guest.indications.pop_front()).unwrap();
    assert_eq!(event, rndis::Event::MediaDisconnect.number());
}
