//! What the host daemon and a VM's worker say to each other.
//!
//! The worker is started with one Unix stream socket (descriptor 3) over which its [`Setup`] comes: one JSON line, whose
//! descriptors ([`Handle`], in the order of [`Setup::handles`]) travel beside it (`SCM_RIGHTS`). Later whoever is the host daemon
//! connects to the control listener among them and sends [`Request`]s, one JSON line each; the worker answers each with a
//! [`Response`] of the same number, and sends [`Event`]s in between. The daemon may go and come back: the worker goes on,
//! and a new connection takes the place of the old one.

use serde::{Deserialize, Serialize};

/// Descriptor of a worker that its [`Setup`] comes over.
pub const SETUP_FD: i32 = 3;

/// Processors of one VM at most.
pub const MAX_VCPUS: u32 = 64;

/// What a descriptor handed over with the [`Setup`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Handle {
    /// `/dev/kvm`, open for reading and writing.
    Kvm,
    /// The kernel: a bzImage.
    Kernel,
    /// The initial RAM file system.
    Initrd,
    /// Where the serial console's output is appended.
    SerialLog,
    /// Listener for control connections (stream).
    Control,
    /// Listener over which VMBus channels are handed over (sequenced packets).
    Channels,
    /// Listener for consoles (stream): bytes as on the serial line.
    Console,
}

/// All that a worker is told before its guest's first instruction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Setup {
    /// Name of the VM.
    pub name: String,
    /// User and group that the worker becomes, with no other group; none if it stays what it is.
    #[serde(default)]
    pub user: Option<u32>,
    /// Memory.
    pub memory: Memory,
    /// Virtual processors, 1 to [`MAX_VCPUS`].
    pub vcpus: u32,
    /// Host processors, by virtual processor; empty leaves them to the scheduler.
    pub pin: Vec<usize>,
    /// What the guest is told of the processor; none is all that the host has.
    pub baseline: Option<Baseline>,
    /// Kernel command line.
    pub cmdline: String,
    /// Network adapters present at start.
    pub nics: Vec<Nic>,
    /// Integration services offered.
    pub services: Services,
    /// What the descriptors beside this message are.
    pub handles: Vec<Handle>,
}

/// Memory of a VM, in bytes; multiples of 2 MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Memory {
    /// At start.
    pub startup: u64,
    /// What dynamic memory may take it down to; equal to `startup` if it is not dynamic.
    pub minimum: u64,
    /// What dynamic memory may take it up to.
    pub maximum: u64,
    /// Backed by huge pages of the host (2 MiB, from the pool).
    pub huge: bool,
}

impl Memory {
    /// Whether the kernel is asked for huge pages as memory is touched. Not with pages from the pool; and not with dynamic
    /// memory, which is given back in smaller pieces.
    pub fn asks_for_huge_pages(&self) -> bool {
        !self.huge && self.minimum == self.maximum
    }
}

/// A processor that many hosts can present, so that a VM can move between unlike ones: a level of the x86-64 psABI, or a
/// model with its maker, family and features.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Baseline {
    /// SSE4.2, POPCNT (about 2009).
    #[serde(rename = "x86-64-v2")]
    V2,
    /// AVX2, BMI, FMA (about 2013).
    #[serde(rename = "x86-64-v3")]
    V3,
    /// AVX-512 F, BW, CD, DQ, VL (about 2017).
    #[serde(rename = "x86-64-v4")]
    V4,
    /// Intel Xeon 5500 (2009).
    Nehalem,
    /// Intel Xeon E5 v3 (2014), without TSX.
    Haswell,
    /// Intel Xeon Scalable (2017), without TSX and MPX.
    SkylakeServer,
    /// Intel Xeon Scalable, third generation (2021), without TSX.
    IcelakeServer,
    /// AMD EPYC 7001 (2017).
    Epyc,
    /// AMD EPYC 7002 (2019).
    EpycRome,
    /// AMD EPYC 7003 (2021).
    EpycMilan,
}

impl Baseline {
    /// Each with its name.
    pub const NAMED: &[(&str, Self)] = &[
        ("x86-64-v2", Self::V2),
        ("x86-64-v3", Self::V3),
        ("x86-64-v4", Self::V4),
        ("nehalem", Self::Nehalem),
        ("haswell", Self::Haswell),
        ("skylake-server", Self::SkylakeServer),
        ("icelake-server", Self::IcelakeServer),
        ("epyc", Self::Epyc),
        ("epyc-rome", Self::EpycRome),
        ("epyc-milan", Self::EpycMilan),
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        Self::NAMED.iter().find(|(_, named)| *named == self).map_or("", |(name, _)| name)
    }
}

/// A network adapter of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Nic {
    /// Unique in its VM.
    pub name: String,
    /// What the guest sees.
    pub kind: NicKind,
    /// Station address, as `02:00:00:00:00:01`.
    pub mac: String,
    /// VMBus instance, as 8-4-4-4-12 hexadecimal digits; unique among all VMs.
    pub instance: String,
    /// Channels at most (synthetic).
    pub queues: u16,
}

/// What kind of adapter the guest sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NicKind {
    /// A VMBus device: `hv_netvsc`.
    Synthetic,
    /// An emulated 82540EM: `e1000`.
    Legacy,
}

/// Which integration services are offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Services {
    /// Is the guest alive?
    pub heartbeat: bool,
    /// Orderly shutdown.
    pub shutdown: bool,
    /// Clock.
    pub time_sync: bool,
    /// Data exchange.
    pub kvp: bool,
    /// Freeze and thaw for backups.
    pub vss: bool,
    /// Balloon and hot add.
    pub dynamic_memory: bool,
}

impl Default for Services {
    fn default() -> Self {
        Self { heartbeat: true, shutdown: true, time_sync: true, kvp: true, vss: true, dynamic_memory: true }
    }
}

/// A numbered command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Echoed in the [`Response`].
    pub id: u64,
    /// What to do.
    pub command: Command,
}

/// What the host daemon asks of a worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Command {
    /// Runs the guest from its kernel's first instruction.
    Start,
    /// Stops all virtual processors where they are.
    Pause,
    /// Lets them go on; the guest's clock is set right.
    Resume,
    /// As the reset button.
    Reset,
    /// Asks the guest to shut down (integration service; the ACPI power button if the service is not connected).
    Shutdown {
        /// Start again afterwards.
        reboot: bool,
    },
    /// Ends the VM and the worker at once.
    Stop,
    /// Answers with [`Answer::Status`].
    Show,
    /// Plugs in an adapter. A legacy one can only be there from the start.
    AddNic(Nic),
    /// Unplugs an adapter.
    RemoveNic {
        /// Its name.
        name: String,
    },
    /// The switch's end of a legacy adapter: a socket of sequenced packets comes with the line.
    ConnectLegacy {
        /// Adapter.
        name: String,
    },
    /// Takes the link of a legacy adapter down or up; that of a synthetic one is the switch's.
    SetLink {
        /// Adapter.
        name: String,
        /// Up.
        up: bool,
    },
    /// Moves the guest's memory towards this many bytes (dynamic memory).
    SetMemory {
        /// Bytes.
        bytes: u64,
    },
    /// Sets the guest's clock.
    SyncTime,
    /// Writes a value that the guest can read (data exchange, pool 0). No value removes the key.
    SetValue {
        /// Key.
        key: String,
        /// Value.
        value: Option<String>,
    },
    /// Has the guest's file systems quiet, until [`Command::Thaw`].
    Freeze,
    /// Ends [`Command::Freeze`].
    Thaw,
}

/// The answer to a [`Request`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Response {
    /// Of the request.
    pub id: u64,
    /// What came of it; an error is a sentence for the operator.
    pub result: Result<Answer, String>,
}

/// What a command that succeeded answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// Done, or begun.
    Done,
    /// To [`Command::Show`].
    Status(Box<Status>),
}

/// A line from the worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Line {
    /// To a request.
    Response(Response),
    /// Of its own accord.
    Event(Event),
}

/// What happens without being asked for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Event {
    /// The state changed.
    State(State),
    /// The guest's kernel panicked, and said so through the crash registers.
    Panic(Panic),
    /// A device or service of the guest was stopped for what the guest did.
    Fault {
        /// Which.
        device: String,
        /// Why.
        reason: String,
    },
}

/// Where a VM's life stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Set up, its guest not started.
    Ready,
    /// Running.
    Running,
    /// Paused.
    Paused,
    /// The guest switched itself off, or was asked to.
    Off,
    /// The guest panicked or tripped over itself; memory is kept until it is reset or stopped.
    Crashed {
        /// In words.
        reason: String,
    },
}

/// What a panicking guest leaves in its crash registers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Panic {
    /// Registers P0 to P4.
    pub parameters: [u64; 5],
    /// The end of the kernel's log, if the guest gave one.
    pub log: Option<String>,
}

/// All that is known of a running VM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Status {
    /// Name of the VM.
    pub name: String,
    /// State.
    pub state: State,
    /// The setup it was started with, adapters added and removed since included; without descriptors.
    pub setup: Setup,
    /// Seconds since the guest started.
    pub uptime: f64,
    /// Bytes of memory the guest has now.
    pub memory: u64,
    /// VMBus version agreed on, such as `5.3`.
    pub vmbus: Option<String>,
    /// Adapters.
    pub nics: Vec<NicStatus>,
    /// What the guest says of itself.
    pub guest: GuestStatus,
    /// Devices and services that were stopped, with the reason.
    pub faults: Vec<(String, String)>,
    /// The last panic.
    pub panic: Option<Panic>,
    /// Exits to user space by kind since the start: where a guest's time goes.
    pub exits: Vec<(String, u64)>,
}

/// An adapter, as its worker sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct NicStatus {
    /// Name.
    pub name: String,
    /// Kind.
    pub kind: NicKind,
    /// Open channels (synthetic), or 1 once the driver runs (legacy).
    pub channels: u16,
    /// The switch serves it.
    pub connected: bool,
}

/// How a guest is, by its heartbeat.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum Heartbeat {
    /// The guest has not opened the channel.
    #[default]
    NoContact,
    /// Beats.
    Ok,
    /// Beat once, and stopped.
    Lost,
    /// Its answers make no sense.
    Error,
}

/// What integration services tell of a guest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub struct GuestStatus {
    /// Alive?
    pub heartbeat: Heartbeat,
    /// Pairs of the automatic pool: `OSName`, `OSVersion`, `NetworkAddressIPv4` and so on.
    pub values: Vec<(String, String)>,
    /// Services whose channel is open and whose versions are agreed on: name, version.
    pub services: Vec<(String, String)>,
    /// Dynamic memory.
    pub memory: Option<MemoryStatus>,
    /// File systems are frozen for a backup.
    pub frozen: bool,
}

/// What dynamic memory tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub struct MemoryStatus {
    /// Bytes the guest has.
    pub assigned: u64,
    /// Bytes that were asked for.
    pub target: u64,
    /// Bytes taken by the balloon.
    pub ballooned: u64,
    /// Bytes added while running.
    pub added: u64,
    /// Bytes the guest's programs want.
    pub committed: u64,
    /// Bytes free in the guest.
    pub available: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn baselines_are_written_by_their_names() {
        for &(name, baseline) in Baseline::NAMED {
            assert_eq!((baseline.name(), serde_json::json!(baseline)), (name, name.into()));
        }
    }
}
