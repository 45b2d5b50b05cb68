//! Which system calls each class of threads may make.
//!
//! A filter runs at each system call. Calls that are allowed whatever their arguments cost next to nothing (the kernel keeps a bitmap
//! of them); `ioctl`, which enters the guest, passes the filters of the thread and of those it descends from: about ten
//! comparisons each, since calls are compared in ascending order and its number is 16.
//!
//! The lists hold what this crate calls and what Rust's standard library and glibc 2.36 or later call on its behalf.

use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter,
};

use super::ConfineError;

/// What a thread does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// The main thread and others that build the machine, start threads and answer the daemon. It may do all that the
    /// others may, because they descend from it.
    Control,
    /// Devices, VMBus, integration services, consoles.
    Devices,
    /// Runs the guest.
    Vcpu,
}

/// What every thread of a Rust program does: input and output on open descriptors, waiting, memory, signals, its end.
const BASICS: &[c_long] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_close,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_getrandom,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_set_robust_list,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// Waiting for several descriptors, messages with descriptors, memory files, eventfds.
const DEVICES: &[c_long] = &[
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_eventfd2,
    libc::SYS_accept4,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_shutdown,
    libc::SYS_memfd_create,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_fstat,
    libc::SYS_lseek,
    libc::SYS_pread64,
];

/// Filters of threads.
const CONTROL: &[c_long] = &[libc::SYS_seccomp];

/// Calls with a path fail with EACCES: glibc and the standard library make them by themselves, and live without.
const PATHS: &[c_long] = &[
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_access,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_getcwd,
];

/// KVM's requests of a processor's thread: `KVM_RUN`, `KVM_GET_MSRS` (crash registers), `KVM_IRQ_LINE` (a device's register
/// was written).
const VCPU_REQUESTS: &[u32] = &[0xae80, 0xc008_ae88, 0x4008_ae61];

/// KVM's requests of a device's thread.
const DEVICE_REQUESTS: &[u32] = &[
    0x4008_ae61, // KVM_IRQ_LINE
    0x4020_ae76, // KVM_IRQFD
    0x4018_aebd, // KVM_HYPERV_EVENTFD
    0x8030_ae7c, // KVM_GET_CLOCK
    0x5421,      // FIONBIO
    0x5451,      // FIOCLEX
];

/// `fcntl` without what sends signals or takes locks.
const FILE_COMMANDS: &[i32] = &[
    libc::F_SETFD,
    libc::F_GETFL,
    libc::F_SETFL,
    libc::F_DUPFD_CLOEXEC,
    libc::F_ADD_SEALS,
    libc::F_GET_SEALS,
];

/// Memory that can be run as code is never made.
const EXECUTABLE: u64 = 4;

/// Group of KVM's ioctl numbers, in their second byte.
const KVM_GROUP: (u64, u64) = (0xff00, 0xae00);

type Rules = BTreeMap<c_long, Vec<SeccompRule>>;

/// Allows calls when the low 32 bits of an argument match; several rules of one call are alternatives.
fn when(rules: &mut Rules, call: c_long, matches: &[(u8, SeccompCmpOp, u64)]) -> Result<(), BackendError> {
    let condition = |(argument, operator, value): &(u8, SeccompCmpOp, u64)| {
        SeccompCondition::new(*argument, SeccompCmpArgLen::Dword, operator.clone(), *value)
    };
    let conditions = matches.iter().map(condition).collect::<Result<Vec<_>, _>>()?;
    rules.entry(call).or_default().push(SeccompRule::new(conditions)?);
    Ok(())
}

/// What `class` may do.
fn rules(class: Class) -> Result<Rules, BackendError> {
    use SeccompCmpOp::{Eq, MaskedEq};
    let mut lists = vec![BASICS, PATHS, &[libc::SYS_clone3]];
    if class != Class::Vcpu {
        lists.push(DEVICES);
    }
    if class == Class::Control {
        lists.push(CONTROL);
    }
    let mut rules: Rules = lists.concat().into_iter().map(|call| (call, Vec::new())).collect();

    when(&mut rules, libc::SYS_mmap, &[(2, MaskedEq(EXECUTABLE), 0)])?;
    when(&mut rules, libc::SYS_mprotect, &[(2, MaskedEq(EXECUTABLE), 0)])?;
    let own = std::process::id().into();
    when(&mut rules, libc::SYS_tgkill, &[(0, Eq, own)])?;
    when(&mut rules, libc::SYS_prctl, &[(0, Eq, number(libc::PR_SET_NAME))])?;
    when(&mut rules, libc::SYS_prctl, &[(0, Eq, number(libc::PR_SET_VMA))])?;
    // To whom the socket is connected, and nobody else.
    let send = SeccompCondition::new(4, SeccompCmpArgLen::Qword, Eq, 0)?;
    rules.insert(libc::SYS_sendto, vec![SeccompRule::new(vec![send])?]);

    // The standard library looks at what it closes, in debug builds.
    when(&mut rules, libc::SYS_fcntl, &[(1, Eq, number(libc::F_GETFD))])?;

    let requests = if class == Class::Vcpu { VCPU_REQUESTS } else { DEVICE_REQUESTS };
    for &request in requests {
        when(&mut rules, libc::SYS_ioctl, &[(1, Eq, request.into())])?;
    }
    if class != Class::Vcpu {
        for &command in FILE_COMMANDS {
            when(&mut rules, libc::SYS_fcntl, &[(1, Eq, number(command))])?;
        }
        for call in [libc::SYS_getsockopt, libc::SYS_setsockopt] {
            when(&mut rules, call, &[(1, Eq, number(libc::SOL_SOCKET))])?;
        }
    }
    if class == Class::Control {
        let (mask, kvm) = KVM_GROUP;
        when(&mut rules, libc::SYS_ioctl, &[(1, MaskedEq(mask), kvm)])?;
        let thread = number(libc::CLONE_THREAD | libc::CLONE_VM);
        when(&mut rules, libc::SYS_clone, &[(0, MaskedEq(thread), thread)])?;
        when(&mut rules, libc::SYS_prctl, &[(0, Eq, number(libc::PR_SET_NO_NEW_PRIVS))])?;
        // Its own processors; an unprivileged worker could move the daemon's threads otherwise.
        when(&mut rules, libc::SYS_sched_setaffinity, &[(0, Eq, 0)])?;
    }
    Ok(rules)
}

/// A constant of the C interface as a filter sees it: its low 32 bits.
fn number(constant: i32) -> u64 {
    u64::from(constant.cast_unsigned())
}

fn install(rules: Rules, otherwise: SeccompAction, matching: SeccompAction) -> Result<(), ConfineError> {
    let filter = SeccompFilter::new(rules, otherwise, matching, TargetArch::x86_64)?;
    let program = BpfProgram::try_from(filter)?;
    Ok(apply_filter(&program)?)
}

/// Has calls with a path fail, and has the C library start threads by `clone`, whose flags can be checked.
pub(super) fn refuse_paths() -> Result<(), ConfineError> {
    for (calls, error) in [(PATHS, libc::EACCES), (&[libc::SYS_clone3][..], libc::ENOSYS)] {
        let rules = calls.iter().map(|&call| (call, Vec::new())).collect();
        install(rules, SeccompAction::Allow, SeccompAction::Errno(error.cast_unsigned()))?;
    }
    Ok(())
}

/// Ends the process when the calling thread makes a call that `class` does not make.
pub(super) fn limit(class: Class) -> Result<(), ConfineError> {
    install(rules(class)?, SeccompAction::KillProcess, SeccompAction::Allow)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_may_do_what_its_threads_may() {
        let control = rules(Class::Control).unwrap();
        for class in [Class::Devices, Class::Vcpu] {
            for call in rules(class).unwrap().keys() {
                assert!(control.contains_key(call), "{class:?} makes call {call}, its parent may not");
            }
        }
        let in_group = |request: &&u32| u64::from(**request) & KVM_GROUP.0 == KVM_GROUP.1;
        for request in VCPU_REQUESTS.iter().filter(|request| !in_group(request)) {
            assert!(DEVICE_REQUESTS.contains(request), "{request:#x}");
        }
    }

    #[test]
    fn no_class_runs_programs_makes_sockets_or_looks_into_processes() {
        let never = [
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_fork,
            libc::SYS_vfork,
            libc::SYS_socket,
            // One end of a pair can send to any path.
            libc::SYS_socketpair,
            libc::SYS_connect,
            libc::SYS_bind,
            libc::SYS_listen,
            libc::SYS_ptrace,
            libc::SYS_process_vm_readv,
            libc::SYS_process_vm_writev,
            libc::SYS_pidfd_getfd,
            libc::SYS_kill,
            libc::SYS_io_uring_setup,
            libc::SYS_bpf,
            libc::SYS_mount,
            libc::SYS_openat2,
            libc::SYS_open_by_handle_at,
            libc::SYS_unlinkat,
            libc::SYS_userfaultfd,
            libc::SYS_pkey_mprotect,
            libc::SYS_shmat,
            libc::SYS_personality,
        ];
        for class in [Class::Control, Class::Devices, Class::Vcpu] {
            let allowed = rules(class).unwrap();
            for call in never {
                assert!(!allowed.contains_key(&call), "{class:?} may make call {call}");
            }
        }
    }

    #[test]
    fn threads_of_devices_ask_kvm_for_lines_doorbells_and_the_time() {
        let kvm = DEVICE_REQUESTS.iter().filter(|&&request| u64::from(request) & KVM_GROUP.0 == KVM_GROUP.1);
        assert_eq!(kvm.map(|request| request & 0xff).collect::<Vec<_>>(), [0x61, 0x76, 0xbd, 0x7c]);
    }

    #[test]
    fn requests_are_those_of_kvm() {
        // _IO(0xAE, 0x80), _IOWR(0xAE, 0x88, 8 bytes), _IOW(0xAE, 0x61, 8 bytes).
        assert_eq!(VCPU_REQUESTS, [0xae << 8 | 0x80, 3 << 30 | 8 << 16 | 0xae88, 1 << 30 | 8 << 16 | 0xae61]);
    }
}
