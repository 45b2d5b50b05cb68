//! Frames that a guest sends: out of a message 107's bytes into a burst.
//!
//! The bytes of a message lie in a section of the send buffer, in ranges of guest memory, or in both, one behind the
//! other ([`Bytes`]); several RNDIS messages may follow each other in them. The RNDIS header is copied once and checked;
//! the frame stays where it is and goes into the burst as segments of guest memory. Only what has to be rewritten, a tag
//! to be put in or the headers of a large send, is copied into a [`Slot`] of our own.
//!
//! Source: netvsp.md §7 (RNDIS packet), §8 (forms, checksum, LSOv2).

use arrayvec::ArrayVec;
use vmq::frame::{BURST_FRAMES, Burst, Checksum, FRAME_SEGMENTS, Gso, GsoKind, Offload};
use vmq::memory::Segment;
use vswitch::DropReason;
use vswitch::offload::{HEADER_MAX, checksum};
use vswitch::parse::{Headers, L3, L4, ethertype};
use vswitch::tally::Tally;

use crate::protocol::packet::{Lso, MAX_HEADER, PacketError, TxChecksums, TxPacket, Vlan};

/// Pieces that the bytes of one message 107 lie in at most: the longest frame's and a send section's.
pub(crate) const PIECES: usize = FRAME_SEGMENTS;

const TAG_AT: usize = 12;
const TAG: usize = 4;
/// TCP's congestion-window-reduced flag (RFC 3168).
const CWR: u8 = 0x80;

/// Headers rewritten on behalf of a guest: the longest headers, and a tag.
pub(crate) type Slot = [u8; HEADER_MAX + TAG];

/// Slots for one burst.
pub(crate) fn slots() -> Box<[Slot; BURST_FRAMES]> {
    Box::new([[0; HEADER_MAX + TAG]; BURST_FRAMES])
}

/// What a guest must not send.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TransmitFault {
    /// An RNDIS message that is none, or does not lie inside what was sent.
    #[error(transparent)]
    Packet(#[from] PacketError),
    /// More packets in one message than the guest was told.
    #[error("more than {0} packets in one message")]
    TooMany(usize),
    /// Segmentation of what cannot be segmented, or into segments of nothing.
    #[error("large send with segment size {size} and tcp header at {offset} does not fit its frame")]
    LargeSend {
        /// Bytes per segment.
        size: u32,
        /// Where the TCP header is said to be.
        offset: u16,
    },
    /// A checksum outside the frame.
    #[error("checksum of the transport header at {offset} in a frame of {len} bytes")]
    Checksum {
        /// Where the transport header is said to be.
        offset: u16,
        /// The frame's length.
        len: u32,
    },
    /// In more pieces than any frame.
    #[error("message in more than {PIECES} pieces")]
    Pieces,
}

/// The bytes of one message 107.
#[derive(Debug, Default)]
pub(crate) struct Bytes<'m> {
    pieces: ArrayVec<Segment<'m>, PIECES>,
    len: u32,
}

impl<'m> Bytes<'m> {
    /// Adds what comes next.
    pub(crate) fn push(&mut self, segment: Segment<'m>) -> Result<(), TransmitFault> {
        if segment.is_empty() {
            return Ok(());
        }
        self.len = self.len.checked_add(segment.len()).ok_or(TransmitFault::Pieces)?;
        self.pieces.try_push(segment).map_err(|_| TransmitFault::Pieces)
    }

    /// Pieces held.
    pub(crate) fn pieces(&self) -> usize {
        self.pieces.len()
    }

    /// All of it, up to `limit` bytes, as a copy of our own.
    pub(crate) fn copy(&self, limit: usize) -> Vec<u8> {
        let mut bytes = vec![0; limit.min(self.len as usize)];
        let filled = Cursor::new(&self.pieces).read(&mut bytes);
        bytes.truncate(filled);
        bytes
    }
}

/// A place in the bytes.
#[derive(Clone, Copy)]
struct Cursor<'a, 'm> {
    first: Segment<'m>,
    rest: &'a [Segment<'m>],
}

impl<'a, 'm> Cursor<'a, 'm> {
    fn new(pieces: &'a [Segment<'m>]) -> Self {
        match pieces.split_first() {
            Some((&first, rest)) => Self { first, rest },
            None => Self { first: Segment::from(&[][..]), rest: &[] },
        }
    }

    #[inline]
    fn skip(mut self, mut count: u32) -> Self {
        while count >= self.first.len() {
            let Some((&next, rest)) = self.rest.split_first() else { break };
            count -= self.first.len();
            (self.first, self.rest) = (next, rest);
        }
        self.first = self.first.skip(count);
        self
    }

    /// Copies what comes next, without moving.
    #[inline]
    fn read(self, into: &mut [u8]) -> usize {
        let mut filled = self.first.read_into(into);
        for piece in self.rest {
            if filled == into.len() {
                break;
            }
            filled += piece.read_into(&mut into[filled..]);
        }
        filled
    }

    /// The next `len` bytes, segment by segment.
    fn take(self, len: u32) -> impl Iterator<Item = Segment<'m>> + 'a {
        let pieces = std::iter::once(self.first).chain(self.rest.iter().copied());
        pieces.scan(len, |left, piece| {
            let piece = piece.take(*left);
            *left -= piece.len();
            (!piece.is_empty() || *left > 0).then_some(piece)
        })
    }
}

/// Adds the frames in `bytes` to `burst`, at most `limit` of them, for which there must be room, and as many `slots`.
///
/// # Errors
/// The guest broke the protocol. Frames that came before are in the burst.
pub(crate) fn frames<'m>(
    bytes: &Bytes<'m>,
    limit: usize,
    slots: &mut &'m mut [Slot],
    burst: &mut Burst<'m>,
    tally: &mut Tally,
) -> Result<(), TransmitFault> {
    let (mut cursor, mut available) = (Cursor::new(&bytes.pieces), bytes.len);
    for count in 0.. {
        if count == limit {
            return Err(TransmitFault::TooMany(limit));
        }
        let mut head = [0; MAX_HEADER];
        let filled = cursor.read(&mut head);
        let packet = TxPacket::parse(&head[..filled], available)?;
        add(&packet, cursor.skip(packet.data_offset), slots, burst, tally)?;
        available -= packet.len;
        // What is too short for a message is padding.
        if available < 8 {
            break;
        }
        cursor = cursor.skip(packet.len);
    }
    Ok(())
}

/// Adds one frame.
#[inline]
fn add<'m>(
    packet: &TxPacket,
    frame: Cursor<'_, 'm>,
    slots: &mut &'m mut [Slot],
    burst: &mut Burst<'m>,
    tally: &mut Tally,
) -> Result<(), TransmitFault> {
    let ip_header = packet.checksum.is_some_and(|asked| asked.what.contains(TxChecksums::IP_HEADER));
    let rewritten = packet.vlan.is_some() || packet.lso.is_some() || ip_header;
    let pushed = if rewritten {
        let Some((slot, rest)) = std::mem::take(slots).split_first_mut() else {
            return Err(TransmitFault::TooMany(BURST_FRAMES));
        };
        *slots = rest;
        let (offload, copied, taken) = rewrite(packet, frame, slot)?;
        let head: &'m [u8] = slot.get(..copied).unwrap_or_default();
        let rest = frame.skip(taken).take(packet.data_len.saturating_sub(taken));
        burst.push_pieces(std::iter::once(Segment::from(head)).chain(rest), offload)
    } else {
        let offload = checksum_only(packet, frame)?;
        if frame.first.len() >= packet.data_len {
            burst.push(frame.first.take(packet.data_len), offload)
        } else {
            burst.push_pieces(frame.take(packet.data_len), offload)
        }
    };
    if !pushed {
        tally.drop(DropReason::Malformed);
    }
    Ok(())
}

fn checksum_only(packet: &TxPacket, frame: Cursor<'_, '_>) -> Result<Offload, TransmitFault> {
    partial(packet, || {
        let mut bytes = [0; HEADER_MAX];
        let count = frame.read(&mut bytes).min(packet.data_len as usize);
        Headers::parse(&bytes[..count], packet.data_len as usize)
    })
}

/// What the checksum information asks for, in a frame without tag of ours.
#[inline]
fn partial(packet: &TxPacket, headers: impl Fn() -> Headers) -> Result<Offload, TransmitFault> {
    let asked = packet.checksum.filter(|asked| asked.what.intersects(TxChecksums::TCP | TxChecksums::UDP));
    let Some(asked) = asked else { return Ok(Offload::NONE) };
    let offset = if asked.what.contains(TxChecksums::TCP) { 16 } else { 6 };
    let start = match asked.transport_offset {
        0 => headers().l4_offset,
        start => start,
    };
    if start == 0 || u32::from(start) + u32::from(offset) + 2 > packet.data_len {
        return Err(TransmitFault::Checksum { offset: start, len: packet.data_len });
    }
    Ok(Offload { checksum: Checksum::Partial { start, offset }, gso: None })
}

/// Copies the headers into `slot` and does to them what the guest left to be done. Returns what is left to be done, the
/// bytes in the slot, and the frame's bytes that they stand for.
fn rewrite(
    packet: &TxPacket,
    frame: Cursor<'_, '_>,
    slot: &mut Slot,
) -> Result<(Offload, usize, u32), TransmitFault> {
    let wanted = (packet.data_len as usize).min(HEADER_MAX);
    let mut filled = frame.read(&mut slot[..wanted]);
    let headers = Headers::parse(&slot[..filled], packet.data_len as usize);
    let mut offload;
    if let Some(lso) = packet.lso {
        (offload, filled) = large_send(packet, lso, &headers, &mut slot[..filled])?;
    } else {
        offload = partial(packet, || headers)?;
        let ip_header = packet.checksum.is_some_and(|asked| asked.what.contains(TxChecksums::IP_HEADER));
        if ip_header && headers.l3 == L3::Ipv4 {
            set_ipv4_checksum(&mut slot[..filled], usize::from(headers.l3_offset));
        }
    }
    let taken = u32::try_from(filled).unwrap_or(0);
    if let Some(vlan) = packet.vlan
        && filled >= TAG_AT
    {
        push_tag(slot, filled, vlan);
        filled += TAG;
        if let Checksum::Partial { start, .. } = &mut offload.checksum {
            *start = start.saturating_add(4);
        }
    }
    Ok((offload, filled, taken))
}

fn push_tag(slot: &mut Slot, filled: usize, vlan: Vlan) {
    slot.copy_within(TAG_AT..filled, TAG_AT + TAG);
    put16(slot, TAG_AT, ethertype::VLAN);
    put16(slot, TAG_AT + 2, vlan.tci());
}

fn put16(bytes: &mut [u8], at: usize, value: u16) {
    if let Some(field) = bytes.get_mut(at..at + 2) {
        field.copy_from_slice(&value.to_be_bytes());
    }
}

fn set_ipv4_checksum(bytes: &mut [u8], l3: usize) {
    let header_len = usize::from(bytes.get(l3).copied().unwrap_or(0) & 15) * 4;
    put16(bytes, l3 + 10, 0);
    let sum = checksum::sum(bytes.get(l3..l3 + header_len).unwrap_or_default(), 0);
    put16(bytes, l3 + 10, checksum::finish(sum));
}

/// Restores what LSOv2 leaves empty: the IP length, the IPv4 checksum, and the length in the pseudo-header's sum. Returns
/// the offload and the length of the headers.
fn large_send(
    packet: &TxPacket,
    lso: Lso,
    headers: &Headers,
    bytes: &mut [u8],
) -> Result<(Offload, usize), TransmitFault> {
    let wrong = TransmitFault::LargeSend { size: lso.mss, offset: lso.tcp_offset };
    let header_len = headers.headers_len().ok_or(wrong)?;
    let family = if lso.ipv6 { L3::Ipv6 } else { L3::Ipv4 };
    let is_tcp = headers.l3 == family && headers.l4 == L4::Tcp && headers.l4_offset == lso.tcp_offset;
    let fits = usize::from(header_len) <= bytes.len() && u32::from(header_len) <= packet.data_len;
    // Segments of 64 KiB and more are beyond any frame.
    let size = u16::try_from(lso.mss).map_err(|_| wrong)?;
    if size == 0 || !is_tcp || !fits {
        return Err(wrong);
    }
    let offset = lso.tcp_offset;
    let l3 = usize::from(headers.l3_offset);
    let ip_len = packet.data_len - u32::from(headers.l3_offset);
    let tcp_len = packet.data_len - u32::from(offset);
    let field = |len: u32| u16::try_from(len).map_err(|_| wrong);
    let array = |at: usize| bytes.get(at..).and_then(<[u8]>::first_chunk::<4>).copied().unwrap_or_default();
    let wide = |at: usize| bytes.get(at..).and_then(<[u8]>::first_chunk::<16>).copied().unwrap_or_default();
    let pseudo = if lso.ipv6 {
        checksum::pseudo_v6(wide(l3 + 8), wide(l3 + 24), 6, tcp_len)
    } else {
        checksum::pseudo_v4(array(l3 + 12), array(l3 + 16), 6, tcp_len)
    };
    if lso.ipv6 {
        put16(bytes, l3 + 4, field(ip_len - 40)?);
    } else {
        put16(bytes, l3 + 2, field(ip_len)?);
        set_ipv4_checksum(bytes, l3);
    }
    put16(bytes, usize::from(offset) + 16, checksum::fold(pseudo));
    let flags = bytes.get(usize::from(offset) + 13).copied().unwrap_or(0);
    let payload = packet.data_len - u32::from(header_len);
    let kind = if lso.ipv6 { GsoKind::Tcp6 } else { GsoKind::Tcp4 };
    let gso = (payload > u32::from(size)).then_some(Gso { kind, size, ecn: flags & CWR != 0 });
    let checksum = Checksum::Partial { start: offset, offset: 16 };
    Ok((Offload { checksum, gso }, usize::from(header_len)))
}
