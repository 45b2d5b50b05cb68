//! A partition: memory, processors and devices of one guest, through all its restarts.
//!
//! A reset makes a new virtual machine of KVM over the same memory: no register, timer or pending interrupt of the old one
//! can survive it.

#![forbid(unsafe_code)]

use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use acpi_tables::Aml;
use kvm_bindings::Msrs;
use rustix::thread::{CpuSet, sched_setaffinity};
use vm_memory::{Bytes, GuestAddress};
use vmq::doorbell::Doorbell;

use crate::acpi;
use crate::boot::{self, BootError};
use crate::confine::Confine;
use crate::control::{Baseline, MAX_VCPUS, Memory as Sizes};
use crate::cpuid::{Cpuid, CpuidError};
use crate::devices::bus::{Bus, Overlap, Shared};
use crate::devices::power::{self, Power};
use crate::devices::rtc::{self, Rtc};
use crate::gate::{Gate, Wanted};
use crate::guest::OnFault;
use crate::kvm::{Clock, Gsi, Host, Kick, KvmError, Processor, Vm, install_signal};
use crate::legacy::{Legacy, LegacyError, LegacyNic, LegacyStatus};
use crate::memory::{Memory, MemoryError};
use crate::serial::SerialPort;
use crate::synic::Synic;
use crate::vcpu::{EXIT_NAMES, Handle, MessagePort, Outcome, Surroundings, Vcpu};

/// Stack of a processor's thread.
const STACK: usize = 256 << 10;

/// What a partition is made of.
pub struct Parts {
    /// Name, for the memory's file.
    pub name: String,
    /// `/dev/kvm`.
    pub kvm: OwnedFd,
    /// Memory sizes.
    pub memory: Sizes,
    /// Processors.
    pub vcpus: u32,
    /// Host processor by virtual processor; empty for none in particular.
    pub pin: Vec<usize>,
    /// What the guest is told of its processor.
    pub baseline: Option<Baseline>,
    /// bzImage.
    pub kernel: File,
    /// Initial RAM file system.
    pub initrd: Option<File>,
    /// Kernel command line.
    pub cmdline: String,
    /// Serial port.
    pub serial: SerialPort,
    /// Emulated adapters. Without any the guest sees no PCI bus.
    pub legacy: Vec<LegacyNic>,
    /// Called when an adapter is stopped for what the guest did.
    pub on_fault: OnFault,
}

impl fmt::Debug for Parts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Parts").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Why a partition cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum PartitionError {
    /// Not 1 to 64 processors.
    #[error("{0} virtual processors; 1 to {MAX_VCPUS} are possible")]
    Processors(u32),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Processor features.
    #[error(transparent)]
    Cpuid(#[from] CpuidError),
    /// Kernel.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// Tables.
    #[error(transparent)]
    Acpi(#[from] acpi::TooLarge),
    /// Devices.
    #[error(transparent)]
    Devices(#[from] Overlap),
    /// Emulated adapters.
    #[error(transparent)]
    Legacy(#[from] LegacyError),
    /// Threads, eventfds, pinning.
    #[error("cannot {what}")]
    System {
        /// What was to be done.
        what: &'static str,
        /// The kernel's reason.
        #[source]
        source: std::io::Error,
    },
}

fn system(what: &'static str) -> impl FnOnce(std::io::Error) -> PartitionError {
    move |source| PartitionError::System { what, source }
}

/// What runs between two resets.
#[derive(Debug)]
struct Machine {
    /// KVM's end; VMBus ties its channels to it.
    vm: Arc<Vm>,
    clock: Clock,
    around: Arc<Surroundings>,
    handles: Vec<Arc<Handle>>,
    threads: Vec<JoinHandle<()>>,
}

impl Machine {
    fn tell(&self, wanted: Wanted) {
        self.around.gate.want(wanted);
        if wanted != Wanted::Run {
            self.handles.iter().for_each(|handle| handle.kick());
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.tell(Wanted::End);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// A guest's machine.
#[derive(Debug)]
pub struct Partition {
    host: Host,
    cpuid: Cpuid,
    memory: Arc<Memory>,
    parts: Settings,
    button: Doorbell,
    messages: Arc<dyn MessagePort>,
    outcomes: Sender<(u64, Outcome)>,
    legacy: Legacy,
    confine: Confine,
    generation: u64,
    machine: Option<Machine>,
}

/// [`Parts`] that are needed again after a reset.
#[derive(Debug)]
struct Settings {
    vcpus: u32,
    pin: Vec<usize>,
    kernel: File,
    initrd: Option<File>,
    cmdline: String,
    serial: SerialPort,
}

impl Partition {
    /// A machine with its kernel loaded, not yet running. Outcomes are marked with [`Partition::generation`].
    ///
    /// # Errors
    /// See [`PartitionError`].
    pub fn new(
        parts: Parts,
        messages: Arc<dyn MessagePort>,
        outcomes: Sender<(u64, Outcome)>,
        confine: Confine,
    ) -> Result<Self, PartitionError> {
        if !(1..=MAX_VCPUS).contains(&parts.vcpus) {
            return Err(PartitionError::Processors(parts.vcpus));
        }
        install_signal();
        let host = Host::new(parts.kvm, parts.vcpus)?;
        let cpuid = Cpuid::new(&host, parts.vcpus, parts.baseline)?;
        let memory = Arc::new(Memory::new(&parts.name, parts.memory)?);
        let legacy = Legacy::new(&parts.legacy, memory.guest(), &parts.on_fault, confine.devices)?;
        let Parts { vcpus, pin, kernel, initrd, cmdline, serial, .. } = parts;
        let parts = Settings { vcpus, pin, kernel, initrd, cmdline, serial };
        let button = Doorbell::new().map_err(system("make the power button"))?;
        let mut partition = Self {
            host,
            cpuid,
            memory,
            parts,
            button,
            messages,
            outcomes,
            legacy,
            confine,
            generation: 0,
            machine: None,
        };
        partition.build()?;
        Ok(partition)
    }

    /// Guest memory.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// The machine's KVM end and interrupt controllers, which change with a reset.
    pub fn wiring(&self) -> Option<(Arc<Vm>, Arc<Synic>)> {
        let machine = self.machine.as_ref()?;
        Some((Arc::clone(&machine.vm), Arc::clone(&machine.around.synic)))
    }

    /// Which machine's outcomes still count: those of an older one came too late.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Lets the guest run. Its time goes on where it was when the guest was paused.
    pub fn run(&mut self) {
        if let Some(machine) = &mut self.machine {
            machine.clock.go();
            self.legacy.resume();
            machine.tell(Wanted::Run);
        }
    }

    /// Stops all processors and adapters where they are; returns when they have stopped.
    pub fn pause(&mut self) {
        self.legacy.pause();
        if let Some(machine) = &mut self.machine {
            machine.tell(Wanted::Park);
            machine.around.gate.all_parked(machine.handles.len());
            machine.clock.stop();
        }
    }

    /// Ends the machine; its memory stays.
    pub fn stop(&mut self) {
        self.legacy.pause();
        self.machine = None;
        self.parts.serial.flush();
    }

    /// A new machine over the same, cleared memory, not yet running.
    ///
    /// # Errors
    /// See [`PartitionError`].
    pub fn reset(&mut self) -> Result<(), PartitionError> {
        self.stop();
        self.memory.clear()?;
        self.parts.serial.reset();
        self.legacy.reset();
        self.build()
    }

    /// Plugs a cable, one end of a pair of sequenced packets, into the emulated adapter `name`; one from before is pulled.
    /// False if there is no such adapter.
    pub fn connect_legacy(&self, name: &str, socket: OwnedFd) -> bool {
        self.legacy.connect(name, socket)
    }

    /// Takes the link of the emulated adapter `name` down or up. False if there is no such adapter.
    pub fn set_legacy_link(&self, name: &str, up: bool) -> bool {
        self.legacy.set_link(name, up)
    }

    /// Its emulated adapters.
    pub fn legacy(&self) -> Vec<LegacyStatus> {
        self.legacy.status()
    }

    /// Presses the power button when it is called.
    pub fn power_button(&self) -> impl FnOnce() + Send + 'static {
        let button = self.button.try_clone();
        move || match button {
            Ok(button) => button.ring(),
            Err(error) => tracing::warn!(%error, "the power button cannot be pressed"),
        }
    }

    /// Exits of all processors since the last reset, by kind.
    pub fn exits(&self) -> Vec<(String, u64)> {
        let mut sums = [0u64; EXIT_NAMES.len()];
        for handle in self.machine.iter().flat_map(|machine| &machine.handles) {
            for (sum, count) in sums.iter_mut().zip(handle.exits.get()) {
                *sum = sum.saturating_add(count);
            }
        }
        EXIT_NAMES.iter().map(|name| (*name).to_owned()).zip(sums).collect()
    }

    fn build(&mut self) -> Result<(), PartitionError> {
        self.generation += 1;
        let entry = self.load()?;
        let count = self.parts.vcpus;
        let vm = Arc::new(Vm::new(&self.host, &self.memory)?);
        let fds = (0..count).map(|index| Ok(vm.create_vcpu(index)?));
        let fds = fds.collect::<Result<Vec<Processor>, PartitionError>>()?;
        let clock = Clock::new(&vm, &fds)?;
        vm.route_interrupts(count)?;
        vm.interrupt_by(self.parts.serial.interrupt(), Gsi(u32::from(acpi::SERIAL_GSI)))?;
        vm.interrupt_by(&self.button, Gsi(u32::from(acpi::POWER_GSI)))?;
        self.legacy.attach(&vm);
        let synic = Synic::new(Arc::clone(self.memory.guest()), count);
        let synic = Arc::new(synic.map_err(system("make synthetic interrupts"))?);
        for vp in 0..count {
            if let Some(interrupt) = synic.interrupt(vp) {
                vm.interrupt_by(interrupt, Gsi::sint(vp))?;
            }
        }
        let around = Arc::new(Surroundings {
            memory: Arc::clone(self.memory.guest()),
            ports: self.ports()?,
            mmio: self.legacy.window()?,
            synic,
            gate: Gate::default(),
            messages: Arc::clone(&self.messages),
            outcomes: self.outcomes.clone(),
            machine: self.generation,
        });
        let mut machine = Machine { vm, clock, around, handles: Vec::new(), threads: Vec::new() };
        for (index, fd) in (0..).zip(fds) {
            self.prepare(&fd, index, entry)?;
            self.spawn(&mut machine, index, fd)?;
        }
        // All of them are confined by now, or are not there: one that could not be has ended.
        machine.around.gate.all_parked(machine.handles.len());
        self.machine = Some(machine);
        Ok(())
    }

    /// Puts kernel and tables into memory; returns where the kernel is entered.
    fn load(&mut self) -> Result<u64, PartitionError> {
        let processors = u8::try_from(self.parts.vcpus).unwrap_or(u8::MAX);
        let root = self.legacy.description();
        let more: Vec<_> = root.iter().map(|root| root as &dyn Aml).collect();
        let tables = acpi::tables(processors, &more)?;
        let guest = self.memory.loader();
        guest.write_slice(&tables, GuestAddress(acpi::BASE)).map_err(BootError::from)?;
        let Settings { kernel, initrd, cmdline, .. } = &mut self.parts;
        Ok(boot::load(&self.memory, kernel, initrd.as_mut(), cmdline, acpi::BASE)?)
    }

    fn ports(&self) -> Result<Bus, PartitionError> {
        let mut bus = Bus::default();
        let mut place = |range: Range<u16>, device: Shared| {
            bus.place(u64::from(range.start)..u64::from(range.end), device)
        };
        let serial: Shared = Arc::new(Mutex::new(self.parts.serial.clone()));
        place(acpi::SERIAL_PORT..acpi::SERIAL_PORT + 8, serial)?;
        place(rtc::PORT..rtc::PORT + 2, Arc::new(Mutex::new(Rtc::default())))?;
        let power = |first| -> Shared {
            let (outcomes, machine) = (self.outcomes.clone(), self.generation);
            let tell = move |wish| {
                let _ = outcomes.send((machine, Outcome::Wish(wish)));
            };
            Arc::new(Mutex::new(Power::new(first, tell)))
        };
        place(power::SLEEP_CONTROL..power::SLEEP_CONTROL + 3, power(power::SLEEP_CONTROL))?;
        place(power::KEYBOARD..power::KEYBOARD + 1, power(power::KEYBOARD))?;
        let reset = power(power::CHIPSET_RESET);
        let (range, chipset) =
            self.legacy.ports(&reset).unwrap_or((power::CHIPSET_RESET..power::CHIPSET_RESET + 1, reset));
        place(range, chipset)?;
        Ok(bus)
    }

    fn prepare(&self, fd: &Processor, index: u32, entry: u64) -> Result<(), PartitionError> {
        use crate::kvm::failed;
        fd.set_cpuid2(&self.cpuid.of(index)?).map_err(failed("set processor features"))?;
        let msrs = Msrs::from_entries(&boot::firmware_msrs()).map_err(|_| CpuidError::TooMany)?;
        fd.set_msrs(&msrs).map_err(failed("set registers"))?;
        if index == 0 {
            let mut sregs = fd.get_sregs().map_err(failed("read registers"))?;
            boot::long_mode(&mut sregs);
            fd.set_sregs(&sregs).map_err(failed("set registers"))?;
            fd.set_regs(&boot::registers(entry)).map_err(failed("set registers"))?;
        }
        Ok(())
    }

    fn spawn(&self, machine: &mut Machine, index: u32, fd: Processor) -> Result<(), PartitionError> {
        let handle = Arc::new(Handle::new(Kick::new(&fd)?));
        let (around, confine) = (Arc::clone(&machine.around), self.confine.vcpu);
        let vcpu = Vcpu { fd, index, handle: Arc::clone(&handle), around };
        let pinned = usize::try_from(index).ok().and_then(|index| self.parts.pin.get(index)).copied();
        let thread = move || {
            let ready = pinned.map_or(Ok(()), pin).and_then(|()| confine());
            match ready {
                Ok(()) => vcpu.run(),
                Err(error) => {
                    let reason = format!("processor {index} cannot be pinned or confined: {error}");
                    vcpu.around.report(Outcome::Crashed(reason));
                    vcpu.around.gate.pass(true);
                }
            }
        };
        let builder = std::thread::Builder::new().name(format!("vcpu{index}")).stack_size(STACK);
        let thread = builder.spawn(thread).map_err(system("start a processor's thread"))?;
        machine.handles.push(handle);
        machine.threads.push(thread);
        Ok(())
    }
}

fn pin(processor: usize) -> std::io::Result<()> {
    if processor >= CpuSet::MAX_CPU {
        return Err(std::io::ErrorKind::InvalidInput.into());
    }
    let mut set = CpuSet::new();
    set.set(processor);
    Ok(sched_setaffinity(None, &set)?)
}
