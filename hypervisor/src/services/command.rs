//! Commands to the services, and the way their answers go.

use std::sync::mpsc;
use std::time::Duration;

use super::CommandError;
use super::shutdown::ShutdownKind;

/// Where the answer to a command goes. Dropped without one, its receiver learns that the service is gone.
#[derive(Debug)]
pub struct Answer<T>(mpsc::Sender<Result<T, CommandError>>);

impl<T> Answer<T> {
    /// An answer's two ends.
    pub fn channel() -> (Self, mpsc::Receiver<Result<T, CommandError>>) {
        let (sender, receiver) = mpsc::channel();
        (Self(sender), receiver)
    }

    /// Answers.
    pub fn give(&self, result: Result<T, CommandError>) {
        self.try_give(result);
    }

    /// Answers; false if nobody waits any more.
    pub fn try_give(&self, result: Result<T, CommandError>) -> bool {
        self.0.send(result).is_ok()
    }
}

/// What a guest can be asked for. An answer whose receiver is gone is lost, and no harm done.
#[derive(Debug)]
pub enum Command {
    /// Shut down or restart. The answer is the guest's word that it will.
    Shutdown {
        /// Which.
        kind: ShutdownKind,
        /// Where the answer goes.
        answer: Answer<()>,
    },
    /// Set the clock.
    TimeSync {
        /// Where the answer goes.
        answer: Answer<()>,
    },
    /// Freeze the file systems. A freeze whose answer nobody receives is undone.
    Freeze {
        /// Thaw them after this time at the latest.
        hold: Duration,
        /// Where the answer goes.
        answer: Answer<()>,
    },
    /// Thaw them.
    Thaw {
        /// Where the answer goes; no error means that they were frozen until now.
        answer: Answer<()>,
    },
    /// Write a pair for the guest's programs.
    KvpSet {
        /// Key.
        key: String,
        /// Value.
        value: String,
        /// Where the answer goes.
        answer: Answer<()>,
    },
    /// Remove such a pair.
    KvpDelete {
        /// Key.
        key: String,
        /// Where the answer goes.
        answer: Answer<()>,
    },
    /// Move the guest's memory towards a size.
    SetMemory {
        /// Bytes.
        bytes: u64,
        /// Where the answer goes: the target is accepted, not reached.
        answer: Answer<()>,
    },
}
