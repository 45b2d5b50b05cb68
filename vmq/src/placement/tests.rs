use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

/// A switch that carries out each plan before the next tick.
struct Switch {
    placement: Placement,
    workers: Vec<WorkerId>,
    queues: BTreeMap<QueueId, QueueState>,
    /// Moves other than repairs.
    chosen_moves: usize,
}

impl Switch {
    fn new(workers: u16) -> Self {
        let workers = (0..workers).map(WorkerId).collect();
        Self { placement: Placement::new(), workers, queues: BTreeMap::new(), chosen_moves: 0 }
    }

    fn with(workers: u16, queues: &[(u16, Permille)]) -> Self {
        let mut switch = Self::new(workers);
        for (id, (worker, load)) in (0..).map(QueueId).zip(queues) {
            let state = QueueState { id, worker: Some(WorkerId(*worker)), load: *load, pin: None };
            switch.queues.insert(id, state);
        }
        switch
    }

    fn add(&mut self, id: u32, load: Permille, pin: Option<u16>) {
        let id = QueueId(id);
        self.queues.insert(id, QueueState { id, worker: None, load, pin: pin.map(WorkerId) });
    }

    fn set(&mut self, id: u32, load: Permille) {
        self.queues.get_mut(&QueueId(id)).unwrap().load = load;
    }

    fn tick(&mut self) -> Plan {
        let states: Vec<_> = self.queues.values().copied().collect();
        let plan = self.placement.tick(&self.workers, &states);
        for change in &plan.moves {
            let queue = self.queues.get_mut(&change.queue).unwrap();
            assert_eq!(queue.worker, change.from);
            assert_ne!(Some(change.to), change.from);
            queue.worker = Some(change.to);
            let repair =
                matches!(change.reason, MoveReason::New | MoveReason::WorkerGone | MoveReason::Pinned);
            self.chosen_moves += usize::from(!repair);
        }
        plan
    }

    /// Ticks until a plan moves something or parks or wakes a worker, at most `limit` times.
    fn run(&mut self, limit: u32) -> Option<(u32, Plan)> {
        let parked = self.placement.parked().to_vec();
        (1..=limit)
            .map(|n| (n, self.tick()))
            .find(|(_, plan)| !plan.moves.is_empty() || plan.parked != parked)
    }

    fn worker_of(&self, id: u32) -> u16 {
        self.queues[&QueueId(id)].worker.unwrap().0
    }

    fn loads(&self) -> Vec<Permille> {
        let of = |worker: &WorkerId| {
            self.queues.values().filter(|queue| queue.worker == Some(*worker)).map(|queue| queue.load).sum()
        };
        self.workers.iter().map(of).collect()
    }
}

fn ids(workers: &[u16]) -> Vec<WorkerId> {
    workers.iter().copied().map(WorkerId).collect()
}

#[test]
fn new_queues_spread_over_workers_awake() {
    let mut switch = Switch::new(3);
    for id in 0..7 {
        switch.add(id, 0, None);
    }
    let plan = switch.tick();
    assert!(plan.moves.iter().all(|change| change.reason == MoveReason::New));
    let counts = [0, 1, 2].map(|worker| (0..7).filter(|id| switch.worker_of(*id) == worker).count());
    assert_eq!(counts, [3, 2, 2]);
}

#[test]
fn new_queue_goes_to_the_least_loaded_worker_awake() {
    let switch = Switch::with(3, &[(0, 500), (1, 200), (2, 300)]);
    let states: Vec<_> = switch.queues.values().copied().collect();
    let place = |parked: &[u16], pin: Option<u16>| {
        let placement = Placement { parked: ids(parked), ..Placement::default() };
        placement.place(&ids(&[0, 1, 2, 3]), &states, QueueId(9), pin.map(WorkerId))
    };
    assert_eq!(place(&[], None), Some(WorkerId(3)));
    assert_eq!(place(&[3], None), Some(WorkerId(1)));
    assert_eq!(place(&[3], Some(3)), Some(WorkerId(3)));
    assert_eq!(place(&[3], Some(8)), Some(WorkerId(1)));
    assert_eq!(Placement::new().place(&[], &states, QueueId(9), None), None);
}

#[test]
fn queues_of_a_vanished_worker_move_at_once() {
    let mut switch = Switch::with(2, &[(0, 300), (1, 300), (1, 100)]);
    switch.workers = ids(&[0]);
    let plan = switch.tick();
    assert_eq!(plan.moves.len(), 2);
    assert!(
        plan.moves.iter().all(|change| change.reason == MoveReason::WorkerGone && change.to == WorkerId(0))
    );
}

#[test]
fn vanishing_of_the_last_worker_awake_wakes_another() {
    let mut switch = Switch::with(2, &[(0, 10)]);
    assert_eq!(switch.run(PARK_TICKS).unwrap().1.parked, ids(&[1]));
    switch.workers = ids(&[1]);
    let plan = switch.tick();
    assert_eq!((switch.worker_of(0), plan.parked), (1, ids(&[])));
}

#[test]
fn without_workers_nothing_is_planned() {
    let mut switch = Switch::with(0, &[(0, 900)]);
    assert_eq!(switch.tick(), Plan::default());
}

#[test]
fn pinned_queue_stays_on_an_overloaded_worker() {
    let mut switch = Switch::new(2);
    for id in 0..4 {
        switch.add(id, 250, Some(0));
    }
    assert!(switch.tick().moves.iter().all(|change| change.to == WorkerId(0)));
    assert_eq!(switch.run(1000).map(|(_, plan)| plan), None);
}

#[test]
fn pin_wakes_its_parked_worker() {
    let mut switch = Switch::with(2, &[(0, 10), (0, 10)]);
    assert_eq!(switch.run(PARK_TICKS).unwrap().1.parked, ids(&[1]));
    switch.queues.get_mut(&QueueId(1)).unwrap().pin = Some(WorkerId(1));
    let plan = switch.tick();
    assert_eq!((switch.worker_of(1), plan.parked), (1, ids(&[])));
    // The pinned queue keeps its worker awake; the other joins it there.
    assert_eq!(switch.run(1000).unwrap().1.parked, ids(&[0]));
    assert_eq!(switch.run(1000).map(|(_, plan)| plan), None);
}

#[test]
fn overload_is_balanced_after_its_ticks_and_not_before() {
    let mut switch = Switch::with(2, &[(0, 500), (0, 480), (1, 300)]);
    let (ticks, plan) = switch.run(100).unwrap();
    assert_eq!((ticks, plan.moves.len()), (OVERLOAD_TICKS, 1));
    assert_eq!(switch.loads(), [500, 780]);
    assert_eq!(switch.run(1000).map(|(_, plan)| plan), None);
}

#[test]
fn lasting_imbalance_is_balanced_and_a_passing_one_is_not() {
    let mut switch = Switch::with(2, &[(0, 400), (0, 400), (1, 100)]);
    for _ in 0..10 {
        for _ in 0..IMBALANCE_TICKS - 1 {
            assert_eq!(switch.tick().moves, []);
        }
        switch.set(2, 700);
        assert_eq!(switch.tick().moves, []);
        switch.set(2, 100);
    }
    assert_eq!(switch.run(100).unwrap().0, IMBALANCE_TICKS);
    assert_eq!(switch.loads(), [400, 500]);
}

#[test]
fn single_heavy_queue_is_not_carried_about() {
    let mut switch = Switch::with(2, &[(0, 1000), (1, 0)]);
    assert_eq!(switch.run(10_000).map(|(_, plan)| plan), None);
}

/// The worker with the heavy queue cannot be helped; the other overloaded one can.
#[test]
fn heavy_queue_does_not_hide_a_worker_that_can_be_relieved() {
    let mut switch = Switch::with(3, &[(0, 1000), (1, 490), (1, 490), (2, 10)]);
    assert_eq!(switch.run(100).unwrap().0, OVERLOAD_TICKS);
    assert_eq!(switch.loads(), [1000, 490, 500]);
}

#[test]
fn small_gain_is_not_worth_a_move() {
    let mut switch = Switch::with(2, &[(0, 940), (0, 20), (1, 400), (1, 100)]);
    assert_eq!(switch.run(10_000).map(|(_, plan)| plan), None);
}

#[test]
fn low_load_parks_all_but_the_needed_workers_at_once() {
    let mut switch = Switch::with(4, &[(0, 200), (1, 200), (2, 200), (3, 200)]);
    let (ticks, plan) = switch.run(1000).unwrap();
    assert_eq!((ticks, plan.parked), (PARK_TICKS, ids(&[2, 3])));
    assert_eq!(switch.loads(), [400, 400, 0, 0]);
    assert_eq!(switch.run(1000).map(|(_, plan)| plan), None);
}

#[test]
fn last_worker_is_never_parked() {
    let mut switch = Switch::new(3);
    assert_eq!(switch.run(1000).unwrap().1.parked, ids(&[1, 2]));
    assert_eq!(switch.run(1000).map(|(_, plan)| plan), None);
}

#[test]
fn high_load_wakes_a_worker_at_once() {
    let mut switch = Switch::with(2, &[(0, 100), (0, 100)]);
    switch.run(1000).unwrap();
    switch.set(0, 430);
    switch.set(1, 430);
    let plan = switch.tick();
    assert_eq!((plan.moves.len(), plan.parked), (1, ids(&[])));
    assert_eq!(switch.loads(), [430, 430]);
}

#[test]
fn growing_load_wakes_every_worker_one_a_tick() {
    let mut switch = Switch::with(4, &[(0, 10); 8]);
    assert_eq!(switch.run(1000).unwrap().1.parked, ids(&[1, 2, 3]));
    for id in 0..8 {
        switch.set(id, 450);
    }
    for _ in 0..3 {
        switch.tick();
    }
    assert_eq!(switch.loads(), [900; 4]);
}

#[test]
fn waking_does_not_help_a_single_heavy_queue() {
    let mut switch = Switch::with(2, &[(0, 100)]);
    switch.run(1000).unwrap();
    switch.set(0, 1000);
    assert_eq!(switch.run(1000).map(|(_, plan)| plan), None);
}

#[test]
fn load_between_the_thresholds_neither_parks_nor_wakes() {
    for load in [PACK_BELOW / 2, UNPARK_ABOVE / 2] {
        let mut spread = Switch::with(2, &[(0, load), (1, load)]);
        assert_eq!(spread.run(10_000).map(|(_, plan)| plan), None);
    }
    let mut packed = Switch::with(2, &[(0, 0), (0, 0)]);
    packed.run(1000).unwrap();
    packed.set(0, UNPARK_ABOVE / 2);
    packed.set(1, UNPARK_ABOVE / 2);
    assert_eq!(packed.run(10_000).map(|(_, plan)| plan), None);
}

/// Two of four queues are heavy, other two each time, so that every placement is wrong sooner or later: each reversal
/// doubles the wait before the next change.
#[test]
fn oscillating_load_gives_few_moves() {
    const TICKS: u32 = 50_000;
    const PAIRS: [[u32; 2]; 6] = [[0, 1], [2, 3], [0, 2], [1, 3], [0, 3], [1, 2]];
    for half_period in [1, 3, OVERLOAD_TICKS, 10, IMBALANCE_TICKS, 60, 100, 150, 300, 700] {
        for (low, high) in [(100, 480), (290, 310), (420, 430), (200, 1000)] {
            let mut switch = Switch::with(2, &[(0, low), (0, low), (1, low), (1, low)]);
            for tick in 0..TICKS {
                let heavy = PAIRS[(tick / half_period) as usize % PAIRS.len()];
                for id in 0..4 {
                    switch.set(id, if heavy.contains(&id) { high } else { low });
                }
                switch.tick();
            }
            // One change in 640 ticks, of two moves.
            let moves = switch.chosen_moves;
            assert!(moves <= 160, "{moves} moves at half period {half_period}, loads {low} and {high}");
        }
    }
}

/// All load comes and goes: workers wake at once each time they are needed, but park more and more rarely.
#[test]
fn load_that_comes_and_goes_parks_few_times() {
    const TICKS: u32 = 50_000;
    for half_period in [10, PARK_TICKS, 60, 100, 150, 300, 700] {
        let mut switch = Switch::with(4, &[(0, 0), (1, 0), (2, 0), (3, 0)]);
        let mut parks = 0;
        for tick in 0..TICKS {
            let parked = switch.placement.parked().len();
            let load = if tick / half_period % 2 == 0 { 50 } else { 450 };
            (0..4).for_each(|id| switch.set(id, load));
            let plan = switch.tick();
            parks += usize::from(plan.parked.len() > parked);
            assert!(load == 50 || switch.loads().iter().all(|load| *load <= 1000) || plan.parked.is_empty());
        }
        assert!(parks <= 80, "{parks} parks at half period {half_period}");
    }
}

#[derive(Debug, Clone)]
enum Step {
    Ticks(u32),
    Load(u32, Permille),
    Pin(u32, Option<u16>),
    Add(u32),
    Remove(u32),
    Workers(Vec<u16>),
}

fn step() -> impl Strategy<Value = Step> {
    let load = prop_oneof![Just(0), 0..200u32, 0..1000u32, Just(u32::MAX)];
    prop_oneof![
        4 => (1..100u32).prop_map(Step::Ticks),
        6 => (0..12u32, load).prop_map(|(id, load)| Step::Load(id, load)),
        1 => (0..12u32, proptest::option::of(0..6u16)).prop_map(|(id, pin)| Step::Pin(id, pin)),
        3 => (0..12u32).prop_map(Step::Add),
        1 => (0..12u32).prop_map(Step::Remove),
        1 => proptest::collection::vec(0..6u16, 1..6).prop_map(Step::Workers),
    ]
}

/// What must hold after every tick; `before` is the placement the plan was made for.
fn check(switch: &Switch, before: &BTreeMap<QueueId, QueueState>, plan: &Plan) {
    for queue in switch.queues.values() {
        let worker = queue.worker.expect("every queue is assigned");
        assert!(switch.workers.contains(&worker), "to an existing worker");
        assert!(!plan.parked.contains(&worker), "that is awake");
        if let Some(pin) = queue.pin.filter(|pin| switch.workers.contains(pin)) {
            assert_eq!(worker, pin);
        }
    }
    assert!(switch.workers.iter().any(|worker| !plan.parked.contains(worker)), "somebody is awake");
    let mut moved: Vec<_> = plan.moves.iter().map(|change| change.queue).collect();
    moved.sort();
    moved.dedup();
    assert_eq!(moved.len(), plan.moves.len(), "a queue moves once");
    for change in &plan.moves {
        let queue = before[&change.queue];
        let needed = match change.reason {
            MoveReason::New => queue.worker.is_none(),
            MoveReason::WorkerGone => queue.worker.is_some_and(|worker| !switch.workers.contains(&worker)),
            MoveReason::Pinned => queue.pin == Some(change.to),
            MoveReason::Unpark | MoveReason::Balance => queue.load > 0,
            MoveReason::Park => plan.parked.iter().any(|worker| queue.worker == Some(*worker)),
        };
        assert!(needed, "{change:?} of {queue:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn any_history_keeps_every_queue_on_a_worker_awake(steps in proptest::collection::vec(step(), 1..60)) {
        let mut switch = Switch::new(3);
        for step in steps {
            let mut ticks = 1;
            match step {
                Step::Ticks(n) => ticks = n,
                Step::Load(id, load) => {
                    if let Some(queue) = switch.queues.get_mut(&QueueId(id)) {
                        queue.load = load;
                    }
                }
                Step::Pin(id, pin) => {
                    if let Some(queue) = switch.queues.get_mut(&QueueId(id)) {
                        queue.pin = pin.map(WorkerId);
                    }
                }
                Step::Add(id) => switch.add(id, 0, None),
                Step::Remove(id) => drop(switch.queues.remove(&QueueId(id))),
                Step::Workers(workers) => switch.workers = ids(&workers),
            }
            for _ in 0..ticks {
                let before = switch.queues.clone();
                let plan = switch.tick();
                check(&switch, &before, &plan);
            }
        }
    }

    #[test]
    fn steady_load_comes_to_rest(
        queues in proptest::collection::vec((0..4u16, 0..1000u32), 0..20),
    ) {
        let mut switch = Switch::with(4, &queues);
        for _ in 0..6_000 {
            switch.tick();
        }
        let moves = switch.chosen_moves;
        let parked = switch.placement.parked().to_vec();
        for _ in 0..6_000 {
            switch.tick();
        }
        prop_assert_eq!(switch.chosen_moves, moves);
        prop_assert_eq!(switch.placement.parked(), parked);
    }

    #[test]
    fn even_and_moderate_load_never_moves(loads in proptest::collection::vec(700..800u32, 3..=3)) {
        let queues: Vec<_> = (0..).zip(loads).collect();
        let mut switch = Switch::with(3, &queues);
        prop_assert_eq!(switch.run(500).map(|(_, plan)| plan), None);
    }
}
