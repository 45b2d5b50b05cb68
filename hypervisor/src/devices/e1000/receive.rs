//! Frames into the receive ring (manual, section 3.2): address and VLAN filters, buffers, descriptors.

use vmq::memory::GuestMemory;

use super::registers::{RCTL_BAM, RCTL_BSEX, RCTL_LPE, RCTL_MPE, RCTL_SECRC, RCTL_UPE, RCTL_VFE};
use super::ring::{E1000Fault, Ring, write_buffer};

/// Bytes of the longest frame without [`RCTL_LPE`], without check sequence.
const ORDINARY: usize = 1518;

const STATUS_DD: u8 = 1;
const STATUS_EOP: u8 = 1 << 1;
const STATUS_IGNORE_SUMS: u8 = 1 << 2;
const STATUS_VLAN: u8 = 1 << 3;
const STATUS_TCP_SUM: u8 = 1 << 5;
const STATUS_IP_SUM: u8 = 1 << 6;

/// What the guest set up about receiving.
#[derive(Debug)]
pub struct Filters {
    /// `RCTL`.
    pub control: u32,
    /// Receive addresses, low and high halves in turn.
    pub addresses: [u32; 32],
    /// Hash table of groups.
    pub groups: [u32; 128],
    /// VLANs.
    pub vlans: [u32; 128],
    /// EtherType of tags.
    pub tag: u16,
    /// Tags are taken off.
    pub strip: bool,
}

/// Bit 31 of a receive address's high half: it counts.
const ADDRESS_VALID: u32 = 1 << 31;

impl Filters {
    /// True if the adapter takes `frame`.
    pub fn accepts(&self, frame: &[u8]) -> bool {
        let Some(destination) = frame.first_chunk::<6>() else { return false };
        if frame.len() > ORDINARY && self.control & RCTL_LPE == 0 {
            return false;
        }
        if self.control & RCTL_VFE != 0
            && let Some(vlan) = self.tag_of(frame).map(|tag| usize::from(tag & 0xfff))
            && self.vlans[vlan >> 5] >> (vlan & 31) & 1 == 0
        {
            return false;
        }
        if destination == &[0xff; 6] {
            return self.control & RCTL_BAM != 0 || self.in_groups(destination);
        }
        let everyone = if destination[0] & 1 != 0 { RCTL_MPE } else { RCTL_UPE };
        self.control & everyone != 0
            || self.is_own(destination)
            || destination[0] & 1 != 0 && self.in_groups(destination)
    }

    fn is_own(&self, destination: &[u8; 6]) -> bool {
        let [a, b, c, d, e, f] = *destination;
        let (low, high) = (u32::from_le_bytes([a, b, c, d]), u32::from(u16::from_le_bytes([e, f])));
        self.addresses
            .chunks_exact(2)
            .any(|pair| pair[1] & ADDRESS_VALID != 0 && pair[0] == low && pair[1] & 0xffff == high)
    }

    /// 12 bits of the address choose a bit of the table (manual, section 13.5.1).
    fn in_groups(&self, destination: &[u8; 6]) -> bool {
        const SHIFTS: [u32; 4] = [4, 3, 2, 0];
        let shift = SHIFTS[(self.control >> 12 & 3) as usize];
        let hash = u32::from(u16::from_le_bytes([destination[4], destination[5]])) >> shift & 0xfff;
        self.groups[(hash >> 5) as usize] >> (hash & 31) & 1 != 0
    }

    fn tag_of(&self, frame: &[u8]) -> Option<u16> {
        let bytes = frame.get(12..16)?;
        (bytes[..2] == self.tag.to_be_bytes()).then(|| u16::from_be_bytes([bytes[2], bytes[3]]))
    }

    /// Bytes of a receive buffer.
    pub fn buffer(&self) -> u32 {
        let size = 2048u32 >> (self.control >> 16 & 3);
        if self.control & RCTL_BSEX != 0 { size.saturating_mul(16) } else { size }
    }

    /// Descriptors below which the guest wants to be warned, out of `count`.
    pub fn few(&self, count: u32) -> u32 {
        count >> ((self.control >> 8 & 3) + 1)
    }
}

/// What became of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Received {
    /// It is in the ring.
    Stored,
    /// The guest does not want it.
    Filtered,
    /// Not enough descriptors.
    NoRoom,
}

/// Puts `frame` into the ring. `verified` says that its checksums are known to be right.
///
/// # Errors
/// The ring or a buffer is outside the guest's memory.
pub fn store(
    memory: &GuestMemory,
    ring: &mut Ring,
    filters: &Filters,
    frame: &mut Vec<u8>,
    verified: bool,
) -> Result<Received, E1000Fault> {
    if !filters.accepts(frame) {
        return Ok(Received::Filtered);
    }
    let mut status = if verified { STATUS_IP_SUM | STATUS_TCP_SUM } else { STATUS_IGNORE_SUMS };
    let tag = filters.tag_of(frame).filter(|_| filters.strip);
    if tag.is_some() {
        frame.drain(12..16);
        status |= STATUS_VLAN;
    }
    // On the wire nothing is shorter; the check sequence, which nobody looks at, is all zero.
    frame.resize(frame.len().max(60), 0);
    if filters.control & RCTL_SECRC == 0 {
        frame.extend([0; 4]);
    }
    let size = filters.buffer() as usize;
    let pieces = frame.chunks(size);
    if u32::try_from(pieces.len()).unwrap_or(u32::MAX) > ring.available() {
        return Ok(Received::NoRoom);
    }
    let last = pieces.len() - 1;
    for (at, piece) in pieces.enumerate() {
        let index = ring.head;
        let descriptor = ring.read(memory, index)?;
        let [a, b, c, d, e, f, g, h, ..] = descriptor;
        write_buffer(memory, u64::from_le_bytes([a, b, c, d, e, f, g, h]), piece)?;
        let end = if at == last { STATUS_EOP } else { 0 };
        // A buffer has at most 32 KiB.
        let [low, high] = u16::try_from(piece.len()).unwrap_or(u16::MAX).to_le_bytes();
        let [tag_low, tag_high] = tag.unwrap_or(0).to_le_bytes();
        // Length, checksum, status, errors, special; the status makes the descriptor the guest's, so it comes last.
        ring.write(memory, index, 8, &[low, high, 0, 0])?;
        ring.write(memory, index, 13, &[0, tag_low, tag_high])?;
        std::sync::atomic::fence(std::sync::atomic::Ordering::Release);
        ring.write(memory, index, 12, &[status | end | STATUS_DD])?;
        ring.head = ring.next(index);
    }
    Ok(Received::Stored)
}
