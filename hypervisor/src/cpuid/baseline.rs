//! Processors that many hosts can present: the levels of the x86-64 psABI.
//!
//! A baseline is a list of what *may* be shown (everything else is masked) and what *must* be there. Bits by which guests guard
//! against speculation attacks stay as the host has them: hiding them would leave the guest unprotected.

use kvm_bindings::kvm_cpuid_entry2;

use crate::control::Baseline;

/// The host has not what a baseline promises.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("this host's processor cannot present {baseline}: it lacks {}", lacks.join(", "))]
pub struct Lacks {
    /// Name of the baseline.
    pub baseline: &'static str,
    /// Features that are missing.
    pub lacks: Vec<&'static str>,
}

/// Register of a leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Register {
    Ebx,
    Ecx,
    Edx,
}
use Register::{Ebx, Ecx, Edx};

/// A named bit: leaf (and sub-leaf 0), register, bit, name.
type Bit = (u32, Register, u32, &'static str);

const V1: &[Bit] = &[
    (1, Edx, 0, "fpu"),
    (1, Edx, 8, "cx8"),
    (1, Edx, 15, "cmov"),
    (1, Edx, 23, "mmx"),
    (1, Edx, 24, "fxsr"),
    (1, Edx, 25, "sse"),
    (1, Edx, 26, "sse2"),
    (0x8000_0001, Edx, 11, "syscall"),
    (0x8000_0001, Edx, 20, "nx"),
    (0x8000_0001, Edx, 29, "lm"),
];

const V2: &[Bit] = &[
    (1, Ecx, 0, "sse3"),
    (1, Ecx, 9, "ssse3"),
    (1, Ecx, 13, "cx16"),
    (1, Ecx, 19, "sse4.1"),
    (1, Ecx, 20, "sse4.2"),
    (1, Ecx, 23, "popcnt"),
    (0x8000_0001, Ecx, 0, "lahf"),
];

const V3: &[Bit] = &[
    (1, Ecx, 12, "fma"),
    (1, Ecx, 22, "movbe"),
    (1, Ecx, 26, "xsave"),
    (1, Ecx, 28, "avx"),
    (1, Ecx, 29, "f16c"),
    (7, Ebx, 3, "bmi1"),
    (7, Ebx, 5, "avx2"),
    (7, Ebx, 8, "bmi2"),
    (0x8000_0001, Ecx, 5, "lzcnt"),
];

const V4: &[Bit] = &[
    (7, Ebx, 16, "avx512f"),
    (7, Ebx, 17, "avx512dq"),
    (7, Ebx, 28, "avx512cd"),
    (7, Ebx, 30, "avx512bw"),
    (7, Ebx, 31, "avx512vl"),
];

/// What every level may show besides, where the host has it: (leaf, register, bits).
const PLUMBING: &[(u32, Register, u32)] = &[
    // x2apic, deadline timer, osxsave (follows CR4), hypervisor.
    (1, Ecx, (1 << 21) | (1 << 24) | (1 << 27) | (1 << 31)),
    // All of the first word but what only laptops and debuggers use (DS, ACPI, SS, TM, IA64, PBE).
    (1, Edx, 0x178b_fbff),
    // Speculation: MD_CLEAR, IBRS/IBPB, STIBP, L1D flush, ARCH_CAPABILITIES, SSBD.
    (7, Edx, (1 << 10) | (0x1f << 26) | (1 << 31)),
    // Legacy bits of AMD: cmp_legacy, cr8; and the first word once more.
    (0x8000_0001, Ecx, (1 << 1) | (1 << 4)),
    (0x8000_0001, Edx, 0x0183_f3ff | (1 << 11) | (1 << 20) | (1 << 27) | (1 << 29)),
    // Invariant TSC.
    (0x8000_0007, Edx, 1 << 8),
    // Speculation on AMD: IBPB, IBRS, STIBP, SSBD and their relatives.
    (0x8000_0008, Ebx, (1 << 12) | (0x1f << 14) | (0xf << 23) | (1 << 28)),
];

/// Leaves whose feature bits are masked. Sub-leaves other than 0 of leaf 7, and leaves with features of no baseline, vanish.
const MASKED: &[(u32, &[Register])] = &[
    (1, &[Ecx, Edx]),
    (7, &[Ebx, Ecx, Edx]),
    (0x8000_0001, &[Ecx, Edx]),
    (0x8000_0007, &[Edx]),
    (0x8000_0008, &[Ebx]),
];

/// Performance counters, SGX, processor trace, tile registers, key locker; SVM, memory encryption.
const GONE: &[u32] = &[0xa, 0x12, 0x14, 0x19, 0x1d, 0x1e, 0x8000_000a, 0x8000_001f, 0x8000_0021, 0x8000_0022];

/// State components of leaf 0xD by level: x87 and SSE; AVX; AVX-512 (three).
fn state_components(baseline: Baseline) -> u32 {
    match baseline {
        Baseline::V2 => 0,
        Baseline::V3 => 0b111,
        Baseline::V4 => 0b1110_0111,
    }
}

fn levels(baseline: Baseline) -> (&'static str, &'static [&'static [Bit]]) {
    match baseline {
        Baseline::V2 => ("x86-64-v2", &[V1, V2]),
        Baseline::V3 => ("x86-64-v3", &[V1, V2, V3]),
        Baseline::V4 => ("x86-64-v4", &[V1, V2, V3, V4]),
    }
}

fn register(leaf: &mut kvm_cpuid_entry2, register: Register) -> &mut u32 {
    match register {
        Ebx => &mut leaf.ebx,
        Ecx => &mut leaf.ecx,
        Edx => &mut leaf.edx,
    }
}

/// Masks `leaves` down to the baseline.
///
/// # Errors
/// [`Lacks`] lists the features of the baseline that are not there.
pub fn apply(baseline: Baseline, leaves: &mut Vec<kvm_cpuid_entry2>) -> Result<(), Lacks> {
    let (name, levels) = levels(baseline);
    let mut lacks = Vec::new();
    for &(function, which, bit, feature) in levels.iter().copied().flatten() {
        let there = leaves
            .iter_mut()
            .find(|leaf| leaf.function == function && leaf.index == 0)
            .is_some_and(|leaf| *register(leaf, which) & (1 << bit) != 0);
        if !there {
            lacks.push(feature);
        }
    }
    if !lacks.is_empty() {
        return Err(Lacks { baseline: name, lacks });
    }
    let components = state_components(baseline);
    leaves.retain(|leaf| !GONE.contains(&leaf.function) && (leaf.function != 7 || leaf.index == 0));
    leaves.retain(|leaf| match (leaf.function, leaf.index) {
        (0xd, 0 | 1) => components != 0,
        (0xd, component) => component < 32 && components & (1 << component) != 0,
        _ => true,
    });
    for leaf in leaves.iter_mut() {
        mask(leaf, levels, components);
    }
    Ok(())
}

fn mask(leaf: &mut kvm_cpuid_entry2, levels: &[&[Bit]], components: u32) {
    match (leaf.function, leaf.index) {
        (7, 0) => leaf.eax = 0,
        (0xd, 0) => (leaf.eax, leaf.edx) = (leaf.eax & components, 0),
        // Supervisor states and their compaction belong to later processors; XSAVEOPT came with AVX.
        (0xd, 1) => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (leaf.eax & 1, 0, 0, 0),
        _ => {}
    }
    let function = leaf.function;
    let Some((_, registers)) = MASKED.iter().find(|(masked, _)| *masked == function) else { return };
    for &which in *registers {
        let features = levels.iter().copied().flatten();
        let features =
            features.filter(|bit| bit.0 == function && bit.1 == which).fold(0, |all, bit| all | (1 << bit.2));
        let plumbing = PLUMBING.iter().filter(|(of, on, _)| *of == function && *on == which);
        let plumbing = plumbing.fold(0, |all, (_, _, bits)| all | bits);
        *register(leaf, which) &= features | plumbing;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn everything() -> Vec<kvm_cpuid_entry2> {
        let full = |function, index| kvm_cpuid_entry2 {
            function,
            index,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        };
        [(0, 0), (1, 0), (7, 0), (7, 1), (0xd, 0), (0xd, 1), (0xd, 2), (0xd, 5), (0xd, 18), (0x14, 0)]
            .into_iter()
            .chain([0x8000_0001, 0x8000_0007, 0x8000_0008, 0x8000_001f].map(|function| (function, 0)))
            .map(|(function, index)| full(function, index))
            .collect()
    }

    fn leaf(leaves: &[kvm_cpuid_entry2], function: u32, index: u32) -> Option<kvm_cpuid_entry2> {
        leaves.iter().find(|leaf| (leaf.function, leaf.index) == (function, index)).copied()
    }

    #[test]
    fn levels_show_their_features_and_no_later_ones() {
        let shown = |baseline| {
            let mut leaves = everything();
            apply(baseline, &mut leaves).unwrap();
            leaves
        };
        let v2 = shown(Baseline::V2);
        assert_eq!(leaf(&v2, 7, 0).unwrap().ebx, 0);
        assert_eq!(leaf(&v2, 1, 0).unwrap().ecx & (1 << 28), 0);
        assert!(leaf(&v2, 0xd, 0).is_none());
        let v3 = shown(Baseline::V3);
        assert_eq!(leaf(&v3, 7, 0).unwrap().ebx, (1 << 3) | (1 << 5) | (1 << 8));
        assert_eq!(leaf(&v3, 0xd, 0).unwrap().eax, 7);
        assert!(leaf(&v3, 0xd, 2).is_some() && leaf(&v3, 0xd, 5).is_none());
        let v4 = shown(Baseline::V4);
        assert_ne!(leaf(&v4, 7, 0).unwrap().ebx & (1 << 16), 0);
        assert!(leaf(&v4, 0xd, 5).is_some());
        for leaves in [v2, v3, v4] {
            assert!(leaf(&leaves, 0x14, 0).is_none() && leaf(&leaves, 7, 1).is_none());
            assert!(leaf(&leaves, 0x8000_001f, 0).is_none() && leaf(&leaves, 0xd, 18).is_none());
            assert_ne!(leaf(&leaves, 7, 0).unwrap().edx & (1 << 26), 0, "guards against speculation stay");
        }
    }

    #[test]
    fn missing_features_are_named() {
        let mut leaves = everything();
        for leaf in &mut leaves {
            if leaf.function == 7 {
                leaf.ebx = !(1 << 16) & !(1 << 5);
            }
        }
        let error = apply(Baseline::V4, &mut leaves).unwrap_err();
        assert_eq!(error.lacks, ["avx2", "avx512f"]);
        assert_eq!(
            error.to_string(),
            "this host's processor cannot present x86-64-v4: it lacks avx2, avx512f"
        );
        assert!(apply(Baseline::V2, &mut leaves).is_ok());
    }
}
