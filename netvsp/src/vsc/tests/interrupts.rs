//! What a machine may cost the switch with eventfds for its interrupts that make a write wait. It may do it once.

use vmq::doorbell::Doorbell;
use vswitch::report::PortState;

use super::*;

fn state(rig: &Rig) -> PortState {
    rig.fabric().port_state("lan", "nic2").unwrap()
}

/// Has the guest's interrupts go to `eventfd`, and has the next one wait.
fn stop_up(guest: &mut Guest, eventfd: &Doorbell) {
    guest.vmm.retarget(0, eventfd).unwrap();
    // Retargeted, it is interrupted at once.
    assert!(eventfd.clear());
    rustix::io::ioctl_fionbio(eventfd, false).unwrap();
    rustix::io::write(eventfd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
}

/// Sends frames to the second guest, which takes them and asks for interrupts, until `done`.
fn send_until(one: &mut Guest, two: &mut Guest, mut done: impl FnMut(&mut Guest) -> bool) {
    let end = Instant::now() + TIMEOUT;
    while !done(two) {
        assert!(Instant::now() < end, "nothing happens");
        two.poll().unwrap();
        two.channels[0].arm();
        one.send(&frame(2, 1, 77), &Transmit::default()).unwrap();
        one.flush();
        std::thread::sleep(Duration::from_millis(5));
        one.poll().unwrap();
    }
}

/// Sends frames to the second guest until its port stops, with the reason.
fn stops(rig: &Rig, one: &mut Guest, two: &mut Guest) {
    send_until(one, two, |_| matches!(state(rig), PortState::Faulted(_)));
    is_stopped(rig);
    assert!(two.vmm.fault().unwrap().contains("eventfd"));
}

fn is_stopped(rig: &Rig) {
    match state(rig) {
        PortState::Faulted(reason) => assert!(reason.contains("eventfd"), "{reason}"),
        state => panic!("{state:?}"),
    }
}

/// The guest may not begin anew. Another machine in its place.
fn is_refused(rig: &mut Rig, vmm: Vmm) -> Vmm {
    match Guest::start(vmm, Config { receive_pages: 64, ..Config::default() }) {
        Err(VscError::Refused(_)) => {}
        other => panic!("{:?}", other.map(drop)),
    }
    is_stopped(rig);
    rig.cut("nic2");
    let (vmm, switch) = Vmm::new("nic2", 64 << 20).unwrap();
    rig.serve("nic2", switch).unwrap();
    vmm
}

#[test]
fn machine_whose_interrupt_makes_the_switch_wait_has_its_port_stopped_whatever_it_begins_anew() {
    let (mut rig, mut one, mut two) = two(Config::default(), Config::default());
    let mut three = rig.guest(3, |_| (), Config::default()).unwrap();
    let eventfd = Doorbell::new().unwrap();
    stop_up(&mut two, &eventfd);
    stops(&rig, &mut one, &mut two);
    // The others go on, and it is not waited for any more.
    for _ in 0..100 {
        one.send(&frame(2, 1, 100), &Transmit::default()).unwrap();
        one.send(&frame(3, 1, 100), &Transmit::default()).unwrap();
        one.flush();
        while next(&mut three, 1).frame.len() != 100 {}
    }
    let another = Doorbell::new().unwrap();
    two.vmm.retarget(0, &another).unwrap();
    assert!(!another.clear(), "none of its eventfds is rung");

    // A guest that was reset, an adapter plugged in anew, another link.
    let mut vmm = two.vmm;
    vmm.reset().unwrap();
    let mut vmm = is_refused(&mut rig, vmm);
    vmm.remove().unwrap();
    vmm.plug(false).unwrap();
    let vmm = is_refused(&mut rig, vmm);
    // Only the operator ends it.
    rig.fabric().restart_port("lan", "nic2").unwrap();
    let mut two = Guest::start(vmm, Config::default()).unwrap();
    assert_eq!(state(&rig), PortState::Up);
    one.query(Oid::GEN_LINK_SPEED).unwrap();
    two.query(Oid::GEN_LINK_SPEED).unwrap();
}

#[test]
fn port_restarted_by_the_operator_goes_on_until_an_interrupt_makes_the_switch_wait_again() {
    let (rig, mut one, mut two) = two(Config::default(), Config::default());
    let eventfd = Doorbell::new().unwrap();
    for _ in 0..2 {
        stop_up(&mut two, &eventfd);
        stops(&rig, &mut one, &mut two);
        rig.fabric().restart_port("lan", "nic2").unwrap();
        assert_eq!(state(&rig), PortState::Up);
        // Set non-blocking again, so that it can be emptied here.
        assert!(eventfd.clear());
        while two.receive().is_some() {}
        send_until(&mut one, &mut two, |two| two.receive().is_some());
        send_until(&mut one, &mut two, |_| eventfd.clear());
    }
}

/// A fault of the guest's ends when it begins anew, and would take the other one with it.
#[test]
fn interrupt_that_makes_the_switch_wait_on_a_port_that_is_stopped_counts_as_well() {
    let (mut rig, _one, mut two) = two(Config::default(), Config::default());
    let eventfd = Doorbell::new().unwrap();
    stop_up(&mut two, &eventfd);
    two.send_raw(0, &hostile::asked(5), &hostile::announce(170, 100)).unwrap();
    assert!(two.vmm.fault().unwrap().contains("send section 170"));
    // It is told of its cable all the same.
    two.poll().unwrap();
    two.channels[0].arm();
    assert!(rig.link("nic2").unwrap().set_link("nic2", false));
    is_stopped(&rig);
    two.vmm.reset().unwrap();
    is_refused(&mut rig, two.vmm);
}
