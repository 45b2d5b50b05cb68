//! Network namespaces: stations on this host that see only the devices given to them.

use std::fs::File;
use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use rustix::net::sockopt::set_socket_recv_buffer_size_force;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::janitor;
use crate::lab::{Lab, serial};
use crate::process::{Process, command, output, words};
use crate::station::{Job, Output, Station};

/// A named namespace, deleted when dropped.
#[derive(Debug)]
pub struct Netns {
    name: String,
    dir: PathBuf,
}

impl Netns {
    /// A fresh namespace with its loopback up. Its name contains `hint` and is unique on this host.
    pub fn new(lab: &Lab, hint: &str) -> Result<Self> {
        let name = format!("yard-{hint}-{}-{}", std::process::id(), serial());
        words(&format!("ip netns add {name}"))?;
        let namespace = Self { name, dir: lab.dir().to_path_buf() };
        let name = &namespace.name;
        janitor::at_exit(&format!("ip netns pids {name} | xargs -r kill -9; ip netns del {name}"))?;
        namespace.ip("link set lo up")?;
        // Without duplicate address detection an IPv6 address is usable at once.
        namespace.sysctl("net.ipv6.conf.default.accept_dad", "0")?;
        Ok(namespace)
    }

    /// Its name, as `ip netns list` shows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A command that runs inside and dies with this program.
    pub fn command(&self, program: &str) -> Command {
        let mut inside = command("ip");
        inside.args(["netns", "exec", &self.name, program]);
        inside
    }

    /// Runs `ip` inside, with words separated by blanks: `ip("addr show dev eth0")`.
    pub fn ip(&self, arguments: &str) -> Result<String> {
        words(&format!("ip -n {} {arguments}", self.name))
    }

    /// Sets a kernel parameter inside.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        output(self.command("sysctl").args(["-q", "-w", &format!("{key}={value}")])).map(drop)
    }

    /// Silences IPv6 (neighbour discovery, router solicitation), so that only what a test sends is on the wire.
    /// Call it before a device moves in.
    pub fn without_ipv6(self) -> Result<Self> {
        self.sysctl("net.ipv6.conf.default.disable_ipv6", "1")?;
        self.sysctl("net.ipv6.conf.all.disable_ipv6", "1")?;
        Ok(self)
    }

    /// Moves a device of the host in.
    pub fn take(&self, device: &str) -> Result<()> {
        words(&format!("ip link set dev {device} netns {}", self.name)).map(drop)
    }

    /// Moves a device of the host in, gives it an address ("10.0.0.1/24") and an MTU, and brings it up.
    pub fn plug(&self, device: &str, address: &str, mtu: Option<u32>) -> Result<()> {
        self.take(device)?;
        if let Some(mtu) = mtu {
            self.ip(&format!("link set dev {device} mtu {mtu}"))?;
        }
        self.ip(&format!("addr add {address} dev {device}"))?;
        self.ip(&format!("link set dev {device} up"))?;
        Ok(())
    }

    /// A UDP socket inside, with room for thousands of datagrams that were not read yet.
    pub fn udp(&self, port: u16) -> Result<UdpSocket> {
        let open = || -> Result<UdpSocket> {
            let namespace = File::open(format!("/run/netns/{}", self.name))?;
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
            let socket = UdpSocket::bind(("0.0.0.0", port))?;
            set_socket_recv_buffer_size_force(&socket, 8 << 20)?;
            Ok(socket)
        };
        // On a thread of its own, which stays in there until it ends.
        std::thread::scope(|scope| scope.spawn(open).join())
            .map_err(|_| anyhow!("the thread panicked"))?
            .with_context(|| format!("no socket in {}", self.name))
    }

    /// The device's MAC address.
    pub fn mac(&self, device: &str) -> Result<String> {
        let shown = self.ip(&format!("-j link show dev {device}"))?;
        let json: serde_json::Value = serde_json::from_str(&shown)?;
        json[0]["address"].as_str().map(str::to_owned).context("the device has no MAC address")
    }
}

impl Station for Netns {
    fn name(&self) -> &str {
        &self.name
    }

    fn run(&self, line: &str, limit: Duration) -> Result<Output> {
        let mut job = self.start(line)?;
        match job.wait_status(limit) {
            Ok(output) => Ok(output),
            Err(_) => {
                job.kill()?;
                Ok(Output { status: 137, stdout: job.process.log() })
            }
        }
    }

    fn spawn(&self, line: &str) -> Result<Box<dyn Job>> {
        Ok(Box::new(self.start(line)?))
    }
}

impl Netns {
    fn start(&self, line: &str) -> Result<NetnsJob> {
        // A session of its own, so that all that the line starts can be killed together.
        let mut shell = self.command("setsid");
        shell.args(["sh", "-c", line]);
        let log = self.dir.join(format!("job-{}.log", serial()));
        let mut process = Process::spawn(&format!("{}: {line}", self.name), shell, log)?;
        process.close_stdin();
        Ok(NetnsJob { process })
    }
}

#[derive(Debug)]
struct NetnsJob {
    process: Process,
}

impl NetnsJob {
    fn wait_status(&mut self, limit: Duration) -> Result<Output> {
        use std::os::unix::process::ExitStatusExt;
        let status = self.process.wait(limit)?;
        let status = status.code().or(status.signal().map(|signal| 128 + signal)).unwrap_or(-1);
        Ok(Output { status, stdout: self.process.log() })
    }
}

impl Job for NetnsJob {
    fn wait(&mut self, limit: Duration) -> Result<Output> {
        self.wait_status(limit)
    }

    fn output(&mut self) -> Result<String> {
        Ok(self.process.log())
    }

    fn kill(&mut self) -> Result<()> {
        if self.process.is_running() {
            // The whole session: the shell and what it started.
            let group = i32::try_from(self.process.id()).ok().and_then(rustix::process::Pid::from_raw);
            if let Some(group) = group {
                let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
            }
        }
        self.process.kill()
    }
}

impl Drop for NetnsJob {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        // Fails only if somebody deleted it first.
        let _ = words(&format!("ip netns del {}", self.name));
    }
}
