use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use super::*;

const HEADER: PacketHeader<'static> =
    PacketHeader { kind: PacketKind::InBand, completion_requested: false, transaction: 0 };

fn write(out: &mut Outgoing, len: usize) -> bool {
    out.write(&HEADER, &[&vec![0; len]]).unwrap();
    out.publish()
}

fn drain(incoming: &mut Incoming) -> bool {
    let mut buffer = PacketBuffer::new();
    while incoming.next(&mut buffer).unwrap().is_some() {}
    incoming.commit()
}

#[test]
fn writer_signals_only_an_empty_ring_that_is_not_masked() {
    let ring = ring(1);
    let (mut out, mut incoming) = both(&ring);
    assert!(!out.publish(), "nothing was written");
    assert!(write(&mut out, 8), "empty before");
    assert!(!write(&mut out, 8), "not empty");
    assert!(!drain(&mut incoming));
    incoming.disarm();
    assert!(!write(&mut out, 8), "masked");
    assert!(incoming.arm(), "data came while signals were masked");
    drain(&mut incoming);
    assert!(!incoming.arm());
    assert!(write(&mut out, 8), "unmasked and empty");
}

#[test]
fn burst_is_signalled_once() {
    let ring = ring(1);
    let (mut out, _incoming) = both(&ring);
    for _ in 0..5 {
        out.write(&HEADER, &[&[1; 8]]).unwrap();
    }
    assert!(out.publish());
    assert!(!out.publish());
}

#[test]
fn writer_that_waits_is_signalled_when_its_room_becomes_enough_and_only_then() {
    let ring = ring(1);
    let (mut out, mut incoming) = both(&ring);
    // 15 packets of 256 bytes leave 256 free, which is not strictly more than what one more needs.
    for _ in 0..15 {
        assert!(out.wait_for_room(232));
        write(&mut out, 232);
    }
    assert_eq!(word(&ring, PENDING_SEND_SIZE), 0);
    assert!(!out.wait_for_room(3 * 256 - 24));
    assert_eq!(word(&ring, PENDING_SEND_SIZE), 3 * 256);
    let mut buffer = PacketBuffer::new();
    let mut take = |incoming: &mut Incoming| {
        incoming.next(&mut buffer).unwrap().unwrap();
        incoming.commit()
    };
    // Free: 512, 768, 1024: more than 768 only after the third.
    assert!(!take(&mut incoming) && !take(&mut incoming));
    assert!(take(&mut incoming));
    assert!(!take(&mut incoming), "there was room before");
    write(&mut out, 3 * 256 - 24);
    assert_eq!(word(&ring, PENDING_SEND_SIZE), 0, "the wish ends with success");
}

#[test]
fn writer_without_the_feature_bit_is_not_signalled_for_room() {
    let ring = ring(1);
    let (mut out, mut incoming) = both(&ring);
    for _ in 0..15 {
        write(&mut out, 232);
    }
    assert!(!out.wait_for_room(232));
    ring.write(FEATURES, &0u32.to_le_bytes());
    assert!(!drain(&mut incoming));
    assert!(out.room(232));
}

#[test]
fn room_that_came_before_the_wish_was_seen_is_found_at_once() {
    let ring = ring(1);
    let (mut out, mut incoming) = both(&ring);
    for _ in 0..15 {
        write(&mut out, 232);
    }
    drain(&mut incoming);
    assert!(out.wait_for_room(232));
    assert_eq!(word(&ring, PENDING_SEND_SIZE), 0);
}

/// What a side sleeps on. It spins, so that both sides meet at every instant of each other's decisions.
#[derive(Default)]
struct Bell(AtomicBool);

impl Bell {
    fn ring(&self) {
        self.0.store(true, Ordering::Release);
    }

    fn clear(&self) {
        self.0.store(false, Ordering::Relaxed);
    }

    /// False if it was not rung for far longer than anything takes.
    fn sleep(&self) -> bool {
        let start = Instant::now();
        for round in 1u32.. {
            if self.0.load(Ordering::Acquire) {
                return true;
            }
            if round.is_multiple_of(1 << 10) {
                std::thread::yield_now();
                if start.elapsed() > Duration::from_secs(60) {
                    break;
                }
            }
        }
        false
    }
}

/// Two threads that sleep whenever the rules let them, over a ring so small that both often do.
fn sleepers(packets: u64, lens: usize) {
    let ring = ring(1);
    let (mut out, mut incoming) = both(&ring);
    let (reader, writer) = (Bell::default(), Bell::default());
    let publish = |out: &mut Outgoing| {
        if out.publish() {
            reader.ring();
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for transaction in 0..packets {
                let payload = &[0xa5; 1000][..usize::try_from(transaction * 37).unwrap() % lens];
                let header = PacketHeader::in_band(transaction);
                while let Err(error) = out.write(&header, &[payload]) {
                    assert_eq!(error, WriteError::Full);
                    publish(&mut out);
                    writer.clear();
                    assert!(out.wait_for_room(payload.len()) || writer.sleep(), "the writer was not woken");
                }
                publish(&mut out);
            }
        });
        let mut buffer = PacketBuffer::new();
        let mut expected = 0;
        while expected < packets {
            while let Some(packet) = incoming.next(&mut buffer).unwrap() {
                assert_eq!(packet.transaction, expected);
                expected += 1;
            }
            if incoming.commit() {
                writer.ring();
            }
            reader.clear();
            assert!(expected == packets || incoming.arm() || reader.sleep(), "the reader was not woken");
            incoming.disarm();
        }
    });
}

#[test]
fn reader_never_sleeps_on_a_ring_with_packets() {
    sleepers(1_000_000, 8);
}

#[test]
fn writer_never_sleeps_on_a_ring_with_room() {
    sleepers(300_000, 1000);
}
