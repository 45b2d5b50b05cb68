//! Abuse by a guest, after known faults of hosts: GPADLs that are incomplete or malformed, processors used as an index, a
//! reset while opening, requests without end.

use super::*;

fn header(change: impl FnOnce(&mut GpadlHeader)) -> GpadlHeader {
    let mut header = GpadlHeader {
        relid: 1.into(),
        gpadl: 0x20.into(),
        range_bytes: 72.into(),
        range_count: 1.into(),
        byte_count: (8 * PAGE).into(),
        byte_offset: 0.into(),
    };
    change(&mut header);
    header
}

#[test]
fn gpadl_ranges_that_disagree_with_themselves_are_refused() {
    let (mut rig, _) = Rig::offered(Version::V5_3);
    for (what, header) in [
        ("no range", header(|h| h.range_count = 0.into())),
        ("two ranges", header(|h| h.range_count = 2.into())),
        ("range count of all ones", header(|h| h.range_count = u16::MAX.into())),
        ("no bytes", header(|h| h.byte_count = 0.into())),
        ("more bytes than pages", header(|h| h.byte_count = (8 * PAGE + 1).into())),
        ("fewer bytes than pages", header(|h| h.byte_count = (7 * PAGE).into())),
        ("offset of a page", header(|h| h.byte_offset = PAGE.into())),
        ("offset of all ones", header(|h| h.byte_offset = u32::MAX.into())),
        ("offset that needs a ninth page", header(|h| h.byte_offset = 1.into())),
        ("sum that wraps", header(|h| (h.byte_count, h.byte_offset) = (u32::MAX.into(), 4095.into()))),
        ("range bytes of zero", header(|h| h.range_bytes = 0.into())),
        ("range bytes that are odd", header(|h| h.range_bytes = 71.into())),
        ("range bytes of all ones", header(|h| h.range_bytes = u16::MAX.into())),
        ("channel 0", header(|h| h.relid = 0.into())),
        ("channel that is not offered", header(|h| h.relid = 2047.into())),
        ("channel of all ones", header(|h| h.relid = u32::MAX.into())),
    ] {
        rig.say(&encode_with(&header, &pfns(8))).unwrap();
        assert_eq!(rig.heard(), ["created 0x20 no"], "{what}");
    }
    assert_eq!(rig.root.describe().gpadls, 0);
}

#[test]
fn gpadl_page_numbers_that_are_too_many_torn_or_beyond_any_address_are_refused() {
    let (mut rig, _) = Rig::offered(Version::V5_3);
    let mut torn = pfns(7);
    torn.push(0);
    let mut beyond = pfns(7);
    beyond.extend((1u64 << 52).to_le_bytes());
    for (what, pfns) in [("too many", pfns(9)), ("torn", torn), ("beyond", beyond)] {
        rig.say(&encode_with(&header(|_| {}), &pfns)).unwrap();
        assert_eq!(rig.heard(), ["created 0x20 no"], "{what} in the header");
        rig.say(&encode_with(&header(|_| {}), &[])).unwrap();
        rig.say(&encode_with(&GpadlBody { number: 0.into(), gpadl: 0x20.into() }, &pfns)).unwrap();
        assert_eq!(rig.heard(), ["created 0x20 no"], "{what} in a body");
    }
    assert_eq!(rig.root.describe().gpadl_pages, 0);
}

#[test]
fn gpadl_body_without_page_numbers_ends_the_gpadl() {
    let (mut rig, _) = Rig::offered(Version::V5_3);
    rig.say(&gpadl(1, 0x20, 8, 4)).unwrap();
    rig.say(&body(0x20, 0)).unwrap();
    assert_eq!(rig.heard(), ["created 0x20 no"]);
    assert_eq!(rig.say(&body(0x20, 4)), Err(GuestError::UnknownGpadl { kind: Kind::GpadlBody, gpadl: 0x20 }));
}

#[test]
fn gpadls_in_progress_at_once_are_told_apart_by_handle() {
    let (mut rig, _) = Rig::offered(Version::V5_3);
    rig.say(&gpadl(1, 0x20, 60, 26)).unwrap();
    rig.say(&gpadl(1, 0x21, 50, 26)).unwrap();
    rig.say(&body(0x20, 28)).unwrap();
    rig.say(&body(0x21, 24)).unwrap();
    rig.say(&body(0x20, 6)).unwrap();
    assert_eq!(rig.heard(), ["GPADL 0x21 50", "GPADL 0x20 60"]);
}

#[test]
fn gpadl_of_8190_pages_is_the_longest() {
    let (mut rig, _) = Rig::offered(Version::V5_3);
    rig.say(&gpadl(1, 0x20, 8190, 26)).unwrap();
    let mut left = 8190 - 26;
    while left > 0 {
        let here = left.min(28);
        rig.say(&body(0x20, here)).unwrap();
        left -= here;
    }
    assert_eq!(rig.heard(), ["GPADL 0x20 8190"]);
    let longer = header(|h| (h.byte_count, h.range_bytes) = ((8191 * PAGE).into(), u16::MAX.into()));
    rig.say(&encode_with(&longer, &pfns(26))).unwrap();
    assert_eq!(rig.heard(), ["created 0x20 no"]);
}

#[test]
fn duplicate_handle_is_refused_and_the_first_lives_on() {
    let (mut rig, device) = Rig::offered(Version::V5_3);
    rig.root.offer(spec(2)).unwrap();
    rig.say(&gpadl(1, 0x20, 8, 4)).unwrap();
    rig.say(&gpadl(2, 0x20, 8, 4)).unwrap();
    rig.say(&body(0x20, 4)).unwrap();
    rig.root.gpadl_accepted(device, GpadlId(0x20), true);
    assert_eq!(rig.heard(), ["offer 2.0", "created 0x20 no", "GPADL 0x20 8", "created 0x20 ok"]);
}

#[test]
fn gpadls_and_pages_are_limited_and_given_back() {
    let (mut rig, device) = Rig::offered(Version::V5_3);
    rig.root.config.max_gpadls = 2;
    rig.root.config.max_gpadl_pages = 20;
    rig.share(device, 1, 0x20);
    rig.say(&gpadl(1, 0x21, 13, 13)).unwrap();
    assert_eq!(rig.heard(), ["created 0x21 no"], "one page too many");
    rig.share(device, 1, 0x21);
    rig.say(&gpadl(1, 0x22, 1, 1)).unwrap();
    assert_eq!(rig.heard(), ["created 0x22 no"], "one gpadl too many");
    rig.say(&teardown(1, 0x21)).unwrap();
    rig.root.gpadl_released(device, GpadlId(0x21));
    rig.say(&gpadl(1, 0x22, 12, 12)).unwrap();
    assert_eq!(rig.heard(), ["TEARDOWN 0x21", "torndown 0x21", "GPADL 0x22 12"]);
}

#[test]
fn rings_that_do_not_fit_are_refused() {
    let (mut rig, device) = Rig::offered(Version::V5_3);
    rig.root.offer(spec(2)).unwrap();
    rig.share(device, 1, 0x10);
    rig.share(DeviceId(2), 2, 0x20);
    rig.say(&encode_with(
        &header(|h| (h.gpadl, h.byte_count) = (0x30.into(), (8 * PAGE - 8).into())),
        &pfns(8),
    ))
    .unwrap();
    rig.root.gpadl_accepted(device, GpadlId(0x30), true);
    rig.say(&gpadl(1, 0x40, 8, 8)).unwrap();
    rig.heard();
    for (what, gpadl, split, vp) in [
        ("no ring to the host", 0x10, 0, 0),
        ("control page alone", 0x10, 1, 0),
        ("control page alone on the other side", 0x10, 7, 0),
        ("no ring to the guest", 0x10, 8, 0),
        ("split beyond the end", 0x10, u32::MAX, 0),
        ("another channel's pages", 0x20, 4, 0),
        ("pages in part", 0x30, 4, 0),
        ("pages not accepted yet", 0x40, 4, 0),
        ("pages never shared", 0x50, 4, 0),
        ("processor that does not exist", 0x10, 4, 4),
        ("no interrupts", 0x10, 4, NO_INTERRUPTS),
    ] {
        rig.say(&open_at(1, gpadl, split, vp)).unwrap();
        assert_eq!(rig.heard(), ["opened 1 no"], "{what}");
    }
    rig.say(&open_at(1, 0x10, 6, 3)).unwrap();
    assert_eq!(rig.heard(), ["OPEN 0 0x10"]);
}

#[test]
fn ring_torn_down_while_open_stays_until_the_channel_is_closed() {
    let (mut rig, device) = Rig::opened(Version::V5_3);
    rig.say(&teardown(1, 0x10)).unwrap();
    assert!(rig.heard().is_empty());
    assert!(rig.say(&teardown(1, 0x10)).is_err());
    rig.say(&close(1)).unwrap();
    rig.say(&open(1, 0x10)).unwrap();
    rig.root.closed(key(device, 0));
    assert_eq!(rig.heard(), ["CLOSE 0", "opened 1 no", "TEARDOWN 0x10"]);
}

#[test]
fn processors_that_do_not_exist_are_not_answered_on() {
    let mut rig = Rig::new(Version::V5_3);
    for vp in [4, 64, NO_INTERRUPTS] {
        assert_eq!(rig.say(&contact(Version::V5_3.to_wire(), vp)), Err(GuestError::NoProcessor(vp)));
    }
    assert!(rig.heard().is_empty());
    let (mut rig, _) = Rig::opened(Version::V5_2);
    assert_eq!(rig.say(&modify(1, 4)), Err(GuestError::NoProcessor(4)));
    let (mut rig, _) = Rig::opened(Version::V5_3);
    for vp in [4, NO_INTERRUPTS] {
        rig.say(&modify(1, vp)).unwrap();
        assert_eq!(rig.heard(), ["modified 1 no"]);
    }
}

#[test]
fn reset_while_a_device_is_opening_does_not_wait_for_it() {
    let (mut rig, device) = Rig::offered(Version::V5_3);
    rig.share(device, 1, 0x10);
    rig.say(&open(1, 0x10)).unwrap();
    rig.root.reset();
    assert_eq!(rig.heard(), ["RESET"], "the opening that no device heard of is taken back");
    rig.root.unloaded();
    rig.say(&contact(Version::V5_3.to_wire(), 0)).unwrap();
    rig.root.opened(key(device, 0), true);
    assert_eq!(rig.heard(), ["version ok"]);
    assert_eq!(rig.root.open_channels().count(), 0);
}

#[test]
fn guest_that_asks_and_never_reads_is_put_off_but_may_unload() {
    let (mut rig, _) = Rig::offered(Version::V5_3);
    rig.root.config.max_actions = 100;
    let taken = (0..100_000).filter(|_| rig.say(&open(1, 0x99)).is_ok()).count();
    assert_eq!(taken, 100);
    assert_eq!(rig.say(&close(1)), Err(GuestError::Busy));
    assert_eq!(rig.root.actions.len(), 100);
    rig.say(&encode(&Unload {})).unwrap();
    rig.root.unloaded();
    assert_eq!(rig.heard(), ["RESET", "unloaded"]);
}

#[test]
fn contact_and_unload_repeated_without_end_keep_one_reset() {
    let (mut rig, _) = Rig::opened(Version::V5_3);
    for _ in 0..10_000 {
        rig.say(&contact(Version::V5_3.to_wire(), 0)).unwrap();
        rig.say(&encode(&Unload {})).unwrap();
    }
    assert_eq!(rig.root.actions.len(), 1);
    rig.root.unloaded();
    assert_eq!(rig.heard(), ["RESET", "unloaded"]);
}

#[test]
fn guest_that_never_releases_runs_out_of_ids_and_harms_only_itself() {
    let (mut rig, device) = Rig::opened(Version::V5_3);
    for _ in 0..1000 {
        let granted = rig.root.offer_subchannels(device, 4).unwrap();
        rig.say(&close(1)).unwrap();
        rig.root.closed(key(device, 0));
        rig.say(&open(1, 0x10)).unwrap();
        rig.root.opened(key(device, 0), true);
        rig.heard();
        assert!(granted == 4 || rig.root.describe().relids == MAX_RELID as usize);
    }
    assert_eq!(rig.root.offer_subchannels(device, 4), Ok(0));
    assert_eq!(rig.root.offer(spec(2)), Err(OfferError::NoRelid));
    rig.say(&released(2)).unwrap();
    assert!(rig.root.offer(spec(2)).is_ok());
}

#[test]
fn answers_nobody_asked_for_change_nothing() {
    let (mut rig, device) = Rig::opened(Version::V5_3);
    let before = rig.root.describe();
    for index in [0, 1, u16::MAX] {
        rig.root.opened(key(device, index), false);
        rig.root.closed(key(device, index));
        rig.root.modified(key(device, index));
    }
    rig.root.gpadl_accepted(device, GpadlId(0x10), false);
    rig.root.gpadl_released(device, GpadlId(0x10));
    rig.root.gpadl_released(DeviceId(77), GpadlId(0x10));
    rig.root.unloaded();
    assert!(rig.heard().is_empty());
    assert_eq!(rig.root.describe(), before);
}

#[test]
fn messages_on_other_connection_ids_or_of_later_versions_are_mistakes() {
    let (mut rig, _) = Rig::opened(Version::V4_0);
    for id in [0, 2, 3, 5, 0x2001, u32::MAX] {
        assert_eq!(rig.root.message(id, &close(1)), Err(GuestError::WrongConnection(id)));
    }
    let late = GuestError::NotInVersion { kind: Kind::ModifyChannel, version: Version::V4_0 };
    assert_eq!(rig.say(&modify(1, 2)), Err(late));
    let description = rig.root.describe();
    assert_eq!(description.errors, 7);
    assert_eq!(description.last_error.as_deref(), Some("ModifyChannel in protocol 4.0"));
}

#[test]
fn every_prefix_and_every_flipped_bit_of_every_message_is_survived() {
    let all = [
        contact(Version::V5_3.to_wire(), 0),
        gpadl(1, 0x20, 8, 8),
        body(0x20, 4),
        teardown(1, 0x10),
        open(1, 0x10),
        close(1),
        modify(1, 2),
        released(1),
    ];
    for message in all {
        for len in 0..message.len() {
            let (mut rig, _) = Rig::opened(Version::V5_3);
            let _ = rig.say(&message[..len]);
        }
        for bit in 0..message.len() * 8 {
            let (mut rig, _) = Rig::opened(Version::V5_3);
            let mut flipped = message.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            let _ = rig.say(&flipped);
            let description = rig.root.describe();
            assert!(description.gpadls <= 2 && description.relids == 1);
        }
    }
}

#[test]
fn reopening_that_waits_when_its_subchannel_is_rescinded_never_reaches_the_next_of_that_index() {
    let (mut rig, device) = Rig::opened(Version::V5_3);
    rig.root.offer_subchannels(device, 1).unwrap();
    rig.share(device, 2, 0x20);
    rig.say(&open(2, 0x20)).unwrap();
    rig.root.opened(key(device, 1), true);
    rig.say(&close(2)).unwrap();
    rig.say(&open(2, 0x20)).unwrap();
    rig.say(&close(1)).unwrap();
    rig.root.closed(key(device, 0));
    rig.say(&open(1, 0x10)).unwrap();
    rig.root.opened(key(device, 0), true);
    rig.root.offer_subchannels(device, 1).unwrap();
    rig.heard();
    rig.root.closed(key(device, 1));
    assert_eq!(rig.heard(), ["offer 3.1"]);
}

/// Numbers are compared whole: one that becomes another when it is cut to 16 bits names nothing.
#[test]
fn numbers_whose_lower_half_is_right_name_nothing() {
    let (mut rig, device) = Rig::offered(Version::V5_3);
    rig.share(device, 1, 0x10);
    for high in [0x1_0000, 0x8000_0000, 0xFFFF_0000] {
        rig.say(&open_at(1 | high, 0x10, 4, 0)).unwrap();
        rig.say(&open_at(1, 0x10 | high, 4, 0)).unwrap();
        rig.say(&open_at(1, 0x10, 4 | high, 0)).unwrap();
        rig.say(&open_at(1, 0x10, 4, high)).unwrap();
        assert_eq!(
            rig.heard(),
            [&format!("opened {} no", 1 | high), "opened 1 no", "opened 1 no", "opened 1 no"]
        );
        for wrong in [close(1 | high), released(1 | high), teardown(1 | high, 0x10), teardown(1, 0x10 | high)]
        {
            assert!(rig.say(&wrong).is_err());
        }
        assert_eq!(
            rig.say(&contact(Version::V5_3.to_wire(), high)),
            Err(GuestError::NoProcessor(high)),
            "contact"
        );
    }
    assert!(rig.heard().is_empty());
}

#[test]
fn ten_thousand_openings_and_gpadls_leave_nothing_behind() {
    let (mut rig, device) = Rig::opened(Version::V5_3);
    let before = rig.root.describe();
    for round in 0..10_000u32 {
        rig.say(&close(1)).unwrap();
        rig.root.closed(key(device, 0));
        let handle = 0x1000 + round;
        rig.say(&gpadl(1, handle, 8, 8)).unwrap();
        rig.root.gpadl_accepted(device, GpadlId(handle), round % 2 == 0);
        if round % 2 == 0 {
            rig.say(&teardown(1, handle)).unwrap();
            rig.root.gpadl_released(device, GpadlId(handle));
        }
        rig.say(&open(1, 0x10)).unwrap();
        rig.root.opened(key(device, 0), true);
        rig.heard();
    }
    assert_eq!(Description { refusals: 0, ..rig.root.describe() }, before);
}
