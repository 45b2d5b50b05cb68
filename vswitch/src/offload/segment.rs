//! Segmentation in software: one large frame becomes the frames it stands for.
//!
//! Each segment gets a header of its own, made from the large frame's; the payload stays where it is. What the large
//! frame says in its IP length and checksum is not read: senders may leave both 0 (NDIS LSO, Linux BIG TCP).

use vmq::frame::{Burst, Checksum, Frame, Gso, GsoKind, Offload};

use super::check::{TCP_CHECKSUM, UDP_CHECKSUM, large};
use super::checksum;
use super::header::{
    Cursor, HEADER_MAX, Header, Pieces, SLOT, get16, get32, ipv4_header_len, pseudo_sum, put, put16,
    set_ip_len,
};
use super::tag::Retag;
use crate::DropReason;
use crate::parse::{Headers, L3};

/// TCP flags, in the header's byte 13.
pub(super) mod tcp_flag {
    /// No more data.
    pub const FIN: u8 = 0x01;
    /// Deliver now.
    pub const PSH: u8 = 0x08;
    /// The acknowledgement number counts.
    pub const ACK: u8 = 0x10;
    /// Congestion window reduced.
    pub const CWR: u8 = 0x80;
}

/// Where the flags are in the TCP header.
pub(super) const TCP_FLAGS: usize = 13;
/// Where the sequence number is in the TCP header.
pub(super) const TCP_SEQUENCE: usize = 4;
/// Where the length is in the UDP header.
const UDP_LENGTH: usize = 4;

pub(super) const PROTOCOL_TCP: u8 = 6;
pub(super) const PROTOCOL_UDP: u8 = 17;

/// A large frame, and how far it is cut up.
#[derive(Debug)]
pub(super) struct Segments<'b> {
    header: Header,
    headers: Headers,
    header_len: u16,
    gso: Gso,
    /// The pseudo-header's sum without its length.
    pseudo: u32,
    /// The receiver cannot complete checksums.
    complete: bool,
    payload: Cursor<'b>,
    left: u32,
    index: u32,
    ended: bool,
}

/// One segment: its header is in the slot that was given.
#[derive(Debug)]
pub(super) struct Segmented<'b> {
    /// Bytes of the slot.
    pub(super) header_len: u16,
    /// What follows.
    pub(super) payload: Pieces<'b>,
    /// What is still to be done.
    pub(super) offload: Offload,
}

impl<'b> Segments<'b> {
    /// Starts on `frame`, whose tag changes on the way.
    ///
    /// # Errors
    /// [`DropReason::BadOffload`] if the frame is not fit to be segmented.
    pub(super) fn new(
        burst: &'b Burst<'_>,
        frame: &'b Frame,
        gso: Gso,
        retag: Retag,
        complete: bool,
    ) -> Result<Self, DropReason> {
        let mut header = Header::EMPTY;
        header.read(burst, frame, HEADER_MAX);
        let headers = large(&header, frame.offload.checksum, gso)?;
        let header_len = headers.headers_len().ok_or(DropReason::BadOffload)?;
        let payload = Cursor::new(burst, frame).skip(u32::from(header_len));
        let left = frame.len.saturating_sub(u32::from(header_len));
        let pseudo = pseudo_of_large(&header, &headers, gso.kind);
        header.retag(retag);
        let headers = retag.headers(headers).ok_or(DropReason::BadOffload)?;
        let header_len = headers.headers_len().ok_or(DropReason::BadOffload)?;
        Ok(Self { header, headers, header_len, gso, pseudo, complete, payload, left, index: 0, ended: false })
    }

    /// True if there is no segment left.
    pub(super) fn ended(&self) -> bool {
        self.ended
    }

    /// Makes the next segment, its header in `slot`. There is at least one.
    pub(super) fn next(&mut self, slot: &mut [u8; SLOT]) -> Segmented<'b> {
        let len = self.left.min(u32::from(self.gso.size));
        let payload = self.payload.take(len);
        self.left -= len;
        self.ended = self.left == 0;

        self.header.copy_to(slot, usize::from(self.header_len));
        let bytes = &mut slot[..usize::from(self.header_len)];
        let l3 = usize::from(self.headers.l3_offset);
        let l4 = usize::from(self.headers.l4_offset);
        let l4_len = u32::from(self.header_len - self.headers.l4_offset) + len;
        if self.headers.l3 == L3::Ipv4 {
            // At most MAX_SEGMENTS, so nothing is lost.
            let ahead = u16::try_from(self.index).unwrap_or(u16::MAX);
            put16(bytes, l3 + 4, get16(bytes, l3 + 4).wrapping_add(ahead));
        }
        set_ip_len(bytes, &self.headers, u32::from(self.header_len - self.headers.l3_offset) + len);
        let offset = match self.gso.kind {
            GsoKind::Tcp4 | GsoKind::Tcp6 => {
                self.set_tcp(&mut bytes[l4..]);
                TCP_CHECKSUM
            }
            GsoKind::Udp => {
                put16(bytes, l4 + UDP_LENGTH, u16::try_from(l4_len).unwrap_or(u16::MAX));
                UDP_CHECKSUM
            }
        };
        let field = l4 + usize::from(offset);
        let pseudo = checksum::combine(self.pseudo, l4_len, false);
        let checksum = if self.complete {
            put16(bytes, field, 0);
            let header = checksum::sum(&bytes[l4..], pseudo);
            // Both transport headers are of even length.
            let sum = checksum::combine(header, payload.clone().sum(), false);
            let udp = self.gso.kind == GsoKind::Udp;
            put16(bytes, field, if udp { checksum::finish_udp(sum) } else { checksum::finish(sum) });
            Checksum::Valid
        } else {
            put16(bytes, field, checksum::fold(pseudo));
            Checksum::Partial { start: self.headers.l4_offset, offset }
        };
        self.payload = self.payload.skip(len);
        self.index += 1;
        Segmented { header_len: self.header_len, payload, offload: Offload { checksum, gso: None } }
    }

    fn set_tcp(&self, tcp: &mut [u8]) {
        let ahead = self.index.wrapping_mul(u32::from(self.gso.size));
        put(tcp, TCP_SEQUENCE, get32(tcp, TCP_SEQUENCE).wrapping_add(ahead).to_be_bytes());
        if !self.ended {
            tcp[TCP_FLAGS] &= !(tcp_flag::FIN | tcp_flag::PSH);
        }
        if self.index > 0 {
            tcp[TCP_FLAGS] &= !tcp_flag::CWR;
        }
    }
}

/// The pseudo-header's sum without its length.
///
/// It is taken from the addresses, not from what the sender left in the field, as not every sender counts the length
/// in. Only where a routing option or header may have put another destination into the pseudo-header the sender is
/// asked.
fn pseudo_of_large(header: &Header, headers: &Headers, kind: GsoKind) -> u32 {
    let bytes = header.bytes();
    let bare = match headers.l3 {
        L3::Ipv4 => ipv4_header_len(bytes, headers) == 20,
        _ => headers.l4_offset - headers.l3_offset == 40,
    };
    let (protocol, field) = match kind {
        GsoKind::Tcp4 | GsoKind::Tcp6 => (PROTOCOL_TCP, TCP_CHECKSUM),
        GsoKind::Udp => (PROTOCOL_UDP, UDP_CHECKSUM),
    };
    if bare {
        return pseudo_sum(bytes, headers, protocol);
    }
    let l4_len = header.frame_len().saturating_sub(u32::from(headers.l4_offset));
    let seed = get16(bytes, usize::from(headers.l4_offset + field));
    // Adding the complement subtracts.
    u32::from(seed) + u32::from(checksum::finish(l4_len))
}
