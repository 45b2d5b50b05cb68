//! A descriptor ring in guest memory (manual, sections 3.2 and 3.4): 16 bytes a descriptor, head and tail by index.

use vmq::memory::GuestMemory;

/// Bytes of a descriptor.
pub const DESCRIPTOR: u32 = 16;

/// What a guest did to a ring, or put into a descriptor, that cannot be served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum E1000Fault {
    /// Memory that the guest does not have.
    #[error("{what} at guest address {address:#x} is outside the guest's memory")]
    Outside {
        /// Descriptor or buffer.
        what: &'static str,
        /// Where.
        address: u64,
    },
    /// A frame that does not end.
    #[error("frame to be sent exceeds {limit} bytes")]
    TooLong {
        /// Bytes at most.
        limit: usize,
    },
}

/// The registers of a ring.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Ring {
    /// Guest-physical address, a multiple of 16.
    pub base: u64,
    /// Bytes, a multiple of 128.
    pub bytes: u32,
    /// Next descriptor of the device.
    pub head: u32,
    /// First descriptor that is not the device's.
    pub tail: u32,
}

impl Ring {
    /// Descriptors.
    pub fn count(&self) -> u32 {
        self.bytes / DESCRIPTOR
    }

    /// Descriptors that are the device's.
    pub fn available(&self) -> u32 {
        let count = self.count();
        // A guest may write any index.
        if self.head >= count || self.tail >= count {
            return 0;
        }
        if self.tail >= self.head { self.tail - self.head } else { count - self.head + self.tail }
    }

    /// Where descriptor `index` is.
    fn address(&self, index: u32) -> Option<u64> {
        self.base.checked_add(u64::from(index) * u64::from(DESCRIPTOR))
    }

    /// A private copy of descriptor `index`.
    pub fn read(&self, memory: &GuestMemory, index: u32) -> Result<[u8; 16], E1000Fault> {
        let outside = E1000Fault::Outside { what: "descriptor", address: self.base };
        let segment = self.address(index).and_then(|at| memory.segment(at, DESCRIPTOR)).ok_or(outside)?;
        segment.read().ok_or(outside)
    }

    /// Writes `bytes` at `offset` of descriptor `index`.
    pub fn write(
        &self,
        memory: &GuestMemory,
        index: u32,
        offset: u32,
        bytes: &[u8],
    ) -> Result<(), E1000Fault> {
        let outside = E1000Fault::Outside { what: "descriptor", address: self.base };
        let room = self.address(index).and_then(|at| memory.room(at, DESCRIPTOR)).ok_or(outside)?;
        room.skip(offset).write(bytes);
        Ok(())
    }

    /// The descriptor after `index`.
    pub fn next(&self, index: u32) -> u32 {
        if index + 1 >= self.count() { 0 } else { index + 1 }
    }
}

/// Appends `len` bytes at `address` to `into`.
pub fn read_buffer(
    memory: &GuestMemory,
    address: u64,
    len: u32,
    into: &mut Vec<u8>,
) -> Result<(), E1000Fault> {
    let outside = E1000Fault::Outside { what: "buffer", address };
    let inside = memory.pieces(address, len, |at, len| {
        if let Some(segment) = memory.segment(at, len) {
            let begin = into.len();
            into.resize(begin + len as usize, 0);
            segment.read_into(&mut into[begin..]);
        }
    });
    if inside { Ok(()) } else { Err(outside) }
}

/// Writes `bytes` at `address`.
pub fn write_buffer(memory: &GuestMemory, address: u64, mut bytes: &[u8]) -> Result<(), E1000Fault> {
    let outside = E1000Fault::Outside { what: "buffer", address };
    let len = u32::try_from(bytes.len()).map_err(|_| outside)?;
    let inside = memory.pieces(address, len, |at, len| {
        let (now, rest) = bytes.split_at((len as usize).min(bytes.len()));
        if let Some(room) = memory.room(at, len) {
            room.write(now);
        }
        bytes = rest;
    });
    if inside { Ok(()) } else { Err(outside) }
}
