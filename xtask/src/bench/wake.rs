//! What waking adds: pings far enough apart that the worker sleeps between them, against a worker that keeps polling. And what
//! it costs on this machine to wake any process on the other processor and to be woken by it: a byte to `cat` and back.

use std::io::{Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use switchyard_tests::process::command_on;
use switchyard_tests::station::Station;

use super::goal::Goal;
use super::namespaces::{Joined, Kind, RIGHT};
use super::peers::{CLIENT_CPU, SWITCH_CPU};
use super::plan::{Figure, Peer, Plan, join};
use super::table::{Report, Table, median};

/// Pings in a measurement.
const PINGS: usize = 100;

/// From one to the next: four hundred times as long as a worker polls before it sleeps.
const INTERVAL: Duration = Duration::from_millis(20);

/// Round trips through a worker asleep and one awake.
pub fn run(plan: &Plan, report: &mut Report) -> Result<()> {
    let mut peers = [Joined::start(plan, Kind::Yardd)?, Joined::start(plan, Kind::YarddAwake)?];
    let figure = Figure::new(format!("median round trip of {PINGS} pings between TAP devices"), "µs");
    let row = plan.interleave(&figure, &mut peers, ping)?;
    let [asleep, awake] =
        [0, 1].map(|index: usize| row.series.get(index).map_or(f64::NAN, |s| median(&s.samples)));
    let mut table = Table::new("waking from sleep");
    table
        .notes
        .push(format!("Waking adds {:.1} µs to a ping, which crosses the switch twice.", asleep - awake));
    table.goal(&Goal::at_most("added by waking, µs", asleep - awake, 50.0));
    table.rows.push(row);
    report.tables.push(table);
    let figure = Figure::new(format!("median round trip of {PINGS} bytes over two pipes"), "µs");
    let row = plan.interleave(&figure, &mut [Echo::start()?], Echo::round_trip)?;
    let mut table =
        Table::new("waking a process on the switch's processor, and being woken by it, without a switch");
    table.rows.push(row);
    report.tables.push(table);
    Ok(())
}

/// `cat` on the switch's processor, asleep between two bytes.
struct Echo {
    child: Child,
    to: ChildStdin,
    from: ChildStdout,
}

impl Echo {
    fn start() -> Result<Self> {
        let mut cat = command_on(&[SWITCH_CPU], "cat");
        let mut child = cat.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("cannot run cat")?;
        let to = child.stdin.take().context("no input")?;
        let from = child.stdout.take().context("no output")?;
        Ok(Self { child, to, from })
    }

    /// The median round trip in microseconds, from a thread on the clients' processor.
    fn round_trip(&mut self) -> Result<f64> {
        let (to, from) = (&mut self.to, &mut self.from);
        let trips = move || -> Result<f64> {
            vmq::os::pin_thread(CLIENT_CPU)?;
            let mut times = Vec::with_capacity(PINGS);
            for _ in 0..PINGS {
                std::thread::sleep(INTERVAL);
                let start = Instant::now();
                to.write_all(b"x")?;
                from.read_exact(&mut [0])?;
                times.push(start.elapsed().as_secs_f64() * 1e6);
            }
            Ok(median(&times))
        };
        std::thread::scope(|scope| join(scope.spawn(trips)))
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Peer for Echo {
    fn name(&self) -> &'static str {
        "cat"
    }

    /// Without a byte it sleeps anyway.
    fn freeze(&mut self) -> Result<()> {
        Ok(())
    }

    fn thaw(&mut self) -> Result<()> {
        Ok(())
    }
}

/// The median round trip in microseconds.
fn ping(peer: &mut Joined) -> Result<f64> {
    let line = format!("ping -n -W 2 -c {PINGS} -i {} {RIGHT}", INTERVAL.as_secs_f64());
    let times = round_trips(&peer.left.check(&line, Duration::from_secs(60))?);
    ensure!(times.len() == PINGS, "{} of {PINGS} pings were answered", times.len());
    Ok(median(&times))
}

/// The microseconds in lines like "64 bytes from 10.9.0.2: icmp_seq=1 ttl=64 time=0.123 ms".
fn round_trips(text: &str) -> Vec<f64> {
    let time = |line: &str| line.split_once("time=")?.1.split(' ').next()?.parse::<f64>().ok();
    text.lines().filter_map(time).map(|milliseconds| milliseconds * 1000.0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trips_are_read_in_microseconds() {
        let text = "PING 10.9.0.2 (10.9.0.2) 56(84) bytes of data.\n\
                    64 bytes from 10.9.0.2: icmp_seq=1 ttl=64 time=0.125 ms\n\
                    64 bytes from 10.9.0.2: icmp_seq=2 ttl=64 time=2.5 ms\n\n\
                    2 packets transmitted, 2 received, 0% packet loss, time 20ms\n";
        assert_eq!(round_trips(text), [125.0, 2500.0]);
    }
}
