//! The emulated adapters of a VM, and the PCI root they are plugged into: made once, kept through resets.
//!
//! A guest without emulated adapters sees no PCI bus at all. Interrupts are level-triggered lines of the I/O APIC, as PCI's
//! are; slots share four of them, so a line is high while any of its adapters is. `KVM_IRQ_LINE` sets them rather than an
//! eventfd: the level is then right without help at the guest's end of interrupt, which a second eventfd would have to wake
//! a thread for.

#![forbid(unsafe_code)]

use std::fmt;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak, mpsc};
use std::thread::JoinHandle;

use vmq::memory::GuestMemory;

use crate::devices::bus::{Bus, BusDevice, InterruptLine, Overlap, Shared};
use crate::devices::e1000::E1000;
use crate::devices::pci::aml::{Description, LINES, line};
use crate::devices::pci::{CONFIG_PORTS, ConfigPorts, PciRoot, SLOTS, Window};
use crate::devices::power::CHIPSET_RESET;
use crate::guest::OnFault;
use crate::kvm::{Gsi, Vm};

/// Guest-physical addresses of adapters' registers: above memory, below the interrupt controllers.
const WINDOW: Range<u32> = 0xe000_0000..0xf000_0000;

/// Stack of an adapter's thread.
const STACK: usize = 256 << 10;

/// Adapters that there is a slot for; the first slot is the host bridge.
pub const MOST: usize = SLOTS - 1;

/// An adapter to be emulated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LegacyNic {
    /// Its name: unique in the VM.
    pub name: String,
    /// Its station address.
    pub mac: [u8; 6],
}

/// What an adapter is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LegacyStatus {
    /// Its name.
    pub name: String,
    /// A driver receives.
    pub running: bool,
    /// The cable is plugged in, and somebody is at its other end.
    pub connected: bool,
}

/// Why adapters cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum LegacyError {
    /// No slots left.
    #[error("{0} emulated adapters; {MOST} are possible")]
    TooMany(usize),
    /// Threads, eventfds, confinement.
    #[error("cannot {what} of emulated adapter {name:?}")]
    System {
        /// What was to be done.
        what: &'static str,
        /// For which.
        name: String,
        /// The kernel's reason.
        #[source]
        source: std::io::Error,
    },
}

/// Who holds a line up, one bit an adapter.
#[derive(Debug, Default, Clone, Copy)]
struct Levels(u32);

impl Levels {
    /// An adapter's level changes; returns the line's new level if that changes.
    fn set(&mut self, adapter: u32, high: bool) -> Option<bool> {
        let before = self.0 != 0;
        let bit = 1 << adapter;
        self.0 = if high { self.0 | bit } else { self.0 & !bit };
        let after = self.0 != 0;
        (before != after).then_some(after)
    }
}

/// A line, and the machine it leads to, which changes with a reset.
#[derive(Debug)]
struct Line {
    gsi: Gsi,
    state: Mutex<(Levels, Weak<Vm>)>,
}

impl Line {
    fn new(number: u8) -> Self {
        Self { gsi: Gsi(number.into()), state: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, (Levels, Weak<Vm>)> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Leads to `vm` from now on, whose line is low.
    fn attach(&self, vm: &Arc<Vm>) {
        *self.lock() = (Levels::default(), Arc::downgrade(vm));
    }
}

/// An adapter's pin on a line.
#[derive(Debug)]
struct Pin {
    line: Arc<Line>,
    adapter: u32,
}

impl InterruptLine for Pin {
    fn set(&self, high: bool) {
        // Held while KVM is told, so that levels reach it in order.
        let mut state = self.line.lock();
        if let Some(level) = state.0.set(self.adapter, high)
            && let Some(vm) = state.1.upgrade()
        {
            vm.set_line(self.line.gsi, level);
        }
    }
}

#[derive(Debug)]
struct Adapter {
    name: String,
    device: E1000,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Adapter {
    fn drop(&mut self) {
        self.device.end();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Where the reset port is among the root's ports.
const RESET: u64 = (CHIPSET_RESET - CONFIG_PORTS) as u64;

/// The ports that a chipset has from [`CONFIG_PORTS`] on.
struct Ports {
    config: ConfigPorts,
    reset: Shared,
}

impl BusDevice for Ports {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match (offset, data.len()) {
            (RESET, 1) => self.reset.lock().unwrap_or_else(PoisonError::into_inner).read(0, data),
            _ => self.config.read(offset, data),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data.len()) {
            (RESET, 1) => self.reset.lock().unwrap_or_else(PoisonError::into_inner).write(0, data),
            _ => self.config.write(offset, data),
        }
    }
}

/// The emulated adapters of a VM.
pub struct Legacy {
    adapters: Vec<Adapter>,
    root: Arc<PciRoot>,
    lines: Vec<Arc<Line>>,
}

impl fmt::Debug for Legacy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.status()).finish()
    }
}

impl Legacy {
    /// Adapters without cables, paused. Each has a thread, which `confine` confines.
    ///
    /// # Errors
    /// See [`LegacyError`].
    pub fn new(
        nics: &[LegacyNic],
        memory: &Arc<GuestMemory>,
        on_fault: &OnFault,
        confine: fn() -> std::io::Result<()>,
    ) -> Result<Self, LegacyError> {
        if nics.len() > MOST {
            return Err(LegacyError::TooMany(nics.len()));
        }
        let (first, count) = LINES;
        let lines = (first..first + count).map(|number| Arc::new(Line::new(number))).collect();
        let root = Arc::new(PciRoot::new(WINDOW.start.into()));
        let mut legacy = Self { adapters: Vec::new(), root, lines };
        for (slot, nic) in (1..).zip(nics) {
            legacy.add(slot, nic, memory, on_fault, confine)?;
        }
        Ok(legacy)
    }

    fn add(
        &mut self,
        slot: u32,
        nic: &LegacyNic,
        memory: &Arc<GuestMemory>,
        on_fault: &OnFault,
        confine: fn() -> std::io::Result<()>,
    ) -> Result<(), LegacyError> {
        let failed = |what| {
            let name = nic.name.clone();
            move |source| LegacyError::System { what, name, source }
        };
        let at = usize::try_from(slot).unwrap_or(SLOTS);
        let full = || LegacyError::TooMany(at);
        let ours = |found: &&Arc<Line>| found.gsi == Gsi(line(at).into());
        let line = self.lines.iter().find(ours).map(Arc::clone).ok_or_else(full)?;
        let pin = Arc::new(Pin { line, adapter: slot });
        let (tell, name) = (Arc::clone(on_fault), nic.name.clone());
        let told = Box::new(move |fault: &_| tell(&name, &format!("{fault}")));
        let device =
            E1000::new(nic.mac, Arc::clone(memory), pin, told).map_err(failed("make the doorbell"))?;
        device.pause();
        let number = |slot| crate::devices::pci::aml::line(slot);
        self.root.plug(Box::new(device.clone()), number).map_err(|_| full())?;

        let (ready, confined) = mpsc::channel();
        let served = device.clone();
        let work = move || {
            let confined = confine();
            let go = confined.is_ok();
            let _ = ready.send(confined);
            if go {
                served.run();
            }
        };
        let builder = std::thread::Builder::new().name(format!("nic {}", nic.name)).stack_size(STACK);
        let thread = builder.spawn(work).map_err(failed("start the thread"))?;
        self.adapters.push(Adapter { name: nic.name.clone(), device, thread: Some(thread) });
        let ended = std::io::Error::other("it ended");
        confined.recv().unwrap_or(Err(ended)).map_err(failed("confine the thread"))
    }

    /// Leads interrupts to `vm`, a new machine.
    pub fn attach(&self, vm: &Arc<Vm>) {
        self.lines.iter().for_each(|line| line.attach(vm));
    }

    /// What ACPI says of the root, if there is one.
    pub fn description(&self) -> Option<Description> {
        let window = (WINDOW.start, WINDOW.end - 1);
        (!self.adapters.is_empty()).then_some(Description { window })
    }

    /// The root's I/O ports, if there is one. In their midst is the machine's reset port, of one byte, which leads to `reset`.
    pub fn ports(&self, reset: &Shared) -> Option<(Range<u16>, Shared)> {
        let ports = Ports { config: ConfigPorts(Arc::clone(&self.root)), reset: Arc::clone(reset) };
        let device: Shared = Arc::new(Mutex::new(ports));
        (!self.adapters.is_empty()).then_some((CONFIG_PORTS..CONFIG_PORTS + 8, device))
    }

    /// The addresses at which adapters' registers are.
    ///
    /// # Errors
    /// None that can happen: it is the only device there.
    pub fn window(&self) -> Result<Bus, Overlap> {
        let mut bus = Bus::default();
        if !self.adapters.is_empty() {
            let device = Arc::new(Mutex::new(Window(Arc::clone(&self.root))));
            bus.place(WINDOW.start.into()..WINDOW.end.into(), device)?;
        }
        Ok(bus)
    }

    /// Plugs a cable into adapter `name`; false if there is none of that name.
    pub fn connect(&self, name: &str, cable: OwnedFd) -> bool {
        let adapter = self.adapters.iter().find(|adapter| adapter.name == name);
        adapter.map(|adapter| adapter.device.connect(cable)).is_some()
    }

    /// Takes the link of adapter `name` down or up; false if there is none of that name.
    pub fn set_link(&self, name: &str, up: bool) -> bool {
        let adapter = self.adapters.iter().find(|adapter| adapter.name == name);
        adapter.map(|adapter| adapter.device.set_link(up)).is_some()
    }

    /// What each is doing.
    pub fn status(&self) -> Vec<LegacyStatus> {
        let status = |Adapter { name, device, .. }: &Adapter| LegacyStatus {
            name: name.clone(),
            running: device.is_running(),
            connected: device.is_connected(),
        };
        self.adapters.iter().map(status).collect()
    }

    /// When this returns no adapter touches memory or an interrupt, until [`Legacy::resume`].
    pub fn pause(&self) {
        self.adapters.iter().for_each(|adapter| adapter.device.pause());
    }

    /// Undoes [`Legacy::pause`].
    pub fn resume(&self) {
        self.adapters.iter().for_each(|adapter| adapter.device.resume());
    }

    /// As after power-on; cables stay plugged in.
    pub fn reset(&self) {
        self.root.reset();
        self.adapters.iter().for_each(|adapter| adapter.device.reset());
    }
}

#[cfg(test)]
mod tests;
