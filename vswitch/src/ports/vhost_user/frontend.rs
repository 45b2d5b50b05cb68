//! The front-end's half, as a VMM would have it: for tests, fuzzing and load generators.
//!
//! It blocks, trusts its back-end, and knows nothing of [`super::session`]. Rings are the caller's: it says where they
//! lie in memory that it shares.

use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::io::Errno;
use vmq::ring::RingAddresses;
use zerocopy::IntoBytes;
use zerocopy::little_endian::{U32, U64};

use super::features::{Features, Negotiated, Protocol};
use super::message::{
    Header, InflightArea, Kind, MemoryRegion, MessageError, Request, VringAddress, VringFd, VringState, read,
};
use super::socket;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why a conversation with a back-end failed.
#[derive(Debug, thiserror::Error)]
pub enum FrontendError {
    /// The connection broke, or no answer came in time.
    #[error("no answer from the back-end")]
    Io(#[from] std::io::Error),
    /// The answer makes no sense.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// An answer to another request.
    #[error("{} was answered with message {answer}", asked.name())]
    Mismatch {
        /// What was asked.
        asked: Kind,
        /// Number of the answer.
        answer: u32,
    },
    /// The back-end said no.
    #[error("the back-end refused {}", .0.name())]
    Refused(Kind),
    /// No descriptor came with the answer.
    #[error("no descriptor with the answer to {}", .0.name())]
    NoDescriptor(Kind),
}

impl From<Errno> for FrontendError {
    fn from(error: Errno) -> Self {
        Self::Io(error.into())
    }
}

/// A ring to be started.
#[derive(Debug)]
pub struct RingSetup<'f> {
    /// Entries.
    pub size: u16,
    /// Where its parts lie, in this process.
    pub addresses: RingAddresses,
    /// Where it goes on.
    pub base: u32,
    /// Our doorbell; without one the back-end polls.
    pub kick: Option<BorrowedFd<'f>>,
    /// The back-end's interrupt; without one we poll.
    pub call: Option<BorrowedFd<'f>>,
}

/// A connection to a back-end.
#[derive(Debug)]
pub struct Frontend {
    stream: UnixStream,
    /// `REPLY_ACK` was negotiated: everything is acknowledged.
    acknowledged: bool,
}

impl From<UnixStream> for Frontend {
    fn from(stream: UnixStream) -> Self {
        let _ = stream.set_read_timeout(Some(PATIENCE));
        let _ = stream.set_write_timeout(Some(PATIENCE));
        Self { stream, acknowledged: false }
    }
}

impl AsFd for Frontend {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl Frontend {
    /// Sends bytes as they are, and descriptors with the first of them.
    ///
    /// # Errors
    /// The connection broke.
    pub fn send_raw(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), FrontendError> {
        let mut sent = 0;
        while let Some(rest) = bytes.get(sent..).filter(|rest| !rest.is_empty()) {
            sent += socket::send(self.stream.as_fd(), rest, if sent == 0 { fds } else { &[] })?;
        }
        Ok(())
    }

    /// Sends a request and waits for its acknowledgement, if those were negotiated.
    ///
    /// # Errors
    /// [`FrontendError::Refused`], and all others.
    pub fn tell(&mut self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<(), FrontendError> {
        self.send_raw(&request.encode(self.acknowledged), fds)?;
        // The answer to this one is due anyway.
        let answered = request.kind() == Kind::SetLogBase;
        if (self.acknowledged || answered) && self.number(request.kind())? != 0 {
            return Err(FrontendError::Refused(request.kind()));
        }
        Ok(())
    }

    /// Sends a request whose answer is a number.
    ///
    /// # Errors
    /// The connection broke, or the answer is something else.
    pub fn ask(&mut self, request: &Request) -> Result<u64, FrontendError> {
        self.send_raw(&request.encode(false), &[])?;
        self.number(request.kind())
    }

    fn number(&mut self, kind: Kind) -> Result<u64, FrontendError> {
        let (payload, _) = self.answer(kind)?;
        Ok(read::<U64>(kind, &payload)?.get())
    }

    /// Waits for the answer to a request of `kind`: its payload and descriptors.
    ///
    /// # Errors
    /// The connection broke, or the answer is to something else.
    pub fn answer(&mut self, kind: Kind) -> Result<(Vec<u8>, Vec<OwnedFd>), FrontendError> {
        let (mut header, mut fds) = (Header::default(), Vec::new());
        let mut filled = 0;
        while let Some(rest) = header.as_mut_bytes().get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match socket::fill(self.stream.as_fd(), rest, &mut fds) {
                Ok(Some(0) | None) => {
                    return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
                }
                Ok(Some(count)) => filled += count,
                Err(error) => return Err(std::io::Error::other(error).into()),
            }
        }
        let mut payload = vec![0; usize::try_from(header.size.get()).unwrap_or(0)];
        self.stream.read_exact(&mut payload)?;
        if !header.is_reply() || header.request.get() != kind as u32 {
            return Err(FrontendError::Mismatch { asked: kind, answer: header.request.get() });
        }
        Ok((payload, fds))
    }

    /// Opens a session with as many of the wanted features as the back-end offers.
    ///
    /// # Errors
    /// The connection broke, or the back-end refused.
    pub fn negotiate(&mut self, features: Features, protocol: Protocol) -> Result<Negotiated, FrontendError> {
        let features = features & Features::from_bits_retain(self.ask(&Request::GetFeatures)?);
        let protocol = protocol & Protocol::from_bits_retain(self.ask(&Request::GetProtocolFeatures)?);
        self.tell(&Request::SetProtocolFeatures(protocol.bits()), &[])?;
        self.acknowledged = protocol.contains(Protocol::REPLY_ACK);
        self.tell(&Request::SetOwner, &[])?;
        self.tell(&Request::SetFeatures(features.bits()), &[])?;
        Ok(Negotiated { features, protocol })
    }

    /// Shows the back-end memory: regions and, one each, their files.
    ///
    /// # Errors
    /// The connection broke, or the back-end refused.
    pub fn show_memory(
        &mut self,
        regions: &[MemoryRegion],
        files: &[BorrowedFd<'_>],
    ) -> Result<(), FrontendError> {
        self.tell(&Request::SetMemTable(regions.to_vec()), files)
    }

    /// Starts ring `index`. It stays disabled until [`Frontend::enable_ring`], if protocol features were acknowledged.
    ///
    /// # Errors
    /// The connection broke, or the back-end refused.
    pub fn start_ring(&mut self, index: u8, ring: &RingSetup<'_>) -> Result<(), FrontendError> {
        let state = |num| VringState { index: U32::new(index.into()), num: U32::new(num) };
        self.tell(&Request::SetVringNum(state(ring.size.into())), &[])?;
        self.tell(&Request::SetVringBase(state(ring.base)), &[])?;
        self.set_addresses(index, &ring.addresses)?;
        let fd = |fd: &Option<BorrowedFd<'_>>| VringFd { index, polled: fd.is_none() };
        self.tell(&Request::SetVringCall(fd(&ring.call)), ring.call.as_slice())?;
        self.tell(&Request::SetVringKick(fd(&ring.kick)), ring.kick.as_slice())
    }

    /// Tells where ring `index` lies, and whether its writes are to be logged.
    ///
    /// # Errors
    /// The connection broke, or the back-end refused.
    pub fn set_addresses(&mut self, index: u8, addresses: &RingAddresses) -> Result<(), FrontendError> {
        let wire = VringAddress {
            index: U32::new(index.into()),
            flags: U32::new(if addresses.log.is_some() { VringAddress::LOG } else { 0 }),
            descriptors: U64::new(addresses.descriptors),
            used: U64::new(addresses.device),
            available: U64::new(addresses.driver),
            log: U64::new(addresses.log.unwrap_or(0)),
        };
        self.tell(&Request::SetVringAddr(wire), &[])
    }

    /// Enables or disables ring `index`.
    ///
    /// # Errors
    /// The connection broke, or the back-end refused.
    pub fn enable_ring(&mut self, index: u8, on: bool) -> Result<(), FrontendError> {
        let state = VringState { index: U32::new(index.into()), num: U32::new(on.into()) };
        self.tell(&Request::SetVringEnable(state), &[])
    }

    /// Stops ring `index`; returns where it is to go on.
    ///
    /// # Errors
    /// The connection broke, or the answer is something else.
    pub fn stop_ring(&mut self, index: u8) -> Result<u32, FrontendError> {
        let state = VringState { index: U32::new(index.into()), num: U32::ZERO };
        self.send_raw(&Request::GetVringBase(state).encode(false), &[])?;
        let (payload, _) = self.answer(Kind::GetVringBase)?;
        Ok(read::<VringState>(Kind::GetVringBase, &payload)?.num.get())
    }

    /// Asks for a new in-flight record of `rings` rings with `size` entries.
    ///
    /// # Errors
    /// The connection broke, or no record came.
    pub fn new_inflight(&mut self, rings: u16, size: u16) -> Result<(InflightArea, OwnedFd), FrontendError> {
        let kind = Kind::GetInflightFd;
        let area = InflightArea { rings: rings.into(), ring_size: size.into(), ..InflightArea::default() };
        self.send_raw(&Request::GetInflightFd(area).encode(false), &[])?;
        let (payload, fds) = self.answer(kind)?;
        let fd = fds.into_iter().next().ok_or(FrontendError::NoDescriptor(kind))?;
        Ok((read(kind, &payload)?, fd))
    }
}
