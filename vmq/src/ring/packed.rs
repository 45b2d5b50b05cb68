//! Packed rings (2.8): one ring of descriptors that both sides write.

use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use super::walk::{self, Raw};
use super::{
    Chain, DESC_WRITE, Descriptor, Inflight, Layout, LayoutError, MAX_PENDING, Mark, RingFault, Virtqueue,
};
use crate::memory::{GuestMemory, prefetch_write};

const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;
const WRAP: u16 = 1 << 15;

/// `RING_EVENT_FLAGS_*` (2.8.14).
const EVENT_ENABLE: u16 = 0;
const EVENT_DISABLE: u16 = 1;
const EVENT_DESC: u16 = 2;

/// A position in the ring and the wrap counter that goes with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cursor {
    at: u16,
    wrap: bool,
}

impl Cursor {
    #[inline]
    fn advance(&mut self, by: u16, size: u16) {
        // `at < size <= 32768` and `by <= size`: no overflow.
        self.at += by;
        if self.at >= size {
            self.at -= size;
            self.wrap = !self.wrap;
        }
    }

    fn base(self) -> u16 {
        self.at | if self.wrap { WRAP } else { 0 }
    }

    fn from_base(base: u16) -> Self {
        Self { at: base & !WRAP, wrap: base & WRAP != 0 }
    }
}

/// Descriptors in a cache line.
const LINE_ENTRIES: u16 = 4;

/// A packed ring, device side.
#[derive(Debug)]
pub struct PackedRing {
    layout: Layout,
    next: Cursor,
    used: Cursor,
    /// The first used descriptor of a burst is shown last, so that the burst appears at once: where, and its flags.
    held: Option<(u16, u16)>,
    /// With a record of what is in flight, bursts wait here until they are published: where each used descriptor
    /// goes, and bytes 8 to 16 of it. A crash must not leave descriptors that are half overwritten.
    staged: Vec<(Cursor, u64)>,
    /// Slots pushed since the last publication.
    pushed: u16,
    more: Vec<Descriptor>,
    inflight: Option<Inflight>,
}

impl PackedRing {
    /// `layout`'s parts have the size that goes with `layout.size`: [`super::Ring::new`] saw to it.
    pub(super) fn new(layout: Layout, base: u32) -> Result<Self, LayoutError> {
        let next = Cursor::from_base((base & 0xffff) as u16);
        // The high half is the used position; peers that know only one position send 0 there.
        let used = match (base >> 16) as u16 {
            0 => next,
            used => Cursor::from_base(used),
        };
        if next.at >= layout.size || used.at >= layout.size {
            return Err(LayoutError::Base(base));
        }
        Ok(Self {
            layout,
            next,
            used,
            held: None,
            staged: Vec::new(),
            pushed: 0,
            more: Vec::new(),
            inflight: None,
        })
    }

    #[inline]
    fn flags_cell(&self, at: u16) -> &AtomicU16 {
        debug_assert!(at < self.layout.size);
        // SAFETY: the ring holds `size` descriptors of 16 bytes, aligned to 16; the flags are their last two bytes.
        unsafe { AtomicU16::from_ptr(self.layout.descriptors.ptr().add(16 * usize::from(at) + 14).cast()) }
    }

    #[inline]
    fn descriptor(&self, at: u16) -> Raw {
        debug_assert!(at < self.layout.size);
        // SAFETY: as `flags_cell`. One volatile read makes the private copy.
        Raw::packed(unsafe {
            self.layout.descriptors.ptr().cast::<[u64; 2]>().add(usize::from(at)).read_volatile()
        })
    }

    #[inline]
    fn is_available(&self, cursor: Cursor) -> bool {
        // Acquire: the rest of the descriptor is visible.
        let flags = self.flags_cell(cursor.at).load(Ordering::Acquire);
        (flags & AVAIL != 0) == cursor.wrap && (flags & USED != 0) != cursor.wrap
    }

    #[cold]
    fn pop_chain(&mut self, first: Raw, memory: &GuestMemory) -> Result<Chain, RingFault> {
        if self.more.len() > MAX_PENDING {
            return Err(RingFault::ChainTooLong { limit: MAX_PENDING });
        }
        let mut more = std::mem::take(&mut self.more);
        let at = more.len();
        let size = self.layout.size;
        let mut cursor = self.next;
        // Linked descriptors follow one another in the ring; the id stands in the last.
        let walked = walk::chain(first, size, true, memory, &mut more, |_, _| {
            cursor.advance(1, size);
            Ok(self.descriptor(cursor.at))
        });
        self.more = more;
        let (slots, last) = walked?;
        let count = self.more.len() - at;
        let first = self.more[at];
        let fits = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let (more_at, more_count) = if count == 1 { (0, 0) } else { (fits(at), fits(count)) };
        Ok(Chain { id: last.next, slots, first, more_at, more_count })
    }

    fn event_cell(&self, device: bool) -> &AtomicU32 {
        let part = if device { &self.layout.device } else { &self.layout.driver };
        // SAFETY: both parts hold 4 bytes aligned to 4: `off_wrap` in the low half, `flags` in the high one.
        unsafe { AtomicU32::from_ptr(part.ptr().cast()) }
    }

    /// Notes in the dirty log that the descriptor at `at` was written.
    #[cold]
    fn log_used(&self, at: u16) {
        if let Some((log, _)) = &self.layout.log {
            log.mark(self.layout.descriptors.gpa() + 16 * u64::from(at), 16);
        }
    }

    fn write_event(&self, off_wrap: u16, flags: u16) {
        let event = u32::from(off_wrap) | u32::from(flags) << 16;
        self.event_cell(true).store(event, Ordering::Relaxed);
        if let Some((log, _)) = &self.layout.log {
            log.mark(self.layout.device.gpa(), 4);
        }
    }

    /// Shows the staged burst, which ends at `self.used`. Each descriptor is one store with a step of the record
    /// before it, so that a successor knows how far the driver was shown, whenever this process ends.
    #[cold]
    fn publish_staged(&mut self) {
        let Some(inflight) = &self.inflight else { return };
        for (i, &(from, word)) in self.staged.iter().enumerate() {
            let to = self.staged.get(i + 1).map_or(self.used, |&(to, _)| to);
            inflight.prepare((from.at, from.wrap), (to.at, to.wrap));
            // SAFETY: `at < size`, see `flags_cell`; bytes 8 to 16 of a descriptor aligned to 16.
            let cell = unsafe {
                AtomicU64::from_ptr(self.layout.descriptors.ptr().add(16 * usize::from(from.at) + 8).cast())
            };
            // Release: the step and the buffer are in memory before the descriptor.
            cell.store(word.to_le(), Ordering::Release);
            self.log_used(from.at);
        }
        inflight.settle(self.used.at, self.used.wrap);
        self.staged.clear();
    }

    fn wants_interrupt(&self, pushed: u16) -> bool {
        let event = self.event_cell(false).load(Ordering::Relaxed);
        let (off_wrap, flags) = ((event & 0xffff) as u16, (event >> 16) as u16);
        match flags & 3 {
            EVENT_DISABLE => false,
            EVENT_DESC if self.layout.event_idx => {
                let mut event = off_wrap & !WRAP;
                if (off_wrap & WRAP != 0) != self.used.wrap {
                    event = event.wrapping_sub(self.layout.size);
                }
                let new = self.used.at;
                new.wrapping_sub(event).wrapping_sub(1) < pushed
            }
            _ => true,
        }
    }
}

impl Virtqueue for PackedRing {
    #[inline]
    fn refresh(&mut self) -> Result<(), RingFault> {
        Ok(())
    }

    #[inline]
    fn pop(&mut self, memory: &GuestMemory) -> Result<Option<Chain>, RingFault> {
        if !self.is_available(self.next) {
            return Ok(None);
        }
        let first = self.descriptor(self.next.at);
        let chain = if first.is_single() {
            Chain::single(first.next, first.descriptor())
        } else {
            self.pop_chain(first, memory)?
        };
        if chain.id >= self.layout.size {
            return Err(RingFault::IndexOutside { index: chain.id, size: usize::from(self.layout.size) });
        }
        self.next.advance(chain.slots, self.layout.size);
        Ok(Some(chain))
    }

    #[inline]
    fn descriptors<'a>(&'a self, chain: &'a Chain) -> &'a [Descriptor] {
        if chain.is_single() {
            return std::slice::from_ref(&chain.first);
        }
        let at = chain.more_at as usize;
        self.more.get(at..at + chain.more_count as usize).unwrap_or(&[])
    }

    #[inline]
    fn mark(&self) -> Mark {
        Mark(self.next.at, self.next.wrap)
    }

    #[inline]
    fn rewind(&mut self, mark: Mark) {
        self.next = Cursor { at: mark.0, wrap: mark.1 };
    }

    #[inline]
    fn push_used(&mut self, chain: &Chain, len: u32) {
        let flags = if self.used.wrap { AVAIL | USED } else { 0 } | if len > 0 { DESC_WRITE } else { 0 };
        let used = self.used;
        let at = used.at;
        self.used.advance(chain.slots, self.layout.size);
        self.pushed = self.pushed.saturating_add(chain.slots);
        if self.inflight.is_some() {
            let word = u64::from(len) | u64::from(chain.id) << 32 | u64::from(flags) << 48;
            return self.staged.push((used, word));
        }
        // SAFETY: `at < size`, see `flags_cell`; `len` and `id` are bytes 8 to 14 of the descriptor.
        unsafe {
            let descriptor = self.layout.descriptors.ptr().add(16 * usize::from(at));
            descriptor.add(8).cast::<u32>().write_volatile(len.to_le());
            descriptor.add(12).cast::<u16>().write_volatile(chain.id.to_le());
        }
        if self.held.is_none() {
            self.held = Some((at, flags));
        } else {
            self.flags_cell(at).store(flags, Ordering::Release);
        }
        if self.layout.log.is_some() {
            self.log_used(at);
        }
    }

    #[inline]
    fn prefetch_used(&self, count: usize) {
        let mut cursor = self.used;
        for _ in (0..count).step_by(usize::from(LINE_ENTRIES)) {
            prefetch_write(self.layout.descriptors.ptr().wrapping_add(16 * usize::from(cursor.at)));
            cursor.advance(LINE_ENTRIES % self.layout.size, self.layout.size);
        }
    }

    #[inline]
    fn publish(&mut self) -> bool {
        self.more.clear();
        if let Some((at, flags)) = self.held.take() {
            // Release: buffers and the burst's other descriptors are visible to a driver that sees this one.
            self.flags_cell(at).store(flags, Ordering::Release);
            if self.layout.log.is_some() {
                self.log_used(at);
            }
        } else if !self.staged.is_empty() {
            self.publish_staged();
        } else {
            return false;
        }
        let pushed = std::mem::take(&mut self.pushed);
        // The descriptors must be visible before the driver's wish is read, else both sides may go to sleep.
        fence(Ordering::SeqCst);
        self.wants_interrupt(pushed)
    }

    fn arm(&mut self) -> bool {
        let flags = if self.layout.event_idx { EVENT_DESC } else { EVENT_ENABLE };
        self.write_event(self.next.base(), flags);
        fence(Ordering::SeqCst);
        self.is_available(self.next)
    }

    fn disarm(&mut self) {
        self.write_event(0, EVENT_DISABLE);
    }

    fn base(&self) -> u32 {
        u32::from(self.next.base()) | u32::from(self.used.base()) << 16
    }

    fn track(&mut self, inflight: Inflight) {
        let size = self.layout.size;
        let is_available = |at, wrap| self.is_available(Cursor { at, wrap });
        if let Some((at, wrap)) = inflight.resume_packed(size, is_available) {
            (self.next, self.used) = (Cursor { at, wrap }, Cursor { at, wrap });
        }
        inflight.start(size, self.used.at, self.used.wrap);
        self.inflight = Some(inflight);
    }
}
