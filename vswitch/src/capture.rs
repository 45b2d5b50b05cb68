//! Live captures: copies of frames that pass a port, for somebody who watches.
//!
//! A capture's queue is bounded: nobody waits for its reader, and what does not fit is counted as missed. A frame that
//! comes in is shown once it is known who gets it, one that goes out once the receiver has it, in the form it has there;
//! each with the reason if it was dropped instead. For that a port that is watched takes its frames one at a time.
//! One that is not pays one load per burst.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use vmq::frame::{Burst, Frame};

use crate::drops::DropReason;
use crate::port::PortCore;

/// Bytes that wait for the reader before frames are missed.
const BACKLOG: usize = 16 << 20;

/// What a waiting frame costs beside its bytes.
const OVERHEAD: usize = 128;

/// Direction, seen from the switch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the port into the switch.
    Inbound,
    /// From the switch to the port.
    Outbound,
}

/// A copy of a frame.
#[derive(Debug, Clone)]
pub struct CapturedFrame {
    /// Nanoseconds since the epoch.
    pub time: u64,
    /// Port name.
    pub port: Arc<str>,
    /// Direction.
    pub direction: Direction,
    /// Bytes the frame had.
    pub original_len: u32,
    /// Its first bytes.
    pub data: Box<[u8]>,
    /// Why it went no further.
    pub dropped: Option<DropReason>,
}

/// The queue between workers and the reader of one capture.
#[derive(Debug)]
struct Channel {
    snaplen: u32,
    drops: bool,
    missed: AtomicU64,
    /// Ports watched that still exist.
    ports: AtomicUsize,
    queue: Mutex<Queue>,
    filled: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    frames: Vec<CapturedFrame>,
    bytes: usize,
}

/// A running capture. Dropping it ends it.
#[derive(Debug)]
pub struct Capture {
    channel: Arc<Channel>,
}

impl Capture {
    /// A capture of up to `snaplen` bytes of each frame that passes one of `ports`, with `drops` if asked.
    pub fn start(snaplen: u32, drops: bool, ports: &[Arc<PortCore>]) -> Self {
        let channel = Arc::new(Channel {
            snaplen,
            drops,
            missed: AtomicU64::new(0),
            ports: AtomicUsize::new(ports.len()),
            queue: Mutex::default(),
            filled: Condvar::new(),
        });
        for port in ports {
            port.taps.add(&channel);
        }
        Self { channel }
    }

    /// All frames that came since the last call, waiting up to `wait` for the first.
    pub fn receive(&self, wait: Duration) -> Vec<CapturedFrame> {
        let queue = self.channel.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let empty = |queue: &mut Queue| queue.frames.is_empty() && !self.ended();
        let (mut queue, _) = self
            .channel
            .filled
            .wait_timeout_while(queue, wait, empty)
            .unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *queue).frames
    }

    /// Frames that were not captured because the reader was too slow.
    pub fn missed(&self) -> u64 {
        self.channel.missed.load(Ordering::Relaxed)
    }

    /// Every port that was watched is gone.
    pub fn ended(&self) -> bool {
        self.channel.ports.load(Ordering::Relaxed) == 0
    }
}

impl Channel {
    fn copy(&self, port: &PortCore, direction: Direction, burst: &Burst<'_>, frame: &Frame) -> CapturedFrame {
        let wanted = frame.len.min(self.snaplen) as usize;
        let mut data = Vec::with_capacity(wanted);
        data.extend_from_slice(&frame.head()[..frame.head_len().min(wanted)]);
        for segment in burst.tail(frame) {
            let at = data.len();
            data.resize((at + segment.len() as usize).min(wanted), 0);
            segment.read_into(&mut data[at..]);
        }
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        CapturedFrame {
            time: u64::try_from(since.as_nanos()).unwrap_or(u64::MAX),
            port: Arc::clone(&port.name),
            direction,
            original_len: frame.len,
            data: data.into_boxed_slice(),
            dropped: None,
        }
    }

    fn push(&self, frame: CapturedFrame) {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = queue.bytes + frame.data.len() + OVERHEAD;
        if bytes > BACKLOG {
            self.missed.fetch_add(1, Ordering::Relaxed);
            return;
        }
        queue.bytes = bytes;
        queue.frames.push(frame);
        drop(queue);
        self.filled.notify_one();
    }
}

/// The captures of one port.
#[derive(Debug, Default)]
pub struct Taps {
    active: AtomicBool,
    channels: RwLock<Vec<Weak<Channel>>>,
}

impl Taps {
    fn add(&self, channel: &Arc<Channel>) {
        self.channels.write().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(channel));
        self.active.store(true, Ordering::Release);
    }

    /// True if anybody watches.
    #[inline]
    pub fn is_active(&self) -> bool {
        self.active.load(Ordering::Relaxed)
    }

    /// Shows the frames of `list` to whoever watches `port`, dropped for `reason` if there is one.
    #[cold]
    pub fn show(
        &self,
        port: &PortCore,
        direction: Direction,
        burst: &Burst<'_>,
        list: impl Iterator<Item = (u8, Option<DropReason>)> + Clone,
    ) {
        let mut gone = false;
        for weak in self.channels.read().unwrap_or_else(PoisonError::into_inner).iter() {
            let Some(channel) = weak.upgrade() else {
                gone = true;
                continue;
            };
            for (index, dropped) in list.clone() {
                let Some(frame) = burst.frames().get(usize::from(index)) else { continue };
                if dropped.is_none() || channel.drops {
                    let copy = channel.copy(port, direction, burst, frame);
                    channel.push(CapturedFrame { dropped, ..copy });
                }
            }
        }
        if gone {
            self.forget_ended();
        }
    }

    fn forget_ended(&self) {
        let mut channels = self.channels.write().unwrap_or_else(PoisonError::into_inner);
        channels.retain(|channel| channel.strong_count() > 0);
        self.active.store(!channels.is_empty(), Ordering::Release);
    }

    /// The port is removed: its captures end.
    pub fn end(&self) {
        for channel in self.channels.read().unwrap_or_else(PoisonError::into_inner).iter() {
            if let Some(channel) = channel.upgrade() {
                channel.ports.fetch_sub(1, Ordering::Relaxed);
                channel.filled.notify_all();
            }
        }
    }
}
