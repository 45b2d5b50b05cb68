//! Abuse by guests, as far as the pipeline decides it; each test is a case of the project's list of abuses.

use vmq::frame::{Checksum, Gso, GsoKind};

use super::*;
use crate::fdb::Key;

const PASSTHROUGH: VlanMode = VlanMode::Passthrough;

// Frame shapes.

#[test]
fn frame_without_a_whole_ethernet_header_is_a_runt() {
    let mut rig = Rig::with_ports([port(PASSTHROUGH), port(PASSTHROUGH)]);
    for len in 0..14 {
        assert_eq!(rig.send(0, 0, vec![0; len]), dropped(DropReason::Runt), "{len} bytes");
        // Neither does what the frame before left in the buffer count.
        let both = [frame(station(2), station(1), &[], 60), vec![2; len]];
        assert_eq!(rig.burst(0, 0, &both), [to([1]), dropped(DropReason::Runt)]);
    }
    assert_eq!(rig.send(0, 0, frame(station(2), station(1), &[], 14)), to([1]));
}

#[test]
fn frame_that_ends_inside_its_tag_is_a_runt() {
    for mode in [PASSTHROUGH, VlanMode::Access(10), trunk(&[10], Some(1))] {
        let mut rig = Rig::with_ports([port(mode.clone()), port(mode)]);
        for len in 14..18 {
            let cut = frame(station(2), station(1), &[(0x8100, 20)], len);
            assert_eq!(rig.send(0, 0, cut), dropped(DropReason::Runt), "{len} bytes");
        }
    }
}

#[test]
fn frame_of_any_size_passes_up_to_the_mtu_and_is_counted_above() {
    for (mtu, longest) in [(68, 82), (1500, 1514), (9000, 9014), (9216, 9230)] {
        let mut rig = Rig::with_ports([Port { mtu, ..port(PASSTHROUGH) }, port(PASSTHROUGH)]);
        for len in [14, 60, 82, 83, 1514, 1515, 1518, 9014, 9018, 9019, 9230, 9234, 9235, 65_550, 65_557] {
            for (tags, extra) in [(&[][..], 0), (&[(0x8100, 5)][..], 4), (&[(0x88a8, 5), (0x8100, 6)][..], 0)]
            {
                if len < 18 && extra > 0 {
                    continue;
                }
                let expected = if len <= longest + extra { to([1]) } else { dropped(DropReason::IngressMtu) };
                let fate = rig.send(0, 0, frame(station(2), station(1), tags, len));
                assert_eq!(fate, expected, "{len} bytes with {} tags, MTU {mtu}", tags.len());
            }
        }
    }
}

#[test]
fn large_frame_to_be_segmented_may_exceed_the_mtu_and_one_that_contradicts_itself_is_dropped() {
    let mut rig = Rig::with_ports([port(PASSTHROUGH), port(PASSTHROUGH)]);
    let mut packet = frame(station(2), station(1), &[], 30_000);
    let ipv4 = [0x45, 0, 0x75, 0x22, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
    packet[12..14].copy_from_slice(&[8, 0]);
    packet[14..34].copy_from_slice(&ipv4);
    packet[34..54].fill(0);
    packet[46] = 0x50;
    let large = |size| Offload {
        checksum: Checksum::Partial { start: 34, offset: 16 },
        gso: Some(Gso { kind: GsoKind::Tcp4, size, ecn: false }),
    };
    assert_eq!(rig.burst_of(0, 0, &[packet.clone()], large(1448)), [to([1])]);
    let bad = [dropped(DropReason::BadOffload)];
    assert_eq!(rig.burst_of(0, 0, &[packet.clone()], large(0)), bad);
    assert_eq!(rig.burst_of(0, 0, &[packet.clone()], large(1)), bad);
    let beyond = Offload { checksum: Checksum::Partial { start: 34, offset: u16::MAX }, gso: None };
    assert_eq!(rig.burst_of(0, 0, &[packet[..64].to_vec()], beyond), bad);
}

// VLANs 0 and 4095, and hopping.

#[test]
fn tagged_frame_on_an_access_port_is_refused_even_with_the_ports_own_vlan() {
    let mut rig =
        Rig::with_ports([port(VlanMode::Access(10)), port(VlanMode::Access(10)), port(VlanMode::Access(20))]);
    for tag in [1, 10, 20, 4094, 4095] {
        let fate = rig.send(0, 0, frame(BROADCAST, station(1), &[(0x8100, tag)], 60));
        assert_eq!(fate, dropped(DropReason::VlanRefused), "VLAN {tag}");
    }
}

#[test]
fn priority_tag_counts_as_no_tag() {
    let mut rig = Rig::with_ports([
        port(VlanMode::Access(10)),
        port(VlanMode::Access(10)),
        port(trunk(&[20], Some(10))),
        port(trunk(&[20], None)),
        port(VlanMode::Access(20)),
    ]);
    let priority = |source| frame(BROADCAST, station(source), &[(0x8100, 0xe000)], 60);
    assert_eq!(rig.send(0, 0, priority(1)), to([1, 2]));
    assert_eq!(rig.send(2, 0, priority(2)), to([0, 1]));
    assert_eq!(rig.send(3, 0, priority(3)), dropped(DropReason::Untagged));
}

#[test]
fn vlan_4095_reaches_no_port_that_knows_vlans() {
    let mut rig = Rig::with_ports([
        port(PASSTHROUGH),
        port(VlanMode::Access(10)),
        port(trunk(&(1..=4094).collect::<Vec<_>>(), Some(1))),
        port(PASSTHROUGH),
    ]);
    let reserved = |source| frame(BROADCAST, station(source), &[(0x8100, 0x0fff)], 60);
    assert_eq!(rig.send(0, 0, reserved(1)), to([3]));
    assert_eq!(rig.send(1, 0, reserved(2)), dropped(DropReason::VlanRefused));
    assert_eq!(rig.send(2, 0, reserved(3)), dropped(DropReason::VlanRefused));
}

/// The outer tag is the trunk's native VLAN: an unwary switch takes it off, and the inner one does the rest.
#[test]
fn double_tagged_frame_does_not_hop_out_of_a_native_vlan() {
    let mut rig = Rig::with_ports([
        port(trunk(&[10], None)),
        port(trunk(&[20], Some(10))),
        port(VlanMode::Access(10)),
        port(VlanMode::Access(20)),
        port(trunk(&[10, 20], None)),
    ]);
    let hop = |source: u32| frame(BROADCAST, station(source), &[(0x8100, 10), (0x8100, 20)], 64);
    assert_eq!(rig.send(0, 0, hop(1)), to([4]), "only where the outer tag stays on");
    rig.teach(2, 0, station(7));
    let aimed = frame(station(7), station(1), &[(0x8100, 10), (0x8100, 20)], 64);
    assert_eq!(rig.send(0, 0, aimed), to([4]), "nor if the destination is known");
    // A service tag inside is payload to this switch and to those it serves.
    let service = frame(BROADCAST, station(1), &[(0x8100, 10), (0x88a8, 20)], 64);
    assert_eq!(rig.send(0, 0, service), to([1, 2, 4]));
}

#[test]
fn priority_tag_does_not_smuggle_a_second_tag_through_an_access_port() {
    let mut rig = Rig::with_ports([
        port(VlanMode::Access(10)),
        port(trunk(&[20], Some(10))),
        port(VlanMode::Access(10)),
    ]);
    let smuggled = frame(BROADCAST, station(1), &[(0x8100, 0), (0x8100, 20)], 64);
    assert_eq!(rig.send(0, 0, smuggled), dropped(DropReason::NoReceiver));
}

#[test]
fn triple_tagged_frame_is_classified_by_its_outer_tag() {
    let mut rig =
        Rig::with_ports([port(trunk(&[10, 20], None)), port(trunk(&[10], None)), port(trunk(&[20], None))]);
    let triple = frame(BROADCAST, station(1), &[(0x8100, 10), (0x8100, 20), (0x8100, 20)], 64);
    assert_eq!(rig.send(0, 0, triple), to([1]));
}

// Addresses: flood, theft, flapping.

#[test]
fn frame_with_another_guests_source_address_is_dropped_and_teaches_nothing() {
    let mut rig = Rig::with_ports([
        Port { source: Some(station(1)), ..port(PASSTHROUGH) },
        port(PASSTHROUGH),
        port(PASSTHROUGH),
    ]);
    rig.teach(1, 0, station(2));
    assert_eq!(rig.send(0, 0, frame(BROADCAST, station(2), &[], 60)), dropped(DropReason::Spoofed));
    assert_eq!(rig.send(2, 0, frame(station(2), station(3), &[], 60)), to([1]));
    assert_eq!(rig.send(0, 0, frame(station(2), station(1), &[], 60)), to([1]));
}

#[test]
fn pinned_address_cannot_be_stolen_by_a_port_that_may_spoof() {
    let mut rig = Rig::with_ports([port(PASSTHROUGH), port(PASSTHROUGH), port(PASSTHROUGH)]);
    rig.fdb.insert_static(Key::new(station(9), 0), 1).unwrap();
    assert_eq!(rig.send(0, 0, frame(BROADCAST, station(9), &[], 60)), to([1, 2]));
    assert_eq!(rig.send(2, 0, frame(station(9), station(3), &[], 60)), to([1]));
}

#[test]
fn group_source_is_dropped_and_teaches_nothing() {
    let mut rig = Rig::with_ports([port(PASSTHROUGH), port(PASSTHROUGH)]);
    for source in [BROADCAST, [1, 0, 0x5e, 0, 0, 1], [3, 0, 0, 0, 0, 1]] {
        assert_eq!(rig.send(0, 0, frame(station(2), source, &[], 60)), dropped(DropReason::SourceGroup));
    }
    assert_eq!(rig.fdb.stats().entries, 0);
}

#[test]
fn frame_to_its_own_source_is_not_sent_back() {
    let mut rig = Rig::with_ports([port(PASSTHROUGH), port(PASSTHROUGH)]);
    assert_eq!(rig.send(0, 0, frame(station(1), station(1), &[], 60)), dropped(DropReason::SamePort));
    assert_eq!(rig.send(0, 0, frame(station(1), station(4), &[], 60)), dropped(DropReason::SamePort));
}

#[test]
fn all_zero_source_is_forwarded_and_not_learnt() {
    let mut rig = Rig::with_ports([port(PASSTHROUGH), port(PASSTHROUGH), port(PASSTHROUGH)]);
    assert_eq!(rig.send(0, 0, frame(BROADCAST, [0; 6], &[], 60)), to([1, 2]));
    assert_eq!(rig.send(1, 0, frame([0; 6], station(1), &[], 60)), to([0, 2]));
}

#[test]
fn flood_of_source_addresses_stops_at_the_ports_limit_and_harms_nobody() {
    let mut rig = Rig::with_ports([port(PASSTHROUGH), port(PASSTHROUGH), port(PASSTHROUGH)]);
    rig.fdb.set_port_limit(0, Some(100));
    rig.teach(1, 0, station(1));
    rig.teach(2, 0, station(2));
    for first in (1000..101_000).step_by(50) {
        let flood: Vec<_> = (first..first + 50).map(|n| frame(station(1), station(n), &[], 60)).collect();
        assert!(
            rig.burst(0, 0, &flood).iter().all(|fate| *fate == to([1])),
            "not even the flood is hindered"
        );
    }
    assert_eq!(rig.fdb.learned_on(0), 100);
    assert_eq!(rig.send(1, 0, frame(station(2), station(1), &[], 60)), to([2]));
    assert_eq!(rig.send(2, 0, frame(station(1), station(2), &[], 60)), to([1]));
    // A station not yet known still gets in elsewhere.
    rig.teach(2, 0, station(3));
    assert_eq!(rig.send(1, 0, frame(station(3), station(1), &[], 60)), to([2]));
}

#[test]
fn full_table_floods_and_keeps_what_it_knows() {
    let mut rig = Rig::new(Config { capacity: 50, ..Config::default() });
    rig.set_ports(&(0..3).map(|index| (index, port(PASSTHROUGH))).collect());
    rig.teach(1, 0, station(1));
    for n in 1000..2000 {
        rig.teach(0, 0, station(n));
    }
    assert_eq!(rig.fdb.stats().entries, 50);
    assert_eq!(rig.send(2, 0, frame(station(1), station(2), &[], 60)), to([1]));
    assert_eq!(rig.send(1, 0, frame(station(1999), station(1), &[], 60)), to([0, 2]));
}

#[test]
fn address_that_two_ports_fight_over_stays_where_it_was_first() {
    let mut rig = Rig::with_ports([port(PASSTHROUGH), port(PASSTHROUGH), port(PASSTHROUGH)]);
    let flap = Flap::default();
    rig.teach(0, 0, station(1));
    for _ in 0..1000 {
        rig.teach(1, 0, station(1));
        rig.teach(0, 0, station(1));
    }
    let aimed = || frame(station(1), station(2), &[], 60);
    assert_eq!(rig.send(2, 0, aimed()), to([0]));
    assert_eq!(rig.fdb.stats().moved, u64::from(flap.moves));
    // Both are still heard, and after the hold an honest move counts again.
    assert_eq!(rig.send(1, 1, frame(station(2), station(1), &[], 60)), to([2]));
    rig.teach(1, flap.hold, station(1));
    assert_eq!(rig.send(2, flap.hold, aimed()), to([1]));
}

// Delivery and change.

#[test]
fn flooded_frame_is_planned_for_each_receiver_on_its_own() {
    let mut rig = Rig::with_ports((0..50).map(|_| port(PASSTHROUGH)));
    let frames: Vec<_> = (0..64).map(|n| frame(BROADCAST, station(n), &[], 60)).collect();
    let fates = rig.burst(0, 0, &frames);
    assert!(fates.iter().all(|fate| matches!(fate, Fate::Delivered(ports) if ports.len() == 49)));
    // So a receiver that takes nothing has its own list to lose, and no other list is shorter for it.
    assert!(rig.plan.deliveries().all(|(_, list)| list.len() == 64));
}

#[test]
fn frame_to_a_port_that_was_removed_is_flooded_until_its_address_is_forgotten() {
    let mut rig = Rig::with_ports((0..4).map(|_| port(PASSTHROUGH)));
    rig.teach(3, 0, station(3));
    rig.set_ports(&(0..3).map(|index| (index, port(PASSTHROUGH))).collect());
    assert_eq!(rig.send(0, 0, frame(station(3), station(1), &[], 60)), to([1, 2]));
    assert_eq!(rig.send(3, 0, frame(station(1), station(3), &[], 60)), dropped(DropReason::NotReady));
}

#[test]
fn address_known_in_one_vlan_is_unknown_in_another() {
    let mut rig = Rig::with_ports([
        port(VlanMode::Access(10)),
        port(trunk(&[10, 20], None)),
        port(VlanMode::Access(20)),
    ]);
    rig.teach(0, 0, station(1));
    let aimed = |vlan| frame(station(1), station(2), &[(0x8100, vlan)], 60);
    assert_eq!(rig.send(1, 0, aimed(10)), to([0]));
    assert_eq!(rig.send(1, 0, aimed(20)), to([2]));
}

#[test]
fn frame_from_a_port_that_does_not_exist_is_accounted_for() {
    let mut rig = Rig::with_ports([port(PASSTHROUGH)]);
    let frames = vec![frame(BROADCAST, station(1), &[], 60); 3];
    assert_eq!(rig.burst(5, 0, &frames), vec![dropped(DropReason::NotReady); 3]);
    assert_eq!(rig.send(0, 0, frames[0].clone()), dropped(DropReason::NoReceiver));
}
