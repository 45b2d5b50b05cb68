//! How fast the pipeline learns: bursts whose frames all come from new stations, until a full table is known. Prints
//! JSON.

#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::Instant;

use anyhow::ensure;
use clap::Parser;
use vmq::frame::{BURST_FRAMES, Burst, FrameStore, Offload};
use vswitch::fdb::{Config, Fdb};
use vswitch::pipeline::{Plan, forward};
use vswitch::tally::Tally;
use vswitch::topology::{Rules, Topology, VlanRule};

/// Learns addresses as fast as the pipeline does.
#[derive(Debug, Parser)]
struct Arguments {
    /// Addresses to learn; the table holds no more.
    #[arg(long, default_value_t = 1 << 20, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    addresses: u32,
}

/// The one destination: known before, so that only learning is measured.
const STATION: [u8; 6] = [2, 0xff, 0, 0, 0, 1];

fn main() -> anyhow::Result<()> {
    let addresses = Arguments::parse().addresses;
    let rules = || Some(Rules { source: None, vlan: VlanRule::Passthrough, private: None, mtu: 1500 });
    // One for the station.
    let config = Config { capacity: addresses + 1, ports: 2, ..Config::default() };
    let topology = Topology::new(vec![rules(), rules()], Arc::new(Fdb::new(config, [0xfeed, 0xbeef])));
    let mut bytes = [0; 64];
    bytes[12..14].copy_from_slice(&[0x88, 0xb5]);

    let mut store = FrameStore::default();
    let mut burst = Burst::new(&mut store);
    while burst.len() < BURST_FRAMES && burst.push(bytes.as_slice().into(), Offload::default()) {}
    let (mut plan, mut tally) = (Plan::default(), Tally::default());
    address(&mut burst, [2, 0xfe, 0, 0, 0, 0], || STATION);
    forward(&topology, 1, 0, &mut burst, &mut plan, &mut tally);

    let mut next = 0u32;
    let start = Instant::now();
    while next < addresses {
        address(&mut burst, STATION, || {
            let [a, b, c, d] = next.to_be_bytes();
            next = next.wrapping_add(1);
            [2, 0, a, b, c, d]
        });
        forward(&topology, 0, 0, &mut burst, &mut plan, &mut tally);
    }
    let seconds = start.elapsed().as_secs_f64();
    let learned = topology.fdb.stats().entries.saturating_sub(1);
    ensure!(learned >= addresses, "only {learned} of {addresses} addresses were learnt");
    let line = serde_json::json!({
        "learned": learned,
        "seconds": seconds,
        "per_second": f64::from(learned) / seconds,
    });
    println!("{line}");
    Ok(())
}

fn address(burst: &mut Burst<'_>, to: [u8; 6], mut from: impl FnMut() -> [u8; 6]) {
    for frame in burst.frames_mut() {
        frame.head[..6].copy_from_slice(&to);
        frame.head[6..12].copy_from_slice(&from());
    }
}
