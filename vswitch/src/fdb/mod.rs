//! The address table (forwarding database) of one switch: which port a station was last seen on.
//!
//! All workers share it. Look-ups and the refresh of a known address take no lock and touch one cache line; they
//! come in steps, so that a burst hashes all its keys, prefetches all its buckets, and only then reads them:
//!
//! ```
//! use vswitch::fdb::{Config, Fdb, Key, Learned};
//!
//! let fdb = Fdb::new(Config::default(), [1, 2]);
//! let key = Key::new([2, 0, 0, 0, 0, 1], 10);
//! let slot = fdb.hash(key);
//! fdb.prefetch(slot);
//! assert_eq!(fdb.learn(key, slot, 7, 100), Learned::New);
//! assert_eq!(fdb.lookup(key, slot), Some(7));
//! ```
//!
//! A new or moved address goes through the writer's lock. A worker that finds the lock taken for long gives up
//! ([`Learned::Busy`]): the frame is forwarded all the same, and the next one teaches the address. So management,
//! which holds the lock for a few buckets at a time, never makes a worker wait.
//!
//! Time is given by the caller, in whole seconds of a monotonic clock.

mod control;
mod key;
mod table;
#[cfg(test)]
mod tests;
mod writer;

pub use control::FdbEntry;
pub use control::Filter;
pub use control::Refusals;
pub use control::StaticError;
pub use control::Stats;
pub use key::Key;
pub use table::Slot;

use crate::topology::VlanRule;
use arc_swap::ArcSwap;
use crossbeam_utils::CachePadded;
use key::Secret;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::TryLockError;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use table::TIME_RANGE;
use table::Table;
use table::Value;
use writer::Writer;

/// The number of a port within its switch.
pub type PortIndex = u16;

/// The longest aging time, in seconds (six days): time stamps are kept modulo twice this.
pub const MAX_AGING: u32 = TIME_RANGE / 2 - 1;

/// How often a worker looks at a taken lock before it leaves the address to the next frame: about a microsecond.
const LOCK_TRIES: u32 = 32;

/// The limits of a table, fixed at its creation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Config {
    /// Addresses the table holds; it takes 32 to 64 bytes of memory for each.
    pub capacity: u32,
    /// Port indices are below this; no address is learnt on others.
    pub ports: u16,
    /// Seconds after which an unseen address is forgotten, at most [`MAX_AGING`]; 0 keeps them for ever.
    pub aging: u32,
    /// New and moved addresses per second; as many may come in one go.
    pub learn_rate: u32,
    /// What counts as flapping.
    pub flap: Flap,
}

impl Default for Config {
    fn default() -> Self {
        Self { capacity: 8192, ports: 1024, aging: 300, learn_rate: 4_000_000, flap: Flap::default() }
    }
}

/// An address that moves more than `moves` times within `window` seconds stays where it is for `hold` seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flap {
    /// Moves allowed in a window. An even number leaves an address that two ports fight over where it was first.
    pub moves: u8,
    /// Seconds.
    pub window: u32,
    /// Seconds.
    pub hold: u32,
}

impl Default for Flap {
    fn default() -> Self {
        Self { moves: 4, window: 10, hold: 10 }
    }
}

/// An address that no other port may learn in the VLANs of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    address: Key,
    port: PortIndex,
    vlans: VlanRule,
}

impl Owner {
    /// `mac` belongs to `port` wherever `vlans` carries.
    pub fn new(mac: [u8; 6], port: PortIndex, vlans: VlanRule) -> Self {
        Self { address: Key::new(mac, 0), port, vlans }
    }
}

/// What became of a source address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Learned {
    /// Known on this port, and seen within this second.
    Known,
    /// Known on this port; its time stamp was brought up to date.
    Refreshed,
    /// Entered.
    New,
    /// Was known on another port.
    Moved {
        /// That port.
        from: PortIndex,
    },
    /// The lock was taken: not learnt this time.
    Busy,
    /// Pinned to another port, or its own.
    RefusedStatic,
    /// Moved too often, and stays on its port for a while.
    RefusedFlapping,
    /// The port has as many addresses as it may have, or its index is beyond [`Config::ports`].
    RefusedPortLimit,
    /// The table is full.
    RefusedFull,
    /// More new addresses this second than [`Config::learn_rate`].
    RefusedRate,
    /// A group address or all zeros cannot be a source.
    RefusedAddress,
}

/// What the data path must know about a port.
#[derive(Debug)]
struct PortCell {
    /// Dynamic addresses; changed under the writer's lock.
    learned: AtomicU32,
    limit: AtomicU32,
}

/// Written under the writer's lock, and read by workers to refuse an address without it: a flood of addresses that
/// cannot be learnt costs no lock.
#[derive(Debug)]
struct Signals {
    /// All entries of the table.
    entries: AtomicU32,
    /// When the first of the frozen addresses is free to move again.
    thaw_at: AtomicU32,
    /// The second in which the learn rate was used up.
    spent_at: AtomicU32,
}

#[derive(Debug, Default)]
struct RefusalCounters {
    fixed: AtomicU64,
    flapping: AtomicU64,
    port_limit: AtomicU64,
    full: AtomicU64,
    rate: AtomicU64,
    address: AtomicU64,
    busy: AtomicU64,
}

/// The address table. See the module's text.
#[derive(Debug)]
pub struct Fdb {
    config: Config,
    table: Table,
    /// Sorted by address. Asked for new and moved addresses only.
    owners: ArcSwap<Vec<Owner>>,
    ports: Box<[PortCell]>,
    signals: CachePadded<Signals>,
    refusals: CachePadded<RefusalCounters>,
    writer: CachePadded<Mutex<Writer>>,
}

impl Fdb {
    /// An empty table. `seed` must be random wherever guests choose the addresses.
    pub fn new(config: Config, seed: [u64; 2]) -> Self {
        let config = Config { aging: config.aging.min(MAX_AGING), ..config };
        let table = Table::new(config.capacity as usize, Secret::new(seed));
        let port = |_| PortCell { learned: AtomicU32::new(0), limit: AtomicU32::new(u32::MAX) };
        let signals = Signals {
            entries: AtomicU32::new(0),
            thaw_at: AtomicU32::new(u32::MAX),
            spent_at: AtomicU32::new(u32::MAX),
        };
        Self {
            config,
            owners: ArcSwap::default(),
            ports: (0..config.ports).map(port).collect(),
            signals: CachePadded::new(signals),
            refusals: CachePadded::default(),
            writer: CachePadded::new(Mutex::new(Writer::new(&config, &table))),
            table,
        }
    }

    /// The limits it was made with.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Where to look for `key`.
    #[inline]
    pub fn hash(&self, key: Key) -> Slot {
        self.table.slot(key)
    }

    /// Starts to load the bucket that most likely holds the key of `slot`.
    #[inline]
    pub fn prefetch(&self, slot: Slot) {
        vmq::memory::prefetch(self.table.home(slot));
    }

    /// The port of `key`, whose `slot` is `hash(key)`.
    #[inline]
    pub fn lookup(&self, key: Key, slot: Slot) -> Option<PortIndex> {
        self.table.find(key, slot).map(|(_, value)| value.port())
    }

    /// Notes that `key`, whose `slot` is `hash(key)`, was seen as the source of a frame from `port` at `now`.
    #[inline]
    pub fn learn(&self, key: Key, slot: Slot, port: PortIndex, now: u32) -> Learned {
        match self.table.find(key, slot) {
            Some((_, value)) if value.says(port, now) => Learned::Known,
            Some((place, value)) if value.port() == port => {
                // If the compare-and-swap fails, whoever was faster has seen the address too, or removed it.
                if value.is_fresh(now) {
                    Learned::Known
                } else if self.table.entry(place).refresh(value, now) {
                    Learned::Refreshed
                } else {
                    Learned::Known
                }
            }
            known => self.learn_change(key, port, now, known.map(|(_, value)| value)),
        }
    }

    #[cold]
    #[inline(never)]
    fn learn_change(&self, key: Key, port: PortIndex, now: u32, known: Option<Value>) -> Learned {
        let learned = match self.refusal(key, port, now, known) {
            Some(refused) => refused,
            None => match self.try_lock() {
                Some(mut writer) => writer.learn(self, key, port, now),
                None => Learned::Busy,
            },
        };
        self.refusals.count(learned);
        learned
    }

    /// The refusals that need no lock.
    fn refusal(&self, key: Key, port: PortIndex, now: u32, known: Option<Value>) -> Option<Learned> {
        let signals = &self.signals;
        if let Some(value) = known {
            if value.is_static() {
                return Some(Learned::RefusedStatic);
            }
            if value.is_frozen() {
                return (now < signals.thaw_at.load(Relaxed)).then_some(Learned::RefusedFlapping);
            }
        } else if !key.is_station() {
            return Some(Learned::RefusedAddress);
        } else if signals.entries.load(Relaxed) >= self.config.capacity {
            return Some(Learned::RefusedFull);
        }
        if self.ports.get(usize::from(port)).is_none_or(PortCell::is_full) {
            return Some(Learned::RefusedPortLimit);
        }
        if self.is_foreign(key, port) {
            return Some(Learned::RefusedStatic);
        }
        (signals.spent_at.load(Relaxed) == now).then_some(Learned::RefusedRate)
    }

    /// True if `key` belongs to a port other than `port`.
    fn is_foreign(&self, key: Key, port: PortIndex) -> bool {
        let owners = self.owners.load();
        let vlan = key.vlan();
        owners_of(&owners, key.address()).any(|owner| owner.port != port && owner.vlans.carries(vlan))
    }

    /// The writer's lock for a worker, which does not wait for it.
    fn try_lock(&self) -> Option<MutexGuard<'_, Writer>> {
        for _ in 0..LOCK_TRIES {
            match self.writer.try_lock() {
                Ok(writer) => return Some(writer),
                Err(TryLockError::Poisoned(poisoned)) => return Some(poisoned.into_inner()),
                Err(TryLockError::WouldBlock) => std::hint::spin_loop(),
            }
        }
        None
    }

    /// The writer's lock for the control plane.
    fn lock(&self) -> MutexGuard<'_, Writer> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Those of `address` among the sorted `owners`.
fn owners_of(owners: &[Owner], address: Key) -> impl Iterator<Item = &Owner> {
    let first = owners.partition_point(|owner| owner.address.0 < address.0);
    owners[first..].iter().take_while(move |owner| owner.address == address)
}

impl PortCell {
    fn is_full(&self) -> bool {
        self.learned.load(Relaxed) >= self.limit.load(Relaxed)
    }
}

impl RefusalCounters {
    fn count(&self, learned: Learned) {
        let counter = match learned {
            Learned::RefusedStatic => &self.fixed,
            Learned::RefusedFlapping => &self.flapping,
            Learned::RefusedPortLimit => &self.port_limit,
            Learned::RefusedFull => &self.full,
            Learned::RefusedRate => &self.rate,
            Learned::RefusedAddress => &self.address,
            Learned::Busy => &self.busy,
            Learned::Known | Learned::Refreshed | Learned::New | Learned::Moved { .. } => return,
        };
        counter.fetch_add(1, Relaxed);
    }
}
