//! A guest and a device that exchange chains, step by step, with a model of what each must see.

use std::collections::VecDeque;

use super::*;
use crate::driver::Token;
use crate::memory::Mapping;

/// Bytes of data memory for each chain that is out.
const DATA: u64 = 4096;

/// One step. Numbers are limits; a step that has nothing to do does nothing.
#[derive(Debug, Clone)]
pub(super) enum Step {
    /// The driver adds a chain with pieces of these lengths, of which the first `readable` are to be read.
    Add { pieces: Vec<u8>, readable: usize, indirect: bool },
    /// The driver publishes.
    Offer,
    /// The driver takes back everything that is shown.
    Reclaim,
    /// The device looks and takes up to so many chains.
    Take(usize),
    /// The device gives back all but the first so many of those it has taken.
    Rewind(usize),
    /// The device is done with up to so many of those it has taken.
    Use(usize),
    /// The device publishes.
    Return,
    /// The device asks for doorbells, or says it needs none.
    DeviceSleeps(bool),
    /// The driver asks for interrupts, or says it needs none.
    DriverSleeps(bool),
    /// The device ends in good order, and a successor starts at its base.
    Restart,
    /// The device ends without notice, and a successor starts from what is in shared memory.
    Crash,
    /// As `Crash`, but in the midst of publishing, after so many steps; the driver works on before the successor comes.
    CrashIn(u32),
}

/// A chain on its way.
#[derive(Debug, Clone)]
struct Sent {
    number: u64,
    token: Token,
    buffers: Vec<Buffer>,
}

pub(super) struct Exchange {
    pub(super) pair: Pair,
    features: Features,
    record: Option<Arc<Mapping>>,
    data: u64,
    sent: u64,
    added: VecDeque<Sent>,
    available: VecDeque<Sent>,
    taken: VecDeque<(Mark, Chain, Sent)>,
    /// Used, with the length; shown to the driver if before `shown`.
    used: VecDeque<(Sent, u32)>,
    shown: usize,
    pub(super) returned: u64,
    device_sleeps: bool,
    driver_sleeps: bool,
    /// Doorbells and interrupts since the last time each side asked for them; and the asks themselves.
    pub(super) kicks: u64,
    pub(super) interrupts: u64,
}

impl Exchange {
    pub(super) fn new(form: Form, size: u16, features: Features, tracked: bool) -> Self {
        let pair = Pair::new(form, size, features);
        let data = pair.arena.alloc(DATA * (u64::from(size) + 1), 16).unwrap();
        let record =
            tracked.then(|| Arc::new(Mapping::memfd("record", Inflight::len_for(size, true)).unwrap().0));
        let mut exchange = Self {
            pair,
            features,
            record,
            data,
            sent: 0,
            added: VecDeque::new(),
            available: VecDeque::new(),
            taken: VecDeque::new(),
            used: VecDeque::new(),
            shown: 0,
            returned: 0,
            device_sleeps: false,
            driver_sleeps: false,
            kicks: 0,
            interrupts: 0,
        };
        exchange.track();
        exchange
    }

    /// Lets a split ring's indices start anywhere.
    pub(super) fn start_at(&mut self, index: u16) {
        if let DriverRing::Split(driver) = &mut self.pair.driver {
            driver.start_at(index);
            self.replace_device(u32::from(index));
        }
    }

    pub(super) fn run(&mut self, step: &Step) {
        match *step {
            Step::Add { ref pieces, readable, indirect } => self.add(pieces, readable, indirect),
            Step::Offer => self.offer(),
            Step::Reclaim => self.reclaim(),
            Step::Take(count) => self.take(count),
            Step::Rewind(keep) => self.rewind(keep),
            Step::Use(count) => self.use_up(count),
            Step::Return => self.give_back(),
            Step::DeviceSleeps(sleeps) => self.device_sleeps(sleeps),
            Step::DriverSleeps(sleeps) => self.driver_sleeps(sleeps),
            Step::Restart => self.restart(),
            Step::Crash => self.crash(),
            Step::CrashIn(points) => self.crash_in(points),
        }
    }

    /// Lets everything that is under way arrive.
    pub(super) fn drain(&mut self) {
        self.offer();
        while !self.available.is_empty() || !self.taken.is_empty() {
            self.take(usize::MAX);
            self.use_up(usize::MAX);
        }
        self.give_back();
        self.reclaim();
        assert_eq!(self.returned, self.sent);
        assert_eq!(self.pair.driver.free(), self.pair.driver.size());
    }

    /// The bytes that a chain's readable pieces carry, and those that the device answers.
    fn byte(number: u64, at: u64, answer: bool) -> u8 {
        let mixed = (number.wrapping_mul(31) + at).wrapping_mul(7) + u64::from(answer);
        u8::try_from(mixed % 251).unwrap()
    }

    fn add(&mut self, pieces: &[u8], readable: usize, indirect: bool) {
        // Chains come back in order, so this one's memory is free once it fits into the ring.
        let place = self.data + DATA * (self.sent % (u64::from(self.pair.driver.size()) + 1));
        let mut at = 0;
        let buffers: Vec<Buffer> = (pieces.iter().enumerate())
            .map(|(i, &len)| {
                let buffer = Buffer { addr: place + at, len: u32::from(len), writable: i >= readable };
                at += u64::from(len);
                buffer
            })
            .collect();
        assert!(at <= DATA);
        let Some(token) = self.pair.driver.add(&buffers, indirect) else { return };
        let bytes: Vec<u8> = (0..at).map(|at| Self::byte(self.sent, at, false)).collect();
        self.pair.arena.write(place, &bytes);
        assert!(self.all_out().all(|sent| sent.token != token), "token is out already");
        self.added.push_back(Sent { number: self.sent, token, buffers });
        self.sent += 1;
    }

    fn all_out(&self) -> impl Iterator<Item = &Sent> {
        let taken = self.taken.iter().map(|(.., sent)| sent);
        let used = self.used.iter().map(|(sent, _)| sent);
        self.added.iter().chain(&self.available).chain(taken).chain(used)
    }

    fn offer(&mut self) {
        let idle = self.available.is_empty();
        let count = self.added.len();
        let kick = self.pair.driver.publish();
        self.available.append(&mut self.added);
        self.kicks += u64::from(kick);
        if self.device_sleeps && idle && count > 0 {
            assert!(kick, "device sleeps and nobody wakes it");
        }
        assert!(!kick || count > 0, "doorbell for nothing");
        if kick {
            self.device_sleeps = false;
        }
    }

    fn reclaim(&mut self) {
        while let Some(used) = self.pair.driver.poll_used().unwrap() {
            assert!(self.shown > 0, "chain came back before it was published");
            let (sent, len) = self.used.pop_front().unwrap();
            assert_eq!((used.token, used.len), (sent.token, len));
            let (mut at, mut left) = (0, len);
            for buffer in &sent.buffers {
                let mut bytes = vec![0; usize::try_from(buffer.len).unwrap()];
                self.pair.arena.read(buffer.addr, &mut bytes);
                for byte in bytes {
                    let answer = buffer.writable && left > 0;
                    assert_eq!(byte, Self::byte(sent.number, at, answer));
                    (at, left) = (at + 1, left - u32::from(answer));
                }
            }
            self.shown -= 1;
            self.returned += 1;
        }
        assert_eq!(self.shown, 0, "published chain did not come back");
    }

    fn take(&mut self, count: usize) {
        self.pair.refresh().unwrap();
        for _ in 0..count {
            let mark = self.pair.mark();
            let Some(chain) = self.pair.pop().unwrap() else {
                assert!(self.available.is_empty(), "available chain is not seen");
                return;
            };
            let sent = self.available.pop_front().expect("chain was seen before it was published");
            assert_eq!(chain.id, sent.token.0);
            let seen = self.pair.descriptors(&chain);
            let seen = seen.iter().map(|d| Buffer { addr: d.addr, len: d.len, writable: d.is_writable() });
            let seen: Vec<_> = seen.collect();
            assert_eq!(seen, sent.buffers);
            assert_eq!(chain.is_single(), seen.len() == 1);
            self.taken.push_back((mark, chain, sent));
        }
    }

    fn rewind(&mut self, keep: usize) {
        if let Some(&(mark, ..)) = self.taken.get(keep) {
            self.pair.rewind(mark);
            for (.., sent) in self.taken.drain(keep..).rev() {
                self.available.push_front(sent);
            }
        }
    }

    fn use_up(&mut self, count: usize) {
        for _ in 0..count.min(self.taken.len()) {
            let Some((_, chain, sent)) = self.taken.pop_front() else { return };
            let (mut at, mut len) = (0, 0);
            for buffer in &sent.buffers {
                let answer: Vec<u8> = (at..at + u64::from(buffer.len))
                    .map(|at| Self::byte(sent.number, at, buffer.writable))
                    .collect();
                let segment = self.pair.memory.segment(buffer.addr, buffer.len).unwrap();
                if buffer.writable {
                    self.pair.memory.room(buffer.addr, buffer.len).unwrap().write(&answer);
                    len += buffer.len;
                } else {
                    let mut bytes = vec![0; answer.len()];
                    segment.read_into(&mut bytes);
                    assert_eq!(bytes, answer);
                }
                at += u64::from(buffer.len);
            }
            self.pair.push_used(&chain, len);
            self.used.push_back((sent, len));
        }
    }

    fn give_back(&mut self) {
        let count = self.used.len() - self.shown;
        let none_waits = self.shown == 0;
        let interrupt = self.pair.publish();
        self.shown = self.used.len();
        self.interrupts += u64::from(interrupt);
        if self.driver_sleeps && none_waits && count > 0 {
            assert!(interrupt, "driver sleeps and nobody wakes it");
        }
        assert!(!interrupt || count > 0, "interrupt for nothing");
        if interrupt {
            self.driver_sleeps = false;
        }
        // Descriptors of chains that are still held are gone with the burst; their ids are not.
    }

    fn device_sleeps(&mut self, sleeps: bool) {
        if !sleeps {
            self.pair.disarm();
            self.device_sleeps = false;
            return;
        }
        let work = self.pair.arm();
        assert_eq!(work, !self.available.is_empty(), "arm() tells whether there is work");
        self.device_sleeps = !work;
    }

    fn driver_sleeps(&mut self, sleeps: bool) {
        if !sleeps {
            self.pair.driver.disable_interrupts();
            self.driver_sleeps = false;
            return;
        }
        let work = self.pair.driver.enable_interrupts();
        assert_eq!(work, self.shown > 0);
        self.driver_sleeps = !work;
    }

    fn restart(&mut self) {
        self.rewind(0);
        self.give_back();
        let base = self.pair.base();
        self.replace_device(base);
        assert_eq!(self.pair.base(), base);
    }

    fn crash(&mut self) {
        if self.pair.driver.form() == Form::Packed && self.record.is_none() {
            // Without a record nothing in shared memory says where a packed ring stands.
            return self.restart();
        }
        // What was taken, or used but not shown, is available again.
        self.rewind_all(self.shown);
        // Whoever starts a successor interrupts the driver once: the predecessor may have owed it that.
        self.driver_sleeps = false;
        let used_index = self.pair.arena.read_u16(self.pair.driver.addresses().device + 2);
        let base = if self.pair.driver.form() == Form::Split { u32::from(used_index) } else { 0x8000_8000 };
        self.replace_device(base);
    }

    /// Of what was used, the first `shown` stay so.
    fn rewind_all(&mut self, shown: usize) {
        for (.., sent) in self.taken.drain(..).rev() {
            self.available.push_front(sent);
        }
        for (sent, _) in self.used.drain(shown..).rev() {
            self.available.push_front(sent);
        }
    }

    fn crash_in(&mut self, points: u32) {
        if self.record.is_none() {
            self.give_back();
            return self.crash();
        }
        if survives(points, || _ = self.pair.publish()) {
            self.shown = self.used.len();
            return self.crash();
        }
        // Only the driver can tell how much of the burst it was shown.
        while let Some(used) = self.pair.driver.poll_used().unwrap() {
            let (sent, len) = self.used.pop_front().expect("chain came back before it was used");
            assert_eq!((used.token, used.len), (sent.token, len));
            self.returned += 1;
        }
        self.shown = 0;
        self.rewind_all(0);
        // It makes the slots it got back available again, while there is no device.
        (0..2).for_each(|_| self.add(&[7], 1, false));
        self.offer();
        self.crash();
    }

    fn replace_device(&mut self, base: u32) {
        self.pair.device = device_of(&self.pair.memory, &self.pair.driver, self.features.event_idx, base);
        self.device_sleeps = false;
        self.track();
    }

    fn track(&mut self) {
        let Some(record) = &self.record else { return };
        let packed = self.pair.driver.form() == Form::Packed;
        let inflight = Inflight::new(Arc::clone(record), 0, self.pair.driver.size(), packed).unwrap();
        with_ring!(&mut self.pair.device, ring => ring.track(inflight));
    }
}
