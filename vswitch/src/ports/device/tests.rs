//! Devices in network namespaces of their own: each test's thread enters a new one, which ends with it.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmq::frame::{Burst, Checksum, FrameStore, Gso, GsoKind, Offload};
use vmq::memory::Segment;
use vmq::os::{self, packet};
use vmq::uring::Tuning;

use super::{DeviceError, DeviceSink, DeviceSource, tap, uplink};
use crate::drops::DropReason;
use crate::spec::TapSpec;
use crate::tally::Tally;

/// True in a new namespace; else the test cannot run here, which it says.
fn isolated() -> bool {
    let result = os::new_network_namespace()
        .and_then(|()| std::fs::File::options().read(true).write(true).open("/dev/net/tun").map(drop));
    if let Err(error) = &result {
        eprintln!("skipped: needs root and /dev/net/tun: {error}");
    }
    result.is_ok()
}

fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split(' ')).stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Keeps the host from sending neighbour discovery in between.
fn quiet(device: &str) {
    let key = format!("net.ipv6.conf.{device}.disable_ipv6=1");
    let _ = Command::new("sysctl").args(["-qw", &key]).output();
}

fn open_tap(name: &str, mtu: u16, tuning: Tuning) -> (DeviceSource, DeviceSink) {
    let options = tap::Options { tuning, ..tap::Options::new(mtu) };
    let queue = tap::open(&TapSpec::Name(name.into()), &options).unwrap().remove(0);
    quiet(name);
    queue
}

fn open_uplink(name: &str, tuning: Tuning) -> (DeviceSource, DeviceSink) {
    uplink::open(name, &uplink::Options { tuning, ..uplink::Options::new(1500) }).unwrap().remove(0)
}

/// A packet socket that the kernel gives frames to as they are.
fn raw(device: &str) -> std::fs::File {
    packet::open(device, packet::Flags::default()).unwrap().into()
}

fn until<T>(what: &str, mut try_once: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        if let Some(value) = try_once() {
            return value;
        }
        assert!(Instant::now() < end, "{what} did not happen");
        std::thread::yield_now();
    }
}

fn read_raw(socket: &mut std::fs::File) -> Vec<u8> {
    let mut buffer = vec![0; 70_000];
    let len = until("a frame", || socket.read(&mut buffer).ok());
    buffer.truncate(len);
    buffer
}

/// A frame of `len` bytes of an experimental type, from an address that nobody has.
fn frame(len: usize, seed: u8) -> Vec<u8> {
    let mut bytes = vec![0x02, 0, 0, 0, 0, 0xbb, 0x02, 0, 0, 0, 0, 0xaa, 0x88, 0xb5];
    bytes.extend((14..len).map(|at| u8::try_from(at % 251).unwrap() ^ seed));
    bytes.truncate(len);
    bytes
}

fn flatten(burst: &Burst<'_>) -> Vec<Vec<u8>> {
    let flat = |frame: &vmq::frame::Frame| {
        let mut bytes = frame.head().to_vec();
        for segment in burst.tail(frame) {
            let mut piece = vec![0; segment.len() as usize];
            segment.read_into(&mut piece);
            bytes.extend(piece);
        }
        bytes
    };
    burst.frames().iter().map(flat).collect()
}

fn compare(got: &[Vec<u8>], sent: &[Vec<u8>], what: &str) {
    let lengths = |frames: &[Vec<u8>]| frames.iter().map(Vec::len).collect::<Vec<_>>();
    assert_eq!(lengths(got), lengths(sent), "{what}");
    let first = got.iter().zip(sent).position(|(got, sent)| got != sent);
    assert_eq!(first, None, "{what}: the first frame that differs");
}

/// All frames until there are `count`, in bursts as they come.
fn receive(source: &mut DeviceSource, count: usize) -> Vec<Vec<u8>> {
    let (mut store, mut frames) = (FrameStore::default(), Vec::new());
    until("a frame", || {
        let mut burst = Burst::new(&mut store);
        source.receive(&mut burst, &mut Tally::default()).unwrap();
        frames.extend(flatten(&burst));
        (frames.len() >= count).then_some(())
    });
    frames
}

/// Hands over `frames`, each in pieces of `piece` bytes.
fn put(sink: &mut DeviceSink, frames: &[Vec<u8>], piece: usize) -> (Result<(), DeviceError>, Tally) {
    let (mut store, mut tally) = (FrameStore::default(), Tally::default());
    let mut burst = Burst::new(&mut store);
    let mut result = Ok(());
    for (at, frame) in frames.iter().enumerate() {
        assert!(burst.push_pieces(frame.chunks(piece).map(Segment::from), Offload::default()));
        if burst.room() == 0 || at + 1 == frames.len() {
            let list: Vec<u8> = (0..u8::try_from(burst.len()).unwrap()).collect();
            result = result.and(sink.put(&burst, &list, &mut tally));
            burst.clear();
        }
    }
    (result, tally)
}

const PLAIN: Tuning = Tuning { uring: false, frames: 64, bytes: 256 << 10 };

#[test]
fn frames_of_every_size_pass_a_tap_unaltered_in_order() {
    if !isolated() {
        return;
    }
    for (name, tuning) in [("ring", Tuning::default()), ("plain", PLAIN)] {
        let (mut source, mut sink) = open_tap(name, 9004, tuning);
        let mut host = raw(name);
        let sizes = [14, 15, 60, 63, 64, 65, 128, 590, 1514, 1518, 2048, 4096, 9000, 9018];
        let sent: Vec<_> = sizes.iter().cycle().zip(0..60).map(|(&len, seed)| frame(len, seed)).collect();
        for frame in &sent {
            assert_eq!(host.write(frame).unwrap(), frame.len());
        }
        compare(&receive(&mut source, sent.len()), &sent, name);
        for piece in [1500, 64, 9018] {
            let (result, tally) = put(&mut sink, &sent, piece);
            assert!(result.is_ok());
            assert_eq!((tally.frames, tally.dropped_total()), (60, 0));
            let got: Vec<_> = sent.iter().map(|_| read_raw(&mut host)).collect();
            compare(&got, &sent, name);
        }
    }
}

#[test]
fn frame_of_64_kib_with_offload_goes_whole_from_tap_to_tap() {
    if !isolated() {
        return;
    }
    let (mut source, mut sink) = open_tap("gso", 1500, Tuning::default());
    let mut whole = vec![0; 14 + 20 + 20 + 44 * 1448];
    whole[..12].copy_from_slice(&[0x02, 0, 0, 0, 0, 0xbb, 0x02, 0, 0, 0, 0, 0xaa]);
    whole[12..14].copy_from_slice(&[0x08, 0x00]);
    let total = u16::try_from(whole.len() - 14).unwrap().to_be_bytes();
    whole[14..24].copy_from_slice(&[0x45, 0, total[0], total[1], 0, 1, 0x40, 0, 64, 6]);
    whole[26..34].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
    whole[46] = 0x50;
    let gso = Gso { kind: GsoKind::Tcp4, size: 1448, ecn: false };
    let offload = Offload { checksum: Checksum::Partial { start: 34, offset: 16 }, gso: Some(gso) };
    // The host's side is a packet socket with virtio-net header: what it sends, the device transmits.
    let mut host: std::fs::File =
        packet::open("gso", packet::Flags { header: true, bypass: false }).unwrap().into();
    let header = crate::ports::vnet::emit(&offload, sink.accepts(), 0);
    let mut message = header[..packet::HEADER].to_vec();
    message.extend(&whole);
    assert_eq!(host.write(&message).unwrap(), message.len());
    let (mut store, mut tally) = (FrameStore::default(), Tally::default());
    let mut burst = Burst::new(&mut store);
    while burst.is_empty() {
        let mut again = FrameStore::default();
        let mut probe = Burst::new(&mut again);
        until("the frame", || {
            source.receive(&mut probe, &mut tally).unwrap();
            (!probe.is_empty()).then_some(())
        });
    }
}
