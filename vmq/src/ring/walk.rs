//! The one chain walker: direct and indirect, split and packed.

use super::{DESC_INDIRECT, DESC_NEXT, Descriptor, MAX_CHAIN, RingFault};
use crate::memory::GuestMemory;

/// A descriptor as it stands in a table (2.7.5): the last field is `next` in split tables, `id` in packed ones.
#[derive(Debug, Clone, Copy)]
pub(super) struct Raw {
    pub(super) addr: u64,
    pub(super) len: u32,
    pub(super) flags: u16,
    pub(super) next: u16,
}

impl Raw {
    /// Takes a split descriptor apart: `addr`, `len`, `flags`, `next`.
    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "the fields are cut out of the word on purpose")]
    pub(super) fn split(words: [u64; 2]) -> Self {
        let rest = words[1];
        Self { addr: words[0], len: rest as u32, flags: (rest >> 32) as u16, next: (rest >> 48) as u16 }
    }

    /// Takes a packed descriptor apart: `addr`, `len`, `id`, `flags`.
    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "the fields are cut out of the word on purpose")]
    pub(super) fn packed(words: [u64; 2]) -> Self {
        let rest = words[1];
        Self { addr: words[0], len: rest as u32, next: (rest >> 32) as u16, flags: (rest >> 48) as u16 }
    }

    #[inline]
    pub(super) fn descriptor(self) -> Descriptor {
        Descriptor { addr: self.addr, len: self.len, flags: self.flags }
    }

    /// True if this is a whole chain by itself.
    #[inline]
    pub(super) fn is_single(self) -> bool {
        self.flags & (DESC_NEXT | DESC_INDIRECT) == 0
    }
}

/// Appends the chain that starts with `first` to `into`. `next` reads the table's descriptor of the given position
/// in the chain (1, 2, …) and `next` index; it refuses an index outside the table. Returns the ring slots it took.
pub(super) fn chain(
    first: Raw,
    size: u16,
    packed: bool,
    memory: &GuestMemory,
    into: &mut Vec<Descriptor>,
    mut next: impl FnMut(u16, u16) -> Result<Raw, RingFault>,
) -> Result<(u16, Raw), RingFault> {
    let start = into.len();
    let limit = usize::from(size).min(MAX_CHAIN);
    let (mut raw, mut slots) = (first, 1u16);
    loop {
        if raw.flags & DESC_INDIRECT != 0 {
            // Split chains may end in a table (2.7.5.3.2); in packed rings it stands alone (2.8.8).
            if raw.flags & DESC_NEXT != 0 || (packed && slots != 1) {
                return Err(RingFault::IndirectNested);
            }
            indirect(raw, packed, memory, into)?;
            if into.len() - start > MAX_CHAIN {
                return Err(RingFault::ChainTooLong { limit: MAX_CHAIN });
            }
        } else {
            into.push(raw.descriptor());
        }
        if raw.flags & DESC_NEXT == 0 {
            return Ok((slots, raw));
        }
        if into.len() - start >= limit {
            return Err(RingFault::ChainTooLong { limit });
        }
        raw = next(slots, raw.next)?;
        slots += 1;
    }
}

/// Appends the buffers of an indirect table (2.7.5.3, 2.8.8). The table is read once, entry by entry.
fn indirect(
    table: Raw,
    packed: bool,
    memory: &GuestMemory,
    into: &mut Vec<Descriptor>,
) -> Result<(), RingFault> {
    let entries = table.len as usize / 16;
    if entries == 0 || !table.len.is_multiple_of(16) || entries > MAX_CHAIN {
        return Err(RingFault::IndirectLength { len: table.len });
    }
    let unmapped = RingFault::BadAddress { addr: table.addr, len: table.len };
    let segment = memory.segment(table.addr, table.len).ok_or(unmapped)?;
    let mut index = 0usize;
    for _ in 0..entries {
        // `index < entries`, so the product is less than the table's length.
        let at = u32::try_from(index * 16).unwrap_or(u32::MAX);
        let bytes: [u8; 16] = segment.skip(at).read().ok_or(unmapped)?;
        let words = [0, 8].map(|at| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(word)
        });
        let raw = if packed { Raw::packed(words) } else { Raw::split(words) };
        if raw.flags & DESC_INDIRECT != 0 {
            return Err(RingFault::IndirectNested);
        }
        into.push(raw.descriptor());
        // A packed table has no links: its entries follow one another to the end.
        let last = if packed { index + 1 == entries } else { raw.flags & DESC_NEXT == 0 };
        if last {
            return Ok(());
        }
        index = if packed { index + 1 } else { usize::from(raw.next) };
        if index >= entries {
            return Err(RingFault::IndexOutside { index: raw.next, size: entries });
        }
    }
    Err(RingFault::ChainTooLong { limit: entries })
}
