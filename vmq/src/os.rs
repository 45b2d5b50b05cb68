//! The thin edge to the kernel that no safe crate covers: processor affinity, timer slack, network namespaces, and the
//! set-up of network devices, [`tap`] queues and [`packet`] sockets.

// UNSAFETY: calls libc with plain values and pointers to local structures.
#![allow(unsafe_code)]
#![expect(clippy::cast_possible_truncation, reason = "constants and sizes, in the types of the C interface")]

pub mod packet;
pub mod tap;

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Pins the calling thread to one processor.
///
/// # Errors
/// The processor does not exist or is not allowed.
pub fn pin_thread(cpu: usize) -> io::Result<()> {
    if cpu >= libc::CPU_SETSIZE as usize {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    // SAFETY: a zeroed set is valid, `cpu` is below its size, and the call reads the set only.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        check(libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set))?;
    }
    Ok(())
}

/// The signal that ends a wait. Ignored by those who do not know it, and sent by the kernel to nobody who did not ask for it.
const INTERRUPT: libc::c_int = libc::SIGURG;

/// From now on [`interrupt`] does what it says.
pub(crate) fn be_interruptible() {
    extern "C" fn ignore(_: libc::c_int) {}
    // SAFETY: a zeroed `sigaction` is a valid value, and without SA_RESTART, as it should be; the handler does nothing.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = ignore as *const () as usize;
        libc::sigemptyset(&raw mut action.sa_mask);
        libc::sigaction(INTERRUPT, &raw const action, std::ptr::null_mut());
    }
}

/// Has the system call that `thread` of this process waits in fail with `EINTR`. Nothing happens if it waits in none.
pub(crate) fn interrupt(thread: i32) {
    // SAFETY: plain values. A number that is no thread of this process is an error.
    unsafe { libc::syscall(libc::SYS_tgkill, std::process::id(), thread, INTERRUPT) };
}

/// Lets the calling thread's timeouts end when they are due, not up to 50 µs later.
pub fn exact_timers() {
    // SAFETY: plain values; the slack of this thread becomes 1 ns.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1, 0, 0, 0) };
}

/// The calling thread does not take the processor from others when it is woken: it runs when its turn comes, or at once
/// where nobody else wants to.
pub fn wait_for_turn() {
    // SAFETY: all-zero is a valid `sched_param`, the one that this policy asks for, and the call reads it only.
    unsafe {
        let parameters: libc::sched_param = std::mem::zeroed();
        libc::sched_setscheduler(0, libc::SCHED_BATCH, &raw const parameters);
    }
}

/// The running kernel's version, such as (6, 12); (0, 0) if it does not say.
pub fn kernel_version() -> (u32, u32) {
    // SAFETY: all-zero is a valid `utsname`, which the call fills.
    let release = unsafe {
        let mut name: libc::utsname = std::mem::zeroed();
        libc::uname(&raw mut name);
        name.release
    };
    let release: String = release.iter().map(|&byte| char::from(byte.cast_unsigned())).collect();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|number| number.parse().ok());
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// Moves the calling thread, and the processes it starts from now on, into a new network namespace with nothing in it
/// but a loopback device that is down. The namespace ends with the last thread in it.
///
/// # Errors
/// No permission.
pub fn new_network_namespace() -> io::Result<()> {
    // SAFETY: affects the calling thread's namespace only.
    check(unsafe { libc::unshare(libc::CLONE_NEWNET) }).map(drop)
}

fn interface_request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: all-zero is a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.is_empty() || name.len() >= request.ifr_name.len() || name.contains(['\0', '/', '%']) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "a device name has 1 to 15 bytes, no `/` nor `%`",
        ));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

fn interface_name(request: &libc::ifreq) -> String {
    let bytes: Vec<u8> =
        request.ifr_name.iter().map(|&byte| byte.cast_unsigned()).take_while(|&byte| byte != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

fn interface_ioctl(request: libc::c_ulong, value: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: a datagram socket to carry the ioctl, which reads and writes one `ifreq`.
    unsafe {
        let socket = check(libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0))?;
        let socket = OwnedFd::from_raw_fd(socket);
        check(libc::ioctl(socket.as_raw_fd(), request, std::ptr::from_mut(value)))?;
    }
    Ok(())
}

/// The number of a network device of the calling thread's namespace.
///
/// # Errors
/// No such device.
pub fn interface_index(name: &str) -> io::Result<i32> {
    let mut request = interface_request(name)?;
    interface_ioctl(libc::SIOCGIFINDEX as libc::c_ulong, &mut request)?;
    // SAFETY: the kernel has just written the index.
    Ok(unsafe { request.ifr_ifru.ifru_ifindex })
}

/// A device's MTU.
///
/// # Errors
/// No such device.
pub fn mtu(name: &str) -> io::Result<i32> {
    let mut request = interface_request(name)?;
    interface_ioctl(libc::SIOCGIFMTU as libc::c_ulong, &mut request)?;
    // SAFETY: the kernel has just written the MTU.
    Ok(unsafe { request.ifr_ifru.ifru_mtu })
}

/// Sets a device's MTU.
///
/// # Errors
/// No such device, no permission, or out of the device's range.
pub fn set_mtu(name: &str, mtu: u16) -> io::Result<()> {
    let mut request = interface_request(name)?;
    request.ifr_ifru.ifru_mtu = libc::c_int::from(mtu);
    interface_ioctl(libc::SIOCSIFMTU as libc::c_ulong, &mut request)
}

/// Sets a device up, or down.
///
/// # Errors
/// No such device or no permission.
pub fn set_up(name: &str, up: bool) -> io::Result<()> {
    let mut request = interface_request(name)?;
    interface_ioctl(libc::SIOCGIFFLAGS as libc::c_ulong, &mut request)?;
    let bit = libc::IFF_UP as libc::c_short;
    // SAFETY: the kernel has just written the flags.
    unsafe {
        let flags = request.ifr_ifru.ifru_flags;
        request.ifr_ifru.ifru_flags = if up { flags | bit } else { flags & !bit };
    }
    interface_ioctl(libc::SIOCSIFFLAGS as libc::c_ulong, &mut request)
}
