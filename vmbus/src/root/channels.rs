//! Opening, closing and redirecting channels.

use super::state::{ChannelState, Connection, GpadlState, Modify, Offer, OpenParameters, Relid};
use super::{Action, ChannelKey, GpadlId, GuestError, Root};
use crate::protocol::{
    Kind, ModifyChannel, ModifyChannelResponse, OpenChannel, OpenChannelResult, PAGE, Version,
    event_connection, status,
};

/// Least pages of one ring: its control page and one of data.
const LEAST_RING: usize = 2;

/// A channel id as the guest may use it.
#[derive(Debug, Clone, Copy)]
pub(super) enum Found {
    /// Never offered, or released.
    Unknown,
    /// Rescinded; the guest may not have noticed yet.
    Rescinded,
    Live(ChannelKey),
}

impl Root {
    /// The device opened a channel, or could not.
    pub fn opened(&mut self, key: ChannelKey, ok: bool) {
        let Some(channel) = self.channel_mut(key) else { return };
        let ChannelState::Opening { open, abandoned } = &channel.state else { return };
        let (open, abandoned, relid) = (open.clone(), *abandoned, channel.relid);
        let told = channel.offer == Offer::Offered;
        let open_id = open.open_id;
        channel.state = match (ok, abandoned) {
            (true, false) => ChannelState::Open { open, modify: Modify::Idle },
            (true, true) => ChannelState::Closing { open, reopen: None },
            (false, _) => ChannelState::Closed,
        };
        if told {
            let result = if ok && !abandoned { status::SUCCESS } else { status::UNSUCCESSFUL };
            self.answer_open(relid, open_id, result);
        }
        match (ok, abandoned) {
            (true, false) => {}
            (true, true) => self.actions.push_back(Action::Close { channel: key }),
            (false, _) => self.settle(key),
        }
    }

    /// The device closed a channel and no longer touches its rings.
    pub fn closed(&mut self, key: ChannelKey) {
        let Some(channel) = self.channel_mut(key) else { return };
        let ChannelState::Closing { reopen, .. } = &mut channel.state else { return };
        let reopen = reopen.take();
        channel.state = ChannelState::Closed;
        let relid = channel.relid;
        self.settle(key);
        if let Some(open) = reopen {
            self.begin_open(key, relid, open);
        }
    }

    /// The interrupts of a channel go where [`Action::Modify`] asked.
    pub fn modified(&mut self, key: ChannelKey) {
        let acknowledged = self.acknowledges_modify();
        let Some(channel) = self.channel_mut(key) else { return };
        let relid = channel.relid;
        let ChannelState::Open { open, modify } = &mut channel.state else { return };
        let Modify::Asked { vp, next } = *modify else { return };
        open.vp = vp;
        *modify = match next {
            Some(vp) => Modify::Asked { vp, next: None },
            None => Modify::Idle,
        };
        if let Some(vp) = next {
            self.actions.push_back(Action::Modify { channel: key, vp });
        }
        if acknowledged {
            self.answer_modify(relid, status::SUCCESS);
        }
    }

    pub(super) fn open(&mut self, message: &OpenChannel) -> Result<(), GuestError> {
        let (relid, open_id) = (message.relid.get(), message.open_id.get());
        let open = OpenParameters {
            open_id,
            gpadl: GpadlId(message.gpadl.get()),
            downstream_page: message.downstream_page.get(),
            vp: message.target_vp.get(),
            user_data: message.user_data,
        };
        match self.find(relid) {
            Found::Unknown => self.answer_open(relid, open_id, status::INVALID_PARAMETER),
            // Its guest no longer waits, and an answer might meet a later one.
            Found::Rescinded => {}
            Found::Live(key) => self.begin_open(key, relid, open),
        }
        Ok(())
    }

    /// Asks the device to open, now or when it has closed; or refuses.
    fn begin_open(&mut self, key: ChannelKey, relid: u32, open: OpenParameters) {
        let fits = self.rings_fit(relid, &open);
        let open_id = open.open_id;
        let Some(channel) = self.channel_mut(key) else { return };
        match &mut channel.state {
            _ if !fits => self.answer_open(relid, open_id, status::INVALID_PARAMETER),
            state @ ChannelState::Closed => {
                let action = Action::Open {
                    channel: key,
                    relid,
                    connection: event_connection(relid),
                    gpadl: open.gpadl,
                    downstream_page: open.downstream_page,
                    vp: open.vp,
                    user_data: open.user_data,
                };
                *state = ChannelState::Opening { open, abandoned: false };
                self.actions.push_back(action);
            }
            ChannelState::Closing { reopen: reopen @ None, .. } => *reopen = Some(open),
            _ => self.answer_open(relid, open_id, status::UNSUCCESSFUL),
        }
    }

    /// Whether the GPADL is this channel's, holds both rings, and the processor exists.
    fn rings_fit(&self, relid: u32, open: &OpenParameters) -> bool {
        let Some(gpadl) = self.gpadls.get(&open.gpadl) else { return false };
        let Ok(split) = usize::try_from(open.downstream_page) else { return false };
        gpadl.relid == relid
            && gpadl.state == GpadlState::Established
            && gpadl.byte_offset == 0
            && gpadl.byte_count.is_multiple_of(PAGE)
            && split >= LEAST_RING
            && gpadl.pages.saturating_sub(split) >= LEAST_RING
            && self.is_target(open.vp)
    }

    pub(super) fn close(&mut self, relid: u32) -> Result<(), GuestError> {
        let key = match self.find(relid) {
            Found::Unknown => return Err(Self::unknown_channel(Kind::CloseChannel, relid)),
            // The driver of a rescinded channel still closes it; the device was asked to at once.
            Found::Rescinded => return Ok(()),
            Found::Live(key) => key,
        };
        let not_open = GuestError::NotOpen { kind: Kind::CloseChannel, relid };
        match &mut self.channel_mut(key).ok_or(not_open)?.state {
            ChannelState::Opening { abandoned: false, .. } | ChannelState::Open { .. } => {
                self.begin_close(key)
            }
            ChannelState::Closing { reopen, .. } => {
                let open_id = reopen.take().ok_or(not_open)?.open_id;
                self.answer_open(relid, open_id, status::UNSUCCESSFUL);
                // A GPADL that only the second opening would have used may be wanted back.
                self.ask_for_teardowns(relid);
            }
            ChannelState::Closed | ChannelState::Opening { abandoned: true, .. } => return Err(not_open),
        }
        Ok(())
    }

    /// Has the device close a channel, whoever wants it. Closing a primary rescinds its subchannels first.
    pub(super) fn begin_close(&mut self, key: ChannelKey) {
        if key.index == 0 {
            self.rescind_subchannels(key);
        }
        let Some(channel) = self.channel_mut(key) else { return };
        let relid = channel.relid;
        match &mut channel.state {
            ChannelState::Opening { abandoned, .. } => *abandoned = true,
            ChannelState::Open { open, modify } => {
                let asked = matches!(modify, Modify::Asked { .. });
                let open = open.clone();
                channel.state = ChannelState::Closing { open, reopen: None };
                if asked && self.acknowledges_modify() {
                    self.answer_modify(relid, status::UNSUCCESSFUL);
                }
                self.actions.push_back(Action::Close { channel: key });
            }
            ChannelState::Closing { reopen, .. } => *reopen = None,
            ChannelState::Closed => {}
        }
    }

    fn rescind_subchannels(&mut self, primary: ChannelKey) {
        let Some(device) = self.devices.get_mut(&primary.device) else { return };
        device.subchannels = 0;
        let indices: Vec<u16> = device.channels.keys().copied().filter(|&index| index != 0).collect();
        for index in indices {
            self.rescind(ChannelKey { index, ..primary });
        }
    }

    pub(super) fn modify(&mut self, message: &ModifyChannel) -> Result<(), GuestError> {
        let (relid, vp) = (message.relid.get(), message.target_vp.get());
        let version = self.version().ok_or(GuestError::NotConnected(Kind::ModifyChannel))?;
        if version < Version::V4_1 {
            return Err(GuestError::NotInVersion { kind: Kind::ModifyChannel, version });
        }
        match self.begin_modify(relid, vp) {
            Err(_) if self.acknowledges_modify() => {
                self.answer_modify(relid, status::UNSUCCESSFUL);
                Ok(())
            }
            result => result,
        }
    }

    fn begin_modify(&mut self, relid: u32, vp: u32) -> Result<(), GuestError> {
        let serial = self.acknowledges_modify();
        let not_open = GuestError::NotOpen { kind: Kind::ModifyChannel, relid };
        if !self.is_target(vp) {
            return Err(GuestError::NoProcessor(vp));
        }
        let key = match self.find(relid) {
            Found::Unknown => return Err(Self::unknown_channel(Kind::ModifyChannel, relid)),
            Found::Rescinded => return Err(not_open),
            Found::Live(key) => key,
        };
        let Some(ChannelState::Open { modify, .. }) = self.channel_mut(key).map(|channel| &mut channel.state)
        else {
            return Err(not_open);
        };
        match modify {
            Modify::Idle => {
                *modify = Modify::Asked { vp, next: None };
                self.actions.push_back(Action::Modify { channel: key, vp });
            }
            // Where each is acknowledged the guest waits for one before it asks again: this one does not.
            Modify::Asked { .. } if serial => return Err(not_open),
            Modify::Asked { next, .. } => *next = Some(vp),
        }
        Ok(())
    }

    /// A channel has become closed: what waited for that goes on.
    fn settle(&mut self, key: ChannelKey) {
        let Some(relid) = self.channel(key).map(|channel| channel.relid) else { return };
        self.ask_for_teardowns(relid);
        self.leave_if_closed(key);
    }

    pub(super) fn find(&self, relid: u32) -> Found {
        match self.relids.get(&relid) {
            None => Found::Unknown,
            Some(Relid::Leaving(_)) => Found::Rescinded,
            Some(&Relid::Live(key)) => match self.channel(key).map(|channel| channel.offer) {
                Some(Offer::Offered) => Found::Live(key),
                Some(Offer::Rescinded) => Found::Rescinded,
                Some(Offer::Hidden | Offer::Released) | None => Found::Unknown,
            },
        }
    }

    pub(super) fn version(&self) -> Option<Version> {
        match &self.connection {
            Connection::Connected(connected) => Some(connected.version),
            Connection::Disconnected | Connection::Draining(_) => None,
        }
    }

    fn acknowledges_modify(&self) -> bool {
        self.version().is_some_and(|version| version >= Version::V5_3)
    }

    fn answer_open(&mut self, relid: u32, open_id: u32, status: u32) {
        self.count_refusal(status);
        self.post(&OpenChannelResult { relid: relid.into(), open_id: open_id.into(), status: status.into() });
    }

    fn answer_modify(&mut self, relid: u32, status: u32) {
        self.count_refusal(status);
        self.post(&ModifyChannelResponse { relid: relid.into(), status: status.into() });
    }
}
