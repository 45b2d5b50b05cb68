//! Structures of data exchange, and the UTF-16 text in them.

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::services::Mistake;

/// Bytes of a key, its terminator included.
pub const KEY: usize = 512;
/// Bytes of a value, its terminator included.
pub const VALUE: usize = 2048;

/// Type of a value: UTF-16 text. The only one that is used.
pub const TYPE_STRING: u32 = 1;

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Operation {
    /// Write a pair.
    Set = 1,
    /// Remove a pair.
    Delete = 2,
    /// The pair at an index.
    Enumerate = 3,
}

/// Where pairs are kept in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Pool {
    /// Written by the host.
    External = 0,
    /// Written by the guest's programs.
    Guest = 1,
    /// Made by the guest's daemon: names, versions, addresses.
    Auto = 2,
}

/// First part of a body.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    /// [`Operation`].
    pub operation: u8,
    /// [`Pool`].
    pub pool: u8,
}

/// A pair.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Value {
    /// Of the value.
    pub kind: U32,
    /// Bytes of the key, terminator included.
    pub key_len: U32,
    /// Bytes of the value, terminator included.
    pub value_len: U32,
    /// Key.
    pub key: [u8; KEY],
    /// Value.
    pub value: [u8; VALUE],
}

/// A pair and where it stands.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Enumerate {
    /// From 0.
    pub index: U32,
    /// Filled in by the guest.
    pub value: Value,
}

/// A key to be removed.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Delete {
    /// Bytes of the key, terminator included.
    pub key_len: U32,
    /// Key.
    pub key: [u8; KEY],
}

/// A request about pairs: the largest has the size of [`Enumerate`].
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct PairMessage<T> {
    /// What is asked for.
    pub header: Header,
    /// 0.
    pub padding: U16,
    /// The rest.
    pub body: T,
}

const _: () = assert!(size_of::<Value>() == 2572);
const _: () = assert!(size_of::<Enumerate>() == 2576);
const _: () = assert!(size_of::<Delete>() == 516);
const _: () = assert!(size_of::<PairMessage<Enumerate>>() == 2580);

/// Writes `text` with its terminator, and returns its bytes. `None` if it does not fit, in UTF-16 or in the UTF-8 that
/// the guest's daemon makes of it.
pub fn encode(text: &str, to: &mut [u8]) -> Option<u32> {
    if text.len() >= to.len() || text.contains('\0') {
        return None;
    }
    let units = text.encode_utf16().chain([0]);
    let len = units.clone().count() * 2;
    for (place, unit) in to.get_mut(..len)?.chunks_exact_mut(2).zip(units) {
        place.copy_from_slice(&unit.to_le_bytes());
    }
    u32::try_from(len).ok()
}

/// The first `len` bytes of `from` as text, up to its terminator.
///
/// # Errors
/// [`Mistake::Text`]: `len` is odd or more than there is.
pub fn decode(from: &[u8], len: u32) -> Result<String, Mistake> {
    let bytes =
        usize::try_from(len).ok().and_then(|len| from.get(..len)).filter(|bytes| bytes.len() % 2 == 0);
    let bytes = bytes.ok_or(Mistake::Text { len, room: from.len() })?;
    let units = bytes.chunks_exact(2).map(|unit| u16::from_le_bytes([unit[0], unit[1]]));
    let text = char::decode_utf16(units.take_while(|unit| *unit != 0));
    Ok(text.map(|decoded| printable(decoded.unwrap_or(char::REPLACEMENT_CHARACTER))).collect())
}

/// What a guest writes is shown on terminals and in logs: nothing in it may steer them.
fn printable(character: char) -> char {
    let steers = character.is_control()
        || matches!(character, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    if steers { char::REPLACEMENT_CHARACTER } else { character }
}
