//! Files of pcap ports. Whoever asked for one to be opened or closed waits for its disk, with nothing locked and not for
//! ever: nobody else has to wait for what that disk does.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::Fabric;
use super::switch::Port;
use crate::error::FabricError;
use crate::port::PortCore;
use crate::ports::file::{FileError, FileSink, FileSource, PATIENCE, Unfinished, WhenFull};
use crate::queue::{Sink, Source};
use crate::report::PortState;
use crate::spec::Attachment;

/// How long a disk is waited for that is only slow: clients of the API are gone after a minute.
pub(super) const SLOW: Duration = Duration::from_secs(30);

/// What disks have yet to open or to close.
#[derive(Debug, Default)]
pub(super) struct Disks {
    unfinished: Mutex<Vec<Entry>>,
}

#[derive(Debug)]
pub(super) struct Entry {
    port: Arc<str>,
    file: Unfinished,
    stuck: bool,
}

impl Disks {
    /// Ends the capture that is written to `sink`, if it is one, and waits for nobody.
    pub(super) fn end(&self, port: &PortCore, sink: Sink) {
        let Sink::File(mut file) = sink else { return };
        match file.end() {
            Ok(Some(file)) => self.add(&port.name, file),
            Ok(None) => {}
            Err(error) => not_closed(&port.name, &error),
        }
    }

    pub(super) fn add(&self, port: &Arc<str>, file: Unfinished) {
        self.lock().push(Entry { port: Arc::clone(port), file, stuck: false });
    }

    /// Waits until the files that are `wanted` are let go of: `longest` if their disks are slow.
    ///
    /// # Errors
    /// One is not, and is left to its disk.
    pub(super) fn wait(&self, longest: Duration, wanted: impl Fn(&Path) -> bool) -> Result<(), FileError> {
        let begin = Instant::now();
        loop {
            let list = self.look();
            let mut waited_for = list.iter().filter(|entry| wanted(entry.file.path()));
            let Some(first) = waited_for.next() else { return Ok(()) };
            if begin.elapsed() > longest || (first.stuck && waited_for.all(|entry| entry.stuck)) {
                return Err(FileError::Silent { path: first.file.path().into() });
            }
            drop(list);
            sleep(Duration::from_millis(1));
        }
    }

    /// Forgets what is closed, and notes which disks do not answer.
    pub(super) fn look(&self) -> MutexGuard<'_, Vec<Entry>> {
        let mut list = self.lock();
        for Entry { port, file, .. } in list.extract_if(.., |entry| entry.file.is_over()) {
            if let Err(error) = file.wait() {
                not_closed(&port, &error);
            }
        }
        for Entry { port, file, stuck } in &mut *list {
            let before = std::mem::replace(stuck, file.is_stuck());
            if *stuck && !before {
                let path = file.path().display();
                tracing::warn!(%port, %path, "the disk does not answer: the capture file is left to it");
            }
        }
        list
    }

    /// Opens the file of `port` that is at `path`, if any, as soon as it is let go of.
    fn open<T: Send + 'static>(
        &self,
        port: &Arc<str>,
        path: Option<&PathBuf>,
        open: impl FnOnce(&Path) -> Result<T, FileError> + Send + 'static,
    ) -> Result<Option<T>, FabricError> {
        let Some(path) = path else { return Ok(None) };
        let opened = self.wait(SLOW, |unfinished| unfinished == path).and_then(|()| {
            Unfinished::open(path, PATIENCE, open).unwrap_or_else(|unfinished| {
                self.add(port, unfinished);
                Err(FileError::Silent { path: path.clone() })
            })
        });
        in_use_by(port, opened)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.unfinished.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A file that was opened for `port`, or why it was not.
pub(super) fn in_use_by<T>(port: &str, opened: Result<T, FileError>) -> Result<Option<T>, FabricError> {
    opened.map(Some).map_err(|error| FabricError::failed(format!("port {port}"), error))
}

fn not_closed(port: &str, error: &FileError) {
    tracing::warn!(%port, %error, "capture file not closed cleanly");
}

/// The files of a port, opened.
#[derive(Debug, Default)]
pub(super) struct Files {
    pub(super) played: Option<FileSource>,
    pub(super) written: Option<FileSink>,
}

impl Files {
    /// Puts the files into the port's queues.
    pub(super) fn connect(self, port: &Port) {
        let (Some((_, source)), Some(sink)) = (port.sources.first(), port.sinks.first()) else { return };
        if let Some(file) = self.written {
            sink.swap(Sink::File(Box::new(file)));
            source.note_drops_in(sink);
        }
        port.core.set_state(PortState::Up);
        if let Some(file) = self.played {
            source.swap(Source::File(Box::new(file)));
        }
    }
}

impl Fabric {
    /// Opens the files of a pcap port as soon as those that it had are closed. Nothing may be locked.
    pub(super) fn open_files(&self, port: &Arc<str>, attachment: &Attachment) -> Result<Files, FabricError> {
        let Attachment::Pcap { read, write, pace, repeat } = attachment else { return Ok(Files::default()) };
        let (pace, repeat, epoch, name) = (*pace, *repeat, self.epoch, Arc::clone(port));
        let play = move |path: &Path| FileSource::open(path, pace, repeat);
        let write_to = move |path: &Path| FileSink::create(path, &name, epoch, true, WhenFull::Lose);
        Ok(Files {
            played: self.disks.open(port, read.as_ref(), play)?,
            written: self.disks.open(port, write.as_ref(), write_to)?,
        })
    }
}
