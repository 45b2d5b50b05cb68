//! Eventfds: a guest's doorbell (kick) and a guest's interrupt (call).

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{EventfdFlags, eventfd};

mod watch;

/// An eventfd. Shared with a guest, so nothing about its counter is believed.
#[derive(Debug)]
pub struct Doorbell {
    fd: OwnedFd,
    /// See [`Doorbell::is_broken`].
    broken: AtomicBool,
}

/// A descriptor that is no eventfd was passed as one.
#[derive(Debug, thiserror::Error)]
#[error("the descriptor passed as a doorbell is {0}, not an eventfd")]
pub struct NotADoorbell(String);

impl NotADoorbell {
    /// What it is.
    pub fn kind(&self) -> &str {
        &self.0
    }
}

impl Doorbell {
    /// A new eventfd.
    ///
    /// # Errors
    /// Out of descriptors or memory.
    pub fn new() -> std::io::Result<Self> {
        Ok(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?.into())
    }

    /// Takes a descriptor that a peer sent. Anything but an eventfd is refused, because a write to, say, a full pipe
    /// could block the worker.
    ///
    /// # Errors
    /// [`NotADoorbell`] says what it is instead.
    pub fn from_peer(fd: OwnedFd) -> Result<Self, NotADoorbell> {
        Self::check(fd.as_fd())?;
        // A full counter must not make us wait either. The peer can undo this; then the watch helps.
        let _ = rustix::io::ioctl_fionbio(&fd, true);
        watch::start();
        Ok(fd.into())
    }

    /// Looks whether a descriptor is an eventfd.
    ///
    /// # Errors
    /// [`NotADoorbell`] says what it is instead.
    pub fn check(fd: BorrowedFd<'_>) -> Result<(), NotADoorbell> {
        let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
        let kind = link.map_or_else(|error| error.to_string(), |path| path.display().to_string());
        if kind.starts_with("anon_inode:[eventfd") { Ok(()) } else { Err(NotADoorbell(kind)) }
    }

    /// Rings. A counter that is full already rings as well, so nothing is lost if the write fails.
    ///
    /// A guest that clears `O_NONBLOCK` on its copy and fills the counter makes this wait for two rounds of the [`watch`];
    /// from then on its doorbell is dead ([`Doorbell::is_broken`]).
    #[inline]
    pub fn ring(&self) {
        if self.broken.load(Ordering::Relaxed) {
            return;
        }
        let written = watch::during(|| rustix::io::write(&self.fd, &1u64.to_ne_bytes()));
        // Only a write that waits is ever interrupted.
        if written == Err(rustix::io::Errno::INTR) {
            self.broken.store(true, Ordering::Relaxed);
        }
    }

    /// True if it made a ring wait. It is not rung any more, and whoever sent it should send no other: each costs its ringer
    /// two rounds of the watch.
    #[inline]
    pub fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Relaxed)
    }

    /// Takes the counter back to 0; true if it had been rung.
    pub fn clear(&self) -> bool {
        rustix::io::read(&self.fd, &mut [0u8; 8]).is_ok()
    }

    /// Another handle to the same eventfd.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn try_clone(&self) -> std::io::Result<Self> {
        Ok(self.fd.try_clone()?.into())
    }
}

impl From<OwnedFd> for Doorbell {
    fn from(fd: OwnedFd) -> Self {
        Self { fd, broken: AtomicBool::new(false) }
    }
}

impl AsFd for Doorbell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_doorbell_that_the_peer_made_blocking_delays_one_ring_and_is_dead_then() {
        let theirs = eventfd(0, EventfdFlags::empty()).unwrap();
        let ours = Doorbell::from_peer(theirs.try_clone().unwrap()).unwrap();
        rustix::io::ioctl_fionbio(&theirs, false).unwrap();
        rustix::io::write(&theirs, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        ours.ring();
        assert!(ours.is_broken());
        rustix::io::read(&theirs, &mut [0u8; 8]).unwrap();
        ours.ring();
        let mut fds = [rustix::event::PollFd::new(&theirs, rustix::event::PollFlags::IN)];
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        assert_eq!(rustix::event::poll(&mut fds, Some(&now)).unwrap(), 0, "a dead doorbell is not rung");
    }

    #[test]
    fn ring_comes_back_from_a_doorbell_that_the_peer_fills_again_whenever_it_has_room() {
        let theirs = eventfd(0, EventfdFlags::empty()).unwrap();
        let ours = Doorbell::from_peer(theirs.try_clone().unwrap()).unwrap();
        rustix::io::ioctl_fionbio(&theirs, false).unwrap();
        let fill = || rustix::io::write(&theirs, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        fill();
        std::thread::scope(|scope| {
            let writers: Vec<_> = (0..64).map(|_| scope.spawn(fill)).collect();
            std::thread::sleep(watch::ROUND);
            ours.ring();
            assert!(ours.is_broken());
            // One for each write.
            for _ in 0..=writers.len() {
                rustix::io::read(&theirs, &mut [0u8; 8]).unwrap();
            }
        });
    }

    #[test]
    fn ring_of_a_thread_that_waits_for_its_processor_is_heard_and_its_doorbell_lives() {
        let theirs = eventfd(0, EventfdFlags::empty()).unwrap();
        let ours = Doorbell::from_peer(theirs.try_clone().unwrap()).unwrap();
        let written = watch::during(|| {
            let written = rustix::io::write(&theirs, &1u64.to_ne_bytes());
            // Taken off its processor before it comes back from the kernel, for some looks of the watch.
            std::thread::sleep(5 * watch::ROUND);
            written
        });
        assert_eq!(written, Ok(8));
        assert!(ours.clear(), "the ring was swallowed");
    }

    #[test]
    fn descriptor_that_is_no_eventfd_is_refused() {
        let (_reader, writer) = std::io::pipe().unwrap();
        assert!(Doorbell::from_peer(writer.into()).is_err());
        let ours = Doorbell::new().unwrap();
        let theirs = Doorbell::from_peer(ours.as_fd().try_clone_to_owned().unwrap()).unwrap();
        theirs.ring();
        assert!(ours.clear());
        assert!(!ours.clear());
    }
}
