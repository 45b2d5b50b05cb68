//! How every comparison runs: a warm-up round that is thrown away, then rounds in which each peer is measured once while
//! the others are frozen. What drifts on a shared machine then drifts for all of them.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::table::{Row, Series};

/// Between a peer's thaw and its measurement.
const SETTLE: Duration = Duration::from_millis(300);

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
}

impl Plan {
    /// `runs` rounds after the warm-up, `seconds` for each measurement; the programs under test are in `programs`.
    pub fn new(programs: PathBuf, runs: u32, seconds: u32) -> Self {
        Self { programs, runs, seconds, start: Instant::now() }
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

    /// Measures every peer once a round. All must be frozen, and are afterwards. The first peer is ours: tables relate
    /// the others to it.
    pub fn interleave<P: Peer>(
        &self,
        figure: &Figure,
        peers: &mut [P],
        mut measure: impl FnMut(&mut P) -> Result<f64>,
    ) -> Result<Row> {
        let mut series: Vec<_> = peers.iter().map(|peer| Series::new(peer.name())).collect();
        for round in 0..=self.runs {
            let mut shown = String::new();
            for (peer, series) in peers.iter_mut().zip(&mut series) {
                let value = self
                    .one(peer, &mut measure)
                    .with_context(|| format!("{}: {}", peer.name(), figure.what))?;
                if round > 0 {
                    series.samples.push(value);
                }
                shown.push_str(&format!("  {} {value:.3}", peer.name()));
            }
            let name = if round == 0 { "warm-up".to_owned() } else { format!("round {round}/{}", self.runs) };
            self.say(format_args!("{}, {name}:{shown} {}", figure.what, figure.unit));
        }
        Ok(Row { what: figure.what.clone(), unit: figure.unit, series })
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
    fn silence_is_an_error() {
        let plan = Plan::new(PathBuf::new(), 1, 1);
        let mut peers = [Fake("a", false)];
        assert!(plan.interleave(&Figure::new("x", "y"), &mut peers, |_| Ok(0.0)).is_err());
        assert!(!peers[0].1, "left running");
    }
}
