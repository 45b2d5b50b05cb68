//! What an operator is shown of a VM, as plain values.

use std::path::PathBuf;

use hypervisor::control::{
    Baseline, Heartbeat, Memory, MemoryStatus, NicKind, NicStatus, Panic, Services, Status,
};
use serde::Serialize;
use vswitch::spec::{PrivateVlan, VlanMode};

use super::spec::{LinkState, NicSpec, RestartPolicy, VmSpec, port_name};

/// Where a VM's life stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmState {
    /// No worker.
    Off,
    /// The worker is there, its guest does not run yet.
    Starting,
    /// The guest runs.
    Running,
    /// Its processors are stopped.
    Paused,
    /// The guest panicked or tripped over itself; memory is kept.
    Crashed,
    /// The worker was asked to end.
    Stopping,
    /// It ended unasked, and will be started again.
    Waiting,
    /// Its supervisor does not answer.
    Unknown,
}

impl VmState {
    /// In a word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Crashed => "crashed",
            Self::Stopping => "stopping",
            Self::Waiting => "waiting",
            Self::Unknown => "unknown",
        }
    }
}

/// A VM.
#[derive(Debug, Clone, Serialize)]
pub struct VmReport {
    /// Name.
    pub name: String,
    /// State.
    pub state: VmState,
    /// Why it is in that state, if that needs saying: how it ended, why it waits.
    pub reason: Option<String>,
    /// What of the host does not do for it: no control group, a switch that is gone, a worker that does not answer.
    pub warnings: Vec<String>,
    /// Virtual processors.
    pub vcpus: u32,
    /// Memory, in bytes.
    pub memory: MemoryReport,
    /// Share of the host's processors.
    pub cpu: CpuReport,
    /// A bzImage.
    pub kernel: PathBuf,
    /// The initial RAM file system.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: String,
    /// Integration services offered.
    pub services: Services,
    /// What happens when it ends unasked.
    pub restart: RestartPolicy,
    /// Started with the daemon.
    pub autostart: bool,
    /// Times it was started again by its restart policy.
    pub restarts: u32,
    /// The definition has changed since it was started: the next start takes it.
    pub changed: bool,
    /// Seconds since the guest started.
    pub uptime: Option<f64>,
    /// Process of the worker.
    pub pid: Option<u32>,
    /// User and group of the worker, if it has its own.
    pub user: Option<u32>,
    /// VMBus version agreed on.
    pub vmbus: Option<String>,
    /// Adapters.
    pub nics: Vec<NicReport>,
    /// What the guest says of itself.
    pub guest: GuestReport,
    /// What was stopped for what the guest did.
    pub faults: Vec<FaultReport>,
    /// The last panic of the guest's kernel.
    pub panic: Option<Panic>,
    /// Exits to user space by kind since the start.
    pub exits: Vec<ExitReport>,
    /// Its directory: sockets and logs.
    pub directory: PathBuf,
    /// Where its console is reached.
    pub console: PathBuf,
}

/// Memory of a VM.
#[derive(Debug, Clone, Serialize)]
pub struct MemoryReport {
    /// As configured.
    #[serde(flatten)]
    pub configured: Memory,
    /// Bytes that the guest has now.
    pub assigned: Option<u64>,
    /// What dynamic memory tells.
    pub dynamic: Option<MemoryStatus>,
}

/// Processors of a VM.
#[derive(Debug, Clone, Serialize)]
pub struct CpuReport {
    /// Percent of its virtual processors.
    pub reserve: u32,
    /// Percent of its virtual processors.
    pub limit: u32,
    /// Against the others' weights.
    pub weight: u32,
    /// Host processors, by virtual processor.
    pub pin: Vec<usize>,
    /// What the guest is told of the processor.
    pub baseline: Option<Baseline>,
    /// Processors that it is kept to, so that the switch polls undisturbed on the others; none if it may use all.
    pub allowed: Vec<usize>,
    /// Its control group, if there is one.
    pub cgroup: Option<PathBuf>,
}

/// An adapter.
#[derive(Debug, Clone, Serialize)]
pub struct NicReport {
    /// Name.
    pub name: String,
    /// What the guest sees.
    pub kind: NicKind,
    /// Switch.
    pub switch: String,
    /// Port of that switch.
    pub port: String,
    /// Station address.
    pub mac: String,
    /// VLANs.
    pub vlan: VlanMode,
    /// Whom it meets in them.
    pub private: Option<PrivateVlan>,
    /// Largest IP packet in bytes.
    pub mtu: u16,
    /// Channels at most.
    pub queues: u16,
    /// Its link, as the operator wants it.
    pub link: LinkState,
    /// Channels open now.
    pub channels: u16,
    /// The switch serves it.
    pub connected: bool,
}

/// What the guest says of itself, through its integration services.
#[derive(Debug, Clone, Default, Serialize)]
pub struct GuestReport {
    /// Alive?
    pub heartbeat: Heartbeat,
    /// Name of its system.
    pub os: Option<String>,
    /// Version of its system.
    pub version: Option<String>,
    /// Its own name.
    pub hostname: Option<String>,
    /// Its addresses.
    pub addresses: Vec<String>,
    /// Everything that it tells, by key.
    pub values: Vec<(String, String)>,
    /// Services in use, with their versions.
    pub services: Vec<(String, String)>,
    /// Its file systems are frozen for a backup.
    pub frozen: bool,
}

/// A device or service that was stopped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FaultReport {
    /// Which.
    pub device: String,
    /// Why.
    pub reason: String,
}

/// Exits of a kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ExitReport {
    /// Which kind.
    pub kind: String,
    /// How many.
    pub count: u64,
}

impl VmReport {
    /// A VM of which nothing but its specification is known.
    pub(super) fn new(spec: &VmSpec, directory: &super::directory::Directory) -> Self {
        Self {
            name: spec.name.clone(),
            state: VmState::Off,
            reason: None,
            warnings: Vec::new(),
            vcpus: spec.vcpus,
            memory: MemoryReport { configured: spec.memory, assigned: None, dynamic: None },
            cpu: CpuReport {
                reserve: spec.cpu.reserve,
                limit: spec.cpu.limit,
                weight: spec.cpu.weight,
                pin: spec.cpu.pin.clone(),
                baseline: spec.cpu.baseline,
                allowed: Vec::new(),
                cgroup: None,
            },
            kernel: spec.kernel.clone(),
            initrd: spec.initrd.clone(),
            cmdline: spec.cmdline.clone(),
            services: spec.services,
            restart: spec.restart,
            autostart: spec.autostart,
            restarts: 0,
            changed: false,
            uptime: None,
            pid: None,
            user: None,
            vmbus: None,
            nics: spec.nics.iter().map(|nic| NicReport::new(&spec.name, nic)).collect(),
            guest: GuestReport::default(),
            faults: Vec::new(),
            panic: None,
            exits: Vec::new(),
            directory: directory.path().to_owned(),
            console: directory.console(),
        }
    }

    /// What its worker says of it.
    pub(super) fn tell(&mut self, status: &Status) {
        self.uptime = Some(status.uptime);
        self.memory.assigned = Some(status.memory);
        self.memory.dynamic = status.guest.memory;
        self.vmbus.clone_from(&status.vmbus);
        for nic in &mut self.nics {
            nic.tell(status.nics.iter().find(|told| told.name == nic.name));
        }
        self.guest = GuestReport::new(status);
        for (device, reason) in status.faults.iter().cloned() {
            let fault = FaultReport { device, reason };
            // An event may have told it already.
            if !self.faults.contains(&fault) {
                self.faults.push(fault);
            }
        }
        self.panic.clone_from(&status.panic);
        let exits = status.exits.iter().cloned();
        self.exits = exits.map(|(kind, count)| ExitReport { kind, count }).collect();
    }
}

impl NicReport {
    fn new(vm: &str, nic: &NicSpec) -> Self {
        Self {
            name: nic.name.clone(),
            kind: nic.kind,
            switch: nic.switch.clone(),
            port: port_name(vm, &nic.name),
            mac: nic.mac.clone(),
            vlan: nic.vlan.clone(),
            private: nic.private,
            mtu: nic.mtu,
            queues: nic.queues,
            link: nic.link,
            channels: 0,
            connected: false,
        }
    }

    fn tell(&mut self, told: Option<&NicStatus>) {
        self.channels = told.map_or(0, |told| told.channels);
        self.connected = told.is_some_and(|told| told.connected);
    }
}

impl GuestReport {
    /// Keys are those of hv_kvp_daemon's automatic pool.
    fn new(status: &Status) -> Self {
        let guest = &status.guest;
        let value = |key: &str| {
            let found = guest.values.iter().find(|(name, value)| name == key && !value.is_empty());
            found.map(|(_, value)| value.clone())
        };
        let list = |key: &str| value(key).unwrap_or_default();
        let (four, six) = (list("NetworkAddressIPv4"), list("NetworkAddressIPv6"));
        let addresses = four.split(';').chain(six.split(';')).filter(|address| !address.is_empty());
        Self {
            heartbeat: guest.heartbeat,
            os: value("OSName"),
            version: value("OSVersion").or_else(|| value("OSBuildNumber")),
            // A guest that cannot tell says why instead.
            hostname: value("FullyQualifiedDomainName").filter(|name| !name.contains(' ')),
            addresses: addresses.map(str::to_owned).collect(),
            values: guest.values.clone(),
            services: guest.services.clone(),
            frozen: guest.frozen,
        }
    }
}
