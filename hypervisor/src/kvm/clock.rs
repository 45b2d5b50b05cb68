//! The guest's time, which stands still while the guest does: its clocks would leap by the length of a pause, and its
//! watchdogs bark at processors that were away.
//!
//! Two things tell a guest the time: KVM's clock (reference time, and the page that derives it from the time stamp counter)
//! and the counter itself, which is the host's plus an offset. Both go on where they were.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use kvm_bindings::{
    KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, Msrs, kvm_clock_data, kvm_device_attr, kvm_msr_entry, kvm_msrs,
};

use super::{KvmError, Processor, READ_WRITE, Vm, WRITE, check, failed, opcode, raw};

/// The time stamp counter, as the guest reads it.
const MSR_TSC: u32 = 0x10;

const SET_ATTRIBUTE: u64 = 0xe1;
const GET_ATTRIBUTE: u64 = 0xe2;

/// The time of one machine.
#[derive(Debug)]
pub struct Clock {
    vm: Arc<Vm>,
    processors: Vec<OwnedFd>,
    stopped: Option<Stopped>,
}

/// When the guest was stopped.
#[derive(Debug, Clone, Copy)]
struct Stopped {
    /// By KVM's clock, in ns.
    nanoseconds: u64,
    /// By the first processor's counter, in ticks.
    ticks: u64,
}

fn refused(what: &'static str) -> impl FnOnce(std::io::Error) -> KvmError {
    move |source| KvmError::Ioctl { what, source }
}

impl Clock {
    /// Of `vm`, which has `processors`.
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub fn new(vm: &Arc<Vm>, processors: &[Processor]) -> Result<Self, KvmError> {
        let again = |processor: &Processor| {
            // SAFETY: the descriptor is open for as long as `processor` is borrowed.
            let fd = unsafe { BorrowedFd::borrow_raw(raw(&processor.fd)) };
            fd.try_clone_to_owned().map_err(refused("hold a virtual processor's clock"))
        };
        let processors = processors.iter().map(again).collect::<Result<_, _>>()?;
        Ok(Self { vm: Arc::clone(vm), processors, stopped: None })
    }

    /// All processors stand still: time stops, if it has not already.
    pub fn stop(&mut self) {
        if self.stopped.is_none() {
            self.stopped = self.now().map_err(|error| warn(&error)).ok();
        }
    }

    /// Time goes on where it stopped. To be called before a processor runs.
    pub fn go(&mut self) {
        if let Some(stopped) = self.stopped.take() {
            let _ = self.go_on(stopped).map_err(|error| warn(&error));
        }
    }

    fn now(&self) -> Result<Stopped, KvmError> {
        let clock = self.vm.fd.get_clock().map_err(failed("tell the time"))?;
        let first = self.processors.first().map(ticks).transpose();
        let ticks = first.map_err(refused("tell the time stamp counter"))?.unwrap_or_default();
        Ok(Stopped { nanoseconds: clock.clock, ticks })
    }

    fn go_on(&self, stopped: Stopped) -> Result<(), KvmError> {
        let passed = self.now()?.ticks.wrapping_sub(stopped.ticks);
        for processor in &self.processors {
            // Before Linux 5.16 there is no such attribute: counters leap, which guests that take the reference time do not see.
            let mut offset = 0;
            if attribute(processor, GET_ATTRIBUTE, &mut offset).is_ok() {
                offset = offset.wrapping_sub(passed);
                attribute(processor, SET_ATTRIBUTE, &mut offset)
                    .map_err(refused("set a time stamp counter"))?;
            }
        }
        // Without flags: with that of real time the kernel would add what has passed.
        let clock = kvm_clock_data { clock: stopped.nanoseconds, ..Default::default() };
        self.vm.fd.set_clock(&clock).map_err(failed("set the time"))
    }
}

fn warn(error: &KvmError) {
    tracing::warn!(%error, "the guest's time leaps over the pause");
}

/// The counter of a processor that does not run.
fn ticks(processor: &OwnedFd) -> std::io::Result<u64> {
    let entry = kvm_msr_entry { index: MSR_TSC, ..Default::default() };
    let mut list =
        Msrs::from_entries(&[entry]).map_err(|error| std::io::Error::other(format!("{error:?}")))?;
    let request = opcode(READ_WRITE, 0x88, size_of::<kvm_msrs>());
    // SAFETY: the pointer leads to a `kvm_msrs` with as many entries as its `nmsrs` says, which the kernel fills.
    let result = unsafe { libc::ioctl(raw(processor), request, list.as_mut_fam_struct_ptr()) };
    check(result)?;
    Ok(list.as_slice().first().map_or(0, |entry| entry.data))
}

/// Reads or sets a processor's offset, in ticks, from the host's counter.
fn attribute(processor: &OwnedFd, number: u64, offset: &mut u64) -> std::io::Result<()> {
    let attribute = kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: std::ptr::from_mut(offset) as u64,
    };
    let request = opcode(WRITE, number, size_of::<kvm_device_attr>());
    // SAFETY: the kernel reads one `kvm_device_attr`, and reads or writes the `u64` that its address leads to, which is
    // borrowed mutably for that long.
    check(unsafe { libc::ioctl(raw(processor), request, &raw const attribute) })
}
