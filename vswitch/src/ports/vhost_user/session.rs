//! One vhost-user connection, sans-io: requests in, replies out, rings handed to the port.
//!
//! A front-end configures each ring part by part, in an order of its own, and changes memory, log and doorbells while
//! rings run. So each message only notes what it says; afterwards every ring that is complete and not in use is
//! started, and rings in use are taken back and set up again when what they stand on changes. Whatever comes, in
//! whatever order, the worst outcome is a [`SessionError`]: the connection ends and the port gives its rings back.
//!
//! Traps that clients set: DPDK sends `SET_VRING_CALL` before features and memory; QEMU repeats `SET_FEATURES` for
//! each queue pair while the first ones run, and swaps call descriptors while they run.

use std::fmt::Write;
use std::os::fd::OwnedFd;

use vmq::Mac;
use vmq::doorbell::Doorbell;
use vmq::memory::DirtyLog;
use zerocopy::IntoBytes;
use zerocopy::little_endian::{U32, U64};

use super::features::{Features, Negotiated, Protocol};
use super::memory_table::{MAX_SLOTS, MemoryTable, TableError, map_log};
use super::message::{
    ConfigArea, Incoming, InflightArea, Kind, LogArea, MAX_CONFIG, MessageError, Reply, Request, VringAddress,
    VringFd, VringState,
};
use super::queue::ActiveRing;
use super::vring::{
    Context, DoorbellError, InflightError, InflightRecord, Kick, SetupError, State, Vring, doorbell, ring_addresses,
};
use crate::spec::PortSpec;

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

    /// The front-end asks to tell the network where `mac` is now, after a migration.
    fn announce(&mut self, mac: Mac) {
        let _ = mac;
    }
}

/// Why a session ends, or a request is refused.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The message itself is wrong.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// A request that this back-end does not serve.
    #[error("{} is not supported", .0.name())]
    Unsupported(Kind),
    /// A request that needs a protocol feature which was not acknowledged.
    #[error("{} without its protocol feature", .0.name())]
    NotNegotiated(Kind),
    /// Features were acknowledged that were not offered.
    #[error("features acknowledged that were not offered: {0}")]
    Unoffered(String),
    /// Features changed under running rings.
    #[error("features changed while rings run: {0}")]
    FeaturesWhileRunning(String),
    /// A ring the port does not have.
    #[error("ring {index} of a port with {rings}")]
    NoSuchRing {
        /// Its index.
        index: u32,
        /// Rings of the port.
        rings: usize,
    },
    /// A running ring cannot be changed that way.
    #[error("{} for ring {index}, which runs", kind.name())]
    Running {
        /// The ring.
        index: usize,
        /// The request.
        kind: Kind,
    },
    /// A number that means nothing for this request.
    #[error("{} with value {value:#x}", kind.name())]
    Value {
        /// The request.
        kind: Kind,
        /// The number.
        value: u64,
    },
    /// A doorbell is none.
    #[error("doorbell of ring {index}")]
    Doorbell {
        /// The ring.
        index: usize,
        /// Why.
        #[source]
        source: DoorbellError,
    },
    /// The memory table makes no sense.
    #[error("guest memory")]
    Memory(#[from] TableError),
    /// The in-flight record makes no sense.
    #[error("in-flight record")]
    Inflight(#[from] InflightError),
    /// A ring cannot be set up.
    #[error("ring {index} cannot be set up")]
    Setup {
        /// The ring.
        index: usize,
        /// Why.
        #[source]
        source: SetupError,
    },
    /// The port gave up a ring of its own accord.
    #[error("ring {0} was stopped by the switch")]
    RingGone(usize),
    /// A larger MTU than the port's.
    #[error("mtu of {asked}, the port has {limit}")]
    Mtu {
        /// What the front-end wants.
        asked: u64,
        /// What the port has.
        limit: u16,
    },
}

impl SessionError {
    /// The error with all its causes, in one line.
    pub fn report(&self) -> String {
        let mut text = self.to_string();
        let mut source = std::error::Error::source(self);
        while let Some(cause) = source {
            let _ = write!(text, ": {cause}");
            source = cause.source();
        }
        text
    }

    /// True if the session can go on once the front-end was told.
    fn is_refusal(&self) -> bool {
        matches!(
            self,
            Self::Unsupported(_) | Self::NotNegotiated(_) | Self::Mtu { .. } | Self::Message(MessageError::Unknown(_))
        )
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
}

type Outcome = Result<Option<Reply>, SessionError>;

impl Session {
    /// A fresh connection.
    pub fn new(config: SessionConfig) -> Self {
        let offered =
            Negotiated { features: Features::offered(&config), protocol: Protocol::offered(&config) };
        let vrings = (0..config.rings()).map(|_| Vring::default()).collect();
        Self {
            config,
            offered,
            negotiated: Negotiated::default(),
            features_known: false,
            table: MemoryTable::default(),
            log: None,
            inflight: None,
            vrings,
            status: 0,
        }
    }

    /// What was agreed on so far.
    pub fn negotiated(&self) -> &Negotiated {
        &self.negotiated
    }

    /// Takes one message; the answer is to be sent, if there is one. Descriptors are closed unless they are put to
    /// use.
    ///
    /// # Errors
    /// The session is over: [`Session::close`] it and cut the connection.
    pub fn handle(&mut self, message: Incoming, rings: &mut dyn Rings) -> Outcome {
        let number = message.header.request.get();
        let acknowledge = message.header.needs_reply() && self.negotiated.protocol.contains(Protocol::REPLY_ACK);
        match self.dispatch(message, rings) {
            Ok(None) if acknowledge => Ok(Some(Reply::number(number, 0))),
            Err(error) if acknowledge && error.is_refusal() => {
                tracing::info!("vhost-user request refused: {}", error.report());
                Ok(Some(Reply::number(number, 1)))
            }
            outcome => outcome,
        }
    }

    /// Ends the session: the port gives all rings back.
    pub fn close(&mut self, rings: &mut dyn Rings) {
        for index in 0..self.vrings.len() {
            let _ = self.stop(index, rings);
        }
        self.vrings.clear();
        self.table = MemoryTable::default();
    }

    fn dispatch(&mut self, message: Incoming, rings: &mut dyn Rings) -> Outcome {
        let Incoming { header, payload, fds } = message;
        let number = header.request.get();
        let kind = Kind::from_number(number).ok_or(MessageError::Unknown(number))?;
        if !kind.fds().contains(&fds.len()) {
            return Err(MessageError::Descriptors { kind, count: fds.len() }.into());
        }
        let request = Request::parse(kind, &payload)?;
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
            _ => self.device(request, &fds, rings)?,
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
            Request::SetMemTable(regions) => {
                self.table.replace(&regions, fds)?;
                self.rebuild(rings)?;
            }
            Request::AddMemReg(region) => {
                self.table.add(&region, one(kind, fds)?)?;
                self.rebuild(rings)?;
            }
            Request::RemMemReg(region) => {
                self.table.remove(&region)?;
                self.rebuild(rings)?;
            }
            Request::SetLogBase(area) => {
                self.set_log(&area, one(kind, fds)?, rings)?;
                return Ok(Some(Reply::number(kind as u32, 0)));
            }
            Request::SetInflightFd(area) => {
                let (max, packed) = (self.config.rings(), self.negotiated.packed());
                self.inflight = Some(InflightRecord::map(&area, one(kind, fds)?, max, packed)?);
            }
            Request::NetSetMtu(asked) => {
                let limit = self.config.mtu;
                if asked < u64::from(PortSpec::MIN_MTU) || asked > u64::from(limit) {
                    return Err(SessionError::Mtu { asked, limit });
                }
            }
            Request::SendRarp(mac) => rings.announce(mac),
            Request::SetStatus(status) => self.set_status(status, rings)?,
            // Nothing depends on them: the owner is whoever is connected, and nobody waits for the log's eventfd.
            Request::SetOwner | Request::SetLogFd => {}
            _ => return Err(SessionError::Unsupported(kind)),
        }
        Ok(None)
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
        self.log = Some(map_log(area, fd)?);
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

/// What concerns rings.
impl Session {
    fn index(&self, index: u32) -> Result<usize, SessionError> {
        let rings = self.vrings.len();
        match usize::try_from(index) {
            Ok(at) if at < rings => Ok(at),
            _ => Err(SessionError::NoSuchRing { index, rings }),
        }
    }

    fn running(&self) -> bool {
        self.vrings.iter().any(|vring| matches!(vring.state, State::Started(_)))
    }

    /// Requests that set one ring's parts.
    fn vring(&mut self, request: Request, fds: Vec<OwnedFd>, rings: &mut dyn Rings) -> Result<(), SessionError> {
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
    fn draft(&mut self, index: usize, kind: Kind) -> Result<&mut super::vring::Draft, SessionError> {
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
                self.rebuild_one(index, rings)?;
            }
        }
        Ok(())
    }

    fn set_kick(&mut self, fd: VringFd, fds: Vec<OwnedFd>, rings: &mut dyn Rings) -> Result<(), SessionError> {
        let index = self.index(fd.index.into())?;
        let doorbell = doorbell(fd.polled, fds).map_err(|source| SessionError::Doorbell { index, source })?;
        let kick = doorbell.map_or(Kick::Poll, |doorbell| Kick::Doorbell(doorbell.into()));
        match &mut self.vrings[index].state {
            State::Stopped(draft) => draft.kick = Some(kick),
            State::Started(setup) => {
                setup.kick = kick;
                self.rebuild_one(index, rings)?;
            }
        }
        Ok(())
    }

    fn set_call(&mut self, fd: VringFd, fds: Vec<OwnedFd>, rings: &mut dyn Rings) -> Result<(), SessionError> {
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
        if let Some(call) = again {
            call.ring();
        }
        Ok(())
    }

    fn enable(&mut self, index: usize, on: bool, rings: &mut dyn Rings) {
        let vring = &mut self.vrings[index];
        vring.enabled = on;
        if let State::Started(_) = vring.state {
            rings.set_enabled(index, on);
        }
    }

    fn enable_all(&mut self, on: bool, rings: &mut dyn Rings) {
        for index in 0..self.vrings.len() {
            self.enable(index, on, rings);
        }
    }

    fn get_base(&mut self, state: VringState, rings: &mut dyn Rings) -> Result<Reply, SessionError> {
        let index = self.index(state.index.get())?;
        let base = self.stop(index, rings)?;
        let answer = VringState { index: state.index, num: U32::new(base) };
        Ok(Reply::new(Kind::GetVringBase as u32, answer.as_bytes()))
    }

    /// Stops ring `index`, if it runs; returns where.
    fn stop(&mut self, index: usize, rings: &mut dyn Rings) -> Result<u32, SessionError> {
        let vring = &mut self.vrings[index];
        let draft = match &mut vring.state {
            State::Stopped(draft) => {
                draft.kick = None;
                return Ok(draft.base.unwrap_or(0));
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
    fn start_complete(&mut self, rings: &mut dyn Rings) -> Result<(), SessionError> {
        if !self.features_known || self.table.is_empty() {
            return Ok(());
        }
        for index in 0..self.vrings.len() {
            let State::Stopped(draft) = &self.vrings[index].state else { continue };
            let Some((setup, base)) = draft.complete() else { continue };
            let call = self.vrings[index].call.take();
            self.start(index, setup, base, call, rings)?;
        }
        Ok(())
    }

    fn start(
        &mut self,
        index: usize,
        setup: super::vring::Setup,
        base: Option<u32>,
        call: Option<Doorbell>,
        rings: &mut dyn Rings,
    ) -> Result<(), SessionError> {
        let context = Context {
            index,
            memory: self.table.memory(),
            negotiated: &self.negotiated,
            inflight: self.inflight.as_ref(),
        };
        let ring = setup.activate(&context, base, call).map_err(|source| SessionError::Setup { index, source })?;
        // Whoever had the ring before may have used buffers and not told the guest.
        if let Some(call) = &ring.call {
            call.ring();
        }
        let vring = &mut self.vrings[index];
        vring.state = State::Started(setup);
        let always = !self.negotiated.features.contains(Features::PROTOCOL_FEATURES);
        rings.install(index, ring, always || vring.enabled);
        Ok(())
    }

    /// Sets all running rings up again, on changed memory.
    fn rebuild(&mut self, rings: &mut dyn Rings) -> Result<(), SessionError> {
        (0..self.vrings.len()).try_for_each(|index| self.rebuild_one(index, rings))
    }

    fn rebuild_one(&mut self, index: usize, rings: &mut dyn Rings) -> Result<(), SessionError> {
        let State::Started(setup) = &self.vrings[index].state else { return Ok(()) };
        let setup = setup.clone();
        let base = self.stop(index, rings)?;
        let call = self.vrings[index].call.take();
        self.start(index, setup, Some(base), call, rings)
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
