//! What an operator asks for: virtual machines and their adapters, as plain values. They are read from the configuration
//! or a request, and kept in a running VM's directory, so that a new daemon knows what it takes back.

use std::path::PathBuf;

use hypervisor::control::{Baseline, Memory, Nic, NicKind, Services};
use serde::{Deserialize, Serialize};
use vmq::Mac;
use vswitch::fabric::PortChange;
use vswitch::spec::{PrivateVlan, VlanMode};

use super::identity;

/// A virtual machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct VmSpec {
    /// Unique name: letters, digits, `-`, `_` and `.`.
    pub name: String,
    /// Memory, in bytes.
    pub memory: Memory,
    /// Virtual processors, 1 to 64.
    pub vcpus: u32,
    /// A bzImage.
    pub kernel: PathBuf,
    /// The initial RAM file system.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: String,
    /// Adapters, in the order in which the guest sees them.
    pub nics: Vec<NicSpec>,
    /// Processors: how much of them, and which.
    pub cpu: CpuSpec,
    /// Integration services offered to the guest.
    pub services: Services,
    /// What happens when the VM ends unasked.
    pub restart: RestartPolicy,
    /// Started with the daemon.
    pub autostart: bool,
}

impl VmSpec {
    /// A VM of which nothing but its name is known.
    pub(super) fn unknown(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            memory: Memory { startup: 0, minimum: 0, maximum: 0, huge: false },
            vcpus: 0,
            kernel: PathBuf::new(),
            initrd: None,
            cmdline: String::new(),
            nics: Vec::new(),
            cpu: CpuSpec::default(),
            services: Services::default(),
            restart: RestartPolicy::Never,
            autostart: false,
        }
    }
}

/// A VM's share of the host's processors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CpuSpec {
    /// Percent of its virtual processors that it is to get even when all want more, 0 to 100.
    pub reserve: u32,
    /// Percent of its virtual processors that it gets at most, 1 to 100.
    pub limit: u32,
    /// Its part of what is scarce, against the others' weights, 1 to 10000.
    pub weight: u32,
    /// Host processors, by virtual processor; empty leaves them to the scheduler.
    pub pin: Vec<usize>,
    /// What the guest is told of the processor; none is all that the host has.
    pub baseline: Option<Baseline>,
}

impl CpuSpec {
    /// Default of [`CpuSpec::weight`], that of cgroup v2.
    pub const WEIGHT: u32 = 100;
    /// Largest [`CpuSpec::weight`].
    pub const MAX_WEIGHT: u32 = 10_000;
}

impl Default for CpuSpec {
    fn default() -> Self {
        Self { reserve: 0, limit: 100, weight: Self::WEIGHT, pin: Vec::new(), baseline: None }
    }
}

/// What happens when a VM ends without `yard` having asked for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RestartPolicy {
    /// It stays off.
    Never,
    /// It is started again if its worker died or its guest crashed.
    #[default]
    OnCrash,
    /// It is also started again if its guest switched itself off.
    Always,
}

/// An adapter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct NicSpec {
    /// Unique in its VM; the switch's port is named `VM.NIC`.
    pub name: String,
    /// Switch it is a port of.
    pub switch: String,
    /// What the guest sees.
    pub kind: NicKind,
    /// Station address, as `02:00:00:00:00:01`.
    pub mac: String,
    /// VLANs.
    pub vlan: VlanMode,
    /// Whom the adapter meets in them.
    #[serde(default)]
    pub private: Option<PrivateVlan>,
    /// Channels at most; 1 for a legacy adapter.
    pub queues: u16,
    /// Largest IP packet in bytes.
    pub mtu: u16,
    /// Other sources than [`NicSpec::mac`] are allowed.
    pub spoofing: bool,
    /// Most addresses learnt on the port.
    pub address_limit: Option<u32>,
    /// Checksum and segmentation offloads are offered.
    pub offloads: bool,
    /// TCP segments may be merged for the guest (RSC).
    pub coalesce: bool,
    /// Its link, as the operator wants it.
    #[serde(default)]
    pub link: LinkState,
}

/// What a guest is shown of an adapter's link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LinkState {
    /// The cable is in.
    #[default]
    Up,
    /// The cable is out.
    Down,
}

/// Name of the port of `vm`'s adapter `nic`.
pub fn port_name(vm: &str, nic: &str) -> String {
    format!("{vm}.{nic}")
}

impl NicSpec {
    /// What the worker of `vm` is told of it.
    pub fn device(&self, vm: &str) -> Nic {
        Nic {
            name: self.name.clone(),
            kind: self.kind,
            mac: self.mac.clone(),
            instance: identity::instance(vm, &self.name),
            queues: self.queues,
        }
    }
}

/// What may be changed of an adapter; none leaves a value as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NicChange {
    /// See [`NicSpec::mac`]; only while the VM is off.
    pub mac: Option<Mac>,
    /// See [`NicSpec::link`].
    pub link: Option<LinkState>,
    /// Its port.
    pub port: PortChange,
}

/// What may be changed of a VM while it runs; none leaves a value as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VmChange {
    /// Bytes that dynamic memory is to move the guest to.
    pub memory: Option<u64>,
    /// See [`CpuSpec::weight`].
    pub weight: Option<u32>,
    /// See [`CpuSpec::limit`].
    pub limit: Option<u32>,
    /// See [`CpuSpec::reserve`].
    pub reserve: Option<u32>,
}
