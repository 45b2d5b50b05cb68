//! The address table, and the pipeline around it, among few and many addresses.

use std::hint::black_box;
use std::sync::Arc;

use criterion::{BenchmarkId, Criterion, Throughput};
use vmq::frame::{BURST_FRAMES, Burst, FrameStore, Offload};
use vswitch::fdb::{Config, Fdb, Key, Learned, Slot};
use vswitch::pipeline::{Plan, forward};
use vswitch::spec::VlanMode;
use vswitch::tally::Tally;
use vswitch::topology::{Rules, Topology, VlanRule};

use crate::frames::{Transport, ipv4, random, station};

const COUNTS: [u32; 3] = [2, 1024, 1 << 20];

/// So many bursts pass before the addresses come again.
const ROUND: usize = 1024;

/// A table of `count` addresses: those with even numbers on port 0, the others on port 1.
fn table(count: u32) -> Arc<Fdb> {
    let fdb = Fdb::new(Config { capacity: count, ports: 2, ..Config::default() }, [0xfeed, 0xbeef]);
    for n in 0..count {
        let key = Key::new(station(n), 0);
        assert_eq!(fdb.learn(key, fdb.hash(key), u16::from(n % 2 == 1), 0), Learned::New);
    }
    Arc::new(fdb)
}

/// A burst of keys at a time: hash and prefetch all, then look all up.
pub fn look_up(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("look_up");
    group.throughput(Throughput::Elements(BURST_FRAMES as u64));
    for count in COUNTS {
        let fdb = table(count);
        let keys: Vec<_> =
            random(count).take(ROUND * BURST_FRAMES).map(|n| Key::new(station(n), 0)).collect();
        let mut bursts = keys.chunks(BURST_FRAMES).cycle();
        group.bench_function(BenchmarkId::from_parameter(count), |bencher| {
            let mut slots = [Slot::default(); BURST_FRAMES];
            bencher.iter(|| {
                let Some(keys) = bursts.next() else { return };
                for (slot, &key) in slots.iter_mut().zip(keys) {
                    *slot = fdb.hash(key);
                    fdb.prefetch(*slot);
                }
                for (&slot, &key) in slots.iter().zip(keys) {
                    black_box(fdb.lookup(key, slot));
                }
            });
        });
    }
}

/// A full burst of frames of 64 bytes from port 0 to port 1: classified, learnt, looked up.
pub fn pipeline(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("pipeline");
    group.throughput(Throughput::Elements(BURST_FRAMES as u64));
    for count in COUNTS {
        let topology = topology(count, &VlanMode::Passthrough);
        group
            .bench_function(BenchmarkId::new("untagged", count), |bencher| switch(bencher, &topology, count));
    }
    let topology = topology(1024, &VlanMode::Access(10));
    group.bench_function(BenchmarkId::new("access", 1024), |bencher| switch(bencher, &topology, 1024));
}

fn topology(count: u32, vlan: &VlanMode) -> Topology {
    let rules = || Some(Rules { source: None, vlan: VlanRule::from(vlan), private: None, mtu: 1500 });
    let topology = Topology::new(vec![rules(), rules()], table(count));
    if let VlanMode::Access(vlan) = vlan {
        for n in 0..count {
            let key = Key::new(station(n), *vlan);
            let _ = topology.fdb.remove(Key::new(station(n), 0));
            topology.fdb.learn(key, topology.fdb.hash(key), u16::from(n % 2 == 1), 0);
        }
    }
    topology
}

fn switch(bencher: &mut criterion::Bencher<'_>, topology: &Topology, count: u32) {
    let bytes = ipv4(None, Transport::Udp(0), 22);
    let mut store = FrameStore::default();
    let mut burst = Burst::new(&mut store);
    while burst.len() < BURST_FRAMES && burst.push(bytes.as_slice().into(), Offload::default()) {}
    let pair = |n: u32| (station(n / 2 * 2 + 1), station(n / 2 * 2));
    let addresses: Vec<_> = random(count).take(ROUND * BURST_FRAMES).map(pair).collect();
    let mut addresses = addresses.chunks(BURST_FRAMES).cycle();
    let (mut plan, mut tally) = (Plan::default(), Tally::default());
    bencher.iter(|| {
        for (frame, (to, from)) in burst.frames_mut().iter_mut().zip(addresses.next().unwrap_or_default()) {
            frame.head[..6].copy_from_slice(to);
            frame.head[6..12].copy_from_slice(from);
        }
        forward(topology, 0, 0, &mut burst, &mut plan, &mut tally);
        black_box(&plan);
    });
    let delivered: usize = plan.deliveries().map(|(_, list)| list.len()).sum();
    assert_eq!((delivered, tally.dropped_total()), (BURST_FRAMES, 0), "what was measured is not forwarding");
}
