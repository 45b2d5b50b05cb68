//! Survival of a peer that cuts its memory file short.
//!
//! Touching a mapped page beyond the end of its file raises SIGBUS. The handler looks the address up among the watched
//! ranges; if it is there, it puts zeroed private memory over the whole range, marks the range lost and returns, so
//! that the interrupted copy goes on and the port is faulted afterwards. Any other SIGBUS takes its default course.
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
    taken: AtomicBool,
    lost: AtomicBool,
}

static TABLE: [Slot; SLOTS] = [const {
    Slot {
        generation: AtomicUsize::new(0),
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
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

/// Watches `len` bytes from `start`. `None` if the table is full.
pub(super) fn watch(start: usize, len: usize) -> Option<Guard> {
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
        if replace(start, len) {
            return;
        }
    }
    // SAFETY: restores the default action; the faulting instruction runs again and ends the process as usual.
    unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
}

/// Puts zeroed memory over the range. The range stays owned by its `Mapping`, which unmaps it as before.
fn replace(start: usize, len: usize) -> bool {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    // SAFETY: the whole range belongs to one `Mapping` that is still watched, hence still mapped.
    unsafe { libc::mmap(start as *mut libc::c_void, len, prot, flags, -1, 0) != libc::MAP_FAILED }
}
