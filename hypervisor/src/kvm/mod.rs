//! The edge to KVM: everything that takes an ioctl of its own or a pointer, so that the rest of the crate needs neither.

// UNSAFETY: registers memory with KVM, issues ioctls that `kvm-ioctls` does not wrap, and maps the run page of processors.
#![allow(unsafe_code)]

mod clock;
mod exit;
mod kick;
mod vm;

use std::arch::x86_64::__cpuid;
use std::ffi::c_ulong;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::OnceLock;

use kvm_bindings::{
    CpuId, KVM_CAP_HYPERV, KVM_CAP_HYPERV_EVENTFD, KVM_CAP_HYPERV_SYNIC2, KVM_CAP_HYPERV_TIME,
    KVM_CAP_HYPERV_VP_INDEX, KVM_CAP_IMMEDIATE_EXIT, KVM_CAP_IRQ_ROUTING, KVM_CAP_IRQCHIP, KVM_CAP_IRQFD,
    KVM_CAP_MAX_VCPUS, KVM_CAP_SYS_HYPERV_CPUID, KVM_CAP_TSC_DEADLINE_TIMER, KVM_CAP_USER_MEMORY,
    KVM_CAP_X86_MSR_FILTER, KVM_CAP_X86_USER_SPACE_MSR, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};
use kvm_ioctls::Kvm;

pub use clock::Clock;
pub use exit::{Hyperv, internal_error, take_hyperv};
pub use kick::{Kick, install_signal};
pub(crate) use vm::MSR_CRASH_CTL;
pub use vm::{EventId, Gsi, IOAPIC_PINS, Processor, Vm};

/// Version of the KVM interface since Linux 2.6.22.
const API_VERSION: i32 = 12;

/// Why there is no partition.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// The descriptor is not `/dev/kvm`, or a very old one.
    #[error("the descriptor handed over is not /dev/kvm: KVM interface version {0}, not {API_VERSION}")]
    Version(i32),
    /// The host's KVM lacks something.
    #[error("this host's KVM lacks {name} ({what}); Linux {since} or later has it")]
    Missing {
        /// The capability's name in the kernel's interface.
        name: &'static str,
        /// What it is for.
        what: &'static str,
        /// First kernel that has it.
        since: &'static str,
    },
    /// More processors than KVM allows.
    #[error("{asked} virtual processors asked for, KVM allows {most}")]
    TooManyProcessors {
        /// Asked for.
        asked: u32,
        /// Most.
        most: u32,
    },
    /// An ioctl failed.
    #[error("KVM refuses to {what}")]
    Ioctl {
        /// What was to be done.
        what: &'static str,
        /// The kernel's reason.
        #[source]
        source: std::io::Error,
    },
}

/// Turns the error of a `kvm-ioctls` call into ours.
pub(crate) fn failed(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> KvmError {
    move |error| KvmError::Ioctl { what, source: error.into() }
}

/// A capability without which a partition cannot look like a Hyper-V machine.
const NEEDED: &[(u32, &str, &str, &str)] = &[
    (KVM_CAP_USER_MEMORY, "KVM_CAP_USER_MEMORY", "guest memory", "2.6.26"),
    (KVM_CAP_IRQCHIP, "KVM_CAP_IRQCHIP", "interrupt controllers in the kernel", "2.6.20"),
    (KVM_CAP_IRQ_ROUTING, "KVM_CAP_IRQ_ROUTING", "interrupt routes", "2.6.30"),
    (KVM_CAP_IRQFD, "KVM_CAP_IRQFD", "interrupts by eventfd", "2.6.32"),
    (KVM_CAP_IMMEDIATE_EXIT, "KVM_CAP_IMMEDIATE_EXIT", "pausing processors", "4.12"),
    (KVM_CAP_HYPERV, "KVM_CAP_HYPERV", "Hyper-V registers", "2.6.34"),
    (KVM_CAP_HYPERV_TIME, "KVM_CAP_HYPERV_TIME", "reference time", "3.14"),
    (KVM_CAP_HYPERV_SYNIC2, "KVM_CAP_HYPERV_SYNIC2", "synthetic interrupt controller", "4.13"),
    (KVM_CAP_HYPERV_VP_INDEX, "KVM_CAP_HYPERV_VP_INDEX", "virtual processor index", "4.13"),
    (KVM_CAP_HYPERV_EVENTFD, "KVM_CAP_HYPERV_EVENTFD", "signal-event hypercalls by eventfd", "4.17"),
    (KVM_CAP_SYS_HYPERV_CPUID, "KVM_CAP_SYS_HYPERV_CPUID", "list of Hyper-V features", "5.11"),
];

/// An opened `/dev/kvm` that has all that is needed.
#[derive(Debug)]
pub struct Host {
    kvm: Kvm,
    /// Crash registers can be handled here rather than in the kernel, which knows no crash messages.
    pub msr_filter: bool,
    /// Guests can be told of the local timer's deadline mode.
    pub deadline_timer: bool,
}

/// Whether the processor ends interrupts of guests by itself (APICv, AVIC), which only the kernel module's parameters tell.
/// To be asked before the process gives up its files; what cannot be read is taken for a yes.
pub fn virtualizes_apic() -> bool {
    static KNOWN: OnceLock<bool> = OnceLock::new();
    let says_no = |parameter: &str| {
        let said = std::fs::read_to_string(format!("/sys/module/{parameter}"));
        said.is_ok_and(|said| matches!(said.trim(), "N" | "0"))
    };
    *KNOWN.get_or_init(|| {
        !["kvm_intel/parameters/enable_apicv", "kvm_amd/parameters/avic"].into_iter().any(says_no)
    })
}

/// Has the leaves say the name of this processor, as its own do.
fn name(leaves: &mut [kvm_cpuid_entry2]) {
    for leaf in leaves.iter_mut().filter(|leaf| (0x8000_0002..=0x8000_0004).contains(&leaf.function)) {
        #[allow(unused_unsafe, reason = "the oldest Rust that builds this calls it unsafe")]
        // SAFETY: every 64-bit processor has the instruction, and it changes nothing but its results.
        let own = unsafe { __cpuid(leaf.function) };
        (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (own.eax, own.ebx, own.ecx, own.edx);
    }
}

/// Checks what is needed against what there is.
fn complete(has: impl Fn(u32) -> bool) -> Result<(), KvmError> {
    match NEEDED.iter().find(|(number, ..)| !has(*number)) {
        Some(&(_, name, what, since)) => Err(KvmError::Missing { name, what, since }),
        None => Ok(()),
    }
}

impl Host {
    /// Takes over an opened `/dev/kvm` and checks what it can.
    ///
    /// # Errors
    /// [`KvmError::Missing`] names the first capability that is not there.
    pub fn new(fd: OwnedFd, processors: u32) -> Result<Self, KvmError> {
        // SAFETY: the descriptor is owned and open; the `Kvm` takes its ownership. If it is some other file, the first
        // ioctl fails.
        let kvm = unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) };
        let version = kvm.get_api_version();
        if version != API_VERSION {
            return Err(KvmError::Version(version));
        }
        let has = |number: u32| kvm.check_extension_raw(c_ulong::from(number)) > 0;
        complete(has)?;
        let most = u32::try_from(kvm.check_extension_raw(c_ulong::from(KVM_CAP_MAX_VCPUS))).unwrap_or(0);
        if processors > most {
            return Err(KvmError::TooManyProcessors { asked: processors, most });
        }
        let msr_filter = has(KVM_CAP_X86_USER_SPACE_MSR) && has(KVM_CAP_X86_MSR_FILTER);
        let deadline_timer = has(KVM_CAP_TSC_DEADLINE_TIMER);
        Ok(Self { kvm, msr_filter, deadline_timer })
    }

    /// Processor features that KVM can give to guests here, and the processor's name, which KVM leaves empty.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn supported_cpuid(&self) -> Result<CpuId, KvmError> {
        let leaves = self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES);
        let mut leaves = leaves.map_err(failed("list processor features"))?;
        name(leaves.as_mut_slice());
        Ok(leaves)
    }

    /// Hyper-V features that KVM can give to guests here (leaves 0x40000000 and up).
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn supported_hyperv_cpuid(&self) -> Result<CpuId, KvmError> {
        let failed = |source| KvmError::Ioctl { what: "list Hyper-V features", source };
        let mut list =
            CpuId::new(HYPERV_LEAVES).map_err(|error| failed(std::io::Error::other(format!("{error:?}"))))?;
        let request = opcode(READ_WRITE, 0xc1, size_of::<kvm_bindings::kvm_cpuid2>());
        // SAFETY: the pointer leads to a `kvm_cpuid2` with room for as many entries as its `nent` says, which the kernel
        // fills and does not exceed.
        let result = unsafe { libc::ioctl(raw(&self.kvm), request, list.as_mut_fam_struct_ptr()) };
        check(result).map_err(failed)?;
        Ok(list)
    }

    /// A virtual machine without memory or processors.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn create_vm(&self) -> Result<kvm_ioctls::VmFd, KvmError> {
        self.kvm.create_vm().map_err(failed("create a virtual machine"))
    }
}

/// Leaves that the kernel may list: twelve in Linux 6.12.
const HYPERV_LEAVES: usize = 64;

const WRITE: u64 = 1;
const READ_WRITE: u64 = 3;

/// Number of an ioctl of KVM (`_IOC` of the kernel's `ioctl.h`, group 0xAE).
const fn opcode(direction: u64, number: u64, size: usize) -> c_ulong {
    (direction << 30) | ((size as u64) << 16) | (0xae << 8) | number
}

fn raw(fd: &impl std::os::fd::AsRawFd) -> i32 {
    fd.as_raw_fd()
}

fn check(result: i32) -> std::io::Result<()> {
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ioctl_numbers_are_those_of_the_kernel_headers() {
        assert_eq!(opcode(READ_WRITE, 0xc1, 8), 0xc008_aec1);
        assert_eq!(opcode(WRITE, 0xe1, size_of::<kvm_bindings::kvm_device_attr>()), 0x4018_aee1);
        assert_eq!(opcode(WRITE, 0x76, size_of::<kvm_bindings::kvm_irqfd>()), 0x4020_ae76);
        assert_eq!(opcode(WRITE, 0xbd, size_of::<kvm_bindings::kvm_hyperv_eventfd>()), 0x4018_aebd);
    }

    #[test]
    fn capability_that_is_not_there_is_named_with_the_kernel_that_has_it() {
        assert!(complete(|_| true).is_ok());
        // Listing features of the whole host came later than of a processor.
        let error = complete(|number| number != 191).unwrap_err();
        let text = "this host's KVM lacks KVM_CAP_SYS_HYPERV_CPUID (list of Hyper-V features); Linux 5.11 or later has it";
        assert_eq!(error.to_string(), text);
    }

    #[test]
    fn leaves_get_the_name_that_the_kernel_has_of_this_processor() {
        let empty = |function| kvm_cpuid_entry2 { function, ..Default::default() };
        let mut leaves: Vec<_> = (0x8000_0001..=0x8000_0005).map(empty).collect();
        name(&mut leaves);
        assert_eq!((leaves[0], leaves[4]), (empty(0x8000_0001), empty(0x8000_0005)));
        let words = leaves[1..4].iter().flat_map(|leaf| [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]);
        let bytes: Vec<u8> = words.flat_map(u32::to_le_bytes).take_while(|byte| *byte != 0).collect();
        let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        let shown = std::fs::read_to_string("/proc/cpuinfo").unwrap();
        let shown = shown.lines().find_map(|line| line.strip_prefix("model name\t: ")).unwrap();
        assert!(bytes.is_empty() || words(&String::from_utf8_lossy(&bytes)) == words(shown), "{shown}");
    }

    #[test]
    fn descriptor_that_is_not_kvm_is_refused() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(matches!(Host::new(file.into(), 1), Err(KvmError::Version(_))));
    }
}
