//! Lines that come over a Unix stream socket, with descriptors beside them.

use std::collections::VecDeque;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

/// A longer line is none of ours, in bytes.
const MAX_LINE: usize = 1 << 20;
/// Descriptors that wait to be taken.
const MAX_FDS: usize = 16;
/// Read at once, in bytes.
const PIECE: usize = 16 << 10;

/// What came and was not taken yet.
#[derive(Debug, Default)]
pub struct Lines {
    bytes: Vec<u8>,
    fds: VecDeque<OwnedFd>,
}

impl Lines {
    /// Reads what has come, waiting for something if the socket does. False if nothing more will come.
    ///
    /// # Errors
    /// The socket fails, or what comes is no line.
    pub fn read(&mut self, socket: impl AsFd) -> io::Result<bool> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut beside = RecvAncillaryBuffer::new(&mut space);
        let mut piece = vec![0; PIECE];
        let got = recvmsg(socket, &mut [IoSliceMut::new(&mut piece)], &mut beside, RecvFlags::CMSG_CLOEXEC)?;
        for message in beside.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                self.fds.extend(rights);
            }
        }
        self.bytes.extend_from_slice(piece.get(..got.bytes).unwrap_or_default());
        if self.bytes.len() > MAX_LINE {
            return Err(io::Error::other(format!("a line is longer than {MAX_LINE} bytes")));
        }
        if self.fds.len() > MAX_FDS {
            return Err(io::Error::other(format!("more than {MAX_FDS} descriptors came")));
        }
        Ok(got.bytes > 0)
    }

    /// The next whole line, without its end.
    pub fn line(&mut self) -> Option<Vec<u8>> {
        let end = self.bytes.iter().position(|&byte| byte == b'\n')?;
        let mut line: Vec<u8> = self.bytes.drain(..=end).collect();
        line.pop();
        Some(line)
    }

    /// The oldest descriptor that nobody took.
    pub fn fd(&mut self) -> Option<OwnedFd> {
        self.fds.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{IoSlice, Write};
    use std::os::unix::net::UnixStream;

    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

    use super::*;

    #[test]
    fn lines_and_descriptors_come_apart_in_order() {
        let (mut theirs, ours) = UnixStream::pair().unwrap();
        theirs.write_all(b"one\ntw").unwrap();
        let mut lines = Lines::default();
        assert!(lines.read(&ours).unwrap());
        assert_eq!((lines.line().unwrap(), lines.line()), (b"one".to_vec(), None));
        let (end, _) = UnixStream::pair().unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut beside = SendAncillaryBuffer::new(&mut space);
        let fds = [end.as_fd()];
        assert!(beside.push(SendAncillaryMessage::ScmRights(&fds)));
        sendmsg(&theirs, &[IoSlice::new(b"o\n")], &mut beside, SendFlags::empty()).unwrap();
        assert!(lines.read(&ours).unwrap());
        assert_eq!(lines.line().unwrap(), b"two");
        assert!(lines.fd().is_some() && lines.fd().is_none());
        drop(theirs);
        assert!(!lines.read(&ours).unwrap());
    }

    #[test]
    fn endless_line_is_refused() {
        let (mut theirs, ours) = UnixStream::pair().unwrap();
        let endless = std::thread::spawn(move || while theirs.write_all(&[b'x'; 4096]).is_ok() {});
        let mut lines = Lines::default();
        let refused = loop {
            if let Err(error) = lines.read(&ours) {
                break error;
            }
        };
        assert!(refused.to_string().contains("longer than"), "{refused}");
        drop(ours);
        endless.join().unwrap();
    }
}
