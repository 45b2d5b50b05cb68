//! The pcap port: frames that enter the switch from a capture file ([`FileSource`]), and frames that leave it into one
//! ([`FileSink`]).
//!
//! Neither reads a clock: the caller says what time it is. Driven by a virtual clock, the same files in give the same
//! bytes out.
//!
//! Both want plain files (the sink also takes a device such as `/dev/null`): a pipe whose other end is slow would
//! hold up the worker that reads it, and with it the whole switch. Files are written, and closed, by a thread of their own
//! ([`Unfinished`]). A file is locked while it is in use, so that no two ports write one capture, and none reads what
//! another is overwriting.

mod backlog;
mod sink;
mod source;
#[cfg(test)]
mod tests;
mod unfinished;

use std::error::Error;
use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use crate::pcap::{ReadError, WriteError};

pub use backlog::WhenFull;
#[cfg(test)]
pub(crate) use backlog::tests::Disk;
pub use sink::FileSink;
pub use source::{FileSource, Progress};
pub use unfinished::{PATIENCE, Unfinished};

/// Why a capture file cannot be used, or used further. Each names the file.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The file cannot be opened or made.
    #[error("cannot open `{}`: {cause}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        cause: io::Error,
    },
    /// A pipe, socket, directory or the like.
    #[error("`{}` is not a plain file: a pipe or device could stall the switch", path.display())]
    NotPlain {
        /// The file.
        path: PathBuf,
    },
    /// Another port, or another program, holds the file's lock.
    #[error("`{}` is in use by another port or program", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// The capture is broken; the message says at which byte.
    #[error("cannot read `{}`: {}", path.display(), with_cause(cause))]
    Read {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        cause: ReadError,
    },
    /// The capture cannot be written: the disk is full, for example.
    #[error("cannot write `{}`: {}", path.display(), with_cause(cause))]
    Write {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        cause: WriteError,
    },
    /// The disk is waited for in vain, see [`PATIENCE`]. What it has of the file is not known.
    #[error("the disk of `{}` does not answer in time", path.display())]
    Silent {
        /// The file.
        path: PathBuf,
    },
}

/// An error's message, and the one of what caused it.
fn with_cause(error: &dyn Error) -> String {
    match error.source() {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}

/// Opens `path` without waiting for anybody, and checks its kind before anything is read or changed.
fn open(
    path: &Path,
    options: &mut OpenOptions,
    fits: fn(&std::fs::FileType) -> bool,
) -> Result<File, FileError> {
    let failed = |cause| FileError::Open { path: path.into(), cause };
    let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or(0);
    let file = match options.custom_flags(flags).open(path) {
        // How a pipe without a reader refuses to be opened for writing.
        Err(cause) if cause.raw_os_error() == Some(rustix::io::Errno::NXIO.raw_os_error()) => {
            return Err(FileError::NotPlain { path: path.into() });
        }
        opened => opened.map_err(failed)?,
    };
    if fits(&file.metadata().map_err(failed)?.file_type()) {
        Ok(file)
    } else {
        Err(FileError::NotPlain { path: path.into() })
    }
}

fn open_to_read(path: &Path) -> Result<File, FileError> {
    let file = open(path, OpenOptions::new().read(true), std::fs::FileType::is_file)?;
    locked(path, file.try_lock_shared())?;
    Ok(file)
}

/// The file is emptied only once it is known to be nobody else's.
fn open_to_write(path: &Path) -> Result<File, FileError> {
    let fits = |kind: &std::fs::FileType| kind.is_file() || kind.is_char_device();
    let file = open(path, OpenOptions::new().write(true).create(true), fits)?;
    let failed = |cause| FileError::Open { path: path.into(), cause };
    if file.metadata().map_err(failed)?.is_file() {
        locked(path, file.try_lock())?;
        file.set_len(0).map_err(failed)?;
    }
    Ok(file)
}

fn locked(path: &Path, outcome: Result<(), TryLockError>) -> Result<(), FileError> {
    match outcome {
        // A file system without locks must do without.
        Ok(()) | Err(TryLockError::Error(_)) => Ok(()),
        Err(TryLockError::WouldBlock) => Err(FileError::InUse { path: path.into() }),
    }
}
