//! Control messages between a guest and the VMBus root: versions, message types, structures.
//!
//! A message is an eight-byte header (type, zero) and a body, 240 bytes at most, posted through the hypervisor's message
//! page or hypercall. Sizes and offsets: vmbus.md §2–§4; Linux `include/linux/hyperv.h`.

mod parse;
#[expect(
    missing_debug_implementations,
    reason = "the derives of zerocopy add types of their own within the macro"
)]
mod wire;

#[cfg(test)]
mod tests;

use std::fmt;

use serde::{Deserialize, Serialize};
use zerocopy::IntoBytes;

pub use parse::{GuestMessage, HostMessage, ParseError};
pub use wire::*;

/// Most bytes of one message, header included.
pub const MAX_MESSAGE: usize = 240;
/// Connection id on which a guest posts messages; for protocols below 5.0 the only one.
pub const MESSAGE_CONNECTION: u32 = 1;
/// Connection id on which a guest makes contact for protocol 5.0 and later.
pub const CONTACT_CONNECTION: u32 = 4;
/// The synthetic interrupt source of VMBus: messages and channel events.
pub const SINT: u8 = 2;
/// Greatest channel id: the event-flag page of one interrupt source has 2048 flags, of which 0 is reserved.
pub const MAX_RELID: u32 = 2047;
/// A target processor that means "no interrupts", in OPENCHANNEL and MODIFYCHANNEL. No driver asks for it; it is refused.
pub const NO_INTERRUPTS: u32 = 0xFFFF_FFFF;
/// Bytes of a page, on every architecture.
pub const PAGE: u32 = 4096;

/// The connection id a guest signals for the channel `relid` (vmbus.md §1).
#[must_use]
pub const fn event_connection(relid: u32) -> u32 {
    (SINT as u32) << 12 | relid
}

/// Status words of replies: zero is success; the others are the NT codes a Windows host would give.
pub mod status {
    /// Done.
    pub const SUCCESS: u32 = 0;
    /// It could not be done.
    pub const UNSUCCESSFUL: u32 = 0xC000_0001;
    /// A field of the request is wrong.
    pub const INVALID_PARAMETER: u32 = 0xC000_000D;
    /// A limit of this host is reached.
    pub const INSUFFICIENT_RESOURCES: u32 = 0xC000_009A;
    /// Nobody listens there.
    pub const CONNECTION_REFUSED: u32 = 0xC000_0236;
}

/// A protocol version this host speaks. Ordered by age.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[repr(u32)]
pub enum Version {
    /// Windows 8: an interrupt of its own for each channel, subchannels.
    V2_4 = 0x0002_0004,
    /// Windows 8.1: UNLOAD.
    V3_0 = 0x0003_0000,
    /// Windows 10: netvsc tears GPADLs down after it closed the channel.
    V4_0 = 0x0004_0000,
    /// MODIFYCHANNEL, without acknowledgement.
    V4_1 = 0x0004_0001,
    /// Contact on connection id 4; the response names the message connection id.
    V5_0 = 0x0005_0000,
    /// The trust level in INITIATE_CONTACT counts.
    V5_1 = 0x0005_0001,
    /// TL_CONNECT_REQUEST with silo id.
    V5_2 = 0x0005_0002,
    /// MODIFYCHANNEL is acknowledged.
    V5_3 = 0x0005_0003,
}

impl Version {
    /// All of them, oldest first.
    pub const ALL: [Self; 8] =
        [Self::V2_4, Self::V3_0, Self::V4_0, Self::V4_1, Self::V5_0, Self::V5_1, Self::V5_2, Self::V5_3];

    /// The version of this wire number, if it is one of [`Version::ALL`].
    #[must_use]
    pub fn from_wire(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|version| version.to_wire() == number)
    }

    /// Major number in the upper half, minor in the lower.
    #[must_use]
    pub const fn to_wire(self) -> u32 {
        self as u32
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.to_wire() >> 16, self.to_wire() & 0xFFFF)
    }
}

/// Message types (Linux `enum vmbus_channel_message_type`). Those from 25 on belong to protocol 6.0 and are unknown here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u32)]
#[expect(missing_docs, reason = "the names are the protocol's; the fact sheet's table explains each")]
pub enum Kind {
    OfferChannel = 1,
    RescindChannelOffer = 2,
    RequestOffers = 3,
    AllOffersDelivered = 4,
    OpenChannel = 5,
    OpenChannelResult = 6,
    CloseChannel = 7,
    GpadlHeader = 8,
    GpadlBody = 9,
    GpadlCreated = 10,
    GpadlTeardown = 11,
    GpadlTorndown = 12,
    RelidReleased = 13,
    InitiateContact = 14,
    VersionResponse = 15,
    Unload = 16,
    UnloadResponse = 17,
    TlConnectRequest = 21,
    ModifyChannel = 22,
    TlConnectResult = 23,
    ModifyChannelResponse = 24,
}

impl Kind {
    /// All of them, by number.
    pub const ALL: [Self; 21] = [
        Self::OfferChannel,
        Self::RescindChannelOffer,
        Self::RequestOffers,
        Self::AllOffersDelivered,
        Self::OpenChannel,
        Self::OpenChannelResult,
        Self::CloseChannel,
        Self::GpadlHeader,
        Self::GpadlBody,
        Self::GpadlCreated,
        Self::GpadlTeardown,
        Self::GpadlTorndown,
        Self::RelidReleased,
        Self::InitiateContact,
        Self::VersionResponse,
        Self::Unload,
        Self::UnloadResponse,
        Self::TlConnectRequest,
        Self::ModifyChannel,
        Self::TlConnectResult,
        Self::ModifyChannelResponse,
    ];

    /// The type of this wire number, if known.
    #[must_use]
    pub fn from_wire(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.to_wire() == number)
    }

    /// The wire number.
    #[must_use]
    pub const fn to_wire(self) -> u32 {
        self as u32
    }
}

/// The bytes of a whole message: header and body.
#[must_use]
pub fn encode<B: Body>(body: &B) -> Vec<u8> {
    encode_with(body, &[])
}

/// The bytes of a message whose body is followed by `tail`: a GPADL message and its page numbers.
#[must_use]
pub fn encode_with<B: Body>(body: &B, tail: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(size_of::<Header>() + size_of::<B>() + tail.len());
    bytes.extend_from_slice(Header { kind: B::KIND.to_wire().into(), padding: 0.into() }.as_bytes());
    bytes.extend_from_slice(body.as_bytes());
    bytes.extend_from_slice(tail);
    bytes
}
