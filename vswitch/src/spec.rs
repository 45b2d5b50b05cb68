//! What an operator asks for: switches and ports, as plain checked-for-shape values. The daemon reads them from its
//! configuration file or its API; [`crate::fabric::Fabric`] makes them real.

use std::ops::RangeInclusive;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use vmq::Mac;
use vmq::filter::MAX_VLAN;

use crate::topology::VlanRule;

/// The longest name of a switch or port, in bytes.
pub const MAX_NAME: usize = 32;

/// Whether `name` may name a switch or port: it goes into paths, metrics and terminals.
///
/// # Errors
/// What is wrong with it, and what was expected.
pub fn check_name(name: &str) -> Result<(), String> {
    check_word(name, "name", MAX_NAME)
}

/// Whether `word`, a `what`, has 1 to `longest` letters, digits, `-`, `_` and `.`, and begins with a letter or digit.
///
/// # Errors
/// What is wrong with it, and what was expected.
pub fn check_word(word: &str, what: &str, longest: usize) -> Result<(), String> {
    const SHOWN: usize = 80;
    let expected = format!(
        "expected 1 to {longest} of the letters a to z, A to Z, digits, `-`, `_`, `.`, beginning with a letter or digit"
    );
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    // A character in backquotes, escaped if it cannot be printed.
    let shown =
        |c: char| if c == '\'' || c == '"' { format!("`{c}`") } else { format!("`{}`", c.escape_debug()) };
    let fault = match word.chars().next() {
        None => return Err(format!("the {what} is empty, {expected}")),
        Some(_) if word.len() > longest => format!("has {} bytes", word.len()),
        Some(first) if !first.is_ascii_alphanumeric() => format!("begins with {}", shown(first)),
        Some(_) => match word.chars().find(|&c| !allowed(c)) {
            Some(bad) => format!("contains {}", shown(bad)),
            None => return Ok(()),
        },
    };
    let cut = if word.chars().count() > SHOWN { "…" } else { "" };
    let word: String = word.chars().take(SHOWN).flat_map(char::escape_debug).collect();
    Err(format!("{what} \"{word}{cut}\" {fault}, {expected}"))
}

/// Whom a switch connects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SwitchKind {
    /// Guests, the host and a network beyond: may have an uplink port.
    External,
    /// Guests and the host: a TAP device is made for the host.
    Internal,
    /// Ports only that the operator names; neither host nor uplink of its own.
    Private,
}

/// A switch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SwitchSpec {
    /// Unique name: letters, digits, `-`, `_` and `.`.
    pub name: String,
    /// Whom it connects.
    pub kind: SwitchKind,
    /// Addresses the table holds, static ones included: of [`SwitchSpec::ADDRESSES_RANGE`].
    pub addresses: usize,
    /// Seconds after which an address that was not seen is forgotten: of [`SwitchSpec::AGING_RANGE`].
    pub aging: u32,
}

impl SwitchSpec {
    /// Default of [`SwitchSpec::addresses`].
    pub const ADDRESSES: usize = 16_384;
    /// Default of [`SwitchSpec::aging`], IEEE 802.1Q-2018, table 8-6.
    pub const AGING: u32 = 300;
    /// What [`SwitchSpec::addresses`], and [`PortSpec::address_limit`], may be.
    pub const ADDRESSES_RANGE: RangeInclusive<usize> = 1..=1 << 20;
    /// What [`SwitchSpec::aging`] may be.
    pub const AGING_RANGE: RangeInclusive<u32> = 10..=crate::fdb::MAX_AGING;
}

/// How a port takes part in VLANs.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VlanMode {
    /// Frames pass as they are. A tag names the frame's VLAN, untagged frames are in none (0).
    #[default]
    Passthrough,
    /// Untagged frames only, all of one VLAN.
    Access(u16),
    /// Tagged frames of the listed VLANs, and untagged ones if there is a native VLAN.
    Trunk {
        /// Member VLANs, 1 to 4094, sorted.
        members: Vec<u16>,
        /// The VLAN of untagged frames; sent untagged as well.
        native: Option<u16>,
    },
}

impl VlanMode {
    /// VLANs that can be named.
    pub const IDS: RangeInclusive<u16> = 1..=MAX_VLAN;

    /// True if frames of `vlan` (0 is none) may pass the port.
    pub fn carries(&self, vlan: u16) -> bool {
        VlanRule::from(self).carries(vlan)
    }

    /// The VLAN of untagged frames, 0 for none; `None` if the port takes no such frames.
    pub fn untagged(&self) -> Option<u16> {
        match self {
            Self::Passthrough => Some(0),
            Self::Access(vlan) => Some(*vlan),
            Self::Trunk { native, .. } => *native,
        }
    }

    /// A VLAN that ports of both modes carry.
    fn shared(&self, other: &Self) -> Option<u16> {
        let (own, other) = (VlanRule::from(self), VlanRule::from(other));
        (0..=MAX_VLAN).find(|&vlan| own.carries(vlan) && other.carries(vlan))
    }
}

/// A port's place in a private VLAN: whom of the others in its VLAN it meets. A port with none meets all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PrivateVlan {
    /// Only ports without a place (routers, uplinks).
    Isolated,
    /// Those, and ports of the same community.
    Community(u16),
}

/// Which side of a vhost-user socket listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SocketMode {
    /// The switch listens.
    Server,
    /// The guest's VMM listens; the switch connects, and connects again.
    Client,
}

/// How fast a capture file is played.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pace {
    /// With the gaps in which it was recorded.
    Recorded,
    /// As fast as the switch takes it.
    Full,
}

/// How a TAP device is found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TapSpec {
    /// Opened, or made, by name.
    Name(String),
    /// Descriptors of an open device, one a queue, inherited by the daemon.
    Fds(Vec<i32>),
}

/// What a port is attached to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Attachment {
    /// A guest or application that speaks vhost-user.
    VhostUser {
        /// Socket.
        path: PathBuf,
        /// Who listens.
        mode: SocketMode,
        /// Queue pairs offered, 1 to 64.
        queues: u16,
    },
    /// A TAP device: the host or a container.
    Tap {
        /// The device.
        tap: TapSpec,
        /// Queues, 1 to 64.
        queues: u16,
    },
    /// A network device of the host (AF_PACKET): the way out of an external switch.
    Uplink {
        /// Device name.
        device: String,
        /// Sockets in a fanout group, 1 to 64.
        queues: u16,
    },
    /// A VM's synthetic adapter, whose channels are handed over while the VM runs.
    Synthetic {
        /// VM.
        vm: String,
        /// Adapter.
        nic: String,
        /// Channels, 1 to 64.
        queues: u16,
    },
    /// A VM's emulated adapter, connected through a socket while the VM runs.
    Legacy {
        /// VM.
        vm: String,
        /// Adapter.
        nic: String,
    },
    /// Capture files.
    Pcap {
        /// Frames that enter the switch here.
        read: Option<PathBuf>,
        /// Where frames that leave the switch here are written.
        write: Option<PathBuf>,
        /// How fast.
        pace: Pace,
        /// Play the file again and again.
        repeat: bool,
    },
}

/// A static address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StaticAddress {
    /// The address.
    pub mac: Mac,
    /// Its VLAN, 0 for none.
    pub vlan: u16,
}

/// VMQ: frames for an address go to some of the port's queues only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmqSpec {
    /// Destination address.
    pub mac: Mac,
    /// Its VLAN, 0 for none.
    pub vlan: u16,
    /// The queues, by number.
    pub queues: Vec<u16>,
}

/// Receive-side scaling of a port with several queues.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RssSpec {
    /// 40 bytes; the default is the published Microsoft key.
    pub key: Option<Vec<u8>>,
    /// Queue numbers, a power of two of them; the default is round robin over 128 entries.
    pub table: Option<Vec<u16>>,
}

/// A port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortSpec {
    /// Name, unique in its switch: letters, digits, `-`, `_` and `.`.
    pub name: String,
    /// What it is attached to.
    pub attachment: Attachment,
    /// Largest IP packet in bytes, of [`PortSpec::MTU_RANGE`].
    pub mtu: u16,
    /// The guest's address. If given, it belongs to this port in all VLANs that the port carries (static where untagged
    /// frames are), and other sources are refused.
    pub mac: Option<Mac>,
    /// Other sources than [`PortSpec::mac`] are allowed (`mac-spoofing`).
    pub spoofing: bool,
    /// VLANs.
    pub vlan: VlanMode,
    /// Whom the port meets in them.
    pub private: Option<PrivateVlan>,
    /// Most addresses learnt on the port; none is "as many as the table holds".
    pub address_limit: Option<u32>,
    /// Addresses pinned to the port.
    pub addresses: Vec<StaticAddress>,
    /// Offer checksum and segmentation offloads.
    pub offloads: bool,
    /// Merge small TCP segments for a receiver that takes large frames (RSC).
    pub coalesce: bool,
    /// Which queues serve which address.
    pub vmq: Vec<VmqSpec>,
    /// Spread over queues.
    pub rss: RssSpec,
    /// Processors that poll the port's queues, by queue; an empty list leaves it to the placement.
    pub pin: Vec<usize>,
}

impl PortSpec {
    /// Default of [`PortSpec::mtu`].
    pub const MTU: u16 = 1500;
    /// What [`PortSpec::mtu`] may be; the smallest is RFC 791's.
    pub const MTU_RANGE: RangeInclusive<u16> = 68..=9216;
    /// Queues that a port may have.
    pub const QUEUES_RANGE: RangeInclusive<u16> = 1..=64;

    /// A port with every default.
    pub fn new(name: impl Into<String>, attachment: Attachment) -> Self {
        Self {
            name: name.into(),
            attachment,
            mtu: Self::MTU,
            mac: None,
            spoofing: false,
            vlan: VlanMode::Passthrough,
            private: None,
            address_limit: None,
            addresses: Vec::new(),
            offloads: true,
            coalesce: true,
            vmq: Vec::new(),
            rss: RssSpec::default(),
            pin: Vec::new(),
        }
    }

    /// [`PortSpec::mac`] where untagged frames are.
    pub fn own_address(&self) -> Option<StaticAddress> {
        self.mac.zip(self.vlan.untagged()).map(|(mac, vlan)| StaticAddress { mac, vlan })
    }

    /// The static entries of the port in the switch's table.
    pub fn pinned(&self) -> impl Iterator<Item = StaticAddress> + '_ {
        self.own_address().into_iter().chain(self.addresses.iter().copied())
    }

    /// True if no other port may have the address.
    pub fn owns(&self, address: StaticAddress) -> bool {
        self.mac == Some(address.mac) && self.vlan.carries(address.vlan) || self.addresses.contains(&address)
    }

    /// An address that this port and `other` would both own.
    pub fn clash(&self, other: &Self) -> Option<StaticAddress> {
        let twice = |mac| {
            let vlan = self.vlan.shared(&other.vlan)?;
            Some(StaticAddress { mac, vlan })
        };
        let listed =
            |one: &Self, two: &Self| one.addresses.iter().copied().find(|&address| two.owns(address));
        let mac = self.mac.filter(|&mac| other.mac == Some(mac)).and_then(twice);
        mac.or_else(|| listed(self, other)).or_else(|| listed(other, self))
    }
}
