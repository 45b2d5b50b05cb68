//! Packet sockets (AF_PACKET, packet(7)): every frame that a network device receives, and a way to send through it.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::{check, interface_index};

/// Bytes of the virtio-net header before each frame of a socket opened with [`Flags::header`].
pub const HEADER: usize = 10;

/// What a packet socket is opened with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Flags {
    /// A virtio-net header of [`HEADER`] bytes before each frame (`PACKET_VNET_HDR`), and a VLAN tag that the kernel
    /// took off told beside it (`PACKET_AUXDATA`).
    pub header: bool,
    /// Frames sent go to the device past its queueing discipline (`PACKET_QDISC_BYPASS`).
    pub bypass: bool,
}

/// `linux/if_packet.h`.
const PACKET_IGNORE_OUTGOING: libc::c_int = 23;
const PACKET_FANOUT_HASH: libc::c_int = 0;
const PACKET_FANOUT_FLAG_UNIQUEID: libc::c_int = 0x2000;
const PACKET_FANOUT_FLAG_IGNORE_OUTGOING: libc::c_int = 0x4000;

/// Bytes of frames that may wait in a socket, either way.
const BUFFER: libc::c_int = 8 << 20;

fn set<T>(fd: BorrowedFd<'_>, level: libc::c_int, option: libc::c_int, value: &T) -> io::Result<()> {
    // SAFETY: the call reads `value` only.
    let result = unsafe {
        let value = std::ptr::from_ref(value).cast();
        libc::setsockopt(fd.as_raw_fd(), level, option, value, size_of::<T>() as libc::socklen_t)
    };
    check(result).map(drop)
}

/// Opens a non-blocking packet socket on the device `name`: every frame the device receives, promiscuously, none that
/// the host sends through it.
///
/// # Errors
/// No such device or no permission.
pub fn open(name: &str, flags: Flags) -> io::Result<OwnedFd> {
    let index = interface_index(name)?;
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // Protocol 0: nothing is received before the socket is bound and set up.
    // SAFETY: plain values; the socket is owned at once.
    let socket = unsafe { OwnedFd::from_raw_fd(check(libc::socket(libc::AF_PACKET, kind, 0))?) };
    let fd = std::os::fd::AsFd::as_fd(&socket);
    let on: libc::c_int = 1;
    if flags.header {
        set(fd, libc::SOL_PACKET, libc::PACKET_VNET_HDR, &on)?;
        set(fd, libc::SOL_PACKET, libc::PACKET_AUXDATA, &on)?;
    }
    if flags.bypass {
        set(fd, libc::SOL_PACKET, libc::PACKET_QDISC_BYPASS, &on)?;
    }
    set(fd, libc::SOL_PACKET, PACKET_IGNORE_OUTGOING, &on)?;
    for option in [libc::SO_RCVBUFFORCE, libc::SO_SNDBUFFORCE] {
        // Without the permission the default has to do.
        let _ = set(fd, libc::SOL_SOCKET, option, &BUFFER);
    }
    // SAFETY: all-zero is a valid address; the call reads it only.
    unsafe {
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
        address.sll_ifindex = index;
        let len = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        check(libc::bind(fd.as_raw_fd(), (&raw const address).cast(), len))?;
    }
    let membership = libc::packet_mreq {
        mr_ifindex: index,
        mr_type: libc::PACKET_MR_PROMISC as u16,
        mr_alen: 0,
        mr_address: [0; 8],
    };
    set(fd, libc::SOL_PACKET, libc::PACKET_ADD_MEMBERSHIP, &membership)?;
    Ok(socket)
}

/// Makes the sockets share the device's frames by flow (`PACKET_FANOUT`), in a group of their own. What they received
/// before, each a copy, is thrown away.
///
/// # Errors
/// The device is down, or the sockets are of several devices.
pub fn share(sockets: &[OwnedFd]) -> io::Result<()> {
    let Some((first, others)) = sockets.split_first() else { return Ok(()) };
    // The group decides about outgoing frames, whatever its sockets were told.
    let hash = (PACKET_FANOUT_HASH | PACKET_FANOUT_FLAG_IGNORE_OUTGOING) << 16;
    let fd = std::os::fd::AsFd::as_fd(first);
    set(fd, libc::SOL_PACKET, libc::PACKET_FANOUT, &(hash | (PACKET_FANOUT_FLAG_UNIQUEID << 16)))?;
    let mut group: libc::c_int = 0;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the call writes `len` bytes into `group`.
    check(unsafe {
        let value = (&raw mut group).cast();
        libc::getsockopt(fd.as_raw_fd(), libc::SOL_PACKET, libc::PACKET_FANOUT, value, &raw mut len)
    })?;
    for other in others {
        set(
            std::os::fd::AsFd::as_fd(other),
            libc::SOL_PACKET,
            libc::PACKET_FANOUT,
            &((group & 0xffff) | hash),
        )?;
    }
    sockets.iter().for_each(discard);
    Ok(())
}

/// Throws away what waits in `socket`, within reason.
fn discard(socket: &OwnedFd) {
    for _ in 0..65_536 {
        // The buffer is too short for a header, which is an error too, but the frame is gone.
        // SAFETY: nothing is written to a buffer of no bytes.
        let result = unsafe { libc::recv(socket.as_raw_fd(), std::ptr::null_mut(), 0, libc::MSG_DONTWAIT) };
        if result < 0 && io::Error::last_os_error().kind() == io::ErrorKind::WouldBlock {
            return;
        }
    }
}

/// Frames that the socket had no room for since the last call (`PACKET_STATISTICS`, which begins anew when it is read).
pub fn take_lost(fd: BorrowedFd<'_>) -> usize {
    let mut told = libc::tpacket_stats { tp_packets: 0, tp_drops: 0 };
    let mut len = size_of::<libc::tpacket_stats>() as libc::socklen_t;
    let value = (&raw mut told).cast();
    // SAFETY: the call writes `len` bytes into `told`. Should it fail, nothing was lost that we know of.
    unsafe {
        libc::getsockopt(fd.as_raw_fd(), libc::SOL_PACKET, libc::PACKET_STATISTICS, value, &raw mut len);
    }
    told.tp_drops as usize
}

/// True while the socket is bound to a device. One that was deleted, or moved to another namespace, is lost for good.
pub fn is_bound(fd: BorrowedFd<'_>) -> bool {
    // SAFETY: all-zero is a valid address, which the call fills.
    unsafe {
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        let mut len = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        libc::getsockname(fd.as_raw_fd(), (&raw mut address).cast(), &raw mut len) == 0
            && address.sll_ifindex > 0
    }
}
