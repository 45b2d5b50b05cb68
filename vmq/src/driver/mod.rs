//! Virtqueues, driver side: the guest played in-process, for tests, fuzzing, benches and the traffic generator.
//!
//! Written from the specification alone and sharing no code with [`crate::ring`], so that a misreading on one side
//! shows as a disagreement. Positions are counted without wrapping and taken apart only where the ring is touched,
//! which is slower than the device side's way and easier to see to be right.
//!
//! Source: Virtual I/O Device (VIRTIO) Version 1.2, sections 2.7 (split) and 2.8 (packed).

mod fixed;
mod memory;
mod packed;
mod split;

pub use fixed::FixedRing;
pub use memory::Arena;
pub use packed::PackedDriver;
pub use split::SplitDriver;

const DESC_NEXT: u16 = 1;
const DESC_WRITE: u16 = 2;
const DESC_INDIRECT: u16 = 4;
const DESC_BYTES: u64 = 16;

/// Which of the two forms a ring has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Section 2.7.
    Split,
    /// Section 2.8.
    Packed,
}

/// Ring features that were negotiated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Features {
    /// `VIRTIO_F_EVENT_IDX`
    pub event_idx: bool,
    /// `VIRTIO_F_INDIRECT_DESC`
    pub indirect: bool,
    /// `VIRTIO_F_IN_ORDER`: descriptors are used one after another, and the device may report a batch by its last.
    pub in_order: bool,
}

/// One piece of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buffer {
    /// Guest-physical address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// The device may write it.
    pub writable: bool,
}

impl Buffer {
    fn flags(&self) -> u16 {
        if self.writable { DESC_WRITE } else { 0 }
    }
}

/// Names a chain from [`DriverRing::add`] until it comes back; below the ring's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Token(pub u16);

/// A chain that came back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Used {
    /// Which.
    pub token: Token,
    /// Bytes the device says it wrote. Unknown, hence 0, for all but the last chain of an in-order batch.
    pub len: u32,
}

/// A device that breaks the rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DeviceFault {
    /// The id of no chain that is out.
    #[error("device returned chain {0}, which is not out")]
    Unknown(u32),
    /// More came back than is out.
    #[error("device returned {returned} chains, {out} are out")]
    TooMany {
        /// Chains it claims to return.
        returned: u16,
        /// Chains it had.
        out: usize,
    },
}

/// Guest-physical addresses of a ring's parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Addresses {
    /// Descriptor table or packed ring.
    pub descriptors: u64,
    /// Available ring or driver event suppression.
    pub driver: u64,
    /// Used ring or device event suppression.
    pub device: u64,
}

/// A descriptor as it stands in memory, whatever it says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RawDescriptor {
    /// Guest-physical address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// `VIRTQ_DESC_F_*`
    pub flags: u16,
    /// `next` in split rings, the buffer's id in packed ones.
    pub next: u16,
}

impl RawDescriptor {
    /// Writes the descriptor at `gpa` in the given form, the flags last.
    pub fn write(&self, arena: &Arena, gpa: u64, form: Form) {
        let (flags_at, next_at) = match form {
            Form::Split => (gpa + 12, gpa + 14),
            Form::Packed => (gpa + 14, gpa + 12),
        };
        arena.write_u64(gpa, self.addr);
        arena.write_u32(gpa + 8, self.len);
        arena.write_u16(next_at, self.next);
        arena.write_u16(flags_at, self.flags);
    }
}

/// The memory of a ring, common to both forms.
#[derive(Debug)]
struct Parts {
    arena: Arena,
    size: u16,
    features: Features,
    at: Addresses,
    /// An indirect table for each id that needed one, with the entries it has room for.
    tables: Vec<Option<(u64, usize)>>,
}

impl Parts {
    fn new(arena: &Arena, size: u16, features: Features, form: Form) -> Option<Self> {
        let n = u64::from(size);
        let (driver, device) = match form {
            Form::Split => (6 + 2 * n, 6 + 8 * n),
            Form::Packed => (4, 4),
        };
        let at = Addresses {
            descriptors: arena.alloc(DESC_BYTES * n, 16)?,
            driver: arena.alloc(driver, 4)?,
            device: arena.alloc(device, 4)?,
        };
        Some(Self { arena: arena.clone(), size, features, at, tables: vec![None; usize::from(size)] })
    }

    /// Puts `buffers` into the indirect table that belongs to `id`; returns the descriptor that refers to it.
    fn write_table(&mut self, id: u16, buffers: &[Buffer], form: Form) -> Option<RawDescriptor> {
        let slot = self.tables.get_mut(usize::from(id))?;
        let addr = match *slot {
            Some((addr, entries)) if entries >= buffers.len() => addr,
            _ => {
                let entries = buffers.len().next_power_of_two();
                let addr = self.arena.alloc(DESC_BYTES * entries as u64, 16)?;
                *slot = Some((addr, entries));
                addr
            }
        };
        for (i, buffer) in (0u16..).zip(buffers) {
            let last = usize::from(i) + 1 == buffers.len();
            let mut raw =
                RawDescriptor { addr: buffer.addr, len: buffer.len, flags: buffer.flags(), next: 0 };
            // Packed tables have no links, and their ids mean nothing (2.8.8).
            match form {
                Form::Split if !last => (raw.flags, raw.next) = (raw.flags | DESC_NEXT, i + 1),
                Form::Split => {}
                Form::Packed => raw.next = 0xffff,
            }
            raw.write(&self.arena, addr + DESC_BYTES * u64::from(i), form);
        }
        let len = u32::try_from(DESC_BYTES * buffers.len() as u64).ok()?;
        Some(RawDescriptor { addr, len, flags: DESC_INDIRECT, next: 0 })
    }
}

/// A ring of either form, driver side.
#[derive(Debug)]
pub enum DriverRing {
    /// Section 2.7.
    Split(SplitDriver),
    /// Section 2.8.
    Packed(PackedDriver),
}

macro_rules! each {
    ($self:expr, $ring:ident => $body:expr) => {
        match $self {
            DriverRing::Split($ring) => $body,
            DriverRing::Packed($ring) => $body,
        }
    };
}

impl DriverRing {
    /// An empty ring of `size` entries in `arena`. `None` if the arena is used up or the size is not allowed (0,
    /// above 32768, or no power of two for a split ring).
    pub fn new(arena: &Arena, form: Form, size: u16, features: Features) -> Option<Self> {
        Some(match form {
            Form::Split => Self::Split(SplitDriver::new(arena, size, features)?),
            Form::Packed => Self::Packed(PackedDriver::new(arena, size, features)?),
        })
    }

    /// Which form it has.
    pub fn form(&self) -> Form {
        match self {
            Self::Split(_) => Form::Split,
            Self::Packed(_) => Form::Packed,
        }
    }

    fn parts(&self) -> &Parts {
        each!(self, ring => &ring.parts)
    }

    /// Where its parts lie.
    pub fn addresses(&self) -> Addresses {
        self.parts().at
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.parts().size
    }

    /// The memory it lies in.
    pub fn arena(&self) -> &Arena {
        &self.parts().arena
    }

    /// Descriptors that are free.
    pub fn free(&self) -> u16 {
        each!(self, ring => ring.free())
    }

    /// Puts a chain of `buffers` into the ring, through an indirect table if `indirect` and that was negotiated. The
    /// device sees it after [`DriverRing::publish`]. `None` if there are no buffers or too few free descriptors, or
    /// the arena has no room for an indirect table.
    #[inline]
    pub fn add(&mut self, buffers: &[Buffer], indirect: bool) -> Option<Token> {
        each!(self, ring => ring.add(buffers, indirect))
    }

    /// Makes what was added available. True if the device wants a doorbell for it.
    #[inline]
    pub fn publish(&mut self) -> bool {
        each!(self, ring => ring.publish())
    }

    /// Takes back the next chain that the device is done with.
    ///
    /// # Errors
    /// The device broke the rules.
    #[inline]
    pub fn poll_used(&mut self) -> Result<Option<Used>, DeviceFault> {
        each!(self, ring => ring.poll_used())
    }

    /// Asks for an interrupt from the next used chain on. True if there is one already, so that none may come.
    pub fn enable_interrupts(&mut self) -> bool {
        each!(self, ring => ring.enable_interrupts(0))
    }

    /// Asks for an interrupt only once `count` more descriptors (packed) or chains (split) were used after the next
    /// one; needs event indices, else as [`DriverRing::enable_interrupts`].
    pub fn enable_interrupts_after(&mut self, count: u16) -> bool {
        each!(self, ring => ring.enable_interrupts(count))
    }

    /// Says that no interrupts are needed.
    pub fn disable_interrupts(&mut self) {
        each!(self, ring => ring.disable_interrupts());
    }

    /// Overwrites the descriptor at `index` with anything.
    pub fn poke_descriptor(&self, index: u16, raw: RawDescriptor) {
        let at = self.addresses().descriptors + DESC_BYTES * u64::from(index);
        raw.write(self.arena(), at, self.form());
    }

    /// Overwrites an entry of a split ring's available ring.
    pub fn poke_available_entry(&self, slot: u16, head: u16) {
        self.arena().write_u16(self.addresses().driver + 4 + 2 * u64::from(slot), head);
    }

    /// Overwrites a split ring's available index.
    pub fn poke_available_index(&self, index: u16) {
        self.arena().write_u16(self.addresses().driver + 2, index);
    }
}

#[cfg(test)]
mod tests;
