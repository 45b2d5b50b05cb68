//! What waking adds: pings far enough apart that the worker sleeps between them, against a worker that keeps polling.

use std::time::Duration;

use anyhow::{Result, ensure};
use switchyard_tests::station::Station;

use super::namespaces::{Joined, Kind, RIGHT};
use super::plan::{Figure, Plan};
use super::table::{Report, Table, median};

/// Pings in a measurement.
const PINGS: usize = 100;

/// Seconds from one to the next: four hundred times as long as a worker polls before it sleeps.
const INTERVAL: &str = "0.02";

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
    table.rows.push(row);
    report.tables.push(table);
    Ok(())
}

/// The median round trip in microseconds.
fn ping(peer: &mut Joined) -> Result<f64> {
    let line = format!("ping -n -W 2 -c {PINGS} -i {INTERVAL} {RIGHT}");
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
