//! The hand-over of open channels from the process that runs a guest (the VMM) to the one that serves them (the switch).
//!
//! The VMM speaks VMBus with the guest and keeps what it knows; the switch gets the guest's memory, the pages of GPADLs,
//! and for each open channel an eventfd for either direction. From then on frames and signals go between guest and
//! switch alone. A switch that comes back is told everything again and goes on where the rings stand.
//!
//! The crate's README describes the protocol so that any VMM can speak it; [`FromVmm`] and [`FromSwitch`] are its messages.

mod connection;
#[doc(hidden)]
pub mod fuzz;
mod wire;

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use vmq::memory::{GuestMemory, Mapping, MappingError, Region, RegionError};

pub use connection::{Connection, HandoverError, Listener, SwitchConnection, VmmConnection, pair};
pub use wire::{Message, MessageError};

use crate::channel::InterruptTarget;
use crate::guid::Guid;

/// Version of the protocol, in [`FromVmm::Hello`].
pub const VERSION: u32 = 1;

/// Bytes of the memfd in which the switch keeps what it must remember of a device over its own restart.
pub const STATE_BYTES: usize = 1 << 20;

/// Regions in one [`FromVmm::Memory`].
pub const MAX_REGIONS: usize = 64;

/// Bytes of a guest's memory, offsets in its file included: no VMM is to use up the switch's address space.
pub const MAX_MEMORY: usize = 4 << 40;

/// Bytes of a device's name, and of a fault's reason.
pub const MAX_TEXT: usize = 1024;

/// What the VMM tells the switch.
#[derive(Debug)]
pub enum FromVmm {
    /// The first message.
    Hello {
        /// [`VERSION`]; a switch that does not speak it closes the connection.
        version: u32,
    },
    /// The guest's memory, once, before any device.
    Memory {
        /// Where the file's parts lie in the guest.
        regions: Vec<MemoryRegion>,
        /// The file.
        fd: OwnedFd,
    },
    /// A device whose channels the switch is to serve.
    Device {
        /// Chosen by the VMM; names the device in all other messages.
        device: u32,
        /// Its type.
        interface: Guid,
        /// Which of its type.
        instance: Guid,
        /// What the operator calls it.
        name: String,
        /// A memfd of [`STATE_BYTES`], zeroed when the device was made; the switch's own.
        state: OwnedFd,
        /// A switch has served the device before, and `state` is what it left.
        resumed: bool,
    },
    /// The guest grants memory. Answer: [`FromSwitch::GpadlAccepted`].
    Gpadl {
        /// Of which device.
        device: u32,
        /// The guest's handle.
        gpadl: u32,
        /// Bytes.
        byte_count: u32,
        /// Where they start in the first page.
        byte_offset: u32,
        /// Guest page numbers.
        pfns: Vec<u64>,
    },
    /// The guest takes memory back. Answer: [`FromSwitch::GpadlReleased`], once nothing touches it any more.
    GpadlTeardown {
        /// Of which device.
        device: u32,
        /// The guest's handle.
        gpadl: u32,
    },
    /// The guest opens a channel. Answer: [`FromSwitch::Opened`].
    Open {
        /// Of which device.
        device: u32,
        /// 0 is the primary channel, others are subchannels.
        index: u16,
        /// The channel's id between VMM and guest.
        relid: u32,
        /// The GPADL with both rings.
        gpadl: u32,
        /// The page of it where the host-to-guest ring starts.
        downstream_page: u32,
        /// The processor that is interrupted.
        vp: u32,
        /// How it is interrupted.
        target: InterruptTarget,
        /// Eventfd that the guest's signals write.
        doorbell: OwnedFd,
        /// The guest knows the channel to be open: a switch has served it before.
        resumed: bool,
    },
    /// The guest closes a channel. Answer: [`FromSwitch::Closed`], once nothing touches its rings any more.
    Close {
        /// Of which device.
        device: u32,
        /// Which channel.
        index: u16,
    },
    /// A channel's interrupts go elsewhere. Answer: [`FromSwitch::Retargeted`].
    Retarget {
        /// Of which device.
        device: u32,
        /// Which channel.
        index: u16,
        /// The processor that is interrupted.
        vp: u32,
        /// How it is interrupted.
        target: InterruptTarget,
    },
    /// The device is about to be taken from the guest. Answer: [`FromSwitch::Quiet`], once the guest neither sends nor has
    /// anything under way; it may never come.
    Quiesce {
        /// Which.
        device: u32,
    },
    /// The device is no more, nor are its channels and GPADLs. No answer.
    Gone {
        /// Which.
        device: u32,
    },
    /// Everything that was there when the switch connected has been told. No answer.
    Ready,
}

/// What the switch tells the VMM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FromSwitch {
    /// Answers [`FromVmm::Open`].
    Opened {
        /// Of which device.
        device: u32,
        /// Which channel.
        index: u16,
        /// False: the guest is to be told that it cannot be opened.
        ok: bool,
    },
    /// Answers [`FromVmm::Close`].
    Closed {
        /// Of which device.
        device: u32,
        /// Which channel.
        index: u16,
    },
    /// Answers [`FromVmm::Gpadl`].
    GpadlAccepted {
        /// Of which device.
        device: u32,
        /// The guest's handle.
        gpadl: u32,
        /// False: the guest is to be told that it failed.
        ok: bool,
    },
    /// Answers [`FromVmm::GpadlTeardown`].
    GpadlReleased {
        /// Of which device.
        device: u32,
        /// The guest's handle.
        gpadl: u32,
    },
    /// Answers [`FromVmm::Quiesce`].
    Quiet {
        /// Which device.
        device: u32,
    },
    /// Answers [`FromVmm::Retarget`]: no interrupt goes to the old place any more.
    Retargeted {
        /// Of which device.
        device: u32,
        /// Which channel.
        index: u16,
    },
    /// The guest asked the device for subchannels; the VMM offers them.
    OfferSubchannels {
        /// Of which device.
        device: u32,
        /// How many, besides the primary.
        count: u16,
    },
    /// The guest did what no guest may; the device stays silent until it is closed.
    Fault {
        /// Which device.
        device: u32,
        /// For the operator.
        reason: String,
    },
}

/// Part of a guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryRegion {
    /// First guest-physical address.
    pub gpa: u64,
    /// Bytes.
    pub len: u64,
    /// Where it starts in the file.
    pub offset: u64,
}

/// Why a guest's memory cannot be mapped.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A region's end exceeds 2^64.
    #[error("region at {0:#x} of the file exceeds the address space")]
    OutOfBounds(u64),
    /// More than [`MAX_MEMORY`].
    #[error("guest memory of {0} bytes, at most {MAX_MEMORY} are mapped")]
    TooLarge(usize),
    /// The file cannot be mapped.
    #[error(transparent)]
    Mapping(#[from] MappingError),
    /// The regions make no sense.
    #[error(transparent)]
    Region(#[from] RegionError),
}

/// Maps a guest's memory as [`FromVmm::Memory`] describes it.
///
/// # Errors
/// The file is too short, is not in memory, or the regions make no sense.
pub fn map_memory(regions: &[MemoryRegion], fd: BorrowedFd<'_>) -> Result<Arc<GuestMemory>, MemoryError> {
    let mut len = 0;
    for region in regions {
        let end = region.offset.checked_add(region.len).and_then(|end| usize::try_from(end).ok());
        len = len.max(end.ok_or(MemoryError::OutOfBounds(region.offset))?);
    }
    if len > MAX_MEMORY {
        return Err(MemoryError::TooLarge(len));
    }
    let mapping = Arc::new(Mapping::from_peer(fd, 0, len)?);
    let region = |it: &MemoryRegion| Region::new(it.gpa, it.gpa, it.len, Arc::clone(&mapping), it.offset);
    let regions = regions.iter().map(region).collect::<Result<Vec<_>, _>>()?;
    Ok(Arc::new(GuestMemory::new(regions, None)?))
}

#[cfg(test)]
mod tests;
