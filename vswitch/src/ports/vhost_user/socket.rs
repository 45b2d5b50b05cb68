//! The stream a session runs over: a Unix socket that never blocks.
//!
//! A peer may send a message byte by byte, or stop in the middle; what came so far waits in the [`Connection`]. While
//! an answer is not taken, nothing more is read, so a peer that asks without listening holds up only itself and the
//! memory it can make us use is one message and one answer.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use vmq::doorbell::Doorbell;
use zerocopy::IntoBytes;

use super::message::{Header, Incoming, MAX_FDS, MessageError, Reply};

/// Descriptors that Linux lets go with one message (`include/net/scm.h`).
const SCM_MAX_FD: usize = 253;

/// Why a connection cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The kernel says so.
    #[error("connection lost")]
    Io(#[from] Errno),
    /// A header that starts no message.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// More descriptors than any message carries, or more than this process can hold.
    #[error("more than {MAX_FDS} descriptors with one message")]
    Descriptors,
    /// Neither memory nor an eventfd. Who closes it may have to wait, so it goes no further.
    #[error("a descriptor that came is {0}, which is not in memory and not an eventfd")]
    Foreign(String),
    /// The peer left before its message was complete.
    #[error("connection closed in the middle of a message")]
    Cut,
}

/// What [`Connection::receive`] found.
#[derive(Debug)]
pub enum Received {
    /// A whole message.
    Message(Incoming),
    /// Nothing more for now.
    Pending,
    /// The peer closed the connection, between messages.
    Closed,
}

/// One end of a connection.
#[derive(Debug)]
pub struct Connection {
    socket: OwnedFd,
    header: Header,
    header_read: usize,
    payload: Vec<u8>,
    payload_read: usize,
    fds: Vec<OwnedFd>,
    answer: Option<Answer>,
}

/// An answer that the peer did not take whole.
#[derive(Debug)]
struct Answer {
    reply: Reply,
    sent: usize,
}

impl Connection {
    /// Takes a connected socket, which it makes non-blocking.
    ///
    /// # Errors
    /// The descriptor is no such thing.
    pub fn new(socket: OwnedFd) -> Result<Self, SocketError> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Self {
            socket,
            header: Header::default(),
            header_read: 0,
            payload: Vec::new(),
            payload_read: 0,
            fds: Vec::new(),
            answer: None,
        })
    }

    /// True while an answer waits for the peer; nothing is received meanwhile.
    pub fn is_sending(&self) -> bool {
        self.answer.is_some()
    }

    /// Reads on, to the end of the next message at most.
    ///
    /// # Errors
    /// The connection is of no more use.
    pub fn receive(&mut self) -> Result<Received, SocketError> {
        if self.is_sending() {
            return Ok(Received::Pending);
        }
        while self.header_read < Header::LEN {
            let Some(rest) = self.header.as_mut_bytes().get_mut(self.header_read..) else { break };
            match take(self.socket.as_fd(), rest, &mut self.fds)? {
                Some(0) if self.header_read == 0 => return Ok(Received::Closed),
                Some(0) => return Err(SocketError::Cut),
                Some(count) => self.header_read += count,
                None => return Ok(Received::Pending),
            }
            if self.header_read == Header::LEN {
                self.payload = vec![0; self.header.check()?];
                self.payload_read = 0;
            }
        }
        while self.payload_read < self.payload.len() {
            match take(self.socket.as_fd(), &mut self.payload[self.payload_read..], &mut self.fds)? {
                Some(0) => return Err(SocketError::Cut),
                Some(count) => self.payload_read += count,
                None => return Ok(Received::Pending),
            }
        }
        self.header_read = 0;
        let (payload, fds) = (std::mem::take(&mut self.payload), std::mem::take(&mut self.fds));
        Ok(Received::Message(Incoming { header: self.header, payload, fds }))
    }

    /// Sends an answer, as much of it as the peer takes; the rest goes with [`Connection::flush`].
    ///
    /// # Errors
    /// The connection is of no more use.
    pub fn send(&mut self, reply: Reply) -> Result<(), SocketError> {
        debug_assert!(!self.is_sending(), "nothing was received, so nothing is to be answered");
        self.answer = Some(Answer { reply, sent: 0 });
        self.flush()
    }

    /// Goes on sending.
    ///
    /// # Errors
    /// The connection is of no more use.
    pub fn flush(&mut self) -> Result<(), SocketError> {
        while let Some(answer) = &mut self.answer {
            let bytes = answer.reply.bytes.get(answer.sent..).unwrap_or_default();
            if bytes.is_empty() {
                self.answer = None;
                continue;
            }
            // A descriptor goes with the first byte.
            let fds = answer.reply.fd.as_ref().map(AsFd::as_fd);
            let fds = if answer.sent == 0 { fds.as_slice() } else { &[] };
            match send(self.socket.as_fd(), bytes, fds) {
                Ok(count) => answer.sent += count,
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Sends bytes, and descriptors with the first of them; returns how many bytes went.
///
/// # Errors
/// The kernel's.
pub(super) fn send(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<usize, Errno> {
    // Room for what tests send too much.
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4 * MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Errno::TOOMANYREFS);
    }
    sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)
}

/// As [`fill`], of a peer that may send any descriptor.
fn take(
    socket: BorrowedFd<'_>,
    bytes: &mut [u8],
    fds: &mut Vec<OwnedFd>,
) -> Result<Option<usize>, SocketError> {
    let known = fds.len();
    let count = fill(socket, bytes, fds)?;
    for fd in fds.get(known..).unwrap_or_default() {
        // Neither question asks the file's server, if it has one. Only files in memory know seals.
        if rustix::fs::fcntl_get_seals(fd).is_err()
            && let Err(error) = Doorbell::check(fd.as_fd())
        {
            return Err(SocketError::Foreign(error.kind().to_owned()));
        }
    }
    Ok(count)
}

/// Reads some bytes and the descriptors that come with them. `None` if there are none now, 0 at the end.
pub(super) fn fill(
    socket: BorrowedFd<'_>,
    bytes: &mut [u8],
    fds: &mut Vec<OwnedFd>,
) -> Result<Option<usize>, SocketError> {
    // Room for all that may come: the kernel closes what does not fit, and waits for that.
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SCM_MAX_FD))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        match recvmsg(socket, &mut [IoSliceMut::new(bytes)], &mut control, RecvFlags::CMSG_CLOEXEC) {
            Ok(received) => break received,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
    };
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(more) = message {
            fds.extend(more);
        }
    }
    // Cut short if this process could hold no more.
    if fds.len() > MAX_FDS || received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(SocketError::Descriptors);
    }
    Ok(Some(received.bytes))
}
