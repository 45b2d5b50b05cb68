//! Where virtual processors stop and go: each of their threads passes the gate before it enters guest mode.

#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// What the processors are to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Wanted {
    /// Stay out of guest mode.
    Park,
    /// Run the guest.
    Run,
    /// End their threads.
    End,
}

/// The gate of one machine. Closed at first.
#[derive(Debug)]
pub struct Gate {
    /// The same as in the mutex, for the threads' look at every exit.
    wanted: AtomicU8,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    wanted: Wanted,
    parked: usize,
}

impl Default for Gate {
    fn default() -> Self {
        let wanted = Wanted::Park;
        Self {
            wanted: AtomicU8::new(wanted as u8),
            state: Mutex::new(State { wanted, parked: 0 }),
            changed: Condvar::new(),
        }
    }
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True if a processor may enter guest mode without asking further.
    pub fn is_open(&self) -> bool {
        self.wanted.load(Ordering::SeqCst) == Wanted::Run as u8
    }

    /// Waits until the guest is to run (true) or the thread is to end (false). A processor that is `dead` waits for its end.
    pub fn pass(&self, dead: bool) -> bool {
        let mut state = self.lock();
        state.parked += 1;
        self.changed.notify_all();
        loop {
            match state.wanted {
                Wanted::End => return false,
                Wanted::Run if !dead => {
                    state.parked -= 1;
                    return true;
                }
                _ => state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Tells all processors; those in guest mode must be kicked afterwards.
    pub fn want(&self, wanted: Wanted) {
        let mut state = self.lock();
        state.wanted = wanted;
        self.wanted.store(wanted as u8, Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// Waits until `count` processors are parked or ended.
    pub fn all_parked(&self, count: usize) {
        let mut state = self.lock();
        while state.parked < count {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn processors_park_run_and_end_as_told() {
        let gate = Arc::new(Gate::default());
        let threads: Vec<_> = (0..3)
            .map(|index| {
                let gate = Arc::clone(&gate);
                std::thread::spawn(move || {
                    let mut passed = 0;
                    while gate.pass(index == 2) {
                        passed += 1;
                        while gate.is_open() {
                            std::thread::yield_now();
                        }
                    }
                    passed
                })
            })
            .collect();
        for _ in 0..2 {
            gate.all_parked(3);
            gate.want(Wanted::Run);
            while gate.lock().parked > 1 {
                std::thread::yield_now();
            }
            gate.want(Wanted::Park);
        }
        gate.all_parked(3);
        gate.want(Wanted::End);
        let passed: Vec<u32> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        assert_eq!(passed, [2, 2, 0], "the dead one never passes");
    }
}
