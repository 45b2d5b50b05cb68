//! A guest that rings its doorbell without end, and what others get done meanwhile.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use rustix::thread::{CpuSet, sched_setaffinity};
use rustix::time::{ClockId, clock_gettime};
use vmq::doorbell::Doorbell;
use vmq::frame::{Accepts, BURST_FRAMES, Burst, Offload};
use vmq::worker::{Nanos, Wait};
use vswitch::backend::{BackendFault, FrameSink, FrameSource};
use vswitch::tally::Tally;

use super::life::Silent;
use super::*;

/// Turns of the witness, a full burst each, that are one sample.
const TURNS: u64 = 16;

/// Samples of each kind. Storm and calm alternate, so that what else the machine does meets both.
const SAMPLES: usize = 60;

/// Rings while a sample was taken, at least.
const RINGS: u64 = 16;

/// What the witness' worker spent on samples.
#[derive(Debug, Default)]
struct Books {
    storm: AtomicBool,
    /// Changes of `storm` so far.
    changes: AtomicU64,
    /// Of either doorbell.
    rings: AtomicU64,
    /// Nanoseconds of the worker's own processor time: in calm, in a storm.
    samples: Mutex<[Vec<u64>; 2]>,
}

/// The moment at which a sample ends and the next one begins.
#[derive(Debug, Clone, Copy, Default)]
struct Moment {
    spent: u64,
    wall: u64,
    changes: u64,
    rings: u64,
}

/// Always has frames, and reads its worker's clock.
#[derive(Debug)]
struct Witness {
    frame: Vec<u8>,
    books: Arc<Books>,
    turns: u64,
    since: Moment,
}

impl Witness {
    /// It is no sample if storm and calm were in it, if the worker was kept from its processor, or if nobody rang.
    fn look(&mut self) {
        let nanos = |clock| {
            let time = clock_gettime(clock);
            u64::try_from(time.tv_sec * 1_000_000_000 + time.tv_nsec).unwrap()
        };
        let now = Moment {
            spent: nanos(ClockId::ThreadCPUTime),
            wall: nanos(ClockId::Monotonic),
            changes: self.books.changes.load(Ordering::SeqCst),
            rings: self.books.rings.load(Ordering::Relaxed),
        };
        let since = std::mem::replace(&mut self.since, now);
        let spent = now.spent - since.spent;
        let rang = now.rings - since.rings >= RINGS;
        if rang && now.changes == since.changes && now.wall - since.wall < spent + spent / 8 {
            let storm = self.books.storm.load(Ordering::SeqCst);
            self.books.samples.lock().unwrap()[usize::from(storm)].push(spent);
        }
    }
}

impl FrameSource for Witness {
    fn receive<'m>(&'m mut self, burst: &mut Burst<'m>, _: Nanos, _: &mut Tally) -> Result<(), BackendFault> {
        if self.turns.is_multiple_of(TURNS) {
            self.look();
        }
        self.turns += 1;
        for _ in 0..BURST_FRAMES {
            assert!(burst.push(self.frame.as_slice().into(), Offload::NONE));
        }
        Ok(())
    }

    fn complete(&mut self) -> Result<bool, BackendFault> {
        Ok(false)
    }

    fn arm(&mut self) -> Wait {
        Wait::Nothing
    }

    fn disarm(&mut self) {}
}

/// Takes whatever comes, and copies it as any adapter does.
#[derive(Debug)]
struct Hole {
    arrived: Arc<AtomicU64>,
    copy: Vec<u8>,
}

impl FrameSink for Hole {
    fn accepts(&self) -> Accepts {
        Accepts::all()
    }

    fn put(&mut self, _: Nanos, burst: &Burst<'_>, list: &[u8], _: &mut Tally) -> Result<bool, BackendFault> {
        for &index in list {
            for segment in burst.tail(&burst.frames()[usize::from(index)]) {
                segment.read_into(&mut self.copy[..segment.len() as usize]);
            }
        }
        self.arrived.fetch_add(list.len() as u64, Ordering::Relaxed);
        Ok(false)
    }
}

/// A port whose frames are made and taken here.
fn plug(rig: &mut Rig, number: u8, source: impl FrameSource + 'static, arrived: &Arc<AtomicU64>) {
    let name = rig.port(number, |spec| spec.mac = Some(address(number))).unwrap();
    let port = rig.fabric().backend("lan", &name).unwrap();
    let sink = Hole { arrived: Arc::clone(arrived), copy: vec![0; 1514] };
    port.connect(0, Box::new(source), Box::new(sink));
}

/// A witness with frames of `len` bytes shares its worker with a guest that storms. What is compared is the processor time of
/// that worker which as many of its frames take, with all that comes in between, in calm and in a storm: it leaves out what
/// the machine gives to others.
fn price(len: usize) -> [u64; 2] {
    let mut rig = Rig::new(vec![0]).unwrap();
    let mut one = rig.guest(1, |_| (), Config::default()).unwrap();
    let (books, arrived) = (Arc::new(Books::default()), Arc::new(AtomicU64::new(0)));
    plug(&mut rig, 3, Silent, &arrived);
    let witness =
        Witness { frame: frame(3, 2, len), books: Arc::clone(&books), turns: 0, since: Moment::default() };
    plug(&mut rig, 2, witness, &arrived);
    let (stop, elsewhere) = (AtomicBool::new(false), Doorbell::new().unwrap());
    let end = Instant::now() + TIMEOUT;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Rings that take turns with the worker on its processor are no storm.
            let mut processors = CpuSet::new();
            processors.set(1);
            let _ = sched_setaffinity(None, &processors);
            while !stop.load(Ordering::Relaxed) {
                // In calm as much is rung, and nobody hears it.
                books.rings.fetch_add(8, Ordering::Relaxed);
                for _ in 0..8 {
                    if books.storm.load(Ordering::Relaxed) {
                        one.channels[0].ring();
                    } else {
                        elsewhere.ring();
                    }
                }
            }
        });
        while books.samples.lock().unwrap().iter().any(|samples| samples.len() < SAMPLES) {
            let storm = books.storm.load(Ordering::SeqCst);
            let before = books.samples.lock().unwrap()[usize::from(storm)].len();
            while books.samples.lock().unwrap()[usize::from(storm)].len() < before + 4 && Instant::now() < end
            {
                std::thread::sleep(Duration::from_millis(1));
            }
            books.storm.store(!storm, Ordering::SeqCst);
            books.changes.fetch_add(1, Ordering::SeqCst);
            assert!(Instant::now() < end, "the witness gets no turn");
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(arrived.load(Ordering::Relaxed) > TURNS * BURST_FRAMES as u64, "the witness' frames go nowhere");
    let [calm, storm] = books.samples.lock().unwrap().each_mut().map(|samples| {
        samples.sort_unstable();
        samples[samples.len() / 4]
    });
    // The guest that stormed is served as well.
    one.query(Oid::GEN_LINK_SPEED).unwrap();
    println!("{TURNS} turns of {len} bytes: {calm} ns in calm and {storm} ns in a storm");
    [calm, storm]
}

#[test]
fn doorbell_storm_of_an_idle_guest_leaves_a_witness_nine_tenths_of_the_worker() {
    let [calm, storm] = price(1514);
    assert!(calm * 10 >= storm * 9, "{calm} ns became {storm} ns");
}

/// Frames that are hardly any work: there is the most time for doorbells between them.
#[test]
fn doorbell_storm_of_an_idle_guest_leaves_a_witness_of_the_shortest_frames_seven_tenths() {
    let [calm, storm] = price(60);
    assert!(calm * 10 >= storm * 7, "{calm} ns became {storm} ns");
}
