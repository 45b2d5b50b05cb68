//! The bodies of control messages, as they lie after the eight-byte header. All little-endian and unaligned.

use zerocopy::little_endian::{I32, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::Kind;
use crate::guid::Guid;

/// The body of one message type.
pub trait Body: FromBytes + IntoBytes + KnownLayout + Immutable + Unaligned {
    /// The type that announces this body.
    const KIND: Kind;
}

/// One structure: its fields, its type, and its size with the header, which is checked here.
macro_rules! bodies {
    ($($(#[$doc:meta])* $name:ident = $size:literal { $($(#[$field_doc:meta])* $field:ident: $type:ty),* $(,)? })*) => { $(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
        #[repr(C)]
        pub struct $name { $($(#[$field_doc])* pub $field: $type),* }

        const _: () = assert!(size_of::<Header>() + size_of::<$name>() == $size);

        impl Body for $name {
            const KIND: Kind = Kind::$name;
        }
    )* };
}

/// What every message begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Header {
    /// Message type, see [`Kind`].
    pub kind: U32,
    /// Zero.
    pub padding: U32,
}

const _: () = assert!(size_of::<Header>() == 8);

bodies! {
    /// Host: here is a channel (vmbus.md §4).
    OfferChannel = 196 {
        /// Type of the device.
        interface: Guid,
        /// The device; a subchannel repeats its primary's.
        instance: Guid,
        /// Zero.
        reserved: [U64; 2],
        /// See [`offer_flags`].
        flags: U16,
        /// Megabytes of memory-mapped I/O the device wants.
        mmio_megabytes: U16,
        /// Device data; a pipe's mode comes first.
        user_defined: [u8; 120],
        /// 0 for a primary channel.
        subchannel: U16,
        /// Zero.
        reserved2: U16,
        /// The channel's id.
        relid: U32,
        /// 0xFF: none.
        monitor_id: u8,
        /// Bit 0: signalled through the monitor page.
        monitor_allocated: u8,
        /// Bit 0: interrupts have a flag of their own.
        dedicated: U16,
        /// What the guest signals.
        connection: U32,
    }
    /// Host: the channel goes away.
    RescindChannelOffer = 12 {
        /// The channel.
        relid: U32,
    }
    /// Guest: send the offers.
    RequestOffers = 8 {}
    /// Host: those were the offers.
    AllOffersDelivered = 8 {}
    /// Guest: open a channel.
    OpenChannel = 148 {
        /// The channel.
        relid: U32,
        /// Echoed in the result.
        open_id: U32,
        /// The GPADL that holds both rings.
        gpadl: U32,
        /// The processor to interrupt.
        target_vp: U32,
        /// Pages of the ring from guest to host; the rest is the other ring.
        downstream_page: U32,
        /// Data for the device.
        user_data: [u8; 120],
    }
    /// Host: the channel is open, or not.
    OpenChannelResult = 20 {
        /// The channel.
        relid: U32,
        /// As in the request.
        open_id: U32,
        /// See [`super::status`].
        status: U32,
    }
    /// Guest: the channel is closed. No reply.
    CloseChannel = 12 {
        /// The channel.
        relid: U32,
    }
    /// Guest: pages for the host to use; page numbers follow, 26 at most.
    GpadlHeader = 28 {
        /// The channel they are for.
        relid: U32,
        /// The guest's handle.
        gpadl: U32,
        /// Bytes of all ranges, their headers included.
        range_bytes: U16,
        /// Ranges; this host accepts one.
        range_count: U16,
        /// Bytes of the range.
        byte_count: U32,
        /// Where in the first page it begins.
        byte_offset: U32,
    }
    /// Guest: more page numbers, 28 at most.
    GpadlBody = 16 {
        /// Zero from Linux; not used.
        number: U32,
        /// The handle of the header before.
        gpadl: U32,
    }
    /// Host: the pages are accepted, or not.
    GpadlCreated = 20 {
        /// As in the header.
        relid: U32,
        /// As in the header.
        gpadl: U32,
        /// See [`super::status`].
        status: U32,
    }
    /// Guest: I want the pages back.
    GpadlTeardown = 16 {
        /// The channel they were for.
        relid: U32,
        /// The handle.
        gpadl: U32,
    }
    /// Host: nobody touches the pages any more.
    GpadlTorndown = 12 {
        /// The handle.
        gpadl: U32,
    }
    /// Guest: a rescinded channel's id is free. No reply.
    RelidReleased = 12 {
        /// The channel.
        relid: U32,
    }
    /// Guest: let us talk, in this version.
    InitiateContact = 40 {
        /// See [`super::Version`].
        version: U32,
        /// The processor whose message page gets all that the host says.
        target_vp: U32,
        /// From 5.0: interrupt source of messages. Before, with the next fields: the interrupt page.
        sint: u8,
        /// From 5.1: trust level.
        vtl: u8,
        /// Zero.
        reserved: U16,
        /// Feature flags of later versions.
        features: U32,
        /// Monitor page, host to guest.
        monitor_page_1: U64,
        /// Monitor page, guest to host.
        monitor_page_2: U64,
    }
    /// Host: that version is spoken here, or not. Shorter than 16 bytes Linux drops it.
    VersionResponse = 16 {
        /// 1 or 0.
        supported: u8,
        /// 0: well; 1: low resources; 2: failure.
        connection_state: u8,
        /// Zero.
        reserved: U16,
        /// From 5.0: the message connection id. Before: the version.
        connection_or_version: U32,
    }
    /// Guest: close and forget everything.
    Unload = 8 {}
    /// Host: everything is closed and forgotten.
    UnloadResponse = 8 {}
    /// Guest: connect a socket to a service of the host. From 5.2 sixteen bytes of silo id may follow.
    TlConnectRequest = 40 {
        /// The guest's end.
        endpoint: Guid,
        /// The host's service.
        service: Guid,
    }
    /// Guest: interrupt another processor for this channel.
    ModifyChannel = 16 {
        /// The channel.
        relid: U32,
        /// The processor.
        target_vp: U32,
    }
    /// Host: what became of a TL_CONNECT_REQUEST.
    TlConnectResult = 44 {
        /// As in the request.
        endpoint: Guid,
        /// As in the request.
        service: Guid,
        /// See [`super::status`].
        status: I32,
    }
    /// Host: interrupts go to the other processor now. Sent exactly in protocol 5.3.
    ModifyChannelResponse = 16 {
        /// The channel.
        relid: U32,
        /// See [`super::status`].
        status: U32,
    }
}

/// Bits of [`OfferChannel::flags`].
pub mod offer_flags {
    /// The device's interface is to be enumerated: usual.
    pub const ENUMERATE: u16 = 0x1;
    /// The channel is a pipe: the user-defined bytes begin with its mode.
    pub const PIPE: u16 = 0x10;
}

/// A pipe whose packets are messages, in the first word of [`OfferChannel::user_defined`].
pub const PIPE_MODE_MESSAGE: u32 = 4;
