//! Rings against an independent driver side ([`crate::driver`]).

mod exchange;
mod flow;
mod hostile;
mod log;
mod race;
mod resume;
mod suppression;

use std::cell::Cell;
use std::sync::Arc;

use super::*;
use crate::driver::{Arena, Buffer, DriverRing, Features, Form};
use crate::memory::{GuestMemory, Region};

/// Guest-physical address of a test guest's memory, and what to add to it for the peer's own addresses.
const GUEST: u64 = 0x4000_0000;
const USER: u64 = 0x7f00_0000_0000;

const FORMS: [Form; 2] = [Form::Split, Form::Packed];

/// Every combination of ring features.
fn all_features() -> impl Iterator<Item = Features> {
    (0..8).map(|bits| Features { event_idx: bits & 1 != 0, indirect: bits & 2 != 0, in_order: bits & 4 != 0 })
}

/// All of an arena as one region.
fn memory_of(arena: &Arena) -> GuestMemory {
    let region = Region::new(GUEST, GUEST + USER, arena.len(), Arc::clone(arena.mapping()), 0).unwrap();
    GuestMemory::new(vec![region], None).unwrap()
}

fn addresses_of(driver: &DriverRing) -> RingAddresses {
    let at = driver.addresses();
    RingAddresses {
        descriptors: at.descriptors + USER,
        driver: at.driver + USER,
        device: at.device + USER,
        log: None,
    }
}

/// Where a fresh ring starts: index 0, wrap counters 1.
fn fresh(form: Form) -> u32 {
    if form == Form::Packed { 0x8000_8000 } else { 0 }
}

/// The device side of `driver`.
fn device_of(memory: &GuestMemory, driver: &DriverRing, event_idx: bool, base: u32) -> Ring {
    let packed = driver.form() == Form::Packed;
    Ring::new(memory, packed, driver.size(), addresses_of(driver), base, event_idx).unwrap()
}

/// A guest with one ring and the device side of it.
struct Pair {
    arena: Arena,
    memory: GuestMemory,
    driver: DriverRing,
    device: Ring,
}

impl Pair {
    fn new(form: Form, size: u16, features: Features) -> Self {
        let arena = Arena::new(GUEST, 4 << 20).unwrap();
        let memory = memory_of(&arena);
        let driver = DriverRing::new(&arena, form, size, features).unwrap();
        let device = device_of(&memory, &driver, features.event_idx, fresh(form));
        Self { arena, memory, driver, device }
    }

    /// `len` bytes of guest memory for the device to write.
    fn buffer(&self, len: u32) -> Buffer {
        Buffer { addr: self.arena.alloc(u64::from(len), 16).unwrap(), len, writable: true }
    }

    fn refresh(&mut self) -> Result<(), RingFault> {
        with_ring!(&mut self.device, ring => ring.refresh())
    }

    fn pop(&mut self) -> Result<Option<Chain>, RingFault> {
        with_ring!(&mut self.device, ring => ring.pop(&self.memory))
    }

    /// What a device does first in a burst, with the fault of either step.
    fn take(&mut self) -> Result<Option<Chain>, RingFault> {
        self.refresh()?;
        self.pop()
    }

    fn descriptors(&self, chain: &Chain) -> Vec<Descriptor> {
        with_ring!(&self.device, ring => ring.descriptors(chain).to_vec())
    }

    fn push_used(&mut self, chain: &Chain, len: u32) {
        with_ring!(&mut self.device, ring => ring.push_used(chain, len));
    }

    fn publish(&mut self) -> bool {
        with_ring!(&mut self.device, ring => ring.publish())
    }

    fn arm(&mut self) -> bool {
        with_ring!(&mut self.device, ring => ring.arm())
    }

    fn disarm(&mut self) {
        with_ring!(&mut self.device, ring => ring.disarm());
    }

    fn mark(&self) -> Mark {
        with_ring!(&self.device, ring => ring.mark())
    }

    fn rewind(&mut self, mark: Mark) {
        with_ring!(&mut self.device, ring => ring.rewind(mark));
    }

    fn base(&self) -> u32 {
        with_ring!(&self.device, ring => ring.base())
    }

    /// The device takes and returns one chain at once; true if it interrupts.
    fn serve_one(&mut self) -> bool {
        let chain = self.take().unwrap().expect("a chain is available");
        self.push_used(&chain, 1);
        self.publish()
    }
}

thread_local! {
    /// Points that the ring still passes before it ends without notice; it lives on if there is no number.
    static LEFT: Cell<Option<u32>> = const { Cell::new(None) };
}

/// Ends the ring, by unwinding out of it, when its last point is reached.
pub(super) fn crash_point() {
    match LEFT.get() {
        Some(0) => std::panic::resume_unwind(Box::new("crash")),
        Some(left) => LEFT.set(Some(left - 1)),
        None => {}
    }
}

/// Lets `act` pass `points` points. False if it ended there; what it worked on must not be used again.
fn survives(points: u32, act: impl FnOnce()) -> bool {
    LEFT.set(Some(points));
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(act));
    LEFT.set(None);
    result.is_ok()
}
