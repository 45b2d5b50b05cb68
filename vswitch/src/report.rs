//! What an operator is shown: the state of every switch, port, queue and worker as plain values.

use serde::Serialize;

use crate::spec::SwitchKind;
use crate::tally::CounterValues;

/// Everything.
#[derive(Debug, Clone, Serialize)]
pub struct FabricReport {
    /// Switches, sorted by name.
    pub switches: Vec<SwitchReport>,
    /// Workers, in the order of the configuration.
    pub workers: Vec<WorkerReport>,
}

/// A switch.
#[derive(Debug, Clone, Serialize)]
pub struct SwitchReport {
    /// Name.
    pub name: String,
    /// Whom it connects.
    pub kind: SwitchKind,
    /// Addresses known, static ones included.
    pub addresses: usize,
    /// Addresses it can hold.
    pub capacity: usize,
    /// Ports, sorted by name.
    pub ports: Vec<PortReport>,
}

/// What a port is doing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "state", content = "reason")]
pub enum PortState {
    /// Waiting for its client or device; the text says what for.
    Waiting(String),
    /// Frames flow.
    Up,
    /// A capture was played to its end.
    Finished,
    /// Stopped after a fault of its guest, peer or file, until restarted.
    Faulted(String),
}

/// A port.
#[derive(Debug, Clone, Serialize)]
pub struct PortReport {
    /// Name.
    pub name: String,
    /// `vhost-user`, `tap`, `uplink` or `pcap`.
    pub kind: &'static str,
    /// Socket, device or file.
    pub attached: String,
    /// State.
    #[serde(flatten)]
    pub state: PortState,
    /// The last thing that went wrong, if it did not stop the port (a peer that broke the protocol and was cut off).
    pub last_error: Option<String>,
    /// MTU in bytes.
    pub mtu: u16,
    /// Configured address.
    pub mac: Option<String>,
    /// VLANs, as the operator would write them.
    pub vlan: String,
    /// What was negotiated with the client, in words.
    pub features: Vec<String>,
    /// Frames from the port into the switch: those that went on to another port, and those dropped on the way in.
    pub received: CounterValues,
    /// Frames from the switch to the port: those that it took, and those dropped on the way out.
    pub sent: CounterValues,
    /// Queue by queue.
    pub queues: Vec<QueueReport>,
}

/// A queue pair of a port.
#[derive(Debug, Clone, Serialize)]
pub struct QueueReport {
    /// Number in the port.
    pub queue: u16,
    /// Processor that polls it, if it is in use.
    pub cpu: Option<usize>,
    /// The operator chose that processor.
    pub pinned: bool,
    /// Enabled by the client.
    pub enabled: bool,
    /// Load it puts on that processor, in thousandths.
    pub load_permille: u32,
    /// Frames from the queue into the switch.
    pub received: CounterValues,
    /// Frames from the switch to the queue.
    pub sent: CounterValues,
}

/// A poll worker.
#[derive(Debug, Clone, Serialize)]
pub struct WorkerReport {
    /// Processor it is pinned to.
    pub cpu: usize,
    /// `polling`, `asleep` or `parked`.
    pub state: &'static str,
    /// Queues placed on it.
    pub queues: usize,
    /// Time spent on frames in the last second, in thousandths.
    pub load_permille: u32,
    /// Times it went to sleep.
    pub sleeps: u64,
}

/// Addresses of a switch's table.
#[derive(Debug, Clone, Serialize)]
pub struct AddressList {
    /// How many there are.
    pub total: usize,
    /// The first of them, by VLAN and address.
    pub addresses: Vec<AddressReport>,
}

/// An address of a switch's table.
#[derive(Debug, Clone, Serialize)]
pub struct AddressReport {
    /// The address.
    pub mac: String,
    /// VLAN, 0 for none.
    pub vlan: u16,
    /// Port name.
    pub port: String,
    /// Seconds since it was last seen, as far as known.
    pub age: u32,
    /// Pinned by the operator.
    pub fixed: bool,
}
