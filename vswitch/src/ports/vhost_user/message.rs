//! The messages of the vhost-user protocol: header, payloads, and how many descriptors each may carry.
//!
//! A message is a header of three words and a payload whose size must be exactly what the request asks for; nothing
//! here trusts either. Numbers are in native order by the specification, so little-endian wherever virtio 1.x guests
//! run.
//!
//! Source: QEMU, `docs/interop/vhost-user`, "Message Specification" and "Front-end message types".

use std::os::fd::OwnedFd;

use vmq::Mac;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

pub use super::kind::Kind;

/// The longest payload that is read, in bytes. The longest of the protocol is below 300.
pub const MAX_PAYLOAD: usize = 4096;

/// Descriptors that one message may carry: a memory table's.
pub const MAX_FDS: usize = 8;

/// Regions in one `SET_MEM_TABLE`.
pub const MAX_TABLE: usize = 8;

/// Bytes of device configuration that may be asked for (`VHOST_USER_MAX_CONFIG_SIZE`).
pub const MAX_CONFIG: usize = 256;

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 4;
const NEED_REPLY: u32 = 8;

/// What is wrong with a message, whatever the state of the session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// Another protocol version, or a reply where a request is due.
    #[error("message flags {0:#x} are not those of a request of version 1")]
    Flags(u32),
    /// A payload no message has.
    #[error("message {request} claims a payload of {size} bytes, at most {MAX_PAYLOAD} are allowed")]
    TooLong {
        /// The request's number.
        request: u32,
        /// Bytes claimed.
        size: u32,
    },
    /// A request the protocol does not have.
    #[error("request {0} is unknown")]
    Unknown(u32),
    /// A payload of the wrong size for its request.
    #[error("{} with a payload of {size} bytes", kind.name())]
    Size {
        /// The request.
        kind: Kind,
        /// Bytes of its payload.
        size: usize,
    },
    /// A payload whose fields contradict its size, or one another.
    #[error("{} with a nonsensical field: {value:#x}", kind.name())]
    Field {
        /// The request.
        kind: Kind,
        /// The field's value.
        value: u64,
    },
    /// More or fewer descriptors than the request carries.
    #[error("{} with {count} descriptors", kind.name())]
    Descriptors {
        /// The request.
        kind: Kind,
        /// Descriptors that came.
        count: usize,
    },
}

/// The header of every message.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Header {
    /// Number of the request.
    pub request: U32,
    /// Version and flags.
    pub flags: U32,
    /// Bytes of payload.
    pub size: U32,
}

impl Header {
    /// Bytes.
    pub const LEN: usize = size_of::<Self>();

    /// Size of the payload, checked to be one that a request of version 1 may have.
    ///
    /// # Errors
    /// [`MessageError::Flags`], [`MessageError::TooLong`].
    pub fn check(&self) -> Result<usize, MessageError> {
        let (flags, size) = (self.flags.get(), self.size.get());
        if flags & VERSION_MASK != VERSION || flags & REPLY != 0 {
            return Err(MessageError::Flags(flags));
        }
        match usize::try_from(size) {
            Ok(len) if len <= MAX_PAYLOAD => Ok(len),
            _ => Err(MessageError::TooLong { request: self.request.get(), size }),
        }
    }

    /// The sender waits for an acknowledgement (if `REPLY_ACK` was negotiated).
    pub fn needs_reply(&self) -> bool {
        self.flags.get() & NEED_REPLY != 0
    }

    /// True for a back-end's answer.
    pub fn is_reply(&self) -> bool {
        self.flags.get() & (VERSION_MASK | REPLY) == VERSION | REPLY
    }
}

/// A message as it came: nothing but the header's size and flags were checked.
#[derive(Debug)]
pub struct Incoming {
    /// Header.
    pub header: Header,
    /// As many bytes as the header says.
    pub payload: Vec<u8>,
    /// Descriptors that came along.
    pub fds: Vec<OwnedFd>,
}

/// A ring and a number.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct VringState {
    /// The ring.
    pub index: U32,
    /// Size, base or switch, by request.
    pub num: U32,
}

/// Where a ring lies.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct VringAddress {
    /// The ring.
    pub index: U32,
    /// [`VringAddress::LOG`] or 0.
    pub flags: U32,
    /// Address of the descriptor table or packed ring, in the peer's process, as the next two.
    pub descriptors: U64,
    /// Used ring or device event suppression.
    pub used: U64,
    /// Available ring or driver event suppression.
    pub available: U64,
    /// Guest-physical address of the used ring, for the dirty log.
    pub log: U64,
}

impl VringAddress {
    /// Log the ring's own writes (`VHOST_VRING_F_LOG`).
    pub const LOG: u32 = 1;
}

/// A stretch of guest memory in a file.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct MemoryRegion {
    /// First guest-physical address.
    pub guest: U64,
    /// Bytes.
    pub size: U64,
    /// First address in the peer's process.
    pub user: U64,
    /// Where it begins in the file.
    pub offset: U64,
}

#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct TableHeader {
    count: U32,
    padding: U32,
}

#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct SingleRegion {
    padding: U64,
    region: MemoryRegion,
}

/// A stretch of a file: the dirty log.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct LogArea {
    /// Bytes.
    pub size: U64,
    /// Where it begins in the file.
    pub offset: U64,
}

/// The in-flight record of all rings. The specification shows 20 bytes; QEMU and DPDK send their C structure of 24.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct InflightArea {
    /// Bytes.
    pub size: U64,
    /// Where it begins in the file.
    pub offset: U64,
    /// Rings recorded.
    pub rings: U16,
    /// Entries of the largest ring.
    pub ring_size: U16,
    /// Fills the C structure; absent in the short form.
    pub padding: U32,
}

impl InflightArea {
    /// Bytes without the padding.
    pub const SHORT: usize = 20;
}

/// A stretch of the device configuration; its bytes follow.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct ConfigArea {
    /// First byte.
    pub offset: U32,
    /// Bytes.
    pub size: U32,
    /// 0, or 1 for migration.
    pub flags: U32,
}

const _: () = {
    assert!(Header::LEN == 12);
    assert!(size_of::<VringState>() == 8);
    assert!(size_of::<VringAddress>() == 40);
    assert!(size_of::<MemoryRegion>() == 32);
    assert!(size_of::<TableHeader>() == 8);
    assert!(size_of::<SingleRegion>() == 40);
    assert!(size_of::<LogArea>() == 16);
    assert!(size_of::<InflightArea>() == 24);
    assert!(size_of::<ConfigArea>() == 12);
};

/// The ring that an eventfd belongs to (`SET_VRING_KICK`, `_CALL`, `_ERR`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VringFd {
    /// The ring.
    pub index: u8,
    /// No eventfd comes along: this side is to poll.
    pub polled: bool,
}

const VRING_INDEX: u64 = 0xff;
const VRING_NO_FD: u64 = 0x100;

/// A request of a front-end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// [`Kind::GetFeatures`]
    GetFeatures,
    /// [`Kind::SetFeatures`]
    SetFeatures(u64),
    /// [`Kind::SetOwner`]
    SetOwner,
    /// [`Kind::ResetOwner`]
    ResetOwner,
    /// [`Kind::SetMemTable`]
    SetMemTable(Vec<MemoryRegion>),
    /// [`Kind::SetLogBase`] as it is with `LOG_SHMFD`
    SetLogBase(LogArea),
    /// [`Kind::SetLogFd`]
    SetLogFd,
    /// [`Kind::SetVringNum`]
    SetVringNum(VringState),
    /// [`Kind::SetVringAddr`]
    SetVringAddr(VringAddress),
    /// [`Kind::SetVringBase`]
    SetVringBase(VringState),
    /// [`Kind::GetVringBase`]
    GetVringBase(VringState),
    /// [`Kind::SetVringKick`]
    SetVringKick(VringFd),
    /// [`Kind::SetVringCall`]
    SetVringCall(VringFd),
    /// [`Kind::SetVringErr`]
    SetVringErr(VringFd),
    /// [`Kind::GetProtocolFeatures`]
    GetProtocolFeatures,
    /// [`Kind::SetProtocolFeatures`]
    SetProtocolFeatures(u64),
    /// [`Kind::GetQueueNum`]
    GetQueueNum,
    /// [`Kind::SetVringEnable`]
    SetVringEnable(VringState),
    /// [`Kind::SendRarp`]
    SendRarp(Mac),
    /// [`Kind::NetSetMtu`]
    NetSetMtu(u64),
    /// [`Kind::GetConfig`]
    GetConfig(ConfigArea),
    /// [`Kind::SetConfig`] with the bytes to be written
    SetConfig(ConfigArea, Vec<u8>),
    /// [`Kind::GetInflightFd`]
    GetInflightFd(InflightArea),
    /// [`Kind::SetInflightFd`]
    SetInflightFd(InflightArea),
    /// [`Kind::ResetDevice`]
    ResetDevice,
    /// [`Kind::GetMaxMemSlots`]
    GetMaxMemSlots,
    /// [`Kind::AddMemReg`]
    AddMemReg(MemoryRegion),
    /// [`Kind::RemMemReg`]
    RemMemReg(MemoryRegion),
    /// [`Kind::SetStatus`]
    SetStatus(u64),
    /// [`Kind::GetStatus`]
    GetStatus,
    /// A request for something that a switch never offers; its payload is not looked at.
    Foreign(Kind),
}

impl Request {
    /// Reads the payload of a request of `kind`.
    ///
    /// # Errors
    /// [`MessageError::Size`] unless the payload has exactly the size of the kind, [`MessageError::Field`].
    pub fn parse(kind: Kind, payload: &[u8]) -> Result<Self, MessageError> {
        let wrong_size = MessageError::Size { kind, size: payload.len() };
        let nothing = |request: Self| if payload.is_empty() { Ok(request) } else { Err(wrong_size) };
        Ok(match kind {
            Kind::GetFeatures => nothing(Self::GetFeatures)?,
            Kind::SetFeatures => Self::SetFeatures(number(kind, payload)?),
            Kind::SetOwner => nothing(Self::SetOwner)?,
            Kind::ResetOwner => nothing(Self::ResetOwner)?,
            Kind::SetMemTable => Self::SetMemTable(table(payload)?),
            Kind::SetLogBase => Self::SetLogBase(read(kind, payload)?),
            Kind::SetLogFd => nothing(Self::SetLogFd)?,
            Kind::SetVringNum => Self::SetVringNum(read(kind, payload)?),
            Kind::SetVringAddr => Self::SetVringAddr(read(kind, payload)?),
            Kind::SetVringBase => Self::SetVringBase(read(kind, payload)?),
            Kind::GetVringBase => Self::GetVringBase(read(kind, payload)?),
            Kind::SetVringKick => Self::SetVringKick(vring_fd(kind, payload)?),
            Kind::SetVringCall => Self::SetVringCall(vring_fd(kind, payload)?),
            Kind::SetVringErr => Self::SetVringErr(vring_fd(kind, payload)?),
            Kind::GetProtocolFeatures => nothing(Self::GetProtocolFeatures)?,
            Kind::SetProtocolFeatures => Self::SetProtocolFeatures(number(kind, payload)?),
            Kind::GetQueueNum => nothing(Self::GetQueueNum)?,
            Kind::SetVringEnable => Self::SetVringEnable(read(kind, payload)?),
            Kind::SendRarp => {
                let [a, b, c, d, e, f, _, _] = read::<[u8; 8]>(kind, payload)?;
                Self::SendRarp(Mac([a, b, c, d, e, f]))
            }
            Kind::NetSetMtu => Self::NetSetMtu(number(kind, payload)?),
            Kind::GetConfig => Self::GetConfig(config(kind, payload)?.0),
            Kind::SetConfig => {
                let (area, bytes) = config(kind, payload)?;
                Self::SetConfig(area, bytes.to_vec())
            }
            Kind::GetInflightFd => Self::GetInflightFd(inflight(kind, payload)?),
            Kind::SetInflightFd => Self::SetInflightFd(inflight(kind, payload)?),
            Kind::ResetDevice => nothing(Self::ResetDevice)?,
            Kind::GetMaxMemSlots => nothing(Self::GetMaxMemSlots)?,
            Kind::AddMemReg => Self::AddMemReg(read::<SingleRegion>(kind, payload)?.region),
            Kind::RemMemReg => Self::RemMemReg(read::<SingleRegion>(kind, payload)?.region),
            Kind::SetStatus => Self::SetStatus(number(kind, payload)?),
            Kind::GetStatus => nothing(Self::GetStatus)?,
            Kind::SetBackendReqFd
            | Kind::IotlbMsg
            | Kind::SetVringEndian
            | Kind::CreateCryptoSession
            | Kind::CloseCryptoSession
            | Kind::PostcopyAdvise
            | Kind::PostcopyListen
            | Kind::PostcopyEnd
            | Kind::GpuSetSocket
            | Kind::VringKick
            | Kind::GetSharedObject
            | Kind::SetDeviceStateFd
            | Kind::CheckDeviceState
            | Kind::GetShmemConfig => Self::Foreign(kind),
        })
    }

    /// Its kind.
    pub fn kind(&self) -> Kind {
        match self {
            Self::GetFeatures => Kind::GetFeatures,
            Self::SetFeatures(_) => Kind::SetFeatures,
            Self::SetOwner => Kind::SetOwner,
            Self::ResetOwner => Kind::ResetOwner,
            Self::SetMemTable(_) => Kind::SetMemTable,
            Self::SetLogBase(_) => Kind::SetLogBase,
            Self::SetLogFd => Kind::SetLogFd,
            Self::SetVringNum(_) => Kind::SetVringNum,
            Self::SetVringAddr(_) => Kind::SetVringAddr,
            Self::SetVringBase(_) => Kind::SetVringBase,
            Self::GetVringBase(_) => Kind::GetVringBase,
            Self::SetVringKick(_) => Kind::SetVringKick,
            Self::SetVringCall(_) => Kind::SetVringCall,
            Self::SetVringErr(_) => Kind::SetVringErr,
            Self::GetProtocolFeatures => Kind::GetProtocolFeatures,
            Self::SetProtocolFeatures(_) => Kind::SetProtocolFeatures,
            Self::GetQueueNum => Kind::GetQueueNum,
            Self::SetVringEnable(_) => Kind::SetVringEnable,
            Self::SendRarp(_) => Kind::SendRarp,
            Self::NetSetMtu(_) => Kind::NetSetMtu,
            Self::GetConfig(_) => Kind::GetConfig,
            Self::SetConfig(..) => Kind::SetConfig,
            Self::GetInflightFd(_) => Kind::GetInflightFd,
            Self::SetInflightFd(_) => Kind::SetInflightFd,
            Self::ResetDevice => Kind::ResetDevice,
            Self::GetMaxMemSlots => Kind::GetMaxMemSlots,
            Self::AddMemReg(_) => Kind::AddMemReg,
            Self::RemMemReg(_) => Kind::RemMemReg,
            Self::SetStatus(_) => Kind::SetStatus,
            Self::GetStatus => Kind::GetStatus,
            Self::Foreign(kind) => *kind,
        }
    }

    /// The whole message, header first. (Foreign requests go without a payload.)
    pub fn encode(&self, need_reply: bool) -> Vec<u8> {
        let flags = VERSION | if need_reply { NEED_REPLY } else { 0 };
        message(self.kind() as u32, flags, &self.payload())
    }

    fn payload(&self) -> Vec<u8> {
        match self {
            Self::SetFeatures(bits)
            | Self::SetProtocolFeatures(bits)
            | Self::NetSetMtu(bits)
            | Self::SetStatus(bits) => bits.to_le_bytes().to_vec(),
            Self::SetMemTable(regions) => {
                let count = U32::new(u32::try_from(regions.len()).unwrap_or(u32::MAX));
                let mut bytes = TableHeader { count, padding: U32::ZERO }.as_bytes().to_vec();
                regions.iter().for_each(|region| bytes.extend_from_slice(region.as_bytes()));
                bytes
            }
            Self::SetLogBase(area) => area.as_bytes().to_vec(),
            Self::SetVringNum(state)
            | Self::SetVringBase(state)
            | Self::GetVringBase(state)
            | Self::SetVringEnable(state) => state.as_bytes().to_vec(),
            Self::SetVringAddr(address) => address.as_bytes().to_vec(),
            Self::SetVringKick(fd) | Self::SetVringCall(fd) | Self::SetVringErr(fd) => {
                (u64::from(fd.index) | if fd.polled { VRING_NO_FD } else { 0 }).to_le_bytes().to_vec()
            }
            Self::SendRarp(Mac(mac)) => [&mac[..], &[0; 2]].concat(),
            Self::GetConfig(area) => {
                let mut bytes = area.as_bytes().to_vec();
                bytes.resize(bytes.len() + usize::try_from(area.size.get()).unwrap_or(0).min(MAX_CONFIG), 0);
                bytes
            }
            Self::SetConfig(area, data) => [area.as_bytes(), data].concat(),
            Self::GetInflightFd(area) | Self::SetInflightFd(area) => area.as_bytes().to_vec(),
            Self::AddMemReg(region) | Self::RemMemReg(region) => {
                SingleRegion { padding: U64::ZERO, region: *region }.as_bytes().to_vec()
            }
            _ => Vec::new(),
        }
    }
}

/// A payload of exactly the size of `T`.
pub(super) fn read<T: FromBytes>(kind: Kind, payload: &[u8]) -> Result<T, MessageError> {
    T::read_from_bytes(payload).map_err(|_| MessageError::Size { kind, size: payload.len() })
}

fn number(kind: Kind, payload: &[u8]) -> Result<u64, MessageError> {
    Ok(read::<U64>(kind, payload)?.get())
}

fn vring_fd(kind: Kind, payload: &[u8]) -> Result<VringFd, MessageError> {
    let value = number(kind, payload)?;
    match u8::try_from(value & VRING_INDEX) {
        Ok(index) if value & !(VRING_INDEX | VRING_NO_FD) == 0 => {
            Ok(VringFd { index, polled: value & VRING_NO_FD != 0 })
        }
        _ => Err(MessageError::Field { kind, value }),
    }
}

fn table(payload: &[u8]) -> Result<Vec<MemoryRegion>, MessageError> {
    let kind = Kind::SetMemTable;
    let wrong_size = MessageError::Size { kind, size: payload.len() };
    let (header, rest) = TableHeader::read_from_prefix(payload).map_err(|_| wrong_size)?;
    let count = header.count.get();
    let regions = <[MemoryRegion]>::ref_from_bytes(rest).map_err(|_| wrong_size)?;
    if regions.len() > MAX_TABLE || u32::try_from(regions.len()) != Ok(count) {
        return Err(MessageError::Field { kind, value: u64::from(count) });
    }
    Ok(regions.to_vec())
}

fn config(kind: Kind, payload: &[u8]) -> Result<(ConfigArea, &[u8]), MessageError> {
    let wrong_size = MessageError::Size { kind, size: payload.len() };
    let (area, bytes) = ConfigArea::read_from_prefix(payload).map_err(|_| wrong_size)?;
    if u32::try_from(bytes.len()) != Ok(area.size.get()) || bytes.len() > MAX_CONFIG {
        return Err(MessageError::Field { kind, value: u64::from(area.size.get()) });
    }
    Ok((area, bytes))
}

fn inflight(kind: Kind, payload: &[u8]) -> Result<InflightArea, MessageError> {
    if payload.len() == InflightArea::SHORT {
        return read(kind, &[payload, &[0; 4]].concat());
    }
    read(kind, payload)
}

fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let size = U32::new(u32::try_from(payload.len()).unwrap_or(u32::MAX));
    let header = Header { request: U32::new(request), flags: U32::new(flags), size };
    [header.as_bytes(), payload].concat()
}

/// An answer, ready to be sent.
#[derive(Debug)]
pub struct Reply {
    /// Header and payload.
    pub bytes: Vec<u8>,
    /// A descriptor to go along.
    pub fd: Option<OwnedFd>,
}

impl Reply {
    /// An answer to request number `request`.
    pub fn new(request: u32, payload: &[u8]) -> Self {
        Self { bytes: message(request, VERSION | REPLY, payload), fd: None }
    }

    /// An answer that is one number: for acknowledgements 0 is success.
    pub fn number(request: u32, value: u64) -> Self {
        Self::new(request, &value.to_le_bytes())
    }

    /// The payload.
    pub fn payload(&self) -> &[u8] {
        self.bytes.get(Header::LEN..).unwrap_or_default()
    }
}
