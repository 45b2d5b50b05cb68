//! The words of the command line. Help, manual pages and completions are made from these definitions.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

use super::vm_args::VmCommand;

/// Examples, for `--help` and the manual page.
pub const EXAMPLES: &[(&str, &str)] = &[
    ("yard show", "Everything on one screen, faults first."),
    ("yard port add lab/red --vhost-user /run/switchyard/red.sock --queues 4", "A port for a guest."),
    ("yard port set lab/red --access 10 --mtu 9000", "Put it into VLAN 10, with jumbo frames."),
    ("yard capture lab/red -w - | wireshark -k -i -", "Watch it live."),
    ("yard capture lab --drops --count 100 -w drops.pcapng", "Why are frames dropped?"),
    (
        "yard vm define web --kernel vmlinuz --initrd initrd.img --memory 512M --nic name=eth0,switch=lab --start",
        "A virtual machine.",
    ),
    ("yard vm console web", "Its serial console; Ctrl-] leaves it."),
    ("yard stats --watch 1", "Rates every second."),
    ("yard -j show | jq '.switches[].ports[].name'", "For programs."),
];

const AFTER: &str = "\
Examples:
  yard show
  yard port add lab/red --vhost-user /run/switchyard/red.sock --queues 4
  yard port set lab/red --access 10 --mtu 9000
  yard capture lab/red -w - | wireshark -k -i -
  yard vm define web --kernel vmlinuz --initrd initrd.img --memory 512M --nic name=eth0,switch=lab --start
  yard stats --watch 1

Exit status: 0 done, 1 failed, 2 wrong usage, 3 no such thing, 4 exists already, 5 the daemon does not answer.";

/// Shows and changes the switches and virtual machines of a running yardd.
#[derive(Debug, Parser)]
#[command(name = "yard", version, after_help = AFTER, propagate_version = true, max_term_width = 100)]
pub struct Yard {
    /// Socket of the daemon [default: $YARD_SOCKET, or /run/switchyard/yardd.sock]
    #[arg(long, global = true, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Print JSON, as the API gives it
    #[arg(short, long, global = true)]
    pub json: bool,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// What `yard` does.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show switches, ports, virtual machines, workers and every fault
    Show,
    /// Add, remove and list switches
    #[command(subcommand)]
    Switch(SwitchCommand),
    /// Add, remove, change and show ports
    #[command(subcommand)]
    Port(PortCommand),
    /// Show and change the address table of a switch
    #[command(subcommand)]
    Fdb(FdbCommand),
    /// Show queues, and choose the processors that poll them
    #[command(subcommand)]
    Queue(QueueCommand),
    /// Define, start, end, change and show virtual machines
    #[command(subcommand)]
    Vm(VmCommand),
    /// Show counters and drop reasons, or rates
    Stats(StatsArgs),
    /// Show a live table of ports and queues
    Top(TopArgs),
    /// Capture frames as pcapng
    Capture(CaptureArgs),
    /// Print a completion script for a shell
    Completions {
        /// Which shell
        shell: Shell,
    },
    /// Write the manual pages of yard, yardd and switchyard.toml
    Man {
        /// Directory to write them to
        dir: PathBuf,
    },
}

/// A port as operators name it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortName {
    /// Switch.
    pub switch: String,
    /// Port of that switch.
    pub port: String,
}

impl FromStr for PortName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('/') {
            Some((switch, port)) if !switch.is_empty() && !port.is_empty() && !port.contains('/') => {
                Ok(Self { switch: switch.into(), port: port.into() })
            }
            _ => Err("expected SWITCH/PORT, such as lab/red".into()),
        }
    }
}

impl std::fmt::Display for PortName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.switch, self.port)
    }
}

/// `yard switch …`
#[derive(Debug, Subcommand)]
pub enum SwitchCommand {
    /// Add a switch
    Add(SwitchAdd),
    /// Remove a switch and its ports
    Del {
        /// Name of the switch
        switch: String,
        /// Do nothing if there is no such switch
        #[arg(long)]
        if_exists: bool,
    },
    /// List switches
    List,
}

/// Whom a switch connects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// Guests, the host and a network beyond
    External,
    /// Guests and the host
    Internal,
    /// Its ports only
    Private,
}

/// `yard switch add`
#[derive(Debug, Args)]
pub struct SwitchAdd {
    /// Name of the switch
    pub switch: String,
    /// Whom it connects
    #[arg(long = "type", value_name = "TYPE", default_value = "private")]
    pub kind: Kind,
    /// External switch: network device of the host that leads out
    #[arg(long, value_name = "DEVICE")]
    pub uplink: Option<String>,
    /// Internal switch: name of the host's TAP device [default: yard-SWITCH]
    #[arg(long, value_name = "NAME")]
    pub host: Option<String>,
    /// Addresses that the table holds [default: 16384]
    #[arg(long, value_name = "N")]
    pub addresses: Option<u64>,
    /// Seconds after which an address that was not seen is forgotten [default: 300]
    #[arg(long, value_name = "SECS")]
    pub aging: Option<u64>,
    /// Do nothing if there is such a switch
    #[arg(long)]
    pub may_exist: bool,
}

/// `yard port …`
#[derive(Debug, Subcommand)]
pub enum PortCommand {
    /// Add a port
    Add(Box<PortAdd>),
    /// Remove a port
    Del {
        /// Which port
        #[arg(value_name = "SWITCH/PORT")]
        port: PortName,
        /// Do nothing if there is no such port
        #[arg(long)]
        if_exists: bool,
    },
    /// List ports
    List {
        /// Only those of this switch
        switch: Option<String>,
    },
    /// Show everything about a port
    Show {
        /// Which port
        #[arg(value_name = "SWITCH/PORT")]
        port: PortName,
    },
    /// Change a port while it runs
    Set(PortSet),
    /// Clear a fault, or play a capture again; a connected client is cut off
    Restart {
        /// Which port
        #[arg(value_name = "SWITCH/PORT")]
        port: PortName,
    },
}

/// VLANs of a port.
#[derive(Debug, Clone, Default, Args)]
pub struct VlanArgs {
    /// Untagged frames only, all of this VLAN
    #[arg(long, value_name = "VLAN", conflicts_with_all = ["trunk", "native"])]
    pub access: Option<u16>,
    /// Tagged frames of these VLANs, such as 10-20,30
    #[arg(long, value_name = "VLANS")]
    pub trunk: Option<String>,
    /// With --trunk: VLAN of untagged frames
    #[arg(long, value_name = "VLAN", requires = "trunk")]
    pub native: Option<u16>,
}

/// `yard port add`
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("attachment").required(true).multiple(true)))]
pub struct PortAdd {
    /// Which port
    #[arg(value_name = "SWITCH/PORT")]
    pub port: PortName,
    /// Attach a guest or application over vhost-user
    #[arg(long, value_name = "SOCKET", group = "attachment", conflicts_with_all = ["tap", "uplink", "pcap_read", "pcap_write"])]
    pub vhost_user: Option<PathBuf>,
    /// The guest's VMM listens on the socket, the switch connects
    #[arg(long, requires = "vhost_user")]
    pub client: bool,
    /// Attach a TAP device, made if it is missing
    #[arg(long, value_name = "NAME", group = "attachment", conflicts_with_all = ["uplink", "pcap_read", "pcap_write"])]
    pub tap: Option<String>,
    /// Attach a network device of the host
    #[arg(long, value_name = "DEVICE", group = "attachment", conflicts_with_all = ["pcap_read", "pcap_write"])]
    pub uplink: Option<String>,
    /// Play a capture file into the switch
    #[arg(long, value_name = "FILE", group = "attachment")]
    pub pcap_read: Option<PathBuf>,
    /// Write what the switch sends to the port to a pcapng file
    #[arg(long, value_name = "FILE", group = "attachment")]
    pub pcap_write: Option<PathBuf>,
    /// Play as fast as the switch takes it, not with the recorded gaps
    #[arg(long, requires = "pcap_read")]
    pub full_speed: bool,
    /// Play again and again
    #[arg(long, requires = "pcap_read")]
    pub repeat: bool,
    /// Queue pairs [default: 1]
    #[arg(long, value_name = "N", conflicts_with_all = ["pcap_read", "pcap_write"])]
    pub queues: Option<u16>,
    /// Longest IP packet in bytes [default: 1500]
    #[arg(long, value_name = "BYTES")]
    pub mtu: Option<u32>,
    /// The guest's address; it may send from no other
    #[arg(long)]
    pub mac: Option<String>,
    /// Allow other source addresses than --mac
    #[arg(long)]
    pub mac_spoofing: bool,
    /// Most addresses that are learnt on the port
    #[arg(long, value_name = "N")]
    pub address_limit: Option<u32>,
    #[command(flatten)]
    #[expect(missing_docs, reason = "a comment here would become the command's help")]
    pub vlan: VlanArgs,
    /// Offer no checksum and segmentation offloads
    #[arg(long)]
    pub no_offloads: bool,
    /// Merge no TCP segments
    #[arg(long)]
    pub no_coalesce: bool,
    /// Processor for each queue
    #[arg(long, value_name = "CPU,...", value_delimiter = ',')]
    pub pin: Option<Vec<usize>>,
    /// More keys of the configuration's port table, such as '{"rss": {"table": [0, 1]}}'
    #[arg(long, value_name = "JSON")]
    pub with: Option<String>,
    /// Do nothing if there is such a port
    #[arg(long)]
    pub may_exist: bool,
}

/// `yard port set`
#[derive(Debug, Args)]
pub struct PortSet {
    /// Which port
    #[arg(value_name = "SWITCH/PORT")]
    pub port: PortName,
    #[command(flatten)]
    #[expect(missing_docs, reason = "a comment here would become the command's help")]
    pub change: ChangeArgs,
}

/// What may change of a port while it runs.
#[derive(Debug, Clone, Args)]
#[group(required = true, multiple = true)]
pub struct ChangeArgs {
    /// Longest IP packet in bytes
    #[arg(long, value_name = "BYTES")]
    pub mtu: Option<u32>,
    /// Untagged frames only, all of this VLAN
    #[arg(long, value_name = "VLAN", conflicts_with_all = ["trunk", "passthrough"])]
    pub access: Option<u16>,
    /// Tagged frames of these VLANs, such as 10-20,30
    #[arg(long, value_name = "VLANS", conflicts_with = "passthrough")]
    pub trunk: Option<String>,
    /// With --trunk: VLAN of untagged frames
    #[arg(long, value_name = "VLAN", requires = "trunk")]
    pub native: Option<u16>,
    /// Frames keep the tag that they have
    #[arg(long)]
    pub passthrough: bool,
    /// Allow other source addresses than the port's
    #[arg(long, value_name = "BOOL")]
    pub mac_spoofing: Option<bool>,
    /// Merge TCP segments for a receiver that takes large frames
    #[arg(long, value_name = "BOOL")]
    pub coalesce: Option<bool>,
    /// Most addresses that are learnt on the port, or none
    #[arg(long, value_name = "N|none")]
    pub address_limit: Option<String>,
}

/// `yard fdb …`
#[derive(Debug, Subcommand)]
pub enum FdbCommand {
    /// Show the addresses of a switch
    Show {
        /// Which switch
        switch: String,
        /// Only those behind this port
        #[arg(long)]
        port: Option<String>,
        /// At most so many
        #[arg(long, value_name = "N", default_value_t = 10_000)]
        limit: usize,
    },
    /// Forget learnt addresses
    Flush {
        /// Which switch
        switch: String,
        /// Only those behind this port
        #[arg(long)]
        port: Option<String>,
    },
    /// Pin an address to a port
    Add {
        /// Which port
        #[arg(value_name = "SWITCH/PORT")]
        port: PortName,
        /// The address
        mac: String,
        /// Its VLAN; 0 is none
        #[arg(long, default_value_t = 0)]
        vlan: u16,
    },
    /// Forget an address, learnt or pinned
    Del {
        /// Which switch
        switch: String,
        /// The address
        mac: String,
        /// Its VLAN; 0 is none
        #[arg(long, default_value_t = 0)]
        vlan: u16,
    },
}

/// `yard queue …`
#[derive(Debug, Subcommand)]
pub enum QueueCommand {
    /// Show queues with their processors and load
    Show {
        /// Only those of this port
        #[arg(value_name = "SWITCH/PORT")]
        port: Option<PortName>,
    },
    /// Choose the processor that polls a queue
    Pin {
        /// Which port
        #[arg(value_name = "SWITCH/PORT")]
        port: PortName,
        /// Which of its queues
        queue: u16,
        /// Processor, or auto to leave it to the placement
        #[arg(value_name = "CPU|auto", value_parser = processor)]
        cpu: Processor,
    },
}

/// A processor, or none in particular.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Processor(pub Option<usize>);

fn processor(text: &str) -> Result<Processor, String> {
    match text {
        "auto" => Ok(Processor(None)),
        _ => text
            .parse()
            .map(|cpu| Processor(Some(cpu)))
            .map_err(|_| "expected a processor number or auto".into()),
    }
}

/// `yard stats`
#[derive(Debug, Args)]
pub struct StatsArgs {
    /// Only this switch or port
    #[arg(value_name = "SWITCH[/PORT]")]
    pub target: Option<String>,
    /// Show rates, every so many seconds
    #[arg(long, value_name = "SECS", value_parser = clap::value_parser!(u32).range(1..=86_400))]
    pub watch: Option<u32>,
    /// With --watch: end after so many tables
    #[arg(long, value_name = "N", requires = "watch")]
    pub count: Option<u64>,
}

/// `yard top`
#[derive(Debug, Args)]
pub struct TopArgs {
    /// Seconds between two tables
    #[arg(long, value_name = "SECS", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=86_400))]
    pub interval: u32,
    /// End after so many tables
    #[arg(long, value_name = "N")]
    pub count: Option<u64>,
}

/// `yard capture`
#[derive(Debug, Args)]
pub struct CaptureArgs {
    /// A switch, or one port [default: the only switch]
    #[arg(value_name = "SWITCH|PORT|SWITCH/PORT")]
    pub target: Option<String>,
    /// File to write, or - for standard output
    #[arg(short, long, value_name = "FILE")]
    pub write: PathBuf,
    /// Bytes kept of each frame; 0 keeps all
    #[arg(long, value_name = "BYTES", default_value_t = 0)]
    pub snaplen: u32,
    /// Dropped frames too, with their reason as comment
    #[arg(long)]
    pub drops: bool,
    /// End after so many frames
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
}
