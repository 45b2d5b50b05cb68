//! A ring for saturating traffic: every descriptor has one buffer for good, and all go round in order.
//!
//! Cost per buffer: nothing but a share of the index write in a split ring, one 8-byte write in a packed one. So the
//! generator stays far from being the bottleneck of what it measures. Who wants to know nothing of the buffers that come back
//! takes them from a split ring at once, however many.

use std::sync::atomic::{Ordering, fence};

use super::{Addresses, Arena, Buffer, DESC_BYTES, Features, Form, Parts, RawDescriptor};

/// Flags of a packed descriptor.
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// A ring whose descriptors are written once and used in order (`VIRTIO_F_IN_ORDER`, no event indices, interrupts off).
/// The buffer at position `n` is the one with index `n % size`.
#[derive(Debug)]
pub struct FixedRing {
    parts: Parts,
    form: Form,
    /// Bytes 8 to 16 of each packed descriptor without the flags of its round.
    words: Vec<u64>,
    offered: Cursor,
    reclaimed: Cursor,
    out: u16,
    /// Buffers of a batch that the device reported by its last one, still to be taken back.
    batch: u16,
}

/// A slot, the round's wrap counter, and the count as split rings have it.
#[derive(Debug, Clone, Copy)]
struct Cursor {
    slot: u16,
    wrap: bool,
    count: u16,
}

impl Cursor {
    const START: Self = Self { slot: 0, wrap: true, count: 0 };

    #[inline]
    fn step(&mut self, size: u16) {
        self.advance(1, size);
    }

    /// By at most `size`.
    #[inline]
    fn advance(&mut self, by: u16, size: u16) {
        self.count = self.count.wrapping_add(by);
        let left = size - self.slot;
        (self.slot, self.wrap) =
            if by < left { (self.slot + by, self.wrap) } else { (by - left, !self.wrap) };
    }
}

impl FixedRing {
    /// A ring of `size` buffers, of which `buffer` says where each lies. `None` as for [`super::DriverRing::new`].
    pub fn new(arena: &Arena, form: Form, size: u16, mut buffer: impl FnMut(u16) -> Buffer) -> Option<Self> {
        let allowed = match form {
            Form::Split => size.is_power_of_two(),
            Form::Packed => size > 0 && size <= 32768,
        };
        if !allowed {
            return None;
        }
        let features = Features { in_order: true, ..Features::default() };
        let parts = Parts::new(arena, size, features, form)?;
        let mut words = Vec::with_capacity(usize::from(size));
        for index in 0..size {
            let Buffer { addr, len, .. } = buffer(index);
            let flags = buffer(index).flags();
            let at = parts.at.descriptors + DESC_BYTES * u64::from(index);
            let next = if form == Form::Packed { index } else { 0 };
            // A packed descriptor with equal AVAIL and USED bits is not available in the first round.
            RawDescriptor { addr, len, flags, next }.write(arena, at, form);
            words.push(u64::from(len) | u64::from(index) << 32 | u64::from(flags) << 48);
            if form == Form::Split {
                arena.write_u16(parts.at.driver + 4 + 2 * u64::from(index), index);
            }
        }
        // No interrupts, in either form's words.
        match form {
            Form::Split => arena.write_u16(parts.at.driver, 1),
            Form::Packed => arena.write_u32(parts.at.driver, 1 << 16),
        }
        Some(Self { parts, form, words, offered: Cursor::START, reclaimed: Cursor::START, out: 0, batch: 0 })
    }

    /// Where its parts lie.
    pub fn addresses(&self) -> Addresses {
        self.parts.at
    }

    /// Buffers that can be offered.
    #[inline]
    pub fn free(&self) -> u16 {
        self.parts.size - self.out
    }

    /// Index of the buffer that is offered next.
    #[inline]
    pub fn next_offered(&self) -> u16 {
        self.offered.slot
    }

    /// Index of the buffer that comes back next.
    #[inline]
    pub fn next_reclaimed(&self) -> u16 {
        self.reclaimed.slot
    }

    /// Makes the next `count` buffers available (at most those that are free). True if the device wants a doorbell.
    #[inline]
    pub fn offer(&mut self, count: u16) -> bool {
        let count = count.min(self.free());
        if count == 0 {
            return false;
        }
        self.out += count;
        let (arena, at) = (&self.parts.arena, &self.parts.at);
        match self.form {
            Form::Split => {
                self.offered.advance(count, self.parts.size);
                arena.write_u16(at.driver + 2, self.offered.count);
            }
            Form::Packed => {
                for _ in 0..count {
                    let flags = if self.offered.wrap { AVAIL } else { USED };
                    let word = self.words[usize::from(self.offered.slot)] | u64::from(flags) << 48;
                    arena.write_u64(at.descriptors + DESC_BYTES * u64::from(self.offered.slot) + 8, word);
                    self.offered.step(self.parts.size);
                }
            }
        }
        fence(Ordering::SeqCst);
        match self.form {
            Form::Split => arena.read_u16(at.device) & 1 == 0,
            Form::Packed => arena.read_u32(at.device) >> 16 != 1,
        }
    }

    /// Takes back at most `max` buffers; `visit` gets each one's index and the bytes the device wrote. Returns how
    /// many came back.
    #[inline]
    pub fn reclaim(&mut self, max: u16, mut visit: impl FnMut(u16, u32)) -> u16 {
        let ready = self.ready(max);
        let mut count = 0;
        while count < ready {
            let Some(len) = self.returned_len() else { break };
            visit(self.reclaimed.slot, len);
            self.reclaimed.step(self.parts.size);
            count += 1;
        }
        self.out -= count;
        count
    }

    /// As [`FixedRing::reclaim`], of buffers whose contents nobody wants.
    #[inline]
    pub fn take_back(&mut self, max: u16) -> u16 {
        if self.form == Form::Packed {
            return self.reclaim(max, |_, _| ());
        }
        let count = self.ready(max);
        self.reclaimed.advance(count, self.parts.size);
        self.out -= count;
        count
    }

    /// How many of at most `max` buffers may be back: what the index of a split ring says. A packed one has none, and all may.
    #[inline]
    fn ready(&self, max: u16) -> u16 {
        let limit = max.min(self.out);
        if self.form == Form::Packed {
            return limit;
        }
        let shown = self.parts.arena.read_u16(self.parts.at.device + 2);
        shown.wrapping_sub(self.reclaimed.count).min(limit)
    }

    /// Bytes that the device wrote to the buffer that comes back next. `None` if a packed one is not back yet.
    #[inline]
    fn returned_len(&mut self) -> Option<u32> {
        let (arena, at, slot) = (&self.parts.arena, &self.parts.at, u64::from(self.reclaimed.slot));
        if self.form == Form::Split {
            return Some(arena.read_u32(at.device + 4 + 8 * slot + 4));
        }
        if self.batch > 0 {
            self.batch -= 1;
            return Some(0);
        }
        let descriptor = at.descriptors + DESC_BYTES * slot;
        let flags = arena.read_u16(descriptor + 14);
        if [flags & AVAIL != 0, flags & USED != 0] != [self.reclaimed.wrap; 2] {
            return None;
        }
        let last = arena.read_u16(descriptor + 12) % self.parts.size;
        let behind = if last < self.reclaimed.slot { self.parts.size } else { 0 };
        self.batch = last + behind - self.reclaimed.slot;
        Some(arena.read_u32(descriptor + 8))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cursor_that_advances_at_once_is_where_single_steps_lead() {
        for size in [1, 5, 8, 32768] {
            let mut at = Cursor::START;
            for by in [0, 1, size / 2, size, size - 1, size, 1].into_iter().cycle().take(20) {
                let mut stepped = at;
                (0..by).for_each(|_| stepped.step_alone(size));
                at.advance(by, size);
                assert_eq!(
                    (at.slot, at.wrap, at.count),
                    (stepped.slot, stepped.wrap, stepped.count),
                    "{by} of {size}"
                );
            }
        }
    }

    impl Cursor {
        fn step_alone(&mut self, size: u16) {
            self.count = self.count.wrapping_add(1);
            self.slot += 1;
            if self.slot == size {
                (self.slot, self.wrap) = (0, !self.wrap);
            }
        }
    }
}
