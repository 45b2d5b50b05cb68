//! Four connections through four queues on four virtual processors, through one of these queues, and through the only queue of
//! a guest with one virtual processor.

use anyhow::{Context, Result};
use switchyard_tests::iperf::Load;
use switchyard_tests::station::Station;

use super::ours::{FOUR_QUEUES, Machine, ONE_QUEUE};
use super::{Line, SHORT, Stage, Way};
use crate::bench::goal::Goal;
use crate::bench::plan::Peer;
use crate::bench::table::Table;

const STREAMS: Load = Load::Tcp { streams: 4 };
const LINES: [Line; 2] = [
    Line { what: "TCP transmit, 4 streams", unit: "Mbit/s", way: Way::Transmit, load: STREAMS },
    Line { what: "TCP receive, 4 streams", unit: "Mbit/s", way: Way::Receive, load: STREAMS },
];

#[derive(Debug)]
struct Contender<'a> {
    name: &'static str,
    machine: &'a Machine,
    queues: u32,
}

impl Peer for Contender<'_> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn freeze(&mut self) -> Result<()> {
        self.machine.freeze()
    }

    fn thaw(&mut self) -> Result<()> {
        self.machine.thaw()?;
        let queues = self.queues;
        // ethtool reports a change to what is so already as a failure.
        let line = format!(
            "ethtool -l eth0 | tail -n 2 | grep -q 'Combined:.*{queues}$' || ethtool -L eth0 combined {queues}"
        );
        let guest = &self.machine.guest;
        guest.check(&line, SHORT)?;
        guest
            .check(&format!("until ping -c 1 -W 1 {}; do :; done", self.machine.host_address), SHORT)
            .map(drop)
    }
}

/// Both ways.
pub fn run(stage: &Stage<'_>) -> Result<Table> {
    let (one, four) = (stage.ours.boot_ready(ONE_QUEUE)?, stage.ours.boot_ready(FOUR_QUEUES)?);
    one.freeze()?;
    four.freeze()?;
    stage.plan.say("a guest with four virtual processors and one with one are up");
    let mut contenders = [
        Contender { name: "4 queues, 4 vCPUs", machine: &four, queues: 4 },
        Contender { name: "1 queue, 4 vCPUs", machine: &four, queues: 1 },
        Contender { name: "1 queue, 1 vCPU", machine: &one, queues: 1 },
    ];
    let mut table = Table::new("one guest in the nested host, guest ↔ host, 4 TCP streams, MTU 1500, iperf3");
    for line in LINES {
        let row = stage
            .plan
            .interleave(&line.figure(), &mut contenders, |contender| {
                contender.machine.measure(line.way, line.load, stage.plan.seconds())
            })
            .with_context(|| stage.ours.state(FOUR_QUEUES))?;
        for (index, to) in [(1, "1 queue of 4 vCPUs"), (2, "1 queue of 1 vCPU")] {
            table.goal(&Goal::at_least(format!("{}, 4 queues to {to}", row.what), row.ratio(index), 1.0));
        }
        table.rows.push(row);
    }
    Ok(table)
}
