//! Coalescing (RSC, GRO): TCP segments that follow each other become one large frame, for a receiver that takes such.
//!
//! It is planned over a whole list of frames before any is passed on. Segments of one flow are merged if a sender could
//! have made them from one large frame: all their headers equal but for what segmentation itself counts up. Frames of
//! one flow are never reordered: any frame of the flow that does not fit ends the merge before it.

use arrayvec::ArrayVec;
use vmq::frame::{BURST_FRAMES, Burst, Checksum, FRAME_SEGMENTS, Frame, Gso, GsoKind, Offload};
use vmq::memory::Segment;
use vmq::rss::Flow;

use super::check::TCP_CHECKSUM;
use super::checksum;
use super::header::{Cursor, Header, SLOT, array, get16, get32, pseudo_sum, put16, set_ip_len};
use super::segment::{PROTOCOL_TCP, TCP_FLAGS, TCP_SEQUENCE, tcp_flag};
use super::tag::Retag;
use crate::parse::{Headers, L3, L4};

/// Enough for two tags, a bare IP header and the longest TCP header.
const READ: usize = 128;

/// Flows that are merged at a time; when there are more, the merge that began first ends.
const OPEN_FLOWS: usize = 16;

/// IPv4's "don't fragment".
const DONT_FRAGMENT: u16 = 0x4000;

/// How one frame of the list is to be passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// By itself.
    Alone,
    /// As the first of the group of this number.
    First(usize),
    /// With the first of its group.
    Merged,
}

/// The plan for one list, and the headers it was made on.
#[derive(Debug)]
pub(super) struct Coalescer {
    /// By place in the list.
    headers: Box<[Header; BURST_FRAMES]>,
    roles: ArrayVec<Role, BURST_FRAMES>,
    members: ArrayVec<Member, BURST_FRAMES>,
    groups: ArrayVec<Group, BURST_FRAMES>,
    /// Groups that may grow, oldest first.
    open: ArrayVec<usize, OPEN_FLOWS>,
}

/// A frame at a place of the list, and the place of the next of its group.
#[derive(Debug, Clone, Copy)]
struct Member {
    index: u8,
    payload: u32,
    next: Option<usize>,
}

/// Segments that become one frame.
#[derive(Debug)]
struct Group {
    first_place: usize,
    first: TcpSegment,
    last_place: usize,
    last: TcpSegment,
    flow: Flow,
    count: u32,
    payload: u32,
    pieces: usize,
    /// How the identification goes on from member to member, once there are two.
    id_step: Option<u16>,
    /// The first member's checksum was looked at.
    verified: bool,
}

/// A TCP segment that may be merged.
#[derive(Debug, Clone, Copy)]
struct TcpSegment {
    headers: Headers,
    header_len: u16,
    payload: u32,
    sequence: u32,
    push: bool,
    id: u16,
    dont_fragment: bool,
    pieces: usize,
}

/// What came of trying to merge a segment.
enum Join {
    Merged,
    /// It starts a group of its own.
    Refused,
    /// Its checksum is wrong: it goes alone.
    Broken,
}

impl Coalescer {
    pub(super) fn new() -> Self {
        Self {
            headers: Box::new([const { Header::EMPTY }; BURST_FRAMES]),
            roles: ArrayVec::new(),
            members: ArrayVec::new(),
            groups: ArrayVec::new(),
            open: ArrayVec::new(),
        }
    }

    /// Forgets the plan: every frame goes alone.
    pub(super) fn clear(&mut self) {
        self.roles.clear();
        self.members.clear();
        self.groups.clear();
        self.open.clear();
    }

    /// Makes the plan for the first [`BURST_FRAMES`] of `list`. Only frames that are `wanted` are merged.
    pub(super) fn plan(&mut self, burst: &Burst<'_>, list: &[u8], wanted: impl Fn(&Frame, L3) -> bool) {
        self.clear();
        for (place, index) in list.iter().take(BURST_FRAMES).enumerate() {
            self.members.push(Member { index: *index, payload: 0, next: None });
            let role = match burst.frames().get(usize::from(*index)) {
                Some(frame) => self.assign(burst, place, frame, &wanted),
                None => Role::Alone,
            };
            self.roles.push(role);
        }
    }

    /// What becomes of the frame at `place` of the list.
    pub(super) fn role(&self, place: usize) -> Role {
        match self.roles.get(place) {
            Some(Role::First(group)) if self.groups.get(*group).is_some_and(|group| group.count == 1) => {
                Role::Alone
            }
            Some(role) => *role,
            None => Role::Alone,
        }
    }

    fn assign(
        &mut self,
        burst: &Burst<'_>,
        place: usize,
        frame: &Frame,
        wanted: impl Fn(&Frame, L3) -> bool,
    ) -> Role {
        let header = &mut self.headers[place];
        header.read(burst, frame, READ);
        let headers = header.parse();
        let flow = headers.flow(header.bytes());
        let segment =
            TcpSegment::read(header.bytes(), headers, frame.offload).filter(|_| wanted(frame, headers.l3));
        let Some(mut segment) = segment else {
            self.end(|group| touches(&group.flow, &flow));
            return Role::Alone;
        };
        segment.pieces = Cursor::new(burst, frame).pieces();
        self.members[place].payload = segment.payload;
        let found = self.open.iter().copied().find(|group| self.groups[*group].flow == flow);
        if let Some(found) = found {
            match self.join(burst, place, frame, found, segment) {
                Join::Merged => return Role::Merged,
                Join::Refused => self.end(|group| group.flow == flow),
                Join::Broken => {
                    self.end(|group| group.flow == flow);
                    return Role::Alone;
                }
            }
        }
        self.begin(place, flow, segment)
    }

    /// Starts a group with the segment at `place`.
    fn begin(&mut self, place: usize, flow: Flow, segment: TcpSegment) -> Role {
        let number = self.groups.len();
        self.groups.push(Group {
            first_place: place,
            first: segment,
            last_place: place,
            last: segment,
            flow,
            count: 1,
            payload: segment.payload,
            pieces: segment.pieces,
            id_step: None,
            verified: false,
        });
        if !segment.push {
            if self.open.is_full() {
                self.open.remove(0);
            }
            self.open.push(number);
        }
        Role::First(number)
    }

    fn join(
        &mut self,
        burst: &Burst<'_>,
        place: usize,
        frame: &Frame,
        found: usize,
        segment: TcpSegment,
    ) -> Join {
        let group = &mut self.groups[found];
        let first_index = usize::from(self.members[group.first_place].index);
        let Some(first_frame) = burst.frames().get(first_index) else { return Join::Refused };
        let (first, header) = (&self.headers[group.first_place], &self.headers[place]);
        if (frame.vlan, frame.tagged) != (first_frame.vlan, first_frame.tagged)
            || !group.goes_on_with(&segment)
            || uncounted(first, &group.first) != uncounted(header, &segment)
        {
            return Join::Refused;
        }
        if !segment.verified(burst, frame, header) {
            return Join::Broken;
        }
        group.verified = group.verified || group.first.verified(burst, first_frame, first);
        if !group.verified {
            return Join::Refused;
        }
        self.members[group.last_place].next = Some(place);
        if segment.push || segment.payload < group.first.payload {
            self.open.retain(|open| *open != found);
        }
        group.add(place, segment);
        Join::Merged
    }

    /// Lets the groups that `ended` names grow no more.
    fn end(&mut self, ended: impl Fn(&Group) -> bool) {
        let groups = &self.groups;
        self.open.retain(|group| !ended(&groups[*group]));
    }

    /// Writes the header of the merged frame of `group`, its tag changed, into `slot`; says its length and what is left
    /// to be done. Once per plan.
    pub(super) fn header(
        &mut self,
        group: usize,
        retag: Retag,
        slot: &mut [u8; SLOT],
    ) -> Option<(usize, Offload)> {
        let group = self.groups.get(group)?;
        let header = &mut self.headers[group.first_place];
        header.retag(retag);
        let headers = retag.headers(group.first.headers)?;
        let header_len = usize::from(headers.headers_len()?);
        header.copy_to(slot, header_len);
        let bytes = &mut slot[..header_len];
        let l4 = usize::from(headers.l4_offset);
        let l4_len = u32::from(headers.l4_header_len) + group.payload;
        set_ip_len(bytes, &headers, u32::from(headers.l4_offset - headers.l3_offset) + l4_len);
        if group.last.push {
            bytes[l4 + TCP_FLAGS] |= tcp_flag::PSH;
        }
        let pseudo = checksum::combine(pseudo_sum(bytes, &headers, PROTOCOL_TCP), l4_len, false);
        put16(bytes, l4 + usize::from(TCP_CHECKSUM), checksum::fold(pseudo));
        let kind = if headers.l3 == L3::Ipv4 { GsoKind::Tcp4 } else { GsoKind::Tcp6 };
        let size = u16::try_from(group.first.payload).ok()?;
        let checksum = Checksum::Partial { start: headers.l4_offset, offset: TCP_CHECKSUM };
        Some((header_len, Offload { checksum, gso: Some(Gso { kind, size, ecn: false }) }))
    }

    /// The payload of every member of `group`, in order.
    pub(super) fn payload<'b>(
        &self,
        group: usize,
        burst: &'b Burst<'_>,
    ) -> impl Iterator<Item = Segment<'b>> {
        let group = self.groups.get(group);
        // All headers are of one length, as all are equal but for counters.
        let header_len = group.map_or(0, |group| u32::from(group.first.header_len));
        let mut place = group.map(|group| group.first_place);
        std::iter::from_fn(move || {
            let member = self.members.get(place?)?;
            place = member.next;
            let frame = burst.frames().get(usize::from(member.index))?;
            Some(Cursor::new(burst, frame).skip(header_len).take(member.payload))
        })
        .flatten()
    }
}

impl Group {
    /// Whether `segment` is the next, and the whole stays within what one frame may hold.
    fn goes_on_with(&self, segment: &TcpSegment) -> bool {
        let ip_header = u32::from(self.first.header_len - self.first.headers.l3_offset);
        segment.sequence == self.last.sequence.wrapping_add(self.last.payload)
            && segment.payload <= self.first.payload
            && ip_header + self.payload + segment.payload <= u32::from(u16::MAX)
            && self.pieces + segment.pieces <= FRAME_SEGMENTS
            && self.counts_on(segment)
    }

    /// Whether the identification goes on as in a large frame that was cut: by one each. Where a packet may not be
    /// fragmented it means nothing (RFC 6864), so there it may stand still as well.
    fn counts_on(&self, segment: &TcpSegment) -> bool {
        let step = segment.id.wrapping_sub(self.last.id);
        let may_stand = segment.dont_fragment || segment.headers.l3 == L3::Ipv6;
        (step == 1 || (step == 0 && may_stand)) && self.id_step.is_none_or(|before| before == step)
    }

    fn add(&mut self, place: usize, segment: TcpSegment) {
        self.id_step = Some(segment.id.wrapping_sub(self.last.id));
        self.count += 1;
        self.payload += segment.payload;
        self.pieces += segment.pieces;
        (self.last_place, self.last) = (place, segment);
    }
}

impl TcpSegment {
    /// Reads a segment that may be merged: nothing but TCP over bare, whole IP, no flag but ACK and PSH, some payload.
    fn read(bytes: &[u8], headers: Headers, offload: Offload) -> Option<Self> {
        let l3 = usize::from(headers.l3_offset);
        let l4 = usize::from(headers.l4_offset);
        let header_len = headers.headers_len()?;
        let (ip_header, id, fragment) = match headers.l3 {
            L3::Ipv4 => (20, get16(bytes, l3 + 4), get16(bytes, l3 + 6)),
            L3::Ipv6 => (40, 0, DONT_FRAGMENT),
            L3::None => return None,
        };
        let [flags] = array(bytes, l4 + TCP_FLAGS);
        let checksum_fits = match offload.checksum {
            Checksum::Partial { start, offset } => start == headers.l4_offset && offset == TCP_CHECKSUM,
            Checksum::Unknown | Checksum::Valid => true,
        };
        let payload = headers.ip_end().checked_sub(u32::from(header_len))?;
        let fits = headers.l4 == L4::Tcp
            && usize::from(header_len) <= bytes.len()
            && l4 - l3 == ip_header
            && headers.ip_intact
            && !headers.fragment
            && flags & !tcp_flag::PSH == tcp_flag::ACK
            && offload.gso.is_none()
            && checksum_fits
            && payload > 0;
        fits.then(|| Self {
            headers,
            header_len,
            payload,
            sequence: get32(bytes, l4 + TCP_SEQUENCE),
            push: flags & tcp_flag::PSH != 0,
            id,
            dont_fragment: fragment & DONT_FRAGMENT != 0,
            pieces: 1,
        })
    }

    /// Whether both checksums are right, as far as nobody vouches for them: IPv4's never is vouched for.
    fn verified(&self, burst: &Burst<'_>, frame: &Frame, header: &Header) -> bool {
        let bytes = header.bytes();
        let l3 = usize::from(self.headers.l3_offset);
        let l4 = usize::from(self.headers.l4_offset);
        if self.headers.l3 == L3::Ipv4 && !checksum::is_valid(checksum::sum(&bytes[l3..l4], 0)) {
            return false;
        }
        if frame.offload.checksum != Checksum::Unknown {
            return true;
        }
        let l4_len = u32::from(self.headers.l4_header_len) + self.payload;
        let pseudo = checksum::combine(pseudo_sum(bytes, &self.headers, PROTOCOL_TCP), l4_len, false);
        let header_sum = checksum::sum(&bytes[l4..usize::from(self.header_len)], pseudo);
        let payload = Cursor::new(burst, frame).skip(u32::from(self.header_len)).take(self.payload);
        checksum::is_valid(checksum::combine(header_sum, payload.sum(), false))
    }
}

/// The headers without the fields that differ from segment to segment: lengths, identification, sequence number, PSH
/// and checksums.
fn uncounted(header: &Header, segment: &TcpSegment) -> ([u8; READ], u16) {
    let mut bytes = [0; READ];
    let count = usize::from(segment.header_len).min(READ).min(header.bytes().len());
    bytes[..count].copy_from_slice(&header.bytes()[..count]);
    let l3 = usize::from(segment.headers.l3_offset);
    let l4 = usize::from(segment.headers.l4_offset);
    match segment.headers.l3 {
        L3::Ipv4 => {
            bytes[l3 + 2..l3 + 6].fill(0);
            bytes[l3 + 10..l3 + 12].fill(0);
        }
        _ => bytes[l3 + 4..l3 + 6].fill(0),
    }
    bytes[l4 + TCP_SEQUENCE..l4 + TCP_SEQUENCE + 4].fill(0);
    bytes[l4 + TCP_FLAGS] &= !tcp_flag::PSH;
    put16(&mut bytes, l4 + usize::from(TCP_CHECKSUM), 0);
    (bytes, segment.header_len)
}

/// Whether a frame of flow `other` may belong to `flow`: a fragment does not show its ports.
fn touches(flow: &Flow, other: &Flow) -> bool {
    match (flow, other) {
        (Flow::V4 { src: s, dst: d, ports: p }, Flow::V4 { src, dst, ports }) => {
            (s, d) == (src, dst) && (ports.is_none() || p == ports)
        }
        (Flow::V6 { src: s, dst: d, ports: p }, Flow::V6 { src, dst, ports }) => {
            (s, d) == (src, dst) && (ports.is_none() || p == ports)
        }
        _ => false,
    }
}
