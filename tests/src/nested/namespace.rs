//! Network namespaces of the nested host: stations apart from its own network.

use std::time::Duration;

use anyhow::Result;

use super::host::Host;
use crate::station::{Job, Output, Station};

const SHORT: Duration = Duration::from_secs(30);

/// A namespace, deleted when dropped.
#[derive(Debug)]
pub struct Namespace {
    host: Host,
    name: String,
}

impl Namespace {
    /// A fresh one with its loopback up.
    pub fn new(host: &Host, name: &str) -> Result<Self> {
        host.check(&format!("ip netns add {name} && ip -n {name} link set lo up"), SHORT)?;
        Ok(Self { host: host.clone(), name: name.to_owned() })
    }

    /// Moves a device of the host in, gives it an address ("10.0.0.1/24"), and brings it up.
    pub fn plug(&self, device: &str, address: &str) -> Result<()> {
        let name = &self.name;
        let line = format!(
            "ip link set {device} netns {name} && ip -n {name} addr add {address} dev {device} && \
             ip -n {name} link set {device} up"
        );
        self.host.check(&line, SHORT).map(drop)
    }

    fn inside(&self, line: &str) -> String {
        format!("exec ip netns exec {} dash -c '{}'", self.name, line.replace('\'', r"'\''"))
    }
}

impl Station for Namespace {
    fn name(&self) -> &str {
        &self.name
    }

    fn run(&self, line: &str, limit: Duration) -> Result<Output> {
        self.host.run(&self.inside(line), limit)
    }

    fn spawn(&self, line: &str) -> Result<Box<dyn Job>> {
        self.host.spawn(&self.inside(line))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // The host may be gone.
        let _ = self.host.run(&format!("ip netns del {}", self.name), SHORT);
    }
}
