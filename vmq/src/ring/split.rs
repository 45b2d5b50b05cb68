//! Split rings (2.7): descriptor table, available ring, used ring.

use std::sync::atomic::{AtomicU16, Ordering, fence};

use super::walk::{self, Raw};
use super::{Chain, Descriptor, Inflight, Layout, MAX_PENDING, Mark, RingFault, Virtqueue};
use crate::memory::{GuestMemory, prefetch_write};

/// `VIRTQ_AVAIL_F_NO_INTERRUPT`, and of the same value `VIRTQ_USED_F_NO_NOTIFY`.
const SUPPRESS: u16 = 1;

/// Offset of the first entry in the available and used rings.
const ENTRIES: usize = 4;

/// Used entries in a cache line.
const LINE_ENTRIES: usize = 8;

/// A split ring, device side.
#[derive(Debug)]
pub struct SplitRing {
    layout: Layout,
    mask: u16,
    /// Next entry of the available ring to be taken, and how far the driver was at the last look.
    next: u16,
    available: u16,
    /// Next entry of the used ring to be written, and what the driver was shown.
    used: u16,
    published: u16,
    /// Used index at the last interrupt decision; none before the first.
    signalled: Option<u16>,
    more: Vec<Descriptor>,
    inflight: Option<Inflight>,
}

impl SplitRing {
    /// `layout.size` is a power of two and the parts have the size that goes with it: [`super::Ring::new`] saw to it.
    pub(super) fn new(layout: Layout, base: u32) -> Self {
        // The low half is the available index; the used index is read back from the ring itself.
        let next = (base & 0xffff) as u16;
        let mask = layout.size - 1;
        let mut ring = Self {
            layout,
            mask,
            next,
            available: next,
            used: 0,
            published: 0,
            signalled: None,
            more: Vec::new(),
            inflight: None,
        };
        ring.used = ring.used_cell(2).load(Ordering::Acquire);
        ring.published = ring.used;
        ring
    }

    #[inline]
    fn driver_cell(&self, at: usize) -> &AtomicU16 {
        debug_assert!(at + 2 <= self.layout.driver.len() && at.is_multiple_of(2));
        // SAFETY: `at` is even and within the part, whose start is aligned to 2; the memory lives as long as `layout`.
        unsafe { AtomicU16::from_ptr(self.layout.driver.ptr().add(at).cast()) }
    }

    #[inline]
    fn used_cell(&self, at: usize) -> &AtomicU16 {
        debug_assert!(at + 2 <= self.layout.device.len() && at.is_multiple_of(2));
        // SAFETY: as `driver_cell`, for the used ring.
        unsafe { AtomicU16::from_ptr(self.layout.device.ptr().add(at).cast()) }
    }

    /// `index` must be below the ring's size.
    #[inline]
    fn descriptor(&self, index: u16) -> Raw {
        debug_assert!(index < self.layout.size);
        // SAFETY: the table holds `size` entries of 16 bytes, aligned to 16. One volatile read makes the private copy.
        Raw::split(unsafe {
            self.layout.descriptors.ptr().cast::<[u64; 2]>().add(usize::from(index)).read_volatile()
        })
    }

    fn used_event(&self) -> u16 {
        self.driver_cell(ENTRIES + 2 * usize::from(self.layout.size)).load(Ordering::Relaxed)
    }

    #[cold]
    fn pop_chain(&mut self, id: u16, first: Raw, memory: &GuestMemory) -> Result<Chain, RingFault> {
        if self.more.len() > MAX_PENDING {
            return Err(RingFault::ChainTooLong { limit: MAX_PENDING });
        }
        let mut more = std::mem::take(&mut self.more);
        let at = more.len();
        let size = self.layout.size;
        let walked = walk::chain(first, size, false, memory, &mut more, |_, next| {
            if next >= size {
                return Err(RingFault::IndexOutside { index: next, size: usize::from(size) });
            }
            Ok(self.descriptor(next))
        });
        self.more = more;
        walked?;
        let count = self.more.len() - at;
        let first = self.more[at];
        if count == 1 {
            return Ok(Chain::single(id, first));
        }
        let fits = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Ok(Chain { id, slots: 1, first, more_at: fits(at), more_count: fits(count) })
    }

    /// Notes in the dirty log that `len` bytes of the used ring were written, `at` bytes into it. The peer chose the
    /// ring's logged address, so the sum may not fit; the log ignores what lies beyond its end.
    #[cold]
    fn log_write(&self, at: usize, len: u64) {
        if let Some((log, gpa)) = &self.layout.log {
            log.mark(gpa.saturating_add(at as u64), len);
        }
    }

    #[cold]
    fn log_used(&self) {
        for i in 0..self.used.wrapping_sub(self.published) {
            let slot = self.published.wrapping_add(i) & self.mask;
            self.log_write(ENTRIES + 8 * usize::from(slot), 8);
        }
        self.log_write(2, 2);
    }

    /// Writes the event index (`at` behind the entries) or the flags (`at` 0).
    fn write_wish(&self, at: usize, value: u16) {
        self.used_cell(at).store(value, Ordering::Relaxed);
        if self.layout.log.is_some() {
            self.log_write(at, 2);
        }
    }
}

impl Virtqueue for SplitRing {
    #[inline]
    fn refresh(&mut self) -> Result<(), RingFault> {
        // Acquire: the entries and descriptors behind the index are visible.
        let available = self.driver_cell(2).load(Ordering::Acquire);
        let by = available.wrapping_sub(self.next);
        if by > self.layout.size {
            return Err(RingFault::IndexJump { by, size: self.layout.size });
        }
        self.available = available;
        Ok(())
    }

    #[inline]
    fn pop(&mut self, memory: &GuestMemory) -> Result<Option<Chain>, RingFault> {
        if self.next == self.available {
            return Ok(None);
        }
        let slot = usize::from(self.next & self.mask);
        let id = self.driver_cell(ENTRIES + 2 * slot).load(Ordering::Relaxed);
        if id >= self.layout.size {
            return Err(RingFault::IndexOutside { index: id, size: usize::from(self.layout.size) });
        }
        let first = self.descriptor(id);
        let chain = if first.is_single() {
            Chain::single(id, first.descriptor())
        } else {
            self.pop_chain(id, first, memory)?
        };
        self.next = self.next.wrapping_add(1);
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
        Mark(self.next, false)
    }

    #[inline]
    fn rewind(&mut self, mark: Mark) {
        self.next = mark.0;
    }

    #[inline]
    fn push_used(&mut self, chain: &Chain, len: u32) {
        let slot = usize::from(self.used & self.mask);
        let entry = u64::from(chain.id) | u64::from(len) << 32;
        // SAFETY: the used ring holds `size` entries of 8 bytes behind 4 bytes; `slot < size`. The part is aligned to
        // 4, so the write may be unaligned for 8; the driver reads it only after the index is published.
        unsafe {
            self.layout.device.ptr().add(ENTRIES + 8 * slot).cast::<u64>().write_unaligned(entry.to_le());
        }
        self.used = self.used.wrapping_add(1);
    }

    #[inline]
    fn prefetch_used(&self, count: usize) {
        let first = usize::from(self.used & self.mask);
        for entry in (0..count).step_by(LINE_ENTRIES) {
            let slot = (first + entry) & usize::from(self.mask);
            prefetch_write(self.layout.device.ptr().wrapping_add(ENTRIES + 8 * slot));
        }
    }

    #[inline]
    fn publish(&mut self) -> bool {
        self.more.clear();
        if self.used == self.published {
            return false;
        }
        // Release: entries and buffers are visible to a driver that sees the index.
        self.used_cell(2).store(self.used, Ordering::Release);
        if self.layout.log.is_some() {
            self.log_used();
        }
        self.published = self.used;
        if let Some(inflight) = &self.inflight {
            inflight.settle(self.used, false);
        }
        // The index must be visible before the driver's wish is read, else both sides may go to sleep.
        fence(Ordering::SeqCst);
        if !self.layout.event_idx {
            return self.driver_cell(0).load(Ordering::Relaxed) & SUPPRESS == 0;
        }
        let (event, new) = (self.used_event(), self.used);
        match self.signalled.replace(new) {
            // 2.7.7.2: the event index was passed since the last decision.
            Some(old) => new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old),
            None => true,
        }
    }

    fn arm(&mut self) -> bool {
        if self.layout.event_idx {
            self.write_wish(ENTRIES + 8 * usize::from(self.layout.size), self.next);
        } else {
            self.write_wish(0, 0);
        }
        fence(Ordering::SeqCst);
        self.driver_cell(2).load(Ordering::Acquire) != self.next
    }

    fn disarm(&mut self) {
        if !self.layout.event_idx {
            self.write_wish(0, SUPPRESS);
        }
        // With event indices the last one asked for lies behind and will not be passed again for 2^16 buffers.
    }

    fn base(&self) -> u32 {
        u32::from(self.next)
    }

    fn track(&mut self, inflight: Inflight) {
        inflight.start(self.layout.size, self.used, false);
        self.inflight = Some(inflight);
    }
}
