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

use rustix::event::epoll;

use crate::doorbell::Doorbell;
use crate::os;

mod rounds;

use rounds::Loop;

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
    /// This descriptor becoming readable, but no longer than until this moment.
    ReadableUntil(Arc<dyn AsFd + Send + Sync>, Nanos),
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
            Self::ReadableUntil(fd, at) => write!(f, "ReadableUntil({:?}, {at})", fd.as_fd()),
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
    /// Another worker will let the task arrive; what else concerns it has to wait for that.
    Expect(TaskId),
    /// Let go by the worker that had it; none if it was over.
    Arrive(TaskId, Option<Arc<dyn Task<S>>>),
    /// To the worker with this inbox.
    Move(TaskId, Arc<Shared<S>>),
    Stop,
}

impl<S> Command<S> {
    /// The task that has to be there first.
    fn needs(&self) -> Option<TaskId> {
        match self {
            Self::Remove(id) | Self::Nudge(id) | Self::Expect(id) | Self::Move(id, _) => Some(*id),
            Self::Add(..) | Self::Arrive(..) | Self::Stop => None,
        }
    }
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

impl<S> Shared<S> {
    fn send(&self, command: Command<S>) {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner).push(command);
        self.pending.store(true, Ordering::Release);
        self.wake.ring();
    }
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
                    Loop::new(shared, epoll, clock, idle, sharing.preempt).run();
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
        self.shared.send(Command::Add(id, task));
    }

    /// Takes a task away; it may be polled once more.
    pub fn remove(&self, id: TaskId) {
        self.shared.send(Command::Remove(id));
    }

    /// Gives a task to the worker `to`, which touches it only when this one has let it go for good: a late doorbell of the
    /// one must not undo what the other has asked the guest for. Whatever concerns the task goes to `to` from now on; calls
    /// about one task must follow each other.
    pub fn hand_over(&self, id: TaskId, to: &Self) {
        if !Arc::ptr_eq(&self.shared, &to.shared) {
            to.shared.send(Command::Expect(id));
            self.shared.send(Command::Move(id, Arc::clone(&to.shared)));
        }
    }

    /// Makes the worker look at a task that may be asleep.
    pub fn nudge(&self, id: TaskId) {
        self.shared.send(Command::Nudge(id));
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
}

impl<S> Drop for Worker<S> {
    fn drop(&mut self) {
        self.shared.send(Command::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

const WAKE: u64 = u64::MAX;

#[cfg(test)]
mod tests;
