//! The writer of a ring.

use std::sync::atomic::{Ordering, fence};

use vmq::memory::Room;
use zerocopy::IntoBytes;

use super::packet::{Descriptor, PacketHeader};
use super::{Control, FEATURE_PENDING_SEND, RingFault, TRAILER};
use crate::pages::Pages;

/// Writes packets to a ring.
///
/// [`Outgoing::write`] puts packets in; the reader sees them with [`Outgoing::publish`].
#[derive(Debug)]
pub struct Outgoing {
    control: Control,
    data: Pages,
    /// Where the next packet goes.
    next: u32,
    /// The write index as the reader knows it.
    published: u32,
    /// How far the reader was at the last look.
    read: u32,
    /// The reader is asked to say when there is room.
    waiting: bool,
}

/// Why a packet was not written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    /// Not now: see [`Outgoing::wait_for_room`].
    #[error("ring is full")]
    Full,
    /// Never: the packet is longer than the ring, or than any packet can be.
    #[error("packet of {0} bytes is too long for the ring")]
    TooLong(usize),
    /// The reader's index makes no sense.
    #[error(transparent)]
    Fault(#[from] RingFault),
}

impl Outgoing {
    /// Writes on in `ring`, its control page and data, from where it stands.
    ///
    /// A `fresh` ring was opened just now: what the writer owns is initialised. Otherwise a predecessor has used it.
    ///
    /// # Errors
    /// The ring is too small, or its indices make no sense.
    pub fn new(ring: &Pages, fresh: bool) -> Result<Self, RingFault> {
        let (control, data) = Control::new(ring)?;
        let (next, read) = (control.write_index()?, control.read_index()?);
        if fresh {
            control.pending.store(0, Ordering::SeqCst);
            control.features.fetch_or(FEATURE_PENDING_SEND, Ordering::SeqCst);
        }
        let waiting = control.pending.load(Ordering::Relaxed) != 0;
        Ok(Self { control, data, next, published: next, read, waiting })
    }

    /// Bytes of data that the ring has.
    pub fn size(&self) -> u32 {
        self.control.size
    }

    /// True if the reader has taken everything that it was shown.
    pub fn is_read(&self) -> bool {
        self.control.read.load(Ordering::Acquire) == self.published
    }

    /// True if an in-band packet or completion with `payload_len` bytes fits now.
    #[inline]
    pub fn room(&mut self, payload_len: usize) -> bool {
        total(Descriptor::LEN, payload_len).is_ok_and(|(_, total)| self.fits(total) == Ok(true))
    }

    /// As [`Outgoing::room`], but if there is none, asks the reader to signal when there is. True if there is room.
    ///
    /// The wish ends with the next packet written.
    pub fn wait_for_room(&mut self, payload_len: usize) -> bool {
        if self.room(payload_len) {
            return true;
        }
        if let Ok((_, total)) = total(Descriptor::LEN, payload_len) {
            // Strictly more than this is what the packet needs.
            self.control.pending.store(total, Ordering::SeqCst);
            self.waiting = true;
            // The wish must be visible before the reader's index is read, else room made in between is not signalled.
            fence(Ordering::SeqCst);
        }
        self.room(payload_len)
    }

    /// True if `total` bytes fit and at least one stays free, so that a full ring never looks empty.
    #[inline]
    fn fits(&mut self, total: u32) -> Result<bool, RingFault> {
        if self.free() > total {
            return Ok(true);
        }
        let read = self.control.read_index()?;
        // The reader is between where it was and what it was shown.
        let control = &self.control;
        if control.distance(read, self.published) > control.distance(self.read, self.published) {
            return Err(RingFault::IndexJump { which: "read", from: self.read, to: read });
        }
        if self.data.lost() {
            return Err(RingFault::MemoryLost);
        }
        self.read = read;
        Ok(self.free() > total)
    }

    #[inline]
    fn free(&self) -> u32 {
        self.control.size - self.control.distance(self.read, self.next)
    }

    /// Puts a packet into the ring whose payload is `parts`, one behind the other.
    ///
    /// # Errors
    /// [`WriteError`]; nothing was written.
    #[inline]
    pub fn write(&mut self, header: &PacketHeader<'_>, parts: &[&[u8]]) -> Result<(), WriteError> {
        let (extra, ranges) = header.kind.extra();
        let extra = if header.kind.has_extra() { extra.as_slice() } else { &[] };
        let offset = Descriptor::LEN + extra.len() + ranges.len();
        let payload = parts.iter().map(|part| part.len()).sum();
        let (len8, total) = total(offset, payload)?;
        if total >= self.control.size {
            return Err(WriteError::TooLong(offset + payload));
        }
        if !self.fits(total)? {
            return Err(WriteError::Full);
        }
        let descriptor = Descriptor {
            kind: header.kind.wire().into(),
            // At most `len8`, which fits.
            offset8: u16::try_from(offset / 8).unwrap_or(u16::MAX).into(),
            len8: len8.into(),
            flags: header.flags().into(),
            transaction: header.transaction.into(),
        };
        let Some(mut cursor) = Cursor::new(&self.data, self.next, total) else {
            return Err(WriteError::Full);
        };
        cursor.put(descriptor.as_bytes());
        if !extra.is_empty() {
            cursor.put(extra);
            cursor.put(ranges);
        }
        for part in parts {
            cursor.put(part);
        }
        let padding = (offset + payload).wrapping_neg() % 8;
        cursor.put(&[0; 8][..padding]);
        cursor.put(&(u64::from(self.next) << 32).to_le_bytes());
        self.next = self.control.advance(self.next, total);
        if self.waiting {
            self.waiting = false;
            self.control.pending.store(0, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Shows the reader all packets written; true if it is to be signalled, because it wants to be and had read all others.
    #[inline]
    pub fn publish(&mut self) -> bool {
        if self.next == self.published {
            return false;
        }
        // Release: the packets are visible to a reader that sees the index.
        self.control.write.store(self.next, Ordering::Release);
        let before = std::mem::replace(&mut self.published, self.next);
        // The index must be visible before the reader's mask and index are read, else it may go to sleep unseen.
        fence(Ordering::SeqCst);
        self.control.mask.load(Ordering::Relaxed) == 0 && self.control.read.load(Ordering::Acquire) == before
    }
}

/// A packet's length in units of 8 bytes, and its bytes in the ring, trailer included.
#[inline]
fn total(offset: usize, payload: usize) -> Result<(u16, u32), WriteError> {
    let len = offset.saturating_add(payload);
    let len8 = u16::try_from(len.div_ceil(8)).map_err(|_| WriteError::TooLong(len))?;
    Ok((len8, u32::from(len8) * 8 + TRAILER))
}

/// Writes on and on, over the borders of pages that are apart.
struct Cursor<'p> {
    pages: &'p Pages,
    room: Room<'p>,
    /// Offset of the room's end, and of the whole range's.
    at: u32,
    end: u32,
}

impl<'p> Cursor<'p> {
    #[inline]
    fn new(pages: &'p Pages, at: u32, len: u32) -> Option<Self> {
        let room = pages.rooms(at, len)?.next()?;
        Some(Self { pages, room, at: at + room.len(), end: at + len })
    }

    #[inline]
    fn put(&mut self, bytes: &[u8]) {
        if bytes.len() <= self.room.len() as usize {
            self.room = self.room.write(bytes);
        } else {
            self.put_over_border(bytes);
        }
    }

    #[cold]
    fn put_over_border(&mut self, mut bytes: &[u8]) {
        loop {
            let (fits, rest) = bytes.split_at(bytes.len().min(self.room.len() as usize));
            self.room = self.room.write(fits);
            bytes = rest;
            if bytes.is_empty() {
                return;
            }
            // The range was checked to be there, so that a next room follows.
            let next = self.pages.rooms(self.at, self.end - self.at).and_then(|mut rooms| rooms.next());
            let Some(room) = next else { return };
            self.room = room;
            self.at += room.len();
        }
    }
}
