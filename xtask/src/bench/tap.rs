//! Two network namespaces: TAP devices on our switch against the kernel's own bridge and OVS in user space.
//!
//! Twice: with sender and receiver on one processor, and wherever the host has time. The kernel's bridge has no thread of
//! its own; it works on the sender's and the receiver's account. So it has one processor for everything in the first
//! case, where the others have two, and all of them in the second.

use std::time::Duration;

use anyhow::Result;
use switchyard_tests::iperf::{Load, iperf};
use switchyard_tests::station::{Job, Output, Station};

use super::guests::SHORT;
use super::namespaces::{Joined, Kind, RIGHT};
use super::peers::CLIENT_CPU;
use super::plan::{Figure, Plan};
use super::table::{Report, Table};

const LOADS: [(&str, &str, Load); 3] = [
    ("TCP, 1 stream", "Gbit/s", Load::Tcp { streams: 1 }),
    ("TCP, 4 streams", "Gbit/s", Load::Tcp { streams: 4 }),
    ("UDP of 64 B frames", "kpps", SHORT),
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
        (true, "two network namespaces, iperf3 on one processor, the switch on the other, MTU 1500"),
        (false, "two network namespaces, iperf3 on all processors, MTU 1500"),
    ] {
        let mut table = Table::new(title);
        for (what, unit, load) in LOADS {
            table.rows.push(plan.interleave(&Figure::new(what, unit), &mut peers, |peer| {
                measure(peer, pinned, load, plan.seconds())
            })?);
        }
        report.tables.push(table);
    }
    Ok(())
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
