//! The life of `yardd`: configuration, switches, API, signals, end.

pub mod args;
mod notify;

use std::ffi::OsString;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use clap::Parser;
use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tracing_subscriber::EnvFilter;
use vswitch::fabric::{Fabric, run_offline};
use vswitch::spec::Attachment;

use self::args::Yardd;
use self::notify::notify;
use crate::api::{Api, Limits, Listener, serve};
use crate::cli::{colour, offline_table};
use crate::config::{Config, Machine, load};
use crate::vm::spec::VmSpec;
use crate::vm::{
    Cgroups, Launcher, Manager, PagePolicy, Parking, Patience, Reserves, Settings, Users, Wiring,
};

/// Runs `yardd` with the words of its command line; returns the exit status.
pub fn main(words: impl IntoIterator<Item = OsString>) -> u8 {
    let args = match Yardd::try_parse_from(words) {
        Ok(args) => args,
        Err(error) => {
            let _ = error.print();
            return u8::try_from(error.exit_code()).unwrap_or(2);
        }
    };
    if let Err(error) = log(&args.log) {
        eprintln!(
            "yardd: --log: {error}, expected error, warn, info, debug, trace or a filter such as vswitch=debug"
        );
        return 2;
    }
    let config = match load(&args.config, &Machine::this()) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("{error}");
            return 1;
        }
    };
    let outcome = match (args.check, args.offline) {
        (true, _) => check(&args.config, &config),
        (_, true) => offline(config),
        _ => run(config, args.worker),
    };
    match outcome {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("yardd: {error:#}");
            1
        }
    }
}

/// Logs to standard error, coloured on a terminal.
fn log(filter: &str) -> Result<(), tracing_subscriber::filter::ParseError> {
    let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::builder().parse(filter)?)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal() && !no_color)
        .init();
    Ok(())
}

fn check(file: &Path, config: &Config) -> anyhow::Result<()> {
    let ports: usize = config.switches.iter().map(|switch| switch.ports.len()).sum();
    let switches = config.switches.len();
    let vms = match config.vms.len() {
        0 => String::new(),
        count => format!(", {count} virtual machines"),
    };
    writeln!(io::stdout(), "{}: good: {switches} switches, {ports} ports{vms}", file.display())?;
    Ok(())
}

fn offline(config: Config) -> anyhow::Result<()> {
    let switches = config.switches.into_iter().map(|switch| (switch.switch, switch.ports));
    let report = run_offline(switches.collect())?;
    write!(io::stdout(), "{}", offline_table(&report, colour()))?;
    Ok(())
}

fn run(config: Config, worker: Option<PathBuf>) -> anyhow::Result<()> {
    raise_descriptor_limit();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        // One for each request that waits: for a guest, a disk, or nobody.
        .max_blocking_threads(64)
        .thread_name("control")
        .build()
        .context("the control plane cannot start")?;
    runtime.block_on(life(config, worker))
}

/// Every port takes descriptors, and the usual soft limit of 1024 is for programs that use select(2).
fn raise_descriptor_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!("the limit of open descriptors stays as it is: {error}");
    }
}

async fn life(mut config: Config, worker: Option<PathBuf>) -> anyhow::Result<()> {
    // From here on signals end the daemon in good order, also while it starts.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    // The socket comes first: a second daemon must not touch the devices of the first.
    let listener = Listener::bind(&config.socket)?;
    let fabric = Fabric::start(config.workers.clone()).context("the switch cannot start")?;
    let vms = Arc::new(machines(&config, worker, &fabric));
    let configured = std::mem::take(&mut config.vms);
    let applied = {
        let fabric = Arc::clone(&fabric);
        tokio::task::spawn_blocking(move || apply(&fabric, config)).await?
    };
    if let Err(error) = applied {
        end(fabric).await?;
        return Err(error);
    }
    begin(&vms, configured).await?;
    tracing::info!("serving at {}", listener.path().display());
    let (stop, stopped) = watch::channel(false);
    let backend = Arc::clone(&fabric);
    let server =
        tokio::spawn(serve(listener, Api::new(backend, Arc::clone(&vms), Limits::default()), stopped));
    notify("READY=1");
    let cause = loop {
        tokio::select! {
            _ = terminate.recv() => break "SIGTERM",
            _ = interrupt.recv() => break "SIGINT",
            _ = hangup.recv() => tracing::warn!(
                "SIGHUP: the configuration is not read again while the daemon runs; use yard, or restart yardd"
            ),
        }
    };
    tracing::info!("{cause}: ending");
    notify("STOPPING=1");
    let _ = stop.send(true);
    server.await?;
    // The VMs go on; whoever comes next takes them back.
    tokio::task::spawn_blocking(move || vms.end()).await?;
    end(fabric).await
}

/// The virtual machines: their directories lie beside the API's socket.
fn machines(config: &Config, worker: Option<PathBuf>, fabric: &Arc<Fabric>) -> Manager {
    let beside = config.socket.parent().unwrap_or(Path::new("/"));
    let mut launcher = Launcher::installed();
    launcher.program = worker.unwrap_or(launcher.program);
    Manager::new(Settings {
        root: std::path::absolute(beside).unwrap_or_else(|_| beside.to_owned()).join("vm"),
        launcher,
        network: Arc::new(Wiring::new(Arc::clone(fabric))),
        cgroups: Cgroups::of_this_host(),
        pages: PagePolicy::of_this_host(),
        cpus: Machine::this().cpus,
        parking: Parking::default(),
        patience: Patience::default(),
        reserves: Reserves::default(),
        users: Users::of_this_host(),
    })
}

/// Takes back the VMs that run, and starts those that start with the daemon. One that cannot keeps no other from it.
async fn begin(vms: &Arc<Manager>, configured: Vec<VmSpec>) -> anyhow::Result<()> {
    let vms = Arc::clone(vms);
    for problem in tokio::task::spawn_blocking(move || vms.begin(configured)).await? {
        tracing::error!("{problem}");
    }
    Ok(())
}

async fn end(fabric: Arc<Fabric>) -> anyhow::Result<()> {
    Ok(tokio::task::spawn_blocking(move || fabric.shutdown()).await?)
}

/// Makes what the configuration asks for; everything that cannot be made is reported at once.
fn apply(fabric: &Fabric, config: Config) -> anyhow::Result<()> {
    let mut refused = Vec::new();
    let mut ports = Vec::new();
    for wanted in config.switches {
        let name = wanted.switch.name.clone();
        match fabric.add_switch(wanted.switch) {
            Ok(()) => ports.extend(wanted.ports.into_iter().map(|port| (name.clone(), port))),
            Err(error) => refused.push(format!("switch.{name}: {error}")),
        }
    }
    // A capture is played to all the others.
    ports.sort_by_key(|(_, port)| matches!(port.attachment, Attachment::Pcap { read: Some(_), .. }));
    for (switch, port) in ports {
        let path = format!("switch.{switch}.port.{}", port.name);
        if let Err(error) = fabric.add_port(&switch, port) {
            refused.push(format!("{path}: {error}"));
        }
    }
    if refused.is_empty() { Ok(()) } else { Err(anyhow::anyhow!("{}", refused.join("\nyardd: "))) }
}
