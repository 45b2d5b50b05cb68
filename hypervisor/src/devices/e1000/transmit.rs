//! Frames out of the transmit ring (manual, section 3.3): legacy, context and data descriptors.
//!
//! A frame is gathered once into a buffer of the adapter's and handed over behind a virtio-net header. Segmentation is
//! not done here: the header says what the context said, and the switch passes the frame whole to who takes it.

use super::ring::{E1000Fault, Ring, read_buffer};
use vmq::memory::{GuestMemory, Segment};

/// Bytes of the virtio-net header before each frame (`struct virtio_net_hdr_v1`).
pub const VNET: usize = 12;

/// Bytes of the longest frame: 64 KiB of IP behind Ethernet and a tag.
pub const LONGEST: usize = 65_535 + 18;

/// Descriptors taken at one go, so that a guest cannot hold the adapter for ever.
const TURN: u32 = 256;

const CMD_EOP: u8 = 1;
const CMD_IC: u8 = 1 << 2;
const CMD_RS: u8 = 1 << 3;
const CMD_DEXT: u8 = 1 << 5;
const CMD_VLE: u8 = 1 << 6;
/// In data and context descriptors bit 2 is "segment".
const CMD_TSE: u8 = 1 << 2;
const STATUS_DD: u8 = 1;
const POPTS_IXSM: u8 = 1;
const POPTS_TXSM: u8 = 1 << 1;
const TUCMD_TCP: u8 = 1;
const TUCMD_IPV4: u8 = 1 << 1;

/// What the last context descriptor said. Offsets count from the frame's first byte.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Context {
    ip_start: u8,
    ip_sum: u8,
    ip_end: u16,
    transport_start: u8,
    transport_sum: u8,
    header: u8,
    mss: u16,
    tcp: bool,
    ipv4: bool,
}

impl Context {
    /// Reads a context descriptor (manual, section 3.3.6).
    fn parse(d: &[u8; 16]) -> Self {
        let command = d[11];
        Self {
            ip_start: d[0],
            ip_sum: d[1],
            ip_end: u16::from_le_bytes([d[2], d[3]]),
            transport_start: d[4],
            transport_sum: d[5],
            header: d[13],
            mss: u16::from_le_bytes([d[14], d[15]]),
            tcp: command & TUCMD_TCP != 0,
            ipv4: command & TUCMD_IPV4 != 0,
        }
    }
}

/// The frame being gathered.
#[derive(Debug, Default)]
struct Frame {
    /// Virtio-net header, then the frame.
    bytes: Vec<u8>,
    segment: bool,
    options: u8,
    /// Checksum of a legacy descriptor: start and place.
    legacy: Option<(u8, u8)>,
    begun: bool,
}

/// What one turn of the transmitter did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Turn {
    /// Descriptors were written back.
    pub reported: bool,
    /// Segmentation contexts used.
    pub segmentations: u32,
    /// What is left to do.
    pub backlog: Backlog,
}

/// What a turn left.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Backlog {
    /// Nothing.
    #[default]
    None,
    /// More descriptors than a turn takes.
    More,
    /// A frame that is not taken now: its receiver is congested.
    Blocked,
}

/// The transmitter's state between descriptors.
#[derive(Debug, Default)]
pub struct Transmitter {
    context: Context,
    frame: Frame,
    /// The frame is complete, and was not taken.
    waiting: bool,
}

impl Transmitter {
    /// Takes what the guest gave from `ring`; each frame goes to `send`, behind its virtio-net header. A frame that `send`
    /// does not take (false) is kept for the next turn, and the ring is left alone until then.
    ///
    /// `tag` is the EtherType of tags to be put on, while the guest wants that.
    ///
    /// # Errors
    /// The ring or a buffer is outside the guest's memory, or a frame does not end.
    pub fn run(
        &mut self,
        memory: &GuestMemory,
        ring: &mut Ring,
        tag: Option<u16>,
        send: &mut dyn FnMut(&[u8]) -> bool,
    ) -> Result<Turn, E1000Fault> {
        let mut turn = Turn::default();
        self.waiting = self.waiting && !send(&self.frame.bytes);
        for _ in 0..ring.available().min(TURN) {
            if self.waiting {
                break;
            }
            let index = ring.head;
            let descriptor = ring.read(memory, index)?;
            let command = descriptor[11];
            if command & CMD_DEXT != 0 && descriptor[10] >> 4 == 0 {
                self.context = Context::parse(&descriptor);
            } else {
                self.take(memory, &descriptor)?;
                if command & CMD_EOP != 0 {
                    let special = u16::from_le_bytes([descriptor[14], descriptor[15]]);
                    let tag = tag.filter(|_| command & CMD_VLE != 0).map(|kind| (kind, special));
                    self.finish(tag, &mut turn, send);
                }
            }
            if command & CMD_RS != 0 {
                ring.write(memory, index, 12, &[descriptor[12] | STATUS_DD])?;
                turn.reported = true;
            }
            ring.head = ring.next(index);
        }
        turn.backlog = match self.waiting {
            true => Backlog::Blocked,
            false if ring.available() > 0 => Backlog::More,
            false => Backlog::None,
        };
        Ok(turn)
    }

    /// Adds the bytes of a legacy or data descriptor.
    fn take(&mut self, memory: &GuestMemory, d: &[u8; 16]) -> Result<(), E1000Fault> {
        let [a, b, c, e, f, g, h, i, ..] = *d;
        let address = u64::from_le_bytes([a, b, c, e, f, g, h, i]);
        let extended = d[11] & CMD_DEXT != 0;
        let len = if extended {
            u32::from_le_bytes([d[8], d[9], d[10], 0]) & 0xf_ffff
        } else {
            u16::from_le_bytes([d[8], d[9]]).into()
        };
        let frame = &mut self.frame;
        if !frame.begun {
            frame.begun = true;
            frame.bytes.clear();
            frame.bytes.resize(VNET, 0);
            // Options count in the first descriptor of a frame.
            (frame.segment, frame.options) =
                if extended { (d[11] & CMD_TSE != 0, d[13]) } else { (false, 0) };
        }
        frame.legacy = (!extended && d[11] & CMD_IC != 0).then_some((d[13], d[10]));
        if frame.bytes.len() + len as usize > VNET + LONGEST {
            *frame = Frame::default();
            return Err(E1000Fault::TooLong { limit: LONGEST });
        }
        read_buffer(memory, address, len, &mut frame.bytes)
    }

    fn finish(&mut self, tag: Option<(u16, u16)>, turn: &mut Turn, send: &mut dyn FnMut(&[u8]) -> bool) {
        let context = self.context;
        let frame = &mut self.frame;
        frame.begun = false;
        let done = if frame.segment { segment(frame, &context) } else { checksums(frame, &context) };
        match (done, tag) {
            // What makes no sense is the switch's to drop and to count, with a reason: a checksum beyond the frame.
            (None, _) => partial(&mut frame.bytes, u16::MAX, u16::MAX),
            (Some(()), Some((kind, control))) if frame.bytes.len() >= VNET + 14 => {
                insert_tag(&mut frame.bytes, kind, control);
            }
            _ => {}
        }
        turn.segmentations += u32::from(done.is_some() && frame.segment);
        self.waiting = !send(&frame.bytes);
    }
}

/// Fills in or hands on the checksums that the frame's descriptors ask for. `None` if they lie outside the frame.
fn checksums(frame: &mut Frame, context: &Context) -> Option<()> {
    if frame.options & POPTS_IXSM != 0 {
        ip_checksum(&mut frame.bytes[VNET..], context)?;
    }
    let wanted = match frame.legacy {
        Some(places) => Some(places),
        None => (frame.options & POPTS_TXSM != 0).then_some((context.transport_start, context.transport_sum)),
    };
    let Some((start, place)) = wanted else { return Some(()) };
    let offset = place.checked_sub(start)?;
    if VNET + usize::from(place) + 2 > frame.bytes.len() {
        return None;
    }
    partial(&mut frame.bytes, start.into(), offset.into());
    Some(())
}

/// Says in the virtio-net header that the checksum is to be completed.
fn partial(bytes: &mut [u8], start: u16, offset: u16) {
    bytes[0] = 1;
    bytes[6..8].copy_from_slice(&start.to_le_bytes());
    bytes[8..10].copy_from_slice(&offset.to_le_bytes());
}

fn ip_checksum(frame: &mut [u8], context: &Context) -> Option<()> {
    let (start, place) = (usize::from(context.ip_start), usize::from(context.ip_sum));
    let end = usize::from(context.ip_end).checked_add(1)?;
    if place < start || place + 2 > end {
        return None;
    }
    frame.get(start..end)?;
    frame[place..place + 2].fill(0);
    let value = !Segment::from(&frame[start..end]).sum();
    frame[place..place + 2].copy_from_slice(&value.to_be_bytes());
    Some(())
}

/// Makes a frame to be segmented one that the switch understands: lengths and pseudo-header sum as in a frame that long
/// (drivers leave the length out of both), kind and size of the segments in the header.
fn segment(frame: &mut Frame, context: &Context) -> Option<()> {
    let bytes = &mut frame.bytes;
    let ip = VNET + usize::from(context.ip_start);
    let transport = VNET + usize::from(context.transport_start);
    let place = VNET + usize::from(context.transport_sum);
    let header = VNET + usize::from(context.header);
    let fits = ip + 20 <= transport && transport + 20 <= header && place + 2 <= header && place >= transport;
    if !fits || header > bytes.len() || context.mss == 0 || !context.tcp {
        return None;
    }
    if header == bytes.len() {
        // Nothing but a header: nothing to be cut.
        return checksums(frame, context);
    }
    let below = u16::try_from(bytes.len() - transport).ok()?;
    let kind = if context.ipv4 {
        let total = u16::try_from(bytes.len() - ip).ok()?;
        bytes[ip + 2..ip + 4].copy_from_slice(&total.to_be_bytes());
        ip_checksum(&mut bytes[VNET..], context)?;
        1
    } else {
        let payload = u16::try_from((bytes.len() - ip).checked_sub(40)?).ok()?;
        bytes[ip + 4..ip + 6].copy_from_slice(&payload.to_be_bytes());
        4
    };
    let mut pseudo = [0; 4];
    pseudo[..2].copy_from_slice(&bytes[place..place + 2]);
    pseudo[2..].copy_from_slice(&below.to_be_bytes());
    bytes[place..place + 2].copy_from_slice(&Segment::from(&pseudo[..]).sum().to_be_bytes());
    if bytes.len() - header > usize::from(context.mss) {
        bytes[1] = kind;
        bytes[2..4].copy_from_slice(&u16::from(context.header).to_le_bytes());
        bytes[4..6].copy_from_slice(&context.mss.to_le_bytes());
        // CWR goes with the first segment only (RFC 3168).
        if bytes[transport + 13] & 0x80 != 0 {
            bytes[1] |= 0x80;
        }
    }
    let start = context.transport_start;
    partial(bytes, start.into(), (context.transport_sum - start).into());
    Some(())
}

/// Puts an 802.1Q tag behind the addresses, and moves the offsets of the header behind it.
fn insert_tag(bytes: &mut Vec<u8>, kind: u16, control: u16) {
    let [a, b] = kind.to_be_bytes();
    let [c, d] = control.to_be_bytes();
    bytes.splice(VNET + 12..VNET + 12, [a, b, c, d]);
    if bytes[0] & 1 != 0 {
        let start = u16::from_le_bytes([bytes[6], bytes[7]]).saturating_add(4);
        bytes[6..8].copy_from_slice(&start.to_le_bytes());
    }
    if bytes[1] != 0 {
        let header = u16::from_le_bytes([bytes[2], bytes[3]]).saturating_add(4);
        bytes[2..4].copy_from_slice(&header.to_le_bytes());
    }
}
