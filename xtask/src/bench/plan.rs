//! How every comparison runs: a warm-up round that is thrown away, then rounds in which each peer is measured once while
//! the others are frozen. What drifts on a shared machine then drifts for all of them.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::table::{Row, Series};

/// Between a peer's thaw, or its clients' start, and its measurement.
pub const SETTLE: Duration = Duration::from_millis(300);

/// What a thread has to say; its panic is ours.
pub fn join<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Something that is measured beside others: a switch with its clients.
pub trait Peer {
    /// Its column in the table.
    fn name(&self) -> &'static str;

    /// Stops everything of it that could take processor time (SIGSTOP).
    fn freeze(&mut self) -> Result<()>;

    /// Lets it go on.
    fn thaw(&mut self) -> Result<()>;
}

/// What is measured, as a row of a table has it.
#[derive(Debug, Clone)]
pub struct Figure {
    /// Row.
    pub what: String,
    /// Unit, for the row's name.
    pub unit: &'static str,
}

impl Figure {
    /// `what` in `unit`.
    pub fn new(what: impl Into<String>, unit: &'static str) -> Self {
        Self { what: what.into(), unit }
    }
}

/// How often and how long to measure.
#[derive(Debug)]
pub struct Plan {
    /// Where the release build of our programs is.
    pub programs: PathBuf,
    runs: u32,
    seconds: u32,
    start: Instant,
    /// Whole rounds of each figure, if they are kept: a measurement that is begun again goes on from there.
    kept: RefCell<Option<BTreeMap<String, Vec<Vec<f64>>>>>,
}

impl Plan {
    /// `runs` rounds after the warm-up, `seconds` for each measurement; the programs under test are in `programs`.
    pub fn new(programs: PathBuf, runs: u32, seconds: u32) -> Self {
        Self { programs, runs, seconds, start: Instant::now(), kept: RefCell::default() }
    }

    /// How long one measurement takes.
    pub fn window(&self) -> Duration {
        Duration::from_secs(self.seconds.into())
    }

    /// The same in whole seconds, for iperf3.
    pub fn seconds(&self) -> u32 {
        self.seconds
    }

    /// Rounds without the warm-up.
    pub fn runs(&self) -> u32 {
        self.runs
    }

    /// Prints what is being done.
    pub fn say(&self, what: impl std::fmt::Display) {
        eprintln!("[{:6.1} s] {what}", self.start.elapsed().as_secs_f32());
    }

    /// Keeps whole rounds of what is measured from now on, for when it fails and is begun again.
    pub fn keep_rounds(&self) {
        self.kept.replace(Some(BTreeMap::new()));
    }

    /// Measures every peer once a round. All must be frozen, and are afterwards. The first peer is ours: tables relate
    /// the others to it. Rounds that were kept are not measured again.
    pub fn interleave<P: Peer>(
        &self,
        figure: &Figure,
        peers: &mut [P],
        mut measure: impl FnMut(&mut P) -> Result<f64>,
    ) -> Result<Row> {
        let kept = self.kept.borrow().as_ref().and_then(|kept| kept.get(&figure.what).cloned());
        let mut rounds = kept.unwrap_or_default();
        let mut warm = false;
        while rounds.len() < self.runs as usize {
            let round = self.round(figure, peers, &mut measure)?;
            let shown: String = peers
                .iter()
                .zip(&round)
                .map(|(peer, value)| format!("  {} {value:.3}", peer.name()))
                .collect();
            if !std::mem::replace(&mut warm, true) {
                self.say(format_args!("{}, warm-up:{shown} {}", figure.what, figure.unit));
                continue;
            }
            rounds.push(round);
            let (number, of) = (rounds.len(), self.runs);
            self.say(format_args!("{}, round {number}/{of}:{shown} {}", figure.what, figure.unit));
            if let Some(kept) = &mut *self.kept.borrow_mut() {
                kept.insert(figure.what.clone(), rounds.clone());
            }
        }
        let samples = |at: usize| rounds.iter().filter_map(|round| round.get(at).copied()).collect();
        let series = |(at, peer): (usize, &P)| Series { samples: samples(at), ..Series::new(peer.name()) };
        let series = peers.iter().enumerate().map(series).collect();
        Ok(Row { what: figure.what.clone(), unit: figure.unit, series })
    }

    /// Every peer once.
    fn round<P: Peer>(
        &self,
        figure: &Figure,
        peers: &mut [P],
        measure: &mut impl FnMut(&mut P) -> Result<f64>,
    ) -> Result<Vec<f64>> {
        let one = |peer: &mut P| {
            let value = self.one(peer, measure);
            value.with_context(|| format!("{}: {}", peer.name(), figure.what))
        };
        peers.iter_mut().map(one).collect()
    }

    fn one<P: Peer>(&self, peer: &mut P, measure: &mut impl FnMut(&mut P) -> Result<f64>) -> Result<f64> {
        peer.thaw()?;
        std::thread::sleep(SETTLE);
        let value = measure(peer);
        // Frozen also after a failure, or it would disturb what is measured next; the failure is what counts.
        let frozen = peer.freeze();
        let value = value?;
        frozen?;
        ensure!(value.is_finite() && value > 0.0, "{value} was measured: nothing went through");
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fake(&'static str, bool);

    impl Peer for Fake {
        fn name(&self) -> &'static str {
            self.0
        }
        fn freeze(&mut self) -> Result<()> {
            self.1 = false;
            Ok(())
        }
        fn thaw(&mut self) -> Result<()> {
            self.1 = true;
            Ok(())
        }
    }

    #[test]
    fn first_round_is_thrown_away_and_only_the_measured_peer_runs() {
        let plan = Plan::new(PathBuf::new(), 2, 1);
        let mut peers = [Fake("a", false), Fake("b", false)];
        let mut order = Vec::new();
        let mut count = 0.0;
        let row = plan
            .interleave(&Figure::new("x", "y"), &mut peers, |peer| {
                assert!(peer.1, "measured while frozen");
                order.push(peer.0);
                count += 1.0;
                Ok(count)
            })
            .unwrap();
        assert_eq!(order, ["a", "b", "a", "b", "a", "b"]);
        assert_eq!(row.series[0].samples, [3.0, 5.0]);
        assert_eq!(row.series[1].samples, [4.0, 6.0]);
        assert!(peers.iter().all(|peer| !peer.1));
    }

    #[test]
    fn rounds_before_a_failure_are_kept_for_the_next_attempt() {
        let plan = Plan::new(PathBuf::new(), 3, 1);
        plan.keep_rounds();
        let mut peers = [Fake("a", false), Fake("b", false)];
        let mut count = 0;
        let mut attempt = |fails: i32| {
            plan.interleave(&Figure::new("x", "y"), &mut peers, |_| {
                count += 1;
                ensure!(count != fails, "lost");
                Ok(f64::from(count))
            })
        };
        // Warm-up, one round, half a round.
        assert!(attempt(6).is_err());
        // Warm-up, two rounds.
        let row = attempt(0).unwrap();
        assert_eq!(row.series[0].samples, [3.0, 9.0, 11.0]);
        assert_eq!(row.series[1].samples, [4.0, 10.0, 12.0]);
        // Another figure of that name.
        plan.keep_rounds();
        assert_eq!(attempt(0).unwrap().series[0].samples, [15.0, 17.0, 19.0]);
    }

    #[test]
    fn silence_is_an_error() {
        let plan = Plan::new(PathBuf::new(), 1, 1);
        let mut peers = [Fake("a", false)];
        assert!(plan.interleave(&Figure::new("x", "y"), &mut peers, |_| Ok(0.0)).is_err());
        assert!(!peers[0].1, "left running");
    }
}
