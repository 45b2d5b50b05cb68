//! `cargo xtask nested`: a shell in the nested host, to try things by hand.

use std::io::{Read, Write};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, bail};
use switchyard_tests::lab::Lab;
use switchyard_tests::nested::{Host, HostSpec};
use switchyard_tests::setup;
use switchyard_tests::station::Station;

use crate::build;

const BOOT: Duration = Duration::from_secs(180);

/// Options of `cargo xtask nested`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Runs this line of shell instead, and ends.
    line: Option<String>,
    /// Seconds that the line may take.
    #[arg(long, default_value_t = 300)]
    seconds: u64,
    /// Memory of the nested host in MiB.
    #[arg(long, default_value_t = 3072)]
    memory: u32,
    /// Processors of the nested host.
    #[arg(long, default_value_t = 2)]
    cpus: u32,
    /// Copies a file in first: FILE or FILE:PATH (default: the folder /root).
    #[arg(long)]
    put: Vec<String>,
    /// Puts the programs in this folder aboard instead of a fresh release build.
    #[arg(long)]
    programs: Option<PathBuf>,
}

/// Boots the host, and hands over its shell.
pub fn run(options: &Options) -> Result<()> {
    setup::ensure(setup::NESTED)?;
    let programs = match &options.programs {
        Some(folder) => std::path::absolute(folder)?,
        None => build::release_for_nested()?,
    };
    let lab = Lab::shared()?;
    let spec = HostSpec { memory_mb: options.memory, cpus: options.cpus, ..HostSpec::new(&programs) };
    let host = Host::boot(&lab, &spec, BOOT)?;
    eprintln!("the nested host is up after {:.1} s", host.boot_time().as_secs_f64());
    for put in &options.put {
        let name = put.rsplit('/').next().unwrap_or_default();
        let default = (put.as_str(), format!("/root/{name}"));
        let (file, path) = put.split_once(':').map_or(default, |(file, path)| (file, path.to_owned()));
        host.put(&path, &std::fs::read(file)?)?;
        host.check(&format!("chmod +x {path}"), Duration::from_secs(30))?;
    }
    let status = match &options.line {
        Some(line) => {
            let mut shell = host.open(line)?;
            shell.end_input()?;
            show(&mut shell, Some(Duration::from_secs(options.seconds)))?
        }
        None => interact(&host)?,
    };
    if status != 0 {
        bail!("status {status}");
    }
    Ok(())
}

/// A shell with a terminal of its own in the host, until it ends.
fn interact(host: &Host) -> Result<i32> {
    let mut shell = host.open("exec script -q -c 'exec sh -i' /dev/null")?;
    let feeder = shell.feeder();
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(length) = std::io::stdin().read(&mut buffer) {
            if feeder.input(buffer.get(..length).unwrap_or_default()).is_err() || length == 0 {
                return;
            }
        }
    });
    show(&mut shell, None)
}

fn show(shell: &mut switchyard_tests::nested::link::Conversation, limit: Option<Duration>) -> Result<i32> {
    let start = std::time::Instant::now();
    loop {
        let chunk = shell.chunk(Duration::from_millis(500))?;
        if let Some(chunk) = &chunk {
            std::io::stdout().write_all(chunk)?;
            std::io::stdout().flush()?;
        }
        if chunk.is_some_and(|chunk| chunk.is_empty()) {
            return Ok(shell.wait(Duration::ZERO)?.unwrap_or_default());
        }
        if limit.is_some_and(|limit| start.elapsed() > limit) {
            bail!("still runs after {:.0} s", start.elapsed().as_secs_f64());
        }
    }
}
