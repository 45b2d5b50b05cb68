//! What the guest's processors leave for the thread: bounded, and no faster than it can harm nobody.

use std::collections::{BTreeSet, VecDeque};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use vmbus::protocol::{CONTACT_CONNECTION, MESSAGE_CONNECTION};

use super::Ask;
use crate::hypercall::Status;
use crate::vcpu::MessagePort;

/// Messages of the guest that wait to be looked at.
pub(super) const INBOX: usize = 64;

/// Messages at once: those of several adapters with 64 channels each that are set up together.
pub(super) const BURST: f64 = 16384.0;

/// Messages per second for ever. Many of them cost the switch work, for which this guest's share of the processors does
/// not pay: channels that are opened and closed without end must not be felt elsewhere.
pub(super) const RATE: f64 = 2000.0;

/// A message of the guest.
#[derive(Debug)]
pub(super) struct Message {
    pub connection: u32,
    pub payload: Vec<u8>,
}

/// What is left to do for the guest.
#[derive(Debug)]
struct Pending {
    messages: VecDeque<Message>,
    /// Processors whose synthetic interrupt controllers have other registers: each once, however often they changed.
    changed: BTreeSet<u32>,
    /// The thread is told, and has not looked yet.
    told: bool,
    allowance: f64,
    filled: Instant,
}

impl Pending {
    /// Whether the guest may post now (a token bucket).
    fn allow(&mut self, now: Instant) -> bool {
        let passed = now.saturating_duration_since(self.filled).as_secs_f64();
        self.allowance = (self.allowance + passed * RATE).min(BURST);
        self.filled = self.filled.max(now);
        let allowed = self.allowance >= 1.0;
        if allowed {
            self.allowance -= 1.0;
        }
        allowed
    }
}

/// The guest's messages and changes on their way to the thread.
#[derive(Debug)]
pub(super) struct Inbox(Mutex<Pending>);

impl Default for Inbox {
    fn default() -> Self {
        Self(Mutex::new(Pending {
            messages: VecDeque::new(),
            changed: BTreeSet::new(),
            told: false,
            allowance: BURST,
            filled: Instant::now(),
        }))
    }
}

impl Inbox {
    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread looks: it is to be told of what comes from now on.
    pub fn heed(&self) {
        self.lock().told = false;
    }

    pub fn pop(&self) -> Option<Message> {
        self.lock().messages.pop_front()
    }

    pub fn is_empty(&self) -> bool {
        self.lock().messages.is_empty()
    }

    /// Processors whose controllers changed since the last call.
    pub fn changed(&self) -> BTreeSet<u32> {
        std::mem::take(&mut self.lock().changed)
    }

    pub fn clear(&self) {
        let mut pending = self.lock();
        pending.messages.clear();
        pending.changed.clear();
    }
}

/// The processors' end.
#[derive(Debug)]
pub struct Port {
    pub(super) inbox: Arc<Inbox>,
    pub(super) asks: Sender<Ask>,
}

impl Port {
    /// Tells the thread, unless it is told already: what it has not heard yet does not pile up.
    fn tell(&self, mut pending: MutexGuard<'_, Pending>) {
        if !std::mem::replace(&mut pending.told, true) {
            drop(pending);
            let _ = self.asks.send(Ask::Guest);
        }
    }
}

impl MessagePort for Port {
    fn post(&self, connection: u32, payload: &[u8]) -> Status {
        if connection != MESSAGE_CONNECTION && connection != CONTACT_CONNECTION {
            return Status::InvalidConnectionId;
        }
        let mut pending = self.inbox.lock();
        if pending.messages.len() >= INBOX || !pending.allow(Instant::now()) {
            return Status::InsufficientBuffers;
        }
        pending.messages.push_back(Message { connection, payload: payload.to_vec() });
        self.tell(pending);
        Status::Success
    }

    fn synic_changed(&self, vp: u32) {
        let mut pending = self.inbox.lock();
        pending.changed.insert(vp);
        self.tell(pending);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;

    #[test]
    fn thread_is_told_once_however_much_the_guest_does() {
        let (asks, told) = channel();
        let port = Port { inbox: Arc::default(), asks };
        for round in 0..100_000u32 {
            port.synic_changed(round % 64);
            port.post(1, &[0; 8]);
        }
        assert_eq!(told.try_iter().count(), 1);
        assert_eq!((port.inbox.changed().len(), port.inbox.lock().messages.len()), (64, INBOX));
        port.inbox.heed();
        port.synic_changed(1);
        assert_eq!(told.try_iter().count(), 1);
    }

    #[test]
    fn messages_beyond_the_burst_are_put_off_to_the_rate() {
        let inbox = Inbox::default();
        let mut pending = inbox.lock();
        let start = pending.filled;
        let allowed = |pending: &mut Pending, at| (0..100_000).filter(|_| pending.allow(at)).count();
        assert_eq!(allowed(&mut pending, start), 16384);
        assert_eq!(allowed(&mut pending, start + Duration::from_millis(500)), 1000);
        assert_eq!(allowed(&mut pending, start), 0, "a clock that seems to go back gives nothing");
        assert_eq!(allowed(&mut pending, start + Duration::from_secs(3600)), 16384);
    }
}
