//! Frames and bursts: what travels from a queue through the switch to another queue.
//!
//! A [`Frame`] is a private copy of the first 64 bytes (its *head*), metadata, and the memory that holds the rest (its
//! *tail*), still in the sender's buffers. Everything the switch decides is decided on the head, and the receiver gets
//! that very head, so a guest that rewrites its buffer meanwhile gains nothing. Cost: two cache lines of frame per
//! packet in L1, one line of the guest's memory read; a frame of 64 bytes has no tail and is read exactly once.

use arrayvec::ArrayVec;

use crate::memory::Segment;

/// Frames per burst: 128 costs a saturated switch 4 to 8 % less a packet than 64, and its heads still lie in L1.
pub const BURST_FRAMES: usize = 128;

/// Bytes of a frame that are copied privately: Ethernet, one tag, IPv6 and the ports.
pub const HEAD_BYTES: usize = 64;

const HEAD_U32: u32 = 64;
const _: () = assert!(HEAD_BYTES == HEAD_U32 as usize);

/// Tail segments per burst. A burst ends early when a frame might not find room.
pub const BURST_SEGMENTS: usize = 1024;

/// Tail segments per frame; a frame in more pieces is refused. Linux uses up to 19 for 64 KiB.
pub const FRAME_SEGMENTS: usize = 256;

/// The longest frame a burst carries: 64 KiB of IP behind Ethernet and two tags.
pub const MAX_FRAME: u32 = 65_535 + 22;

/// What is known about the transport checksum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Checksum {
    /// It is in the frame, unverified.
    #[default]
    Unknown,
    /// It is in the frame and was verified, or never left a trusted path.
    Valid,
    /// The field holds the pseudo-header's sum only; the rest is to be added from `start` on and stored at
    /// `start + offset`. Both count from the frame's first byte.
    Partial {
        /// First byte that is summed.
        start: u16,
        /// Where the sum goes, from `start`.
        offset: u16,
    },
}

/// What kind of large frame this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GsoKind {
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6.
    Tcp6,
    /// UDP datagrams in a row (`UDP_SEGMENT`), over IPv4 or IPv6.
    Udp,
}

/// A large frame that stands for several on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gso {
    /// Protocol.
    pub kind: GsoKind,
    /// Payload bytes per segment, never 0.
    pub size: u16,
    /// The first segment carries CWR, which must not be repeated in the others (RFC 3168).
    pub ecn: bool,
}

/// Work that the sender left to whoever needs it done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offload {
    /// Transport checksum.
    pub checksum: Checksum,
    /// Segmentation.
    pub gso: Option<Gso>,
}

impl Offload {
    /// Nothing known, nothing left to be done.
    pub const NONE: Self = Self { checksum: Checksum::Unknown, gso: None };

    /// Nothing to be done by anyone.
    #[inline]
    pub fn is_plain(&self) -> bool {
        self.gso.is_none() && !matches!(self.checksum, Checksum::Partial { .. })
    }
}

bitflags::bitflags! {
    /// What a receiver takes without having it done first.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct Accepts: u8 {
        /// Frames with [`Checksum::Partial`].
        const CHECKSUM = 1;
        /// [`GsoKind::Tcp4`].
        const TCP4 = 1 << 1;
        /// [`GsoKind::Tcp6`].
        const TCP6 = 1 << 2;
        /// [`Gso::ecn`].
        const ECN = 1 << 3;
        /// [`GsoKind::Udp`].
        const UDP = 1 << 4;
    }
}

impl Accepts {
    /// True if a frame with `offload` can be handed over as it is.
    #[inline]
    pub fn covers(self, offload: &Offload) -> bool {
        let checksum = !matches!(offload.checksum, Checksum::Partial { .. }) || self.contains(Self::CHECKSUM);
        let gso = match offload.gso {
            None => true,
            Some(gso) => {
                let kind = match gso.kind {
                    GsoKind::Tcp4 => Self::TCP4,
                    GsoKind::Tcp6 => Self::TCP6,
                    GsoKind::Udp => Self::UDP,
                };
                self.contains(kind) && (!gso.ecn || self.contains(Self::ECN))
            }
        };
        checksum && gso
    }
}

/// A frame's head and metadata. Its tail is in the [`Burst`] that holds it.
#[derive(Debug, Clone)]
#[repr(C, align(64))]
pub struct Frame {
    /// The first bytes; valid up to [`Frame::head_len`].
    pub head: [u8; HEAD_BYTES],
    /// Bytes in all, from the destination address on, without check sequence.
    pub len: u32,
    tail_at: u16,
    tail_count: u16,
    /// What the sender left to be done.
    pub offload: Offload,
    /// The VLAN the frame was classified into; 0 is "untagged". Set by the switch.
    pub vlan: u16,
    /// The head carries an 802.1Q tag. Set by the switch.
    pub tagged: bool,
}

impl Frame {
    const EMPTY: Self = Self {
        head: [0; HEAD_BYTES],
        len: 0,
        tail_at: 0,
        tail_count: 0,
        offload: Offload::NONE,
        vlan: 0,
        tagged: false,
    };

    /// Bytes of [`Frame::head`] that belong to the frame.
    #[inline]
    pub fn head_len(&self) -> usize {
        (self.len as usize).min(HEAD_BYTES)
    }

    /// The valid part of the head.
    #[inline]
    pub fn head(&self) -> &[u8] {
        &self.head[..self.head_len()]
    }
}

/// Storage for the frames of one burst, kept by a worker and lent to each [`Burst`] in turn.
#[derive(Debug)]
pub struct FrameStore(Box<[Frame; BURST_FRAMES]>);

impl Default for FrameStore {
    fn default() -> Self {
        Self(Box::new([const { Frame::EMPTY }; BURST_FRAMES]))
    }
}

/// Up to [`BURST_FRAMES`] frames from one queue.
#[derive(Debug)]
pub struct Burst<'m> {
    frames: &'m mut [Frame; BURST_FRAMES],
    count: usize,
    tails: ArrayVec<Segment<'m>, BURST_SEGMENTS>,
    plain: bool,
    longest: u32,
}

impl<'m> Burst<'m> {
    /// An empty burst over `store`.
    #[inline]
    pub fn new(store: &'m mut FrameStore) -> Self {
        Self { frames: &mut store.0, count: 0, tails: ArrayVec::new(), plain: true, longest: 0 }
    }

    /// Frames held.
    #[inline]
    pub fn len(&self) -> usize {
        self.count
    }

    /// True if no frame is held.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Frames that may still be added, each of up to [`FRAME_SEGMENTS`] pieces.
    #[inline]
    pub fn room(&self) -> usize {
        if self.tails.remaining_capacity() < FRAME_SEGMENTS { 0 } else { BURST_FRAMES - self.count }
    }

    /// Tail segments that may still be added.
    #[inline]
    pub fn segment_room(&self) -> usize {
        self.tails.remaining_capacity()
    }

    /// True if no frame needs a checksum or segmentation from anyone.
    #[inline]
    pub fn is_plain(&self) -> bool {
        self.plain
    }

    /// Bytes of the longest frame.
    #[inline]
    pub fn longest(&self) -> u32 {
        self.longest
    }

    /// The frames.
    #[inline]
    pub fn frames(&self) -> &[Frame] {
        &self.frames[..self.count]
    }

    /// The frames, to be changed in place.
    #[inline]
    pub fn frames_mut(&mut self) -> &mut [Frame] {
        &mut self.frames[..self.count]
    }

    /// What follows the head of `frame`, which must be one of this burst's.
    #[inline]
    pub fn tail(&self, frame: &Frame) -> &[Segment<'m>] {
        let at = usize::from(frame.tail_at);
        self.tails.get(at..at + usize::from(frame.tail_count)).unwrap_or(&[])
    }

    /// Adds a frame that lies in one piece. False if there is no room or it is longer than [`MAX_FRAME`].
    #[inline(always)]
    pub fn push(&mut self, whole: Segment<'m>, offload: Offload) -> bool {
        if self.count == BURST_FRAMES || whole.len() > MAX_FRAME {
            return false;
        }
        let tail_at = self.tails.len();
        let frame = &mut self.frames[self.count];
        if whole.read_array(&mut frame.head) {
            if whole.len() as usize > HEAD_BYTES && self.tails.try_push(whole.skip(HEAD_U32)).is_err() {
                return false;
            }
        } else {
            whole.read_into(&mut frame.head);
        }
        self.admit(whole.len(), tail_at, offload);
        true
    }

    /// Adds a frame that lies in several pieces. False as for [`Burst::push`], or if it has too many pieces.
    pub fn push_pieces(&mut self, pieces: impl Iterator<Item = Segment<'m>>, offload: Offload) -> bool {
        if self.room() == 0 {
            return false;
        }
        let tail_at = self.tails.len();
        let frame = &mut self.frames[self.count];
        let (mut filled, mut len) = (0, 0u32);
        for piece in pieces {
            let copied = piece.read_into(&mut frame.head[filled..]);
            filled += copied;
            len = len.saturating_add(piece.len());
            let rest = piece.skip(u32::try_from(copied).unwrap_or(u32::MAX));
            let full = self.tails.len() - tail_at == FRAME_SEGMENTS;
            if len > MAX_FRAME || (!rest.is_empty() && (full || self.tails.try_push(rest).is_err())) {
                self.tails.truncate(tail_at);
                return false;
            }
        }
        self.admit(len, tail_at, offload);
        true
    }

    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "both are at most BURST_SEGMENTS")]
    fn admit(&mut self, len: u32, tail_at: usize, offload: Offload) {
        let tail_count = self.tails.len() - tail_at;
        let frame = &mut self.frames[self.count];
        frame.len = len;
        (frame.tail_at, frame.tail_count) = (tail_at as u16, tail_count as u16);
        frame.offload = offload;
        self.plain &= offload.is_plain();
        self.longest = self.longest.max(len);
        self.count += 1;
    }

    /// Forgets all frames.
    pub fn clear(&mut self) {
        self.count = 0;
        self.tails.clear();
        (self.plain, self.longest) = (true, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(len: usize) -> Vec<u8> {
        (0..len).map(|i| u8::try_from(i % 251).unwrap()).collect()
    }

    fn flatten(burst: &Burst<'_>, frame: &Frame) -> Vec<u8> {
        let mut all = frame.head().to_vec();
        for segment in burst.tail(frame) {
            let mut piece = vec![0; segment.len() as usize];
            segment.read_into(&mut piece);
            all.extend(piece);
        }
        all
    }

    #[test]
    fn frame_in_any_split_reads_back_whole() {
        for len in [0usize, 1, 13, 14, 63, 64, 65, 128, 1518] {
            let data = bytes(len);
            for cut in 0..=len.min(130) {
                let mut store = FrameStore::default();
                let mut burst = Burst::new(&mut store);
                let (a, b) = data.split_at(cut);
                assert!(burst.push_pieces([a.into(), b.into()].into_iter(), Offload::default()));
                assert_eq!(flatten(&burst, &burst.frames()[0]), data);
            }
            let mut store = FrameStore::default();
            let mut burst = Burst::new(&mut store);
            assert!(burst.push(data.as_slice().into(), Offload::default()));
            assert_eq!(flatten(&burst, &burst.frames()[0]), data);
        }
    }

    #[test]
    fn frame_in_too_many_pieces_is_refused_and_leaves_no_trace() {
        let data = bytes(64 + FRAME_SEGMENTS + 1);
        let mut store = FrameStore::default();
        let mut burst = Burst::new(&mut store);
        assert!(!burst.push_pieces(data.chunks(1).map(Segment::from), Offload::default()));
        assert!(burst.is_empty());
        assert!(burst.push(data.as_slice().into(), Offload::default()));
        assert_eq!(flatten(&burst, &burst.frames()[0]), data);
    }

    #[test]
    fn frame_longer_than_the_limit_is_refused() {
        let data = bytes(MAX_FRAME as usize + 1);
        let mut store = FrameStore::default();
        let mut burst = Burst::new(&mut store);
        assert!(!burst.push(data.as_slice().into(), Offload::default()));
        assert!(!burst.push_pieces(data.chunks(4096).map(Segment::from), Offload::default()));
        assert!(burst.push(data[1..].into(), Offload::default()));
    }
}
