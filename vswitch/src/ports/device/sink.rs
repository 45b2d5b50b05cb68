//! Frames from the switch to a device.

use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::io::Errno;
use vmq::frame::{Accepts, Burst};
use vmq::os::packet;
use vmq::uring::{Link, Writer};

use super::DeviceError;
use crate::drops::DropReason;
use crate::ports::vnet;
use crate::tally::Tally;

/// A queue of a device that frames go to.
#[derive(Debug)]
pub struct DeviceSink {
    device: Arc<str>,
    link: Link,
    accepts: Accepts,
    writer: Writer,
}

impl DeviceSink {
    pub(super) fn new(device: Arc<str>, link: Link, accepts: Accepts, writer: Writer) -> Self {
        Self { device, link, accepts, writer }
    }

    /// The device's name.
    pub fn device(&self) -> &Arc<str> {
        &self.device
    }

    /// What the kernel takes on, and does itself if the device cannot.
    pub fn accepts(&self) -> Accepts {
        self.accepts
    }

    /// Hands the frames of `list` to the device, straight from the sender's memory.
    ///
    /// Frames that it does not take are counted: [`DropReason::QueueFull`] if there is no room,
    /// [`DropReason::NotReady`] if the device is down, [`DropReason::EgressMtu`] if it says so, and
    /// [`DropReason::DeviceError`] otherwise.
    ///
    /// # Errors
    /// [`DeviceError::Gone`] if the device was deleted.
    pub fn put(&mut self, burst: &Burst<'_>, mut list: &[u8], tally: &mut Tally) -> Result<(), DeviceError> {
        let accepts = self.accepts;
        let mut gone = false;
        while !list.is_empty() && !gone {
            let results =
                self.writer.write(burst, list, |frame| vnet::emit(&frame.offload, accepts, 1).bytes());
            let (tried, rest) = list.split_at(results.len().min(list.len()));
            for (&index, &result) in tried.iter().zip(results) {
                if result >= 0 {
                    tally.moved(burst.frames().get(usize::from(index)).map_or(0, |frame| frame.len));
                    continue;
                }
                let reason = reason(Errno::from_raw_os_error(result.wrapping_neg()));
                gone |= reason == DropReason::Faulted;
                tally.drop(reason);
            }
            list = rest;
        }
        if !gone {
            return Ok(());
        }
        tally.drop_many(DropReason::Faulted, list.len());
        if self.link == Link::Packet && packet::is_bound(self.writer.fd().as_fd()) {
            return Ok(());
        }
        Err(DeviceError::Gone { device: Arc::clone(&self.device) })
    }
}

/// What an error of a write means for the frame; [`DropReason::Faulted`] if the device seems to be gone.
#[cold]
fn reason(error: Errno) -> DropReason {
    match error {
        Errno::AGAIN | Errno::NOBUFS | Errno::NOMEM => DropReason::QueueFull,
        Errno::IO | Errno::NETDOWN => DropReason::NotReady,
        Errno::MSGSIZE => DropReason::EgressMtu,
        Errno::BADFD | Errno::NODEV | Errno::NXIO | Errno::PIPE | Errno::CONNRESET => DropReason::Faulted,
        _ => DropReason::DeviceError,
    }
}
