//! The table as the control plane uses it: static entries, limits, aging, flushing, listing.
//!
//! Scans take the writer's lock for [`CHUNK`] buckets at a time, so that workers get their turn to learn.

use super::Fdb;
use super::Key;
use super::Owner;
use super::PortIndex;
use super::key::VLAN_MASK;
use super::owners_of;
use super::writer::Writer;
use serde::Serialize;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

/// Buckets scanned in one hold of the lock: a few microseconds even from memory.
const CHUNK: usize = 64;

/// Why an address was not pinned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StaticError {
    /// A group address or all zeros.
    #[error("{0} is not the address of a station")]
    NotStation(Key),
    /// The port is beyond [`super::Config::ports`].
    #[error("port {port} is out of range: the table was made for {ports} ports")]
    PortRange {
        /// The index asked for.
        port: PortIndex,
        /// The number of ports.
        ports: u16,
    },
    /// The table is full.
    #[error("the address table is full")]
    Full,
}

/// Which entries to flush: those that fit every field. The default is all of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Filter {
    /// Only those of this port.
    pub port: Option<PortIndex>,
    /// Only those in this VLAN.
    pub vlan: Option<u16>,
    /// Leave static entries in place.
    pub dynamic_only: bool,
}

impl Filter {
    fn fits(&self, entry: &FdbEntry) -> bool {
        self.port.is_none_or(|port| port == entry.port)
            && self.vlan.is_none_or(|vlan| vlan == entry.key.vlan())
            && !(self.dynamic_only && entry.is_static)
    }
}

/// One line of a listing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct FdbEntry {
    /// Address and VLAN.
    pub key: Key,
    /// Where it is.
    pub port: PortIndex,
    /// Seconds since it was seen; 0 for a static entry.
    pub age: u32,
    /// Pinned by the operator.
    pub is_static: bool,
    /// Held on its port for moving too often.
    pub is_frozen: bool,
}

/// State and totals of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Stats {
    /// Entries the table may hold.
    pub capacity: u32,
    /// Entries in it, static ones included.
    pub entries: u32,
    /// Static entries.
    pub statics: u32,
    /// Bytes of its buckets.
    pub bytes: usize,
    /// Addresses entered by learning.
    pub learned: u64,
    /// Moves from port to port.
    pub moved: u64,
    /// Entries that aged out.
    pub aged: u64,
    /// Entries removed or flushed.
    pub removed: u64,
    /// Times that an address was frozen.
    pub frozen: u64,
    /// Addresses in a hold now; counts those removed meanwhile until their hold is over.
    pub held: usize,
    /// Frames whose source was not learnt.
    pub refused: Refusals,
}

/// Frames whose source was not learnt, by reason. See [`super::Learned`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Refusals {
    /// Pinned to another port, or its own.
    pub fixed: u64,
    /// Moved too often.
    pub flapping: u64,
    /// Port at its limit.
    pub port_limit: u64,
    /// Table full.
    pub full: u64,
    /// Learn rate used up.
    pub rate: u64,
    /// Not a station's address.
    pub address: u64,
    /// Lock taken.
    pub busy: u64,
}

impl Fdb {
    /// Pins `key` to `port`. It replaces a learnt or static entry, does not age, and does not count against the
    /// port's limit.
    pub fn insert_static(&self, key: Key, port: PortIndex) -> Result<(), StaticError> {
        if !key.is_station() {
            return Err(StaticError::NotStation(key));
        }
        if port >= self.config.ports {
            return Err(StaticError::PortRange { port, ports: self.config.ports });
        }
        self.lock().pin(self, key, port)
    }

    /// Replaces the addresses' owners. What others have learnt of them is forgotten, static entries excepted.
    pub fn set_owners(&self, mut owners: Vec<Owner>) {
        owners.sort_unstable_by_key(|owner| owner.address.0);
        let owners = Arc::new(owners);
        let before = self.owners.swap(Arc::clone(&owners));
        // Whoever is learning under the old owners holds the lock; who takes it next knows the new ones.
        drop(self.lock());
        let is_new = |owner: &&Owner| owners_of(&before, owner.address).all(|known| known != *owner);
        for owner in owners.iter().filter(is_new) {
            let mac = owner.address.mac();
            for vlan in (0..=VLAN_MASK).filter(|&vlan| owner.vlans.carries(vlan)) {
                let key = Key::new(mac, vlan);
                let known = self.table.find(key, self.table.slot(key));
                if known.is_some_and(|(_, value)| value.port() != owner.port && !value.is_static()) {
                    self.remove(key);
                }
            }
        }
    }

    /// Removes `key`, learnt or static. False if it was not there.
    pub fn remove(&self, key: Key) -> bool {
        let mut writer = self.lock();
        // A worker may refresh the entry in between; then try once more with what it left.
        while let Some((place, value)) = self.table.find(key, self.table.slot(key)) {
            if writer.remove(self, place, key, value) {
                writer.totals.removed += 1;
                return true;
            }
        }
        false
    }

    /// Removes the entries that fit `filter` and were there when the call began; returns how many.
    ///
    /// To empty a port for good while workers may still learn on it, set its limit to 0 first.
    pub fn flush(&self, filter: Filter) -> usize {
        let buckets = self.table.buckets();
        (0..buckets)
            .step_by(CHUNK)
            .map(|first| {
                let mut writer = self.lock();
                let removed = self
                    .remove_in(&mut writer, first, CHUNK.min(buckets - first), 0, |entry| filter.fits(entry));
                writer.totals.removed += removed as u64;
                removed
            })
            .sum()
    }

    /// Removes the addresses not seen for the aging time, in the next `budget` buckets; returns how many. Called
    /// once a second with a hundredth of [`Fdb::buckets`], it visits each address in time.
    pub fn age(&self, now: u32, budget: usize) -> usize {
        let aging = self.config.aging;
        let mut left = budget.min(self.table.buckets());
        let mut removed = 0;
        self.lock().thaw(self, now);
        while left > 0 && aging != 0 {
            let mut writer = self.lock();
            let (first, chunk) = (writer.cursor, left.min(CHUNK));
            let old = self
                .remove_in(&mut writer, first, chunk, now, |entry| !entry.is_static && entry.age >= aging);
            writer.cursor = (first + chunk) % self.table.buckets();
            writer.totals.aged += old as u64;
            removed += old;
            left -= chunk;
        }
        removed
    }

    fn remove_in(
        &self,
        writer: &mut Writer,
        first: usize,
        buckets: usize,
        now: u32,
        unwanted: impl Fn(&FdbEntry) -> bool,
    ) -> usize {
        let mut removed = 0;
        for place in (first..first + buckets).flat_map(|index| self.table.places(index)) {
            // Again if a worker refreshed the entry in between: it may be wanted now.
            while let Some((key, value)) = self.table.entry(place).read() {
                if !unwanted(&FdbEntry::new(key, value, now)) {
                    break;
                }
                if writer.remove(self, place, key, value) {
                    removed += 1;
                    break;
                }
            }
        }
        removed
    }

    /// Lets `port` have at most `limit` learnt addresses, or any number (`None`). Those it has beyond it stay.
    /// False if the port is out of range.
    pub fn set_port_limit(&self, port: PortIndex, limit: Option<u32>) -> bool {
        let Some(cell) = self.ports.get(usize::from(port)) else { return false };
        cell.limit.store(limit.unwrap_or(u32::MAX), Relaxed);
        true
    }

    /// Addresses learnt on `port`.
    pub fn learned_on(&self, port: PortIndex) -> u32 {
        self.ports.get(usize::from(port)).map_or(0, |cell| cell.learned.load(Relaxed))
    }

    /// Buckets of the table, the unit of [`Fdb::age`]'s budget.
    pub fn buckets(&self) -> usize {
        self.table.buckets()
    }

    /// All entries, in no order, with their ages at `now`. Takes no lock: what changes meanwhile may show or not.
    pub fn iter(&self, now: u32) -> impl Iterator<Item = FdbEntry> + '_ {
        (0..self.table.buckets())
            .flat_map(|index| self.table.places(index))
            .filter_map(move |place| self.table.entry(place).read())
            .map(move |(key, value)| FdbEntry::new(key, value, now))
    }

    /// The number of entries, or of those on `port`, and the first `limit` of them in order of VLAN and address.
    pub fn snapshot(&self, now: u32, port: Option<PortIndex>, limit: usize) -> (usize, Vec<FdbEntry>) {
        let wanted = |entry: &FdbEntry| port.is_none_or(|port| port == entry.port);
        let order = |entry: &FdbEntry| (entry.key.vlan(), entry.key.mac());
        let mut entries: Vec<_> = self.iter(now).filter(wanted).collect();
        let total = entries.len();
        if limit < total {
            entries.select_nth_unstable_by_key(limit, order);
            entries.truncate(limit);
        }
        entries.sort_unstable_by_key(order);
        (total, entries)
    }

    /// State and totals.
    pub fn stats(&self) -> Stats {
        let writer = self.lock();
        let refused = &self.refusals;
        Stats {
            capacity: self.config.capacity,
            entries: self.signals.entries.load(Relaxed),
            statics: writer.statics,
            bytes: self.table.buckets() * size_of::<super::table::Bucket>(),
            learned: writer.totals.learned,
            moved: writer.totals.moved,
            aged: writer.totals.aged,
            removed: writer.totals.removed,
            frozen: writer.totals.frozen,
            held: writer.held(),
            refused: Refusals {
                fixed: refused.fixed.load(Relaxed),
                flapping: refused.flapping.load(Relaxed),
                port_limit: refused.port_limit.load(Relaxed),
                full: refused.full.load(Relaxed),
                rate: refused.rate.load(Relaxed),
                address: refused.address.load(Relaxed),
                busy: refused.busy.load(Relaxed),
            },
        }
    }
}

impl FdbEntry {
    fn new(key: Key, value: super::table::Value, now: u32) -> Self {
        Self {
            key,
            port: value.port(),
            age: if value.is_static() { 0 } else { value.age(now) },
            is_static: value.is_static(),
            is_frozen: value.is_frozen(),
        }
    }
}
