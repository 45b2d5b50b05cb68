//! The driver under a TCP/IP stack.

use smoltcp::phy::{Checksum, ChecksumCapabilities, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;

use super::{Guest, Transmit};

/// A guest's adapter as a device of smoltcp.
#[derive(Debug)]
pub(crate) struct Adapter {
    pub(crate) guest: Guest,
    pub(crate) mtu: usize,
    /// It takes coalesced segments.
    pub(crate) trusting: bool,
    /// Sent on this channel.
    pub(crate) queue: usize,
}

/// A frame that came.
pub(crate) struct Arrived(Vec<u8>);

impl RxToken for Arrived {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, take: F) -> R {
        take(&self.0)
    }
}

/// Room for a frame to be sent.
pub(crate) struct Sending<'g>(&'g mut Adapter);

impl TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, fill: F) -> R {
        let mut frame = vec![0; len];
        let result = fill(&mut frame);
        let transmit = Transmit { queue: self.0.queue, ..Transmit::default() };
        // A full ring loses the frame, as a wire would.
        let _ = self.0.guest.send(&frame, &transmit).unwrap();
        self.0.guest.flush();
        result
    }
}

impl Device for Adapter {
    type RxToken<'a> = Arrived;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Arrived, Sending<'_>)> {
        if self.guest.waiting() == 0 {
            self.guest.poll().unwrap();
        }
        let received = self.guest.receive()?;
        Some((Arrived(received.frame), Sending(self)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Sending<'_>> {
        Some(Sending(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = self.mtu + 14;
        capabilities.checksum = ChecksumCapabilities::default();
        // A guest with RSC trusts the host's word: what never left the host may have no checksum yet.
        capabilities.checksum.tcp = if self.trusting { Checksum::Tx } else { Checksum::Both };
        capabilities
    }
}
