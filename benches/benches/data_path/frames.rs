//! Frames to measure with.

use vswitch::offload::checksum;

/// The address of station `n`.
pub fn station(n: u32) -> [u8; 6] {
    let [a, b, c, d] = n.to_be_bytes();
    [2, 0, a, b, c, d]
}

/// Numbers below `bound` in no order, always the same ones.
pub fn random(bound: u32) -> impl Iterator<Item = u32> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        u32::try_from((u64::from(bound) * (state >> 32)) >> 32).unwrap_or(0)
    })
}

fn ethernet(tag: Option<u16>, ethertype: u16) -> Vec<u8> {
    let mut bytes = [station(2), station(1)].concat();
    if let Some(vlan) = tag {
        bytes.extend([0x81, 0]);
        bytes.extend(vlan.to_be_bytes());
    }
    bytes.extend(ethertype.to_be_bytes());
    bytes
}

/// UDP or TCP header, payload, and the transport checksum.
#[derive(Debug, Clone, Copy)]
pub enum Transport {
    /// From port 1000 + n to 2000.
    Udp(u16),
    /// With this sequence number.
    Tcp(u32),
}

impl Transport {
    fn protocol(self) -> u8 {
        match self {
            Self::Udp(_) => 17,
            Self::Tcp(_) => 6,
        }
    }

    fn segment(self, pseudo: impl Fn(u32) -> u32, payload: usize) -> Vec<u8> {
        let (mut bytes, at) = match self {
            Self::Udp(n) => {
                let [a, b] = (1000 + n).to_be_bytes();
                let [c, d] = u16::try_from(8 + payload).unwrap_or(0).to_be_bytes();
                (vec![a, b, 0x07, 0xd0, c, d, 0, 0], 6)
            }
            Self::Tcp(sequence) => {
                let [a, b, c, d] = sequence.to_be_bytes();
                (vec![3, 0xe8, 7, 0xd0, a, b, c, d, 0, 0, 0, 1, 0x50, 0x10, 1, 0xf5, 0, 0, 0, 0], 16)
            }
        };
        bytes.extend((0..=250u8).cycle().take(payload));
        let sum = checksum::sum(&bytes, pseudo(u32::try_from(bytes.len()).unwrap_or(0)));
        bytes[at..at + 2].copy_from_slice(&checksum::finish(sum).to_be_bytes());
        bytes
    }
}

/// A frame over IPv4, tagged or not.
pub fn ipv4(tag: Option<u16>, transport: Transport, payload: usize) -> Vec<u8> {
    let (src, dst) = ([10, 0, 0, 1], [10, 0, 0, 2]);
    let segment = transport.segment(|len| checksum::pseudo_v4(src, dst, transport.protocol(), len), payload);
    let [high, low] = u16::try_from(20 + segment.len()).unwrap_or(0).to_be_bytes();
    let mut header = vec![0x45, 0, high, low, 0, 0, 0x40, 0, 64, transport.protocol(), 0, 0];
    header.extend(src);
    header.extend(dst);
    let sum = checksum::finish(checksum::sum(&header, 0));
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    [ethernet(tag, 0x0800), header, segment].concat()
}

/// A frame over IPv6.
pub fn ipv6(transport: Transport, payload: usize) -> Vec<u8> {
    let address = |n| [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, n];
    let pseudo = |len| checksum::pseudo_v6(address(1), address(2), transport.protocol(), len);
    let segment = transport.segment(pseudo, payload);
    let [high, low] = u16::try_from(segment.len()).unwrap_or(0).to_be_bytes();
    let mut header = vec![0x60, 0, 0, 0, high, low, transport.protocol(), 64];
    header.extend(address(1));
    header.extend(address(2));
    [ethernet(None, 0x86dd), header, segment].concat()
}
