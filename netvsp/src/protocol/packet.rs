//! RNDIS data packets (fact sheet §7): one frame behind a header and its packet information.
//!
//! **Cost.** Reading is one pass over at most [`MAX_HEADER`] bytes that were copied from the guest once, with one bounds
//! check per piece of information. Writing fills an array of words on the stack, of which the caller copies as many as
//! were used: no branch but one for each kind of information, and no loop over the result.

use thiserror::Error;
use zerocopy::FromBytes;
use zerocopy::little_endian::{U16, U32};

use super::wire;

/// Bytes before the packet information.
pub const HEADER_BYTES: usize = 44;
/// Bytes of header and packet information that a sender may use: 13 pieces, Linux uses 4 of the 11 there are.
pub const MAX_HEADER: usize = HEADER_BYTES + 13 * 16;
/// Bytes of the longest header that [`RxHeader::write`] writes.
pub const MAX_RX_HEADER: usize = HEADER_BYTES + 5 * 16;

/// `RNDIS_PACKET_MSG`.
const PACKET: u32 = 1;
/// Where offsets count from.
const BODY: u32 = 8;
/// Where packet information begins, counted from the body.
const PPI_OFFSET: u32 = 36;

const CHECKSUM: u32 = 0;
const LSO: u32 = 2;
const VLAN: u32 = 6;
const HASH_VALUE: u32 = 8;
const HASH_INFO: u32 = 9;
/// In the internal namespace (top bit).
const PACKET_ID: u32 = 0x8000_0001;

wire! {
    /// PACKET, with its header.
    Header = 44 {
        /// 1.
        kind: U32,
        /// Bytes of the message.
        len: U32,
        /// Where the frame begins, from byte 8.
        data_offset: U32,
        /// Bytes of the frame.
        data_len: U32,
        /// Out-of-band data: never used.
        out_of_band: [U32; 3],
        /// Where packet information begins, from byte 8.
        ppi_offset: U32,
        /// Bytes of it.
        ppi_len: U32,
        /// 0.
        reserved: [U32; 2],
    }
    /// One piece of packet information; its data follows.
    Ppi = 12 {
        /// Bytes of header and data.
        size: U32,
        /// What it is.
        kind: U32,
        /// Where the data begins, from this header.
        offset: U32,
    }
    /// Data of a packet identifier.
    PacketId = 4 {
        /// 1.
        version: u8,
        /// See [`RscPart`].
        flags: u8,
        /// Which coalesced packet.
        id: U16,
    }
}

/// Why a packet was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum PacketError {
    /// Fewer bytes than a header takes.
    #[error("RNDIS packet of {0} bytes has no header")]
    Short(usize),
    /// Something else than a packet on the data channel.
    #[error("RNDIS message {0:#x} among data packets")]
    NotAPacket(u32),
    /// The length field does not fit the bytes there are.
    #[error("RNDIS packet says it has {claimed} bytes, but {available} came")]
    Length {
        /// What the field says.
        claimed: u32,
        /// What came.
        available: u32,
    },
    /// The frame is not within the message.
    #[error("RNDIS packet of {len} bytes with data at {offset} + {data_len}")]
    Data {
        /// Bytes of the message.
        len: u32,
        /// Offset given.
        offset: u32,
        /// Length given.
        data_len: u32,
    },
    /// Packet information is not within the message, or there is too much of it.
    #[error("RNDIS packet information at {offset} + {len}; at most {MAX_HEADER} bytes of header are read")]
    Information {
        /// Offset given.
        offset: u32,
        /// Length given.
        len: u32,
    },
    /// A piece of packet information with an impossible size or offset.
    #[error("RNDIS packet information {kind:#x} of size {size} with data at {offset}, {left} bytes left")]
    Piece {
        /// Its kind.
        kind: u32,
        /// Its size.
        size: u32,
        /// Its data's offset.
        offset: u32,
        /// Bytes left of all packet information.
        left: usize,
    },
    /// Large send offload version 1, or a segment size of zero.
    #[error("large send offload {0:#010x} is not version 2 with a segment size")]
    Lso(u32),
}

bitflags::bitflags! {
    /// What checksums a sender leaves to the host.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct TxChecksums: u32 {
        /// The frame is IPv4.
        const IPV4 = 1;
        /// The frame is IPv6.
        const IPV6 = 1 << 1;
        /// TCP's.
        const TCP = 1 << 2;
        /// UDP's.
        const UDP = 1 << 3;
        /// IPv4's header.
        const IP_HEADER = 1 << 4;
    }
}

bitflags::bitflags! {
    /// What is known of a received frame's checksums. Only say that one is good if it is also right in the frame: a
    /// guest that forwards does not compute it again.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct RxChecksums: u32 {
        /// TCP's is wrong.
        const TCP_FAILED = 1;
        /// UDP's is wrong.
        const UDP_FAILED = 1 << 1;
        /// IPv4's is wrong.
        const IP_FAILED = 1 << 2;
        /// TCP's is right.
        const TCP_OK = 1 << 3;
        /// UDP's is right.
        const UDP_OK = 1 << 4;
        /// IPv4's is right.
        const IP_OK = 1 << 5;
        /// The frame never was on a wire.
        const LOOPBACK = 1 << 6;
        /// The value in TCP's or UDP's field means nothing.
        const TCP_VALUE_INVALID = 1 << 7;
        /// The value in IPv4's field means nothing; with [`Self::IP_OK`] Linux computes it.
        const IP_VALUE_INVALID = 1 << 8;
    }
}

/// Checksum offload of one frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TxChecksum {
    /// What to compute.
    pub what: TxChecksums,
    /// Where the transport header begins in the frame.
    pub transport_offset: u16,
}

impl TxChecksum {
    const fn from_word(word: u32) -> Self {
        Self { what: TxChecksums::from_bits_truncate(word & 0x1f), transport_offset: bits(word, 16, 10) }
    }

    /// As packet information.
    pub const fn word(self) -> u32 {
        self.what.bits() | (self.transport_offset as u32 & 0x3ff) << 16
    }
}

/// Large send offload of one frame, version 2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lso {
    /// Payload bytes per segment, never 0; 20 bits.
    pub mss: u32,
    /// Where the TCP header begins in the frame.
    pub tcp_offset: u16,
    /// IPv6, not IPv4.
    pub ipv6: bool,
}

impl Lso {
    const VERSION_2: u32 = 1 << 30;

    fn from_word(word: u32) -> Result<Self, PacketError> {
        let lso = Self { mss: word & 0xf_ffff, tcp_offset: bits(word, 20, 10), ipv6: word >> 31 == 1 };
        if lso.mss == 0 || word & Self::VERSION_2 == 0 { Err(PacketError::Lso(word)) } else { Ok(lso) }
    }

    /// As packet information.
    pub const fn word(self) -> u32 {
        (self.mss & 0xf_ffff)
            | (self.tcp_offset as u32 & 0x3ff) << 20
            | Self::VERSION_2
            | (self.ipv6 as u32) << 31
    }
}

/// The tag of a frame, which the frame itself does not carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Vlan {
    /// VLAN identifier, 12 bits.
    pub id: u16,
    /// Priority, 3 bits.
    pub priority: u8,
    /// Drop eligible.
    pub dei: bool,
}

impl Vlan {
    /// From the tag control information of an 802.1Q tag.
    pub const fn from_tci(tci: u16) -> Self {
        Self { id: tci & 0xfff, priority: (tci >> 13) as u8, dei: tci & 0x1000 != 0 }
    }

    /// As tag control information of an 802.1Q tag.
    pub const fn tci(self) -> u16 {
        (self.id & 0xfff) | (self.dei as u16) << 12 | (self.priority as u16 & 7) << 13
    }

    const fn from_word(word: u32) -> Self {
        Self { id: bits(word, 4, 12), priority: (word & 7) as u8, dei: word & 8 != 0 }
    }

    /// As packet information: priority lowest, identifier highest.
    pub const fn word(self) -> u32 {
        (self.priority as u32 & 7) | (self.dei as u32) << 3 | (self.id as u32 & 0xfff) << 4
    }
}

/// `count` (at most 16) bits of `word` from bit `from` on.
#[expect(clippy::cast_possible_truncation, reason = "masked to at most 16 bits")]
const fn bits(word: u32, from: u32, count: u32) -> u16 {
    (word >> from & ((1 << count) - 1)) as u16
}

/// Which fragment of a coalesced packet a message holds (§9).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RscPart {
    /// The first; the packet's other information goes with it.
    pub first: bool,
    /// The last.
    pub last: bool,
    /// Which packet.
    pub id: u16,
}

impl RscPart {
    fn data(self) -> [u8; 4] {
        let [low, high] = self.id.to_le_bytes();
        [1, 1 | u8::from(self.first) << 1 | u8::from(self.last) << 2, low, high]
    }

    fn from_data(data: [u8; 4]) -> Option<Self> {
        let [1, flags, low, high] = data else { return None };
        let id = u16::from_le_bytes([low, high]);
        (flags & 1 == 1).then_some(Self { first: flags & 2 != 0, last: flags & 4 != 0, id })
    }
}

/// Where things lie in a message, checked against it and against the bytes there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Layout {
    len: u32,
    data_offset: u32,
    data_len: u32,
}

/// Reads the header, and every piece of packet information whose data is one word at least.
#[inline]
fn parse(head: &[u8], available: u32, mut piece: impl FnMut(u32, [u8; 4])) -> Result<Layout, PacketError> {
    let (header, _) = Header::read_from_prefix(head).map_err(|_| PacketError::Short(head.len()))?;
    if header.kind.get() != PACKET {
        return Err(PacketError::NotAPacket(header.kind.get()));
    }
    let claimed = header.len.get();
    if claimed > available || claimed < 44 {
        return Err(PacketError::Length { claimed, available });
    }
    let (offset, data_len) = (header.data_offset.get(), header.data_len.get());
    let wrong = PacketError::Data { len: claimed, offset, data_len };
    let data_offset = offset.checked_add(BODY).ok_or(wrong)?;
    if offset < PPI_OFFSET || data_offset.checked_add(data_len).is_none_or(|end| end > claimed) {
        return Err(wrong);
    }
    let (offset, len) = (header.ppi_offset.get(), header.ppi_len.get());
    if len != 0 {
        let wrong = PacketError::Information { offset, len };
        let start = offset.checked_add(BODY).ok_or(wrong)?;
        let end = start.checked_add(len).filter(|end| *end <= claimed).ok_or(wrong)?;
        let range = usize::try_from(start).map_err(|_| wrong)?..usize::try_from(end).map_err(|_| wrong)?;
        if offset < PPI_OFFSET {
            return Err(wrong);
        }
        pieces(head.get(range).ok_or(wrong)?, &mut piece)?;
    }
    Ok(Layout { len: claimed, data_offset, data_len })
}

/// Walks packet information; a size or offset that does not fit ends it with an error, never with another lap.
fn pieces(mut rest: &[u8], piece: &mut impl FnMut(u32, [u8; 4])) -> Result<(), PacketError> {
    while !rest.is_empty() {
        let left = rest.len();
        let none = PacketError::Piece { kind: 0, size: 0, offset: 0, left };
        let (ppi, _) = Ppi::read_from_prefix(rest).map_err(|_| none)?;
        let (kind, size, offset) = (ppi.kind.get(), ppi.size.get(), ppi.offset.get());
        let wrong = PacketError::Piece { kind, size, offset, left };
        let whole = usize::try_from(size).map_err(|_| wrong)?;
        let data = usize::try_from(offset).map_err(|_| wrong)?;
        if data < size_of::<Ppi>() || data > whole || whole > left {
            return Err(wrong);
        }
        let one = rest.get(data..whole).ok_or(wrong)?;
        if let Some(word) = one.first_chunk() {
            piece(kind, *word);
        } else if matches!(kind, CHECKSUM | LSO | VLAN | HASH_VALUE) {
            return Err(wrong);
        }
        rest = rest.get(whole..).unwrap_or_default();
    }
    Ok(())
}

/// A frame that a guest sends: where it lies in its message, and what is to be done to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TxPacket {
    /// Bytes of the message; the next one of the same section begins here.
    pub len: u32,
    /// Where the frame begins, from the message's first byte.
    pub data_offset: u32,
    /// Bytes of the frame; the frame lies within the message.
    pub data_len: u32,
    /// Checksums to compute.
    pub checksum: Option<TxChecksum>,
    /// Segmentation to do.
    pub lso: Option<Lso>,
    /// Tag to insert.
    pub vlan: Option<Vlan>,
}

impl TxPacket {
    /// Reads a packet from `head`, a private copy of the message's first bytes (all, or [`MAX_HEADER`]), of which
    /// `available` are in the guest's memory. Information of unknown kind is ignored, and the last of a kind counts.
    ///
    /// # Errors
    /// [`PacketError`].
    #[inline]
    pub fn parse(head: &[u8], available: u32) -> Result<Self, PacketError> {
        let (mut checksum, mut lso, mut vlan) = (None, None, None);
        let Layout { len, data_offset, data_len } = parse(head, available, |kind, data| {
            let word = u32::from_le_bytes(data);
            match kind {
                CHECKSUM => checksum = Some(TxChecksum::from_word(word)),
                LSO => lso = Some(word),
                VLAN => vlan = Some(Vlan::from_word(word)),
                _ => {}
            }
        })?;
        let lso = lso.map(Lso::from_word).transpose()?;
        Ok(Self { len, data_offset, data_len, checksum, lso, vlan })
    }
}

/// A frame, or a fragment of one, that a guest received: its own view, for tests and the in-process guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RxPacket {
    /// Bytes of the message.
    pub len: u32,
    /// Where the frame begins, from the message's first byte.
    pub data_offset: u32,
    /// Bytes of the frame.
    pub data_len: u32,
    /// The packet information.
    pub header: RxHeader,
}

impl RxPacket {
    /// Reads a packet of which all bytes are in `message`.
    ///
    /// # Errors
    /// [`PacketError`].
    pub fn parse(message: &[u8]) -> Result<Self, PacketError> {
        let mut header = RxHeader::default();
        let (mut value, mut info) = (None, 0);
        let available = u32::try_from(message.len()).unwrap_or(u32::MAX);
        let Layout { len, data_offset, data_len } = parse(message, available, |kind, data| {
            let word = u32::from_le_bytes(data);
            match kind {
                CHECKSUM => header.checksums = RxChecksums::from_bits_retain(word),
                VLAN => header.vlan = Some(Vlan::from_word(word)),
                HASH_VALUE => value = Some(word),
                HASH_INFO => info = word,
                PACKET_ID => header.rsc = RscPart::from_data(data),
                _ => {}
            }
        })?;
        header.hash = value.map(|value| (value, info));
        Ok(Self { len, data_offset, data_len, header })
    }
}

/// What goes before a frame that a guest receives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RxHeader {
    /// Left out if empty.
    pub checksums: RxChecksums,
    /// Tag that was taken out of the frame.
    pub vlan: Option<Vlan>,
    /// Hash of the flow, and by which function and type (`NDIS_HASH_*`).
    pub hash: Option<(u32, u32)>,
    /// Which fragment this is.
    pub rsc: Option<RscPart>,
}

impl RxHeader {
    /// Writes header and packet information for `data_len` bytes of frame into `out`; returns how many bytes, which the
    /// frame follows at once. `out` of [`MAX_RX_HEADER`] bytes is always enough; `None` if it is too short.
    #[inline]
    pub fn write(&self, out: &mut [u8], data_len: u32) -> Option<usize> {
        let mut pieces = Pieces::default();
        if !self.checksums.is_empty() {
            pieces.push(CHECKSUM, self.checksums.bits());
        }
        if let Some(vlan) = self.vlan {
            pieces.push(VLAN, vlan.word());
        }
        if let Some((value, info)) = self.hash {
            pieces.push(HASH_VALUE, value);
            pieces.push(HASH_INFO, info);
        }
        if let Some(part) = self.rsc {
            pieces.push(PACKET_ID, u32::from_le_bytes(part.data()));
        }
        pieces.finish(out, data_len)
    }
}

/// What goes before a frame that a guest sends: the in-process guest's side of [`TxPacket::parse`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TxHeader {
    /// Checksums to compute.
    pub checksum: Option<TxChecksum>,
    /// Segmentation to do.
    pub lso: Option<Lso>,
    /// Tag to insert.
    pub vlan: Option<Vlan>,
    /// The guest's own hash of the flow.
    pub hash: Option<u32>,
}

impl TxHeader {
    /// As [`RxHeader::write`].
    #[inline]
    pub fn write(&self, out: &mut [u8], data_len: u32) -> Option<usize> {
        let mut pieces = Pieces::default();
        if let Some(hash) = self.hash {
            pieces.push(HASH_VALUE, hash);
        }
        if let Some(vlan) = self.vlan {
            pieces.push(VLAN, vlan.word());
        }
        if let Some(lso) = self.lso {
            pieces.push(LSO, lso.word());
        }
        if let Some(checksum) = self.checksum {
            pieces.push(CHECKSUM, checksum.word());
        }
        pieces.finish(out, data_len)
    }
}

/// A header under construction: 11 words, then 4 for each of up to 5 pieces.
struct Pieces {
    words: [[u8; 4]; MAX_RX_HEADER / 4],
    at: usize,
}

impl Default for Pieces {
    fn default() -> Self {
        Self { words: [[0; 4]; MAX_RX_HEADER / 4], at: HEADER_BYTES / 4 }
    }
}

impl Pieces {
    #[inline(always)]
    fn push(&mut self, kind: u32, data: u32) {
        if let Some(piece) = self.words.get_mut(self.at..self.at + 4) {
            piece.copy_from_slice(&[16, kind, 12, data].map(u32::to_le_bytes));
            self.at += 4;
        }
    }

    #[inline(always)]
    fn finish(mut self, out: &mut [u8], data_len: u32) -> Option<usize> {
        let len = self.at * 4;
        let header = u32::try_from(len).ok()?;
        let ppi_len = header - 44;
        let ppi_offset = if ppi_len == 0 { 0 } else { PPI_OFFSET };
        let all = data_len.checked_add(header)?;
        let words = [PACKET, all, header - BODY, data_len, 0, 0, 0, ppi_offset, ppi_len, 0, 0];
        self.words.first_chunk_mut::<11>()?.copy_from_slice(&words.map(u32::to_le_bytes));
        out.get_mut(..len)?.copy_from_slice(self.words.as_flattened().get(..len)?);
        Some(len)
    }
}
