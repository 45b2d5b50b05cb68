//! The part of a session that concerns single rings: their parts, and when they start and stop.

use std::os::fd::OwnedFd;

use vmq::doorbell::Doorbell;
use vmq::ring::LayoutError;
use zerocopy::IntoBytes;
use zerocopy::little_endian::U32;

use super::vring::{
    Context, DoorbellError, Draft, Kick, PACKED_START, State, Vring, doorbell, ring_addresses,
};
use super::{Rings, Session, SessionError, SetupError};
use crate::ports::vhost_user::features::Features;
use crate::ports::vhost_user::message::{Kind, Reply, Request, VringAddress, VringFd, VringState};
use crate::ports::vhost_user::queue::ActiveRing;

/// Interrupts the guest. Who makes that wait would do so again, with other descriptors and on other connections.
fn interrupt(index: usize, call: &Doorbell, rings: &mut dyn Rings) -> Result<(), SessionError> {
    call.ring();
    if !call.is_broken() {
        return Ok(());
    }
    let error = SessionError::Doorbell { index, source: DoorbellError::Blocks };
    rings.fault(error.report());
    Err(error)
}

impl Session {
    pub(super) fn index(&self, index: u32) -> Result<usize, SessionError> {
        let rings = self.vrings.len();
        match usize::try_from(index) {
            Ok(at) if at < rings => Ok(at),
            _ => Err(SessionError::NoSuchRing { index, rings }),
        }
    }

    pub(super) fn running(&self) -> bool {
        (0..self.vrings.len()).any(|index| self.is_running(index))
    }

    /// Requests that set one ring's parts.
    pub(super) fn vring(
        &mut self,
        request: Request,
        fds: &mut Vec<OwnedFd>,
        rings: &mut dyn Rings,
    ) -> Result<(), SessionError> {
        let kind = request.kind();
        match request {
            Request::SetVringNum(VringState { index, num }) => {
                let index = self.index(index.get())?;
                let value = SessionError::Value { kind, value: num.get().into() };
                let size = u16::try_from(num.get()).map_err(|_| value)?;
                self.draft(index, kind)?.size = Some(size);
            }
            Request::SetVringBase(VringState { index, num }) => {
                let index = self.index(index.get())?;
                self.draft(index, kind)?.base = Some(num.get());
            }
            Request::SetVringAddr(wire) => self.set_addresses(&wire, rings)?,
            Request::SetVringKick(fd) => self.set_kick(fd, fds, rings)?,
            Request::SetVringCall(fd) => self.set_call(fd, fds, rings)?,
            Request::SetVringErr(VringFd { index, polled }) => {
                // Checked and let go: a ring with an error ends the connection, which says it louder.
                let index = self.index(index.into())?;
                doorbell(polled, fds).map_err(|source| SessionError::Doorbell { index, source })?;
            }
            Request::SetVringEnable(VringState { index, num }) => {
                let index = self.index(index.get())?;
                let on = match num.get() {
                    0 => false,
                    1 => true,
                    value => return Err(SessionError::Value { kind, value: value.into() }),
                };
                self.enable(index, on, rings);
            }
            _ => return Err(SessionError::Unsupported(kind)),
        }
        Ok(())
    }

    /// What is known of ring `index`, which must not run.
    fn draft(&mut self, index: usize, kind: Kind) -> Result<&mut Draft, SessionError> {
        match &mut self.vrings[index].state {
            State::Stopped(draft) => Ok(draft),
            State::Started(_) => Err(SessionError::Running { index, kind }),
        }
    }

    fn set_addresses(&mut self, wire: &VringAddress, rings: &mut dyn Rings) -> Result<(), SessionError> {
        let index = self.index(wire.index.get())?;
        let addresses = ring_addresses(wire);
        match &mut self.vrings[index].state {
            State::Stopped(draft) => draft.addresses = Some(addresses),
            // Only the log flag changes under way, but that is the front-end's affair.
            State::Started(setup) => {
                setup.addresses = addresses;
                self.rebuild_one(index, false, rings)?;
            }
        }
        Ok(())
    }

    fn set_kick(
        &mut self,
        fd: VringFd,
        fds: &mut Vec<OwnedFd>,
        rings: &mut dyn Rings,
    ) -> Result<(), SessionError> {
        let index = self.index(fd.index.into())?;
        let doorbell = doorbell(fd.polled, fds).map_err(|source| SessionError::Doorbell { index, source })?;
        let kick = doorbell.map_or(Kick::Poll, |doorbell| Kick::Doorbell(doorbell.into()));
        match &mut self.vrings[index].state {
            State::Stopped(draft) => draft.kick = Some(kick),
            State::Started(setup) => {
                setup.kick = kick;
                self.rebuild_one(index, false, rings)?;
            }
        }
        Ok(())
    }

    fn set_call(
        &mut self,
        fd: VringFd,
        fds: &mut Vec<OwnedFd>,
        rings: &mut dyn Rings,
    ) -> Result<(), SessionError> {
        let index = self.index(fd.index.into())?;
        let call = doorbell(fd.polled, fds).map_err(|source| SessionError::Doorbell { index, source })?;
        let vring = &mut self.vrings[index];
        if let State::Stopped(_) = vring.state {
            vring.call = call;
            return Ok(());
        }
        // The port may have rung the old one just before the swap; the new one must not miss that.
        let again = call.as_ref().and_then(|call| call.try_clone().ok());
        rings.set_call(index, call);
        again.map_or(Ok(()), |call| interrupt(index, &call, rings))
    }

    fn enable(&mut self, index: usize, on: bool, rings: &mut dyn Rings) {
        let vring = &mut self.vrings[index];
        vring.enabled = on;
        if let State::Started(_) = vring.state {
            rings.set_enabled(index, on);
        }
    }

    pub(super) fn enable_all(&mut self, on: bool, rings: &mut dyn Rings) {
        for index in 0..self.vrings.len() {
            self.enable(index, on, rings);
        }
    }

    pub(super) fn get_base(
        &mut self,
        state: VringState,
        rings: &mut dyn Rings,
    ) -> Result<Reply, SessionError> {
        let index = self.index(state.index.get())?;
        let base = self.stop(index, rings)?;
        let answer = VringState { index: state.index, num: U32::new(base) };
        Ok(Reply::new(Kind::GetVringBase as u32, answer.as_bytes()))
    }

    /// Stops ring `index`, if it runs; returns where.
    pub(super) fn stop(&mut self, index: usize, rings: &mut dyn Rings) -> Result<u32, SessionError> {
        let vring = &mut self.vrings[index];
        let draft = match &mut vring.state {
            State::Stopped(draft) => {
                (draft.kick, draft.parked) = (None, false);
                return Ok(draft.base.unwrap_or(if self.negotiated.packed() { PACKED_START } else { 0 }));
            }
            State::Started(setup) => setup.clone(),
        };
        let ring = rings.remove(index);
        let base = ring.as_ref().map_or(0, ActiveRing::base);
        vring.state = State::Stopped(draft.stopped(base));
        match ring {
            Some(ring) => vring.call = ring.call,
            None => return Err(SessionError::RingGone(index)),
        }
        Ok(base)
    }

    /// Starts every ring that is complete.
    pub(super) fn start_complete(&mut self, rings: &mut dyn Rings) -> Result<(), SessionError> {
        if !self.features_known || self.table.is_empty() {
            return Ok(());
        }
        (0..self.vrings.len()).try_for_each(|index| self.start(index, rings))
    }

    /// Starts ring `index`, if it is complete. One that waits for its memory goes on waiting if that is not there.
    fn start(&mut self, index: usize, rings: &mut dyn Rings) -> Result<(), SessionError> {
        let vring = &mut self.vrings[index];
        let State::Stopped(draft) = &vring.state else { return Ok(()) };
        let Some(setup) = draft.complete() else { return Ok(()) };
        let context = Context {
            index,
            memory: self.table.memory(),
            negotiated: &self.negotiated,
            inflight: self.inflight.as_ref(),
        };
        let mut ring = match setup.activate(&context, draft.base) {
            Ok(ring) => ring,
            Err(SetupError::Layout(LayoutError::Address(_))) if draft.parked => return Ok(()),
            Err(source) => return Err(SessionError::Setup { index, source }),
        };
        ring.call = vring.call.take();
        // Whoever had the ring before may have used buffers and not told the guest.
        if let Some(call) = &ring.call {
            interrupt(index, call, rings)?;
        }
        vring.state = State::Started(setup);
        let always = !self.negotiated.features.contains(Features::PROTOCOL_FEATURES);
        rings.install(index, ring, always || vring.enabled);
        Ok(())
    }

    /// Sets all running rings up again, on changed memory. Front-ends that reshape a region remove it first: a ring that
    /// lies in it stops until it is there again.
    pub(super) fn rebuild(&mut self, rings: &mut dyn Rings) -> Result<(), SessionError> {
        (0..self.vrings.len()).try_for_each(|index| self.rebuild_one(index, true, rings))
    }

    /// Sets a running ring up again. It may wait for its memory if that `may_come`.
    fn rebuild_one(
        &mut self,
        index: usize,
        may_come: bool,
        rings: &mut dyn Rings,
    ) -> Result<(), SessionError> {
        let State::Started(setup) = &self.vrings[index].state else { return Ok(()) };
        let kick = setup.kick.clone();
        self.stop(index, rings)?;
        if let State::Stopped(draft) = &mut self.vrings[index].state {
            (draft.kick, draft.parked) = (Some(kick), may_come);
        }
        self.start(index, rings)
    }

    /// What rings wait for that ran until their memory was taken away, in words.
    pub fn waits_for(&self) -> Option<String> {
        let parked = |vring: &Vring| matches!(&vring.state, State::Stopped(draft) if draft.parked);
        let waiting = self.vrings.iter().enumerate().filter(|(_, vring)| parked(vring));
        let rings: Vec<_> = waiting.map(|(index, _)| index.to_string()).collect();
        (!rings.is_empty()).then(|| format!("guest memory at the addresses of ring {}", rings.join(", ")))
    }
}
