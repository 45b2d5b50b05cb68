//! Contact, unload, reset: the beginning and the end of a conversation.

use super::state::{ChannelState, Connected, Connection, Offer, Relid, Then};
use super::{Action, GuestError, Root};
use crate::protocol::encode;
use crate::protocol::{
    CONTACT_CONNECTION, InitiateContact, Kind, SINT, UnloadResponse, Version, VersionResponse,
};

impl Root {
    /// The virtual machine was reset: the guest is gone without a word.
    pub fn reset(&mut self) {
        match self.connection {
            Connection::Disconnected => {}
            Connection::Connected(_) | Connection::Draining(_) => self.drain(Then::Nothing),
        }
    }

    /// The devices have let go of everything, as [`Action::Reset`] asked.
    pub fn unloaded(&mut self) {
        let Connection::Draining(then) = &self.connection else { return };
        match *then {
            Then::Nothing => self.connection = Connection::Disconnected,
            Then::UnloadResponse { vp } => {
                self.connection = Connection::Disconnected;
                self.actions.push_back(Action::Post { vp, payload: encode(&UnloadResponse {}) });
            }
            Then::Contact { vp, version } => self.answer_contact(vp, version),
        }
    }

    pub(super) fn contact(&mut self, connection: u32, contact: &InitiateContact) -> Result<(), GuestError> {
        let vp = contact.target_vp.get();
        if vp >= self.config.vps {
            return Err(GuestError::NoProcessor(vp));
        }
        let version = Version::from_wire(contact.version.get())
            .filter(|version| self.speaks(*version, connection, contact));
        match self.connection {
            Connection::Disconnected => self.answer_contact(vp, version),
            // A kernel that followed a crashed one, or began again: nothing of the old conversation counts.
            Connection::Connected(_) | Connection::Draining(_) => self.drain(Then::Contact { vp, version }),
        }
        Ok(())
    }

    /// From 5.0 contact is made on an id of its own and says where messages shall arrive; there is but one place.
    fn speaks(&self, version: Version, connection: u32, contact: &InitiateContact) -> bool {
        version <= self.config.max_version
            && (version < Version::V5_0 || (connection == CONTACT_CONNECTION && contact.sint == SINT))
            && (version < Version::V5_1 || contact.vtl == 0)
    }

    fn answer_contact(&mut self, vp: u32, version: Option<Version>) {
        self.connection = match version {
            Some(version) => Connection::Connected(Connected { version, vp, offers_requested: false }),
            None => Connection::Disconnected,
        };
        let response = VersionResponse {
            supported: version.is_some().into(),
            connection_state: 0,
            reserved: 0.into(),
            connection_or_version: match version {
                None => 0,
                Some(version) if version < Version::V5_0 => version.to_wire(),
                Some(_) => CONTACT_CONNECTION,
            }
            .into(),
        };
        self.refusals = self.refusals.saturating_add(version.is_none().into());
        self.actions.push_back(Action::Post { vp, payload: encode(&response) });
    }

    pub(super) fn unload(&mut self) -> Result<(), GuestError> {
        let vp = match &self.connection {
            Connection::Connected(connected) => connected.vp,
            Connection::Draining(Then::UnloadResponse { vp } | Then::Contact { vp, .. }) => *vp,
            Connection::Disconnected | Connection::Draining(Then::Nothing) => {
                return Err(GuestError::NotConnected(Kind::Unload));
            }
        };
        self.drain(Then::UnloadResponse { vp });
        Ok(())
    }

    /// Forgets all that the guest knew or shared, and has the devices do the same. A later wish replaces an earlier one:
    /// whoever made that no longer waits.
    fn drain(&mut self, then: Then) {
        let asked = matches!(self.connection, Connection::Draining(_));
        self.connection = Connection::Draining(then);
        if asked {
            return;
        }
        self.actions.retain(|action| matches!(action, Action::Gone { .. }));
        self.actions.push_back(Action::Reset);
        self.gpadls.clear();
        self.gpadl_pages = 0;
        self.relids.clear();
        let actions = &mut self.actions;
        self.devices.retain(|&id, device| {
            if device.withdrawn {
                actions.push_back(Action::Gone { device: id });
                return false;
            }
            device.subchannels = 0;
            device.channels.retain(|&index, _| index == 0);
            true
        });
        for (&device, state) in &mut self.devices {
            for (&index, channel) in &mut state.channels {
                channel.offer = Offer::Hidden;
                channel.state = ChannelState::Closed;
                self.relids.insert(channel.relid, Relid::Live(super::ChannelKey { device, index }));
            }
        }
    }
}
