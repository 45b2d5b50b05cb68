//! Packets: their wire form, a private copy of one, and what it holds.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::RingFault;

/// The longest packet that a descriptor can express, in bytes: 16 bits of 8-byte units.
pub const MAX_PACKET: usize = 0xffff * 8;

/// What a [`PacketBuffer`] takes by default, in bytes. The longest packets of a Linux guest have 16 KiB (KVP).
const DEFAULT_PACKET: usize = 64 << 10;

const IN_BAND: u16 = 6;
const TRANSFER_PAGES: u16 = 7;
const GPA_DIRECT: u16 = 9;
const COMPLETION: u16 = 11;

const COMPLETION_REQUESTED: u16 = 1;

/// The first 16 bytes of each packet (`struct vmpacket_descriptor`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Descriptor {
    /// Type.
    pub kind: U16,
    /// Where the payload starts, in units of 8 bytes.
    pub offset8: U16,
    /// Length without the trailer, in units of 8 bytes.
    pub len8: U16,
    /// Bit 0: a completion is asked for. Nothing else is defined.
    pub flags: U16,
    /// Chosen by the sender, echoed in the completion.
    pub transaction: U64,
}

const _: () = assert!(size_of::<Descriptor>() == Descriptor::LEN);

impl Descriptor {
    /// Bytes.
    pub const LEN: usize = 16;
}

/// Part of a buffer of transfer pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct TransferRange {
    /// Bytes.
    pub byte_count: U32,
    /// First byte, counted from the buffer's start.
    pub byte_offset: U32,
}

const _: () = assert!(size_of::<TransferRange>() == 8);

impl TransferRange {
    /// `byte_count` bytes from `byte_offset` on.
    pub fn new(byte_count: u32, byte_offset: u32) -> Self {
        Self { byte_count: byte_count.into(), byte_offset: byte_offset.into() }
    }
}

/// What follows the descriptor of a transfer-page packet, before its ranges.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct TransferHead {
    pub pageset: U16,
    pub sender_owns: u8,
    pub reserved: u8,
    pub count: U32,
}

const _: () = assert!(Descriptor::LEN + size_of::<TransferHead>() == 24);

/// What follows the descriptor of a GPA-direct packet, before its ranges.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct GpaHead {
    pub reserved: U32,
    pub count: U32,
}

const _: () = assert!(Descriptor::LEN + size_of::<GpaHead>() == 24);

/// One range of guest memory that a GPA-direct packet names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GpaRange<'a> {
    /// Bytes.
    pub byte_count: u32,
    /// First byte, counted from the first page's start. Usually less than a page.
    pub byte_offset: u32,
    /// Guest page numbers, as many as offset and count reach over.
    pub pfns: &'a [U64],
}

impl<'a> GpaRange<'a> {
    /// The range as guest-physical addresses and lengths, neighbouring pages merged. Page numbers are the guest's word:
    /// the addresses need not be memory, and one that does not fit 64 bits comes out at the very top.
    #[inline]
    pub fn pieces(self) -> impl Iterator<Item = (u64, u32)> + 'a {
        let mut pfns = self.pfns.get(self.byte_offset as usize / 4096..).unwrap_or_default();
        let (mut inside, mut left) = (self.byte_offset % 4096, self.byte_count);
        std::iter::from_fn(move || {
            let (first, mut rest) = pfns.split_first()?;
            if left == 0 {
                return None;
            }
            let mut last = first.get();
            let mut len = (4096 - inside).min(left);
            while len < left
                && let Some((next, more)) = rest.split_first()
                && last.checked_add(1) == Some(next.get())
            {
                last = next.get();
                len = len.saturating_add(4096).min(left);
                rest = more;
            }
            let gpa = first.get().saturating_mul(4096).saturating_add(u64::from(inside));
            pfns = rest;
            inside = 0;
            left -= len;
            Some((gpa, len))
        })
    }
}

/// The ranges of a GPA-direct packet. All of them are there and whole; iterating checks nothing more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GpaRanges<'a> {
    count: u32,
    bytes: &'a [u8],
}

impl<'a> GpaRanges<'a> {
    fn parse(count: u32, bytes: &'a [u8]) -> Option<Self> {
        // Each range has a header, so that a huge count ends soon.
        let mut rest = bytes;
        for _ in 0..count {
            rest = split_range(rest)?.1;
        }
        let used = bytes.len() - rest.len();
        Some(Self { count, bytes: &bytes[..used] })
    }

    /// Ranges.
    #[expect(clippy::len_without_is_empty, reason = "nobody asks")]
    pub fn len(&self) -> usize {
        self.count as usize
    }

    /// The ranges, in order.
    #[inline]
    pub fn iter(&self) -> impl Iterator<Item = GpaRange<'a>> + use<'a> {
        let (mut rest, mut left) = (self.bytes, self.count);
        std::iter::from_fn(move || {
            left = left.checked_sub(1)?;
            let (range, more) = split_range(rest)?;
            rest = more;
            Some(range)
        })
    }
}

#[inline]
fn split_range(bytes: &[u8]) -> Option<(GpaRange<'_>, &[u8])> {
    let (head, rest) = TransferRange::ref_from_prefix(bytes).ok()?;
    let (byte_count, byte_offset) = (head.byte_count.get(), head.byte_offset.get());
    let pages = (u64::from(byte_count) + u64::from(byte_offset)).div_ceil(4096);
    let (pfns, rest) = <[U64]>::ref_from_prefix_with_elems(rest, usize::try_from(pages).ok()?).ok()?;
    Some((GpaRange { byte_count, byte_offset, pfns }, rest))
}

/// Ranges for a GPA-direct packet, in the making.
#[derive(Debug, Clone, Default)]
pub struct GpaRangeList {
    count: u32,
    bytes: Vec<u8>,
}

impl GpaRangeList {
    /// Adds a range. `pfns` must be as many as offset and count reach over, else the packet makes no sense to its reader.
    pub fn push(&mut self, byte_count: u32, byte_offset: u32, pfns: &[u64]) {
        self.count += 1;
        self.bytes.extend_from_slice(TransferRange::new(byte_count, byte_offset).as_bytes());
        self.bytes.extend(pfns.iter().flat_map(|pfn| pfn.to_le_bytes()));
    }

    /// Forgets all ranges.
    pub fn clear(&mut self) {
        self.count = 0;
        self.bytes.clear();
    }

    /// The ranges, for [`PacketKind::GpaDirect`].
    pub fn ranges(&self) -> GpaRanges<'_> {
        GpaRanges { count: self.count, bytes: &self.bytes }
    }
}

/// What a packet is, and what its header holds beyond the descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PacketKind<'a> {
    /// All data is the payload.
    InBand,
    /// The answer to a packet, whose transaction it bears.
    Completion,
    /// Data lies in a buffer that both sides know, at these ranges. From the host.
    TransferPages {
        /// Which buffer.
        pageset: u16,
        /// Where in it.
        ranges: &'a [TransferRange],
    },
    /// Data lies in the guest's memory, at these ranges. From the guest.
    GpaDirect {
        /// Where.
        ranges: GpaRanges<'a>,
    },
}

impl<'a> PacketKind<'a> {
    pub(super) fn wire(&self) -> u16 {
        match self {
            Self::InBand => IN_BAND,
            Self::Completion => COMPLETION,
            Self::TransferPages { .. } => TRANSFER_PAGES,
            Self::GpaDirect { .. } => GPA_DIRECT,
        }
    }

    /// Header and ranges behind the descriptor, as they are to be written.
    #[inline]
    pub(super) fn extra(&self) -> ([u8; 8], &'a [u8]) {
        let count = |count: usize| U32::new(u32::try_from(count).unwrap_or(u32::MAX));
        match *self {
            Self::InBand | Self::Completion => ([0; 8], &[]),
            Self::TransferPages { pageset, ranges } => {
                let count = count(ranges.len());
                let head = TransferHead { pageset: pageset.into(), sender_owns: 0, reserved: 0, count };
                (zerocopy::transmute!(head), ranges.as_bytes())
            }
            Self::GpaDirect { ranges } => {
                let head = GpaHead { reserved: 0.into(), count: count(ranges.len()) };
                (zerocopy::transmute!(head), ranges.bytes)
            }
        }
    }

    pub(super) fn has_extra(&self) -> bool {
        matches!(self, Self::TransferPages { .. } | Self::GpaDirect { .. })
    }

    /// `extra` is what lies between descriptor and payload. More of it than the ranges need is ignored.
    #[inline]
    fn parse(kind: u16, extra: &'a [u8]) -> Result<Self, RingFault> {
        match kind {
            IN_BAND => Ok(Self::InBand),
            COMPLETION => Ok(Self::Completion),
            TRANSFER_PAGES => {
                let (head, rest) = split_head::<TransferHead>(extra)?;
                let (pageset, count) = (head.pageset.get(), head.count.get());
                let (ranges, _) = <[TransferRange]>::ref_from_prefix_with_elems(rest, count as usize)
                    .map_err(|_| RingFault::Ranges { count, bytes: rest.len() })?;
                Ok(Self::TransferPages { pageset, ranges })
            }
            GPA_DIRECT => {
                let (head, rest) = split_head::<GpaHead>(extra)?;
                let count = head.count.get();
                let ranges =
                    GpaRanges::parse(count, rest).ok_or(RingFault::Ranges { count, bytes: rest.len() })?;
                Ok(Self::GpaDirect { ranges })
            }
            other => Err(RingFault::Kind(other)),
        }
    }
}

fn split_head<T: FromBytes + KnownLayout + Immutable + Unaligned>(
    extra: &[u8],
) -> Result<(&T, &[u8]), RingFault> {
    T::ref_from_prefix(extra).map_err(|_| RingFault::Ranges { count: 0, bytes: extra.len() })
}

/// What a packet to be written is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PacketHeader<'a> {
    /// What it is.
    pub kind: PacketKind<'a>,
    /// A completion is asked for.
    pub completion_requested: bool,
    /// Comes back with the completion.
    pub transaction: u64,
}

impl PacketHeader<'static> {
    /// An in-band packet that asks for no completion.
    pub fn in_band(transaction: u64) -> Self {
        Self { kind: PacketKind::InBand, completion_requested: false, transaction }
    }

    /// The completion of the packet that bore `transaction`.
    pub fn completion(transaction: u64) -> Self {
        Self { kind: PacketKind::Completion, completion_requested: false, transaction }
    }
}

impl PacketHeader<'_> {
    pub(super) fn flags(&self) -> u16 {
        if self.completion_requested { COMPLETION_REQUESTED } else { 0 }
    }
}

/// A private copy of one packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet<'b> {
    /// What it is.
    pub kind: PacketKind<'b>,
    /// The sender wants a completion with the same transaction.
    pub completion_requested: bool,
    /// Chosen by the sender.
    pub transaction: u64,
    /// Bytes of the ring that were copied for it.
    pub bytes: usize,
    /// The payload, up to 7 bytes longer than what was sent: its length is only known in units of 8 bytes.
    pub payload: &'b [u8],
}

/// Where a packet's private copy is kept. One serves for all packets of a ring, one after the other.
#[derive(Debug)]
pub struct PacketBuffer {
    bytes: Box<[u8]>,
}

impl Default for PacketBuffer {
    fn default() -> Self {
        Self::new()
    }
}

impl PacketBuffer {
    /// Takes packets of up to 64 KiB.
    pub fn new() -> Self {
        Self::with_limit(DEFAULT_PACKET)
    }

    /// Takes packets of up to `limit` bytes, at least a descriptor and at most [`MAX_PACKET`].
    pub fn with_limit(limit: usize) -> Self {
        let limit = limit.clamp(Descriptor::LEN, MAX_PACKET);
        Self { bytes: vec![0; limit - Descriptor::LEN].into() }
    }

    /// The longest packet taken, in bytes.
    #[expect(clippy::cast_possible_truncation, reason = "at most `MAX_PACKET`")]
    pub(super) fn limit(&self) -> u32 {
        (self.bytes.len() + Descriptor::LEN) as u32
    }

    /// Room for `len` bytes that follow a descriptor; fewer if the limit is lower.
    #[inline]
    pub(super) fn body(&mut self, len: usize) -> &mut [u8] {
        let len = len.min(self.bytes.len());
        &mut self.bytes[..len]
    }
}

/// Makes a packet of a descriptor and the `body` behind it, both private copies.
#[inline]
pub(super) fn parse(head: Descriptor, body: &[u8]) -> Result<Packet<'_>, RingFault> {
    let flags = head.flags.get();
    if flags & !COMPLETION_REQUESTED != 0 {
        return Err(RingFault::Flags(flags));
    }
    let extra = (usize::from(head.offset8.get()) * 8).saturating_sub(Descriptor::LEN).min(body.len());
    let (extra, payload) = body.split_at(extra);
    Ok(Packet {
        kind: PacketKind::parse(head.kind.get(), extra)?,
        completion_requested: flags != 0,
        transaction: head.transaction.get(),
        bytes: Descriptor::LEN + extra.len() + payload.len(),
        payload,
    })
}
