//! One vhost-user connection, sans-io: requests in, replies out, rings handed to the port.
//!
//! A front-end configures each ring part by part, in an order of its own, and changes memory, log and doorbells while
//! rings run. So each message only notes what it says; afterwards every ring that is complete and not in use is
//! started, and rings in use are taken back and set up again when what they stand on changes. Whatever comes, in
//! whatever order, the worst outcome is a [`SessionError`]: the connection ends and the port gives its rings back.
//!
//! Traps that clients set: DPDK sends `SET_VRING_CALL` before features and memory; QEMU repeats `SET_FEATURES` for
//! each queue pair while the first ones run, and swaps call descriptors while they run.

mod error;
mod rings;
mod vring;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use vmq::Mac;
use vmq::doorbell::Doorbell;
use vmq::memory::{DirtyLog, Share};
use zerocopy::IntoBytes;
use zerocopy::little_endian::U64;

use super::closer::Closer;
use super::features::{Features, Negotiated, Protocol};
use super::memory_table::{MAX_SLOTS, MemoryTable, TableError};
use super::message::{
    ConfigArea, Incoming, InflightArea, Kind, LogArea, MAX_CONFIG, MessageError, Reply, Request,
};
use super::queue::ActiveRing;
use crate::spec::PortSpec;
use vring::{InflightRecord, State, Vring};

pub use error::SessionError;
pub use vring::{DoorbellError, InflightError, SetupError};

/// Bytes of guest memory that are unmapped in 3 ms.
const LARGE: u64 = 64 << 20;

/// What a port offers its front-end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionConfig {
    /// Queue pairs, 1 to 64.
    pub queues: u16,
    /// Largest IP packet in bytes.
    pub mtu: u16,
    /// Offer checksum and segmentation offloads.
    pub offloads: bool,
    /// The guest's address, if the operator gave one.
    pub mac: Option<Mac>,
    /// Offer the device configuration (`GET_CONFIG`); QEMU's network front-end warns about it, so rarely wanted.
    pub config_space: bool,
}

impl Default for SessionConfig {
    fn default() -> Self {
        Self { queues: 1, mtu: PortSpec::MTU, offloads: true, mac: None, config_space: false }
    }
}

impl SessionConfig {
    /// Rings: two for each queue pair, the guest's receive ring first.
    pub fn rings(&self) -> usize {
        2 * usize::from(self.queues)
    }
}

/// The port's side: takes rings into use and gives them back. Rings with an even index are guest receive queues,
/// with an odd one guest transmit queues.
pub trait Rings {
    /// A ring is ready. The port looks at it once even if no doorbell rings: the guest may have rung before. While it
    /// is not `enabled`, nothing is put into a receive ring, and what a transmit ring holds is discarded.
    fn install(&mut self, index: usize, ring: ActiveRing, enabled: bool);

    /// Gives ring `index` back. When this returns, no thread touches it any more. `None` if the port does not have it.
    fn remove(&mut self, index: usize) -> Option<ActiveRing>;

    /// Enables or disables an installed ring.
    fn set_enabled(&mut self, index: usize, enabled: bool);

    /// Replaces an installed ring's interrupt.
    fn set_call(&mut self, index: usize, call: Option<Doorbell>);

    /// The guest chose its features. Rings that are installed later have them.
    fn negotiated(&mut self, negotiated: &Negotiated);

    /// The front-end is not to be served any more, nor is its successor, until the operator says so.
    fn fault(&mut self, reason: String) {
        let _ = reason;
    }

    /// The front-end asks to tell the network where `mac` is now, after a migration.
    fn announce(&mut self, mac: Mac) {
        let _ = mac;
    }
}

/// The state of one connection.
#[derive(Debug)]
pub struct Session {
    config: SessionConfig,
    offered: Negotiated,
    negotiated: Negotiated,
    /// `SET_FEATURES` came: rings may start.
    features_known: bool,
    table: MemoryTable,
    log: Option<DirtyLog>,
    inflight: Option<InflightRecord>,
    vrings: Vec<Vring>,
    status: u8,
    closer: Closer,
}

type Outcome = Result<Option<Reply>, SessionError>;

impl Session {
    /// A fresh connection. What its client shows is mapped as part of `share`.
    pub fn new(config: SessionConfig, share: Option<Arc<Share>>) -> Self {
        let offered =
            Negotiated { features: Features::offered(&config), protocol: Protocol::offered(&config) };
        let vrings = (0..config.rings()).map(|_| Vring::default()).collect();
        Self {
            config,
            offered,
            negotiated: Negotiated::default(),
            features_known: false,
            table: MemoryTable::new(share),
            log: None,
            inflight: None,
            vrings,
            status: 0,
            closer: Closer::in_place(),
        }
    }

    /// Has `closer` let go of what the client sent.
    pub(super) fn close_with(&mut self, closer: Closer) {
        self.closer = closer;
    }

    /// What was agreed on so far.
    pub fn negotiated(&self) -> &Negotiated {
        &self.negotiated
    }

    /// True while the port has ring `index`.
    pub fn is_running(&self, index: usize) -> bool {
        self.vrings.get(index).is_some_and(|vring| matches!(vring.state, State::Started(_)))
    }

    /// Takes one message; the answer is to be sent, if there is one. Descriptors are closed unless they are put to
    /// use.
    ///
    /// # Errors
    /// The session is over: [`Session::close`] it and cut the connection.
    pub fn handle(&mut self, message: Incoming, rings: &mut dyn Rings) -> Outcome {
        let Incoming { header, payload, mut fds } = message;
        let number = header.request.get();
        let acknowledge = header.needs_reply() && self.negotiated.protocol.contains(Protocol::REPLY_ACK);
        let outcome = self.dispatch(number, &payload, &mut fds, rings);
        // Memory that was refused may be its file's last reference. What was taken is mapped, and costs nothing to close.
        if outcome.is_err() && !fds.is_empty() {
            self.closer.dispose_if_idle(fds);
        }
        match outcome {
            Ok(None) if acknowledge => Ok(Some(Reply::number(number, 0))),
            Err(error) if acknowledge && error.is_refusal() => {
                tracing::debug!("vhost-user request refused: {}", error.report());
                Ok(Some(Reply::number(number, 1)))
            }
            outcome => outcome,
        }
    }

    /// Ends the session: the port gives all rings back. The guest's memory goes when the session is dropped.
    pub fn close(&mut self, rings: &mut dyn Rings) {
        for index in 0..self.vrings.len() {
            let _ = self.stop(index, rings);
        }
        self.vrings.clear();
    }

    fn dispatch(
        &mut self,
        number: u32,
        payload: &[u8],
        fds: &mut Vec<OwnedFd>,
        rings: &mut dyn Rings,
    ) -> Outcome {
        let kind = Kind::from_number(number).ok_or(MessageError::Unknown(number))?;
        if !kind.fds().contains(&fds.len()) {
            return Err(MessageError::Descriptors { kind, count: fds.len() }.into());
        }
        let request = Request::parse(kind, payload)?;
        if !self.negotiated.protocol.contains(required(kind)) {
            return Err(SessionError::NotNegotiated(kind));
        }
        let reply = match request {
            Request::GetInflightFd(area) => Some(self.get_inflight(area, payload.len())?),
            Request::Foreign(kind) => return Err(SessionError::Unsupported(kind)),
            _ if is_query(kind) => Some(self.query(&request, rings)?),
            Request::SetVringNum(_)
            | Request::SetVringAddr(_)
            | Request::SetVringBase(_)
            | Request::SetVringKick(_)
            | Request::SetVringCall(_)
            | Request::SetVringErr(_)
            | Request::SetVringEnable(_) => {
                self.vring(request, fds, rings)?;
                None
            }
            _ => self.device(request, fds, rings)?,
        };
        self.start_complete(rings)?;
        Ok(reply)
    }

    /// Requests that are answered with a number, a base or configuration bytes.
    fn query(&mut self, request: &Request, rings: &mut dyn Rings) -> Result<Reply, SessionError> {
        let number = match *request {
            Request::GetFeatures => self.offered.features.bits(),
            Request::GetProtocolFeatures => self.offered.protocol.bits(),
            Request::GetQueueNum => u64::from(self.config.queues),
            Request::GetMaxMemSlots => MAX_SLOTS as u64,
            Request::GetStatus => u64::from(self.status),
            Request::GetVringBase(state) => return self.get_base(state, rings),
            Request::GetConfig(area) => return Ok(self.get_config(&area)),
            _ => return Err(SessionError::Unsupported(request.kind())),
        };
        Ok(Reply::number(request.kind() as u32, number))
    }

    /// Requests that concern the whole device.
    fn device(&mut self, request: Request, fds: &[OwnedFd], rings: &mut dyn Rings) -> Outcome {
        let kind = request.kind();
        match request {
            Request::SetFeatures(bits) => self.set_features(Features::from_bits_retain(bits), rings)?,
            Request::SetProtocolFeatures(bits) => self.set_protocol(Protocol::from_bits_retain(bits))?,
            Request::ResetOwner => self.enable_all(false, rings),
            Request::ResetDevice => self.reset(rings)?,
            Request::SetMemTable(regions) => self.remap(rings, |table| table.replace(&regions, fds))?,
            Request::AddMemReg(region) => {
                let fd = one(kind, fds)?;
                self.remap(rings, |table| table.add(&region, fd))?;
            }
            Request::RemMemReg(region) => self.remap(rings, |table| table.remove(&region))?,
            Request::SetLogBase(area) => {
                self.set_log(&area, one(kind, fds)?, rings)?;
                return Ok(Some(Reply::number(kind as u32, 0)));
            }
            Request::SetInflightFd(area) => {
                let (max, packed) = (self.config.rings(), self.negotiated.packed());
                self.inflight = Some(InflightRecord::map(&area, one(kind, fds)?, &self.table, max, packed)?);
            }
            Request::NetSetMtu(asked) => {
                let limit = self.config.mtu;
                if asked < u64::from(*PortSpec::MTU_RANGE.start()) || asked > u64::from(limit) {
                    return Err(SessionError::Mtu { asked, limit });
                }
            }
            Request::SendRarp(mac) => rings.announce(mac),
            Request::SetStatus(status) => self.set_status(status, rings)?,
            // Nothing depends on it: the owner is whoever is connected.
            Request::SetOwner => {}
            // Nobody waits for it.
            Request::SetLogFd => fds
                .iter()
                .try_for_each(|fd| Doorbell::check(fd.as_fd()))
                .map_err(SessionError::LogDoorbell)?,
            _ => return Err(SessionError::Unsupported(kind)),
        }
        Ok(None)
    }

    /// Changes the guest's memory under its rings.
    fn remap(
        &mut self,
        rings: &mut dyn Rings,
        change: impl FnOnce(&mut MemoryTable) -> Result<(), TableError>,
    ) -> Result<(), SessionError> {
        let before = Arc::clone(self.table.memory());
        change(&mut self.table)?;
        let rebuilt = self.rebuild(rings);
        if self.table.bytes_gone(&before) >= LARGE {
            self.closer.dispose_if_idle(before);
        }
        rebuilt
    }

    fn set_features(&mut self, features: Features, rings: &mut dyn Rings) -> Result<(), SessionError> {
        let unoffered = features.difference(self.offered.features);
        if !unoffered.is_empty() {
            return Err(SessionError::Unoffered(unoffered.names().join(", ")));
        }
        let changed = (features ^ self.negotiated.features) - Features::LOG_ALL;
        if !changed.is_empty() && self.running() {
            return Err(SessionError::FeaturesWhileRunning(changed.names().join(", ")));
        }
        self.negotiated.features = features;
        self.features_known = true;
        rings.negotiated(&self.negotiated);
        self.apply_log(rings)
    }

    fn set_protocol(&mut self, protocol: Protocol) -> Result<(), SessionError> {
        let unoffered = protocol.difference(self.offered.protocol);
        if !unoffered.is_empty() {
            return Err(SessionError::Unoffered(unoffered.names().join(", ")));
        }
        self.negotiated.protocol = protocol;
        Ok(())
    }

    fn set_log(&mut self, area: &LogArea, fd: &OwnedFd, rings: &mut dyn Rings) -> Result<(), SessionError> {
        self.log = Some(self.table.map_log(area, fd)?);
        self.apply_log(rings)
    }

    /// Logs writes if, and only if, there is a log and the front-end wants it used.
    fn apply_log(&mut self, rings: &mut dyn Rings) -> Result<(), SessionError> {
        let wanted = self.negotiated.features.contains(Features::LOG_ALL);
        let log = if wanted { self.log.clone() } else { None };
        if log.is_none() && self.table.memory().log().is_none() {
            return Ok(());
        }
        self.table.set_log(log)?;
        self.rebuild(rings)
    }

    fn set_status(&mut self, status: u64, rings: &mut dyn Rings) -> Result<(), SessionError> {
        let kind = Kind::SetStatus;
        self.status = u8::try_from(status).map_err(|_| SessionError::Value { kind, value: status })?;
        // A device that was reset has no rings and nothing in flight (VIRTIO 1.2, 2.4).
        if self.status == 0 {
            self.inflight = None;
            for index in 0..self.vrings.len() {
                self.stop(index, rings)?;
            }
        }
        Ok(())
    }

    /// Back to the state after the hand-shake. Memory stays: front-ends do not show it again.
    fn reset(&mut self, rings: &mut dyn Rings) -> Result<(), SessionError> {
        self.set_status(0, rings)?;
        self.vrings.iter_mut().for_each(|vring| *vring = Vring::default());
        self.negotiated.features = Features::empty();
        self.features_known = false;
        self.log = None;
        self.apply_log(rings)
    }

    fn get_inflight(&mut self, area: InflightArea, len: usize) -> Result<Reply, SessionError> {
        let (size, fd) = InflightRecord::create(&area, self.config.rings(), self.negotiated.packed())?;
        let answer = InflightArea { size: U64::new(size), offset: U64::ZERO, ..area };
        // As long as the question: the two sides must agree on the C structure's padding.
        let bytes = answer.as_bytes().get(..len).unwrap_or_default();
        Ok(Reply { fd: Some(fd), ..Reply::new(Kind::GetInflightFd as u32, bytes) })
    }

    fn get_config(&self, area: &ConfigArea) -> Reply {
        let (offset, size) = (area.offset.get() as usize, area.size.get() as usize);
        let space = self.config_space();
        let number = Kind::GetConfig as u32;
        match offset.checked_add(size).and_then(|end| space.get(offset..end)) {
            Some(bytes) => Reply::new(number, &[area.as_bytes(), bytes].concat()),
            // An empty payload is an error.
            None => Reply::new(number, &[]),
        }
    }

    /// `struct virtio_net_config` (VIRTIO 1.2, 5.1.4): address, status (link up), queue pairs, MTU, unknown speed.
    fn config_space(&self) -> [u8; MAX_CONFIG] {
        let mut space = [0; MAX_CONFIG];
        let mac = self.config.mac.unwrap_or(Mac::ZERO).0;
        let [queues, mtu] = [self.config.queues, self.config.mtu].map(u16::to_le_bytes);
        let known = [&mac[..], &[1, 0], &queues, &mtu, &[0xff; 4], &[0xff]].concat();
        space[..known.len()].copy_from_slice(&known);
        space
    }
}

fn one(kind: Kind, fds: &[OwnedFd]) -> Result<&OwnedFd, SessionError> {
    fds.first().ok_or(MessageError::Descriptors { kind, count: 0 }.into())
}

fn is_query(kind: Kind) -> bool {
    matches!(
        kind,
        Kind::GetFeatures
            | Kind::GetProtocolFeatures
            | Kind::GetQueueNum
            | Kind::GetMaxMemSlots
            | Kind::GetStatus
            | Kind::GetVringBase
            | Kind::GetConfig
    )
}

/// The protocol feature that makes a request legal.
fn required(kind: Kind) -> Protocol {
    match kind {
        Kind::SetLogBase => Protocol::LOG_SHMFD,
        Kind::SendRarp => Protocol::RARP,
        Kind::NetSetMtu => Protocol::NET_MTU,
        Kind::GetConfig | Kind::SetConfig => Protocol::CONFIG,
        Kind::GetInflightFd | Kind::SetInflightFd => Protocol::INFLIGHT_SHMFD,
        Kind::ResetDevice => Protocol::RESET_DEVICE,
        Kind::GetMaxMemSlots | Kind::AddMemReg | Kind::RemMemReg => Protocol::CONFIGURE_MEM_SLOTS,
        Kind::SetStatus | Kind::GetStatus => Protocol::STATUS,
        _ => Protocol::empty(),
    }
}
