//! What can go wrong in a session.

use std::fmt::Write;

use vmq::doorbell::NotADoorbell;
use vmq::memory::MappingError;

use super::vring::{DoorbellError, InflightError, SetupError};
use crate::ports::vhost_user::memory_table::TableError;
use crate::ports::vhost_user::message::{Kind, MessageError};

/// Why a session ends, or a request is refused.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The message itself is wrong.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// A request that this back-end does not serve.
    #[error("{} is not supported", .0.name())]
    Unsupported(Kind),
    /// A request that needs a protocol feature which was not acknowledged.
    #[error("{} without its protocol feature", .0.name())]
    NotNegotiated(Kind),
    /// Features were acknowledged that were not offered.
    #[error("features acknowledged that were not offered: {0}")]
    Unoffered(String),
    /// Features changed under running rings.
    #[error("features changed while rings run: {0}")]
    FeaturesWhileRunning(String),
    /// A ring the port does not have.
    #[error("ring {index} of a port with {rings}")]
    NoSuchRing {
        /// Its index.
        index: u32,
        /// Rings of the port.
        rings: usize,
    },
    /// A running ring cannot be changed that way.
    #[error("{} for ring {index}, which runs", kind.name())]
    Running {
        /// The ring.
        index: usize,
        /// The request.
        kind: Kind,
    },
    /// A number that means nothing for this request.
    #[error("{} with value {value:#x}", kind.name())]
    Value {
        /// The request.
        kind: Kind,
        /// The number.
        value: u64,
    },
    /// A doorbell is none.
    #[error("doorbell of ring {index}")]
    Doorbell {
        /// The ring.
        index: usize,
        /// Why.
        #[source]
        source: DoorbellError,
    },
    /// The dirty log's doorbell is none.
    #[error("doorbell of the dirty log")]
    LogDoorbell(#[source] NotADoorbell),
    /// The memory table makes no sense.
    #[error("guest memory")]
    Memory(#[from] TableError),
    /// The in-flight record makes no sense.
    #[error("in-flight record")]
    Inflight(#[from] InflightError),
    /// A ring cannot be set up.
    #[error("ring {index} cannot be set up")]
    Setup {
        /// The ring.
        index: usize,
        /// Why.
        #[source]
        source: SetupError,
    },
    /// The port gave up a ring of its own accord.
    #[error("ring {0} was stopped by the switch")]
    RingGone(usize),
    /// A larger MTU than the port's.
    #[error("mtu of {asked}, the port has {limit}")]
    Mtu {
        /// What the front-end wants.
        asked: u64,
        /// What the port has.
        limit: u16,
    },
}

impl SessionError {
    /// The error with all its causes, in one line.
    pub fn report(&self) -> String {
        let mut text = self.to_string();
        let mut source = std::error::Error::source(self);
        while let Some(cause) = source {
            let _ = write!(text, ": {cause}");
            source = cause.source();
        }
        text
    }

    /// True if the session can go on once the front-end was told.
    pub(super) fn is_refusal(&self) -> bool {
        matches!(
            self,
            Self::Unsupported(_)
                | Self::NotNegotiated(_)
                | Self::Mtu { .. }
                | Self::Message(MessageError::Unknown(_))
                | Self::Memory(TableError::Mapping(MappingError::TooMany(_) | MappingError::TooMuch(_)))
        )
    }
}
