//! The switch itself: the daemon with a configuration of the test's, and its command line.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::lab::{Lab, wait_for};
use crate::process::{Process, command, output};

/// How long the daemon may take to start, and a port to change its state.
const LIMIT: Duration = Duration::from_secs(30);

/// Where the programs under test are: beside this one, or one folder up (test programs are built into `deps`).
pub fn programs() -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    own.ancestors()
        .skip(1)
        .take(2)
        .find(|dir| dir.join("yardd").exists())
        .map(Path::to_path_buf)
        .with_context(|| format!("no yardd beside {}; run: cargo build --package host", own.display()))
}

/// One port of a daemon's report.
pub fn find_port(report: &Value, switch: &str, port: &str) -> Result<Value> {
    let find = |list: &Value, name: &str| list.as_array()?.iter().find(|one| one["name"] == name).cloned();
    find(&report["switches"], switch)
        .and_then(|switch| find(&switch["ports"], port))
        .with_context(|| format!("no port {switch}/{port} in {report}"))
}

/// The configuration of a private switch `lab` with vhost-user ports of so many queue pairs, each at a socket of its name.
pub fn private_switch(lab: &Lab, ports: &[&str], queues: u16) -> String {
    let mut config = "[switch.lab]\ntype = \"private\"\n".to_owned();
    for name in ports {
        let path = lab.path(name);
        let attachment = format!("vhost-user = {{ path = {path:?}, queues = {queues} }}");
        config.push_str(&format!("[switch.lab.port.{name}]\n{attachment}\n"));
    }
    config
}

/// A running daemon; killed when dropped.
#[derive(Debug)]
pub struct Yardd {
    process: Process,
    programs: PathBuf,
    socket: PathBuf,
    config: PathBuf,
    log: PathBuf,
}

impl Yardd {
    /// Starts the daemon of folder `programs` with `[api]` and `[workers]` written for it in front of `config`, and waits
    /// until it answers.
    pub fn start(lab: &Lab, programs: &Path, cpus: &[usize], config: &str) -> Result<Self> {
        let socket = lab.path("yardd.sock");
        let file = lab.path("switchyard.toml");
        let head = format!("[workers]\ncpus = {cpus:?}\n[api]\nsocket = {socket:?}\n");
        std::fs::write(&file, format!("{head}{config}"))?;
        Self::run(programs.to_path_buf(), socket, file, lab.path("yardd.log"))
    }

    fn run(programs: PathBuf, socket: PathBuf, config: PathBuf, log: PathBuf) -> Result<Self> {
        let mut daemon = command(programs.join("yardd"));
        daemon.arg("--config").arg(&config);
        let process = Process::spawn("yardd", daemon, &log)?;
        let mut yardd = Self { process, programs, socket, config, log };
        yardd.wait_ready()?;
        Ok(yardd)
    }

    fn wait_ready(&mut self) -> Result<()> {
        let start = std::time::Instant::now();
        while self.yard(&["--json", "show"]).is_err() {
            self.process.expect_running()?;
            ensure!(start.elapsed() < LIMIT, "yardd does not answer\n{}", self.process.log_tail(20));
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Kills the daemon as a crash would, and starts it again with the same configuration.
    pub fn crash_and_restart(mut self) -> Result<Self> {
        self.process.kill()?;
        let Self { programs, socket, config, log, .. } = self;
        Self::run(programs, socket, config, log)
    }

    /// The daemon.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Runs `yard` with these words; what it prints.
    pub fn yard(&self, words: &[&str]) -> Result<String> {
        output(command(self.programs.join("yard")).arg("--socket").arg(&self.socket).args(words))
    }

    /// A `yard` that was not run yet, for tests that keep one in the background.
    pub fn yard_command(&self, words: &[&str]) -> std::process::Command {
        let mut yard = command(self.programs.join("yard"));
        yard.arg("--socket").arg(&self.socket).args(words);
        yard
    }

    /// Everything that `yard show` knows.
    pub fn report(&self) -> Result<Value> {
        let text = self.yard(&["--json", "show"])?;
        serde_json::from_str(&text).with_context(|| format!("not JSON: {text}"))
    }

    /// One port of the report.
    pub fn port(&self, switch: &str, port: &str) -> Result<Value> {
        find_port(&self.report()?, switch, port)
    }

    /// Waits until a port is in `state` (`up`, `waiting`, `faulted`, `finished`).
    pub fn wait_for_port(&self, switch: &str, port: &str, state: &str) -> Result<()> {
        let reached = wait_for(&format!("{switch}/{port} to be {state}"), LIMIT, || {
            Ok(self.port(switch, port)?["state"] == state)
        });
        match reached {
            Ok(()) => Ok(()),
            Err(error) => bail!("{error:#}: {}", self.port(switch, port)?),
        }
    }

    /// Frames that a port dropped on their way to it, by reason.
    pub fn drops(&self, switch: &str, port: &str, direction: &str) -> Result<Value> {
        Ok(self.port(switch, port)?[direction]["drops"].clone())
    }
}
