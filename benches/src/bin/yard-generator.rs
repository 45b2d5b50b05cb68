//! Saturates a vhost-user switch through two of its sockets and prints what came through, as JSON.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use switchyard_benches::generator::{self, Load};

/// Two guests in one thread that send to each other as fast as the switch takes.
#[derive(Debug, Parser)]
struct Arguments {
    /// Socket of the first port.
    a: PathBuf,
    /// Socket of the second port.
    b: PathBuf,
    /// Bytes of a frame, without check sequence.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(60..=9000))]
    frame: u32,
    /// Addresses on each side.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    addresses: u32,
    /// Packed rings.
    #[arg(long)]
    packed: bool,
    /// Entries of each ring.
    #[arg(long, default_value_t = 1024)]
    ring: u16,
    /// Processor to run on.
    #[arg(long)]
    cpu: Option<usize>,
    /// Seconds that are measured.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Seconds before.
    #[arg(long, default_value_t = 1.0)]
    warm_up: f64,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    if let Some(cpu) = arguments.cpu {
        vmq::os::pin_thread(cpu)?;
    }
    let load = Load {
        frame: arguments.frame,
        addresses: arguments.addresses,
        packed: arguments.packed,
        ring: arguments.ring,
    };
    let (warm_up, window) =
        (Duration::from_secs_f64(arguments.warm_up), Duration::from_secs_f64(arguments.seconds));
    let outcome = generator::run(&arguments.a, &arguments.b, &load, warm_up, window)?;
    let line = serde_json::json!({
        "received": outcome.received,
        "sent": outcome.sent,
        "seconds": outcome.elapsed.as_secs_f64(),
        "mpps": outcome.mpps(),
    });
    println!("{line}");
    Ok(())
}
