//! NVSP: the messages in which a guest and its NIC agree on a version, buffers and channels, and which announce RNDIS
//! messages (fact sheet §1, §2). Numbers: Linux `hyperv_net.h`.

use thiserror::Error;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{numbers, wire};

/// Bytes of every message the host sends, whatever its type: guests check against the largest (§1).
pub const MESSAGE_BYTES: usize = 40;
/// No section of the send buffer ([`RndisPacket::section`]).
pub const NO_SECTION: u32 = u32::MAX;
/// Channel type of data ([`RndisPacket::channel`]).
pub const DATA: u32 = 0;
/// Channel type of RNDIS control messages ([`RndisPacket::channel`]).
pub const CONTROL: u32 = 1;
/// Entries of a send-indirection table; Linux refuses any other count (§13).
pub const SEND_TABLE_ENTRIES: usize = 16;
/// The longest chain of buffers in one message that the host says it takes (unused by guests).
pub const MAX_MDL_CHAIN: u32 = 34;
/// The only operation of [`SubchannelRequest`].
pub const ALLOCATE_SUBCHANNELS: u32 = 1;
/// What [`OidQueryComplete`] says: `NDIS_STATUS_NOT_SUPPORTED`.
pub const OID_NOT_SUPPORTED: u32 = 0xC000_00BB;

/// What the completion of a message says. Success is not zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Status {
    /// Done.
    Success = 1,
    /// Not done.
    Failure = 2,
    /// The version asked for is newer than any the host speaks.
    TooNew = 3,
    /// The version asked for is older than any the host speaks.
    TooOld = 4,
    /// The RNDIS packet made no sense.
    InvalidPacket = 5,
    /// Try again later.
    Busy = 6,
    /// Nothing the host does.
    Unsupported = 7,
}

/// Version of the protocol, as agreed by INIT.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub enum Version {
    /// Basics; the MTU is 1500.
    V1,
    /// Adds NDIS configuration: MTU and VLAN.
    V2,
    /// Adds virtual functions.
    V4,
    /// Adds subchannels, RSS, link speed.
    V5,
    /// Adds packet direct, which nobody uses.
    V6,
    /// Adds RSC.
    V61,
}

impl Version {
    /// All, oldest first.
    pub const ALL: [Self; 6] = [Self::V1, Self::V2, Self::V4, Self::V5, Self::V6, Self::V61];

    /// The number on the wire.
    pub const fn number(self) -> u32 {
        match self {
            Self::V1 => 0x2,
            Self::V2 => 0x3_0002,
            Self::V4 => 0x4_0000,
            Self::V5 => 0x5_0000,
            Self::V6 => 0x6_0000,
            Self::V61 => 0x6_0001,
        }
    }

    /// The newest version within `min..=max`.
    pub fn newest_within(min: u32, max: u32) -> Option<Self> {
        Self::ALL.into_iter().rev().find(|version| (min..=max).contains(&version.number()))
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::V1 => "1",
            Self::V2 => "2",
            Self::V4 => "4",
            Self::V5 => "5",
            Self::V6 => "6.0",
            Self::V61 => "6.1",
        })
    }
}

bitflags::bitflags! {
    /// What a guest says in NDIS_CONFIG that it can do (§2).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct Capabilities: u64 {
        /// Virtual machine queues.
        const VMQ = 1;
        /// TCP offload engines.
        const CHIMNEY = 1 << 1;
        /// Virtual functions.
        const SRIOV = 1 << 2;
        /// 802.1Q tags in packet information.
        const VLAN = 1 << 3;
        /// Correlation identifiers.
        const CORRELATION = 1 << 4;
        /// Teaming: wants to hear of changes of the link's speed (§10).
        const TEAMING = 1 << 5;
        /// Virtual subnets.
        const VIRTUAL_SUBNET = 1 << 6;
        /// Coalesced segments over VMBus.
        const RSC = 1 << 7;
    }
}

numbers! {
    /// Type of a message.
    Kind {
        /// G: which version?
        Init = 1, "INIT";
        /// H: answer.
        InitComplete = 2, "INIT_COMPLETE";
        /// G: version of NDIS.
        SendNdisVersion = 100, "SEND_NDIS_VERSION";
        /// G: here is the receive buffer.
        SendReceiveBuffer = 101, "SEND_RECEIVE_BUFFER";
        /// H: answer.
        SendReceiveBufferComplete = 102, "SEND_RECEIVE_BUFFER_COMPLETE";
        /// G: the receive buffer is withdrawn.
        RevokeReceiveBuffer = 103, "REVOKE_RECEIVE_BUFFER";
        /// G: here is the send buffer.
        SendSendBuffer = 104, "SEND_SEND_BUFFER";
        /// H: answer.
        SendSendBufferComplete = 105, "SEND_SEND_BUFFER_COMPLETE";
        /// G: the send buffer is withdrawn.
        RevokeSendBuffer = 106, "REVOKE_SEND_BUFFER";
        /// Both: an RNDIS message.
        SendRndisPacket = 107, "SEND_RNDIS_PACKET";
        /// Both: done with it.
        SendRndisPacketComplete = 108, "SEND_RNDIS_PACKET_COMPLETE";
        /// G: buffer for a TCP offload engine.
        SendChimneyBuffer = 109, "SEND_CHIMNEY_DELEGATED_BUFFER";
        /// H: answer.
        SendChimneyBufferComplete = 110, "SEND_CHIMNEY_DELEGATED_BUFFER_COMPLETE";
        /// G: and its end.
        RevokeChimneyBuffer = 111, "REVOKE_CHIMNEY_DELEGATED_BUFFER";
        /// G: receive on.
        ResumeChimneyReceive = 112, "RESUME_CHIMNEY_RX_INDICATION";
        /// G: stop offloading.
        TerminateChimney = 113, "TERMINATE_CHIMNEY";
        /// H: answer.
        TerminateChimneyComplete = 114, "TERMINATE_CHIMNEY_COMPLETE";
        /// H: something happened to a connection.
        IndicateChimneyEvent = 115, "INDICATE_CHIMNEY_EVENT";
        /// G: data of an offloaded connection.
        SendChimneyPacket = 116, "SEND_CHIMNEY_PACKET";
        /// H: answer.
        SendChimneyPacketComplete = 117, "SEND_CHIMNEY_PACKET_COMPLETE";
        /// G: room for data of an offloaded connection.
        PostChimneyReceive = 118, "POST_CHIMNEY_RECEIVE_REQUEST";
        /// H: answer.
        PostChimneyReceiveComplete = 119, "POST_CHIMNEY_RECEIVE_REQUEST_COMPLETE";
        /// G: more receive buffers.
        AllocateReceiveBuffer = 120, "ALLOCATE_RECEIVE_BUFFER";
        /// H: answer.
        AllocateReceiveBufferComplete = 121, "ALLOCATE_RECEIVE_BUFFER_COMPLETE";
        /// G: fewer.
        FreeReceiveBuffer = 122, "FREE_RECEIVE_BUFFER";
        /// Both: an RNDIS message for a queue.
        SendVmqPacket = 123, "SEND_VMQ_RNDIS_PACKET";
        /// Both: done with it.
        SendVmqPacketComplete = 124, "SEND_VMQ_RNDIS_PACKET_COMPLETE";
        /// G: MTU and capabilities.
        SendNdisConfig = 125, "SEND_NDIS_CONFIG";
        /// G: an offloaded connection.
        AllocateChimneyHandle = 126, "ALLOCATE_CHIMNEY_HANDLE";
        /// H: answer.
        AllocateChimneyHandleComplete = 127, "ALLOCATE_CHIMNEY_HANDLE_COMPLETE";
        /// H: a virtual function comes or goes.
        SendVfAssociation = 128, "SEND_VF_ASSOCIATION";
        /// G: frames go through the virtual function, or not.
        SwitchDataPath = 129, "SWITCH_DATA_PATH";
        /// H: the uplink's state.
        UplinkConnectState = 130, "UPLINK_CONNECT_STATE";
        /// G: an OID, without RNDIS.
        OidQueryEx = 131, "OID_QUERY_EX";
        /// H: answer.
        OidQueryExComplete = 132, "OID_QUERY_EX_COMPLETE";
        /// Both: request for subchannels, and its answer.
        Subchannel = 133, "SUBCHANNEL";
        /// H: which channel for which hash.
        SendIndirectionTable = 134, "SEND_INDIRECTION_TABLE";
        /// Both: packet direct.
        PacketDirectApi = 135, "PACKET_DIRECT_API";
        /// Both: packet direct.
        PacketDirectBatch = 136, "PACKET_DIRECT_BATCH";
    }
}

impl Kind {
    /// The oldest version that has this message.
    pub const fn since(self) -> Version {
        match self.number() {
            0..=108 => Version::V1,
            109..=127 => Version::V2,
            128..=130 => Version::V4,
            131..=134 => Version::V5,
            _ => Version::V6,
        }
    }

    /// The message that answers this one, for requests that nobody sends any more and that are declined.
    pub const fn declined_by(self) -> Option<Self> {
        Some(match self {
            Self::SendChimneyBuffer => Self::SendChimneyBufferComplete,
            Self::TerminateChimney => Self::TerminateChimneyComplete,
            Self::SendChimneyPacket => Self::SendChimneyPacketComplete,
            Self::PostChimneyReceive => Self::PostChimneyReceiveComplete,
            Self::AllocateReceiveBuffer => Self::AllocateReceiveBufferComplete,
            Self::SendVmqPacket => Self::SendVmqPacketComplete,
            Self::AllocateChimneyHandle => Self::AllocateChimneyHandleComplete,
            Self::OidQueryEx => Self::OidQueryExComplete,
            _ => return None,
        })
    }
}

wire! {
    /// INIT: the versions the guest speaks.
    Init = 8 {
        /// Oldest.
        min: U32,
        /// Newest; guests try one at a time.
        max: U32,
    }
    /// INIT_COMPLETE.
    InitComplete = 12 {
        /// Version; unused by guests.
        version: U32,
        /// See [`MAX_MDL_CHAIN`].
        max_mdl_chain: U32,
        /// See [`Status`].
        status: U32,
    }
    /// SEND_NDIS_VERSION.
    NdisVersion = 8 {
        /// 6.
        major: U32,
        /// 1 or 30.
        minor: U32,
    }
    /// SEND_RECEIVE_BUFFER and SEND_SEND_BUFFER.
    SendBuffer = 6 {
        /// GPADL of the pages.
        gpadl: U32,
        /// Name of the buffer.
        id: U16,
    }
    /// SEND_RECEIVE_BUFFER_COMPLETE: one section of equal parts, as all guests want it.
    ReceiveBufferComplete = 24 {
        /// See [`Status`].
        status: U32,
        /// 1.
        count: U32,
        /// 0.
        offset: U32,
        /// Bytes of a part.
        size: U32,
        /// Parts.
        parts: U32,
        /// Where the last part ends.
        end: U32,
    }
    /// REVOKE_RECEIVE_BUFFER and REVOKE_SEND_BUFFER.
    RevokeBuffer = 2 {
        /// Name of the buffer.
        id: U16,
    }
    /// SEND_SEND_BUFFER_COMPLETE.
    SendBufferComplete = 8 {
        /// See [`Status`].
        status: U32,
        /// Bytes of a section.
        size: U32,
    }
    /// SEND_RNDIS_PACKET.
    RndisPacket = 12 {
        /// [`DATA`] or [`CONTROL`].
        channel: U32,
        /// Section of the send buffer, or [`NO_SECTION`].
        section: U32,
        /// Bytes used in the section.
        bytes: U32,
    }
    /// The completion that consists of a status: 108, and the answers to declined requests.
    Completion = 4 {
        /// See [`Status`].
        status: U32,
    }
    /// SEND_NDIS_CONFIG.
    NdisConfig = 16 {
        /// Bytes of the longest frame, Ethernet header included.
        mtu: U32,
        /// 0.
        reserved: U32,
        /// See [`Capabilities`].
        capabilities: U64,
    }
    /// SEND_VF_ASSOCIATION.
    VfAssociation = 8 {
        /// 1 if there is a virtual function.
        allocated: U32,
        /// Its serial number.
        serial: U32,
    }
    /// SWITCH_DATA_PATH.
    SwitchDataPath = 4 {
        /// 0 synthetic, 1 virtual function.
        active: U32,
    }
    /// OID_QUERY_EX.
    OidQuery = 8 {
        /// NDIS object header.
        header: [u8; 4],
        /// The OID.
        oid: U32,
    }
    /// OID_QUERY_EX_COMPLETE.
    OidQueryComplete = 8 {
        /// NDIS status.
        status: U32,
        /// Bytes of information.
        bytes: U32,
    }
    /// SUBCHANNEL from the guest.
    SubchannelRequest = 8 {
        /// [`ALLOCATE_SUBCHANNELS`].
        operation: U32,
        /// How many.
        count: U32,
    }
    /// SUBCHANNEL from the host.
    SubchannelComplete = 8 {
        /// See [`Status`].
        status: U32,
        /// How many the guest gets.
        count: U32,
    }
    /// SEND_INDIRECTION_TABLE; the table follows at [`IndirectionTable::offset`].
    IndirectionTable = 8 {
        /// [`SEND_TABLE_ENTRIES`].
        count: U32,
        /// From the message's first byte.
        offset: U32,
    }
}

/// Why a message was refused without regard to what came before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Malformed {
    /// Not even a type.
    #[error("NVSP message of {0} bytes has no type")]
    NoType(usize),
    /// No such message.
    #[error("NVSP message {0} is unknown")]
    Unknown(u32),
    /// Too short for its type.
    #[error("NVSP {kind} of {len} bytes, needs {needed}")]
    Short {
        /// Type.
        kind: Kind,
        /// Bytes received.
        len: usize,
        /// Bytes its fields take.
        needed: usize,
    },
    /// A message 107 that is for neither data nor control.
    #[error("NVSP SEND_RNDIS_PACKET for channel type {0}")]
    Channel(u32),
}

/// A message's type and what follows it.
///
/// # Errors
/// [`Malformed::NoType`], [`Malformed::Unknown`].
pub fn split(message: &[u8]) -> Result<(Kind, &[u8]), Malformed> {
    let (number, rest) = message.split_first_chunk().ok_or(Malformed::NoType(message.len()))?;
    let number = u32::from_le_bytes(*number);
    Ok((Kind::from_number(number).ok_or(Malformed::Unknown(number))?, rest))
}

/// The fields of `kind`; bytes behind them are ignored, as guests send 40 bytes whatever the type.
///
/// # Errors
/// [`Malformed::Short`].
pub fn body<T: FromBytes + KnownLayout + Immutable + Unaligned>(
    kind: Kind,
    body: &[u8],
) -> Result<T, Malformed> {
    let short = Malformed::Short { kind, len: body.len() + 4, needed: size_of::<T>() + 4 };
    T::read_from_prefix(body).map(|(fields, _)| fields).map_err(|_| short)
}

/// An RNDIS message announced by 107: where its bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Announced {
    /// It is a control message, not data.
    pub control: bool,
    /// Section of the send buffer, and how many of its bytes are used; else everything is in the packet's ranges.
    pub section: Option<(u32, u32)>,
}

/// Reads message 107.
///
/// # Errors
/// [`Malformed`]; [`Malformed::Unknown`] also if it is another message.
#[inline]
pub fn announced(message: &[u8]) -> Result<Announced, Malformed> {
    let (kind, rest) = split(message)?;
    if kind != Kind::SendRndisPacket {
        return Err(Malformed::Unknown(kind.number()));
    }
    let packet: RndisPacket = body(kind, rest)?;
    let control = match packet.channel.get() {
        DATA => false,
        CONTROL => true,
        other => return Err(Malformed::Channel(other)),
    };
    let section = packet.section.get();
    Ok(Announced { control, section: (section != NO_SECTION).then_some((section, packet.bytes.get())) })
}

/// A message of the host: `kind`, `fields`, zeros up to [`MESSAGE_BYTES`].
pub fn message<T: IntoBytes + Immutable>(kind: Kind, fields: &T) -> [u8; MESSAGE_BYTES] {
    const { assert!(size_of::<T>() + 4 <= MESSAGE_BYTES) };
    let mut bytes = [0; MESSAGE_BYTES];
    let (number, body) = bytes.split_at_mut(4);
    number.copy_from_slice(&kind.number().to_le_bytes());
    // Never fails: the assertion above.
    let _ = fields.write_to_prefix(body);
    bytes
}

/// Message 107 for bytes that lie in the packet's ranges.
pub fn rndis_packet(control: bool) -> [u8; MESSAGE_BYTES] {
    let channel = U32::new(if control { CONTROL } else { DATA });
    let fields = RndisPacket { channel, section: U32::new(NO_SECTION), bytes: U32::ZERO };
    message(Kind::SendRndisPacket, &fields)
}

/// Message 108.
pub fn rndis_complete(status: Status) -> [u8; MESSAGE_BYTES] {
    completion(Kind::SendRndisPacketComplete, status)
}

/// An answer that consists of a status.
pub fn completion(kind: Kind, status: Status) -> [u8; MESSAGE_BYTES] {
    message(kind, &Completion { status: U32::new(status as u32) })
}

/// Message 134: hash values in turn to `channels` channels. The table begins at byte 40 in every version, where Linux
/// looks for it whatever the offset says (§13).
pub fn send_table(channels: u16) -> Vec<u8> {
    let offset = U32::new(40);
    let count = U32::new(16);
    let mut bytes = message(Kind::SendIndirectionTable, &IndirectionTable { count, offset }).to_vec();
    let channels = u32::from(channels.max(1));
    for entry in 0u32..16 {
        bytes.extend_from_slice(&(entry % channels).to_le_bytes());
    }
    bytes
}

const _: () = assert!(SEND_TABLE_ENTRIES == 16 && MESSAGE_BYTES == 40);
