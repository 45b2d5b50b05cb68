//! Joins two TAP devices with nothing between: what the device ports cost by themselves.
//!
//! `tap_relay A B [key=value…]`; keys: `cpu`, `uring` (0, 1), `frames`, `bytes`, `napi` (0, 1), `offloads` (0, 1),
//! `sleep` (0: always poll; N: wait after N polls in vain), `flood` (bytes of frames that a thread on processor 0 sends
//! into A as fast as it can). Prints a line of counters when its input ends.

use std::io::Read;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{PollFd, PollFlags, poll};
use vmq::frame::{Burst, FrameStore, Offload};
use vmq::memory::Segment;
use vmq::worker::Wait;
use vswitch::ports::device::{DeviceSink, DeviceSource, tap, uplink};
use vswitch::spec::TapSpec;
use vswitch::tally::Tally;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

#[derive(Debug, Default)]
struct Counts {
    frames: u64,
    bytes: u64,
    bursts: u64,
    dropped: u64,
}

fn relay(
    from: &mut DeviceSource,
    to: &mut DeviceSink,
    store: &mut FrameStore,
    counts: &mut Counts,
) -> Result<bool> {
    let (mut received, mut sent) = (Tally::default(), Tally::default());
    let mut burst = Burst::new(store);
    from.receive(&mut burst, &mut received)?;
    if burst.is_empty() {
        return Ok(false);
    }
    let list: Vec<u8> = (0..u8::try_from(burst.len())?).collect();
    to.put(&burst, &list, &mut sent)?;
    drop(burst);
    from.complete();
    counts.frames += sent.frames;
    counts.bytes += sent.bytes;
    counts.bursts += 1;
    counts.dropped += received.dropped_total() + sent.dropped_total();
    Ok(true)
}

/// Makes the device `name` transmit frames of `len` bytes.
fn send_forever(name: &str, len: usize, stop: &AtomicBool) -> Result<()> {
    vmq::os::pin_thread(0)?;
    let mut queues = uplink::open(name, &uplink::Options { bypass: true, ..uplink::Options::new(1500) })?;
    let mut frame = vec![0; len.max(14)];
    frame[..14].copy_from_slice(&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xb5]);
    let mut store = FrameStore::default();
    let mut burst = Burst::new(&mut store);
    while burst.push(Segment::from(frame.as_slice()), Offload::default()) {}
    let list: Vec<u8> = (0..u8::try_from(burst.len())?).collect();
    while !stop.load(Ordering::Relaxed) {
        queues[0].1.put(&burst, &list, &mut Tally::default())?;
    }
    Ok(())
}

fn wait(sources: [&mut DeviceSource; 2]) -> Result<()> {
    let fds: Vec<_> = sources
        .into_iter()
        .filter_map(|source| match source.arm() {
            Wait::Readable(fd) => Some(fd),
            _ => None,
        })
        .collect();
    let mut polled: Vec<_> =
        fds.iter().map(|fd| PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)).collect();
    let second = rustix::event::Timespec { tv_sec: 1, tv_nsec: 0 };
    poll(&mut polled, Some(&second))?;
    Ok(())
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [a, b, settings @ ..] = arguments.as_slice() else {
        return Err("usage: tap_relay A B [key=value…]".into());
    };
    let mut options = tap::Options::new(1500);
    let (mut sleep, mut flood) = (0u32, 0usize);
    for setting in settings {
        let (key, value) = setting.split_once('=').ok_or("key=value expected")?;
        let value: usize = value.parse()?;
        match key {
            "cpu" => vmq::os::pin_thread(value)?,
            "uring" => options.tuning.uring = value != 0,
            "frames" => options.tuning.frames = value,
            "bytes" => options.tuning.bytes = value,
            "napi" => options.napi = value != 0,
            "offloads" => options.offloads = value != 0,
            "flood" => flood = value,
            "sleep" => sleep = u32::try_from(value)?,
            "mtu" => options.mtu = u16::try_from(value)?,
            _ => return Err(format!("unknown key {key}").into()),
        }
    }
    let open =
        |name: &String| tap::open(&TapSpec::Name(name.clone()), &options).map(|mut queues| queues.remove(0));
    let ((mut source_a, mut sink_a), (mut source_b, mut sink_b)) = (open(a)?, open(b)?);
    println!("ready");
    let stop = Arc::new(AtomicBool::new(false));
    let watcher = Arc::clone(&stop);
    std::thread::spawn(move || {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        watcher.store(true, Ordering::Relaxed);
    });
    if flood > 0 {
        let (name, stop) = (a.clone(), Arc::clone(&stop));
        std::thread::spawn(move || {
            send_forever(&name, flood, &stop).inspect_err(|error| eprintln!("{error}")).is_ok()
        });
    }
    let mut store = FrameStore::default();
    let mut counts = [Counts::default(), Counts::default()];
    let mut idle = 0u32;
    while !stop.load(Ordering::Relaxed) {
        let there = relay(&mut source_a, &mut sink_b, &mut store, &mut counts[0])?;
        let back = relay(&mut source_b, &mut sink_a, &mut store, &mut counts[1])?;
        idle = if there || back { 0 } else { idle.saturating_add(1) };
        if sleep > 0 && idle > sleep {
            wait([&mut source_a, &mut source_b])?;
        }
    }
    println!("{counts:?}");
    Ok(())
}
