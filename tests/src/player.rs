//! A guest played in this process: a vhost-user front-end and a virtio driver that sends and receives whole frames,
//! and breaks the rules if told to.
//!
//! It shares no code with the switch's device side; see [`vmq::driver`].

use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use vmq::doorbell::Doorbell;
use vmq::driver::{Arena, Buffer, DriverRing, Features as RingFeatures, Form, Token};
use vmq::ring::RingAddresses;
use vswitch::ports::vhost_user::features::{Features, Negotiated, Protocol};
use vswitch::ports::vhost_user::frontend::{Frontend, RingSetup};
use vswitch::ports::vhost_user::message::MemoryRegion;
use zerocopy::little_endian::U64;

use crate::lab::wait_for;

/// virtio-net header, VIRTIO 1.2, 5.1.6.
const HEADER: usize = 12;
/// Guest-physical address of the memory.
const BASE: u64 = 0x10_0000;
/// Bytes of a mergeable receive buffer.
const MERGEABLE: usize = 2048;
const LIMIT: Duration = Duration::from_secs(20);

/// What a player is.
#[derive(Debug, Clone, Copy)]
pub struct PlayerSpec {
    /// Queue pairs.
    pub queues: u16,
    /// Descriptors in each ring.
    pub size: u16,
    /// Packed rings.
    pub packed: bool,
    /// Receive buffers of 2 KiB, of which a frame may fill several; else each takes the longest frame.
    pub mergeable: bool,
    /// `VIRTIO_F_IN_ORDER`
    pub in_order: bool,
    /// `VIRTIO_F_EVENT_IDX`
    pub event_idx: bool,
    /// Sends in three pieces through indirect tables.
    pub indirect: bool,
    /// The longest frame in bytes.
    pub max_frame: usize,
}

impl PlayerSpec {
    /// One pair of split rings of 256 with mergeable buffers, frames up to 1514 bytes.
    pub fn new() -> Self {
        Self {
            queues: 1,
            size: 256,
            packed: false,
            mergeable: true,
            in_order: false,
            event_idx: true,
            indirect: false,
            max_frame: 1514,
        }
    }

    /// What is asked of the switch.
    pub fn features(&self) -> Features {
        let mut wanted = Features::VERSION_1 | Features::PROTOCOL_FEATURES;
        wanted.set(Features::RING_PACKED, self.packed);
        wanted.set(Features::MRG_RXBUF, self.mergeable);
        wanted.set(Features::IN_ORDER, self.in_order);
        wanted.set(Features::EVENT_IDX, self.event_idx);
        wanted.set(Features::INDIRECT_DESC, self.indirect);
        wanted.set(Features::MQ, self.queues > 1);
        wanted
    }

    fn landing(&self) -> usize {
        if self.mergeable { MERGEABLE } else { (HEADER + self.max_frame).next_multiple_of(64) }
    }

    fn memory(&self) -> usize {
        let sending = (HEADER + self.max_frame).next_multiple_of(64);
        let per_queue = usize::from(self.size) * (sending + self.landing() + 512);
        (usize::from(self.queues) * per_queue + (1 << 20)).next_multiple_of(1 << 20)
    }
}

impl Default for PlayerSpec {
    fn default() -> Self {
        Self::new()
    }
}

/// One direction of a queue: a ring, its doorbells and the buffers behind its chains.
#[derive(Debug)]
pub struct Lane {
    /// The ring.
    pub ring: DriverRing,
    kick: Doorbell,
    call: Doorbell,
    /// The buffer behind each token that is out.
    out: Vec<Option<u64>>,
    spare: Vec<u64>,
}

impl Lane {
    fn new(arena: &Arena, spec: &PlayerSpec, buffer: usize) -> Result<Self> {
        let form = if spec.packed { Form::Packed } else { Form::Split };
        let features =
            RingFeatures { event_idx: spec.event_idx, indirect: spec.indirect, in_order: spec.in_order };
        let ring = DriverRing::new(arena, form, spec.size, features).context("no room for a ring")?;
        let spare: Option<Vec<u64>> = (0..spec.size).map(|_| arena.alloc(buffer as u64, 64)).collect();
        let spare = spare.context("no room for buffers")?;
        let out = vec![None; usize::from(spec.size)];
        Ok(Self { ring, kick: Doorbell::new()?, call: Doorbell::new()?, out, spare })
    }

    fn put(&mut self, token: Token, buffer: u64) -> Result<()> {
        let place = self.out.get_mut(usize::from(token.0)).context("unexpected token")?;
        ensure!(place.replace(buffer).is_none(), "{token:?} was out already");
        Ok(())
    }

    fn take(&mut self, token: Token) -> Result<u64> {
        let place = self.out.get_mut(usize::from(token.0));
        place.and_then(Option::take).with_context(|| format!("{token:?} came back unexpectedly"))
    }

    /// The ring as a switch is shown it that has not had it before.
    pub fn setup(&self) -> RingSetup<'_> {
        let at = self.ring.addresses();
        RingSetup {
            size: self.ring.size(),
            addresses: RingAddresses {
                descriptors: at.descriptors,
                driver: at.driver,
                device: at.device,
                log: None,
            },
            // A packed ring starts with its wrap counter set.
            base: if self.ring.form() == Form::Packed { 0x8000 } else { 0 },
            kick: Some(self.kick.as_fd()),
            call: Some(self.call.as_fd()),
        }
    }

    /// Makes what was added available and rings if asked to.
    pub fn publish(&mut self) {
        if self.ring.publish() {
            self.kick.ring();
        }
    }

    /// Rings without need.
    pub fn ring_doorbell(&self) {
        self.kick.ring();
    }
}

/// A frame and where it came out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Received {
    /// Queue.
    pub queue: u16,
    /// The frame without virtio-net header.
    pub frame: Vec<u8>,
}

/// A running guest. Dropping it closes the connection.
#[derive(Debug)]
pub struct Player {
    spec: PlayerSpec,
    frontend: Frontend,
    arena: Arena,
    negotiated: Negotiated,
    transmit: Vec<Lane>,
    receive: Vec<Lane>,
}

impl Player {
    /// Connects to a port in server mode and starts every queue.
    pub fn connect(path: &Path, spec: PlayerSpec) -> Result<Self> {
        let mut stream = None;
        wait_for(&format!("a connection to {}", path.display()), LIMIT, || {
            stream = UnixStream::connect(path).ok();
            Ok(stream.is_some())
        })?;
        Self::start(stream.context("no connection")?, spec)
    }

    /// Listens at `path` until a port in client mode connects, then starts every queue.
    pub fn listen(path: &Path, spec: PlayerSpec) -> Result<Self> {
        let _ = std::fs::remove_file(path);
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        let mut stream = None;
        wait_for(&format!("the switch to connect to {}", path.display()), LIMIT, || {
            stream = listener.accept().ok();
            Ok(stream.is_some())
        })?;
        let (stream, _) = stream.context("no connection")?;
        stream.set_nonblocking(false)?;
        Self::start(stream, spec)
    }

    /// Starts every queue over this connection.
    pub fn start(stream: UnixStream, spec: PlayerSpec) -> Result<Self> {
        let mut player = Self::silent(stream, spec)?;
        player.attach()?;
        Ok(player)
    }

    /// With its memory and rings, over a connection on which nothing was said yet.
    pub fn silent(stream: UnixStream, spec: PlayerSpec) -> Result<Self> {
        let arena = Arena::new(BASE, spec.memory())?;
        let lanes = |buffer: usize| -> Result<Vec<Lane>> {
            (0..spec.queues).map(|_| Lane::new(&arena, &spec, buffer)).collect()
        };
        let mut receive = lanes(spec.landing())?;
        let transmit = lanes((HEADER + spec.max_frame).next_multiple_of(64))?;
        receive.iter_mut().try_for_each(|lane| fill(lane, &spec))?;
        let (frontend, negotiated) = (Frontend::from(stream), Negotiated::default());
        Ok(Self { spec, frontend, arena, negotiated, transmit, receive })
    }

    /// Goes on over another connection, with the same memory and rings: its switch was restarted. Where a packed ring goes
    /// on would be in an in-flight record, which a player does not keep.
    pub fn attach_again(&mut self, stream: UnixStream) -> Result<()> {
        ensure!(!self.spec.packed, "only split rings say themselves where they go on");
        self.frontend = Frontend::from(stream);
        self.introduce()?;
        // As QEMU does, before they are started: what waits in a ring that is not enabled is dropped.
        for index in 0..2 * self.spec.queues {
            self.frontend.enable_ring(u8::try_from(index)?, true)?;
        }
        self.start_rings()
    }

    fn attach(&mut self) -> Result<()> {
        self.introduce()?;
        self.start_rings()
    }

    /// Agrees on features and shows the memory.
    fn introduce(&mut self) -> Result<()> {
        let wanted = self.spec.features();
        self.negotiated = self.frontend.negotiate(wanted, Protocol::REPLY_ACK | Protocol::MQ)?;
        let missing = wanted - self.negotiated.features;
        ensure!(missing.is_empty(), "the switch does not offer {missing:?}");
        Ok(self.frontend.show_memory(&[self.region()], &[self.arena.fd()])?)
    }

    fn start_rings(&mut self) -> Result<()> {
        for queue in 0..self.spec.queues {
            self.start_pair(u8::try_from(queue)?)?;
        }
        Ok(())
    }

    /// All memory, at its guest-physical addresses.
    pub fn region(&self) -> MemoryRegion {
        MemoryRegion {
            guest: U64::new(BASE),
            size: U64::new(self.arena.len()),
            user: U64::new(BASE),
            offset: U64::ZERO,
        }
    }

    fn start_pair(&mut self, queue: u8) -> Result<()> {
        let at = usize::from(queue);
        for (index, lane) in [(2 * queue, &self.receive[at]), (2 * queue + 1, &self.transmit[at])] {
            self.frontend.start_ring(index, &lane.setup())?;
            self.frontend.enable_ring(index, true)?;
        }
        Ok(())
    }

    /// What was agreed on.
    pub fn negotiated(&self) -> &Negotiated {
        &self.negotiated
    }

    /// The guest's memory.
    pub fn arena(&self) -> &Arena {
        &self.arena
    }

    /// The connection.
    pub fn frontend(&mut self) -> &mut Frontend {
        &mut self.frontend
    }

    /// Queue pairs.
    pub fn queues(&self) -> u16 {
        self.spec.queues
    }

    /// The transmit side of a queue.
    pub fn transmit(&mut self, queue: u16) -> &mut Lane {
        &mut self.transmit[usize::from(queue)]
    }

    /// The receive side of a queue.
    pub fn receive_lane(&mut self, queue: u16) -> &mut Lane {
        &mut self.receive[usize::from(queue)]
    }

    /// Sends a frame; false if the ring is full.
    pub fn send(&mut self, queue: u16, frame: &[u8]) -> Result<bool> {
        self.send_with_header(queue, &[0; HEADER], frame)
    }

    /// Sends a frame with this virtio-net header; false if the ring is full.
    pub fn send_with_header(&mut self, queue: u16, header: &[u8; HEADER], frame: &[u8]) -> Result<bool> {
        ensure!(frame.len() <= self.spec.max_frame, "a frame of {} bytes is too long", frame.len());
        let lane = &mut self.transmit[usize::from(queue)];
        while let Some(used) = lane.ring.poll_used()? {
            let buffer = lane.take(used.token)?;
            lane.spare.push(buffer);
        }
        let Some(buffer) = lane.spare.pop() else { return Ok(false) };
        self.arena.write(buffer, header);
        self.arena.write(buffer + HEADER as u64, frame);
        let pieces = pieces(buffer, HEADER + frame.len(), self.spec.indirect);
        let Some(token) = lane.ring.add(&pieces, self.spec.indirect) else {
            lane.spare.push(buffer);
            return Ok(false);
        };
        lane.put(token, buffer)?;
        lane.publish();
        Ok(true)
    }

    /// Whether the switch has taken all that was sent.
    pub fn is_sent(&mut self) -> Result<bool> {
        let mut left = 0;
        for lane in &mut self.transmit {
            while let Some(used) = lane.ring.poll_used()? {
                let buffer = lane.take(used.token)?;
                lane.spare.push(buffer);
            }
            left += lane.out.iter().flatten().count();
        }
        Ok(left == 0)
    }

    /// Waits until the switch has taken all that was sent.
    pub fn flush(&mut self, limit: Duration) -> Result<()> {
        let start = Instant::now();
        while !self.is_sent()? {
            ensure!(start.elapsed() < limit, "the switch did not take all that was sent");
            std::thread::sleep(Duration::from_micros(50));
        }
        Ok(())
    }

    /// The next frame of any queue.
    pub fn receive(&mut self) -> Result<Option<Received>> {
        for queue in 0..self.spec.queues {
            if let Some(frame) = self.receive_from(queue)? {
                return Ok(Some(Received { queue, frame }));
            }
        }
        Ok(None)
    }

    fn receive_from(&mut self, queue: u16) -> Result<Option<Vec<u8>>> {
        let lane = &mut self.receive[usize::from(queue)];
        let Some(mut used) = lane.ring.poll_used()? else { return Ok(None) };
        let mut bytes = Vec::new();
        let mut left = None;
        loop {
            let buffer = lane.take(used.token)?;
            let mut piece = vec![0; usize::try_from(used.len)?];
            ensure!(piece.len() <= self.spec.landing(), "{} bytes in a receive buffer", used.len);
            self.arena.read(buffer, &mut piece);
            lane.spare.push(buffer);
            bytes.extend(piece);
            ensure!(bytes.len() > HEADER, "a frame of {} bytes with its header", bytes.len());
            let more = *left.get_or_insert(u16::from_le_bytes([bytes[10], bytes[11]])) - 1;
            if more == 0 {
                break;
            }
            left = Some(more);
            // The switch makes all pieces of a frame visible at once.
            used = lane.ring.poll_used()?.context("a frame's next piece is missing")?;
        }
        fill(lane, &self.spec)?;
        Ok(Some(bytes.split_off(HEADER)))
    }

    /// The next frame of any queue, within `limit`.
    pub fn expect_frame(&mut self, limit: Duration) -> Result<Received> {
        let mut frame = None;
        wait_for("a frame", limit, || {
            frame = self.receive()?;
            Ok(frame.is_some())
        })?;
        frame.context("no frame")
    }

    /// Shrinks the memory's file to `len` bytes behind the switch's back.
    pub fn cut_memory(&self, len: u64) -> Result<()> {
        Ok(rustix::fs::ftruncate(self.arena.fd(), len)?)
    }

    /// Waits until the switch closes the connection.
    pub fn wait_for_hang_up(&mut self, limit: Duration) -> Result<()> {
        let mut byte = [0; 64];
        wait_for("the switch to hang up", limit, || {
            match rustix::net::recv(self.frontend.as_fd(), &mut byte[..], rustix::net::RecvFlags::DONTWAIT) {
                Ok((0, _)) | Err(rustix::io::Errno::CONNRESET) => Ok(true),
                Ok(_) | Err(rustix::io::Errno::AGAIN) => Ok(false),
                Err(error) => bail!(error),
            }
        })
    }
}

/// Gives every spare buffer to a receive ring.
fn fill(lane: &mut Lane, spec: &PlayerSpec) -> Result<()> {
    while let Some(buffer) = lane.spare.pop() {
        let piece = Buffer { addr: buffer, len: u32::try_from(spec.landing())?, writable: true };
        let Some(token) = lane.ring.add(&[piece], false) else {
            lane.spare.push(buffer);
            break;
        };
        lane.put(token, buffer)?;
    }
    lane.publish();
    Ok(())
}

/// A sent buffer as one piece, or as header, a short piece and the rest.
fn pieces(buffer: u64, len: usize, split: bool) -> Vec<Buffer> {
    let cuts: &[usize] = if split { &[0, HEADER, HEADER + 17] } else { &[0] };
    let ends = cuts.iter().skip(1).copied().chain([len]);
    let piece = |(&from, to): (&usize, usize)| Buffer {
        addr: buffer + from as u64,
        len: u32::try_from(to - from).unwrap_or(0),
        writable: false,
    };
    cuts.iter().zip(ends).map(piece).collect()
}
