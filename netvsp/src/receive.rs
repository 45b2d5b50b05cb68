//! Frames for a guest: from a burst into sections of its receive buffer.
//!
//! Each section gets one RNDIS packet: header and per-packet information, built in a few words of ours, then the frame,
//! copied once from the sender's memory. The frames of a burst go into one type-7 packet with a range each, so the ring, the
//! guest's interrupt and its completion are paid once per burst. A large frame for a guest with RSC is cut into as many
//! sections as it needs, all in one packet (netvsp.md §9); nothing else of it is touched.
//!
//! A checksum that its sender left to be done is done here, on the way: the frame goes through a buffer of ours block by
//! block, and is summed there. Only a large frame has none: what stands for many has no checksum of its own. Per-packet
//! information vouches for both, but a guest that switched receive checksums off looks at the field (Linux never says so),
//! and so does every program that reads whole frames.

use vmbus::pages::Pages;
use vmq::Mac;
use vmq::frame::{Burst, Checksum, Frame};
use vmq::memory::{Next, Room, Segment};
use vmq::rss::{HashTypes, Rss};
use vswitch::offload::checksum;
use vswitch::parse::{Headers, L4, ethertype};

use crate::control::PacketFilter;
use crate::protocol::oid;
use crate::protocol::packet::{MAX_RX_HEADER, RscPart, RxChecksums, RxHeader, Vlan};

/// Bytes of all that may precede a frame in its section.
const HEADER_MAX: u32 = 124;
const _: () = assert!(HEADER_MAX as usize == MAX_RX_HEADER);

/// Bytes at a section's end that are not used: Windows reads beyond the packet (netvsp.md §4).
const SECTION_TAIL: u32 = 36;

/// Bytes of a frame that the switch has a copy of.
const HEAD_BYTES: u32 = 64;
const _: () = assert!(HEAD_BYTES as usize == vmq::frame::HEAD_BYTES);

const TAG_AT: usize = 12;
const TAG: u32 = 4;

/// Bytes that are summed at once.
const BLOCK: usize = 2048;

/// Where UDP has its checksum, from its header on: none would be 0 there.
const UDP_CHECKSUM: u16 = 6;

/// How frames are written for one guest.
#[derive(Debug, Clone)]
pub(crate) struct Form {
    /// Bytes of a section.
    pub(crate) section_size: u32,
    /// Which frames the guest wants.
    pub(crate) filter: PacketFilter,
    /// Groups it takes, if not all.
    pub(crate) multicast: Vec<Mac>,
    /// Large frames go whole.
    pub(crate) rsc: bool,
    /// The hash that the guest wants to see.
    pub(crate) rss: Option<Rss>,
}

/// Where a frame goes, and what precedes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Layout {
    /// The tag that is left out of the frame, as VLAN information.
    vlan: Option<Vlan>,
    /// Bytes that are written, without tag.
    len: u32,
    /// Frame bytes per section.
    piece: u32,
    /// Sections.
    pub(crate) sections: usize,
}

/// Where a frame is written.
#[derive(Debug)]
pub(crate) struct Target<'t> {
    pub(crate) pages: &'t Pages,
    pub(crate) sections: &'t [u32],
    /// Where the frame after it lies and goes.
    pub(crate) next: Next,
}

impl Form {
    /// Whether the guest wants `frame`.
    #[inline]
    pub(crate) fn wants(&self, frame: &Frame) -> bool {
        if frame.head[0] & 1 == 0 {
            return !self.filter.is_empty();
        }
        let [a, b, c, d, e, f, ..] = frame.head;
        let group = [a, b, c, d, e, f];
        let always = PacketFilter::PROMISCUOUS;
        if group == [0xff; 6] {
            return self.filter.intersects(always | PacketFilter::BROADCAST);
        }
        self.filter.intersects(always | PacketFilter::ALL_MULTICAST)
            || (self.filter.contains(PacketFilter::MULTICAST) && self.multicast.contains(&Mac(group)))
    }

    /// How `frame` is laid out, or `None` if it does not fit.
    #[inline]
    pub(crate) fn layout(&self, frame: &Frame) -> Option<Layout> {
        let vlan = tag(frame);
        let len = frame.len - if vlan.is_some() { TAG } else { 0 };
        let room = self.section_size.checked_sub(HEADER_MAX)?;
        if len <= room {
            return Some(Layout { vlan, len, piece: len, sections: 1 });
        }
        let piece = room.saturating_sub(SECTION_TAIL);
        if !self.rsc || frame.offload.gso.is_none() || piece == 0 {
            return None;
        }
        let sections = len.div_ceil(piece) as usize;
        Some(Layout { vlan, len, piece, sections })
    }

    /// Writes `frame` to `target`, and names the range in each section, length first. False if the buffer is not there.
    #[inline]
    pub(crate) fn write(
        &self,
        burst: &Burst<'_>,
        frame: &Frame,
        layout: &Layout,
        target: &Target<'_>,
        mut range: impl FnMut(u32, u32),
    ) -> bool {
        let &Target { pages, sections, next } = target;
        let mut header = self.header(frame, layout.vlan);
        let mut source = Source::new(burst, frame, layout.vlan.is_some());
        let (mut left, last) = (layout.len, sections.len().saturating_sub(1));
        for (index, &section) in sections.iter().enumerate() {
            let len = left.min(layout.piece);
            left -= len;
            if last > 0 {
                let part = RscPart { first: index == 0, last: index == last, id: 0 };
                // What is known of the frame goes with the first part.
                let first = if index == 0 { header } else { RxHeader::default() };
                header = RxHeader { rsc: Some(part), ..first };
            }
            let mut bytes = [0; MAX_RX_HEADER];
            let Some(written) = header.write(&mut bytes, len) else { return false };
            let total = len + u32::try_from(written).unwrap_or(0);
            let Some(at) = section.checked_mul(self.section_size) else { return false };
            let Some(mut rooms) = pages.rooms(at, total) else { return false };
            let Some(room) = rooms.next() else { return false };
            let room = write_header(room, &bytes[..written], &mut rooms);
            match frame.offload.checksum {
                Checksum::Partial { start, offset } if frame.offload.gso.is_none() => {
                    let tag = if layout.vlan.is_some() { TAG } else { 0 };
                    let start = u32::from(start).saturating_sub(tag);
                    let sum = source.fill_summed(room, &mut rooms, len, start, next);
                    let udp = offset == UDP_CHECKSUM;
                    let value = if udp { checksum::finish_udp(sum) } else { checksum::finish(sum) };
                    let field = total - len + start + u32::from(offset);
                    // That it lies in the frame was checked when it came in.
                    if field + 2 <= total && !pages.write(at + field, &value.to_be_bytes()) {
                        return false;
                    }
                }
                _ => source.fill(room, &mut rooms, len, next),
            }
            range(total, at);
        }
        true
    }

    #[inline]
    fn header(&self, frame: &Frame, vlan: Option<Vlan>) -> RxHeader {
        // Nearly all there is to say needs the headers.
        let verified = frame.offload.checksum != Checksum::Unknown;
        if !verified && self.rss.is_none() {
            return RxHeader { vlan, ..RxHeader::default() };
        }
        let headers = Headers::parse(frame.head(), frame.len as usize);
        let checksums = match headers.l4 {
            L4::Tcp if verified => RxChecksums::TCP_OK,
            L4::Udp if verified => RxChecksums::UDP_OK,
            _ => RxChecksums::empty(),
        };
        let hash = self.rss.as_ref().and_then(|rss| rss.hash(&headers.flow(frame.head())));
        RxHeader { checksums, vlan, hash: hash.map(|(value, kind)| (value, hash_info(kind))), rsc: None }
    }
}

/// How a flow was hashed, in NDIS terms.
fn hash_info(kind: HashTypes) -> u32 {
    let kind = match kind {
        HashTypes::TCP_V4 => oid::HASH_TCP_IPV4,
        HashTypes::UDP_V4 => oid::HASH_UDP_IPV4,
        HashTypes::IPV6 => oid::HASH_IPV6,
        HashTypes::TCP_V6 => oid::HASH_TCP_IPV6,
        HashTypes::UDP_V6 => oid::HASH_UDP_IPV6,
        _ => oid::HASH_IPV4,
    };
    oid::HASH_TOEPLITZ | kind
}

/// The tag of a tagged frame.
#[inline]
fn tag(frame: &Frame) -> Option<Vlan> {
    let [.., high, low, a, b] = *frame.head.first_chunk::<16>()?;
    let tagged = frame.len >= 18 && u16::from_be_bytes([high, low]) == ethertype::VLAN;
    tagged.then(|| Vlan::from_tci(u16::from_be_bytes([a, b])))
}

/// Writes `header` and returns the room behind it.
#[inline]
fn write_header<'p>(
    mut room: Room<'p>,
    mut header: &[u8],
    rooms: &mut impl Iterator<Item = Room<'p>>,
) -> Room<'p> {
    loop {
        let count = header.len().min(room.len() as usize);
        room = room.write(&header[..count]);
        header = &header[count..];
        if header.is_empty() {
            return room;
        }
        match rooms.next() {
            Some(next) => room = next,
            None => return room,
        }
    }
}

/// A frame's bytes in order, to be spread over rooms.
struct Source<'b> {
    first: Segment<'b>,
    /// What of the head comes behind a tag that is left out.
    second: Segment<'b>,
    tail: &'b [Segment<'b>],
}

impl<'b> Source<'b> {
    #[inline]
    fn new(burst: &'b Burst<'_>, frame: &'b Frame, untag: bool) -> Self {
        let head = frame.head();
        let (first, second) = match (untag, head.split_at_checked(TAG_AT)) {
            (true, Some((addresses, rest))) => (addresses, rest.get(TAG as usize..).unwrap_or_default()),
            _ => (head, &[][..]),
        };
        Self { first: first.into(), second: second.into(), tail: burst.tail(frame) }
    }

    /// Writes the next `len` bytes.
    #[inline]
    fn fill<'p>(&mut self, room: Room<'p>, rooms: &mut impl Iterator<Item = Room<'p>>, len: u32, next: Next) {
        let (mut room, mut left) = (room, len);
        while left > 0 {
            if room.is_empty() {
                let Some(next) = rooms.next() else { return };
                room = next;
                continue;
            }
            if self.first.is_empty() && !self.advance() {
                return;
            }
            let piece = self.first.take(left.min(room.len()));
            // While a tail moves, the next frame's lines are fetched; heads are in the cache already.
            let next = if piece.len() > HEAD_BYTES { next } else { Next::NONE };
            room = room.copy(piece, next);
            self.first = self.first.skip(piece.len());
            left -= piece.len();
        }
    }

    /// Writes the next `len` bytes, and gives the partial sum of those from `start` on.
    fn fill_summed<'p>(
        &mut self,
        mut room: Room<'p>,
        rooms: &mut impl Iterator<Item = Room<'p>>,
        len: u32,
        start: u32,
        next: Next,
    ) -> u32 {
        let mut block = [0; BLOCK];
        let (mut at, mut sum, mut odd) = (0, 0, false);
        while at < len {
            if room.is_empty() {
                let Some(next) = rooms.next() else { break };
                room = next;
                continue;
            }
            if self.first.is_empty() && !self.advance() {
                break;
            }
            let count = self.first.take((len - at).min(room.len())).read_into(&mut block);
            let bytes = &block[..count];
            // A block is no longer than 32 bits can say.
            let count = u32::try_from(count).unwrap_or(0);
            let next = if count > HEAD_BYTES { next } else { Next::NONE };
            room = room.copy(bytes.into(), next);
            self.first = self.first.skip(count);
            let summed = bytes.get(start.saturating_sub(at) as usize..).unwrap_or_default();
            sum = checksum::combine(sum, checksum::sum(summed, 0), odd);
            odd ^= summed.len() % 2 == 1;
            at += count;
        }
        sum
    }

    #[inline]
    fn advance(&mut self) -> bool {
        if !self.second.is_empty() {
            self.first = std::mem::replace(&mut self.second, Segment::from(&[][..]));
            return true;
        }
        let Some((&next, rest)) = self.tail.split_first() else { return false };
        (self.first, self.tail) = (next, rest);
        true
    }
}
