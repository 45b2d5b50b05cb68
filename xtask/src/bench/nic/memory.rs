//! What a VM's worker takes beside its guest's memory, after traffic.

use anyhow::{Context, Result};
use switchyard_tests::station::Station;

use super::ours::{Machine, SYNTHETIC};
use super::{SHORT, Stage, TCP, Way};
use crate::bench::goal::Goal;
use crate::bench::table::{Row, Table, median};

/// Adds up `/proc/PID/smaps` (KiB), but for the guest's memory: the memfd larger than 16 MiB.
const SUM: &str = "awk '/^[0-9a-f]+-[0-9a-f]+ / { memfd = /memfd:/ } \
     /^Size:/ { guest = memfd && $2 > 16384 } \
     /^Pss:/ { if (!guest) pss += $2; else of_guest += $2 } \
     /^Private_(Clean|Dirty):/ { if (!guest) uss += $2 } \
     END { print pss, uss, of_guest }'";

/// Several fresh VMs, one after the other.
pub fn run(stage: &Stage<'_>) -> Result<Table> {
    let (mut proportional, mut unique) = (Vec::new(), Vec::new());
    for round in 1..=stage.plan.runs().min(3) {
        let machine = stage.ours.boot_ready(SYNTHETIC)?;
        machine.measure(Way::Transmit, TCP, 1)?;
        machine.measure(Way::Receive, TCP, 1)?;
        let [pss, uss, guest] = sum(&machine)?;
        stage.ours.stop(machine)?;
        stage.plan.say(format_args!(
            "worker, round {round}: {pss:.2} MiB, {uss:.2} MiB its own; of the guest's memory {guest:.0} MiB are there"
        ));
        proportional.push(pss);
        unique.push(uss);
    }
    let mut table = Table::new("a VM's worker after traffic, beside the guest's memory (/proc/PID/smaps)");
    table.goal(&Goal::at_most("worker's memory, PSS in MiB", median(&proportional), 10.0));
    table.rows.push(Row::alone("PSS: shared pages in part", "MiB", "yard-worker", proportional));
    table.rows.push(Row::alone("USS: its own pages", "MiB", "yard-worker", unique));
    Ok(table)
}

/// Proportional, unique, and the guest's, in MiB.
fn sum(machine: &Machine) -> Result<[f64; 3]> {
    let text = machine.guest.host().check(&format!("{SUM} /proc/{}/smaps", machine.worker), SHORT)?;
    let numbers: Vec<f64> = text.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    let numbers: [f64; 3] = numbers.try_into().ok().with_context(|| format!("no sums: {text:?}"))?;
    anyhow::ensure!(numbers[0] > 0.0, "nothing is mapped: {text:?}");
    Ok(numbers.map(|kib| kib / 1024.0))
}
