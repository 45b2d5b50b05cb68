//! A running VM's directory: its sockets, its logs, and what a later daemon must know to take the VM back.

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde::{Deserialize, Serialize};

use super::error::VmError;
use super::run::Aim;
use super::spec::VmSpec;

/// Only the daemon's user gets in: whoever reaches the sockets rules the VM.
const MODE: u32 = 0o700;
/// A longer record is none of ours, in bytes.
const MAX_RECORD: u64 = 4 << 20;
/// When a guest's console output is cut, and what is kept of it, in bytes: the directory lies in memory.
const MAX_LOG: u64 = 4 << 20;
const KEPT_LOG: i64 = 1 << 20;

/// What a daemon leaves to the next one. What later versions add has a default: a record that cannot be read is a VM lost.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Record {
    /// The VM as it runs, changes since the start included.
    pub spec: VmSpec,
    /// Process of the worker.
    pub pid: u32,
    /// Clock ticks from the host's start to that of the process: another process of the same number has another.
    pub born: u64,
    /// Seconds from 1970 to the start.
    pub started: u64,
    /// Times it was started again by its restart policy.
    pub restarts: u32,
    /// What the run was to come to.
    #[serde(default)]
    pub aim: Aim,
    /// An operator asked the guest to switch itself off.
    #[serde(default)]
    pub off_wanted: bool,
    /// User and group of the worker, if it has its own.
    #[serde(default)]
    pub user: Option<u32>,
}

/// The directory of one VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Directory {
    path: PathBuf,
}

/// The sockets that a worker is handed.
#[derive(Debug)]
pub struct Listeners {
    pub control: OwnedFd,
    pub channels: OwnedFd,
    pub console: OwnedFd,
}

impl Directory {
    /// That of VM `name` below `root`.
    pub fn new(root: &Path, name: &str) -> Self {
        Self { path: root.join(name) }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn control(&self) -> PathBuf {
        self.path.join("control.sock")
    }

    pub fn channels(&self) -> PathBuf {
        self.path.join("vmbus.sock")
    }

    pub fn console(&self) -> PathBuf {
        self.path.join("console.sock")
    }

    pub fn serial_log(&self) -> PathBuf {
        self.path.join("serial.log")
    }

    pub fn worker_log(&self) -> PathBuf {
        self.path.join("worker.log")
    }

    fn record(&self) -> PathBuf {
        self.path.join("setup.json")
    }

    /// Makes the directory, or makes sure that nobody else gets into the one that is there.
    pub fn make(&self) -> Result<(), VmError> {
        DirBuilder::new()
            .recursive(true)
            .mode(MODE)
            .create(&self.path)
            .and_then(|()| std::fs::set_permissions(&self.path, Permissions::from_mode(MODE)))
            .map_err(VmError::file(&self.path))
    }

    /// Listens anew at every socket.
    pub fn listen(&self) -> Result<Listeners, VmError> {
        let stream = |path: &Path| {
            remove(path)?;
            UnixListener::bind(path).map(OwnedFd::from)
        };
        let (control, console) = (self.control(), self.console());
        Ok(Listeners {
            control: stream(&control).map_err(VmError::file(&control))?,
            channels: self.listen_packets().map_err(VmError::file(&self.channels()))?,
            console: stream(&console).map_err(VmError::file(&console))?,
        })
    }

    /// Sequenced packets, which the standard library does not know.
    fn listen_packets(&self) -> io::Result<OwnedFd> {
        let path = self.channels();
        remove(&path)?;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        rustix::net::bind(&socket, &SocketAddrUnix::new(&path)?)?;
        rustix::net::listen(&socket, 4)?;
        Ok(socket)
    }

    /// A log, to be appended to.
    pub fn log(path: &Path) -> Result<File, VmError> {
        let log = OpenOptions::new().create(true).append(true).mode(0o600).open(path);
        log.map_err(VmError::file(path))
    }

    /// Keeps the logs from filling the file system: what a guest prints is without end.
    pub fn cut_logs(&self) -> io::Result<()> {
        for path in [self.serial_log(), self.worker_log()] {
            let mut log = match OpenOptions::new().read(true).write(true).open(&path) {
                Ok(log) if log.metadata()?.len() > MAX_LOG => log,
                Ok(_) => continue,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            let mut kept = Vec::new();
            log.seek(SeekFrom::End(-KEPT_LOG))?;
            Read::by_ref(&mut log).take(KEPT_LOG.unsigned_abs()).read_to_end(&mut kept)?;
            std::fs::write(path.with_extension("log.1"), kept)?;
            // Whoever appends goes on at the beginning.
            log.set_len(0)?;
        }
        Ok(())
    }

    /// The last line that the worker logged, if it logged any.
    pub fn last_word(&self) -> Option<String> {
        const TAIL: i64 = 4096;
        let mut log = File::open(self.worker_log()).ok()?;
        let length = log.metadata().ok()?.len();
        if length > TAIL.unsigned_abs() {
            log.seek(SeekFrom::End(-TAIL)).ok()?;
        }
        let mut tail = Vec::new();
        log.take(TAIL.unsigned_abs()).read_to_end(&mut tail).ok()?;
        let tail = String::from_utf8_lossy(&tail);
        tail.lines().rev().map(str::trim).find(|line| !line.is_empty()).map(str::to_owned)
    }

    /// Leaves `record` to a later daemon; a killed one leaves the old record or the new one, never half of it.
    pub fn write(&self, record: &Record) -> Result<(), VmError> {
        let path = self.record();
        let draft = path.with_extension("json~");
        let written = || -> io::Result<()> {
            let mut file =
                OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(&draft)?;
            file.write_all(&serde_json::to_vec_pretty(record)?)?;
            std::fs::rename(&draft, &path)
        };
        written().map_err(VmError::file(&path))
    }

    /// What an earlier daemon left, if it left anything.
    ///
    /// # Errors
    /// There is a record, and it cannot be read: its worker may run.
    pub fn read(&self) -> Result<Option<Record>, VmError> {
        let path = self.record();
        let mut text = Vec::new();
        match File::open(&path).and_then(|file| file.take(MAX_RECORD).read_to_end(&mut text)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            read => read.map_err(VmError::file(&path))?,
        };
        let same = |record: Record| match self.path.ends_with(&record.spec.name) {
            true => Ok(Some(record)),
            false => Err(serde::de::Error::custom(format!("it is of VM {}", record.spec.name))),
        };
        serde_json::from_slice(&text).and_then(same).map_err(|error: serde_json::Error| {
            let known = serde_json::from_slice::<serde_json::Value>(&text).ok();
            let pid = known.and_then(|known| known.get("pid")?.as_u64());
            let worker = pid.map_or_else(|| "its worker".into(), |pid| format!("its worker, process {pid},"));
            let path = path.display();
            VmError::Refused(format!(
                "the record of its last run is not understood, so {worker} may still be there: end it, then remove {path} ({error})"
            ))
        })
    }

    /// Removes what a worker that ended leaves, but its logs.
    pub fn clear(&self) {
        for path in [self.control(), self.channels(), self.console(), self.record()] {
            if let Err(error) = remove(&path) {
                tracing::warn!("{}: {error}", path.display());
            }
        }
    }

    /// Removes it with everything in it.
    pub fn delete(&self) -> io::Result<()> {
        match std::fs::remove_dir_all(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory() -> (tempfile::TempDir, Directory) {
        let root = tempfile::tempdir().unwrap();
        let directory = Directory::new(root.path(), "web");
        directory.make().unwrap();
        (root, directory)
    }

    #[test]
    fn directory_is_the_daemons_alone() {
        let (_root, directory) = directory();
        std::fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
        directory.make().unwrap();
        assert_eq!(std::fs::metadata(directory.path()).unwrap().permissions().mode() & 0o777, 0o700);
        directory.delete().unwrap();
        directory.delete().unwrap();
        assert!(!directory.path().exists());
    }

    #[test]
    fn listeners_replace_those_of_a_worker_that_died() {
        let (_root, directory) = directory();
        drop(directory.listen().unwrap());
        let _listeners = directory.listen().unwrap();
        std::os::unix::net::UnixStream::connect(directory.control()).unwrap();
        directory.clear();
        assert!(!directory.control().exists());
    }

    #[test]
    fn long_log_is_cut_and_its_end_is_kept() {
        let (_root, directory) = directory();
        let mut log = Directory::log(&directory.serial_log()).unwrap();
        log.write_all(&vec![b'a'; usize::try_from(MAX_LOG).unwrap()]).unwrap();
        directory.cut_logs().unwrap();
        assert_eq!(log.metadata().unwrap().len(), MAX_LOG);
        log.write_all(b"end").unwrap();
        directory.cut_logs().unwrap();
        assert_eq!(log.metadata().unwrap().len(), 0);
        log.write_all(b"more").unwrap();
        assert_eq!(std::fs::read(directory.serial_log()).unwrap(), b"more");
        let kept = std::fs::read(directory.path().join("serial.log.1")).unwrap();
        assert!(kept.ends_with(b"aend") && kept.len() == 1 << 20);
    }

    #[test]
    fn last_word_is_the_last_line_that_is_not_blank() {
        let (_root, directory) = directory();
        assert_eq!(directory.last_word(), None);
        std::fs::write(directory.worker_log(), "one\ntwo  \n\n").unwrap();
        assert_eq!(directory.last_word().as_deref(), Some("two"));
        std::fs::write(directory.worker_log(), format!("{}\nlast", "x".repeat(10_000))).unwrap();
        assert_eq!(directory.last_word().as_deref(), Some("last"));
    }

    #[test]
    fn torn_record_is_refused() {
        let (_root, directory) = directory();
        assert_eq!(directory.read().unwrap(), None);
        for (text, worker) in [("{\"pid\": 1", "so its worker may"), ("{\"pid\": 12}", "process 12, may")] {
            std::fs::write(directory.record(), text).unwrap();
            let refused = directory.read().unwrap_err().to_string();
            assert!(refused.contains("setup.json") && refused.contains(worker), "{refused}");
        }
    }
}
