use std::sync::atomic::AtomicUsize;

use super::rounds::Window;
use super::*;

/// A queue of which the test says how much is in it.
struct Counter {
    waiting: AtomicUsize,
    moved: AtomicUsize,
    armed: AtomicUsize,
    gone: AtomicBool,
    bell: Arc<Doorbell>,
}

impl Counter {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            waiting: AtomicUsize::new(0),
            moved: AtomicUsize::new(0),
            armed: AtomicUsize::new(0),
            gone: AtomicBool::new(false),
            bell: Arc::new(Doorbell::new().unwrap()),
        })
    }

    fn offer(&self, count: usize) {
        self.waiting.fetch_add(count, Ordering::SeqCst);
        self.bell.ring();
    }
}

impl Task<()> for Counter {
    fn poll(&self, (): &mut (), _now: Nanos) -> Polled {
        if self.gone.load(Ordering::SeqCst) {
            return Polled::Gone;
        }
        match self.waiting.swap(0, Ordering::SeqCst) {
            0 => Polled::Empty,
            count => {
                self.moved.fetch_add(count, Ordering::SeqCst);
                Polled::Moved(count)
            }
        }
    }

    fn arm(&self) -> Wait {
        self.armed.fetch_add(1, Ordering::SeqCst);
        if self.waiting.load(Ordering::SeqCst) > 0 {
            Wait::Nothing
        } else {
            Wait::Readable(self.bell.clone())
        }
    }

    fn disarm(&self) {}
    fn spent(&self, _nanos: Nanos) {}
}

fn eventually(what: &str, condition: impl Fn() -> bool) {
    for _ in 0..5_000 {
        if condition() {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("{what} did not happen");
}

const SHARING: Sharing = Sharing { idle: Duration::from_micros(50), preempt: false };

fn worker() -> Worker<()> {
    Worker::start(0, Clock::default(), SHARING).unwrap()
}

#[test]
fn doorbell_of_a_sleeping_queue_wakes_it_each_time() {
    let worker = worker();
    let task = Counter::new();
    worker.add(TaskId(1), task.clone());
    for round in 1..=200 {
        eventually("sleep", || worker.activity() == Activity::Asleep);
        task.offer(3);
        eventually("wake-up", || task.moved.load(Ordering::SeqCst) == 3 * round);
    }
    assert!(task.armed.load(Ordering::SeqCst) >= 200);
}

#[test]
fn silent_queue_sleeps_while_another_is_busy_and_still_wakes() {
    let worker = worker();
    let (busy, silent) = (Counter::new(), Counter::new());
    worker.add(TaskId(1), busy.clone());
    worker.add(TaskId(2), silent.clone());
    let stop = Arc::new(AtomicBool::new(false));
    let feeder = {
        let (busy, stop) = (busy.clone(), stop.clone());
        std::thread::spawn(move || {
            while !stop.load(Ordering::SeqCst) {
                busy.offer(1);
            }
        })
    };
    eventually("arming", || silent.armed.load(Ordering::SeqCst) > 0);
    silent.offer(5);
    eventually("wake-up", || silent.moved.load(Ordering::SeqCst) == 5);
    stop.store(true, Ordering::SeqCst);
    feeder.join().unwrap();
}

#[test]
fn removed_or_finished_task_is_let_go_and_the_worker_parks() {
    let worker = worker();
    let (removed, finished) = (Counter::new(), Counter::new());
    worker.add(TaskId(1), removed.clone());
    worker.add(TaskId(2), finished.clone());
    eventually("sleep", || worker.activity() == Activity::Asleep);
    worker.remove(TaskId(1));
    finished.gone.store(true, Ordering::SeqCst);
    worker.nudge(TaskId(2));
    eventually("parking", || worker.activity() == Activity::Parked);
    assert_eq!((Arc::strong_count(&removed), Arc::strong_count(&finished)), (1, 1));
}

#[test]
fn processor_that_does_not_exist_is_an_error() {
    assert!(Worker::<()>::start(4000, Clock::default(), SHARING).is_err());
}

#[test]
fn window_grows_while_frames_come_soon_and_shrinks_to_nothing_while_they_do_not() {
    let mut window = Window(50);
    for expected in [25, 12, 6, 0, 0] {
        window.adapt(500, 50);
        assert_eq!(window, Window(expected));
    }
    for expected in [12, 24, 48, 50, 50] {
        window.adapt(49, 50);
        assert_eq!(window, Window(expected));
    }
    // A worker that never polls in vain.
    let mut window = Window(0);
    window.adapt(0, 0);
    assert_eq!(window, Window(0));
}

/// Tells the scheduling policy of the thread that polls it.
#[derive(Debug, Default)]
struct Policy(Mutex<Option<String>>);

impl Task<()> for Policy {
    fn poll(&self, (): &mut (), _: Nanos) -> Polled {
        // proc_pid_stat(5): the name in parentheses is the second field, the policy the 41st.
        let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
        let policy = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(41 - 3));
        *self.0.lock().unwrap() = policy.map(str::to_owned);
        Polled::Gone
    }

    fn arm(&self) -> Wait {
        Wait::Nudge
    }

    fn disarm(&self) {}
    fn spent(&self, _: Nanos) {}
}

#[test]
fn woken_worker_waits_for_its_turn_unless_it_is_to_preempt() {
    const OTHER: &str = "0";
    const BATCH: &str = "3";
    for (preempt, policy) in [(false, BATCH), (true, OTHER)] {
        let worker = Worker::start(0, Clock::default(), Sharing { preempt, ..SHARING }).unwrap();
        let task = Arc::new(Policy::default());
        worker.add(TaskId(1), task.clone());
        eventually("poll", || task.0.lock().unwrap().is_some());
        assert_eq!(task.0.lock().unwrap().as_deref(), Some(policy));
    }
}

/// A task that keeps its worker in a poll until it is opened.
#[derive(Default)]
struct Gate {
    entered: AtomicBool,
    open: AtomicBool,
}

impl Task<()> for Gate {
    fn poll(&self, (): &mut (), _: Nanos) -> Polled {
        self.entered.store(true, Ordering::SeqCst);
        while !self.open.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
        Polled::Gone
    }

    fn arm(&self) -> Wait {
        Wait::Nudge
    }

    fn disarm(&self) {}
    fn spent(&self, _: Nanos) {}
}

/// A worker that has armed `tasks`, from number 1 on, and is then kept from doing anything.
fn stuck(tasks: &[Arc<Counter>]) -> (Worker<()>, Arc<Gate>) {
    let (worker, gate) = (worker(), Arc::new(Gate::default()));
    for (id, task) in (1..).zip(tasks) {
        worker.add(TaskId(id), task.clone());
        eventually("arming", || task.armed.load(Ordering::SeqCst) > 0);
    }
    eventually("sleep", || worker.activity() == Activity::Asleep);
    worker.add(TaskId(0), gate.clone());
    eventually("entering", || gate.entered.load(Ordering::SeqCst));
    (worker, gate)
}

/// Waits until `worker` has done all it was told so far.
fn settle(worker: &Worker<()>) {
    let task = Counter::new();
    task.offer(1);
    worker.add(TaskId(100), task.clone());
    eventually("poll", || task.moved.load(Ordering::SeqCst) == 1);
    worker.remove(TaskId(100));
}

#[test]
fn task_handed_over_is_not_touched_before_the_worker_that_had_it_lets_it_go() {
    let task = Counter::new();
    let ((from, gate), to) = (stuck(std::slice::from_ref(&task)), worker());
    // Its doorbell rings, and the worker that waits for it does not know yet.
    task.offer(1);
    from.hand_over(TaskId(1), &to);
    settle(&to);
    assert_eq!(task.moved.load(Ordering::SeqCst), 0, "two workers have it");
    gate.open.store(true, Ordering::SeqCst);
    eventually("move", || task.moved.load(Ordering::SeqCst) == 1);
    drop(from);
    eventually("sleep", || to.activity() == Activity::Asleep);
    task.offer(2);
    eventually("wake-up", || task.moved.load(Ordering::SeqCst) == 3);
}

#[test]
fn what_is_asked_of_a_task_on_its_way_is_done_when_it_arrives() {
    let tasks = [Counter::new(), Counter::new(), Counter::new()];
    let [roaming, removed, finished] = &tasks;
    let ((from, gate), to, third) = (stuck(&tasks), worker(), worker());
    from.hand_over(TaskId(1), &to);
    to.hand_over(TaskId(1), &from);
    from.hand_over(TaskId(1), &third);
    third.hand_over(TaskId(1), &third);
    from.hand_over(TaskId(2), &to);
    to.nudge(TaskId(2));
    to.remove(TaskId(2));
    finished.gone.store(true, Ordering::SeqCst);
    finished.offer(1);
    from.hand_over(TaskId(3), &to);
    to.hand_over(TaskId(3), &third);
    settle(&to);
    settle(&third);
    gate.open.store(true, Ordering::SeqCst);
    for task in [removed, finished] {
        eventually("letting go", || Arc::strong_count(task) == 1);
    }
    settle(&from);
    drop((from, to));
    roaming.offer(1);
    eventually("wake-up", || roaming.moved.load(Ordering::SeqCst) == 1);
    third.remove(TaskId(1));
    eventually("letting go", || Arc::strong_count(roaming) == 1);
}

/// A queue that waits for what the test says.
struct Waiter {
    polls: AtomicUsize,
    wait: Box<dyn Fn() -> Wait + Send + Sync>,
}

impl Waiter {
    fn new(wait: impl Fn() -> Wait + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self { polls: AtomicUsize::new(0), wait: Box::new(wait) })
    }
}

impl Task<()> for Waiter {
    fn poll(&self, (): &mut (), _: Nanos) -> Polled {
        self.polls.fetch_add(1, Ordering::SeqCst);
        Polled::Empty
    }

    fn arm(&self) -> Wait {
        (self.wait)()
    }

    fn disarm(&self) {}
    fn spent(&self, _: Nanos) {}
}

#[test]
fn task_whose_doorbell_cannot_be_waited_for_is_looked_at_all_the_same() {
    // A regular file cannot be in an epoll set.
    let file = Arc::new(std::fs::File::open("/proc/self/exe").unwrap());
    let worker = worker();
    let task = Waiter::new(move || Wait::Readable(file.clone()));
    worker.add(TaskId(1), task.clone());
    eventually("polls", || task.polls.load(Ordering::SeqCst) > 100);
    assert!(worker.sleeps() > 0);
}

#[test]
fn task_with_doorbell_and_deadline_is_woken_by_either() {
    let sharing = Sharing { idle: Duration::ZERO, preempt: false };
    let polls = |deadline: fn(Nanos) -> Nanos, rings: usize| {
        let clock = Clock::default();
        let worker = Worker::<()>::start(0, clock, sharing).unwrap();
        let bell = Arc::new(Doorbell::new().unwrap());
        let rung = bell.clone();
        let task = Waiter::new(move || Wait::ReadableUntil(bell.clone(), deadline(clock.now())));
        worker.add(TaskId(1), task.clone());
        for seen in 1..=rings {
            eventually("sleep", || worker.activity() == Activity::Asleep);
            rung.ring();
            eventually("wake-up", || task.polls.load(Ordering::SeqCst) > seen);
        }
        eventually("polls", || task.polls.load(Ordering::SeqCst) > 10);
    };
    polls(|_| Nanos::MAX, 10);
    polls(|now| now + 1_000_000, 0);
}
