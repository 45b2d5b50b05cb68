//! A PCI root with one bus: just enough for an emulated adapter. Configuration through ports 0xcf8 and 0xcfc (PCI Local
//! Bus 3.0, section 3.2.2.3), memory BARs inside one window, interrupts by pin through fixed lines.

pub mod aml;

use std::sync::{Mutex, PoisonError};

use super::bus::BusDevice;

/// First port of the configuration mechanism; it has 8.
pub const CONFIG_PORTS: u16 = 0xcf8;

/// Slots of the bus; slot 0 is the host bridge.
pub const SLOTS: usize = 32;

/// BARs of a function.
const BARS: usize = 6;

/// What identifies a function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Base class, subclass, interface: 24 bits.
    pub class: u32,
    /// Revision.
    pub revision: u8,
    /// Subsystem vendor and device.
    pub subsystem: (u16, u16),
}

/// A function in a slot.
pub trait PciFunction: Send {
    /// Who it is.
    fn identity(&self) -> Identity;
    /// Bytes of its memory BARs, each a power of two of at least 16; 0 for none.
    fn bars(&self) -> [u32; BARS];
    /// Reads `data.len()` bytes at `offset` of memory BAR `bar`.
    fn read(&self, bar: usize, offset: u32, data: &mut [u8]);
    /// Writes `data` at `offset` of memory BAR `bar`.
    fn write(&self, bar: usize, offset: u32, data: &[u8]);
    /// The guest allowed or forbade the function to reach memory.
    fn set_master(&self, on: bool);
    /// The guest allowed or forbade the function to interrupt by its pin.
    fn set_interrupts(&self, on: bool);
    /// The function has something to interrupt for, whether that is allowed or not.
    fn interrupts(&self) -> bool;
}

/// Command register bits a guest may set: memory space, bus master, interrupt disable.
const COMMAND_MASK: u16 = COMMAND_MEMORY | COMMAND_MASTER | COMMAND_NO_INTERRUPTS;
const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_MASTER: u16 = 1 << 2;
const COMMAND_NO_INTERRUPTS: u16 = 1 << 10;

/// Status register, in the upper half of the dword: an interrupt is pending. Drivers that mask by the command register look here.
const STATUS_INTERRUPT: u32 = 1 << (16 + 3);

struct Slot {
    function: Box<dyn PciFunction>,
    command: u16,
    bars: [u32; BARS],
    line: u8,
}

impl Slot {
    fn sizes(&self) -> [u32; BARS] {
        self.function.bars()
    }

    /// The dword at `register` (a multiple of 4) of the configuration header.
    fn config(&self, register: u8) -> u32 {
        let id = self.function.identity();
        match register {
            0x00 => u32::from(id.device) << 16 | u32::from(id.vendor),
            0x04 if self.function.interrupts() => STATUS_INTERRUPT | u32::from(self.command),
            0x04 => u32::from(self.command),
            0x08 => id.class << 8 | u32::from(id.revision),
            0x10..=0x24 => self.bars[usize::from((register - 0x10) / 4)],
            0x2c => u32::from(id.subsystem.1) << 16 | u32::from(id.subsystem.0),
            // Pin A where there is anything to be interrupted for.
            0x3c if self.sizes() != [0; BARS] => 1 << 8 | u32::from(self.line),
            _ => 0,
        }
    }

    fn set_config(&mut self, register: u8, value: u32, mask: u32) {
        let value = self.config(register) & !mask | value & mask;
        match register {
            0x04 => {
                let [low, high, ..] = value.to_le_bytes();
                let before = self.command;
                self.command = u16::from_le_bytes([low, high]) & COMMAND_MASK;
                let changed = before ^ self.command;
                if changed & COMMAND_MASTER != 0 {
                    self.function.set_master(self.command & COMMAND_MASTER != 0);
                }
                if changed & COMMAND_NO_INTERRUPTS != 0 {
                    self.function.set_interrupts(self.command & COMMAND_NO_INTERRUPTS == 0);
                }
            }
            0x10..=0x24 => {
                let bar = usize::from((register - 0x10) / 4);
                let size = self.sizes()[bar];
                // Bits below the size read as zero: that is how a guest learns it.
                self.bars[bar] = if size == 0 { 0 } else { value & !(size - 1) };
            }
            0x3c => self.line = value.to_le_bytes()[0],
            _ => {}
        }
    }

    /// The BAR that covers `address`, and the offset in it.
    fn decode(&self, address: u64, len: usize) -> Option<(usize, u32)> {
        if self.command & COMMAND_MEMORY == 0 {
            return None;
        }
        self.bars.iter().zip(self.sizes()).enumerate().find_map(|(bar, (&base, size))| {
            let offset = u32::try_from(address.checked_sub(u64::from(base))?).ok()?;
            let end = offset.checked_add(u32::try_from(len).ok()?)?;
            (size != 0 && base != 0 && end <= size).then_some((bar, offset))
        })
    }
}

/// The host bridge: a function without anything.
struct HostBridge;

impl PciFunction for HostBridge {
    fn identity(&self) -> Identity {
        // Intel 440FX, which every guest knows and none drives.
        Identity { vendor: 0x8086, device: 0x1237, class: 0x06_00_00, revision: 2, subsystem: (0, 0) }
    }

    fn bars(&self) -> [u32; BARS] {
        [0; BARS]
    }

    fn read(&self, _: usize, _: u32, _: &mut [u8]) {}
    fn write(&self, _: usize, _: u32, _: &[u8]) {}
    fn set_master(&self, _: bool) {}
    fn set_interrupts(&self, _: bool) {}
    fn interrupts(&self) -> bool {
        false
    }
}

struct Bus {
    address: u32,
    slots: [Option<Slot>; SLOTS],
}

impl Bus {
    /// The slot and register that the address register selects.
    fn selected(&mut self) -> Option<(&mut Slot, u8)> {
        let [register, device_function, bus, enable] = self.address.to_le_bytes();
        if enable & 0x80 == 0 || bus != 0 || device_function & 7 != 0 {
            return None;
        }
        let slot = self.slots.get_mut(usize::from(device_function >> 3))?.as_mut()?;
        Some((slot, register & 0xfc))
    }

    fn slot_of(&self, address: u64, len: usize) -> Option<(&Slot, usize, u32)> {
        self.slots.iter().flatten().find_map(|slot| {
            let (bar, offset) = slot.decode(address, len)?;
            Some((slot, bar, offset))
        })
    }
}

/// The root: ports and memory window of one bus.
pub struct PciRoot {
    bus: Mutex<Bus>,
    window: u64,
}

impl std::fmt::Debug for PciRoot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PciRoot").field("window", &self.window).finish_non_exhaustive()
    }
}

impl PciRoot {
    /// A bus with a host bridge only; `window` is the first guest-physical address of the window for BARs.
    pub fn new(window: u64) -> Self {
        let mut slots = [const { None }; SLOTS];
        slots[0] = Some(Slot { function: Box::new(HostBridge), command: 0, bars: [0; BARS], line: 0 });
        Self { bus: Mutex::new(Bus { address: 0, slots }), window }
    }

    /// Puts a function into a free slot, its interrupt on `line`; gives it back if there is none.
    ///
    /// # Errors
    /// The function, if all slots are taken.
    pub fn plug(
        &self,
        function: Box<dyn PciFunction>,
        line: impl Fn(usize) -> u8,
    ) -> Result<usize, Box<dyn PciFunction>> {
        let mut bus = self.lock();
        let free = bus.slots.iter().position(Option::is_none);
        let Some(at) = free else { return Err(function) };
        bus.slots[at] = Some(Slot { function, command: 0, bars: [0; BARS], line: line(at) });
        Ok(at)
    }

    /// As after power-on: no BAR decoded, no function a bus master.
    pub fn reset(&self) {
        let mut bus = self.lock();
        bus.address = 0;
        for slot in bus.slots.iter_mut().flatten() {
            slot.command = 0;
            slot.bars = [0; BARS];
            slot.function.set_master(false);
            slot.function.set_interrupts(true);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Bus> {
        self.bus.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A read of ports [`CONFIG_PORTS`] and up.
    pub fn read_port(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        let mut bus = self.lock();
        match port.wrapping_sub(CONFIG_PORTS) {
            0 if data.len() == 4 => data.copy_from_slice(&bus.address.to_le_bytes()),
            offset @ 4..8 => {
                let start = usize::from(offset - 4);
                if let Some((slot, register)) = bus.selected()
                    && let Some(bytes) = slot.config(register).to_le_bytes().get(start..start + data.len())
                {
                    data.copy_from_slice(bytes);
                }
            }
            _ => {}
        }
    }

    /// A write to ports [`CONFIG_PORTS`] and up.
    pub fn write_port(&self, port: u16, data: &[u8]) {
        let mut bus = self.lock();
        match (port.wrapping_sub(CONFIG_PORTS), data) {
            (0, &[a, b, c, d]) => bus.address = u32::from_le_bytes([a, b, c, d]),
            (offset @ 4..8, _) if usize::from(offset - 4) + data.len() <= 4 => {
                let start = usize::from(offset - 4);
                let (mut value, mut mask) = ([0; 4], [0; 4]);
                value[start..start + data.len()].copy_from_slice(data);
                mask[start..start + data.len()].fill(0xff);
                if let Some((slot, register)) = bus.selected() {
                    slot.set_config(register, u32::from_le_bytes(value), u32::from_le_bytes(mask));
                }
            }
            _ => {}
        }
    }

    /// A read at a guest-physical address in the window.
    pub fn read_memory(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((slot, bar, offset)) = self.lock().slot_of(address, data.len()) {
            slot.function.read(bar, offset, data);
        }
    }

    /// A write at a guest-physical address in the window.
    pub fn write_memory(&self, address: u64, data: &[u8]) {
        if let Some((slot, bar, offset)) = self.lock().slot_of(address, data.len()) {
            slot.function.write(bar, offset, data);
        }
    }
}

/// The root's ports, as a device of the port bus.
#[derive(Debug, Clone)]
pub struct ConfigPorts(pub std::sync::Arc<PciRoot>);

impl BusDevice for ConfigPorts {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.0.read_port(CONFIG_PORTS.wrapping_add(u16::try_from(offset).unwrap_or(u16::MAX)), data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.0.write_port(CONFIG_PORTS.wrapping_add(u16::try_from(offset).unwrap_or(u16::MAX)), data);
    }
}

/// The root's window, as a device of the memory bus.
#[derive(Debug, Clone)]
pub struct Window(pub std::sync::Arc<PciRoot>);

impl BusDevice for Window {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.0.read_memory(self.0.window.saturating_add(offset), data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.0.write_memory(self.0.window.saturating_add(offset), data);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[derive(Default)]
    struct Seen {
        written: AtomicU32,
        master: AtomicU32,
        /// Bit 0: something is pending; bit 1: interrupts are forbidden.
        interrupts: AtomicU32,
    }

    struct Card(Arc<Seen>);

    impl PciFunction for Card {
        fn identity(&self) -> Identity {
            Identity { vendor: 0x8086, device: 0x100e, class: 0x02_00_00, revision: 3, subsystem: (1, 2) }
        }
        fn bars(&self) -> [u32; BARS] {
            [0x2_0000, 0, 0, 0, 0, 0]
        }
        fn read(&self, bar: usize, offset: u32, data: &mut [u8]) {
            data.fill(u8::try_from(bar).unwrap() + u8::try_from(offset & 0xff).unwrap());
        }
        fn write(&self, _: usize, offset: u32, _: &[u8]) {
            self.0.written.store(offset, Ordering::Relaxed);
        }
        fn set_master(&self, on: bool) {
            self.0.master.store(on.into(), Ordering::Relaxed);
        }
        fn set_interrupts(&self, on: bool) {
            self.0.interrupts.store(if on { 1 } else { 3 }, Ordering::Relaxed);
        }
        fn interrupts(&self) -> bool {
            self.0.interrupts.load(Ordering::Relaxed) & 1 != 0
        }
    }

    fn select(root: &PciRoot, slot: u32, register: u32) {
        root.write_port(0xcf8, &(0x8000_0000 | slot << 11 | register).to_le_bytes());
    }

    fn dword(root: &PciRoot, slot: u32, register: u32) -> u32 {
        select(root, slot, register);
        let mut data = [0; 4];
        root.read_port(0xcfc, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn empty_slot_reads_as_ones_and_the_card_as_itself() {
        let (root, seen) = (PciRoot::new(0xe000_0000), Arc::new(Seen::default()));
        assert_eq!(root.plug(Box::new(Card(Arc::clone(&seen))), |_| 17).ok(), Some(1));
        assert_eq!(dword(&root, 0, 0), 0x1237_8086);
        assert_eq!(dword(&root, 1, 0), 0x100e_8086);
        assert_eq!(dword(&root, 1, 8), 0x0200_0003);
        assert_eq!(dword(&root, 1, 0x3c), 0x0111);
        assert_eq!(dword(&root, 2, 0), u32::MAX);
        // Other functions and buses are empty.
        root.write_port(0xcf8, &0x8000_0900u32.to_le_bytes());
        let mut data = [0; 2];
        root.read_port(0xcfe, &mut data);
        assert_eq!(data, [0xff; 2]);
    }

    #[test]
    fn bar_is_sized_placed_and_decoded_only_when_enabled() {
        let (root, seen) = (PciRoot::new(0xe000_0000), Arc::new(Seen::default()));
        assert!(root.plug(Box::new(Card(Arc::clone(&seen))), |_| 17).is_ok());
        select(&root, 1, 0x10);
        root.write_port(0xcfc, &u32::MAX.to_le_bytes());
        assert_eq!(dword(&root, 1, 0x10), 0xfffe_0000);
        select(&root, 1, 0x10);
        root.write_port(0xcfc, &0xe010_0000u32.to_le_bytes());
        let mut data = [0; 4];
        root.read_memory(0xe010_0008, &mut data);
        assert_eq!(data, [0xff; 4], "not decoded yet");
        select(&root, 1, 4);
        root.write_port(0xcfc, &6u16.to_le_bytes());
        assert_eq!(seen.master.load(Ordering::Relaxed), 1);
        root.read_memory(0xe010_0008, &mut data);
        assert_eq!(data, [8; 4]);
        root.write_memory(0xe011_fffc, &[0; 4]);
        assert_eq!(seen.written.load(Ordering::Relaxed), 0x1_fffc);
        root.write_memory(0xe011_fffe, &[0; 4]);
        assert_eq!(seen.written.load(Ordering::Relaxed), 0x1_fffc, "past the end");
        root.reset();
        assert_eq!((dword(&root, 1, 0x10), seen.master.load(Ordering::Relaxed)), (0, 0));
    }

    #[test]
    fn pending_interrupt_is_in_the_status_and_forbidden_by_the_command() {
        let (root, seen) = (PciRoot::new(0xe000_0000), Arc::new(Seen::default()));
        assert!(root.plug(Box::new(Card(Arc::clone(&seen))), |_| 17).is_ok());
        assert_eq!(dword(&root, 1, 4), 0);
        seen.interrupts.store(1, Ordering::Relaxed);
        assert_eq!(dword(&root, 1, 4), STATUS_INTERRUPT);
        root.write_port(0xcfc, &(1u16 << 10).to_le_bytes());
        assert_eq!(
            (dword(&root, 1, 4), seen.interrupts.load(Ordering::Relaxed)),
            (STATUS_INTERRUPT | 1 << 10, 3)
        );
        root.write_port(0xcfc, &0u16.to_le_bytes());
        assert_eq!((dword(&root, 1, 4), seen.interrupts.load(Ordering::Relaxed)), (STATUS_INTERRUPT, 1));
    }

    #[test]
    fn accesses_of_odd_sizes_and_places_are_harmless() {
        let root = PciRoot::new(0);
        for port in 0xcf0..=0xd08u16 {
            for len in 0..=8 {
                root.read_port(port, &mut vec![0; len]);
                root.write_port(port, &vec![0xff; len]);
            }
        }
    }
}
