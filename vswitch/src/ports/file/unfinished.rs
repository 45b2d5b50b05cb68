//! Files that are not in use, but not let go of either: their disk may take as long as it likes to open or to close one.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::FileError;
use super::backlog::{Thread, outcome};

/// How long a disk is waited for that takes nothing.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// A file that a thread of its own has yet to let go of.
#[derive(Debug)]
pub struct Unfinished {
    path: PathBuf,
    thread: Thread,
    left: Arc<AtomicUsize>,
    /// What was left when somebody looked, and since when.
    seen: (usize, Instant),
    patience: Duration,
}

impl Unfinished {
    /// A file that `thread` closes when the disk has what is `left`. With no sign of life for so long it is given up.
    pub(super) fn closing(path: PathBuf, thread: Thread, left: Arc<AtomicUsize>, patience: Duration) -> Self {
        let seen = (left.load(Ordering::Acquire), Instant::now());
        Self { path, thread, left, seen, patience }
    }

    /// Opens a file on a thread of its own.
    ///
    /// # Errors
    /// There was no answer for so long. What the disk opens after all is closed at once.
    pub fn open<T: Send + 'static>(
        path: &Path,
        patience: Duration,
        open: impl FnOnce(&Path) -> Result<T, FileError> + Send + 'static,
    ) -> Result<Result<T, FileError>, Self> {
        let failed = |cause| Err(FileError::Open { path: path.into(), cause });
        let ((answer, answered), theirs) = (channel(), path.to_owned());
        let thread = std::thread::Builder::new().name("capture-file".into()).spawn(move || {
            let _ = answer.send(open(&theirs));
            Ok(())
        });
        let thread = match thread {
            Ok(thread) => thread,
            Err(cause) => return Ok(failed(cause)),
        };
        match answered.recv_timeout(patience) {
            Ok(opened) => Ok(opened),
            Err(RecvTimeoutError::Disconnected) => Ok(failed(io::ErrorKind::BrokenPipe.into())),
            Err(RecvTimeoutError::Timeout) => {
                Err(Self::closing(path.into(), thread, Arc::default(), Duration::ZERO))
            }
        }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file is nobody's any more.
    pub fn is_over(&self) -> bool {
        self.thread.is_finished()
    }

    /// The disk has taken nothing for as long as it is waited for. Only what happens between two looks is noticed.
    pub fn is_stuck(&mut self) -> bool {
        let left = self.left.load(Ordering::Acquire);
        if left != self.seen.0 {
            self.seen = (left, Instant::now());
        }
        self.seen.1.elapsed() >= self.patience
    }

    /// Waits for the end, as long as the disk takes something.
    ///
    /// # Errors
    /// The file could not be written, or the disk does not answer.
    pub fn wait(mut self) -> Result<(), FileError> {
        while !self.is_over() {
            if self.is_stuck() {
                return Err(FileError::Silent { path: self.path });
            }
            sleep(Duration::from_millis(1));
        }
        let Self { path, thread, .. } = self;
        outcome(Some(thread)).map_err(|error| FileError::Write { path, cause: error.into() })
    }
}
