//! What all queues of a port share: its name, its state, and who is told when something goes wrong.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};

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
    last_error: Mutex<Option<String>>,
    faulted: AtomicBool,
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
            last_error: Mutex::new(None),
            faulted: AtomicBool::new(false),
            change_pending: AtomicBool::new(false),
            nudges_pending: AtomicU64::new(0),
            events,
        }
    }

    /// Stops the port: `reason` is shown until it is restarted. The first reason stays.
    #[cold]
    pub fn fault(&self, reason: impl std::fmt::Display) {
        if self.faulted.swap(true, Ordering::SeqCst) {
            return;
        }
        tracing::warn!(switch = %self.switch, port = %self.name, %reason, "port faulted");
        *self.lock_state() = PortState::Faulted(reason.to_string());
        self.notify(PortEvent::Faulted(self.id));
    }

    /// True from a fault until the restart.
    #[inline]
    pub fn is_faulted(&self) -> bool {
        self.faulted.load(Ordering::Relaxed)
    }

    /// Ends a fault.
    pub fn clear_fault(&self, what: String) {
        *self.lock_state() = PortState::Waiting(what);
        *self.last_error.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.faulted.store(false, Ordering::SeqCst);
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
        tracing::warn!(switch = %self.switch, port = %self.name, %error, "peer was cut off");
        *self.last_error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
    }

    /// The last thing that went wrong without stopping the port.
    pub fn last_error(&self) -> Option<String> {
        self.last_error.lock().unwrap_or_else(PoisonError::into_inner).clone()
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

    fn lock_state(&self) -> std::sync::MutexGuard<'_, PortState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
