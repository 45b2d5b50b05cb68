//! Vhost-user switches that are compared: ours, OVS-DPDK with a learning bridge, and testpmd, which only copies.
//!
//! All poll on the same processor, and have two ports that listen on sockets.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::Value;
use switchyard_tests::lab::Lab;
use switchyard_tests::ovs::{Ovs, OvsSpec};
use switchyard_tests::process::Process;
use switchyard_tests::testpmd::Testpmd;
use switchyard_tests::yardd::Yardd;

use super::machine;
use super::plan::{Figure, Peer, Plan};
use super::table::Row;

/// The processor of clients and of everybody's control plane.
pub const CLIENT_CPU: usize = 0;

/// The processor that switches frames.
pub const SWITCH_CPU: usize = 1;

/// Name of our switch in its configuration.
pub const SWITCH: &str = "bench";

/// Which switch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Ours.
    Yardd,
    /// OVS-DPDK, NORMAL action.
    Ovs,
    /// testpmd `io` between two vhost ports: no look at the frame at all.
    Io,
}

/// What the switch must let through.
#[derive(Debug, Clone, Default)]
pub struct Needs {
    /// Bytes of the longest frame, without check sequence.
    pub frame: u32,
    /// Addresses of the guests behind the two ports: the only ones they may send from, where the switch checks.
    pub macs: Option<[&'static str; 2]>,
    /// Addresses the table must hold, if more than it usually does.
    pub addresses: Option<u32>,
}

impl Needs {
    /// MTU of a port; 1518-byte frames carry no tag here, so it is a little above 1500.
    fn mtu(&self) -> u32 {
        self.frame.max(1518)
    }

    fn config(&self, sockets: &[PathBuf; 2]) -> String {
        let mut config = format!("[switch.{SWITCH}]\ntype = \"private\"\n");
        if let Some(addresses) = self.addresses {
            config.push_str(&format!("addresses = {addresses}\n"));
        }
        for (index, (name, socket)) in ["a", "b"].iter().zip(sockets).enumerate() {
            let mtu = self.mtu();
            config.push_str(&format!(
                "[switch.{SWITCH}.port.{name}]\nvhost-user = {{ path = {socket:?}, mode = \"server\" }}\nmtu = {mtu}\n"
            ));
            if let Some(mac) = self.macs.and_then(|macs| macs.get(index).copied()) {
                config.push_str(&format!("mac = {mac:?}\n"));
            }
        }
        config
    }
}

#[derive(Debug)]
enum Program {
    Yardd(Yardd),
    Ovs(Ovs),
    Io(Testpmd),
}

/// A running switch with two ports.
#[derive(Debug)]
pub struct Switch {
    // Dropped before its directory.
    program: Program,
    sockets: [PathBuf; 2],
    lab: Lab,
}

impl Switch {
    /// Starts one; it is left running.
    pub fn start(plan: &Plan, kind: Kind, needs: &Needs) -> Result<Self> {
        let lab = Lab::shared()?;
        let mut sockets = [lab.path("a.sock"), lab.path("b.sock")];
        let program = match kind {
            Kind::Yardd => {
                let config = needs.config(&sockets);
                Program::Yardd(Yardd::start(&lab, &plan.programs, &[SWITCH_CPU], &config)?)
            }
            Kind::Ovs => {
                let poll_cpus = vec![SWITCH_CPU];
                let spec = OvsSpec { poll_cpus, main_cpus: vec![CLIENT_CPU], settings: Vec::new() };
                let ovs = Ovs::start(&lab, &spec)?;
                sockets = [ovs.vhost_server("a", needs.mtu())?, ovs.vhost_server("b", needs.mtu())?];
                Program::Ovs(ovs)
            }
            Kind::Io => {
                let [a, b] = &sockets;
                Program::Io(Testpmd::vhost_io(&lab, [a, b], SWITCH_CPU, needs.frame)?)
            }
        };
        Ok(Self { program, sockets, lab })
    }

    /// Where clients connect.
    pub fn sockets(&self) -> [&Path; 2] {
        let [a, b] = &self.sockets;
        [a, b]
    }

    /// The directory of this switch and its clients.
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// The rate that `measure` finds, and the cycles that our switch spends on a frame meanwhile; another does not tell.
    pub fn metered(&self, measure: impl FnOnce() -> Result<f64>) -> Result<(f64, Option<f64>)> {
        let before = self.work()?;
        let rate = measure()?;
        Ok((rate, self.work()?.zip(before).map(|(after, before)| after.cycles_since(&before))))
    }

    /// Processor time that our switch has spent on frames so far; `None` for another switch.
    fn work(&self) -> Result<Option<Work>> {
        match &self.program {
            Program::Yardd(yardd) => Ok(Some(Work::of(yardd)?)),
            Program::Ovs(_) | Program::Io(_) => Ok(None),
        }
    }

    fn process(&mut self) -> &mut Process {
        match &mut self.program {
            Program::Yardd(yardd) => yardd.process(),
            Program::Ovs(ovs) => ovs.process(),
            Program::Io(testpmd) => testpmd.process(),
        }
    }
}

impl Peer for Switch {
    fn name(&self) -> &'static str {
        match self.program {
            Program::Yardd(_) => "yardd",
            Program::Ovs(_) => "OVS-DPDK",
            Program::Io(_) => "testpmd io",
        }
    }

    fn freeze(&mut self) -> Result<()> {
        self.process().freeze()
    }

    fn thaw(&mut self) -> Result<()> {
        self.process().thaw()
    }
}

/// What our switch has done: frames taken in, and time spent on bursts that were not empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Work {
    frames: u64,
    busy_nanos: u64,
}

impl Work {
    /// Of all ports of all switches.
    pub fn of(yardd: &Yardd) -> Result<Self> {
        Self::read(&yardd.report()?).context("no counters in the report of yardd")
    }

    fn read(report: &Value) -> Option<Self> {
        let mut work = Self { frames: 0, busy_nanos: 0 };
        for switch in report["switches"].as_array()? {
            for port in switch["ports"].as_array()? {
                work.frames += port["received"]["frames"].as_u64()?;
                work.busy_nanos += port["received"]["busy_nanos"].as_u64()?;
            }
        }
        Some(work)
    }

    /// Cycles of the time stamp counter for each frame since `before`.
    pub fn cycles_since(&self, before: &Self) -> f64 {
        let frames = self.frames.saturating_sub(before.frames) as f64;
        let nanos = self.busy_nanos.saturating_sub(before.busy_nanos) as f64;
        nanos / frames * machine::gigahertz()
    }
}

/// Measures the three switches in turns: rows of rates in Mpps, and of our cycles a packet. Each finds its clients anew, in
/// `measure`.
pub fn compare(
    plan: &Plan,
    what: String,
    needs: &Needs,
    mut measure: impl FnMut(&Switch) -> Result<(f64, Option<f64>)>,
) -> Result<(Row, Row)> {
    plan.say(format_args!("{what}: starting three switches"));
    let mut switches = Vec::new();
    for kind in [Kind::Yardd, Kind::Ovs, Kind::Io] {
        let mut switch = Switch::start(plan, kind, needs)?;
        switch.freeze()?;
        switches.push(switch);
    }
    let mut costs = Vec::new();
    let rates = plan.interleave(&Figure::new(what.clone(), "Mpps"), &mut switches, |switch| {
        let (rate, cost) = measure(switch)?;
        costs.extend(cost);
        Ok(rate)
    })?;
    // The warm-up's.
    costs.remove(0);
    Ok((rates, Row::alone(what, "cycles", "yardd", costs)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mac_check_is_on_where_addresses_are_known() {
        let macs = Some(["02:00:00:00:00:0a", "02:00:00:00:00:0b"]);
        let needs = Needs { frame: 9000, macs, addresses: None };
        let config = needs.config(&["/a".into(), "/b".into()]);
        assert!(
            config.contains("mtu = 9000\nmac = \"02:00:00:00:00:0a\"\n[switch.bench.port.b]"),
            "{config}"
        );
        assert!(
            !Needs { frame: 64, macs: None, addresses: None }
                .config(&["/a".into(), "/b".into()])
                .contains("mac")
        );
    }

    #[test]
    fn work_adds_all_ports() {
        let port =
            |frames, nanos| serde_json::json!({ "received": { "frames": frames, "busy_nanos": nanos } });
        let report = serde_json::json!({ "switches": [{ "ports": [port(1, 10), port(2, 20)] }] });
        assert_eq!(Work::read(&report), Some(Work { frames: 3, busy_nanos: 30 }));
        assert_eq!(Work::read(&serde_json::json!({})), None);
    }
}
