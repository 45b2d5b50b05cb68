//! The adapter as its queues see it: requests come in, and what follows from them is carried out.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vmbus::channel::{InterruptError, InterruptTarget, Trust};
use vmbus::handover::FromSwitch;
use vmbus::pages::Pages;
use vmq::frame::Accepts;
use vmq::worker::{Clock, Nanos};
use vswitch::backend::{BackendFault, BackendPort};
use vswitch::report::PortState;

use super::NicError;
use super::control::{Control, Opened, hash};
use super::quiesce::{LOOK, Quiesce};
use super::state::State;
use super::throttle::Throttle;
use crate::control::{Buffer, Effect, Effects, NicConfig, Nvsp, Phase};
use crate::journal::{Ends, Journal, MAX_CHANNELS, MAX_SECTIONS};
use crate::message::{Message, Waiting};
use crate::queue::{Channel, Path, QueueFault, Request, SendPath, Sink, Source};
use crate::sections::Sections;

/// How long memory that a burst is still using is waited for, in steps of [`STEP`]: a burst takes microseconds.
const STEPS: u32 = 10_000;
const STEP: Duration = Duration::from_micros(100);

/// The adapter, shared by its queues.
pub(crate) struct Device {
    number: u32,
    port: BackendPort,
    requests: Box<dyn Fn(FromSwitch) + Send + Sync>,
    control: Mutex<Control>,
    /// This machine's guest has faulted the port; until it gave everything back, or the operator restarts the port.
    faulted: AtomicBool,
    /// In the VMM, whose eventfds interrupts go to.
    trust: Trust,
    throttle: Throttle,
    /// Held while channels are plugged into the switch or out of it, with what is known of them: one that is closed must
    /// not be plugged in by a restart that began before. Taken before `control`.
    plug: Mutex<()>,
    clock: Clock,
}

type Plug<'d> = MutexGuard<'d, ()>;

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device").field("number", &self.number).finish_non_exhaustive()
    }
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
        let restored = blob.map_or(Ok(()), |blob| nvsp.restore(&blob));
        if let Err(error) = &restored {
            tracing::warn!(device = number, %error, "adapter cannot be taken over");
        }
        let past = *nvsp.statistics();
        let left = nvsp.take_waiting();
        // Another link is not another machine.
        let faulted = resumed && port.is_faulted();
        let trust = Trust::default();
        if port.is_faulted_for_good() {
            trust.lose();
        }
        Self {
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
                left,
                unread: restored.is_err(),
                told: None,
                quiesce: None,
                pardons: 0,
            }),
            faulted: AtomicBool::new(faulted),
            trust,
            throttle: Throttle::default(),
            plug: Mutex::default(),
            clock: Clock::default(),
        }
    }

    fn plug(&self) -> Plug<'_> {
        self.plug.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn control(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn queues(&self) -> u16 {
        self.port.queues().min(MAX_CHANNELS)
    }

    pub(super) fn add_gpadl(&self, gpadl: u32, pages: Pages, most: usize) -> bool {
        let mut control = self.control();
        if control.gpadls.len() >= most || control.gpadls.contains_key(&gpadl) {
            return false;
        }
        control.gpadls.insert(gpadl, pages);
        true
    }

    pub(super) fn journal(&self) -> Journal {
        self.control().state.journal()
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

    pub(super) fn trust(&self) -> &Trust {
        &self.trust
    }

    /// Interrupts of a channel go elsewhere from now on.
    pub(super) fn retarget(&self, index: u16, target: InterruptTarget) -> Result<(), InterruptError> {
        let interrupt = self.control().channels.get(&index).map(|opened| opened.interrupt.clone());
        let moved = interrupt.map_or(Ok(()), |interrupt| interrupt.retarget(target));
        self.check_trust();
        moved
    }

    /// Stops the adapter if an interrupt of it made us wait.
    fn check_trust(&self) {
        if self.trust.is_lost() {
            self.fault_as(&QueueFault::InterruptBlocks);
        }
    }

    /// Whether a channel may be opened over `rings`, which nobody has touched yet.
    pub(super) fn admit(&self, index: u16, rings: &Pages, resumed: bool) -> Result<(), NicError> {
        let mut control = self.control();
        if control.channels.contains_key(&index) {
            return Err(NicError::OpenTwice(index));
        }
        if resumed {
            // One whose guest was answered, which has moved the ring's read index, and of which nothing is known.
            let closed = control.nvsp.phase() == Phase::Closed;
            let used = index != 0 || rings.word(4).is_none_or(|read| read.load(Ordering::Relaxed) != 0);
            return if control.unread || closed && used { Err(NicError::NotRestored(index)) } else { Ok(()) };
        }
        let refused = |control: &mut Control| {
            index != 0
                || self.port.is_faulted_for_good()
                || self.faulted.load(Ordering::SeqCst)
                || !control.pardon(self.clock.now())
        };
        if self.port.is_faulted() && refused(&mut control) {
            // Nobody would answer: a guest that is refused says so, and does not wait for ever.
            return Err(NicError::Faulted);
        }
        Ok(())
    }

    /// Opens a channel that was admitted.
    pub(super) fn open(self: &Arc<Self>, opened: Opened, resumed: bool) {
        let index = opened.channel.index;
        let plug = self.plug();
        {
            let mut control = self.control();
            if index == 0 && !resumed {
                self.begin(&mut control);
            }
            opened.channel.set_path(&control.path);
            control.channels.insert(index, opened);
            if control.resuming {
                // All are connected once all is told, whoever opened them: the path of before is not known yet.
                return;
            }
            let effects = control.nvsp.channel_opened(index);
            self.carry_out(&mut control, effects, None);
            // A successor is not told of it by the guest again.
            control.save();
        }
        self.connect(index, &plug);
    }

    /// The guest begins anew. A predecessor that died while the primary channel was closed has left what was before.
    fn begin(&self, control: &mut Control) {
        let pardoned = !self.faulted.load(Ordering::SeqCst) && !self.port.is_faulted_for_good();
        if self.port.is_faulted() && pardoned {
            // Another machine, or one that was reset, does not answer for what was before.
            self.port.recover();
            control.told = None;
        }
        (control.unread, control.resuming, control.left) = (false, false, Waiting::default());
        let effects = control.nvsp.channel_closed(0);
        self.carry_out(control, effects, None);
        control.state.clear();
    }

    /// Plugs an open channel into the switch.
    fn connect(self: &Arc<Self>, index: u16, _: &Plug<'_>) {
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
        let plug = self.plug();
        let indices: Vec<u16> = {
            let mut control = self.control();
            if !std::mem::take(&mut control.resuming) {
                return;
            }
            self.resume(&mut control);
            let subchannels = control.nvsp.data_path().subchannels;
            let mut effects = control.due(self.clock.now());
            for index in 1..=subchannels {
                // Nor do we know of channels that were opened or closed meanwhile.
                effects.extend(match control.channels.contains_key(&index) {
                    true => control.nvsp.channel_opened(index),
                    false => control.nvsp.channel_closed(index),
                });
            }
            if subchannels > 0 {
                // The predecessor may have died before the VMM heard it; the guest waits for what it was granted.
                effects.push(Effect::OfferSubchannels(subchannels));
            }
            self.carry_out(&mut control, effects, None);
            control.save();
            control.channels.keys().copied().collect()
        };
        indices.into_iter().for_each(|index| self.connect(index, &plug));
    }

    /// Finds where the channels stand, the sections that the guest has, and the messages that it has not.
    fn resume(&self, control: &mut Control) {
        let ends: BTreeMap<u16, Ends> = control
            .channels
            .iter_mut()
            .filter_map(|(&index, opened)| Some((index, opened.channel.resume(opened.incoming.as_mut()?))))
            .collect();
        let left = std::mem::take(&mut control.left);
        if let (Some(primary), Some(&ends)) = (control.channels.get(&0), ends.get(&0)) {
            primary.channel.succeed(left, ends);
        }
        let journal = control.state.journal();
        if let Some(receive) = control.nvsp.data_path().receive {
            let count = receive.sections.min(MAX_SECTIONS);
            let sections = Sections::restore(count, journal.clone(), |index| ends.get(&index).copied());
            control.sections = Some((receive.gpadl, Arc::new(sections)));
        }
        ends.keys().for_each(|&index| journal.forget_round(index));
        self.rebuild(control);
        self.check_trust();
    }

    /// The operator restarts the port: channels go on where their rings stand, as a successor's would. What was taken out
    /// of them and not given back is taken again.
    pub(super) fn reconnect(self: &Arc<Self>) {
        let plug = self.plug();
        self.disconnect(&plug);
        self.faulted.store(false, Ordering::SeqCst);
        self.trust.restore();
        let mut control = self.control();
        control.told = None;
        if control.resuming {
            // They are connected when all is told.
            return;
        }
        control.left = control.waiting();
        let journal = control.state.journal();
        let again: Result<Vec<(u16, Opened)>, NicError> = control
            .channels
            .iter()
            .map(|(&index, old)| Ok((index, old.again(index, journal.clone())?)))
            .collect();
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
        indices.into_iter().for_each(|index| self.connect(index, &plug));
    }

    pub(super) fn close(&self, index: u16) {
        let plug = self.plug();
        let opened = self.control().channels.remove(&index);
        // Waits until no worker touches it, so that `control` is not locked.
        self.port.disconnect(index);
        drop(plug);
        let Some(opened) = opened else { return };
        opened.channel.close();
        let mut control = self.control();
        control.past.add(&opened.channel);
        control.resuming &= index != 0;
        let effects = control.nvsp.channel_closed(index);
        self.carry_out(&mut control, effects, None);
        if index == 0 {
            control.left = Waiting::default();
            control.state.clear();
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

    fn disconnect(&self, _: &Plug<'_>) {
        let indices: Vec<u16> = self.control().channels.keys().copied().collect();
        indices.into_iter().for_each(|index| self.port.disconnect(index));
    }

    /// Leaves the guest's channels to a successor.
    pub(super) fn leave(&self) {
        self.disconnect(&self.plug());
        self.control().save();
    }

    /// The guest has the adapter no more.
    pub(super) fn forget(&self) {
        let indices: Vec<u16> = self.control().channels.keys().copied().collect();
        indices.into_iter().rev().for_each(|index| self.close(index));
        self.control().gpadls.clear();
    }

    pub(super) fn set_link(&self, up: bool) {
        let mut control = self.control();
        if control.nvsp.link_is_up() != up {
            self.plug_cable(&mut control, up);
        }
    }

    fn plug_cable(&self, control: &mut Control, up: bool) {
        control.nvsp.set_link(up);
        let effects = control.due(self.clock.now());
        self.carry_out(control, effects, None);
        self.rebuild(control);
        control.save();
    }

    /// The adapter will be taken from the guest: no frame for it any more, its cable is out, and the VMM is told once
    /// nothing is under way.
    pub(super) fn quiesce(&self) {
        let mut control = self.control();
        control.quiesce.get_or_insert_default();
        self.plug_cable(&mut control, false);
    }

    /// Tells guest and VMM what had to wait. How long until there is more, if there is.
    pub(super) fn tick(&self) -> Option<Duration> {
        let mut control = self.control();
        let now = self.clock.now();
        if control.resuming {
            return None;
        }
        let effects = control.due(now);
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
        if control.quiesce.as_mut().is_some_and(|quiesce| quiesce.look(quiet, statistics.sent())) {
            (self.requests)(FromSwitch::Quiet { device: self.number });
            return due;
        }
        Some(due.map_or(LOOK, |due| due.min(LOOK)))
    }

    pub(super) fn settings_changed(&self) {
        let settings = self.port.settings();
        let mut control = self.control();
        let effects = control.nvsp.configure(settings.mtu, settings.mac, settings.spoofing);
        self.carry_out(&mut control, effects, None);
        control.save();
    }

    /// Until when the guest has to wait for having made too many requests.
    #[inline]
    pub(crate) fn throttled(&self, now: Nanos) -> Option<Nanos> {
        self.throttle.until(now)
    }

    /// For a queue that has a control request to carry out, or an answer to write.
    pub(crate) fn lock(&self) -> Adapter<'_> {
        Adapter { device: self, control: self.control() }
    }

    /// The guest has `answer`.
    pub(crate) fn answered(&self, answer: &Answer) {
        if let Some(count) = answer.offer {
            (self.requests)(FromSwitch::OfferSubchannels { device: self.number, count });
        }
    }

    fn carry_out(&self, control: &mut Control, effects: Effects, mut asked: Option<Asked<'_>>) {
        let mut left: VecDeque<Effect> = effects.into_iter().collect();
        while let Some(effect) = left.pop_front() {
            let (to, message) = match (effect, &mut asked) {
                (Effect::Complete(payload), Some(asked)) => {
                    (asked.channel, Message::Completion(asked.transaction, payload))
                }
                (Effect::RndisReply(message) | Effect::Indicate(message), _) => {
                    (0, Message::Control(message))
                }
                (Effect::InBand(message), _) => (0, Message::InBand(message)),
                (Effect::MapReceive { gpadl }, _) => {
                    let bytes = control.gpadls.get(&gpadl).map(Pages::len);
                    // A new buffer has no sections that anybody owns.
                    control.sections = None;
                    left.extend(control.nvsp.mapped(Buffer::Receive, bytes));
                    continue;
                }
                (Effect::MapSend { gpadl }, _) => {
                    let bytes = control.gpadls.get(&gpadl).map(Pages::len);
                    left.extend(control.nvsp.mapped(Buffer::Send, bytes));
                    continue;
                }
                (Effect::Changed, _) => {
                    self.rebuild(control);
                    continue;
                }
                (Effect::OfferSubchannels(count), Some(asked)) => {
                    asked.answer.offer = Some(count);
                    continue;
                }
                (Effect::OfferSubchannels(count), None) => {
                    (self.requests)(FromSwitch::OfferSubchannels { device: self.number, count });
                    continue;
                }
                (Effect::Complete(_), None) => continue,
            };
            match &mut asked {
                Some(asked) if asked.channel == to => asked.answer.replies.push(message),
                _ => self.send(control, to, message),
            }
        }
    }

    fn send(&self, control: &Control, to: u16, message: Message) {
        match control.channels.get(&to).map(|opened| opened.channel.send(message)) {
            None | Some(Ok(true)) => {}
            // Its source sends it later, and may be asleep.
            Some(Ok(false)) => self.port.nudge(to),
            // The ring is of no use; whoever polls it finds out as well.
            Some(Err(fault)) => self.fault_as(&fault),
        }
    }

    /// Makes the path anew from what was negotiated, and shows it to all channels.
    fn rebuild(&self, control: &mut Control) {
        if control.resuming {
            // Not before all is told: sections that look new would wipe out what the predecessor left of them.
            return;
        }
        let data = control.nvsp.data_path();
        let rss = data.rss.as_ref().and_then(|wanted| hash(wanted, self.port.queues()));
        let receive = control.receive(&data, rss);
        let send = data.send.as_ref().and_then(|send| {
            let pages = control.gpadls.get(&send.gpadl)?.clone();
            Some(SendPath { pages, size: send.section_size, count: send.sections })
        });
        // Checksums that senders left are done on the way into the guest's memory, whatever it was offered.
        let large = Accepts::CHECKSUM | Accepts::TCP4 | Accepts::TCP6 | Accepts::ECN;
        let up = receive.is_some();
        let path = Path {
            receive,
            send,
            max_packets: data.max_packets_per_message as usize,
            transmit: data.state == Phase::Running && control.has_cable(),
            accepts: if data.rsc { large } else { Accepts::CHECKSUM },
        };
        control.path = Arc::new(path);
        for opened in control.channels.values() {
            opened.channel.set_path(&control.path);
        }
        // All ports are told of a change of this one.
        let told = (up, data.rss);
        if control.told.as_ref() != Some(&told) {
            self.port.set_steering(told.1.as_ref());
            let waiting = || PortState::Waiting("the guest's driver".into());
            self.port.set_state(if up { PortState::Up } else { waiting() });
            control.told = Some(told);
        }
    }

    /// Stops the adapter, if it was not stopped before, and tells the VMM.
    fn fault(&self, reason: &dyn std::fmt::Display) {
        if !self.faulted.swap(true, Ordering::SeqCst) {
            self.port.fault(reason);
            let reason = reason.to_string().chars().take(200).collect();
            (self.requests)(FromSwitch::Fault { device: self.number, reason });
        }
    }

    /// As [`Device::fault`]. What the VMM did does not end with its guest, nor with the adapter: it would do it again.
    fn fault_as(&self, fault: &QueueFault) {
        if matches!(fault, QueueFault::InterruptBlocks) {
            self.port.fault_for_good(fault);
        }
        self.fault(fault);
    }

    /// A queue cannot go on.
    #[cold]
    pub(crate) fn faulted(&self, fault: QueueFault) -> BackendFault {
        self.fault_as(&fault);
        Box::new(fault)
    }
}

/// What is to come of a request, once there is room for it.
#[derive(Debug, Default)]
pub(crate) struct Answer {
    /// What the guest is told, on the channel that it asked on.
    pub(crate) replies: Vec<Message>,
    /// Subchannels that the VMM is to offer: the guest has to know of its grant first.
    offer: Option<u16>,
}

/// A request that is carried out.
struct Asked<'a> {
    channel: u16,
    transaction: u64,
    answer: &'a mut Answer,
}

/// The adapter, while a queue carries out a control request and answers it.
pub(crate) struct Adapter<'d> {
    device: &'d Device,
    control: MutexGuard<'d, Control>,
}

impl Adapter<'_> {
    /// Carries out what was asked on `channel`.
    pub(crate) fn request(
        &mut self,
        channel: &Channel,
        request: Request,
        now: Nanos,
    ) -> Result<Answer, QueueFault> {
        let Self { device, control } = self;
        device.throttle.count(now);
        let (effects, transaction) = match request {
            Request::Nvsp(message, transaction, wanted) => {
                (control.nvsp.request(&message, wanted)?, transaction)
            }
            Request::Rndis(message) => {
                let statistics = control.statistics();
                control.nvsp.set_statistics(statistics);
                (control.nvsp.rndis(&message)?, 0)
            }
        };
        let mut answer = Answer::default();
        let asked = Asked { channel: channel.index, transaction, answer: &mut answer };
        device.carry_out(control, effects, Some(asked));
        Ok(answer)
    }

    /// Saves what a successor must know, if it has changed. `waiting` is what may wait on the primary channel, if that is the
    /// one that is locked.
    pub(crate) fn keep(&mut self, waiting: Option<Waiting>) {
        let waiting = waiting.unwrap_or_else(|| self.control.waiting());
        self.control.nvsp.set_waiting(waiting);
        if !self.control.nvsp.is_kept() {
            self.control.write();
        }
    }
}
