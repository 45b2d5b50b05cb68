//! What a worker's thread does.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Once, PoisonError};
use std::time::Duration;

use rustix::event::{Timespec, epoll};

use super::{Activity, Clock, Command, Nanos, Polled, Shared, Task, TaskId, WAKE, Wait};

/// Rounds over the active tasks between two looks at the doorbells of the others.
const ROUNDS_PER_CHECK: u32 = 16;

/// How long a task sleeps whose doorbell the kernel does not watch for us (out of memory, or of `max_user_watches`).
const UNHEARD: Nanos = 1_000_000;

enum Phase {
    Active { idle_since: Option<Nanos> },
    Armed { until: Option<Nanos>, since: Nanos },
}

/// How long a task is polled in vain before it is armed; at most what the worker allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Window(pub(super) Nanos);

impl Window {
    /// The task was armed for `slept`; `most` is the longest window.
    pub(super) fn adapt(&mut self, slept: Nanos, most: Nanos) {
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

pub(super) struct Loop<S> {
    shared: Arc<Shared<S>>,
    epoll: OwnedFd,
    clock: Clock,
    idle: Nanos,
    preempt: bool,
    slots: Vec<Option<Slot<S>>>,
    active: Vec<usize>,
    /// Some task waits for a moment.
    timed: bool,
    /// Tasks that other workers have yet to let go.
    coming: Vec<TaskId>,
    /// What is to be done when they have arrived, in order.
    later: Vec<Command<S>>,
}

impl<S: Default> Loop<S> {
    pub(super) fn new(
        shared: Arc<Shared<S>>,
        epoll: OwnedFd,
        clock: Clock,
        idle: Nanos,
        preempt: bool,
    ) -> Self {
        let (slots, active, coming, later) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        Self { shared, epoll, clock, idle, preempt, slots, active, timed: false, coming, later }
    }

    /// Serves until it is told to stop.
    pub(super) fn run(mut self) {
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
        let (fd, until) = match slot.task.arm() {
            Wait::Nothing => {
                slot.task.disarm();
                *idle_since = None;
                return true;
            }
            Wait::Readable(fd) => (Some(fd), None),
            Wait::ReadableUntil(fd, at) => (Some(fd), Some(at)),
            // Nothing is held on to that the task has let go: a device must be free to be opened again.
            Wait::Until(at) => (None, Some(at)),
            Wait::Nudge => (None, None),
        };
        let until = match self.register(index, fd) {
            Ok(()) => until,
            Err(error) => {
                static TOLD: Once = Once::new();
                TOLD.call_once(
                    || tracing::error!(%error, "cannot wait for a doorbell; the queue is polled each millisecond"),
                );
                Some(until.unwrap_or(Nanos::MAX).min(now.saturating_add(UNHEARD)))
            }
        };
        self.timed |= until.is_some();
        if let Some(slot) = self.slots[index].as_mut() {
            slot.phase = Phase::Armed { until, since: now };
        }
        false
    }

    /// Makes `fd` what wakes the task in slot `index`; nothing does if that fails.
    fn register(&mut self, index: usize, fd: Option<Arc<dyn AsFd + Send + Sync>>) -> rustix::io::Result<()> {
        let Some(slot) = self.slots[index].as_mut() else { return Ok(()) };
        if let (Some(old), Some(new)) = (&slot.registered, &fd)
            && Arc::ptr_eq(old, new)
        {
            return Ok(());
        }
        if let Some(old) = slot.registered.take() {
            let _ = epoll::delete(&self.epoll, old.as_fd());
        }
        let Some(fd) = fd else { return Ok(()) };
        // Edge-triggered: a doorbell is never read, each ring of it is an event.
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&self.epoll, fd.as_fd(), epoll::EventData::new_u64(index as u64), flags)?;
        slot.registered = Some(fd);
        Ok(())
    }

    fn release(&mut self, index: usize) -> Option<Arc<dyn Task<S>>> {
        let _ = self.register(index, None);
        self.slots[index].take().map(|slot| slot.task)
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
        commands.into_iter().all(|command| self.carry_out(command))
    }

    fn carry_out(&mut self, command: Command<S>) -> bool {
        if command.needs().is_some_and(|id| self.coming.contains(&id)) {
            self.later.push(command);
            return true;
        }
        match command {
            Command::Add(id, task) => self.admit(id, task),
            Command::Remove(id) => drop(self.dismiss(id)),
            Command::Nudge(id) => self.find(id).into_iter().for_each(|index| self.activate(index)),
            Command::Expect(id) => self.coming.push(id),
            Command::Arrive(id, task) => {
                self.coming.retain(|coming| *coming != id);
                if let Some(task) = task {
                    self.admit(id, task);
                }
                return std::mem::take(&mut self.later).into_iter().all(|command| self.carry_out(command));
            }
            Command::Move(id, to) => to.send(Command::Arrive(id, self.dismiss(id))),
            Command::Stop => return false,
        }
        true
    }

    fn admit(&mut self, id: TaskId, task: Arc<dyn Task<S>>) {
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

    /// Lets a task go.
    fn dismiss(&mut self, id: TaskId) -> Option<Arc<dyn Task<S>>> {
        let index = self.find(id)?;
        self.active.retain(|&active| active != index);
        self.release(index)
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
