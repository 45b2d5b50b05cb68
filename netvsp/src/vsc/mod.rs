//! The guest's side of an adapter, in this process: a driver that speaks to the real device over shared memory.
//!
//! Tests, benches and fuzzing use it where a guest would be: it does what Linux' `hv_netvsc` does (netvsp.md §3, §8, §9,
//! §12), in the same order, and checks what it is told more strictly. It is a driver for measuring switches, not for
//! guests: control requests wait, frames are polled for.

mod channel;
mod frames;
#[cfg(test)]
mod phy;
pub mod rig;
#[cfg(test)]
mod tests;
mod vmm;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use vmbus::handover::HandoverError;
use vmbus::pages::{Pages, PagesError};
use vmbus::ring::{GpaRangeList, PacketHeader, PacketKind, RingFault, WriteError};
use vmq::memory::{MappingError, RegionError};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, IntoBytes};

use crate::protocol::nvsp::{self, Capabilities, Kind, Version};
use crate::protocol::oid::{self, Oid};
use crate::protocol::packet::PacketError;
use crate::protocol::rndis;

use channel::Channel;
pub use frames::{Form, Received, Transmit};
pub use vmm::{Vmm, Wires};

/// How long a request may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Name of the receive buffer.
const RECEIVE_ID: u16 = 0xcafe;

/// Transactions above this are sections or direct sends; requests have it.
const REQUEST: u64 = 1 << 40;

/// Entries of the table that spreads received frames.
pub const TABLE: usize = 128;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum VscError {
    /// The kernel refuses.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// The hand-over failed.
    #[error(transparent)]
    Handover(#[from] HandoverError),
    /// No memory.
    #[error(transparent)]
    Mapping(#[from] MappingError),
    /// No memory.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// No memory.
    #[error(transparent)]
    Pages(#[from] PagesError),
    /// The host broke the ring.
    #[error(transparent)]
    Ring(#[from] RingFault),
    /// A packet cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The host sent a frame that is none.
    #[error(transparent)]
    Packet(#[from] PacketError),
    /// The guest has no more memory.
    #[error("guest is out of memory")]
    OutOfMemory,
    /// The switch closed the connection.
    #[error("switch closed the connection")]
    Closed,
    /// The switch says that the guest broke the protocol.
    #[error("adapter faulted: {0}")]
    Faulted(String),
    /// The switch refused.
    #[error("refused: {0}")]
    Refused(String),
    /// The switch did not answer.
    #[error("no answer to {0}")]
    NoAnswer(&'static str),
    /// The switch said what no host may say.
    #[error("host broke the protocol: {0}")]
    Host(&'static str),
}

/// How the driver sets its adapter up.
#[derive(Debug, Clone)]
pub struct Config {
    /// Largest IP packet in bytes.
    pub mtu: u16,
    /// Queues wanted.
    pub queues: u16,
    /// Pages of the receive buffer.
    pub receive_pages: u64,
    /// Pages of the send buffer; 0 for none.
    pub send_pages: u64,
    /// Take coalesced segments.
    pub rsc: bool,
    /// Protocol version.
    pub version: Version,
    /// Major and minor version of NDIS.
    pub ndis: (u32, u32),
}

impl Default for Config {
    fn default() -> Self {
        Self {
            mtu: 1500,
            queues: 1,
            receive_pages: 1024,
            send_pages: 255,
            rsc: true,
            version: Version::V61,
            ndis: (6, 30),
        }
    }
}

/// A buffer that both sides know.
#[derive(Debug)]
struct Buffer {
    #[cfg_attr(not(test), expect(dead_code, reason = "tests withdraw a buffer on their own"))]
    gpadl: u32,
    pages: Pages,
    section: u32,
    count: u32,
}

/// A driver with its adapter.
#[derive(Debug)]
pub struct Guest {
    vmm: Vmm,
    config: Config,
    channels: Vec<Channel>,
    receive: Option<Buffer>,
    send: Option<Buffer>,
    free: Vec<u32>,
    /// Direct sends: a slot of pages each, and which are free.
    slots: Vec<Vec<u64>>,
    free_slots: Vec<u32>,
    /// A page for control messages.
    scratch: Vec<u64>,
    answers: VecDeque<(u64, Vec<u8>)>,
    replies: VecDeque<Vec<u8>>,
    /// Status indications, oldest first.
    pub indications: VecDeque<u32>,
    received: VecDeque<Received>,
    requests: u32,
    /// Packets with frames are not completed: their channels and transactions are kept here.
    withheld: Option<Vec<(usize, u64)>>,
    /// Ranges and bytes that came, if frames are only counted.
    counted: Option<(u64, u64)>,
    /// What the host says the address is.
    pub mac: [u8; 6],
    /// Transmits that are not completed.
    pub outstanding: usize,
    ranges: GpaRangeList,
}

impl Guest {
    /// Sets the adapter of `vmm` up as Linux does, up to frames flowing.
    ///
    /// # Errors
    /// The host refuses, or is silent.
    pub fn start(vmm: Vmm, config: Config) -> Result<Self, VscError> {
        let mut guest = Self {
            vmm,
            config,
            channels: Vec::new(),
            receive: None,
            send: None,
            free: Vec::new(),
            slots: Vec::new(),
            free_slots: Vec::new(),
            scratch: Vec::new(),
            answers: VecDeque::new(),
            replies: VecDeque::new(),
            indications: VecDeque::new(),
            received: VecDeque::new(),
            requests: 0,
            withheld: None,
            counted: None,
            mac: [0; 6],
            outstanding: 0,
            ranges: GpaRangeList::default(),
        };
        guest.scratch = guest.vmm.allocate(1)?;
        guest.attach()?;
        Ok(guest)
    }

    /// The adapter's VMM.
    pub fn vmm(&mut self) -> &mut Vmm {
        &mut self.vmm
    }

    /// Open channels.
    pub fn queues(&self) -> usize {
        self.channels.len()
    }

    /// The whole handshake.
    fn attach(&mut self) -> Result<(), VscError> {
        self.channels.push(Channel::open(&mut self.vmm, 0)?);
        self.connect_vsp()?;
        self.map_buffers()?;
        self.rndis_up()?;
        if self.config.queues > 1 && self.config.version >= Version::V5 {
            self.subchannels()?;
        }
        self.set(Oid::GEN_CURRENT_PACKET_FILTER, &0x0du32.to_le_bytes())
    }

    fn connect_vsp(&mut self) -> Result<(), VscError> {
        let version = U32::new(self.config.version.number());
        let init = nvsp::message(Kind::Init, &nvsp::Init { min: version, max: version });
        let answer = self.call(&init, "INIT")?;
        let fields = answered::<nvsp::InitComplete>(&answer, Kind::InitComplete)?;
        if fields.status.get() != nvsp::Status::Success as u32 {
            return Err(VscError::Refused(format!("INIT: {fields:?}")));
        }
        let (major, minor) = self.config.ndis;
        let ndis = nvsp::NdisVersion { major: U32::new(major), minor: U32::new(minor) };
        if self.config.version == Version::V1 {
            return self.tell(&nvsp::message(Kind::SendNdisVersion, &ndis));
        }
        let mut capabilities = Capabilities::VLAN | Capabilities::TEAMING | Capabilities::SRIOV;
        capabilities.set(Capabilities::RSC, self.config.rsc);
        let fields = nvsp::NdisConfig {
            mtu: U32::new(u32::from(self.config.mtu) + 14),
            reserved: U32::ZERO,
            capabilities: U64::new(capabilities.bits()),
        };
        self.tell(&nvsp::message(Kind::SendNdisConfig, &fields))?;
        self.tell(&nvsp::message(Kind::SendNdisVersion, &ndis))
    }

    fn map_buffers(&mut self) -> Result<(), VscError> {
        let pfns = self.vmm.allocate(self.config.receive_pages)?;
        let (gpadl, pages) = self.vmm.grant(&pfns)?;
        let fields = nvsp::SendBuffer { gpadl: U32::new(gpadl), id: U16::new(RECEIVE_ID) };
        let answer = self.call(&nvsp::message(Kind::SendReceiveBuffer, &fields), "SEND_RECEIVE_BUFFER")?;
        let fields = answered::<nvsp::ReceiveBufferComplete>(&answer, Kind::SendReceiveBufferComplete)?;
        let (section, count) = (fields.size.get(), fields.parts.get());
        let fits = section.checked_mul(count).is_some_and(|bytes| bytes <= pages.len());
        let well = fields.status.get() == nvsp::Status::Success as u32
            && fields.count.get() == 1
            && fields.offset.get() == 0;
        if !well || !fits || section < 68 {
            return Err(VscError::Refused(format!("receive buffer of {} bytes: {fields:?}", pages.len())));
        }
        self.receive = Some(Buffer { gpadl, pages, section, count });
        if self.config.send_pages == 0 {
            return Ok(());
        }
        let pfns = self.vmm.allocate(self.config.send_pages)?;
        let (gpadl, pages) = self.vmm.grant(&pfns)?;
        let fields = nvsp::SendBuffer { gpadl: U32::new(gpadl), id: U16::ZERO };
        let answer = self.call(&nvsp::message(Kind::SendSendBuffer, &fields), "SEND_SEND_BUFFER")?;
        let fields = answered::<nvsp::SendBufferComplete>(&answer, Kind::SendSendBufferComplete)?;
        let section = fields.size.get();
        if fields.status.get() != nvsp::Status::Success as u32 || section < 68 {
            return Err(VscError::Refused(format!("send buffer of {} bytes: {fields:?}", pages.len())));
        }
        let count = pages.len() / section;
        self.free = (0..count).rev().collect();
        self.send = Some(Buffer { gpadl, pages, section, count });
        Ok(())
    }

    fn rndis_up(&mut self) -> Result<(), VscError> {
        let request = self.request();
        self.ask(&rndis::initialize(request), "INITIALIZE")?;
        let frame = self.query(Oid::GEN_MAXIMUM_FRAME_SIZE)?;
        let mtu = frame.first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
        self.config.mtu = self.config.mtu.min(u16::try_from(mtu).unwrap_or(u16::MAX));
        let mac = self.query(Oid::ETHERNET_PERMANENT_ADDRESS)?;
        self.mac = mac.try_into().map_err(|_| VscError::Host("address"))?;
        let mut capabilities = self.query(Oid::OFFLOAD_HARDWARE_CAPABILITIES)?;
        // Older versions say less.
        capabilities.resize(capabilities.len().max(size_of::<oid::Offload>()), 0);
        let (offload, _) = oid::Offload::read_from_prefix(&capabilities)
            .map_err(|_| VscError::Host("offload capabilities"))?;
        let header = oid::ObjectHeader { kind: oid::TYPE_DEFAULT, revision: 3, size: U16::new(28) };
        let rsc = if self.config.rsc && offload.rsc_v4 != 0 { 2 } else { 1 };
        let parameters = oid::OffloadParameters {
            header,
            tcp4: 4,
            udp4: 4,
            tcp6: 4,
            udp6: 4,
            lso_v4: 2,
            lso_v6: 2,
            rsc_v4: rsc,
            rsc_v6: rsc,
            ..zeroed()
        };
        self.set(Oid::OFFLOAD_PARAMETERS, parameters.as_bytes())?;
        self.query(Oid::GEN_MEDIA_CONNECT_STATUS)?;
        self.query(Oid::GEN_LINK_SPEED)?;
        Ok(())
    }

    fn subchannels(&mut self) -> Result<(), VscError> {
        let capabilities = self.query(Oid::GEN_RECEIVE_SCALE_CAPABILITIES)?;
        let (capabilities, _) = oid::RssCapabilities::read_from_prefix(&capabilities)
            .map_err(|_| VscError::Host("RSS capabilities"))?;
        let wanted = u32::from(self.config.queues).min(capabilities.queues.get());
        if wanted < 2 {
            return Ok(());
        }
        let operation = U32::new(nvsp::ALLOCATE_SUBCHANNELS);
        let fields = nvsp::SubchannelRequest { operation, count: U32::new(wanted - 1) };
        let answer = self.call(&nvsp::message(Kind::Subchannel, &fields), "SUBCHANNEL")?;
        let fields = answered::<nvsp::SubchannelComplete>(&answer, Kind::Subchannel)?;
        let granted = fields.count.get();
        if granted == 0 || granted > wanted - 1 || u32::from(self.vmm.offered()?) != granted {
            return Err(VscError::Host("subchannels"));
        }
        for index in 1..=u16::try_from(granted).unwrap_or(0) {
            self.channels.push(Channel::open(&mut self.vmm, index)?);
        }
        let queues = u32::try_from(self.channels.len()).unwrap_or(1);
        let table: [u32; TABLE] = std::array::from_fn(|entry| u32::try_from(entry).unwrap_or(0) % queues);
        self.set_rss(&table, true)?;
        self.set_rss(&table, false)
    }

    /// Has received frames spread as `table` says, from now on (`ethtool -X`).
    ///
    /// # Errors
    /// The host refuses, or is silent.
    pub fn spread(&mut self, table: &[u32; TABLE]) -> Result<(), VscError> {
        self.set_rss(table, false)
    }

    fn set_rss(&mut self, table: &[u32; TABLE], disable: bool) -> Result<(), VscError> {
        const ENTRIES: u16 = 128;
        const _: () = assert!(ENTRIES as usize == TABLE);
        let header = oid::ObjectHeader { kind: oid::TYPE_RSS_PARAMETERS, revision: 2, size: U16::new(40) };
        let hash =
            oid::HASH_TOEPLITZ | oid::HASH_IPV4 | oid::HASH_TCP_IPV4 | oid::HASH_IPV6 | oid::HASH_TCP_IPV6;
        let parameters = oid::RssParameters {
            header,
            flags: U16::new(if disable { oid::RSS_DISABLE } else { 0 }),
            hash: U32::new(hash),
            table_bytes: U16::new(ENTRIES * 4),
            table_offset: U32::new(40),
            key_bytes: U16::new(40),
            key_offset: U32::new(40 + u32::from(ENTRIES) * 4),
            ..zeroed()
        };
        let mut info = parameters.as_bytes().to_vec();
        info.extend(table.iter().flat_map(|entry| entry.to_le_bytes()));
        info.extend(vmq::rss::DEFAULT_KEY);
        self.set(Oid::GEN_RECEIVE_SCALE_PARAMETERS, &info)
    }

    /// Takes the adapter down, as for a change of MTU or channels, and sets it up again.
    ///
    /// # Errors
    /// The host refuses, or is silent.
    pub fn restart(&mut self, config: Config) -> Result<(), VscError> {
        self.detach()?;
        self.resume(config)
    }

    /// Sets the adapter up again after [`Guest::detach`], as a guest that was suspended does.
    ///
    /// # Errors
    /// The host refuses, or is silent.
    pub fn resume(&mut self, config: Config) -> Result<(), VscError> {
        self.config = config;
        self.attach()
    }

    /// Takes the adapter down (netvsp.md §12).
    ///
    /// # Errors
    /// The host is silent.
    pub fn detach(&mut self) -> Result<(), VscError> {
        self.set(Oid::GEN_CURRENT_PACKET_FILTER, &0u32.to_le_bytes())?;
        self.wait("transmits", |guest| (guest.outstanding == 0).then_some(()))?;
        let request = self.request();
        self.carry(&rndis::request(rndis::Kind::Halt, request))?;
        self.wait("HALT", |guest| (guest.outstanding == 0).then_some(()))?;
        let revoke = |kind, id| nvsp::message(kind, &nvsp::RevokeBuffer { id: U16::new(id) });
        self.tell(&revoke(Kind::RevokeReceiveBuffer, RECEIVE_ID))?;
        if self.send.is_some() {
            self.tell(&revoke(Kind::RevokeSendBuffer, 0))?;
        }
        self.reset()
    }

    /// Loses the adapter as it is, with whatever is under way, as in a reset of the machine; [`Guest::resume`] begins anew.
    ///
    /// # Errors
    /// The host is silent.
    pub fn reset(&mut self) -> Result<(), VscError> {
        self.vmm.reset()?;
        self.channels.clear();
        (self.receive, self.send) = (None, None);
        self.free.clear();
        self.free_slots = (0..u32::try_from(self.slots.len()).unwrap_or(0)).collect();
        self.withheld.iter_mut().for_each(Vec::clear);
        self.answers.clear();
        self.replies.clear();
        self.outstanding = 0;
        Ok(())
    }

    /// Closes a subchannel as it is, with whatever is under way in it, and opens it anew. What was sent in it and is not
    /// completed never will be.
    ///
    /// # Errors
    /// The host refuses, or is silent.
    pub fn reopen(&mut self, index: u16) -> Result<(), VscError> {
        let channel = self.channels.get_mut(usize::from(index)).ok_or(VscError::Closed)?;
        self.vmm.close(index)?;
        self.vmm.revoke(channel.gpadl)?;
        *channel = Channel::open(&mut self.vmm, index)?;
        Ok(())
    }

    fn request(&mut self) -> u32 {
        self.requests += 1;
        self.requests
    }

    /// Polls until `done` says so.
    fn wait<R>(
        &mut self,
        what: &'static str,
        mut done: impl FnMut(&mut Self) -> Option<R>,
    ) -> Result<R, VscError> {
        let end = Instant::now() + PATIENCE;
        loop {
            self.poll()?;
            if let Some(result) = done(self) {
                return Ok(result);
            }
            if Instant::now() > end {
                return Err(VscError::NoAnswer(what));
            }
            self.sleep(Duration::from_millis(20))?;
        }
    }

    /// Sends an NVSP message that wants no answer.
    fn tell(&mut self, message: &[u8]) -> Result<(), VscError> {
        self.post(&PacketHeader::in_band(u64::MAX - 2), message)
    }

    /// Sends an NVSP message and waits for its answer.
    fn call(&mut self, message: &[u8], what: &'static str) -> Result<Vec<u8>, VscError> {
        let transaction = REQUEST + u64::from(self.request());
        let header = PacketHeader { completion_requested: true, ..PacketHeader::in_band(transaction) };
        self.post(&header, message)?;
        self.wait(what, |guest| {
            let at = guest.answers.iter().position(|(answered, _)| *answered == transaction)?;
            guest.answers.remove(at).map(|(_, answer)| answer)
        })
    }

    fn post(&mut self, header: &PacketHeader<'_>, payload: &[u8]) -> Result<(), VscError> {
        let primary = self.channels.first_mut().ok_or(VscError::Closed)?;
        if !primary.write(header, payload)? {
            return Err(VscError::Host("full ring"));
        }
        primary.publish();
        Ok(())
    }

    /// Sends an RNDIS control message, in a page of its own.
    pub(crate) fn carry(&mut self, message: &[u8]) -> Result<(), VscError> {
        let pages = Pages::new(self.vmm.memory(), &self.scratch)?;
        let len = u32::try_from(message.len()).unwrap_or(u32::MAX);
        if !pages.write(0, message) {
            return Err(VscError::OutOfMemory);
        }
        let mut list = GpaRangeList::default();
        list.push(len, 0, &self.scratch);
        let header = PacketHeader {
            kind: PacketKind::GpaDirect { ranges: list.ranges() },
            completion_requested: true,
            transaction: frames::CONTROL,
        };
        self.outstanding += 1;
        self.post(&header, &nvsp::rndis_packet(true))
    }

    /// Sends an RNDIS request and waits for its reply.
    fn ask(&mut self, message: &[u8], what: &'static str) -> Result<Vec<u8>, VscError> {
        self.carry(message)?;
        let request: Option<[u8; 4]> = message.get(8..12).and_then(|bytes| bytes.try_into().ok());
        self.wait(what, |guest| {
            let same = |reply: &Vec<u8>| reply.get(8..12) == request.as_ref().map(<[u8; 4]>::as_slice);
            let at = guest.replies.iter().position(same)?;
            guest.replies.remove(at)
        })
    }

    /// Asks for the value of `oid`.
    ///
    /// # Errors
    /// The host refuses, or is silent.
    pub fn query(&mut self, oid: Oid) -> Result<Vec<u8>, VscError> {
        let request = self.request();
        let reply = self.ask(&rndis::access(rndis::Kind::Query, request, oid, &[]), "QUERY")?;
        let word = |at: usize| {
            reply.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes)
        };
        let (len, offset) = (word(16) as usize, word(20) as usize + 8);
        if word(12) != 0 {
            return Err(VscError::Refused(format!("{oid:?}: {:#x}", word(12))));
        }
        reply.get(offset..offset + len).map(<[u8]>::to_vec).ok_or(VscError::Host("query reply"))
    }

    /// Sets `oid` to `info`.
    ///
    /// # Errors
    /// The host refuses, or is silent.
    pub fn set(&mut self, oid: Oid, info: &[u8]) -> Result<(), VscError> {
        let request = self.request();
        let reply = self.ask(&rndis::access(rndis::Kind::Set, request, oid, info), "SET")?;
        match reply.get(12..16) {
            Some([0, 0, 0, 0]) => Ok(()),
            status => Err(VscError::Refused(format!("{oid:?}: {status:?}"))),
        }
    }
}

fn zeroed<T: zerocopy::FromZeros>() -> T {
    T::new_zeroed()
}

/// The fields of an answer of the kind expected.
fn answered<T: FromBytes + zerocopy::KnownLayout + zerocopy::Immutable + zerocopy::Unaligned>(
    answer: &[u8],
    expected: Kind,
) -> Result<T, VscError> {
    match nvsp::split(answer) {
        Ok((kind, rest)) if kind == expected => {
            nvsp::body(kind, rest).map_err(|_| VscError::Host("short answer"))
        }
        _ => Err(VscError::Host("answer of another kind")),
    }
}
