//! The virtio-net header that precedes each frame on vhost-user rings, TAP devices and packet sockets.
//!
//! Source: VIRTIO 1.2, 5.1.6 (`struct virtio_net_hdr`); little-endian, as all of virtio 1.x.

use vmq::frame::{Accepts, Checksum, Gso, GsoKind, Offload};

/// Bytes with `num_buffers`: virtio 1.x, or mergeable receive buffers.
pub const FULL: usize = 12;

/// Bytes without: legacy devices.
pub const SHORT: usize = 10;

const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;

const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;

/// The header asks for something unknown or not negotiated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("virtio-net header with flags {flags:#x} and segmentation type {gso_type:#x} was not negotiated")]
pub struct BadHeader {
    flags: u8,
    gso_type: u8,
}

/// Reads the header of a frame that a sender allowed to use `offered` wrote.
///
/// # Errors
/// [`BadHeader`] for an unknown type, or one that was not offered.
#[inline]
pub fn parse(header: [u8; SHORT], offered: Accepts) -> Result<Offload, BadHeader> {
    // Nearly all small frames: nothing asked.
    if header[0] | header[1] == 0 {
        return Ok(Offload::default());
    }
    parse_offload(header, offered)
}

fn parse_offload(header: [u8; SHORT], offered: Accepts) -> Result<Offload, BadHeader> {
    let [flags, gso_type, ..] = header;
    let bad = BadHeader { flags, gso_type };
    let field = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    let checksum = if flags & NEEDS_CSUM != 0 {
        Checksum::Partial { start: field(6), offset: field(8) }
    } else if flags & DATA_VALID != 0 {
        Checksum::Valid
    } else {
        Checksum::Unknown
    };
    let kind = match gso_type & !GSO_ECN {
        0 if gso_type == 0 => None,
        GSO_TCPV4 => Some(GsoKind::Tcp4),
        GSO_TCPV6 => Some(GsoKind::Tcp6),
        GSO_UDP_L4 => Some(GsoKind::Udp),
        _ => return Err(bad),
    };
    let ecn = gso_type & GSO_ECN != 0;
    let offload = Offload { checksum, gso: kind.map(|kind| Gso { kind, size: field(4), ecn }) };
    if offered.covers(&offload) { Ok(offload) } else { Err(bad) }
}

/// Writes the header for a receiver that takes `offload` as it is. `buffers` is how many the frame fills.
#[inline]
pub fn emit(offload: &Offload, accepts: Accepts, buffers: u16) -> [u8; FULL] {
    let mut header = [0; FULL];
    header[10..12].copy_from_slice(&buffers.to_le_bytes());
    if offload.checksum != Checksum::Unknown || offload.gso.is_some() {
        emit_offload(&mut header, offload, accepts);
    }
    header
}

fn emit_offload(header: &mut [u8; FULL], offload: &Offload, accepts: Accepts) {
    let mut field = |at: usize, value: u16| header[at..at + 2].copy_from_slice(&value.to_le_bytes());
    if let Some(gso) = offload.gso {
        let base = match gso.kind {
            GsoKind::Tcp4 => GSO_TCPV4,
            GsoKind::Tcp6 => GSO_TCPV6,
            GsoKind::Udp => GSO_UDP_L4,
        };
        field(4, gso.size);
        if let Checksum::Partial { start, .. } = offload.checksum {
            // A hint how much to keep contiguous: up to the end of the transport header without options.
            field(2, start.saturating_add(if gso.kind == GsoKind::Udp { 8 } else { 20 }));
        }
        header[1] = base | if gso.ecn { GSO_ECN } else { 0 };
    }
    let mut field = |at: usize, value: u16| header[at..at + 2].copy_from_slice(&value.to_le_bytes());
    match offload.checksum {
        Checksum::Partial { start, offset } => {
            field(6, start);
            field(8, offset);
            header[0] = NEEDS_CSUM;
        }
        Checksum::Valid if accepts.contains(Accepts::CHECKSUM) => header[0] = DATA_VALID,
        Checksum::Valid | Checksum::Unknown => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_offload_reads_back_as_written() {
        let partial = Checksum::Partial { start: 34, offset: 16 };
        for kind in [GsoKind::Tcp4, GsoKind::Tcp6, GsoKind::Udp] {
            for ecn in [false, true] {
                let offload = Offload { checksum: partial, gso: Some(Gso { kind, size: 1448, ecn }) };
                let header = emit(&offload, Accepts::all(), 1);
                assert_eq!(parse(header[..SHORT].try_into().unwrap(), Accepts::all()), Ok(offload));
            }
        }
        for checksum in [Checksum::Unknown, Checksum::Valid, partial] {
            let offload = Offload { checksum, gso: None };
            let header = emit(&offload, Accepts::all(), 3);
            assert_eq!(header[10..], [3, 0]);
            assert_eq!(parse(header[..SHORT].try_into().unwrap(), Accepts::all()), Ok(offload));
        }
    }

    #[test]
    fn golden_header_of_a_tcp4_frame_with_ecn() {
        let gso = Some(Gso { kind: GsoKind::Tcp4, size: 0x05a8, ecn: true });
        let offload = Offload { checksum: Checksum::Partial { start: 34, offset: 16 }, gso };
        assert_eq!(
            emit(&offload, Accepts::all(), 2),
            [1, 0x81, 54, 0, 0xa8, 0x05, 34, 0, 16, 0, 2, 0]
        );
    }

    #[test]
    fn feature_that_was_not_negotiated_is_refused() {
        let header = |flags, gso_type| [flags, gso_type, 0, 0, 100, 0, 34, 0, 16, 0];
        assert!(parse(header(1, 0), Accepts::empty()).is_err());
        assert!(parse(header(1, 1), Accepts::CHECKSUM).is_err());
        assert!(parse(header(1, 0x81), Accepts::CHECKSUM | Accepts::TCP4).is_err());
        for unknown in [0x80, 2, 3, 6, 0x7f, 0xff] {
            assert!(parse(header(1, unknown), Accepts::all()).is_err(), "{unknown:#x}");
        }
    }

    #[test]
    fn verified_checksum_is_not_claimed_to_a_receiver_that_did_not_ask() {
        let offload = Offload { checksum: Checksum::Valid, gso: None };
        assert_eq!(emit(&offload, Accepts::empty(), 1)[0], 0);
    }
}
