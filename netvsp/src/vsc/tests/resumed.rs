//! What a successor believes of what its predecessor left, and what is touched of rings that are not in use.

use vswitch::backend::GuestRss;
use vswitch::report::PortState;

use super::hostile::{announce, asked};
use super::*;

/// Another switch takes the guest's channels over: whether it did, by channel.
fn succeed(rig: &mut Rig, guest: &mut Guest) -> Vec<bool> {
    let switch = guest.vmm.reconnect().unwrap();
    rig.serve("nic1", switch).unwrap();
    guest.vmm.taken_over().unwrap()
}

fn state(rig: &Rig) -> PortState {
    rig.fabric().port_state("lan", "nic1").unwrap()
}

/// What a predecessor, or a successor that was gone back from, may leave.
fn spoil(guest: &Guest, how: &str) {
    let mut state = guest.vmm.state();
    let blob = String::from_utf8(state.read().unwrap()).unwrap();
    match how {
        "another format" => assert!(state.write(blob.replacen("\"format\":1", "\"format\":2", 1).as_bytes())),
        "another form" => assert!(state.write(blob.replacen("\"receive\"", "\"received\"", 1).as_bytes())),
        "nothing" => state.clear(),
        _ => {
            assert!(state.write(&blob.as_bytes()[..blob.len() / 2]));
            assert!(state.write(&blob.as_bytes()[1..]));
        }
    }
}

#[test]
fn successor_that_cannot_read_the_state_refuses_and_the_adapter_plugged_in_anew_works() {
    for how in ["another format", "another form", "nothing", "cut"] {
        let mut rig = Rig::new(vec![0]).unwrap();
        let config = Config { queues: 3, receive_pages: 256, ..Config::default() };
        let mut one = rig.guest(1, |_| (), config.clone()).unwrap();
        rig.cut("nic1");
        spoil(&one, how);
        assert_eq!(succeed(&mut rig, &mut one), [false; 3], "{how}");
        assert!(!matches!(state(&rig), PortState::Faulted(_)), "{how}: the guest did nothing wrong");
        // As the VMM does then: all is taken from the guest, and the guest begins anew.
        one.vmm.reset().unwrap();
        one = Guest::start(one.vmm, config).unwrap();
        assert_eq!(one.queues(), 3);
        // What is known again can be taken over again.
        rig.cut("nic1");
        assert_eq!(succeed(&mut rig, &mut one), [true; 3], "{how}");
        one.query(Oid::GEN_LINK_SPEED).unwrap();
    }
}

#[test]
fn channel_that_was_opened_and_not_used_yet_is_taken_over_without_state() {
    let mut rig = Rig::new(vec![0]).unwrap();
    rig.port(1, |_| ()).unwrap();
    let (mut vmm, switch) = Vmm::new("nic1", 16 << 20).unwrap();
    rig.serve("nic1", switch).unwrap();
    let _channel = Channel::open(&mut vmm, 0).unwrap();
    rig.cut("nic1");
    let switch = vmm.reconnect().unwrap();
    rig.serve("nic1", switch).unwrap();
    assert_eq!(vmm.taken_over().unwrap(), [true]);
}

/// The VMM answers what a switch was asked to close when it died; the state is as it was before.
#[test]
fn guest_whose_switch_died_while_it_closed_begins_anew_at_the_successor() {
    let mut rig = Rig::new(vec![0]).unwrap();
    let mut one = rig.guest(1, |_| (), Config::default()).unwrap();
    rig.cut("nic1");
    // Nobody hears it; it is closed all the same.
    let _ = one.vmm.remove();
    let switch = one.vmm.reconnect().unwrap();
    rig.serve("nic1", switch).unwrap();
    let mut one = Guest::start(one.vmm, Config { queues: 2, mtu: 4000, ..Config::default() }).unwrap();
    one.query(Oid::GEN_LINK_SPEED).unwrap();
}

/// The VMM goes by the connection's end: what it was asked to give up, it may give up then.
#[test]
fn switch_that_ends_in_order_has_let_go_of_the_guest_before_its_vmm_can_know() {
    use std::sync::atomic::Ordering;
    let mut rig = Rig::new(vec![0]).unwrap();
    for round in 0..50 {
        let name = if round == 0 { rig.port(1, |_| ()).unwrap() } else { "nic1".into() };
        let mut one = rig.start(&name, Config { receive_pages: 64, ..Config::default() }).unwrap();
        let rings = Pages::new(one.vmm.memory(), &[one.vmm.pfn(one.channels[0].gpadl, 0).unwrap()]).unwrap();
        let read = rings.word(4).unwrap();
        let message = hostile::packet(&crate::protocol::packet::TxHeader::default(), &frame(2, 1, 60));
        one.send.as_ref().unwrap().pages.write(0, &message);
        let used = u32::try_from(message.len()).unwrap();
        // More than is read in the time that it takes to be told.
        while one.channels[0].write(&asked(1 << 32), &announce(0, used)).unwrap() {}
        one.flush();
        std::thread::scope(|scope| {
            let told = scope.spawn(|| {
                assert!(matches!(one.vmm.fault(), Err(VscError::Closed)));
                let at = read.load(Ordering::SeqCst);
                std::thread::sleep(Duration::from_millis(2));
                assert_eq!(read.load(Ordering::SeqCst), at, "round {round}: it reads on");
            });
            rig.cut("nic1");
            told.join().unwrap();
        });
    }
}

/// Marks what the host owns of both rings in a GPADL; the guest's indices are 0.
fn mark(rings: &Pages) -> [Vec<u8>; 2] {
    [0, channel::RING_PAGES].map(|at| {
        let ring = rings.pages(at, channel::RING_PAGES);
        let mut control = vec![0; 4096];
        control[8..16].fill(0x5a);
        control[64..128].fill(0x2a);
        assert!(ring.write(0, &control));
        control
    })
}

/// Both control pages.
fn control_pages(rings: &Pages) -> [Vec<u8>; 2] {
    [0, channel::RING_PAGES].map(|at| {
        let mut control = vec![0; 4096];
        assert!(rings.pages(at, channel::RING_PAGES).read(0, &mut control));
        control
    })
}

#[test]
fn rings_of_a_channel_that_is_refused_are_not_touched() {
    let mut rig = Rig::new(vec![0]).unwrap();
    let mut one = rig.guest(1, |_| (), Config { queues: 2, ..Config::default() }).unwrap();
    let pfns = one.vmm.allocate(2 * u64::from(channel::RING_PAGES)).unwrap();
    let (gpadl, rings) = one.vmm.grant(&pfns).unwrap();
    let marked = mark(&rings);
    let refused = |one: &mut Guest, index| {
        let refused = one.vmm.open(index, gpadl, channel::RING_PAGES);
        assert!(matches!(refused, Err(VscError::Refused(_))), "{refused:?}");
        assert!(control_pages(&rings) == marked, "channel {index}");
    };
    refused(&mut one, 0);
    refused(&mut one, 1);
    one.send_raw(0, &asked(5), &announce(170, 100)).unwrap();
    one.vmm.fault().unwrap();
    refused(&mut one, 2);
}

/// The operator restarts the port while the guest closes its channel: whoever is later finds what the other did.
#[test]
fn channel_closed_while_the_port_is_restarted_is_not_touched_any_more() {
    let mut rig = Rig::new(vec![0]).unwrap();
    rig.port(1, |_| ()).unwrap();
    let (mut vmm, switch) = Vmm::new("nic1", 16 << 20).unwrap();
    rig.serve("nic1", switch).unwrap();
    let pfns = vmm.allocate(2 * u64::from(channel::RING_PAGES)).unwrap();
    let (gpadl, rings) = vmm.grant(&pfns).unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                rig.fabric().restart_port("lan", "nic1").unwrap();
            }
        });
        let mut outcome = Ok(());
        for round in 0..8000 {
            mark(&rings);
            vmm.open(0, gpadl, channel::RING_PAGES).unwrap();
            vmm.close(0).unwrap();
            let marked = mark(&rings);
            std::thread::sleep(Duration::from_micros(50));
            if control_pages(&rings) != marked {
                outcome = Err(round);
                break;
            }
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        assert_eq!(outcome, Ok(()), "rings of a closed channel were written");
    });
}

/// Each change of a port's table has the whole switch planned anew.
#[test]
fn request_that_changes_nothing_for_the_switch_is_not_told_to_it() {
    let mut rig = Rig::new(vec![0]).unwrap();
    let mut one = rig.guest(1, |_| (), Config { queues: 4, ..Config::default() }).unwrap();
    let mut two = rig.guest(2, |_| (), Config::default()).unwrap();
    // Told behind the adapter's back: it stays until the adapter itself says something else.
    let port = rig.fabric().backend("lan", "nic1").unwrap();
    let table = vec![2; TABLE];
    port.set_steering(Some(&GuestRss {
        key: vmq::rss::DEFAULT_KEY,
        table,
        types: vmq::rss::HashTypes::TCP_V4,
    }));
    port.set_state(PortState::Waiting("the test".into()));
    let mut queues = |one: &mut Guest| -> Vec<usize> {
        (1..20)
            .map(|port| {
                two.send(&life::datagram(1, 2, port), &Transmit::default()).unwrap();
                two.flush();
                two.poll().unwrap();
                next(one, 2).queue
            })
            .collect()
    };
    let end = Instant::now() + TIMEOUT;
    while queues(&mut one) != [2; 19] {
        assert!(Instant::now() < end, "the switch has another table");
    }
    one.set(Oid::ETHERNET_MULTICAST_LIST, &[1, 0, 0x5e, 0, 0, 1]).unwrap();
    one.set(Oid::GEN_CURRENT_PACKET_FILTER, &0x0bu32.to_le_bytes()).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(queues(&mut one), [2; 19]);
    assert_eq!(state(&rig), PortState::Waiting("the test".into()));
    // What does change is told, and so is everything after a restart.
    one.spread(&[1; TABLE]).unwrap();
    assert_eq!(state(&rig), PortState::Up);
    while queues(&mut one) != [1; 19] {
        assert!(Instant::now() < end, "the switch has another table");
    }
    port.set_state(PortState::Waiting("the test".into()));
    rig.fabric().restart_port("lan", "nic1").unwrap();
    assert_eq!(state(&rig), PortState::Up);
}

#[test]
fn request_that_changes_nothing_is_not_saved() {
    let mut rig = Rig::new(vec![0]).unwrap();
    let mut one = rig.guest(1, |_| (), Config::default()).unwrap();
    let written = |one: &Guest| {
        let mut state = one.vmm.state();
        state.read().map(|_| state.sequence()).unwrap()
    };
    // What is known of the link is saved with the first question.
    one.query(Oid::GEN_LINK_SPEED).unwrap();
    let before = written(&one);
    for _ in 0..20 {
        one.query(Oid::GEN_LINK_SPEED).unwrap();
        one.query(Oid::GEN_STATISTICS).unwrap();
    }
    assert_eq!(written(&one), before);
    one.set(Oid::GEN_CURRENT_PACKET_FILTER, &0x0bu32.to_le_bytes()).unwrap();
    // Its answer may come before it is saved, and the next request only after.
    one.query(Oid::GEN_LINK_SPEED).unwrap();
    assert_eq!(written(&one), before + 1);
}
