//! What a root can tell the operator, and whoever wants to save the machine.

use serde::Serialize;

use super::state::{ChannelState, Connection, Modify, Offer};
use super::{ChannelKey, DeviceId, Root};
use crate::guid::Guid;

/// A root at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Description {
    /// The conversation with the guest.
    pub connection: ConnectionStatus,
    /// The version agreed upon, if connected: "5.3".
    pub version: Option<String>,
    /// All devices that are not gone.
    pub devices: Vec<DeviceDescription>,
    /// GPADLs, those in progress included.
    pub gpadls: usize,
    /// Pages in them.
    pub gpadl_pages: usize,
    /// Channel ids in use, those the guest has yet to release included.
    pub relids: usize,
    /// Messages that had no answer.
    pub errors: u64,
    /// Requests answered with a status that is not success.
    pub refusals: u64,
    /// The last message that had no answer.
    pub last_error: Option<String>,
}

/// The conversation with the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ConnectionStatus {
    /// No guest made contact.
    Disconnected,
    /// Contact is made; offers are not asked for.
    Connected,
    /// The guest knows the devices.
    Offered,
    /// Devices are letting go after an unload, a reset or a new contact.
    Draining,
}

/// A device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DeviceDescription {
    /// Its name here.
    pub device: DeviceId,
    /// What it is.
    pub interface: Guid,
    /// Which it is.
    pub instance: Guid,
    /// The host takes it away; the guest has not released it.
    pub withdrawn: bool,
    /// Its channels, the primary first.
    pub channels: Vec<ChannelDescription>,
}

/// A channel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ChannelDescription {
    /// 0 for the primary.
    pub index: u16,
    /// Its id.
    pub relid: u32,
    /// The guest was told that it goes.
    pub rescinded: bool,
    /// Its state.
    pub status: ChannelStatus,
    /// The processor it interrupts, unless closed.
    pub vp: Option<u32>,
}

/// The state of a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ChannelStatus {
    /// The guest was not told of it.
    Hidden,
    /// Offered, not open.
    Closed,
    /// The device is opening it.
    Opening,
    /// Open.
    Open,
    /// The device is redirecting its interrupts.
    Modifying,
    /// The device is closing it.
    Closing,
}

impl Root {
    /// Everything worth showing.
    #[must_use]
    pub fn describe(&self) -> Description {
        Description {
            connection: match &self.connection {
                Connection::Disconnected => ConnectionStatus::Disconnected,
                Connection::Connected(connected) if connected.offers_requested => ConnectionStatus::Offered,
                Connection::Connected(_) => ConnectionStatus::Connected,
                Connection::Draining(_) => ConnectionStatus::Draining,
            },
            version: self.version().map(|version| version.to_string()),
            devices: self.devices.iter().map(|(&device, state)| describe_device(device, state)).collect(),
            gpadls: self.gpadls.len(),
            gpadl_pages: self.gpadl_pages,
            relids: self.relids.len(),
            errors: self.errors,
            refusals: self.refusals,
            last_error: self.last_error.map(|error| error.to_string()),
        }
    }

    /// Channels that are not closed: whoever saves or stops the machine has to reckon with their devices.
    pub fn open_channels(&self) -> impl Iterator<Item = ChannelKey> + '_ {
        self.devices.iter().flat_map(|(&device, state)| {
            let open =
                state.channels.iter().filter(|(_, channel)| !matches!(channel.state, ChannelState::Closed));
            open.map(move |(&index, _)| ChannelKey { device, index })
        })
    }

    /// The spec a device was offered with, while it is not gone.
    #[must_use]
    pub fn device(&self, device: DeviceId) -> Option<&super::OfferSpec> {
        self.devices.get(&device).map(|state| &state.spec)
    }
}

fn describe_device(device: DeviceId, state: &super::Device) -> DeviceDescription {
    let channels = state.channels.iter().map(|(&index, channel)| {
        let (status, vp) = match &channel.state {
            ChannelState::Closed if channel.offer == Offer::Hidden => (ChannelStatus::Hidden, None),
            ChannelState::Closed => (ChannelStatus::Closed, None),
            ChannelState::Opening { open, .. } => (ChannelStatus::Opening, Some(open.vp)),
            ChannelState::Open { open, modify: Modify::Idle } => (ChannelStatus::Open, Some(open.vp)),
            ChannelState::Open { open, .. } => (ChannelStatus::Modifying, Some(open.vp)),
            ChannelState::Closing { open, .. } => (ChannelStatus::Closing, Some(open.vp)),
        };
        let rescinded = matches!(channel.offer, Offer::Rescinded | Offer::Released);
        ChannelDescription { index, relid: channel.relid, rescinded, status, vp }
    });
    DeviceDescription {
        device,
        interface: state.spec.interface,
        instance: state.spec.instance,
        withdrawn: state.withdrawn,
        channels: channels.collect(),
    }
}
