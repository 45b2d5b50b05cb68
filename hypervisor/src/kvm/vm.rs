//! A virtual machine: memory slots, interrupt routes, and eventfds both ways.

use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_HYPERV_SYNIC2, KVM_CAP_X86_USER_SPACE_MSR, KVM_HYPERV_EVENTFD_DEASSIGN, KVM_IRQ_ROUTING_HV_SINT,
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQCHIP_IOAPIC, KVM_IRQFD_FLAG_DEASSIGN, KVM_MSR_EXIT_REASON_FILTER,
    KvmIrqRouting, kvm_enable_cap, kvm_hyperv_eventfd, kvm_irq_routing_entry, kvm_irqfd,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VcpuExit, VcpuFd, VmFd};
use vmq::doorbell::Doorbell;

use super::{Host, KvmError, WRITE, check, failed, opcode};
use crate::memory::Memory;

/// An interrupt source: a pin of the I/O APIC, or a processor's synthetic interrupt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gsi(pub u32);

/// Pins of the I/O APIC: the first interrupt sources.
pub const IOAPIC_PINS: u32 = 24;

impl Gsi {
    /// The synthetic interrupt source (SINT 2) of a processor.
    pub fn sint(vp: u32) -> Self {
        Self(IOAPIC_PINS + vp)
    }
}

/// Connection id of a signal-event hypercall, 24 bits.
pub type EventId = u32;

/// Intel's virtualization needs three pages of guest addresses for itself, below the firmware's place at 4 GiB.
const TSS: usize = 0xfffb_d000;
const IDENTITY_MAP: u64 = 0xfffb_c000;

/// Crash control, the only register that is handled here: the kernel knows no crash messages.
pub(crate) const MSR_CRASH_CTL: u32 = 0x4000_0105;

/// A virtual machine of KVM with its interrupt controllers.
#[derive(Debug)]
pub struct Vm {
    pub(super) fd: VmFd,
    /// Its addresses are registered; let go of after the machine.
    _memory: Arc<Memory>,
}

/// A virtual processor. The kernel keeps its machine; this keeps the memory of that.
#[derive(Debug)]
pub struct Processor {
    pub(super) fd: VcpuFd,
    _vm: Arc<Vm>,
}

impl Processor {
    /// Runs the guest until it leaves guest mode.
    ///
    /// # Errors
    /// The kernel's: EINTR after a [`super::Kick`].
    pub fn run(&mut self) -> Result<VcpuExit<'_>, kvm_ioctls::Error> {
        self.fd.run()
    }
}

/// Not mutably: what is inside must not be taken out.
impl Deref for Processor {
    type Target = VcpuFd;

    fn deref(&self) -> &VcpuFd {
        &self.fd
    }
}

impl Vm {
    /// A machine with `memory` and interrupt routes for `processors`, none of which exist yet.
    ///
    /// # Errors
    /// The kernel refuses; the error names the step.
    pub fn new(host: &Host, memory: &Arc<Memory>) -> Result<Self, KvmError> {
        let fd = host.create_vm()?;
        fd.set_identity_map_address(IDENTITY_MAP).map_err(failed("place the identity map"))?;
        fd.set_tss_address(TSS).map_err(failed("place the task state"))?;
        fd.create_irq_chip().map_err(failed("create interrupt controllers"))?;
        for (slot, region) in (0..).zip(memory.slots()) {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.guest,
                memory_size: region.len,
                userspace_addr: region.host,
            };
            // SAFETY: the range belongs to a mapping that `memory` owns; machine and processors keep it for as long as
            // they live.
            unsafe { fd.set_user_memory_region(region) }.map_err(failed("register guest memory"))?;
        }
        let vm = Self { fd, _memory: Arc::clone(memory) };
        if host.msr_filter {
            vm.take_crash_control()?;
        }
        Ok(vm)
    }

    /// Has accesses to the crash control register exit to us.
    fn take_crash_control(&self) -> Result<(), KvmError> {
        let cap = kvm_enable_cap {
            cap: KVM_CAP_X86_USER_SPACE_MSR,
            args: [u64::from(KVM_MSR_EXIT_REASON_FILTER), 0, 0, 0],
            ..Default::default()
        };
        self.fd.enable_cap(&cap).map_err(failed("handle registers in user space"))?;
        let range = MsrFilterRange {
            flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
            base: MSR_CRASH_CTL,
            msr_count: 1,
            bitmap: &[0],
        };
        self.fd
            .set_msr_filter(MsrFilterDefaultAction::ALLOW, &[range])
            .map_err(failed("handle the crash register in user space"))
    }

    /// Processor `index`, with its synthetic interrupt controller on. To be called in order of the index, which
    /// becomes the VP index.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn create_vcpu(self: &Arc<Self>, index: u32) -> Result<Processor, KvmError> {
        let vcpu = self.fd.create_vcpu(u64::from(index)).map_err(failed("create a virtual processor"))?;
        let cap = kvm_enable_cap { cap: KVM_CAP_HYPERV_SYNIC2, ..Default::default() };
        vcpu.enable_cap(&cap).map_err(failed("switch the synthetic interrupt controller on"))?;
        Ok(Processor { fd: vcpu, _vm: Arc::clone(self) })
    }

    /// Routes the I/O APIC's pins, and SINT 2 of each of `processors`. The old interrupt controllers (PIC) get
    /// nothing: no guest that finds ACPI uses them.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn route_interrupts(&self, processors: u32) -> Result<(), KvmError> {
        let mut entries = Vec::new();
        for pin in 0..IOAPIC_PINS {
            let mut entry =
                kvm_irq_routing_entry { gsi: pin, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
            entry.u.irqchip.irqchip = KVM_IRQCHIP_IOAPIC;
            entry.u.irqchip.pin = pin;
            entries.push(entry);
        }
        for vp in 0..processors {
            let mut entry = kvm_irq_routing_entry {
                gsi: Gsi::sint(vp).0,
                type_: KVM_IRQ_ROUTING_HV_SINT,
                ..Default::default()
            };
            entry.u.hv_sint.vcpu = vp;
            entry.u.hv_sint.sint = crate::synic::SINT;
            entries.push(entry);
        }
        let routing = KvmIrqRouting::from_entries(&entries).map_err(|error| KvmError::Ioctl {
            what: "route interrupts",
            source: std::io::Error::other(format!("{error:?}")),
        })?;
        self.fd.set_gsi_routing(&routing).map_err(failed("route interrupts"))
    }

    /// From now on ringing `doorbell` raises the interrupt `gsi`, without this process's help.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn interrupt_by(&self, doorbell: &Doorbell, gsi: Gsi) -> Result<(), KvmError> {
        self.irqfd(doorbell.as_fd(), gsi, 0)
    }

    /// Undoes [`Vm::interrupt_by`].
    ///
    /// # Errors
    /// It was not done.
    pub fn no_interrupt_by(&self, doorbell: &Doorbell, gsi: Gsi) -> Result<(), KvmError> {
        self.irqfd(doorbell.as_fd(), gsi, KVM_IRQFD_FLAG_DEASSIGN)
    }

    fn irqfd(&self, fd: BorrowedFd<'_>, gsi: Gsi, flags: u32) -> Result<(), KvmError> {
        let irqfd = kvm_irqfd { fd: unsigned(fd), gsi: gsi.0, flags, ..Default::default() };
        let request = opcode(WRITE, 0x76, size_of::<kvm_irqfd>());
        // SAFETY: the kernel reads one `kvm_irqfd`; both descriptors are open.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), request, &raw const irqfd) };
        check(result).map_err(|source| KvmError::Ioctl { what: "tie an eventfd to an interrupt", source })
    }

    /// From now on a guest's signal-event hypercall for connection `id` rings `doorbell`, without this process's help.
    ///
    /// # Errors
    /// The id is taken or has more than 24 bits.
    pub fn signal_event_rings(&self, id: EventId, doorbell: &Doorbell) -> Result<(), KvmError> {
        self.event(id, doorbell.as_fd().as_raw_fd(), 0)
    }

    /// Undoes [`Vm::signal_event_rings`].
    ///
    /// # Errors
    /// It was not done.
    pub fn signal_event_is_over(&self, id: EventId) -> Result<(), KvmError> {
        self.event(id, -1, KVM_HYPERV_EVENTFD_DEASSIGN)
    }

    fn event(&self, conn_id: EventId, fd: i32, flags: u32) -> Result<(), KvmError> {
        let event = kvm_hyperv_eventfd { conn_id, fd, flags, padding: [0; 3] };
        let request = opcode(WRITE, 0xbd, size_of::<kvm_hyperv_eventfd>());
        // SAFETY: the kernel reads one `kvm_hyperv_eventfd`.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), request, &raw const event) };
        check(result).map_err(|source| KvmError::Ioctl { what: "tie a connection to an eventfd", source })
    }

    /// The guest's reference time (what TIME_REF_COUNT reads), in units of 100 ns. 0 if the kernel does not tell.
    pub fn reference_time(&self) -> u64 {
        self.fd.get_clock().map_or(0, |clock| clock.clock / 100)
    }

    /// Sets the level of an interrupt line (level-triggered devices).
    pub fn set_line(&self, gsi: Gsi, high: bool) {
        // Fails only for a line that does not exist.
        if let Err(error) = self.fd.set_irq_line(gsi.0, high) {
            tracing::warn!(line = gsi.0, %error, "interrupt line cannot be set");
        }
    }
}

#[expect(clippy::cast_sign_loss, reason = "an open descriptor is not negative")]
fn unsigned(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd() as u32
}
