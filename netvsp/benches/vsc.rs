//! Frames from one guest through the switch to another, over the real device: guest's driver, rings, switch, rings.
//!
//! This thread plays both guests and the switch has one worker, so the figures include the guests' own work: the copy into
//! a send section (or its page list), and the reading of completions. Frames go in batches that the receiver's buffer
//! holds; a batch begins when the one before has arrived.

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use netvsp::protocol::packet::Lso;
use netvsp::vsc::rig::{Rig, RigError, address};
use netvsp::vsc::{Config, Guest, Transmit};

/// Ethernet, IPv4 and TCP, as for a large send.
fn frame(len: usize) -> Vec<u8> {
    let mut frame = [address(2).0, address(1).0].concat();
    frame.extend([8, 0, 0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    frame.extend([0x10, 0, 0, 80, 0, 0, 1, 0, 0, 0, 2, 0, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
    frame.resize(len, 0x5a);
    frame
}

/// Sends `count` frames in batches and waits until `bytes` of each have come.
fn move_frames(
    one: &mut Guest,
    two: &mut Guest,
    frame: &[u8],
    transmit: &Transmit,
    batch: u64,
    count: u64,
) -> Duration {
    two.count();
    let started = Instant::now();
    let mut left = count;
    while left > 0 {
        let batch = batch.min(left);
        let mut sent = 0;
        while sent < batch {
            if one.send(frame, transmit).expect("ring") {
                sent += 1;
            } else {
                one.flush();
                one.poll().expect("completions");
            }
        }
        one.flush();
        let (wanted, mut came) = (batch * frame.len() as u64, 0);
        while came < wanted {
            two.poll().expect("frames");
            // With their headers they are longer than what was sent.
            came += two.count().1;
            one.poll().expect("completions");
        }
        left -= batch;
    }
    started.elapsed()
}

fn bench(criterion: &mut Criterion) -> Result<(), RigError> {
    let mut rig = Rig::new(vec![1])?;
    let config = Config { mtu: 9000, receive_pages: 4096, ..Config::default() };
    let mut one = rig.guest(1, |_| (), config.clone())?;
    let mut two = rig.guest(2, |_| (), config)?;
    let mut group = criterion.benchmark_group("vsc");
    let large = Transmit::default().large(Lso { mss: 1448, tcp_offset: 34, ipv6: false });
    for (name, len, transmit, batch) in [
        ("64", 64, Transmit::default(), 128),
        ("1500", 1500, Transmit::default(), 128),
        ("9000", 9000, Transmit::default(), 32),
        ("64KiB", 65_000, large, 16),
    ] {
        let frame = frame(len);
        group.throughput(Throughput::ElementsAndBytes { elements: 1, bytes: len as u64 });
        group.bench_function(BenchmarkId::from_parameter(name), |bencher| {
            bencher.iter_custom(|count| {
                black_box(move_frames(&mut one, &mut two, &frame, &transmit, batch, count))
            });
        });
    }
    Ok(())
}

fn run(criterion: &mut Criterion) {
    bench(criterion).expect("rig");
}

criterion_group!(benches, run);
criterion_main!(benches);
