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

/// A header in two words, as it goes to and from registers: bytes 0 to 7 and, in the low half of the second, 8 and 9;
/// `num_buffers` is the high half.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Words {
    /// `flags`, `gso_type`, `hdr_len`, `gso_size`, `csum_start`.
    pub low: u64,
    /// `csum_offset`, `num_buffers`.
    pub high: u32,
}

impl Words {
    /// True if the sender leaves nothing to be done and says nothing about checksums.
    #[inline]
    pub fn is_plain(self) -> bool {
        self.low & 0xffff == 0
    }

    /// The bytes in order.
    pub fn bytes(self) -> [u8; FULL] {
        let mut bytes = [0; FULL];
        bytes[..8].copy_from_slice(&self.low.to_le_bytes());
        bytes[8..].copy_from_slice(&self.high.to_le_bytes());
        bytes
    }

    /// Words of the first ten bytes of a header.
    pub fn from_bytes(header: [u8; SHORT]) -> Self {
        let [a, b, c, d, e, f, g, h, i, j] = header;
        Self { low: u64::from_le_bytes([a, b, c, d, e, f, g, h]), high: u16::from_le_bytes([i, j]).into() }
    }
}

/// Reads the header of a frame that a sender allowed to use `offered` wrote.
///
/// # Errors
/// [`BadHeader`] for an unknown type, or one that was not offered.
#[inline]
pub fn parse(header: Words, offered: Accepts) -> Result<Offload, BadHeader> {
    // Nearly all small frames: nothing asked.
    if header.is_plain() {
        return Ok(Offload::default());
    }
    parse_offload(header, offered)
}

#[expect(clippy::cast_possible_truncation, reason = "fields are cut out of words")]
fn parse_offload(header: Words, offered: Accepts) -> Result<Offload, BadHeader> {
    let (flags, gso_type) = (header.low as u8, (header.low >> 8) as u8);
    let bad = BadHeader { flags, gso_type };
    let checksum = if flags & NEEDS_CSUM != 0 {
        Checksum::Partial { start: (header.low >> 48) as u16, offset: header.high as u16 }
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
    let (size, ecn) = ((header.low >> 32) as u16, gso_type & GSO_ECN != 0);
    let offload = Offload { checksum, gso: kind.map(|kind| Gso { kind, size, ecn }) };
    if offered.covers(&offload) { Ok(offload) } else { Err(bad) }
}

/// The header for a receiver that takes `offload` as it is. `buffers` is how many the frame fills.
#[inline]
pub fn emit(offload: &Offload, accepts: Accepts, buffers: u16) -> Words {
    let header = Words { low: 0, high: u32::from(buffers) << 16 };
    if offload.checksum == Checksum::Unknown && offload.gso.is_none() {
        return header;
    }
    emit_offload(header, offload, accepts)
}

fn emit_offload(mut header: Words, offload: &Offload, accepts: Accepts) -> Words {
    if let Some(gso) = offload.gso {
        let kind = match gso.kind {
            GsoKind::Tcp4 => GSO_TCPV4,
            GsoKind::Tcp6 => GSO_TCPV6,
            GsoKind::Udp => GSO_UDP_L4,
        };
        let kind = kind | if gso.ecn { GSO_ECN } else { 0 };
        header.low |= u64::from(kind) << 8 | u64::from(gso.size) << 32;
        if let Checksum::Partial { start, .. } = offload.checksum {
            // A hint how much to keep contiguous: up to the end of the transport header without options.
            let hint = start.saturating_add(if gso.kind == GsoKind::Udp { 8 } else { 20 });
            header.low |= u64::from(hint) << 16;
        }
    }
    match offload.checksum {
        Checksum::Partial { start, offset } => {
            header.low |= u64::from(NEEDS_CSUM) | u64::from(start) << 48;
            header.high |= u32::from(offset);
        }
        Checksum::Valid if accepts.contains(Accepts::CHECKSUM) => header.low |= u64::from(DATA_VALID),
        Checksum::Valid | Checksum::Unknown => {}
    }
    header
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
                assert_eq!(parse(header, Accepts::all()), Ok(offload));
            }
        }
        for checksum in [Checksum::Unknown, Checksum::Valid, partial] {
            let offload = Offload { checksum, gso: None };
            let header = emit(&offload, Accepts::all(), 3);
            assert_eq!(header.bytes()[10..], [3, 0]);
            let short = header.bytes()[..SHORT].try_into().unwrap();
            assert_eq!(parse(Words::from_bytes(short), Accepts::all()), Ok(offload));
        }
    }

    #[test]
    fn golden_header_of_a_tcp4_frame_with_ecn() {
        let gso = Some(Gso { kind: GsoKind::Tcp4, size: 0x05a8, ecn: true });
        let offload = Offload { checksum: Checksum::Partial { start: 34, offset: 16 }, gso };
        assert_eq!(
            emit(&offload, Accepts::all(), 2).bytes(),
            [1, 0x81, 54, 0, 0xa8, 0x05, 34, 0, 16, 0, 2, 0]
        );
    }

    #[test]
    fn feature_that_was_not_negotiated_is_refused() {
        let header = |flags, gso_type| Words::from_bytes([flags, gso_type, 0, 0, 100, 0, 34, 0, 16, 0]);
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
        assert_eq!(emit(&offload, Accepts::empty(), 1).bytes()[0], 0);
    }
}
