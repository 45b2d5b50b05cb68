//! What a root remembers.

use std::collections::BTreeMap;

use super::action::{ChannelKey, DeviceId, GpadlId, OfferSpec};
use crate::protocol::Version;

/// The conversation with the guest.
#[derive(Debug)]
pub(super) enum Connection {
    /// No guest made contact.
    Disconnected,
    /// One did.
    Connected(Connected),
    /// Devices are letting go of everything; then comes this.
    Draining(Then),
}

#[derive(Debug)]
pub(super) struct Connected {
    pub version: Version,
    /// Where all messages go.
    pub vp: u32,
    pub offers_requested: bool,
}

/// What follows when the devices have let go.
#[derive(Debug)]
pub(super) enum Then {
    /// The machine was reset: nobody waits.
    Nothing,
    UnloadResponse {
        vp: u32,
    },
    Contact {
        vp: u32,
        /// None: the version asked for is refused.
        version: Option<Version>,
    },
}

#[derive(Debug)]
pub(super) struct Device {
    pub spec: OfferSpec,
    pub withdrawn: bool,
    /// Subchannels 1 to this are to exist.
    pub subchannels: u16,
    /// By index. Rescinded channels leave when the device has closed them.
    pub channels: BTreeMap<u16, Channel>,
}

/// What a channel id stands for.
#[derive(Debug, Clone, Copy)]
pub(super) enum Relid {
    Live(ChannelKey),
    /// Rescinded and closed; the guest has not released it. The channel's index may be in use again.
    Leaving(DeviceId),
}

#[derive(Debug)]
pub(super) struct Channel {
    pub relid: u32,
    pub offer: Offer,
    pub state: ChannelState,
}

/// What the guest knows of a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Offer {
    /// Nothing: it did not ask yet.
    Hidden,
    Offered,
    Rescinded,
    /// Rescinded, and the guest is done with it; the device is not.
    Released,
}

#[derive(Debug)]
pub(super) enum ChannelState {
    Closed,
    /// The device was asked to open. If `abandoned` it will be asked to close next.
    Opening {
        open: OpenParameters,
        abandoned: bool,
    },
    Open {
        open: OpenParameters,
        modify: Modify,
    },
    /// The device was asked to close; the guest may have asked for the next opening already.
    Closing {
        open: OpenParameters,
        reopen: Option<OpenParameters>,
    },
}

/// Redirection of a channel's interrupts.
#[derive(Debug)]
pub(super) enum Modify {
    Idle,
    /// The device was asked for `vp`. `next` is the newest wish since, where the protocol acknowledges none.
    Asked {
        vp: u32,
        next: Option<u32>,
    },
}

/// What OPENCHANNEL said.
#[derive(Debug, Clone)]
pub(super) struct OpenParameters {
    pub open_id: u32,
    pub gpadl: GpadlId,
    pub downstream_page: u32,
    pub vp: u32,
    pub user_data: [u8; 120],
}

impl ChannelState {
    /// Whether this GPADL holds the channel's rings, now or next.
    pub fn uses(&self, gpadl: GpadlId) -> bool {
        match self {
            Self::Closed => false,
            Self::Opening { open, .. } | Self::Open { open, .. } => open.gpadl == gpadl,
            Self::Closing { open, reopen } => {
                open.gpadl == gpadl || reopen.as_ref().is_some_and(|reopen| reopen.gpadl == gpadl)
            }
        }
    }
}

#[derive(Debug)]
pub(super) struct Gpadl {
    pub device: DeviceId,
    /// The channel it was made for.
    pub relid: u32,
    pub byte_count: u32,
    pub byte_offset: u32,
    /// Page numbers promised.
    pub pages: usize,
    /// Page numbers that came.
    pub pfns: Vec<u64>,
    pub state: GpadlState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum GpadlState {
    /// Page numbers are still to come.
    Collecting,
    /// The device was asked to accept it.
    Offered,
    /// The device has it and the guest knows.
    Established,
    /// The guest wants it back. It is asked of the device as soon as no ring is in it.
    TearingDown { asked: bool },
    /// Its channel is released: the device must let go of it, and the guest hears nothing.
    Orphaned(Orphan),
}

/// How far a device is from having let go of an orphaned GPADL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Orphan {
    /// It has yet to say whether it accepts it.
    Accepting,
    /// It holds it, and a ring may be in it.
    Held,
    /// It was asked to let go.
    Asked,
}
