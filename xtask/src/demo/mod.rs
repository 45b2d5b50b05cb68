//! `cargo xtask demo`: the main jobs on real input, in about a minute.

mod machines;
mod switch;
mod venue;

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;

use crate::build;

/// Options of `cargo xtask demo`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Which part [default: both]
    act: Option<Act>,
    /// Folder that captures are left in [default: target/demo]
    #[arg(long)]
    output: Option<PathBuf>,
    /// Shows the programs in this folder instead of a fresh release build
    #[arg(long)]
    programs: Option<PathBuf>,
    /// The guests' kernel and root file system, where neither can be made on the spot (machines)
    #[arg(long, num_args = 2, value_names = ["KERNEL", "INITRD"])]
    guest: Option<Vec<PathBuf>>,
}

/// A part of the demo.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Act {
    /// Two Debian guests under our hypervisor, with synthetic network cards on a private switch
    Machines,
    /// One switch that joins QEMU guests, namespaces and a replayed capture
    Switch,
}

/// What an act needs.
#[derive(Debug)]
struct Scene {
    /// Where our programs are.
    programs: PathBuf,
    /// Where captures are left.
    output: PathBuf,
    /// A kernel and a root file system that were given.
    guest: Option<[PathBuf; 2]>,
    start: Instant,
}

impl Scene {
    /// Prints what is being done, with the seconds since the start.
    fn say(&self, what: impl std::fmt::Display) {
        println!("[{:5.1} s] {what}", self.start.elapsed().as_secs_f32());
    }
}

/// Shows both parts, or the one that was asked for. Where this machine cannot show the switch, the plain demo says why and
/// goes without.
pub fn run(options: &Options) -> Result<()> {
    let programs = match &options.programs {
        Some(folder) => std::path::absolute(folder)?,
        None => build::release_for_nested()?,
    };
    let output = options.output.clone().unwrap_or_else(|| build::target().join("demo"));
    let output = std::path::absolute(output)?;
    std::fs::create_dir_all(&output)?;
    let guest = options.guest.clone().and_then(|guest| <[PathBuf; 2]>::try_from(guest).ok());
    let scene = Scene { programs, output, guest, start: Instant::now() };
    match options.act {
        Some(Act::Machines) => machines::run(&scene)?,
        Some(Act::Switch) => switch::run(&scene)?,
        None => {
            machines::run(&scene)?;
            match switch::lacks() {
                None => switch::run(&scene)?,
                Some(reason) => scene.say(format_args!("the switch is not shown here: {reason}")),
            }
        }
    }
    scene.say(format_args!(
        "done; everything that was started is gone, captures are in {}",
        scene.output.display()
    ));
    Ok(())
}
