//! Rescue from eventfds that make a write wait.
//!
//! `O_NONBLOCK` belongs to the open file, which a guest's VMM shares and may clear; if it also fills the counter, the next
//! write to it waits for ever, and with it a worker and all its ports. No kernel call writes an eventfd in a way that
//! cannot wait. So each thread says which descriptor it is ringing (two stores to a line of its own), and one thread
//! looks every tenth of a second: a write seen in two looks in a row, to a counter that is full, is freed by emptying the
//! counter. One that takes so long to a counter with room waits for a processor and not for the peer: its thread lost its
//! own to whom it woke. It needs no help, and its doorbell is as good as any.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use crossbeam_utils::CachePadded;

use crate::os;

pub(super) const ROUND: Duration = Duration::from_millis(100);

/// Threads that are watched; further ones ring without.
const THREADS: usize = 256;

const IDLE: RawFd = -1;

struct Seat {
    /// Descriptor that is being rung.
    fd: AtomicI32,
    /// Counts the rings, to tell one long one from two short ones.
    rings: AtomicU64,
    /// The watch had to help.
    helped: AtomicBool,
}

static SEATS: [CachePadded<Seat>; THREADS] = [const {
    CachePadded::new(Seat {
        fd: AtomicI32::new(IDLE),
        rings: AtomicU64::new(0),
        helped: AtomicBool::new(false),
    })
}; THREADS];

static TAKEN: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static SEAT: usize = TAKEN.fetch_add(1, Ordering::Relaxed);
}

/// Rings `fd` by calling `write`, watched. True if it had to be helped.
#[inline]
pub(super) fn during(fd: &OwnedFd, write: impl FnOnce()) -> bool {
    let Some(seat) = SEAT.with(|&seat| SEATS.get(seat)) else {
        write();
        return false;
    };
    seat.rings.store(seat.rings.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
    seat.fd.store(fd.as_raw_fd(), Ordering::Release);
    write();
    seat.fd.store(IDLE, Ordering::Release);
    seat.helped.load(Ordering::Relaxed) && seat.helped.swap(false, Ordering::Relaxed)
}

/// Starts the watch, once per process.
pub(super) fn start() {
    static STARTED: Once = Once::new();
    STARTED.call_once(|| {
        let watch = std::thread::Builder::new().name("doorbells".into());
        if let Err(error) = watch.spawn(run) {
            tracing::error!(%error, "doorbells are not watched");
        }
    });
}

fn run() {
    let mut seen = [(IDLE, 0); THREADS];
    loop {
        std::thread::sleep(ROUND);
        let taken = TAKEN.load(Ordering::Relaxed).min(THREADS);
        for (seat, seen) in SEATS.iter().zip(&mut seen).take(taken) {
            let now = (seat.fd.load(Ordering::Acquire), seat.rings.load(Ordering::Relaxed));
            if now.0 != IDLE && now == *seen && os::counter_is_full(now.0) {
                help(seat, now.0);
            }
            *seen = now;
        }
    }
}

/// Empties the counter that `seat`'s thread waits on.
fn help(seat: &Seat, fd: RawFd) {
    seat.helped.store(true, Ordering::Relaxed);
    os::empty_counter(fd);
}
