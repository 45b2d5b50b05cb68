//! The socket that a hand-over runs over.

use std::io::{IoSlice, IoSliceMut};
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType, sockopt,
};

use super::wire::{MAX_FDS, MAX_MESSAGE, Message, MessageError};
use super::{FromSwitch, FromVmm};

/// Socket buffers, in bytes: some of the longest messages at once, so that neither side often waits for the other.
const BUFFER_BYTES: usize = 4 * MAX_MESSAGE;

/// How long a switch waits to be let in.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why a connection cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// The kernel says so.
    #[error("hand-over connection failed")]
    Io(#[from] Errno),
    /// The peer is gone, so that nothing can be sent.
    #[error("hand-over connection is closed")]
    Closed,
    /// The peer sent what is no message, or we were about to.
    #[error(transparent)]
    Message(#[from] MessageError),
}

/// One end of a hand-over, which sends `S` and receives `R`. Any thread may send while another receives.
#[derive(Debug)]
pub struct Connection<S, R> {
    socket: OwnedFd,
    messages: PhantomData<fn(S) -> R>,
}

/// The VMM's end.
pub type VmmConnection = Connection<FromVmm, FromSwitch>;

/// The switch's end.
pub type SwitchConnection = Connection<FromSwitch, FromVmm>;

/// Two ends of one connection, for a switch and a VMM in one process.
///
/// # Errors
/// The kernel refuses.
pub fn pair() -> Result<(VmmConnection, SwitchConnection), HandoverError> {
    let flags = SocketFlags::CLOEXEC;
    let (vmm, switch) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    Ok((Connection::new(vmm)?, Connection::new(switch)?))
}

impl SwitchConnection {
    /// Connects to the VMM that listens at `path`. One that accepts nobody is not waited for long.
    ///
    /// # Errors
    /// Nobody listens there, or the kernel refuses.
    pub fn connect(path: &Path) -> Result<Self, HandoverError> {
        Self::connect_within(path, PATIENCE)
    }

    pub(super) fn connect_within(path: &Path, patience: Duration) -> Result<Self, HandoverError> {
        let address = SocketAddrUnix::new(path)?;
        let socket = socket()?;
        // Until there is room in its queue.
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(patience))?;
        rustix::net::connect(&socket, &address)?;
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, None)?;
        Self::new(socket)
    }
}

fn socket() -> Result<OwnedFd, Errno> {
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
}

/// Where a VMM waits for a switch to connect, and for the next one after it.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
}

impl Listener {
    /// Listens at `path`, which must not exist.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn bind(path: &Path) -> Result<Self, HandoverError> {
        let address = SocketAddrUnix::new(path)?;
        let socket = socket()?;
        rustix::net::bind(&socket, &address)?;
        rustix::net::listen(&socket, 4)?;
        Ok(Self { socket })
    }

    /// Waits for a switch to connect.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn accept(&self) -> Result<VmmConnection, HandoverError> {
        let accept = || rustix::net::accept_with(&self.socket, SocketFlags::CLOEXEC);
        Connection::new(rustix::io::retry_on_intr(accept)?)
    }
}

impl From<OwnedFd> for Listener {
    /// Takes a listening socket that somebody else bound.
    fn from(socket: OwnedFd) -> Self {
        Self { socket }
    }
}

impl From<Listener> for OwnedFd {
    fn from(listener: Listener) -> Self {
        listener.socket
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl<S: Message, R: Message> Connection<S, R> {
    /// Takes a connected `SOCK_SEQPACKET` Unix socket, which it makes blocking.
    ///
    /// # Errors
    /// The descriptor is no such thing.
    pub fn new(socket: OwnedFd) -> Result<Self, HandoverError> {
        if sockopt::socket_type(&socket)? != SocketType::SEQPACKET {
            return Err(Errno::PROTOTYPE.into());
        }
        rustix::io::ioctl_fionbio(&socket, false)?;
        // Less than asked for is no harm: the kernel's default holds any single message.
        sockopt::set_socket_send_buffer_size(&socket, BUFFER_BYTES)?;
        sockopt::set_socket_recv_buffer_size(&socket, BUFFER_BYTES)?;
        Ok(Self { socket, messages: PhantomData })
    }

    /// Sends a message; waits while the peer's buffer is full.
    ///
    /// # Errors
    /// The peer is gone, or the message is longer than any may be.
    pub fn send(&self, message: &S) -> Result<(), HandoverError> {
        let (bytes, fds) = message.encode()?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(Errno::TOOMANYREFS.into());
        }
        loop {
            let io = [IoSlice::new(&bytes)];
            match rustix::net::sendmsg(&self.socket, &io, &mut control, SendFlags::NOSIGNAL) {
                // A message goes whole or not at all.
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(HandoverError::Closed),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Waits for a message. `None` once the peer has closed the connection.
    ///
    /// # Errors
    /// The peer sent what is no message; the connection is of no more use.
    pub fn receive(&self) -> Result<Option<R>, HandoverError> {
        let mut bytes = vec![0; MAX_MESSAGE];
        // Room for more than any message carries, so that too many are seen and closed.
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4 * MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            let io = &mut [IoSliceMut::new(&mut bytes)];
            match rustix::net::recvmsg(&self.socket, io, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Ok(received) => break received,
                Err(Errno::INTR) => {}
                Err(Errno::CONNRESET) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        };
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(more) = message {
                fds.extend(more);
            }
        }
        if received.bytes == 0 {
            return Ok(None);
        }
        if received.flags.contains(ReturnFlags::TRUNC) {
            return Err(MessageError::TooLong.into());
        }
        if received.flags.contains(ReturnFlags::CTRUNC) {
            return Err(MessageError::TooManyDescriptors.into());
        }
        let bytes = bytes.get(..received.bytes).unwrap_or_default();
        Ok(Some(R::decode(bytes, fds)?))
    }

    /// Asks the peer to end the connection: it receives nothing more, and [`Connection::receive`] returns when it has ended.
    pub fn hang_up(&self) {
        // It fails only if the connection has ended already.
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Write);
    }

    /// Ends the connection for both sides: whoever waits in [`Connection::receive`] or [`Connection::send`] returns.
    pub fn shutdown(&self) {
        // It fails only if the connection has ended already.
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Both);
    }
}

impl<S, R> AsFd for Connection<S, R> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
