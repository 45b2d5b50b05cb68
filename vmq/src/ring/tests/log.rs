//! The ring's own writes in the dirty log.

use super::*;
use crate::memory::{DirtyLog, Mapping, PAGE};

const LEN: usize = 4 << 20;

/// A guest with a log, and the ring's device side with logging on.
struct Logged {
    pair: Pair,
    bitmap: Arena,
}

impl Logged {
    fn new(form: Form, size: u16, event_idx: bool) -> Self {
        let features = Features { event_idx, ..Features::default() };
        let arena = Arena::new(0, LEN).unwrap();
        let bitmap = Arena::new(0, LEN / 4096 / 8).unwrap();
        // One page apart at least, so that each part's marks can be told from the others'.
        let driver = DriverRing::new(&arena, form, size, features).unwrap();
        let memory = |log| {
            let region = Region::new(0, USER, LEN as u64, Arc::clone(arena.mapping()), 0).unwrap();
            GuestMemory::new(vec![region], log).unwrap()
        };
        let log = DirtyLog::new(Arc::clone(bitmap.mapping()), 0, bitmap.len()).unwrap();
        let memory = memory(Some(log));
        let at = RingAddresses { log: Some(driver.addresses().device), ..addresses_of(&driver) };
        let device = Ring::new(&memory, form == Form::Packed, size, at, fresh(form), event_idx).unwrap();
        Self { pair: Pair { arena, memory, driver, device }, bitmap }
    }

    /// The pages marked since the last call.
    fn marked(&self) -> Vec<u64> {
        let mut bytes = vec![0u8; LEN / 4096 / 8];
        self.bitmap.read(0, &mut bytes);
        self.bitmap.write(0, &vec![0; bytes.len()]);
        let bits = bytes.iter().flat_map(|byte| (0..8).map(move |bit| byte & 1 << bit != 0));
        (0..).zip(bits).filter(|&(_, marked)| marked).map(|(page, _)| page).collect()
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; LEN];
        self.pair.arena.read(0, &mut bytes);
        bytes
    }

    /// Lets the device act and checks that exactly the pages are marked that it may have written: those that changed,
    /// and no other than `allowed`.
    fn check(&mut self, allowed: &[u64], act: impl FnOnce(&mut Pair)) {
        self.marked();
        let before = self.bytes();
        act(&mut self.pair);
        let after = self.bytes();
        let marked = self.marked();
        for (page, (old, new)) in before.chunks(4096).zip(after.chunks(4096)).enumerate() {
            assert!(old == new || marked.contains(&(page as u64)), "page {page} changed and is not marked");
        }
        assert!(
            marked.iter().all(|page| allowed.contains(page)),
            "{marked:?} are marked, {allowed:?} written"
        );
    }
}

fn offer(pair: &mut Pair, count: usize) {
    let buffer = Buffer { addr: 0, len: 4, writable: true };
    (0..count).for_each(|_| assert!(pair.driver.add(&[buffer], false).is_some()));
    pair.driver.publish();
}

fn serve(pair: &mut Pair, count: usize) {
    for _ in 0..count {
        let chain = pair.take().unwrap().unwrap();
        pair.push_used(&chain, 4);
    }
    pair.publish();
}

#[test]
fn used_entries_index_and_event_of_a_split_ring_mark_their_pages_only() {
    let mut logged = Logged::new(Form::Split, 1024, true);
    let device = logged.pair.driver.addresses().device;
    let page = |offset: u64| (device + offset) / PAGE;
    offer(&mut logged.pair, 1024);
    logged.check(&[page(2), page(4), page(11)], |pair| serve(pair, 1));
    logged.check(&[page(2), page(12), page(4 + 8 * 700)], |pair| serve(pair, 500));
    logged
        .check(&[page(2), page(4 + 8 * 501), page(4 + 8 * 523), page(4 + 8 * 1023)], |pair| serve(pair, 523));
    logged.check(&[page(4 + 8 * 1024)], |pair| assert!(!pair.arm()));
}

#[test]
fn flags_of_a_split_ring_mark_their_page() {
    let mut logged = Logged::new(Form::Split, 1024, false);
    let page = logged.pair.driver.addresses().device / PAGE;
    logged.check(&[page], Pair::disarm);
    logged.check(&[page], |pair| assert!(!pair.arm()));
}

#[test]
fn used_descriptors_and_event_of_a_packed_ring_mark_their_pages_only() {
    let mut logged = Logged::new(Form::Packed, 1000, true);
    let at = logged.pair.driver.addresses();
    let page = |slot: u64| (at.descriptors + 16 * slot) / PAGE;
    for _ in 0..2 {
        offer(&mut logged.pair, 1000);
        logged.check(&[page(0)], |pair| serve(pair, 1));
        logged.check(&[page(1), page(299)], |pair| serve(pair, 299));
        logged.check(&[page(300), page(600), page(800), page(999)], |pair| serve(pair, 700));
        while logged.pair.driver.poll_used().unwrap().is_some() {}
    }
    logged.check(&[at.device / PAGE], Pair::disarm);
    logged.check(&[at.device / PAGE], |pair| assert!(!pair.arm()));
}

#[test]
fn packed_ring_with_a_record_marks_its_pages_too() {
    let mut logged = Logged::new(Form::Packed, 1000, true);
    let record = Arc::new(Mapping::memfd("record", Inflight::len_for(1000, true)).unwrap().0);
    let inflight = Inflight::new(record, 0, 1000, true).unwrap();
    with_ring!(&mut logged.pair.device, ring => ring.track(inflight));
    let descriptors = logged.pair.driver.addresses().descriptors;
    offer(&mut logged.pair, 1000);
    logged.check(&[0, 1, 2, 3].map(|page| descriptors / PAGE + page), |pair| serve(pair, 1000));
}

#[test]
fn log_address_at_the_end_of_the_address_space_is_ignored() {
    for log in [u64::MAX, u64::MAX - 4, 1 << 63] {
        let mut logged = Logged::new(Form::Split, 8, true);
        let at = RingAddresses { log: Some(log), ..addresses_of(&logged.pair.driver) };
        logged.pair.device = Ring::new(&logged.pair.memory, false, 8, at, 0, true).unwrap();
        offer(&mut logged.pair, 8);
        serve(&mut logged.pair, 8);
        logged.pair.arm();
        assert_eq!(logged.marked(), []);
    }
}
