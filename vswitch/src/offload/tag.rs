//! The VLAN tag a frame leaves with: what a port wants, and what has to be done to a frame for it.

use vmq::frame::{Checksum, Frame, Offload};

use super::header::get16;
use crate::parse::{ETHERNET_LEN, Headers, VLAN_LEN, ethertype};

/// Where the 802.1Q tag is: behind both addresses.
pub(super) const TAG_AT: usize = 12;
/// Bytes of the tag.
pub(super) const TAG_LEN: usize = VLAN_LEN as usize;

/// Priority and drop eligibility, in the tag's control information.
const PRIORITY: u16 = 0xf000;
const VLAN_ID: u16 = 0x0fff;

/// How a port wants its frames tagged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TagForm {
    /// With the tag of the frame's VLAN; a frame without VLAN leaves as it came, priority tag included.
    #[default]
    AsIs,
    /// Without 802.1Q tag.
    Access,
    /// With the tag of the frame's VLAN, but frames of VLAN `native` (and of none) without.
    Trunk {
        /// The VLAN without tag; 0 if there is none.
        native: u16,
    },
}

impl TagForm {
    /// What has to be done to `frame`. Its priority bits are kept where it has some, and 0 in a new tag.
    #[inline]
    pub(super) fn change(self, frame: &Frame) -> Retag {
        let wanted = match self {
            Self::AsIs if frame.vlan == 0 => return Retag::Keep,
            Self::AsIs => frame.vlan & VLAN_ID,
            Self::Access => 0,
            Self::Trunk { native } if frame.vlan == native => 0,
            Self::Trunk { .. } => frame.vlan & VLAN_ID,
        };
        if wanted == 0 && !frame.tagged {
            return Retag::Keep;
        }
        Retag::to(frame, wanted)
    }
}

/// What is done to a frame's outer 802.1Q tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Retag {
    /// Nothing.
    Keep,
    /// It is taken away.
    Strip,
    /// A tag with this control information is put in.
    Push(u16),
    /// Its control information is replaced.
    Set(u16),
}

impl Retag {
    /// What gives `frame` the tag of `vlan`, or none if 0. The frame's own bytes decide whether it has a tag.
    fn to(frame: &Frame, vlan: u16) -> Self {
        let head = frame.head();
        let tagged =
            head.len() >= usize::from(ETHERNET_LEN) + TAG_LEN && get16(head, TAG_AT) == ethertype::VLAN;
        let control = get16(head, TAG_AT + 2);
        match (tagged, vlan) {
            (false, 0) => Self::Keep,
            (true, 0) => Self::Strip,
            (false, _) if head.len() < usize::from(ETHERNET_LEN) => Self::Keep,
            (false, vlan) => Self::Push(vlan),
            (true, vlan) if control & VLAN_ID == vlan => Self::Keep,
            (true, vlan) => Self::Set(control & PRIORITY | vlan),
        }
    }

    /// Whether the frame has an 802.1Q tag outermost afterwards, if it had one before.
    pub(super) fn tagged(self, before: bool) -> bool {
        match self {
            Self::Keep => before,
            Self::Strip => false,
            Self::Push(_) | Self::Set(_) => true,
        }
    }

    /// Where a byte behind the tag is afterwards, or how long the frame is.
    pub(super) fn moved(self, before: u16) -> Option<u16> {
        match self {
            Self::Keep | Self::Set(_) => Some(before),
            Self::Strip => before.checked_sub(VLAN_LEN).filter(|after| *after >= ETHERNET_LEN),
            Self::Push(_) => before.checked_add(VLAN_LEN),
        }
    }

    /// The headers afterwards, or `None` if they lie in the tag.
    pub(super) fn headers(self, before: Headers) -> Option<Headers> {
        let (l3_offset, l4_offset) = (self.moved(before.l3_offset)?, self.moved(before.l4_offset)?);
        Some(Headers { l3_offset, l4_offset, ..before })
    }

    /// The offload of the frame afterwards, or `None` if it sums over the tag.
    pub(super) fn offload(self, before: Offload) -> Option<Offload> {
        let Checksum::Partial { start, offset } = before.checksum else { return Some(before) };
        Some(Offload { checksum: Checksum::Partial { start: self.moved(start)?, offset }, ..before })
    }
}

#[cfg(test)]
mod tests {
    use vmq::frame::{Burst, FrameStore};

    use super::*;

    /// The change for a frame of classified VLAN `vlan` that came with `tag`.
    fn change(form: TagForm, vlan: u16, tag: Option<u16>) -> Retag {
        let mut bytes = vec![2; 12];
        if let Some(tag) = tag {
            bytes.extend([0x81, 0]);
            bytes.extend(tag.to_be_bytes());
        }
        bytes.extend([8, 0, 0x45, 0, 0, 0]);
        let mut store = FrameStore::default();
        let mut burst = Burst::new(&mut store);
        assert!(burst.push(bytes.as_slice().into(), Offload::default()));
        let frame = &mut burst.frames_mut()[0];
        (frame.vlan, frame.tagged) = (vlan, tag.is_some());
        form.change(frame)
    }

    #[test]
    fn access_port_gets_no_tag() {
        assert_eq!(change(TagForm::Access, 0, None), Retag::Keep);
        assert_eq!(change(TagForm::Access, 7, None), Retag::Keep);
        assert_eq!(change(TagForm::Access, 7, Some(7)), Retag::Strip);
        assert_eq!(change(TagForm::Access, 0, Some(0xe000)), Retag::Strip);
    }

    #[test]
    fn trunk_gets_all_tags_but_the_native_one() {
        let trunk = TagForm::Trunk { native: 5 };
        assert_eq!(change(trunk, 5, Some(5)), Retag::Strip);
        assert_eq!(change(trunk, 5, None), Retag::Keep);
        assert_eq!(change(trunk, 6, None), Retag::Push(6));
        assert_eq!(change(trunk, 6, Some(0x6006)), Retag::Keep);
        assert_eq!(change(trunk, 6, Some(0x6000)), Retag::Set(0x6006));
        assert_eq!(change(TagForm::Trunk { native: 0 }, 6, None), Retag::Push(6));
        assert_eq!(change(TagForm::Trunk { native: 0 }, 0, None), Retag::Keep);
    }

    #[test]
    fn frame_without_vlan_passes_as_it_came() {
        assert_eq!(change(TagForm::AsIs, 0, None), Retag::Keep);
        assert_eq!(change(TagForm::AsIs, 0, Some(0xa000)), Retag::Keep);
        assert_eq!(change(TagForm::AsIs, 9, None), Retag::Push(9));
        assert_eq!(change(TagForm::AsIs, 9, Some(9)), Retag::Keep);
    }

    #[test]
    fn checksum_start_moves_with_the_tag_and_never_into_it() {
        let partial = |start| Offload { checksum: Checksum::Partial { start, offset: 6 }, gso: None };
        assert_eq!(Retag::Push(1).offload(partial(34)), Some(partial(38)));
        assert_eq!(Retag::Strip.offload(partial(38)), Some(partial(34)));
        assert_eq!(Retag::Set(1).offload(partial(38)), Some(partial(38)));
        assert_eq!(Retag::Strip.offload(partial(17)), None);
        assert_eq!(Retag::Push(1).offload(partial(u16::MAX)), None);
    }
}
