//! Integration services: what a host and a guest's operating system do for each other.
//!
//! | module | service |
//! |---|---|
//! | [`heartbeat`] | is the guest alive? |
//! | [`shutdown`] | shut down, restart, hibernate, as asked |
//! | [`time_sync`] | the guest's clock |
//! | [`kvp`] | its name, versions, addresses; values for its programs |
//! | [`vss`] | file systems frozen for a backup |
//! | [`balloon`] | memory taken and given back |
//! | [`framing`] | the framing that all but the last share |
//! | [`pump`] | the thread that serves their channels |
//!
//! Each is a [`Service`] without I/O: packets go in and come out, time is given in. Costs do not matter here, some packets
//! a second; what matters is that a guest that answers never, late, or with nonsense harms nothing but its own service.
//!
//! Source: fact sheet of integration services (Linux `drivers/hv/hv_util.c` and its neighbours).

pub mod balloon;
mod command;
mod error;
pub mod framing;
pub mod heartbeat;
pub mod kvp;
pub mod pump;
mod set;
pub mod shutdown;
pub mod time_sync;
pub mod vss;

#[cfg(test)]
mod tests;

use std::time::Duration;

use vmbus::guid::Guid;
use zerocopy::{FromBytes, Immutable, KnownLayout};

pub use command::{Answer, Command};
pub use error::{CommandError, Mistake};
pub use set::{Services, Settings};

/// Instances: one of each service in a VM, and always the same.
pub mod instance {
    use vmbus::guid::Guid;
    pub use vmbus::guid::instance::{KVP, SHUTDOWN, TIME_SYNC};

    /// Heartbeat.
    pub const HEARTBEAT: Guid = Guid::new(0xdf29_7768, 0x5156, 0x476c, 0xad23, 0xe720_8c02_0293);
    /// Backup.
    pub const VSS: Guid = Guid::new(0x7c46_7818, 0x911e, 0x4828, 0xbdda, 0xf596_5a0c_1fcc);
    /// Dynamic memory.
    pub const DYNAMIC_MEMORY: Guid = Guid::new(0x662c_26b4, 0x286c, 0x4203, 0xae74, 0xea4b_56e4_0882);
}

/// Commands that wait for one service at most.
const QUEUE: usize = 64;

/// A point in the time that a VM spends running.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(Duration);

impl Moment {
    /// When it began.
    pub const START: Self = Self(Duration::ZERO);

    /// The time from `earlier` to this; none if that was later.
    pub const fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

impl std::ops::Add<Duration> for Moment {
    type Output = Self;

    fn add(self, time: Duration) -> Self {
        Self(self.0.saturating_add(time))
    }
}

/// A packet for the guest: in-band, no completion wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    /// Ring transaction.
    pub transaction: u64,
    /// Bytes.
    pub payload: Vec<u8>,
}

/// Packets for the guest, in order.
#[derive(Debug, Default)]
pub struct Outbox(std::collections::VecDeque<Packet>);

impl Outbox {
    /// Adds a packet.
    pub fn send(&mut self, transaction: u64, payload: Vec<u8>) {
        self.0.push_back(Packet { transaction, payload });
    }

    /// The packet to be sent next; it stays.
    pub fn first(&self) -> Option<&Packet> {
        self.0.front()
    }

    /// Takes the packet to be sent next.
    pub fn pop(&mut self) -> Option<Packet> {
        self.0.pop_front()
    }

    /// Packets.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// None.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// How far guest and service are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Contact {
    /// The channel is not open.
    Closed,
    /// It is; versions are not agreed on yet.
    Opened,
    /// The service runs, with this version.
    Ready(String),
    /// No version in common.
    Incompatible,
}

impl Contact {
    /// A command needs a service that runs.
    fn ready(&self) -> Result<(), CommandError> {
        match self {
            Self::Ready(_) => Ok(()),
            Self::Incompatible => Err(CommandError::Incompatible),
            Self::Closed | Self::Opened => Err(CommandError::NotReady),
        }
    }
}

/// One integration service: a device with one channel.
pub trait Service: std::fmt::Debug + Send {
    /// As shown to the operator.
    fn name(&self) -> &'static str;
    /// Device type.
    fn interface(&self) -> Guid;
    /// Device.
    fn instance(&self) -> Guid;
    /// How far it is.
    fn contact(&self) -> Contact;
    /// The guest opened the channel.
    fn opened(&mut self, now: Moment);
    /// The channel is closed; who waits for an answer is told. Twice is as good as once.
    fn closed(&mut self);
    /// The VM was reset.
    fn reset(&mut self) {
        self.closed();
    }
    /// Takes the payload of an in-band packet.
    ///
    /// # Errors
    /// What the guest did wrong. The channel is not to be served any more, and [`Service::closed`] to be called.
    fn receive(
        &mut self,
        packet: &[u8],
        transaction: u64,
        out: &mut Outbox,
        now: Moment,
    ) -> Result<(), Mistake>;
    /// Does what is due: to be called after each of the above and each command, and when the moment it returned has
    /// come.
    fn tick(&mut self, out: &mut Outbox, now: Moment) -> Option<Moment>;
}

/// The value that `bytes` begin with, and the rest.
fn take<T: FromBytes + KnownLayout + Immutable>(bytes: &[u8]) -> Result<(T, &[u8]), Mistake> {
    T::read_from_prefix(bytes).map_err(|_| Mistake::Short { len: bytes.len(), need: size_of::<T>() })
}
