//! A virtual processor: a thread that runs the guest and carries out what it leaves guest mode for.

#![forbid(unsafe_code)]

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, OnceLock};

use kvm_bindings::{
    KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, Msrs, kvm_msr_entry,
};
use kvm_ioctls::VcpuExit;
use vmq::memory::GuestMemory;

use crate::control::Panic;
use crate::devices::bus::Bus;
use crate::devices::power::Wish;
use crate::gate::Gate;
use crate::hypercall::{self, Status};
use crate::kvm::{Hyperv, Kick, MSR_CRASH_CTL, Processor, internal_error, take_hyperv};
use crate::synic::{Registers, Synic};

/// What a guest's processors bring about that concerns the whole machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Off or anew.
    Wish(Wish),
    /// The guest's kernel reports that it panicked.
    Panic(Panic),
    /// The machine cannot go on.
    Crashed(String),
}

/// Takes what the guest says to VMBus. Called by processors, so it must not block.
pub trait MessagePort: Send + Sync + fmt::Debug {
    /// A message for a connection.
    fn post(&self, connection: u32, payload: &[u8]) -> Status;
    /// A processor's synthetic interrupt controller has other registers now.
    fn synic_changed(&self, vp: u32);
}

/// Why processors left guest mode, for the operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Exit {
    /// I/O ports.
    Io,
    /// Addresses without memory.
    Mmio,
    /// Hypercalls that KVM leaves to us.
    Hypercall,
    /// Synthetic interrupt controller.
    Synic,
    /// Crash register.
    Msr,
    /// Interrupted by us.
    Kick,
    /// All others.
    Other,
}

/// Names of [`Exit`], in order.
pub const EXIT_NAMES: [&str; 7] = ["io", "mmio", "hypercall", "synic", "msr", "kick", "other"];

/// Exits of one processor by kind.
#[derive(Debug, Default)]
pub struct Exits([AtomicU64; EXIT_NAMES.len()]);

impl Exits {
    fn count(&self, exit: Exit) {
        self.0[exit as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// The counts, in the order of [`EXIT_NAMES`].
    pub fn get(&self) -> [u64; EXIT_NAMES.len()] {
        std::array::from_fn(|kind| self.0[kind].load(Ordering::Relaxed))
    }
}

/// What all processors of a machine share.
#[derive(Debug)]
pub struct Surroundings {
    /// Memory.
    pub memory: Arc<GuestMemory>,
    /// I/O ports.
    pub ports: Bus,
    /// Addresses without memory.
    pub mmio: Bus,
    /// Synthetic interrupt controllers.
    pub synic: Arc<Synic>,
    /// Stop and go.
    pub gate: Gate,
    /// VMBus.
    pub messages: Arc<dyn MessagePort>,
    /// Where outcomes go, marked with the machine they are of.
    pub outcomes: Sender<(u64, Outcome)>,
    /// The mark.
    pub machine: u64,
}

impl Surroundings {
    /// Reports an outcome; nobody may be listening any more.
    pub fn report(&self, outcome: Outcome) {
        let _ = self.outcomes.send((self.machine, outcome));
    }
}

/// What others know of a processor's thread.
#[derive(Debug)]
pub struct Handle {
    /// Gets it out of guest mode.
    kick: Kick,
    /// Its thread, once it runs.
    thread: AtomicI32,
    /// It has reported a panic: once is enough, and a guest may do it without end.
    panicked: AtomicBool,
    /// Exits.
    pub exits: Exits,
}

impl Handle {
    /// Of a processor that has no thread yet.
    pub fn new(kick: Kick) -> Self {
        Self { kick, thread: AtomicI32::new(0), panicked: AtomicBool::new(false), exits: Exits::default() }
    }

    /// Makes the processor look at the gate.
    pub fn kick(&self) {
        match self.thread.load(Ordering::SeqCst) {
            0 => {}
            thread => self.kick.kick(thread),
        }
    }
}

/// A processor, owned by its thread.
#[derive(Debug)]
pub struct Vcpu {
    /// KVM's end.
    pub fd: Processor,
    /// VP index.
    pub index: u32,
    /// What others know.
    pub handle: Arc<Handle>,
    /// The machine.
    pub around: Arc<Surroundings>,
}

impl Vcpu {
    /// The thread: runs the guest whenever the gate lets it, until it is to end.
    pub fn run(mut self) {
        let thread = rustix::thread::gettid().as_raw_nonzero().get();
        self.handle.thread.store(thread, Ordering::SeqCst);
        let mut dead = false;
        loop {
            if dead || !self.around.gate.is_open() {
                // Cleared before the gate is asked: a kick after that makes the next entry return at once.
                self.handle.kick.clear();
                if !self.around.gate.pass(dead) {
                    return;
                }
                continue;
            }
            if let Err(reason) = self.enter() {
                self.around.report(Outcome::Crashed(reason));
                dead = true;
            }
        }
    }

    /// Runs the guest until it leaves guest mode once, and does what it left for.
    fn enter(&mut self) -> Result<(), String> {
        let (around, exits) = (&self.around, &self.handle.exits);
        match self.fd.run() {
            Ok(VcpuExit::IoOut(port, data)) => {
                exits.count(Exit::Io);
                around.ports.write(u64::from(port), data);
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                exits.count(Exit::Io);
                around.ports.read(u64::from(port), data);
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                exits.count(Exit::Mmio);
                around.mmio.read(address, data);
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                exits.count(Exit::Mmio);
                around.mmio.write(address, data);
            }
            Ok(VcpuExit::Hyperv) => self.hyperv(),
            Ok(VcpuExit::X86Rdmsr(exit)) => {
                exits.count(Exit::Msr);
                // The guest may report a crash, with the end of its log.
                *exit.data = CRASH_NOTIFY | CRASH_MESSAGE;
                *exit.error = u8::from(exit.index != MSR_CRASH_CTL);
            }
            Ok(VcpuExit::X86Wrmsr(exit)) => {
                exits.count(Exit::Msr);
                let (index, data) = (exit.index, exit.data);
                *exit.error = u8::from(index != MSR_CRASH_CTL);
                if index == MSR_CRASH_CTL && data & CRASH_NOTIFY != 0 {
                    self.report_panic(data & CRASH_MESSAGE != 0);
                }
            }
            Ok(VcpuExit::SystemEvent(kind, _)) => {
                exits.count(Exit::Other);
                match kind {
                    KVM_SYSTEM_EVENT_CRASH => self.report_panic(false),
                    KVM_SYSTEM_EVENT_RESET => around.report(Outcome::Wish(Wish::Reset)),
                    KVM_SYSTEM_EVENT_SHUTDOWN => around.report(Outcome::Wish(Wish::Off)),
                    other => return Err(format!("processor {}: system event {other}", self.index)),
                }
            }
            Ok(VcpuExit::Hlt | VcpuExit::Intr | VcpuExit::IrqWindowOpen) => exits.count(Exit::Other),
            Ok(VcpuExit::Shutdown) => return Err(format!("triple fault on processor {}", self.index)),
            Ok(VcpuExit::InternalError) => {
                let reason = internal_error(&mut self.fd);
                return Err(format!("processor {}: KVM gave up, {reason}", self.index));
            }
            Ok(VcpuExit::FailEntry(reason, _)) => {
                return Err(format!("processor {} cannot enter guest mode: reason {reason:#x}", self.index));
            }
            Ok(other) => {
                return Err(format!("processor {}: {other:?} is not expected", self.index));
            }
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                exits.count(Exit::Kick);
                self.handle.kick.clear();
            }
            Err(error) => return Err(format!("processor {} cannot run: {error}", self.index)),
        }
        Ok(())
    }

    fn hyperv(&mut self) {
        let (around, exits, vp) = (&self.around, &self.handle.exits, self.index);
        take_hyperv(&mut self.fd, |exit| match exit {
            Hyperv::Synic { control, flags_page, message_page } => {
                exits.count(Exit::Synic);
                if around.synic.update(vp, Registers { control, flags_page, message_page }) {
                    around.messages.synic_changed(vp);
                }
                0
            }
            Hyperv::Hypercall { input, parameters } => {
                exits.count(Exit::Hypercall);
                let post = |connection, payload: &[u8]| around.messages.post(connection, payload);
                hypercall::handle(&around.memory, input, parameters, post) as u64
            }
            Hyperv::Other(_) => {
                exits.count(Exit::Other);
                Status::InvalidCode as u64
            }
        });
    }

    /// Reads the crash registers and tells, once.
    fn report_panic(&self, message: bool) {
        if self.handle.panicked.swap(true, Ordering::Relaxed) {
            return;
        }
        let entries: Vec<_> = (MSR_CRASH_P0..MSR_CRASH_P0 + 5)
            .map(|index| kvm_msr_entry { index, ..Default::default() })
            .collect();
        let mut parameters = [0; 5];
        if let Ok(mut msrs) = Msrs::from_entries(&entries)
            && self.fd.get_msrs(&mut msrs).is_ok()
        {
            for (parameter, entry) in parameters.iter_mut().zip(msrs.as_slice()) {
                *parameter = entry.data;
            }
        }
        let log = message.then(|| crash_log(&self.around.memory, parameters[3], parameters[4]));
        self.around.report(Outcome::Panic(Panic { parameters, log: log.flatten() }));
    }
}

/// First of the five crash parameters.
const MSR_CRASH_P0: u32 = 0x4000_0100;

/// Crash control: report.
const CRASH_NOTIFY: u64 = 1 << 63;

/// Crash control: the fourth and fifth parameter say where the end of the log is.
const CRASH_MESSAGE: u64 = 1 << 62;

/// The log's last page, made harmless for terminals.
fn crash_log(memory: &GuestMemory, gpa: u64, len: u64) -> Option<String> {
    let len = u32::try_from(len.min(4096)).ok()?;
    let mut bytes = vec![0; usize::try_from(len).ok()?];
    memory.segment(gpa, len)?.read_into(&mut bytes);
    let text = String::from_utf8_lossy(&bytes);
    let plain = text.chars().filter(|letter| *letter == '\n' || !letter.is_control()).collect::<String>();
    Some(plain.trim().to_owned()).filter(|plain| !plain.is_empty())
}

/// What a panic says in one line: the reason in its log, or the registers.
pub fn describe(panic: &Panic) -> String {
    static MARKS: OnceLock<[&str; 3]> = OnceLock::new();
    let marks = MARKS.get_or_init(|| ["Kernel panic - not syncing:", "BUG:", "Oops:"]);
    let lines = || panic.log.as_deref().unwrap_or_default().lines();
    let found =
        marks.iter().find_map(|mark| lines().find_map(|line| line.find(mark).and_then(|at| line.get(at..))));
    match found {
        Some(line) => line.trim().to_owned(),
        None => format!("the guest's kernel panicked (registers {:x?})", panic.parameters),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmq::memory::{Mapping, Region};

    #[test]
    fn crash_log_is_bounded_and_plain() {
        let mapping = Arc::new(Mapping::memfd("guest", 0x2000).unwrap().0);
        let memory = GuestMemory::new(vec![Region::new(0, 0, 0x2000, mapping, 0).unwrap()], None).unwrap();
        memory.room(0x1000, 64).unwrap().write(b"<0>one\n\x1b[31mtwo\0\0");
        assert_eq!(crash_log(&memory, 0x1000, 64).unwrap(), "<0>one\n[31mtwo");
        assert_eq!(crash_log(&memory, 0x1000, u64::MAX).unwrap(), "<0>one\n[31mtwo");
        assert_eq!(crash_log(&memory, 0x1001, 4096), None);
        assert_eq!(crash_log(&memory, u64::MAX, 1), None);
        assert_eq!(crash_log(&memory, 0, 0), None);
    }

    #[test]
    fn panic_is_described_by_its_reason() {
        let log =
            "<4>[ 1.0] x\n<0>[ 2.0] Kernel panic - not syncing: sysrq triggered crash\n<4>[ 2.1] CPU: 0";
        let panic = Panic { parameters: [0; 5], log: Some(log.into()) };
        assert_eq!(describe(&panic), "Kernel panic - not syncing: sysrq triggered crash");
        let panic = Panic { parameters: [1, 2, 3, 4, 5], log: None };
        assert_eq!(describe(&panic), "the guest's kernel panicked (registers [1, 2, 3, 4, 5])");
    }
}
