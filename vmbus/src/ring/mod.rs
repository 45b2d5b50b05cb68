//! Rings of a channel, host's side and guest's side.
//!
//! A channel has two rings, one for each direction, each a control page and a data area of whole pages. The writer owns
//! the write index, the wish to be told of room and the feature bits; the reader owns the read index and the interrupt
//! mask. Host and guest are alike in this, so there is one reader, [`Incoming`], and one writer, [`Outgoing`], and the
//! guest's side is the same code under another name.
//!
//! The performance idea: the table of the data area lists its pages twice, so that a packet that wraps is read and
//! written like any other, and no copy is split at the ring's end unless the guest's pages are apart there. The other
//! side's index is looked at when what was seen of the ring is used up, not once a packet; our own is stored once a burst.
//! Cost of a packet: its descriptor (one 16-byte load) and one copy into a private [`PacketBuffer`], from which it is then
//! parsed, so that nothing is fetched twice; writing is three or four stores straight into the ring. Cost of a burst: one
//! full fence on each side, because of the signalling rules.
//!
//! Everything that the other side writes is checked each time it is read. What makes no sense is a [`RingFault`]; after
//! one the ring is of no use, but safe to touch.
//!
//! Source: Linux `drivers/hv/ring_buffer.c`, `include/linux/hyperv.h` (`struct hv_ring_buffer`).

#[doc(hidden)]
pub mod fuzz;
mod incoming;
mod outgoing;
mod packet;

use std::sync::atomic::Ordering;

use crate::pages::{Pages, SharedWord};

pub use incoming::{Incoming, Mark};
pub use outgoing::{Outgoing, WriteError};
pub use packet::{
    Descriptor, GpaRange, GpaRangeList, GpaRanges, MAX_PACKET, Packet, PacketBuffer, PacketHeader,
    PacketKind, TransferRange,
};

/// The guest's reader of the ring that the host writes.
pub type GuestIncoming = Incoming;

/// The guest's writer of the ring that the host reads.
pub type GuestOutgoing = Outgoing;

/// Bytes behind each packet: 0 and the offset at which it starts. Not counted in its length.
const TRAILER: u32 = 8;

/// Offsets in the control page.
const WRITE_INDEX: u32 = 0;
const READ_INDEX: u32 = 4;
const INTERRUPT_MASK: u32 = 8;
const PENDING_SEND_SIZE: u32 = 12;
const FEATURES: u32 = 64;

/// Feature bit: the writer says in `pending_send_sz` how much room it waits for.
const FEATURE_PENDING_SEND: u32 = 1;

/// A mistake of the other side that makes a ring unusable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RingFault {
    /// Less than a control page and a page of data.
    #[error("ring of {pages} pages, at least 2 are needed")]
    TooSmall {
        /// Pages it has.
        pages: u32,
    },
    /// An index at or beyond the end of the data, or no multiple of 8.
    #[error("{which} index {index:#x} is outside a ring of {size:#x} bytes or not a multiple of 8")]
    Index {
        /// `read` or `write`.
        which: &'static str,
        /// What stood in the ring.
        index: u32,
        /// Bytes of data.
        size: u32,
    },
    /// The writer's index went over bytes that it was not given back, or the reader's over bytes that were not written.
    #[error("{which} index jumped from {from:#x} to {to:#x} past what may be used")]
    IndexJump {
        /// `read` or `write`.
        which: &'static str,
        /// Where it stood.
        from: u32,
        /// Where it stands.
        to: u32,
    },
    /// A packet that is shorter than its own header, or longer than what was written.
    #[error("packet of {len} bytes with its payload at {offset}, {available} bytes are there")]
    PacketLength {
        /// Bytes it claims, without its trailer.
        len: u32,
        /// Where it claims its payload starts.
        offset: u32,
        /// Bytes of the ring that are written and not read.
        available: u32,
    },
    /// A packet longer than the buffer it is read into.
    #[error("packet of {len} bytes, {limit} are accepted")]
    PacketTooLong {
        /// Its bytes.
        len: u32,
        /// Bytes accepted.
        limit: u32,
    },
    /// A type that no guest uses.
    #[error("packet of type {0:#x}")]
    Kind(u16),
    /// Flags other than the one for a completion.
    #[error("packet with flags {0:#x}")]
    Flags(u16),
    /// A list of ranges that does not fit its header.
    #[error("{count} ranges do not fit a header of {bytes} bytes")]
    Ranges {
        /// Ranges claimed.
        count: u32,
        /// Bytes that the header has for them.
        bytes: usize,
    },
    /// The guest's memory file was cut short under the ring.
    #[error("guest memory is gone: its file was cut short")]
    MemoryLost,
}

/// The words of a control page, and the size of the data behind it.
#[derive(Debug)]
struct Control {
    write: SharedWord,
    read: SharedWord,
    mask: SharedWord,
    pending: SharedWord,
    features: SharedWord,
    size: u32,
}

impl Control {
    /// Takes a ring's pages apart: control words, and the data's pages twice.
    fn new(ring: &Pages) -> Result<(Self, Pages), RingFault> {
        let too_small = RingFault::TooSmall { pages: ring.count() };
        let data = ring.pages(1, u32::MAX);
        if data.is_empty() {
            return Err(too_small);
        }
        let word = |offset| ring.word(offset).ok_or(too_small);
        let control = Self {
            write: word(WRITE_INDEX)?,
            read: word(READ_INDEX)?,
            mask: word(INTERRUPT_MASK)?,
            pending: word(PENDING_SEND_SIZE)?,
            features: word(FEATURES)?,
            size: data.len(),
        };
        Ok((control, data.twice()))
    }

    /// The writer's index. Acquire: the packets before it are visible.
    #[inline]
    fn write_index(&self) -> Result<u32, RingFault> {
        self.check("write", self.write.load(Ordering::Acquire))
    }

    /// The reader's index. Acquire: what is written into the room behind it cannot be seen by a reader still there.
    #[inline]
    fn read_index(&self) -> Result<u32, RingFault> {
        self.check("read", self.read.load(Ordering::Acquire))
    }

    #[inline]
    fn check(&self, which: &'static str, index: u32) -> Result<u32, RingFault> {
        if index < self.size && index.is_multiple_of(8) {
            Ok(index)
        } else {
            Err(RingFault::Index { which, index, size: self.size })
        }
    }

    /// Bytes from `from` on to `to`, both below the size.
    #[inline]
    fn distance(&self, from: u32, to: u32) -> u32 {
        if to >= from { to - from } else { self.size - from + to }
    }

    /// `by` bytes on from `at`; `by` is at most the size.
    #[inline]
    fn advance(&self, at: u32, by: u32) -> u32 {
        let end = at + by;
        if end >= self.size { end - self.size } else { end }
    }
}

/// Empties a ring, as a guest does before it opens a channel: both indices 0, nothing masked, nothing waited for, and the
/// writer can say how much room it waits for. False if there is no whole control page.
pub fn clear(ring: &Pages) -> bool {
    let words = [WRITE_INDEX, READ_INDEX, INTERRUPT_MASK, PENDING_SEND_SIZE].map(|at| (at, 0));
    let mut all = words.into_iter().chain([(FEATURES, FEATURE_PENDING_SEND)]);
    all.all(|(at, value)| ring.write(at, &u32::to_le_bytes(value)))
}

#[cfg(test)]
mod tests;
