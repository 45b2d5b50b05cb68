//! Placement of receive queues on workers (switching processors): who polls which queue, and which workers may sleep.
//!
//! Sans-io: once a [`TICK`] the caller tells the loads and who polls what, and gets a [`Plan`] back, which it carries out
//! before the next tick. Moving a queue costs cold caches and a hand-over, and a queue that wanders is worse than one placed
//! badly, so nothing moves on a single measurement and a reversal makes the next one wait longer. In order:
//!
//! 1. **Repair**, at once: new queues and those of vanished workers go to the least loaded worker awake; pins are obeyed.
//! 2. **Unpark**, at once, when a worker runs above [`UNPARK_ABOVE`] and another's waking would relieve it: a late wake
//!    loses frames, an early one costs only power.
//! 3. **Balance**, when one worker stayed above [`OVERLOAD_ABOVE`], or one stayed [`IMBALANCE_ABOVE`] busier than another,
//!    and the moves would cut the variance of the workers' loads by [`MIN_IMPROVEMENT`].
//! 4. **Park**, when for a while the queues would have fitted on fewer workers, each below [`PACK_BELOW`].
//!
//! Unpark and park thresholds lie apart, so that a load between them changes nothing.

use std::time::Duration;

mod backoff;
mod board;

use backoff::Backoff;
use board::Board;

/// A worker's or queue's load in thousandths of one processor.
pub type Permille = u32;

/// How often the caller should ask for a plan; the tick counts below are written for it.
pub const TICK: Duration = Duration::from_millis(250);

/// A worker above this is about to lose frames: OVS' `pmd-auto-lb-load-threshold` of 95 %.
pub const OVERLOAD_ABOVE: Permille = 950;
/// One second of overload: bursts shorter than this are what the rings are for.
pub const OVERLOAD_TICKS: u32 = 4;
/// A gap between the busiest and idlest worker that is worth closing although nobody is overloaded: latency suffers on the one.
pub const IMBALANCE_ABOVE: Permille = 300;
/// Ten seconds, longer than the slow start and pauses of a transfer.
pub const IMBALANCE_TICKS: u32 = 40;
/// Per cent by which a balance must cut the variance of loads: OVS' `pmd-auto-lb-improvement-threshold`.
pub const MIN_IMPROVEMENT: u128 = 25;
/// A gap below this is left alone: closing it moves many small queues for nothing.
pub const GAP_GOOD_ENOUGH: Permille = 100;
/// A worker above this wakes a parked one, while there is still room to hand queues over in.
pub const UNPARK_ABOVE: Permille = 850;
/// Workers are packed at most this full, so that a packed load may grow by 40 % before a worker must wake.
pub const PACK_BELOW: Permille = 600;
/// Ten seconds of low load before workers are parked.
pub const PARK_TICKS: u32 = 40;

/// A worker, by the index the operator sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerId(pub u16);

/// A receive queue of any port; ids are the caller's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QueueId(pub u32);

/// A queue as the caller sees it at a tick.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueState {
    /// Which queue; each appears once.
    pub id: QueueId,
    /// Who polls it now; `None` for a new one.
    pub worker: Option<WorkerId>,
    /// The time its worker spent on it since the last tick; above 1000 counts as 1000.
    pub load: Permille,
    /// The worker the operator wants it on; ignored while that worker does not exist.
    pub pin: Option<WorkerId>,
}

/// Why a queue moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MoveReason {
    /// It is new.
    New,
    /// Its worker is gone.
    WorkerGone,
    /// The operator pinned it there.
    Pinned,
    /// A woken worker takes load off a busy one.
    Unpark,
    /// Loads were uneven or too high.
    Balance,
    /// Its worker is to be parked.
    Park,
}

/// One queue's hand-over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Move {
    /// The queue.
    pub queue: QueueId,
    /// Who polls it until now, if anybody.
    pub from: Option<WorkerId>,
    /// Who polls it from now on.
    pub to: WorkerId,
    /// Why.
    pub reason: MoveReason,
}

/// What to do after a tick.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Hand-overs, in order; a queue appears at most once.
    pub moves: Vec<Move>,
    /// Workers that have no queue and should sleep until a later plan leaves them out, in order.
    pub parked: Vec<WorkerId>,
}

/// The placement's memory between ticks. Deterministic: the same ticks give the same plans.
#[derive(Debug, Clone, Default)]
pub struct Placement {
    parked: Vec<WorkerId>,
    /// The busiest worker that a move would relieve, while it is overloaded, or far busier than another.
    overload: Streak,
    imbalance: Streak,
    /// For how many ticks the load would have fitted on fewer workers.
    parkable_ticks: u32,
    balancing: Backoff,
    parking: Backoff,
    /// Whether the last change to the parked set was a park, so that an unpark reverses it.
    unpark_reverses: bool,
}

/// For how many ticks in a row the same worker met a condition.
#[derive(Debug, Clone, Copy, Default)]
struct Streak {
    worker: Option<WorkerId>,
    ticks: u32,
}

impl Streak {
    fn note(&mut self, worker: Option<WorkerId>) {
        self.ticks = match worker {
            None => 0,
            Some(_) if worker == self.worker => self.ticks.saturating_add(1),
            Some(_) => 1,
        };
        self.worker = worker;
    }
}

impl Placement {
    /// Every worker awake, no history.
    pub fn new() -> Self {
        Self::default()
    }

    /// The workers asleep, as of the last plan.
    pub fn parked(&self) -> &[WorkerId] {
        &self.parked
    }

    /// The worker for a queue that is added between ticks: its pin, or the least loaded one awake. `None` without workers.
    pub fn place(
        &self,
        workers: &[WorkerId],
        queues: &[QueueState],
        id: QueueId,
        pin: Option<WorkerId>,
    ) -> Option<WorkerId> {
        let mut queues: Vec<_> = queues.iter().filter(|queue| queue.id != id).copied().collect();
        queues.push(QueueState { id, worker: None, load: 0, pin });
        let board = Board::new(workers, &self.parked, &queues);
        board.moves().iter().find(|change| change.queue == id).map(|change| change.to)
    }

    /// One tick: `workers` are those that exist, `queues` all queues with their loads since the last tick.
    ///
    /// Without workers the plan is empty. A worker that is named twice counts once.
    pub fn tick(&mut self, workers: &[WorkerId], queues: &[QueueState]) -> Plan {
        self.balancing.tick();
        self.parking.tick();
        let mut board = Board::new(workers, &self.parked, queues);
        let relief = board.relief();
        self.overload
            .note(relief.as_ref().filter(|relief| relief.load > OVERLOAD_ABOVE).map(|relief| relief.source));
        self.imbalance
            .note(relief.as_ref().filter(|relief| relief.gap > IMBALANCE_ABOVE).map(|relief| relief.source));
        let packed = board.packed();
        self.parkable_ticks = if packed.is_some() { self.parkable_ticks.saturating_add(1) } else { 0 };

        if let Some(relieved) = self.unpark(&board) {
            board = relieved;
        } else if let Some(balanced) = self.balance(&board) {
            board = balanced;
        } else if let Some(packed) = packed.filter(|_| self.may_park()) {
            self.parkable_ticks = 0;
            self.parking.acted();
            self.unpark_reverses = true;
            board = packed;
        }
        self.parked = board.parked();
        Plan { moves: board.moves().to_vec(), parked: self.parked.clone() }
    }

    fn may_park(&self) -> bool {
        self.parking.is_over() && self.parkable_ticks >= PARK_TICKS
    }

    /// The board with one more worker awake, if one is too busy and would be relieved by it.
    fn unpark(&mut self, board: &Board) -> Option<Board> {
        let woken = board.with_one_unparked()?;
        woken.relief().filter(|relief| relief.load > UNPARK_ABOVE)?;
        let relieved = woken.balanced(MoveReason::Unpark)?;
        if self.unpark_reverses {
            self.parking.reversed();
            self.unpark_reverses = false;
        }
        self.parking.hold();
        self.parkable_ticks = 0;
        Some(relieved)
    }

    /// The board with loads evened out, if that is due and worth it.
    fn balance(&mut self, board: &Board) -> Option<Board> {
        let due = self.overload.ticks >= OVERLOAD_TICKS || self.imbalance.ticks >= IMBALANCE_TICKS;
        if !due || !self.balancing.is_over() {
            return None;
        }
        let balanced = board.balanced(MoveReason::Balance)?;
        self.balancing.reversed();
        self.balancing.acted();
        Some(balanced)
    }
}

#[cfg(test)]
mod tests;
