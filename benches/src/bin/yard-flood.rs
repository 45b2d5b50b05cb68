//! Sends UDP datagrams as fast as one thread can, whether or not anybody listens, and prints how many as JSON. The
//! receiver's side is counted by its device: a program that reads them would be slower than the switch.

#![forbid(unsafe_code)]

use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use clap::Parser;

/// Floods an address with datagrams.
#[derive(Debug, Parser)]
struct Arguments {
    /// Address and port.
    to: SocketAddr,
    /// Bytes of payload; 18 make the shortest Ethernet frame.
    #[arg(long, default_value_t = 18, value_parser = clap::value_parser!(u16).range(..=1472))]
    payload: u16,
    /// For how long.
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let socket = UdpSocket::bind(if arguments.to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
    socket.connect(arguments.to)?;
    let payload = vec![0x5a; arguments.payload.into()];
    let window = Duration::from_secs_f64(arguments.seconds);
    let (start, mut sent) = (Instant::now(), 0u64);
    while start.elapsed() < window {
        for _ in 0..64 {
            // "Nobody listens" comes back now and then, and is no reason to stop.
            sent += u64::from(socket.send(&payload).is_ok());
        }
    }
    println!("{}", serde_json::json!({ "sent": sent, "seconds": start.elapsed().as_secs_f64() }));
    Ok(())
}
