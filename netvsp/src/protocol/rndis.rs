//! RNDIS control messages (fact sheet §5): parsed as the host reads them, built as either side sends them. Data packets
//! are in [`super::packet`].
//!
//! Offsets in a message count from byte 8, where its body begins.

use thiserror::Error;
use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::oid::Oid;
use super::{numbers, wire};

/// Bytes of the longest control message taken from a guest; the longest that a guest has reason to send, RSS parameters,
/// takes under 700.
pub const MAX_CONTROL_BYTES: usize = 4096;
/// Bytes before the body, which is where offsets count from.
pub const HEADER_BYTES: usize = 8;
/// Bytes of alignment that the host asks for between packets of one message, as a power of two.
pub const ALIGNMENT_SHIFT: u32 = 3;

numbers! {
    /// Type of a message. Answers are the request with the top bit set.
    Kind {
        /// A frame.
        Packet = 0x0000_0001, "PACKET";
        /// Begin.
        Initialize = 0x0000_0002, "INITIALIZE";
        /// End.
        Halt = 0x0000_0003, "HALT";
        /// Read an OID.
        Query = 0x0000_0004, "QUERY";
        /// Write an OID.
        Set = 0x0000_0005, "SET";
        /// Begin anew.
        Reset = 0x0000_0006, "RESET";
        /// Something happened.
        Indicate = 0x0000_0007, "INDICATE_STATUS";
        /// Still there?
        Keepalive = 0x0000_0008, "KEEPALIVE";
        /// Answer.
        InitializeComplete = 0x8000_0002, "INITIALIZE_COMPLETE";
        /// Answer.
        QueryComplete = 0x8000_0004, "QUERY_COMPLETE";
        /// Answer.
        SetComplete = 0x8000_0005, "SET_COMPLETE";
        /// Answer.
        ResetComplete = 0x8000_0006, "RESET_COMPLETE";
        /// Answer.
        KeepaliveComplete = 0x8000_0008, "KEEPALIVE_COMPLETE";
    }
}

/// How a request went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Status {
    /// Done.
    Success = 0,
    /// Not done.
    Failure = 0xC000_0001,
    /// Nothing this NIC does.
    NotSupported = 0xC000_00BB,
    /// The information has the wrong length.
    InvalidLength = 0xC001_0014,
    /// The information makes no sense.
    InvalidData = 0xC001_0015,
    /// No such OID.
    InvalidOid = 0xC001_0017,
}

numbers! {
    /// What an indication tells (§10).
    Event {
        /// The link is up.
        MediaConnect = 0x4001_000B, "media connect";
        /// The link is down.
        MediaDisconnect = 0x4001_000C, "media disconnect";
        /// The link has another speed; the speed follows.
        LinkSpeedChange = 0x4001_0013, "link speed change";
        /// The network behind the link is another.
        NetworkChange = 0x4001_0018, "network change";
        /// What is offloaded now; an `NDIS_OFFLOAD` follows.
        OffloadConfig = 0x4002_0006, "offload configuration";
    }
}

wire! {
    /// Begins every message.
    Header = 8 {
        /// See [`Kind`].
        kind: U32,
        /// Bytes of the message, this header included.
        len: U32,
    }
    /// INITIALIZE.
    Initialize = 16 {
        /// Echoed in the answer.
        request: U32,
        /// 1.
        major: U32,
        /// 0.
        minor: U32,
        /// Bytes of the longest message the guest takes.
        max_transfer: U32,
    }
    /// INITIALIZE_COMPLETE.
    InitializeComplete = 44 {
        /// As in the request.
        request: U32,
        /// See [`Status`].
        status: U32,
        /// 1.
        major: U32,
        /// 0.
        minor: U32,
        /// 1: connectionless.
        device_flags: U32,
        /// 0: 802.3.
        medium: U32,
        /// Packets the guest may put in one NVSP message.
        max_packets: U32,
        /// Bytes of the longest message the host takes.
        max_transfer: U32,
        /// Alignment of packets within one message, as a power of two.
        alignment_shift: U32,
        /// 0.
        reserved: [U32; 2],
    }
    /// HALT, KEEPALIVE; RESET has a zero in its place.
    Request = 4 {
        /// Echoed in the answer.
        request: U32,
    }
    /// QUERY and SET; the information follows.
    Access = 20 {
        /// Echoed in the answer.
        request: U32,
        /// Which object.
        oid: U32,
        /// Bytes of information.
        info_len: U32,
        /// Where it begins.
        info_offset: U32,
        /// 0.
        reserved: U32,
    }
    /// QUERY_COMPLETE; the information follows.
    QueryComplete = 16 {
        /// As in the request.
        request: U32,
        /// See [`Status`].
        status: U32,
        /// Bytes of information.
        info_len: U32,
        /// Where it begins; 0 if there is none, by which Linux knows a failure.
        info_offset: U32,
    }
    /// SET_COMPLETE and KEEPALIVE_COMPLETE.
    Complete = 8 {
        /// As in the request.
        request: U32,
        /// See [`Status`].
        status: U32,
    }
    /// RESET_COMPLETE.
    ResetComplete = 8 {
        /// See [`Status`].
        status: U32,
        /// 1 if filter and addresses must be set again.
        addressing_reset: U32,
    }
    /// INDICATE_STATUS; data may follow.
    Indicate = 12 {
        /// See [`Event`].
        event: U32,
        /// Bytes of data.
        len: U32,
        /// Where they begin, or 0.
        offset: U32,
    }
}

/// Why a control message was refused without regard to what came before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Malformed {
    /// Longer than any control message.
    #[error("RNDIS control message of {0} bytes, at most {MAX_CONTROL_BYTES} are taken")]
    TooLong(usize),
    /// Shorter than a header, or than its own length says.
    #[error("RNDIS message says it has {claimed} bytes, but {len} came")]
    Length {
        /// What its length field says.
        claimed: u32,
        /// What came.
        len: usize,
    },
    /// No such message.
    #[error("RNDIS message {0:#x} is unknown")]
    Unknown(u32),
    /// Too short for its type.
    #[error("RNDIS {kind} of {len} bytes, needs {needed}")]
    Short {
        /// Type.
        kind: Kind,
        /// Bytes its length field says.
        len: usize,
        /// Bytes its fields take.
        needed: usize,
    },
    /// The information of a QUERY or SET does not lie within it.
    #[error("RNDIS {kind} of {len} bytes with information at {offset} + {info_len}")]
    Information {
        /// Type.
        kind: Kind,
        /// Bytes its length field says.
        len: usize,
        /// Offset given.
        offset: u32,
        /// Length given.
        info_len: u32,
    },
    /// A message that a guest does not send, or not as a control message.
    #[error("RNDIS {0} as a guest's control message")]
    Direction(Kind),
}

/// A guest's control message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Control<'m> {
    /// INITIALIZE.
    Initialize {
        /// Echoed.
        request: u32,
    },
    /// HALT.
    Halt,
    /// QUERY.
    Query {
        /// Echoed.
        request: u32,
        /// Which object.
        oid: Oid,
        /// What came with the question.
        info: &'m [u8],
        /// Bytes the guest says it has, which may be the room it has for the answer.
        room: u32,
    },
    /// SET.
    Set {
        /// Echoed.
        request: u32,
        /// Which object.
        oid: Oid,
        /// Its new value.
        info: &'m [u8],
    },
    /// RESET.
    Reset,
    /// KEEPALIVE.
    Keepalive {
        /// Echoed.
        request: u32,
    },
}

impl<'m> Control<'m> {
    /// Its type.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Initialize { .. } => Kind::Initialize,
            Self::Halt => Kind::Halt,
            Self::Query { .. } => Kind::Query,
            Self::Set { .. } => Kind::Set,
            Self::Reset => Kind::Reset,
            Self::Keepalive { .. } => Kind::Keepalive,
        }
    }

    /// Reads `message`, a private copy of the guest's bytes; what lies behind the length it claims is ignored.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn parse(message: &'m [u8]) -> Result<Self, Malformed> {
        if message.len() > MAX_CONTROL_BYTES {
            return Err(Malformed::TooLong(message.len()));
        }
        let (kind, message) = split(message)?;
        Ok(match kind {
            Kind::Initialize => {
                let Initialize { request, .. } = body(kind, message)?;
                Self::Initialize { request: request.get() }
            }
            Kind::Halt => Self::Halt,
            Kind::Query => {
                let access: Access = body(kind, message)?;
                let info = information(kind, message, &access)?;
                let (request, oid) = (access.request.get(), Oid(access.oid.get()));
                Self::Query { request, oid, info, room: access.info_len.get() }
            }
            Kind::Set => {
                let access: Access = body(kind, message)?;
                let info = information(kind, message, &access)?;
                Self::Set { request: access.request.get(), oid: Oid(access.oid.get()), info }
            }
            Kind::Reset => Self::Reset,
            Kind::Keepalive => {
                let Request { request } = body(kind, message)?;
                Self::Keepalive { request: request.get() }
            }
            other => return Err(Malformed::Direction(other)),
        })
    }
}

/// Type and body of any message, the body cut to the length that the header claims.
///
/// # Errors
/// [`Malformed::Length`], [`Malformed::Unknown`].
pub fn split(message: &[u8]) -> Result<(Kind, &[u8]), Malformed> {
    let Ok((header, _)) = Header::read_from_prefix(message) else {
        return Err(Malformed::Length { claimed: 8, len: message.len() });
    };
    let claimed = header.len.get();
    let range = HEADER_BYTES..usize::try_from(claimed).unwrap_or(usize::MAX);
    let body = message.get(range).ok_or(Malformed::Length { claimed, len: message.len() })?;
    let kind = header.kind.get();
    Ok((Kind::from_number(kind).ok_or(Malformed::Unknown(kind))?, body))
}

/// The fields of a message whose body is `bytes`.
///
/// # Errors
/// [`Malformed::Short`].
pub fn body<T: FromBytes + KnownLayout + Immutable + Unaligned>(
    kind: Kind,
    bytes: &[u8],
) -> Result<T, Malformed> {
    let len = bytes.len() + HEADER_BYTES;
    let short = Malformed::Short { kind, len, needed: size_of::<T>() + HEADER_BYTES };
    T::read_from_prefix(bytes).map(|(fields, _)| fields).map_err(|_| short)
}

/// What `access` points at. Its length may exceed the message in a QUERY without input, where guests say how much room
/// they have: then there is none.
fn information<'m>(kind: Kind, body: &'m [u8], access: &Access) -> Result<&'m [u8], Malformed> {
    let (offset, info_len) = (access.info_offset.get(), access.info_len.get());
    if info_len == 0 || (kind == Kind::Query && body.len() <= size_of::<Access>()) {
        return Ok(&[]);
    }
    let wrong = Malformed::Information { kind, len: body.len() + HEADER_BYTES, offset, info_len };
    let start = usize::try_from(offset).map_err(|_| wrong)?;
    let len = usize::try_from(info_len).map_err(|_| wrong)?;
    let end = start.checked_add(len).ok_or(wrong)?;
    if start < size_of::<Access>() {
        return Err(wrong);
    }
    body.get(start..end).ok_or(wrong)
}

/// A message: header, `fields`, `data`.
pub fn message<T: IntoBytes + Immutable>(kind: Kind, fields: &T, data: &[u8]) -> Vec<u8> {
    let len = HEADER_BYTES + size_of::<T>() + data.len();
    let header =
        Header { kind: U32::new(kind.number()), len: U32::new(u32::try_from(len).unwrap_or(u32::MAX)) };
    let mut bytes = Vec::with_capacity(len);
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(fields.as_bytes());
    bytes.extend_from_slice(data);
    bytes
}

/// INITIALIZE_COMPLETE.
pub fn initialize_complete(request: u32, max_packets: u32, max_transfer: u32) -> Vec<u8> {
    let fields = InitializeComplete {
        request: U32::new(request),
        major: U32::new(1),
        device_flags: U32::new(1),
        max_packets: U32::new(max_packets),
        max_transfer: U32::new(max_transfer),
        alignment_shift: U32::new(ALIGNMENT_SHIFT),
        ..InitializeComplete::default()
    };
    message(Kind::InitializeComplete, &fields, &[])
}

/// QUERY_COMPLETE. A failure has neither information nor an offset, by which Linux, which does not look at the status,
/// knows it.
pub fn query_complete(request: u32, answer: Result<&[u8], Status>) -> Vec<u8> {
    let (status, info) = match answer {
        Ok(info) => (Status::Success, info),
        Err(status) => (status, [].as_slice()),
    };
    let fields = QueryComplete {
        request: U32::new(request),
        status: U32::new(status as u32),
        info_len: U32::new(u32::try_from(info.len()).unwrap_or(u32::MAX)),
        info_offset: U32::new(if info.is_empty() { 0 } else { 16 }),
    };
    message(Kind::QueryComplete, &fields, info)
}

/// SET_COMPLETE.
pub fn set_complete(request: u32, status: Status) -> Vec<u8> {
    complete(Kind::SetComplete, request, status)
}

/// KEEPALIVE_COMPLETE.
pub fn keepalive_complete(request: u32, status: Status) -> Vec<u8> {
    complete(Kind::KeepaliveComplete, request, status)
}

fn complete(kind: Kind, request: u32, status: Status) -> Vec<u8> {
    message(kind, &Complete { request: U32::new(request), status: U32::new(status as u32) }, &[])
}

/// RESET_COMPLETE; the guest has to set its filter again.
pub fn reset_complete(status: Status) -> Vec<u8> {
    let fields = ResetComplete { status: U32::new(status as u32), addressing_reset: U32::new(1) };
    message(Kind::ResetComplete, &fields, &[])
}

/// INDICATE_STATUS.
pub fn indicate(event: Event, data: &[u8]) -> Vec<u8> {
    let fields = Indicate {
        event: U32::new(event.number()),
        len: U32::new(u32::try_from(data.len()).unwrap_or(u32::MAX)),
        offset: U32::new(if data.is_empty() { 0 } else { 12 }),
    };
    message(Kind::Indicate, &fields, data)
}

/// A guest's INITIALIZE.
pub fn initialize(request: u32) -> Vec<u8> {
    let (request, max_transfer) = (U32::new(request), U32::new(0x4000));
    message(
        Kind::Initialize,
        &Initialize { request, major: U32::new(1), minor: U32::ZERO, max_transfer },
        &[],
    )
}

/// A guest's HALT, KEEPALIVE or RESET.
pub fn request(kind: Kind, request: u32) -> Vec<u8> {
    message(kind, &Request { request: U32::new(request) }, &[])
}

/// A guest's QUERY or SET.
pub fn access(kind: Kind, request: u32, oid: Oid, info: &[u8]) -> Vec<u8> {
    let fields = Access {
        request: U32::new(request),
        oid: U32::new(oid.0),
        info_len: U32::new(u32::try_from(info.len()).unwrap_or(u32::MAX)),
        info_offset: U32::new(20),
        reserved: U32::ZERO,
    };
    message(kind, &fields, info)
}
