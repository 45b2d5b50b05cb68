//! The reader of a ring.

use std::sync::atomic::{Ordering, fence};

use super::packet::{self, Descriptor, Packet, PacketBuffer};
use super::{Control, FEATURE_PENDING_SEND, RingFault, TRAILER};
use crate::pages::Pages;

/// Bytes of a descriptor, as lengths are counted here.
const DESCRIPTOR: u32 = 16;
const _: () = assert!(DESCRIPTOR as usize == Descriptor::LEN);

/// Reads packets from a ring.
///
/// [`Incoming::next`] takes packets; the writer gets their room back, and forgets them, with [`Incoming::commit`]. A
/// reader that takes the ring over in between finds them again.
#[derive(Debug)]
pub struct Incoming {
    control: Control,
    data: Pages,
    /// The next packet.
    next: u32,
    /// How far the writer was at the last look.
    seen: u32,
    /// The read index as the writer knows it.
    committed: u32,
}

/// A place in a ring to go back to, see [`Incoming::rewind`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark(u32);

impl Mark {
    /// The place, in bytes from the data's start.
    pub fn index(self) -> u32 {
        self.0
    }
}

impl Incoming {
    /// Reads on in `ring`, its control page and data, from where it stands.
    ///
    /// A `fresh` ring was opened just now: what the reader owns is initialised. Otherwise a predecessor has used it.
    ///
    /// # Errors
    /// The ring is too small, or its indices make no sense.
    pub fn new(ring: &Pages, fresh: bool) -> Result<Self, RingFault> {
        let (control, data) = Control::new(ring)?;
        let next = control.read_index()?;
        control.write_index()?;
        if fresh {
            control.mask.store(0, Ordering::SeqCst);
        }
        Ok(Self { control, data, next, seen: next, committed: next })
    }

    /// Bytes of data that the ring has.
    pub fn size(&self) -> u32 {
        self.control.size
    }

    /// Looks how far the writer is; true if there is something to read.
    #[inline]
    fn refresh(&mut self) -> Result<bool, RingFault> {
        let write = self.control.write_index()?;
        // The writer may not use what it was not given back: what was seen stays between us and it.
        if self.control.distance(self.committed, write) < self.control.distance(self.committed, self.seen) {
            return Err(RingFault::IndexJump { which: "write", from: self.seen, to: write });
        }
        if self.data.lost() {
            return Err(RingFault::MemoryLost);
        }
        self.seen = write;
        Ok(write != self.next)
    }

    /// Takes the next packet: copies it into `buffer` and says what it is. `None` if there is none.
    ///
    /// # Errors
    /// The writer's index or the packet makes no sense. The ring stays where it is.
    #[inline]
    pub fn next<'b>(&mut self, buffer: &'b mut PacketBuffer) -> Result<Option<Packet<'b>>, RingFault> {
        if self.next == self.seen && !self.refresh()? {
            return Ok(None);
        }
        let available = self.control.distance(self.next, self.seen);
        let mut head = [0; Descriptor::LEN];
        if available < DESCRIPTOR + TRAILER || !self.data.read(self.next, &mut head) {
            return Err(RingFault::PacketLength { len: available, offset: 0, available });
        }
        let head: Descriptor = zerocopy::transmute!(head);
        let (offset, len) = (u32::from(head.offset8.get()) * 8, u32::from(head.len8.get()) * 8);
        if offset < DESCRIPTOR || offset > len || len + TRAILER > available {
            return Err(RingFault::PacketLength { len, offset, available });
        }
        if len > buffer.limit() {
            return Err(RingFault::PacketTooLong { len, limit: buffer.limit() });
        }
        let body = buffer.body(len as usize - Descriptor::LEN);
        if !self.data.read(self.next + DESCRIPTOR, body) {
            return Err(RingFault::PacketLength { len, offset, available });
        }
        let packet = packet::parse(head, body)?;
        self.next = self.control.advance(self.next, len + TRAILER);
        Ok(Some(packet))
    }

    /// Where the next packet will be read.
    #[inline]
    pub fn mark(&self) -> Mark {
        Mark(self.next)
    }

    /// Goes back to `mark`, which was made since the last [`Incoming::commit`]: the packets behind it come again.
    #[inline]
    pub fn rewind(&mut self, mark: Mark) {
        self.next = mark.0;
    }

    /// Goes on to `index`, up to which a predecessor has taken all; the next [`Incoming::commit`] says so. False, and
    /// nothing has changed, if the writer has not written so far.
    pub fn skip_to(&mut self, index: u32) -> bool {
        let (Ok(index), Ok(write)) = (self.control.check("read", index), self.control.write_index()) else {
            return false;
        };
        let written =
            self.control.distance(self.committed, index) <= self.control.distance(self.committed, write);
        if written {
            (self.next, self.seen) = (index, write);
        }
        written
    }

    /// Gives the writer the room of all packets taken; true if it is to be signalled, because it waits for room and has
    /// enough of it now.
    #[inline]
    pub fn commit(&mut self) -> bool {
        if self.next == self.committed {
            return false;
        }
        let freed = self.control.distance(self.committed, self.next);
        // Release: the packets are read before their room is written again.
        self.control.read.store(self.next, Ordering::Release);
        self.committed = self.next;
        // The index must be visible before the writer's wish is read, else both sides may wait for one another.
        fence(Ordering::SeqCst);
        let pending = self.control.pending.load(Ordering::Relaxed);
        pending != 0 && self.writer_waited(pending, freed)
    }

    /// Decides as Linux does (`hv_pkt_iter_close`): the writer is told when its room becomes enough, and only then.
    #[cold]
    fn writer_waited(&self, pending: u32, freed: u32) -> bool {
        if self.control.features.load(Ordering::Relaxed) & FEATURE_PENDING_SEND == 0 {
            return false;
        }
        // An index that makes no sense is a fault at the next look.
        let Ok(write) = self.control.write_index() else { return false };
        let free = self.control.size - self.control.distance(self.committed, write);
        free > pending && free.saturating_sub(freed) <= pending
    }

    /// Asks for a signal when the ring ceases to be empty; true if it is not empty now, so that none may come.
    pub fn arm(&mut self) -> bool {
        self.control.mask.store(0, Ordering::SeqCst);
        // The wish must be visible before the writer's index is read, else a packet written in between is not signalled.
        fence(Ordering::SeqCst);
        // An index that makes no sense counts as work: it is a fault when it is read.
        self.control.write.load(Ordering::Acquire) != self.next
    }

    /// Says that signals are not needed.
    #[inline]
    pub fn disarm(&mut self) {
        self.control.mask.store(1, Ordering::Relaxed);
    }
}
