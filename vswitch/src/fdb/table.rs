//! The buckets: one cache line of four entries, read without a lock.
//!
//! # Why a reader never gets another key's port
//!
//! An entry is two words, the key and the value, and the value carries a generation that changes whenever the
//! entry is given up. Only the holder of the writer's lock changes keys, in this order:
//!
//! - give up:  value ← invalid, generation g + 1;  then key ← 0
//! - take:     key ← k;  then value ← valid, port, generation g + 1
//!
//! with release stores throughout. A reader loads value, key, value, the first two with acquire. Let the first
//! load give a valid value of generation g. It happened after the store of g's key, so the second load gives that
//! key or a later one. A later one was stored after the entry's generation became g + 1, so the third load gives
//! g + 1 or later. Hence, if the generations of both values are equal, the key is the key of generation g.
//!
//! That fails only if the 25-bit generation comes round between the first and the third load: 2^25 reuses of one
//! entry, each of which needs the aging time to pass or a command of the operator, while one thread stands between
//! two adjacent instructions. No guest can bring about even one of them: learning never evicts.
//!
//! The only store of a reader is the time-stamp refresh, a compare-and-swap on the whole value: it fails if the
//! entry was moved or given up, and being a read-modify-write it keeps the writer's release visible to others.

use super::PortIndex;
use super::key::KEY_MASK;
use super::key::Key;
use super::key::Secret;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Acquire;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::Ordering::Release;

pub(super) const ENTRIES: usize = 4;
/// Buckets that may hold a key: its home, and those it spills to when the home is full. At a load of one half 4 %
/// of the keys spill and about one bucket in six is full, so that 0.04 × 6^-7 of the keys find no place.
const PROBES: u32 = 8;
const MIN_BUCKETS: usize = 16;
const MAX_BUCKETS: usize = 1 << 28;
/// The four bits above the key of a bucket's first entry count the keys that spilled out of the bucket.
const SPILL_SHIFT: u32 = 60;
/// A count that reached its end is not counted down any more: the bucket is then always searched further.
const SPILL_MAX: u64 = 15;

/// Time stamps are kept modulo this, in seconds.
pub(super) const TIME_RANGE: u32 = 1 << 20;

/// Where to look for a key: its hash, made by [`super::Fdb::hash`], good for that table only.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Slot(u64);

/// The value word: port 16, time 20, flags 3, generation 25 bits from the low end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Value(u64);

const SEEN_SHIFT: u32 = 16;
const SEEN_MASK: u64 = (TIME_RANGE as u64 - 1) << SEEN_SHIFT;
const PORT_MASK: u64 = 0xffff;
const VALID: u64 = 1 << 36;
const STATIC: u64 = 1 << 37;
const FROZEN: u64 = 1 << 38;
const GENERATION_SHIFT: u32 = 39;

impl Value {
    /// A dynamic value; the entry adds its generation when it takes it.
    pub fn dynamic(port: PortIndex, now: u32) -> Self {
        Self(VALID | u64::from(port)).seen_at(now)
    }

    /// A static value, which neither ages nor moves.
    pub fn fixed(port: PortIndex) -> Self {
        Self(VALID | STATIC | u64::from(port))
    }

    #[inline]
    pub fn port(self) -> PortIndex {
        (self.0 & PORT_MASK) as PortIndex
    }

    pub fn is_static(self) -> bool {
        self.0 & STATIC != 0
    }

    pub fn is_frozen(self) -> bool {
        self.0 & FROZEN != 0
    }

    pub fn frozen(self, frozen: bool) -> Self {
        Self(if frozen { self.0 | FROZEN } else { self.0 & !FROZEN })
    }

    #[inline]
    pub fn seen_at(self, now: u32) -> Self {
        Self(self.0 & !SEEN_MASK | (u64::from(now) << SEEN_SHIFT) & SEEN_MASK)
    }

    /// True if the value says `port` and the very second `now`: the usual case, in one comparison.
    #[inline]
    pub fn says(self, port: PortIndex, now: u32) -> bool {
        let said = u64::from(port) | u64::from(now) << SEEN_SHIFT;
        (self.0 ^ said) & (PORT_MASK | SEEN_MASK) == 0
    }

    /// True if the time stamp is not older than `now`, or the value needs none.
    #[inline]
    pub fn is_fresh(self, now: u32) -> bool {
        self.age(now) == 0 || self.is_static()
    }

    /// Seconds since the address was seen. Workers' clocks may differ by a tick: a stamp ahead of `now` is age 0.
    #[inline]
    pub fn age(self, now: u32) -> u32 {
        let seen = ((self.0 & SEEN_MASK) >> SEEN_SHIFT) as u32;
        let age = now.wrapping_sub(seen) % TIME_RANGE;
        if age < TIME_RANGE / 2 { age } else { 0 }
    }

    fn is_valid(self) -> bool {
        self.0 & VALID != 0
    }

    fn generation(self) -> u64 {
        self.0 >> GENERATION_SHIFT
    }

    fn of_generation(self, generation: u64) -> Self {
        Self(self.0 & !(u64::MAX << GENERATION_SHIFT) | generation << GENERATION_SHIFT)
    }
}

#[derive(Debug, Default)]
pub(super) struct Entry {
    key: AtomicU64,
    value: AtomicU64,
}

impl Entry {
    /// The key and its value, if the entry is in use; see the module's text.
    #[inline]
    pub fn read(&self) -> Option<(Key, Value)> {
        let value = Value(self.value.load(Acquire));
        let key = Key(self.key.load(Acquire) & KEY_MASK);
        let again = Value(self.value.load(Relaxed));
        (value.is_valid() && value.generation() == again.generation()).then_some((key, value))
    }

    /// As [`Entry::read`], if the key is `key`: one branch for all that may be amiss.
    #[inline]
    fn read_of(&self, key: Key) -> Option<Value> {
        let value = self.value.load(Acquire);
        let found = self.key.load(Acquire) & KEY_MASK;
        let again = self.value.load(Relaxed);
        let wrong = (value ^ again) >> GENERATION_SHIFT | !value & VALID | found ^ key.0;
        (wrong == 0).then_some(Value(value))
    }

    /// Notes that `value`'s owner was seen. False if the value has changed meanwhile.
    #[inline]
    pub fn refresh(&self, value: Value, now: u32) -> bool {
        self.value.compare_exchange(value.0, value.seen_at(now).0, Relaxed, Relaxed).is_ok()
    }

    fn is_free(&self) -> bool {
        !Value(self.value.load(Relaxed)).is_valid()
    }

    fn take(&self, key: Key, value: Value) {
        let spilled = self.key.load(Relaxed) & !KEY_MASK;
        let generation = Value(self.value.load(Relaxed)).generation();
        self.key.store(spilled | key.0, Release);
        self.value.store(value.of_generation(generation).0, Release);
    }

    /// Gives `value`'s new contents to the key that is here.
    fn replace(&self, value: Value) {
        let generation = Value(self.value.load(Relaxed)).generation();
        self.value.store(value.of_generation(generation).0, Release);
    }

    /// Frees the entry unless its value has changed from `value`.
    fn give_up(&self, value: Value) -> bool {
        let free = Value(0).of_generation(value.generation().wrapping_add(1));
        let freed = self.value.compare_exchange(value.0, free.0, Release, Relaxed).is_ok();
        if freed {
            self.key.store(self.key.load(Relaxed) & !KEY_MASK, Release);
        }
        freed
    }
}

#[derive(Debug, Default)]
#[repr(align(64))]
pub(super) struct Bucket {
    entries: [Entry; ENTRIES],
}

impl Bucket {
    /// Compares all four keys before it branches once: the position of a key is not predictable.
    #[inline]
    fn find(&self, key: Key) -> Option<(usize, Value)> {
        let [first, second, third, fourth] = self.entries.each_ref().map(|entry| entry.key.load(Relaxed));
        // Only the first entry has a count above its key.
        let hits = u32::from(first & KEY_MASK == key.0)
            | u32::from(second == key.0) << 1
            | u32::from(third == key.0) << 2
            | u32::from(fourth == key.0) << 3;
        if hits == 0 {
            return None;
        }
        let at = hits.trailing_zeros() as usize % ENTRIES;
        let value = self.entries[at].read_of(key)?;
        Some((at, value))
    }

    #[inline]
    fn spilled(&self) -> u64 {
        self.entries[0].key.load(Relaxed) >> SPILL_SHIFT
    }

    fn set_spilled(&self, count: u64) {
        let key = self.entries[0].key.load(Relaxed) & KEY_MASK;
        self.entries[0].key.store(key | count << SPILL_SHIFT, Release);
    }
}

/// An entry's position: bucket × [`ENTRIES`] + entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place(pub usize);

impl Place {
    #[inline]
    fn new(bucket: usize, entry: usize) -> Self {
        Self(bucket * ENTRIES + entry)
    }
}

/// All buckets of one table. Methods named in the plain form are for any thread; those that take or free entries
/// ([`Table::insert`], [`Table::replace`], [`Table::remove`]) are for the holder of the writer's lock.
#[derive(Debug)]
pub(super) struct Table {
    buckets: Box<[Bucket]>,
    mask: u32,
    secret: Secret,
}

impl Table {
    /// A table for `capacity` keys: twice as many entries, in a power of two of buckets.
    pub fn new(capacity: usize, secret: Secret) -> Self {
        let wanted = capacity.saturating_mul(2).div_ceil(ENTRIES).clamp(MIN_BUCKETS, MAX_BUCKETS);
        let buckets = vmq::memory::table(wanted.next_power_of_two(), Bucket::default);
        let mask = u32::try_from(buckets.len() - 1).unwrap_or(u32::MAX);
        Self { buckets, mask, secret }
    }

    pub fn buckets(&self) -> usize {
        self.buckets.len()
    }

    #[inline]
    pub fn slot(&self, key: Key) -> Slot {
        Slot(self.secret.hash(key))
    }

    /// The bucket of probe `n`: the hash's low half says where the home is, the high half, made odd so that the probes are
    /// distinct buckets, how far it is to the next.
    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "the two halves of the hash are what is wanted")]
    fn index(&self, slot: Slot, n: u32) -> usize {
        let (home, step) = (slot.0 as u32, (slot.0 >> 32) as u32 | 1);
        (home.wrapping_add(step.wrapping_mul(n)) & self.mask) as usize
    }

    #[inline]
    pub fn home(&self, slot: Slot) -> &Bucket {
        &self.buckets[self.index(slot, 0)]
    }

    /// Where `key` is, and its value at one moment within the call.
    #[inline]
    pub fn find(&self, key: Key, slot: Slot) -> Option<(Place, Value)> {
        let index = self.index(slot, 0);
        let home = &self.buckets[index];
        match home.find(key) {
            Some((at, value)) => Some((Place::new(index, at), value)),
            None if home.spilled() == 0 => None,
            None => self.find_spilled(key, slot),
        }
    }

    #[cold]
    #[inline(never)]
    fn find_spilled(&self, key: Key, slot: Slot) -> Option<(Place, Value)> {
        (1..PROBES).find_map(|n| {
            let index = self.index(slot, n);
            self.buckets[index].find(key).map(|(at, value)| (Place::new(index, at), value))
        })
    }

    #[inline]
    pub fn entry(&self, place: Place) -> &Entry {
        &self.buckets[place.0 / ENTRIES].entries[place.0 % ENTRIES]
    }

    /// The places of bucket `index`, wrapping at the table's end.
    pub fn places(&self, index: usize) -> impl Iterator<Item = Place> + use<> {
        let first = index % self.buckets.len() * ENTRIES;
        (first..first + ENTRIES).map(Place)
    }

    /// Puts a key that is not in the table into the first free entry. `None` if all its buckets are full.
    pub fn insert(&self, key: Key, value: Value) -> Option<Place> {
        let slot = self.slot(key);
        (0..PROBES).find_map(|n| {
            let index = self.index(slot, n);
            let at = self.buckets[index].entries.iter().position(Entry::is_free)?;
            if n > 0 {
                // Before the key appears, so that who misses it at home looks further.
                let home = self.home(slot);
                home.set_spilled((home.spilled() + 1).min(SPILL_MAX));
            }
            self.buckets[index].entries[at].take(key, value);
            Some(Place::new(index, at))
        })
    }

    /// Gives the key at `place` another value.
    pub fn replace(&self, place: Place, value: Value) {
        self.entry(place).replace(value);
    }

    /// Frees the entry at `place`, which held `key` with `value`. False if a reader has refreshed it since.
    pub fn remove(&self, place: Place, key: Key, value: Value) -> bool {
        if !self.entry(place).give_up(value) {
            return false;
        }
        let slot = self.slot(key);
        let home = self.home(slot);
        let spilled = home.spilled();
        if place.0 / ENTRIES != self.index(slot, 0) && spilled < SPILL_MAX {
            home.set_spilled(spilled.saturating_sub(1));
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;

    #[test]
    fn bucket_is_one_cache_line() {
        assert_eq!(size_of::<Bucket>(), 64);
        assert_eq!(align_of::<Bucket>(), 64);
    }

    #[test]
    fn value_keeps_its_fields_apart() {
        let value = Value::dynamic(0xffff, u32::MAX).of_generation((1 << 25) - 1);
        assert_eq!((value.port(), value.age(u32::MAX), value.generation()), (0xffff, 0, (1 << 25) - 1));
        assert!(value.is_valid() && !value.is_static() && !value.is_frozen());
        let value = value.frozen(true).seen_at(0);
        assert!(value.is_frozen() && value.is_fresh(0));
        assert_eq!((value.port(), value.generation()), (0xffff, (1 << 25) - 1));
    }

    #[test]
    fn age_survives_the_wrap_of_the_stamp_and_a_clock_behind() {
        let value = Value::dynamic(1, TIME_RANGE - 2);
        assert_eq!(value.age(TIME_RANGE + 3), 5);
        assert_eq!(value.age(TIME_RANGE - 3), 0);
    }

    #[test]
    fn refresh_of_a_given_up_entry_fails() {
        let entry = Entry::default();
        entry.take(Key::new([2; 6], 0), Value::dynamic(1, 5));
        let (_, value) = entry.read().unwrap();
        assert!(entry.give_up(value));
        entry.take(Key::new([2; 6], 0), Value::dynamic(1, 5));
        assert!(!entry.refresh(value, 6), "the same key, port and time, but another generation");
    }

    /// One entry and nothing around it, so that readers meet every stage of the hand-over many times.
    #[test]
    fn entry_that_changes_hands_under_readers_never_pairs_a_key_with_anothers_port() {
        const HANDOVERS: u64 = 2_000_000;
        let (entry, done) = (Entry::default(), AtomicBool::new(false));
        let met = [AtomicBool::new(false), AtomicBool::new(false)];
        let owner = |n: u64| match n % 3 {
            0 => (Key::new([2, 0, 0, 0, 0, 0], 0), 10),
            1 => (Key::new([2, 0, 0, 0, 0, 1], 0), 11),
            _ => (Key::new([2, 0, 0, 0, 0, 2], 0), 12),
        };
        let read = |own: u64, met: &AtomicBool| {
            let (key, port) = owner(own);
            let mut now = 0;
            while !done.load(Relaxed) {
                let listed = entry.read();
                assert!(listed.is_none_or(|(key, value)| (0..3).any(|n| owner(n) == (key, value.port()))));
                let Some(value) = entry.read_of(key) else { continue };
                assert_eq!(value.port(), port);
                met.store(true, Relaxed);
                now += 1;
                entry.refresh(value, now);
            }
        };
        std::thread::scope(|scope| {
            let readers = [scope.spawn(|| read(0, &met[0])), scope.spawn(|| read(1, &met[1]))];
            // On, until both readers have found something to check (or failed).
            let all_met = || met.iter().all(|met| met.load(Relaxed));
            let failed = || readers.iter().any(|reader| reader.is_finished());
            for n in (0..).take_while(|&n| n < HANDOVERS || !all_met() && !failed()) {
                let (key, port) = owner(n);
                entry.take(key, Value::dynamic(port, 0));
                while !entry.read().is_some_and(|(_, value)| entry.give_up(value)) {}
            }
            done.store(true, Relaxed);
        });
    }

    #[test]
    fn keys_beyond_a_full_home_are_found_until_removed_and_the_count_returns_to_zero() {
        let table = Table::new(1, Secret::new([7, 7]));
        let home = |key: &Key| table.index(table.slot(*key), 0);
        let first = Key::new([2, 0, 0, 0, 0, 0], 0);
        let candidates =
            (0..4000u16).map(|n| Key::new([2, 0, 0, 0, n.to_be_bytes()[0], n.to_be_bytes()[1]], 0));
        let keys: Vec<Key> = candidates.filter(|key| home(key) == home(&first)).take(12).collect();
        let places: Vec<Place> =
            keys.iter().map(|&key| table.insert(key, Value::dynamic(1, 0)).unwrap()).collect();
        assert!(table.buckets.iter().any(|bucket| bucket.spilled() > 0), "12 keys with one home of 4 spill");
        for (&key, &place) in keys.iter().zip(&places) {
            let (_, value) = table.find(key, table.slot(key)).unwrap();
            assert!(table.remove(place, key, value));
            assert!(table.find(key, table.slot(key)).is_none());
        }
        assert!(table.buckets.iter().all(|bucket| bucket.spilled() == 0));
    }
}
