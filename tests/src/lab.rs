//! One run of the lab: its directory, and the lock that gives it the machine's processors to itself.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use crate::janitor;

static SERIAL: AtomicU32 = AtomicU32::new(0);

/// A directory for the sockets and logs of one run, removed with everything in it at the end.
///
/// `/tmp/yard-…` rather than `$TMPDIR`: a Unix socket's path may have 107 characters at most.
#[derive(Debug)]
pub struct Lab {
    dir: TempDir,
    _machine: Option<File>,
}

impl Lab {
    /// A lab beside others, for what needs little processor time.
    pub fn shared() -> Result<Self> {
        Self::create(None)
    }

    /// A lab that waits until no other exclusive one is left on this machine, in any process: two polling
    /// switches on two processors would only measure each other.
    pub fn exclusive() -> Result<Self> {
        let path = std::env::temp_dir().join("switchyard-lab.lock");
        let lock = File::create(&path).with_context(|| format!("cannot open {}", path.display()))?;
        lock.lock().with_context(|| format!("cannot lock {}", path.display()))?;
        Self::create(Some(lock))
    }

    fn create(machine: Option<File>) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("yard-").tempdir_in("/tmp")?;
        janitor::at_exit(&format!("rm -rf {}", dir.path().display()))?;
        Ok(Self { dir, _machine: machine })
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
