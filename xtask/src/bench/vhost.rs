//! A testpmd pair that sends packets round through a vhost-user switch, at several frame sizes.
//!
//! testpmd is the client that others measure with; it spends about 164 cycles on a packet itself, so that it limits
//! small frames. The generator bench does not.

use anyhow::Result;
use switchyard_tests::testpmd::{Testpmd, TestpmdSpec};

use super::peers::{CLIENT_CPU, Kind, Needs, Switch};
use super::plan::{Figure, Peer, Plan};
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

/// A switch and the pair that loads it.
struct Loop {
    // Dropped before the switch: it closes its sockets in good order.
    client: Testpmd,
    switch: Switch,
}

impl Loop {
    /// Sets up both, lets packets circulate, and freezes all.
    fn start(plan: &Plan, kind: Kind, frame: u32, packed: bool) -> Result<Self> {
        let needs = Needs { frame, macs: Some(MACS), addresses: None };
        let switch = Switch::start(plan, kind, &needs)?;
        let [a, b] = switch.sockets();
        let mut spec = TestpmdSpec::pair(a, b);
        spec.cpu = CLIENT_CPU;
        spec.max_frame = frame.max(1518);
        spec.ports.iter_mut().for_each(|port| port.packed = packed);
        let client = Testpmd::start(switch.lab(), &spec)?;
        let mut all = Self { client, switch };
        all.client.start_loop(frame, BURSTS)?;
        all.freeze()?;
        Ok(all)
    }
}

impl Peer for Loop {
    fn name(&self) -> &'static str {
        self.switch.name()
    }

    fn freeze(&mut self) -> Result<()> {
        self.client.process().freeze()?;
        self.switch.freeze()
    }

    fn thaw(&mut self) -> Result<()> {
        self.switch.thaw()?;
        self.client.process().thaw()
    }
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

/// Everything is set up anew for each size, so that no packet of another size still circulates.
fn one_size(plan: &Plan, packed: bool, frame: u32) -> Result<(Row, Row)> {
    plan.say(format_args!("{frame} B: starting three switches with a testpmd pair each"));
    let kinds = [Kind::Yardd, Kind::Ovs, Kind::Io];
    let mut peers =
        kinds.into_iter().map(|kind| Loop::start(plan, kind, frame, packed)).collect::<Result<Vec<_>>>()?;
    let mut cycles = Vec::new();
    let figure = Figure::new(format!("{frame} B"), "Mpps");
    let rate = plan.interleave(&figure, &mut peers, |peer| {
        let before = peer.switch.work()?;
        let rate = peer.client.measure(plan.window())?;
        if let (Some(before), Some(after)) = (before, peer.switch.work()?) {
            cycles.push(after.cycles_since(&before));
        }
        Ok(rate.packets_per_second / 1e6)
    })?;
    // The warm-up's.
    cycles.remove(0);
    Ok((rate, Row::alone(format!("{frame} B"), "cycles", "yardd", cycles)))
}
