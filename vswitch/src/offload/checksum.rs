//! The Internet checksum (RFC 1071) and its incremental update (RFC 1624).
//!
//! A *partial sum* is a `u32` that stands for a one's-complement sum of big-endian 16-bit words; any `u32` is a valid one.
//! Sums of parts are made one by [`combine`], folded by [`fold`], and become the header field by [`finish`].
//! The bytes are added up by [`Segment::sum`].

use vmq::memory::Segment;

/// The partial sum of `bytes`, taken to start at an even offset, added to `initial`. An odd last byte is padded with 0.
#[inline]
pub fn sum(bytes: &[u8], initial: u32) -> u32 {
    add(u32::from(Segment::from(bytes).sum()), initial)
}

/// The sum of `a` and `b`, where `b` was summed from its own start but lies behind `a` at an odd offset if `b_at_odd_offset`.
#[inline]
pub fn combine(a: u32, b: u32, b_at_odd_offset: bool) -> u32 {
    let b = fold(b);
    add(a, u32::from(if b_at_odd_offset { b.swap_bytes() } else { b }))
}

/// A partial sum in 16 bits.
#[inline]
pub fn fold(sum: u32) -> u16 {
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    #[expect(clippy::cast_possible_truncation, reason = "two folds of at most 32 bits leave 16")]
    let folded = sum as u16;
    folded
}

/// The header field for a partial sum: its complement.
#[inline]
pub fn finish(sum: u32) -> u16 {
    !fold(sum)
}

/// As [`finish`], for UDP: 0 would mean "no checksum", so all ones, its equal, is sent instead (RFC 768).
#[inline]
pub fn finish_udp(sum: u32) -> u16 {
    match finish(sum) {
        0 => 0xffff,
        field => field,
    }
}

/// Whether a partial sum that includes the checksum field itself shows an intact packet.
#[inline]
pub fn is_valid(sum: u32) -> bool {
    fold(sum) == 0xffff
}

/// The partial sum of IPv4's pseudo-header (RFC 9293, 3.1); `len` is that of transport header and payload in bytes.
#[inline]
pub fn pseudo_v4(src: [u8; 4], dst: [u8; 4], protocol: u8, len: u32) -> u32 {
    add(sum(&src, u32::from(protocol)), sum(&dst, u32::from(fold(len))))
}

/// The partial sum of IPv6's pseudo-header (RFC 8200, 8.1); `len` is that of transport header and payload in bytes.
#[inline]
pub fn pseudo_v6(src: [u8; 16], dst: [u8; 16], next_header: u8, len: u32) -> u32 {
    add(sum(&src, u32::from(next_header)), sum(&dst, u32::from(fold(len))))
}

/// The checksum field after a covered word changed from `old` to `new`: equation 3 of RFC 1624.
#[inline]
pub fn update(field: u16, old: u16, new: u16) -> u16 {
    finish(u32::from(!field) + u32::from(!old) + u32::from(new))
}

/// One's-complement addition.
#[inline]
fn add(a: u32, b: u32) -> u32 {
    let (sum, carry) = a.overflowing_add(b);
    // After a carry the sum is at most 2^32 - 2.
    sum + u32::from(carry)
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;
    use etherparse::SlicedPacket;
    use etherparse::TransportSlice;
    use proptest::prelude::*;

    use super::*;

    /// RFC 1071's definition: add the big-endian words, carry round.
    fn naive(bytes: &[u8]) -> u16 {
        let mut sum = 0_u64;
        for pair in bytes.chunks(2) {
            sum += u64::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
        }
        while sum > 0xffff {
            sum = (sum >> 16) + (sum & 0xffff);
        }
        u16::try_from(sum).unwrap()
    }

    #[test]
    fn example_of_rfc_1071_sums_to_ddf2() {
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(fold(sum(&bytes, 0)), 0xddf2);
        assert_eq!(finish(sum(&bytes, 0)), !0xddf2);
    }

    /// RFC 1624, section 4: the older equations gave 0xffff here.
    #[test]
    fn example_of_rfc_1624_updates_to_zero() {
        assert_eq!(update(0xdd2f, 0x5555, 0x3285), 0x0000);
    }

    #[test]
    fn nothing_sums_to_nothing() {
        assert_eq!(sum(&[], 0), 0);
        assert_eq!(finish(sum(&[], 0)), 0xffff);
    }

    #[test]
    fn largest_frame_of_ones_does_not_overflow() {
        assert_eq!(fold(sum(&vec![0xff; 1 << 20], u32::MAX)), 0xffff);
    }

    #[test]
    fn udp_field_of_zero_is_sent_as_ones() {
        assert_eq!((finish(0xffff), finish_udp(0xffff)), (0, 0xffff));
        assert_eq!(finish_udp(0x1234), !0x1234);
    }

    #[test]
    fn ipv4_header_of_etherparse_is_valid() {
        let mut frame = Vec::new();
        PacketBuilder::ethernet2([2; 6], [4; 6])
            .ipv4([192, 168, 0, 1], [10, 1, 2, 3], 64)
            .udp(1, 2)
            .write(&mut frame, b"odd")
            .unwrap();
        assert!(is_valid(sum(&frame[14..34], 0)));
        frame[20] ^= 1;
        assert!(!is_valid(sum(&frame[14..34], 0)));
    }

    proptest! {
        #[test]
        fn any_bytes_sum_as_defined(bytes in proptest::collection::vec(any::<u8>(), 0..3000), start in 0usize..64) {
            let bytes = bytes.get(start..).unwrap_or_default();
            prop_assert_eq!(fold(sum(bytes, 0)), naive(bytes));
        }

        #[test]
        fn initial_sum_is_added(bytes in proptest::collection::vec(any::<u8>(), 0..100), initial in any::<u32>()) {
            let prefixed = [&initial.to_be_bytes(), bytes.as_slice()].concat();
            prop_assert_eq!(fold(sum(&bytes, initial)), naive(&prefixed));
        }

        #[test]
        fn any_split_combines_to_the_whole(
            bytes in proptest::collection::vec(any::<u8>(), 1..2000),
            cuts in proptest::collection::vec(any::<proptest::sample::Index>(), 0..12),
        ) {
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len())).collect();
            cuts.extend([0, bytes.len()]);
            cuts.sort_unstable();
            let total = cuts.windows(2).fold(0, |total, cut| {
                combine(total, sum(&bytes[cut[0]..cut[1]], 0), cut[0] % 2 == 1)
            });
            prop_assert_eq!(fold(total), naive(&bytes));
        }

        #[test]
        fn transport_checksums_equal_etherparse(
            v6: bool,
            tcp: bool,
            src in any::<[u8; 16]>(),
            dst in any::<[u8; 16]>(),
            payload in proptest::collection::vec(any::<u8>(), 0..1500),
        ) {
            let (src4, dst4) = ([src[0], src[1], src[2], src[3]], [dst[0], dst[1], dst[2], dst[3]]);
            let link = PacketBuilder::ethernet2([2; 6], [4; 6]);
            let ip = if v6 { link.ipv6(src, dst, 9) } else { link.ipv4(src4, dst4, 9) };
            let mut frame = Vec::new();
            if tcp {
                ip.tcp(1, 2, 3, 4).write(&mut frame, &payload).unwrap();
            } else {
                ip.udp(1, 2).write(&mut frame, &payload).unwrap();
            }
            let l4 = if v6 { 54 } else { 34 };
            let field = l4 + if tcp { 16 } else { 6 };
            let expected = match SlicedPacket::from_ethernet(&frame).unwrap().transport {
                Some(TransportSlice::Tcp(tcp)) => tcp.checksum(),
                Some(TransportSlice::Udp(udp)) => udp.checksum(),
                other => panic!("{other:?}"),
            };
            let (protocol, len) = (if tcp { 6 } else { 17 }, u32::try_from(frame.len() - l4).unwrap());
            let pseudo = if v6 { pseudo_v6(src, dst, protocol, len) } else { pseudo_v4(src4, dst4, protocol, len) };
            prop_assert!(is_valid(sum(&frame[l4..], pseudo)));
            frame[field..field + 2].fill(0);
            let whole = sum(&frame[l4..], pseudo);
            prop_assert_eq!(if tcp { finish(whole) } else { finish_udp(whole) }, expected);
        }

        #[test]
        fn update_equals_a_new_sum(
            bytes in proptest::collection::vec(any::<u8>(), 8..80),
            at in 0usize..3,
            new in any::<[u8; 4]>(),
        ) {
            let before = finish(sum(&bytes, 0));
            let mut changed = bytes.clone();
            changed[2 * at..2 * at + 4].copy_from_slice(&new);
            let old = [bytes[2 * at], bytes[2 * at + 1], bytes[2 * at + 2], bytes[2 * at + 3]];
            let first = update(before, u16::from_be_bytes([old[0], old[1]]), u16::from_be_bytes([new[0], new[1]]));
            let both = update(first, u16::from_be_bytes([old[2], old[3]]), u16::from_be_bytes([new[2], new[3]]));
            // 0 and all ones are the same number; which of them comes out may differ.
            prop_assert!(is_valid(sum(&changed, u32::from(both))) || changed.iter().all(|byte| *byte == 0));
        }
    }
}
