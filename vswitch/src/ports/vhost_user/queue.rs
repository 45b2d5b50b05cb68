//! virtio-net over a ring: frames out of a guest's transmit queue, frames into its receive queue.
//!
//! Both directions run ahead of themselves: a descriptor is taken, its address translated and the lines behind it
//! fetched [`AHEAD`] frames before those lines are touched, so that misses overlap with each other and with the moving
//! of bytes. Fetching for the whole burst first is worse: it fills the processor's miss buffers and waits for them. Cost
//! per frame of 64 bytes, both directions: two descriptor reads, two used entries, one copy of 64 bytes into the burst and
//! one out of it, 12 bytes of header read and written.

mod put;
mod receive;

use std::sync::Arc;

use vmq::doorbell::Doorbell;
use vmq::frame::{Accepts, Burst, HEAD_BYTES};
use vmq::memory::GuestMemory;
use vmq::ring::{Ring, RingFault, Virtqueue};
use vmq::with_ring;

use crate::ports::vnet;
use crate::tally::Tally;
use put::put;
use receive::{discard, receive};

/// What was negotiated for a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct NetFeatures {
    /// Header of 12 bytes (virtio 1.x or mergeable buffers), else 10.
    pub full_header: bool,
    /// `VIRTIO_NET_F_MRG_RXBUF`: a frame may fill several buffers.
    pub mergeable: bool,
    /// What the guest may ask of us (`VIRTIO_NET_F_CSUM`, `HOST_TSO4`, …).
    pub offered: Accepts,
    /// What the guest takes (`VIRTIO_NET_F_GUEST_CSUM`, `GUEST_TSO4`, …).
    pub accepts: Accepts,
}

impl NetFeatures {
    #[inline]
    fn header_len(&self) -> usize {
        if self.full_header { vnet::FULL } else { vnet::SHORT }
    }

    #[inline]
    fn header_u32(&self) -> u32 {
        if self.full_header { 12 } else { 10 }
    }
}

/// A ring in use, with all that goes with it.
#[derive(Debug)]
pub struct ActiveRing {
    /// The ring.
    pub ring: Ring,
    /// The memory its descriptors point into.
    pub memory: Arc<GuestMemory>,
    /// What was negotiated.
    pub features: NetFeatures,
    /// What the guest sends goes on its way; else it is discarded.
    pub enabled: bool,
    /// The guest's doorbell; without one the ring is polled.
    pub kick: Option<Arc<Doorbell>>,
    /// The guest's interrupt; without one the guest polls.
    pub call: Option<Doorbell>,
}

impl ActiveRing {
    /// Takes up to a burst of frames that the guest sends. They are given back by [`ActiveRing::complete`].
    ///
    /// # Errors
    /// The ring is unusable.
    #[inline]
    pub fn receive<'m>(&'m mut self, burst: &mut Burst<'m>, tally: &mut Tally) -> Result<(), RingFault> {
        let (memory, features) = (&*self.memory, &self.features);
        with_ring!(&mut self.ring, ring => receive(ring, memory, features, burst, tally))
    }

    /// Hands the frames of `list` to the guest, as many as it has buffers for. True if it was interrupted.
    ///
    /// # Errors
    /// The ring is unusable.
    #[inline]
    pub fn put(&mut self, burst: &Burst<'_>, list: &[u8], tally: &mut Tally) -> Result<bool, RingFault> {
        let (memory, features) = (&*self.memory, &self.features);
        let put = with_ring!(&mut self.ring, ring => put(ring, memory, features, burst, list, tally));
        // What is read from memory that is gone is nonsense, and not the fault to tell of.
        if self.memory.lost() {
            return Err(RingFault::MemoryLost);
        }
        put.and_then(|()| self.complete())
    }

    /// Shows the guest what is done with. True if it was interrupted.
    ///
    /// # Errors
    /// The guest cannot be interrupted without waiting for it.
    #[inline]
    pub fn complete(&mut self) -> Result<bool, RingFault> {
        let wanted = with_ring!(&mut self.ring, ring => ring.publish());
        if wanted && let Some(call) = &self.call {
            call.ring();
            if call.is_broken() {
                return Err(RingFault::DoorbellBlocks);
            }
        }
        Ok(wanted)
    }

    /// True if the memory behind the ring turned out to be gone.
    #[inline]
    pub fn lost(&self) -> bool {
        self.memory.lost()
    }

    /// Takes up to some frames that the guest has sent and drops them: its ring is disabled. True if the guest
    /// was interrupted.
    ///
    /// # Errors
    /// The ring is unusable.
    #[cold]
    pub fn discard(&mut self, tally: &mut Tally) -> Result<bool, RingFault> {
        let memory = &*self.memory;
        let discarded = with_ring!(&mut self.ring, ring => discard(ring, memory, tally));
        if self.memory.lost() {
            return Err(RingFault::MemoryLost);
        }
        discarded.and_then(|()| self.complete())
    }

    /// Asks for doorbells; true if there is work already.
    pub fn arm(&mut self) -> bool {
        with_ring!(&mut self.ring, ring => ring.arm())
    }

    /// Says that doorbells are not needed.
    pub fn disarm(&mut self) {
        with_ring!(&mut self.ring, ring => ring.disarm());
    }

    /// Where a successor resumes.
    pub fn base(&self) -> u32 {
        with_ring!(&self.ring, ring => ring.base())
    }
}

/// How many frames descriptors and lines are fetched ahead.
///
/// 8 to 64 were tried: 8 and 64 cost 3 to 5 %, there is little between the others.
const AHEAD: usize = 32;

/// Bytes at a buffer's start that hold header and head.
const NEAR: usize = vnet::FULL + HEAD_BYTES - 1;

/// So many are taken at a time: the loop that takes and the one that moves bytes each have the registers to themselves.
const STEP: usize = 4;
