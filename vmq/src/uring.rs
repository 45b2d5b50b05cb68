//! Frames in batches from and to the kernel: a [`Reader`] and a [`Writer`] over a descriptor that carries one frame a
//! system call, each behind a virtio-net header (a TAP queue or a packet socket).
//!
//! Both perform a batch of reads or writes in one `io_uring_enter` and return when all of it is done, so that nothing is
//! ever in flight between two calls, and memory may be lent to a batch as to any system call. That works because no
//! operation waits: each is marked as non-blocking (`RWF_NOWAIT`, `MSG_DONTWAIT`), so it completes while it is submitted,
//! in order, with `EAGAIN` at worst. Where io_uring is not to be had (seccomp, `kernel.io_uring_disabled`), and for a
//! batch of one, plain system calls with the same marks do the same. `O_NONBLOCK` alone would not do: it belongs to the open
//! file, and whoever shares that can take it back.
//!
//! Linked operations would stop a batch of reads at the first `EAGAIN`, but a read that fills less than its buffer breaks
//! a link too, and every read here does. Instead the size of a batch follows what the last one found: an idle queue
//! costs one system call, a trickling one seldom two, a full one is read up to 64 at a time.

// UNSAFETY: hands pointers into buffers, bursts and message headers to the kernel.
#![allow(unsafe_code)]
#![expect(clippy::cast_possible_truncation, reason = "constants, and lengths below 128 KiB")]

mod reader;
mod writer;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::{IoUring, squeue};

pub use reader::{Link, Reader, Received};
pub use writer::Writer;

/// Most operations in one batch.
pub const BATCH: usize = 64;

/// How frames are moved. The defaults are what measured best (`cargo run --example tap_relay` in `vswitch`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tuning {
    /// Use io_uring if the kernel has it.
    pub uring: bool,
    /// Most frames of one batch, up to [`BATCH`].
    pub frames: usize,
    /// Bytes that one batch reads, about: the buffers are to stay in the second-level cache.
    pub bytes: usize,
}

impl Default for Tuning {
    fn default() -> Self {
        Self { uring: true, frames: BATCH, bytes: 256 << 10 }
    }
}

/// An io_uring with one descriptor, for batches that complete while they are submitted.
struct Ring(IoUring);

/// The ring did not do what was asked; it is not to be used again.
struct Broken;

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Ring")
    }
}

impl Ring {
    /// `None` if the kernel has no io_uring for us.
    fn new(fd: BorrowedFd<'_>) -> Option<Self> {
        let entries = u32::try_from(BATCH).ok()?;
        // Whichever worker holds the queue uses the ring, so there is no single issuer.
        let ring = IoUring::builder().setup_coop_taskrun().build(entries).or_else(|_| IoUring::new(entries));
        let ring = ring.and_then(|ring| {
            ring.submitter().register_files(&[fd.as_raw_fd()])?;
            Ok(ring)
        });
        ring.inspect_err(|error| tracing::debug!(%error, "no io_uring; plain system calls are used"))
            .ok()
            .map(Self)
    }

    /// Performs `operations`, at most [`BATCH`], and stores the result of each.
    ///
    /// # Errors
    /// [`Broken`]: some of them may not have been performed; their results are left as they were.
    ///
    /// # Safety
    /// The operations must be non-blocking ones, and all they point to must be valid until the call returns.
    unsafe fn run(&mut self, operations: &mut [squeue::Entry], results: &mut [i32]) -> Result<(), Broken> {
        for (at, operation) in (0..).zip(&mut *operations) {
            operation.set_user_data(at);
        }
        // SAFETY: the caller's promise; nothing is left in flight below.
        unsafe { self.0.submission().push_multiple(operations) }.map_err(|_| Broken)?;
        let mut done = 0;
        while done < operations.len() {
            let outcome = self.0.submit_and_wait(operations.len() - done);
            done += self.reap(results);
            if let Err(error) = outcome
                && error.raw_os_error() != Some(libc::EINTR)
            {
                tracing::debug!(%error, "io_uring failed; plain system calls are used");
                // What the kernel has taken completes without our help, what it has not it never will take.
                let taken = operations.len() - self.0.submission().len();
                while done < taken {
                    std::thread::yield_now();
                    done += self.reap(results);
                }
                return Err(Broken);
            }
        }
        Ok(())
    }

    fn reap(&mut self, results: &mut [i32]) -> usize {
        let mut count = 0;
        for completion in self.0.completion() {
            count += 1;
            if let Some(result) =
                usize::try_from(completion.user_data()).ok().and_then(|at| results.get_mut(at))
            {
                *result = completion.result();
            }
        }
        count
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // At once, not when the kernel gets to it: a TAP queue is busy as long as it is registered.
        let _ = self.0.submitter().unregister_files();
    }
}

/// The result of a system call as io_uring tells it: a count, or an error number below 0.
fn outcome(result: libc::c_long) -> i32 {
    if result < 0 {
        return -io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
    }
    i32::try_from(result).unwrap_or(i32::MAX)
}

/// Ends of a call that mean "not now".
fn is_later(error: i32) -> bool {
    matches!(-error, libc::EAGAIN | libc::EINTR)
}
