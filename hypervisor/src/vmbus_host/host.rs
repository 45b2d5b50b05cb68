//! The thread: takes what guest, switch and worker say, and carries out the root's actions.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use vmbus::channel::{Interrupt, InterruptTarget, OpenChannel};
use vmbus::guid::{Guid, interface};
use vmbus::handover::{FromVmm, MemoryRegion};
use vmbus::pages::Pages;
use vmbus::protocol::Version;
use vmbus::root::replay::Item;
use vmbus::root::{Action, ChannelKey, DeviceId, GpadlId, OfferSpec, Root, RootConfig};

use super::inbox::{INBOX, Inbox, Message};
use super::nics::Device;
use super::switch::Link;
use super::wires::Wires;
use super::{Ask, OnFault, Report};
use crate::control::{Nic, NicKind};
use crate::memory::Memory;
use crate::services::pump::Pump;
use crate::synic::Posted;

/// Messages to the guest that wait while more of its own are taken in.
const OUTBOX: usize = 256;

/// First and longest time between looks at a message slot that the guest has not emptied.
const LOOK_AGAIN: (Duration, Duration) = (Duration::from_micros(200), Duration::from_millis(20));

/// A switch that has not let go of the guest's memory after this time is asked to end, and after as much again cut off.
const LET_GO: Duration = Duration::from_millis(if cfg!(test) { 1500 } else { 5000 });

/// An adapter that the switch does not get quiet in this time is taken from the guest as it is.
const QUIET: Duration = Duration::from_secs(4);

/// Least time between looks at controllers that changed: each may have the switch change all channels of a processor.
const RETARGET: Duration = Duration::from_millis(10);

/// An integration service's device.
#[derive(Debug)]
struct Service {
    instance: Guid,
    gpadls: BTreeMap<GpadlId, Pages>,
    interrupt: Option<Interrupt>,
}

/// How far the switch has come that is to let go of the guest's memory, and until when it has time for that.
#[derive(Debug, Clone, Copy)]
pub(super) enum Draining {
    /// It was told to.
    Told(Instant),
    /// It did not in time, and was asked to end the connection.
    HungUp(Instant),
}

impl Draining {
    fn until(self) -> Instant {
        match self {
            Self::Told(until) | Self::HungUp(until) => until,
        }
    }
}

/// Everything that VMBus of one guest consists of.
pub(super) struct Host {
    pub(super) root: Root,
    pub(super) wires: Wires,
    pub(super) nics: BTreeMap<DeviceId, Device>,
    pub(super) switch: Option<Link>,
    memory: Arc<Memory>,
    pump: Arc<Pump>,
    services: BTreeMap<DeviceId, Service>,
    inbox: Arc<Inbox>,
    outbox: VecDeque<(u32, Vec<u8>)>,
    wait: Duration,
    /// Processors whose controllers changed, and when they may be looked at.
    changed: BTreeSet<u32>,
    retarget: Instant,
    /// The guest unloads or was reset.
    pub(super) draining: Option<Draining>,
    detached: Vec<Sender<()>>,
    pub(super) on_fault: OnFault,
}

impl Host {
    pub fn new(
        memory: Arc<Memory>,
        vcpus: u32,
        pump: Arc<Pump>,
        inbox: Arc<Inbox>,
        on_fault: OnFault,
    ) -> Self {
        let mut host = Self {
            root: Root::new(RootConfig::new(Version::V5_3, vcpus)),
            wires: Wires::default(),
            nics: BTreeMap::new(),
            switch: None,
            memory,
            pump,
            services: BTreeMap::new(),
            inbox,
            outbox: VecDeque::new(),
            wait: LOOK_AGAIN.0,
            changed: BTreeSet::new(),
            retarget: Instant::now(),
            draining: None,
            detached: Vec::new(),
            on_fault,
        };
        for (interface, instance) in host.pump.devices().to_vec() {
            let spec = OfferSpec { interface, instance, subchannels_max: 0, pipe: true };
            match host.root.offer(spec) {
                Ok(id) => {
                    let service = Service { instance, gpadls: BTreeMap::new(), interrupt: None };
                    host.services.insert(id, service);
                }
                Err(error) => tracing::error!(%error, "integration service cannot be offered"),
            }
        }
        host
    }

    pub fn run(mut self, asks: &Receiver<Ask>) {
        loop {
            let ask = match self.timeout() {
                None => asks.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(timeout) => asks.recv_timeout(timeout),
            };
            match ask {
                Ok(Ask::End) | Err(RecvTimeoutError::Disconnected) => break,
                Ok(ask) => self.take(ask),
                Err(RecvTimeoutError::Timeout) => {}
            }
            self.work();
        }
        self.wires.detach();
    }

    fn timeout(&self) -> Option<Duration> {
        let left = |until: Instant| until.saturating_duration_since(Instant::now());
        let drained = self.draining.map(|draining| left(draining.until()));
        let posted = (!self.outbox.is_empty()).then_some(self.wait);
        let changed = (!self.changed.is_empty()).then(|| left(self.retarget));
        let more = (self.listens() && !self.inbox.is_empty()).then_some(Duration::ZERO);
        let quiet = self.nics.values().filter_map(|device| device.quiet_by).min().map(left);
        [drained, posted, changed, more, quiet].into_iter().flatten().min()
    }

    /// Messages of the guest are taken in.
    fn listens(&self) -> bool {
        self.outbox.len() < OUTBOX && self.draining.is_none()
    }

    fn take(&mut self, ask: Ask) {
        match ask {
            Ask::Guest => self.inbox.heed(),
            Ask::End => {}
            Ask::Attach(machine) => self.wires.attach(machine),
            Ask::Detach(done) => {
                self.inbox.clear();
                self.changed.clear();
                self.root.reset();
                self.detached.push(done);
            }
            Ask::AddNic(nic, done) => {
                let _ = done.send(self.add_nic(nic));
            }
            Ask::RemoveNic(name, done) => {
                let _ = done.send(self.remove_nic(&name));
            }
            Ask::Report(to) => {
                let _ = to.send(self.report());
            }
            Ask::SwitchCame(link) => self.greet(link),
            Ask::SwitchSaid(number, said, unheard) => {
                self.hear(number, said);
                drop(unheard);
            }
            Ask::SwitchLeft(number) => self.switch_left(number),
        }
    }

    /// Does what there is to do. A guest that posts without end does not keep the thread from what others ask.
    fn work(&mut self) {
        self.follow_controllers();
        self.withdraw_quiet(Instant::now());
        for turn in 0..=INBOX {
            self.act();
            self.deliver();
            if !self.listens() || turn == INBOX {
                break;
            }
            let Some(Message { connection, payload }) = self.inbox.pop() else { break };
            if let Err(error) = self.root.message(connection, &payload) {
                tracing::debug!(%error, "message of the guest refused");
            }
        }
        if self.draining.is_some_and(|draining| draining.until() <= Instant::now()) {
            self.press_switch();
        }
        if self.draining.is_none() && !self.detached.is_empty() {
            self.pump.reset();
            self.wires.detach();
            self.outbox.clear();
            for done in self.detached.drain(..) {
                let _ = done.send(());
            }
        }
    }

    /// The switch has had its time to let go. One that ends by itself has; one that does not may go on touching memory.
    fn press_switch(&mut self) {
        let Some(link) = self.switch.clone() else { return self.act() };
        if let Some(Draining::Told(_)) = self.draining {
            tracing::warn!("the switch does not let go of the guest's memory; it is asked to end");
            link.hang_up();
            self.draining = Some(Draining::HungUp(Instant::now() + LET_GO));
            return;
        }
        tracing::error!(
            "the switch does not end; its connection is cut, and it may still touch the guest's memory"
        );
        link.end();
        self.switch_left(link.number);
        self.act();
    }

    /// Has interrupts go where processors have their event flags now.
    fn follow_controllers(&mut self) {
        self.changed.append(&mut self.inbox.changed());
        let now = Instant::now();
        if self.changed.is_empty() || now < self.retarget {
            return;
        }
        self.retarget = now + RETARGET;
        for vp in std::mem::take(&mut self.changed) {
            for key in self.wires.of(vp) {
                self.retarget(key, vp);
            }
        }
    }

    fn act(&mut self) {
        loop {
            while let Some(action) = self.root.next_action() {
                self.carry_out(action);
            }
            let idle = self.nics.values().all(Device::is_idle);
            if self.draining.is_none() || !idle {
                return;
            }
            self.draining = None;
            self.root.unloaded();
        }
    }

    fn carry_out(&mut self, action: Action) {
        match action {
            Action::Post { vp, payload } => self.outbox.push_back((vp, payload)),
            Action::Gpadl { device, gpadl, byte_count, byte_offset, pfns } => {
                if let Some(service) = self.services.get_mut(&device) {
                    let pages = Pages::new(self.memory.guest(), &pfns);
                    let ok = pages.map(|pages| service.gpadls.insert(gpadl, pages)).is_ok();
                    self.root.gpadl_accepted(device, gpadl, ok);
                } else {
                    self.give_gpadl(device, gpadl, byte_count, byte_offset, pfns);
                }
            }
            Action::GpadlTeardown { device, gpadl } => {
                if let Some(service) = self.services.get_mut(&device) {
                    service.gpadls.remove(&gpadl);
                    self.root.gpadl_released(device, gpadl);
                } else {
                    self.ask_for_gpadl(device, gpadl);
                }
            }
            Action::Open { channel, relid, connection, gpadl, downstream_page, vp, .. } => {
                if self.wires.tie(channel, relid, connection, vp).is_none() {
                    self.root.opened(channel, false);
                } else if self.services.contains_key(&channel.device) {
                    let ok = self.open_service(channel, gpadl, downstream_page).is_some();
                    if !ok {
                        self.wires.untie(channel);
                    }
                    self.root.opened(channel, ok);
                } else {
                    self.give_channel(channel, relid, gpadl, downstream_page, false);
                }
            }
            Action::Close { channel } => {
                if let Some(service) = self.services.get_mut(&channel.device) {
                    service.interrupt = None;
                    self.pump.close(service.instance);
                    self.wires.untie(channel);
                    self.root.closed(channel);
                } else {
                    self.ask_for_channel(channel);
                }
            }
            Action::Modify { channel, vp } => {
                // Once the switch says that it has moved, if it is asked to.
                if !self.retarget(channel, vp) {
                    self.root.modified(channel);
                }
            }
            Action::Reset => self.drain(),
            Action::Gone { device } => {
                let gone = self.nics.remove(&device);
                self.tell(&FromVmm::Gone { device: device.0 });
                if let Some(Device { again: true, gone: None, nic, .. }) = gone
                    && let Err(error) = self.add_nic(nic)
                {
                    tracing::error!(error, "adapter cannot be plugged in anew");
                }
            }
        }
    }

    /// Hands messages to the guest, in order, as it takes them.
    fn deliver(&mut self) {
        while let Some((vp, payload)) = self.outbox.front() {
            let posted = match self.wires.machine() {
                Some(machine) => machine.synic.post(*vp, payload, self.outbox.len() > 1),
                None => Posted::Off,
            };
            match posted {
                Posted::Done => {
                    self.outbox.pop_front();
                    self.wait = LOOK_AGAIN.0;
                }
                // A processor without a message page: who listened there does so no more.
                Posted::Off => drop(self.outbox.pop_front()),
                Posted::Busy => {
                    self.wait = (self.wait * 2).min(LOOK_AGAIN.1);
                    return;
                }
            }
        }
    }

    fn open_service(&mut self, key: ChannelKey, gpadl: GpadlId, downstream_page: u32) -> Option<()> {
        let (target, wire) = (self.wires.target(key)?, self.wires.get(key)?);
        let service = self.services.get_mut(&key.device)?;
        let interrupt = Interrupt::disabled(self.memory.guest());
        interrupt.aim(target.flags_gpa, target.flag, target.eventfd.into()).ok()?;
        let (pages, doorbell) = (service.gpadls.get(&gpadl)?, Arc::clone(&wire.doorbell));
        let channel = OpenChannel::new(pages, downstream_page, doorbell, interrupt.clone(), true).ok()?;
        service.interrupt = Some(interrupt);
        self.pump.open(service.instance, channel).ok()
    }

    /// Has a channel's interrupts go to `vp`. True if the switch answers when they do; else they do so at once, or never.
    fn retarget(&mut self, key: ChannelKey, vp: u32) -> bool {
        if !self.wires.retarget(key, vp) {
            return false;
        }
        let Some(target) = self.wires.target(key) else { return false };
        if let Some(service) = self.services.get(&key.device) {
            let InterruptTarget { flags_gpa, flag, eventfd } = target;
            let aim = |interrupt: &Interrupt| interrupt.aim(flags_gpa, flag, eventfd.into());
            if let Some(Err(error)) = service.interrupt.as_ref().map(aim) {
                tracing::warn!(%error, %key, "interrupts stay where they were");
            }
            return false;
        }
        self.tell(&FromVmm::Retarget { device: key.device.0, index: key.index, vp, target });
        self.switch.is_some()
    }

    /// Everything of the guest's is let go; the switch may need some time.
    fn drain(&mut self) {
        self.outbox.clear();
        for service in self.services.values_mut() {
            if service.interrupt.take().is_some() {
                self.pump.close(service.instance);
            }
            service.gpadls.clear();
        }
        self.wires.clear();
        for (&id, device) in &mut self.nics {
            for message in device.let_go(id) {
                if let Some(link) = &self.switch {
                    link.send(&message);
                }
            }
        }
        self.draining = Some(Draining::Told(Instant::now() + LET_GO));
    }

    fn add_nic(&mut self, nic: Nic) -> Result<(), String> {
        if nic.kind != NicKind::Synthetic {
            return Err("a legacy adapter can only be there from the start".into());
        }
        if self.nics.values().any(|device| !device.is_leaving() && device.nic.name == nic.name) {
            return Err(format!("there is an adapter {} already", nic.name));
        }
        let subchannels_max = nic.queues.saturating_sub(1);
        let mut device = Device::new(nic)?;
        let spec =
            OfferSpec { interface: interface::NIC, instance: device.instance, subchannels_max, pipe: false };
        let id = self.root.offer(spec).map_err(|error| error.to_string())?;
        if let Some(link) = &self.switch
            && let Some(introduction) = device.introduction(id)
        {
            link.send(&introduction);
        }
        self.nics.insert(id, device);
        Ok(())
    }

    fn remove_nic(&mut self, name: &str) -> Result<Receiver<()>, String> {
        let found = self.nics.iter_mut().find(|(_, device)| !device.is_leaving() && device.nic.name == name);
        let Some((&id, device)) = found else { return Err(format!("there is no adapter {name}")) };
        let (gone, told) = channel();
        device.gone = Some(gone);
        let open = device.channels.get(&0).is_some_and(|closing| !closing);
        let now = Instant::now();
        device.quiet_by = Some(if open { now + QUIET } else { now });
        match &self.switch {
            Some(link) if open => link.send(&FromVmm::Quiesce { device: id.0 }),
            _ => self.withdraw_quiet(now),
        }
        Ok(told)
    }

    /// Takes adapters from the guest whose time has come.
    fn withdraw_quiet(&mut self, now: Instant) {
        let due = |device: &mut Device| device.quiet_by.take_if(|by| *by <= now).is_some();
        for id in self.nics.iter_mut().filter_map(|(&id, device)| due(device).then_some(id)) {
            self.root.withdraw(id);
        }
    }

    fn report(&self) -> Report {
        let open: Vec<ChannelKey> = self.root.open_channels().collect();
        let channels = |id: DeviceId| {
            u16::try_from(open.iter().filter(|key| key.device == id).count()).unwrap_or(u16::MAX)
        };
        let here = || self.nics.iter().filter(|(_, device)| !device.is_leaving());
        let connected = self.switch.is_some();
        Report {
            root: self.root.describe(),
            nics: here().map(|(&id, device)| device.status(connected, channels(id))).collect(),
            faults: here()
                .filter_map(|(_, device)| Some((device.nic.name.clone(), device.fault.clone()?)))
                .collect(),
        }
    }

    /// A switch connected: tells it everything.
    fn greet(&mut self, link: Link) {
        if let Some(old) = self.switch.take() {
            old.end();
            self.forget_switch();
        }
        let regions = self.memory.regions().into_iter();
        let regions = regions.map(|(gpa, len, offset)| MemoryRegion { gpa, len, offset }).collect();
        let Ok(fd) = self.memory.fd().try_clone_to_owned() else { return link.end() };
        link.send(&FromVmm::Hello { version: vmbus::handover::VERSION });
        link.send(&FromVmm::Memory { regions, fd });
        self.switch = Some(link);
        for id in self.nics.keys().copied().collect::<Vec<_>>() {
            self.introduce(id);
        }
        self.tell(&FromVmm::Ready);
    }

    fn introduce(&mut self, id: DeviceId) {
        let Some(message) = self.nics.get_mut(&id).and_then(|device| device.introduction(id)) else { return };
        self.tell(&message);
        let items: Vec<Replayed> =
            self.root.replay(|device| device == id).filter_map(Replayed::from_item).collect();
        for item in items {
            match item {
                Replayed::Gpadl { gpadl, byte_count, byte_offset, pfns } => {
                    self.give_gpadl(id, gpadl, byte_count, byte_offset, pfns);
                }
                Replayed::Open { channel, relid, connection, gpadl, downstream_page, vp, resumed } => {
                    if self.wires.get(channel).is_none() {
                        self.wires.tie(channel, relid, connection, vp);
                    }
                    self.wires.retarget(channel, vp);
                    self.give_channel(channel, relid, gpadl, downstream_page, resumed);
                }
            }
        }
    }

    pub(super) fn tell(&self, message: &FromVmm) {
        if let Some(link) = &self.switch {
            link.send(message);
        }
    }
}

/// An [`Item`] of a NIC, owned.
enum Replayed {
    Gpadl {
        gpadl: GpadlId,
        byte_count: u32,
        byte_offset: u32,
        pfns: Vec<u64>,
    },
    Open {
        channel: ChannelKey,
        relid: u32,
        connection: u32,
        gpadl: GpadlId,
        downstream_page: u32,
        vp: u32,
        resumed: bool,
    },
}

impl Replayed {
    fn from_item(item: Item<'_>) -> Option<Self> {
        Some(match item {
            Item::Device { .. } => return None,
            Item::Gpadl { gpadl, byte_count, byte_offset, pfns, .. } => {
                Self::Gpadl { gpadl, byte_count, byte_offset, pfns: pfns.to_vec() }
            }
            Item::Open { channel, relid, connection, gpadl, downstream_page, vp, resumed, .. } => {
                Self::Open { channel, relid, connection, gpadl, downstream_page, vp, resumed }
            }
        })
    }
}
