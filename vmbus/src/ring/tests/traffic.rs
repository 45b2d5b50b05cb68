use proptest::prelude::*;

use super::*;

#[test]
fn in_band_packet_has_these_bytes() {
    let ring = ring(1);
    stand_at(&ring, 0x40);
    let (mut out, mut incoming) = both(&ring);
    let header = PacketHeader {
        kind: PacketKind::InBand,
        completion_requested: true,
        transaction: 0x0807_0605_0403_0201,
    };
    out.write(&header, &[b"abc", b"", b"defghi"]).unwrap();
    out.publish();
    let mut bytes = [0; 40];
    assert!(ring.read(0x1040, &mut bytes));
    #[rustfmt::skip]
    assert_eq!(bytes, [
        6, 0, 2, 0, 4, 0, 1, 0, 1, 2, 3, 4, 5, 6, 7, 8,
        b'a', b'b', b'c', b'd', b'e', b'f', b'g', b'h', b'i', 0, 0, 0, 0, 0, 0, 0,
        0, 0, 0, 0, 0x40, 0, 0, 0,
    ]);
    assert_eq!(word(&ring, WRITE_INDEX), 0x68);
    let mut buffer = PacketBuffer::new();
    let packet = incoming.next(&mut buffer).unwrap().unwrap();
    assert_eq!((packet.kind, packet.completion_requested), (PacketKind::InBand, true));
    assert_eq!((packet.transaction, packet.payload), (header.transaction, &b"abcdefghi\0\0\0\0\0\0\0"[..]));
}

#[test]
fn transfer_page_packet_has_these_bytes() {
    let ring = ring(1);
    let (mut out, mut incoming) = both(&ring);
    let ranges = [TransferRange::new(0x5ea, 0x1000), TransferRange::new(60, 0x2000)];
    let kind = PacketKind::TransferPages { pageset: 0xcafe, ranges: &ranges };
    out.write(&PacketHeader { kind, completion_requested: true, transaction: 5 }, &[&[0x6b, 0, 0, 0]])
        .unwrap();
    out.publish();
    let mut bytes = [0; 56];
    assert!(ring.read(0x1000, &mut bytes));
    #[rustfmt::skip]
    assert_eq!(bytes, [
        7, 0, 5, 0, 6, 0, 1, 0, 5, 0, 0, 0, 0, 0, 0, 0,
        0xfe, 0xca, 0, 0, 2, 0, 0, 0,
        0xea, 5, 0, 0, 0, 0x10, 0, 0, 60, 0, 0, 0, 0, 0x20, 0, 0,
        0x6b, 0, 0, 0, 0, 0, 0, 0,
        0, 0, 0, 0, 0, 0, 0, 0,
    ]);
    let mut buffer = PacketBuffer::new();
    assert_eq!(incoming.next(&mut buffer).unwrap().unwrap().kind, kind);
}

#[test]
fn gpa_direct_packet_has_these_bytes_and_its_ranges_come_out_merged() {
    let ring = ring(1);
    let (mut out, mut incoming) = both(&ring);
    let mut list = GpaRangeList::default();
    list.push(0x1800, 0x900, &[0x10, 0x11, 0x20]);
    list.push(4, 0, &[7]);
    let kind = PacketKind::GpaDirect { ranges: list.ranges() };
    out.write(&PacketHeader { kind, completion_requested: false, transaction: 1 }, &[&[9; 8]]).unwrap();
    out.publish();
    let mut bytes = [0; 80];
    assert!(ring.read(0x1000, &mut bytes));
    assert_eq!(bytes[..8], [9, 0, 9, 0, 10, 0, 0, 0]);
    assert_eq!(bytes[16..32], [0, 0, 0, 0, 2, 0, 0, 0, 0, 0x18, 0, 0, 0, 9, 0, 0]);
    assert_eq!(
        bytes[32..56],
        [[0x10, 0, 0, 0, 0, 0, 0, 0], [0x11, 0, 0, 0, 0, 0, 0, 0], [0x20, 0, 0, 0, 0, 0, 0, 0]].concat()
    );
    let mut buffer = PacketBuffer::new();
    let packet = incoming.next(&mut buffer).unwrap().unwrap();
    let PacketKind::GpaDirect { ranges } = packet.kind else { panic!("{packet:?}") };
    let pieces: Vec<Vec<(u64, u32)>> = ranges.iter().map(|range| range.pieces().collect()).collect();
    assert_eq!(pieces, [vec![(0x10900, 0x1700), (0x20000, 0x100)], vec![(0x7000, 4)]]);
    assert_eq!(packet.payload, [9; 8]);
}

#[test]
fn range_whose_offset_is_beyond_its_first_page_starts_in_a_later_one() {
    let pfns = [1, 2, 4, u64::MAX].map(zerocopy::little_endian::U64::new);
    let range = GpaRange { byte_count: 4096, byte_offset: 4096 + 100, pfns: &pfns[..3] };
    assert_eq!(range.pieces().collect::<Vec<_>>(), [(0x2064, 3996), (0x4000, 100)]);
    let range = GpaRange { byte_count: 4096, byte_offset: 100, pfns: &pfns[2..] };
    assert_eq!(range.pieces().map(|(gpa, _)| gpa).collect::<Vec<_>>(), [0x4064, u64::MAX]);
    let empty = GpaRange { byte_count: 0, byte_offset: 0, pfns: &[] };
    assert_eq!(empty.pieces().count(), 0);
}

#[test]
fn packet_wraps_at_every_boundary() {
    let ring = ring(3);
    let payload: Vec<u8> = (0..100).collect();
    let mut buffer = PacketBuffer::new();
    for back in (8..=160).step_by(8) {
        stand_at(&ring, 3 * 4096 - back);
        let (mut out, mut incoming) = both(&ring);
        for transaction in 0..3 {
            out.write(&PacketHeader::in_band(transaction), &[&payload]).unwrap();
        }
        out.publish();
        for transaction in 0..3 {
            let packet = incoming.next(&mut buffer).unwrap().unwrap();
            assert_eq!((packet.transaction, &packet.payload[..100]), (transaction, payload.as_slice()));
        }
        assert_eq!(incoming.next(&mut buffer).unwrap(), None);
        incoming.commit();
        assert_eq!(word(&ring, READ_INDEX), 3 * 128 - back);
    }
}

#[test]
fn ring_is_full_when_one_more_packet_would_make_it_look_empty() {
    let ring = ring(1);
    let (mut out, mut incoming) = both(&ring);
    // 4096 bytes: 31 packets of 128 leave 128 free, which is not strictly more than another one.
    for _ in 0..31 {
        assert!(out.room(104));
        out.write(&PacketHeader::in_band(0), &[&[0; 104]]).unwrap();
    }
    assert!(!out.room(104) && out.room(96));
    assert_eq!(out.write(&PacketHeader::in_band(0), &[&[0; 104]]), Err(WriteError::Full));
    out.write(&PacketHeader::in_band(0), &[&[0; 96]]).unwrap();
    assert!(!out.room(0));
    out.publish();
    let mut buffer = PacketBuffer::new();
    for _ in 0..32 {
        assert!(incoming.next(&mut buffer).unwrap().is_some());
    }
    assert_eq!(incoming.next(&mut buffer).unwrap(), None);
    assert!(!out.room(0), "room comes back with the commit only");
    incoming.commit();
    assert!(out.room(4064) && !out.room(4072));
    assert_eq!(out.write(&PacketHeader::in_band(0), &[&[0; 4072]]), Err(WriteError::TooLong(4088)));
    let huge = vec![0; MAX_PACKET];
    assert_eq!(out.write(&PacketHeader::in_band(0), &[&huge]), Err(WriteError::TooLong(MAX_PACKET + 16)));
}

#[test]
fn packets_taken_and_not_committed_come_again_after_rewind_and_after_takeover() {
    let ring = ring(2);
    let (mut out, mut incoming) = both(&ring);
    for transaction in 0..4 {
        out.write(&PacketHeader::in_band(transaction), &[&[1; 5]]).unwrap();
    }
    out.publish();
    let mut buffer = PacketBuffer::new();
    let mut next =
        |incoming: &mut Incoming| incoming.next(&mut buffer).unwrap().map(|packet| packet.transaction);
    assert_eq!(next(&mut incoming), Some(0));
    incoming.commit();
    let mark = incoming.mark();
    assert_eq!((next(&mut incoming), next(&mut incoming)), (Some(1), Some(2)));
    incoming.rewind(mark);
    assert_eq!(next(&mut incoming), Some(1));
    incoming.disarm();
    let mut successor = Incoming::new(&ring, false).unwrap();
    assert_eq!(word(&ring, INTERRUPT_MASK), 1, "a ring taken over is left as it is");
    assert_eq!((1..4).map(|_| next(&mut successor)).collect::<Vec<_>>(), [Some(1), Some(2), Some(3)]);
    let mut writer = Outgoing::new(&ring, false).unwrap();
    writer.write(&PacketHeader::completion(4), &[]).unwrap();
    writer.publish();
    assert_eq!(next(&mut successor), Some(4));
}

#[test]
fn fresh_ring_gets_only_the_fields_that_its_side_owns() {
    let ring = ring(1);
    for at in [INTERRUPT_MASK, PENDING_SEND_SIZE] {
        ring.write(at, &7u32.to_le_bytes());
    }
    ring.write(FEATURES, &8u32.to_le_bytes());
    stand_at(&ring, 64);
    let fields =
        || [WRITE_INDEX, READ_INDEX, INTERRUPT_MASK, PENDING_SEND_SIZE, FEATURES].map(|at| word(&ring, at));
    Incoming::new(&ring, false).unwrap();
    Outgoing::new(&ring, false).unwrap();
    assert_eq!(fields(), [64, 64, 7, 7, 8]);
    Incoming::new(&ring, true).unwrap();
    assert_eq!(fields(), [64, 64, 0, 7, 8]);
    Outgoing::new(&ring, true).unwrap();
    assert_eq!(fields(), [64, 64, 0, 0, 9]);
}

/// What one side does next.
#[derive(Debug, Clone)]
enum Step {
    Write { kind: u8, len: usize },
    Publish,
    Read(usize),
    Commit,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0u8..4, prop_oneof![0usize..64, 0usize..600, 0usize..5000]).prop_map(|(kind, len)| Step::Write { kind, len }),
        2 => Just(Step::Publish),
        2 => (1usize..20).prop_map(Step::Read),
        2 => Just(Step::Commit),
    ]
}

proptest! {
    /// Every packet comes out once, in order and unchanged, whatever the ring's size and place of its pages.
    #[test]
    fn packets_come_out_as_they_went_in(
        data in 1u64..9,
        start in 0u32..4096 / 8,
        steps in proptest::collection::vec(step(), 1..400),
    ) {
        let ring = ring(data);
        stand_at(&ring, start * 8);
        let (mut out, mut incoming) = both(&ring);
        let mut buffer = PacketBuffer::new();
        let (mut sent, mut published, mut read) = (Vec::new(), 0, 0);
        for step in steps.into_iter().chain([Step::Publish, Step::Read(usize::MAX)]) {
            match step {
                Step::Write { kind, len } => {
                    let tag = sent.len();
                    let room = out.room(len);
                    match send(&mut out, kind, len, tag) {
                        Ok(()) => sent.push((kind, len)),
                        Err(WriteError::Full) => prop_assert!(!room || kind > 1),
                        Err(WriteError::TooLong(_)) => prop_assert!(len + 64 > usize::try_from(data << 12).unwrap()),
                        Err(error) => prop_assert!(false, "{error}"),
                    }
                }
                Step::Publish => {
                    out.publish();
                    published = sent.len();
                }
                Step::Read(count) => {
                    for _ in 0..count {
                        let packet = incoming.next(&mut buffer).unwrap();
                        prop_assert_eq!(packet.is_some(), read < published);
                        let Some(packet) = packet else { break };
                        verify(&packet, sent[read], read);
                        read += 1;
                    }
                }
                Step::Commit => {
                    incoming.commit();
                }
            }
        }
        prop_assert_eq!(read, sent.len());
    }
}

fn bytes(len: usize, tag: usize) -> Vec<u8> {
    (0..len).map(|i| u8::try_from((i * 31 + tag * 7) % 251).unwrap()).collect()
}

fn send(out: &mut Outgoing, kind: u8, len: usize, tag: usize) -> Result<(), WriteError> {
    let payload = bytes(len, tag);
    let (head, tail) = payload.split_at(len / 3);
    let number = u32::try_from(tag).unwrap();
    let ranges = [TransferRange::new(number, 1), TransferRange::new(2, number)];
    let mut list = GpaRangeList::default();
    list.push(5000, 0, &[tag as u64, 2]);
    let kind = match kind {
        0 => PacketKind::InBand,
        1 => PacketKind::Completion,
        2 => PacketKind::TransferPages { pageset: 3, ranges: &ranges },
        _ => PacketKind::GpaDirect { ranges: list.ranges() },
    };
    let header = PacketHeader { kind, completion_requested: tag.is_multiple_of(2), transaction: tag as u64 };
    out.write(&header, &[head, tail])
}

fn verify(packet: &Packet<'_>, (kind, len): (u8, usize), tag: usize) {
    assert_eq!((packet.transaction, packet.completion_requested), (tag as u64, tag.is_multiple_of(2)));
    assert_eq!(packet.payload.len(), len.next_multiple_of(8));
    assert_eq!(packet.payload[..len], bytes(len, tag));
    assert!(packet.payload[len..].iter().all(|&byte| byte == 0));
    match (kind, packet.kind) {
        (0, PacketKind::InBand) | (1, PacketKind::Completion) => {}
        (2, PacketKind::TransferPages { pageset: 3, ranges }) => {
            let number = u32::try_from(tag).unwrap();
            assert_eq!(ranges, [TransferRange::new(number, 1), TransferRange::new(2, number)]);
        }
        (3, PacketKind::GpaDirect { ranges }) => {
            let ranges: Vec<_> = ranges.iter().collect();
            assert_eq!((ranges.len(), ranges[0].byte_count, ranges[0].pfns[0].get()), (1, 5000, tag as u64));
        }
        other => panic!("{other:?}"),
    }
}
