//! The header parser of the hot path: where a frame's network and transport headers lie, and its flow.
//!
//! It reads a private copy of the frame's first bytes, which may be shorter than the frame, and says only what those bytes
//! show: a header that is cut off, contradicts itself or lies beyond the IP packet's own length is reported as absent. It
//! never allocates or panics, and each loop is bounded (two VLAN tags, eight extension headers), so no frame costs more than
//! a few dozen steps. The straight path, untagged IPv4 or IPv6 with TCP or UDP, has one bounds check a header.

#[doc(hidden)]
pub mod fuzz;

use vmq::rss::Flow;
use vmq::rss::Ports;
use vmq::rss::Transport;

/// Bytes of an Ethernet header without tags.
pub const ETHERNET_LEN: u16 = 14;
/// Bytes of one VLAN tag.
pub const VLAN_LEN: u16 = 4;
/// Most VLAN tags that are looked through; what follows is opaque.
pub const MAX_VLAN_TAGS: u8 = 2;
/// Most IPv6 extension headers that are walked. RFC 8504 (5.3) lets a node limit them, and real packets carry one or two.
pub const MAX_EXTENSIONS: usize = 8;

/// EtherType values (IEEE 802 numbers).
pub mod ethertype {
    /// IPv4.
    pub const IPV4: u16 = 0x0800;
    /// ARP.
    pub const ARP: u16 = 0x0806;
    /// Customer VLAN tag, 802.1Q.
    pub const VLAN: u16 = 0x8100;
    /// IPv6.
    pub const IPV6: u16 = 0x86dd;
    /// Service VLAN tag, 802.1ad.
    pub const SERVICE_VLAN: u16 = 0x88a8;
}

/// Protocol numbers of IPv4's protocol and IPv6's next header field (IANA).
mod protocol {
    pub const HOP_BY_HOP: u8 = 0;
    pub const TCP: u8 = 6;
    pub const UDP: u8 = 17;
    pub const ROUTING: u8 = 43;
    pub const FRAGMENT: u8 = 44;
    pub const AUTHENTICATION: u8 = 51;
    pub const NONE: u8 = 59;
    pub const DESTINATION: u8 = 60;
}

/// The network protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum L3 {
    /// Not IP, or its fixed header is not all there.
    #[default]
    None,
    /// IPv4; the 20 bytes of its fixed header were there.
    Ipv4,
    /// IPv6; the 40 bytes of its fixed header were there.
    Ipv6,
}

/// The transport protocol, as the network header names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum L4 {
    /// No IP packet, or an IP length too small for its own header.
    #[default]
    None,
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// Another protocol, or the header where the walk over IPv6 extension headers had to stop.
    Other(u8),
}

/// What a frame's first bytes show.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Headers {
    /// Where the network header starts, after all tags; 0 if not even the Ethernet header is there.
    pub l3_offset: u16,
    /// The EtherType after all tags, as the frame states it; below 0x600 it is an 802.3 length.
    pub ethertype: u16,
    /// How many VLAN tags were looked through.
    pub vlan_tags: u8,
    /// Network protocol.
    pub l3: L3,
    /// Transport protocol; of a fragment too.
    pub l4: L4,
    /// Whether the packet is a fragment, first or later. Only a first one has an `l4_offset`.
    pub fragment: bool,
    /// Whether the IP length field is sound: not less than its header, not more than the frame, not 0 where 0 says "unknown".
    pub ip_intact: bool,
    /// Bytes of the frame that belong to the IP packet, header included and padding not; 0 if not IP.
    ///
    /// A length field beyond the frame is cut to it. A field of 0 means the rest of the frame: senders of segmentation
    /// offload leave it so (NDIS LSO, Linux BIG TCP, RFC 2675 jumbograms).
    pub ip_len: u32,
    /// Where the transport header starts, or 0 if there is none; may lie beyond the bytes at hand.
    pub l4_offset: u16,
    /// Length of the TCP (with options) or UDP header; 0 if it is not visible, or does not fit the packet.
    pub l4_header_len: u8,
}

impl Headers {
    /// Reads `bytes`, the start of a frame of `frame_len` bytes.
    #[inline]
    pub fn parse(bytes: &[u8], frame_len: usize) -> Self {
        let bytes = bytes.get(..frame_len).unwrap_or(bytes);
        let frame_len = u32::try_from(frame_len).unwrap_or(u32::MAX);
        let mut headers = Self::default();
        let Some(ethernet) = array::<14>(bytes, 0) else { return headers };
        headers.l3_offset = ETHERNET_LEN;
        headers.ethertype = u16::from_be_bytes([ethernet[12], ethernet[13]]);
        if matches!(headers.ethertype, ethertype::VLAN | ethertype::SERVICE_VLAN) {
            headers.skip_vlan_tags(bytes);
        }
        match headers.ethertype {
            ethertype::IPV4 => headers.read_ipv4(bytes, frame_len),
            ethertype::IPV6 => headers.read_ipv6(bytes, frame_len),
            _ => {}
        }
        headers
    }

    /// The outermost VLAN tag's control information (priority and identifier), if there is a tag.
    #[inline]
    pub fn vlan_tci(&self, bytes: &[u8]) -> Option<u16> {
        if self.vlan_tags == 0 {
            return None;
        }
        array::<2>(bytes, ETHERNET_LEN).copied().map(u16::from_be_bytes)
    }

    /// The addresses, and the ports if the packet is no fragment and shows them.
    ///
    /// `bytes` are those that were parsed; others give a flow of other nonsense, never a panic.
    #[inline(always)]
    pub fn flow(&self, bytes: &[u8]) -> Flow {
        match self.l3 {
            L3::None => Flow::Other,
            L3::Ipv4 => {
                let src = array::<4>(bytes, self.l3_offset.saturating_add(12));
                let dst = array::<4>(bytes, self.l3_offset.saturating_add(16));
                match (src, dst) {
                    (Some(&src), Some(&dst)) => Flow::V4 { src, dst, ports: self.ports(bytes) },
                    _ => Flow::Other,
                }
            }
            L3::Ipv6 => {
                let src = array::<16>(bytes, self.l3_offset.saturating_add(8));
                let dst = array::<16>(bytes, self.l3_offset.saturating_add(24));
                match (src, dst) {
                    (Some(&src), Some(&dst)) => Flow::V6 { src, dst, ports: self.ports(bytes) },
                    _ => Flow::Other,
                }
            }
        }
    }

    /// The TCP or UDP ports, if the packet is no fragment and shows them.
    #[inline(always)]
    pub fn ports(&self, bytes: &[u8]) -> Option<Ports> {
        let transport = match self.l4 {
            L4::Tcp => Transport::Tcp,
            L4::Udp => Transport::Udp,
            L4::None | L4::Other(_) => return None,
        };
        if self.fragment || self.l4_offset == 0 || u32::from(self.l4_offset) + 4 > self.ip_end() {
            return None;
        }
        let &[a, b, c, d] = array::<4>(bytes, self.l4_offset)?;
        Some(Ports { transport, src: u16::from_be_bytes([a, b]), dst: u16::from_be_bytes([c, d]) })
    }

    /// Bytes up to the transport payload, or `None` if the transport header is not visible.
    #[inline]
    pub fn headers_len(&self) -> Option<u16> {
        (self.l4_header_len != 0).then(|| self.l4_offset.saturating_add(u16::from(self.l4_header_len)))
    }

    /// Where the IP packet ends in the frame.
    #[inline]
    pub fn ip_end(&self) -> u32 {
        u32::from(self.l3_offset).saturating_add(self.ip_len)
    }

    #[cold]
    fn skip_vlan_tags(&mut self, bytes: &[u8]) {
        while matches!(self.ethertype, ethertype::VLAN | ethertype::SERVICE_VLAN)
            && self.vlan_tags < MAX_VLAN_TAGS
        {
            let Some(&[_, _, high, low]) = array::<4>(bytes, self.l3_offset) else { return };
            self.ethertype = u16::from_be_bytes([high, low]);
            self.l3_offset += VLAN_LEN;
            self.vlan_tags += 1;
        }
    }

    /// RFC 791.
    #[inline]
    fn read_ipv4(&mut self, bytes: &[u8], frame_len: u32) {
        let Some(ip) = array::<20>(bytes, self.l3_offset) else { return };
        let header_len = u16::from(ip[0] & 15) * 4;
        if ip[0] >> 4 != 4 || header_len < 20 {
            return;
        }
        let room = frame_len - u32::from(self.l3_offset);
        let stated = u32::from(u16::from_be_bytes([ip[2], ip[3]]));
        self.l3 = L3::Ipv4;
        self.ip_len = if stated == 0 { room } else { stated.min(room) };
        self.ip_intact = stated >= u32::from(header_len) && stated <= room;
        let fragment_field = u16::from_be_bytes([ip[6], ip[7]]);
        self.fragment = fragment_field & 0x3fff != 0;
        if self.ip_len < u32::from(header_len) {
            return;
        }
        let (protocol, offset) = (ip[9], self.l3_offset + header_len);
        if fragment_field & 0x1fff != 0 {
            self.l4 = L4::named(protocol);
        } else if protocol == protocol::AUTHENTICATION {
            self.walk_extensions(bytes, protocol, offset, 1);
        } else {
            self.read_transport(bytes, protocol, offset);
        }
    }

    /// RFC 8200.
    #[inline]
    fn read_ipv6(&mut self, bytes: &[u8], frame_len: u32) {
        let Some(ip) = array::<40>(bytes, self.l3_offset) else { return };
        if ip[0] >> 4 != 6 {
            return;
        }
        let room = frame_len - u32::from(self.l3_offset);
        let stated = 40 + u32::from(u16::from_be_bytes([ip[4], ip[5]]));
        let next = ip[6];
        let unknown = stated == 40 && next != protocol::NONE;
        self.l3 = L3::Ipv6;
        self.ip_len = if unknown { room } else { stated.min(room) };
        self.ip_intact = stated <= room && (!unknown || room == 40);
        let offset = self.l3_offset + 40;
        if is_extension(next) {
            self.walk_extensions(bytes, next, offset, MAX_EXTENSIONS);
        } else {
            self.read_transport(bytes, next, offset);
        }
    }

    /// Walks at most `limit` extension headers from `next` at `offset`. Offsets cannot overflow: eight headers of at most
    /// 2048 bytes.
    #[cold]
    fn walk_extensions(&mut self, bytes: &[u8], mut next: u8, mut offset: u16, limit: usize) {
        let stop = |headers: &mut Self, next, offset| {
            headers.l4 = L4::Other(next);
            headers.l4_offset = offset;
        };
        for walked in 0..limit {
            // Hop-by-hop options may only come first (RFC 8200, 4.1).
            if !is_extension(next) || (next == protocol::HOP_BY_HOP && walked > 0) {
                break;
            }
            if u32::from(offset) + 8 > self.ip_end() {
                return stop(self, next, offset);
            }
            let Some(header) = array::<8>(bytes, offset) else { return stop(self, next, offset) };
            let len = match next {
                protocol::FRAGMENT => 8,
                protocol::AUTHENTICATION => (u16::from(header[1]) + 2) * 4,
                _ => (u16::from(header[1]) + 1) * 8,
            };
            // An authentication header's fixed part has 12 bytes (RFC 4302, 2).
            let too_short = next == protocol::AUTHENTICATION && len < 12;
            if too_short || u32::from(offset + len) > self.ip_end() {
                return stop(self, next, offset);
            }
            if next == protocol::FRAGMENT {
                let field = u16::from_be_bytes([header[2], header[3]]);
                // Offset 0 and no more to come is a whole packet (RFC 6946).
                self.fragment |= field & 0xfff9 != 0;
                if field & 0xfff8 != 0 {
                    self.l4 = L4::named(header[0]);
                    return;
                }
            }
            next = header[0];
            offset += len;
        }
        self.read_transport(bytes, next, offset);
    }

    /// The transport header of `protocol` at `offset`, as far as packet and bytes reach.
    #[inline]
    fn read_transport(&mut self, bytes: &[u8], protocol: u8, offset: u16) {
        self.l4 = L4::named(protocol);
        self.l4_offset = offset;
        let in_packet = self.ip_end().saturating_sub(u32::from(offset));
        let header_len = match self.l4 {
            L4::Tcp => match array::<20>(bytes, offset) {
                Some(tcp) if tcp[12] >> 4 >= 5 => (tcp[12] >> 4) * 4,
                _ => return,
            },
            L4::Udp if array::<8>(bytes, offset).is_some() => 8,
            _ => return,
        };
        if u32::from(header_len) <= in_packet {
            self.l4_header_len = header_len;
        }
    }
}

impl L4 {
    #[inline]
    fn named(protocol: u8) -> Self {
        match protocol {
            protocol::TCP => Self::Tcp,
            protocol::UDP => Self::Udp,
            other => Self::Other(other),
        }
    }
}

/// Whether `next` is an IPv6 extension header that the walk knows.
#[inline]
fn is_extension(next: u8) -> bool {
    matches!(
        next,
        protocol::HOP_BY_HOP
            | protocol::ROUTING
            | protocol::FRAGMENT
            | protocol::AUTHENTICATION
            | protocol::DESTINATION
    )
}

/// `N` bytes at `offset`, if they are there.
#[inline(always)]
fn array<const N: usize>(bytes: &[u8], offset: u16) -> Option<&[u8; N]> {
    bytes.get(usize::from(offset)..)?.first_chunk()
}

#[cfg(test)]
mod tests;
