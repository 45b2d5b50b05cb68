//! Poll workers: one thread per switching processor.
//!
//! A worker holds tasks, each a receive queue. A task that moves frames is *active* and polled in turn. One that found
//! nothing for a while is *armed*: its guest is asked for doorbells, and it costs nothing until one comes (384 silent
//! ports are 384 entries in an epoll set, and no work). While some tasks are active the doorbells of the others are
//! looked at every few rounds; when none is active the worker sleeps.
//!
//! Polling in vain takes the processor from others, and costs a system call a round for a device. So each task has a window
//! of its own: it grows while frames come soon after the task was armed, when a longer one would have caught them, and
//! shrinks, to nothing at last, while they do not.
//!
//! A worker that shares its processor with guests waits for its turn when it is woken ([`Sharing::preempt`]). Otherwise each
//! doorbell would end in a switch to the worker, which finds the one frame that the guest had time to write: a guest and its
//! switch on one processor move five times as much when the guest writes until it has to wait. For the same reason a worker
//! that polls in vain gives way between two polls. On a processor of its own a worker runs at once in either case.
//!
//! The arming order makes a lost wake-up impossible: ask for doorbells, then look once more, then sleep.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{Timespec, epoll};

use crate::doorbell::Doorbell;
use crate::os;

/// Nanoseconds since the process's clock began.
pub type Nanos = u64;

/// A monotonic clock.
#[derive(Debug, Clone, Copy)]
pub struct Clock(Instant);

impl Default for Clock {
    fn default() -> Self {
        Self(Instant::now())
    }
}

impl Clock {
    /// Nanoseconds since the clock was made.
    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "584 years")]
    pub fn now(&self) -> Nanos {
        self.0.elapsed().as_nanos() as Nanos
    }
}

/// What a poll found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Polled {
    /// Frames were moved.
    Moved(usize),
    /// Nothing there.
    Empty,
    /// The task is over; the worker lets it go.
    Gone,
}

/// What an idle task waits for.
#[derive(Clone)]
pub enum Wait {
    /// There is work already.
    Nothing,
    /// This descriptor becoming readable.
    Readable(Arc<dyn AsFd + Send + Sync>),
    /// This moment, if it is not nudged before.
    Until(Nanos),
    /// A nudge only.
    Nudge,
}

impl std::fmt::Debug for Wait {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Nothing => f.write_str("Nothing"),
            Self::Readable(fd) => write!(f, "Readable({:?})", fd.as_fd()),
            Self::Until(at) => write!(f, "Until({at})"),
            Self::Nudge => f.write_str("Nudge"),
        }
    }
}

/// A receive queue as a worker sees it. `S` is what a worker keeps for all its tasks.
pub trait Task<S>: Send + Sync {
    /// Moves up to one burst.
    fn poll(&self, scratch: &mut S, now: Nanos) -> Polled;
    /// Gets ready to sleep, and says what to wait for.
    fn arm(&self) -> Wait;
    /// Is about to be polled again.
    fn disarm(&self);
    /// `nanos` were spent on a poll that moved frames.
    fn spent(&self, nanos: Nanos);
}

/// Identifies a task among all workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TaskId(pub u32);

enum Command<S> {
    Add(TaskId, Arc<dyn Task<S>>),
    Remove(TaskId),
    Nudge(TaskId),
    Stop,
}

/// What a worker is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Activity {
    /// Polling.
    Polling = 0,
    /// Waiting for doorbells.
    Asleep = 1,
    /// Without tasks.
    Parked = 2,
}

#[derive(Debug, Default)]
struct Status {
    activity: AtomicU8,
    sleeps: AtomicU64,
    busy: AtomicU64,
}

struct Shared<S> {
    inbox: Mutex<Vec<Command<S>>>,
    pending: AtomicBool,
    wake: Doorbell,
    status: Status,
}

/// How a worker shares its processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sharing {
    /// A task that moved nothing for so long, or less, goes to sleep.
    pub idle: Duration,
    /// Whether a worker that is woken takes the processor from whoever has it, and keeps it while it polls in vain.
    pub preempt: bool,
}

/// A worker's handle. Dropping it stops the thread.
pub struct Worker<S> {
    cpu: usize,
    shared: Arc<Shared<S>>,
    thread: Option<JoinHandle<()>>,
}

impl<S> std::fmt::Debug for Worker<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Worker").field("cpu", &self.cpu).finish_non_exhaustive()
    }
}

impl<S: Default + 'static> Worker<S> {
    /// Starts a worker pinned to `cpu`.
    ///
    /// # Errors
    /// The processor is not available, or the process is out of descriptors or threads.
    pub fn start(cpu: usize, clock: Clock, sharing: Sharing) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            inbox: Mutex::new(Vec::new()),
            pending: AtomicBool::new(false),
            wake: Doorbell::new()?,
            status: Status::default(),
        });
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&epoll, &shared.wake, epoll::EventData::new_u64(WAKE), flags)?;
        let (report, pinned) = std::sync::mpsc::sync_channel(1);
        let run = {
            let shared = Arc::clone(&shared);
            move || {
                os::exact_timers();
                if !sharing.preempt {
                    os::wait_for_turn();
                }
                let result = os::pin_thread(cpu);
                let failed = result.is_err();
                let _ = report.send(result);
                if !failed {
                    let idle = u64::try_from(sharing.idle.as_nanos()).unwrap_or(u64::MAX);
                    let (slots, active, preempt) = (Vec::new(), Vec::new(), sharing.preempt);
                    Loop { shared, epoll, clock, idle, preempt, slots, active, timed: false }.run();
                }
            }
        };
        let thread = std::thread::Builder::new().name(format!("worker-{cpu}")).spawn(run)?;
        pinned.recv().map_err(std::io::Error::other)??;
        Ok(Self { cpu, shared, thread: Some(thread) })
    }
}

impl<S> Worker<S> {
    /// The processor.
    pub fn cpu(&self) -> usize {
        self.cpu
    }

    /// Gives the worker a task.
    pub fn add(&self, id: TaskId, task: Arc<dyn Task<S>>) {
        self.send(Command::Add(id, task));
    }

    /// Takes a task away; it may be polled once more.
    pub fn remove(&self, id: TaskId) {
        self.send(Command::Remove(id));
    }

    /// Makes the worker look at a task that may be asleep.
    pub fn nudge(&self, id: TaskId) {
        self.send(Command::Nudge(id));
    }

    /// What the worker is doing.
    pub fn activity(&self) -> Activity {
        match self.shared.status.activity.load(Ordering::Relaxed) {
            0 => Activity::Polling,
            1 => Activity::Asleep,
            _ => Activity::Parked,
        }
    }

    /// Times it went to sleep.
    pub fn sleeps(&self) -> u64 {
        self.shared.status.sleeps.load(Ordering::Relaxed)
    }

    /// Nanoseconds spent on frames since it started.
    pub fn busy(&self) -> Nanos {
        self.shared.status.busy.load(Ordering::Relaxed)
    }

    fn send(&self, command: Command<S>) {
        self.shared.inbox.lock().unwrap_or_else(PoisonError::into_inner).push(command);
        self.shared.pending.store(true, Ordering::Release);
        self.shared.wake.ring();
    }
}

impl<S> Drop for Worker<S> {
    fn drop(&mut self) {
        self.send(Command::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

const WAKE: u64 = u64::MAX;

/// Rounds over the active tasks between two looks at the doorbells of the others.
const ROUNDS_PER_CHECK: u32 = 16;

enum Phase {
    Active { idle_since: Option<Nanos> },
    Armed { until: Option<Nanos>, since: Nanos },
}

/// How long a task is polled in vain before it is armed; at most what the worker allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Window(Nanos);

impl Window {
    /// The task was armed for `slept`; `most` is the longest window.
    fn adapt(&mut self, slept: Nanos, most: Nanos) {
        self.0 = match self.0 {
            now if slept < most => now.saturating_mul(2).clamp(most / 4, most),
            now if now > most / 8 => now / 2,
            _ => 0,
        };
    }
}

struct Slot<S> {
    id: TaskId,
    task: Arc<dyn Task<S>>,
    phase: Phase,
    window: Window,
    /// What is in the epoll set for this slot. Held so that it can be taken out again: a descriptor whose file is
    /// shared with a guest does not leave the set by being closed here.
    registered: Option<Arc<dyn AsFd + Send + Sync>>,
}

struct Loop<S> {
    shared: Arc<Shared<S>>,
    epoll: std::os::fd::OwnedFd,
    clock: Clock,
    idle: Nanos,
    preempt: bool,
    slots: Vec<Option<Slot<S>>>,
    active: Vec<usize>,
    /// Some task waits for a moment.
    timed: bool,
}

impl<S: Default> Loop<S> {
    fn run(mut self) {
        let mut scratch = S::default();
        let mut rounds = 0u32;
        loop {
            if self.shared.pending.load(Ordering::Acquire) && !self.take_commands() {
                return;
            }
            let moved = self.round(&mut scratch);
            rounds = rounds.wrapping_add(1);
            if self.active.is_empty() {
                self.sleep();
                continue;
            }
            if rounds.is_multiple_of(ROUNDS_PER_CHECK) {
                self.look(Some(Timespec { tv_sec: 0, tv_nsec: 0 }));
                if self.timed {
                    self.wake_due();
                }
            }
            if !moved {
                self.pause();
            }
        }
    }

    /// Between two polls in vain.
    fn pause(&self) {
        if self.preempt {
            std::hint::spin_loop();
        } else {
            // To those whose work would be the next to move.
            std::thread::yield_now();
        }
    }

    /// Polls every active task once; true if any frame moved.
    fn round(&mut self, scratch: &mut S) -> bool {
        let mut now = self.clock.now();
        let mut any = false;
        let mut at = 0;
        while let Some(&index) = self.active.get(at) {
            let Some(slot) = self.slots[index].as_mut() else {
                self.active.swap_remove(at);
                continue;
            };
            match slot.task.poll(scratch, now) {
                Polled::Moved(_) => {
                    let end = self.clock.now();
                    let spent = end.saturating_sub(now);
                    slot.task.spent(spent);
                    let busy = &self.shared.status.busy;
                    busy.store(busy.load(Ordering::Relaxed).wrapping_add(spent), Ordering::Relaxed);
                    now = end;
                    any = true;
                    slot.phase = Phase::Active { idle_since: None };
                    at += 1;
                }
                Polled::Empty => {
                    if self.stays_active(index, now) {
                        at += 1;
                    } else {
                        self.active.swap_remove(at);
                    }
                }
                Polled::Gone => {
                    self.release(index);
                    self.active.swap_remove(at);
                }
            }
        }
        any
    }

    /// Decides about a task that found nothing: go on polling, or arm it.
    fn stays_active(&mut self, index: usize, now: Nanos) -> bool {
        let Some(slot) = self.slots[index].as_mut() else { return false };
        let Phase::Active { idle_since } = &mut slot.phase else { return false };
        let since = *idle_since.get_or_insert(now);
        if now.saturating_sub(since) < slot.window.0 {
            return true;
        }
        let until = match slot.task.arm() {
            Wait::Nothing => {
                slot.task.disarm();
                *idle_since = None;
                return true;
            }
            Wait::Readable(fd) => {
                self.register(index, Some(fd));
                None
            }
            Wait::Until(at) => {
                self.register(index, None);
                self.timed = true;
                Some(at)
            }
            // Nothing is held on to that the task has let go: a device must be free to be opened again.
            Wait::Nudge => {
                self.register(index, None);
                None
            }
        };
        if let Some(slot) = self.slots[index].as_mut() {
            slot.phase = Phase::Armed { until, since: now };
        }
        false
    }

    /// Makes `fd` what wakes the task in slot `index`.
    fn register(&mut self, index: usize, fd: Option<Arc<dyn AsFd + Send + Sync>>) {
        let Some(slot) = self.slots[index].as_mut() else { return };
        if let (Some(old), Some(new)) = (&slot.registered, &fd)
            && Arc::ptr_eq(old, new)
        {
            return;
        }
        if let Some(old) = slot.registered.take() {
            let _ = epoll::delete(&self.epoll, old.as_fd());
        }
        let Some(fd) = fd else { return };
        // Edge-triggered: a doorbell is never read, each ring of it is an event.
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        match epoll::add(&self.epoll, fd.as_fd(), epoll::EventData::new_u64(index as u64), flags) {
            Ok(()) => slot.registered = Some(fd),
            Err(error) => tracing::error!(%error, "cannot wait for a doorbell; the queue stays silent"),
        }
    }

    fn release(&mut self, index: usize) {
        self.register(index, None);
        self.slots[index] = None;
    }

    fn activate(&mut self, index: usize) {
        if let Some(Some(slot)) = self.slots.get_mut(index)
            && let Phase::Armed { since, .. } = slot.phase
        {
            slot.window.adapt(self.clock.now().saturating_sub(since), self.idle);
            slot.task.disarm();
            slot.phase = Phase::Active { idle_since: None };
            self.active.push(index);
        }
    }

    /// No task is active: waits for a doorbell, a command or the next moment a task asked for.
    fn sleep(&mut self) {
        let status = &self.shared.status;
        let parked = self.slots.iter().all(Option::is_none);
        let activity = if parked { Activity::Parked } else { Activity::Asleep };
        status.activity.store(activity as u8, Ordering::Relaxed);
        status.sleeps.store(status.sleeps.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
        let due = self.slots.iter().flatten().filter_map(Slot::due).min();
        let timeout = due.map(|due| timespec(due.saturating_sub(self.clock.now())));
        self.look(timeout);
        self.shared.status.activity.store(Activity::Polling as u8, Ordering::Relaxed);
        if due.is_some() {
            self.wake_due();
        }
    }

    fn wake_due(&mut self) {
        let now = self.clock.now();
        self.timed = self.slots.iter().flatten().any(|slot| slot.due().is_some());
        for index in 0..self.slots.len() {
            if self.slots[index].as_ref().and_then(Slot::due).is_some_and(|due| due <= now) {
                self.activate(index);
            }
        }
    }

    /// Activates the tasks whose doorbell rang.
    fn look(&mut self, timeout: Option<Timespec>) {
        let mut events =
            [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }; 64];
        let count = epoll::wait(&self.epoll, &mut events, timeout.as_ref()).unwrap_or(0);
        for event in &events[..count] {
            let data = event.data;
            if let Ok(index) = usize::try_from(data.u64())
                && data.u64() != WAKE
            {
                self.activate(index);
            }
        }
    }

    /// Carries out what other threads asked for; false if the worker is to end.
    fn take_commands(&mut self) -> bool {
        self.shared.pending.store(false, Ordering::Release);
        let commands = std::mem::take(&mut *self.shared.inbox.lock().unwrap_or_else(PoisonError::into_inner));
        for command in commands {
            match command {
                Command::Add(id, task) => {
                    let phase = Phase::Armed { until: None, since: self.clock.now() };
                    let slot = Slot { id, task, phase, window: Window(self.idle), registered: None };
                    let index = self.slots.iter().position(Option::is_none).unwrap_or(self.slots.len());
                    if index == self.slots.len() {
                        self.slots.push(Some(slot));
                    } else {
                        self.slots[index] = Some(slot);
                    }
                    self.activate(index);
                }
                Command::Remove(id) => self.find(id).into_iter().for_each(|index| {
                    self.release(index);
                    self.active.retain(|&active| active != index);
                }),
                Command::Nudge(id) => self.find(id).into_iter().for_each(|index| self.activate(index)),
                Command::Stop => return false,
            }
        }
        true
    }

    fn find(&self, id: TaskId) -> Option<usize> {
        self.slots.iter().position(|slot| slot.as_ref().is_some_and(|slot| slot.id == id))
    }
}

impl<S> Slot<S> {
    fn due(&self) -> Option<Nanos> {
        match self.phase {
            Phase::Armed { until, .. } => until,
            Phase::Active { .. } => None,
        }
    }
}

fn timespec(nanos: Nanos) -> Timespec {
    let duration = Duration::from_nanos(nanos);
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(duration.subsec_nanos()),
    }
}

#[cfg(test)]
mod tests;
