//! Virtqueues, device side: split and packed rings behind one interface.
//!
//! A ring hands out [`Chain`]s of descriptors the driver made available and takes back used ones. Whatever the driver
//! wrote is read once into a private copy, checked, and only the copy is used. One chain walker ([`walk`]) serves both
//! layouts, direct and indirect. Cost per packet in the common case (one descriptor): one 16-byte read and one 8-byte
//! write; indices move once per burst, and the driver is interrupted at most once per burst.
//!
//! Source: Virtual I/O Device (VIRTIO) Version 1.2, sections 2.7 (split) and 2.8 (packed).

// UNSAFETY: reads and writes ring memory shared with another process, through pointers that were bounds-checked once.
#![allow(unsafe_code)]

#[doc(hidden)]
pub mod fuzz;
mod inflight;
mod packed;
mod split;
mod walk;

use crate::memory::{DirtyLog, GuestMemory, RingMemory};

pub use inflight::Inflight;
pub use packed::PackedRing;
pub use split::SplitRing;

/// The largest ring (2.7 and 2.8: the maximum queue size is 32768).
pub const MAX_SIZE: u16 = 32768;

/// The longest chain, whatever the ring's size: what QEMU accepts (`VIRTQUEUE_MAX_SIZE`).
pub const MAX_CHAIN: usize = 1024;

/// Descriptors of chains that are longer than one, between two publications: a burst of the largest honest frames takes a
/// tenth of it, and it bounds how long a guest can keep a worker busy with a burst.
const MAX_PENDING: usize = 16 * MAX_CHAIN;

const DESC_NEXT: u16 = 1;
const DESC_WRITE: u16 = 2;
const DESC_INDIRECT: u16 = 4;

/// A mistake of the driver that makes its ring unusable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RingFault {
    /// The available index moved by more than the ring's size.
    #[error("available index jumped by {by} in a ring of {size}")]
    IndexJump {
        /// How far.
        by: u16,
        /// Ring size.
        size: u16,
    },
    /// A descriptor index at or beyond the ring's (or indirect table's) end.
    #[error("descriptor index {index} is outside a table of {size}")]
    IndexOutside {
        /// The index.
        index: u16,
        /// Entries in the table.
        size: usize,
    },
    /// A chain that is longer than its table, hence has a loop, or longer than any honest one.
    #[error("descriptor chain is longer than {limit}")]
    ChainTooLong {
        /// The limit it broke.
        limit: usize,
    },
    /// An indirect table whose length is 0, no multiple of 16 or too long.
    #[error("indirect table of {len} bytes")]
    IndirectLength {
        /// Bytes.
        len: u32,
    },
    /// An indirect descriptor inside an indirect table, or chained to another.
    #[error("indirect descriptor where none may be")]
    IndirectNested,
    /// Memory that the guest does not have.
    #[error("{len} bytes at guest address {addr:#x} are not guest memory")]
    BadAddress {
        /// Guest-physical address.
        addr: u64,
        /// Bytes.
        len: u32,
    },
    /// A buffer to be read in a queue whose buffers are to be written, or the reverse.
    #[error("descriptor has the wrong direction for its queue")]
    Direction,
    /// The guest's memory file was cut short under the ring.
    #[error("guest memory is gone: its file was cut short")]
    MemoryLost,
    /// The guest made the eventfd of its interrupt one that makes us wait ([`crate::doorbell::Doorbell::is_broken`]).
    #[error("the eventfd of the guest's interrupt was full and blocking")]
    DoorbellBlocks,
}

/// A private copy of one descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest-physical address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    flags: u16,
}

impl Descriptor {
    /// The device may write the buffer (and not read it).
    #[inline]
    pub fn is_writable(&self) -> bool {
        self.flags & DESC_WRITE != 0
    }
}

/// One buffer that the driver made available: a descriptor, and rarely more.
#[derive(Debug, Clone, Copy)]
pub struct Chain {
    id: u16,
    slots: u16,
    /// The first descriptor.
    pub first: Descriptor,
    more_at: u32,
    more_count: u32,
}

impl Chain {
    #[inline]
    fn single(id: u16, first: Descriptor) -> Self {
        Self { id, slots: 1, first, more_at: 0, more_count: 0 }
    }

    /// True if [`Chain::first`] is all there is.
    #[inline]
    pub fn is_single(&self) -> bool {
        self.more_count == 0
    }
}

/// A place in a ring to go back to, see [`Virtqueue::rewind`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark(u16, bool);

/// The device's side of a virtqueue.
pub trait Virtqueue {
    /// Looks once how far the driver has come. To be called at the start of a burst.
    ///
    /// # Errors
    /// The driver's index makes no sense.
    fn refresh(&mut self) -> Result<(), RingFault>;

    /// Takes the next available buffer, if there was one at the last [`Virtqueue::refresh`].
    ///
    /// # Errors
    /// The chain makes no sense.
    fn pop(&mut self, memory: &GuestMemory) -> Result<Option<Chain>, RingFault>;

    /// All descriptors of `chain`, which was popped since the last [`Virtqueue::publish`].
    fn descriptors<'a>(&'a self, chain: &'a Chain) -> &'a [Descriptor];

    /// Where the next [`Virtqueue::pop`] will look.
    fn mark(&self) -> Mark;

    /// Gives back what was popped since `mark` and not used.
    fn rewind(&mut self, mark: Mark);

    /// Notes that `chain` is done with and `len` bytes of it were written. Visible after [`Virtqueue::publish`].
    fn push_used(&mut self, chain: &Chain, len: u32);

    /// Brings the lines near that the next `count` calls of [`Virtqueue::push_used`] will write.
    fn prefetch_used(&self, count: usize);

    /// Shows the driver all that was pushed; true if it wants an interrupt for it.
    fn publish(&mut self) -> bool;

    /// Asks the driver for doorbells from here on; true if there is work already, so that none may come.
    fn arm(&mut self) -> bool;

    /// Tells the driver that doorbells are not needed.
    fn disarm(&mut self);

    /// Where a successor resumes, in the form of `VHOST_USER_GET_VRING_BASE`: the next available index, for packed
    /// rings also the used index, each with its wrap counter in bit 15.
    fn base(&self) -> u32;

    /// Keeps `inflight` up to date from here on, after resuming where it says a crashed predecessor stood.
    fn track(&mut self, inflight: Inflight);
}

/// Where a ring's three parts lie.
#[derive(Debug)]
pub struct Layout {
    /// Entries: a power of two for split rings, anything up to [`MAX_SIZE`] for packed ones.
    pub size: u16,
    /// Descriptor table, or the packed ring itself.
    pub descriptors: RingMemory,
    /// Available ring, or the driver's event suppression.
    pub driver: RingMemory,
    /// Used ring, or the device's event suppression.
    pub device: RingMemory,
    /// `VIRTIO_F_EVENT_IDX` was negotiated.
    pub event_idx: bool,
    /// The ring's own writes are logged here, at this guest address of the used ring.
    pub log: Option<(DirtyLog, u64)>,
}

/// Why a ring cannot be set up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// Size 0, too large, or no power of two for a split ring.
    #[error("ring size {0} is not allowed")]
    Size(u16),
    /// A part is not in guest memory, or not aligned.
    #[error("ring address {0:#x} is not in guest memory or not aligned")]
    Address(u64),
    /// The base names an index outside a packed ring.
    #[error("ring base {0:#x} is outside the ring")]
    Base(u32),
}

/// Addresses of a ring's parts in the peer's own process, as vhost-user names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RingAddresses {
    /// Descriptor table or packed ring.
    pub descriptors: u64,
    /// Available ring or driver event suppression.
    pub driver: u64,
    /// Used ring or device event suppression.
    pub device: u64,
    /// Guest-physical address of the used ring if its writes are to be logged.
    pub log: Option<u64>,
}

/// A ring of either layout.
#[derive(Debug)]
pub enum Ring {
    /// Section 2.7.
    Split(SplitRing),
    /// Section 2.8.
    Packed(PackedRing),
}

impl Ring {
    /// Sets a ring up in `memory` so that it goes on at `base` (see [`Virtqueue::base`]).
    ///
    /// # Errors
    /// Size, addresses or base make no sense.
    pub fn new(
        memory: &GuestMemory,
        packed: bool,
        size: u16,
        at: RingAddresses,
        base: u32,
        event_idx: bool,
    ) -> Result<Self, LayoutError> {
        let entries = usize::from(size);
        if size == 0 || size > MAX_SIZE || (!packed && !size.is_power_of_two()) {
            return Err(LayoutError::Size(size));
        }
        let part = |address, len, align| {
            memory.ring_memory(address, len, align).ok_or(LayoutError::Address(address))
        };
        let (driver_len, device_len) = if packed { (4, 4) } else { (6 + 2 * entries, 6 + 8 * entries) };
        let layout = Layout {
            size,
            descriptors: part(at.descriptors, 16 * entries, 16)?,
            driver: part(at.driver, driver_len, if packed { 4 } else { 2 })?,
            device: part(at.device, device_len, 4)?,
            event_idx,
            log: at.log.and_then(|gpa| memory.log().map(|log| (log.clone(), gpa))),
        };
        Ok(if packed {
            Self::Packed(PackedRing::new(layout, base)?)
        } else {
            Self::Split(SplitRing::new(layout, base))
        })
    }
}

/// Runs `$body` with `$ring` bound to whichever layout it is: one dispatch per burst, none per packet.
#[macro_export]
macro_rules! with_ring {
    ($value:expr, $ring:ident => $body:expr) => {
        match $value {
            $crate::ring::Ring::Split($ring) => $body,
            $crate::ring::Ring::Packed($ring) => $body,
        }
    };
}

#[cfg(test)]
mod tests;
