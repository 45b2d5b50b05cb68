//! What the pipeline knows of a switch: each port's rules and the address table. An immutable snapshot; a changed
//! configuration is a new one.

use std::sync::Arc;

use crate::fdb::{Fdb, PortIndex};
use crate::spec::{PrivateVlan, VlanMode};

/// Bytes of an Ethernet header without tag.
pub const ETHERNET: u32 = 14;

/// Bytes of an 802.1Q tag.
pub const TAG: u32 = 4;

/// How frames of a port relate to VLANs, ready to be asked per frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VlanRule {
    /// Tags pass; they name the VLAN.
    Passthrough,
    /// One VLAN, untagged.
    Access(u16),
    /// Several VLANs, tagged but for the native one.
    Trunk {
        /// One bit per VLAN.
        members: Box<[u64; 64]>,
        /// VLAN of untagged frames.
        native: Option<u16>,
    },
}

impl VlanRule {
    /// True if frames of `vlan` (0 is none) may leave through the port.
    #[inline]
    pub fn carries(&self, vlan: u16) -> bool {
        match self {
            Self::Passthrough => true,
            Self::Access(own) => *own == vlan,
            Self::Trunk { members, native } => is_member(members, vlan) || *native == Some(vlan),
        }
    }

    /// True if frames of `vlan` leave the port without tag.
    pub fn untags(&self, vlan: u16) -> bool {
        match self {
            Self::Passthrough => false,
            Self::Access(own) => *own == vlan,
            Self::Trunk { native, .. } => *native == Some(vlan),
        }
    }
}

#[inline]
pub(crate) fn is_member(members: &[u64; 64], vlan: u16) -> bool {
    members[usize::from(vlan >> 6) & 63] >> (vlan & 63) & 1 != 0
}

impl From<&VlanMode> for VlanRule {
    fn from(mode: &VlanMode) -> Self {
        match mode {
            VlanMode::Passthrough => Self::Passthrough,
            VlanMode::Access(vlan) => Self::Access(*vlan),
            VlanMode::Trunk { members, native } => {
                let mut bits = Box::new([0u64; 64]);
                for &vlan in members {
                    bits[usize::from(vlan >> 6) & 63] |= 1 << (vlan & 63);
                }
                Self::Trunk { members: bits, native: *native }
            }
        }
    }
}

/// What a port may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    /// The only source address allowed, if there is one.
    pub source: Option<[u8; 6]>,
    /// VLANs.
    pub vlan: VlanRule,
    /// Place in private VLANs.
    pub private: Option<PrivateVlan>,
    /// Largest IP packet in bytes.
    pub mtu: u16,
}

impl Rules {
    /// Bytes of the longest untagged frame; a tag adds [`TAG`].
    #[inline]
    pub fn longest_frame(&self) -> u32 {
        u32::from(self.mtu) + ETHERNET
    }
}

/// A switch at one moment.
#[derive(Debug, Clone)]
pub struct Topology {
    ports: Vec<Option<Rules>>,
    members: Vec<PortIndex>,
    vlan_aware: bool,
    private: bool,
    /// Who is where.
    pub fdb: Arc<Fdb>,
}

impl Topology {
    /// A switch of the given ports, by index.
    pub fn new(ports: Vec<Option<Rules>>, fdb: Arc<Fdb>) -> Self {
        let members = (0..).zip(&ports).filter(|(_, port)| port.is_some()).map(|(index, _)| index).collect();
        let vlan_aware = ports.iter().flatten().any(|port| port.vlan != VlanRule::Passthrough);
        let private = ports.iter().flatten().any(|port| port.private.is_some());
        Self { ports, members, vlan_aware, private, fdb }
    }

    /// The rules of a port.
    #[inline]
    pub fn rules(&self, port: PortIndex) -> Option<&Rules> {
        self.ports.get(usize::from(port)).and_then(Option::as_ref)
    }

    /// Ports in use, in order.
    #[inline]
    pub fn members(&self) -> &[PortIndex] {
        &self.members
    }

    /// True if a frame of `vlan` may leave through `port`.
    #[inline]
    pub fn carries(&self, port: PortIndex, vlan: u16) -> bool {
        match self.rules(port) {
            Some(rules) => !self.vlan_aware || rules.vlan.carries(vlan),
            None => false,
        }
    }

    /// True if ports `from` and `to` meet in the VLANs they share.
    #[inline]
    pub fn meet(&self, from: PortIndex, to: PortIndex) -> bool {
        !self.private || self.places_meet(from, to)
    }

    fn places_meet(&self, from: PortIndex, to: PortIndex) -> bool {
        let place = |port| self.rules(port).and_then(|rules| rules.private);
        match (place(from), place(to)) {
            (None, _) | (_, None) => true,
            (Some(PrivateVlan::Community(own)), Some(PrivateVlan::Community(other))) => own == other,
            _ => false,
        }
    }

    /// True if frames of `vlan` leave through `port` without tag.
    pub fn untags(&self, port: PortIndex, vlan: u16) -> bool {
        self.rules(port).is_some_and(|rules| rules.vlan.untags(vlan))
    }
}
