//! Two network namespaces: TAP devices on our switch against the kernel's own bridge and OVS in user space.
//!
//! Twice: with sender and receiver on one processor, and wherever the host has time. The kernel's bridge has no thread of
//! its own; it works on the sender's and the receiver's account. So it has one processor for everything in the first
//! case, where the others have two, and all of them in the second.

use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;
use switchyard_tests::iperf::{Load, iperf};
use switchyard_tests::station::{Job, Output, Station};

use super::guests::SHORT;
use super::namespaces::{Joined, Kind, RIGHT};
use super::peers::CLIENT_CPU;
use super::plan::{Figure, Plan};
use super::table::{Bounds, Report, Table};

/// Columns of those that are compared with.
const BRIDGE: usize = 1;
const OVS: usize = 2;
const TCP: &Bounds = &[(BRIDGE, 1.0), (OVS, 4.0)];
const UDP: &Bounds = &[(OVS, 2.0)];

/// Of iperf3, and what is wanted of the others' rates. With datagrams iperf3 measures itself: [`flood`] has a bound.
const LOADS: [(&str, &str, Load, &Bounds); 3] = [
    ("TCP, 1 stream", "Gbit/s", Load::Tcp { streams: 1 }, TCP),
    ("TCP, 4 streams", "Gbit/s", Load::Tcp { streams: 4 }, TCP),
    ("UDP of 64 B frames, iperf3", "kpps", SHORT, &[]),
];

/// A station whose commands stay on the clients' processor.
struct Pinned<'a>(&'a dyn Station);

impl Pinned<'_> {
    fn line(line: &str) -> String {
        format!("taskset -c {CLIENT_CPU} {line}")
    }
}

impl Station for Pinned<'_> {
    fn name(&self) -> &str {
        self.0.name()
    }

    fn run(&self, line: &str, limit: Duration) -> Result<Output> {
        self.0.run(&Self::line(line), limit)
    }

    fn spawn(&self, line: &str) -> Result<Box<dyn Job>> {
        self.0.spawn(&Self::line(line))
    }
}

/// TCP with one and four connections, and UDP.
pub fn run(plan: &Plan, report: &mut Report) -> Result<()> {
    plan.say("two namespaces each at yardd, a Linux bridge and OVS in user space");
    let kinds = [Kind::Yardd, Kind::Bridge, Kind::Ovs];
    let mut peers = kinds.into_iter().map(|kind| Joined::start(plan, kind)).collect::<Result<Vec<_>>>()?;
    for (pinned, title) in [
        (
            true,
            "two network namespaces, sender and receiver on one processor, the switch on the other, MTU 1500",
        ),
        (false, "two network namespaces, sender and receiver on all processors, MTU 1500"),
    ] {
        let mut table = Table::new(title);
        for (what, unit, load, wanted) in LOADS {
            let row = plan.interleave(&Figure::new(what, unit), &mut peers, |peer| {
                measure(peer, pinned, load, plan.seconds())
            })?;
            table.row(row, wanted);
        }
        let figure = Figure::new("UDP of 64 B frames, flood", "kpps");
        table.row(plan.interleave(&figure, &mut peers, |peer| flood(plan, peer, pinned))?, UDP);
        report.tables.push(table);
    }
    Ok(())
}

/// Thousands of frames a second that arrive at the right namespace's device, while the left one sends what it can. At
/// this rate iperf3 measures itself: its receiver takes more time for a datagram than a switch does.
fn flood(plan: &Plan, peer: &Joined, pinned: bool) -> Result<f64> {
    let flood = plan.programs.join("yard-flood");
    let line = format!("{} {RIGHT}:9 --seconds {}", flood.display(), plan.seconds());
    let line = if pinned { Pinned::line(&line) } else { line };
    let before = arrived(peer)?;
    let text = peer.left.check(&line, plan.window() + Duration::from_secs(20))?;
    let frames = arrived(peer)?.saturating_sub(before);
    let json: Value = serde_json::from_str(&text).with_context(|| format!("not JSON: {text}"))?;
    Ok(frames as f64 / json["seconds"].as_f64().context("the flood says no duration")? / 1e3)
}

/// Frames that the devices of the right namespace have received.
fn arrived(peer: &Joined) -> Result<u64> {
    let text = peer.right.check("cat /sys/class/net/*/statistics/rx_packets", Duration::from_secs(10))?;
    text.lines().map(|line| line.trim().parse::<u64>().with_context(|| format!("no count: {line:?}"))).sum()
}

fn measure(peer: &Joined, pinned: bool, load: Load, seconds: u32) -> Result<f64> {
    let (left, right): (&dyn Station, &dyn Station) = (&peer.left, &peer.right);
    let report = if pinned {
        iperf(&Pinned(right), &Pinned(left), RIGHT, load, seconds)?
    } else {
        iperf(right, left, RIGHT, load, seconds)?
    };
    Ok(match load {
        Load::Tcp { .. } => report.bits_per_second / 1e9,
        Load::Udp { .. } => report.packets_per_second / 1e3,
    })
}
