//! Structures of dynamic memory. No pipe, no negotiation frame: a header of its own.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::services::Mistake;

/// Message types.
pub mod kind {
    pub const VERSION_REQUEST: u16 = 1;
    pub const VERSION_RESPONSE: u16 = 2;
    pub const CAPABILITIES_REPORT: u16 = 3;
    pub const CAPABILITIES_RESPONSE: u16 = 4;
    pub const STATUS_REPORT: u16 = 5;
    pub const BALLOON_REQUEST: u16 = 6;
    pub const BALLOON_RESPONSE: u16 = 7;
    pub const UNBALLOON_REQUEST: u16 = 8;
    pub const UNBALLOON_RESPONSE: u16 = 9;
    pub const HOT_ADD_REQUEST: u16 = 10;
    pub const HOT_ADD_RESPONSE: u16 = 11;
    pub const INFO: u16 = 12;
}

/// Bytes of a message at most.
pub const MESSAGE: usize = 4096;
/// Ranges of one message at most.
pub const RANGES: usize = (MESSAGE - size_of::<Unballoon>()) / size_of::<U64>();

/// First part of every message.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    /// Message type.
    pub kind: U16,
    /// Bytes of the message, this header included.
    pub size: U16,
    /// Each side counts its own; not echoed.
    pub transaction: U32,
}

/// Body of a version request: the guest's proposal.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct VersionRequest {
    /// After the dot.
    pub minor: U16,
    /// Before the dot.
    pub major: U16,
    /// Bit 0: there is no further proposal.
    pub last: U32,
}

/// Body of the answers to version and capabilities: bit 0 accepts.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Verdict {
    /// Bit 0.
    pub accepted: U64,
}

/// Body of a capabilities report.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Capabilities {
    /// Bit 0 balloon, bit 1 hot add, bits 5:2 alignment of hot-added memory as a power of two of MiB.
    pub bits: U64,
    /// Pages the guest cannot do without.
    pub minimum: U64,
    /// Highest page number.
    pub highest: U64,
}

/// Body of a status report, once a second.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Report {
    /// Pages available to programs.
    pub available: U64,
    /// Pages promised to programs, those in the balloon included.
    pub committed: U64,
    /// Pages of the page file.
    pub page_file: U64,
    /// Pages free.
    pub free: U64,
    /// Pages written to the page file.
    pub writes: U32,
    /// Pages written less pages read.
    pub io_difference: U32,
}

/// Body of a balloon request.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Balloon {
    /// Pages wanted.
    pub pages: U32,
    /// 0.
    pub reserved: U32,
}

/// Body of a balloon response; ranges follow.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Ballooned {
    /// 0.
    pub reserved: U32,
    /// Bit 0: more responses follow; bits 31:1 ranges.
    pub more_and_count: U32,
}

/// Header and body of an unballoon request; ranges follow.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Unballoon {
    /// Header.
    pub header: Header,
    /// Bit 0: more requests follow.
    pub more: U32,
    /// Ranges.
    pub count: U32,
}

/// Body of a hot-add request that names the region as well.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct HotAdd {
    /// Pages to be used.
    pub range: U64,
    /// The region they are in.
    pub region: U64,
}

/// Body of a hot-add response.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct HotAdded {
    /// Pages in use now, from the first of the range on.
    pub pages: U32,
    /// 1 success; 1 with no pages: never try again.
    pub result: U32,
}

/// Body of an info message that tells the guest how much memory it may get.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Info {
    /// 0.
    pub reserved: U32,
    /// Bytes that follow.
    pub len: U32,
    /// 0: maximum.
    pub kind: U32,
    /// Bytes of the value.
    pub size: U32,
    /// Pages.
    pub pages: U64,
}

const HEADER: usize = size_of::<Header>();
const _: () = assert!(HEADER == 8);
const _: () = assert!(HEADER + size_of::<VersionRequest>() == 16);
const _: () = assert!(HEADER + size_of::<Verdict>() == 16);
const _: () = assert!(HEADER + size_of::<Capabilities>() == 32);
const _: () = assert!(HEADER + size_of::<Report>() == 48);
const _: () = assert!(HEADER + size_of::<Balloon>() == 16);
const _: () = assert!(HEADER + size_of::<Ballooned>() == 16);
const _: () = assert!(size_of::<Unballoon>() == 16);
const _: () = assert!(HEADER + size_of::<HotAdd>() == 24);
const _: () = assert!(HEADER + size_of::<HotAdded>() == 16);
const _: () = assert!(HEADER + size_of::<Info>() == 16 + 8 + 8);

/// Pages that follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRange {
    /// Number of the first (guest-physical address / 4096).
    pub first: u64,
    /// How many.
    pub count: u64,
}

impl PageRange {
    /// From the wire: bits 39:0 first page, 63:40 count.
    pub const fn from_wire(range: u64) -> Self {
        Self { first: range & 0xff_ffff_ffff, count: range >> 40 }
    }

    /// To the wire. `None` if page number or count do not fit.
    pub fn to_wire(self) -> Option<u64> {
        (self.first >> 40 == 0 && self.count >> 24 == 0).then_some(self.first | self.count << 40)
    }

    /// The page after the last.
    pub const fn end(self) -> u64 {
        self.first.saturating_add(self.count)
    }

    /// All of `other` is in this one.
    pub const fn holds(self, other: Self) -> bool {
        other.first >= self.first && other.end() <= self.end()
    }
}

/// A whole message: header and body.
pub fn message<T: IntoBytes + Immutable>(kind: u16, transaction: u32, body: &T) -> Vec<u8> {
    let size = u16::try_from(HEADER + size_of::<T>()).unwrap_or(0);
    let header = Header { kind: U16::new(kind), size: U16::new(size), transaction: U32::new(transaction) };
    [header.as_bytes(), body.as_bytes()].concat()
}

/// An unballoon request of `ranges`, at most [`RANGES`] of them, and no other after it.
pub fn unballoon(transaction: u32, ranges: &[u64]) -> Vec<u8> {
    let size = size_of::<Unballoon>() + size_of_val(ranges);
    let header = Header {
        kind: U16::new(kind::UNBALLOON_REQUEST),
        size: U16::new(u16::try_from(size).unwrap_or(0)),
        transaction: U32::new(transaction),
    };
    let count = U32::new(u32::try_from(ranges.len()).unwrap_or(0));
    let mut bytes = Unballoon { header, more: U32::ZERO, count }.as_bytes().to_vec();
    bytes.extend(ranges.iter().flat_map(|range| range.to_le_bytes()));
    bytes
}

/// Splits a message from the guest into header and body, cut to the size it claims.
///
/// # Errors
/// It claims more than there is, or less than a header.
pub fn parse(packet: &[u8]) -> Result<(Header, &[u8]), Mistake> {
    let (header, _) = crate::services::take::<Header>(packet)?;
    let need = usize::from(header.size.get());
    let body =
        packet.get(HEADER..need).ok_or(Mistake::Short { len: packet.len(), need: need.max(HEADER) })?;
    Ok((header, body))
}
