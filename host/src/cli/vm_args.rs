//! The words of `yard vm`.

use std::path::PathBuf;

use clap::{ArgGroup, Args, Subcommand, ValueEnum};

use super::args::ChangeArgs;

/// `yard vm …`
#[derive(Debug, Subcommand)]
pub enum VmCommand {
    /// Define virtual machines, by a file or by options
    Define(Box<VmDefine>),
    /// Start a VM that is off
    Start {
        /// Which VM
        vm: String,
    },
    /// Ask the guest to shut down
    Shutdown {
        /// Which VM
        vm: String,
        /// Start again afterwards
        #[arg(long)]
        reboot: bool,
    },
    /// End a VM at once, as if its power were cut
    Stop {
        /// Which VM
        vm: String,
    },
    /// Stop the processors of a VM where they are
    Pause {
        /// Which VM
        vm: String,
    },
    /// Let a paused VM go on
    Resume {
        /// Which VM
        vm: String,
    },
    /// Reset a VM, as the reset button
    Reset {
        /// Which VM
        vm: String,
    },
    /// List virtual machines
    List,
    /// Show everything about a VM
    Show {
        /// Which VM
        vm: String,
    },
    /// Use the serial console of a VM; Ctrl-] leaves it
    Console {
        /// Which VM
        vm: String,
    },
    /// Forget a VM that is off
    Delete {
        /// Which VM
        vm: String,
        /// Do nothing if there is no such VM
        #[arg(long)]
        if_exists: bool,
    },
    /// Change memory and share of the processors, also while the VM runs
    Set(VmSet),
    /// Add, remove and change adapters, also while the VM runs
    #[command(subcommand)]
    Nic(NicCommand),
    /// Have the guest's file systems quiet, for a backup
    Freeze {
        /// Which VM
        vm: String,
    },
    /// End a freeze
    Thaw {
        /// Which VM
        vm: String,
    },
    /// Set the guest's clock to the host's
    SyncTime {
        /// Which VM
        vm: String,
    },
    /// Exchange values with the guest
    #[command(subcommand)]
    Value(ValueCommand),
}

/// `yard vm define`
#[derive(Debug, Args)]
pub struct VmDefine {
    /// File with [vm.NAME] tables; with --kernel, the name of a VM
    #[arg(value_name = "FILE|NAME")]
    pub target: String,
    /// Kernel to boot, a bzImage
    #[arg(long, value_name = "FILE", requires = "memory")]
    pub kernel: Option<PathBuf>,
    /// Memory, such as 512M
    #[arg(long, value_name = "SIZE", requires = "kernel")]
    pub memory: Option<String>,
    /// Dynamic memory: how far it may shrink
    #[arg(long, value_name = "SIZE", requires = "kernel")]
    pub minimum: Option<String>,
    /// Dynamic memory: how far it may grow
    #[arg(long, value_name = "SIZE", requires = "kernel")]
    pub maximum: Option<String>,
    /// Back the memory with huge pages
    #[arg(long, requires = "kernel")]
    pub huge: bool,
    /// Virtual processors [default: 1]
    #[arg(long, value_name = "N", requires = "kernel")]
    pub vcpus: Option<u32>,
    /// Initial RAM file system
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line [default: console=ttyS0]
    #[arg(long, value_name = "TEXT", requires = "kernel")]
    pub cmdline: Option<String>,
    /// Adapter: keys of a [[vm.NAME.nic]] table, such as name=eth0,switch=lab,queues=4,access=10
    #[arg(long, value_name = "KEY=VALUE,...", requires = "kernel")]
    pub nic: Vec<String>,
    /// When to start it again by itself [default: on-crash]
    #[arg(long, value_name = "POLICY", requires = "kernel")]
    pub restart: Option<Restart>,
    /// Processor that the guest is to see, such as x86-64-v2 or haswell
    #[arg(long, value_name = "NAME", requires = "kernel")]
    pub baseline: Option<String>,
    /// More keys of the configuration's vm table, such as '{"services": {"vss": false}}'
    #[arg(long, value_name = "JSON", requires = "kernel")]
    pub with: Option<String>,
    /// Start it too
    #[arg(long)]
    pub start: bool,
    /// Do nothing if there is such a VM
    #[arg(long)]
    pub may_exist: bool,
}

/// When a VM is started again by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Restart {
    /// Never
    Never,
    /// If its worker died or its guest crashed
    OnCrash,
    /// Also if its guest switched itself off
    Always,
}

/// `yard vm set`
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("vm-change").required(true).multiple(true)))]
pub struct VmSet {
    /// Which VM
    pub vm: String,
    /// Memory to move the guest to, such as 768M
    #[arg(long, value_name = "SIZE", group = "vm-change")]
    pub memory: Option<String>,
    /// Part of what is scarce, against the weights of others, 1 to 10000
    #[arg(long, value_name = "N", group = "vm-change")]
    pub cpu_weight: Option<u32>,
    /// Percent of its virtual processors that it gets at most
    #[arg(long, value_name = "PERCENT", group = "vm-change")]
    pub cpu_limit: Option<u32>,
    /// Percent of its virtual processors that it gets at least
    #[arg(long, value_name = "PERCENT", group = "vm-change")]
    pub cpu_reserve: Option<u32>,
}

/// `yard vm nic …`
#[derive(Debug, Subcommand)]
pub enum NicCommand {
    /// Plug in an adapter
    Add(NicAdd),
    /// Unplug an adapter
    Remove {
        /// Which VM
        vm: String,
        /// Which adapter
        nic: String,
    },
    /// Change an adapter and its port
    Set {
        /// Which VM
        vm: String,
        /// Which adapter
        nic: String,
        /// Station address; only while the VM is off
        #[arg(long, group = "ChangeArgs")]
        mac: Option<String>,
        /// Plug the cable in or out
        #[arg(long, value_name = "STATE", group = "ChangeArgs")]
        link: Option<LinkWanted>,
        #[command(flatten)]
        #[expect(missing_docs, reason = "a comment here would become the command's help")]
        change: ChangeArgs,
    },
}

/// `yard vm nic add`
#[derive(Debug, Args)]
pub struct NicAdd {
    /// Which VM
    pub vm: String,
    /// Name of the adapter
    pub nic: String,
    /// Switch to join
    #[arg(long, value_name = "SWITCH")]
    pub switch: String,
    /// What the guest sees; a legacy adapter can only be added while the VM is off
    #[arg(long = "type", value_name = "TYPE", default_value = "synthetic")]
    pub kind: NicType,
    /// Station address [default: made of the names]
    #[arg(long)]
    pub mac: Option<String>,
    /// Channels at most [default: 1]
    #[arg(long, value_name = "N")]
    pub queues: Option<u16>,
    /// Longest IP packet in bytes [default: 1500]
    #[arg(long, value_name = "BYTES")]
    pub mtu: Option<u32>,
    /// Allow other source addresses than the adapter's
    #[arg(long)]
    pub mac_spoofing: bool,
    #[command(flatten)]
    #[expect(missing_docs, reason = "a comment here would become the command's help")]
    pub vlan: super::args::VlanArgs,
    /// More keys of the configuration's nic table, such as '{"offloads": false}'
    #[arg(long, value_name = "JSON")]
    pub with: Option<String>,
}

/// A cable, as the guest sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LinkWanted {
    /// In
    Up,
    /// Out
    Down,
}

/// What a guest sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum NicType {
    /// A VMBus adapter
    Synthetic,
    /// An emulated adapter
    Legacy,
}

/// `yard vm value …`
#[derive(Debug, Subcommand)]
pub enum ValueCommand {
    /// Show the values that the guest tells
    Show {
        /// Which VM
        vm: String,
    },
    /// Give the guest a value
    Set {
        /// Which VM
        vm: String,
        /// Key
        key: String,
        /// Value
        value: String,
    },
    /// Take a value back
    Remove {
        /// Which VM
        vm: String,
        /// Key
        key: String,
    },
}
