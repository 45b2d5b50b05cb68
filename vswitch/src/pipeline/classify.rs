//! The first stage: what a port lets in, in which VLAN, and which frames are one flow.

use std::ops::Range;

use arrayvec::ArrayVec;
use vmq::frame::{BURST_FRAMES, Burst, Frame};

use super::plan::{Plan, Way};
use crate::drops::DropReason;
use crate::fdb::{Fdb, Key, Slot};
use crate::offload;
use crate::parse::ethertype::VLAN;
use crate::tally::Tally;
use crate::topology::{ETHERNET, Rules, TAG, VlanRule, is_member};

/// Frames in a row with the same addresses in the same VLAN. Traffic comes in runs, so a burst has few.
pub(super) struct Flow {
    pub source: (Key, Slot),
    pub destination: (Key, Slot),
    /// Its frames in the burst.
    pub frames: Range<u8>,
    /// The head carries a tag: such a frame shares its flow with no other, as what follows the tag matters too.
    pub tagged: bool,
}

/// The flows of a burst, in order. Frames between them were refused.
pub(super) type Flows = ArrayVec<Flow, BURST_FRAMES>;

/// One bit for each frame of a burst.
type Set = u128;
const _: () = assert!(BURST_FRAMES <= Set::BITS as usize);

/// The frames whose offload metadata contradicts the frame.
#[cold]
fn unfit_offloads(burst: &Burst<'_>) -> Set {
    let unfit = |frame: &Frame| !frame.offload.is_plain() && offload::check::check(burst, frame).is_err();
    burst.frames().iter().enumerate().filter(|(_, frame)| unfit(frame)).fold(0, |bits, (i, _)| bits | 1 << i)
}

/// Finds the flows of `burst`, frames of a port of `rules`, sets their VLANs, and starts to fetch their entries of the table.
#[inline(never)]
pub(super) fn classify(
    fdb: &Fdb,
    rules: &Rules,
    burst: &mut Burst<'_>,
    flows: &mut Flows,
    plan: &mut Plan,
    tally: &mut Tally,
) {
    let unfit = if burst.is_plain() { 0 } else { unfit_offloads(burst) };
    let gate = Gate::new(rules);
    let mut index = 0;
    let mut rest = burst.frames_mut();
    while let [frame, others @ ..] = rest {
        let header = Header::of(frame);
        let followers = match gate.admit(header, frame) {
            Ok(_) if unfit != 0 && unfit >> index & 1 != 0 => {
                plan.refuse(index, DropReason::BadOffload, tally);
                0
            }
            Ok(vlan) => {
                (frame.vlan, frame.tagged) = (vlan, header.is_tagged());
                let alone = frame.tagged || unfit != 0;
                let followers = if alone { 0 } else { gate.follow(header, vlan, others) };
                // There is room: a flow at most for each frame of the burst.
                let frames = index..index + 1 + followers;
                let _ = flows.try_push(Flow::new(fdb, header, vlan, frames));
                followers
            }
            Err(reason) => {
                plan.refuse(index, reason, tally);
                0
            }
        };
        index += 1 + followers;
        rest = &mut others[usize::from(followers)..];
    }
}

impl Flow {
    #[inline]
    fn new(fdb: &Fdb, header: Header, vlan: u16, frames: Range<u8>) -> Self {
        let fetch = |key| {
            let slot = fdb.hash(key);
            fdb.prefetch(slot);
            (key, slot)
        };
        let (source, destination) = (fetch(header.source(vlan)), fetch(header.destination(vlan)));
        Self { source, destination, frames, tagged: header.is_tagged() }
    }

    /// Where the destination is, if that is known.
    #[inline]
    pub fn way(&self, fdb: &Fdb) -> Option<Way> {
        let (key, slot) = self.destination;
        let port = if key.is_group() { None } else { fdb.lookup(key, slot) };
        port.map(|port| Way { port, vlan: key.vlan() })
    }
}

/// Destination, source and type as they lie in the frame: the first eight bytes, and the next six above two of zero.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Header(u64, u64);

impl Header {
    #[inline]
    fn of(frame: &Frame) -> Self {
        let [first, second, ..] = *frame.head.as_chunks().0 else { return Self(0, 0) };
        Self(u64::from_le_bytes(first), u64::from_le_bytes(second) << 16)
    }

    #[inline]
    fn destination(self, vlan: u16) -> Key {
        Key::from_wire(self.0, vlan)
    }

    #[inline]
    fn source(self, vlan: u16) -> Key {
        Key::from_wire(self.0 >> 48 | self.1, vlan)
    }

    #[inline]
    fn is_tagged(self) -> bool {
        self.1 >> 48 == u64::from(VLAN.to_be())
    }
}

/// What a port lets in.
struct Gate<'a> {
    vlan: &'a VlanRule,
    /// Bytes of the longest untagged frame.
    longest: u32,
    /// The only source allowed, if there is one.
    source: Option<Key>,
}

impl<'a> Gate<'a> {
    fn new(rules: &'a Rules) -> Self {
        let source = rules.source.map(|source| Key::new(source, 0));
        Self { vlan: &rules.vlan, longest: rules.longest_frame(), source }
    }

    /// Checks the shape and source of `frame`, which begins with `header`, and finds its VLAN.
    #[inline]
    fn admit(&self, header: Header, frame: &Frame) -> Result<u16, DropReason> {
        let tagged = header.is_tagged();
        // Padded by whoever receives it, the rest of a tag would be zeros or worse.
        if frame.len < ETHERNET || tagged && frame.len < ETHERNET + TAG {
            return Err(DropReason::Runt);
        }
        let tag = if tagged { u16::from_be_bytes([frame.head[14], frame.head[15]]) & 0xfff } else { 0 };
        let vlan = match self.vlan {
            VlanRule::Passthrough => tag,
            other => vlan_of(other, tag)?,
        };
        if !self.fits(frame, if tagged { TAG } else { 0 }) {
            return Err(DropReason::IngressMtu);
        }
        let source = header.source(0);
        if source.is_group() {
            return Err(DropReason::SourceGroup);
        }
        match self.source {
            Some(allowed) if allowed != source => Err(DropReason::Spoofed),
            _ => Ok(vlan),
        }
    }

    /// Classifies the first of `frames` that follow one of `header` and `vlan`, untagged, in the same flow, and counts them.
    #[inline]
    fn follow(&self, header: Header, vlan: u16, frames: &mut [Frame]) -> u8 {
        let goes_on =
            |frame: &Frame| Header::of(frame) == header && frame.len >= ETHERNET && self.fits(frame, 0);
        let mut followers = 0;
        for frame in frames {
            if !goes_on(frame) {
                break;
            }
            (frame.vlan, frame.tagged) = (vlan, false);
            followers += 1;
        }
        followers
    }

    /// True if `frame` with `tag` bytes of tags is not too long, or will be cut up.
    #[inline]
    fn fits(&self, frame: &Frame, tag: u32) -> bool {
        frame.len <= self.longest + tag || frame.offload.gso.is_some()
    }
}

/// The VLAN of a frame with `tag` (0: untagged or priority-tagged) on an access or trunk port.
fn vlan_of(rule: &VlanRule, tag: u16) -> Result<u16, DropReason> {
    match rule {
        VlanRule::Passthrough => Ok(tag),
        VlanRule::Access(own) if tag == 0 => Ok(*own),
        VlanRule::Access(_) => Err(DropReason::VlanRefused),
        VlanRule::Trunk { native, .. } if tag == 0 => native.ok_or(DropReason::Untagged),
        VlanRule::Trunk { members, .. } if is_member(members, tag) => Ok(tag),
        VlanRule::Trunk { .. } => Err(DropReason::VlanRefused),
    }
}
