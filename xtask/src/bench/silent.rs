//! Guests that connect, offer buffers, and then say nothing.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result};
use vmq::doorbell::Doorbell;
use vmq::driver::{Arena, Buffer, FixedRing, Form};
use vmq::ring::RingAddresses;
use vswitch::ports::vhost_user::features::{Features, Protocol};
use vswitch::ports::vhost_user::frontend::{Frontend, RingSetup};
use vswitch::ports::vhost_user::message::MemoryRegion;

/// Guest-physical address of the memory.
const BASE: u64 = 0x10_0000;

/// Entries of each ring.
const ENTRIES: u16 = 256;

/// Bytes of a buffer.
const BUFFER: u32 = 1536;

/// A silent guest; gone when dropped.
#[derive(Debug)]
pub struct Silent {
    _frontend: Frontend,
    _arena: Arena,
}

impl Silent {
    /// Connects to a port with one queue pair, and offers a ring full of receive buffers.
    pub fn connect(socket: &Path) -> Result<Self> {
        let stream =
            UnixStream::connect(socket).with_context(|| format!("cannot connect to {}", socket.display()))?;
        let mut frontend = Frontend::from(stream);
        let features =
            Features::VERSION_1 | Features::MRG_RXBUF | Features::IN_ORDER | Features::PROTOCOL_FEATURES;
        frontend.negotiate(features, Protocol::REPLY_ACK | Protocol::MQ)?;
        // The buffers of one ring, and the rings.
        let arena = Arena::new(BASE, usize::from(ENTRIES) * 2048)?;
        let ring = |writable| {
            let room = arena.alloc(u64::from(BUFFER) * u64::from(if writable { ENTRIES } else { 1 }), 64)?;
            let stride = if writable { u64::from(BUFFER) } else { 0 };
            let buffer =
                |index: u16| Buffer { addr: room + u64::from(index) * stride, len: BUFFER, writable };
            FixedRing::new(&arena, Form::Split, ENTRIES, buffer)
        };
        let mut receive = ring(true).context("no room for the receive ring")?;
        let transmit = ring(false).context("no room for the transmit ring")?;
        let region = MemoryRegion {
            guest: BASE.into(),
            size: arena.len().into(),
            user: BASE.into(),
            offset: 0.into(),
        };
        frontend.show_memory(&[region], &[arena.fd()])?;
        receive.offer(ENTRIES);
        for (index, at) in [(0, receive.addresses()), (1, transmit.addresses())] {
            let addresses = RingAddresses {
                descriptors: at.descriptors,
                driver: at.driver,
                device: at.device,
                log: None,
            };
            // The switch keeps its copies. Ours may go: nobody rings.
            let (kick, call) = (Doorbell::new()?, Doorbell::new()?);
            let (kick, call) = (Some(kick.as_fd()), Some(call.as_fd()));
            frontend.start_ring(index, &RingSetup { size: ENTRIES, addresses, base: 0, kick, call })?;
            frontend.enable_ring(index, true)?;
        }
        Ok(Self { _frontend: frontend, _arena: arena })
    }
}
