//! Getting an adapter quiet before it is taken from the guest.
//!
//! Linux stops listening to a channel when its offer is withdrawn, and then waits for every frame that it sent to be
//! completed and for every frame that it was given to be gone: one that is under way at that moment, in either direction,
//! hangs its driver for ever. So the adapter first gives nothing, says that its cable is out, and waits until nothing
//! moves.

use std::time::Duration;

/// Time between two looks.
pub(super) const LOOK: Duration = Duration::from_millis(50);

/// Looks in a row that have to find nothing: the guest hears that the cable is out in its own time.
const LOOKS: u32 = 6;

/// How far it is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Quiesce {
    /// Nothing was found so many times, and the guest has sent so many frames.
    Waiting { looks: u32, sent: u64 },
    /// Nothing is under way.
    Quiet,
}

impl Default for Quiesce {
    fn default() -> Self {
        Self::Waiting { looks: 0, sent: 0 }
    }
}

impl Quiesce {
    /// There is more to wait for.
    pub(super) fn goes_on(&self) -> bool {
        *self != Self::Quiet
    }

    /// `quiet`: nothing is under way now; `sent`: frames of the guest so far. True once it is enough.
    pub(super) fn look(&mut self, quiet: bool, sent: u64) -> bool {
        let Self::Waiting { looks, sent: before } = self else { return true };
        *looks = if quiet && *before == sent { *looks + 1 } else { 0 };
        *before = sent;
        let enough = *looks >= LOOKS;
        if enough {
            *self = Self::Quiet;
        }
        enough
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adapter_is_quiet_once_nothing_moved_for_some_looks_in_a_row() {
        let mut quiesce = Quiesce::default();
        assert!(!quiesce.look(true, 5));
        for sent in [5, 5, 6, 6, 6] {
            assert!(!quiesce.look(true, sent));
        }
        assert!(!quiesce.look(false, 6));
        for _ in 1..LOOKS {
            assert!(!quiesce.look(true, 6));
        }
        assert!(quiesce.goes_on() && quiesce.look(true, 6) && !quiesce.goes_on());
    }
}
