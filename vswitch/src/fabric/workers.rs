//! The switching processors: which worker polls which queue, and who moves where as the load changes.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vmq::placement::{Placement, QueueId, QueueState, WorkerId};
use vmq::worker::{Activity, Clock, Nanos, Sharing, TaskId, Worker};

use crate::error::FabricError;
use crate::queue::{Scratch, SourceQueue};
use crate::report::WorkerReport;

/// The switching processors, as the operator wants them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkersSpec {
    /// Processors, one worker each.
    pub cpus: Vec<usize>,
    /// How long a queue is polled in vain before it goes to sleep on its doorbell.
    pub idle: Duration,
    /// Whether a worker that is woken takes its processor at once from a guest that runs there, and keeps it while it polls
    /// in vain.
    pub preempt: bool,
    /// Let the placement move queues and park workers.
    pub balance: bool,
}

impl WorkersSpec {
    /// Default of [`WorkersSpec::idle`]: long enough to bridge a guest's think time, short enough to leave the processor
    /// to others at low load.
    pub const IDLE: Duration = Duration::from_micros(50);
}

struct Placed {
    queue: Arc<SourceQueue>,
    worker: usize,
    pin: Option<usize>,
    busy_before: Nanos,
    load: u32,
}

struct Board {
    tasks: BTreeMap<TaskId, Placed>,
    placement: Placement,
    next: u32,
    ticked: Nanos,
    /// Busy time of each worker at the last tick, and its load since, in thousandths.
    loads: Vec<(Nanos, u32)>,
}

/// All workers and what is placed on them.
pub(super) struct Workers {
    workers: Vec<Worker<Scratch>>,
    clock: Clock,
    balance: bool,
    board: Mutex<Board>,
}

impl std::fmt::Debug for Workers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Workers").field("workers", &self.workers).finish_non_exhaustive()
    }
}

/// Where a queue is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub(super) cpu: usize,
    pub(super) pinned: bool,
    pub(super) load: u32,
}

impl Workers {
    pub(super) fn start(spec: &WorkersSpec, clock: Clock) -> Result<Self, FabricError> {
        let mut workers = Vec::new();
        let sharing = Sharing { idle: spec.idle, preempt: spec.preempt };
        for &cpu in &spec.cpus {
            let worker = Worker::start(cpu, clock, sharing).map_err(|error| {
                FabricError::failed(format!("starting a worker on processor {cpu}"), error)
            })?;
            workers.push(worker);
        }
        if workers.is_empty() {
            return Err(FabricError::invalid("workers.cpus", "at least one processor is needed"));
        }
        let loads = vec![(0, 0); workers.len()];
        let board = Board {
            tasks: BTreeMap::new(),
            placement: Placement::new(),
            next: 0,
            ticked: clock.now(),
            loads,
        };
        Ok(Self { workers, clock, balance: spec.balance, board: Mutex::new(board) })
    }

    pub(super) fn clock(&self) -> Clock {
        self.clock
    }

    fn board(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn worker_on(&self, cpu: usize) -> Result<usize, FabricError> {
        self.workers
            .iter()
            .position(|worker| worker.cpu() == cpu)
            .ok_or_else(|| FabricError::NotFound { what: "worker on processor", name: cpu.to_string() })
    }

    fn ids(&self) -> Vec<WorkerId> {
        (0u16..).zip(&self.workers).map(|(id, _)| WorkerId(id)).collect()
    }

    /// Places a new queue: on the processor it is pinned to, or where there is least to do.
    pub(super) fn add(&self, queue: &Arc<SourceQueue>, pin: Option<usize>) -> Result<TaskId, FabricError> {
        let pin = pin.map(|cpu| self.worker_on(cpu)).transpose()?;
        let mut board = self.board();
        let id = TaskId(board.next);
        board.next += 1;
        let states = board.states();
        let wanted = pin.and_then(|pin| u16::try_from(pin).ok()).map(WorkerId);
        let worker = match board.placement.place(&self.ids(), &states, QueueId(id.0), wanted) {
            Some(WorkerId(worker)) => usize::from(worker),
            None => pin.unwrap_or(0),
        };
        self.workers[worker].add(id, Arc::clone(queue) as _);
        let placed = Placed { queue: Arc::clone(queue), worker, pin, busy_before: 0, load: 0 };
        board.tasks.insert(id, placed);
        Ok(id)
    }

    pub(super) fn remove(&self, id: TaskId) {
        if let Some(placed) = self.board().tasks.remove(&id) {
            placed.queue.close();
            self.workers[placed.worker].remove(id);
        }
    }

    pub(super) fn nudge(&self, id: TaskId) {
        if let Some(placed) = self.board().tasks.get(&id) {
            self.workers[placed.worker].nudge(id);
        }
    }

    pub(super) fn pin(&self, id: TaskId, cpu: Option<usize>) -> Result<(), FabricError> {
        let pin = cpu.map(|cpu| self.worker_on(cpu)).transpose()?;
        let mut board = self.board();
        if let Some(placed) = board.tasks.get_mut(&id) {
            placed.pin = pin;
            if let Some(to) = pin {
                self.shift(id, placed, to);
            }
        }
        Ok(())
    }

    fn shift(&self, id: TaskId, placed: &mut Placed, to: usize) {
        if placed.worker != to {
            self.workers[placed.worker].hand_over(id, &self.workers[to]);
            placed.worker = to;
        }
    }

    pub(super) fn place(&self, id: TaskId) -> Option<Place> {
        let board = self.board();
        let placed = board.tasks.get(&id)?;
        let cpu = self.workers[placed.worker].cpu();
        Some(Place { cpu, pinned: placed.pin.is_some(), load: placed.load })
    }

    /// Measures the load since the last tick and lets the placement act on it.
    pub(super) fn tick(&self) {
        let mut board = self.board();
        let now = self.clock.now();
        let elapsed = now.saturating_sub(board.ticked).max(1);
        board.ticked = now;
        for (load, worker) in board.loads.iter_mut().zip(&self.workers) {
            let busy = worker.busy();
            *load = (busy, permille(busy.saturating_sub(load.0), elapsed));
        }
        for placed in board.tasks.values_mut() {
            let busy = placed.queue.counters.busy_nanos();
            placed.load = permille(busy.saturating_sub(placed.busy_before), elapsed);
            placed.busy_before = busy;
        }
        if !self.balance || self.workers.len() < 2 {
            return;
        }
        let states = board.states();
        let plan = board.placement.tick(&self.ids(), &states);
        for step in plan.moves {
            let (id, to) = (TaskId(step.queue.0), usize::from(step.to.0));
            if let Some(placed) = board.tasks.get_mut(&id) {
                tracing::info!(port = %placed.queue.port.name, queue = placed.queue.queue,
                    cpu = self.workers[to].cpu(), reason = ?step.reason, "queue moved");
                self.shift(id, placed, to);
            }
        }
    }

    pub(super) fn report(&self) -> Vec<WorkerReport> {
        let board = self.board();
        let describe = |(at, worker): (usize, &Worker<Scratch>)| WorkerReport {
            cpu: worker.cpu(),
            state: match worker.activity() {
                Activity::Polling => "polling",
                Activity::Asleep => "asleep",
                Activity::Parked => "parked",
            },
            queues: board.tasks.values().filter(|placed| placed.worker == at).count(),
            load_permille: board.loads[at].1,
            sleeps: worker.sleeps(),
        };
        self.workers.iter().enumerate().map(describe).collect()
    }
}

impl Board {
    fn states(&self) -> Vec<QueueState> {
        let worker = |at: usize| u16::try_from(at).ok().map(WorkerId);
        self.tasks
            .iter()
            .map(|(id, placed)| QueueState {
                id: QueueId(id.0),
                worker: worker(placed.worker),
                load: placed.load,
                pin: placed.pin.and_then(worker),
            })
            .collect()
    }
}

fn permille(busy: Nanos, elapsed: Nanos) -> u32 {
    u32::try_from(busy.saturating_mul(1000) / elapsed).unwrap_or(1000).min(1000)
}
