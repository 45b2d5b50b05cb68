//! What changes the table, behind its lock: counts and limits, the learn rate, and flapping addresses.

use super::Config;
use super::Fdb;
use super::Flap;
use super::Learned;
use super::PortIndex;
use super::StaticError;
use super::key::Key;
use super::table::ENTRIES;
use super::table::Place;
use super::table::Table;
use super::table::Value;
use std::collections::VecDeque;
use std::sync::atomic::Ordering::Relaxed;

#[derive(Debug)]
pub(super) struct Writer {
    rate: LearnRate,
    moves: Moves,
    /// The bucket at which aging goes on.
    pub cursor: usize,
    pub statics: u32,
    pub totals: Totals,
}

/// What was done since the table was made.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Totals {
    pub learned: u64,
    pub moved: u64,
    pub frozen: u64,
    pub aged: u64,
    pub removed: u64,
}

impl Writer {
    pub fn new(config: &Config, table: &Table) -> Self {
        Self {
            rate: LearnRate { rate: config.learn_rate, tokens: config.learn_rate, filled_at: None },
            moves: Moves::new(config.flap, table.buckets() * ENTRIES),
            cursor: 0,
            statics: 0,
            totals: Totals::default(),
        }
    }

    /// The lock-free part of `Fdb::learn` did not settle it: look again, now that nobody else changes anything.
    pub fn learn(&mut self, fdb: &Fdb, key: Key, port: PortIndex, now: u32) -> Learned {
        self.thaw(fdb, now);
        match fdb.table.find(key, fdb.table.slot(key)) {
            Some((_, value)) if value.port() == port => Learned::Known,
            // Again: it may have got its owner since the lock-free part.
            _ if fdb.is_foreign(key, port) => Learned::RefusedStatic,
            Some((_, value)) if value.is_static() => Learned::RefusedStatic,
            Some((_, value)) if value.is_frozen() => Learned::RefusedFlapping,
            Some((place, value)) => self.relocate(fdb, key, place, value, port, now),
            None => self.enter(fdb, key, port, now),
        }
    }

    fn enter(&mut self, fdb: &Fdb, key: Key, port: PortIndex, now: u32) -> Learned {
        let Some(cell) = fdb.ports.get(usize::from(port)).filter(|cell| !cell.is_full()) else {
            return Learned::RefusedPortLimit;
        };
        if fdb.signals.entries.load(Relaxed) >= fdb.config.capacity {
            return Learned::RefusedFull;
        }
        if !self.rate.take(fdb, now) {
            return Learned::RefusedRate;
        }
        let Some(place) = fdb.table.insert(key, Value::dynamic(port, now)) else {
            return Learned::RefusedFull;
        };
        self.moves.forget(place);
        cell.learned.fetch_add(1, Relaxed);
        fdb.signals.entries.fetch_add(1, Relaxed);
        self.totals.learned += 1;
        Learned::New
    }

    fn relocate(
        &mut self,
        fdb: &Fdb,
        key: Key,
        place: Place,
        value: Value,
        port: PortIndex,
        now: u32,
    ) -> Learned {
        let Some(cell) = fdb.ports.get(usize::from(port)).filter(|cell| !cell.is_full()) else {
            return Learned::RefusedPortLimit;
        };
        if !self.rate.take(fdb, now) {
            return Learned::RefusedRate;
        }
        if !self.moves.allow(place, now) {
            fdb.table.replace(place, value.frozen(true));
            self.moves.freeze(fdb, key, place, now);
            self.totals.frozen += 1;
            return Learned::RefusedFlapping;
        }
        fdb.table.replace(place, Value::dynamic(port, now));
        count_down(fdb, value);
        cell.learned.fetch_add(1, Relaxed);
        self.totals.moved += 1;
        Learned::Moved { from: value.port() }
    }

    /// Pins `key` to `port`, whatever it was before.
    pub fn pin(&mut self, fdb: &Fdb, key: Key, port: PortIndex) -> Result<(), StaticError> {
        if let Some((place, value)) = fdb.table.find(key, fdb.table.slot(key)) {
            fdb.table.replace(place, Value::fixed(port));
            count_down(fdb, value);
            self.statics += u32::from(!value.is_static());
            return Ok(());
        }
        let full = fdb.signals.entries.load(Relaxed) >= fdb.config.capacity;
        let place = if full { None } else { fdb.table.insert(key, Value::fixed(port)) };
        let place = place.ok_or(StaticError::Full)?;
        self.moves.forget(place);
        fdb.signals.entries.fetch_add(1, Relaxed);
        self.statics += 1;
        Ok(())
    }

    /// Removes what is at `place`. False if a reader has refreshed it since `value` was read.
    pub fn remove(&mut self, fdb: &Fdb, place: Place, key: Key, value: Value) -> bool {
        let removed = fdb.table.remove(place, key, value);
        if removed {
            count_down(fdb, value);
            self.statics -= u32::from(value.is_static());
            fdb.signals.entries.fetch_sub(1, Relaxed);
        }
        removed
    }

    /// Lets go of the addresses whose hold is over.
    pub fn thaw(&mut self, fdb: &Fdb, now: u32) {
        while let Some(hold) = self.moves.over(now) {
            let held = fdb.table.entry(hold.place).read();
            // The place may have been given to another address, which may itself be held.
            if let Some((key, value)) = held
                && key == hold.key
                && self.moves.since[hold.place.0] == hold.until
                && value.is_frozen()
            {
                fdb.table.replace(hold.place, value.frozen(false));
                self.moves.forget(hold.place);
            }
        }
        self.moves.signal(fdb);
    }

    /// Addresses held on their port, those removed meanwhile included.
    pub fn held(&self) -> usize {
        self.moves.holds.len()
    }
}

/// Statics do not count against a port's limit.
fn count_down(fdb: &Fdb, value: Value) {
    if let Some(cell) = fdb.ports.get(usize::from(value.port()))
        && !value.is_static()
    {
        cell.learned.fetch_sub(1, Relaxed);
    }
}

/// A token bucket in whole seconds.
#[derive(Debug)]
struct LearnRate {
    rate: u32,
    tokens: u32,
    filled_at: Option<u32>,
}

impl LearnRate {
    fn take(&mut self, fdb: &Fdb, now: u32) -> bool {
        // One second's worth is all the bucket holds. A worker whose clock is a tick behind fills nothing.
        if self.filled_at.is_none_or(|at| at < now) {
            self.tokens = self.rate;
            self.filled_at = Some(now);
        }
        match self.tokens.checked_sub(1) {
            Some(left) => {
                self.tokens = left;
                true
            }
            None => {
                fdb.signals.spent_at.store(now, Relaxed);
                false
            }
        }
    }
}

/// How often each entry's address moved, beside the table as only the writer needs it. The arrays start as zero
/// pages and take no memory where nothing moves.
#[derive(Debug)]
struct Moves {
    flap: Flap,
    /// Start of the window; of a frozen entry, the end of its hold.
    since: Vec<u32>,
    count: Vec<u8>,
    /// In order of time, as each hold is equally long.
    holds: VecDeque<Hold>,
}

#[derive(Debug)]
struct Hold {
    place: Place,
    key: Key,
    until: u32,
}

impl Moves {
    fn new(flap: Flap, entries: usize) -> Self {
        Self { flap, since: vec![0; entries], count: vec![0; entries], holds: VecDeque::new() }
    }

    fn forget(&mut self, place: Place) {
        // A store only where something was counted, so that zero pages stay untouched.
        if self.count[place.0] != 0 {
            self.count[place.0] = 0;
        }
    }

    /// Counts a move. False if it is one too many.
    fn allow(&mut self, place: Place, now: u32) -> bool {
        let (since, count) = (&mut self.since[place.0], &mut self.count[place.0]);
        if *count == 0 || now.saturating_sub(*since) >= self.flap.window {
            (*since, *count) = (now, 0);
        }
        let allowed = *count < self.flap.moves;
        *count = count.saturating_add(1);
        allowed
    }

    fn freeze(&mut self, fdb: &Fdb, key: Key, place: Place, now: u32) {
        let until = now.saturating_add(self.flap.hold);
        self.since[place.0] = until;
        self.holds.push_back(Hold { place, key, until });
        self.signal(fdb);
    }

    /// The next hold that is over, if any.
    fn over(&mut self, now: u32) -> Option<Hold> {
        self.holds.front().is_some_and(|hold| hold.until <= now).then(|| self.holds.pop_front()).flatten()
    }

    fn signal(&self, fdb: &Fdb) {
        let first = self.holds.front().map_or(u32::MAX, |hold| hold.until);
        fdb.signals.thaw_at.store(first, Relaxed);
    }
}
