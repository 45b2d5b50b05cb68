//! Whether a frame's offload metadata fits the frame.
//!
//! The metadata is the sender's word. Checked once where a frame comes in, nobody behind has to doubt it: not the
//! translator, and not a receiver, to whom the same words are passed on. The rules are those that Linux applies to a
//! virtio-net header (include/linux/virtio_net.h) and in its segmentation functions.

use vmq::frame::{Burst, Checksum, Frame, Gso, GsoKind, Offload};

use super::header::{HEADER_MAX, Header};
use crate::DropReason;
use crate::parse::{ETHERNET_LEN, Headers, L3, L4};

/// The most segments one large frame may stand for: 64 KiB in segments of 48 bytes, Linux' least MSS
/// (`tcp_min_snd_mss`). Without a limit one frame with a segment size of 1 would cost the switch 65 000.
pub const MAX_SEGMENTS: u32 = 1366;

/// Checks the offload of a frame that is not plain; a plain one passes.
///
/// # Errors
/// [`DropReason::BadOffload`] if the checksum lies outside the frame, before the network header or beyond the first
/// [`HEADER_MAX`] bytes; or if segmentation is asked for what is not a complete, unfragmented TCP or UDP packet of the
/// kind named, without its checksum being left to be done, or into more than [`MAX_SEGMENTS`].
pub fn check(burst: &Burst<'_>, frame: &Frame) -> Result<(), DropReason> {
    if frame.offload.is_plain() {
        return Ok(());
    }
    let mut header = Header::EMPTY;
    header.read(burst, frame, HEADER_MAX);
    match frame.offload.gso {
        Some(gso) => large(&header, frame.offload.checksum, gso).map(|_| ()),
        None => partial(&header, frame.offload).map(|_| ()),
    }
}

/// Where the checksum of a frame without segmentation is left to be done.
pub(super) fn partial(header: &Header, offload: Offload) -> Result<Field, DropReason> {
    let Checksum::Partial { start, offset } = offload.checksum else { return Err(DropReason::BadOffload) };
    let field = Field {
        start: usize::from(start),
        at: usize::from(start) + usize::from(offset),
        udp: offset == UDP_CHECKSUM,
    };
    let network = usize::from(header.parse().l3_offset.max(ETHERNET_LEN));
    if field.start < network || field.at + 2 > header.bytes().len() {
        return Err(DropReason::BadOffload);
    }
    Ok(field)
}

/// Where a checksum is left to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Field {
    /// First byte that is summed.
    pub(super) start: usize,
    /// Where the sum goes.
    pub(super) at: usize,
    /// By its place it is UDP's, where 0 means "none".
    pub(super) udp: bool,
}

/// Offset of the checksum in the TCP header.
pub(super) const TCP_CHECKSUM: u16 = 16;
/// Offset of the checksum in the UDP header.
pub(super) const UDP_CHECKSUM: u16 = 6;

/// The headers of a large frame that is fit to be segmented. Their transport header is in `header` completely.
pub(super) fn large(header: &Header, checksum: Checksum, gso: Gso) -> Result<Headers, DropReason> {
    let headers = header.parse();
    let (kind_fits, field) = match gso.kind {
        GsoKind::Tcp4 => (headers.l3 == L3::Ipv4 && headers.l4 == L4::Tcp, TCP_CHECKSUM),
        GsoKind::Tcp6 => (headers.l3 == L3::Ipv6 && headers.l4 == L4::Tcp, TCP_CHECKSUM),
        GsoKind::Udp => (headers.l3 != L3::None && headers.l4 == L4::Udp && !gso.ecn, UDP_CHECKSUM),
    };
    let checksum_fits = match checksum {
        Checksum::Partial { start, offset } => start == headers.l4_offset && offset == field,
        Checksum::Unknown | Checksum::Valid => false,
    };
    let Some(header_len) = headers.headers_len().filter(|len| usize::from(*len) <= header.bytes().len())
    else {
        return Err(DropReason::BadOffload);
    };
    let payload = header.frame_len().saturating_sub(u32::from(header_len));
    let segment = payload.min(u32::from(gso.size));
    let ip_len = u32::from(header_len - headers.l3_offset) + segment;
    let size_fits = gso.size != 0
        && payload.div_ceil(u32::from(gso.size)) <= MAX_SEGMENTS
        && ip_len <= u32::from(u16::MAX);
    if kind_fits && checksum_fits && size_fits && !headers.fragment {
        Ok(headers)
    } else {
        Err(DropReason::BadOffload)
    }
}

#[cfg(test)]
mod tests {
    use vmq::frame::FrameStore;

    use super::super::testing::{Builder, Transport};
    use super::*;

    fn checked(bytes: &[u8], offload: Offload) -> Result<(), DropReason> {
        let mut store = FrameStore::default();
        let mut burst = Burst::new(&mut store);
        assert!(burst.push(bytes.into(), offload));
        check(&burst, &burst.frames()[0])
    }

    fn partial_at(start: u16, offset: u16) -> Offload {
        Offload { checksum: Checksum::Partial { start, offset }, gso: None }
    }

    #[test]
    fn checksum_outside_the_frame_is_refused() {
        let bytes = [0; 100];
        for start in 0..=u16::MAX {
            for offset in [0, 1, 6, 16, 64, 83, 84, 85, 98, 99, 1000, 65_534, u16::MAX] {
                let fits = start >= 14 && u32::from(start) + u32::from(offset) + 2 <= 100;
                assert_eq!(checked(&bytes, partial_at(start, offset)).is_ok(), fits, "{start} + {offset}");
            }
        }
    }

    #[test]
    fn checksum_beyond_the_header_limit_is_refused() {
        assert_eq!(checked(&[0; 300], partial_at(14, 240)), Ok(()));
        assert_eq!(checked(&[0; 300], partial_at(14, 241)), Err(DropReason::BadOffload));
    }

    #[test]
    fn checksum_that_covers_a_tag_is_refused() {
        let frame = Builder { tag: Some(5), ..Builder::new(false, Transport::Udp) }.build(10);
        assert_eq!(checked(&frame, partial_at(17, 6)), Err(DropReason::BadOffload));
        assert_eq!(checked(&frame, partial_at(18, 6)), Ok(()));
    }

    #[test]
    fn plain_frame_passes_whatever_it_holds() {
        assert_eq!(checked(&[], Offload::default()), Ok(()));
        assert_eq!(checked(&[9; 13], Offload { checksum: Checksum::Valid, gso: None }), Ok(()));
    }

    #[test]
    fn large_frame_of_each_kind_passes_and_of_any_other_is_refused() {
        let kinds = [GsoKind::Tcp4, GsoKind::Tcp6, GsoKind::Udp];
        for (v6, transport, right) in [
            (false, Transport::Tcp, vec![GsoKind::Tcp4]),
            (true, Transport::Tcp, vec![GsoKind::Tcp6]),
            (false, Transport::Udp, vec![GsoKind::Udp]),
            (true, Transport::Udp, vec![GsoKind::Udp]),
        ] {
            for tag in [None, Some(9)] {
                let builder = Builder { tag, ..Builder::new(v6, transport) };
                let frame = builder.build(4000);
                for kind in kinds {
                    let offload = builder.large(kind, 1000, false);
                    assert_eq!(
                        checked(&frame, offload).is_ok(),
                        right.contains(&kind),
                        "{builder:?} {kind:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn large_frame_with_nonsense_is_refused() {
        let builder = Builder::new(false, Transport::Tcp);
        let frame = builder.build(4000);
        let good = builder.large(GsoKind::Tcp4, 1000, true);
        let gso = good.gso.unwrap();
        let refused =
            |bytes: &[u8], offload| assert_eq!(checked(bytes, offload), Err(DropReason::BadOffload));
        assert_eq!(checked(&frame, good), Ok(()));
        refused(&frame, Offload { gso: Some(Gso { size: 0, ..gso }), ..good });
        refused(&frame, Offload { gso: Some(Gso { size: 2, ..gso }), ..good });
        refused(&frame, Offload { checksum: Checksum::Unknown, ..good });
        refused(&frame, Offload { checksum: Checksum::Valid, ..good });
        refused(&frame, Offload { checksum: Checksum::Partial { start: 34, offset: 6 }, ..good });
        refused(&frame, Offload { checksum: Checksum::Partial { start: 33, offset: 16 }, ..good });
        for len in 0..54 {
            refused(&frame[..len], good);
        }
        let mut fragment = frame.clone();
        fragment[20] |= 0x20;
        refused(&fragment, good);
        let mut short_tcp = frame.clone();
        short_tcp[46] = 0x40;
        refused(&short_tcp, good);
        let udp = Builder::new(true, Transport::Udp);
        refused(&udp.build(4000), udp.large(GsoKind::Udp, 1000, true));
    }

    #[test]
    fn large_frame_whose_ip_length_is_zero_passes() {
        let builder = Builder::new(false, Transport::Tcp);
        let mut frame = builder.build(60_000);
        frame[16..18].fill(0);
        frame[24..26].fill(0);
        assert_eq!(checked(&frame, builder.large(GsoKind::Tcp4, 1448, false)), Ok(()));
    }

    #[test]
    fn segment_longer_than_an_ip_packet_is_refused() {
        let builder = Builder::new(false, Transport::Tcp);
        let frame = builder.build(65_535 + 22 - 54);
        assert_eq!(checked(&frame, builder.large(GsoKind::Tcp4, 65_495, false)), Ok(()));
        let too_large = builder.large(GsoKind::Tcp4, 65_496, false);
        assert_eq!(checked(&frame, too_large), Err(DropReason::BadOffload));
    }
}
