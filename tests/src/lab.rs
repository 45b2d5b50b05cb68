//! One run of the lab: its directory, and the locks that give it processors of the machine to itself.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::thread::{CpuSet, sched_getaffinity};
use tempfile::TempDir;

use crate::janitor;

static SERIAL: AtomicU32 = AtomicU32::new(0);
/// Between two looks for a free processor.
const PATIENCE: Duration = Duration::from_millis(200);

/// A directory for the sockets and logs of one run, removed with everything in it at the end.
///
/// `/tmp/yard-…` rather than `$TMPDIR`: a Unix socket's path may have 107 characters at most.
#[derive(Debug)]
pub struct Lab {
    dir: TempDir,
    processor: Option<usize>,
    _locks: Vec<File>,
}

impl Lab {
    /// A lab beside others, for what needs little processor time.
    pub fn shared() -> Result<Self> {
        Self::create(None, Vec::new())
    }

    /// A lab that waits until no other is left on this machine but shared ones, in any process: two polling
    /// switches on two processors would only measure each other.
    pub fn exclusive() -> Result<Self> {
        let machine = lock_file("")?;
        machine.lock().context("cannot wait for the machine")?;
        Self::create(None, vec![machine])
    }

    /// A lab that waits until a processor is left, and shares the machine with others of its kind.
    pub fn on_one_processor() -> Result<Self> {
        let machine = lock_file("")?;
        machine.lock_shared().context("cannot wait for the machine")?;
        let allowed = sched_getaffinity(None)?;
        loop {
            for cpu in (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)) {
                let processor = lock_file(&format!("-{cpu}"))?;
                match processor.try_lock() {
                    Ok(()) => return Self::create(Some(cpu), vec![machine, processor]),
                    Err(TryLockError::WouldBlock) => {}
                    Err(TryLockError::Error(error)) => return Err(error).context("cannot take a processor"),
                }
            }
            std::thread::sleep(PATIENCE);
        }
    }

    fn create(processor: Option<usize>, locks: Vec<File>) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("yard-").tempdir_in("/tmp")?;
        janitor::at_exit(&format!("rm -rf {}", dir.path().display()))?;
        Ok(Self { dir, processor, _locks: locks })
    }

    /// The processor that it has to itself, if it is on one.
    pub fn processor(&self) -> Option<usize> {
        self.processor
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// `name` in the directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir().join(name)
    }

    /// Ends the lab but leaves its logs behind, for a look at what went wrong; returns where they are.
    pub fn keep(self) -> Result<PathBuf> {
        let kept = PathBuf::from(format!("{}-kept", self.dir().display()));
        std::fs::rename(self.dir(), &kept)?;
        Ok(kept)
    }
}

fn lock_file(of: &str) -> Result<File> {
    let path = std::env::temp_dir().join(format!("switchyard-lab{of}.lock"));
    File::create(&path).with_context(|| format!("cannot open {}", path.display()))
}

/// A number that no other caller in this program gets, for names.
pub fn serial() -> u32 {
    SERIAL.fetch_add(1, Ordering::Relaxed)
}

/// Asks `ready` every 20 ms; an error that names `what` after `limit`.
pub fn wait_for(what: &str, limit: Duration, mut ready: impl FnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    while !ready()? {
        if start.elapsed() > limit {
            bail!("{what}: not after {:.1} s", limit.as_secs_f64());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
