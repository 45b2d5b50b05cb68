//! Packed rings (2.8), driver side.

use std::collections::VecDeque;
use std::sync::atomic::{Ordering, fence};

use super::{
    Arena, Buffer, DESC_BYTES, DESC_NEXT, DeviceFault, Features, Form, Parts, RawDescriptor, Token, Used,
};

const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// `RING_EVENT_FLAGS_*` (2.8.14).
const EVENT_ENABLE: u16 = 0;
const EVENT_DISABLE: u16 = 1;
const EVENT_DESC: u16 = 2;

/// Stands where only a chain's last descriptor has an id.
const NO_ID: u16 = 0xffff;

/// A packed ring, driver side.
#[derive(Debug)]
pub struct PackedDriver {
    pub(super) parts: Parts,
    /// Descriptors ever added, ever published, ever taken back.
    added: u64,
    published: u64,
    returned: u64,
    /// The first descriptor that was not yet published: where its flags go, and what they are. Written last, so that
    /// everything behind it becomes available at once.
    held: Option<(u64, u16)>,
    ids: Vec<u16>,
    /// Descriptors of the chain with each id; 0 if it is not out.
    chains: Vec<u16>,
    /// Ids that are out, oldest first; kept only if the device returns them in order.
    order: VecDeque<u16>,
    /// An in-order batch is being taken back up to this id, for which the device reported this length.
    batch: Option<(u16, u32)>,
}

impl PackedDriver {
    /// See [`super::DriverRing::new`].
    pub fn new(arena: &Arena, size: u16, features: Features) -> Option<Self> {
        if size == 0 || size > 32768 {
            return None;
        }
        Some(Self {
            parts: Parts::new(arena, size, features, Form::Packed)?,
            added: 0,
            published: 0,
            returned: 0,
            held: None,
            ids: (0..size).rev().collect(),
            chains: vec![0; usize::from(size)],
            order: VecDeque::new(),
            batch: None,
        })
    }

    /// Slot of a position, and the wrap counter, which starts as 1 (2.8.1).
    fn place(&self, position: u64) -> (u64, bool) {
        let size = u64::from(self.parts.size);
        (position % size, (position / size).is_multiple_of(2))
    }

    fn address(&self, position: u64) -> u64 {
        self.parts.at.descriptors + DESC_BYTES * self.place(position).0
    }

    pub(super) fn free(&self) -> u16 {
        let out = self.added - self.returned;
        self.parts.size.saturating_sub(u16::try_from(out).unwrap_or(u16::MAX))
    }

    pub(super) fn add(&mut self, buffers: &[Buffer], indirect: bool) -> Option<Token> {
        let indirect = indirect && self.parts.features.indirect;
        let needed = if indirect { 1 } else { u16::try_from(buffers.len()).ok()? };
        if buffers.is_empty() || needed > self.free() {
            return None;
        }
        let id = self.ids.pop()?;
        if indirect {
            let Some(raw) = self.parts.write_table(id, buffers, Form::Packed) else {
                self.ids.push(id);
                return None;
            };
            self.write_first(RawDescriptor { next: id, ..raw });
        } else {
            self.write_chain(id, buffers);
        }
        self.chains[usize::from(id)] = needed;
        if self.parts.features.in_order {
            self.order.push_back(id);
        }
        self.added += u64::from(needed);
        Some(Token(id))
    }

    /// The first descriptor comes last, when all behind it is in place (2.8.21).
    fn write_chain(&mut self, id: u16, buffers: &[Buffer]) {
        for (i, buffer) in buffers.iter().enumerate().rev() {
            let last = i + 1 == buffers.len();
            let flags = buffer.flags() | if last { 0 } else { DESC_NEXT };
            let next = if last { id } else { NO_ID };
            let mut raw = RawDescriptor { addr: buffer.addr, len: buffer.len, flags, next };
            if i == 0 {
                self.write_first(raw);
            } else {
                let position = self.added + i as u64;
                raw.flags |= self.available(position);
                raw.write(&self.parts.arena, self.address(position), Form::Packed);
            }
        }
    }

    fn write_first(&mut self, mut raw: RawDescriptor) {
        let (at, flags) = (self.address(self.added), raw.flags | self.available(self.added));
        if self.held.is_none() {
            self.held = Some((at + 14, flags));
            // All but the flags, which stay as they are: used, or never available.
            raw.flags = self.parts.arena.read_u16(at + 14);
        } else {
            raw.flags = flags;
        }
        raw.write(&self.parts.arena, at, Form::Packed);
    }

    /// The flags that make a descriptor available at a position.
    fn available(&self, position: u64) -> u16 {
        if self.place(position).1 { AVAIL } else { USED }
    }

    pub(super) fn publish(&mut self) -> bool {
        let Some((at, flags)) = self.held.take() else { return false };
        self.parts.arena.write_u16(at, flags);
        let (old, new) = (self.published, self.added);
        self.published = new;
        // 2.8.21.3.1: the descriptors are visible before the device's wish is read.
        fence(Ordering::SeqCst);
        let event = self.parts.arena.read_u32(self.parts.at.device);
        let (off_wrap, flags) = halves(event);
        match flags {
            EVENT_DISABLE => false,
            EVENT_DESC if self.parts.features.event_idx => {
                (old..new).any(|position| self.off_wrap(position) == off_wrap)
            }
            _ => true,
        }
    }

    /// A position as the event structures name it: slot, and the wrap counter in bit 15.
    fn off_wrap(&self, position: u64) -> u16 {
        let (slot, wrap) = self.place(position);
        u16::try_from(slot).unwrap_or_default() | if wrap { 1 << 15 } else { 0 }
    }

    /// True if the descriptor at a position is marked used in its round.
    fn is_used(&self, position: u64) -> bool {
        let flags = self.parts.arena.read_u16(self.address(position) + 14);
        let wrap = self.place(position).1;
        (flags & AVAIL != 0) == wrap && (flags & USED != 0) == wrap
    }

    pub(super) fn poll_used(&mut self) -> Result<Option<Used>, DeviceFault> {
        if let Some((last, len)) = self.batch {
            let Some(&id) = self.order.front() else { return Err(DeviceFault::Unknown(u32::from(last))) };
            if id == last {
                self.batch = None;
            }
            return Ok(Some(self.take_back(id, if id == last { len } else { 0 })));
        }
        if self.returned == self.published || !self.is_used(self.returned) {
            return Ok(None);
        }
        let at = self.address(self.returned);
        let (len, id) = (self.parts.arena.read_u32(at + 8), self.parts.arena.read_u16(at + 12));
        if self.chains.get(usize::from(id)).is_none_or(|&count| count == 0) {
            return Err(DeviceFault::Unknown(u32::from(id)));
        }
        if self.order.front().is_some_and(|&oldest| oldest != id) {
            self.batch = Some((id, len));
            return self.poll_used();
        }
        Ok(Some(self.take_back(id, len)))
    }

    fn take_back(&mut self, id: u16, len: u32) -> Used {
        self.order.pop_front();
        let count = std::mem::take(&mut self.chains[usize::from(id)]);
        self.returned += u64::from(count);
        self.ids.push(id);
        Used { token: Token(id), len }
    }

    pub(super) fn enable_interrupts(&mut self, after: u16) -> bool {
        let (flags, after) =
            if self.parts.features.event_idx { (EVENT_DESC, after) } else { (EVENT_ENABLE, 0) };
        let event = self.returned + u64::from(after);
        let word = u32::from(self.off_wrap(event)) | u32::from(flags) << 16;
        self.parts.arena.write_u32(self.parts.at.driver, word);
        fence(Ordering::SeqCst);
        // Whether `event` itself was passed cannot be seen if it lies inside a chain, so anything used counts.
        self.returned < self.published && self.is_used(self.returned)
    }

    pub(super) fn disable_interrupts(&mut self) {
        self.parts.arena.write_u32(self.parts.at.driver, u32::from(EVENT_DISABLE) << 16);
    }
}

fn halves(word: u32) -> (u16, u16) {
    let [a, b, c, d] = word.to_le_bytes();
    (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]))
}
