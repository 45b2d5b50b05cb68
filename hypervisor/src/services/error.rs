//! What goes wrong: a guest's mistakes, and commands that come to nothing.

use vmbus::ring::RingFault;

use super::framing::Version;

/// What a guest did wrong. Its service is stopped until it opens the channel again.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Mistake {
    /// A packet, a message or a list in it ends too early.
    #[error("a message has {len} bytes where {need} are needed")]
    Short {
        /// Bytes there are.
        len: usize,
        /// Bytes needed.
        need: usize,
    },
    /// The ring.
    #[error(transparent)]
    Ring(#[from] RingFault),
    /// A packet with ranges, or a completion.
    #[error("a packet came that is not in-band data")]
    NotInBand,
    /// The guest does not read its ring.
    #[error("the guest sends requests and reads no answers")]
    NotReading,
    /// A ring in which a request has no room.
    #[error("the guest's ring is too small for a message of {len} bytes")]
    SmallRing {
        /// Bytes of the message.
        len: usize,
    },
    /// A packet that answers nothing.
    #[error("a message came that was not asked for")]
    Unasked,
    /// A field that must be echoed, or follows from the request.
    #[error("the {field} of an answer is {found}, not {expected}")]
    Differs {
        /// Field.
        field: &'static str,
        /// What it is.
        found: u64,
        /// What it must be.
        expected: u64,
    },
    /// The guest chose what it was not offered.
    #[error("the guest chose versions {framework} and {message}, which were not offered")]
    NotOffered {
        /// Version of the framing.
        framework: Version,
        /// Version of the messages.
        message: Version,
    },
    /// The guest chose several.
    #[error("the guest chose {frameworks} and {messages} versions, not one each")]
    Choice {
        /// Versions of the framing.
        frameworks: u16,
        /// Versions of the messages.
        messages: u16,
    },
    /// A text is longer than its place, or ends within a character.
    #[error("a text of {len} bytes stands in {room}")]
    Text {
        /// Bytes claimed.
        len: u32,
        /// Bytes there are.
        room: usize,
    },
    /// A value is no text.
    #[error("a value is of type {0}, not text")]
    ValueType(u32),
    /// A message in the wrong state, or one that no guest sends.
    #[error("dynamic memory message {kind} came at the wrong time")]
    OutOfOrder {
        /// Message type.
        kind: u16,
    },
    /// The guest gave or took more pages than it was asked to.
    #[error("the guest names {excess} pages more than it was asked for")]
    MoreThanAsked {
        /// Pages too many.
        excess: u64,
    },
    /// The guest gave pages that it does not have.
    #[error("the guest gives {count} pages from {first:#x} on, which are not its memory")]
    NotMemory {
        /// First page.
        first: u64,
        /// Pages.
        count: u64,
    },
    /// The guest gave pages that are in the balloon.
    #[error("the guest gives {count} pages from {first:#x} on, some of which it gave before")]
    TakenTwice {
        /// First page.
        first: u64,
        /// Pages.
        count: u64,
    },
}

/// Why a command came to nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// The VM was set up without the service.
    #[error("the VM does not have this service")]
    Absent,
    /// The guest has not opened the channel, or its program has not started yet.
    #[error("the guest does not run this service (its driver or daemon is not there)")]
    NotReady,
    /// No version in common.
    #[error("the guest speaks none of the host's versions of this service")]
    Incompatible,
    /// The service is waiting for the guest.
    #[error("the guest has not answered what it was asked before")]
    Busy,
    /// The channel was closed before the answer came.
    #[error("the guest closed the service's channel")]
    Closed,
    /// No answer in time.
    #[error("the guest did not answer within {seconds} s")]
    NoAnswer {
        /// Limit.
        seconds: u64,
    },
    /// The guest answered that it did not.
    #[error("the guest refused (status {status:#x})")]
    Refused {
        /// What it said.
        status: u32,
    },
    /// Key or value are too long, or hold a NUL.
    #[error("key or value are too long: at most {key} and {value} characters")]
    TooLong {
        /// Characters of a key.
        key: usize,
        /// Characters of a value.
        value: usize,
    },
    /// Thawed before it was asked for.
    #[error("the file systems had to be thawed early: a snapshot taken meanwhile may be torn")]
    HoldExpired,
    /// There is nothing to thaw.
    #[error("the file systems are not frozen")]
    NotFrozen,
    /// A target out of bounds.
    #[error("{bytes} bytes are not between the minimum of {minimum} and the maximum of {maximum}")]
    Limits {
        /// Target.
        bytes: u64,
        /// Least.
        minimum: u64,
        /// Most.
        maximum: u64,
    },
}
