//! Rescue from eventfds that make a write wait.
//!
//! `O_NONBLOCK` belongs to the open file, which a guest's VMM shares and may clear; if it also fills the counter, the next
//! write to it waits for ever, and with it a worker and all its ports. No kernel call writes an eventfd in a way that
//! cannot wait. So each thread says when it rings (two stores to a line of its own), and one thread looks every tenth of a
//! second: a ring seen in two looks in a row is interrupted by a signal, again and again until it is over. Only a write
//! that waits fails by that. One whose thread lost its processor to whom it woke has been heard already, or will be.

use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::time::Duration;

use crossbeam_utils::CachePadded;

use crate::os;

pub(super) const ROUND: Duration = Duration::from_millis(100);

/// Threads that have a seat of their own as long as they live; further ones take a free one for each ring, or wait for it.
const THREADS: usize = 1024;

struct Seat {
    /// A thread has it.
    taken: AtomicBool,
    /// Which one.
    thread: AtomicI32,
    /// Odd during a ring, another number at each.
    rings: AtomicU64,
}

impl Seat {
    const fn free() -> CachePadded<Self> {
        CachePadded::new(Self {
            taken: AtomicBool::new(false),
            thread: AtomicI32::new(0),
            rings: AtomicU64::new(0),
        })
    }
}

static SEATS: [CachePadded<Seat>; THREADS] = [const { Seat::free() }; THREADS];

/// A seat of the thread that made it, until it is dropped.
struct Claim(&'static Seat);

impl Claim {
    fn new(seats: &'static [CachePadded<Seat>]) -> Option<Self> {
        let free = |seat: &&CachePadded<Seat>| {
            !seat.taken.load(Ordering::Relaxed) && !seat.taken.swap(true, Ordering::Acquire)
        };
        let seat = seats.iter().find(free)?;
        seat.thread.store(rustix::thread::gettid().as_raw_nonzero().get(), Ordering::Relaxed);
        Some(Self(seat))
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

    #[inline]
    fn during<R>(&self, ring: impl Fn() -> R) -> R {
        let rings = &self.0.rings;
        let before = rings.load(Ordering::Relaxed);
        rings.store(before.wrapping_add(1), Ordering::Release);
        let result = ring();
        rings.store(before.wrapping_add(2), Ordering::Release);
        result
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

/// Calls `ring`, watched.
#[inline]
pub(super) fn during<R>(ring: impl Fn() -> R) -> R {
    match SEAT.try_with(|seat| seat.as_ref().map(|claim| claim.during(&ring))) {
        Ok(Some(result)) => result,
        Ok(None) | Err(_) => Claim::wait(&SEATS).during(ring),
    }
}

/// Starts the watch, once per process.
pub(super) fn start() {
    static STARTED: Once = Once::new();
    STARTED.call_once(|| {
        os::be_interruptible();
        let watch = std::thread::Builder::new().name("doorbells".into());
        if let Err(error) = watch.spawn(run) {
            tracing::error!(%error, "doorbells are not watched");
        }
    });
}

fn run() {
    let mut seen = [0; THREADS];
    loop {
        std::thread::sleep(ROUND);
        for (seat, seen) in SEATS.iter().zip(&mut seen) {
            let now = seat.rings.load(Ordering::Acquire);
            if now % 2 == 1 && now == *seen {
                os::interrupt(seat.thread.load(Ordering::Relaxed));
            }
            *seen = now;
        }
    }
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
        let mut all: Vec<Claim> = std::iter::from_fn(|| Claim::new(&FEW)).collect();
        assert_eq!(all.len(), FEW.len());
        std::thread::scope(|scope| {
            let late = scope.spawn(|| Claim::wait(&FEW).during(|| ()));
            std::thread::sleep(ROUND);
            assert!(!late.is_finished());
            all.pop();
            late.join().unwrap();
        });
    }
}
