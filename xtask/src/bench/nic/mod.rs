//! A guest's network card in the nested host: ours, synthetic and emulated, beside QEMU's, with the same guest kernel and
//! root file system, in the same run.
//!
//! | piece | what it compares |
//! |---|---|
//! | [`boot`] | from the VMM's start to the guest's init |
//! | [`host`] | one guest with each card, TCP and UDP to and from the nested host |
//! | [`pair`] | two guests on one switch, with and without segmentation offload, and with long frames |
//! | [`queues`] | four queues on four virtual processors, against one |
//! | [`memory`] | what a VM's worker takes beside its guest's memory |
//!
//! The guests of a piece run side by side in one nested host, and are stopped (SIGSTOP) but for those that are measured.

mod boot;
mod cost;
mod host;
mod memory;
mod ours;
mod pair;
mod queues;

use std::time::Duration;

use anyhow::{Result, ensure};
use switchyard_tests::iperf::{Load, iperf};
use switchyard_tests::lab::Lab;
use switchyard_tests::nested::{Host, HostSpec};
use switchyard_tests::station::Station;

use self::ours::Ours;
use super::plan::{Figure, Plan};
use super::table::{Report, Table};

/// For a guest to boot, and for the nested host itself.
const BOOT: Duration = Duration::from_secs(180);
/// Nested hosts for one piece.
const ATTEMPTS: u32 = 6;

/// For what takes next to no time.
const SHORT: Duration = Duration::from_secs(30);
/// Memory of every guest, in MiB.
const GUEST_MEMORY_MB: u32 = 256;
/// For the nested host's own files, and for as many guests as a piece has.
const HOST_MEMORY_MB: u32 = 3072;

const TCP: Load = Load::Tcp { streams: 1 };

/// A part of the bench that can be measured alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Piece {
    /// From the VMM's start to the guest's init.
    Boot,
    /// TCP between one guest and the nested host, each card.
    Host,
    /// The shortest frames, from one guest to the nested host, each card.
    Udp,
    /// Two guests on one switch.
    Pair,
    /// Four queues against one.
    Queues,
    /// The worker's own memory.
    Memory,
}

impl Piece {
    const ALL: [Self; 6] = [Self::Boot, Self::Host, Self::Udp, Self::Pair, Self::Queues, Self::Memory];
}

/// What to measure and where.
#[derive(Debug, Clone, clap::Args)]
#[group(id = "nic")]
pub struct Options {
    /// Only these pieces (nic).
    #[arg(long, value_delimiter = ',')]
    only: Vec<Piece>,
    /// Processors of the nested host (nic).
    #[arg(long, default_value_t = 2)]
    host_cpus: u32,
    /// Processors of the nested host on which our switch works (nic).
    #[arg(long, value_delimiter = ',', default_value = "1")]
    switch_cpus: Vec<usize>,
    /// Processors of this machine that those of the nested host run on; all if none is named (nic).
    #[arg(long, value_delimiter = ',')]
    pin: Vec<usize>,
    /// More words for the nested host's kernel, such as loglevel=7 (nic).
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    host_arguments: String,
    /// Say what each measurement of TCP cost: exits, interrupts, processor time (nic).
    #[arg(long)]
    costs: bool,
}

/// The nested host, with our daemon in it.
#[derive(Debug)]
struct Stage<'a> {
    plan: &'a Plan,
    costs: bool,
    ours: Ours,
    // Dropped after what runs in it.
    host: Host,
}

impl<'a> Stage<'a> {
    fn set(plan: &'a Plan, options: &Options, lab: &Lab) -> Result<Self> {
        let spec = HostSpec {
            memory_mb: HOST_MEMORY_MB,
            cpus: options.host_cpus,
            pin: options.pin.clone(),
            kernel_arguments: options.host_arguments.clone(),
            ..HostSpec::new(&plan.programs)
        };
        let host = Host::boot(lab, &spec, BOOT)?;
        plan.say(format_args!("the nested host is up after {:.1} s", host.boot_time().as_secs_f64()));
        Ok(Self { plan, costs: options.costs, ours: Ours::start(&host, &options.switch_cpus)?, host })
    }

    fn measure(&self, piece: Piece) -> Result<Table> {
        match piece {
            Piece::Boot => boot::run(self),
            Piece::Memory => memory::run(self),
            Piece::Host => host::tcp(self),
            Piece::Udp => host::udp(self),
            Piece::Pair => pair::run(self),
            Piece::Queues => queues::run(self),
        }
    }
}

/// Measures the pieces that are asked for, all if none is, each in a nested host of its own. One that fails does not keep the
/// others from being measured.
pub fn run(plan: &Plan, options: &Options, report: &mut Report) -> Result<()> {
    let pieces = if options.only.is_empty() { &Piece::ALL[..] } else { &options.only };
    let mut failures = Vec::new();
    for &piece in pieces {
        match measure(plan, options, piece) {
            Ok(table) => report.tables.push(table),
            Err(error) => {
                plan.say(format_args!("{piece:?} failed: {error:#}"));
                failures.push(format!("{piece:?}"));
            }
        }
    }
    ensure!(!report.tables.is_empty(), "nothing was measured: {}", failures.join(", "));
    if !failures.is_empty() {
        report.failed = Some(failures.join(", "));
    }
    Ok(())
}

/// The software CPU's nested virtualization loses guests, of ours and of QEMU's, and the nested host itself: the piece then
/// goes on in another nested host, with the rounds it has.
fn measure(plan: &Plan, options: &Options, piece: Piece) -> Result<Table> {
    let lab = Lab::shared()?;
    plan.keep_rounds();
    let mut attempt = 1;
    loop {
        let table = Stage::set(plan, options, &lab).and_then(|stage| stage.measure(piece));
        match table {
            Err(error) if attempt < ATTEMPTS => {
                plan.say(format_args!("{piece:?} goes on in another nested host: {error:#}"));
                attempt += 1;
            }
            outcome => return outcome,
        }
    }
}

/// As the guest sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Transmit,
    Receive,
}

/// One line of a table between a guest and the nested host.
#[derive(Debug, Clone, Copy)]
struct Line {
    what: &'static str,
    unit: &'static str,
    way: Way,
    load: Load,
}

impl Line {
    fn figure(&self) -> Figure {
        Figure::new(self.what, self.unit)
    }
}

/// Sends `load` from one station to another at `address`: Mbit/s of TCP, or thousands of datagrams a second, that arrive.
fn send(from: &dyn Station, to: &dyn Station, address: &str, load: Load, seconds: u32) -> Result<f64> {
    let report = iperf(to, from, address, load, seconds)?;
    Ok(match load {
        Load::Tcp { .. } => report.bits_per_second / 1e6,
        Load::Udp { .. } => report.packets_per_second / 1e3,
    })
}
