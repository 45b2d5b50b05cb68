//! Channels that were granted, opened, or left with answers that wait, when the switch dies or the operator restarts.

use vmbus::ring::PacketKind;

use super::*;

/// The switch is killed, and another takes the guest's channels over. Nothing is saved at the last moment.
fn succeed(rig: &mut Rig, guest: &mut Guest) {
    let mut state = guest.vmm.state();
    let kept = state.read().unwrap();
    rig.cut("nic1");
    state.read().unwrap();
    assert!(state.write(&kept));
    let switch = guest.vmm.reconnect().unwrap();
    rig.serve("nic1", switch).unwrap();
    assert!(guest.vmm.taken_over().unwrap().iter().all(|ok| *ok));
}

/// Asks for subchannels, and does not wait for their offers.
fn ask_for_subchannels(guest: &mut Guest, count: u32) {
    let operation = U32::new(nvsp::ALLOCATE_SUBCHANNELS);
    let fields = nvsp::SubchannelRequest { operation, count: U32::new(count) };
    let answer = guest.call(&nvsp::message(Kind::Subchannel, &fields), "SUBCHANNEL").unwrap();
    assert_eq!(answered::<nvsp::SubchannelComplete>(&answer, Kind::Subchannel).unwrap().count.get(), count);
}

/// NVSP messages of the host that wait in the primary channel.
fn in_band(guest: &mut Guest) -> Vec<Vec<u8>> {
    let mut messages = Vec::new();
    while let Some(packet) = guest.channels[0].next().unwrap() {
        assert_eq!(packet.kind, PacketKind::InBand);
        messages.push(packet.payload.to_vec());
    }
    guest.channels[0].commit();
    messages
}

#[test]
fn subchannels_granted_by_a_switch_that_died_are_offered_opened_and_used_at_its_successors() {
    let mut rig = Rig::new(vec![0]).unwrap();
    let mut one = rig.guest(1, |_| (), Config::default()).unwrap();
    ask_for_subchannels(&mut one, 3);
    succeed(&mut rig, &mut one);
    let end = Instant::now() + TIMEOUT;
    while !one.vmm.is_told() {
        assert!(Instant::now() < end, "not offered again");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(one.vmm.offered().unwrap(), 3);
    for index in 1..=3 {
        let channel = Channel::open(&mut one.vmm, index).unwrap();
        one.channels.push(channel);
        let table = nvsp::send_table(4).to_vec();
        assert_eq!(in_band(&mut one), if index == 3 { vec![table] } else { vec![] });
        succeed(&mut rig, &mut one);
    }
    // The table is told once, and all channels may be spread to.
    assert_eq!(one.vmm.offered().unwrap(), 3);
    assert_eq!(in_band(&mut one), Vec::<Vec<u8>>::new());
    one.spread(&std::array::from_fn(|entry| u32::try_from(entry).unwrap() % 4)).unwrap();
}

#[test]
fn subchannel_closed_while_no_switch_was_there_is_spread_to_no_more() {
    let mut rig = Rig::new(vec![0]).unwrap();
    let mut one = rig.guest(1, |_| (), Config { queues: 3, ..Config::default() }).unwrap();
    rig.cut("nic1");
    // Nobody hears it; it is closed all the same.
    let _ = one.vmm.close(2);
    one.channels.pop();
    succeed(&mut rig, &mut one);
    one.spread(&[2; TABLE]).unwrap_err();
    one.spread(&[1; TABLE]).unwrap();
}

#[test]
fn channel_that_is_opened_before_all_is_told_is_served_once_it_is() {
    let (mut rig, mut one, mut two) = two(Config::default(), Config::default());
    ask_for_subchannels(&mut one, 1);
    rig.cut("nic1");
    let switch = one.vmm.tell_again().unwrap();
    rig.serve("nic1", switch).unwrap();
    let channel = Channel::open(&mut one.vmm, 1).unwrap();
    one.channels.push(channel);
    // In a section of the send buffer, which is not known before.
    let transmit = Transmit { queue: 1, ..Transmit::default() };
    assert!(one.send(&frame(2, 1, 100), &transmit).unwrap());
    one.flush();
    std::thread::sleep(Duration::from_millis(100));
    one.vmm.ready().unwrap();
    assert_eq!(next(&mut two, 1).frame, frame(2, 1, 100));
    one.wait("completion", |guest| (guest.outstanding == 0).then_some(())).unwrap();
    one.spread(&[1; TABLE]).unwrap();
}

#[test]
fn guest_that_begins_anew_before_all_is_told_has_nothing_of_the_one_before() {
    let (mut rig, mut one, mut two) = two(Config::default(), Config::default());
    two.withhold(true).unwrap();
    one.send(&frame(2, 1, 100), &Transmit::default()).unwrap();
    one.flush();
    next(&mut two, 1);
    rig.cut("nic2");
    let _ = two.vmm.remove();
    let switch = two.vmm.tell_again().unwrap();
    rig.serve("nic2", switch).unwrap();
    let mut two =
        Guest::start(two.vmm, Config { mtu: 4000, receive_pages: 64, ..Config::default() }).unwrap();
    two.vmm.ready().unwrap();
    let end = Instant::now() + TIMEOUT;
    while two.waiting() < 200 {
        // Frames to a port that is not in the switch's plan yet are dropped, as ever.
        one.send(&frame(2, 1, 100), &Transmit::default()).unwrap();
        one.flush();
        one.poll().unwrap();
        two.poll().unwrap();
        assert!(Instant::now() < end, "no frame");
    }
}

#[test]
fn answer_that_waits_for_a_section_comes_after_the_operators_restart() {
    use std::sync::atomic::Ordering;
    let mut rig = Rig::new(vec![0]).unwrap();
    // Two sections.
    let mut one = rig.guest(1, |_| (), Config { receive_pages: 3, ..Config::default() }).unwrap();
    let ring = Pages::new(one.vmm.memory(), &[one.vmm.pfn(one.channels[0].gpadl, 0).unwrap()]).unwrap();
    let read = ring.word(4).unwrap();
    let message = |request| rndis::access(rndis::Kind::Query, request, Oid::GEN_LINK_SPEED, &[]);
    for request in 1000..1003 {
        let before = read.load(Ordering::SeqCst);
        one.carry(&message(request)).unwrap();
        let end = Instant::now() + TIMEOUT;
        while read.load(Ordering::SeqCst) == before {
            assert!(Instant::now() < end, "not read");
            std::thread::yield_now();
        }
    }
    rig.fabric().restart_port("lan", "nic1").unwrap();
    let answered = |guest: &mut Guest| (guest.replies.len() == 3).then_some(());
    one.wait("answer that waited", answered).unwrap();
}
