//! A channel as the guest sees it.

use std::sync::atomic::Ordering;

use vmbus::pages::SharedWord;
use vmbus::ring::{self, GuestIncoming, GuestOutgoing, Packet, PacketBuffer, PacketHeader, WriteError};

use super::VscError;
use super::vmm::{Vmm, Wires};

/// Pages of each ring.
pub(super) const RING_PAGES: u32 = 128;

/// An open channel.
#[derive(Debug)]
pub(super) struct Channel {
    pub(super) gpadl: u32,
    incoming: GuestIncoming,
    outgoing: GuestOutgoing,
    wires: Wires,
    flags: SharedWord,
    buffer: PacketBuffer,
}

impl Channel {
    /// Opens channel number `index`.
    pub(super) fn open(vmm: &mut Vmm, index: u16) -> Result<Self, VscError> {
        let pfns = vmm.allocate(2 * u64::from(RING_PAGES))?;
        let (gpadl, pages) = vmm.grant(&pfns)?;
        let (to_host, to_guest) = (pages.pages(0, RING_PAGES), pages.pages(RING_PAGES, RING_PAGES));
        if !ring::clear(&to_host) || !ring::clear(&to_guest) {
            return Err(VscError::OutOfMemory);
        }
        let outgoing = GuestOutgoing::new(&to_host, true)?;
        let incoming = GuestIncoming::new(&to_guest, true)?;
        let wires = vmm.open(index, gpadl, RING_PAGES)?;
        let flags = vmm.memory().word(wires.flags_gpa).ok_or(VscError::OutOfMemory)?;
        Ok(Self { gpadl, incoming, outgoing, wires, flags, buffer: PacketBuffer::new() })
    }

    /// Puts a packet into the ring. False if it is full.
    pub(super) fn write(&mut self, header: &PacketHeader<'_>, payload: &[u8]) -> Result<bool, VscError> {
        match self.outgoing.write(header, &[payload]) {
            Ok(()) => Ok(true),
            Err(WriteError::Full) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Shows the switch what was written.
    pub(super) fn publish(&mut self) {
        if self.outgoing.publish() {
            self.wires.doorbell.ring();
        }
    }

    /// Rings the doorbell, whether there is anything or not.
    #[cfg(test)]
    pub(super) fn ring(&self) {
        self.wires.doorbell.ring();
    }

    /// Takes the interrupt, as the guest's handler does.
    pub(super) fn acknowledge(&mut self) {
        self.flags.fetch_and(!self.wires.mask, Ordering::SeqCst);
        self.wires.interrupt.clear();
    }

    /// The next packet.
    pub(super) fn next(&mut self) -> Result<Option<Packet<'_>>, VscError> {
        Ok(self.incoming.next(&mut self.buffer)?)
    }

    /// Gives the switch the room of what was read.
    pub(super) fn commit(&mut self) {
        if self.incoming.commit() {
            self.wires.doorbell.ring();
        }
    }

    /// Asks for interrupts; true if there is something to read already.
    pub(super) fn arm(&mut self) -> bool {
        self.incoming.arm()
    }

    /// Polls from now on.
    pub(super) fn disarm(&mut self) {
        self.incoming.disarm();
    }

    /// What becomes readable with an interrupt.
    pub(super) fn interrupt(&self) -> &vmq::doorbell::Doorbell {
        &self.wires.interrupt
    }
}
