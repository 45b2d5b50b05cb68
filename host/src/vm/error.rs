//! What can go wrong when an operator asks for something.

use std::io;
use std::path::Path;

use vswitch::error::FabricError;

/// Why a request about a VM was refused.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// There is no such VM or adapter.
    #[error("there is no {what} `{name}`")]
    NotFound {
        /// `VM` or `adapter`.
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// Something of that name exists already.
    #[error("{what} `{name}` exists already")]
    Exists {
        /// `VM` or `adapter`.
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// The VM is in another state than the request needs.
    #[error("VM `{name}` is {state}, expected {expected}")]
    State {
        /// The VM.
        name: String,
        /// What it is.
        state: String,
        /// What it would have to be, and how it gets there.
        expected: &'static str,
    },
    /// A value is out of range or contradicts another.
    #[error("{key}: {problem}")]
    Invalid {
        /// The key as in the configuration file.
        key: &'static str,
        /// What is wrong and what was expected.
        problem: String,
    },
    /// The host refused something.
    #[error("{doing}: {source}")]
    Io {
        /// What was being done.
        doing: String,
        /// The reason.
        source: io::Error,
    },
    /// The switch refused the VM's port.
    #[error("adapter `{nic}`: {source}")]
    Port {
        /// The adapter.
        nic: String,
        /// The reason.
        source: FabricError,
    },
    /// The worker, or the guest behind it, refused.
    #[error("{0}")]
    Refused(String),
    /// The worker did not answer in time.
    #[error("the worker of VM `{name}` does not answer; `yard vm stop {name}` ends it")]
    Silent {
        /// The VM.
        name: String,
    },
    /// The daemon is ending.
    #[error("yardd is ending")]
    Ending,
}

impl VmError {
    /// There is no VM `name`.
    pub fn no_vm(name: &str) -> Self {
        Self::NotFound { what: "VM", name: name.to_owned() }
    }

    /// There is no adapter `name`.
    pub fn no_nic(name: &str) -> Self {
        Self::NotFound { what: "adapter", name: name.to_owned() }
    }

    /// The host refused something about a file.
    pub(super) fn file(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        |source| Self::Io { doing: path.display().to_string(), source }
    }

    /// The host refused while `doing` something.
    pub(super) fn io(doing: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Io { doing: doing.into(), source: source.into() }
    }
}
