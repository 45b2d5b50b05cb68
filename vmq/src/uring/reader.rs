//! Frames out of the kernel.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use arrayvec::ArrayVec;
use io_uring::{opcode, squeue, types};
use rustix::io::{Errno, ReadWriteFlags};

use super::{BATCH, Ring, Tuning, is_later, outcome};
use crate::frame::MAX_FRAME;
use crate::os::{packet, tap};

/// What kind of descriptor carries the frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// A TAP queue prepared by [`tap::prepare`].
    Tap,
    /// A packet socket opened with [`packet::Flags::header`].
    Packet,
    /// A connected socket of sequenced packets, each a frame behind a header as a TAP queue's.
    Socket,
}

impl Link {
    /// Bytes of the virtio-net header before each frame.
    pub fn header(self) -> usize {
        match self {
            Self::Tap | Self::Socket => tap::HEADER,
            Self::Packet => packet::HEADER,
        }
    }
}

/// Where a frame begins in its slot: a line boundary, behind room for the header and a tag.
const HEADROOM: usize = 64;

/// Bytes of a slot. Not a multiple of 4096, so that the beginnings of the slots do not compete for the same few lines
/// of a cache. Only pages that frames reach into are ever touched.
const SLOT: usize = HEADROOM + 65_600;
const _: () = assert!(MAX_FRAME < 65_600);

/// Bytes of an 802.1Q tag.
const TAG: usize = 4;

/// Bytes of the two addresses that a tag follows.
const ADDRESSES: usize = 12;

/// A frame that was read.
#[derive(Debug, Clone, Copy)]
pub struct Received<'a> {
    /// The virtio-net header, without `num_buffers`.
    pub header: [u8; packet::HEADER],
    /// The frame, as far as it was received.
    pub bytes: &'a [u8],
    /// The end of the frame is missing.
    pub truncated: bool,
    /// The kernel had taken a VLAN tag off, which was put back: offsets in the header count without it.
    pub retagged: bool,
}

#[derive(Debug, Clone, Copy)]
struct Meta {
    header: [u8; packet::HEADER],
    /// Where the frame lies, in this slot from the slot's beginning.
    slot: usize,
    start: usize,
    end: usize,
    truncated: bool,
    retagged: bool,
}

/// Reads frames in batches into buffers of its own.
#[derive(Debug)]
pub struct Reader {
    fd: Arc<OwnedFd>,
    link: Link,
    ring: Option<Ring>,
    tuning: Tuning,
    slots: Box<[u8]>,
    messages: Messages,
    metas: ArrayVec<Meta, BATCH>,
    /// Frames to ask for next time.
    want: usize,
    /// An error that came with frames before it.
    pending: Option<i32>,
    refused: usize,
    lost: usize,
    /// Plain reads may say that they are not to wait.
    nowait: bool,
}

impl Reader {
    /// A reader of `fd`, which must be of the kind that `link` says.
    pub fn new(fd: Arc<OwnedFd>, link: Link, tuning: Tuning) -> Self {
        let ring = if tuning.uring { Ring::new(fd.as_fd()) } else { None };
        let messages =
            Messages(if link == Link::Packet { vec![Message::default(); BATCH] } else { Vec::new() });
        // Zeroed memory of this size is mapped, not written.
        let slots = vec![0; SLOT * BATCH].into_boxed_slice();
        let metas = ArrayVec::new();
        let (want, pending, refused, lost, nowait) = (1, None, 0, 0, true);
        Self { fd, link, ring, tuning, slots, messages, metas, want, pending, refused, lost, nowait }
    }

    /// The descriptor, to wait on.
    pub fn fd(&self) -> &Arc<OwnedFd> {
        &self.fd
    }

    /// True if batches go through io_uring.
    pub fn has_ring(&self) -> bool {
        self.ring.is_some()
    }

    /// Reads what is there, up to a batch or `limit` frames; they are [`Reader::frames`] until the next call.
    ///
    /// # Errors
    /// The descriptor's, such as `EBADFD` for a TAP device that was deleted. Frames read before it come first.
    pub fn read(&mut self, limit: usize) -> io::Result<()> {
        self.metas.clear();
        if let Some(error) = self.pending.take() {
            return Err(io::Error::from_raw_os_error(-error));
        }
        let asked = self.want.min(limit);
        let mut results = [-libc::EAGAIN; BATCH];
        let results = &mut results[..asked.min(BATCH)];
        self.perform(results);
        let bytes = self.take(results);
        if self.link == Link::Packet && asked > 1 && self.metas.len() == asked {
            // A socket that has lost frames was full: reading what is left fills a batch or more.
            self.lost += packet::take_lost(self.fd.as_fd());
        }
        self.want = next_want(&self.tuning, asked, self.metas.len(), bytes);
        match self.pending {
            Some(error) if self.metas.is_empty() => {
                self.pending = None;
                Err(io::Error::from_raw_os_error(-error))
            }
            _ => Ok(()),
        }
    }

    /// The frames of the last batch.
    pub fn frames(&self) -> impl ExactSizeIterator<Item = Received<'_>> {
        self.metas.iter().map(|meta| Received {
            header: meta.header,
            bytes: self
                .slots
                .get(meta.slot * SLOT..)
                .and_then(|s| s.get(meta.start..meta.end))
                .unwrap_or(&[]),
            truncated: meta.truncated,
            retagged: meta.retagged,
        })
    }

    /// Frames that the kernel threw away since the last call, because a virtio-net header cannot describe them.
    pub fn take_refused(&mut self) -> usize {
        std::mem::take(&mut self.refused)
    }

    /// Frames that found a packet socket full since the last call.
    pub fn take_lost(&mut self) -> usize {
        std::mem::take(&mut self.lost)
    }

    fn perform(&mut self, results: &mut [i32]) {
        if results.len() > 1
            && let Some(ring) = &mut self.ring
        {
            let (begin, fd) = (HEADROOM - self.link.header(), types::Fixed(0));
            let rooms = self.slots.chunks_exact_mut(SLOT).map(|slot| &mut slot[begin..]).take(results.len());
            let mut operations: ArrayVec<squeue::Entry, BATCH> = match self.link {
                Link::Packet => {
                    let receive = |(message, room): (&mut Message, _)| {
                        message.prepare(room);
                        let receive = opcode::RecvMsg::new(fd, &raw mut message.header);
                        receive.flags(libc::MSG_DONTWAIT as u32).build()
                    };
                    self.messages.0.iter_mut().zip(rooms).map(receive).collect()
                }
                Link::Tap | Link::Socket => {
                    // At most SLOT bytes.
                    let read = |room: &mut [u8]| opcode::Read::new(fd, room.as_mut_ptr(), room.len() as u32);
                    rooms.map(|room| read(room).rw_flags(libc::RWF_NOWAIT).build()).collect()
                }
            };
            // SAFETY: messages and slots are ours, borrowed exclusively until the call is over; the operations do not wait.
            let done = unsafe { ring.run(&mut operations, results) };
            self.check_ring(done.is_err(), results);
            return;
        }
        for (at, result) in results.iter_mut().enumerate() {
            *result = self.read_one(at);
            if *result < 0 {
                return;
            }
        }
    }

    /// Reads one frame into slot `at` by a plain system call. Not the C library's, which is a cancellation point and makes
    /// an idle poll dearer by a fifth.
    fn read_one(&mut self, at: usize) -> i32 {
        let room = &mut self.slots[at * SLOT..(at + 1) * SLOT][HEADROOM - self.link.header()..];
        if let Some(message) = self.messages.0.get_mut(at) {
            message.prepare(room);
            let header = &raw mut message.header;
            // SAFETY: the message was prepared just now and points to a slot and to itself.
            return outcome(unsafe {
                libc::syscall(libc::SYS_recvmsg, self.fd.as_raw_fd(), header, libc::MSG_DONTWAIT)
            });
        }
        let mut read = Err(Errno::OPNOTSUPP);
        if self.nowait {
            // `u64::MAX`: where the file stands.
            let mut rooms = [io::IoSliceMut::new(room)];
            read = rustix::io::preadv2(&self.fd, &mut rooms, u64::MAX, ReadWriteFlags::NOWAIT);
            self.nowait = read != Err(Errno::OPNOTSUPP);
        }
        if !self.nowait {
            read = rustix::io::read(&self.fd, room);
        }
        read.map_or_else(|error| -error.raw_os_error(), |len| len as i32)
    }

    /// Does without io_uring from now on if it failed, or the driver cannot tell whether it would wait.
    fn check_ring(&mut self, broken: bool, results: &[i32]) {
        if broken || results.first() == Some(&-libc::EOPNOTSUPP) {
            self.ring = None;
        }
    }

    /// Notes which slots hold frames; their bytes in all.
    fn take(&mut self, results: &[i32]) -> usize {
        let header_len = self.link.header();
        let mut bytes = 0;
        for (at, &result) in results.iter().enumerate() {
            let slot = &mut self.slots[at * SLOT..(at + 1) * SLOT];
            let Some(len) = usize::try_from(result).ok().and_then(|len| len.checked_sub(header_len)) else {
                match -result {
                    libc::EOPNOTSUPP => {}
                    // The other end was closed.
                    0 if self.link == Link::Socket => self.pending = Some(-libc::ENODEV),
                    libc::EINVAL if self.link == Link::Packet => self.refused += 1,
                    _ if result >= 0 || is_later(result) => {}
                    _ => self.pending = Some(result),
                }
                continue;
            };
            let end = (HEADROOM + len).min(SLOT);
            let mut header = [0; packet::HEADER];
            header.copy_from_slice(&slot[HEADROOM - header_len..][..packet::HEADER]);
            let mut meta =
                Meta { header, slot: at, start: HEADROOM, end, truncated: end == SLOT, retagged: false };
            if let Some(message) = self.messages.0.get(at) {
                meta.truncated |= message.header.msg_flags & libc::MSG_TRUNC != 0;
                if let Some(tag) = message.tag()
                    && len >= ADDRESSES
                {
                    meta.start -= TAG;
                    meta.retagged = true;
                    slot.copy_within(HEADROOM..HEADROOM + ADDRESSES, meta.start);
                    slot[meta.start + ADDRESSES..][..TAG].copy_from_slice(&tag);
                }
            }
            bytes += len;
            self.metas.push(meta);
        }
        bytes
    }
}

/// How many frames to ask for, after `asked` gave `got` with `bytes` in all.
fn next_want(tuning: &Tuning, asked: usize, got: usize, bytes: usize) -> usize {
    let want = if got == asked { asked * 2 } else { got };
    let fit = tuning.bytes.saturating_mul(got).checked_div(bytes).unwrap_or(BATCH);
    want.min(fit).min(tuning.frames).clamp(1, BATCH)
}

/// Control data: one `cmsghdr` with a `tpacket_auxdata`, and room to spare.
const CONTROL: usize = 64;

/// What `recvmsg` needs for one frame.
#[derive(Debug, Clone, Copy)]
struct Message {
    header: libc::msghdr,
    room: libc::iovec,
    control: [u64; CONTROL / 8],
}

#[derive(Debug)]
struct Messages(Vec<Message>);

// SAFETY: the pointers in a message are set by `prepare` before each use, and mean nothing between.
unsafe impl Send for Messages {}
// SAFETY: a shared reference gives no access to what the pointers lead to.
unsafe impl Sync for Messages {}

impl Default for Message {
    fn default() -> Self {
        // SAFETY: all-zero is a valid `msghdr`.
        let header = unsafe { std::mem::zeroed() };
        let room = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        Self { header, room, control: [0; CONTROL / 8] }
    }
}

impl Message {
    fn prepare(&mut self, room: &mut [u8]) {
        self.room = libc::iovec { iov_base: room.as_mut_ptr().cast(), iov_len: room.len() };
        self.control = [0; CONTROL / 8];
        self.header.msg_iov = &raw mut self.room;
        self.header.msg_iovlen = 1;
        self.header.msg_control = (&raw mut self.control).cast();
        self.header.msg_controllen = CONTROL;
        self.header.msg_flags = 0;
    }

    /// The VLAN tag that the kernel took off the frame, as it stood in it.
    fn tag(&self) -> Option<[u8; TAG]> {
        let mut bytes = [0; CONTROL];
        for (bytes, word) in bytes.chunks_exact_mut(8).zip(&self.control) {
            bytes.copy_from_slice(&word.to_ne_bytes());
        }
        parse_auxdata(&bytes)
    }
}

/// `struct cmsghdr` (length, level, type) followed by `struct tpacket_auxdata` (status, three lengths and offsets, then
/// tag control information and tag protocol).
fn parse_auxdata(control: &[u8; CONTROL]) -> Option<[u8; TAG]> {
    let word =
        |at: usize| u32::from_ne_bytes([control[at], control[at + 1], control[at + 2], control[at + 3]]);
    let half = |at: usize| u16::from_ne_bytes([control[at], control[at + 1]]);
    const LEVEL: u32 = libc::SOL_PACKET as u32;
    const AUXDATA: u32 = libc::PACKET_AUXDATA as u32;
    let status = word(16);
    if word(8) != LEVEL || word(12) != AUXDATA || status & libc::TP_STATUS_VLAN_VALID == 0 {
        return None;
    }
    let known = status & libc::TP_STATUS_VLAN_TPID_VALID != 0;
    let protocol = if known { half(34) } else { libc::ETH_P_8021Q as u16 };
    let ([a, b], [c, d]) = (protocol.to_be_bytes(), half(32).to_be_bytes());
    Some([a, b, c, d])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batch_grows_on_a_full_queue_and_shrinks_on_an_idle_one() {
        let tuning = Tuning { uring: true, frames: 32, bytes: 256 << 10 };
        let mut want = 1;
        for _ in 0..6 {
            want = next_want(&tuning, want, want, want * 64);
        }
        assert_eq!(want, 32);
        assert_eq!(next_want(&tuning, 32, 5, 320), 5);
        assert_eq!(next_want(&tuning, 32, 0, 0), 1);
        assert_eq!(next_want(&tuning, 8, 8, 8 * 65_536), 4);
    }

    #[test]
    fn tag_in_control_data_is_found() {
        let mut control = [0; CONTROL];
        control[8..12].copy_from_slice(&263u32.to_ne_bytes());
        control[12..16].copy_from_slice(&8u32.to_ne_bytes());
        assert_eq!(parse_auxdata(&control), None);
        control[16..20].copy_from_slice(&0x51u32.to_ne_bytes());
        control[32..34].copy_from_slice(&0x600au16.to_ne_bytes());
        control[34..36].copy_from_slice(&0x88a8u16.to_ne_bytes());
        assert_eq!(parse_auxdata(&control), Some([0x88, 0xa8, 0x60, 0x0a]));
        control[16..20].copy_from_slice(&0x11u32.to_ne_bytes());
        assert_eq!(parse_auxdata(&control), Some([0x81, 0x00, 0x60, 0x0a]));
    }
}
