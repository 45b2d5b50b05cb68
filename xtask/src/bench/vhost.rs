//! A testpmd pair that sends packets round through a vhost-user switch, at several frame sizes.
//!
//! testpmd is the client that others measure with; it spends about 164 cycles on a packet itself, so that it limits
//! small frames. The generator bench does not.

use anyhow::Result;
use switchyard_tests::testpmd::{Testpmd, TestpmdSpec};

use super::peers::{CLIENT_CPU, Needs, Switch, compare};
use super::plan::{Plan, SETTLE};
use super::table::{Report, Row, Table};

/// Bytes, without check sequence, and what is wanted of OVS-DPDK's rate and of `io`'s.
const FRAMES: [(u32, [f64; 2]); 5] =
    [(64, [1.5, 1.1]), (256, [1.7, 1.3]), (1518, [1.9, 1.6]), (4000, [1.45, 1.35]), (9000, [1.3, 1.2])];

/// Columns of those that are compared with.
const OVS: usize = 1;
const IO: usize = 2;

/// Packets that circulate: as many bursts of 32 from each port.
const BURSTS: u32 = 16;

/// [`TestpmdSpec::pair`] sends from these.
const MACS: [&str; 2] = ["02:00:00:00:00:0a", "02:00:00:00:00:0b"];

/// A pair that loads `switch`, with packets in circulation.
fn circulate(switch: &Switch, frame: u32, packed: bool) -> Result<Testpmd> {
    let [a, b] = switch.sockets();
    let mut spec = TestpmdSpec::pair(a, b);
    spec.cpu = CLIENT_CPU;
    spec.max_frame = frame.max(1518);
    spec.ports.iter_mut().for_each(|port| port.packed = packed);
    let mut client = Testpmd::start(switch.lab(), &spec)?;
    client.start_loop(frame, BURSTS)?;
    std::thread::sleep(SETTLE);
    Ok(client)
}

/// Measures all sizes, or only `frames`.
pub fn run(plan: &Plan, packed: bool, frames: &[u32], report: &mut Report) -> Result<()> {
    let rings = if packed { "packed" } else { "split" };
    let mut rates = Table::new(format!("testpmd pair over vhost-user, {rings} rings, both directions added"));
    let mut cycles = Table::new("what a packet costs yardd, by its own count");
    let all = FRAMES.map(|(frame, _)| frame);
    for &frame in if frames.is_empty() { &all } else { frames } {
        let (rate, cost) = one_size(plan, packed, frame)?;
        let wanted = FRAMES.iter().find(|(with, _)| *with == frame);
        let wanted = wanted.map(|&(_, [ovs, io])| [(OVS, ovs), (IO, io)]);
        rates.row(rate, wanted.as_ref().map_or(&[], |wanted| wanted));
        cycles.rows.push(cost);
    }
    report.tables.extend([rates, cycles]);
    Ok(())
}

/// Every measurement has a fresh pair: where its rings and buffers lie decides up to a quarter of the rate, and stays as it is
/// for as long as the pair lives.
fn one_size(plan: &Plan, packed: bool, frame: u32) -> Result<(Row, Row)> {
    let needs = Needs { frame, macs: Some(MACS), addresses: None };
    compare(plan, format!("{frame} B"), &needs, |switch| {
        let mut client = circulate(switch, frame, packed)?;
        switch.metered(|| Ok(client.measure(plan.window())?.packets_per_second / 1e6))
    })
}
