//! Offers: devices and subchannels that come and go.

use super::state::{Channel, ChannelState, Connection, Device, Offer, Relid};
use super::{Action, ChannelKey, DeviceId, GuestError, OfferError, OfferSpec, Root};
use crate::protocol::{
    AllOffersDelivered, Kind, MAX_RELID, OfferChannel, PIPE_MODE_MESSAGE, RescindChannelOffer,
    event_connection, offer_flags,
};

impl Root {
    /// A device for the guest: told at once if it asked for offers already (hot add), else when it asks.
    ///
    /// # Errors
    /// The instance is in use, or no channel id is free.
    pub fn offer(&mut self, spec: OfferSpec) -> Result<DeviceId, OfferError> {
        if self.devices.values().any(|device| device.spec.instance == spec.instance) {
            return Err(OfferError::InstanceInUse(spec.instance));
        }
        let relid = self.free_relid().ok_or(OfferError::NoRelid)?;
        let device = DeviceId(self.next_device);
        self.next_device = self.next_device.wrapping_add(1);
        self.devices
            .insert(device, Device { spec, withdrawn: false, subchannels: 0, channels: Default::default() });
        self.add_channel(ChannelKey { device, index: 0 }, relid);
        Ok(device)
    }

    /// Takes a device from the guest (hot remove). Its channels are rescinded, subchannels first, and closed.
    /// [`Action::Gone`] says when the instance may be offered again. An unknown device is none: nothing happens.
    pub fn withdraw(&mut self, device: DeviceId) {
        let Some(state) = self.devices.get_mut(&device) else { return };
        if std::mem::replace(&mut state.withdrawn, true) {
            return;
        }
        state.subchannels = 0;
        let indices: Vec<u16> = state.channels.keys().rev().copied().collect();
        for index in indices {
            self.rescind(ChannelKey { device, index });
        }
        self.forget_if_gone(device);
    }

    /// Offers subchannels 1 to `count` of a device whose protocol was asked for them. Those that exist stay; those that
    /// are still being closed follow when they are. Returns how many there will be.
    ///
    /// # Errors
    /// No such device, or its primary channel is not open.
    pub fn offer_subchannels(&mut self, device: DeviceId, count: u16) -> Result<u16, OfferError> {
        let state = self.devices.get(&device).filter(|state| !state.withdrawn);
        let state = state.ok_or(OfferError::NoDevice(device))?;
        if !matches!(state.channels.get(&0).map(|primary| &primary.state), Some(ChannelState::Open { .. })) {
            return Err(OfferError::PrimaryNotOpen(device));
        }
        let wanted = count.min(state.spec.subchannels_max).max(state.subchannels);
        let missing = (1..=wanted).filter(|index| !state.channels.contains_key(index)).count();
        let short = missing.saturating_sub((MAX_RELID as usize).saturating_sub(self.relids.len()));
        let granted = wanted.saturating_sub(u16::try_from(short).unwrap_or(u16::MAX)).max(state.subchannels);
        if let Some(state) = self.devices.get_mut(&device) {
            state.subchannels = granted;
        }
        self.fill_subchannels(device);
        Ok(granted.min(count))
    }

    /// Creates the subchannels that are to exist and do not.
    pub(super) fn fill_subchannels(&mut self, device: DeviceId) {
        let Some(state) = self.devices.get(&device) else { return };
        let missing: Vec<u16> =
            (1..=state.subchannels).filter(|index| !state.channels.contains_key(index)).collect();
        for index in missing {
            let Some(relid) = self.free_relid() else { return };
            self.add_channel(ChannelKey { device, index }, relid);
        }
    }

    pub(super) fn request_offers(&mut self) -> Result<(), GuestError> {
        let Connection::Connected(connected) = &mut self.connection else {
            return Err(GuestError::NotConnected(Kind::RequestOffers));
        };
        if std::mem::replace(&mut connected.offers_requested, true) {
            return Err(GuestError::OffersRequestedTwice);
        }
        let hidden: Vec<ChannelKey> = self
            .devices
            .iter()
            .flat_map(|(&device, state)| {
                state.channels.keys().map(move |&index| ChannelKey { device, index })
            })
            .collect();
        for key in hidden {
            self.tell(key);
        }
        self.post(&AllOffersDelivered {});
        Ok(())
    }

    /// The guest has done with a rescinded channel and with every GPADL it shared for it.
    pub(super) fn relid_released(&mut self, relid: u32) -> Result<(), GuestError> {
        let unknown = Self::unknown_channel(Kind::RelidReleased, relid);
        match *self.relids.get(&relid).ok_or(unknown)? {
            Relid::Leaving(device) => self.free(relid, device),
            Relid::Live(key) => {
                let channel = self.channel_mut(key).ok_or(unknown)?;
                match channel.offer {
                    Offer::Rescinded => {
                        channel.offer = Offer::Released;
                        self.orphan_gpadls(relid);
                    }
                    Offer::Offered => return Err(GuestError::NotRescinded(relid)),
                    Offer::Hidden | Offer::Released => return Err(unknown),
                }
            }
        }
        Ok(())
    }

    /// Rescinds a channel: the guest is told, the device closes it. One the guest does not know just goes.
    pub(super) fn rescind(&mut self, key: ChannelKey) {
        let Some(channel) = self.channel_mut(key) else { return };
        let relid = channel.relid;
        match channel.offer {
            Offer::Hidden => channel.offer = Offer::Released,
            Offer::Offered => {
                channel.offer = Offer::Rescinded;
                self.post(&RescindChannelOffer { relid: relid.into() });
            }
            Offer::Rescinded | Offer::Released => return,
        }
        self.begin_close(key);
        self.leave_if_closed(key);
    }

    /// A rescinded channel that the device has closed gives its index back, and its id if the guest released it.
    pub(super) fn leave_if_closed(&mut self, key: ChannelKey) {
        let Some(Channel { relid, offer, state: ChannelState::Closed }) = self.channel(key) else { return };
        let (relid, offer) = (*relid, *offer);
        if offer == Offer::Hidden || offer == Offer::Offered {
            return;
        }
        if let Some(device) = self.devices.get_mut(&key.device) {
            device.channels.remove(&key.index);
        }
        self.relids.insert(relid, Relid::Leaving(key.device));
        if offer == Offer::Released {
            self.free(relid, key.device);
        }
        self.fill_subchannels(key.device);
    }

    /// Frees the id of a channel that guest and device are done with.
    fn free(&mut self, relid: u32, device: DeviceId) {
        self.relids.remove(&relid);
        self.orphan_gpadls(relid);
        self.fill_subchannels(device);
        self.forget_if_gone(device);
    }

    /// Forgets a withdrawn device once nothing is left of it.
    pub(super) fn forget_if_gone(&mut self, device: DeviceId) {
        let left =
            self.devices.get(&device).is_none_or(|state| !state.withdrawn || !state.channels.is_empty())
                || self.relids.values().any(|relid| matches!(relid, Relid::Leaving(id) if *id == device))
                || self.gpadls.values().any(|gpadl| gpadl.device == device);
        if !left {
            self.devices.remove(&device);
            self.actions.push_back(Action::Gone { device });
        }
    }

    fn add_channel(&mut self, key: ChannelKey, relid: u32) {
        self.relids.insert(relid, Relid::Live(key));
        if let Some(device) = self.devices.get_mut(&key.device) {
            let channel = Channel { relid, offer: Offer::Hidden, state: ChannelState::Closed };
            device.channels.insert(key.index, channel);
        }
        if matches!(&self.connection, Connection::Connected(connected) if connected.offers_requested) {
            self.tell(key);
        }
    }

    /// Posts the offer of a channel that the guest does not know yet.
    fn tell(&mut self, key: ChannelKey) {
        let Some(device) = self.devices.get_mut(&key.device) else { return };
        let spec = device.spec;
        let Some(channel) = device.channels.get_mut(&key.index) else { return };
        if channel.offer == Offer::Hidden {
            channel.offer = Offer::Offered;
            let message = offer_message(&spec, key.index, channel.relid);
            self.post(&message);
        }
    }

    fn free_relid(&mut self) -> Option<u32> {
        let first = self.next_relid;
        let relid = (first..=MAX_RELID).chain(1..first).find(|relid| !self.relids.contains_key(relid))?;
        self.next_relid = relid % MAX_RELID + 1;
        Some(relid)
    }
}

fn offer_message(spec: &OfferSpec, index: u16, relid: u32) -> OfferChannel {
    let mut user_defined = [0; 120];
    let mut flags = offer_flags::ENUMERATE;
    if spec.pipe {
        flags |= offer_flags::PIPE;
        user_defined[..4].copy_from_slice(&PIPE_MODE_MESSAGE.to_le_bytes());
    }
    OfferChannel {
        interface: spec.interface,
        instance: spec.instance,
        reserved: [0.into(); 2],
        flags: flags.into(),
        mmio_megabytes: 0.into(),
        user_defined,
        subchannel: index.into(),
        reserved2: 0.into(),
        relid: relid.into(),
        monitor_id: 0xFF,
        monitor_allocated: 0,
        dedicated: 1.into(),
        connection: event_connection(relid).into(),
    }
}
