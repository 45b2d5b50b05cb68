//! Processors that many hosts can present: the levels of the x86-64 psABI, and models built on them.
//!
//! A baseline is a list of what *may* be shown (everything else is masked) and what *must* be there. Bits by which guests guard
//! against speculation attacks stay as the host has them: hiding them would leave the guest unprotected. A model also has a
//! maker, which must be the host's (calls into the kernel and registers differ), and the number and name of its kind.
//! Features of models: Intel SDM volume 2A, CPUID; AMD APM volume 3, appendix E. What Intel or AMD took back from
//! processors in the field (TSX, MPX) and what a guest cannot have (topology of nodes, performance counters) is left out.

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

const HASWELL: &[Bit] = &[
    (1, Ecx, 1, "pclmulqdq"),
    (1, Ecx, 17, "pcid"),
    (1, Ecx, 25, "aes"),
    (1, Ecx, 30, "rdrand"),
    (7, Ebx, 0, "fsgsbase"),
    (7, Ebx, 7, "smep"),
    (7, Ebx, 9, "erms"),
    (7, Ebx, 10, "invpcid"),
    (0x8000_0001, Edx, 27, "rdtscp"),
];

const SKYLAKE: &[Bit] = &[
    (7, Ebx, 18, "rdseed"),
    (7, Ebx, 19, "adx"),
    (7, Ebx, 20, "smap"),
    (7, Ebx, 23, "clflushopt"),
    (7, Ebx, 24, "clwb"),
    (0x8000_0001, Ecx, 8, "3dnowprefetch"),
    (0x8000_0001, Edx, 26, "pdpe1gb"),
];

const ICELAKE: &[Bit] = &[
    (7, Ebx, 21, "avx512ifma"),
    (7, Ebx, 29, "sha-ni"),
    (7, Ecx, 1, "avx512vbmi"),
    (7, Ecx, 2, "umip"),
    (7, Ecx, 6, "avx512vbmi2"),
    (7, Ecx, 8, "gfni"),
    (7, Ecx, 9, "vaes"),
    (7, Ecx, 10, "vpclmulqdq"),
    (7, Ecx, 11, "avx512vnni"),
    (7, Ecx, 12, "avx512bitalg"),
    (7, Ecx, 14, "avx512vpopcntdq"),
    (7, Ecx, 22, "rdpid"),
    (7, Edx, 4, "fsrm"),
];

const NAPLES: &[Bit] = &[
    (1, Ecx, 1, "pclmulqdq"),
    (1, Ecx, 25, "aes"),
    (1, Ecx, 30, "rdrand"),
    (7, Ebx, 0, "fsgsbase"),
    (7, Ebx, 7, "smep"),
    (7, Ebx, 18, "rdseed"),
    (7, Ebx, 19, "adx"),
    (7, Ebx, 20, "smap"),
    (7, Ebx, 23, "clflushopt"),
    (7, Ebx, 29, "sha-ni"),
    (0x8000_0001, Ecx, 6, "sse4a"),
    (0x8000_0001, Ecx, 7, "misalignsse"),
    (0x8000_0001, Ecx, 8, "3dnowprefetch"),
    (0x8000_0001, Edx, 22, "mmxext"),
    (0x8000_0001, Edx, 25, "fxsr-opt"),
    (0x8000_0001, Edx, 26, "pdpe1gb"),
    (0x8000_0001, Edx, 27, "rdtscp"),
    (0x8000_0008, Ebx, 0, "clzero"),
];

const ROME: &[Bit] =
    &[(7, Ebx, 24, "clwb"), (7, Ecx, 2, "umip"), (7, Ecx, 22, "rdpid"), (0x8000_0008, Ebx, 9, "wbnoinvd")];

const MILAN: &[Bit] = &[
    (1, Ecx, 17, "pcid"),
    (7, Ebx, 9, "erms"),
    (7, Ebx, 10, "invpcid"),
    (7, Ecx, 9, "vaes"),
    (7, Ecx, 10, "vpclmulqdq"),
    (7, Edx, 4, "fsrm"),
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

/// State components of leaf 0xD: x87 and SSE need none; AVX; AVX-512 (three).
const AVX: u32 = 0b111;
const AVX_512: u32 = 0b1110_0111;

/// What a baseline shows and asks for.
struct Shown {
    sets: &'static [&'static [Bit]],
    /// State components of leaf 0xD.
    components: u32,
    /// A level is no kind of its own: the host's is shown.
    kind: Option<Kind>,
}

/// A kind of processors: its maker, its family, model and stepping (leaf 1 EAX), and its name for people.
#[derive(Clone, Copy)]
struct Kind(Maker, u32, &'static str);

/// The first four letters of a maker's identification (leaf 0 EBX), and what is missing on a host that has another.
type Maker = (u32, &'static str);

const INTEL: Maker = (u32::from_le_bytes(*b"Genu"), "Intel as its maker");
const AMD: Maker = (super::AUTHENTIC_AMD, "AMD as its maker");

fn shown(baseline: Baseline) -> Shown {
    let level = |sets, components| Shown { sets, components, kind: None };
    let model = |sets, components, kind| Shown { sets, components, kind: Some(kind) };
    match baseline {
        Baseline::V2 => level(&[V1, V2], 0),
        Baseline::V3 => level(&[V1, V2, V3], AVX),
        Baseline::V4 => level(&[V1, V2, V3, V4], AVX_512),
        Baseline::Nehalem => model(&[V1, V2], 0, Kind(INTEL, 0x1_06a5, "Intel Xeon 5500 (Nehalem)")),
        Baseline::Haswell => {
            model(&[V1, V2, V3, HASWELL], AVX, Kind(INTEL, 0x3_06f2, "Intel Xeon E5 v3 (Haswell)"))
        }
        Baseline::SkylakeServer => {
            let kind = Kind(INTEL, 0x5_0654, "Intel Xeon Scalable (Skylake)");
            model(&[V1, V2, V3, HASWELL, V4, SKYLAKE], AVX_512, kind)
        }
        Baseline::IcelakeServer => {
            let kind = Kind(INTEL, 0x6_06a6, "Intel Xeon Scalable (Ice Lake)");
            model(&[V1, V2, V3, HASWELL, V4, SKYLAKE, ICELAKE], AVX_512, kind)
        }
        Baseline::Epyc => model(&[V1, V2, V3, NAPLES], AVX, Kind(AMD, 0x80_0f12, "AMD EPYC 7001 (Naples)")),
        Baseline::EpycRome => {
            model(&[V1, V2, V3, NAPLES, ROME], AVX, Kind(AMD, 0x83_0f10, "AMD EPYC 7002 (Rome)"))
        }
        Baseline::EpycMilan => {
            model(&[V1, V2, V3, NAPLES, ROME, MILAN], AVX, Kind(AMD, 0xa0_0f11, "AMD EPYC 7003 (Milan)"))
        }
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
    let Shown { sets, components, kind } = shown(baseline);
    let mut lacks = Vec::new();
    if let Some(Kind((maker, missing), ..)) = kind
        && !leaves.iter().any(|leaf| leaf.function == 0 && leaf.ebx == maker)
    {
        lacks.push(missing);
    }
    for &(function, which, bit, feature) in sets.iter().copied().flatten() {
        let there = leaves
            .iter_mut()
            .find(|leaf| leaf.function == function && leaf.index == 0)
            .is_some_and(|leaf| *register(leaf, which) & (1 << bit) != 0);
        if !there {
            lacks.push(feature);
        }
    }
    if !lacks.is_empty() {
        return Err(Lacks { baseline: baseline.name(), lacks });
    }
    leaves.retain(|leaf| !GONE.contains(&leaf.function) && (leaf.function != 7 || leaf.index == 0));
    leaves.retain(|leaf| match (leaf.function, leaf.index) {
        (0xd, 0 | 1) => components != 0,
        (0xd, component) => component < 32 && components & (1 << component) != 0,
        _ => true,
    });
    let area = state_area(leaves);
    for leaf in leaves.iter_mut() {
        mask(leaf, sets, components);
        if (leaf.function, leaf.index) == (0xd, 0) {
            leaf.ecx = area;
        }
        if let Some(kind) = kind {
            name(leaf, kind);
        }
    }
    Ok(())
}

/// Bytes that XSAVE needs for all components shown: x87, SSE and a header, and each other one at its place. KVM says how many
/// those need that are switched on, but leaves this one as it is on the host.
fn state_area(leaves: &[kvm_cpuid_entry2]) -> u32 {
    const FIRST: u32 = 512 + 64;
    let others = leaves.iter().filter(|leaf| leaf.function == 0xd && leaf.index > 1);
    others.map(|leaf| leaf.ebx.saturating_add(leaf.eax)).fold(FIRST, u32::max)
}

/// Has a leaf say which kind of processor it is.
fn name(leaf: &mut kvm_cpuid_entry2, Kind(maker, signature, brand): Kind) {
    match leaf.function {
        1 => leaf.eax = signature,
        0x8000_0001 if maker == AMD => leaf.eax = signature,
        // 48 bytes in three leaves, ending with zeros.
        0x8000_0002..=0x8000_0004 => {
            let start = 16 * (leaf.function - 0x8000_0002) as usize;
            let word = |at: usize| {
                let byte = |at: usize| brand.as_bytes().get(at).copied().unwrap_or(0);
                u32::from_le_bytes(std::array::from_fn(|index| byte(start + 4 * at + index)))
            };
            (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (word(0), word(1), word(2), word(3));
        }
        _ => {}
    }
}

fn mask(leaf: &mut kvm_cpuid_entry2, sets: &[&[Bit]], components: u32) {
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
        let features = sets.iter().copied().flatten();
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
            .chain((0x8000_0001..=0x8000_0008).chain([0x8000_001f]).map(|function| (function, 0)))
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
    fn area_for_state_is_as_large_as_the_components_shown_need() {
        let mut leaves = everything();
        for leaf in leaves.iter_mut().filter(|leaf| leaf.function == 0xd) {
            (leaf.eax, leaf.ebx) = match leaf.index {
                2 => (256, 576),
                5 => (64, 1088),
                _ => (leaf.eax, leaf.ebx),
            };
        }
        for (baseline, bytes) in [(Baseline::V3, 832), (Baseline::V4, 1152)] {
            let mut leaves = leaves.clone();
            apply(baseline, &mut leaves).unwrap();
            assert_eq!(leaf(&leaves, 0xd, 0).unwrap().ecx, bytes, "{baseline:?}");
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

    /// A host of `maker` that has everything.
    fn host(maker: Maker) -> Vec<kvm_cpuid_entry2> {
        let mut leaves = everything();
        leaves[0].ebx = maker.0;
        leaves
    }

    #[test]
    fn models_show_their_kind_and_its_features_and_no_later_ones() {
        let shown = |maker, baseline| {
            let mut leaves = host(maker);
            apply(baseline, &mut leaves).unwrap();
            leaves
        };
        let haswell = shown(INTEL, Baseline::Haswell);
        let one = leaf(&haswell, 1, 0).unwrap();
        // Family 6, model 63, stepping 2.
        assert_eq!((one.eax >> 8 & 15, one.eax >> 12 & 0xf0 | one.eax >> 4 & 15, one.eax & 15), (6, 63, 2));
        assert_ne!(one.ecx & (1 << 25), 0, "aes");
        let seven = leaf(&haswell, 7, 0).unwrap();
        assert_eq!((seven.ebx & (1 << 18), seven.ecx), (0, 0), "rdseed came later");
        assert!(leaf(&haswell, 0xd, 5).is_none());
        let brand: Vec<u8> = (0x8000_0002..=0x8000_0004)
            .filter_map(|function| leaf(&haswell, function, 0))
            .flat_map(|leaf| [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx].map(u32::to_le_bytes).concat())
            .collect();
        assert!(brand.starts_with(b"Intel Xeon E5 v3 (Haswell)\0") && brand.len() == 48);

        let icelake = shown(INTEL, Baseline::IcelakeServer);
        assert_ne!(leaf(&icelake, 7, 0).unwrap().ecx & (1 << 11), 0, "avx512vnni");
        assert!(leaf(&icelake, 0xd, 5).is_some());
        assert_eq!(leaf(&icelake, 7, 0).unwrap().ebx & (1 << 11 | 1 << 4), 0, "no TSX");

        let rome = shown(AMD, Baseline::EpycRome);
        let extended = leaf(&rome, 0x8000_0001, 0).unwrap();
        assert_eq!((leaf(&rome, 1, 0).unwrap().eax, extended.eax), (0x83_0f10, 0x83_0f10));
        assert_ne!(extended.ecx & (1 << 6), 0, "sse4a");
        assert_eq!(extended.ecx & (1 << 2), 0, "svm");
        assert_eq!(leaf(&rome, 7, 0).unwrap().ebx & (1 << 16), 0, "avx512f");
    }

    #[test]
    fn every_model_promises_what_it_shows_of_its_level() {
        for &(name, baseline) in Baseline::NAMED {
            let kind = shown(baseline).kind;
            let mut leaves = host(kind.map_or(INTEL, |Kind(maker, ..)| maker));
            assert_eq!(apply(baseline, &mut leaves), Ok(()), "{name}");
            let again = leaves.clone();
            assert_eq!(
                apply(baseline, &mut leaves),
                Ok(()),
                "{name}: a guest's processor can present it again"
            );
            assert!(leaves == again, "{name}");
            assert!(kind.is_none_or(|Kind(_, _, brand)| brand.len() < 48), "{name}");
        }
    }

    #[test]
    fn model_of_another_maker_or_with_features_that_are_missing_is_refused() {
        let mut leaves = host(AMD);
        let error = apply(Baseline::Haswell, &mut leaves).unwrap_err();
        assert_eq!(
            error.to_string(),
            "this host's processor cannot present haswell: it lacks Intel as its maker"
        );
        for leaf in leaves.iter_mut().filter(|leaf| leaf.function == 7) {
            leaf.ecx = 0;
        }
        assert_eq!(
            apply(Baseline::EpycMilan, &mut leaves).unwrap_err().lacks,
            ["umip", "rdpid", "vaes", "vpclmulqdq"]
        );
        assert_eq!(apply(Baseline::Epyc, &mut leaves), Ok(()));
    }
}
