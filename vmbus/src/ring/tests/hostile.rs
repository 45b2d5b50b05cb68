use std::os::fd::AsFd;
use std::sync::atomic::AtomicBool;

use super::*;

/// A ring whose reader has seen nothing yet, with `words` in its control page and `packet` at the start of its data.
fn reader(words: &[(u32, u32)], packet: &[u8]) -> (Pages, Incoming) {
    let ring = ring(2);
    let incoming = Incoming::new(&ring, true).unwrap();
    assert!(ring.write(4096, packet));
    for &(at, value) in words {
        ring.write(at, &value.to_le_bytes());
    }
    (ring, incoming)
}

fn descriptor(kind: u16, offset8: u16, len8: u16, flags: u16) -> Vec<u8> {
    [kind, offset8, len8, flags, 0, 0, 0, 0].iter().flat_map(|field| field.to_le_bytes()).collect()
}

/// What the reader says to a packet of `kind` and these lengths, when `written` bytes are in the ring.
fn read(written: u32, packet: &[u8]) -> RingFault {
    let (_, mut incoming) = reader(&[(WRITE_INDEX, written)], packet);
    let fault = incoming.next(&mut PacketBuffer::with_limit(4000)).unwrap_err();
    assert_eq!(incoming.next(&mut PacketBuffer::with_limit(4000)), Err(fault), "a fault stays");
    fault
}

#[test]
fn write_index_outside_the_ring_or_unaligned_is_a_fault() {
    for index in [8192, 8200, 4, 7, 8191, u32::MAX, u32::MAX - 7, 1 << 31] {
        let fault = RingFault::Index { which: "write", index, size: 8192 };
        assert_eq!(read(index, &[]), fault);
    }
}

#[test]
fn read_index_outside_the_ring_unaligned_or_past_what_was_written_is_a_fault() {
    let ring = ring(2);
    let (mut out, _) = both(&ring);
    for _ in 0..14 {
        out.write(&PacketHeader::in_band(0), &[&[0; 500]]).unwrap();
    }
    out.publish();
    let write = word(&ring, WRITE_INDEX);
    for index in [8192, 12, u32::MAX] {
        ring.write(READ_INDEX, &index.to_le_bytes());
        let fault = RingFault::Index { which: "read", index, size: 8192 };
        assert_eq!(out.write(&PacketHeader::in_band(0), &[&[0; 2000]]), Err(WriteError::Fault(fault)));
        assert!(!out.room(2000) && !out.wait_for_room(2000));
    }
    ring.write(READ_INDEX, &(write + 8).to_le_bytes());
    let jump = RingFault::IndexJump { which: "read", from: 0, to: write + 8 };
    assert_eq!(out.write(&PacketHeader::in_band(0), &[&[0; 2000]]), Err(WriteError::Fault(jump)));
    ring.write(READ_INDEX, &write.to_le_bytes());
    assert!(out.room(2000), "all was read");
    ring.write(READ_INDEX, &0u32.to_le_bytes());
    out.write(&PacketHeader::in_band(0), &[&[0; 7000]]).unwrap();
    let back = RingFault::IndexJump { which: "read", from: write, to: 0 };
    assert_eq!(out.write(&PacketHeader::in_band(0), &[&[0; 2000]]), Err(WriteError::Fault(back)));
}

#[test]
fn write_index_over_packets_that_were_not_given_back_is_a_fault() {
    let ring = ring(2);
    let (mut out, mut incoming) = both(&ring);
    out.write(&PacketHeader::in_band(0), &[&[0; 1000]]).unwrap();
    out.publish();
    let mut buffer = PacketBuffer::new();
    incoming.next(&mut buffer).unwrap().unwrap();
    ring.write(WRITE_INDEX, &512u32.to_le_bytes());
    let fault = RingFault::IndexJump { which: "write", from: 1024, to: 512 };
    assert_eq!(incoming.next(&mut buffer), Err(fault));
    assert!(incoming.arm(), "a fault counts as work");
    assert!(!incoming.commit());
}

#[test]
fn indices_that_make_no_sense_at_the_start_are_refused() {
    for (at, which) in [(WRITE_INDEX, "write"), (READ_INDEX, "read")] {
        let ring = ring(2);
        ring.write(at, &8192u32.to_le_bytes());
        let fault = RingFault::Index { which, index: 8192, size: 8192 };
        assert_eq!(Incoming::new(&ring, true).unwrap_err(), fault);
        assert_eq!(Outgoing::new(&ring, false).unwrap_err(), fault);
    }
}

#[test]
fn ring_without_data_is_refused() {
    for pages in [0, 1] {
        let small = ring(2).pages(0, pages);
        assert_eq!(Incoming::new(&small, true).unwrap_err(), RingFault::TooSmall { pages });
        assert_eq!(Outgoing::new(&small, true).unwrap_err(), RingFault::TooSmall { pages });
    }
}

#[test]
fn packet_shorter_than_its_header_or_longer_than_what_was_written_is_a_fault() {
    for (written, offset8, len8) in [
        (8, 2, 2),
        (16, 2, 2),
        (24, 2, 3),
        (24, 0, 2),
        (24, 1, 2),
        (24, 2, 0),
        (24, 2, 1),
        (24, 3, 2),
        (8184, 2, 1023),
        (8184, 2, 0xffff),
        (8184, 0xffff, 0xffff),
        (8184, 0xffff, 2),
    ] {
        let fault = read(written, &descriptor(6, offset8, len8, 0));
        assert!(matches!(fault, RingFault::PacketLength { .. }), "{written} {offset8} {len8}: {fault}");
    }
}

#[test]
fn packet_longer_than_the_buffer_is_a_fault() {
    let fault = RingFault::PacketTooLong { len: 4008, limit: 4000 };
    assert_eq!(read(8184, &descriptor(6, 2, 501, 0)), fault);
}

#[test]
fn unknown_types_and_flags_are_faults() {
    for kind in (0..=5).chain([8, 10]).chain(12..=20).chain([0x106, 0xffff]) {
        assert_eq!(read(24, &descriptor(kind, 2, 2, 0)), RingFault::Kind(kind));
    }
    for flags in [2, 3, 0x8000, 0xffff] {
        assert_eq!(read(24, &descriptor(6, 2, 2, flags)), RingFault::Flags(flags));
    }
}

#[test]
fn ranges_that_do_not_fit_their_header_are_faults() {
    let packet = |kind: u16, offset8: u16, words: &[u32]| {
        let mut packet = descriptor(kind, offset8, 100, 0);
        packet.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        read(1000, &packet)
    };
    for kind in [7, 9] {
        assert_eq!(packet(kind, 2, &[]), RingFault::Ranges { count: 0, bytes: 0 });
        for count in [1, 2, u32::MAX, 1 << 29, 1 << 31] {
            assert_eq!(packet(kind, 3, &[0, count]), RingFault::Ranges { count, bytes: 0 });
        }
        assert_eq!(packet(kind, 4, &[0, 2, 0, 0]), RingFault::Ranges { count: 2, bytes: 8 });
    }
    // The range needs one page number more than there is, or as many as the length can ask for.
    for (len, offset) in [(1, 4096), (4096, 1), (4097, 0), (u32::MAX, u32::MAX), (u32::MAX, 0), (0, u32::MAX)]
    {
        assert_eq!(packet(9, 5, &[0, 1, len, offset, 1, 0]), RingFault::Ranges { count: 1, bytes: 16 });
    }
}

#[test]
fn wish_for_room_that_makes_no_sense_is_answered_at_most_by_a_signal() {
    for pending in [1, 7, 8192, 1 << 31, u32::MAX] {
        let (ring, mut incoming) =
            reader(&[(WRITE_INDEX, 24), (PENDING_SEND_SIZE, pending)], &descriptor(6, 2, 2, 0));
        ring.write(FEATURES, &u32::MAX.to_le_bytes());
        incoming.next(&mut PacketBuffer::new()).unwrap().unwrap();
        ring.write(WRITE_INDEX, &u32::MAX.to_le_bytes());
        assert!(!incoming.commit(), "{pending}");
    }
}

/// A file in memory that is all of a ring.
fn file_and_ring() -> (std::os::fd::OwnedFd, Pages) {
    let (mapping, fd) = Mapping::memfd("guest", 3 << 12).unwrap();
    let region = Region::new(0, 0, 3 << 12, Arc::new(mapping), 0).unwrap();
    let memory = Arc::new(GuestMemory::new(vec![region], None).unwrap());
    let ring = Pages::new(&memory, &[0, 1, 2]).unwrap();
    assert!(clear(&ring));
    (fd, ring)
}

#[test]
fn memory_cut_short_under_a_ring_is_a_fault() {
    let (fd, ring) = file_and_ring();
    let (mut out, mut incoming) = both(&ring);
    rustix::fs::ftruncate(fd.as_fd(), 0).unwrap();
    assert_eq!(incoming.next(&mut PacketBuffer::new()), Err(RingFault::MemoryLost));
    // The writer finds out when it has used up what it knows of.
    let faults = (0..4).map(|_| out.write(&PacketHeader::in_band(0), &[&[0; 4000]]));
    assert!(faults.into_iter().any(|result| result == Err(WriteError::Fault(RingFault::MemoryLost))));
}

/// The guest rewrites a descriptor while it is read. Whatever is seen is one of the two packets or a fault.
#[test]
fn descriptor_that_changes_while_it_is_read_gives_a_whole_packet_or_a_fault() {
    let short = descriptor(6, 2, 3, 0);
    let long = descriptor(6, 3, 200, 1);
    let (ring, mut incoming) = reader(&[(WRITE_INDEX, 2048)], &short);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                ring.write(4096, &long);
                ring.write(4096, &short);
            }
        });
        let mut buffer = PacketBuffer::new();
        let start = incoming.mark();
        for _ in 0..200_000 {
            if let Ok(Some(packet)) = incoming.next(&mut buffer) {
                let seen = (packet.payload.len(), packet.completion_requested);
                assert!(seen == (8, false) || seen == (197 * 8, true), "{seen:?}");
            }
            incoming.rewind(start);
        }
        stop.store(true, Ordering::Relaxed);
    });
}

/// A guest may name one page for everything: control pages and data of both rings. What is written then comes back as what
/// was received, or is a fault; nothing else happens.
#[test]
fn rings_that_are_all_one_page_harm_nobody() {
    let mapping = Arc::new(Mapping::memfd("guest", 2 << 12).unwrap().0);
    let region = Region::new(0, 0, 2 << 12, mapping, 0).unwrap();
    let memory = Arc::new(GuestMemory::new(vec![region], None).unwrap());
    let pages = Pages::new(&memory, &[0; 8]).unwrap();
    let (mut out, mut incoming) = both(&pages);
    let mut buffer = PacketBuffer::new();
    for round in 0..1000u32 {
        let payload = [round.to_le_bytes()[0]; 200];
        let wrote = out.write(&PacketHeader::in_band(round.into()), &[&payload]).is_ok();
        out.publish();
        let taken = incoming.next(&mut buffer).is_ok_and(|packet| packet.is_some());
        incoming.commit();
        incoming.arm();
        if !wrote && !taken {
            break;
        }
    }
    assert_eq!(memory.segment(0x1000, 8).unwrap().read(), Some([0; 8]), "the other page is untouched");
}

/// Pages that the balloon took are zeroes again: an empty ring, or an index that went back.
#[test]
fn ring_whose_pages_went_to_the_balloon_is_empty_or_a_fault() {
    use rustix::fs::{FallocateFlags, fallocate};
    let (fd, ring) = file_and_ring();
    let (mut out, mut incoming) = both(&ring);
    let mut buffer = PacketBuffer::new();
    for _ in 0..3 {
        out.write(&PacketHeader::in_band(0), &[&[0; 500]]).unwrap();
        out.publish();
    }
    incoming.next(&mut buffer).unwrap().unwrap();
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&fd, punch, 0, 3 << 12).unwrap();
    // Two packets were seen to be there: their descriptors are all zero now.
    assert!(matches!(incoming.next(&mut buffer), Err(RingFault::PacketLength { .. })));
    let (_, mut anew) = both(&ring);
    assert_eq!(anew.next(&mut buffer), Ok(None));
    let faults = (0..20).map(|_| out.write(&PacketHeader::in_band(0), &[&[0; 500]]));
    let refused = faults.filter(Result::is_err).collect::<Vec<_>>();
    assert!(!refused.is_empty());
}
