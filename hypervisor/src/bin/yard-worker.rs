//! Runs one virtual machine. Started by `yardd`, or by hand with `--standalone`.

#![forbid(unsafe_code)]

use std::io::IsTerminal;

use clap::Parser;
use hypervisor::{standalone, worker};

/// Runs one virtual machine
///
/// Without --standalone it is started by yardd, which hands it all it needs over file descriptor 3.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Run a guest in the foreground, its console on standard input and output, without a switch
    #[arg(long, requires = "kernel")]
    standalone: bool,
    #[command(flatten)]
    options: standalone::Options,
}

fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into()),
        )
        .with_ansi(std::io::stderr().is_terminal())
        .without_time()
        .init();
    die_of_panics();
    // As yardd starts it: everything comes over a socket.
    if std::env::args_os().len() == 1 {
        return worker::run();
    }
    match Arguments::parse() {
        Arguments { standalone: true, options } => standalone::run(options),
        _ => anyhow::bail!("started by hand without --standalone"),
    }
}

/// A thread that panicked would leave the others waiting for it. The daemon says what the log ends with, and restarts the VM if
/// its policy is so.
fn die_of_panics() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        std::process::abort();
    }));
}
