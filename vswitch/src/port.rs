//! What all queues of a port share: its name, its state, and who is told when something goes wrong.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;

use crate::capture::Taps;
use crate::fdb::PortIndex;
use crate::report::PortState;
use crate::snapshot::Snapshot;

/// Identifies a port for the life of the process; never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortId(pub u64);

/// What a queue or a peer tells the control plane.
#[derive(Debug)]
pub enum PortEvent {
    /// The port was stopped by a fault.
    Faulted(PortId),
    /// Queues were enabled or disabled, so the snapshot is out of date.
    Changed(PortId),
    /// Queues may have work: look at them.
    Nudge(PortId),
    /// The control plane is to end.
    Stop,
}

/// A fault that ends when the operator restarts the port, or when another guest begins; and one that only the operator ends.
const FAULTED: u8 = 1;
const FOR_GOOD: u8 = 2;

/// Between two messages in the log about peers of one port: a peer causes as many as it likes.
const QUIET: Duration = Duration::from_secs(10);

/// What went wrong last, and how much of it was not logged.
#[derive(Debug, Default)]
struct LastError {
    text: Option<String>,
    logged: Option<Instant>,
    unlogged: u64,
}

impl LastError {
    /// Remembers `text`. If it is time to log it: how many others were not.
    fn note(&mut self, text: &str, now: Instant) -> Option<u64> {
        self.text = Some(text.to_owned());
        if self.logged.is_some_and(|then| now.saturating_duration_since(then) < QUIET) {
            self.unlogged += 1;
            return None;
        }
        self.logged = Some(now);
        Some(std::mem::take(&mut self.unlogged))
    }
}

/// The part of a port that its queues share.
#[derive(Debug)]
pub struct PortCore {
    /// Identity.
    pub id: PortId,
    /// Its switch's name.
    pub switch: Arc<str>,
    /// Name.
    pub name: Arc<str>,
    /// Index in its switch.
    pub index: PortIndex,
    /// The switch.
    pub snapshot: Arc<ArcSwap<Snapshot>>,
    /// Running captures.
    pub taps: Taps,
    state: Mutex<PortState>,
    last_error: Mutex<LastError>,
    /// [`FAULTED`], or [`FOR_GOOD`].
    fault: AtomicU8,
    /// An event of the kind is on its way: a peer that repeats itself adds none.
    change_pending: AtomicBool,
    nudges_pending: AtomicU64,
    events: Sender<PortEvent>,
}

impl PortCore {
    /// A port that waits for `what`.
    pub fn new(
        id: PortId,
        (switch, name): (Arc<str>, Arc<str>),
        index: PortIndex,
        snapshot: Arc<ArcSwap<Snapshot>>,
        what: String,
        events: Sender<PortEvent>,
    ) -> Self {
        Self {
            id,
            switch,
            name,
            index,
            snapshot,
            taps: Taps::default(),
            state: Mutex::new(PortState::Waiting(what)),
            last_error: Mutex::default(),
            fault: AtomicU8::new(0),
            change_pending: AtomicBool::new(false),
            nudges_pending: AtomicU64::new(0),
            events,
        }
    }

    /// Stops the port: `reason` is shown until it is restarted. The first reason stays.
    #[cold]
    pub fn fault(&self, reason: impl std::fmt::Display) {
        self.fault_as(FAULTED, &reason);
    }

    /// As [`PortCore::fault`], whatever it was stopped for before: no peer that begins anew is to end that, but the operator.
    #[cold]
    pub fn fault_for_good(&self, reason: impl std::fmt::Display) {
        self.fault_as(FOR_GOOD, &reason);
    }

    fn fault_as(&self, fault: u8, reason: &dyn std::fmt::Display) {
        if self.fault.fetch_max(fault, Ordering::SeqCst) >= fault {
            return;
        }
        tracing::warn!(switch = %self.switch, port = %self.name, %reason, "port faulted");
        *self.lock_state() = PortState::Faulted(reason.to_string());
        self.notify(PortEvent::Faulted(self.id));
    }

    /// True from a fault until the restart.
    #[inline]
    pub fn is_faulted(&self) -> bool {
        self.fault.load(Ordering::Relaxed) != 0
    }

    /// True from [`PortCore::fault_for_good`] until the restart.
    pub fn is_faulted_for_good(&self) -> bool {
        self.fault.load(Ordering::Relaxed) == FOR_GOOD
    }

    /// Ends a fault.
    pub fn clear_fault(&self, what: String) {
        *self.lock_state() = PortState::Waiting(what);
        self.lock_error().text = None;
        self.fault.store(0, Ordering::SeqCst);
    }

    /// Changes the state that is shown, unless a fault is.
    pub fn set_state(&self, state: PortState) {
        let mut current = self.lock_state();
        if !self.is_faulted() {
            *current = state;
        }
    }

    /// The state that is shown.
    pub fn state(&self) -> PortState {
        self.lock_state().clone()
    }

    /// Remembers something that went wrong without stopping the port.
    pub fn set_error(&self, error: String) {
        let due = self.lock_error().note(&error, Instant::now());
        if let Some(unlogged) = due {
            tracing::warn!(switch = %self.switch, port = %self.name, %error, unlogged, "peer was cut off");
        }
    }

    /// The last thing that went wrong without stopping the port.
    pub fn last_error(&self) -> Option<String> {
        self.lock_error().text.clone()
    }

    /// The queues in use changed: the snapshot is to be made anew.
    pub fn changed(&self) {
        if !self.change_pending.swap(true, Ordering::SeqCst) {
            self.notify(PortEvent::Changed(self.id));
        }
    }

    /// The control plane is about to act on [`PortEvent::Changed`].
    pub fn take_change(&self) {
        self.change_pending.store(false, Ordering::SeqCst);
    }

    /// Queue number `queue` may have work.
    pub fn nudge(&self, queue: usize) {
        let bit = 1u64 << (queue & 63);
        if self.nudges_pending.fetch_or(bit, Ordering::SeqCst) == 0 {
            self.notify(PortEvent::Nudge(self.id));
        }
    }

    /// Queues to be looked at, one bit each; forgets them.
    pub fn take_nudges(&self) -> u64 {
        self.nudges_pending.swap(0, Ordering::SeqCst)
    }

    /// Tells the control plane.
    pub fn notify(&self, event: PortEvent) {
        // It is gone only when the process ends.
        let _ = self.events.send(event);
    }

    fn lock_error(&self) -> std::sync::MutexGuard<'_, LastError> {
        self.last_error.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_state(&self) -> std::sync::MutexGuard<'_, PortState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_that_a_peer_causes_in_a_row_are_logged_once_and_counted() {
        let (mut last, start) = (LastError::default(), Instant::now());
        assert_eq!(last.note("first", start), Some(0));
        for n in 0..1000 {
            assert_eq!(last.note(&n.to_string(), start + QUIET - Duration::from_nanos(1)), None);
        }
        assert_eq!(last.text.as_deref(), Some("999"), "it is shown all the same");
        assert_eq!(last.note("next", start + QUIET), Some(1000));
        assert_eq!(last.note("next", start + 3 * QUIET), Some(0));
    }
}
