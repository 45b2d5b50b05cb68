//! A frame in two parts: its headers, copied once into memory of our own, and the rest, still in the sender's.
//!
//! What is validated is the copy, and what is sent is the copy: a sender that rewrites its buffer meanwhile changes
//! payload bytes at most.

use vmq::frame::{Burst, Frame};
use vmq::memory::Segment;

use super::checksum;
use super::tag::{Retag, TAG_AT, TAG_LEN};
use crate::parse::{Headers, L3, VLAN_LEN, ethertype};

/// The longest headers, Ethernet to TCP options, that an offload may concern: eight IPv6 extension headers of common
/// size, or VXLAN with a TCP packet in it, fit well.
pub const HEADER_MAX: usize = 256;

/// Bytes of a header that is to be sent: one tag may have been pushed.
pub(super) const SLOT: usize = HEADER_MAX + TAG_LEN;

/// The first bytes of a frame, in memory of our own.
#[derive(Debug, Clone)]
pub(super) struct Header {
    bytes: [u8; SLOT],
    filled: usize,
    frame_len: u32,
}

impl Header {
    pub(super) const EMPTY: Self = Self { bytes: [0; SLOT], filled: 0, frame_len: 0 };

    /// Copies up to `count` bytes (at most [`HEADER_MAX`]) of `frame`.
    pub(super) fn read(&mut self, burst: &Burst<'_>, frame: &Frame, count: usize) {
        let wanted = count.min(HEADER_MAX);
        let head = frame.head();
        self.filled = head.len().min(wanted);
        self.bytes[..self.filled].copy_from_slice(&head[..self.filled]);
        self.frame_len = frame.len;
        for segment in burst.tail(frame) {
            if self.filled == wanted {
                break;
            }
            self.filled += segment.read_into(&mut self.bytes[self.filled..wanted]);
        }
    }

    /// The bytes that were read, as they are now.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.filled]
    }

    /// The frame's length with the headers as they are now.
    pub(super) fn frame_len(&self) -> u32 {
        self.frame_len
    }

    /// Where the headers lie.
    pub(super) fn parse(&self) -> Headers {
        Headers::parse(self.bytes(), self.frame_len as usize)
    }

    /// Changes the outer tag. Once at most per frame read: there is room for one tag.
    pub(super) fn retag(&mut self, retag: Retag) {
        match retag {
            Retag::Keep => {}
            Retag::Strip => {
                let behind = (TAG_AT + TAG_LEN).min(self.filled);
                self.bytes.copy_within(behind..self.filled, TAG_AT);
                self.filled = TAG_AT + (self.filled - behind);
                self.frame_len = self.frame_len.saturating_sub(u32::from(VLAN_LEN));
            }
            Retag::Push(control) => {
                self.filled = self.filled.clamp(TAG_AT, HEADER_MAX);
                self.bytes.copy_within(TAG_AT..self.filled, TAG_AT + TAG_LEN);
                self.filled += TAG_LEN;
                self.frame_len = self.frame_len.saturating_add(u32::from(VLAN_LEN));
                put16(&mut self.bytes, TAG_AT, ethertype::VLAN);
                put16(&mut self.bytes, TAG_AT + 2, control);
            }
            Retag::Set(control) => put16(&mut self.bytes, TAG_AT + 2, control),
        }
    }

    /// Forgets all but the first `count` bytes.
    pub(super) fn truncate(&mut self, count: usize) {
        self.filled = self.filled.min(count);
    }

    /// Sets the 16-bit field at `at`.
    pub(super) fn put16(&mut self, at: usize, value: u16) {
        put16(&mut self.bytes[..self.filled], at, value);
    }

    /// Writes up to `count` bytes into `slot`, and says how many.
    pub(super) fn copy_to(&self, slot: &mut [u8; SLOT], count: usize) -> usize {
        let count = count.min(self.filled);
        slot[..count].copy_from_slice(&self.bytes[..count]);
        count
    }
}

/// The bytes of a frame from some point on, where the sender has them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cursor<'b> {
    first: Segment<'b>,
    rest: &'b [Segment<'b>],
}

impl<'b> Cursor<'b> {
    /// From the frame's first byte on.
    pub(super) fn new(burst: &'b Burst<'_>, frame: &'b Frame) -> Self {
        Self { first: Segment::from(frame.head()), rest: burst.tail(frame) }
    }

    /// From `count` bytes further on; empty if there are fewer.
    pub(super) fn skip(mut self, mut count: u32) -> Self {
        while count >= self.first.len() {
            let Some((next, rest)) = self.rest.split_first() else { break };
            count -= self.first.len();
            (self.first, self.rest) = (*next, rest);
        }
        self.first = self.first.skip(count);
        self
    }

    /// The next `count` bytes.
    pub(super) fn take(self, count: u32) -> Pieces<'b> {
        Pieces { cursor: self, left: count }
    }

    /// All that is left.
    pub(super) fn all(self) -> Pieces<'b> {
        self.take(u32::MAX)
    }

    /// Segments that [`Cursor::all`] gives at most.
    pub(super) fn pieces(&self) -> usize {
        self.rest.len() + 1
    }
}

/// A run of bytes, segment by segment.
#[derive(Debug, Clone)]
pub(super) struct Pieces<'b> {
    cursor: Cursor<'b>,
    left: u32,
}

impl<'b> Iterator for Pieces<'b> {
    type Item = Segment<'b>;

    #[inline]
    fn next(&mut self) -> Option<Segment<'b>> {
        while self.cursor.first.is_empty() {
            let (next, rest) = self.cursor.rest.split_first()?;
            self.cursor = Cursor { first: *next, rest };
        }
        let piece = self.cursor.first.take(self.left);
        if piece.is_empty() {
            return None;
        }
        self.left -= piece.len();
        self.cursor.first = self.cursor.first.skip(piece.len());
        Some(piece)
    }
}

impl Pieces<'_> {
    /// The partial sum of the bytes.
    pub(super) fn sum(self) -> u32 {
        let (mut total, mut odd) = (0, false);
        for piece in self {
            total = checksum::combine(total, piece.sum().into(), odd);
            odd ^= piece.len() % 2 == 1;
        }
        total
    }
}

/// The partial sum of the pseudo-header without its length, from the addresses of the fixed IP header.
pub(super) fn pseudo_sum(bytes: &[u8], headers: &Headers, protocol: u8) -> u32 {
    let l3 = usize::from(headers.l3_offset);
    match headers.l3 {
        L3::Ipv4 => checksum::pseudo_v4(array(bytes, l3 + 12), array(bytes, l3 + 16), protocol, 0),
        L3::Ipv6 => checksum::pseudo_v6(array(bytes, l3 + 8), array(bytes, l3 + 24), protocol, 0),
        L3::None => 0,
    }
}

/// Sets length and header checksum of the IP header at `headers.l3_offset` for a packet of `ip_len` bytes, which fits
/// the length field.
pub(super) fn set_ip_len(bytes: &mut [u8], headers: &Headers, ip_len: u32) {
    let l3 = usize::from(headers.l3_offset);
    let field = |len: u32| u16::try_from(len).unwrap_or(u16::MAX);
    match headers.l3 {
        L3::Ipv4 => {
            let header_len = ipv4_header_len(bytes, headers);
            put16(bytes, l3 + 2, field(ip_len));
            put16(bytes, l3 + 10, 0);
            let sum = checksum::sum(bytes.get(l3..l3 + header_len).unwrap_or_default(), 0);
            put16(bytes, l3 + 10, checksum::finish(sum));
        }
        L3::Ipv6 => put16(bytes, l3 + 4, field(ip_len.saturating_sub(40))),
        L3::None => {}
    }
}

/// Bytes of the IPv4 header, options included.
pub(super) fn ipv4_header_len(bytes: &[u8], headers: &Headers) -> usize {
    let [first] = array(bytes, usize::from(headers.l3_offset));
    usize::from(first & 15) * 4
}

/// `N` bytes at `at`; zeros beyond the end, where callers that parsed the bytes never look.
pub(super) fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..).and_then(<[u8]>::first_chunk).copied().unwrap_or([0; N])
}

/// The 16-bit field at `at`; 0 beyond the end.
pub(super) fn get16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(array(bytes, at))
}

/// The 32-bit field at `at`; 0 beyond the end.
pub(super) fn get32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(array(bytes, at))
}

/// Sets the 16-bit field at `at`, if it is there.
pub(super) fn put16(bytes: &mut [u8], at: usize, value: u16) {
    put(bytes, at, value.to_be_bytes());
}

/// Sets the bytes at `at`, if they are there.
pub(super) fn put<const N: usize>(bytes: &mut [u8], at: usize, value: [u8; N]) {
    if let Some(field) = bytes.get_mut(at..).and_then(<[u8]>::first_chunk_mut) {
        *field = value;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vmq::frame::{FrameStore, Offload};

    use super::*;

    fn flat(pieces: Pieces<'_>) -> Vec<u8> {
        let mut all = Vec::new();
        for piece in pieces {
            let mut bytes = vec![0; piece.len() as usize];
            piece.read_into(&mut bytes);
            all.extend(bytes);
        }
        all
    }

    fn header_of(bytes: &[u8]) -> Header {
        let mut store = FrameStore::default();
        let mut burst = Burst::new(&mut store);
        assert!(burst.push(bytes.into(), Offload::default()));
        let mut header = Header::EMPTY;
        header.read(&burst, &burst.frames()[0], HEADER_MAX);
        header
    }

    #[test]
    fn pushed_tag_is_stripped_again() {
        let bytes: Vec<u8> = (0..=255).collect();
        let mut header = header_of(&bytes);
        header.retag(Retag::Push(0x2064));
        assert_eq!(header.bytes()[..12], bytes[..12]);
        assert_eq!(header.bytes()[12..16], [0x81, 0, 0x20, 0x64]);
        assert_eq!(header.bytes()[16..], bytes[12..]);
        assert_eq!(header.frame_len(), 260);
        header.retag(Retag::Set(7));
        assert_eq!(header.bytes()[12..16], [0x81, 0, 0, 7]);
        header.retag(Retag::Strip);
        assert_eq!((header.bytes(), header.frame_len()), (bytes.as_slice(), 256));
    }

    proptest! {
        #[test]
        fn any_range_of_any_split_reads_and_sums_as_the_bytes(
            bytes in proptest::collection::vec(any::<u8>(), 0..6000),
            cuts in proptest::collection::vec(any::<proptest::sample::Index>(), 0..12),
            from in any::<proptest::sample::Index>(),
            count in 0u32..7000,
        ) {
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
            cuts.extend([0, bytes.len()]);
            cuts.sort_unstable();
            let mut store = FrameStore::default();
            let mut burst = Burst::new(&mut store);
            let pieces = cuts.windows(2).map(|cut| Segment::from(&bytes[cut[0]..cut[1]]));
            prop_assert!(burst.push_pieces(pieces, Offload::default()));
            let from = from.index(bytes.len() + 1);
            let cursor = Cursor::new(&burst, &burst.frames()[0]).skip(u32::try_from(from).unwrap());
            let expected = &bytes[from..(from + count as usize).min(bytes.len())];
            prop_assert_eq!(flat(cursor.take(count)), expected);
            prop_assert_eq!(checksum::fold(cursor.take(count).sum()), checksum::fold(checksum::sum(expected, 0)));
            let mut header = Header::EMPTY;
            header.read(&burst, &burst.frames()[0], 200);
            prop_assert_eq!(header.bytes(), &bytes[..bytes.len().min(200)]);
        }
    }
}
