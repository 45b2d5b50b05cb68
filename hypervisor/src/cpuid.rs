//! What a guest is told of its processor: the host's features, or a baseline of them, and the face of Hyper-V.
//!
//! Facts of the Hyper-V leaves: `hyperv-cpuid-msr-hypercall.md` section 1. Only the `Microsoft Hv` signature is shown: guests take
//! the hypervisor with the highest leaf, and a second signature would hide this one.

#![forbid(unsafe_code)]

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use crate::control::Baseline;
use crate::kvm::{Host, KvmError, virtualizes_apic};

mod baseline;

pub use baseline::Lacks;

/// Why there is no processor to show.
#[derive(Debug, thiserror::Error)]
pub enum CpuidError {
    /// The host cannot present the baseline.
    #[error(transparent)]
    Baseline(#[from] Lacks),
    /// KVM does not say what it can.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// More leaves than the kernel takes.
    #[error("too many processor feature leaves")]
    TooMany,
}

/// Makes the leaves of every processor of a guest.
#[derive(Debug)]
pub struct Cpuid {
    leaves: Vec<kvm_cpuid_entry2>,
    processors: u32,
    amd: bool,
}

impl Cpuid {
    /// What guests with `processors` see on this host.
    ///
    /// # Errors
    /// See [`CpuidError`].
    pub fn new(host: &Host, processors: u32, baseline: Option<Baseline>) -> Result<Self, CpuidError> {
        let supported = host.supported_cpuid()?;
        let hyperv = host.supported_hyperv_cpuid()?;
        let mut leaves: Vec<_> =
            supported.as_slice().iter().filter(|leaf| leaf.function >> 28 != 4).copied().collect();
        if host.deadline_timer
            && let Some(leaf) = leaves.iter_mut().find(|leaf| leaf.function == 1)
        {
            leaf.ecx |= DEADLINE_TIMER;
        }
        if let Some(baseline) = baseline {
            baseline::apply(baseline, &mut leaves)?;
        }
        hide_virtualization(&mut leaves);
        let amd = leaves.iter().any(|leaf| leaf.function == 0 && leaf.ebx == AUTHENTIC_AMD);
        leaves.extend(microsoft(hyperv.as_slice(), address_bits(&leaves), !virtualizes_apic()));
        Ok(Self { leaves, processors, amd })
    }

    /// The leaves of processor `index`: its APIC id and place in the topology, one socket of single-threaded cores.
    ///
    /// # Errors
    /// [`CpuidError::TooMany`].
    pub fn of(&self, index: u32) -> Result<CpuId, CpuidError> {
        let mut leaves: Vec<_> =
            self.leaves.iter().filter(|leaf| !matches!(leaf.function, 0xb | 0x1f)).copied().collect();
        leaves.extend(self.extended_topology(index));
        for leaf in &mut leaves {
            self.place(leaf, index);
        }
        CpuId::from_entries(&leaves).map_err(|_| CpuidError::TooMany)
    }

    /// Bits of an APIC id that number the cores of a socket.
    fn core_bits(&self) -> u32 {
        self.processors.next_power_of_two().trailing_zeros()
    }

    fn place(&self, leaf: &mut kvm_cpuid_entry2, index: u32) {
        let last = self.processors.saturating_sub(1);
        match leaf.function {
            1 => {
                leaf.ebx = (leaf.ebx & 0xffff) | (self.processors << 16) | (index << 24);
                leaf.ecx |= HYPERVISOR;
                let hyper_threading = 1 << 28;
                leaf.edx = (leaf.edx & !hyper_threading) | if last > 0 { hyper_threading } else { 0 };
            }
            // Caches: the last level is shared by the socket, the others belong to a core.
            4 if leaf.eax & 0x1f != 0 => {
                let sharers = if (leaf.eax >> 5) & 7 >= 3 { last } else { 0 };
                leaf.eax = (leaf.eax & 0x3fff) | (sharers << 14) | (last.min(63) << 26);
            }
            0x8000_001d if leaf.eax & 0x1f != 0 => {
                let sharers = if (leaf.eax >> 5) & 7 >= 3 { last } else { 0 };
                leaf.eax = (leaf.eax & 0x3fff) | (sharers << 14);
            }
            0x8000_0008 if self.amd => leaf.ecx = (self.core_bits() << 12) | last,
            0x8000_001e => (leaf.eax, leaf.ebx, leaf.ecx) = (index, index & 0xff, 0),
            _ => {}
        }
    }

    /// Leaf 0xB: threads (one a core), cores, end.
    fn extended_topology(&self, index: u32) -> [kvm_cpuid_entry2; 3] {
        let level = |number: u32, kind: u32, shift: u32, count: u32| kvm_cpuid_entry2 {
            function: 0xb,
            index: number,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: count,
            ecx: number | (kind << 8),
            edx: index,
            ..Default::default()
        };
        [level(0, 1, 0, 1), level(1, 2, self.core_bits(), self.processors), level(2, 0, 0, 0)]
    }
}

const AUTHENTIC_AMD: u32 = u32::from_le_bytes(*b"Auth");

/// Leaf 1 ECX: timer with a deadline.
const DEADLINE_TIMER: u32 = 1 << 24;

/// Leaf 1 ECX: there is a hypervisor.
const HYPERVISOR: u32 = 1 << 31;

/// A guest is no host: what KVM would lend it of VMX and SVM is neither paused nor moved with it.
fn hide_virtualization(leaves: &mut Vec<kvm_cpuid_entry2>) {
    const VMX: u32 = 1 << 5;
    const SVM: u32 = 1 << 2;
    leaves.retain(|leaf| leaf.function != 0x8000_000a);
    for leaf in leaves {
        match leaf.function {
            1 => leaf.ecx &= !VMX,
            0x8000_0001 => leaf.ecx &= !SVM,
            _ => {}
        }
    }
}

/// Physical address bits (leaf 0x80000008).
fn address_bits(leaves: &[kvm_cpuid_entry2]) -> u32 {
    leaves.iter().find(|leaf| leaf.function == 0x8000_0008).map_or(36, |leaf| leaf.eax & 0xff)
}

/// Privileges (0x40000003 EAX): reference counter, SynIC, synthetic timers, hypercalls, VP index, reference TSC page, frequencies,
/// TSC invariance control. The last only where KVM has it.
const PRIVILEGES: u32 =
    (1 << 1) | (1 << 2) | (1 << 3) | (1 << 5) | (1 << 6) | (1 << 9) | (1 << 11) | (1 << 15);

/// Privileges (EAX): end of interrupt in the assist page or by MSR, and the rest of the local APIC by MSR.
const APIC_ACCESS: u32 = 1 << 4;

/// Privileges, high half (EBX): post messages, signal events.
const PRIVILEGES_HIGH: u32 = (1 << 4) | (1 << 5);

/// Features (EDX): frequency registers, crash registers, timers that interrupt directly rather than by message.
const FEATURES: u32 = (1 << 8) | (1 << 10) | (1 << 19);

/// Hints (0x40000004 EAX): relaxed timing, and no automatic end of interrupt (it would switch hardware APIC
/// virtualization off).
const HINTS: u32 = (1 << 5) | (1 << 9);

/// Hint: end interrupts in the assist page. That saves an exit for nearly each interrupt where the processor does not
/// virtualize the APIC, and costs one where it does.
const LAZY_END: u32 = 1 << 3;

/// The leaves from 0x40000000, as far as KVM (`supported`) can keep what they promise.
fn microsoft(supported: &[kvm_cpuid_entry2], address_bits: u32, lazy_end: bool) -> Vec<kvm_cpuid_entry2> {
    let known =
        |function: u32| supported.iter().find(|leaf| leaf.function == function).copied().unwrap_or_default();
    let leaf = |function: u32, [eax, ebx, ecx, edx]: [u32; 4]| kvm_cpuid_entry2 {
        function,
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    };
    let text = |text: &[u8; 4]| u32::from_le_bytes(*text);
    let features = known(0x4000_0003);
    let apic_access = if lazy_end { features.eax & APIC_ACCESS } else { 0 };
    let hints = if apic_access == 0 { HINTS } else { HINTS | LAZY_END };
    let mut leaves = vec![
        leaf(0x4000_0000, [0x4000_0005, text(b"Micr"), text(b"osof"), text(b"t Hv")]),
        leaf(0x4000_0001, [text(b"Hv#1"), 0, 0, 0]),
        // Version 10.0, build 20348: what Windows Server 2022 says.
        leaf(0x4000_0002, [20348, 10 << 16, 0, 0]),
        leaf(
            0x4000_0003,
            [
                features.eax & PRIVILEGES | apic_access,
                features.ebx & PRIVILEGES_HIGH,
                0,
                features.edx & FEATURES,
            ],
        ),
        // Never tell the hypervisor of long spins.
        leaf(0x4000_0004, [hints, u32::MAX, address_bits, 0]),
        leaf(0x4000_0005, [crate::control::MAX_VCPUS, crate::control::MAX_VCPUS, 0, 0]),
    ];
    // Leaves that guests read beyond the highest: on Intel, leaves that are not there would show another one's contents.
    let empty = (0x4000_0006..=0x4000_000c).chain(0x4000_0080..=0x4000_0082);
    leaves.extend(empty.map(|function| leaf(function, [0; 4])));
    leaves
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all_supported() -> Vec<kvm_cpuid_entry2> {
        (0x4000_0000..=0x4000_0005)
            .map(|function| kvm_cpuid_entry2 {
                function,
                eax: u32::MAX,
                ebx: u32::MAX,
                ecx: u32::MAX,
                edx: u32::MAX,
                ..Default::default()
            })
            .collect()
    }

    fn cpuid(processors: u32) -> Cpuid {
        let leaf = |function, eax, ebx| kvm_cpuid_entry2 { function, eax, ebx, ..Default::default() };
        let leaves = vec![
            leaf(0, 13, AUTHENTIC_AMD),
            leaf(1, 0, 0xff00_0800),
            leaf(0x8000_0008, 48, 0),
            leaf(0x8000_001e, 0, 0),
        ];
        Cpuid { leaves, processors, amd: true }
    }

    fn find(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        let found = cpuid.as_slice().iter().find(|leaf| leaf.function == function && leaf.index == index);
        *found.unwrap()
    }

    #[test]
    fn guest_sees_hyper_v_and_no_privilege_that_breaks_linux() {
        let leaves = microsoft(&all_supported(), 40, false);
        let signature = leaves[0];
        assert_eq!((signature.ebx, signature.ecx, signature.edx), (0x7263_694d, 0x666f_736f, 0x7648_2074));
        assert_eq!(leaves[1].eax, 0x3123_7648);
        let features = leaves[3];
        assert_eq!(features.eax, 0x8a6e);
        assert_eq!(features.ebx & ((1 << 1) | (1 << 12) | (1 << 20) | (1 << 22)), 0);
        assert_eq!(features.edx, 0x8_0500);
        assert_eq!((leaves[4].eax, leaves[4].ecx), (0x220, 40));
    }

    #[test]
    fn interrupts_end_lazily_only_where_it_saves_an_exit_and_kvm_can() {
        let shown = |supported: &[kvm_cpuid_entry2], lazy_end| {
            let leaves = microsoft(supported, 40, lazy_end);
            (leaves[3].eax & APIC_ACCESS, leaves[4].eax)
        };
        assert_eq!(shown(&all_supported(), true), (APIC_ACCESS, 0x228));
        assert_eq!(shown(&all_supported(), false), (0, 0x220));
        let mut old = all_supported();
        old[3].eax &= !APIC_ACCESS;
        assert_eq!(shown(&old, true), (0, 0x220));
    }

    #[test]
    fn virtualization_is_not_lent() {
        let leaf = |function, ecx| kvm_cpuid_entry2 { function, ecx, ..Default::default() };
        let mut leaves = vec![leaf(1, 0x2a), leaf(0x8000_0001, 0x107), leaf(0x8000_000a, 1)];
        hide_virtualization(&mut leaves);
        assert_eq!(leaves, [leaf(1, 0xa), leaf(0x8000_0001, 0x103)]);
    }

    #[test]
    fn what_kvm_cannot_do_is_not_promised() {
        let mut supported = all_supported();
        supported[3].eax &= !(1 << 15);
        supported[3].edx = 0;
        let leaves = microsoft(&supported, 40, false);
        assert_eq!((leaves[3].eax, leaves[3].edx), (0xa6e, 0));
    }

    #[test]
    fn processors_are_cores_of_one_socket() {
        let leaves = cpuid(6).of(5).unwrap();
        assert_eq!(find(&leaves, 1, 0).ebx, (5 << 24) | (6 << 16) | 0x800);
        assert_ne!(find(&leaves, 1, 0).ecx & HYPERVISOR, 0);
        let cores = find(&leaves, 0xb, 1);
        assert_eq!((cores.eax, cores.ebx, cores.ecx, cores.edx), (3, 6, 0x201, 5));
        assert_eq!(find(&leaves, 0x8000_0008, 0).ecx, (3 << 12) | 5);
    }
}
