//! Frames from one synthetic adapter through the switch to another, over the real device: guest's driver, rings, switch,
//! rings. No processor is virtual.
//!
//! This thread plays both guests and the switch has one worker, so frames a second include the guests' own work: the copy
//! into a send section (or its page list), and the reading of completions. What the switch alone spends on a frame is told
//! by its worker's own count, in the table at the end: taking it, switching it, the one copy, both completions' share.
//! Frames go in batches that the receiver's buffer holds thrice; a batch begins when the one before has arrived, all of
//! it: what the receiver gave back may wait in its ring until the worker looks at a doorbell, up to 1024 frames later. A
//! batch of which nothing arrives any more has lost frames, and ends the run.
//!
//! `cargo bench -p switchyard-benches --bench vsc`; `-- table` prints the table only.

use std::hint::black_box;
use std::time::{Duration, Instant};

use anyhow::Result;
use criterion::{BenchmarkId, Criterion, Throughput};
use netvsp::protocol::packet::Lso;
use netvsp::vsc::rig::{Rig, address};
use netvsp::vsc::{Config, Guest, Transmit};

/// Processor of the switch's worker.
const WORKER: usize = 1;

/// Rounds that each row of the table is the median of, and what a round moves at most: bytes and frames.
const ROUNDS: usize = 9;
const ROUND_BYTES: u64 = 1 << 30;
const ROUND_FRAMES: u64 = 200_000;

/// How long nothing may arrive.
const PATIENCE: Duration = Duration::from_secs(10);

/// Bytes of the shortest RNDIS header of a received frame.
const HEADER: u64 = 44;

/// How frames are sent.
struct Load {
    name: &'static str,
    len: usize,
    /// Frames in one message of the guest, as Linux packs them when there are more to come.
    together: usize,
    large: bool,
    batch: u64,
}

const LOADS: [Load; 5] = [
    Load { name: "64", len: 64, together: 1, large: false, batch: 128 },
    Load { name: "64, 8 in a message", len: 64, together: 8, large: false, batch: 512 },
    Load { name: "1500", len: 1500, together: 1, large: false, batch: 128 },
    Load { name: "9000", len: 9000, together: 1, large: false, batch: 32 },
    Load { name: "64 KiB LSO to RSC", len: 65_000, together: 1, large: true, batch: 16 },
];

/// Two guests on a switch.
struct Pair {
    rig: Rig,
    one: Guest,
    two: Guest,
}

impl Pair {
    fn new() -> Result<Self> {
        let mut rig = Rig::new(vec![WORKER])?;
        let config = Config { mtu: 9000, receive_pages: 4096, ..Config::default() };
        let one = rig.guest(1, |_| (), config.clone())?;
        let mut two = rig.guest(2, |_| (), config)?;
        // The switch learns where the receiver is, and floods nothing.
        two.send(&[address(1).0.as_slice(), &address(2).0, &[0x5a; 48]].concat(), &Transmit::default())?;
        two.flush();
        Ok(Self { rig, one, two })
    }

    /// Sends `count` frames in batches and waits for each batch.
    fn carry(&mut self, load: &Load, count: u64) -> Result<Duration> {
        let Self { rig, one, two } = self;
        let frame = frame(load);
        let together = vec![frame.as_slice(); load.together];
        let mut transmit = Transmit::default();
        if load.large {
            transmit = transmit.large(Lso { mss: 1448, tcp_offset: 34, ipv6: false });
        }
        two.count();
        let started = Instant::now();
        let mut left = count;
        while left > 0 {
            let batch = load.batch.min(left).next_multiple_of(load.together as u64);
            let mut sent = 0;
            while sent < batch {
                if one.send_together(&together, &transmit)? {
                    sent += load.together as u64;
                } else {
                    one.flush();
                    one.poll()?;
                }
            }
            one.flush();
            let (mut missing, mut since) = (batch * load.len as u64, Instant::now());
            while missing > 0 {
                two.poll()?;
                let (ranges, bytes) = two.count();
                // The last part of a large frame never comes without the others, and what the parts' headers have in
                // excess does not come to a frame.
                let came = if load.large { bytes - ranges * HEADER } else { ranges * load.len as u64 };
                missing = missing.saturating_sub(came);
                one.poll()?;
                if came > 0 {
                    since = Instant::now();
                } else if since.elapsed() > PATIENCE {
                    anyhow::bail!("{missing} bytes of a batch are lost: {:?}", drops(rig));
                }
            }
            left -= batch.min(left);
        }
        Ok(started.elapsed())
    }

    /// Nanoseconds that the switch was busy, and frames that it took from the first guest.
    fn spent(&self) -> (u64, u64) {
        let report = self.rig.fabric().report();
        let ports = report.switches.iter().flat_map(|switch| &switch.ports);
        ports.fold((0, 0), |(nanos, frames), port| {
            (nanos + port.received.busy_nanos, frames + port.received.frames)
        })
    }
}

/// Frames that did not reach a guest, by port and reason.
fn drops(rig: &Rig) -> Vec<String> {
    let report = rig.fabric().report();
    let ports = report.switches.iter().flat_map(|switch| &switch.ports);
    ports.map(|port| format!("{}: {:?} {:?}", port.name, port.received.drops, port.sent.drops)).collect()
}

/// Ethernet, IPv4, and TCP for a large send, else UDP, which nobody coalesces.
fn frame(load: &Load) -> Vec<u8> {
    let protocol = if load.large { 6 } else { 17 };
    let mut frame = [address(2).0, address(1).0].concat();
    frame.extend([8, 0, 0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    frame.extend([0x10, 0, 0, 80, 0, 0, 1, 0, 0, 0, 2, 0, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
    frame.resize(load.len, 0x5a);
    frame
}

fn bench(criterion: &mut Criterion) -> Result<()> {
    let mut pair = Pair::new()?;
    let mut group = criterion.benchmark_group("vsc");
    for load in &LOADS {
        group.throughput(Throughput::ElementsAndBytes { elements: 1, bytes: load.len as u64 });
        group.bench_function(BenchmarkId::from_parameter(load.name), |bencher| {
            bencher.iter_custom(|count| match pair.carry(load, count) {
                Ok(elapsed) => black_box(elapsed),
                Err(error) => panic!("{error}"),
            });
        });
    }
    Ok(())
}

/// Cycles of the time stamp counter a nanosecond.
fn gigahertz() -> f64 {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let megahertz = info.lines().find_map(|line| line.strip_prefix("cpu MHz")?.split(':').nth(1));
    megahertz.and_then(|value| value.trim().parse::<f64>().ok()).unwrap_or(1000.0) / 1000.0
}

/// All loads, round after round, as a table of medians.
fn table() -> Result<()> {
    let mut pair = Pair::new()?;
    println!("| frame (bytes) | frames/s | Gbit/s | cycles a frame in the switch |");
    println!("|---|--:|--:|--:|");
    for load in &LOADS {
        let count = (ROUND_BYTES / load.len as u64).min(ROUND_FRAMES);
        let (mut rates, mut cycles) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let before = pair.spent();
            let seconds = pair.carry(load, count)?.as_secs_f64();
            let after = pair.spent();
            let frames = (after.1 - before.1) as f64;
            rates.push(frames / seconds);
            cycles.push((after.0 - before.0) as f64 / frames * gigahertz());
        }
        let (rate, cycles) = (median(rates), median(cycles));
        let gigabits = rate * load.len as f64 * 8e-9;
        println!("| {} | {rate:.0} | {gigabits:.1} | {cycles:.0} |", load.name);
    }
    Ok(())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

fn main() -> Result<()> {
    if !std::env::args().any(|argument| argument == "table") {
        let mut criterion = Criterion::default().configure_from_args();
        bench(&mut criterion)?;
        criterion.final_summary();
    }
    table()
}
