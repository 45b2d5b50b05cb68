//! An emulated 82540EM, which every guest has a driver for: Linux' `e1000`, DPDK's PMD. Slow by nature, since a register
//! access stops the virtual processor; the synthetic adapter is measured against it.
//!
//! Frames cross a socket of sequenced packets to the switch, each behind a virtio-net header. A thread of the
//! adapter's own (`service`) sends, receives, and delivers throttled interrupts. Segmentation and checksums are left to the switch.
//!
//! Cost model: what a frame costs is exits, about six an interrupt and one a tail write, and one system call that moves it.
//! So a frame to be segmented is sent whole, a virtual processor wakes the thread only if that sleeps over something new, and
//! it goes on while the thread copies: only registers are behind the lock that both take.

mod eeprom;
#[doc(hidden)]
pub mod fuzz;
mod interrupt;
mod phy;
mod receive;
mod registers;
mod ring;
mod service;
mod transmit;

#[cfg(test)]
mod tests;

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use vmq::doorbell::Doorbell;
use vmq::memory::GuestMemory;

use self::eeprom::Eeprom;
use self::interrupt::Interrupts;
use self::phy::Phy;
use self::receive::{Filters, Received};
use self::registers::*;
use self::ring::Ring;
use self::transmit::{Backlog, Transmitter, VNET};
use super::bus::InterruptLine;
use super::pci::{Identity, PciFunction};

pub use self::ring::E1000Fault;

/// Called once with the reason if the guest does what cannot be served; the adapter is dead from then on, until it is
/// reset.
pub type OnFault = Box<dyn Fn(&E1000Fault) + Send + Sync>;

/// Bytes of frames on their way to the switch that are asked for.
const BUFFER: usize = 1 << 20;

/// EtherType of tags unless the driver says otherwise.
const TAG: u16 = 0x8100;

/// All that the guest can change.
#[derive(Debug)]
struct Core {
    mac: [u8; 6],
    control: u32,
    control_ext: u32,
    management: u32,
    vlan_type: u32,
    transmit_control: u32,
    packet_buffer: u32,
    receive_sums: u32,
    throttle: u32,
    eeprom: Eeprom,
    eeprom_read: u32,
    phy: Phy,
    filters: Filters,
    receive: Ring,
    transmit: Ring,
    backlog: Backlog,
    interrupts: Interrupts,
    /// It interrupts; whether that reaches its pin is up to `forbidden`.
    line: bool,
    /// What its pin was told.
    pin: bool,
    /// The guest forbids interrupts by the pin.
    forbidden: bool,
    /// When the line has to be looked at again.
    alarm: Option<Instant>,
    /// The thread waits for frames from the cable.
    listening: bool,
    /// The machine is stopped: memory and interrupt line are left alone.
    held: bool,
    statistics: [u32; ((STATISTICS_END - STATISTICS) / 4) as usize],
    /// The guest allows access to its memory.
    master: bool,
    dead: bool,
    cable: Option<Arc<OwnedFd>>,
    /// The operator has taken the link down; the cable stays plugged in, and what comes through it is lost.
    down: bool,
}

/// The adapter, shared by virtual processors and its thread.
#[derive(Debug)]
struct Shared {
    /// Held while frames are sent, and by who changes what that relies on. Taken before `core`.
    transmitter: Mutex<Transmitter>,
    core: Mutex<Core>,
    memory: Arc<GuestMemory>,
    line: Arc<dyn InterruptLine>,
    /// Wakes the thread: descriptors, a cable, a moment to interrupt, the end.
    wake: Doorbell,
    ended: AtomicBool,
    on_fault: Fault,
}

struct Fault(OnFault);

impl std::fmt::Debug for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("OnFault")
    }
}

/// The adapter as its VM's devices hold it.
#[derive(Debug, Clone)]
pub struct E1000(Arc<Shared>);

impl Core {
    fn new(mac: [u8; 6]) -> Self {
        let mut filters = Filters {
            control: 0,
            addresses: [0; 32],
            groups: [0; 128],
            vlans: [0; 128],
            tag: TAG,
            strip: false,
        };
        let [a, b, c, d, e, f] = mac;
        filters.addresses[0] = u32::from_le_bytes([a, b, c, d]);
        filters.addresses[1] = u32::from(u16::from_le_bytes([e, f])) | 1 << 31;
        Self {
            mac,
            // Full duplex, speed by detection, link forced up.
            control: 1 | 1 << 6 | 1 << 5 | 1 << 9,
            control_ext: 0,
            management: 0,
            vlan_type: 0,
            transmit_control: 0,
            packet_buffer: 0x0010_0030,
            receive_sums: 0,
            throttle: 0,
            eeprom: Eeprom::new(mac),
            eeprom_read: 0,
            phy: Phy::default(),
            filters,
            receive: Ring::default(),
            transmit: Ring::default(),
            backlog: Backlog::None,
            interrupts: Interrupts::default(),
            line: false,
            pin: false,
            forbidden: false,
            alarm: None,
            listening: false,
            held: false,
            statistics: [0; 64],
            master: false,
            dead: false,
            cable: None,
            down: false,
        }
    }

    /// As after power-on; cable and permissions stay.
    fn reset(&mut self) {
        let fresh = Self::new(self.mac);
        let (cable, master, line) = (self.cable.take(), self.master, self.line);
        let (pin, forbidden) = (self.pin, self.forbidden);
        let (listening, held, down) = (self.listening, self.held, self.down);
        *self = Self { cable, master, line, pin, forbidden, listening, held, down, ..fresh };
        self.phy.set_link(self.link());
    }

    /// The other end is gone.
    fn unplug(&mut self) {
        self.cable = None;
        self.link_changed();
    }

    fn link(&self) -> bool {
        self.cable.is_some() && !self.down
    }

    fn link_changed(&mut self) {
        self.phy.set_link(self.link());
        self.interrupts.raise(CAUSE_LSC);
    }

    fn count(&mut self, register: u32, by: u32) {
        let cell = &mut self.statistics[((register - STATISTICS) / 4) as usize];
        *cell = cell.saturating_add(by);
    }

    fn count_bytes(&mut self, register: u32, by: usize) {
        let at = ((register - STATISTICS) / 4) as usize;
        let wide = u64::from(self.statistics[at + 1]) << 32 | u64::from(self.statistics[at]);
        let [a, b, c, d, e, f, g, h] = wide.saturating_add(by as u64).to_le_bytes();
        self.statistics[at] = u32::from_le_bytes([a, b, c, d]);
        self.statistics[at + 1] = u32::from_le_bytes([e, f, g, h]);
    }

    fn status(&self) -> u32 {
        STATUS_FD | STATUS_1000 | if self.link() { STATUS_LU } else { 0 }
    }

    fn read(&mut self, register: u32) -> u32 {
        let low = |base: u64| (base & 0xffff_ffff) as u32;
        let high = |base: u64| (base >> 32) as u32;
        match register {
            CTRL => self.control,
            STATUS => self.status(),
            EECD => self.eeprom.read(),
            EERD => self.eeprom_read,
            CTRL_EXT => self.control_ext,
            MDIC => self.management,
            VET => self.vlan_type,
            ICR => self.interrupts.take(),
            ITR => self.throttle,
            IMS => self.interrupts.mask(),
            RCTL => self.filters.control,
            TCTL => self.transmit_control,
            PBA => self.packet_buffer,
            RDBAL => low(self.receive.base),
            RDBAH => high(self.receive.base),
            RDLEN => self.receive.bytes,
            RDH => self.receive.head,
            RDT => self.receive.tail,
            TDBAL => low(self.transmit.base),
            TDBAH => high(self.transmit.base),
            TDLEN => self.transmit.bytes,
            TDH => self.transmit.head,
            TDT => self.transmit.tail,
            RXCSUM => self.receive_sums,
            STATISTICS..STATISTICS_END => {
                std::mem::take(&mut self.statistics[((register - STATISTICS) / 4) as usize])
            }
            _ => table(&mut self.filters, register).map_or(0, |word| *word),
        }
    }

    /// Writes a register.
    fn write(&mut self, register: u32, value: u32) {
        let set_low = |base: u64| base & !0xffff_ffff | u64::from(value & !15);
        let set_high = |base: u64| base & 0xffff_ffff | u64::from(value) << 32;
        match register {
            CTRL if value & CTRL_RST != 0 => self.reset(),
            CTRL => {
                self.control = value & !CTRL_PHY_RST;
                if value & CTRL_PHY_RST != 0 {
                    self.phy.write(0, 1 << 15);
                }
                self.filters.strip = value & CTRL_VME != 0;
            }
            EECD => self.eeprom.write(value),
            EERD if value & 1 != 0 => {
                let word = self.eeprom.word((value >> 8 & 0xff) as usize);
                self.eeprom_read = u32::from(word) << 16 | value & 0xff00 | 1 << 4;
            }
            CTRL_EXT => self.control_ext = value,
            MDIC => self.manage(value),
            VET => {
                self.vlan_type = value & 0xffff;
                self.filters.tag =
                    u16::try_from(self.vlan_type).ok().filter(|&kind| kind != 0).unwrap_or(TAG);
            }
            ICR => self.interrupts.clear(value),
            ITR => {
                self.throttle = value & 0xffff;
                self.interrupts.throttle(value);
            }
            ICS => self.interrupts.raise(value),
            IMS => self.interrupts.enable(value),
            IMC => self.interrupts.disable(value),
            RCTL => self.filters.control = value,
            TCTL => self.transmit_control = value,
            PBA => self.packet_buffer = value,
            RDBAL => self.receive.base = set_low(self.receive.base),
            RDBAH => self.receive.base = set_high(self.receive.base),
            RDLEN => self.receive.bytes = value & 0xf_ff80,
            RDH => self.receive.head = value & 0xffff,
            RDT => self.receive.tail = value & 0xffff,
            TDBAL => self.transmit.base = set_low(self.transmit.base),
            TDBAH => self.transmit.base = set_high(self.transmit.base),
            TDLEN => self.transmit.bytes = value & 0xf_ff80,
            TDH => self.transmit.head = value & 0xffff,
            TDT => self.transmit.tail = value & 0xffff,
            RXCSUM => self.receive_sums = value,
            _ => {
                if let Some(word) = table(&mut self.filters, register) {
                    *word = value;
                }
            }
        }
    }

    /// Reads or writes a register of the transceiver (manual, section 13.4.8).
    fn manage(&mut self, value: u32) {
        let (register, address, operation) = (value >> 16 & 31, value >> 21 & 31, value >> 26 & 3);
        self.management = value & 0x0fff_ffff | MDIC_READY;
        match (address, operation) {
            (phy::ADDRESS, 2) => {
                self.management = self.management & !0xffff | u32::from(self.phy.read(register));
            }
            (phy::ADDRESS, 1) => self.phy.write(register, u16::try_from(value & 0xffff).unwrap_or(0)),
            _ => self.management |= MDIC_ERROR,
        }
    }

    /// A driver has set it up, and it goes.
    fn is_running(&self) -> bool {
        self.filters.control & RCTL_EN != 0 && self.master && !self.dead
    }

    fn transmits(&self) -> bool {
        self.transmit_control & TCTL_EN != 0 && self.master && !self.dead && !self.held
    }

    /// Frames may be put into the ring.
    fn receives(&self) -> bool {
        self.is_running() && !self.held
    }

    /// Puts a frame, behind its virtio-net header, into the ring.
    fn receive(&mut self, memory: &GuestMemory, message: &mut Vec<u8>) -> Result<(), E1000Fault> {
        if message.len() < VNET + 14 {
            return Ok(());
        }
        // The only thing that the switch may say: the checksum was verified.
        let verified = message[0] & 2 != 0;
        let (first, octets) = (message[VNET], octets(message.len() - VNET));
        let to_all = message[VNET..VNET + 6] == [0xff; 6];
        message.drain(..VNET);
        let mut ring = self.receive;
        let received = receive::store(memory, &mut ring, &self.filters, message, verified)?;
        self.receive = ring;
        match received {
            Received::Stored => {
                [GPRC, TPR].into_iter().for_each(|register| self.count(register, 1));
                [GORC, TOR].into_iter().for_each(|register| self.count_bytes(register, octets));
                if to_all {
                    self.count(BPRC, 1);
                } else if first & 1 != 0 {
                    self.count(MPRC, 1);
                }
                let few = ring.available() <= self.filters.few(ring.count());
                self.interrupts.raise(CAUSE_RXT0 | if few { CAUSE_RXDMT0 } else { 0 });
            }
            Received::NoRoom => {
                self.count(MPC, 1);
                self.interrupts.raise(CAUSE_RXO);
            }
            Received::Filtered => {}
        }
        Ok(())
    }
}

/// What a frame of `len` bytes counts for: nothing is shorter on the wire, and the check sequence belongs to it (manual,
/// section 13.7).
fn octets(len: usize) -> usize {
    len.max(60) + 4
}

/// The word of a table that `register` is.
fn table(filters: &mut Filters, register: u32) -> Option<&mut u32> {
    let at = |base: u32| ((register - base) / 4) as usize;
    match register {
        MTA..0x5400 => filters.groups.get_mut(at(MTA)),
        RA..0x5480 => filters.addresses.get_mut(at(RA)),
        VFTA..0x5800 => filters.vlans.get_mut(at(VFTA)),
        _ => None,
    }
}

impl E1000 {
    /// An adapter with the given station address, without cable. Its thread is the caller's to start with
    /// [`E1000::run`].
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub fn new(
        mac: [u8; 6],
        memory: Arc<GuestMemory>,
        line: Arc<dyn InterruptLine>,
        on_fault: OnFault,
    ) -> std::io::Result<Self> {
        let mut core = Core::new(mac);
        core.phy.set_link(false);
        let (core, wake, on_fault) = (Mutex::new(core), Doorbell::new()?, Fault(on_fault));
        let ended = AtomicBool::new(false);
        let transmitter = Mutex::default();
        Ok(Self(Arc::new(Shared { transmitter, core, memory, line, wake, ended, on_fault })))
    }

    /// Serves the adapter, until [`E1000::end`].
    pub fn run(&self) {
        self.0.run();
    }

    /// Ends [`E1000::run`], for good.
    pub fn end(&self) {
        self.0.ended.store(true, Ordering::SeqCst);
        self.0.wake.ring();
    }

    /// Connects the cable: one end of a pair of sequenced packets. A cable from before is pulled.
    pub fn connect(&self, cable: OwnedFd) {
        let _ = rustix::io::ioctl_fionbio(&cable, true);
        // Room for several frames to be segmented; the kernel gives what it allows.
        let _ = rustix::net::sockopt::set_socket_send_buffer_size(&cable, BUFFER);
        let mut core = self.0.lock();
        core.cable = Some(Arc::new(cable));
        core.link_changed();
        self.0.update_line(&mut core);
        drop(core);
        self.0.wake.ring();
    }

    /// Takes the link down or up, with the cable plugged in.
    pub fn set_link(&self, up: bool) {
        let mut core = self.0.lock();
        if std::mem::replace(&mut core.down, !up) != up {
            return;
        }
        core.link_changed();
        self.0.update_line(&mut core);
        drop(core);
        self.0.wake.ring();
    }

    /// True once a driver receives.
    pub fn is_running(&self) -> bool {
        self.0.lock().is_running()
    }

    /// True while the cable is connected.
    pub fn is_connected(&self) -> bool {
        self.0.lock().cable.is_some()
    }

    /// When this returns, the adapter touches neither memory nor its interrupt line, until [`E1000::resume`]. Frames wait in
    /// the cable.
    pub fn pause(&self) {
        let _idle = self.0.transmitter();
        self.0.lock().held = true;
    }

    /// Undoes [`E1000::pause`].
    pub fn resume(&self) {
        let mut core = self.0.lock();
        core.held = false;
        self.0.update_line(&mut core);
        drop(core);
        self.0.wake.ring();
    }

    /// As the machine's reset button.
    pub fn reset(&self) {
        *self.0.transmitter() = Transmitter::default();
        let mut core = self.0.lock();
        core.reset();
        core.line = false;
        if std::mem::take(&mut core.pin) {
            self.0.line.set(false);
        }
    }
}

impl PciFunction for E1000 {
    fn identity(&self) -> Identity {
        Identity {
            vendor: 0x8086,
            device: 0x100e,
            class: 0x02_00_00,
            revision: 3,
            subsystem: (0x8086, 0x001e),
        }
    }

    fn bars(&self) -> [u32; 6] {
        [END, 0, 0, 0, 0, 0]
    }

    fn read(&self, _: usize, offset: u32, data: &mut [u8]) {
        let mut core = self.0.lock();
        let value = core.read(offset & !3).to_le_bytes();
        self.0.update_line(&mut core);
        let start = (offset & 3) as usize;
        for (byte, from) in data.iter_mut().zip(value.iter().skip(start)) {
            *byte = *from;
        }
    }

    fn write(&self, _: usize, offset: u32, data: &[u8]) {
        // Registers are written as a whole (manual, section 13.2).
        let (Some(&value), 0) = (data.first_chunk::<4>(), offset & 3) else { return };
        let value = u32::from_le_bytes(value);
        // Not while the thread reads the ring. The tail may move meanwhile.
        let ring = matches!(offset, CTRL | TCTL | TDBAL | TDBAH | TDLEN | TDH);
        let mut idle = ring.then(|| self.0.transmitter());
        let mut core = self.0.lock();
        core.write(offset, value);
        if let Some(transmitter) = idle.as_mut().filter(|_| offset == CTRL && value & CTRL_RST != 0) {
            **transmitter = Transmitter::default();
        }
        let alarmed = self.0.update_line(&mut core);
        // The thread looks after the clock, after frames to be sent, and after received ones once there is room.
        let room = !core.listening && core.receives() && core.receive.available() > 0;
        let frames = core.backlog == Backlog::None && core.transmits() && core.transmit.available() > 0;
        if frames {
            core.backlog = Backlog::More;
        }
        // Frames that waited for the transmitter to be switched on.
        let again = offset == TCTL && core.transmits() && core.backlog != Backlog::None;
        if alarmed || room || frames || again {
            drop(core);
            self.0.wake.ring();
        }
    }

    fn set_master(&self, on: bool) {
        let _idle = self.0.transmitter();
        self.0.lock().master = on;
        self.0.wake.ring();
    }

    fn set_interrupts(&self, on: bool) {
        let mut core = self.0.lock();
        core.forbidden = !on;
        self.0.update_line(&mut core);
    }

    fn interrupts(&self) -> bool {
        self.0.lock().line
    }
}
