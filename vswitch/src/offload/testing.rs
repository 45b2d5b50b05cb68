//! Frames for tests, built by hand, and taken apart by etherparse.

use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use vmq::frame::{Burst, Checksum, Frame, Gso, GsoKind, Offload};
use vmq::memory::Segment;

use super::checksum;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    Tcp,
    Udp,
}

/// What a frame is to look like.
#[derive(Debug, Clone)]
pub struct Builder {
    pub v6: bool,
    pub transport: Transport,
    /// Control information of an 802.1Q tag.
    pub tag: Option<u16>,
    /// IPv4 options, or IPv6 destination options in multiples of 8 bytes.
    pub ip_options: usize,
    pub tcp_options: Vec<u8>,
    pub ports: (u16, u16),
    pub sequence: u32,
    pub acknowledgement: u32,
    pub window: u16,
    pub flags: u8,
    pub id: u16,
    pub dont_fragment: bool,
    pub tos: u8,
    pub ttl: u8,
}

impl Builder {
    pub fn new(v6: bool, transport: Transport) -> Self {
        Self {
            v6,
            transport,
            tag: None,
            ip_options: 0,
            tcp_options: vec![],
            ports: (1000, 2000),
            sequence: 0xffff_f000,
            acknowledgement: 77,
            window: 501,
            flags: 0x10,
            id: 0xfff0,
            dont_fragment: true,
            tos: 2,
            ttl: 64,
        }
    }

    pub fn l3(&self) -> usize {
        if self.tag.is_some() { 18 } else { 14 }
    }

    pub fn l4(&self) -> usize {
        self.l3() + if self.v6 { 40 } else { 20 } + self.ip_options
    }

    pub fn header_len(&self) -> usize {
        self.l4() + if self.transport == Transport::Tcp { 20 + self.tcp_options.len() } else { 8 }
    }

    /// Offset of the checksum in the transport header.
    pub fn field(&self) -> usize {
        if self.transport == Transport::Tcp { 16 } else { 6 }
    }

    pub fn partial(&self) -> Offload {
        let (start, offset) = (u16::try_from(self.l4()).unwrap(), u16::try_from(self.field()).unwrap());
        Offload { checksum: Checksum::Partial { start, offset }, gso: None }
    }

    pub fn large(&self, kind: GsoKind, size: u16, ecn: bool) -> Offload {
        Offload { gso: Some(Gso { kind, size, ecn }), ..self.partial() }
    }

    /// The whole frame with `payload`, all checksums done.
    pub fn frame(&self, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 8];
        if let Some(tag) = self.tag {
            frame.extend([0x81, 0]);
            frame.extend(tag.to_be_bytes());
        }
        let l4_len = self.header_len() - self.l4() + payload.len();
        let protocol = if self.transport == Transport::Tcp { 6 } else { 17 };
        // Jumbograms' length is 0, as Linux leaves it.
        let length = |len: usize| u16::try_from(len).unwrap_or(0).to_be_bytes();
        if self.v6 {
            frame.extend([0x86, 0xdd, 0x60 | self.tos >> 4, self.tos << 4, 3, 4]);
            frame.extend(length(self.ip_options + l4_len));
            frame.extend([if self.ip_options > 0 { 60 } else { protocol }, self.ttl]);
            frame.extend((0..32).map(|i| if i % 16 == 0 { 0xfd } else { i }));
            if self.ip_options > 0 {
                let padding = u8::try_from(self.ip_options - 4).unwrap();
                frame.extend([protocol, u8::try_from(self.ip_options / 8 - 1).unwrap(), 1, padding]);
                frame.extend(vec![0; self.ip_options - 4]);
            }
        } else {
            frame.extend([8, 0, 0x45 + u8::try_from(self.ip_options / 4).unwrap(), self.tos]);
            frame.extend(length(20 + self.ip_options + l4_len));
            frame.extend(self.id.to_be_bytes());
            frame.extend([if self.dont_fragment { 0x40 } else { 0 }, 0, self.ttl, protocol, 0, 0]);
            frame.extend([10, 0, 0, 1, 10, 9, 8, 7]);
            frame.extend(vec![1; self.ip_options]);
            let sum = checksum::sum(&frame[self.l3()..], 0);
            let at = self.l3() + 10;
            frame[at..at + 2].copy_from_slice(&checksum::finish(sum).to_be_bytes());
        }
        frame.extend(self.ports.0.to_be_bytes());
        frame.extend(self.ports.1.to_be_bytes());
        match self.transport {
            Transport::Tcp => {
                frame.extend(self.sequence.to_be_bytes());
                frame.extend(self.acknowledgement.to_be_bytes());
                frame.extend([0x50 + u8::try_from(self.tcp_options.len() * 4).unwrap(), self.flags]);
                frame.extend(self.window.to_be_bytes());
                frame.extend([0; 4]);
                frame.extend(&self.tcp_options);
            }
            Transport::Udp => {
                frame.extend(length(l4_len));
                frame.extend([0; 2]);
            }
        }
        assert_eq!(frame.len(), self.header_len());
        frame.extend(payload);
        let sum = checksum::sum(&frame[self.l4()..], self.pseudo(&frame));
        let udp = self.transport == Transport::Udp;
        let value = if udp { checksum::finish_udp(sum) } else { checksum::finish(sum) };
        self.set_checksum(&mut frame, value);
        frame
    }

    /// The whole frame with a payload of `len` bytes.
    pub fn build(&self, len: usize) -> Vec<u8> {
        self.frame(&payload(len))
    }

    /// Leaves the frame's checksum to be done.
    pub fn unfinish(&self, mut frame: Vec<u8>) -> Vec<u8> {
        let pseudo = checksum::fold(self.pseudo(&frame));
        self.set_checksum(&mut frame, pseudo);
        frame
    }

    fn set_checksum(&self, frame: &mut [u8], value: u16) {
        let at = self.l4() + self.field();
        frame[at..at + 2].copy_from_slice(&value.to_be_bytes());
    }

    fn pseudo(&self, frame: &[u8]) -> u32 {
        let l3 = self.l3();
        let len = u32::try_from(frame.len() - self.l4()).unwrap();
        let protocol = if self.transport == Transport::Tcp { 6 } else { 17 };
        if self.v6 {
            let address = |at: usize| frame[l3 + at..l3 + at + 16].try_into().unwrap();
            checksum::pseudo_v6(address(8), address(24), protocol, len)
        } else {
            let address = |at: usize| frame[l3 + at..l3 + at + 4].try_into().unwrap();
            checksum::pseudo_v4(address(12), address(16), protocol, len)
        }
    }
}

/// `len` bytes without a pattern that a shift would hide.
pub fn payload(len: usize) -> Vec<u8> {
    let mut state = 0x1234_5678_u32;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state.to_be_bytes()[0]
        })
        .collect()
}

/// All bytes of a frame.
pub fn flatten(burst: &Burst<'_>, frame: &Frame) -> Vec<u8> {
    let mut all = frame.head().to_vec();
    for segment in burst.tail(frame) {
        let mut piece = vec![0; segment.len() as usize];
        assert_eq!(segment.read_into(&mut piece), piece.len());
        all.extend(piece);
    }
    assert_eq!(all.len(), frame.len as usize);
    all
}

/// Adds `bytes` as a frame in pieces that end at `cuts`.
pub fn push_cut<'m>(burst: &mut Burst<'m>, bytes: &'m [u8], cuts: &[usize], offload: Offload) {
    let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % (bytes.len() + 1)).collect();
    cuts.extend([0, bytes.len()]);
    cuts.sort_unstable();
    let pieces = cuts.windows(2).map(|cut| Segment::from(&bytes[cut[0]..cut[1]]));
    assert!(burst.push_pieces(pieces, offload));
    let tagged = bytes.get(12..14) == Some(&[0x81, 0]);
    let frame = burst.frames_mut().last_mut().unwrap();
    frame.tagged = tagged;
    frame.vlan = if tagged { u16::from_be_bytes([bytes[14], bytes[15]]) & 0xfff } else { 0 };
}

/// What etherparse makes of a TCP or UDP frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    pub payload: Vec<u8>,
    pub vlan: Option<u16>,
    pub id: Option<u16>,
    pub sequence: Option<u32>,
    pub flags: Option<u8>,
}

/// The big-endian words of `bytes`, added up.
fn words(bytes: &[u8]) -> u32 {
    bytes.chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum()
}

/// Takes a frame apart and checks its lengths, the IPv4 header checksum, and the transport checksum, which may have been
/// left to be done.
pub fn verify(bytes: &[u8], checksum: Checksum) -> Result<Seen, String> {
    let packet = SlicedPacket::from_ethernet(bytes).map_err(|error| error.to_string())?;
    let net = packet.net.as_ref().ok_or("no IP")?;
    let id = match net {
        NetSlice::Ipv4(ip) => {
            let header = ip.header().to_header();
            // etherparse does not keep the reserved flag, so there the header is summed here.
            let reserved = ip.header().slice()[6] & 0x80 != 0;
            let right = match reserved {
                true => words(ip.header().slice()).is_multiple_of(0xffff),
                false => header.header_checksum == header.calc_header_checksum(),
            };
            if !right {
                return Err("IPv4 header checksum".into());
            }
            Some(header.identification)
        }
        NetSlice::Ipv6(_) => None,
        NetSlice::Arp(_) => return Err("ARP".into()),
    };
    let ip_payload = net.ip_payload_ref().ok_or("no IP payload")?.payload;
    // Nothing behind the IP packet.
    if bytes.as_ptr_range().end != ip_payload.as_ptr_range().end {
        return Err("IP length".into());
    }
    let finished = match checksum {
        Checksum::Partial { start, offset } => {
            let at = usize::from(start) + usize::from(offset);
            let mut bytes = bytes.to_vec();
            let udp = matches!(packet.transport, Some(TransportSlice::Udp(_)));
            if bytes.as_ptr_range().end.addr() - bytes.as_ptr().addr()
                != ip_payload.len() + usize::from(start)
            {
                return Err("checksum start".into());
            }
            let sum = checksum::sum(&bytes[usize::from(start)..], 0);
            let value = if udp { checksum::finish_udp(sum) } else { checksum::finish(sum) };
            bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
            return verify(&bytes, Checksum::Valid);
        }
        Checksum::Unknown | Checksum::Valid => packet.transport.as_ref().ok_or("no transport")?,
    };
    let vlan = packet.vlan_ids().first().map(|vlan| vlan.value());
    match finished {
        TransportSlice::Tcp(tcp) => {
            let right = match net {
                NetSlice::Ipv4(ip) => tcp.calc_checksum_ipv4(ip.header().source(), ip.header().destination()),
                NetSlice::Ipv6(ip) => tcp.calc_checksum_ipv6(ip.header().source(), ip.header().destination()),
                NetSlice::Arp(_) => unreachable!("refused above"),
            };
            if right.map_err(|error| error.to_string())? != tcp.checksum() {
                return Err(format!("TCP checksum {:04x}", tcp.checksum()));
            }
            Ok(Seen {
                payload: tcp.payload().to_vec(),
                vlan,
                id,
                sequence: Some(tcp.sequence_number()),
                flags: Some(tcp.slice()[13]),
            })
        }
        TransportSlice::Udp(udp) => {
            let header = udp.to_header();
            let right = match net {
                NetSlice::Ipv4(ip) => header.calc_checksum_ipv4_raw(
                    ip.header().source(),
                    ip.header().destination(),
                    udp.payload(),
                ),
                NetSlice::Ipv6(ip) => header.calc_checksum_ipv6_raw(
                    ip.header().source(),
                    ip.header().destination(),
                    udp.payload(),
                ),
                NetSlice::Arp(_) => unreachable!("refused above"),
            };
            if right.map_err(|error| error.to_string())? != udp.checksum() {
                return Err(format!("UDP checksum {:04x}", udp.checksum()));
            }
            if usize::from(udp.length()) != ip_payload.len() {
                return Err("UDP length".into());
            }
            Ok(Seen { payload: udp.payload().to_vec(), vlan, id, sequence: None, flags: None })
        }
        other => Err(format!("{other:?}")),
    }
}
