//! What survives a back-end: the dirty log for a migration, the in-flight record for a crash.

use std::collections::BTreeSet;
use std::os::fd::AsFd;

use vmq::driver::Form;
use vmq::memory::{GuestMemory, Mapping, Region};

use super::rig::*;
use crate::ports::vhost_user::features::{Features, Protocol};
use crate::ports::vhost_user::message::{LogArea, Request};

const LOG_AT: u64 = 24;
const LOG_LEN: u64 = (GUEST + MEMORY as u64) / 4096 / 8;

/// The dirty log as the migrating process sees it.
struct Log {
    memory: GuestMemory,
    fd: std::os::fd::OwnedFd,
    len: u32,
}

impl Log {
    fn new() -> Self {
        let (mapping, fd) = Mapping::memfd("log", 4096).unwrap();
        let region = Region::new(0, 0, 4096, mapping.into(), 0).unwrap();
        Self { memory: GuestMemory::new(vec![region], None).unwrap(), fd, len: 4096 }
    }

    /// The pages marked since the last look.
    fn take(&self) -> BTreeSet<u64> {
        let mut bytes = vec![0; self.len as usize];
        self.memory.segment(0, self.len).unwrap().read_into(&mut bytes);
        self.memory.room(0, self.len).unwrap().write(&vec![0; self.len as usize]);
        let at = usize::try_from(LOG_AT).unwrap();
        assert!(bytes[..at].iter().all(|&byte| byte == 0), "marks before the log");
        let bits = bytes[at..].iter().enumerate();
        bits.flat_map(|(byte, &bits)| {
            (0..8u64).filter(move |bit| bits >> bit & 1 == 1).map(move |bit| byte as u64 * 8 + bit)
        })
        .collect()
    }
}

fn pages(addresses: impl IntoIterator<Item = u64>) -> BTreeSet<u64> {
    addresses.into_iter().map(|gpa| gpa / 4096).collect()
}

#[test]
fn dirty_log_marks_exactly_what_was_written_while_it_was_on() {
    for form in [Form::Split, Form::Packed] {
        let mut guest = Guest::new(form, 1);
        let mut lab = Lab::new(pairs(1));
        guest.start(&mut lab.front, Protocol::REPLY_ACK | Protocol::LOG_SHMFD, guest.fresh());
        guest.round_trip(0, &lab.port, 3);
        let log = Log::new();
        let area = LogArea { size: LOG_LEN.into(), offset: LOG_AT.into() };
        lab.front.tell(&Request::SetLogBase(area), &[log.fd.as_fd()]).unwrap();
        guest.round_trip(0, &lab.port, 3);
        assert_eq!(log.take(), BTreeSet::new(), "nothing asks for marks yet");

        let on = guest.features() | Features::LOG_ALL;
        lab.front.tell(&Request::SetFeatures(on.bits()), &[]).unwrap();
        let buffers = guest.post(0, 3);
        guest.send(0, &[1; 100]);
        guest.send(0, &[2; 1900]);
        assert_eq!(lab.port.echo(0), 2);
        assert_eq!(log.take(), pages(buffers[..2].iter().copied()), "used rings are not logged yet");

        let rings = [&guest.pairs[0].receive, &guest.pairs[0].transmit];
        let used: Vec<u64> = rings.iter().map(|ring| ring.addresses().device).collect();
        for (index, ring) in (0..).zip(rings) {
            let addresses =
                vmq::ring::RingAddresses { log: Some(ring.addresses().device), ..Guest::addresses(ring) };
            lab.front.set_addresses(index, &addresses).unwrap();
        }
        guest.send(0, &[3; 100]);
        assert_eq!(lab.port.echo(0), 1);
        assert_eq!(log.take(), pages(buffers[2..].iter().chain(&used).copied()));
        assert_eq!(guest.received(0).len(), 3);
        assert_eq!(guest.reclaim(0), 3);

        lab.front.tell(&Request::SetFeatures(guest.features().bits()), &[]).unwrap();
        guest.round_trip(0, &lab.port, 3);
        assert_eq!(log.take(), BTreeSet::new());
        lab.leave().unwrap();
    }
}

#[test]
fn crash_with_frames_in_flight_neither_loses_nor_repeats_one() {
    for form in [Form::Split, Form::Packed] {
        let mut guest = Guest::new(form, 1);
        let protocol = Protocol::REPLY_ACK | Protocol::INFLIGHT_SHMFD;
        let mut lab = Lab::new(pairs(1));
        lab.front.negotiate(guest.features(), protocol).unwrap();
        let (area, record) = lab.front.new_inflight(2, ENTRIES).unwrap();
        lab.front.tell(&Request::SetInflightFd(area), &[record.as_fd()]).unwrap();
        lab.front.show_memory(&[guest.region()], &[guest.arena.fd()]).unwrap();
        guest.start_rings(&mut lab.front, &[guest.fresh(); 2]);
        for round in 0..40u8 {
            guest.round_trip(0, &lab.port, 5);
            guest.post(0, 2);
            guest.send(0, &[round; 80]);
            guest.send(0, &[round; 90]);
            assert_eq!(lab.port.take_and_crash(0), 2);
            lab.leave().unwrap();
            assert_eq!(guest.reclaim(0), 0);

            // The successor is told a base that was right long ago; the record knows better.
            lab = Lab::new(pairs(1));
            lab.front.negotiate(guest.features(), protocol).unwrap();
            lab.front.tell(&Request::SetInflightFd(area), &[record.as_fd()]).unwrap();
            lab.front.show_memory(&[guest.region()], &[guest.arena.fd()]).unwrap();
            guest.start_rings(&mut lab.front, &[guest.fresh(); 2]);
            assert_eq!(lab.port.echo(0), 2);
            assert_eq!(guest.received(0), [vec![round; 80], vec![round; 90]]);
            assert_eq!(guest.reclaim(0), 2);
        }
        lab.leave().unwrap();
    }
}
