//! Sections of the guest's receive buffer: which are free, and which the guest still has.
//!
//! A section is the guest's from the moment its range is put in a type-7 packet until the guest completes that packet.
//! All channels of an adapter share the buffer, so each keeps a small stock of free sections under the lock it holds
//! anyway, and goes to the shared pool only to fill or to empty it. The sections of one packet are a chain that begins at
//! the packet's transaction id: giving a packet back costs one look at a private word per section.
//!
//! Every word is also written to a *journal* outside the process, one plain store each. A switch that takes the adapter
//! over learns from it what the guest still owns. A word says "unpublished" until the packet is in the ring for the guest
//! to see, and the ring's write position from before is kept beside it, so that the successor knows which of the two
//! moments its predecessor died at.
//!
//! A source ends a *round* with two stores that cannot be one: the write index that shows the guest its completions, and
//! the read index that gives it its packets' room back. So the journal is told first where the one stands and where the
//! other will, and which sections the round's packets give back. The successor finds a write index that has moved on: then
//! the round is over, and the read index follows. Nothing of it lies where the guest can write, but for the indices.
//!
//! Cost per section: one pop, two stores to take it; one load, three stores, one push to give it back. Per round: two stores.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::journal::{Ends, Journal, MAX_SECTIONS};

/// Sections that only control messages may take: without them a flood of frames could keep a reply from the guest. Half
/// of them all, if there are few.
pub(crate) const RESERVE: usize = 16;

/// Most sections in one packet (netvsp.md §9).
pub(crate) const MAX_CHAIN: usize = 375;

const BUSY: u32 = 1 << 31;
const FIRST: u32 = 1 << 30;
const UNPUBLISHED: u32 = 1 << 29;
/// The round that is recorded gives the chain back. Only in the journal.
const RETURNED: u32 = 1 << 28;
const CHANNEL_SHIFT: u32 = 20;
const CHANNEL_MASK: u32 = 0x7f;
const NEXT_MASK: u32 = (1 << CHANNEL_SHIFT) - 1;
/// No section follows.
const LAST: u32 = NEXT_MASK;

/// A completion that names no packet of the channel that the guest has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("receive completion for transaction {transaction:#x}, which is not outstanding on channel {channel}")]
pub struct NotOutstanding {
    /// The transaction id that the guest gave.
    pub transaction: u64,
    /// The channel it came on.
    pub channel: u16,
}

/// The sections of one receive buffer.
#[derive(Debug)]
pub(crate) struct Sections {
    /// A word per section: 0 while it is free or on its way back.
    words: Box<[AtomicU32]>,
    free: Mutex<Vec<u32>>,
    journal: Journal,
    /// Free sections that a channel keeps at most.
    stock: usize,
    /// What the pool keeps for control messages, and whether it may have less: what comes back goes there first then.
    reserve: usize,
    low: AtomicBool,
}

/// Free sections at hand.
pub(crate) type Stock = Vec<u32>;

fn word(channel: u16, next: u32) -> u32 {
    BUSY | (u32::from(channel) & CHANNEL_MASK) << CHANNEL_SHIFT | next
}

impl Sections {
    /// `count` free sections (at most [`MAX_SECTIONS`]).
    pub(crate) fn new(count: u32, journal: Journal) -> Self {
        let count = count.min(MAX_SECTIONS);
        (0..count).for_each(|section| journal.set(section, 0));
        let sections = Self::busy(count, journal);
        *sections.pool() = (0..count).rev().collect();
        sections
    }

    /// Sections of which none is free.
    fn busy(count: u32, journal: Journal) -> Self {
        let all = count as usize;
        Self {
            words: (0..count).map(|_| AtomicU32::new(0)).collect(),
            free: Mutex::default(),
            journal,
            // So few that idle channels leave most of them to the others.
            stock: (all / 128).min(128),
            reserve: RESERVE.min(all / 2),
            low: AtomicBool::new(true),
        }
    }

    /// `count` sections as the journal says. `ends` tells where a channel's rings stand, if there is the channel.
    ///
    /// What the journal says is only believed as far as it makes chains: a section in no chain, or in two, is free.
    pub(crate) fn restore(count: u32, journal: Journal, ends: impl Fn(u16) -> Option<Ends>) -> Self {
        let sections = Self::busy(count.min(MAX_SECTIONS), journal);
        let kept: Vec<u32> = (0..sections.count()).map(|section| sections.journal.get(section)).collect();
        for (first, &head) in (0..).zip(&kept) {
            if head & (BUSY | FIRST) != BUSY | FIRST {
                continue;
            }
            let channel = u16::try_from(head >> CHANNEL_SHIFT & CHANNEL_MASK).unwrap_or(0);
            let ends = ends(channel);
            let never_seen = head & UNPUBLISHED != 0
                && ends.is_none_or(|ends| ends.write == sections.journal.position(channel));
            // Its completion will not be read again.
            let given_back = head & RETURNED != 0
                && ends.is_none_or(|ends| sections.journal.round(channel) == Some(ends.read));
            if !never_seen && !given_back {
                sections.adopt(first, channel, &kept);
            }
        }
        let free = (0..sections.count()).rev().filter(|&section| {
            let is_free = sections.load(section) == 0;
            if is_free {
                sections.journal.set(section, 0);
            }
            is_free
        });
        *sections.pool() = free.collect();
        sections
    }

    /// Takes over the chain from `first` on, as far as it is one.
    fn adopt(&self, first: u32, channel: u16, kept: &[u32]) {
        let (mut at, mut flag) = (first, FIRST);
        for _ in 0..MAX_CHAIN {
            let Some(&old) = kept.get(at as usize).filter(|_| self.load(at) == 0) else { return };
            let next = old & NEXT_MASK;
            let fits = |next: u32| {
                next != at
                    && self.load(next) == 0
                    && kept.get(next as usize).is_some_and(|word| word & (BUSY | FIRST) == BUSY)
            };
            let next = if fits(next) { next } else { LAST };
            self.store(at, word(channel, next) | flag);
            self.journal.set(at, word(channel, next) | flag);
            if next == LAST {
                return;
            }
            (at, flag) = (next, 0);
        }
    }

    /// Sections in all.
    pub(crate) fn count(&self) -> u32 {
        u32::try_from(self.words.len()).unwrap_or(MAX_SECTIONS)
    }

    /// True if the guest has none of them.
    pub(crate) fn are_back(&self) -> bool {
        self.words.iter().all(|word| word.load(Ordering::Relaxed) == 0)
    }

    fn pool(&self) -> std::sync::MutexGuard<'_, Vec<u32>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn load(&self, section: u32) -> u32 {
        self.words.get(section as usize).map_or(BUSY, |word| word.load(Ordering::Relaxed))
    }

    fn store(&self, section: u32, value: u32) {
        if let Some(word) = self.words.get(section as usize) {
            word.store(value, Ordering::Relaxed);
        }
    }

    /// Sees to it that `stock` has `wanted` sections. False if there are not so many.
    #[inline]
    pub(crate) fn fill(&self, stock: &mut Stock, wanted: usize) -> bool {
        stock.len() >= wanted || self.refill(stock, wanted, false)
    }

    /// As [`Sections::fill`], for control messages.
    pub(crate) fn fill_reserved(&self, stock: &mut Stock, wanted: usize) -> bool {
        stock.len() >= wanted || self.refill(stock, wanted, true)
    }

    #[cold]
    fn refill(&self, stock: &mut Stock, wanted: usize, control: bool) -> bool {
        let mut pool = self.pool();
        // Frames use what is in stock, so that nothing of the reserve comes there for later.
        let (keep, more) = if control { (0, 0) } else { (self.reserve, self.stock / 2) };
        let spare = pool.len().saturating_sub(keep);
        let count = (wanted - stock.len() + more).min(spare);
        let at = pool.len() - count;
        stock.extend(pool.drain(at..));
        self.low.store(pool.len() < self.reserve, Ordering::Relaxed);
        stock.len() >= wanted
    }

    /// The sections of `chain`, which came from a stock, are about to be shown to the guest in one packet on `channel`.
    /// Its transaction id is the first section's number. It cannot be completed before it is [`Sections::written`].
    pub(crate) fn occupy(&self, channel: u16, chain: &[u32]) {
        let nexts = chain.iter().skip(1).copied().chain(std::iter::once(LAST));
        let mut flag = FIRST | UNPUBLISHED;
        for (&section, next) in chain.iter().zip(nexts) {
            let value = word(channel, next) | flag;
            self.store(section, value);
            self.journal.set(section, value);
            flag = 0;
        }
    }

    /// The packet of transaction `first` will be shown to the guest.
    pub(crate) fn written(&self, first: u32) {
        self.store(first, self.load(first) & !UNPUBLISHED);
    }

    /// The guest sees the packet of transaction `first` now.
    pub(crate) fn published(&self, first: u32) {
        self.journal.set(first, self.load(first));
    }

    /// The packet of `chain` was not shown to the guest after all.
    pub(crate) fn withdraw(&self, chain: &[u32], stock: &mut Stock) {
        for &section in chain {
            self.store(section, 0);
            self.journal.set(section, 0);
            stock.push(section);
        }
    }

    /// The guest completed `transaction` on `channel`: its sections are added to `back`, for [`Sections::release`].
    ///
    /// # Errors
    /// [`NotOutstanding`]: it never had that packet, or completed it before.
    pub(crate) fn finish(
        &self,
        channel: u16,
        transaction: u64,
        back: &mut Vec<u32>,
    ) -> Result<(), NotOutstanding> {
        let wrong = NotOutstanding { transaction, channel };
        let mut section = u32::try_from(transaction).map_err(|_| wrong)?;
        let head = self.words.get(section as usize).ok_or(wrong)?.load(Ordering::Relaxed);
        let mine = head >> CHANNEL_SHIFT & CHANNEL_MASK == u32::from(channel) & CHANNEL_MASK;
        if head & (BUSY | FIRST | UNPUBLISHED) != BUSY | FIRST || !mine {
            return Err(wrong);
        }
        for _ in 0..MAX_CHAIN {
            let next = self.load(section) & NEXT_MASK;
            self.store(section, 0);
            back.push(section);
            if next == LAST {
                break;
            }
            section = next;
        }
        Ok(())
    }

    /// The round that is recorded gives the sections of `back` back.
    pub(crate) fn returned(&self, back: &[u32]) {
        for &section in back {
            let word = self.journal.get(section);
            if word & FIRST != 0 {
                self.journal.set(section, word | RETURNED);
            }
        }
    }

    /// The sections of `back` are free: the guest's completion is not going to be read again.
    pub(crate) fn release(&self, back: &mut Vec<u32>, stock: &mut Stock) {
        for &section in &*back {
            self.journal.set(section, 0);
        }
        stock.append(back);
        let full = stock.len() > self.stock;
        if full || self.low.load(Ordering::Relaxed) {
            let mut pool = self.pool();
            let lacking = self.reserve.saturating_sub(pool.len()).min(stock.len());
            // The oldest go: the others are in the caches.
            let count = if full { lacking.max(stock.len() - self.stock / 2) } else { lacking };
            pool.extend(stock.drain(..count));
            self.low.store(pool.len() < self.reserve, Ordering::Relaxed);
        }
    }

    /// A channel is closed: what its guest had of it, and what it kept in `stock`, is free.
    pub(crate) fn release_channel(&self, channel: u16, stock: &mut Stock) {
        let busy = (0..self.count()).filter(|&section| {
            let word = self.load(section);
            word & BUSY != 0 && word >> CHANNEL_SHIFT & CHANNEL_MASK == u32::from(channel) & CHANNEL_MASK
        });
        let mut back: Vec<u32> = busy.collect();
        for &section in &back {
            self.store(section, 0);
            self.journal.set(section, 0);
        }
        back.append(stock);
        self.pool().append(&mut back);
    }

    /// Sections in the shared pool.
    #[cfg(test)]
    pub(crate) fn pooled(&self) -> usize {
        self.pool().len()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vmq::memory::{GuestMemory, Mapping, Region};

    use super::*;
    use crate::journal::JOURNAL_BYTES;

    fn journal() -> Journal {
        let bytes = usize::try_from(JOURNAL_BYTES).unwrap();
        let mapping = Arc::new(Mapping::memfd("sections", bytes).unwrap().0);
        let region = Region::new(0, 0, JOURNAL_BYTES, mapping, 0).unwrap();
        Journal::new(Arc::new(GuestMemory::new(vec![region], None).unwrap()), 0)
    }

    fn take(sections: &Sections, stock: &mut Stock, channel: u16, count: usize) -> Vec<u32> {
        assert!(sections.fill(stock, count));
        let at = stock.len() - count;
        let chain: Vec<u32> = stock.drain(at..).collect();
        sections.occupy(channel, &chain);
        sections.written(chain[0]);
        chain
    }

    #[test]
    fn completion_gives_back_the_whole_chain_once() {
        let sections = Sections::new(100, journal());
        let (mut stock, mut back) = (Vec::new(), Vec::new());
        let chain = take(&sections, &mut stock, 3, 5);
        let transaction = u64::from(chain[0]);
        assert!(sections.finish(4, transaction, &mut back).is_err(), "another channel's");
        assert!(sections.finish(3, u64::from(chain[1]), &mut back).is_err(), "the middle of a chain");
        assert!(sections.finish(3, 100, &mut back).is_err());
        assert!(sections.finish(3, u64::MAX, &mut back).is_err());
        sections.finish(3, transaction, &mut back).unwrap();
        assert_eq!(back, chain);
        assert!(sections.finish(3, transaction, &mut back).is_err(), "completed twice");
        sections.release(&mut back, &mut stock);
        sections.release_channel(3, &mut stock);
        assert_eq!(sections.pooled(), 100);
    }

    #[test]
    fn completion_guessed_before_its_packet_is_written_frees_nothing_twice() {
        let sections = Sections::new(100, journal());
        let (mut stock, mut back) = (Vec::new(), Vec::new());
        assert!(sections.fill(&mut stock, 3));
        let chain: Vec<u32> = stock.drain(..3).collect();
        sections.occupy(1, &chain);
        // The ring may be full yet: then the sections are back in stock.
        assert!(sections.finish(1, chain[0].into(), &mut back).is_err());
        sections.withdraw(&chain, &mut stock);
        sections.release(&mut back, &mut stock);
        sections.release_channel(1, &mut stock);
        assert_eq!(sections.pooled(), 100);
    }

    #[test]
    fn reserve_is_left_for_control_messages() {
        let sections = Sections::new(40, journal());
        let mut stock = Vec::new();
        assert!(sections.fill(&mut stock, 40 - RESERVE));
        assert!(!sections.fill(&mut stock, 40 - RESERVE + 1));
        assert!(sections.fill_reserved(&mut stock, 40));
    }

    #[test]
    fn few_sections_serve_frames_and_answers() {
        for count in 2..=16 {
            let sections = Sections::new(count, journal());
            let (mut one, mut two) = (Vec::new(), Vec::new());
            assert!(sections.fill(&mut one, 1) && sections.fill_reserved(&mut two, 1), "{count}");
        }
    }

    #[test]
    fn idle_channels_leave_sections_to_the_others() {
        let sections = Sections::new(200, journal());
        for channel in 0..64 {
            let (mut stock, mut back) = (Vec::new(), Vec::new());
            let chain = take(&sections, &mut stock, channel, 20);
            sections.finish(channel, chain[0].into(), &mut back).unwrap();
            sections.release(&mut back, &mut stock);
        }
        assert!(sections.pooled() >= 200 - 64);
    }

    #[test]
    fn reserve_is_whole_again_after_any_number_of_answers() {
        let sections = Sections::new(4096, journal());
        let (mut stock, mut all) = (Vec::new(), Vec::new());
        assert!(sections.fill(&mut all, 4096 - RESERVE));
        for _ in 0..2 * RESERVE {
            assert!(sections.fill_reserved(&mut stock, 1));
            assert_eq!(stock.len(), 1, "frames could take what is more");
            let section = stock.pop().unwrap();
            assert!(!sections.fill(&mut stock, 1));
            sections.release(&mut vec![section], &mut stock);
        }
        assert_eq!((stock.len(), sections.pooled()), (0, RESERVE));
    }

    #[test]
    fn successor_knows_what_the_guest_has() {
        let journal = journal();
        let sections = Sections::new(100, journal.clone());
        let mut stock = Vec::new();
        journal.set_position(1, 800);
        let seen = take(&sections, &mut stock, 1, 3);
        sections.published(seen[0]);
        let unseen = take(&sections, &mut stock, 1, 2);
        let other = take(&sections, &mut stock, 2, 1);
        drop(sections);

        let ends = |channel| Some(Ends { write: if channel == 1 { 800 } else { 64 }, read: 0 });
        let successor = Sections::restore(100, journal.clone(), ends);
        let mut back = Vec::new();
        assert!(successor.finish(1, u64::from(unseen[0]), &mut back).is_err());
        successor.finish(1, u64::from(seen[0]), &mut back).unwrap();
        assert_eq!(back, seen);
        // Its ring moved on, so the guest has seen it.
        successor.finish(2, u64::from(other[0]), &mut back).unwrap();
        assert_eq!(successor.pooled(), 100 - 4);
    }

    #[test]
    fn journal_of_nonsense_makes_every_section_free_or_part_of_one_chain() {
        let journal = journal();
        let mut random = 1u32;
        for section in 0..500 {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let next = if section % 3 == 0 { random % 600 } else { LAST };
            journal.set(section, random & (BUSY | FIRST | UNPUBLISHED) | next);
        }
        let sections = Sections::restore(500, journal, |_| Some(Ends { write: 0, read: 0 }));
        let mut back = Vec::new();
        for transaction in 0..600 {
            let _ = sections.finish(0, transaction, &mut back);
        }
        let mut all = back.clone();
        all.extend(sections.pool().iter());
        all.sort_unstable();
        assert_eq!(all, (0..500).collect::<Vec<_>>());
    }
}
