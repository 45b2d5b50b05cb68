//! Which queue a frame goes to.

use std::collections::BTreeSet;

use vmq::Mac;
use vmq::frame::{FrameStore, Offload};

use super::*;
use crate::spec::{Attachment, RssSpec, VmqSpec};

const LISTED: Mac = Mac([2, 0, 0, 0, 0, 1]);
const UNLISTED: Mac = Mac([2, 0, 0, 0, 0, 2]);
const BROADCAST: Mac = Mac::BROADCAST;

/// A port of 8 queues, some of them for `LISTED` in VLAN 5.
fn spec(filter: &[u16], table: Option<&[u16]>) -> PortSpec {
    let vmq = VmqSpec { mac: LISTED, vlan: 5, queues: filter.to_vec() };
    let attachment = Attachment::Uplink { device: "wire".into(), queues: 8 };
    PortSpec {
        vmq: Some(vmq).filter(|vmq| !vmq.queues.is_empty()).into_iter().collect(),
        rss: RssSpec { key: None, table: table.map(Into::into) },
        ..PortSpec::new("port", attachment)
    }
}

fn steering(spec: &PortSpec, enabled: &[u16]) -> Steering {
    Steering::new(spec, &Steering::key(spec).unwrap(), None, enabled).unwrap()
}

/// A TCP segment from `port`.
fn segment(to: Mac, port: u16) -> Vec<u8> {
    let mut frame = [to.0, [2, 0, 0, 0, 0, 9]].concat();
    frame.extend([8, 0, 0x45, 0, 0, 40, 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    frame.extend(port.to_be_bytes());
    frame.extend([0, 80, 0, 0, 1, 0, 0, 0, 2, 0, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
    frame
}

/// The queue of a frame in VLAN 5.
fn queue(steering: &Steering, bytes: &[u8]) -> u16 {
    let mut store = FrameStore::default();
    let mut burst = Burst::new(&mut store);
    assert!(burst.push(bytes.into(), Offload::NONE));
    burst.frames_mut()[0].vlan = 5;
    let queue = steering.pick(&burst.frames()[0]);
    let mut lists = Vec::new();
    steering.spread(&burst, &[0], &mut lists, 8);
    let listed: Vec<_> = (0..).zip(&lists).filter(|(_, list)| !list.is_empty()).map(|(at, _)| at).collect();
    assert_eq!(listed, [queue]);
    queue
}

/// The queues of many flows; each flow keeps its own.
fn queues(steering: &Steering, to: Mac) -> BTreeSet<u16> {
    let flow = |port| {
        let mut frame = segment(to, port);
        let first = queue(steering, &frame);
        frame.resize(1000, 7);
        assert_eq!(queue(steering, &frame), first);
        first
    };
    (1..200).map(flow).collect()
}

const ALL: [u16; 8] = [0, 1, 2, 3, 4, 5, 6, 7];

#[test]
fn flows_are_spread_as_the_table_says_and_by_default_over_all_queues() {
    assert_eq!(queues(&steering(&spec(&[], None), &ALL), UNLISTED), ALL.into());
    let asked = steering(&spec(&[], Some(&[6, 1, 6, 6])), &ALL);
    assert_eq!(queues(&asked, UNLISTED), [1, 6].into());
    let key = ToeplitzKey::default();
    for port in 1..200 {
        let hash = key.hash_v4_ports([10, 0, 0, 1], [10, 0, 0, 2], port, 80);
        assert_eq!(queue(&asked, &segment(UNLISTED, port)), if hash % 4 == 1 { 1 } else { 6 });
    }
}

#[test]
fn filtered_address_has_its_queues_and_all_others_have_the_table() {
    let asked = steering(&spec(&[2, 3], Some(&[0, 1, 2, 4])), &ALL);
    assert_eq!(queues(&asked, LISTED), [2, 3].into());
    assert_eq!(queues(&asked, UNLISTED), [0, 1, 2, 4].into());
    assert_eq!(queues(&asked, BROADCAST), [0, 1, 2, 4].into());
}

#[test]
fn queues_of_a_filter_are_spared_unless_the_table_names_them_or_there_are_no_others() {
    let asked = steering(&spec(&[0, 3], None), &ALL);
    assert_eq!(queues(&asked, LISTED), [0, 3].into());
    assert_eq!(queues(&asked, UNLISTED), [1, 2, 4, 5, 6, 7].into());
    // Nor do frames without a flow go there.
    let mut arp = segment(BROADCAST, 1);
    arp[12..14].copy_from_slice(&[8, 6]);
    assert_eq!(queue(&asked, &arp), 1);
    assert_eq!(queues(&steering(&spec(&ALL, None), &ALL), UNLISTED), ALL.into());
}

#[test]
fn queues_that_are_not_enabled_are_left_out_and_the_others_keep_their_numbers() {
    let asked = |filter: &[u16], table| steering(&spec(filter, table), &[1, 3, 5]);
    assert_eq!(queues(&asked(&[], None), UNLISTED), [1, 3, 5].into());
    assert_eq!(queues(&asked(&[], Some(&[3, 0])), UNLISTED), [1, 3].into());
    let some = asked(&[1, 2], None);
    assert_eq!(queues(&some, LISTED), [1].into());
    assert_eq!(queues(&some, UNLISTED), [3, 5].into());
    // A filter without any of its queues is none.
    assert_eq!(queues(&asked(&[2, 4], None), LISTED), [1, 3, 5].into());
}

#[test]
fn table_of_the_guest_is_taken_for_the_operators() {
    let spec = spec(&[2], Some(&[0, 1]));
    let table = IndirectionTable::new(&[4, 5], 8).unwrap();
    let guest = Rss { key: ToeplitzKey::default(), table, types: HashTypes::IPV4 };
    let asked = Steering::new(&spec, &ToeplitzKey::default(), Some(guest), &ALL).unwrap();
    assert_eq!(queues(&asked, LISTED), [2].into());
    // By addresses alone all this is one flow.
    assert_eq!(queues(&asked, UNLISTED).len(), 1);
    assert!(queues(&asked, UNLISTED).is_subset(&[4, 5].into()));
}

#[test]
fn queues_that_the_port_has_not_are_refused() {
    for wrong in [spec(&[8], None), spec(&[], Some(&[0, 8])), spec(&[], Some(&[0, 1, 2]))] {
        assert!(Steering::key(&wrong).is_err(), "{wrong:?}");
    }
    let long = RssSpec { key: Some(vec![1; 39]), table: None };
    assert!(Steering::key(&PortSpec { rss: long, ..spec(&[], None) }).is_err());
}
