//! Every translation, byte by byte.

use std::cell::RefCell;

use proptest::prelude::*;
use vmq::frame::{Accepts, Burst, Checksum, Frame, FrameStore, Gso, GsoKind, Offload};

use super::testing::{Builder, Seen, Transport, flatten, payload, push_cut, verify};
use super::*;
use crate::DropReason;

mod coalescing;
mod hostile;

/// A frame as the sender gives it.
#[derive(Debug, Clone)]
struct Given {
    bytes: Vec<u8>,
    offload: Offload,
    /// The VLAN it was classified into, if that is not its tag's.
    vlan: Option<u16>,
    cuts: Vec<usize>,
}

impl Given {
    fn new(bytes: Vec<u8>, offload: Offload) -> Self {
        Self { bytes, offload, vlan: None, cuts: vec![] }
    }
}

/// A frame as the receiver gets it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Got {
    bytes: Vec<u8>,
    offload: Offload,
    vlan: u16,
    tagged: bool,
}

impl Got {
    fn verified(&self) -> Seen {
        assert_eq!(self.tagged, self.bytes[12..14] == [0x81, 0]);
        verify(&self.bytes, self.offload.checksum).unwrap_or_else(|error| panic!("{error}: {self:02x?}"))
    }
}

const EVERYTHING: Want =
    Want { accepts: Accepts::all(), coalesce: false, max_frame: 1514, tag: TagForm::AsIs };

/// Runs frames through a translator, which is asked for only if needed.
fn translate(given: &[Given], want: &Want) -> (Vec<Got>, Vec<DropReason>) {
    thread_local!(static TRANSLATOR: RefCell<Translator> = RefCell::new(Translator::new()));
    let mut store = FrameStore::default();
    let mut burst = Burst::new(&mut store);
    for one in given {
        push_cut(&mut burst, &one.bytes, &one.cuts, one.offload);
        let frame = burst.frames_mut().last_mut().unwrap();
        frame.vlan = one.vlan.unwrap_or(frame.vlan);
    }
    let list: Vec<u8> = (0..u8::try_from(given.len()).unwrap()).collect();
    let (mut got, mut dropped) = (vec![], vec![]);
    let mut sink = |burst: &Burst<'_>, list: &[u8]| {
        assert!(!list.is_empty());
        got.extend(list.iter().map(|index| got_of(burst, &burst.frames()[usize::from(*index)])));
    };
    if Translator::needed(&burst, &list, want) {
        TRANSLATOR.with_borrow_mut(|translator| {
            translator.run(&burst, &list, want, &mut sink, &mut |_, reason| dropped.push(reason));
        });
    } else {
        sink(&burst, &list);
    }
    (got, dropped)
}

fn got_of(burst: &Burst<'_>, frame: &Frame) -> Got {
    Got { bytes: flatten(burst, frame), offload: frame.offload, vlan: frame.vlan, tagged: frame.tagged }
}

/// What a sender does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sends {
    Plain,
    Partial,
    Large(GsoKind, bool),
}

/// Each kind of frame over each protocol that can carry it.
fn senders() -> Vec<(Sends, bool, Transport)> {
    let mut all = vec![];
    for v6 in [false, true] {
        for transport in [Transport::Tcp, Transport::Udp] {
            all.push((Sends::Plain, v6, transport));
            all.push((Sends::Partial, v6, transport));
        }
        let kind = if v6 { GsoKind::Tcp6 } else { GsoKind::Tcp4 };
        all.push((Sends::Large(kind, false), v6, Transport::Tcp));
        all.push((Sends::Large(kind, true), v6, Transport::Tcp));
        all.push((Sends::Large(GsoKind::Udp, false), v6, Transport::Udp));
    }
    all
}

/// How a frame comes, and how it is to leave: tag, classified VLAN, form, tag afterwards.
type Tagging = (Option<u16>, Option<u16>, TagForm, Option<u16>);

const TAGS: [Tagging; 7] = [
    (None, None, TagForm::AsIs, None),
    (None, Some(10), TagForm::Access, None),
    (Some(0x600a), None, TagForm::AsIs, Some(0x600a)),
    (Some(0x600a), None, TagForm::Access, None),
    (None, Some(10), TagForm::Trunk { native: 1 }, Some(10)),
    (Some(0x600a), None, TagForm::Trunk { native: 10 }, None),
    (Some(0xe000), Some(10), TagForm::Trunk { native: 0 }, Some(0xe00a)),
];

/// The frames that `builder`, now with the receiver's tag, must have become.
fn expected(
    sends: Sends,
    builder: &Builder,
    data: &[u8],
    size: u16,
    accepts: Accepts,
) -> Vec<(Vec<u8>, Offload)> {
    let partial = accepts.contains(Accepts::CHECKSUM);
    let valid = Offload { checksum: Checksum::Valid, gso: None };
    let whole = builder.frame(data);
    match sends {
        Sends::Plain => vec![(whole, Offload::default())],
        Sends::Partial if partial => vec![(builder.unfinish(whole), builder.partial())],
        Sends::Partial => vec![(whole, valid)],
        Sends::Large(kind, ecn) => {
            let offload = builder.large(kind, size, ecn);
            if accepts.covers(&offload) {
                return vec![(builder.unfinish(whole), offload)];
            }
            let chunks: Vec<&[u8]> = data.chunks(usize::from(size)).collect();
            let segment = |(k, chunk): (usize, &&[u8])| {
                let mut builder = builder.clone();
                let count = u32::try_from(k).unwrap();
                builder.sequence = builder.sequence.wrapping_add(count * u32::from(size));
                builder.id = builder.id.wrapping_add(u16::try_from(k).unwrap());
                if k + 1 < chunks.len() {
                    builder.flags &= !0x09;
                }
                if k > 0 {
                    builder.flags &= !0x80;
                }
                let frame = builder.frame(chunk);
                if partial { (builder.unfinish(frame), builder.partial()) } else { (frame, valid) }
            };
            chunks.iter().enumerate().map(segment).collect()
        }
    }
}

#[test]
fn every_sender_to_every_receiver_is_right_byte_by_byte() {
    let extras: [(usize, Vec<u8>); 3] =
        [(0, vec![]), (8, vec![]), (0, [[1, 1, 8, 10].as_slice(), &[7; 8]].concat())];
    let mut cases = 0;
    for (sends, v6, transport) in senders() {
        for (tag, vlan, form, tag_after) in TAGS {
            for (ip_options, tcp_options) in &extras {
                let builder = Builder {
                    tag,
                    ip_options: *ip_options,
                    tcp_options: tcp_options.clone(),
                    // CWR, ECE, ACK, PSH, FIN.
                    flags: if sends == Sends::Large(GsoKind::Tcp4, true) { 0xd9 } else { 0x19 },
                    ..Builder::new(v6, transport)
                };
                let size = 1001;
                let data = payload(if matches!(sends, Sends::Large(..)) { 5 * 1001 + 77 } else { 801 });
                let whole = builder.frame(&data);
                let (bytes, offload) = match sends {
                    Sends::Plain => (whole, Offload::default()),
                    Sends::Partial => (builder.unfinish(whole), builder.partial()),
                    Sends::Large(kind, ecn) => (builder.unfinish(whole), builder.large(kind, size, ecn)),
                };
                let given = Given { bytes, offload, vlan, cuts: vec![50, 67, 900, 1111] };
                for bits in 0..=Accepts::all().bits() {
                    let accepts = Accepts::from_bits(bits).unwrap();
                    let want = Want { accepts, tag: form, ..EVERYTHING };
                    let (got, dropped) = translate(std::slice::from_ref(&given), &want);
                    assert_eq!(dropped, []);
                    let after = Builder { tag: tag_after, ..builder.clone() };
                    let right = expected(sends, &after, &data, size, accepts);
                    assert_eq!(got.len(), right.len());
                    for (got, (bytes, offload)) in got.iter().zip(right) {
                        assert_eq!(got.bytes, bytes, "{builder:?} {want:?}");
                        assert_eq!(got.offload, offload, "{builder:?} {want:?}");
                        assert_eq!(got.tagged, tag_after.is_some());
                        assert_eq!(got.vlan, vlan.or(tag.map(|tag| tag & 0xfff)).unwrap_or(0));
                        assert!(accepts.covers(&got.offload));
                        if got.offload.gso.is_none() {
                            assert_eq!(got.verified().vlan, tag_after.map(|tag| tag & 0xfff));
                        }
                        cases += 1;
                    }
                }
            }
        }
    }
    assert!(cases > 5000, "{cases}");
}

#[test]
fn frames_that_suit_need_no_translation() {
    let builder = Builder::new(false, Transport::Tcp);
    let frames = [
        (builder.build(1000), Offload::default()),
        (builder.build(1000), builder.partial()),
        (builder.build(60_000), builder.large(GsoKind::Tcp4, 1460, false)),
    ];
    for (bytes, offload) in &frames {
        let mut store = FrameStore::default();
        let mut burst = Burst::new(&mut store);
        assert!(burst.push(bytes.as_slice().into(), *offload));
        let needed = |want: &Want| Translator::needed(&burst, &[0], want);
        assert!(!needed(&EVERYTHING));
        assert_eq!(needed(&Want { accepts: Accepts::empty(), ..EVERYTHING }), !offload.is_plain());
        assert!(needed(&Want { max_frame: 1053, ..EVERYTHING }));
        assert!(!Translator::needed(&burst, &[], &Want { max_frame: 60, ..EVERYTHING }));
    }
}

#[test]
fn frame_longer_than_the_mtu_is_dropped_with_its_reason() {
    let builder = Builder::new(false, Transport::Udp);
    let limit = builder.header_len() + 500;
    let want = Want { max_frame: u32::try_from(limit).unwrap(), accepts: Accepts::empty(), ..EVERYTHING };
    for tag in [None, Some(3)] {
        let builder = Builder { tag, ..builder.clone() };
        let (got, dropped) = translate(&[Given::new(builder.build(500), Offload::default())], &want);
        assert_eq!((got.len(), dropped), (1, vec![]));
        let (got, dropped) = translate(&[Given::new(builder.build(501), builder.partial())], &want);
        assert_eq!((got.len(), dropped), (0, vec![DropReason::EgressMtu]));
    }
}

#[test]
fn tag_does_not_count_into_the_mtu_whatever_becomes_of_it() {
    for (tag, vlan, form, _) in TAGS {
        let builder = Builder { tag, ..Builder::new(true, Transport::Tcp) };
        let len = 1514 - 14 - 60;
        for (extra, fits) in [(0, true), (1, false)] {
            let given = Given { vlan, ..Given::new(builder.build(len + extra), Offload::default()) };
            let (got, dropped) = translate(&[given], &Want { tag: form, ..EVERYTHING });
            assert_eq!((got.len() == 1, dropped.is_empty()), (fits, fits), "{tag:?} {form:?}");
        }
    }
}

#[test]
fn large_frame_is_held_to_the_mtu_segment_by_segment() {
    let builder = Builder::new(true, Transport::Tcp);
    for accepts in [Accepts::empty(), Accepts::all()] {
        for (size, fits) in [(1440, true), (1441, false)] {
            let given = Given::new(builder.build(40_000), builder.large(GsoKind::Tcp6, size, false));
            let (got, dropped) = translate(&[given], &Want { accepts, ..EVERYTHING });
            assert_eq!((!got.is_empty(), dropped.is_empty()), (fits, fits));
        }
    }
    let given = Given::new(builder.build(1440), builder.large(GsoKind::Tcp6, 9000, false));
    assert_eq!(translate(&[given], &EVERYTHING).0.len(), 1);
}

#[test]
fn frame_cut_into_more_segments_than_a_burst_holds_stays_whole_and_in_order() {
    let builder = Builder { tcp_options: vec![1; 40], tag: Some(9), ..Builder::new(true, Transport::Tcp) };
    let data = payload(60_000);
    let large = Given {
        cuts: (1..16).map(|i| i * 4000).collect(),
        ..Given::new(builder.frame(&data), builder.large(GsoKind::Tcp6, 48, false))
    };
    let small = Given::new(builder.build(5), Offload::default());
    let given = [small.clone(), large.clone(), large, small];
    let want = Want { accepts: Accepts::empty(), tag: TagForm::Access, ..EVERYTHING };
    let (got, dropped) = translate(&given, &want);
    assert_eq!(dropped, []);
    assert_eq!(got.len(), 2 + 2 * 1250);
    let seen: Vec<u8> = got.iter().flat_map(|got| got.verified().payload).collect();
    assert_eq!(seen, [payload(5), data.clone(), data, payload(5)].concat());
}

#[test]
fn ip_length_and_checksum_that_the_sender_left_open_are_filled_in() {
    for v6 in [false, true] {
        let builder = Builder::new(v6, Transport::Tcp);
        let mut bytes = builder.unfinish(builder.build(60_000));
        if v6 {
            bytes[18..20].fill(0);
        } else {
            bytes[16..18].fill(0);
            bytes[24..26].fill(0);
        }
        // Neither is the length counted in the pseudo-header's sum.
        let at = builder.l4() + builder.field();
        bytes[at..at + 2].fill(0);
        let kind = if v6 { GsoKind::Tcp6 } else { GsoKind::Tcp4 };
        let given = Given::new(bytes, builder.large(kind, 1400, false));
        for accepts in [Accepts::empty(), Accepts::CHECKSUM] {
            let (got, _) = translate(std::slice::from_ref(&given), &Want { accepts, ..EVERYTHING });
            let seen: Vec<u8> = got.iter().flat_map(|got| got.verified().payload).collect();
            assert_eq!(seen, payload(60_000));
        }
    }
}

#[test]
fn large_frame_without_payload_is_one_frame() {
    let builder = Builder::new(false, Transport::Tcp);
    let given = Given::new(builder.build(0), builder.large(GsoKind::Tcp4, 1400, false));
    let (got, _) = translate(&[given], &Want { accepts: Accepts::empty(), ..EVERYTHING });
    assert_eq!(got.len(), 1);
    assert_eq!(got[0].bytes, builder.build(0));
}

#[test]
fn udp_checksum_that_comes_out_as_zero_is_sent_as_ones() {
    let builder = Builder::new(false, Transport::Udp);
    // The word that makes the sum all ones.
    let sum = checksum::fold(checksum::sum(&builder.unfinish(builder.frame(&[0, 0]))[34..], 0));
    let bytes = builder.unfinish(builder.frame(&(!sum).to_be_bytes()));
    let given = Given::new(bytes, builder.partial());
    let (got, _) = translate(&[given], &Want { accepts: Accepts::empty(), ..EVERYTHING });
    assert_eq!(got[0].bytes[40..42], [0xff, 0xff]);
    got[0].verified();
}

#[test]
fn tag_pushed_on_two_tags_leaves_the_packet_right() {
    let builder = Builder { tag: Some(5), ..Builder::new(false, Transport::Tcp) };
    let plain = builder.build(3000);
    let double = [&plain[..12], &[0x88, 0xa8, 0, 7], &plain[12..]].concat();
    let mut offload = builder.large(GsoKind::Tcp4, 1000, false);
    offload.checksum = Checksum::Partial { start: 42, offset: 16 };
    let given = Given { vlan: Some(99), ..Given::new(double, offload) };
    let want = Want { accepts: Accepts::empty(), tag: TagForm::Trunk { native: 0 }, ..EVERYTHING };
    let (got, dropped) = translate(&[given], &want);
    assert_eq!((got.len(), dropped), (3, vec![]));
    for (k, got) in got.iter().enumerate() {
        assert_eq!(got.bytes[12..24], [0x81, 0, 0, 99, 0x88, 0xa8, 0, 7, 0x81, 0, 0, 5]);
        let mut untagged = got.bytes.clone();
        untagged.drain(12..24);
        let seen = verify(&untagged, Checksum::Valid).unwrap();
        assert_eq!(seen.payload, payload(3000)[k * 1000..(k + 1) * 1000]);
    }
}

#[test]
fn udp_segment_whose_checksum_comes_out_as_zero_is_sent_as_ones() {
    let builder = Builder::new(true, Transport::Udp);
    let sum = checksum::fold(checksum::sum(&builder.unfinish(builder.frame(&[0, 0]))[54..], 0));
    let data = [(!sum).to_be_bytes(), [1, 2]].concat();
    let given = Given::new(builder.frame(&data), builder.large(GsoKind::Udp, 2, false));
    let (got, _) = translate(&[given], &Want { accepts: Accepts::empty(), ..EVERYTHING });
    assert_eq!(got.len(), 2);
    assert_eq!(got[0].bytes[60..62], [0xff, 0xff]);
    got[0].verified();
}

#[test]
fn segments_of_a_source_routed_packet_count_its_final_destination() {
    let builder = Builder { ip_options: 8, ..Builder::new(false, Transport::Tcp) };
    let data = payload(3000);
    // The sender sums the final destination, as the option has it; the header names the next hop.
    let route = |frame: &mut [u8]| {
        frame[30..34].copy_from_slice(&[10, 99, 98, 97]);
        frame[34..42].copy_from_slice(&[131, 7, 4, 10, 9, 8, 7, 0]);
    };
    let mut bytes = builder.unfinish(builder.frame(&data));
    route(&mut bytes);
    let given = Given::new(bytes, builder.large(GsoKind::Tcp4, 1000, false));
    let (got, _) = translate(&[given], &Want { accepts: Accepts::empty(), ..EVERYTHING });
    for (k, got) in got.iter().enumerate() {
        let sequence = builder.sequence.wrapping_add(u32::try_from(k).unwrap() * 1000);
        let right = Builder { sequence, ..builder.clone() }.frame(&data[k * 1000..(k + 1) * 1000]);
        assert_eq!(got.bytes[42..], right[42..]);
    }
}

#[test]
fn frame_in_too_many_pieces_for_a_tag_costs_no_other_frame() {
    let builder = Builder::new(false, Transport::Tcp);
    let pieces = Given {
        cuts: (0..256).map(|i| 64 + i * 2).collect(),
        vlan: Some(7),
        ..Given::new(builder.build(64 + 512 - 54), Offload::default())
    };
    let data = payload(100 * 100);
    let large =
        Given { vlan: Some(7), ..Given::new(builder.frame(&data), builder.large(GsoKind::Tcp4, 100, false)) };
    let want = Want { accepts: Accepts::empty(), ..EVERYTHING };
    let (got, dropped) = translate(&[pieces.clone(), pieces, large], &want);
    assert_eq!(dropped, [DropReason::Malformed; 2]);
    let seen: Vec<u8> = got.iter().flat_map(|got| got.verified().payload).collect();
    assert_eq!(seen, data);
}

proptest! {
    #[test]
    fn checksum_of_any_place_is_the_sum_from_its_start(
        bytes in proptest::collection::vec(any::<u8>(), 100..400),
        start in 18u16..80,
        offset in 0u16..20,
        cuts in proptest::collection::vec(any::<usize>(), 0..8),
        strip: bool,
    ) {
        let mut bytes = bytes;
        let tag = if strip { [0x81, 0, 0, 5, 9, 9] } else { [9; 6] };
        bytes[12..18].copy_from_slice(&tag);
        let given = Given {
            cuts,
            ..Given::new(bytes.clone(), Offload { checksum: Checksum::Partial { start, offset }, gso: None })
        };
        let want = Want { accepts: Accepts::empty(), tag: TagForm::Access, ..EVERYTHING };
        let (got, dropped) = translate(&[given], &want);
        prop_assert_eq!(dropped, vec![]);
        let (from, at) = (usize::from(start), usize::from(start + offset));
        let mut sum = 0_u32;
        for pair in bytes[from..].chunks(2) {
            sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
        }
        let folded = u16::try_from(sum % 0xffff).unwrap();
        let value = u16::from_be_bytes([got[0].bytes[at - if strip { 4 } else { 0 }],
            got[0].bytes[at + 1 - if strip { 4 } else { 0 }]]);
        prop_assert_eq!((u32::from(value) + u32::from(folded)) % 0xffff, 0);
        bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
        if strip {
            bytes.drain(12..16);
        }
        prop_assert_eq!(&got[0].bytes, &bytes);
    }
}
