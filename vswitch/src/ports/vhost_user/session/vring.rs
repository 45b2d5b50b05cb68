//! One ring of a session: what the front-end has told about it, and the step from there to a ring in use.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use vmq::doorbell::{Doorbell, NotADoorbell};
use vmq::memory::{GuestMemory, Mapping};
use vmq::ring::{Inflight, LayoutError, Ring, RingAddresses, Virtqueue};
use vmq::with_ring;

use crate::ports::vhost_user::features::{Features, Negotiated};
use crate::ports::vhost_user::memory_table::{MemoryTable, TableError};
use crate::ports::vhost_user::message::{InflightArea, VringAddress};
use crate::ports::vhost_user::queue::ActiveRing;

/// A packed ring's base before anything happened: position 0, wrap counter 1, for both sides (VIRTIO 1.2, 2.8.1).
pub(super) const PACKED_START: u32 = 0x8000_8000;

/// The guest's doorbell.
#[derive(Debug, Clone)]
pub(super) enum Kick {
    /// There is none: the ring is polled.
    Poll,
    /// An eventfd.
    Doorbell(Arc<Doorbell>),
}

/// What the front-end has told about a ring that is not in use yet.
#[derive(Debug, Clone, Default)]
pub(super) struct Draft {
    pub size: Option<u16>,
    pub addresses: Option<RingAddresses>,
    pub base: Option<u32>,
    pub kick: Option<Kick>,
    /// It ran until its memory was taken away, and goes on when that is back.
    pub parked: bool,
}

/// All it takes to set a ring up, again and again.
#[derive(Debug, Clone)]
pub(super) struct Setup {
    pub size: u16,
    pub addresses: RingAddresses,
    pub kick: Kick,
}

/// Whether the port has the ring.
#[derive(Debug)]
pub(super) enum State {
    /// It has not.
    Stopped(Draft),
    /// It has.
    Started(Setup),
}

/// One ring.
#[derive(Debug)]
pub(super) struct Vring {
    /// The last word of `SET_VRING_ENABLE`.
    pub enabled: bool,
    /// The guest's interrupt, while the port does not have the ring.
    pub call: Option<Doorbell>,
    pub state: State,
}

impl Default for Vring {
    fn default() -> Self {
        Self { enabled: false, call: None, state: State::Stopped(Draft::default()) }
    }
}

impl Draft {
    /// The ring's set-up, once every part is known. The kick comes last: it is what starts a ring.
    pub(super) fn complete(&self) -> Option<Setup> {
        Some(Setup { size: self.size?, addresses: self.addresses?, kick: self.kick.clone()? })
    }
}

impl Setup {
    /// What remains after the ring was stopped at `base`. Without a kick it does not start again.
    pub(super) fn stopped(self, base: u32) -> Draft {
        let (size, addresses) = (Some(self.size), Some(self.addresses));
        Draft { size, addresses, base: Some(base), kick: None, parked: false }
    }

    /// Sets the ring up in `context`, to go on at `base`. It has no interrupt yet.
    pub(super) fn activate(
        &self,
        context: &Context<'_>,
        base: Option<u32>,
    ) -> Result<ActiveRing, SetupError> {
        let memory = context.memory;
        let packed = context.negotiated.packed();
        let base = if packed { base.unwrap_or(PACKED_START) } else { self.used_index(memory)? };
        let event_idx = context.negotiated.features.contains(Features::EVENT_IDX);
        let mut ring = Ring::new(memory, packed, self.size, self.addresses, base, event_idx)?;
        if let Some(record) = context.inflight {
            let inflight = record.ring(context.index, self.size, packed)?;
            with_ring!(&mut ring, ring => ring.track(inflight));
        }
        let kick = match &self.kick {
            Kick::Poll => None,
            Kick::Doorbell(doorbell) => Some(Arc::clone(doorbell)),
        };
        let (memory, features) = (Arc::clone(memory), context.negotiated.net());
        Ok(ActiveRing { ring, memory, features, enabled: true, kick, call: None })
    }

    /// A split ring goes on where its used index stands. Buffers are completed in order, so that is the base as well
    /// if the predecessor stopped properly; if it crashed, front-ends send a base that is too high, or 0.
    fn used_index(&self, memory: &GuestMemory) -> Result<u32, LayoutError> {
        let bad = LayoutError::Address(self.addresses.device);
        let gpa = memory.ring_memory(self.addresses.device, 4, 4).ok_or(bad)?.gpa();
        let index = memory.segment(gpa, 4).and_then(|head| head.read::<4>()).ok_or(bad)?;
        Ok(u32::from(u16::from_le_bytes([index[2], index[3]])))
    }
}

/// What rings are set up with.
#[derive(Debug)]
pub(super) struct Context<'s> {
    pub index: usize,
    pub memory: &'s Arc<GuestMemory>,
    pub negotiated: &'s Negotiated,
    pub inflight: Option<&'s InflightRecord>,
}

/// Why a ring cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// Its size, addresses or base make no sense.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// It is not in the in-flight record.
    #[error(transparent)]
    Inflight(#[from] InflightError),
}

/// Addresses as rings take them.
pub(super) fn ring_addresses(wire: &VringAddress) -> RingAddresses {
    let log = (wire.flags.get() & VringAddress::LOG != 0).then_some(wire.log.get());
    RingAddresses {
        descriptors: wire.descriptors.get(),
        driver: wire.available.get(),
        device: wire.used.get(),
        log,
    }
}

/// A doorbell out of a message's descriptors, none for the "no descriptor" form.
pub(super) fn doorbell(polled: bool, fds: &mut Vec<OwnedFd>) -> Result<Option<Doorbell>, DoorbellError> {
    match (polled, fds.as_slice()) {
        (true, []) => Ok(None),
        (false, [fd]) => {
            Doorbell::check(fd.as_fd())?;
            Ok(fds.pop().map(Doorbell::from_peer).transpose()?)
        }
        _ => Err(DoorbellError::Count(fds.len())),
    }
}

/// A doorbell message without a doorbell.
#[derive(Debug, thiserror::Error)]
pub enum DoorbellError {
    /// Descriptors do not go with the message's flag.
    #[error("{0} descriptors, which contradicts the message's flag")]
    Count(usize),
    /// It is something else.
    #[error(transparent)]
    Kind(#[from] NotADoorbell),
    /// Ringing it made us wait.
    #[error("it was full and blocking")]
    Blocks,
}

/// Where rings note what is in flight, so that a successor of this process finds it.
#[derive(Debug)]
pub(super) struct InflightRecord {
    mapping: Arc<Mapping>,
    offset: usize,
    rings: u16,
    ring_size: u16,
}

/// Why an in-flight record is refused.
#[derive(Debug, thiserror::Error)]
pub enum InflightError {
    /// For no ring, or for more than the port has, or of no possible size.
    #[error("in-flight record for {rings} rings of {size} entries")]
    Shape {
        /// Rings.
        rings: u16,
        /// Entries of each.
        size: u16,
    },
    /// Too short for its rings.
    #[error("in-flight record of {have} bytes, {need} are needed")]
    Short {
        /// Bytes given.
        have: u64,
        /// Bytes needed.
        need: u64,
    },
    /// At an odd place of its file.
    #[error("in-flight record at offset {0:#x}, which is no multiple of 8")]
    Offset(u64),
    /// The file cannot be mapped.
    #[error("in-flight record cannot be mapped")]
    Map(#[from] TableError),
    /// A new one cannot be made.
    #[error("in-flight record cannot be made")]
    Create(#[from] vmq::memory::MappingError),
    /// The ring does not fit the record.
    #[error("ring of {size} entries is not in the in-flight record")]
    NotRecorded {
        /// Entries.
        size: u16,
    },
}

impl InflightRecord {
    fn needed(area: &InflightArea, max_rings: usize, packed: bool) -> Result<u64, InflightError> {
        let (rings, size) = (area.rings.get(), area.ring_size.get());
        if rings == 0 || usize::from(rings) > max_rings || size == 0 || size > vmq::ring::MAX_SIZE {
            return Err(InflightError::Shape { rings, size });
        }
        Ok(u64::from(rings).saturating_mul(Inflight::len_for(size, packed) as u64))
    }

    /// A new, empty record's file and size in bytes (`GET_INFLIGHT_FD`). Nothing of it stays here.
    pub(super) fn create(
        area: &InflightArea,
        max_rings: usize,
        packed: bool,
    ) -> Result<(u64, OwnedFd), InflightError> {
        let needed = Self::needed(area, max_rings, packed)?;
        let (_, fd) = Mapping::memfd("vhost-inflight", usize::try_from(needed).unwrap_or(usize::MAX))?;
        Ok((needed, fd))
    }

    /// A record that the front-end kept (`SET_INFLIGHT_FD`).
    pub(super) fn map(
        area: &InflightArea,
        fd: &OwnedFd,
        table: &MemoryTable,
        max_rings: usize,
        packed: bool,
    ) -> Result<Self, InflightError> {
        let need = Self::needed(area, max_rings, packed)?;
        let (have, offset) = (area.size.get(), area.offset.get());
        if have < need {
            return Err(InflightError::Short { have, need });
        }
        let mapping = table.map_file(offset, have, fd)?;
        match usize::try_from(offset) {
            Ok(at) if at.is_multiple_of(8) => {
                Ok(Self { mapping, offset: at, rings: area.rings.get(), ring_size: area.ring_size.get() })
            }
            _ => Err(InflightError::Offset(offset)),
        }
    }

    fn ring(&self, index: usize, size: u16, packed: bool) -> Result<Inflight, InflightError> {
        let not_recorded = InflightError::NotRecorded { size };
        if index >= usize::from(self.rings) || size > self.ring_size {
            return Err(not_recorded);
        }
        // `index` is at most 127 and `len_for` at most 1 MiB.
        let offset = self.offset.saturating_add(index * Inflight::len_for(self.ring_size, packed));
        Inflight::new(Arc::clone(&self.mapping), offset, size, packed).ok_or(not_recorded)
    }
}
