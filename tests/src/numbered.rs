//! Frames that a receiver can check byte for byte: UDP over IPv4, numbered by flow and sequence, the rest of the
//! payload drawn from both numbers.

/// Bytes of an untagged frame up to the end of both numbers.
pub const SHORTEST: usize = 14 + 20 + 8 + 12;

const FLOW_AT: usize = 42;
const SEQUENCE_AT: usize = 46;

/// The frame number `sequence` of `flow`, of `len` bytes without frame check sequence.
///
/// Flows differ in their source port, so that receive-side scaling spreads them.
pub fn frame(from: [u8; 6], to: [u8; 6], flow: u32, sequence: u64, len: usize) -> Vec<u8> {
    let len = len.max(SHORTEST);
    let mut frame = Vec::with_capacity(len);
    frame.extend(to);
    frame.extend(from);
    frame.extend([8, 0]);
    let short = |value: usize| u16::try_from(value).unwrap_or(u16::MAX).to_be_bytes();
    let mut header = vec![0x45, 0];
    header.extend(short(len - 14));
    header.extend([0, 0, 0x40, 0, 64, 17, 0, 0, 10, 99, 0, from[5], 10, 99, 0, to[5]]);
    let sum = !internet_checksum(&header);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    frame.extend(header);
    frame.extend(short(1024 + (flow & 0x7fff) as usize));
    frame.extend([0x26, 0x94]);
    frame.extend(short(len - 34));
    // No checksum, RFC 768.
    frame.extend([0, 0]);
    frame.extend(flow.to_be_bytes());
    frame.extend(sequence.to_be_bytes());
    let mut state = u64::from(flow) << 48 ^ sequence ^ 0x9e37_79b9_7f4a_7c15;
    while frame.len() < len {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        frame.extend(state.to_be_bytes().iter().take(len - frame.len()));
    }
    frame
}

/// Flow and sequence number of an untagged frame, if it has any.
pub fn numbers(frame: &[u8]) -> Option<(u32, u64)> {
    if frame.get(12..14)? != [8, 0] || frame.get(36..38)? != [0x26, 0x94] {
        return None;
    }
    let flow = frame.get(FLOW_AT..SEQUENCE_AT)?.try_into().ok()?;
    let sequence = frame.get(SEQUENCE_AT..SHORTEST)?.try_into().ok()?;
    Some((u32::from_be_bytes(flow), u64::from_be_bytes(sequence)))
}

/// RFC 1071, not complemented.
fn internet_checksum(bytes: &[u8]) -> u16 {
    let sum: u32 =
        bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    u16::try_from((folded & 0xffff) + (folded >> 16)).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frame_has_its_length_and_numbers_and_a_good_header() {
        let frame = frame([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2], 7, 99, 60);
        assert_eq!(frame.len(), 60);
        assert_eq!(numbers(&frame), Some((7, 99)));
        assert_eq!(internet_checksum(&frame[14..34]), 0xffff);
    }

    #[test]
    fn payloads_of_neighbours_differ() {
        let payload = |flow, sequence| frame([2; 6], [2; 6], flow, sequence, 1514)[SHORTEST..].to_vec();
        assert_ne!(payload(1, 1), payload(1, 2));
        assert_ne!(payload(1, 1), payload(2, 1));
    }
}
