//! What a NIC remembers of its guest. All of it can be saved, as the process may restart under a running guest.

use serde::{Deserialize, Serialize};
use vmq::Mac;
use vmq::rss::HashTypes;
use vswitch::backend::GuestRss;

use super::link::Told;
use super::{Buffer, DEFAULT_MTU, Offloads, Phase};
use crate::protocol::nvsp::{Capabilities, Version};

/// The primary channel's state, as far as NVSP goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum State {
    /// No version agreed.
    Closed,
    /// A version is agreed.
    Agreed(Session),
}

/// From INIT to the end of the channel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Session {
    pub(super) version: Version,
    /// Major and minor version of the guest's NDIS.
    pub(super) ndis: (u32, u32),
    /// What the guest asked for, without Ethernet header.
    pub(super) mtu: u16,
    capabilities: u64,
    pub(super) receive: Area,
    pub(super) send: Area,
    /// Granted.
    pub(super) subchannels: u16,
    /// Bit for each open subchannel.
    open: u64,
    pub(super) rndis: Rndis,
}

/// A buffer's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Area {
    /// There is none.
    Absent,
    /// The guest offered one, and is answered once it is mapped.
    Mapping { gpadl: u32, id: u16, reply: bool },
    /// In use.
    Mapped(SectionedBuffer),
}

/// A buffer in use, cut in sections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SectionedBuffer {
    /// Its pages.
    pub gpadl: u32,
    /// The guest's name for it; page set of receive packets.
    pub id: u16,
    /// Bytes of a section. Section `i` begins at `i * section_size`.
    pub section_size: u32,
    /// Sections.
    pub sections: u32,
}

impl SectionedBuffer {
    /// Bytes that all sections take; the pages must have as many.
    pub fn bytes(&self) -> u64 {
        u64::from(self.section_size) * u64::from(self.sections)
    }
}

/// RNDIS's state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Rndis {
    /// Not begun, or halted.
    Uninitialised,
    /// Begun.
    Initialised(Device),
}

/// From INITIALIZE to HALT.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Device {
    pub(super) filter: u32,
    pub(super) multicast: Vec<[u8; 6]>,
    pub(super) offloads: Offloads,
    pub(super) rss: Option<Spread>,
    pub(super) told: Told,
}

/// RSS parameters as the guest gave them, checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Spread {
    /// 40 bytes.
    pub(super) key: Vec<u8>,
    pub(super) table: Vec<u16>,
    /// `HASH_*`.
    pub(super) hash: u32,
}

bitflags::bitflags! {
    /// Which frames a guest takes (`NDIS_PACKET_TYPE_*`).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct PacketFilter: u32 {
        /// To its own address.
        const DIRECTED = 1;
        /// To groups it listed.
        const MULTICAST = 1 << 1;
        /// To any group.
        const ALL_MULTICAST = 1 << 2;
        /// To all.
        const BROADCAST = 1 << 3;
        /// Whatever comes.
        const PROMISCUOUS = 1 << 5;
    }
}

impl State {
    pub(super) fn phase(&self) -> Phase {
        match self {
            Self::Closed => Phase::Closed,
            Self::Agreed(session) => match (&session.receive, &session.rndis) {
                (Area::Mapped(_), Rndis::Initialised(_)) => Phase::Running,
                (Area::Mapped(_), Rndis::Uninitialised) => Phase::Ready,
                _ => Phase::Negotiating,
            },
        }
    }

    pub(super) fn session(&self) -> Option<&Session> {
        match self {
            Self::Closed => None,
            Self::Agreed(session) => Some(session),
        }
    }

    pub(super) fn session_mut(&mut self) -> Option<&mut Session> {
        match self {
            Self::Closed => None,
            Self::Agreed(session) => Some(session),
        }
    }

    pub(super) fn device(&self) -> Option<&Device> {
        self.session().and_then(Session::device)
    }
}

impl Session {
    pub(super) fn new(version: Version) -> Self {
        Self {
            version,
            ndis: (6, 1),
            mtu: DEFAULT_MTU,
            capabilities: 0,
            receive: Area::Absent,
            send: Area::Absent,
            subchannels: 0,
            open: 0,
            rndis: Rndis::Uninitialised,
        }
    }

    /// Nothing but a version: another may be agreed.
    pub(super) fn is_fresh(&self) -> bool {
        matches!((self.receive, self.send), (Area::Absent, Area::Absent))
            && self.rndis == Rndis::Uninitialised
            && self.subchannels == 0
    }

    pub(super) fn area_mut(&mut self, kind: Buffer) -> &mut Area {
        match kind {
            Buffer::Receive => &mut self.receive,
            Buffer::Send => &mut self.send,
        }
    }

    pub(super) fn device(&self) -> Option<&Device> {
        match &self.rndis {
            Rndis::Uninitialised => None,
            Rndis::Initialised(device) => Some(device),
        }
    }

    pub(super) fn device_mut(&mut self) -> Option<&mut Device> {
        match &mut self.rndis {
            Rndis::Uninitialised => None,
            Rndis::Initialised(device) => Some(device),
        }
    }

    pub(super) fn capabilities(&self) -> Capabilities {
        Capabilities::from_bits_truncate(self.capabilities)
    }

    pub(super) fn set_capabilities(&mut self, bits: u64) {
        self.capabilities = bits;
    }

    /// Announced, in a version that has it, by a guest that takes the parts of a frame in one packet.
    pub(super) fn takes_rsc(&self) -> bool {
        self.version >= Version::V61
            && self.speaks_ndis_6()
            && self.capabilities().contains(Capabilities::RSC)
    }

    pub(super) fn speaks_ndis_6(&self) -> bool {
        self.ndis.0 >= 6
    }

    /// Notes an open subchannel. False if it was open, or was never granted.
    pub(super) fn subchannel_opened(&mut self, index: u16) -> bool {
        let bit = bit(index);
        let news = index != 0 && index <= self.subchannels && self.open & bit == 0;
        if news {
            self.open |= bit;
        }
        news
    }

    /// Notes a closed subchannel. True if frames were spread to it: they are spread no more, until the guest says how.
    pub(super) fn subchannel_closed(&mut self, index: u16) -> bool {
        self.open &= !bit(index);
        let Some(device) = self.device_mut() else { return false };
        device.rss.take_if(|rss| rss.table.contains(&index)).is_some()
    }

    pub(super) fn all_open(&self) -> bool {
        (1..=self.subchannels).all(|index| self.is_open(index))
    }

    /// Whether frames may go to this channel.
    pub(super) fn is_open(&self, index: u16) -> bool {
        index == 0 || self.open & bit(index) != 0
    }
}

fn bit(index: u16) -> u64 {
    1u64.checked_shl(u32::from(index)).unwrap_or(0)
}

impl Area {
    pub(super) fn mapped(&self) -> Option<SectionedBuffer> {
        match self {
            Self::Mapped(buffer) => Some(*buffer),
            Self::Absent | Self::Mapping { .. } => None,
        }
    }
}

impl Device {
    pub(super) fn new(offloads: Offloads, told: Told) -> Self {
        Self { filter: 0, multicast: Vec::new(), offloads, rss: None, told }
    }

    pub(super) fn filter(&self) -> PacketFilter {
        PacketFilter::from_bits_truncate(self.filter)
    }

    pub(super) fn multicast(&self) -> Vec<Mac> {
        self.multicast.iter().copied().map(Mac).collect()
    }

    pub(super) fn guest_rss(&self) -> Option<GuestRss> {
        let rss = self.rss.as_ref()?;
        Some(GuestRss {
            key: rss.key.as_slice().try_into().ok()?,
            table: rss.table.clone(),
            types: rss.types(),
        })
    }
}

impl Spread {
    /// What is hashed, in the switch's words.
    pub(super) fn types(&self) -> HashTypes {
        super::rss::types(self.hash)
    }
}
