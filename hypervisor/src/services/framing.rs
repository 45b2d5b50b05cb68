//! Framing and negotiation that all services but dynamic memory share.
//!
//! A message is one in-band ring packet: [`PipeHeader`], [`IcHeader`], body. The host asks and the guest edits the very
//! message into its answer, so a request is as long as the longest answer to it. [`Link`] keeps the one rule that all of
//! them live by: versions first, then one request at a time, however long the guest takes.

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Contact, Mistake, Moment, Outbox};

/// Says that the packet holds data (`PIPE_PACKET_DATA`).
const PIPE_DATA: u32 = 1;
/// A transaction, requested.
const REQUEST: u8 = 1 | 2;
/// The packet is an answer.
const RESPONSE: u8 = 4;

/// The guest did as it was asked.
pub const STATUS_OK: u32 = 0;
/// The guest could not, or none of its programs does this.
#[cfg(test)]
pub const STATUS_FAIL: u32 = 0x8000_4005;
/// An enumeration is past its end.
#[cfg(test)]
pub const STATUS_NO_MORE_ITEMS: u32 = 0x8007_0103;

/// A version, as on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Version {
    major: U16,
    minor: U16,
}

impl Version {
    /// Version `major.minor`.
    pub const fn new(major: u16, minor: u16) -> Self {
        Self { major: U16::new(major), minor: U16::new(minor) }
    }

    /// The part before the dot.
    pub const fn major(self) -> u16 {
        self.major.get()
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// First part of every message.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct PipeHeader {
    /// 1: data.
    pub kind: U32,
    /// Bytes after this header.
    pub len: U32,
}

/// Second part of every message.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct IcHeader {
    /// Version of the framing; 0.0 until agreed.
    pub framework: Version,
    /// What the message is: [`Kind`].
    pub kind: U16,
    /// Version of the service's messages; 0.0 until agreed.
    pub message: Version,
    /// Bytes after this header.
    pub body_len: U16,
    /// Outcome; 0 in a request.
    pub status: U32,
    /// Of the request, and echoed.
    pub transaction: u8,
    /// 3 in a request, 5 in an answer.
    pub flags: u8,
    /// 0.
    pub reserved: [u8; 2],
}

/// What the body of a negotiation begins with; versions follow, those of the framework first.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Negotiate {
    /// Framework versions offered; 1 in an answer, 0 if none suits.
    pub frameworks: U16,
    /// Message versions offered; 1 in an answer, 0 if none suits.
    pub messages: U16,
    /// 0.
    pub reserved: U32,
}

/// Bytes before the body.
pub const HEADERS: usize = size_of::<PipeHeader>() + size_of::<IcHeader>();

const _: () = assert!(size_of::<Version>() == 4);
const _: () = assert!(size_of::<PipeHeader>() == 8);
const _: () = assert!(size_of::<IcHeader>() == 20);
const _: () = assert!(size_of::<Negotiate>() == 8);

/// Message types.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Kind {
    /// Which versions?
    Negotiate = 0,
    /// Alive?
    Heartbeat = 1,
    /// Key-value pairs.
    Kvp = 2,
    /// Shut down.
    Shutdown = 3,
    /// The time is.
    TimeSync = 4,
    /// Freeze and thaw.
    Vss = 5,
}

/// Framework versions offered by every service: some guests' VSS takes 3.0 only.
const FRAMEWORKS: [Version; 2] = [Version::new(1, 0), Version::new(3, 0)];

/// What guest and host agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Versions {
    /// Of the framing.
    pub framework: Version,
    /// Of the service's messages.
    pub message: Version,
}

/// A request that is not answered yet.
#[derive(Debug, Clone, Copy)]
struct Outstanding {
    transaction: u64,
    body_len: usize,
    since: Moment,
}

#[derive(Debug, Clone, Copy)]
enum State {
    Closed,
    /// Versions are still to be offered.
    Open,
    Negotiating(Outstanding),
    Ready(Versions),
    Asked(Versions, Outstanding),
    /// The guest takes none of our versions. Stays so until the channel is opened again.
    Incompatible,
}

/// What a packet from the guest was.
#[derive(Debug)]
pub enum Event<'p> {
    /// Versions are agreed on, requests may be sent.
    Negotiated(Version),
    /// The guest takes none of our versions.
    Incompatible,
    /// The answer to the request.
    Reply {
        /// Outcome.
        status: u32,
        /// As long as the request's.
        body: &'p [u8],
    },
}

/// One service's conversation over its channel.
#[derive(Debug)]
pub struct Link {
    kind: Kind,
    versions: &'static [Version],
    state: State,
    next: u64,
}

impl Link {
    /// A closed one. `versions` of the messages are offered; at most 100.
    pub const fn new(kind: Kind, versions: &'static [Version]) -> Self {
        Self { kind, versions, state: State::Closed, next: 1 }
    }

    /// The guest opened the channel: everything starts from the beginning.
    pub fn opened(&mut self) {
        self.state = State::Open;
    }

    /// The channel is gone, and what was asked will not be answered.
    pub fn closed(&mut self) {
        self.state = State::Closed;
    }

    /// Where the conversation stands.
    pub fn contact(&self) -> Contact {
        match self.state {
            State::Closed => Contact::Closed,
            State::Open | State::Negotiating(_) => Contact::Opened,
            State::Ready(versions) | State::Asked(versions, _) => {
                Contact::Ready(versions.message.to_string())
            }
            State::Incompatible => Contact::Incompatible,
        }
    }

    /// The version of the service's messages, once agreed on.
    pub fn version(&self) -> Option<Version> {
        match self.state {
            State::Ready(versions) | State::Asked(versions, _) => Some(versions.message),
            _ => None,
        }
    }

    /// A request may be sent now.
    pub fn is_ready(&self) -> bool {
        matches!(self.state, State::Ready(_))
    }

    /// Since when the guest owes an answer.
    pub fn asked_since(&self) -> Option<Moment> {
        match self.state {
            State::Asked(_, asked) => Some(asked.since),
            _ => None,
        }
    }

    /// Offers the versions if that is still to be done. Without a time limit: a guest may read this minutes later, when
    /// the program that serves it has started.
    pub fn negotiate(&mut self, out: &mut Outbox, now: Moment) {
        if !matches!(self.state, State::Open) {
            return;
        }
        let head = Negotiate {
            frameworks: U16::new(FRAMEWORKS.len().try_into().unwrap_or(0)),
            messages: U16::new(self.versions.len().try_into().unwrap_or(0)),
            reserved: U32::ZERO,
        };
        let body = [head.as_bytes(), FRAMEWORKS.as_bytes(), self.versions.as_bytes()].concat();
        let none = Versions { framework: Version::new(0, 0), message: Version::new(0, 0) };
        let asked = self.send(Kind::Negotiate, none, &body, out, now);
        self.state = State::Negotiating(asked);
    }

    /// Sends a request; false if none may be sent now.
    pub fn ask(&mut self, body: &[u8], out: &mut Outbox, now: Moment) -> bool {
        let State::Ready(versions) = self.state else { return false };
        let asked = self.send(self.kind, versions, body, out, now);
        self.state = State::Asked(versions, asked);
        true
    }

    fn send(
        &mut self,
        kind: Kind,
        versions: Versions,
        body: &[u8],
        out: &mut Outbox,
        since: Moment,
    ) -> Outstanding {
        let transaction = self.next;
        self.next = self.next.wrapping_add(1).max(1);
        let body_len = u16::try_from(body.len()).unwrap_or(u16::MAX);
        let ic = IcHeader {
            framework: versions.framework,
            kind: U16::new(kind as u16),
            message: versions.message,
            body_len: U16::new(body_len),
            status: U32::new(STATUS_OK),
            transaction: low_byte(transaction),
            flags: REQUEST,
            reserved: [0; 2],
        };
        let len = u32::from(body_len).saturating_add(20);
        let pipe = PipeHeader { kind: U32::new(PIPE_DATA), len: U32::new(len) };
        out.send(transaction, [pipe.as_bytes(), ic.as_bytes(), body].concat());
        Outstanding { transaction, body_len: body.len(), since }
    }

    /// Takes a packet from the guest, whose ring transaction is `transaction`.
    ///
    /// # Errors
    /// It is not the answer to what was asked.
    pub fn receive<'p>(&mut self, packet: &'p [u8], transaction: u64) -> Result<Event<'p>, Mistake> {
        let (kind, asked) = match self.state {
            State::Negotiating(asked) => (Kind::Negotiate, asked),
            State::Asked(_, asked) => (self.kind, asked),
            _ => return Err(Mistake::Unasked),
        };
        let (status, body) = reply(packet, transaction, kind, asked)?;
        match self.state {
            State::Asked(versions, _) => {
                self.state = State::Ready(versions);
                Ok(Event::Reply { status, body })
            }
            _ => self.negotiated(body),
        }
    }

    /// The guest's choice of versions.
    fn negotiated<'p>(&mut self, body: &[u8]) -> Result<Event<'p>, Mistake> {
        let (head, rest) = super::take::<Negotiate>(body)?;
        let (framework, rest) = super::take::<Version>(rest)?;
        let (message, _) = super::take::<Version>(rest)?;
        match (head.frameworks.get(), head.messages.get()) {
            (0, _) | (_, 0) => {
                self.state = State::Incompatible;
                Ok(Event::Incompatible)
            }
            (1, 1) if FRAMEWORKS.contains(&framework) && self.versions.contains(&message) => {
                self.state = State::Ready(Versions { framework, message });
                Ok(Event::Negotiated(message))
            }
            (1, 1) => Err(Mistake::NotOffered { framework, message }),
            (frameworks, messages) => Err(Mistake::Choice { frameworks, messages }),
        }
    }
}

/// Checks that `packet` is the answer to `asked`, and returns its status and body.
fn reply(packet: &[u8], transaction: u64, kind: Kind, asked: Outstanding) -> Result<(u32, &[u8]), Mistake> {
    let need = HEADERS + asked.body_len;
    let short = Mistake::Short { len: packet.len(), need };
    let (pipe, rest) = super::take::<PipeHeader>(packet)?;
    let (ic, rest) = super::take::<IcHeader>(rest)?;
    let body = rest.get(..asked.body_len).ok_or(short)?;
    let differs = |field, found: u64, expected: u64| {
        if found == expected { Ok(()) } else { Err(Mistake::Differs { field, found, expected }) }
    };
    differs("ring transaction", transaction, asked.transaction)?;
    differs("pipe packet type", pipe.kind.get().into(), PIPE_DATA.into())?;
    differs("length", pipe.len.get().into(), (need - size_of::<PipeHeader>()) as u64)?;
    differs("message type", ic.kind.get().into(), kind as u64)?;
    differs("transaction", ic.transaction.into(), low_byte(asked.transaction).into())?;
    differs("response flag", (ic.flags & RESPONSE).into(), RESPONSE.into())?;
    Ok((ic.status.get(), body))
}

/// What of a transaction number fits into the header.
fn low_byte(transaction: u64) -> u8 {
    transaction.to_le_bytes()[0]
}
