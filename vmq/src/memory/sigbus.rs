//! Survival of a peer that cuts its memory file short.
//!
//! Touching a mapped page beyond the end of its file raises SIGBUS. The handler looks the address up among the watched
//! ranges; if it is there, it puts zeroed private memory over the whole range, marks the range lost and returns, so
//! that the interrupted copy goes on and the port is faulted afterwards. Where the kernel does not promise so much memory
//! at once (`vm.overcommit_memory=2`), only the page that was touched is replaced, and others in their turn. Any other
//! SIGBUS takes its default course.
//!
//! The table is fixed and lock-free because a signal handler may neither allocate nor lock.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, Once, PoisonError};

/// Ranges that can be watched at once: half of the mappings that a kernel lets a process have (`vm.max_map_count`), so
/// that 1400 ports get what is promised to each ([`super::Share`]).
pub(super) const SLOTS: usize = 32768;

struct Slot {
    /// Odd while the slot changes; a handler that saw two values looks elsewhere.
    generation: AtomicUsize,
    start: AtomicUsize,
    len: AtomicUsize,
    /// Bytes of the file's pages: less than one cannot be replaced.
    page: AtomicUsize,
    taken: AtomicBool,
    lost: AtomicBool,
}

static TABLE: [Slot; SLOTS] = [const {
    Slot {
        generation: AtomicUsize::new(0),
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        page: AtomicUsize::new(0),
        taken: AtomicBool::new(false),
        lost: AtomicBool::new(false),
    }
}; SLOTS];

/// One past the highest slot ever taken, so that a fault scans only what was used.
static HIGH: AtomicUsize = AtomicUsize::new(0);

/// No slot below it is free.
static LOWEST: AtomicUsize = AtomicUsize::new(0);

/// Membership of one range in the table.
#[derive(Debug)]
pub(super) struct Guard {
    slot: usize,
}

impl Guard {
    #[inline]
    pub(super) fn lost(&self) -> bool {
        TABLE[self.slot].lost.load(Ordering::Relaxed)
    }

    /// Ends the watch; to be called before the range is unmapped.
    pub(super) fn release(&self) {
        let slot = &TABLE[self.slot];
        slot.generation.fetch_add(1, Ordering::SeqCst);
        slot.len.store(0, Ordering::SeqCst);
        slot.lost.store(false, Ordering::SeqCst);
        slot.generation.fetch_add(1, Ordering::SeqCst);
        slot.taken.store(false, Ordering::Release);
        LOWEST.fetch_min(self.slot, Ordering::AcqRel);
    }
}

/// Watches `len` bytes from `start`, of a file with pages of `page` bytes. `None` if the table is full.
pub(super) fn watch(start: usize, len: usize, page: usize) -> Option<Guard> {
    static INSTALL: Once = Once::new();
    INSTALL.call_once(install);
    // One at a time: a slot that was free when the search began is still free when it is found.
    static TAKING: Mutex<()> = Mutex::new(());
    let taking = TAKING.lock().unwrap_or_else(PoisonError::into_inner);
    // Slots that become free meanwhile are noted anew.
    let lowest = LOWEST.swap(SLOTS, Ordering::AcqRel);
    let free = TABLE.iter().skip(lowest).position(|slot| !slot.taken.load(Ordering::Acquire));
    let slot = lowest + free?;
    TABLE[slot].taken.store(true, Ordering::Relaxed);
    LOWEST.fetch_min(slot + 1, Ordering::AcqRel);
    drop(taking);
    HIGH.fetch_max(slot + 1, Ordering::AcqRel);
    TABLE[slot].generation.fetch_add(1, Ordering::SeqCst);
    TABLE[slot].lost.store(false, Ordering::SeqCst);
    TABLE[slot].start.store(start, Ordering::SeqCst);
    TABLE[slot].len.store(len, Ordering::SeqCst);
    TABLE[slot].page.store(page, Ordering::SeqCst);
    TABLE[slot].generation.fetch_add(1, Ordering::SeqCst);
    Some(Guard { slot })
}

fn install() {
    // SAFETY: a zeroed `sigaction` is a valid value; the handler is async-signal-safe (atomics, mmap and sigaction).
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_sigbus as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER | libc::SA_ONSTACK;
        libc::sigemptyset(&raw mut action.sa_mask);
        libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut());
    }
}

extern "C" fn on_sigbus(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo to an SA_SIGINFO handler; for SIGBUS it carries the address.
    let address = unsafe { (*info).si_addr() } as usize;
    for slot in &TABLE[..HIGH.load(Ordering::Acquire).min(SLOTS)] {
        let before = slot.generation.load(Ordering::SeqCst);
        let (start, len) = (slot.start.load(Ordering::SeqCst), slot.len.load(Ordering::SeqCst));
        let stable = before.is_multiple_of(2) && slot.generation.load(Ordering::SeqCst) == before;
        if !stable || address.wrapping_sub(start) >= len {
            continue;
        }
        // The thread that faulted uses the range, so it stays mapped and its slot stays as it is. Lost first: nobody is
        // to read zeroes and not know.
        slot.lost.store(true, Ordering::SeqCst);
        if rescue(start, len, slot.page.load(Ordering::SeqCst), address, replace) {
            return;
        }
    }
    // SAFETY: restores the default action; the faulting instruction runs again and ends the process as usual.
    unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
}

/// Bytes of the smallest pages there are.
const PAGE: usize = 4096;

/// Has `replace` put zeroed memory over the range, or else over the page of it that `address` is in.
fn rescue(start: usize, len: usize, page: usize, address: usize, replace: fn(usize, usize) -> bool) -> bool {
    let page = page.max(PAGE);
    let offset = (address - start) / page * page;
    replace(start, len) || replace(start + offset, page.min(len - offset))
}

/// Puts zeroed memory over a range, or a part of one. The range stays owned by its `Mapping`, which unmaps it as before.
fn replace(start: usize, len: usize) -> bool {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    // SAFETY: the range belongs to one `Mapping` that is still watched, hence still mapped.
    unsafe { libc::mmap(start as *mut libc::c_void, len, prot, flags, -1, 0) != libc::MAP_FAILED }
}

#[cfg(test)]
mod tests {
    use super::super::Mapping;
    use super::*;

    #[test]
    fn page_alone_is_replaced_where_the_whole_range_is_too_much() {
        for (page, at, replaced) in [(1, 0x2345, 2..3), (0x1000, 0x3fff, 3..4), (0x2000, 0x2000, 2..4)] {
            let (mapping, _fd) = Mapping::memfd("strict", 0x4000).unwrap();
            let start = mapping.as_ptr() as usize;
            let bytes = |number: usize| (start + number * PAGE) as *mut u8;
            for number in 0..4 {
                // SAFETY: four pages are mapped.
                unsafe { bytes(number).write_volatile(7) };
            }
            assert!(rescue(start, 0x4000, page, start + at, |start, len| len < 0x4000 && replace(start, len)));
            for number in 0..4 {
                // SAFETY: as above.
                let byte = unsafe { bytes(number).read_volatile() };
                assert_eq!(byte, if replaced.contains(&number) { 0 } else { 7 }, "page {number}");
            }
        }
        assert!(!rescue(0x1000, 0x1000, 1, 0x1000, |_, _| false));
    }
}
