//! `cargo xtask bench`: every figure of the README, beside those of peers measured in the same run.
//!
//! All benches work alike: the peers are set up side by side and frozen; then [`plan::Plan`] lets one at a time run, round
//! after round, and the medians are set against each other. `docs/performance.md` says what each one measures.

mod generator;
mod goal;
mod guests;
mod machine;
mod namespaces;
mod nic;
mod peers;
mod plan;
mod restart;
mod scale;
mod silent;
mod table;
mod tap;
mod vhost;
mod wake;

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use switchyard_tests::lab::Lab;
use switchyard_tests::setup::{self, Need};

use self::plan::Plan;
use self::table::Report;
use crate::build;

/// Options of `cargo xtask bench`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// What to measure.
    what: What,
    /// Rounds; one more is made before them and thrown away.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// Seconds that each peer is measured in a round.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=600))]
    seconds: u32,
    /// Packed rings (vhost and generator).
    #[arg(long)]
    packed: bool,
    /// Only these frame sizes, such as 64,1518 (vhost and generator).
    #[arg(long, value_delimiter = ',')]
    frames: Vec<u32>,
    /// Measure the programs in this folder instead of a fresh release build.
    #[arg(long)]
    programs: Option<PathBuf>,
    #[command(flatten)]
    nic: nic::Options,
    /// Where the raw figures go [default: target/bench/WHAT.json].
    #[arg(long)]
    json: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum What {
    /// testpmd pair over vhost-user: OVS-DPDK, testpmd io, yardd.
    Vhost,
    /// Saturating driver-side generator: OVS-DPDK, testpmd io, yardd; cycles per packet.
    Generator,
    /// Two QEMU guests: OVS-DPDK, yardd.
    Guests,
    /// Two namespaces over TAP: Linux bridge with veth, OVS userspace, yardd.
    Tap,
    /// Guests' cards in the nested host: ours, synthetic and emulated, QEMU's virtio-net and e1000; boot, memory.
    Nic,
    /// Criterion bench: guest to switch to guest, the guests played in-process over shared memory.
    Vsc,
    /// Many silent ports, many addresses, learning.
    Scale,
    /// What waking from sleep adds to a ping.
    Wake,
    /// How long frames stay away when the daemon is killed and started again.
    Restart,
    /// Criterion benches of the parts.
    Micro,
    /// Everything, one after the other.
    All,
}

impl What {
    const EACH: [Self; 10] = [
        Self::Vhost,
        Self::Generator,
        Self::Guests,
        Self::Tap,
        Self::Nic,
        Self::Vsc,
        Self::Scale,
        Self::Wake,
        Self::Restart,
        Self::Micro,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Vhost => "vhost",
            Self::Generator => "generator",
            Self::Guests => "guests",
            Self::Tap => "tap",
            Self::Nic => "nic",
            Self::Vsc => "vsc",
            Self::Scale => "scale",
            Self::Wake => "wake",
            Self::Restart => "restart",
            Self::Micro => "micro",
            Self::All => "all",
        }
    }

    fn packages(self) -> Vec<&'static str> {
        let packages: &[setup::Packages] = match self {
            Self::Vhost | Self::Generator => &[setup::TESTPMD, setup::OVS],
            Self::Guests => &[setup::GUESTS, setup::OVS],
            Self::Tap => &[setup::NETWORK, setup::OVS],
            Self::Nic => &[setup::NESTED],
            Self::Wake | Self::Restart => &[setup::NETWORK],
            Self::Scale | Self::Vsc | Self::Micro => &[],
            Self::All => return setup::all_packages(),
        };
        packages.concat()
    }

    /// OVS-DPDK takes 512 huge pages, each testpmd 256, of which two run at a time, the generator a few.
    fn needs(self) -> &'static [Need] {
        match self {
            Self::Vhost => &[Need::Root, Need::Processors(2), Need::HugePages(1024)],
            Self::Generator => &[Need::Root, Need::Processors(2), Need::HugePages(832)],
            Self::Guests => &[Need::Root, Need::Processors(2), Need::HugePages(512)],
            Self::Tap | Self::Wake | Self::Restart => {
                &[Need::Root, Need::Processors(2), Need::Tap, Need::Namespaces]
            }
            Self::Nic => &[Need::Processors(2)],
            Self::Scale => &[Need::Root, Need::Processors(2), Need::HugePages(16)],
            Self::Vsc | Self::Micro | Self::All => &[],
        }
    }
}

/// Runs one bench, or all: then one that fails does not keep the others from running.
pub fn run(options: &Options) -> Result<()> {
    if options.what != What::All {
        return run_one(options, options.what);
    }
    ensure!(options.json.is_none(), "--json names one file, and all benches write one each: leave it out");
    let failed: Vec<_> = What::EACH
        .into_iter()
        .filter_map(|what| run_one(options, what).err().map(|error| format!("{}: {error:#}", what.name())))
        .collect();
    ensure!(failed.is_empty(), "benches failed:\n{}", failed.join("\n"));
    Ok(())
}

fn run_one(options: &Options, what: What) -> Result<()> {
    let criterion = ["bench", "--package", "switchyard-benches"];
    match what {
        What::Micro => return build::cargo(&[&criterion[..], &["--bench", "data_path"]].concat()),
        What::Vsc => return build::cargo(&[&criterion[..], &["--bench", "vsc"]].concat()),
        _ => {}
    }
    setup::ensure(&what.packages())?;
    let programs = match &options.programs {
        Some(folder) => std::path::absolute(folder)?,
        None if what == What::Nic => build::release_for_nested()?,
        None => build::release()?,
    };
    // Held to the end: nothing else of the lab may run beside a measurement.
    let _machine = Lab::exclusive()?;
    if let Some(reason) = setup::lacks(what.needs()) {
        bail!("the bench {} cannot run here: {reason}", what.name());
    }
    machine::warn_if_busy();
    let plan = Plan::new(programs, options.runs, options.seconds);
    let mut report = Report::new(what.name(), format!("{} rounds of {} s", options.runs, options.seconds));
    match what {
        What::Vhost => vhost::run(&plan, options.packed, &options.frames, &mut report)?,
        What::Generator => generator::run(&plan, options.packed, &options.frames, &mut report)?,
        What::Guests => guests::run(&plan, &mut report)?,
        What::Tap => tap::run(&plan, &mut report)?,
        What::Nic => nic::run(&plan, &options.nic, &mut report)?,
        What::Scale => scale::run(&plan, &mut report)?,
        What::Wake => wake::run(&plan, &mut report)?,
        What::Restart => restart::run(&plan, &mut report)?,
        What::Vsc | What::Micro | What::All => {}
    }
    println!("{}", report.markdown());
    let file = options.json.clone().unwrap_or_else(|| raw_file(options, what));
    report.save(&file).with_context(|| format!("cannot write {}", file.display()))?;
    eprintln!("raw figures: {}", file.display());
    ensure!(report.failed.is_none(), "not measured: {}", report.failed.unwrap_or_default());
    Ok(())
}

fn raw_file(options: &Options, what: What) -> PathBuf {
    let packed = options.packed && matches!(what, What::Vhost | What::Generator);
    let name = format!("{}{}.json", what.name(), if packed { "-packed" } else { "" });
    build::target().join("bench").join(name)
}
