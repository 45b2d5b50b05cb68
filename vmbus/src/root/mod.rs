//! The host end of VMBus, without I/O: it is told what the guest posts and what devices answer, and says what to do.
//!
//! It touches no memory of the guest, starts no thread and reads no clock. What it remembers of a guest is bounded: by the
//! 2047 channel ids, by the limits of [`RootConfig`], and by refusing messages ([`GuestError::Busy`]) while too many
//! actions wait. Each request of a guest is answered once, with a status if it asks for what cannot be; what cannot be
//! answered is a [`GuestError`], and changes nothing.
//!
//! The host gives [`Root::message`] what the guest posts and takes [`Root::next_action`] until there is none. It hands
//! [`Action::Post`] to the guest in order, and the rest to the devices; each action that has an answer is answered once,
//! in any order between channels. After [`Action::Reset`] only [`Root::unloaded`] is an answer: none to an earlier action
//! may follow it.
//!
//! Protocol: vmbus.md §2–§5, §8, §11–§13; Linux `drivers/hv/{connection,channel_mgmt,channel}.c`.

mod action;
mod channels;
mod connection;
mod describe;
pub mod fuzz;
mod gpadls;
mod offers;
pub mod replay;
mod state;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};

pub use action::{Action, ChannelKey, DeviceId, GpadlId, GuestError, OfferError, OfferSpec, RootConfig};
pub use describe::{ChannelDescription, ChannelStatus, ConnectionStatus, Description, DeviceDescription};

use crate::protocol::{self, Body, CONTACT_CONNECTION, GuestMessage, Kind, MESSAGE_CONNECTION, encode};
use state::{Channel, Connection, Device, Gpadl, Relid};

/// The VMBus root of one virtual machine.
#[derive(Debug)]
pub struct Root {
    config: RootConfig,
    connection: Connection,
    devices: BTreeMap<DeviceId, Device>,
    /// Every id in use, the rescinded ones until the guest released them.
    relids: BTreeMap<u32, Relid>,
    /// By the guest's handle, which is unique in the machine: messages of a GPADL carry no other name.
    gpadls: BTreeMap<GpadlId, Gpadl>,
    /// Page numbers promised by all of `gpadls`.
    gpadl_pages: usize,
    actions: VecDeque<Action>,
    next_device: u32,
    /// Where the search for a free id begins: ids are reused as late as possible.
    next_relid: u32,
    errors: u64,
    refusals: u64,
    last_error: Option<GuestError>,
}

impl Root {
    /// A root with no devices and no guest.
    #[must_use]
    pub fn new(config: RootConfig) -> Self {
        Self {
            config,
            connection: Connection::Disconnected,
            devices: BTreeMap::new(),
            relids: BTreeMap::new(),
            gpadls: BTreeMap::new(),
            gpadl_pages: 0,
            actions: VecDeque::new(),
            next_device: 1,
            next_relid: 1,
            errors: 0,
            refusals: 0,
            last_error: None,
        }
    }

    /// What to do next, if anything.
    pub fn next_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// The guest posted `payload`, a private copy, to this connection id.
    ///
    /// # Errors
    /// A message that cannot be answered; nothing changed but a counter. [`GuestError::Busy`] asks the caller to have the
    /// guest try again (hypercall status 0x13, insufficient buffers); the others are the guest's mistakes.
    pub fn message(&mut self, connection: u32, payload: &[u8]) -> Result<(), GuestError> {
        let result = self.dispatch(connection, payload);
        if let Err(error) = result {
            self.errors = self.errors.saturating_add(1);
            self.last_error = Some(error);
        }
        result
    }

    fn dispatch(&mut self, connection: u32, payload: &[u8]) -> Result<(), GuestError> {
        if connection != MESSAGE_CONNECTION && connection != CONTACT_CONNECTION {
            return Err(GuestError::WrongConnection(connection));
        }
        let message = GuestMessage::parse(payload)?;
        match message {
            GuestMessage::InitiateContact(contact) => return self.contact(connection, contact),
            GuestMessage::Unload => return self.unload(),
            _ => {}
        }
        let Connection::Connected(_) = self.connection else {
            return Err(GuestError::NotConnected(message.kind()));
        };
        if self.actions.len() >= self.config.max_actions {
            return Err(GuestError::Busy);
        }
        match message {
            GuestMessage::RequestOffers => self.request_offers(),
            GuestMessage::OpenChannel(open) => self.open(open),
            GuestMessage::CloseChannel(close) => self.close(close.relid.get()),
            GuestMessage::GpadlHeader(header, pfns) => self.gpadl_header(header, pfns),
            GuestMessage::GpadlBody(header, pfns) => self.gpadl_body(header, pfns),
            GuestMessage::GpadlTeardown(teardown) => self.gpadl_teardown(teardown),
            GuestMessage::RelidReleased(released) => self.relid_released(released.relid.get()),
            GuestMessage::ModifyChannel(modify) => self.modify(modify),
            GuestMessage::TlConnectRequest(request) => self.refuse_socket(request),
            GuestMessage::InitiateContact(_) | GuestMessage::Unload => Ok(()),
        }
    }

    /// There are no services for sockets here: say so, rather than let the guest wait.
    fn refuse_socket(&mut self, request: &protocol::TlConnectRequest) -> Result<(), GuestError> {
        self.refusals = self.refusals.saturating_add(1);
        self.post(&protocol::TlConnectResult {
            endpoint: request.endpoint,
            service: request.service,
            status: protocol::status::CONNECTION_REFUSED.cast_signed().into(),
        });
        Ok(())
    }

    /// A message to the guest, if there is one to talk to.
    fn post<B: Body>(&mut self, body: &B) {
        if let Connection::Connected(connected) = &self.connection {
            self.actions.push_back(Action::Post { vp: connected.vp, payload: encode(body) });
        }
    }

    /// Counts an answer that is not success.
    fn count_refusal(&mut self, status: u32) {
        self.refusals = self.refusals.saturating_add(u64::from(status != protocol::status::SUCCESS));
    }

    fn channel(&self, key: ChannelKey) -> Option<&Channel> {
        self.devices.get(&key.device)?.channels.get(&key.index)
    }

    fn channel_mut(&mut self, key: ChannelKey) -> Option<&mut Channel> {
        self.devices.get_mut(&key.device)?.channels.get_mut(&key.index)
    }

    /// Whether interrupts can go to this processor. [`protocol::NO_INTERRUPTS`] is none: it is refused.
    fn is_target(&self, vp: u32) -> bool {
        vp < self.config.vps
    }

    fn unknown_channel(kind: Kind, relid: u32) -> GuestError {
        GuestError::UnknownChannel { kind, relid }
    }
}
