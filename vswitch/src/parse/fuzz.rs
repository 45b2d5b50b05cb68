//! Body of the fuzz target for the header parser and the offload check, and of its replayed corpus.
//!
//! An input is [`Metadata`] (a short one counts as zeroes), then a frame.

use vmq::frame::{Burst, Checksum, FrameStore, Gso, GsoKind, Offload};
use vmq::memory::Segment;
use vmq::rss::Flow;

use super::{Headers, L3, L4};
use crate::offload;

/// Runs one input.
///
/// # Panics
/// If the parser or the check breaks a promise.
pub fn fuzz(data: &[u8]) {
    let (metadata, frame) = data.split_first_chunk().unwrap_or((&[0; Metadata::LEN], data));
    let metadata = Metadata::read(metadata);
    parse(frame, metadata.frame_len.unwrap_or(frame.len()));
    check(frame, &metadata);
}

/// What comes along with a frame.
struct Metadata {
    /// Bytes of the frame that the parser is told, if not those at hand.
    frame_len: Option<usize>,
    /// Bytes of a piece when the frame is cut up.
    piece: usize,
    offload: Offload,
}

impl Metadata {
    const LEN: usize = 12;

    /// Flags (1: a length; 6: checksum; 24: segmentation; 32: ECN), bytes of a piece less one, the length, where the
    /// checksum starts and goes, and the segment's size, all little-endian.
    fn read(
        &[flags, piece, a, b, c, d, start, start2, offset, offset2, size, size2]: &[u8; Self::LEN],
    ) -> Self {
        let start = u16::from_le_bytes([start, start2]);
        let offset = u16::from_le_bytes([offset, offset2]);
        let checksum = match flags >> 1 & 3 {
            0 => Checksum::Unknown,
            1 => Checksum::Valid,
            _ => Checksum::Partial { start, offset },
        };
        let kind = match flags >> 3 & 3 {
            0 => None,
            1 => Some(GsoKind::Tcp4),
            2 => Some(GsoKind::Tcp6),
            _ => Some(GsoKind::Udp),
        };
        let gso =
            kind.map(|kind| Gso { kind, size: u16::from_le_bytes([size, size2]), ecn: flags & 32 != 0 });
        let len = usize::try_from(u32::from_le_bytes([a, b, c, d])).unwrap_or(usize::MAX);
        Self {
            frame_len: (flags & 1 != 0).then_some(len),
            piece: usize::from(piece) + 1,
            offload: Offload { checksum, gso },
        }
    }
}

fn parse(bytes: &[u8], frame_len: usize) {
    let headers = Headers::parse(bytes, frame_len);
    let shown = bytes.get(..frame_len).unwrap_or(bytes);
    assert_eq!(headers, Headers::parse(shown, frame_len), "bytes beyond the frame were read");
    let _ = headers.vlan_tci(bytes);

    let l3_end = usize::from(headers.l3_offset)
        + match headers.l3 {
            L3::None => 0,
            L3::Ipv4 => 20,
            L3::Ipv6 => 40,
        };
    assert!(l3_end <= shown.len(), "a network header beyond the bytes");
    assert!(headers.ip_end() as usize <= frame_len.max(l3_end), "an IP packet beyond the frame");
    if headers.l4_offset != 0 {
        assert!(headers.l3 != L3::None && usize::from(headers.l4_offset) >= l3_end, "headers overlap");
    }
    if let Some(end) = headers.headers_len() {
        let visible = if headers.l4 == L4::Tcp { 20 } else { 8 };
        assert!(usize::from(headers.l4_offset) + visible <= shown.len(), "an invisible transport header");
        assert!(u32::from(end) <= headers.ip_end(), "a transport header beyond its packet");
    }
    flow(&headers, bytes);
}

/// The flow has the addresses' family, and the ports, if any, are those at the transport header.
fn flow(headers: &Headers, bytes: &[u8]) {
    let ports = headers.ports(bytes);
    match (headers.l3, headers.flow(bytes)) {
        (L3::None, Flow::Other) => assert!(ports.is_none(), "ports without a network header"),
        (L3::Ipv4, Flow::V4 { ports: in_flow, .. }) | (L3::Ipv6, Flow::V6 { ports: in_flow, .. }) => {
            assert_eq!(in_flow, ports);
        }
        (l3, flow) => panic!("{flow:?} of {l3:?}"),
    }
    if let Some(ports) = ports {
        assert!(!headers.fragment, "ports of a fragment");
        let at = usize::from(headers.l4_offset);
        assert_eq!(bytes[at..at + 4], [ports.src.to_be_bytes(), ports.dst.to_be_bytes()].concat());
    }
}

/// A frame's offload is judged alike however the frame is cut up, and never points outside the frame.
fn check(frame: &[u8], metadata: &Metadata) {
    let offload = metadata.offload;
    let (mut store, mut cut_store) = (FrameStore::default(), FrameStore::default());
    let (mut whole, mut cut) = (Burst::new(&mut store), Burst::new(&mut cut_store));
    if !whole.push(frame.into(), offload) {
        return;
    }
    let verdict = offload::check(&whole, &whole.frames()[0]);
    if cut.push_pieces(frame.chunks(metadata.piece).map(Segment::from), offload) {
        assert_eq!(verdict, offload::check(&cut, &cut.frames()[0]), "the verdict depends on the pieces");
    }
    if verdict.is_err() {
        return;
    }
    if let Checksum::Partial { start, offset } = offload.checksum {
        assert!(usize::from(start) + usize::from(offset) + 2 <= frame.len(), "a checksum outside the frame");
    }
    if let Some(gso) = offload.gso {
        assert!(gso.size != 0, "segments of nothing");
        assert!(matches!(offload.checksum, Checksum::Partial { .. }), "segments without checksums");
    }
}
