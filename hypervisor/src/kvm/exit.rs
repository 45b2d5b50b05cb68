//! What a processor that left guest mode wants, where `kvm-ioctls` does not say it.

use kvm_bindings::{
    KVM_EXIT_HYPERV, KVM_EXIT_HYPERV_HCALL, KVM_EXIT_HYPERV_SYNIC, KVM_EXIT_INTERNAL_ERROR,
    KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_SIMUL_EX,
    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON,
};

use super::Processor;

/// A Hyper-V exit (`hyperv-cpuid-msr-hypercall.md` section 10).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hyperv {
    /// The guest wrote a register of its synthetic interrupt controller.
    Synic {
        /// SCONTROL.
        control: u64,
        /// SIEFP.
        flags_page: u64,
        /// SIMP.
        message_page: u64,
    },
    /// A hypercall that the kernel does not handle. Its result must be set before the processor goes on.
    Hypercall {
        /// Control word.
        input: u64,
        /// Input and output address, or fast values.
        parameters: [u64; 2],
    },
    /// Something this program did not enable.
    Other(u32),
}

/// Reads the exit of a processor whose last exit was `VcpuExit::Hyperv`; `answer` gives a hypercall's result.
pub fn take_hyperv(vcpu: &mut Processor, answer: impl FnOnce(Hyperv) -> u64) {
    let run = vcpu.fd.get_kvm_run();
    if run.exit_reason != KVM_EXIT_HYPERV {
        return;
    }
    // SAFETY: the exit reason says that the kernel filled this member of the union; every bit pattern of it is valid.
    let exit = unsafe { &mut run.__bindgen_anon_1.hyperv };
    match exit.type_ {
        KVM_EXIT_HYPERV_SYNIC => {
            // SAFETY: the type says that the kernel filled this member; it consists of integers.
            let synic = unsafe { exit.u.synic };
            answer(Hyperv::Synic {
                control: synic.control,
                flags_page: synic.evt_page,
                message_page: synic.msg_page,
            });
        }
        KVM_EXIT_HYPERV_HCALL => {
            // SAFETY: as above.
            let call = unsafe { &mut exit.u.hcall };
            call.result = answer(Hyperv::Hypercall { input: call.input, parameters: call.params });
        }
        other => {
            answer(Hyperv::Other(other));
        }
    }
}

/// Why KVM gave up on a processor whose last exit was `VcpuExit::InternalError`.
pub fn internal_error(vcpu: &mut Processor) -> String {
    let run = vcpu.fd.get_kvm_run();
    if run.exit_reason != KVM_EXIT_INTERNAL_ERROR {
        return "unknown".into();
    }
    // SAFETY: the exit reason says that the kernel filled this member of the union; it consists of integers.
    let suberror = unsafe { run.__bindgen_anon_1.internal.suberror };
    match suberror {
        KVM_INTERNAL_ERROR_EMULATION => "an instruction cannot be emulated".into(),
        KVM_INTERNAL_ERROR_SIMUL_EX => "an exception while one was delivered".into(),
        KVM_INTERNAL_ERROR_DELIVERY_EV => "an event could not be delivered".into(),
        KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => {
            "the processor left guest mode for a reason unknown to KVM".into()
        }
        other => format!("suberror {other}"),
    }
}
