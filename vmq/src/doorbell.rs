//! Eventfds: a guest's doorbell (kick) and a guest's interrupt (call).

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};

/// An eventfd. Shared with a guest, so nothing about its counter is believed.
#[derive(Debug)]
pub struct Doorbell(OwnedFd);

/// A descriptor that is no eventfd was passed as one.
#[derive(Debug, thiserror::Error)]
#[error("the descriptor passed as a doorbell is {0}, not an eventfd")]
pub struct NotADoorbell(String);

impl Doorbell {
    /// A new eventfd.
    ///
    /// # Errors
    /// Out of descriptors or memory.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Takes a descriptor that a peer sent. Anything but an eventfd is refused, because a write to, say, a full pipe
    /// could block the worker.
    ///
    /// # Errors
    /// [`NotADoorbell`] says what it is instead.
    pub fn from_peer(fd: OwnedFd) -> Result<Self, NotADoorbell> {
        let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
        let kind = link.map_or_else(|error| error.to_string(), |path| path.display().to_string());
        if !kind.starts_with("anon_inode:[eventfd") {
            return Err(NotADoorbell(kind));
        }
        // A full counter must not block us either. (A failure leaves the flag as it is; eventfds do not fail here.)
        let _ = rustix::io::ioctl_fionbio(&fd, true);
        Ok(Self(fd))
    }

    /// Rings. A counter that is full already rings as well, so nothing is lost if the write fails.
    #[inline]
    pub fn ring(&self) {
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Takes the counter back to 0; true if it had been rung.
    pub fn clear(&self) -> bool {
        rustix::io::read(&self.0, &mut [0u8; 8]).is_ok()
    }

    /// Another handle to the same eventfd.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn try_clone(&self) -> std::io::Result<Self> {
        Ok(Self(self.0.try_clone()?))
    }
}

impl AsFd for Doorbell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
