//! What the data path writes down for a successor, one plain store a word, in memory that outlives the process. Those who
//! write it say what it means: [`crate::sections`], [`crate::queue`].
//!
//! A killed switch has done its stores up to one of them and none behind it, so that their order is all that counts. What
//! depends on a store into a guest's ring, an index that moves on, is therefore written before it, with where the ring
//! stood: the successor compares, and knows on which side of it its predecessor died.

use std::sync::Arc;
use std::sync::atomic::{Ordering, compiler_fence};

use vmq::memory::GuestMemory;

/// Most sections of a buffer: what the journal has room for.
pub(crate) const MAX_SECTIONS: u32 = 128 * 1024;

/// Most channels of an adapter: what the journal has room for.
pub(crate) const MAX_CHANNELS: u16 = 64;

/// A round is recorded. Indices are multiples of 8.
const ROUND: u32 = 1;

/// Where what there is begins, in words: a position per channel, a word per section, a round per channel, the counts.
const SECTIONS: u64 = MAX_CHANNELS as u64;
const ROUNDS: u64 = SECTIONS + MAX_SECTIONS as u64;
const COUNTS: u64 = ROUNDS + MAX_CHANNELS as u64;
const END: u64 = COUNTS + 4;

/// Bytes of the journal.
pub(crate) const JOURNAL_BYTES: u64 = 4 * END;

/// Where a channel's rings stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ends {
    /// The write index of the ring to the guest.
    pub(crate) write: u32,
    /// The read index of the ring from the guest.
    pub(crate) read: u32,
}

/// A count of messages on the primary channel, and what it depends on. Each is two words: the count before that has happened, and after.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Count {
    /// Messages that the guest sees: its ring goes on from the position that is recorded.
    Shown = 0,
    /// Messages that it is to see: the round that is recorded is over.
    Owed = 2,
}

/// Memory that outlives the process, [`JOURNAL_BYTES`] of it.
#[derive(Debug, Clone)]
pub(crate) struct Journal {
    memory: Arc<GuestMemory>,
    base: u64,
}

impl Journal {
    /// The journal `base` bytes, a multiple of 4, into `memory`.
    pub(crate) fn new(memory: Arc<GuestMemory>, base: u64) -> Self {
        Self { memory, base }
    }

    fn write(&self, word: u64, value: u32) {
        // Four aligned bytes are one store. A journal that is too short forgets: there is no successor then either.
        if let Some(room) = self.memory.room(self.base + 4 * word, 4) {
            room.write_array(&value.to_le_bytes());
        }
    }

    fn read(&self, word: u64) -> u32 {
        let bytes = self.memory.segment(self.base + 4 * word, 4).and_then(|segment| segment.read());
        bytes.map_or(0, u32::from_le_bytes)
    }

    /// The word of a section.
    pub(crate) fn set(&self, section: u32, value: u32) {
        self.write(SECTIONS + u64::from(section), value);
    }

    /// What [`Journal::set`] wrote.
    pub(crate) fn get(&self, section: u32) -> u32 {
        self.read(SECTIONS + u64::from(section))
    }

    /// Where channel `channel`'s ring to the guest ended before what is being written now.
    pub(crate) fn set_position(&self, channel: u16, position: u32) {
        self.write(u64::from(channel % MAX_CHANNELS), position);
        compiler_fence(Ordering::SeqCst);
    }

    /// What [`Journal::set_position`] wrote.
    pub(crate) fn position(&self, channel: u16) -> u32 {
        self.read(u64::from(channel % MAX_CHANNELS))
    }

    fn set_round(&self, channel: u16, round: u32) {
        self.write(ROUNDS + u64::from(channel % MAX_CHANNELS), round);
        compiler_fence(Ordering::SeqCst);
    }

    /// Up to where the round that is recorded takes the ring from the guest: it is over for a successor that finds the ring
    /// taken up to there.
    pub(crate) fn round(&self, channel: u16) -> Option<u32> {
        let word = self.read(ROUNDS + u64::from(channel % MAX_CHANNELS));
        (word & ROUND != 0).then_some(word & !ROUND)
    }

    /// Once channel `channel`'s ring to the guest goes on from `ends.write`, all up to `ends.read` of the other is taken.
    pub(crate) fn begin_round(&self, channel: u16, ends: Ends) {
        // In this order: the last round's index is where the ring stands already.
        self.set_position(channel, ends.write);
        self.set_round(channel, ends.read | ROUND);
    }

    /// What the channel's last round has done is known.
    pub(crate) fn forget_round(&self, channel: u16) {
        self.set_round(channel, 0);
    }

    /// Up to where the last round of `channel`, whose ring to the guest ends at `write`, has taken the other: `None` if
    /// the guest has seen nothing of that round.
    pub(crate) fn ended_round(&self, channel: u16, write: u32) -> Option<u32> {
        self.round(channel).filter(|_| self.position(channel) != write)
    }

    /// The channel is new.
    pub(crate) fn forget(&self, channel: u16) {
        self.forget_round(channel);
        if channel == 0 {
            self.set_count(Count::Shown, 0);
            self.set_count(Count::Owed, 0);
        }
    }

    /// The count is `value` once what it depends on has happened.
    pub(crate) fn begin_count(&self, count: Count, value: u32) {
        self.write(COUNTS + count as u64 + 1, value);
        compiler_fence(Ordering::SeqCst);
    }

    /// What the count depended on has happened.
    pub(crate) fn end_count(&self, count: Count, value: u32) {
        compiler_fence(Ordering::SeqCst);
        self.write(COUNTS + count as u64, value);
        compiler_fence(Ordering::SeqCst);
    }

    /// The count is `value`, whatever happens.
    pub(crate) fn set_count(&self, count: Count, value: u32) {
        self.begin_count(count, value);
        self.end_count(count, value);
    }

    /// The count where what it depended on has `happened`, or has not.
    pub(crate) fn count(&self, count: Count, happened: bool) -> u32 {
        self.read(COUNTS + count as u64 + u64::from(happened))
    }
}
