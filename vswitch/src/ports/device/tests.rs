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
use crate::offload::testing;
use crate::spec::TapSpec;
use crate::tally::Tally;

/// True in a new namespace; else the test cannot run here, which it says.
pub(crate) fn isolated() -> bool {
    let result = os::new_network_namespace()
        .and_then(|()| std::fs::File::options().read(true).write(true).open("/dev/net/tun").map(drop));
    if let Err(error) = &result {
        eprintln!("skipped: needs root and /dev/net/tun: {error}");
        return false;
    }
    // A device is up before it is known by its name.
    ["all", "default"].into_iter().for_each(quiet);
    true
}

pub(crate) fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split(' ')).stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Keeps the host from sending neighbour discovery in between.
fn quiet(device: &str) {
    let key = format!("net.ipv6.conf.{device}.disable_ipv6=1");
    let _ = Command::new("sysctl").args(["-qw", &key]).output();
}

/// A cable between the devices `wire` and `far`, both up and ready.
fn cable() {
    ip("link add wire type veth peer name far");
    for device in ["wire", "far"] {
        quiet(device);
        ip(&format!("link set {device} up"));
    }
    for device in ["wire", "far"] {
        until("carrier", || {
            let shown = Command::new("ip").args(["link", "show", "dev", device]).output().unwrap();
            String::from_utf8_lossy(&shown.stdout).contains("state UP").then_some(())
        });
    }
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
    burst.frames().iter().map(|frame| testing::flatten(burst, frame)).collect()
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

/// What of the frames sent by a TCP of 44 segments of 1448 bytes matters here.
fn large_frame() -> (Vec<u8>, Offload) {
    let mut whole = vec![0; 14 + 20 + 20 + 44 * 1448];
    whole[..14].copy_from_slice(&[0x02, 0, 0, 0, 0, 0xbb, 0x02, 0, 0, 0, 0, 0xaa, 0x08, 0x00]);
    let total = u16::try_from(whole.len() - 14).unwrap().to_be_bytes();
    whole[14..24].copy_from_slice(&[0x45, 0, total[0], total[1], 0, 1, 0x40, 0, 64, 6]);
    whole[26..34].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
    whole[46] = 0x50;
    let gso = Gso { kind: GsoKind::Tcp4, size: 1448, ecn: false };
    (whole, Offload { checksum: Checksum::Partial { start: 34, offset: 16 }, gso: Some(gso) })
}

/// The first frame that comes, as bytes, with its offload.
fn receive_one(source: &mut DeviceSource) -> (Vec<u8>, Offload) {
    until("a frame", || {
        let mut store = FrameStore::default();
        let mut burst = Burst::new(&mut store);
        source.receive(&mut burst, &mut Tally::default()).unwrap();
        let offload = burst.frames().first()?.offload;
        Some((flatten(&burst).remove(0), offload))
    })
}

#[test]
fn frame_of_64_kib_goes_whole_with_its_offload_between_uplink_and_tap() {
    if !isolated() {
        return;
    }
    let (mut tap_source, mut tap_sink) = open_tap("gso", 1500, Tuning::default());
    let (mut host_source, mut host_sink) = open_uplink("gso", Tuning::default());
    let (whole, offload) = large_frame();
    let mut store = FrameStore::default();
    let mut burst = Burst::new(&mut store);
    assert!(burst.push(Segment::from(whole.as_slice()), offload));
    // The host's socket sends through the device: out of its queue. What is written to the queue the socket receives.
    host_sink.put(&burst, &[0], &mut Tally::default()).unwrap();
    assert!(receive_one(&mut tap_source) == (whole.clone(), offload), "out of the device");
    tap_sink.put(&burst, &[0], &mut Tally::default()).unwrap();
    assert!(receive_one(&mut host_source) == (whole.clone(), offload), "into the device");
}

#[test]
fn vlan_tags_pass_an_uplink_both_ways() {
    if !isolated() {
        return;
    }
    cable();
    for tuning in [Tuning::default(), PLAIN] {
        let (mut source, mut sink) = open_uplink("wire", tuning);
        let mut far = raw("far");
        let plain: Vec<_> = (0..9).map(|seed| frame(100 + usize::from(seed), seed)).collect();
        for tag in [[0x81, 0x00, 0x00, 0x0a], [0x88, 0xa8, 0xe0, 0x64]] {
            let tagged: Vec<_> =
                plain.iter().map(|plain| [&plain[..12], &tag, &plain[12..]].concat()).collect();
            for frame in &tagged {
                far.write_all(frame).unwrap();
            }
            compare(&receive(&mut source, 9), &tagged, "received");
            let (result, tally) = put(&mut sink, &tagged, 40);
            assert!(result.is_ok());
            assert_eq!((tally.frames, tally.dropped_total()), (9, 0));
            // The kernel knew the tag for one: it took it off, and a plain socket is not told.
            let got: Vec<_> = plain.iter().map(|_| read_raw(&mut far)).collect();
            compare(&got, &plain, "sent");
        }
    }
}

#[test]
fn uplink_with_two_queues_receives_each_frame_once() {
    if !isolated() {
        return;
    }
    cable();
    let options = uplink::Options { queues: 2, ..uplink::Options::new(1500) };
    let mut queues = uplink::open("wire", &options).unwrap();
    let mut far = raw("far");
    for seed in 0..50 {
        far.write_all(&frame(60, seed)).unwrap();
    }
    let mut count = 0;
    until("every frame", || {
        for (source, _) in &mut queues {
            let mut store = FrameStore::default();
            let mut burst = Burst::new(&mut store);
            source.receive(&mut burst, &mut Tally::default()).unwrap();
            count += burst.len();
        }
        (count >= 50).then_some(())
    });
    // And none that the host sends through the device, as a single socket does not.
    let mut near = raw("wire");
    near.write_all(&frame(60, 1)).unwrap();
    far.write_all(&frame(60, 51)).unwrap();
    until("the last frame", || {
        let mut store = FrameStore::default();
        for (source, _) in &mut queues {
            let mut burst = Burst::new(&mut store);
            source.receive(&mut burst, &mut Tally::default()).unwrap();
            count += burst.len();
            if flatten(&burst).contains(&frame(60, 51)) {
                return Some(());
            }
        }
        None
    });
    assert_eq!(count, 51);
}

#[test]
fn frame_that_the_kernel_refuses_is_counted_and_the_others_arrive() {
    if !isolated() {
        return;
    }
    for (name, tuning) in [("ring", Tuning::default()), ("plain", PLAIN)] {
        let (_source, mut sink) = open_tap(name, 1500, tuning);
        let mut host = raw(name);
        // Shorter than an Ethernet header.
        let frames = [frame(60, 1), frame(13, 2), frame(60, 3)];
        let (result, tally) = put(&mut sink, &frames, 100);
        assert!(result.is_ok());
        assert_eq!((tally.frames, tally.dropped(DropReason::DeviceError)), (2, 1));
        assert!(read_raw(&mut host) == frames[0] && read_raw(&mut host) == frames[2]);
    }
}

#[test]
fn device_that_is_down_drops_and_counts_until_it_is_up_again() {
    if !isolated() {
        return;
    }
    cable();
    for tuning in [Tuning::default(), PLAIN] {
        for (name, (mut source, mut sink)) in
            [("tap", open_tap("tap", 1500, tuning)), ("wire", open_uplink("wire", tuning))]
        {
            let frames = [frame(60, 1), frame(60, 2)];
            os::set_up(name, false).unwrap();
            let (result, tally) = put(&mut sink, &frames, 100);
            assert!(result.is_ok(), "{name}: {result:?}");
            assert_eq!((tally.frames, tally.dropped(DropReason::NotReady)), (0, 2), "{name}");
            let mut store = FrameStore::default();
            source.receive(&mut Burst::new(&mut store), &mut Tally::default()).unwrap();
            os::set_up(name, true).unwrap();
            until("the device", || (put(&mut sink, &frames, 100).1.frames == 2).then_some(()));
        }
    }
}

#[test]
fn device_deleted_under_traffic_is_reported_as_gone() {
    if !isolated() {
        return;
    }
    for tuning in [Tuning::default(), PLAIN] {
        cable();
        for (name, (mut source, mut sink)) in
            [("tap", open_tap("tap", 1500, tuning)), ("wire", open_uplink("wire", tuning))]
        {
            let frames = [frame(60, 1), frame(1000, 2)];
            for _ in 0..100 {
                assert!(put(&mut sink, &frames, 100).0.is_ok());
            }
            ip(&format!("link delete {name}"));
            let (result, tally) = put(&mut sink, &frames, 100);
            assert!(matches!(result, Err(DeviceError::Gone { .. })), "{name}: {result:?}");
            assert_eq!(tally.dropped(DropReason::Faulted), 2);
            let mut store = FrameStore::default();
            let result = until("the error", || {
                source.receive(&mut Burst::new(&mut store), &mut Tally::default()).err()
            });
            assert!(matches!(&result, DeviceError::Gone { device } if &**device == name), "{result:?}");
        }
    }
}

#[test]
fn full_queue_is_counted() {
    if !isolated() {
        return;
    }
    // Nothing leaves the device's queue of 2 frames: its discipline lets one byte a second pass.
    cable();
    let (_source, mut sink) = open_uplink("wire", Tuning::default());
    let tc = "qdisc replace dev wire root tbf rate 8bit burst 1500 limit 3000";
    let output = Command::new("tc").args(tc.split(' ')).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let frames: Vec<_> = (0..60).map(|seed| frame(1000, seed)).collect();
    let (result, tally) = put(&mut sink, &frames, 1000);
    assert!(result.is_ok());
    assert!(tally.frames >= 1 && tally.dropped(DropReason::QueueFull) >= 50, "{tally:?}");
    assert_eq!(tally.frames + tally.dropped_total(), 60);
}

#[test]
fn frames_for_which_a_full_uplink_has_no_room_are_counted() {
    if !isolated() {
        return;
    }
    for (name, tuning) in [("ring", Tuning::default()), ("plain", PLAIN)] {
        let (_source, mut wire) = open_tap(name, 1500, tuning);
        let (mut source, _sink) = open_uplink(name, tuning);
        // 30 MB, of which 8 MiB or so find room.
        let frames: Vec<_> = (0..200).map(|seed| frame(1514, seed)).collect();
        for _ in 0..100 {
            assert_eq!(put(&mut wire, &frames, 1514).1.frames, 200);
        }
        let (mut store, mut tally, mut count) = (FrameStore::default(), Tally::default(), 0);
        until("an account of every frame", || {
            let mut burst = Burst::new(&mut store);
            source.receive(&mut burst, &mut tally).unwrap();
            count += burst.len();
            (count + usize::try_from(tally.dropped_total()).unwrap() == 20_000).then_some(())
        });
        assert!(tally.dropped(DropReason::DeviceOverrun) > 0, "{name}");
    }
}

#[test]
fn inherited_tap_that_was_made_blocking_makes_nobody_wait() {
    if !isolated() {
        return;
    }
    use std::os::fd::AsRawFd;
    let inherited = os::tap::open("given", os::tap::Flags::default()).unwrap();
    let spec = TapSpec::Fds(vec![inherited.as_raw_fd()]);
    let (mut source, mut sink) = tap::open(&spec, &tap::Options::new(1500)).unwrap().remove(0);
    quiet("given");
    rustix::io::ioctl_fionbio(&inherited, false).unwrap();
    // One frame, then none.
    let mut host = raw("given");
    host.write_all(&frame(60, 1)).unwrap();
    compare(&receive(&mut source, 1), &[frame(60, 1)], "received");
    let (mut store, mut tally) = (FrameStore::default(), Tally::default());
    for _ in 0..3 {
        let mut burst = Burst::new(&mut store);
        source.receive(&mut burst, &mut tally).unwrap();
        assert!(burst.is_empty());
    }
    assert_eq!(put(&mut sink, &[frame(60, 2)], 60).1.frames, 1);
    assert_eq!(read_raw(&mut host), frame(60, 2));
}

#[test]
fn tap_opens_by_descriptor_and_with_the_queues_it_was_made_with() {
    if !isolated() {
        return;
    }
    use std::os::fd::AsRawFd;
    let options = tap::Options { queues: 3, ..tap::Options::new(1500) };
    let queues = tap::open(&TapSpec::Name("multi".into()), &options).unwrap();
    assert_eq!(queues.len(), 3);
    // One more, though the flag is not asked for.
    assert_eq!(tap::open(&TapSpec::Name("multi".into()), &tap::Options::new(1500)).unwrap().len(), 1);
    let inherited = os::tap::open("given", os::tap::Flags::default()).unwrap();
    let spec = TapSpec::Fds(vec![inherited.as_raw_fd()]);
    let mut given = tap::open(&spec, &tap::Options::new(1400)).unwrap();
    assert_eq!((&**given[0].0.device(), os::mtu("given").unwrap()), ("given", 1400));
    let mut host = raw("given");
    host.write_all(&frame(60, 1)).unwrap();
    compare(&receive(&mut given[0].0, 1), &[frame(60, 1)], "by descriptor");
    let file = std::fs::File::open("/dev/null").unwrap();
    let error = tap::open(&TapSpec::Fds(vec![file.as_raw_fd()]), &options).unwrap_err();
    let DeviceError::Setup { source, .. } = &error else { panic!("{error}") };
    assert!(source.to_string().contains("/dev/null"), "{source}");
    assert!(tap::open(&TapSpec::Fds(vec![99_999]), &options).is_err());
    assert!(uplink::open("nothing", &uplink::Options::new(1500)).is_err());
}

#[test]
fn device_made_by_a_port_can_be_made_again_at_once() {
    if !isolated() {
        return;
    }
    for _ in 0..20 {
        drop(open_tap("again", 1500, Tuning::default()));
    }
}

/// Carries frames between two TAP devices until it is dropped.
struct Relay {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Relay {
    fn start(a: (DeviceSource, DeviceSink), b: (DeviceSource, DeviceSink)) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let (mut a, mut b, mut store) = (a, b, FrameStore::default());
            while !seen.load(Ordering::Relaxed) {
                let moved =
                    Self::carry(&mut a.0, &mut b.1, &mut store) + Self::carry(&mut b.0, &mut a.1, &mut store);
                if moved == 0 {
                    std::thread::yield_now();
                }
            }
        });
        Self { stop, thread: Some(thread) }
    }

    fn carry(from: &mut DeviceSource, to: &mut DeviceSink, store: &mut FrameStore) -> usize {
        let mut burst = Burst::new(store);
        from.receive(&mut burst, &mut Tally::default()).unwrap();
        let list: Vec<u8> = (0..u8::try_from(burst.len()).unwrap()).collect();
        to.put(&burst, &list, &mut Tally::default()).unwrap();
        list.len()
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A thread in a namespace of its own, into which `device` is moved with `address`; then it does `work`.
fn host<T: Send + 'static>(
    device: &'static str,
    address: &'static str,
    work: impl FnOnce() -> T + Send + 'static,
) -> JoinHandle<T> {
    let (tell, told) = mpsc::channel();
    let (go, gone) = mpsc::channel::<()>();
    let thread = std::thread::spawn(move || {
        os::new_network_namespace().unwrap();
        tell.send(rustix::thread::gettid().as_raw_nonzero()).unwrap();
        gone.recv().unwrap();
        ip(&format!("address add {address} dev {device}"));
        ip(&format!("link set {device} up"));
        work()
    });
    ip(&format!("link set {device} netns {}", told.recv().unwrap()));
    go.send(()).unwrap();
    thread
}

fn exchange(mut stream: TcpStream, seed: usize) -> bool {
    const LEN: usize = 8 << 20;
    let pattern =
        |seed: usize| (0..LEN).map(move |at| (at.wrapping_mul(2_654_435_761) >> 7 ^ seed).to_le_bytes()[0]);
    let mut sender = stream.try_clone().unwrap();
    let sent = std::thread::spawn(move || {
        sender.write_all(&pattern(seed).collect::<Vec<_>>()).unwrap();
    });
    let mut got = vec![0; LEN];
    stream.read_exact(&mut got).unwrap();
    sent.join().unwrap();
    got.into_iter().eq(pattern(seed ^ 1))
}

#[test]
fn ping_and_tcp_between_namespaces_over_a_relay_of_two_taps() {
    if !isolated() {
        return;
    }
    for offloads in [true, false] {
        let options = tap::Options { offloads, ..tap::Options::new(1500) };
        let open = |name: &str| tap::open(&TapSpec::Name(name.into()), &options).unwrap().remove(0);
        let _relay = Relay::start(open("left"), open("right"));
        let (ready, is_ready) = mpsc::channel();
        let server = host("left", "10.1.2.1/24", move || {
            let listener = TcpListener::bind("10.1.2.1:5000").unwrap();
            ready.send(()).unwrap();
            exchange(listener.accept().unwrap().0, 2)
        });
        is_ready.recv().unwrap();
        let client = host("right", "10.1.2.2/24", || {
            let ping = Command::new("ping").args(["-c3", "-i0.1", "-W5", "10.1.2.1"]).output().unwrap();
            assert!(ping.status.success(), "{}", String::from_utf8_lossy(&ping.stdout));
            let address: SocketAddr = "10.1.2.1:5000".parse().unwrap();
            exchange(TcpStream::connect_timeout(&address, Duration::from_secs(10)).unwrap(), 3)
        });
        assert!(client.join().unwrap() && server.join().unwrap(), "offloads {offloads}");
    }
}

#[test]
fn armed_source_becomes_readable_when_a_frame_comes() {
    if !isolated() {
        return;
    }
    let (mut source, _sink) = open_tap("wake", 1500, Tuning::default());
    let vmq::worker::Wait::Readable(fd) = source.arm() else { panic!("not a descriptor") };
    let ready = |timeout: i64| {
        let mut fds = [rustix::event::PollFd::from_borrowed_fd(fd.as_fd(), rustix::event::PollFlags::IN)];
        let timeout = rustix::event::Timespec { tv_sec: timeout, tv_nsec: 0 };
        rustix::event::poll(&mut fds, Some(&timeout)).unwrap() == 1
    };
    assert!(!ready(0));
    raw("wake").write_all(&frame(60, 1)).unwrap();
    assert!(ready(5));
}
