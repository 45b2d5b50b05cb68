//! A private Open vSwitch, the peer to compare with: its own database, sockets and daemons, nothing of the
//! system's. Every port is in one bridge with the NORMAL action (a learning switch).

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::lab::{Lab, serial};
use crate::process::{Process, command, command_on, output};

const DAEMON: &str = "/usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk";
const SCHEMA: &str = "/usr/share/openvswitch/vswitch.ovsschema";
const LIMIT: Duration = Duration::from_secs(30);
/// Huge pages of 2 MiB that it takes.
pub const HUGE_PAGES: usize = 512;

/// How to run it.
#[derive(Debug, Clone)]
pub struct OvsSpec {
    /// Processors that poll DPDK's ports; none: DPDK stays off, and only TAP ports work.
    pub poll_cpus: Vec<usize>,
    /// Processors for everything else, TAP ports among it.
    pub main_cpus: Vec<usize>,
    /// More `other_config` settings, such as "userspace-tso-enable=true".
    pub settings: Vec<String>,
}

/// A running Open vSwitch; killed when dropped.
#[derive(Debug)]
pub struct Ovs {
    // Dropped in this order: the switch before its database.
    switch: Process,
    _database: Process,
    dir: PathBuf,
}

impl Ovs {
    /// Starts it with an empty bridge.
    pub fn start(lab: &Lab, spec: &OvsSpec) -> Result<Self> {
        let dir = lab.path(&format!("ovs{}", serial()));
        std::fs::create_dir(&dir)?;
        let database_file = dir.join("conf.db");
        output(Command::new("ovsdb-tool").arg("create").arg(&database_file).arg(SCHEMA))?;

        let mut database = at_home(command("ovsdb-server"), &dir);
        database.arg(&database_file).arg(format!("--remote=punix:{}", dir.join("db").display()));
        database.arg(format!("--unixctl={}", dir.join("db.ctl").display()));
        let mut database = Process::spawn("ovsdb-server", database, dir.join("ovsdb-server.log"))?;
        database.wait_for_socket(&dir.join("db"), LIMIT)?;
        let vsctl = |arguments: &[&str]| vsctl(&dir, arguments);
        vsctl(&["--no-wait", "init"])?;
        for setting in other_config(spec) {
            vsctl(&["--no-wait", "set", "Open_vSwitch", ".", &format!("other_config:{setting}")])?;
        }

        let mut switch = at_home(command_on(&spec.main_cpus, DAEMON), &dir);
        switch.arg(format!("unix:{}", dir.join("db").display()));
        switch.arg(format!("--unixctl={}", dir.join("switch.ctl").display()));
        let mut switch = Process::spawn("ovs-vswitchd", switch, dir.join("ovs-vswitchd.log"))?;
        switch.wait_for_socket(&dir.join("switch.ctl"), LIMIT)?;
        vsctl(&["add-br", "br", "--", "set", "bridge", "br", "datapath_type=netdev"])
            .with_context(|| switch.log_tail(20))?;
        Ok(Self { switch, _database: database, dir })
    }

    /// Adds a vhost-user port that listens; the socket to connect to.
    pub fn vhost_server(&self, name: &str, mtu: u32) -> Result<PathBuf> {
        self.add(name, &["type=dpdkvhostuser", &format!("mtu_request={mtu}")])?;
        Ok(self.dir.join(name))
    }

    /// Adds a vhost-user port that connects to `socket`, again and again.
    pub fn vhost_client(&self, name: &str, socket: &Path, mtu: u32) -> Result<()> {
        let path = format!("options:vhost-server-path={}", socket.display());
        self.add(name, &["type=dpdkvhostuserclient", &path, &format!("mtu_request={mtu}")])
    }

    /// Adds a TAP device of this name (at most 15 characters) in the userspace datapath.
    pub fn tap(&self, name: &str, mtu: u32) -> Result<()> {
        self.add(name, &["type=tap", &format!("mtu_request={mtu}")])
    }

    /// The daemon.
    pub fn process(&mut self) -> &mut Process {
        &mut self.switch
    }

    /// Runs `ovs-appctl`, as in `appctl(&["dpif-netdev/pmd-stats-show"])`.
    pub fn appctl(&self, arguments: &[&str]) -> Result<String> {
        let mut command = at_home(Command::new("ovs-appctl"), &self.dir);
        output(command.arg("-t").arg(self.dir.join("switch.ctl")).args(arguments))
    }

    fn add(&self, name: &str, settings: &[&str]) -> Result<()> {
        let port = ["add-port", "br", name, "--", "set", "Interface", name];
        vsctl(&self.dir, &[&port, settings].concat())?;
        let error = vsctl(&self.dir, &["get", "Interface", name, "error"])?;
        anyhow::ensure!(error.trim() == "[]", "ovs port {name}: {error}");
        Ok(())
    }
}

fn other_config(spec: &OvsSpec) -> Vec<String> {
    let mut settings = spec.settings.clone();
    if !spec.poll_cpus.is_empty() {
        let mask = |cpus: &[usize]| cpus.iter().fold(0_u64, |mask, cpu| mask | 1 << cpu);
        settings.push("dpdk-init=true".to_owned());
        // Without a limit, the first port's buffers take all huge pages, and other programs starve. Without
        // pools per port, it tries one of 2.7 GB at a large MTU, and connections made meanwhile fail.
        settings.push("dpdk-socket-mem=1024".to_owned());
        settings.push("dpdk-socket-limit=1024".to_owned());
        settings.push("per-port-memory=true".to_owned());
        settings.push("dpdk-extra=--no-pci --in-memory --single-file-segments --no-telemetry".to_owned());
        settings.push(format!("dpdk-lcore-mask={:#x}", mask(&spec.main_cpus)));
        settings.push(format!("pmd-cpu-mask={:#x}", mask(&spec.poll_cpus)));
    }
    settings
}

fn vsctl(dir: &Path, arguments: &[&str]) -> Result<String> {
    let mut command = at_home(Command::new("ovs-vsctl"), dir);
    output(command.arg("--timeout=30").arg(format!("--db=unix:{}", dir.join("db").display())).args(arguments))
}

/// All of Open vSwitch's directories in one place, so that the system's are not touched.
fn at_home(mut command: Command, dir: &Path) -> Command {
    for variable in ["OVS_RUNDIR", "OVS_LOGDIR", "OVS_DBDIR", "OVS_SYSCONFDIR"] {
        command.env(variable, dir);
    }
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_polling_processors_dpdk_stays_off() {
        let mut spec = OvsSpec { poll_cpus: Vec::new(), main_cpus: vec![0], settings: Vec::new() };
        assert!(other_config(&spec).is_empty());
        spec.poll_cpus = vec![1, 3];
        assert!(other_config(&spec).contains(&"pmd-cpu-mask=0xa".to_owned()));
    }
}
