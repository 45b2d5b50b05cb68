//! Split rings (2.7), driver side.

use std::collections::VecDeque;
use std::sync::atomic::{Ordering, fence};

use super::{
    Arena, Buffer, DESC_BYTES, DESC_NEXT, DeviceFault, Features, Form, Parts, RawDescriptor, Token, Used,
};

/// `VIRTQ_AVAIL_F_NO_INTERRUPT`, `VIRTQ_USED_F_NO_NOTIFY`.
const SUPPRESS: u16 = 1;

/// A split ring, driver side.
#[derive(Debug)]
pub struct SplitDriver {
    pub(super) parts: Parts,
    /// Chains ever added, ever published, ever taken back.
    added: u64,
    published: u64,
    returned: u64,
    /// Chains returned by the device when last looked.
    shown: u64,
    free: FreeList,
    /// Descriptors of the chain that starts at each index; 0 if none that is out does.
    chains: Vec<u16>,
    /// Heads that are out, oldest first; kept only if the device returns them in order.
    order: VecDeque<u16>,
    /// An in-order batch is being taken back up to this head, for which the device reported this length.
    batch: Option<(u16, u32)>,
}

/// Free descriptors: the most recently freed is reused first, or one after another if used in order.
#[derive(Debug)]
struct FreeList {
    in_order: bool,
    count: u16,
    next: u16,
    stack: Vec<u16>,
    /// For each descriptor of a chain, the next one: our own copy, whatever happens to the table.
    links: Vec<u16>,
}

impl FreeList {
    fn take(&mut self) -> Option<u16> {
        self.count = self.count.checked_sub(1)?;
        if !self.in_order {
            return self.stack.pop();
        }
        let index = self.next;
        self.next = if usize::from(index) + 1 == self.links.len() { 0 } else { index + 1 };
        Some(index)
    }

    fn give_back(&mut self, head: u16, count: u16) {
        self.count += count;
        if self.in_order {
            return;
        }
        let mut index = head;
        for _ in 0..count {
            self.stack.push(index);
            index = self.links[usize::from(index)];
        }
    }
}

impl SplitDriver {
    /// See [`super::DriverRing::new`].
    pub fn new(arena: &Arena, size: u16, features: Features) -> Option<Self> {
        if !size.is_power_of_two() {
            return None;
        }
        let entries = usize::from(size);
        let free = FreeList {
            in_order: features.in_order,
            count: size,
            next: 0,
            stack: (0..size).rev().collect(),
            links: vec![0; entries],
        };
        Some(Self {
            parts: Parts::new(arena, size, features, Form::Split)?,
            added: 0,
            published: 0,
            returned: 0,
            shown: 0,
            free,
            chains: vec![0; entries],
            order: VecDeque::new(),
            batch: None,
        })
    }

    /// Lets both indices start at `index` instead of 0, as in a ring that has been in use. Before anything is added.
    pub fn start_at(&mut self, index: u16) {
        let at = u64::from(index);
        (self.added, self.published, self.returned, self.shown) = (at, at, at, at);
        self.parts.arena.write_u16(self.parts.at.driver + 2, index);
        self.parts.arena.write_u16(self.parts.at.device + 2, index);
    }

    pub(super) fn free(&self) -> u16 {
        self.free.count
    }

    fn slot(&self, position: u64) -> u64 {
        position % u64::from(self.parts.size)
    }

    pub(super) fn add(&mut self, buffers: &[Buffer], indirect: bool) -> Option<Token> {
        let indirect = indirect && self.parts.features.indirect;
        let needed = if indirect { 1 } else { u16::try_from(buffers.len()).ok()? };
        if buffers.is_empty() || needed > self.free.count {
            return None;
        }
        let head = self.free.take()?;
        if indirect {
            let Some(raw) = self.parts.write_table(head, buffers, Form::Split) else {
                self.free.give_back(head, 1);
                return None;
            };
            self.write(head, raw);
        } else {
            self.write_chain(head, buffers)?;
        }
        self.chains[usize::from(head)] = needed;
        if self.parts.features.in_order {
            self.order.push_back(head);
        }
        let entry = self.parts.at.driver + 4 + 2 * self.slot(self.added);
        self.parts.arena.write_u16(entry, head);
        self.added += 1;
        Some(Token(head))
    }

    fn write_chain(&mut self, head: u16, buffers: &[Buffer]) -> Option<()> {
        let mut index = head;
        for (i, buffer) in buffers.iter().enumerate() {
            let mut raw =
                RawDescriptor { addr: buffer.addr, len: buffer.len, flags: buffer.flags(), next: 0 };
            if i + 1 < buffers.len() {
                raw.next = self.free.take()?;
                raw.flags |= DESC_NEXT;
            }
            self.write(index, raw);
            self.free.links[usize::from(index)] = raw.next;
            index = raw.next;
        }
        Some(())
    }

    fn write(&self, index: u16, raw: RawDescriptor) {
        let at = self.parts.at.descriptors + DESC_BYTES * u64::from(index);
        raw.write(&self.parts.arena, at, Form::Split);
    }

    pub(super) fn publish(&mut self) -> bool {
        if self.added == self.published {
            return false;
        }
        let (old, new) = (self.published, self.added);
        let (arena, at) = (&self.parts.arena, &self.parts.at);
        arena.write_u16(at.driver + 2, low(new));
        self.published = new;
        // 2.7.13.4.1: the index is visible before the device's wish is read.
        fence(Ordering::SeqCst);
        if !self.parts.features.event_idx {
            return arena.read_u16(at.device) & SUPPRESS == 0;
        }
        let event = arena.read_u16(at.device + 4 + 8 * u64::from(self.parts.size));
        // A doorbell for the chain with the number `event` (2.7.10): is it one of those just published?
        (old..new).any(|position| low(position) == event)
    }

    pub(super) fn poll_used(&mut self) -> Result<Option<Used>, DeviceFault> {
        if let Some((last, len)) = self.batch {
            let Some(&head) = self.order.front() else { return Err(DeviceFault::Unknown(u32::from(last))) };
            if head == last {
                self.batch = None;
            }
            return self.take_back(head, if head == last { len } else { 0 }).map(Some);
        }
        if self.returned == self.shown && !self.look()? {
            return Ok(None);
        }
        let at = self.parts.at.device + 4 + 8 * self.slot(self.returned);
        let (id, len) = (self.parts.arena.read_u32(at), self.parts.arena.read_u32(at + 4));
        let head =
            u16::try_from(id).ok().filter(|&head| self.chains.get(usize::from(head)).is_some_and(|&n| n > 0));
        let head = head.ok_or(DeviceFault::Unknown(id))?;
        if self.order.front().is_some_and(|&oldest| oldest != head) {
            self.batch = Some((head, len));
            return self.poll_used();
        }
        self.take_back(head, len).map(Some)
    }

    fn take_back(&mut self, head: u16, len: u32) -> Result<Used, DeviceFault> {
        if self.returned == self.shown {
            return Err(DeviceFault::Unknown(u32::from(head)));
        }
        self.order.pop_front();
        let count = std::mem::take(&mut self.chains[usize::from(head)]);
        self.free.give_back(head, count);
        self.returned += 1;
        Ok(Used { token: Token(head), len })
    }

    /// Reads the used index; true if it moved.
    fn look(&mut self) -> Result<bool, DeviceFault> {
        let index = self.parts.arena.read_u16(self.parts.at.device + 2);
        let returned = index.wrapping_sub(low(self.returned));
        let out = self.published - self.returned;
        if u64::from(returned) > out {
            return Err(DeviceFault::TooMany { returned, out: usize::try_from(out).unwrap_or(usize::MAX) });
        }
        self.shown = self.returned + u64::from(returned);
        Ok(returned != 0)
    }

    pub(super) fn enable_interrupts(&mut self, after: u16) -> bool {
        let (arena, at) = (&self.parts.arena, &self.parts.at);
        if self.parts.features.event_idx {
            let event = low(self.returned).wrapping_add(after);
            arena.write_u16(at.driver + 4 + 2 * u64::from(self.parts.size), event);
        } else {
            arena.write_u16(at.driver, 0);
        }
        fence(Ordering::SeqCst);
        let waiting = arena.read_u16(at.device + 2).wrapping_sub(low(self.returned));
        let after = if self.parts.features.event_idx { after } else { 0 };
        waiting > after
    }

    pub(super) fn disable_interrupts(&mut self) {
        let (arena, at) = (&self.parts.arena, &self.parts.at);
        if self.parts.features.event_idx {
            // A position that was passed long ago.
            let event = low(self.returned).wrapping_sub(1);
            arena.write_u16(at.driver + 4 + 2 * u64::from(self.parts.size), event);
        } else {
            arena.write_u16(at.driver, SUPPRESS);
        }
    }
}

/// A position as the ring counts it.
fn low(position: u64) -> u16 {
    // Masked to 16 bits first.
    u16::try_from(position & 0xffff).unwrap_or_default()
}
