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
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::time::Duration;

use crossbeam_utils::CachePadded;

use crate::os;

pub(super) const ROUND: Duration = Duration::from_millis(100);

/// Threads that have a seat of their own as long as they live; further ones take a free one for each ring, or wait for it.
const THREADS: usize = 1024;

const IDLE: RawFd = -1;

struct Seat {
    /// A thread has it.
    taken: AtomicBool,
    /// Descriptor that is being rung.
    fd: AtomicI32,
    /// Counts the rings, to tell one long one from two short ones.
    rings: AtomicU64,
    /// The watch had to help.
    helped: AtomicBool,
}

impl Seat {
    const fn free() -> CachePadded<Self> {
        CachePadded::new(Self {
            taken: AtomicBool::new(false),
            fd: AtomicI32::new(IDLE),
            rings: AtomicU64::new(0),
            helped: AtomicBool::new(false),
        })
    }
}

static SEATS: [CachePadded<Seat>; THREADS] = [const { Seat::free() }; THREADS];

/// A seat, until it is dropped.
struct Claim(&'static Seat);

impl Claim {
    fn new(seats: &'static [CachePadded<Seat>]) -> Option<Self> {
        let free = |seat: &&CachePadded<Seat>| {
            !seat.taken.load(Ordering::Relaxed) && !seat.taken.swap(true, Ordering::Acquire)
        };
        seats.iter().find(free).map(|seat| Self(seat))
    }

    /// For a thread that came too late to have one for good, or is about to end.
    #[cold]
    fn wait(seats: &'static [CachePadded<Seat>]) -> Self {
        loop {
            match Self::new(seats) {
                Some(claim) => return claim,
                None => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    /// Rings `fd` by calling `write`, watched. True if it had to be helped.
    #[inline]
    fn during(&self, fd: &OwnedFd, write: impl Fn()) -> bool {
        let seat = self.0;
        // Help that came too late for the ring before it is not for this one.
        seat.helped.store(false, Ordering::Relaxed);
        seat.rings.store(seat.rings.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
        seat.fd.store(fd.as_raw_fd(), Ordering::Release);
        write();
        seat.fd.store(IDLE, Ordering::Release);
        seat.helped.load(Ordering::Relaxed)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.0.taken.store(false, Ordering::Release);
    }
}

thread_local! {
    static SEAT: Option<Claim> = Claim::new(&SEATS);
}

/// Rings `fd` by calling `write`, watched. True if it had to be helped.
#[inline]
pub(super) fn during(fd: &OwnedFd, write: impl Fn()) -> bool {
    match SEAT.try_with(|seat| seat.as_ref().map(|claim| claim.during(fd, &write))) {
        Ok(Some(helped)) => helped,
        Ok(None) | Err(_) => Claim::wait(&SEATS).during(fd, write),
    }
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
        for (seat, seen) in SEATS.iter().zip(&mut seen) {
            if !seat.taken.load(Ordering::Relaxed) {
                continue;
            }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seats_of_threads_that_ended_are_taken_again() {
        for _ in 0..2 * THREADS {
            std::thread::scope(|scope| scope.spawn(|| assert!(SEAT.with(Option::is_some))).join().unwrap());
        }
    }

    #[test]
    fn ring_without_a_free_seat_waits_for_one() {
        static FEW: [CachePadded<Seat>; 3] = [const { Seat::free() }; 3];
        let fd = rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).unwrap();
        let mut all: Vec<Claim> = std::iter::from_fn(|| Claim::new(&FEW)).collect();
        assert_eq!(all.len(), FEW.len());
        std::thread::scope(|scope| {
            let late = scope.spawn(|| Claim::wait(&FEW).during(&fd, || ()));
            std::thread::sleep(ROUND);
            assert!(!late.is_finished());
            all.pop();
            assert!(!late.join().unwrap());
        });
    }
}
