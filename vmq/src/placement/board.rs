//! A trial placement: workers, the queues on them, and the moves made so far.

use std::cmp::Reverse;

use super::GAP_GOOD_ENOUGH;
use super::MIN_IMPROVEMENT;
use super::Move;
use super::MoveReason;
use super::PACK_BELOW;
use super::Permille;
use super::QueueId;
use super::QueueState;
use super::WorkerId;

/// More than one processor's time cannot be spent on a queue.
const MAX_LOAD: Permille = 1000;

/// Every queue on an existing worker that is awake, after the repairs that need no deliberation.
#[derive(Debug, Clone)]
pub(super) struct Board {
    /// Ordered by id.
    workers: Vec<Worker>,
    /// Ordered by load, heaviest first, then by id.
    queues: Vec<Queue>,
    moves: Vec<Move>,
}

#[derive(Debug, Clone)]
struct Worker {
    id: WorkerId,
    load: Permille,
    queues: usize,
    parked: bool,
    pinned: bool,
}

#[derive(Debug, Clone)]
struct Queue {
    id: QueueId,
    /// Index into the workers.
    at: usize,
    load: Permille,
    pinned: bool,
}

/// A queue to move from a busy worker to the idlest.
#[derive(Debug)]
pub(super) struct Relief {
    /// The busy worker.
    pub(super) source: WorkerId,
    /// Its load.
    pub(super) load: Permille,
    /// Its load above the idlest one's.
    pub(super) gap: Permille,
    queue: usize,
    to: usize,
    /// The gap that the move would leave.
    rest: Permille,
}

impl Board {
    /// Seats every queue: on its pin, where it is, or, if it is new or its worker is gone, on the least loaded worker awake.
    pub(super) fn new(workers: &[WorkerId], parked: &[WorkerId], queues: &[QueueState]) -> Self {
        let mut ids = workers.to_vec();
        ids.sort_unstable();
        ids.dedup();
        let workers = ids
            .into_iter()
            .map(|id| Worker { id, load: 0, queues: 0, parked: parked.contains(&id), pinned: false })
            .collect();
        let mut board = Self { workers, queues: Vec::with_capacity(queues.len()), moves: Vec::new() };
        let mut order = queues.to_vec();
        order.sort_by_key(|queue| (Reverse(queue.load), queue.id));
        let (seated, homeless): (Vec<_>, Vec<_>) =
            order.into_iter().partition(|queue| board.seat_of(queue).is_some());
        for queue in &seated {
            if let Some((at, pinned)) = board.seat_of(queue) {
                board.sit(queue, at, pinned, MoveReason::Pinned);
            }
        }
        if board.workers.iter().all(|worker| worker.parked)
            && let Some(first) = board.workers.first_mut()
        {
            first.parked = false;
        }
        for queue in &homeless {
            let reason = if queue.worker.is_some() { MoveReason::WorkerGone } else { MoveReason::New };
            if let Some(at) = board.idlest() {
                board.sit(queue, at, false, reason);
            }
        }
        board.queues.sort_by_key(|queue| (Reverse(queue.load), queue.id));
        board
    }

    /// The moves made so far.
    pub(super) fn moves(&self) -> &[Move] {
        &self.moves
    }

    /// The workers asleep.
    pub(super) fn parked(&self) -> Vec<WorkerId> {
        self.workers.iter().filter(|worker| worker.parked).map(|worker| worker.id).collect()
    }

    /// The move that would relieve the busiest worker that one can relieve. A worker with nothing but one heavy queue is
    /// passed over: that queue would only make another worker as busy.
    pub(super) fn relief(&self) -> Option<Relief> {
        let to = self.idlest()?;
        let idlest_load = self.workers.get(to)?.load;
        let mut best: Option<Relief> = None;
        for (at, queue) in self.queues.iter().enumerate() {
            let Some(source) = self.workers.get(queue.at) else { continue };
            let gap = source.load - idlest_load;
            if queue.pinned || queue.load == 0 || queue.load >= gap || gap <= GAP_GOOD_ENOUGH {
                continue;
            }
            let relief = Relief {
                source: source.id,
                load: source.load,
                gap,
                queue: at,
                to,
                rest: gap.abs_diff(2 * queue.load),
            };
            let rank = |relief: &Relief| (relief.load, Reverse(relief.source), Reverse(relief.rest));
            if best.as_ref().is_none_or(|best| rank(&relief) > rank(best)) {
                best = Some(relief);
            }
        }
        best
    }

    /// The board with the first parked worker awake.
    pub(super) fn with_one_unparked(&self) -> Option<Self> {
        let mut board = self.clone();
        board.workers.iter_mut().find(|worker| worker.parked)?.parked = false;
        Some(board)
    }

    /// The board with queues moved from busy workers to the idlest while that narrows the gap, if it lowers the variance of
    /// the loads enough.
    pub(super) fn balanced(&self, reason: MoveReason) -> Option<Self> {
        let mut board = self.clone();
        for _ in 0..self.queues.len() {
            let Some(relief) = board.relief() else { break };
            board.reseat(relief.queue, relief.to, reason);
        }
        let improves = 100 * board.variance() <= (100 - MIN_IMPROVEMENT) * self.variance();
        (improves && board.moves.len() > self.moves.len()).then_some(board)
    }

    /// The board with as many workers emptied and parked as the rest can take the queues of; `None` if none can be.
    pub(super) fn packed(&self) -> Option<Self> {
        let mut board = self.clone();
        let mut packed = None;
        while let Some(fewer) = board.without_one_worker() {
            board = fewer;
            packed = Some(());
        }
        packed.map(|()| board)
    }

    /// The board with its idlest worker parked, if nothing is pinned there and the others stay below the packing limit.
    fn without_one_worker(&self) -> Option<Self> {
        let mut board = self.clone();
        let candidate = |worker: &&(usize, &Worker)| !worker.1.parked && !worker.1.pinned;
        let numbered: Vec<_> = self.workers.iter().enumerate().collect();
        // Of equals, the last: low workers stay.
        let &(victim, _) = numbered.iter().filter(candidate).rev().min_by_key(|(_, worker)| worker.load)?;
        board.workers.get_mut(victim)?.parked = true;
        let tenants: Vec<usize> = (0..board.queues.len())
            .filter(|queue| self.queues.get(*queue).is_some_and(|q| q.at == victim))
            .collect();
        for queue in tenants {
            let to = board.idlest()?;
            board.reseat(queue, to, MoveReason::Park);
        }
        let mut awake = board.workers.iter().filter(|worker| !worker.parked).peekable();
        awake.peek()?;
        awake.all(|worker| worker.load < PACK_BELOW).then_some(board)
    }

    /// Where `queue` has to sit or may stay, and whether it is pinned there.
    fn seat_of(&self, queue: &QueueState) -> Option<(usize, bool)> {
        let find = |id: Option<WorkerId>| self.workers.binary_search_by_key(&id?, |worker| worker.id).ok();
        find(queue.pin).map(|at| (at, true)).or_else(|| find(queue.worker).map(|at| (at, false)))
    }

    /// Seats `queue`, which wakes the worker and is a move unless it sat there.
    fn sit(&mut self, queue: &QueueState, at: usize, pinned: bool, reason: MoveReason) {
        let Some(worker) = self.workers.get_mut(at) else { return };
        let load = queue.load.min(MAX_LOAD);
        worker.load = worker.load.saturating_add(load);
        worker.queues += 1;
        worker.parked = false;
        worker.pinned |= pinned;
        if queue.worker != Some(worker.id) {
            self.moves.push(Move { queue: queue.id, from: queue.worker, to: worker.id, reason });
        }
        self.queues.push(Queue { id: queue.id, at, load, pinned });
    }

    /// Moves a seated queue; one that moved already keeps a single entry, from where it really is.
    fn reseat(&mut self, queue: usize, to: usize, reason: MoveReason) {
        let Some(queue) = self.queues.get_mut(queue) else { return };
        let Ok([from, target]) = self.workers.get_disjoint_mut([queue.at, to]) else { return };
        from.load -= queue.load;
        from.queues -= 1;
        target.load = target.load.saturating_add(queue.load);
        target.queues += 1;
        queue.at = to;
        match self.moves.iter().position(|earlier| earlier.queue == queue.id) {
            Some(at) => {
                if let Some(earlier) = self.moves.get_mut(at) {
                    earlier.to = target.id;
                }
                if self.moves.get(at).is_some_and(|earlier| earlier.from == Some(earlier.to)) {
                    self.moves.remove(at);
                }
            }
            None => self.moves.push(Move { queue: queue.id, from: Some(from.id), to: target.id, reason }),
        }
    }

    /// The worker awake with least load, then fewest queues; of equals the first.
    fn idlest(&self) -> Option<usize> {
        let awake = self.workers.iter().enumerate().filter(|(_, worker)| !worker.parked);
        awake.min_by_key(|(_, worker)| (worker.load, worker.queues)).map(|(at, _)| at)
    }

    /// The variance of the loads of the workers awake, times the square of their number.
    fn variance(&self) -> u128 {
        let loads =
            || self.workers.iter().filter(|worker| !worker.parked).map(|worker| u128::from(worker.load));
        let (count, total) = loads().fold((0, 0), |(count, total), load| (count + 1, total + load));
        let squares: u128 = loads().map(|load| load * load).sum();
        count * squares - total * total
    }
}
