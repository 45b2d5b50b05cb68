//! Conversations from beginning to end.

use super::*;
use crate::root::replay::Item;

#[test]
fn linux_tries_versions_downward_until_one_is_spoken() {
    let mut rig = Rig::new(Version::V5_3);
    rig.root = Root::new(RootConfig::new(Version::V4_1, 2));
    for version in [Version::V5_3, Version::V5_2, Version::V5_1, Version::V5_0] {
        rig.say(&contact(version.to_wire(), 1)).unwrap();
        assert_eq!(rig.heard(), ["version no"]);
    }
    rig.root.message(MESSAGE_CONNECTION, &contact(Version::V4_1.to_wire(), 1)).unwrap();
    let Some(Action::Post { vp: 1, payload }) = rig.root.next_action() else {
        panic!("no answer on processor 1")
    };
    assert_eq!(payload, [15, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 4, 0]);
    assert_eq!(rig.root.describe().version.as_deref(), Some("4.1"));
}

#[test]
fn all_eight_versions_are_spoken_on_their_connection_id_and_others_refused() {
    for version in Version::ALL {
        let mut rig = Rig::new(version);
        rig.say(&contact(version.to_wire(), 0)).unwrap();
        let Some(Action::Post { payload, .. }) = rig.root.next_action() else { panic!("no answer") };
        let word = if version < Version::V5_0 { version.to_wire() } else { CONTACT_CONNECTION };
        assert_eq!((payload[8], &payload[12..]), (1, &word.to_le_bytes()[..]), "{version}");
    }
    for number in [0x0000_000D, 0x0001_0001, 0x0005_0004, 0x0006_0000, u32::MAX] {
        let mut rig = Rig::new(Version::V5_3);
        rig.say(&contact(number, 0)).unwrap();
        assert_eq!(rig.heard(), ["version no"], "{number:#x}");
    }
}

#[test]
fn contact_for_5_0_on_the_old_connection_id_or_another_interrupt_source_or_trust_level_is_refused() {
    let mut message = contact(Version::V5_3.to_wire(), 0);
    let mut rig = Rig::new(Version::V4_1);
    rig.say(&message).unwrap();
    message[16] = 3;
    rig.root.message(CONTACT_CONNECTION, &message).unwrap();
    message[16] = SINT;
    message[17] = 2;
    rig.root.message(CONTACT_CONNECTION, &message).unwrap();
    assert_eq!(rig.heard(), ["version no", "version no", "version no"]);
}

#[test]
fn offer_of_a_pipe_carries_its_mode_and_a_dedicated_interrupt() {
    let mut rig = Rig::new(Version::V5_3);
    rig.root.offer(OfferSpec { pipe: true, ..spec(9) }).unwrap();
    rig.say(&contact(Version::V5_3.to_wire(), 0)).unwrap();
    rig.say(&encode(&RequestOffers {})).unwrap();
    rig.root.next_action();
    let Some(Action::Post { payload, .. }) = rig.root.next_action() else { panic!("no offer") };
    let Ok(HostMessage::OfferChannel(offer)) = HostMessage::parse(&payload) else { panic!("no offer") };
    assert_eq!(offer.flags.get(), 0x11);
    assert_eq!(offer.user_defined[..4], [4, 0, 0, 0]);
    assert_eq!((offer.monitor_id, offer.monitor_allocated, offer.dedicated.get()), (0xFF, 0, 1));
    assert_eq!((offer.relid.get(), offer.connection.get()), (1, 0x2001));
}

#[test]
fn channel_opens_closes_and_opens_again_with_the_same_id() {
    let (mut rig, device) = Rig::offered(Version::V5_3);
    rig.say(&gpadl(1, 0x10, 40, 26)).unwrap();
    assert!(rig.heard().is_empty());
    rig.say(&body(0x10, 14)).unwrap();
    assert_eq!(rig.heard(), ["GPADL 0x10 40"]);
    rig.root.gpadl_accepted(device, GpadlId(0x10), true);
    rig.say(&open(1, 0x10)).unwrap();
    assert_eq!(rig.heard(), ["created 0x10 ok", "OPEN 0 0x10"]);
    for _ in 0..2 {
        rig.root.opened(key(device, 0), true);
        rig.say(&close(1)).unwrap();
        assert_eq!(rig.heard(), ["opened 1 ok", "CLOSE 0"]);
        rig.say(&open(1, 0x10)).unwrap();
        assert!(rig.heard().is_empty(), "the rings are the device's until it closed");
        rig.root.closed(key(device, 0));
        assert_eq!(rig.heard(), ["OPEN 0 0x10"]);
    }
}

#[test]
fn ring_is_given_back_only_when_the_device_closed_the_channel() {
    let (mut rig, device) = Rig::opened(Version::V5_3);
    rig.say(&close(1)).unwrap();
    rig.say(&teardown(1, 0x10)).unwrap();
    assert_eq!(rig.heard(), ["CLOSE 0"]);
    rig.root.closed(key(device, 0));
    assert_eq!(rig.heard(), ["TEARDOWN 0x10"]);
    rig.root.gpadl_released(device, GpadlId(0x10));
    assert_eq!(rig.heard(), ["torndown 0x10"]);
    rig.say(&open(1, 0x10)).unwrap();
    assert_eq!(rig.heard(), ["opened 1 no"]);
}

#[test]
fn device_that_cannot_open_or_accept_is_reported_to_the_guest() {
    let (mut rig, device) = Rig::offered(Version::V5_3);
    rig.say(&gpadl(1, 0x20, 8, 8)).unwrap();
    rig.root.gpadl_accepted(device, GpadlId(0x20), false);
    assert_eq!(rig.heard(), ["GPADL 0x20 8", "created 0x20 no"]);
    rig.share(device, 1, 0x20);
    rig.say(&open(1, 0x20)).unwrap();
    rig.root.opened(key(device, 0), false);
    assert_eq!(rig.heard(), ["OPEN 0 0x20", "opened 1 no"]);
    rig.say(&open(1, 0x20)).unwrap();
    assert_eq!(rig.heard(), ["OPEN 0 0x20"]);
}

#[test]
fn close_while_opening_fails_the_opening_and_closes_the_device() {
    let (mut rig, device) = Rig::offered(Version::V5_3);
    rig.share(device, 1, 0x10);
    rig.say(&open(1, 0x10)).unwrap();
    rig.say(&close(1)).unwrap();
    assert_eq!(rig.heard(), ["OPEN 0 0x10"]);
    rig.root.opened(key(device, 0), true);
    assert_eq!(rig.heard(), ["opened 1 no", "CLOSE 0"]);
    rig.root.closed(key(device, 0));
    rig.say(&open(1, 0x10)).unwrap();
    assert_eq!(rig.heard(), ["OPEN 0 0x10"]);
}

#[test]
fn modify_is_acknowledged_exactly_in_5_3() {
    for (version, answer) in [(Version::V5_3, vec!["modified 1 ok"]), (Version::V5_2, vec![])] {
        let (mut rig, device) = Rig::opened(version);
        rig.say(&modify(1, 2)).unwrap();
        assert_eq!(rig.heard(), ["MODIFY 0 2"]);
        rig.root.modified(key(device, 0));
        assert_eq!(rig.heard(), answer, "{version}");
        assert_eq!(rig.root.describe().devices[0].channels[0].vp, Some(2));
    }
}

#[test]
fn of_unacknowledged_redirections_the_last_one_wins() {
    let (mut rig, device) = Rig::opened(Version::V4_1);
    for vp in [2, 3, 0] {
        rig.say(&modify(1, vp)).unwrap();
    }
    assert_eq!(rig.heard(), ["MODIFY 0 2"]);
    rig.root.modified(key(device, 0));
    assert_eq!(rig.heard(), ["MODIFY 0 0"]);
}

#[test]
fn subchannels_come_on_request_and_are_rescinded_when_the_primary_closes() {
    let (mut rig, device) = Rig::opened(Version::V5_3);
    assert_eq!(rig.root.offer_subchannels(device, 2), Ok(2));
    assert_eq!(rig.heard(), ["offer 2.1", "offer 3.2"]);
    rig.share(device, 2, 0x20);
    rig.say(&open(2, 0x20)).unwrap();
    rig.root.opened(key(device, 1), true);
    rig.heard();
    rig.say(&close(1)).unwrap();
    assert_eq!(rig.heard(), ["rescind 2", "CLOSE 1", "rescind 3", "CLOSE 0"]);
    rig.root.closed(key(device, 1));
    rig.root.closed(key(device, 0));
    // Opened anew before the guest released the old ones: the same indices, other ids.
    rig.say(&open(1, 0x10)).unwrap();
    rig.root.opened(key(device, 0), true);
    rig.heard();
    assert_eq!(rig.root.offer_subchannels(device, 2), Ok(2));
    assert_eq!(rig.heard(), ["offer 4.1", "offer 5.2"]);
    rig.say(&released(2)).unwrap();
    rig.say(&released(3)).unwrap();
    assert_eq!(rig.heard(), ["TEARDOWN 0x20"]);
}

#[test]
fn subchannel_whose_predecessor_is_still_closing_is_offered_when_that_is_closed() {
    let (mut rig, device) = Rig::opened(Version::V5_3);
    rig.root.offer_subchannels(device, 1).unwrap();
    rig.share(device, 2, 0x20);
    rig.say(&open(2, 0x20)).unwrap();
    rig.root.opened(key(device, 1), true);
    rig.say(&close(1)).unwrap();
    rig.root.closed(key(device, 0));
    rig.say(&open(1, 0x10)).unwrap();
    rig.root.opened(key(device, 0), true);
    rig.heard();
    assert_eq!(rig.root.offer_subchannels(device, 1), Ok(1));
    assert!(rig.heard().is_empty());
    rig.root.closed(key(device, 1));
    assert_eq!(rig.heard(), ["offer 3.1"]);
}

#[test]
fn subchannels_beyond_the_limit_or_without_an_open_primary_are_not_offered() {
    let (mut rig, device) = Rig::offered(Version::V5_3);
    assert_eq!(rig.root.offer_subchannels(device, 1), Err(OfferError::PrimaryNotOpen(device)));
    assert_eq!(rig.root.offer_subchannels(DeviceId(9), 1), Err(OfferError::NoDevice(DeviceId(9))));
    let (mut rig, device) = Rig::opened(Version::V5_3);
    assert_eq!(rig.root.offer_subchannels(device, u16::MAX), Ok(4));
    assert_eq!(rig.heard().len(), 4);
    assert_eq!(rig.root.offer_subchannels(device, 2), Ok(2));
    assert!(rig.heard().is_empty());
}

#[test]
fn device_added_while_the_guest_runs_is_offered_at_once() {
    let (mut rig, _) = Rig::opened(Version::V5_3);
    rig.root.offer(spec(2)).unwrap();
    assert_eq!(rig.heard(), ["offer 2.0"]);
    assert_eq!(rig.root.offer(spec(2)), Err(OfferError::InstanceInUse(spec(2).instance)));
}

#[test]
fn withdrawn_device_is_gone_when_guest_and_device_let_go() {
    let (mut rig, device) = Rig::opened(Version::V5_3);
    rig.root.offer_subchannels(device, 1).unwrap();
    rig.heard();
    rig.root.withdraw(device);
    assert_eq!(rig.heard(), ["rescind 2", "rescind 1", "CLOSE 0"]);
    assert_eq!(rig.root.offer(spec(1)), Err(OfferError::InstanceInUse(spec(1).instance)));
    rig.say(&released(2)).unwrap();
    rig.say(&close(1)).unwrap();
    rig.say(&released(1)).unwrap();
    assert!(rig.heard().is_empty(), "the device still uses the rings");
    rig.root.closed(key(device, 0));
    assert_eq!(rig.heard(), ["TEARDOWN 0x10"]);
    rig.root.gpadl_released(device, GpadlId(0x10));
    assert_eq!(rig.heard(), ["GONE"]);
    rig.root.offer(spec(1)).unwrap();
    assert_eq!(rig.heard(), ["offer 3.0"]);
}

#[test]
fn device_withdrawn_before_any_guest_knew_it_is_gone_at_once() {
    let mut rig = Rig::new(Version::V5_3);
    let device = rig.root.offer(spec(1)).unwrap();
    rig.root.withdraw(device);
    rig.root.withdraw(device);
    assert_eq!(rig.heard(), ["GONE"]);
}

#[test]
fn withdraw_while_the_device_is_opening_answers_nobody_and_closes() {
    let (mut rig, device) = Rig::offered(Version::V5_3);
    rig.share(device, 1, 0x10);
    rig.say(&open(1, 0x10)).unwrap();
    rig.root.withdraw(device);
    assert_eq!(rig.heard(), ["OPEN 0 0x10", "rescind 1"]);
    rig.root.opened(key(device, 0), true);
    assert_eq!(rig.heard(), ["CLOSE 0"]);
}

#[test]
fn unload_is_answered_when_the_devices_have_let_go_and_contact_may_follow() {
    let (mut rig, _) = Rig::opened(Version::V5_3);
    rig.say(&encode(&Unload {})).unwrap();
    assert_eq!(rig.heard(), ["RESET"]);
    rig.root.unloaded();
    assert_eq!(rig.heard(), ["unloaded"]);
    rig.say(&contact(Version::V5_3.to_wire(), 0)).unwrap();
    rig.say(&encode(&RequestOffers {})).unwrap();
    assert_eq!(rig.heard(), ["version ok", "offer 1.0", "offers end"]);
}

#[test]
fn contact_of_a_crash_kernel_drops_all_before_it_is_answered() {
    let (mut rig, device) = Rig::opened(Version::V5_3);
    rig.root.offer_subchannels(device, 2).unwrap();
    rig.say(&gpadl(1, 0x30, 8, 4)).unwrap();
    rig.heard();
    rig.say(&contact(Version::V5_3.to_wire(), 2)).unwrap();
    assert_eq!(rig.heard(), ["RESET"]);
    rig.root.opened(key(device, 0), true);
    rig.root.closed(key(device, 0));
    assert!(rig.heard().is_empty());
    rig.root.unloaded();
    let description = rig.root.describe();
    assert_eq!((description.gpadls, description.gpadl_pages, description.relids), (0, 0, 1));
    rig.say(&encode(&RequestOffers {})).unwrap();
    assert_eq!(rig.heard(), ["version ok", "offer 1.0", "offers end"]);
    rig.share(device, 1, 0x10);
}

#[test]
fn reset_without_a_word_leaves_the_root_ready_for_the_next_guest() {
    let (mut rig, _) = Rig::opened(Version::V5_3);
    rig.root.reset();
    rig.root.reset();
    assert_eq!(rig.heard(), ["RESET"]);
    // The new guest may be faster than the devices.
    rig.say(&contact(Version::V5_3.to_wire(), 0)).unwrap();
    assert!(rig.heard().is_empty());
    rig.root.unloaded();
    assert_eq!(rig.heard(), ["version ok"]);
}

#[test]
fn replay_tells_what_is_open_and_lost_devices_owe_nothing() {
    let (mut rig, device) = Rig::opened(Version::V5_3);
    rig.root.offer_subchannels(device, 2).unwrap();
    rig.share(device, 2, 0x20);
    rig.say(&open(2, 0x20)).unwrap();
    rig.share(device, 1, 0x30);
    rig.say(&teardown(1, 0x30)).unwrap();
    rig.say(&gpadl(1, 0x40, 8, 8)).unwrap();
    rig.say(&modify(1, 3)).unwrap();
    rig.heard();
    rig.root.device_side_lost(device);
    assert_eq!(rig.heard(), ["modified 1 ok", "torndown 0x30"]);
    let told: Vec<String> = rig.root.replay(|_| true).map(|item| told(&item)).collect();
    let expected = [
        "device",
        "gpadl 0x10 8 true",
        "gpadl 0x20 8 true",
        "gpadl 0x40 8 false",
        "open 0 relid 1 vp 3 true",
        "open 1 relid 2 vp 1 false",
    ];
    assert_eq!(told, expected);
    assert_eq!(rig.root.replay(|other| other != device).count(), 0);
    assert_eq!(rig.root.open_channels().count(), 2);
    rig.root.gpadl_accepted(device, GpadlId(0x40), true);
    rig.root.opened(key(device, 1), true);
    assert_eq!(rig.heard(), ["created 0x40 ok", "opened 2 ok"]);
}

#[test]
fn device_side_lost_while_closing_and_reopening_is_replayed_as_an_opening() {
    let (mut rig, device) = Rig::opened(Version::V5_3);
    rig.say(&close(1)).unwrap();
    rig.say(&open(1, 0x10)).unwrap();
    rig.root.device_side_lost(device);
    assert!(rig.heard().is_empty());
    let told: Vec<String> = rig.root.replay(|_| true).map(|item| told(&item)).collect();
    assert_eq!(told, ["device", "gpadl 0x10 8 true", "open 0 relid 1 vp 1 false"]);
}

fn told(item: &Item<'_>) -> String {
    match item {
        Item::Device { .. } => "device".into(),
        Item::Gpadl { gpadl, pfns, established, .. } => {
            format!("gpadl {:#x} {} {established}", gpadl.0, pfns.len())
        }
        Item::Open { channel, relid, vp, resumed, .. } => {
            format!("open {} relid {relid} vp {vp} {resumed}", channel.index)
        }
    }
}
