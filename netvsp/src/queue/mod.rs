//! One channel of an adapter as a queue of the switch: a [`Source`] of what the guest sends, a [`Sink`] for what it gets.
//!
//! The ring from the guest belongs to the source, which one worker polls. The ring to the guest has two writers, the source
//! with its completions and whoever delivers frames, and so a lock, [`Half`], held for a burst at a time and never while
//! frames are delivered to others: two channels that send to each other cannot wait for one another.
//!
//! A source publishes nothing before its burst was delivered: then it carries out the control request that ended the burst,
//! if one did, writes its answer and the completions, a whole burst's at once, and only when all of them are in the ring
//! gives the guest its room back. A switch that is killed has thus lost nothing that it took, and a guest that does not read
//! its completions stops sending, and nobody else. Nor has it done anything twice: see the journal in [`crate::sections`].
//! Only a reply for which the guest has no section is not waited for: it is left to a successor ([`outbox`]).
//!
//! Cost of a burst: one lock of the source's and one of each sink's, one fence each. Cost of a frame sent: one copy of its
//! ring packet and of its RNDIS header, one completion of 64 bytes. Cost of a frame received: 124 bytes of header at most,
//! the one copy of the frame, 8 bytes of range.

mod outbox;
mod sink;
mod source;
mod traffic;

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmbus::channel::Interrupt;
use vmbus::pages::{Pages, SharedWord};
use vmbus::ring::{Incoming, Outgoing, PacketHeader, PacketKind, RingFault, TransferRange, WriteError};
use vmq::doorbell::Doorbell;
use vmq::frame::Accepts;

use crate::journal::{Ends, Journal};
use crate::message::{Message, Waiting};
use crate::protocol::nvsp;
use crate::receive::Form;
use crate::sections::{NotOutstanding, Sections, Stock};
use crate::transmit::TransmitFault;

use outbox::Outbox;
pub(crate) use sink::Sink;
pub(crate) use source::{Request, Source};
pub(crate) use traffic::{Moved, Traffic};

/// Why a queue stopped: its guest broke the protocol.
#[derive(Debug, thiserror::Error)]
pub enum QueueFault {
    /// A ring is unusable.
    #[error(transparent)]
    Ring(#[from] RingFault),
    /// What the guest sent makes no sense.
    #[error(transparent)]
    Transmit(#[from] TransmitFault),
    /// A completion for nothing.
    #[error(transparent)]
    Completion(#[from] NotOutstanding),
    /// A message that makes no sense at this point.
    #[error(transparent)]
    Violation(#[from] crate::control::Violation),
    /// A message that makes no sense at all.
    #[error(transparent)]
    Malformed(#[from] nvsp::Malformed),
    /// A ring packet of a kind that guests do not send.
    #[error("ring packet of the host's own kind")]
    Kind,
    /// A section that the send buffer has not.
    #[error("send section {index} with {bytes} bytes in use, of {sections} sections of {size}")]
    Section {
        /// Which.
        index: u32,
        /// Bytes in use.
        bytes: u32,
        /// Sections there are.
        sections: u32,
        /// Bytes of a section.
        size: u32,
    },
    /// A range outside the guest's memory.
    #[error("{len} bytes at {gpa:#x} are not guest memory")]
    Memory {
        /// Guest-physical address.
        gpa: u64,
        /// Bytes.
        len: u32,
    },
    /// The ring to the guest is too small for the packets it has to take.
    #[error("packet of {0} bytes does not fit the channel's ring")]
    RingTooSmall(usize),
    /// The guest's memory file was cut short.
    #[error("guest memory is gone: its file was cut short")]
    MemoryLost,
    /// The VMM made the eventfd of an interrupt one that makes us wait ([`vmbus::channel::Trust`]).
    #[error("the eventfd of the guest's interrupt was full and blocking")]
    InterruptBlocks,
}

impl From<WriteError> for QueueFault {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::Fault(fault) => fault.into(),
            WriteError::TooLong(len) => Self::RingTooSmall(len),
            WriteError::Full => Self::RingTooSmall(0),
        }
    }
}

/// The guest's receive buffer.
#[derive(Debug, Clone)]
pub(crate) struct ReceivePath {
    pub(crate) pages: Pages,
    pub(crate) id: u16,
    pub(crate) sections: Arc<Sections>,
    /// Ranges in one packet.
    pub(crate) most: usize,
    pub(crate) form: Form,
}

/// The guest's send buffer.
#[derive(Debug, Clone)]
pub(crate) struct SendPath {
    pub(crate) pages: Pages,
    pub(crate) size: u32,
    pub(crate) count: u32,
}

impl SendPath {
    /// Where the first `bytes` bytes of section `index` are, from the buffer's start.
    fn section(&self, index: u32, bytes: u32) -> Result<u32, QueueFault> {
        let wrong = QueueFault::Section { index, bytes, sections: self.count, size: self.size };
        if index >= self.count || bytes > self.size {
            return Err(wrong);
        }
        index.checked_mul(self.size).ok_or(wrong)
    }
}

/// What all channels of an adapter share at one moment. Replaced as a whole when the guest changes something.
#[derive(Debug, Default)]
pub(crate) struct Path {
    pub(crate) receive: Option<ReceivePath>,
    pub(crate) send: Option<SendPath>,
    /// Most packets in one message 107.
    pub(crate) max_packets: usize,
    /// The guest's frames are taken; else they are dropped.
    pub(crate) transmit: bool,
    /// What the guest takes undone.
    pub(crate) accepts: Accepts,
}

/// Bytes of a packet in the ring but for its payload: descriptor and trailer.
const AROUND: usize = 16 + 8;

/// Bytes that a completion takes in the ring.
const COMPLETION_BYTES: usize = AROUND + nvsp::MESSAGE_BYTES;

/// Bytes that a message takes in the ring.
fn ring_bytes(message: &Message) -> usize {
    match message {
        Message::Completion(_, payload) | Message::InBand(payload) => {
            AROUND + payload.len().next_multiple_of(8)
        }
        // A header of 8 bytes more, and one range.
        Message::Control(_) => COMPLETION_BYTES + 8 + size_of::<TransferRange>(),
    }
}

/// What became of messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Written {
    /// They are in the ring, all of them, or of no use to anybody.
    Whole,
    /// The ring is full.
    NoRoom,
    /// The guest has all sections.
    NoSection,
}

/// The way to the guest.
#[derive(Debug)]
pub(crate) struct Half {
    index: u16,
    outgoing: Outgoing,
    /// The ring's write index, for the journal.
    position: SharedWord,
    journal: Journal,
    path: Arc<Path>,
    /// Free sections at hand.
    stock: Stock,
    outbox: Outbox,
    /// The packet that is being made.
    ranges: Vec<TransferRange>,
    chain: Vec<u32>,
    /// First sections of packets that are written and not published.
    unpublished: Vec<u32>,
}

impl Half {
    /// What the adapter's channels share changed.
    pub(crate) fn set_path(&mut self, path: &Arc<Path>) {
        if path.receive.as_ref().is_none_or(|receive| !self.uses(&receive.sections)) {
            // They are of a buffer that is no more.
            self.stock.clear();
        }
        self.path = Arc::clone(path);
    }

    fn uses(&self, sections: &Arc<Sections>) -> bool {
        self.path.receive.as_ref().is_some_and(|receive| Arc::ptr_eq(&receive.sections, sections))
    }

    /// The channel is closed: its sections are free.
    pub(crate) fn close(&mut self) {
        if let Some(receive) = &self.path.receive {
            receive.sections.release_channel(self.index, &mut self.stock);
        }
        self.path = Arc::default();
        self.outbox.clear();
    }

    /// Writes what waits, as far as it goes.
    fn flush(&mut self) -> Result<Written, QueueFault> {
        while let Some(message) = self.outbox.take() {
            let written = self.write(&message);
            if !matches!(written, Ok(Written::Whole)) {
                self.outbox.put_back(message);
                return written;
            }
            self.note_position();
            self.outbox.written(message);
        }
        Ok(Written::Whole)
    }

    /// Writes down where the ring ends until all that is unpublished appears at once.
    fn note_position(&self) {
        self.journal.set_position(self.index, self.position.load(Ordering::Relaxed));
    }

    /// What a successor may have to write, if it is here that it is to be found.
    pub(crate) fn waiting(&self) -> Option<Waiting> {
        (self.index == 0).then(|| self.outbox.to_keep())
    }

    fn write(&mut self, message: &Message) -> Result<Written, QueueFault> {
        let written = match message {
            Message::Completion(transaction, payload) => {
                self.outgoing.write(&PacketHeader::completion(*transaction), &[payload])
            }
            Message::InBand(payload) => self.outgoing.write(&PacketHeader::in_band(0), &[payload]),
            Message::Control(rndis) => return self.write_control(rndis),
        };
        match written {
            Ok(()) => Ok(Written::Whole),
            Err(WriteError::Full) => Ok(Written::NoRoom),
            Err(error) => Err(error.into()),
        }
    }

    /// Writes a control message into a section. One that has no buffer to go to is of no use to anybody.
    fn write_control(&mut self, rndis: &[u8]) -> Result<Written, QueueFault> {
        let path = Arc::clone(&self.path);
        let Some(receive) = &path.receive else { return Ok(Written::Whole) };
        if !receive.sections.fill_reserved(&mut self.stock, 1) {
            return Ok(Written::NoSection);
        }
        let Some(&section) = self.stock.last() else { return Ok(Written::NoSection) };
        let size = receive.form.section_size;
        let len = u32::try_from(rndis.len()).unwrap_or(u32::MAX).min(size);
        let Some(at) = section.checked_mul(size) else { return Ok(Written::Whole) };
        if len as usize != rndis.len() || !receive.pages.write(at, rndis) {
            return Ok(Written::Whole);
        }
        self.stock.pop();
        self.chain.clear();
        self.ranges.clear();
        self.chain.push(section);
        self.ranges.push(TransferRange::new(len, at));
        Ok(if self.write_packet(receive, true)? { Written::Whole } else { Written::NoRoom })
    }

    /// Writes a packet of the sections in `chain`. False, and they are back in stock, if the ring is full.
    fn write_packet(&mut self, receive: &ReceivePath, control: bool) -> Result<bool, QueueFault> {
        let Some(&first) = self.chain.first() else { return Ok(true) };
        if self.unpublished.is_empty() {
            self.note_position();
        }
        receive.sections.occupy(self.index, &self.chain);
        let header = PacketHeader {
            kind: PacketKind::TransferPages { pageset: receive.id, ranges: &self.ranges },
            completion_requested: true,
            transaction: first.into(),
        };
        let written = self.outgoing.write(&header, &[&nvsp::rndis_packet(control)]);
        if written.is_ok() {
            receive.sections.written(first);
            self.unpublished.push(first);
        } else {
            receive.sections.withdraw(&self.chain, &mut self.stock);
        }
        self.chain.clear();
        self.ranges.clear();
        match written {
            Ok(()) => Ok(true),
            Err(WriteError::Full) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Shows the guest what was written; true if it is to be interrupted.
    fn publish(&mut self) -> bool {
        let signal = self.outgoing.publish();
        if let Some(receive) = &self.path.receive {
            self.unpublished.iter().for_each(|&first| receive.sections.published(first));
        }
        self.unpublished.clear();
        self.outbox.published();
        signal
    }
}

/// An open channel: what its source, its sink and its adapter share.
#[derive(Debug)]
pub(crate) struct Channel {
    /// 0 is the primary.
    pub(crate) index: u16,
    pub(crate) interrupt: Interrupt,
    doorbell: Arc<Doorbell>,
    accepts: AtomicU8,
    /// Messages wait for room or for a section.
    pending: AtomicBool,
    half: Mutex<Half>,
    /// What the guest sent.
    pub(crate) sent: Traffic,
    /// What it was given.
    pub(crate) received: Traffic,
}

impl Channel {
    /// Channel number `index`, which writes to `outgoing`, whose ring is `ring`. `None` if the ring has no control page.
    pub(crate) fn new(
        index: u16,
        outgoing: Outgoing,
        ring: &Pages,
        doorbell: Arc<Doorbell>,
        interrupt: Interrupt,
        journal: Journal,
    ) -> Option<Self> {
        let half = Half {
            index,
            outgoing,
            // The write index is the control page's first word.
            position: ring.word(0)?,
            outbox: Outbox::new(index, &journal),
            journal,
            path: Arc::default(),
            stock: Stock::new(),
            ranges: Vec::new(),
            chain: Vec::new(),
            unpublished: Vec::new(),
        };
        Some(Self {
            index,
            interrupt,
            doorbell,
            accepts: AtomicU8::new(0),
            pending: AtomicBool::new(false),
            half: Mutex::new(half),
            sent: Traffic::default(),
            received: Traffic::default(),
        })
    }

    fn half(&self) -> MutexGuard<'_, Half> {
        self.half.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the adapter's channels share changed. Afterwards no sink uses the old one.
    pub(crate) fn set_path(&self, path: &Arc<Path>) {
        self.half().set_path(path);
        self.accepts.store(path.accepts.bits(), Ordering::Relaxed);
    }

    /// Sends `message` as soon as there is room. False if that is not now: the source must be polled.
    pub(crate) fn send(&self, message: Message) -> Result<bool, QueueFault> {
        let mut half = self.half();
        half.outbox.push(message);
        half.outbox.owe();
        half.flush()?;
        let signal = half.publish();
        self.note_pending(&half);
        let all = half.outbox.is_empty();
        drop(half);
        self.interrupt_if(signal)?;
        Ok(all)
    }

    /// What a successor may have to write of the primary channel's.
    pub(crate) fn waiting(&self) -> Waiting {
        self.half().waiting().unwrap_or_default()
    }

    /// What a predecessor left waits here, as far as it is for us to write. The rings stand at `ends`.
    pub(crate) fn succeed(&self, left: Waiting, ends: Ends) {
        let mut half = self.half();
        let shown = half.journal.position(self.index) != ends.write;
        let over = half.journal.round(self.index) == Some(ends.read);
        half.outbox.succeed(left, shown, over);
        self.note_pending(&half);
    }

    fn note_pending(&self, half: &Half) {
        self.pending.store(!half.outbox.is_empty(), Ordering::Relaxed);
    }

    /// Interrupts the guest if it is to be.
    #[inline]
    fn interrupt_if(&self, wanted: bool) -> Result<(), QueueFault> {
        if wanted {
            self.interrupt.signal();
            if self.interrupt.is_dead() {
                return Err(QueueFault::InterruptBlocks);
            }
        }
        Ok(())
    }

    /// Bytes of the ring to the guest.
    fn ring_bytes(&self) -> usize {
        self.half().outgoing.size() as usize
    }

    /// True if the guest has read all that there is for it.
    pub(crate) fn is_read(&self) -> bool {
        let half = self.half();
        half.outbox.is_empty() && half.outgoing.is_read()
    }

    /// Goes on where a predecessor stopped, which may have been between two stores that end a round. Where the rings stand
    /// then.
    pub(crate) fn resume(&self, incoming: &mut Incoming) -> Ends {
        let half = self.half();
        let write = half.position.load(Ordering::Relaxed);
        let skipped = half.journal.ended_round(self.index, write).is_some_and(|read| incoming.skip_to(read));
        if skipped && incoming.commit() {
            self.interrupt.signal();
        }
        Ends { write, read: incoming.mark().index() }
    }

    /// Nothing is sent any more; sections are free.
    pub(crate) fn close(&self) {
        self.half().close();
    }
}

#[cfg(test)]
mod tests;
