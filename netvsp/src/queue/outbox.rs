//! Messages for the guest that are not in its ring yet, or that it cannot see there yet, in their order.
//!
//! One waits where the ring is full, or where the guest has all sections. A reply that waits for a section has its request
//! taken all the same: what gives a section back may lie behind the request. So it is saved with the adapter's state before
//! the request is given up, for a successor to write. It counts once the request's round is over, for until then the request
//! is taken again; and it has been written once the guest's ring goes on from where it stood. Messages are numbered, and
//! the journal knows the last number of each kind ([`Count`]).
//!
//! Only on the primary channel does anything wait when a round is over, and only there is anything written down.

use std::collections::VecDeque;

use crate::journal::{Count, Journal};
use crate::message::{Message, Waiting};

/// Bytes of messages that wait for the guest at most, as [`size`] counts them. More are made only by one that reads none;
/// saving them is part of what a request costs.
const MAX_BYTES: usize = 4096;

/// Bytes that a message counts for.
fn size(message: &Message) -> usize {
    message.payload().len() + 16
}

/// The messages of a channel.
#[derive(Debug)]
pub(super) struct Outbox {
    journal: Option<Journal>,
    /// In the ring, to be seen with the next publish.
    written: Vec<Message>,
    waiting: VecDeque<Message>,
    /// Number of the last message that the guest sees.
    shown: u32,
    /// Number of the last one that it is to see, whatever becomes of the round under way.
    owed: u32,
}

fn count(messages: usize) -> u32 {
    u32::try_from(messages).unwrap_or(u32::MAX)
}

impl Outbox {
    /// No messages, of channel `index`.
    pub(super) fn new(index: u16, journal: &Journal) -> Self {
        let journal = (index == 0).then(|| journal.clone());
        Self { journal, written: Vec::new(), waiting: VecDeque::new(), shown: 0, owed: 0 }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// The message to be written next.
    pub(super) fn first(&self) -> Option<&Message> {
        self.waiting.front()
    }

    /// Takes `message`, behind all others. One too many is lost.
    pub(super) fn push(&mut self, message: Message) {
        let bytes: usize = self.waiting.iter().map(size).sum();
        if bytes + size(&message) <= MAX_BYTES {
            self.waiting.push_back(message);
        }
    }

    /// Takes the first message out, to be written.
    pub(super) fn take(&mut self) -> Option<Message> {
        self.waiting.pop_front()
    }

    /// It could not be written.
    pub(super) fn put_back(&mut self, message: Message) {
        self.waiting.push_front(message);
    }

    /// It is in the ring; where the ring ends for the guest is recorded.
    pub(super) fn written(&mut self, message: Message) {
        self.written.push(message);
        if let Some(journal) = &self.journal {
            journal.begin_count(Count::Shown, self.shown.wrapping_add(count(self.written.len())));
        }
    }

    /// The guest sees what is in the ring.
    #[inline]
    pub(super) fn published(&mut self) {
        if !self.written.is_empty() {
            self.shown = self.shown.wrapping_add(count(self.written.len()));
            self.written.clear();
            if let Some(journal) = &self.journal {
                journal.end_count(Count::Shown, self.shown);
            }
        }
    }

    /// Number of the last message.
    fn last(&self) -> u32 {
        self.shown.wrapping_add(count(self.written.len() + self.waiting.len()))
    }

    /// The guest is to see all that there is once the round that is recorded is over.
    pub(super) fn begin_round(&self) {
        if let Some(journal) = self.journal.as_ref().filter(|_| self.owed != self.last()) {
            journal.begin_count(Count::Owed, self.last());
        }
    }

    /// The round is over.
    pub(super) fn end_round(&mut self) {
        if self.owed != self.last() {
            self.owed = self.last();
            if let Some(journal) = &self.journal {
                journal.end_count(Count::Owed, self.owed);
            }
        }
    }

    /// The guest is to see all that there is: none of it answers a request of the round under way.
    pub(super) fn owe(&mut self) {
        self.begin_round();
        self.end_round();
    }

    /// What a successor may have to write. Not the answers of the round under way if all of them are in the ring: then the
    /// guest sees them when the round is over, and the successor answers when it is not.
    pub(super) fn to_keep(&self) -> Waiting {
        let before = self.owed.wrapping_sub(self.shown) as usize;
        let most = if self.waiting.is_empty() { before } else { usize::MAX };
        let messages: Vec<Message> = self.written.iter().chain(&self.waiting).take(most).cloned().collect();
        let after = if messages.is_empty() { 0 } else { self.shown };
        Waiting { after, messages }
    }

    /// Has the messages of `left` that the guest is to see and has not seen. `shown`: the ring to the guest has moved on
    /// from the position that is recorded; `over`: so has the round.
    pub(super) fn succeed(&mut self, left: Waiting, shown: bool, over: bool) {
        let Some(journal) = &self.journal else { return };
        self.shown = journal.count(Count::Shown, shown);
        journal.set_count(Count::Shown, self.shown);
        let owed = journal.count(Count::Owed, over);
        for message in left.between(self.shown, owed) {
            self.push(message);
        }
        // Whatever more was owed is not known.
        self.owed = self.last();
        if let Some(journal) = &self.journal {
            journal.set_count(Count::Owed, self.owed);
        }
    }

    /// The channel is closed.
    pub(super) fn clear(&mut self) {
        self.written.clear();
        self.waiting.clear();
    }
}
