//! The saturating generator: what a switch can do when its client is no limit.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;
use switchyard_tests::process::{command, output};

use super::goal::Goal;
use super::peers::{CLIENT_CPU, Needs, compare};
use super::plan::Plan;
use super::table::{Report, Row, Table, median};

/// The generator's addresses if it has one a side.
const MACS: [&str; 2] = ["02:00:00:00:00:00", "02:01:00:00:00:00"];

/// Bytes, addresses a side, and what is wanted of OVS-DPDK's rate.
const LOADS: [(u32, u32, Option<f64>); 3] = [(64, 1, Some(2.8)), (64, 1024, Some(4.5)), (1518, 1, None)];
/// OVS-DPDK's column.
const OVS: usize = 1;
/// What one of the shortest frames may cost.
const CYCLES: f64 = 100.0;

/// Seconds from the generator's start to its measurement: OVS sets its queues up anew for each client.
const WARM_UP: &str = "1.5";

/// What the generator sends.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// Bytes of a frame, without check sequence.
    pub frame: u32,
    /// Addresses on each side.
    pub addresses: u32,
    /// Packed rings.
    pub packed: bool,
}

/// Runs the generator once against two sockets: millions of frames a second.
pub fn generate(plan: &Plan, [a, b]: [&Path; 2], load: Load) -> Result<f64> {
    let mut generator = command(plan.programs.join("yard-generator"));
    generator.args([a, b]).args(["--cpu", &CLIENT_CPU.to_string(), "--warm-up", WARM_UP]);
    generator.args(["--frame", &load.frame.to_string(), "--addresses", &load.addresses.to_string()]);
    generator.args(["--seconds", &plan.seconds().to_string()]);
    if load.packed {
        generator.arg("--packed");
    }
    let text = output(&mut generator)?;
    let json: Value = serde_json::from_str(&text).with_context(|| format!("not JSON: {text}"))?;
    json["mpps"].as_f64().context("the generator says no rate")
}

/// Measures all loads, or only those of `frames` bytes.
pub fn run(plan: &Plan, packed: bool, frames: &[u32], report: &mut Report) -> Result<()> {
    let rings = if packed { "packed" } else { "split" };
    let mut rates =
        Table::new(format!("saturating generator over vhost-user, {rings} rings, both directions added"));
    let mut cycles = Table::new("what a packet costs yardd, by its own count");
    let loads = LOADS.iter().filter(|(frame, ..)| frames.is_empty() || frames.contains(frame));
    for &(frame, addresses, wanted) in loads {
        let (rate, cost) = one_load(plan, Load { frame, addresses, packed })?;
        rates.row(rate, wanted.map(|ratio| (OVS, ratio)).as_slice());
        if let (64, [own]) = (frame, &cost.series[..]) {
            let what = format!("{}, cycles a packet", cost.what);
            cycles.goal(&Goal::at_most(what, median(&own.samples), CYCLES));
        }
        cycles.rows.push(cost);
    }
    report.tables.extend([rates, cycles]);
    Ok(())
}

fn one_load(plan: &Plan, load: Load) -> Result<(Row, Row)> {
    let plural = if load.addresses == 1 { "" } else { "es" };
    let what = format!("{} B, {} address{plural} a side", load.frame, load.addresses);
    // A port that checks its guest's address admits only one.
    let macs = (load.addresses == 1).then_some(MACS);
    let needs = Needs { frame: load.frame, macs, addresses: None };
    compare(plan, what, &needs, |switch| switch.metered(|| generate(plan, switch.sockets(), load)))
}
