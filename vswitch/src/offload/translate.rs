//! The translator: frames in the form one receiver takes.
//!
//! New frames are built in a second burst. Their headers are private copies, rewritten; their payload segments point
//! into the sender's memory as before, so the one copy of a frame is still the one into the receiver's buffer. The
//! burst is handed on whenever it is full. What a translation costs is a header of up to 260 bytes a frame, and the
//! reading of the payload where a checksum has to be computed; nothing is allocated.

use vmq::frame::{Accepts, BURST_FRAMES, Burst, Checksum, Frame, FrameStore, HEAD_BYTES, Offload};
use vmq::memory::Segment;

use super::check::{large, partial};
use super::checksum;
use super::coalesce::{Coalescer, Role};
use super::header::{Cursor, HEADER_MAX, Header, SLOT, get16};
use super::segment::Segments;
use super::tag::Retag;
use crate::DropReason;
use crate::parse::{ETHERNET_LEN, L3, MAX_VLAN_TAGS, VLAN_LEN, ethertype};

pub use super::tag::TagForm;

const HEAD_U32: u32 = 64;
const _: () = assert!(HEAD_U32 as usize == HEAD_BYTES);

/// The indices of all frames of a burst.
#[expect(clippy::cast_possible_truncation, reason = "64 indices")]
const ALL: [u8; BURST_FRAMES] = {
    let mut all = [0; BURST_FRAMES];
    let mut at = 0;
    while at < BURST_FRAMES {
        all[at] = at as u8;
        at += 1;
    }
    all
};

/// Who takes frames, such as a receiving queue.
pub trait FrameSink {
    /// Takes the frames of `burst` that `list` names by index, in this order.
    fn put(&mut self, burst: &Burst<'_>, list: &[u8]);
}

impl<F: FnMut(&Burst<'_>, &[u8])> FrameSink for F {
    fn put(&mut self, burst: &Burst<'_>, list: &[u8]) {
        self(burst, list);
    }
}

/// In which form a receiver wants its frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Want {
    /// What may be left undone.
    pub accepts: Accepts,
    /// TCP segments are merged, for each kind of large frame that is accepted.
    pub coalesce: bool,
    /// The longest frame on the wire in bytes, Ethernet header included: MTU + 14. VLAN tags, up to two, come on top.
    pub max_frame: u32,
    /// VLAN tags.
    pub tag: TagForm,
}

impl Want {
    /// Whether `frame` goes to this receiver as it is, alone.
    #[inline]
    fn suits(&self, burst: &Burst<'_>, frame: &Frame) -> bool {
        self.tag.change(frame) == Retag::Keep
            && self.accepts.covers(&frame.offload)
            && (frame.len <= self.max_frame || self.length(burst, frame).is_ok())
    }

    /// The reason to drop `frame`, if it is too long for the wire, or each of its segments is.
    fn length(&self, burst: &Burst<'_>, frame: &Frame) -> Result<(), DropReason> {
        let len = match frame.offload.gso {
            None => frame.len,
            Some(gso) => {
                let mut header = Header::EMPTY;
                header.read(burst, frame, HEADER_MAX);
                let headers = large(&header, frame.offload.checksum, gso)?;
                let header_len = u32::from(headers.headers_len().ok_or(DropReason::BadOffload)?);
                frame.len.min(header_len + u32::from(gso.size))
            }
        };
        if len.saturating_sub(tags_len(frame)) <= self.max_frame {
            Ok(())
        } else {
            Err(DropReason::EgressMtu)
        }
    }

    /// Whether plain TCP segments over `l3` are to be merged.
    fn merges(&self, l3: L3) -> bool {
        let kind = match l3 {
            L3::Ipv4 => Accepts::TCP4,
            L3::Ipv6 => Accepts::TCP6,
            L3::None => return false,
        };
        self.coalesce && self.accepts.contains(Accepts::CHECKSUM | kind)
    }

    /// Whether `list` has two frames that look like TCP segments to be merged.
    fn may_merge(&self, burst: &Burst<'_>, list: &[u8]) -> bool {
        (self.merges(L3::Ipv4) || self.merges(L3::Ipv6))
            && list.iter().filter(|index| frame(burst, **index).is_some_and(looks_like_tcp)).nth(1).is_some()
    }
}

/// Translates frames for receivers. Each worker has one.
#[derive(Debug)]
pub struct Translator {
    store: FrameStore,
    slots: Box<[[u8; SLOT]; BURST_FRAMES]>,
    coalescer: Coalescer,
}

impl Default for Translator {
    fn default() -> Self {
        Self::new()
    }
}

impl Translator {
    /// A translator, with about 45 KiB of scratch space.
    pub fn new() -> Self {
        Self {
            store: FrameStore::default(),
            slots: Box::new([[0; SLOT]; BURST_FRAMES]),
            coalescer: Coalescer::new(),
        }
    }

    /// Whether [`Translator::run`] has anything to do. If not, `list` can be handed over as it is.
    ///
    /// For plain frames to a port without VLANs this reads one field of each frame.
    #[inline]
    pub fn needed(burst: &Burst<'_>, list: &[u8], want: &Want) -> bool {
        let plain = burst.is_plain() && burst.longest() <= want.max_frame;
        let unsuited = if plain {
            list.iter().any(|index| frame(burst, *index).is_some_and(|f| want.tag.change(f) != Retag::Keep))
        } else {
            list.iter().any(|index| frame(burst, *index).is_some_and(|f| !want.suits(burst, f)))
        };
        unsuited || (want.coalesce && want.may_merge(burst, list))
    }

    /// Puts the frames of `burst` that `list` names to `sink`, as `want` says, and calls `dropped` for each that cannot
    /// be, with its index and why: [`DropReason::EgressMtu`], [`DropReason::BadOffload`], [`DropReason::Malformed`] (in too many pieces).
    ///
    /// Each frame is changed in the order tag, length, then merged, cut up or given its checksum. Frames of one flow
    /// keep their order. `sink` is called once per up to a burst of frames.
    pub fn run(
        &mut self,
        burst: &Burst<'_>,
        list: &[u8],
        want: &Want,
        sink: &mut impl FrameSink,
        dropped: &mut impl FnMut(u8, DropReason),
    ) {
        let Self { store, slots, coalescer } = self;
        for list in list.chunks(BURST_FRAMES) {
            if want.coalesce && want.may_merge(burst, list) {
                coalescer.plan(burst, list, |frame, l3| {
                    want.merges(l3) && frame.len.saturating_sub(tags_len(frame)) <= want.max_frame
                });
            } else {
                coalescer.clear();
            }
            let mut job = Job { burst, list, want, coalescer, place: 0, segments: None };
            loop {
                let mut out = Output { burst: Burst::new(store), slots: &mut slots[..] };
                let more = job.fill(&mut out, dropped);
                if let Some(all) = ALL.get(..out.burst.len()).filter(|all| !all.is_empty()) {
                    sink.put(&out.burst, all);
                }
                if !more {
                    break;
                }
            }
        }
    }
}

/// The burst that is being built, and the slots for headers that are still free.
struct Output<'x> {
    burst: Burst<'x>,
    slots: &'x mut [[u8; SLOT]],
}

impl<'x> Output<'x> {
    fn has_room(&self) -> bool {
        self.burst.room() > 0 && !self.slots.is_empty()
    }

    /// A slot to be filled, or `None` if there is none left: [`Output::has_room`] was not asked.
    fn slot(&mut self) -> Option<&'x mut [u8; SLOT]> {
        let (slot, rest) = std::mem::take(&mut self.slots).split_first_mut()?;
        self.slots = rest;
        Some(slot)
    }

    /// Adds a frame made from `from`.
    fn push(
        &mut self,
        header: &'x [u8],
        payload: impl Iterator<Item = Segment<'x>>,
        offload: Offload,
        from: &Frame,
        retag: Retag,
    ) -> Result<(), DropReason> {
        let header = (!header.is_empty()).then(|| Segment::from(header));
        if !self.burst.push_pieces(header.into_iter().chain(payload), offload) {
            return Err(DropReason::Malformed);
        }
        if let Some(frame) = self.burst.frames_mut().last_mut() {
            frame.vlan = from.vlan;
            frame.tagged = retag.tagged(from.tagged);
        }
        Ok(())
    }
}

/// One list on its way, and how far it got.
struct Job<'b, 'm> {
    burst: &'b Burst<'m>,
    list: &'b [u8],
    want: &'b Want,
    coalescer: &'b mut Coalescer,
    place: usize,
    /// The large frame that is being cut up.
    segments: Option<(Segments<'b>, &'b Frame, Retag)>,
}

impl<'b> Job<'b, '_> {
    /// Adds frames to `out` until it is full (true) or nothing is left (false).
    fn fill<'x>(&mut self, out: &mut Output<'x>, dropped: &mut impl FnMut(u8, DropReason)) -> bool
    where
        'b: 'x,
    {
        loop {
            if !out.has_room() {
                return true;
            }
            let step = match self.segments.take() {
                Some(segments) => self.segment(segments, out),
                None => {
                    let Some(index) = self.list.get(self.place) else { return false };
                    self.place += 1;
                    let Some(frame) = frame(self.burst, *index) else { continue };
                    self.start(self.place - 1, frame, out)
                }
            };
            if let Err(reason) = step
                && let Some(&index) = self.place.checked_sub(1).and_then(|place| self.list.get(place))
            {
                dropped(index, reason);
            }
        }
    }

    /// Begins with the frame at `place` of the list.
    fn start<'x>(&mut self, place: usize, frame: &'b Frame, out: &mut Output<'x>) -> Result<(), DropReason>
    where
        'b: 'x,
    {
        let retag = self.want.tag.change(frame);
        match self.coalescer.role(place) {
            Role::Merged => return Ok(()),
            Role::First(group) => return self.merge(group, frame, retag, out),
            Role::Alone => {}
        }
        self.want.length(self.burst, frame)?;
        if self.want.accepts.covers(&frame.offload) {
            return self.pass(frame, retag, out);
        }
        match frame.offload.gso {
            Some(gso) => {
                let complete = !self.want.accepts.contains(Accepts::CHECKSUM);
                let segments = Segments::new(self.burst, frame, gso, retag, complete)?;
                self.segments = Some((segments, frame, retag));
                Ok(())
            }
            None => self.complete(frame, retag, out),
        }
    }

    /// The frame as it is, but for its tag.
    fn pass<'x>(&self, frame: &'b Frame, retag: Retag, out: &mut Output<'x>) -> Result<(), DropReason>
    where
        'b: 'x,
    {
        let whole = Cursor::new(self.burst, frame);
        if retag == Retag::Keep {
            return out.push(&[], whole.all(), frame.offload, frame, retag);
        }
        let offload = retag.offload(frame.offload).ok_or(DropReason::BadOffload)?;
        let mut header = Header::EMPTY;
        header.read(self.burst, frame, HEAD_BYTES);
        header.retag(retag);
        let slot = out.slot().ok_or(DropReason::Malformed)?;
        let header_len = header.copy_to(slot, SLOT);
        out.push(&slot[..header_len], whole.skip(HEAD_U32).all(), offload, frame, retag)
    }

    /// The frame with its checksum done.
    fn complete<'x>(&self, frame: &'b Frame, retag: Retag, out: &mut Output<'x>) -> Result<(), DropReason>
    where
        'b: 'x,
    {
        let mut header = Header::EMPTY;
        header.read(self.burst, frame, HEADER_MAX);
        let field = partial(&header, frame.offload)?;
        // As much as needed, so that the rest stays in one piece: the head, and the checksum.
        let count = header.bytes().len().min(HEAD_BYTES.max(field.at + 2));
        header.truncate(count);
        let rest = Cursor::new(self.burst, frame).skip(u32::try_from(count).unwrap_or(u32::MAX)).all();
        let front = checksum::sum(&header.bytes()[field.start..], 0);
        let sum = checksum::combine(front, rest.clone().sum(), (count - field.start) % 2 == 1);
        let value = if field.udp { checksum::finish_udp(sum) } else { checksum::finish(sum) };
        header.put16(field.at, value);
        header.retag(retag);
        let slot = out.slot().ok_or(DropReason::Malformed)?;
        let header_len = header.copy_to(slot, SLOT);
        let offload = Offload { checksum: Checksum::Valid, gso: None };
        out.push(&slot[..header_len], rest, offload, frame, retag)
    }

    /// The next segment of a large frame, which stays if it is not the last.
    fn segment<'x>(
        &mut self,
        (mut segments, frame, retag): (Segments<'b>, &'b Frame, Retag),
        out: &mut Output<'x>,
    ) -> Result<(), DropReason>
    where
        'b: 'x,
    {
        let slot = out.slot().ok_or(DropReason::Malformed)?;
        let segment = segments.next(slot);
        if !segments.ended() {
            self.segments = Some((segments, frame, retag));
        }
        out.push(&slot[..usize::from(segment.header_len)], segment.payload, segment.offload, frame, retag)
    }

    /// One large frame of a group of segments, of which `frame` is the first.
    fn merge<'x>(
        &mut self,
        group: usize,
        frame: &'b Frame,
        retag: Retag,
        out: &mut Output<'x>,
    ) -> Result<(), DropReason>
    where
        'b: 'x,
    {
        let slot = out.slot().ok_or(DropReason::Malformed)?;
        let (len, offload) = self.coalescer.header(group, retag, slot).ok_or(DropReason::BadOffload)?;
        out.push(&slot[..len], self.coalescer.payload(group, self.burst), offload, frame, retag)
    }
}

#[inline]
fn frame<'b>(burst: &'b Burst<'_>, index: u8) -> Option<&'b Frame> {
    burst.frames().get(usize::from(index))
}

/// Bytes of the frame's VLAN tags, which do not count into the MTU.
fn tags_len(frame: &Frame) -> u32 {
    let head = frame.head();
    let mut tags = 0;
    let tag = |tags: u8| {
        let at = usize::from(ETHERNET_LEN - 2) + usize::from(tags) * usize::from(VLAN_LEN);
        matches!(get16(head, at), ethertype::VLAN | ethertype::SERVICE_VLAN)
    };
    while tags < MAX_VLAN_TAGS && tag(tags) {
        tags += 1;
    }
    u32::from(tags) * u32::from(VLAN_LEN)
}

/// Whether the head shows TCP over bare IP, behind one tag at most.
fn looks_like_tcp(frame: &Frame) -> bool {
    let l3 = if frame.tagged { 18 } else { 14 };
    match get16(&frame.head, l3 - 2) {
        ethertype::IPV4 => frame.head[l3 + 9] == super::segment::PROTOCOL_TCP,
        ethertype::IPV6 => frame.head[l3 + 6] == super::segment::PROTOCOL_TCP,
        _ => false,
    }
}
