//! Frames from a device into the switch.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::io::Errno;
use vmq::frame::{Accepts, Burst, Checksum, Offload};
use vmq::memory::Segment;
use vmq::os::packet;
use vmq::uring::{Link, Reader};
use vmq::worker::Wait;

use super::DeviceError;
use crate::drops::DropReason;
use crate::ports::vnet;
use crate::tally::Tally;

/// Bytes of an 802.1Q tag.
const TAG: u16 = 4;

/// A queue of a device that frames come from.
#[derive(Debug)]
pub struct DeviceSource {
    device: Arc<str>,
    link: Link,
    reader: Reader,
}

impl DeviceSource {
    pub(super) fn new(device: Arc<str>, link: Link, reader: Reader) -> Self {
        Self { device, link, reader }
    }

    /// The device's name.
    pub fn device(&self) -> &Arc<str> {
        &self.device
    }

    /// Takes up to a burst of frames. They lie in the source's own buffers until it is used again.
    ///
    /// # Errors
    /// [`DeviceError::Gone`] if the device was deleted. A device that is merely down is silent.
    pub fn receive<'m>(&'m mut self, burst: &mut Burst<'m>, tally: &mut Tally) -> Result<(), DeviceError> {
        if let Err(error) = self.reader.read(burst.room()) {
            return self.judge(error);
        }
        let refused = self.reader.take_refused();
        if refused > 0 {
            tally.drop_many(DropReason::BadHeader, refused);
        }
        let lost = self.reader.take_lost();
        if lost > 0 {
            tally.drop_many(DropReason::DeviceOverrun, lost);
        }
        for received in self.reader.frames() {
            if received.truncated {
                tally.drop(DropReason::Malformed);
                continue;
            }
            let Ok(mut offload) = vnet::parse(vnet::Words::from_bytes(received.header), Accepts::all())
            else {
                tally.drop(DropReason::BadHeader);
                continue;
            };
            if received.retagged {
                skip_tag(&mut offload);
            }
            if !burst.push(Segment::from(received.bytes), offload) {
                tally.drop(DropReason::Malformed);
            }
        }
        Ok(())
    }

    /// The burst is done with. (The kernel took its buffers back when they were read.)
    pub fn complete(&mut self) {}

    /// What to sleep on.
    pub fn arm(&mut self) -> Wait {
        let fd = Arc::clone(self.reader.fd());
        Wait::Readable(fd)
    }

    /// Whether an error of a read is the end of the device.
    #[cold]
    fn judge(&self, source: io::Error) -> Result<(), DeviceError> {
        let device = Arc::clone(&self.device);
        match (self.link, Errno::from_io_error(&source)) {
            (Link::Tap, Some(Errno::BADFD | Errno::NODEV))
            | (Link::Socket, Some(Errno::NODEV | Errno::CONNRESET | Errno::PIPE)) => {
                Err(DeviceError::Gone { device })
            }
            // Told once when the device goes down, and when it goes away.
            (Link::Packet, Some(Errno::NETDOWN | Errno::NODEV | Errno::NXIO)) => {
                if packet::is_bound(self.reader.fd().as_fd()) {
                    Ok(())
                } else {
                    Err(DeviceError::Gone { device })
                }
            }
            // Short of memory for a moment.
            (_, Some(Errno::NOMEM | Errno::NOBUFS)) => Ok(()),
            _ => Err(DeviceError::Receive { device, source }),
        }
    }
}

/// The kernel counted without the tag that was put back behind the addresses.
fn skip_tag(offload: &mut Offload) {
    if let Checksum::Partial { start, .. } = &mut offload.checksum {
        *start = start.saturating_add(TAG);
    }
}
