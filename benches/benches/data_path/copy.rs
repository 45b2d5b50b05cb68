//! The one copy of a frame, from one guest's memory into another's.

use std::sync::Arc;

use criterion::{BenchmarkId, Criterion, Throughput};
use vmq::memory::{GuestMemory, Mapping, Next, Region};

/// Buffers of each guest, as many as a usual ring has.
const BUFFERS: u64 = 256;
/// Bytes from one buffer to the next.
const STRIDE: u64 = 16 * 1024;

fn guest(name: &str) -> Result<GuestMemory, Box<dyn std::error::Error>> {
    let len = BUFFERS * STRIDE;
    let (mapping, _) = Mapping::memfd(name, usize::try_from(len)?)?;
    Ok(GuestMemory::new(vec![Region::new(0, 0, len, Arc::new(mapping), 0)?], None)?)
}

/// 64 frames a round, each fetching the next one's lines while it is copied.
pub fn copy(criterion: &mut Criterion) {
    let (Ok(from), Ok(to)) = (guest("from"), guest("to")) else {
        eprintln!("copy: no shared memory");
        return;
    };
    let mut group = criterion.benchmark_group("copy");
    for len in [64u32, 256, 1518, 4000, 9000] {
        group.throughput(Throughput::Bytes(u64::from(len) * 64));
        group.bench_function(BenchmarkId::from_parameter(len), |bencher| {
            let place = |n: u64| {
                let at = n % BUFFERS * STRIDE;
                from.segment(at, len).zip(to.room(at, len))
            };
            let mut n = 0;
            bencher.iter(|| {
                for _ in 0..64 {
                    let next = place(n + 1).map_or(Next::NONE, |(segment, room)| Next::new(segment, room));
                    if let Some((segment, room)) = place(n) {
                        room.copy(segment, next);
                    }
                    n += 1;
                }
            });
        });
    }
}
