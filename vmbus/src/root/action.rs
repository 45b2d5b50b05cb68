//! What a root is told and what it asks for: its vocabulary.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::guid::Guid;
use crate::protocol::{Kind, ParseError, Version};

/// A device, named by the root when it is offered; never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct DeviceId(pub u32);

/// A GPADL, named by the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct GpadlId(pub u32);

/// A channel of a device: 0 is the primary, the others are subchannels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ChannelKey {
    /// The device.
    pub device: DeviceId,
    /// Subchannel index, 0 for the primary.
    pub index: u16,
}

impl fmt::Display for ChannelKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "device {} channel {}", self.device.0, self.index)
    }
}

/// Limits of one machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RootConfig {
    /// The newest version spoken.
    pub max_version: Version,
    /// Virtual processors; messages and interrupts that want another are refused.
    pub vps: u32,
    /// Most GPADLs at a time, those in progress included.
    pub max_gpadls: usize,
    /// Most pages in all GPADLs together. Each costs eight bytes here.
    pub max_gpadl_pages: usize,
    /// Waiting actions beyond which messages of the guest are put off.
    pub max_actions: usize,
}

impl RootConfig {
    /// The usual limits for a machine of `vps` processors: 4096 GPADLs, 1 GiB of shared pages.
    #[must_use]
    pub fn new(max_version: Version, vps: u32) -> Self {
        Self { max_version, vps, max_gpadls: 4096, max_gpadl_pages: 1 << 18, max_actions: 8192 }
    }
}

/// A device to offer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct OfferSpec {
    /// What it is: [`crate::guid::interface`].
    pub interface: Guid,
    /// Which it is: unlike any other device of the machine.
    pub instance: Guid,
    /// Most subchannels it may ask for.
    pub subchannels_max: u16,
    /// Its channel is a pipe of messages, as integration services are.
    pub pipe: bool,
}

/// Why a device or subchannel cannot be offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OfferError {
    /// Guests know devices by instance alone.
    #[error("instance {0} is offered already, or the guest has not released it yet")]
    InstanceInUse(Guid),
    /// All 2047 are in use.
    #[error("no channel id is free")]
    NoRelid,
    /// No such device, or it is withdrawn.
    #[error("device {} is not offered", .0.0)]
    NoDevice(DeviceId),
    /// Subchannels exist only beside an open primary channel.
    #[error("device {} has no open primary channel", .0.0)]
    PrimaryNotOpen(DeviceId),
}

/// A message that has no answer: what a guest, or somebody in it, did wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum GuestError {
    /// Not a message.
    #[error(transparent)]
    Malformed(#[from] ParseError),
    /// Posted to a connection id that is not of VMBus messages.
    #[error("message on connection id {0}")]
    WrongConnection(u32),
    /// Only contact may be made now.
    #[error("{0:?} while not connected")]
    NotConnected(Kind),
    /// There is no such processor to answer on.
    #[error("processor {0} does not exist")]
    NoProcessor(u32),
    /// Offers are sent once in a connection.
    #[error("offers requested twice")]
    OffersRequestedTwice,
    /// No channel of this id was offered.
    #[error("{kind:?} for channel id {relid}, which is not offered")]
    UnknownChannel {
        /// The message.
        kind: Kind,
        /// The id.
        relid: u32,
    },
    /// No GPADL of this handle, or none that the message can be for. Bodies of a refused GPADL end here, too.
    #[error("{kind:?} for gpadl {gpadl:#x}, which is not known or not in that state")]
    UnknownGpadl {
        /// The message.
        kind: Kind,
        /// The handle.
        gpadl: u32,
    },
    /// The channel is not open.
    #[error("{kind:?} for channel id {relid}, which is not open")]
    NotOpen {
        /// The message.
        kind: Kind,
        /// The id.
        relid: u32,
    },
    /// The channel was not rescinded.
    #[error("channel id {0} released, which is not rescinded")]
    NotRescinded(u32),
    /// The message belongs to a later version than the one agreed upon.
    #[error("{kind:?} in protocol {version}")]
    NotInVersion {
        /// The message.
        kind: Kind,
        /// The version.
        version: Version,
    },
    /// Too many actions wait: the guest does not read its answers, or asks faster than it is served.
    #[error("too many answers wait for the guest")]
    Busy,
}

/// What the host is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Put a message (at most 240 bytes) into the message page of this processor, in order, interrupt source 2.
    Post {
        /// The processor.
        vp: u32,
        /// Header and body.
        payload: Vec<u8>,
    },
    /// The guest shares pages. Answer: [`super::Root::gpadl_accepted`].
    Gpadl {
        /// For this device.
        device: DeviceId,
        /// Its handle.
        gpadl: GpadlId,
        /// Bytes; never 0.
        byte_count: u32,
        /// Where in the first page they begin; below 4096.
        byte_offset: u32,
        /// Guest page numbers, each below 2^52, as many as the bytes need. Not checked against the guest's memory.
        pfns: Vec<u64>,
    },
    /// The guest wants pages back, or lost the right to share them. Answer: [`super::Root::gpadl_released`].
    GpadlTeardown {
        /// Of this device.
        device: DeviceId,
        /// The handle.
        gpadl: GpadlId,
    },
    /// The guest opens a channel. Answer: [`super::Root::opened`].
    Open {
        /// The channel.
        channel: ChannelKey,
        /// Its id: the event flag to set for an interrupt.
        relid: u32,
        /// The connection id the guest signals.
        connection: u32,
        /// The GPADL of both rings: accepted, whole pages, offset 0.
        gpadl: GpadlId,
        /// Pages of the ring from guest to host: at least 2, and at least 2 less than the GPADL has.
        downstream_page: u32,
        /// The processor to interrupt.
        vp: u32,
        /// Data for the device.
        user_data: [u8; 120],
    },
    /// Stop touching the rings. Answer: [`super::Root::closed`].
    Close {
        /// The channel.
        channel: ChannelKey,
    },
    /// Interrupt another processor from now on. Answer: [`super::Root::modified`].
    Modify {
        /// The channel.
        channel: ChannelKey,
        /// The processor.
        vp: u32,
    },
    /// The guest unloads, begins anew, or is gone: every channel is closed and every GPADL forgotten. Stop touching its
    /// memory. Messages handed out before and not delivered yet are void. Answer: [`super::Root::unloaded`].
    Reset,
    /// The guest has released the last of a withdrawn device: its instance may be offered again. No answer.
    Gone {
        /// The device.
        device: DeviceId,
    },
}
