//! Which device answers an I/O port or an address.

#![forbid(unsafe_code)]

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// A device that a guest reads and writes. Offsets are from the start of the range it was placed at; data has 1, 2, 4 or 8 bytes.
pub trait BusDevice: Send {
    /// Fills `data`.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Takes `data`.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// A device's interrupt line.
pub trait InterruptLine: Send + Sync + fmt::Debug {
    /// Sets its level.
    fn set(&self, high: bool);
}

/// A device that is placed on a bus.
pub type Shared = Arc<Mutex<dyn BusDevice>>;

/// Two devices at one address: a mistake of this program.
#[derive(Debug, thiserror::Error)]
#[error("device range {0:#x}..{1:#x} overlaps another")]
pub struct Overlap(u64, u64);

/// Devices by address. Filled before the guest runs, then only read.
#[derive(Default)]
pub struct Bus {
    devices: Vec<(Range<u64>, Shared)>,
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.devices.iter().map(|(range, _)| range)).finish()
    }
}

impl Bus {
    /// Places a device.
    ///
    /// # Errors
    /// [`Overlap`] if another one is there.
    pub fn place(&mut self, range: Range<u64>, device: Shared) -> Result<(), Overlap> {
        let at = self.devices.partition_point(|(other, _)| other.start < range.start);
        let before = at.checked_sub(1).and_then(|before| self.devices.get(before));
        let free = before.is_none_or(|(other, _)| other.end <= range.start)
            && self.devices.get(at).is_none_or(|(other, _)| range.end <= other.start);
        if !free || range.is_empty() {
            return Err(Overlap(range.start, range.end));
        }
        self.devices.insert(at, (range, device));
        Ok(())
    }

    fn find(&self, address: u64, len: usize) -> Option<(&Shared, u64)> {
        let at = self.devices.partition_point(|(range, _)| range.start <= address).checked_sub(1)?;
        let (range, device) = self.devices.get(at)?;
        let inside = address - range.start;
        (address < range.end && len as u64 <= range.end - address).then_some((device, inside))
    }

    /// A guest reads. Where nothing is, all bits are one.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((device, offset)) = self.find(address, data.len()) {
            device.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
        }
    }

    /// A guest writes. Where nothing is, nothing happens.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.find(address, data.len()) {
            device.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Cells([u8; 8]);

    impl BusDevice for Cells {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            let start = usize::try_from(offset).unwrap();
            data.copy_from_slice(&self.0[start..start + data.len()]);
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            let start = usize::try_from(offset).unwrap();
            self.0[start..start + data.len()].copy_from_slice(data);
        }
    }

    fn cells() -> Shared {
        Arc::new(Mutex::new(Cells::default()))
    }

    #[test]
    fn access_reaches_the_device_at_its_address_and_nothing_elsewhere() {
        let mut bus = Bus::default();
        bus.place(0x10..0x18, cells()).unwrap();
        bus.place(0x18..0x20, cells()).unwrap();
        bus.write(0x14, &[1, 2]);
        bus.write(0x18, &[3]);
        let mut data = [0; 4];
        bus.read(0x14, &mut data);
        assert_eq!(data, [1, 2, 0, 0]);
        for address in [0xf, 0x20, 0x16, 0x1e, u64::MAX] {
            bus.read(address, &mut data);
            assert_eq!(data, [0xff; 4], "{address:#x}");
            bus.write(address, &data);
        }
    }

    #[test]
    fn overlapping_devices_are_refused() {
        let mut bus = Bus::default();
        bus.place(0x10..0x18, cells()).unwrap();
        for range in [0x10..0x18, 0x17..0x19, 0x8..0x11, 0x8..0x20, 0x12..0x13, 0x20..0x20] {
            assert!(bus.place(range.clone(), cells()).is_err(), "{range:?}");
        }
        bus.place(0x8..0x10, cells()).unwrap();
    }
}
