//! What travels between a test and the porter in the nested host, over one virtio-serial port: many conversations at a
//! time, each an order with what is read and written while it lasts.
//!
//! A frame is a conversation's number (`u32`), a kind (`u8`), the length of what follows (`u32`), all little-endian.

use std::io::{self, ErrorKind, Read, Write};

/// The most that follows a header. Larger things take several frames.
pub const LONGEST: usize = 64 * 1024;
const HEADER: usize = 9;

/// What a frame says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// To the porter: run this line of shell.
    Run,
    /// To the porter: connect to the Unix socket of this path.
    Connect,
    /// To the porter: for the command to read, or the socket to receive; empty: nothing more will come.
    Input,
    /// To the porter: kill what runs, or close the connection.
    Kill,
    /// From the porter: it runs, with this process id (`u32`), or is connected (empty). In conversation 0: the host is up.
    Started,
    /// From the porter: what was written.
    Output,
    /// From the porter: the end, with the exit status (`i32`).
    Ended,
}

const KINDS: [Kind; 7] =
    [Kind::Run, Kind::Connect, Kind::Input, Kind::Kill, Kind::Started, Kind::Output, Kind::Ended];

/// One message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Which conversation it belongs to.
    pub conversation: u32,
    /// What it says.
    pub kind: Kind,
    /// What follows.
    pub payload: Vec<u8>,
}

impl Frame {
    /// A frame; `payload` has at most [`LONGEST`] bytes.
    pub fn new(conversation: u32, kind: Kind, payload: impl Into<Vec<u8>>) -> Self {
        Self { conversation, kind, payload: payload.into() }
    }

    /// Sends it, in one write.
    pub fn write(&self, mut to: impl Write) -> io::Result<()> {
        let length = u32::try_from(self.payload.len()).ok().filter(|_| self.payload.len() <= LONGEST);
        let length = length.ok_or_else(|| io::Error::new(ErrorKind::InvalidInput, "frame is too long"))?;
        let kind = KINDS.iter().position(|kind| *kind == self.kind).and_then(|kind| u8::try_from(kind).ok());
        let mut bytes = Vec::with_capacity(HEADER + self.payload.len());
        bytes.extend(self.conversation.to_le_bytes());
        bytes.push(kind.unwrap_or(u8::MAX));
        bytes.extend(length.to_le_bytes());
        bytes.extend(&self.payload);
        to.write_all(&bytes)?;
        to.flush()
    }

    /// Receives one.
    pub fn read(mut from: impl Read) -> io::Result<Self> {
        let mut header = [0; HEADER];
        from.read_exact(&mut header)?;
        let [c0, c1, c2, c3, kind, l0, l1, l2, l3] = header;
        let wrong = |what| io::Error::new(ErrorKind::InvalidData, what);
        let kind = KINDS.get(usize::from(kind)).ok_or_else(|| wrong("unknown kind of frame"))?;
        let length = usize::try_from(u32::from_le_bytes([l0, l1, l2, l3])).unwrap_or(usize::MAX);
        if length > LONGEST {
            return Err(wrong("frame is too long"));
        }
        let mut payload = vec![0; length];
        from.read_exact(&mut payload)?;
        Ok(Self { conversation: u32::from_le_bytes([c0, c1, c2, c3]), kind: *kind, payload })
    }

    /// The number that follows, in a frame that carries one.
    pub fn number(&self) -> Option<[u8; 4]> {
        self.payload.as_slice().try_into().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_read_as_they_were_written() {
        let frames = [
            Frame::new(1, Kind::Run, "echo"),
            Frame::new(u32::MAX, Kind::Ended, (-1i32).to_le_bytes()),
            Frame::new(7, Kind::Input, vec![0; LONGEST]),
        ];
        let mut bytes = Vec::new();
        frames.iter().for_each(|frame| frame.write(&mut bytes).unwrap());
        assert_eq!(&bytes[..13], b"\x01\0\0\0\0\x04\0\0\0echo");
        let mut rest = bytes.as_slice();
        for frame in frames {
            assert_eq!(Frame::read(&mut rest).unwrap(), frame);
        }
        assert_eq!(Frame::read(rest).unwrap_err().kind(), ErrorKind::UnexpectedEof);
    }

    #[test]
    fn noise_is_refused() {
        let unknown = [1, 0, 0, 0, 7, 0, 0, 0, 0];
        assert_eq!(Frame::read(&unknown[..]).unwrap_err().kind(), ErrorKind::InvalidData);
        let long = [1, 0, 0, 0, 0, 1, 0, 1, 0];
        assert_eq!(Frame::read(&long[..]).unwrap_err().kind(), ErrorKind::InvalidData);
        assert!(Frame::new(1, Kind::Input, vec![0; LONGEST + 1]).write(Vec::new()).is_err());
    }
}
