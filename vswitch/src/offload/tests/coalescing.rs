//! Which segments are merged, and which never.

use super::*;

const MERGING: Want = Want { coalesce: true, ..EVERYTHING };

fn base(v6: bool) -> Builder {
    Builder { tcp_options: [[1, 1, 8, 10].as_slice(), &[7; 8]].concat(), ..Builder::new(v6, Transport::Tcp) }
}

/// The `k`th segment of 1000 bytes.
fn nth(builder: &Builder, k: u16) -> Builder {
    Builder {
        sequence: builder.sequence.wrapping_add(u32::from(k) * 1000),
        id: builder.id.wrapping_add(k),
        ..builder.clone()
    }
}

fn plain(builder: &Builder, len: usize) -> Given {
    Given::new(builder.build(len), Offload::default())
}

/// The lengths of the frames that come out, headers not counted.
fn lengths(given: &[Given], want: &Want) -> Vec<usize> {
    let header_len = base(false).header_len();
    let (got, dropped) = translate(given, want);
    assert_eq!(dropped, []);
    got.iter().map(|got| got.bytes.len() - header_len).collect()
}

#[test]
fn segments_of_a_large_frame_become_that_frame_again() {
    for v6 in [false, true] {
        for (tag, vlan, form, tag_after) in TAGS {
            for checksum in [false, true] {
                let builder = Builder { tag, flags: 0x18, ..base(v6) };
                let data = payload(20_500);
                let kind = if v6 { GsoKind::Tcp6 } else { GsoKind::Tcp4 };
                let large = builder.unfinish(builder.frame(&data));
                let given = Given { vlan, ..Given::new(large, builder.large(kind, 1400, false)) };
                let accepts = if checksum { Accepts::CHECKSUM } else { Accepts::empty() };
                let (segments, _) = translate(&[given], &Want { accepts, ..EVERYTHING });
                assert_eq!(segments.len(), 15);
                let given: Vec<Given> = segments
                    .iter()
                    .map(|s| Given { vlan, ..Given::new(s.bytes.clone(), s.offload) })
                    .collect();
                let (got, dropped) = translate(&given, &Want { tag: form, ..MERGING });
                assert_eq!((got.len(), dropped), (1, vec![]));
                let after = Builder { tag: tag_after, ..builder };
                assert_eq!(got[0].bytes, after.unfinish(after.frame(&data)));
                assert_eq!(got[0].offload, after.large(kind, 1400, false));
            }
        }
    }
}

#[test]
fn segments_of_unknown_checksum_are_merged_after_verification() {
    let builder = base(false);
    let given: Vec<Given> = (0..4).map(|k| plain(&nth(&builder, k), 1000)).collect();
    assert_eq!(lengths(&given, &MERGING), [4000]);
}

#[test]
fn segment_of_wrong_checksum_passes_untouched() {
    for broken in 0..4 {
        let builder = base(true);
        let mut given: Vec<Given> = (0..4).map(|k| plain(&nth(&builder, k), 1000)).collect();
        *given[broken].bytes.last_mut().unwrap() ^= 1;
        let (got, _) = translate(&given, &MERGING);
        let expected: &[usize] = match broken {
            0 => &[1000, 3000],
            1 => &[1000, 1000, 2000],
            2 => &[2000, 1000, 1000],
            _ => &[3000, 1000],
        };
        let got_lengths: Vec<usize> = got.iter().map(|got| got.bytes.len() - builder.header_len()).collect();
        assert_eq!(got_lengths, expected);
        assert!(got.iter().any(|got| got.bytes == given[broken].bytes && got.offload == Offload::default()));
    }
}

#[test]
fn segment_of_wrong_ip_checksum_is_not_merged() {
    let builder = base(false);
    let mut given: Vec<Given> = (0..2).map(|k| plain(&nth(&builder, k), 1000)).collect();
    given[1].bytes[25] ^= 1;
    given[1].offload.checksum = Checksum::Valid;
    assert_eq!(lengths(&given, &MERGING), [1000, 1000]);
}

#[test]
fn nothing_is_merged_for_a_receiver_that_does_not_take_it() {
    for v6 in [false, true] {
        let builder = base(v6);
        let given: Vec<Given> = (0..3).map(|k| plain(&nth(&builder, k), 1000)).collect();
        let kind = if v6 { Accepts::TCP6 } else { Accepts::TCP4 };
        for bits in 0..=Accepts::all().bits() {
            let accepts = Accepts::from_bits(bits).unwrap();
            let merged = accepts.contains(kind | Accepts::CHECKSUM);
            assert_eq!(translate(&given, &Want { accepts, ..MERGING }).0.len(), if merged { 1 } else { 3 });
            assert_eq!(translate(&given, &Want { accepts, ..EVERYTHING }).0.len(), 3);
        }
    }
}

#[test]
fn any_difference_but_the_counters_ends_the_merge() {
    type Change = fn(&mut Builder);
    let changes: [(&str, Change); 13] = [
        ("acknowledgement", |b| b.acknowledgement += 1),
        ("window", |b| b.window += 1),
        ("timestamp", |b| b.tcp_options[5] ^= 1),
        ("options", |b| b.tcp_options.truncate(8)),
        ("FIN", |b| b.flags |= 1),
        ("SYN", |b| b.flags |= 2),
        ("RST", |b| b.flags |= 4),
        ("URG", |b| b.flags |= 0x20),
        ("ECE", |b| b.flags |= 0x40),
        ("CWR", |b| b.flags |= 0x80),
        ("congestion experienced", |b| b.tos |= 3),
        ("time to live", |b| b.ttl -= 1),
        ("gap", |b| b.sequence = b.sequence.wrapping_add(1)),
    ];
    for v6 in [false, true] {
        for (name, change) in changes {
            let builder = base(v6);
            let mut odd = nth(&builder, 1);
            change(&mut odd);
            let given = [plain(&builder, 1000), plain(&odd, 1000)];
            let (got, _) = translate(&given, &MERGING);
            let bytes: Vec<&Vec<u8>> = got.iter().map(|got| &got.bytes).collect();
            assert_eq!(bytes, [&given[0].bytes, &given[1].bytes], "{name}");
        }
    }
}

#[test]
fn other_vlan_or_address_ends_the_merge() {
    let builder = base(false);
    let other_vlan = Given { vlan: Some(9), ..plain(&nth(&builder, 1), 1000) };
    assert_eq!(
        lengths(&[plain(&builder, 1000), other_vlan], &Want { tag: TagForm::Access, ..MERGING }).len(),
        2
    );
    let mut other_source = plain(&nth(&builder, 1), 1000);
    other_source.bytes[11] ^= 1;
    assert_eq!(lengths(&[plain(&builder, 1000), other_source], &MERGING).len(), 2);
}

#[test]
fn identification_must_go_on_or_mean_nothing() {
    for (ids, dont_fragment, expected) in [
        ([5, 6, 7], true, vec![3000]),
        ([5, 6, 7], false, vec![3000]),
        ([5, 5, 5], true, vec![3000]),
        ([5, 5, 5], false, vec![1000, 1000, 1000]),
        ([5, 5, 6], true, vec![2000, 1000]),
        ([5, 7, 8], true, vec![1000, 2000]),
        ([65_535, 0, 1], true, vec![3000]),
    ] {
        let builder = Builder { dont_fragment, ..base(false) };
        let given: Vec<Given> = (0..3_u16)
            .map(|k| plain(&Builder { id: ids[usize::from(k)], ..nth(&builder, k) }, 1000))
            .collect();
        assert_eq!(lengths(&given, &MERGING), expected, "{ids:?} {dont_fragment}");
    }
}

#[test]
fn pushed_or_shorter_segment_is_the_last_and_a_longer_one_starts_anew() {
    let builder = base(false);
    let mut given: Vec<Given> = (0..4).map(|k| plain(&nth(&builder, k), 1000)).collect();
    given[1] = plain(&Builder { flags: 0x18, ..nth(&builder, 1) }, 1000);
    let (got, _) = translate(&given, &MERGING);
    assert_eq!(got.len(), 2);
    assert_eq!(got.iter().map(|got| got.bytes[47]).collect::<Vec<u8>>(), [0x18, 0x10]);

    let short = Builder { id: builder.id.wrapping_add(1), ..nth(&builder, 1) };
    let behind = Builder { sequence: short.sequence.wrapping_add(999), ..nth(&builder, 2) };
    let given = [plain(&builder, 1000), plain(&short, 999), plain(&behind, 1000)];
    assert_eq!(lengths(&given, &MERGING), [1999, 1000]);
    let given = [plain(&builder, 1000), plain(&nth(&builder, 1), 1001)];
    assert_eq!(lengths(&given, &MERGING), [1000, 1001]);
}

#[test]
fn padding_behind_the_packet_is_left_out() {
    let builder = base(false);
    let step = |k: u32| Builder {
        sequence: builder.sequence.wrapping_add(k),
        id: builder.id.wrapping_add(u16::try_from(k).unwrap()),
        tcp_options: vec![],
        ..builder.clone()
    };
    let given: Vec<Given> = (0..3)
        .map(|k| {
            let mut one = Given::new(step(k).frame(&[b'a' + u8::try_from(k).unwrap()]), Offload::default());
            one.bytes.resize(60, 0xee);
            one
        })
        .collect();
    let (got, _) = translate(&given, &MERGING);
    assert_eq!(got.len(), 1);
    assert_eq!(got[0].bytes[54..], *b"abc");
    let size = got[0].offload.gso.unwrap().size;
    assert_eq!(size, 1);
}

#[test]
fn acknowledgement_without_data_is_not_overtaken() {
    let builder = base(false);
    let ack = nth(&builder, 1);
    let given = [
        plain(&builder, 1000),
        plain(&ack, 0),
        plain(&nth(&builder, 1), 1000),
        plain(&nth(&builder, 2), 1000),
    ];
    assert_eq!(lengths(&given, &MERGING), [1000, 0, 2000]);
}

#[test]
fn fragment_between_the_addresses_ends_every_merge_between_them() {
    let builder = base(false);
    let mut fragment = plain(&builder, 1000);
    fragment.bytes[20] = 0x20;
    let given = [plain(&builder, 1000), fragment, plain(&nth(&builder, 1), 1000)];
    assert_eq!(lengths(&given, &MERGING), [1000, 1000, 1000]);
}

#[test]
fn flows_in_turn_are_each_merged() {
    let flows: Vec<Builder> = (0..16).map(|port| Builder { ports: (port, 80), ..base(false) }).collect();
    let given: Vec<Given> =
        (0..4_u16).flat_map(|k| flows.iter().map(move |flow| plain(&nth(flow, k), 1000))).collect();
    assert_eq!(lengths(&given, &MERGING), [4000; 16]);
}

#[test]
fn more_flows_than_are_followed_lose_nothing() {
    let flows: Vec<Builder> = (0..32).map(|port| Builder { ports: (port, 80), ..base(false) }).collect();
    let given: Vec<Given> =
        (0..2_u16).flat_map(|k| flows.iter().map(move |flow| plain(&nth(flow, k), 1000))).collect();
    assert_eq!(lengths(&given, &MERGING).iter().sum::<usize>(), 64_000);
}

#[test]
fn merged_packet_never_exceeds_ip() {
    let builder = base(false);
    let given: Vec<Given> = (0..60_u16)
        .map(|k| {
            let sequence = builder.sequence.wrapping_add(u32::from(k) * 1448);
            plain(&Builder { sequence, id: k, ..builder.clone() }, 1448)
        })
        .collect();
    assert_eq!(lengths(&given, &MERGING), [45 * 1448, 15 * 1448]);
}

#[test]
fn too_many_pieces_are_not_merged() {
    let builder = base(false);
    let given: Vec<Given> = (0..12)
        .map(|k| Given { cuts: (1..50).map(|i| 70 + i * 15).collect(), ..plain(&nth(&builder, k), 1000) })
        .collect();
    let lengths = lengths(&given, &MERGING);
    assert!(lengths.len() > 1 && lengths.len() < 6);
    assert_eq!(lengths.iter().sum::<usize>(), 12_000);
}

#[test]
fn long_frame_is_dropped_and_not_merged() {
    let builder = base(false);
    let given: Vec<Given> = (0..3)
        .map(|k| {
            let sequence = builder.sequence.wrapping_add(k * 1449);
            plain(&Builder { sequence, ..builder.clone() }, 1449)
        })
        .collect();
    let (got, dropped) = translate(&given, &MERGING);
    assert_eq!((got.len(), dropped), (0, vec![DropReason::EgressMtu; 3]));
}

#[test]
fn flow_that_began_first_makes_room_for_another() {
    let flows: Vec<Builder> = (0..17).map(|port| Builder { ports: (port, 80), ..base(false) }).collect();
    let mut given: Vec<Given> = flows.iter().map(|flow| plain(flow, 1000)).collect();
    given.extend([16, 15, 1, 0].map(|flow: usize| plain(&nth(&flows[flow], 1), 1000)));
    let lengths = lengths(&given, &MERGING);
    assert_eq!(lengths.len(), 18);
    assert_eq!(
        (lengths[0], lengths[1], lengths[15], lengths[16], lengths[17]),
        (1000, 2000, 2000, 2000, 1000)
    );
}

#[test]
fn packet_that_is_cut_short_is_not_merged() {
    for v6 in [false, true] {
        let builder = base(v6);
        let mut given: Vec<Given> = (0..2).map(|k| plain(&nth(&builder, k), 1000)).collect();
        for one in &mut given {
            one.bytes.pop();
            one.offload.checksum = Checksum::Valid;
        }
        given[1] = plain(&Builder { sequence: builder.sequence.wrapping_add(999), ..nth(&builder, 1) }, 999);
        assert_eq!(translate(&given, &MERGING).0.len(), 2);
    }
}

/// One frame of a random mix: flow, how far its sequence jumps, payload, flags.
fn mix() -> impl Strategy<Value = Vec<(u8, bool, usize, u8, bool)>> {
    let flags = prop_oneof![8 => Just(0x10_u8), 1 => Just(0x18), 1 => any::<u8>()];
    let len = prop_oneof![6 => Just(700_usize), 1 => 0usize..1400];
    proptest::collection::vec((0u8..4, prop::bool::weighted(0.05), len, flags, any::<bool>()), 1..64)
}

proptest! {
    #[test]
    fn any_mix_cut_up_again_is_the_mix(frames in mix()) {
        let mut flows: Vec<Builder> = (0..4u8)
            .map(|n| Builder { ports: (u16::from(n), 80), ..base(n % 2 == 1) })
            .collect();
        let given: Vec<Given> = frames
            .iter()
            .map(|(flow, jump, len, flags, partial)| {
                let flow = &mut flows[usize::from(*flow)];
                flow.sequence = flow.sequence.wrapping_add(u32::from(*jump));
                let now = Builder { flags: *flags, ..flow.clone() };
                flow.sequence = flow.sequence.wrapping_add(u32::try_from(*len).unwrap());
                flow.id = flow.id.wrapping_add(1);
                let whole = now.build(*len);
                match partial {
                    true => Given::new(now.unfinish(whole), now.partial()),
                    false => Given::new(whole, Offload::default()),
                }
            })
            .collect();
        let (merged, dropped) = translate(&given, &MERGING);
        prop_assert_eq!(dropped, vec![]);
        // Cut up again and with every checksum done, each flow is as it was, frame by frame.
        let mut cut = vec![];
        for got in merged {
            let given = Given { vlan: Some(got.vlan), ..Given::new(got.bytes, got.offload) };
            cut.extend(translate(&[given], &Want { accepts: Accepts::empty(), ..EVERYTHING }).0);
        }
        prop_assert_eq!(cut.len(), given.len());
        let finish = Want { accepts: Accepts::empty(), ..EVERYTHING };
        for v6 in [false, true] {
            for port in 0..4u8 {
                let at = Builder::new(v6, Transport::Tcp).l4() + 1;
                let version = if v6 { 0x86 } else { 8 };
                let of_flow = |bytes: &Vec<u8>| bytes[12] == version && bytes[at] == port;
                let before: Vec<Vec<u8>> = given
                    .iter()
                    .flat_map(|one| translate(std::slice::from_ref(one), &finish).0)
                    .map(|got| got.bytes)
                    .filter(of_flow)
                    .collect();
                let after: Vec<Vec<u8>> =
                    cut.iter().map(|got| got.bytes.clone()).filter(of_flow).collect();
                prop_assert_eq!(before, after);
            }
        }
    }
}
