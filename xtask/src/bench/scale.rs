//! Many of everything: silent ports, addresses, learning.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::Value;
use switchyard_tests::lab::{Lab, wait_for};
use switchyard_tests::process::{command_on, output};
use switchyard_tests::yardd::Yardd;

use super::generator::{Load, generate};
use super::goal::Goal;
use super::peers::{Kind, Needs, SWITCH, SWITCH_CPU, Switch};
use super::plan::{Figure, Peer, Plan};
use super::silent::Silent;
use super::table::{Report, Row, Table, median};

const PORTS: u32 = 384;
const ADDRESSES: u32 = 1 << 20;

/// How long the silent daemon is watched in one sample: processor time is counted in ticks of 10 ms.
const WATCH: Duration = Duration::from_secs(5);

/// All of it.
pub fn run(plan: &Plan, report: &mut Report) -> Result<()> {
    report.tables.push(silent_ports(plan)?);
    report.tables.push(forwarding(plan)?);
    report.tables.push(learning(plan)?);
    Ok(())
}

fn silent_ports(plan: &Plan) -> Result<Table> {
    plan.say(format_args!("{PORTS} vhost-user ports, each with a silent guest"));
    let lab = Lab::shared()?;
    let sockets: Vec<_> = (0..PORTS).map(|port| lab.path(&format!("{port}.sock"))).collect();
    let mut config = format!("[switch.{SWITCH}]\ntype = \"private\"\n");
    for (port, socket) in sockets.iter().enumerate() {
        config.push_str(&format!("[switch.{SWITCH}.port.p{port}]\nvhost-user = {{ path = {socket:?} }}\n"));
    }
    let mut yardd = Yardd::start(&lab, &plan.programs, &[SWITCH_CPU], &config)?;
    let empty = yardd.process().resident_kib()? as f64;
    let _guests = sockets.iter().map(|socket| Silent::connect(socket)).collect::<Result<Vec<_>>>()?;
    wait_for("all ports to be up", Duration::from_secs(30), || {
        Ok(ports_up(&yardd.report()?) == sockets.len())
    })?;
    std::thread::sleep(Duration::from_secs(1));

    let mut percent = Vec::new();
    for _ in 0..plan.runs() {
        let before = (Instant::now(), yardd.process().cpu_time()?);
        std::thread::sleep(WATCH);
        let spent = yardd.process().cpu_time()?.saturating_sub(before.1);
        percent.push(100.0 * spent.as_secs_f64() / before.0.elapsed().as_secs_f64());
    }
    let full = yardd.process().resident_kib()? as f64;
    let ports = f64::from(PORTS);
    let mut table = Table::new(format!("{PORTS} vhost-user ports, connected and silent"));
    table.goal(&Goal::at_most("processor time, % of one CPU", median(&percent), 1.0));
    table.goal(&Goal::at_most("resident memory, KiB a port", full / ports, 1024.0));
    table.rows = vec![
        Row::alone("processor time of the daemon", "% of one CPU", "yardd", percent),
        Row::alone("resident memory, whole daemon over ports", "KiB a port", "yardd", vec![full / ports]),
        Row::alone("of which came with the guests", "KiB a port", "yardd", vec![(full - empty) / ports]),
    ];
    Ok(table)
}

fn ports_up(report: &Value) -> usize {
    let switches = report["switches"].as_array().into_iter().flatten();
    let ports = switches.filter_map(|switch| switch["ports"].as_array()).flatten();
    ports.filter(|port| port["state"] == "up").count()
}

/// One load of the generator, all of them at the same switch.
struct Among(&'static str, u32);

impl Peer for Among {
    fn name(&self) -> &'static str {
        self.0
    }

    fn freeze(&mut self) -> Result<()> {
        Ok(())
    }

    fn thaw(&mut self) -> Result<()> {
        Ok(())
    }
}

fn forwarding(plan: &Plan) -> Result<Table> {
    plan.say("forwarding among few and many addresses");
    let needs = Needs { frame: 64, macs: None, addresses: Some(ADDRESSES) };
    let switch = Switch::start(plan, Kind::Yardd, &needs)?;
    let mut loads =
        [Among("1 M addresses", ADDRESSES / 2), Among("2048 addresses", 1024), Among("2 addresses", 1)];
    let row =
        plan.interleave(&Figure::new("64 B, generator", "Mpps"), &mut loads, |Among(_, addresses)| {
            generate(plan, switch.sockets(), Load { frame: 64, addresses: *addresses, packed: false })
        })?;
    let mut table = Table::new("forwarding by number of addresses, one yardd");
    table.row(row, &[(2, 0.85)]);
    Ok(table)
}

fn learning(plan: &Plan) -> Result<Table> {
    plan.say("learning 1 M addresses");
    let mut samples = Vec::new();
    for round in 0..=plan.runs() {
        let mut learner = command_on(&[SWITCH_CPU], plan.programs.join("yard-learner"));
        let text = output(learner.args(["--addresses", &ADDRESSES.to_string()]))?;
        let json: Value = serde_json::from_str(&text).with_context(|| format!("not JSON: {text}"))?;
        let rate = json["per_second"].as_f64().context("the learner says no rate")?;
        if round > 0 {
            samples.push(rate / 1e6);
        }
    }
    let mut table = Table::new("learning, the pipeline by itself");
    table.goal(&Goal::at_least("learning, M addresses/s", median(&samples), 1.0));
    table.rows.push(Row::alone("64 B frames from 1 M fresh sources", "M addresses/s", "yardd", samples));
    Ok(table)
}
