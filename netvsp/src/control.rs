//! The protocol state of one synthetic NIC, without I/O: messages of the guest and events of the host go in, [`Effects`]
//! come out, and [`Nvsp::data_path`] says at any time what frames may do.
//!
//! ```text
//!             INIT                   101, mapped()              INITIALIZE
//!   Closed ─────────▶ Negotiating ─────────────────▶ Ready ──────────────────▶ Running
//!     ▲                    ▲            103            │  ▲          HALT          │
//!     │                    └───────────────────────────┘  └────────────────────────┘
//!     └── the primary channel closes, whatever the state
//! ```
//!
//! What a guest may get wrong and still be told so is answered with a status; what no driver does, and what cannot be
//! answered, is a [`Violation`]: its NIC stops, and the operator reads why.

use thiserror::Error;
use vmq::Mac;
use vmq::worker::Nanos;
use vswitch::backend::GuestRss;

use crate::message::Waiting;
use crate::protocol::nvsp::{self, Version};
use crate::protocol::rndis;

mod link;
mod offloads;
mod query;
mod requests;
mod rndis_requests;
mod rss;
mod saved;
mod set;
mod state;

pub use offloads::{ChecksumDirections, Offloads};
pub use query::Statistics;
pub use saved::RestoreError;
pub use state::{PacketFilter, SectionedBuffer};

use link::Link;
use state::{Area, Device, Session, State};

/// The buffer that receives, as the data path sees it.
pub type ReceiveBuffer = SectionedBuffer;
/// The buffer that sends, as the data path sees it.
pub type SendBuffer = SectionedBuffer;

/// Most queues of a NIC: the most channels Linux opens.
pub const MAX_QUEUES: u16 = 64;
/// Bytes of an Ethernet header, which some MTUs count and others do not.
pub const ETHERNET_BYTES: u32 = 14;
/// The smallest MTU: IPv4's.
pub const MIN_MTU: u16 = 68;
/// The MTU of a guest that was not asked for one.
pub const DEFAULT_MTU: u16 = 1500;
/// Packets that a guest may put in one NVSP message. Hyper-V says 8; twice that halves the ring packets of a flood of
/// small frames, and still leaves room for several messages in a burst.
pub const MAX_PACKETS_PER_MESSAGE: u32 = 16;
/// Bytes of the longest RNDIS message taken: a large send with its headers.
pub const MAX_TRANSFER: u32 = 128 * 1024;
/// Bytes of a section of the send buffer, as Hyper-V has it: longer packets are not worth the guest's copy.
pub const SEND_SECTION_BYTES: u32 = 6144;
/// Ranges in one receive packet, for guests that speak NDIS 6 (§9).
pub const MAX_RANGES: u16 = 375;
/// Bytes of the largest buffer that is mapped, either way; DPDK's receive buffer is 31 MiB.
pub const MAX_BUFFER_BYTES: u32 = 32 << 20;

/// What the host decides about a NIC.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NicConfig {
    /// Permanent address.
    pub mac: Mac,
    /// Bytes of the longest packet the host allows, without Ethernet header.
    pub mtu: u16,
    /// Most channels, the primary included; 1 to [`MAX_QUEUES`].
    pub queues: u16,
    /// Checksum and large send offload are offered.
    pub offloads: bool,
    /// Coalesced segments are delivered to guests that can take them.
    pub rsc: bool,
    /// Speed of the link in Mbit/s.
    pub link_mbps: u64,
    /// What the guest may show as the NIC's name.
    pub name: String,
    /// The guest may choose another address.
    pub spoofing: bool,
}

/// What is to be done after a message or an event, in this order.
pub type Effects = Vec<Effect>;

/// One thing to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Complete the request with this payload, which may be empty. After [`Nvsp::mapped`] that is the request which
    /// asked for the buffer.
    Complete(Vec<u8>),
    /// Send this RNDIS message as the answer to a control message: in a receive section, on the primary channel.
    RndisReply(Vec<u8>),
    /// Send this RNDIS message unasked, likewise.
    Indicate(Vec<u8>),
    /// Send this NVSP message in-band on the primary channel; no completion wanted.
    InBand(Vec<u8>),
    /// Map the receive buffer, then call [`Nvsp::mapped`].
    MapReceive {
        /// Which pages.
        gpadl: u32,
    },
    /// Map the send buffer, then call [`Nvsp::mapped`].
    MapSend {
        /// Which pages.
        gpadl: u32,
    },
    /// Offer this many subchannels.
    OfferSubchannels(u16),
    /// [`Nvsp::data_path`] has changed: a buffer that it does not have any more is not to be touched again.
    Changed,
}

/// One of the two buffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Buffer {
    /// Host to guest.
    Receive,
    /// Guest to host.
    Send,
}

/// What a guest did that no driver does. The NIC stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Violation {
    /// An NVSP message that makes no sense by itself.
    #[error(transparent)]
    Nvsp(#[from] nvsp::Malformed),
    /// An RNDIS control message that makes no sense by itself.
    #[error(transparent)]
    Rndis(#[from] rndis::Malformed),
    /// A message that is the host's to send, or that belongs on another path.
    #[error("NVSP {0} is not a guest's request")]
    NotARequest(nvsp::Kind),
    /// A message that the agreed version does not have.
    #[error("NVSP {kind} is not in version {version}, which was agreed")]
    NotInVersion {
        /// The message.
        kind: nvsp::Kind,
        /// The version.
        version: Version,
    },
    /// A message that does not fit what came before.
    #[error("NVSP {kind} while the NIC is {phase}")]
    OutOfOrder {
        /// The message.
        kind: nvsp::Kind,
        /// The state.
        phase: Phase,
    },
    /// A buffer is withdrawn, or the MTU changes, while the host still maps a buffer or uses it.
    #[error("NVSP {0} while a buffer is in use")]
    BufferInUse(nvsp::Kind),
    /// An RNDIS message although there is no buffer to answer in.
    #[error("RNDIS {kind} while the NIC is {phase}")]
    NoReceiveBuffer {
        /// The message.
        kind: rndis::Kind,
        /// The state.
        phase: Phase,
    },
    /// A frame size no network has.
    #[error("NDIS configuration with frames of {0} bytes")]
    FrameSize(u32),
}

/// How far the guest has got.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// No version agreed.
    Closed,
    /// A version is agreed; there is no receive buffer yet.
    Negotiating,
    /// There is a receive buffer: RNDIS control messages may come.
    Ready,
    /// RNDIS is initialised: frames may be sent, and received as the filter says.
    Running,
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Closed => "closed",
            Self::Negotiating => "negotiating",
            Self::Ready => "ready",
            Self::Running => "running",
        })
    }
}

/// What frames may do: everything the data path needs to know of the protocol.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataPath {
    /// How far the guest has got; frames move only while [`Phase::Running`].
    pub state: Phase,
    /// The version, once agreed.
    pub version: Option<Version>,
    /// Where frames for the guest go.
    pub receive: Option<ReceiveBuffer>,
    /// Where small frames of the guest are.
    pub send: Option<SendBuffer>,
    /// Which frames the guest takes; empty: none.
    pub filter: PacketFilter,
    /// Group addresses the guest asked for, for [`PacketFilter::MULTICAST`] without [`PacketFilter::ALL_MULTICAST`].
    pub multicast: Vec<Mac>,
    /// The guest's own address.
    pub mac: Mac,
    /// Bytes of the longest packet, without Ethernet header: what host and guest both allow.
    pub mtu: u16,
    /// The guest takes coalesced segments, IPv4 and IPv6.
    pub rsc: bool,
    /// What the guest may leave to the host, and wants the host to do for it.
    pub offloads: Offloads,
    /// How the guest wants its frames spread over its channels.
    pub rss: Option<GuestRss>,
    /// Packets of the guest in one NVSP message.
    pub max_packets_per_message: u32,
    /// Ranges in one receive packet.
    pub max_ranges: u16,
    /// Subchannels granted: channels `1..=subchannels` exist, or will.
    pub subchannels: u16,
}

/// The protocol state of one NIC.
#[derive(Debug)]
pub struct Nvsp {
    config: NicConfig,
    /// The address in use: the permanent one, or the guest's choice. Outlives the channel, as guests do not repeat it.
    mac: Mac,
    link: Link,
    statistics: Statistics,
    state: State,
    /// Messages that wait for the guest, as last told.
    waiting: Waiting,
    /// What of it is kept for a successor.
    kept: Option<(State, Mac, bool, Waiting)>,
}

impl Nvsp {
    /// A NIC whose channel is closed, and whose link is up.
    pub fn new(mut config: NicConfig) -> Self {
        config.queues = config.queues.clamp(1, MAX_QUEUES);
        config.mtu = config.mtu.max(MIN_MTU);
        let link = Link::new(config.link_mbps);
        let (statistics, waiting) = (Statistics::default(), Waiting::default());
        Self { mac: config.mac, link, statistics, state: State::Closed, waiting, kept: None, config }
    }

    /// The host's decisions, as they stand.
    pub fn config(&self) -> &NicConfig {
        &self.config
    }

    /// How far the guest has got.
    pub fn phase(&self) -> Phase {
        self.state.phase()
    }

    /// What frames may do now.
    pub fn data_path(&self) -> DataPath {
        let session = self.state.session();
        let device = self.state.device();
        let offloads = device.map(|device| device.offloads).unwrap_or_default();
        DataPath {
            state: self.phase(),
            version: session.map(|session| session.version),
            receive: session.and_then(|session| session.receive.mapped()),
            send: session.and_then(|session| session.send.mapped()),
            filter: device.map(Device::filter).unwrap_or_default(),
            multicast: device.map(Device::multicast).unwrap_or_default(),
            mac: self.mac,
            mtu: self.mtu(),
            rsc: offloads.rsc_v4 && offloads.rsc_v6,
            offloads,
            rss: device.and_then(Device::guest_rss),
            max_packets_per_message: MAX_PACKETS_PER_MESSAGE,
            max_ranges: if session.is_some_and(Session::speaks_ndis_6) { MAX_RANGES } else { 1 },
            subchannels: session.map_or(0, |session| session.subchannels),
        }
    }

    /// The MTU in force: the host's, or the guest's if it asked for less.
    fn mtu(&self) -> u16 {
        self.config.mtu.min(self.state.session().map_or(DEFAULT_MTU, |session| session.mtu))
    }

    /// The buffer that an effect asked for is mapped and has `bytes`, or cannot be mapped. Answers the guest.
    pub fn mapped(&mut self, kind: Buffer, bytes: Option<u32>) -> Effects {
        let mtu = self.mtu();
        let Some(session) = self.state.session_mut() else { return Effects::new() };
        let size = match kind {
            Buffer::Receive => receive_section_bytes(mtu, session.takes_rsc() && self.config.rsc),
            Buffer::Send => SEND_SECTION_BYTES,
        };
        let area = session.area_mut(kind);
        let Area::Mapping { gpadl, id, reply } = *area else { return Effects::new() };
        let sections =
            bytes.filter(|bytes| *bytes <= MAX_BUFFER_BYTES).and_then(|bytes| sections(bytes, size));
        *area = match sections {
            Some(sections) => Area::Mapped(SectionedBuffer { gpadl, id, section_size: size, sections }),
            None => Area::Absent,
        };
        let answer = requests::buffer_answer(kind, area.mapped());
        let changed = sections.map(|_| Effect::Changed);
        changed.into_iter().chain(reply.then(|| Effect::Complete(answer.to_vec()))).collect()
    }

    /// A channel of the NIC was opened. Frames may be spread to it from now on; the guest is told how to spread its own
    /// once all subchannels it was granted are open.
    pub fn channel_opened(&mut self, index: u16) -> Effects {
        let Some(session) = self.state.session_mut() else { return Effects::new() };
        if session.subchannel_opened(index) && session.all_open() {
            vec![Effect::InBand(nvsp::send_table(session.subchannels + 1))]
        } else {
            Effects::new()
        }
    }

    /// A channel of the NIC was closed. Without its primary channel (0) a NIC forgets everything but its address.
    pub fn channel_closed(&mut self, index: u16) -> Effects {
        if index != 0 {
            let changed = self.state.session_mut().is_some_and(|session| session.subchannel_closed(index));
            return if changed { vec![Effect::Changed] } else { Effects::new() };
        }
        self.kept = None;
        match std::mem::replace(&mut self.state, State::Closed) {
            State::Agreed(_) => vec![Effect::Changed],
            State::Closed => Effects::new(),
        }
    }

    /// The host allows packets of `mtu` bytes, the guest to choose another address or not, and gives the NIC another permanent
    /// one, if any. A guest adopts more bytes when it next configures itself, and reads the address when it next begins.
    pub fn configure(&mut self, mtu: u16, mac: Option<Mac>, spoofing: bool) -> Effects {
        let before = (self.mtu(), self.config.mac);
        (self.config.mtu, self.config.spoofing) = (mtu.max(MIN_MTU), spoofing);
        if let Some(mac) = mac.filter(|mac| *mac != self.config.mac) {
            (self.config.mac, self.mac) = (mac, mac);
        }
        if (self.mtu(), self.config.mac) == before { Effects::new() } else { vec![Effect::Changed] }
    }

    /// What the NIC has moved, as last told.
    pub fn statistics(&self) -> &Statistics {
        &self.statistics
    }

    /// What the NIC has moved, for when the guest asks.
    pub fn set_statistics(&mut self, statistics: Statistics) {
        self.statistics = statistics;
    }

    /// Messages that wait for the guest, for a successor.
    pub(crate) fn set_waiting(&mut self, waiting: Waiting) {
        self.waiting = waiting;
    }

    /// What a predecessor left.
    pub(crate) fn take_waiting(&mut self) -> Waiting {
        std::mem::take(&mut self.waiting)
    }

    /// The link went up or down, and the guest is not to be told before the next [`Nvsp::tick`].
    pub fn set_link(&mut self, up: bool) {
        self.link.set(up);
    }

    /// The link went up or down. Guests handle one event in two seconds: what must wait comes out of [`Nvsp::tick`].
    pub fn link(&mut self, up: bool, now: Nanos) -> Effects {
        self.set_link(up);
        self.tick(now)
    }

    /// The link has another speed, in Mbit/s.
    pub fn speed(&mut self, mbps: u64, now: Nanos) -> Effects {
        self.link.set_speed(mbps);
        self.config.link_mbps = mbps;
        self.tick(now)
    }

    /// Time passes.
    pub fn tick(&mut self, now: Nanos) -> Effects {
        let Some(session) = self.state.session_mut() else { return Effects::new() };
        let wants_speed = session.capabilities().contains(nvsp::Capabilities::TEAMING);
        match session.device_mut().and_then(|device| self.link.indicate(&mut device.told, wants_speed, now)) {
            Some(message) => vec![Effect::Indicate(message)],
            None => Effects::new(),
        }
    }

    /// Whether the cable is in.
    pub fn link_is_up(&self) -> bool {
        self.link.is_up()
    }

    /// When [`Nvsp::tick`] has something to say, if it has.
    pub fn next_tick(&self) -> Option<Nanos> {
        let session = self.state.session()?;
        let wants_speed = session.capabilities().contains(nvsp::Capabilities::TEAMING);
        self.link.due(&session.device()?.told, wants_speed)
    }
}

/// Bytes of a receive section for packets of `mtu`.
///
/// A section holds the longest header, the Ethernet header, up to two tags and the packet. With RSC the frame that it
/// holds is a fragment of a larger one, so fewer and longer sections save headers and ranges; 4288 is four KiB and a
/// header, and no multiple of a page, lest the headers of all sections share a cache set. Sections are never shorter than
/// those of the usual MTU: each is something to keep books on, when a guest grants and revokes buffers all the time.
pub fn receive_section_bytes(mtu: u16, rsc: bool) -> u32 {
    let mtu = mtu.max(1500);
    let exact = (128 + ETHERNET_BYTES + 8 + u32::from(mtu)).next_multiple_of(8);
    if rsc { exact.max(4288) } else { exact }
}

/// How many sections of `size` there are in `bytes`; at least two: one for frames, one for answers.
fn sections(bytes: u32, size: u32) -> Option<u32> {
    bytes.checked_div(size).filter(|count| *count >= 2)
}

#[cfg(test)]
mod tests;
