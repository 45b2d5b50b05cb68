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
        let machine = lock_file(&std::env::temp_dir(), "")?;
        machine.lock().context("cannot wait for the machine")?;
        Self::create(None, vec![machine])
    }

    /// A lab that waits until a processor is left, and shares the machine with others of its kind. They come before
    /// exclusive ones, which wait for the last of them.
    pub fn on_one_processor() -> Result<Self> {
        let folder = std::env::temp_dir();
        let machine = lock_file(&folder, "")?;
        machine.lock_shared().context("cannot wait for the machine")?;
        loop {
            if let Some((cpu, processor)) = free_processor(&folder)? {
                return Self::create(Some(cpu), vec![machine, processor]);
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

/// A processor that this program may use and nobody has, and the lock by which it is ours.
fn free_processor(folder: &Path) -> Result<Option<(usize, File)>> {
    let allowed = sched_getaffinity(None)?;
    for cpu in (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)) {
        let processor = lock_file(folder, &format!("-{cpu}"))?;
        match processor.try_lock() {
            Ok(()) => return Ok(Some((cpu, processor))),
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(error)) => return Err(error).context("cannot take a processor"),
        }
    }
    Ok(None)
}

/// The file that is locked for the machine, or for a processor of it. Another user may have made it.
fn lock_file(folder: &Path, of: &str) -> Result<File> {
    let path = folder.join(format!("switchyard-lab{of}.lock"));
    File::open(&path)
        .or_else(|_| File::create(&path))
        .with_context(|| format!("cannot open {}", path.display()))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_shares_a_processor_and_one_given_back_is_taken_again() {
        let folder = tempfile::tempdir().unwrap();
        let mut taken = Vec::new();
        while let Some((cpu, lock)) = free_processor(folder.path()).unwrap() {
            assert!(taken.iter().all(|(other, _)| *other != cpu), "processor {cpu} twice");
            taken.push((cpu, lock));
        }
        assert_eq!(taken.len(), usize::try_from(sched_getaffinity(None).unwrap().count()).unwrap());
        let (cpu, lock) = taken.remove(0);
        drop(lock);
        // A program that another test starts may have the lock until it runs.
        let back = || Ok(free_processor(folder.path())?.is_some_and(|(free, _)| free == cpu));
        wait_for("the processor", Duration::from_secs(10), back).unwrap();
    }

    #[test]
    fn machine_is_nobodys_alone_while_a_processor_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        let [shared, other, exclusive] = [(); 3].map(|()| lock_file(folder.path(), "").unwrap());
        shared.lock_shared().unwrap();
        assert!(other.try_lock_shared().is_ok());
        drop(other);
        assert!(matches!(exclusive.try_lock(), Err(TryLockError::WouldBlock)));
        drop(shared);
        wait_for("the machine", Duration::from_secs(10), || Ok(exclusive.try_lock().is_ok())).unwrap();
    }
}
