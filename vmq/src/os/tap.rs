//! TAP devices (`drivers/net/tun.c`): each queue is a descriptor that carries frames, one a read or write, each behind a
//! virtio-net header of 12 bytes.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::{check, interface_name, interface_request};

/// Bytes of the virtio-net header before each frame of a prepared queue.
pub const HEADER: usize = 12;

/// What a TAP queue is opened with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Flags {
    /// Several queues on one device (`IFF_MULTI_QUEUE`); must be as it was when the device was made.
    pub multi_queue: bool,
    /// Frames written enter the host's stack through NAPI (`IFF_NAPI`).
    pub napi: bool,
}

/// What an open TAP queue belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Info {
    /// The device, by its name in its own network namespace.
    pub name: String,
    /// Opened with `IFF_MULTI_QUEUE`.
    pub multi_queue: bool,
}

/// Offloads of a TAP device (`TUNSETOFFLOAD`): what we take from it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Partial checksums, TCP segmentation with ECN.
    pub tcp: bool,
    /// UDP segmentation (Linux 6.2).
    pub udp: bool,
}

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const TUNSETVNETLE: libc::c_ulong = 0x4004_54dc;

const TUN_F_CSUM: libc::c_ulong = 0x01;
const TUN_F_TSO4: libc::c_ulong = 0x02;
const TUN_F_TSO6: libc::c_ulong = 0x04;
const TUN_F_TSO_ECN: libc::c_ulong = 0x08;
const TUN_F_USO4: libc::c_ulong = 0x20;
const TUN_F_USO6: libc::c_ulong = 0x40;

/// Opens one queue of the TAP device `name`, which is made if it does not exist.
///
/// # Errors
/// No permission; a device of another kind (`EINVAL`), also if it is one with several queues and that was not asked for,
/// or the other way round; a queue too many, or one that another program holds (`EBUSY`).
pub fn open(name: &str, flags: Flags) -> io::Result<OwnedFd> {
    let mut request = interface_request(name)?;
    let mut bits = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if flags.multi_queue {
        bits |= libc::IFF_MULTI_QUEUE;
    }
    if flags.napi {
        bits |= libc::IFF_NAPI;
    }
    request.ifr_ifru.ifru_flags = bits as libc::c_short;
    let mode = libc::O_RDWR | libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: a constant path; the descriptor is owned from here on; the ioctl reads and writes `request`.
    unsafe {
        let fd = OwnedFd::from_raw_fd(check(libc::open(c"/dev/net/tun".as_ptr(), mode))?);
        check(libc::ioctl(fd.as_raw_fd(), TUNSETIFF, &raw mut request))?;
        Ok(fd)
    }
}

/// Another handle to an open TAP queue that the process has inherited as descriptor `number`, which stays open.
///
/// # Errors
/// Not open, or no TAP queue.
pub fn adopt(number: i32) -> io::Result<OwnedFd> {
    // SAFETY: any number may be asked for, and the answer is a descriptor that nobody else owns.
    let fd =
        unsafe { OwnedFd::from_raw_fd(check(libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3 as libc::c_int))?) };
    // The ioctl's number means something else to other kinds of file, so look what it is first.
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    if !link.to_str().is_some_and(|path| path.ends_with("net/tun")) {
        let message = format!("descriptor {number} is {}, not an open /dev/net/tun", link.display());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    Ok(fd)
}

/// Prepares an open TAP queue, ours or handed over: header of [`HEADER`] bytes, little-endian, non-blocking.
///
/// # Errors
/// The descriptor is no TAP queue with virtio-net header.
pub fn prepare(fd: BorrowedFd<'_>) -> io::Result<Info> {
    let (size, little): (libc::c_int, libc::c_int) = (HEADER as libc::c_int, 1);
    // SAFETY: the ioctls read one int, and `TUNGETIFF` fills one `ifreq`.
    unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        check(libc::ioctl(fd.as_raw_fd(), TUNGETIFF, &raw mut request))?;
        let flags = libc::c_int::from(request.ifr_ifru.ifru_flags);
        let wanted = libc::IFF_TAP | libc::IFF_VNET_HDR | libc::IFF_NO_PI;
        if flags & wanted != wanted {
            let message = "not a TAP queue with IFF_VNET_HDR and IFF_NO_PI";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        check(libc::ioctl(fd.as_raw_fd(), TUNSETVNETHDRSZ, &raw const size))?;
        // Kernels without the call are little-endian as we are.
        let _ = libc::ioctl(fd.as_raw_fd(), TUNSETVNETLE, &raw const little);
        let status = check(libc::fcntl(fd.as_raw_fd(), libc::F_GETFL))?;
        check(libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, status | libc::O_NONBLOCK))?;
        Ok(Info { name: interface_name(&request), multi_queue: flags & libc::IFF_MULTI_QUEUE != 0 })
    }
}

/// Tells the kernel whether we take large frames and partial checksums from the device; returns what it agreed to.
pub fn set_offloads(fd: BorrowedFd<'_>, wanted: bool) -> Offloads {
    let tcp = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN;
    // SAFETY: the ioctl takes a plain value.
    let set = |bits: libc::c_ulong| unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETOFFLOAD, bits) } == 0;
    if !wanted {
        set(0);
        return Offloads::default();
    }
    if set(tcp | TUN_F_USO4 | TUN_F_USO6) {
        return Offloads { tcp: true, udp: true };
    }
    Offloads { tcp: set(tcp), udp: false }
}
