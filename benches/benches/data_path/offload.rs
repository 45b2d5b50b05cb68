//! Offload translation, without the copy into the receiver's buffers.

use std::hint::black_box;

use criterion::{Criterion, Throughput};
use vmq::frame::{Accepts, Burst, Checksum, FrameStore, Gso, GsoKind, Offload};
use vswitch::offload::{TagForm, Translator, Want};

use crate::frames::{Transport, ipv4};

const MSS: u16 = 1448;

fn want(accepts: Accepts, coalesce: bool) -> Want {
    Want { accepts, coalesce, max_frame: 1514, tag: TagForm::AsIs }
}

/// Translates the burst; says how many frames come out.
fn translate(translator: &mut Translator, burst: &Burst<'_>, list: &[u8], want: &Want) -> usize {
    let mut frames = 0;
    let mut sink = |burst: &Burst<'_>, list: &[u8]| {
        black_box(burst);
        frames += list.len();
    };
    translator.run(burst, list, want, &mut sink, &mut |_, reason| panic!("dropped: {reason}"));
    frames
}

/// One frame of 64 KB of TCP, cut into 45 segments: with the checksums computed, and with them left to the receiver.
pub fn segmentation(criterion: &mut Criterion) {
    let bytes = ipv4(None, Transport::Tcp(1), usize::from(MSS) * 45);
    let offload = Offload {
        checksum: Checksum::Partial { start: 34, offset: 16 },
        gso: Some(Gso { kind: GsoKind::Tcp4, size: MSS, ecn: false }),
    };
    let mut store = FrameStore::default();
    let mut burst = Burst::new(&mut store);
    assert!(burst.push(bytes.as_slice().into(), offload));
    let mut group = criterion.benchmark_group("segmentation");
    group.throughput(Throughput::Bytes(bytes.len() as u64));
    let mut translator = Translator::new();
    for (name, accepts) in [("checksums_too", Accepts::empty()), ("checksums_left", Accepts::CHECKSUM)] {
        let want = want(accepts, false);
        assert_eq!(translate(&mut translator, &burst, &[0], &want), 45);
        group.bench_function(name, |bencher| {
            bencher.iter(|| translate(&mut translator, &burst, &[0], &want));
        });
    }
}

/// 44 segments of one TCP flow, merged into one frame: with checksums to be verified, and already verified.
pub fn coalescing(criterion: &mut Criterion) {
    let segment = |n: u32| ipv4(None, Transport::Tcp(1 + n * u32::from(MSS)), usize::from(MSS));
    let segments: Vec<_> = (0..44).map(segment).collect();
    let list: Vec<u8> = (0..44).collect();
    let want = want(Accepts::CHECKSUM | Accepts::TCP4, true);
    let mut group = criterion.benchmark_group("coalescing");
    group.throughput(Throughput::Elements(44));
    let mut translator = Translator::new();
    for (name, checksum) in [("to_be_verified", Checksum::Unknown), ("verified", Checksum::Valid)] {
        let mut store = FrameStore::default();
        let mut burst = Burst::new(&mut store);
        for segment in &segments {
            assert!(burst.push(segment.as_slice().into(), Offload { checksum, gso: None }));
        }
        assert_eq!(translate(&mut translator, &burst, &list, &want), 1);
        group.bench_function(name, |bencher| {
            bencher.iter(|| translate(&mut translator, &burst, &list, &want));
        });
    }
}
