mod hostile;
mod signals;
mod traffic;

use std::sync::Arc;

use vmq::memory::{GuestMemory, Mapping, Region};

use super::*;

/// A ring of `data` pages, cleared as a guest clears it, whose pages lie in no order.
fn ring(data: u64) -> Pages {
    let count = data + 1;
    let mapping = Arc::new(Mapping::memfd("guest", usize::try_from(count << 12).unwrap()).unwrap().0);
    let region = Region::new(0x10_0000, 0, count << 12, mapping, 0).unwrap();
    let memory = Arc::new(GuestMemory::new(vec![region], None).unwrap());
    // Some neighbours stay together, some do not.
    let mut pfns: Vec<u64> = (0x100..0x100 + count).collect();
    let last = pfns.len() - 1;
    pfns.rotate_left(last / 2);
    pfns.swap(0, last);
    let pages = Pages::new(&memory, &pfns).unwrap();
    assert!(clear(&pages));
    pages
}

fn both(ring: &Pages) -> (Outgoing, Incoming) {
    (Outgoing::new(ring, true).unwrap(), Incoming::new(ring, true).unwrap())
}

/// Moves an empty ring's indices to `at`.
fn stand_at(ring: &Pages, at: u32) {
    ring.write(WRITE_INDEX, &at.to_le_bytes());
    ring.write(READ_INDEX, &at.to_le_bytes());
}

fn word(ring: &Pages, at: u32) -> u32 {
    ring.word(at).unwrap().load(Ordering::SeqCst)
}
