//! A guest faults its adapter: it stays without until the operator restarts the port, or until there is another guest, be it the
//! same machine after a reset.

use vswitch::report::PortState;

use super::hostile::{announce, asked};
use super::*;

fn small() -> Config {
    Config { receive_pages: 128, send_pages: 24, ..Config::default() }
}

/// Breaks the protocol, and waits until that has been seen.
fn fault(guest: &mut Guest) {
    guest.send_raw(0, &asked(5), &announce(170, 100)).unwrap();
    assert!(guest.vmm().fault().unwrap().contains("send section 170"));
}

fn state(rig: &Rig) -> PortState {
    rig.fabric().port_state("lan", "nic1").unwrap()
}

fn is_refused<T>(outcome: Result<T, VscError>) -> bool {
    matches!(outcome, Err(VscError::Refused(_)))
}

/// Frames come and go.
fn works(one: &mut Guest, two: &mut Guest) {
    let end = Instant::now() + TIMEOUT;
    loop {
        // The first ones may be early for the switch's plan.
        one.send(&frame(2, 1, 100), &Transmit::default()).unwrap();
        two.send(&frame(1, 2, 99), &Transmit::default()).unwrap();
        one.flush();
        two.flush();
        two.sleep(Duration::from_millis(5)).unwrap();
        one.poll().unwrap();
        two.poll().unwrap();
        if one.waiting() > 0 && two.waiting() > 0 {
            return;
        }
        assert!(Instant::now() < end, "no frame");
    }
}

#[test]
fn machine_that_was_reset_has_its_adapter_again() {
    let (rig, mut one, mut two) = two(Config::default(), Config::default());
    for queues in [1, 4, 1] {
        fault(&mut one);
        one.vmm.reset().unwrap();
        assert!(matches!(state(&rig), PortState::Faulted(_)), "until it opens a channel");
        one = Guest::start(one.vmm, Config { queues, receive_pages: 256, ..Config::default() }).unwrap();
        assert_eq!(state(&rig), PortState::Up);
        works(&mut one, &mut two);
    }
}

#[test]
fn machine_that_was_started_again_has_its_adapter_again() {
    let (mut rig, mut one, mut two) = two(Config::default(), Config::default());
    fault(&mut one);
    rig.cut("nic1");
    one = rig.start("nic1", Config::default()).unwrap();
    assert_eq!(state(&rig), PortState::Up);
    works(&mut one, &mut two);
}

#[test]
fn guest_that_faulted_and_keeps_memory_of_before_stays_without() {
    let (rig, mut one, _two) = two(Config::default(), Config::default());
    fault(&mut one);
    let ring = one.channels[0].gpadl;
    for _ in 0..3 {
        one.vmm.close(0).unwrap();
        assert!(is_refused(one.vmm.open(0, ring, channel::RING_PAGES)));
    }
    assert!(matches!(state(&rig), PortState::Faulted(_)));
    // The operator's restart is good for it still.
    rig.fabric().restart_port("lan", "nic1").unwrap();
    one.vmm.open(0, ring, channel::RING_PAGES).unwrap();
}

#[test]
fn guest_that_faulted_stays_without_at_a_switchs_successor() {
    let (mut rig, mut one, mut two) = two(Config::default(), Config::default());
    fault(&mut one);
    rig.cut("nic1");
    let switch = one.vmm.reconnect().unwrap();
    rig.serve("nic1", switch).unwrap();
    let ring = one.channels[0].gpadl;
    one.vmm.close(0).unwrap();
    assert!(is_refused(one.vmm.open(0, ring, channel::RING_PAGES)));
    assert!(matches!(state(&rig), PortState::Faulted(_)));
    one.vmm.reset().unwrap();
    one = Guest::start(one.vmm, Config { receive_pages: 256, ..Config::default() }).unwrap();
    works(&mut one, &mut two);
}

#[test]
fn guest_that_does_nothing_but_fault_and_boot_is_refused_in_the_end() {
    let mut rig = Rig::new(vec![0]).unwrap();
    rig.port(1, |_| ()).unwrap();
    let (mut vmm, switch) = Vmm::new("nic1", 64 << 20).unwrap();
    rig.serve("nic1", switch).unwrap();
    // Each is at most as far from the one before as the time that a pardon takes to be forgotten, or this would never end.
    for boots in 0..100 {
        let mut guest = match Guest::start(vmm, small()) {
            Ok(guest) => guest,
            Err(error) => {
                assert!(boots > 8 && is_refused::<()>(Err(error)), "{boots}");
                return;
            }
        };
        fault(&mut guest);
        vmm = guest.vmm;
        vmm.reset().unwrap();
    }
    panic!("never refused");
}
