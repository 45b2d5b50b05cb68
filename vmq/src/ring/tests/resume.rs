//! A successor goes on exactly where its predecessor stood, however that one ended.
//!
//! Ends in good order and between two calls are steps of [`super::exchange`]; here is what happens inside a call.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::process::{Child, Command, Stdio};

use super::exchange::{Exchange, Step};
use super::*;
use crate::driver::Token;
use crate::memory::Mapping;

const SIZE: u16 = 8;

fn record() -> Arc<Mapping> {
    Arc::new(Mapping::memfd("record", Inflight::len_for(SIZE, true)).unwrap().0)
}

fn inflight(record: &Arc<Mapping>) -> Inflight {
    Inflight::new(Arc::clone(record), 0, SIZE, true).unwrap()
}

#[test]
fn base_names_both_positions_and_their_wrap_counters() {
    let mut pair = Pair::new(Form::Packed, 3, Features::default());
    let buffer = pair.buffer(4);
    let bases: Vec<_> = (0..7)
        .map(|_| {
            let base = pair.base();
            pair.driver.add(&[buffer], false).unwrap();
            pair.driver.publish();
            pair.serve_one();
            pair.driver.poll_used().unwrap().unwrap();
            base
        })
        .collect();
    assert_eq!(bases[..4], [0x8000_8000, 0x8001_8001, 0x8002_8002, 0]);
    assert_eq!(bases[4..], [0x0001_0001, 0x0002_0002, 0x8000_8000]);
}

#[test]
fn packed_ring_that_ends_at_any_store_of_a_burst_is_taken_over() {
    let add = |pieces: usize| Step::Add { pieces: vec![5; pieces], readable: 1, indirect: false };
    for size in [5, 8, 13] {
        for start in 0..2 * u32::from(size) {
            for points in 0..12 {
                let mut exchange = Exchange::new(Form::Packed, size, Features::default(), true);
                for _ in 0..start {
                    [add(1), Step::Offer, Step::Take(1), Step::Use(1), Step::Return, Step::Reclaim]
                        .iter()
                        .for_each(|step| exchange.run(step));
                }
                [
                    add(1),
                    add(2),
                    add(1),
                    add(1),
                    Step::Offer,
                    Step::Take(9),
                    Step::Use(9),
                    Step::CrashIn(points),
                ]
                .iter()
                .for_each(|step| exchange.run(step));
                exchange.drain();
            }
        }
    }
}

#[test]
fn record_between_its_step_and_the_ring_resumes_at_what_the_driver_saw() {
    let (old, new) = ((6, true), (1, false));
    let record = record();
    let inflight = inflight(&record);
    inflight.start(SIZE, old.0, old.1);
    assert_eq!(inflight.resume_packed(SIZE, |_, _| true), Some(old));
    inflight.prepare(old, new);
    // The descriptor is as it was: the step never became visible.
    assert_eq!(inflight.resume_packed(SIZE, |at, wrap| (at, wrap) == old), Some(old));
    // It is used, or used and made available again for the next round.
    assert_eq!(inflight.resume_packed(SIZE, |at, wrap| (at, wrap) == (old.0, !old.1)), Some(new));
    inflight.settle(new.0, new.1);
    assert_eq!(inflight.resume_packed(SIZE, |_, _| true), Some(new));
}

#[test]
fn record_of_another_size_or_with_nonsense_is_not_believed() {
    let (arena, fd) = Mapping::memfd("record", 4096).unwrap();
    let record = Arc::new(arena);
    let bytes = memory_over(&fd);
    let inflight = inflight(&record);
    assert_eq!(inflight.resume_packed(SIZE, |_, _| true), None, "never started");
    inflight.start(SIZE, 3, true);
    assert_eq!(inflight.resume_packed(SIZE + 1, |_, _| true), None);
    assert_eq!(inflight.resume_packed(3, |_, _| true), None);
    bytes.room(16, 2).unwrap().write(&SIZE.to_le_bytes());
    assert_eq!(inflight.resume_packed(SIZE, |_, _| true), None);
    bytes.room(16, 4).unwrap().write(&[3, 0, 0xff, 0xff]);
    assert_eq!(inflight.resume_packed(SIZE, |_, _| true), None);
}

fn memory_over(fd: &impl AsFd) -> GuestMemory {
    let mapping = Arc::new(Mapping::shared(fd.as_fd(), 0, 4096).unwrap());
    GuestMemory::new(vec![Region::new(0, 0, 4096, mapping, 0).unwrap()], None).unwrap()
}

#[test]
fn record_that_exceeds_its_file_or_is_not_aligned_is_refused() {
    let record = record();
    let len = record.len();
    assert_eq!(len, 320);
    assert!(Inflight::new(Arc::clone(&record), 0, SIZE, true).is_some());
    assert!(Inflight::new(Arc::clone(&record), 8, SIZE, true).is_none());
    assert!(Inflight::new(Arc::clone(&record), 4, 1, true).is_none());
    assert!(Inflight::new(Arc::clone(&record), 0, MAX_SIZE, true).is_none());
    assert!(Inflight::new(Arc::clone(&record), usize::MAX - 7, 1, true).is_none());
}

/// Ring, record and positions that the process to be killed needs, as arguments in its environment.
const ROLE: &str = "SWITCHYARD_KILLED_DEVICE";
const LEN: usize = 1 << 20;
const RECORD_LEN: usize = 1 << 16;

/// Serves the ring that [`ROLE`] names until it is killed: answers each chain's number with its complement.
#[test]
#[ignore = "started, and killed, by killed_device_loses_and_repeats_nothing"]
fn device_to_be_killed() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let words: Vec<u64> = role.split(' ').map(|word| word.parse().unwrap()).collect();
    let [parent, guest, record, size, packed, descriptors, driver, device] = words[..] else {
        panic!("bad role")
    };
    let open = |fd, len| {
        let file = File::options().read(true).write(true).open(format!("/proc/{parent}/fd/{fd}")).unwrap();
        Arc::new(Mapping::shared(file.as_fd(), 0, len).unwrap())
    };
    let region = Region::new(GUEST, GUEST + USER, LEN as u64, open(guest, LEN), 0).unwrap();
    let memory = GuestMemory::new(vec![region], None).unwrap();
    let (size, packed) = (u16::try_from(size).unwrap(), packed == 1);
    let base = if packed {
        fresh(Form::Packed)
    } else {
        u32::from(u16::from_le_bytes(memory.segment(device - USER + 2, 2).unwrap().read().unwrap()))
    };
    let at = RingAddresses { descriptors, driver, device, log: None };
    let mut ring = Ring::new(&memory, packed, size, at, base, false).unwrap();
    let inflight = Inflight::new(open(record, RECORD_LEN), 0, size, packed).unwrap();
    with_ring!(&mut ring, ring => {
        ring.track(inflight);
        while u64::from(std::os::unix::process::parent_id()) == parent {
            ring.refresh().unwrap();
            let before = ring.mark();
            while let Some(chain) = ring.pop(&memory).unwrap() {
                let (asked, answer) = match ring.descriptors(&chain) {
                    [asked, .., answer] => (*asked, *answer),
                    other => panic!("chain of {}", other.len()),
                };
                let number: [u8; 8] = memory.segment(asked.addr, asked.len).unwrap().read().unwrap();
                memory.room(answer.addr, answer.len).unwrap().write(&number.map(|byte| !byte));
                ring.push_used(&chain, 8);
            }
            ring.publish();
            if ring.mark() == before {
                std::thread::yield_now();
            }
        }
    });
}

/// The guest of a device that is killed again and again.
struct Survivor {
    arena: Arena,
    driver: DriverRing,
    record_fd: std::os::fd::OwnedFd,
    _record: Mapping,
    data: u64,
    sent: u64,
    out: VecDeque<Token>,
}

impl Survivor {
    fn new(form: Form, size: u16) -> Self {
        let arena = Arena::new(GUEST, LEN).unwrap();
        let features = Features { indirect: true, ..Features::default() };
        let driver = DriverRing::new(&arena, form, size, features).unwrap();
        let (record, record_fd) = Mapping::memfd("record", RECORD_LEN).unwrap();
        let data = arena.alloc(32 * u64::from(size), 8).unwrap();
        Self { arena, driver, record_fd, _record: record, data, sent: 0, out: VecDeque::new() }
    }

    fn start_device(&self) -> Child {
        let at = addresses_of(&self.driver);
        let packed = u8::from(self.driver.form() == Form::Packed);
        let (guest, record) = (self.arena.fd().as_raw_fd(), self.record_fd.as_raw_fd());
        let RingAddresses { descriptors, driver, device, .. } = at;
        let (pid, size) = (std::process::id(), self.driver.size());
        let role = format!("{pid} {guest} {record} {size} {packed} {descriptors} {driver} {device}");
        Command::new(std::env::current_exe().unwrap())
            .args(["ring::tests::resume::device_to_be_killed", "--exact", "--ignored", "--nocapture"])
            .env(ROLE, role)
            .stdout(Stdio::null())
            .spawn()
            .unwrap()
    }

    fn place(&self, number: u64) -> u64 {
        self.data + 32 * (number % u64::from(self.driver.size()))
    }

    /// Fills the ring, then checks what came back; returns how many did.
    fn turn(&mut self) -> u64 {
        loop {
            let place = self.place(self.sent);
            let piece = |at, len, writable| Buffer { addr: place + at, len, writable };
            let buffers = [piece(0, 8, false), piece(8, 8, false), piece(16, 8, true)];
            let used = if self.sent.is_multiple_of(2) { &buffers[..] } else { &[buffers[0], buffers[2]] };
            if self.driver.free() < 3 {
                break;
            }
            self.arena.write_u64(place, self.sent);
            self.arena.write_u64(place + 16, 0);
            self.out.push_back(self.driver.add(used, self.sent.is_multiple_of(5)).unwrap());
            self.sent += 1;
        }
        self.driver.publish();
        let mut returned = 0;
        while let Some(used) = self.driver.poll_used().unwrap() {
            let number = self.sent - self.out.len() as u64;
            assert_eq!((Some(used.token), used.len), (self.out.pop_front(), 8));
            assert_eq!(self.arena.read_u64(self.place(number) + 16), !number);
            returned += 1;
        }
        returned
    }

    /// Turns until `count` chains came back. A ring that stands still would hang the test, hence the limit.
    fn run(&mut self, count: u64) {
        let started = std::time::Instant::now();
        let mut returned = 0;
        while returned < count {
            let now = self.turn();
            returned += now;
            if now == 0 {
                std::thread::yield_now();
                assert!(started.elapsed().as_secs() < 60, "ring stands still");
            }
        }
    }

    /// Keeps `device` at work until it was killed, some time after now.
    fn run_to_death(&mut self, device: &mut Child, after: std::time::Duration) {
        let pid = rustix::process::Pid::from_child(device);
        std::thread::scope(|scope| {
            scope.spawn(move || {
                std::thread::sleep(after);
                rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
            });
            while device.try_wait().unwrap().is_none() {
                (0..10).for_each(|_| _ = self.turn());
            }
        });
    }
}

/// A device that is killed at the latest when the test ends.
struct Mortal(Child);

impl Drop for Mortal {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn killed_device_loses_and_repeats_nothing() {
    for (form, size) in [(Form::Packed, 61), (Form::Split, 64)] {
        let mut survivor = Survivor::new(form, size);
        for round in 0..80u64 {
            let mut device = Mortal(survivor.start_device());
            survivor.run(1 + round * 977 % 300);
            survivor.run_to_death(&mut device.0, std::time::Duration::from_micros(round * 37 % 400));
        }
        let _device = Mortal(survivor.start_device());
        survivor.run(survivor.out.len() as u64);
        assert!(survivor.sent > 10_000);
    }
}
