//! A driver that saturates a vhost-user switch: two guests in one thread, with fixed descriptor tables used in order,
//! no packet buffers to manage and one payload line touched per packet. testpmd spends about 164 cycles on a packet,
//! so it measures itself beyond 15 Mpps; this does little but wait for lines that the switch wrote or read.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use vmq::doorbell::Doorbell;
use vmq::driver::{Arena, Buffer, FixedRing, Form};
use vmq::ring::RingAddresses;
use vswitch::ports::vhost_user::features::{Features, Protocol};
use vswitch::ports::vhost_user::frontend::{Frontend, FrontendError, RingSetup};
use vswitch::ports::vhost_user::message::MemoryRegion;
use zerocopy::little_endian::U64;

/// What to generate.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// Bytes of a frame, 60 to 9000, without check sequence.
    pub frame: u32,
    /// Addresses on each side, a power of two.
    pub addresses: u32,
    /// Packed rings.
    pub packed: bool,
    /// Entries of each ring.
    pub ring: u16,
}

/// What came through.
#[derive(Debug, Clone, Copy, Default)]
pub struct Outcome {
    /// Frames received on both sides.
    pub received: u64,
    /// Frames the switch took from both sides.
    pub sent: u64,
    /// For how long.
    pub elapsed: Duration,
}

impl Outcome {
    /// Frames received per second, in millions.
    pub fn mpps(&self) -> f64 {
        self.received as f64 / self.elapsed.as_secs_f64() / 1e6
    }
}

/// Why the generator cannot run.
#[derive(Debug, thiserror::Error)]
pub enum GeneratorError {
    /// The socket.
    #[error("cannot connect to {path}")]
    Connect {
        /// Its path.
        path: String,
        /// The reason.
        #[source]
        source: std::io::Error,
    },
    /// The conversation.
    #[error("the switch does not play along")]
    Frontend(#[from] FrontendError),
    /// Memory.
    #[error("no memory to share")]
    Memory(#[from] vmq::memory::MappingError),
    /// The rings and buffers do not fit.
    #[error("rings of {0} entries do not fit")]
    Ring(u16),
    /// Nothing was received.
    #[error("nothing came through")]
    Silence,
}

/// virtio-net header in front of each frame.
const HEADER: u64 = 12;

/// Guest-physical address of the memory.
const BASE: u64 = 0x10_0000;

/// Frames offered or taken back at a time.
const BURST: u16 = 64;

/// One of the two guests.
#[derive(Debug)]
struct Guest {
    frontend: Frontend,
    arena: Arena,
    transmit: FixedRing,
    receive: FixedRing,
    buffers: Vec<u64>,
    landing: Vec<u64>,
    /// Rung when the switch sleeps, as any driver does.
    kick: Doorbell,
    side: u8,
    next: u32,
    addresses: u32,
    rewrite: bool,
    sent: u64,
    received: u64,
    checksum: u64,
}

fn arena(load: &Load) -> Result<Arena, GeneratorError> {
    let buffer = buffer_len(load);
    let len = usize::from(load.ring) * usize::try_from(buffer).unwrap_or(usize::MAX) * 2 + (1 << 20);
    // Huge pages where there are some, as any serious guest has them.
    Ok(Arena::huge(BASE, len).or_else(|_| Arena::new(BASE, len))?)
}

/// Bytes from one buffer to the next: an odd number of lines, as DPDK's memory pools have it, so that first lines spread over
/// all sets of the caches. With 1536 bytes they share an eighth of the sets, and each packet costs the switch 7 cycles more.
fn buffer_len(load: &Load) -> u64 {
    (HEADER + u64::from(load.frame)).max(1536).next_multiple_of(128) + 64
}

impl Guest {
    fn connect(path: &Path, side: u8, load: &Load) -> Result<Self, GeneratorError> {
        let stream = UnixStream::connect(path)
            .map_err(|source| GeneratorError::Connect { path: path.display().to_string(), source })?;
        let mut frontend = Frontend::from(stream);
        let mut wanted =
            Features::VERSION_1 | Features::MRG_RXBUF | Features::IN_ORDER | Features::PROTOCOL_FEATURES;
        wanted.set(Features::RING_PACKED, load.packed);
        let negotiated = frontend.negotiate(wanted, Protocol::REPLY_ACK | Protocol::MQ)?;
        let packed = negotiated.features.contains(Features::RING_PACKED);
        let arena = arena(load)?;
        let place = || {
            let buffers: Option<Vec<u64>> =
                (0..load.ring).map(|_| arena.alloc(buffer_len(load), 64)).collect();
            buffers.ok_or(GeneratorError::Ring(load.ring))
        };
        let (buffers, landing) = (place()?, place()?);
        let form = if packed { Form::Packed } else { Form::Split };
        let full = u32::try_from(buffer_len(load)).unwrap_or(u32::MAX);
        let header = u32::try_from(HEADER).unwrap_or(0);
        let transmit = FixedRing::new(&arena, form, load.ring, |index| Buffer {
            addr: buffers[usize::from(index)],
            len: load.frame + header,
            writable: false,
        });
        let receive = FixedRing::new(&arena, form, load.ring, |index| Buffer {
            addr: landing[usize::from(index)],
            len: full,
            writable: true,
        });
        let (Some(transmit), Some(receive)) = (transmit, receive) else {
            return Err(GeneratorError::Ring(load.ring));
        };
        let addresses = load.addresses.next_power_of_two();
        let rewrite = addresses > u32::from(load.ring);
        let mut guest = Self {
            frontend,
            arena,
            transmit,
            receive,
            buffers,
            landing,
            kick: Doorbell::new().map_err(FrontendError::Io)?,
            side,
            next: 0,
            addresses,
            rewrite,
            sent: 0,
            received: 0,
            checksum: 0,
        };
        guest.fill_frames();
        guest.start(packed, load.ring)?;
        Ok(guest)
    }

    /// Writes a whole frame into every transmit buffer: local experimental Ethertype, fixed payload.
    fn fill_frames(&mut self) {
        for index in 0..self.buffers.len() {
            let frame = self.buffers[index] + HEADER;
            self.address_frame(index);
            self.arena.write(frame + 12, &[0x88, 0xb5]);
            self.next = self.next.wrapping_add(1);
        }
        self.next = 0;
    }

    /// Source and destination of the frame in buffer `index`: as many of each as were asked for, in an order that
    /// no prefetcher guesses.
    fn address_frame(&self, index: usize) {
        let mask = self.addresses - 1;
        let (own, other) = (self.next & mask, self.next.wrapping_mul(2_654_435_761) >> 7 & mask);
        let mac = |side: u8, host: u32| {
            let [a, b, c, d] = host.to_be_bytes();
            [2, side, a, b, c, d]
        };
        let mut both = [0; 12];
        both[..6].copy_from_slice(&mac(1 - self.side, other));
        both[6..].copy_from_slice(&mac(self.side, own));
        self.arena.write(self.buffers[index] + HEADER, &both);
    }

    fn start(&mut self, packed: bool, ring: u16) -> Result<(), GeneratorError> {
        let regions = [MemoryRegion {
            guest: U64::new(BASE),
            size: U64::new(self.arena.len()),
            user: U64::new(BASE),
            offset: U64::ZERO,
        }];
        self.frontend.show_memory(&regions, &[self.arena.fd()])?;
        // A packed ring starts with its wrap counter set.
        let base = if packed { 0x8000 } else { 0 };
        for (index, at) in [(0, self.receive.addresses()), (1, self.transmit.addresses())] {
            let addresses = RingAddresses {
                descriptors: at.descriptors,
                driver: at.driver,
                device: at.device,
                log: None,
            };
            let (unused, call) = (Doorbell::new(), Doorbell::new());
            let (unused, call) = (unused.map_err(FrontendError::Io)?, call.map_err(FrontendError::Io)?);
            let kick = if index == 1 { self.kick.as_fd() } else { unused.as_fd() };
            let (kick, call) = (Some(kick), Some(call.as_fd()));
            self.frontend.start_ring(index, &RingSetup { size: ring, addresses, base, kick, call })?;
        }
        for index in 0..2 {
            self.frontend.enable_ring(index, true)?;
        }
        self.receive.offer(ring);
        Ok(())
    }

    /// One round: takes back what was sent and sends it again; takes what was received, looks at it, gives it back. The lines
    /// that will be written are asked for first: they come while those that are read do.
    #[inline]
    fn round(&mut self) {
        self.sent += u64::from(self.transmit.take_back(BURST));
        let free = self.transmit.free().min(BURST);
        let first = usize::from(self.transmit.next_offered());
        let size = self.buffers.len();
        let slots = (first..first + usize::from(free)).map(|at| if at < size { at } else { at - size });
        for index in slots.clone() {
            self.arena.prefetch_write(self.buffers[index] + HEADER);
        }

        let (arena, landing) = (&self.arena, &self.landing);
        let mut checksum = self.checksum;
        let received = self.receive.reclaim(BURST, |index, _| {
            checksum = checksum.wrapping_add(arena.read_u64(landing[usize::from(index)] + 16));
        });
        self.checksum = checksum;
        self.received += u64::from(received);
        self.receive.offer(received);

        for index in slots {
            if self.rewrite {
                self.address_frame(index);
            } else {
                self.arena.write_u32(self.buffers[index] + HEADER + 16, self.next);
            }
            self.next = self.next.wrapping_add(1);
        }
        if self.transmit.offer(free) {
            self.kick.ring();
        }
    }

    fn stop(mut self) {
        for index in 0..2 {
            let _ = self.frontend.stop_ring(index);
        }
    }
}

/// Connects to the sockets of two ports and sends as fast as the switch takes, both ways. What is counted starts after
/// `warm_up`, and after every address was a source at least once.
///
/// # Errors
/// A socket, the protocol or memory; or nothing comes through at all.
pub fn run(
    a: &Path,
    b: &Path,
    load: &Load,
    warm_up: Duration,
    window: Duration,
) -> Result<Outcome, GeneratorError> {
    let mut guests = [Guest::connect(a, 0, load)?, Guest::connect(b, 1, load)?];
    let enough = u64::from(load.addresses);
    let start = Instant::now();
    while start.elapsed() < warm_up || guests.iter().any(|guest| guest.sent < enough) {
        for _ in 0..64 {
            guests.iter_mut().for_each(Guest::round);
        }
        if start.elapsed() > warm_up + Duration::from_secs(20) {
            return Err(GeneratorError::Silence);
        }
    }
    let before = guests.each_ref().map(|guest| (guest.received, guest.sent));
    let start = Instant::now();
    while start.elapsed() < window {
        for _ in 0..64 {
            guests.iter_mut().for_each(Guest::round);
        }
    }
    let elapsed = start.elapsed();
    let mut outcome = Outcome { elapsed, ..Outcome::default() };
    for (guest, (received, sent)) in guests.iter().zip(before) {
        outcome.received += guest.received - received;
        outcome.sent += guest.sent - sent;
    }
    for guest in guests {
        std::hint::black_box(guest.checksum);
        guest.stop();
    }
    Ok(outcome)
}
