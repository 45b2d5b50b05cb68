//! A port's queues: where frames enter the switch ([`SourceQueue`], a worker's task) and where they leave it
//! ([`SinkQueue`], which several workers may deliver to).
//!
//! Each has a lock of its own. A source's is taken once per burst by its worker, a sink's once per burst and receiver;
//! in the placed case nobody else wants them. The control plane takes them to swap a ring in or out, announcing itself
//! so that a busy worker lets it through.

use std::fmt::Display;
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};

use arrayvec::ArrayVec;
use vmq::frame::{Accepts, BURST_FRAMES, Burst, FrameStore, Offload};
use vmq::ring::RingFault;
use vmq::worker::{Nanos, Polled, Task, Wait};

use crate::backend;
use crate::capture::Direction;
use crate::drops::DropReason;
use crate::offload::translate::{FrameSink, Translator, Want};
use crate::pipeline::{self, List, Plan};
use crate::port::PortCore;
use crate::ports::device::{DeviceSink, DeviceSource};
use crate::ports::file::{FileSink, FileSource, Progress};
use crate::ports::vhost_user::queue::ActiveRing;
use crate::report::PortState;
use crate::snapshot::{Outlet, Snapshot};
use crate::tally::{Counters, Tally};

/// Where a queue's frames come from.
#[derive(Debug)]
pub enum Source {
    /// Nobody is connected.
    Absent,
    /// A guest's transmit ring.
    Ring(Box<ActiveRing>),
    /// A TAP queue or packet socket.
    Device(Box<DeviceSource>),
    /// A device model outside this crate.
    Backend(Box<dyn backend::FrameSource>),
    /// A capture being played.
    File(Box<FileSource>),
}

/// Where a queue's frames go.
#[derive(Debug)]
pub enum Sink {
    /// Nowhere, for a reason.
    Absent(DropReason),
    /// A guest's receive ring.
    Ring(Box<ActiveRing>),
    /// A TAP queue or packet socket.
    Device(Box<DeviceSink>),
    /// A device model outside this crate.
    Backend(Box<dyn backend::FrameSink>),
    /// A capture being written.
    File(Box<FileSink>),
}

/// A lock that a worker holds most of the time and the control plane now and then.
#[derive(Debug)]
struct Contended<T> {
    waiting: AtomicUsize,
    value: Mutex<T>,
}

impl<T> Contended<T> {
    fn new(value: T) -> Self {
        Self { waiting: AtomicUsize::new(0), value: Mutex::new(value) }
    }

    /// For the control plane: workers stand back until it has had its turn.
    fn lock(&self) -> MutexGuard<'_, T> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let guard = self.value.lock().unwrap_or_else(PoisonError::into_inner);
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        guard
    }

    /// For a worker that may as well come back later.
    #[inline]
    fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        if self.waiting.load(Ordering::Relaxed) > 0 {
            return None;
        }
        match self.value.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// For a worker that must deliver now.
    #[inline]
    fn lock_now(&self) -> MutexGuard<'_, T> {
        while self.waiting.load(Ordering::Relaxed) > 0 {
            std::thread::yield_now();
        }
        self.value.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a worker keeps for all its queues.
#[derive(Debug, Default)]
pub struct Scratch {
    frames: FrameStore,
    plan: Plan,
    delivery: Delivery,
}

/// What delivering takes.
#[derive(Debug, Default)]
struct Delivery {
    translator: Translator,
    lists: Vec<List>,
}

/// A queue through which frames enter the switch.
#[derive(Debug)]
pub struct SourceQueue {
    /// The port it belongs to.
    pub port: Arc<PortCore>,
    /// Number in the port.
    pub queue: u16,
    /// What happened so far.
    pub counters: Counters,
    state: Contended<Source>,
    closed: AtomicBool,
    /// The same port's capture file, which also takes the frames that were dropped.
    file: OnceLock<Arc<SinkQueue>>,
}

impl SourceQueue {
    /// Queue number `queue` of `port`, with nothing connected.
    pub fn new(port: Arc<PortCore>, queue: u16) -> Self {
        let state = Contended::new(Source::Absent);
        Self {
            port,
            queue,
            counters: Counters::default(),
            state,
            closed: AtomicBool::new(false),
            file: OnceLock::new(),
        }
    }

    /// Puts `source` in place of what was there. After this returns no worker touches the old one.
    pub fn swap(&self, source: Source) -> Source {
        std::mem::replace(&mut *self.state.lock(), source)
    }

    /// Looks at, or changes, what is connected.
    pub fn with<R>(&self, act: impl FnOnce(&mut Source) -> R) -> R {
        act(&mut self.state.lock())
    }

    /// Has frames from here that the switch drops written to the capture file of `sink`, with the reason.
    pub fn note_drops_in(&self, sink: &Arc<SinkQueue>) {
        // A restarted port has the same queues.
        let _ = self.file.set(Arc::clone(sink));
    }

    fn write_drops(&self, burst: &Burst<'_>, dropped: &[(u8, DropReason)], now: Nanos) {
        let Some(sink) = self.file.get().filter(|_| !dropped.is_empty()) else { return };
        let written = sink.with(|sink| match sink {
            Sink::File(file) => file.dropped(now, burst, dropped).map_err(|error| error.to_string()),
            _ => Ok(()),
        });
        if let Err(error) = written {
            self.port.fault(error);
        }
    }

    /// Switches a frame as if it had come in here. Meant for a frame now and then, from the control plane.
    pub fn inject(&self, frame: &[u8], now: Nanos) {
        let Scratch { mut frames, mut plan, mut delivery } = Scratch::default();
        // Whoever holds the queue may count.
        let _state = self.state.lock();
        let snapshot = self.port.snapshot.load();
        let (mut burst, mut tally) = (Burst::new(&mut frames), Tally::default());
        if burst.push(frame.into(), Offload::NONE) {
            self.switch(&snapshot, &mut burst, &mut plan, &mut delivery, now, &mut tally);
            self.counters.add(&tally);
        }
    }

    /// The guest enables or disables its ring, if one is connected. What it sent in between is of yesterday.
    pub fn set_enabled(&self, enabled: bool) {
        let mut state = self.state.lock();
        let Source::Ring(ring) = &mut *state else { return };
        if enabled && !ring.enabled {
            let mut tally = Tally::default();
            // A ring's worth at most, and a burst at a time: chains that wait to be given back are few.
            while tally.dropped_total() < vmq::ring::MAX_SIZE.into() {
                let before = tally.dropped_total();
                // A fault is met by the next burst, too.
                let discarded = ring.discard(&mut tally);
                if discarded.is_err() || tally.dropped_total() == before {
                    break;
                }
            }
            self.counters.add(&tally);
        }
        ring.enabled = enabled;
    }

    /// Ends the task that a worker has of it.
    pub fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        self.swap(Source::Absent);
    }
}

fn polled(tally: &Tally) -> Polled {
    match usize::try_from(tally.frames + tally.dropped_total()) {
        Ok(0) => Polled::Empty,
        Ok(count) => Polled::Moved(count),
        Err(_) => Polled::Moved(usize::MAX),
    }
}

impl Task<Scratch> for SourceQueue {
    fn poll(&self, scratch: &mut Scratch, now: Nanos) -> Polled {
        if self.closed.load(Ordering::Relaxed) {
            return Polled::Gone;
        }
        let Some(mut state) = self.state.try_lock() else { return Polled::Empty };
        let source = &mut *state;
        // Held for this burst only: a silent queue keeps no old snapshot alive.
        let snapshot = self.port.snapshot.load();
        let mut tally = Tally::default();
        // A mistake of ours stops the port that it came to light at, not the worker with all the others.
        let outcome = panic::catch_unwind(AssertUnwindSafe(|| match source {
            Source::Absent => Ok(()),
            Source::Ring(ring) => self.poll_ring(ring, &snapshot, scratch, now, &mut tally),
            Source::Device(device) => self.poll_device(device, &snapshot, scratch, now, &mut tally),
            Source::Backend(backend) => {
                self.poll_backend(&mut **backend, &snapshot, scratch, now, &mut tally)
            }
            Source::File(file) => self.poll_file(file, &snapshot, scratch, now, &mut tally),
        }));
        self.counters.add(&tally);
        let fault: Box<dyn Display> = match outcome {
            Ok(Ok(())) => return polled(&tally),
            Ok(Err(fault)) => Box::new(fault),
            Err(_) => {
                *scratch = Scratch::default();
                Box::new("a mistake in the switch; its log says where")
            }
        };
        *state = Source::Absent;
        // Under the lock: a restart that follows must not be undone by the fault it ended.
        self.port.fault(fault);
        Polled::Empty
    }

    fn arm(&self) -> Wait {
        let Some(mut state) = self.state.try_lock() else { return Wait::Nothing };
        match &mut *state {
            Source::Absent => Wait::Nudge,
            Source::Ring(ring) => match (ring.arm(), &ring.kick) {
                (false, Some(kick)) => Wait::Readable(Arc::clone(kick) as _),
                // There is work, or the guest gave no doorbell because it wants to be polled.
                _ => Wait::Nothing,
            },
            Source::Device(device) => device.arm(),
            Source::Backend(backend) => backend.arm(),
            Source::File(file) => file.next_due().map_or(Wait::Nudge, Wait::Until),
        }
    }

    fn disarm(&self) {
        if let Some(mut state) = self.state.try_lock() {
            match &mut *state {
                Source::Ring(ring) => ring.disarm(),
                Source::Backend(backend) => backend.disarm(),
                _ => {}
            }
        }
    }

    fn spent(&self, nanos: Nanos) {
        self.counters.busy(nanos);
    }
}

/// Why a source stopped, in words for the operator.
type Fault = Box<dyn std::error::Error + Send + Sync>;

impl SourceQueue {
    #[inline]
    fn poll_ring(
        &self,
        ring: &mut ActiveRing,
        snapshot: &Snapshot,
        scratch: &mut Scratch,
        now: Nanos,
        tally: &mut Tally,
    ) -> Result<(), Fault> {
        if !ring.enabled {
            if ring.discard(tally)? {
                self.counters.called();
            }
            return Ok(());
        }
        let Scratch { frames, plan, delivery } = scratch;
        let mut burst = Burst::new(frames);
        let memory = Arc::clone(&ring.memory);
        let received = ring.receive(&mut burst, tally);
        if received.is_err() || memory.lost() {
            // Heads read from memory that is gone would be zeroes.
            tally.drop_many(DropReason::Faulted, burst.len());
        } else if !burst.is_empty() {
            self.switch(snapshot, &mut burst, plan, delivery, now, tally);
        }
        drop(burst);
        // What is read from memory that is gone is nonsense, and not the fault to tell of.
        if ring.lost() {
            return Err(RingFault::MemoryLost.into());
        }
        received?;
        if ring.complete()? {
            self.counters.called();
        }
        if ring.lost() {
            return Err(RingFault::MemoryLost.into());
        }
        Ok(())
    }

    fn poll_device(
        &self,
        device: &mut DeviceSource,
        snapshot: &Snapshot,
        scratch: &mut Scratch,
        now: Nanos,
        tally: &mut Tally,
    ) -> Result<(), Fault> {
        let Scratch { frames, plan, delivery } = scratch;
        let mut burst = Burst::new(frames);
        let received = device.receive(&mut burst, tally);
        if !burst.is_empty() {
            self.switch(snapshot, &mut burst, plan, delivery, now, tally);
        }
        drop(burst);
        received?;
        device.complete();
        Ok(())
    }

    fn poll_backend(
        &self,
        backend: &mut dyn backend::FrameSource,
        snapshot: &Snapshot,
        scratch: &mut Scratch,
        now: Nanos,
        tally: &mut Tally,
    ) -> Result<(), Fault> {
        let Scratch { frames, plan, delivery } = scratch;
        let mut burst = Burst::new(frames);
        let received = backend.receive(&mut burst, now, tally);
        if received.is_err() {
            tally.drop_many(DropReason::Faulted, burst.len());
        } else if !burst.is_empty() {
            self.switch(snapshot, &mut burst, plan, delivery, now, tally);
        }
        drop(burst);
        received?;
        if backend.complete()? {
            self.counters.called();
        }
        Ok(())
    }

    fn poll_file(
        &self,
        file: &mut FileSource,
        snapshot: &Snapshot,
        scratch: &mut Scratch,
        now: Nanos,
        tally: &mut Tally,
    ) -> Result<(), Fault> {
        let Scratch { frames, plan, delivery } = scratch;
        let mut burst = Burst::new(frames);
        let received = file.receive(now, &mut burst, tally);
        if !burst.is_empty() {
            self.switch(snapshot, &mut burst, plan, delivery, now, tally);
            self.write_drops(&burst, plan.dropped(), now);
        }
        if received? == Progress::Finished {
            self.port.set_state(PortState::Finished);
        }
        Ok(())
    }

    /// Takes a burst through the pipeline and delivers it.
    #[inline]
    fn switch(
        &self,
        snapshot: &Snapshot,
        burst: &mut Burst<'_>,
        plan: &mut Plan,
        delivery: &mut Delivery,
        now: Nanos,
        tally: &mut Tally,
    ) {
        pipeline::forward(&snapshot.topology, self.port.index, seconds(now), burst, plan, tally);
        if self.port.taps.is_active() {
            let list = (0..u8::try_from(burst.len()).unwrap_or(u8::MAX)).map(|index| {
                let dropped = plan.dropped().iter().find(|(dropped, _)| *dropped == index);
                (index, dropped.map(|&(_, reason)| reason))
            });
            self.port.taps.show(&self.port, Direction::Inbound, burst, list);
        }
        for (port, list) in plan.deliveries() {
            // A snapshot has an outlet for each port that its topology knows.
            if let Some(outlet) = snapshot.outlets.get(usize::from(port)).and_then(Option::as_ref) {
                outlet.deliver(burst, list, delivery, now);
            }
        }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "136 years")]
fn seconds(now: Nanos) -> u32 {
    (now / 1_000_000_000) as u32
}

impl Outlet {
    /// Hands the frames of `list` to the port.
    #[inline]
    fn deliver(&self, burst: &Burst<'_>, list: &List, delivery: &mut Delivery, now: Nanos) {
        let Delivery { translator, lists } = delivery;
        match (self.sinks.as_slice(), &self.steering) {
            ([], _) => {}
            ([sink, ..], None) => self.put(sink, burst, list, translator, now),
            (sinks, Some(steering)) => {
                steering.spread(burst, list, lists, sinks.len());
                for (sink, list) in sinks.iter().zip(&*lists).filter(|(_, list)| !list.is_empty()) {
                    self.put(sink, burst, list, translator, now);
                }
            }
        }
    }

    #[inline]
    fn put(&self, sink: &SinkQueue, burst: &Burst<'_>, list: &[u8], translator: &mut Translator, now: Nanos) {
        let mut state = sink.state.lock_now();
        let mut tally = Tally::default();
        let want = Want {
            accepts: state.accepts(),
            coalesce: self.coalesce,
            max_frame: self.longest,
            tag: self.tag,
        };
        let port = &*self.port;
        let mut put = Put { port, sink: &mut state, now, called: false, fault: None, tally: &mut tally };
        if Translator::needed(burst, list, &want) {
            let mut dropped = Tally::default();
            let mut shown = ArrayVec::<(u8, Option<DropReason>), BURST_FRAMES>::new();
            translator.run(burst, list, &want, &mut put, &mut |index, reason| {
                dropped.drop(reason);
                let _ = shown.try_push((index, Some(reason)));
            });
            put.tally.absorb(&dropped);
            if !shown.is_empty() && port.taps.is_active() {
                port.taps.show(port, Direction::Outbound, burst, shown.iter().copied());
            }
        } else {
            put.put(burst, list);
        }
        let Put { called, fault, .. } = put;
        if called {
            sink.counters.called();
        }
        if let Some(fault) = fault {
            *state = Sink::Absent(DropReason::Faulted);
            self.port.fault(fault);
        }
        sink.counters.add(&tally);
    }
}

/// One delivery to a locked sink.
struct Put<'a> {
    port: &'a PortCore,
    sink: &'a mut Sink,
    now: Nanos,
    called: bool,
    fault: Option<String>,
    tally: &'a mut Tally,
}

impl FrameSink for Put<'_> {
    #[inline]
    fn put(&mut self, burst: &Burst<'_>, list: &[u8]) {
        if self.port.taps.is_active() {
            self.hand_over_and_show(burst, list);
        } else {
            self.hand_over(burst, list);
        }
    }
}

impl Put<'_> {
    /// One frame at a time, so that whoever watches sees what became of each.
    #[cold]
    fn hand_over_and_show(&mut self, burst: &Burst<'_>, list: &[u8]) {
        for &index in list {
            let before = *self.tally;
            self.hand_over(burst, &[index]);
            let dropped = self.tally.dropped_since(&before);
            self.port.taps.show(self.port, Direction::Outbound, burst, std::iter::once((index, dropped)));
        }
    }

    #[inline]
    fn hand_over(&mut self, burst: &Burst<'_>, list: &[u8]) {
        if self.fault.is_some() {
            self.tally.drop_many(DropReason::Faulted, list.len());
            return;
        }
        let before = *self.tally;
        let put = match self.sink {
            Sink::Absent(reason) => return self.tally.drop_many(*reason, list.len()),
            Sink::Ring(ring) => ring.put(burst, list, self.tally).map_err(|fault| fault.to_string()),
            Sink::Backend(backend) => {
                backend.put(self.now, burst, list, self.tally).map_err(|fault| fault.to_string())
            }
            Sink::Device(device) => {
                self.fault = device.put(burst, list, self.tally).err().map(|fault| fault.to_string());
                return;
            }
            Sink::File(file) => {
                self.fault = file.put(self.now, burst, list, self.tally).err().map(|fault| fault.to_string());
                return;
            }
        };
        match put {
            Ok(called) => self.called |= called,
            Err(fault) => {
                // The guest is never shown what was written.
                *self.tally = before;
                self.tally.drop_many(DropReason::Faulted, list.len());
                self.fault = Some(fault);
            }
        }
    }
}

/// A queue through which frames leave the switch.
#[derive(Debug)]
pub struct SinkQueue {
    /// Number in the port.
    pub queue: u16,
    /// What happened so far.
    pub counters: Counters,
    state: Contended<Sink>,
}

impl Sink {
    #[inline]
    fn accepts(&self) -> Accepts {
        match self {
            // What nobody receives need not be translated.
            Self::Absent(_) => Accepts::all(),
            Self::Ring(ring) => ring.features.accepts,
            Self::Device(device) => device.accepts(),
            Self::Backend(backend) => backend.accepts(),
            Self::File(_) => Accepts::empty(),
        }
    }
}

impl SinkQueue {
    /// Queue number `queue`, with nothing connected.
    pub fn new(queue: u16) -> Self {
        let state = Contended::new(Sink::Absent(DropReason::NotReady));
        Self { queue, counters: Counters::default(), state }
    }

    /// Puts `sink` in place of what was there. After this returns no worker touches the old one.
    pub fn swap(&self, sink: Sink) -> Sink {
        std::mem::replace(&mut *self.state.lock(), sink)
    }

    /// Looks at, or changes, what is connected.
    pub fn with<R>(&self, act: impl FnOnce(&mut Sink) -> R) -> R {
        act(&mut self.state.lock())
    }
}

#[cfg(test)]
mod tests;
