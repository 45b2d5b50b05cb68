//! Frames into the kernel, straight from the sender's memory.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use arrayvec::ArrayVec;
use io_uring::{opcode, squeue, types};

use super::{BATCH, Link, Ring, Tuning, outcome};
use crate::frame::{Burst, FRAME_SEGMENTS, Frame, HEAD_BYTES};

/// Bytes of the longest virtio-net header.
const HEADER: usize = 12;

/// Pieces of one batch. A frame has up to 1 + [`FRAME_SEGMENTS`] of them, well below the kernel's limit of 1024.
const PIECES: usize = 1024;
const _: () = assert!(FRAME_SEGMENTS < PIECES);

/// Header and head of a frame, next to each other.
type Front = [u8; HEADER + HEAD_BYTES];

/// Writes frames in batches. A frame is gathered by the kernel: its header and head from a copy of our own, its tail from
/// where the sender has it.
#[derive(Debug)]
pub struct Writer {
    fd: Arc<OwnedFd>,
    link: Link,
    ring: Option<Ring>,
    tuning: Tuning,
    fronts: Box<[Front; BATCH]>,
    pieces: Pieces,
    results: [i32; BATCH],
    /// Plain writes may say that they are not to wait.
    nowait: bool,
}

#[derive(Debug)]
struct Pieces(Vec<libc::iovec>);

// SAFETY: the pointers are set before each use, and mean nothing between.
unsafe impl Send for Pieces {}
// SAFETY: a shared reference gives no access to what the pointers lead to.
unsafe impl Sync for Pieces {}

impl Writer {
    /// A writer to `fd`, which must be of the kind that `link` says.
    pub fn new(fd: Arc<OwnedFd>, link: Link, tuning: Tuning) -> Self {
        let ring = if tuning.uring { Ring::new(fd.as_fd()) } else { None };
        let (fronts, pieces) = (Box::new([[0; _]; BATCH]), Pieces(Vec::with_capacity(PIECES)));
        Self { fd, link, ring, tuning, fronts, pieces, results: [0; BATCH], nowait: true }
    }

    /// The descriptor.
    pub fn fd(&self) -> &Arc<OwnedFd> {
        &self.fd
    }

    /// Writes the first frames of those that `list` names, as many as fit a batch, each behind what `header` says (of
    /// which a packet socket gets the first 10 bytes). Returns a result for each frame tried, at least one unless `list`
    /// is empty: not negative, or an error number below 0.
    pub fn write(
        &mut self,
        burst: &Burst<'_>,
        list: &[u8],
        header: impl Fn(&Frame) -> [u8; HEADER],
    ) -> &[i32] {
        let begin = HEADER - self.link.header();
        let mut ranges = ArrayVec::<(usize, usize), BATCH>::new();
        self.pieces.0.clear();
        let frames = burst.frames();
        let limit = self.tuning.frames.clamp(1, BATCH);
        for (&index, front) in list.iter().zip(self.fronts.iter_mut()).take(limit) {
            // An index that names no frame becomes an empty write, which the kernel refuses.
            let frame = frames.get(usize::from(index));
            let tail = frame.map_or(&[][..], |frame| burst.tail(frame));
            let first = self.pieces.0.len();
            if first + 1 + tail.len() > PIECES {
                break;
            }
            let mut len = 0;
            if let Some(frame) = frame {
                front[begin..HEADER].copy_from_slice(&header(frame)[..HEADER - begin]);
                front[HEADER..].copy_from_slice(&frame.head);
                len = HEADER - begin + frame.head_len();
            }
            let base = front[begin..].as_mut_ptr().cast();
            self.pieces.0.push(libc::iovec { iov_base: base, iov_len: len });
            self.pieces.0.extend(tail.iter().map(|segment| libc::iovec {
                iov_base: segment.as_ptr().cast_mut().cast(),
                iov_len: segment.len() as usize,
            }));
            ranges.push((first, self.pieces.0.len()));
        }
        self.results = [-libc::EAGAIN; BATCH];
        self.perform(&ranges);
        &self.results[..ranges.len()]
    }

    fn perform(&mut self, ranges: &[(usize, usize)]) {
        if ranges.len() > 1
            && let Some(ring) = &mut self.ring
        {
            let mut operations: ArrayVec<squeue::Entry, BATCH> =
                ranges.iter().map(|range| operation(&self.pieces.0[range.0..range.1])).collect();
            // SAFETY: the pieces lead into `fronts` and into the burst, both borrowed until the call is over; the kernel
            // reads them only, and reports an address that is not mapped; writes with RWF_NOWAIT do not wait.
            let done = unsafe { ring.run(&mut operations, &mut self.results) };
            if done.is_ok() && self.results[0] != -libc::EOPNOTSUPP {
                return;
            }
            self.ring = None;
            if done.is_err() {
                // What was not performed still says EAGAIN and is not tried again: it might have been.
                return;
            }
        }
        for (range, result) in ranges.iter().zip(&mut self.results) {
            let (fd, pieces) = (self.fd.as_raw_fd(), &self.pieces.0[range.0..range.1]);
            // SAFETY: as above, for one frame. An offset of -1 is where the file stands; on 64 bits it is the first of two words.
            let write = |flags: libc::c_int| unsafe {
                let offset: [libc::c_long; 2] = [-1, 0];
                let (pieces, count) = (pieces.as_ptr(), pieces.len());
                outcome(libc::syscall(libc::SYS_pwritev2, fd, pieces, count, offset[0], offset[1], flags))
            };
            *result = if self.nowait { write(libc::RWF_NOWAIT) } else { -libc::EOPNOTSUPP };
            if *result == -libc::EOPNOTSUPP {
                self.nowait = false;
                *result = write(0);
            }
        }
    }
}

/// The write of one frame.
fn operation(pieces: &[libc::iovec]) -> squeue::Entry {
    let fd = types::Fixed(0);
    match pieces {
        // A small frame: no vector to be read by the kernel.
        [piece] => opcode::Write::new(fd, piece.iov_base.cast_const().cast(), piece.iov_len as u32)
            .rw_flags(libc::RWF_NOWAIT)
            .build(),
        _ => opcode::Writev::new(fd, pieces.as_ptr(), pieces.len() as u32).rw_flags(libc::RWF_NOWAIT).build(),
    }
}
