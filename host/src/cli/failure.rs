//! Failures of a command, and the exit status that each has.

use std::io;
use std::path::Path;

use hyper::StatusCode;
use serde::Deserialize;

/// Exit statuses.
pub mod exit {
    /// Done.
    pub const OK: u8 = 0;
    /// The request failed.
    pub const FAILED: u8 = 1;
    /// The command line is wrong.
    pub const USAGE: u8 = 2;
    /// A switch, port, queue, address, VM or adapter does not exist.
    pub const NOT_FOUND: u8 = 3;
    /// Something of that name exists already.
    pub const EXISTS: u8 = 4;
    /// The daemon does not answer.
    pub const UNREACHABLE: u8 = 5;
}

/// A command that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Exit status, of [`exit`].
    pub status: u8,
    /// What went wrong, and what to do.
    pub text: String,
}

/// What the daemon says about a failed request.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Problem {
    kind: String,
    detail: String,
}

impl Failure {
    /// The request, or the command itself, failed.
    pub fn failed(text: impl Into<String>) -> Self {
        Self { status: exit::FAILED, text: text.into() }
    }

    /// The command line is wrong.
    pub fn usage(text: impl Into<String>) -> Self {
        Self { status: exit::USAGE, text: text.into() }
    }

    /// There is no such thing.
    pub fn not_found(text: impl Into<String>) -> Self {
        Self { status: exit::NOT_FOUND, text: text.into() }
    }

    /// No connection to the daemon.
    pub fn unreachable(socket: &Path, error: &io::Error) -> Self {
        let socket = socket.display();
        let advice = match error.kind() {
            io::ErrorKind::PermissionDenied => "its user and group may use it; try as root".to_owned(),
            _ => format!("is yardd running? tried {socket}, --socket PATH names another"),
        };
        Self { status: exit::UNREACHABLE, text: format!("cannot reach yardd at {socket}: {error}\n{advice}") }
    }

    /// The daemon did not answer in time, or broke off.
    pub fn silent(socket: &Path, what: &str) -> Self {
        let text = format!(
            "yardd at {} {what}\nsee its log; a busy daemon may answer a second try",
            socket.display()
        );
        Self { status: exit::UNREACHABLE, text }
    }

    /// The daemon refused.
    pub fn refused(status: StatusCode, body: &[u8]) -> Self {
        let problem: Problem = serde_json::from_slice(body).unwrap_or_default();
        let exit = match status {
            StatusCode::NOT_FOUND => exit::NOT_FOUND,
            StatusCode::CONFLICT if problem.kind != "state" => exit::EXISTS,
            StatusCode::REQUEST_TIMEOUT => exit::UNREACHABLE,
            _ => exit::FAILED,
        };
        let text =
            if problem.detail.is_empty() { format!("the daemon answered {status}") } else { problem.detail };
        Self { status: exit, text }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::failed(error.to_string())
    }
}
