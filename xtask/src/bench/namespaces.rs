//! Two network namespaces joined by a switch: ours over TAP, OVS in user space over TAP, or the kernel's bridge over veth.

use anyhow::Result;
use switchyard_tests::bridge::LinuxBridge;
use switchyard_tests::lab::{Lab, serial};
use switchyard_tests::netns::Netns;
use switchyard_tests::ovs::{Ovs, OvsSpec};
use switchyard_tests::process::Process;
use switchyard_tests::yardd::Yardd;

use super::peers::{SWITCH, SWITCH_CPU};
use super::plan::{Peer, Plan};

const MTU: u32 = 1500;

/// The right one's address.
pub const RIGHT: &str = "10.9.0.2";

/// What joins them.
#[derive(Debug, Clone, Copy)]
pub enum Kind {
    /// Ours, as it is configured by default.
    Yardd,
    /// Ours, whose worker polls a second before it sleeps.
    YarddAwake,
    /// OVS's user-space datapath; its main thread serves TAP devices.
    Ovs,
    /// The kernel.
    Bridge,
}

#[derive(Debug)]
enum Program {
    Yardd(Yardd),
    Ovs(Ovs),
    Bridge(LinuxBridge),
}

/// A switch and two namespaces that reach each other through it.
#[derive(Debug)]
pub struct Joined {
    name: &'static str,
    /// Has 10.9.0.1.
    pub left: Netns,
    /// Has [`RIGHT`].
    pub right: Netns,
    program: Program,
    _lab: Lab,
}

impl Joined {
    /// Sets all up, and freezes it.
    pub fn start(plan: &Plan, kind: Kind) -> Result<Self> {
        let lab = Lab::shared()?;
        let left = Netns::new(&lab, "left")?.without_ipv6()?;
        let right = Netns::new(&lab, "right")?.without_ipv6()?;
        let unique = format!("yt{}-{}", std::process::id() % 100_000, serial());
        let taps = [format!("{unique}a"), format!("{unique}b")];
        let (name, program) = match kind {
            Kind::Yardd => ("yardd", Program::Yardd(yardd(plan, &lab, &config(&taps))?)),
            Kind::YarddAwake => ("yardd, polling", Program::Yardd(yardd_awake(plan, &lab, &config(&taps))?)),
            Kind::Ovs => ("OVS userspace", Program::Ovs(ovs(&lab, &taps)?)),
            Kind::Bridge => ("Linux bridge", Program::Bridge(LinuxBridge::new(&lab)?)),
        };
        let ends = [(&left, "10.9.0.1/24"), (&right, "10.9.0.2/24")];
        for ((namespace, address), tap) in ends.into_iter().zip(&taps) {
            match &program {
                Program::Bridge(bridge) => bridge.connect(namespace, address, MTU)?,
                Program::Yardd(_) | Program::Ovs(_) => namespace.plug(tap, address, Some(MTU))?,
            }
        }
        let mut joined = Self { name, left, right, program, _lab: lab };
        joined.freeze()?;
        Ok(joined)
    }

    /// The kernel has no process of its own for this.
    fn process(&mut self) -> Option<&mut Process> {
        match &mut self.program {
            Program::Yardd(yardd) => Some(yardd.process()),
            Program::Ovs(ovs) => Some(ovs.process()),
            Program::Bridge(_) => None,
        }
    }
}

impl Peer for Joined {
    fn name(&self) -> &'static str {
        self.name
    }

    fn freeze(&mut self) -> Result<()> {
        self.process().map_or(Ok(()), |process| process.freeze())
    }

    fn thaw(&mut self) -> Result<()> {
        self.process().map_or(Ok(()), |process| process.thaw())
    }
}

fn config(taps: &[String; 2]) -> String {
    let mut config = format!("[switch.{SWITCH}]\ntype = \"private\"\n");
    for (port, tap) in ["a", "b"].iter().zip(taps) {
        config.push_str(&format!("[switch.{SWITCH}.port.{port}]\ntap = {{ name = {tap:?} }}\nmtu = {MTU}\n"));
    }
    config
}

fn yardd(plan: &Plan, lab: &Lab, config: &str) -> Result<Yardd> {
    Yardd::start(lab, &plan.programs, &[SWITCH_CPU], config)
}

/// The lab writes the table `[workers]` itself: the daemon starts without ports, and again with the changed file.
fn yardd_awake(plan: &Plan, lab: &Lab, config: &str) -> Result<Yardd> {
    let yardd = yardd(plan, lab, "")?;
    let file = lab.path("switchyard.toml");
    let head = std::fs::read_to_string(&file)?.replacen("[workers]\n", "[workers]\nidle = 1000000\n", 1);
    std::fs::write(&file, format!("{head}{config}"))?;
    yardd.crash_and_restart()
}

fn ovs(lab: &Lab, taps: &[String; 2]) -> Result<Ovs> {
    let spec = OvsSpec { poll_cpus: Vec::new(), main_cpus: vec![SWITCH_CPU], settings: Vec::new() };
    let ovs = Ovs::start(lab, &spec)?;
    taps.iter().try_for_each(|tap| ovs.tap(tap, MTU))?;
    Ok(ovs)
}
