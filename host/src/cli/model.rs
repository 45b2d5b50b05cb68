//! What the daemon reports, as far as tables show it. Fields that a newer daemon adds are ignored.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;

#[derive(Debug, Clone, Default, Deserialize)]
pub struct Report {
    pub switches: Vec<Switch>,
    pub workers: Vec<Worker>,
    #[serde(default)]
    pub vms: Vec<Vm>,
    #[serde(default)]
    pub warnings: Vec<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
pub struct Switch {
    pub name: String,
    pub kind: String,
    pub addresses: u64,
    pub capacity: u64,
    pub ports: Vec<Port>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Port {
    pub name: String,
    pub kind: String,
    pub attached: String,
    pub state: String,
    pub reason: String,
    pub last_error: Option<String>,
    pub mtu: u32,
    pub mac: Option<String>,
    pub vlan: String,
    pub features: Vec<String>,
    pub received: Counters,
    pub sent: Counters,
    pub queues: Vec<Queue>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Queue {
    pub queue: u16,
    pub cpu: Option<usize>,
    pub pinned: bool,
    pub enabled: bool,
    pub load_permille: u32,
    pub received: Counters,
    pub sent: Counters,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Counters {
    pub frames: u64,
    pub bytes: u64,
    pub bursts: u64,
    pub calls: u64,
    pub drops: BTreeMap<String, u64>,
}

impl Counters {
    pub fn dropped(&self) -> u64 {
        self.drops.values().sum()
    }
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Worker {
    pub cpu: usize,
    pub state: String,
    pub queues: usize,
    pub load_permille: u32,
    pub sleeps: u64,
}

#[derive(Debug, Clone, Default, Deserialize)]
pub struct Addresses {
    pub total: usize,
    pub addresses: Vec<Address>,
}

#[derive(Debug, Clone, Default, Deserialize)]
pub struct Address {
    pub mac: String,
    pub vlan: u16,
    pub port: String,
    pub age: u32,
    pub fixed: bool,
}

#[derive(Debug, Clone, Default, Deserialize)]
pub struct Version {
    pub version: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
pub struct Flushed {
    pub flushed: usize,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Vm {
    pub name: String,
    pub state: String,
    pub reason: Option<String>,
    pub warnings: Vec<String>,
    pub vcpus: u32,
    pub memory: VmMemory,
    pub cpu: VmCpu,
    pub kernel: String,
    pub initrd: Option<String>,
    pub cmdline: String,
    pub restart: String,
    pub restarts: u32,
    pub changed: bool,
    pub uptime: Option<f64>,
    pub pid: Option<u32>,
    pub user: Option<u32>,
    pub vmbus: Option<String>,
    pub nics: Vec<NicStatus>,
    pub guest: Guest,
    pub faults: Vec<VmFault>,
    pub panic: Option<Panic>,
    pub exits: Vec<Exit>,
    pub directory: String,
    pub console: PathBuf,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct VmMemory {
    pub startup: u64,
    pub minimum: u64,
    pub maximum: u64,
    pub huge: bool,
    pub assigned: Option<u64>,
    pub dynamic: Option<DynamicMemory>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct DynamicMemory {
    pub committed: u64,
    pub available: u64,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct VmCpu {
    pub reserve: u32,
    pub limit: u32,
    pub weight: u32,
    pub pin: Vec<usize>,
    pub baseline: Option<String>,
    pub allowed: Vec<usize>,
    pub cgroup: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct NicStatus {
    pub name: String,
    pub kind: String,
    pub switch: String,
    pub port: String,
    pub mac: String,
    pub mtu: u32,
    pub queues: u16,
    pub link: String,
    pub channels: u16,
    pub connected: bool,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Guest {
    pub heartbeat: String,
    pub os: Option<String>,
    pub version: Option<String>,
    pub hostname: Option<String>,
    pub addresses: Vec<String>,
    pub values: Vec<(String, String)>,
    pub services: Vec<(String, String)>,
    pub frozen: bool,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct VmFault {
    pub device: String,
    pub reason: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Panic {
    pub parameters: Vec<u64>,
    pub log: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Exit {
    pub kind: String,
    pub count: u64,
}

/// The words for a drop reason; a newer daemon's reason is shown by its name.
pub fn reason_text(reason: &str) -> String {
    let known: Result<vswitch::DropReason, _> = serde_json::from_value(reason.into());
    known.map_or_else(|_| reason.to_owned(), |reason| reason.text().to_owned())
}
