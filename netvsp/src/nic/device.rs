//! The adapter as its queues see it: requests come in, and what follows from them is carried out.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vmbus::channel::Interrupt;
use vmbus::handover::FromSwitch;
use vmbus::pages::Pages;
use vmbus::ring::Incoming;
use vmq::doorbell::Doorbell;
use vmq::frame::Accepts;
use vmq::rss::{IndirectionTable, Rss, ToeplitzKey};
use vmq::worker::{Clock, Nanos};
use vswitch::backend::{BackendFault, BackendPort, GuestRss};
use vswitch::report::PortState;

use super::NicError;
use super::quiesce::{LOOK, Quiesce};
use super::state::State;
use crate::control::{Buffer, DataPath, Effect, Effects, NicConfig, Nvsp, PacketFilter, Statistics};
use crate::queue::{Channel, Message, Path, QueueFault, ReceivePath, Request, SendPath, Sink, Source};
use crate::receive::Form;
use crate::sections::{MAX_SECTIONS, Sections};

/// How long memory that a burst is still using is waited for, in steps of [`STEP`]: a burst takes microseconds.
const STEPS: u32 = 10_000;
const STEP: Duration = Duration::from_micros(100);

/// Machines that begin anew on a faulted port in a row, and how soon each of them is forgotten: a guest that does nothing
/// but fault and boot is not to fill anybody's log.
const PARDONS: u64 = 8;
const PARDON_AGES: Nanos = 10_000_000_000;

/// The adapter, shared by its queues.
pub(crate) struct Device {
    number: u32,
    port: BackendPort,
    requests: Box<dyn Fn(FromSwitch) + Send + Sync>,
    control: Mutex<Control>,
    /// What a successor must know has changed.
    dirty: AtomicBool,
    /// This machine's guest has faulted the port; until it gave everything back, or the operator restarts the port.
    faulted: AtomicBool,
    clock: Clock,
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device").field("number", &self.number).finish_non_exhaustive()
    }
}

/// What the control path has to itself.
#[derive(Debug)]
struct Control {
    nvsp: Nvsp,
    state: State,
    gpadls: BTreeMap<u32, Pages>,
    /// The receive buffer's sections, with its GPADL.
    sections: Option<(u32, Arc<Sections>)>,
    channels: BTreeMap<u16, Opened>,
    path: Arc<Path>,
    /// What channels that are closed have moved, and a predecessor's.
    past: Statistics,
    /// A predecessor's channels are still being told.
    resuming: bool,
    /// It is about to be taken from the guest.
    quiesce: Option<Quiesce>,
    /// When the last pardon is forgotten, [`PARDON_AGES`] after the one before it.
    pardons: Nanos,
}

/// An open channel, and what it takes to connect it to the switch again.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) channel: Arc<Channel>,
    pub(super) rings: Pages,
    pub(super) downstream_page: u32,
    pub(super) doorbell: Arc<Doorbell>,
    pub(super) interrupt: Interrupt,
    /// Until it is connected.
    pub(super) incoming: Option<Incoming>,
}

impl Device {
    pub(super) fn new(
        number: u32,
        port: BackendPort,
        config: NicConfig,
        mut state: State,
        resumed: bool,
        requests: Box<dyn Fn(FromSwitch) + Send + Sync>,
    ) -> Self {
        let mut nvsp = Nvsp::new(config);
        let blob = if resumed { state.read() } else { None };
        let restored = blob.map(|blob| nvsp.restore(&blob));
        let past = *nvsp.statistics();
        // Another link is not another machine.
        let faulted = resumed && port.is_faulted();
        let device = Self {
            number,
            port,
            requests,
            control: Mutex::new(Control {
                nvsp,
                state,
                gpadls: BTreeMap::new(),
                sections: None,
                channels: BTreeMap::new(),
                path: Arc::default(),
                past,
                resuming: resumed,
                quiesce: None,
                pardons: 0,
            }),
            dirty: AtomicBool::new(false),
            faulted: AtomicBool::new(faulted),
            clock: Clock::default(),
        };
        if let Some(Err(error)) = restored {
            device.fault(&error);
        }
        device
    }

    fn control(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn queues(&self) -> u16 {
        self.port.queues().min(crate::sections::MAX_CHANNELS)
    }

    pub(super) fn add_gpadl(&self, gpadl: u32, pages: Pages, most: usize) -> bool {
        let mut control = self.control();
        if control.gpadls.len() >= most || control.gpadls.contains_key(&gpadl) {
            return false;
        }
        control.gpadls.insert(gpadl, pages);
        true
    }

    pub(super) fn pages(&self, gpadl: u32) -> Option<Pages> {
        self.control().gpadls.get(&gpadl).cloned()
    }

    /// The guest takes memory back: returns when no burst uses it any more.
    pub(super) fn remove_gpadl(&self, gpadl: u32) {
        let mut control = self.control();
        control.gpadls.remove(&gpadl);
        let old = Arc::clone(&control.path);
        self.rebuild(&mut control);
        self.forgive(&control);
        drop(control);
        // Sinks have let go of it. A source may be in the middle of a burst.
        for _ in 0..STEPS {
            if Arc::strong_count(&old) == 1 || Arc::ptr_eq(&old, &self.control().path) {
                return;
            }
            std::thread::sleep(STEP);
        }
    }

    pub(super) fn interrupt(&self, index: u16) -> Option<Interrupt> {
        self.control().channels.get(&index).map(|opened| opened.interrupt.clone())
    }

    pub(super) fn open(self: &Arc<Self>, opened: Opened, resumed: bool) -> Result<(), NicError> {
        let index = opened.channel.index;
        {
            let mut control = self.control();
            if control.channels.contains_key(&index) {
                return Err(NicError::OpenTwice(index));
            }
            if !resumed && self.port.is_faulted() {
                if index != 0 || self.faulted.load(Ordering::SeqCst) || !control.pardon(self.clock.now()) {
                    // Nobody would answer: a guest that is refused says so, and does not wait for ever.
                    return Err(NicError::Faulted);
                }
                // Another machine, or one that was reset, does not answer for what was before.
                self.port.recover();
            }
            opened.channel.set_path(&control.path);
            control.channels.insert(index, opened);
            if resumed && control.resuming {
                return Ok(());
            }
            let effects = control.nvsp.channel_opened(index);
            self.carry_out(&mut control, effects, None);
        }
        self.connect(index);
        Ok(())
    }

    /// Plugs an open channel into the switch.
    fn connect(self: &Arc<Self>, index: u16) {
        let (channel, incoming, memory) = {
            let mut control = self.control();
            let Some(opened) = control.channels.get_mut(&index) else { return };
            let Some(incoming) = opened.incoming.take() else { return };
            (Arc::clone(&opened.channel), incoming, Arc::clone(opened.rings.memory()))
        };
        let source = Source::new(Arc::clone(self), Arc::clone(&channel), incoming, memory);
        let sink = Sink::new(Arc::clone(self), channel);
        self.port.connect(index, Box::new(source), Box::new(sink));
    }

    /// Everything that a predecessor served is there again.
    pub(super) fn ready(self: &Arc<Self>) {
        let indices: Vec<u16> = {
            let mut control = self.control();
            if !std::mem::take(&mut control.resuming) {
                return;
            }
            self.resume(&mut control);
            control.channels.keys().copied().collect()
        };
        indices.into_iter().for_each(|index| self.connect(index));
    }

    /// Finds the sections that the guest has.
    fn resume(&self, control: &mut Control) {
        if let Some(receive) = control.nvsp.data_path().receive {
            let ends: BTreeMap<u16, u32> =
                control.channels.iter().map(|(index, opened)| (*index, opened.channel.position())).collect();
            let journal = control.state.journal();
            let sections = Sections::restore(receive.sections.min(MAX_SECTIONS), journal, |index| {
                ends.get(&index).copied()
            });
            control.sections = Some((receive.gpadl, Arc::new(sections)));
        }
        self.rebuild(control);
    }

    /// The operator restarts the port: channels go on where their rings stand, as a successor's would. What was taken out
    /// of them and not given back is taken again.
    pub(super) fn reconnect(self: &Arc<Self>) {
        self.disconnect_all();
        self.faulted.store(false, Ordering::SeqCst);
        let mut control = self.control();
        let again: Result<Vec<(u16, Opened)>, NicError> =
            control.channels.iter().map(|(&index, old)| Ok((index, old.again(index)?))).collect();
        match again {
            Ok(again) => {
                control.past = control.statistics();
                control.channels.extend(again);
            }
            Err(error) => return self.fault(&error),
        }
        self.resume(&mut control);
        let indices: Vec<u16> = control.channels.keys().copied().collect();
        drop(control);
        indices.into_iter().for_each(|index| self.connect(index));
    }

    pub(super) fn close(&self, index: u16) {
        let opened = self.control().channels.remove(&index);
        // Waits until no worker touches it, so the lock is not held.
        self.port.disconnect(index);
        let Some(opened) = opened else { return };
        opened.channel.close();
        let mut control = self.control();
        control.past.add(&opened.channel);
        let effects = control.nvsp.channel_closed(index);
        self.carry_out(&mut control, effects, None);
        if index == 0 {
            self.rebuild(&mut control);
            control.state.clear();
            control.resuming = false;
        } else {
            control.save();
        }
        self.forgive(&control);
    }

    /// A guest that has nothing of ours and gave us nothing, as after a reset, is another one.
    fn forgive(&self, control: &Control) {
        if control.channels.is_empty() && control.gpadls.is_empty() {
            self.faulted.store(false, Ordering::SeqCst);
        }
    }

    pub(super) fn disconnect_all(&self) {
        let indices: Vec<u16> = self.control().channels.keys().copied().collect();
        indices.into_iter().for_each(|index| self.port.disconnect(index));
    }

    /// The guest has the adapter no more.
    pub(super) fn forget(&self) {
        let indices: Vec<u16> = self.control().channels.keys().copied().collect();
        indices.into_iter().rev().for_each(|index| self.close(index));
        self.control().gpadls.clear();
    }

    pub(super) fn set_link(&self, up: bool) {
        let mut control = self.control();
        let effects = control.nvsp.link(up, self.clock.now());
        self.carry_out(&mut control, effects, None);
        control.save();
    }

    /// The adapter will be taken from the guest: no frame for it any more, its cable is out, and the VMM is told once
    /// nothing is under way.
    pub(super) fn quiesce(&self) {
        self.set_link(false);
        let mut control = self.control();
        control.quiesce.get_or_insert_default();
        self.rebuild(&mut control);
    }

    /// Tells guest and VMM what had to wait. How long until there is more, if there is.
    pub(super) fn tick(&self) -> Option<Duration> {
        let mut control = self.control();
        let now = self.clock.now();
        let effects = control.nvsp.tick(now);
        if !effects.is_empty() {
            self.carry_out(&mut control, effects, None);
            control.save();
        }
        let due = control.nvsp.next_tick().map(|due| Duration::from_nanos(due.saturating_sub(now)));
        if !control.quiesce.as_ref().is_some_and(Quiesce::goes_on) {
            return due;
        }
        let quiet = (due.is_none() && control.is_read()) || self.faulted.load(Ordering::SeqCst);
        let statistics = control.statistics();
        let sent = statistics.out_frames.iter().sum::<u64>().wrapping_add(statistics.out_dropped);
        if control.quiesce.as_mut().is_some_and(|quiesce| quiesce.look(quiet, sent)) {
            (self.requests)(FromSwitch::Quiet { device: self.number });
            return due;
        }
        Some(due.map_or(LOOK, |due| due.min(LOOK)))
    }

    pub(super) fn settings_changed(&self) {
        let settings = self.port.settings();
        let mut control = self.control();
        let mut effects = control.nvsp.set_mtu(settings.mtu);
        if let Some(mac) = settings.mac {
            effects.extend(control.nvsp.set_mac(mac));
        }
        control.nvsp.set_spoofing(settings.spoofing);
        self.carry_out(&mut control, effects, None);
        control.save();
    }

    /// A queue found a control message.
    pub(crate) fn request(&self, channel: &Arc<Channel>, request: Request) -> Result<(), QueueFault> {
        let mut control = self.control();
        let (effects, reply) = match request {
            Request::Nvsp(message, transaction, wanted) => {
                (control.nvsp.request(&message, wanted)?, Some((&**channel, transaction)))
            }
            Request::Rndis(message) => {
                let statistics = control.statistics();
                control.nvsp.set_statistics(statistics);
                (control.nvsp.rndis(&message)?, None)
            }
        };
        self.carry_out(&mut control, effects, reply);
        self.dirty.store(true, Ordering::Release);
        Ok(())
    }

    /// Saves what a successor must know, if it has changed.
    #[inline]
    pub(crate) fn keep(&self) {
        if self.dirty.load(Ordering::Relaxed) && self.dirty.swap(false, Ordering::Acquire) {
            self.control().save();
        }
    }

    fn carry_out(&self, control: &mut Control, effects: Effects, reply: Option<(&Channel, u64)>) {
        let mut left: VecDeque<Effect> = effects.into_iter().collect();
        while let Some(effect) = left.pop_front() {
            let primary = control.channels.get(&0).map(|opened| Arc::clone(&opened.channel));
            let to = match (&effect, reply) {
                (Effect::Complete(_), Some((channel, _))) => channel.index,
                _ => 0,
            };
            let sent = match (effect, primary) {
                (Effect::Complete(payload), _) => reply
                    .map(|(channel, transaction)| channel.send(Message::Completion(transaction, payload))),
                (Effect::RndisReply(message) | Effect::Indicate(message), Some(primary)) => {
                    Some(primary.send(Message::Control(message)))
                }
                (Effect::InBand(message), Some(primary)) => Some(primary.send(Message::InBand(message))),
                (Effect::MapReceive { gpadl }, _) => {
                    let bytes = control.gpadls.get(&gpadl).map(Pages::len);
                    // A new buffer has no sections that anybody owns.
                    control.sections = None;
                    left.extend(control.nvsp.mapped(Buffer::Receive, bytes));
                    None
                }
                (Effect::MapSend { gpadl }, _) => {
                    let bytes = control.gpadls.get(&gpadl).map(Pages::len);
                    left.extend(control.nvsp.mapped(Buffer::Send, bytes));
                    None
                }
                (Effect::UnmapReceive | Effect::UnmapSend | Effect::DataPathChanged | Effect::Halted, _) => {
                    self.rebuild(control);
                    None
                }
                (Effect::OfferSubchannels(count), _) => {
                    (self.requests)(FromSwitch::OfferSubchannels { device: self.number, count });
                    None
                }
                _ => None,
            };
            match sent {
                None | Some(Ok(true)) => {}
                // Its source sends it later, and may be asleep.
                Some(Ok(false)) => self.port.nudge(to),
                // The ring is of no use; whoever polls it finds out as well.
                Some(Err(fault)) => self.fault(&fault),
            }
        }
    }

    /// Makes the path anew from what was negotiated, and shows it to all channels.
    fn rebuild(&self, control: &mut Control) {
        let data = control.nvsp.data_path();
        let rss = data.rss.as_ref().and_then(|wanted| hash(wanted, self.port.queues()));
        let receive = control.receive(&data, rss);
        let send = data.send.as_ref().and_then(|send| {
            let pages = control.gpadls.get(&send.gpadl)?.clone();
            Some(SendPath { pages, size: send.section_size, count: send.sections })
        });
        let large = Accepts::CHECKSUM | Accepts::TCP4 | Accepts::TCP6 | Accepts::ECN;
        let up = receive.is_some();
        let path = Path {
            receive,
            send,
            max_packets: data.max_packets_per_message as usize,
            accepts: if data.rsc { large } else { Accepts::empty() },
        };
        control.path = Arc::new(path);
        for opened in control.channels.values() {
            opened.channel.set_path(&control.path);
        }
        self.port.set_steering(data.rss.as_ref());
        self.port.set_state(if up { PortState::Up } else { PortState::Waiting("the guest's driver".into()) });
    }

    /// Stops the adapter, if it was not stopped before, and tells the VMM.
    fn fault(&self, reason: &dyn std::fmt::Display) {
        if !self.faulted.swap(true, Ordering::SeqCst) {
            self.port.fault(reason);
            let reason = reason.to_string().chars().take(200).collect();
            (self.requests)(FromSwitch::Fault { device: self.number, reason });
        }
    }

    /// A queue cannot go on.
    #[cold]
    pub(crate) fn faulted(&self, fault: QueueFault) -> BackendFault {
        self.fault(&fault);
        Box::new(fault)
    }
}

impl Control {
    /// Whether a machine may begin anew on a faulted port.
    fn pardon(&mut self, now: Nanos) -> bool {
        let next = self.pardons.max(now) + PARDON_AGES;
        let few = next <= now + PARDONS * PARDON_AGES;
        if few {
            self.pardons = next;
        }
        few
    }

    /// The guest has read all that there is for it, and has given back all that it read.
    fn is_read(&self) -> bool {
        self.channels.values().all(|opened| opened.channel.is_read())
            && self.sections.as_ref().is_none_or(|(_, sections)| sections.are_back())
    }

    /// What the adapter has moved.
    fn statistics(&self) -> Statistics {
        let mut sum = self.past;
        self.channels.values().for_each(|opened| sum.add(&opened.channel));
        sum
    }

    fn save(&mut self) {
        let statistics = self.statistics();
        self.nvsp.set_statistics(statistics);
        let blob = self.nvsp.save();
        if !self.state.write(&blob) {
            tracing::warn!(bytes = blob.len(), "adapter state does not fit its file");
        }
    }

    fn receive(&mut self, data: &DataPath, rss: Option<Rss>) -> Option<ReceivePath> {
        let Some((wanted, pages)) = data.receive.as_ref().and_then(|receive| {
            let pages = self.gpadls.get(&receive.gpadl)?.clone();
            Some((receive, pages))
        }) else {
            self.sections = None;
            return None;
        };
        let sections = match &self.sections {
            Some((gpadl, sections)) if *gpadl == wanted.gpadl => Arc::clone(sections),
            _ => Arc::new(Sections::new(wanted.sections.min(MAX_SECTIONS), self.state.journal())),
        };
        self.sections = Some((wanted.gpadl, Arc::clone(&sections)));
        let form = Form {
            section_size: wanted.section_size,
            filter: if self.quiesce.is_none() { data.filter } else { PacketFilter::empty() },
            multicast: data.multicast.clone(),
            rsc: data.rsc,
            rss,
        };
        Some(ReceivePath { pages, id: wanted.id, sections, form })
    }
}

impl Statistics {
    /// Adds what `channel` has moved.
    fn add(&mut self, channel: &Channel) {
        let (to_guest, from_guest) = (channel.received.read(), channel.sent.read());
        let add = |sum: &mut u64, more: u64| *sum = sum.wrapping_add(more);
        self.in_frames.iter_mut().zip(to_guest.frames).for_each(|(sum, more)| add(sum, more));
        self.out_frames.iter_mut().zip(from_guest.frames).for_each(|(sum, more)| add(sum, more));
        add(&mut self.in_bytes, to_guest.bytes);
        add(&mut self.in_dropped, to_guest.dropped);
        add(&mut self.out_bytes, from_guest.bytes);
        add(&mut self.out_dropped, from_guest.dropped);
    }
}

fn hash(wanted: &GuestRss, queues: u16) -> Option<Rss> {
    let key = ToeplitzKey::new(&wanted.key).ok()?;
    let table = IndirectionTable::new(&wanted.table, queues).ok()?;
    Some(Rss { key, table, types: wanted.types })
}
