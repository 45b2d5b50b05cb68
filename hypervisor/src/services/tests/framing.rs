use super::super::framing::{Event, HEADERS, Kind, Link, STATUS_FAIL, Version};
use super::*;

const VERSIONS: [Version; 2] = [Version::new(1, 0), Version::new(3, 0)];

fn opened() -> (Link, Packet) {
    let (mut link, mut out) = (Link::new(Kind::Heartbeat, &VERSIONS), Outbox::default());
    link.opened();
    link.negotiate(&mut out, at(0));
    (link, only(&mut out))
}

fn ready() -> Link {
    let (mut link, mut request) = opened();
    linux(&mut request.payload, &[(3, 0)], &[(3, 0)], |_| 0);
    assert!(matches!(link.receive(&request.payload, request.transaction), Ok(Event::Negotiated(_))));
    link
}

fn asked() -> (Link, Packet) {
    let (mut link, mut out) = (ready(), Outbox::default());
    assert!(link.ask(&[7; 12], &mut out, at(1)));
    (link, only(&mut out))
}

#[test]
fn negotiation_has_the_bytes_of_the_fact_sheet() {
    let (_, packet) = opened();
    let golden = [
        &[1, 0, 0, 0, 44, 0, 0, 0][..], // pipe: data, 20 + 24
        &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 24, 0, 0, 0, 0, 0, 1, 3, 0, 0], // negotiate, no versions yet
        &[2, 0, 2, 0, 0, 0, 0, 0],      // two and two
        &[1, 0, 0, 0, 3, 0, 0, 0, 1, 0, 0, 0, 3, 0, 0, 0], // 1.0 3.0, 1.0 3.0
    ];
    assert_eq!(packet, Packet { transaction: 1, payload: golden.concat() });
}

#[test]
fn request_has_the_agreed_versions_and_the_next_transaction() {
    let (_, packet) = asked();
    let golden = [
        &[1, 0, 0, 0, 32, 0, 0, 0][..],
        &[3, 0, 0, 0, 1, 0, 3, 0, 0, 0, 12, 0, 0, 0, 0, 0, 2, 3, 0, 0],
        &[7; 12],
    ];
    assert_eq!(packet, Packet { transaction: 2, payload: golden.concat() });
}

#[test]
fn only_one_request_is_outstanding() {
    let (mut link, packet) = asked();
    let mut out = Outbox::default();
    assert!(!link.ask(&[], &mut out, at(2)) && out.is_empty());
    link.negotiate(&mut out, at(2));
    assert!(out.is_empty());
    let mut answer = packet.payload;
    linux(&mut answer, &[], &[], |_| STATUS_FAIL);
    let reply = link.receive(&answer, packet.transaction).unwrap();
    assert!(matches!(reply, Event::Reply { status: STATUS_FAIL, body } if body == [7; 12]));
    assert!(link.ask(&[], &mut out, at(2)));
}

#[test]
fn reopened_channel_negotiates_again_and_forgets_what_was_asked() {
    let (mut link, packet) = asked();
    link.closed();
    assert_eq!(link.contact(), Contact::Closed);
    assert_eq!(link.receive(&packet.payload, packet.transaction).err(), Some(Mistake::Unasked));
    link.opened();
    let mut out = Outbox::default();
    link.negotiate(&mut out, at(9));
    let again = only(&mut out);
    assert_eq!(u16_at(&again.payload, 12), 0);
    assert_ne!(again.transaction, packet.transaction);
    let stale = link.receive(&packet.payload, packet.transaction).err();
    assert!(stale.is_some(), "an answer to the old channel is not taken");
}

#[test]
fn no_common_version_is_no_mistake_and_ends_the_talk() {
    let (mut link, mut request) = opened();
    linux(&mut request.payload, &[(9, 9)], &[(3, 0)], |_| 0);
    assert!(matches!(link.receive(&request.payload, 1), Ok(Event::Incompatible)));
    assert_eq!(link.contact(), Contact::Incompatible);
    assert!(!link.ask(&[], &mut Outbox::default(), at(0)));
}

#[test]
fn hostile_answers_are_refused_by_what_is_wrong_with_them() {
    let differs =
        |field| move |mistake: &Mistake| matches!(mistake, Mistake::Differs { field: f, .. } if *f == field);
    let short = |mistake: &Mistake| matches!(mistake, Mistake::Short { .. });
    type Spoil = fn(&mut Vec<u8>, &mut u64);
    type Right = Box<dyn Fn(&Mistake) -> bool>;
    let cases: [(Spoil, Right); 11] = [
        (|bytes, _| bytes.clear(), Box::new(short)),
        (|bytes, _| bytes.truncate(7), Box::new(short)),
        (|bytes, _| bytes.truncate(27), Box::new(short)),
        (|bytes, _| bytes.truncate(HEADERS + 11), Box::new(short)),
        (|_, transaction| *transaction += 1, Box::new(differs("ring transaction"))),
        (|bytes, _| bytes[0] = 2, Box::new(differs("pipe packet type"))),
        (|bytes, _| bytes[4] = 33, Box::new(differs("length"))),
        (|bytes, _| bytes[7] = 0xff, Box::new(differs("length"))),
        (|bytes, _| bytes[12] = 0, Box::new(differs("message type"))),
        (|bytes, _| bytes[24] ^= 1, Box::new(differs("transaction"))),
        (|bytes, _| bytes[25] = 3, Box::new(differs("response flag"))),
    ];
    for (index, (spoil, right)) in cases.into_iter().enumerate() {
        let (mut link, mut packet) = asked();
        linux(&mut packet.payload, &[], &[], |_| 0);
        spoil(&mut packet.payload, &mut packet.transaction);
        let mistake = link.receive(&packet.payload, packet.transaction).unwrap_err();
        assert!(right(&mistake), "case {index}: {mistake}");
    }
}

#[test]
fn hostile_choices_of_versions_are_refused() {
    for (counts, chosen, right) in [
        ((1u8, 1u8), [9u8, 3], "were not offered"),
        ((1, 1), [3, 9], "were not offered"),
        ((2, 2), [3, 3], "not one each"),
        ((1, 255), [3, 3], "not one each"),
    ] {
        let (mut link, mut packet) = opened();
        linux(&mut packet.payload, &[(3, 0)], &[(3, 0)], |_| 0);
        (packet.payload[28], packet.payload[30]) = counts;
        (packet.payload[36], packet.payload[40]) = chosen.into();
        let mistake = link.receive(&packet.payload, 1).unwrap_err();
        assert!(mistake.to_string().contains(right), "{mistake}");
    }
}

#[test]
fn answer_in_each_state_is_taken_only_where_one_is_owed() {
    let answer = |packet: &Packet| {
        let mut bytes = packet.payload.clone();
        linux(&mut bytes, &[(3, 0)], &[(3, 0)], |_| 0);
        bytes
    };
    let (negotiating, negotiation) = opened();
    let (asking, request) = asked();
    let mut open = Link::new(Kind::Heartbeat, &VERSIONS);
    open.opened();
    let closed = Link::new(Kind::Heartbeat, &VERSIONS);
    // Links that wait for: nothing, nothing, the negotiation, nothing, the request.
    for (mut link, takes) in
        [(closed, None), (open, None), (negotiating, Some(1)), (ready(), None), (asking, Some(2))]
    {
        for packet in [&request, &negotiation] {
            let taken = link.receive(&answer(packet), packet.transaction).is_ok();
            assert_eq!(taken, takes == Some(packet.transaction), "{link:?}");
        }
    }
}

proptest::proptest! {
    #[test]
    fn any_bytes_are_survived(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200), transaction in 0..4u64) {
        for mut link in [opened().0, ready(), asked().0] {
            let _ = link.receive(&bytes, transaction);
        }
    }
}
