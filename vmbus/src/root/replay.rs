//! All that is open, to be told again to a device side that started anew while the guest ran on.
//!
//! The order is that in which it came about: each device, its GPADLs, its channels. Of what was under way when the old
//! device side went: an opening or a GPADL not yet answered is told again and to be answered; whatever was to be closed,
//! released or redirected is answered by [`Root::device_side_lost`], for who is gone touches nothing.

use super::state::{ChannelState, GpadlState, Modify, OpenParameters, Orphan};
use super::{Action, ChannelKey, DeviceId, GpadlId, OfferSpec, Root};
use crate::protocol::event_connection;

/// One thing to tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item<'a> {
    /// There is this device.
    Device {
        /// Its name.
        device: DeviceId,
        /// What it was offered as.
        spec: &'a OfferSpec,
    },
    /// The guest shares pages with it, as [`Action::Gpadl`] said.
    Gpadl {
        /// The device.
        device: DeviceId,
        /// The handle.
        gpadl: GpadlId,
        /// Bytes.
        byte_count: u32,
        /// Where in the first page they begin.
        byte_offset: u32,
        /// Guest page numbers.
        pfns: &'a [u64],
        /// The guest was told that it is accepted. If not, [`Root::gpadl_accepted`] is still awaited.
        established: bool,
    },
    /// This channel is open, as [`Action::Open`] said, at the processor the guest chose last.
    Open {
        /// The channel.
        channel: ChannelKey,
        /// Its id.
        relid: u32,
        /// The connection id the guest signals.
        connection: u32,
        /// The GPADL of both rings.
        gpadl: GpadlId,
        /// Pages of the ring from guest to host.
        downstream_page: u32,
        /// The processor to interrupt.
        vp: u32,
        /// Data for the device.
        user_data: &'a [u8; 120],
        /// The guest uses it already. If not, [`Root::opened`] is still awaited.
        resumed: bool,
    },
}

impl Root {
    /// What is open of the devices for which `of` holds. Call [`Root::device_side_lost`] before.
    pub fn replay<'a>(&'a self, of: impl Fn(DeviceId) -> bool + 'a) -> impl Iterator<Item = Item<'a>> + 'a {
        self.devices.iter().filter(move |(device, _)| of(**device)).flat_map(|(&device, state)| {
            let itself = std::iter::once(Item::Device { device, spec: &state.spec });
            let channels = state.channels.iter().filter_map(move |(&index, channel)| {
                let (open, resumed) = match &channel.state {
                    ChannelState::Open { open, .. } => (open, true),
                    ChannelState::Opening { open, .. } => (open, false),
                    ChannelState::Closed | ChannelState::Closing { .. } => return None,
                };
                Some(open_item(ChannelKey { device, index }, channel.relid, open, resumed))
            });
            itself.chain(self.replay_gpadls(device)).chain(channels)
        })
    }

    fn replay_gpadls(&self, device: DeviceId) -> impl Iterator<Item = Item<'_>> + '_ {
        self.gpadls.iter().filter(move |(_, entry)| entry.device == device).filter_map(|(&gpadl, entry)| {
            let established = match entry.state {
                GpadlState::Established | GpadlState::TearingDown { asked: false } => true,
                GpadlState::Offered => false,
                _ => return None,
            };
            Some(Item::Gpadl {
                device: entry.device,
                gpadl,
                byte_count: entry.byte_count,
                byte_offset: entry.byte_offset,
                pfns: &entry.pfns,
                established,
            })
        })
    }

    /// The device side of `device` is gone with all it knew. Answers in its stead whatever it was asked to give up, and
    /// takes back what it was not told yet; the rest waits for [`Root::replay`].
    pub fn device_side_lost(&mut self, device: DeviceId) {
        self.actions.retain(|action| match action {
            Action::Post { .. } | Action::Reset | Action::Gone { .. } => true,
            Action::Gpadl { device: of, .. } | Action::GpadlTeardown { device: of, .. } => *of != device,
            Action::Open { channel, .. } | Action::Close { channel } | Action::Modify { channel, .. } => {
                channel.device != device
            }
        });
        let indices: Vec<u16> = self
            .devices
            .get(&device)
            .map(|state| state.channels.keys().rev().copied().collect())
            .unwrap_or_default();
        for index in indices {
            let key = ChannelKey { device, index };
            match self.channel(key).map(|channel| &channel.state) {
                Some(ChannelState::Opening { abandoned: true, .. }) => self.opened(key, false),
                Some(ChannelState::Closing { .. }) => self.closed(key),
                Some(ChannelState::Open { modify: Modify::Asked { .. }, .. }) => self.finish_modify(key),
                _ => {}
            }
        }
        let gpadls: Vec<(GpadlId, GpadlState)> = self
            .gpadls
            .iter()
            .filter(|(_, entry)| entry.device == device)
            .map(|(&gpadl, entry)| (gpadl, entry.state))
            .collect();
        for (gpadl, state) in gpadls {
            match state {
                GpadlState::TearingDown { asked: true } | GpadlState::Orphaned(Orphan::Asked) => {
                    self.gpadl_released(device, gpadl);
                }
                GpadlState::Orphaned(Orphan::Accepting) => self.gpadl_accepted(device, gpadl, false),
                _ => {}
            }
        }
        self.take_back(device);
    }

    /// The processor asked for last is what a replay tells; the guest may hear of it now.
    fn finish_modify(&mut self, key: ChannelKey) {
        self.modified(key);
        // Where nothing is acknowledged one more wish may have been waiting.
        self.modified(key);
    }

    /// Actions that answering made are void where a replay says the same, and answered where it does not.
    fn take_back(&mut self, device: DeviceId) {
        let mut released = Vec::new();
        self.actions.retain(|action| match action {
            Action::GpadlTeardown { device: of, gpadl } if *of == device => {
                released.push(*gpadl);
                false
            }
            Action::Open { channel, .. } | Action::Modify { channel, .. } => channel.device != device,
            _ => true,
        });
        for gpadl in released {
            self.gpadl_released(device, gpadl);
        }
    }
}

fn open_item(channel: ChannelKey, relid: u32, open: &OpenParameters, resumed: bool) -> Item<'_> {
    Item::Open {
        channel,
        relid,
        connection: event_connection(relid),
        gpadl: open.gpadl,
        downstream_page: open.downstream_page,
        vp: open.vp,
        user_data: &open.user_data,
        resumed,
    }
}
