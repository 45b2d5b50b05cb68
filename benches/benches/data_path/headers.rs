//! Reading headers: the parser, the hash over the flow, the Internet checksum.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput};
use vmq::frame::HEAD_BYTES;
use vmq::rss::{DEFAULT_KEY, ToeplitzKey};
use vswitch::offload::checksum::sum;
use vswitch::parse::Headers;

use crate::frames::{Transport, ipv4, ipv6};

/// Heads of 64 flows.
fn heads(build: impl Fn(u16) -> Vec<u8>) -> Vec<([u8; HEAD_BYTES], usize)> {
    let head = |n| {
        let frame = build(n);
        let mut head = [0; HEAD_BYTES];
        let len = frame.len().min(HEAD_BYTES);
        head[..len].copy_from_slice(&frame[..len]);
        (head, frame.len())
    };
    (0..64).map(head).collect()
}

/// [`Headers::parse`] and the flow.
pub fn parse(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("parse");
    group.throughput(Throughput::Elements(64));
    let kinds = [
        ("udp4", heads(|n| ipv4(None, Transport::Udp(n), 22))),
        ("tcp4", heads(|n| ipv4(None, Transport::Tcp(u32::from(n)), 1448))),
        ("udp6", heads(|n| ipv6(Transport::Udp(n), 1000))),
        ("vlan_udp4", heads(|n| ipv4(Some(10), Transport::Udp(n), 18))),
    ];
    for (name, heads) in &kinds {
        group.bench_function(*name, |bencher| {
            bencher.iter(|| {
                for (head, len) in heads {
                    let head = black_box(head);
                    let headers = Headers::parse(head, *len);
                    black_box(headers.flow(head));
                }
            });
        });
    }
}

/// The Toeplitz hash of addresses and ports.
pub fn toeplitz(criterion: &mut Criterion) {
    let Ok(key) = ToeplitzKey::new(&DEFAULT_KEY) else { return };
    let mut group = criterion.benchmark_group("toeplitz");
    group.throughput(Throughput::Elements(64));
    group.bench_function("v4_ports", |bencher| {
        bencher.iter(|| {
            for port in 0..64 {
                black_box(key.hash_v4_ports(black_box([10, 0, 0, 1]), [10, 0, 0, 2], port, 80));
            }
        });
    });
    group.bench_function("v6_ports", |bencher| {
        bencher.iter(|| {
            for port in 0..64 {
                black_box(key.hash_v6_ports(black_box([0xfd; 16]), [0xfe; 16], port, 80));
            }
        });
    });
}

/// The Internet checksum over one piece.
pub fn checksum(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("checksum");
    for len in [20usize, 64, 1448, 9000, 65_535] {
        let bytes = vec![0xa5; len];
        group.throughput(Throughput::Bytes(len as u64));
        group.bench_with_input(BenchmarkId::from_parameter(len), &bytes, |bencher, bytes| {
            bencher.iter(|| sum(black_box(bytes), 0));
        });
    }
}
