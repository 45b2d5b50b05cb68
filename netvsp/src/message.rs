//! Messages of the host, other than frames and their completions.

use serde::{Deserialize, Serialize};

/// What has to reach the guest, sooner or later.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Message {
    /// The answer to a request.
    Completion(u64, Vec<u8>),
    /// An NVSP message of ours.
    InBand(Vec<u8>),
    /// An RNDIS control message, in a receive section.
    Control(Vec<u8>),
}

impl Message {
    /// What it says.
    pub(crate) fn payload(&self) -> &[u8] {
        match self {
            Self::Completion(_, payload) | Self::InBand(payload) | Self::Control(payload) => payload,
        }
    }
}

/// Messages on the primary channel that a successor may have to write: which of them, the journal's counts say.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Waiting {
    /// Messages before them, ever.
    pub(crate) after: u32,
    pub(crate) messages: Vec<Message>,
}

impl Waiting {
    /// The message behind the first `shown` ever and those after it, up to the `owed`th. Nothing is believed of either.
    pub(crate) fn between(mut self, shown: u32, owed: u32) -> Vec<Message> {
        let count = |number: u32| (number.wrapping_sub(self.after) as usize).min(self.messages.len());
        let (shown, owed) = (count(shown), count(owed));
        self.messages.truncate(owed);
        self.messages.drain(..shown.min(owed));
        self.messages
    }
}
