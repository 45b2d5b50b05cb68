//! Debian packages whose files are wanted, not their installation: downloaded and unpacked once into
//! `~/.cache/switchyard`, without rights.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::process::{output, words};
use crate::setup;

/// The folder of unpacked packages, one folder a package, held while one is looked for or downloaded: one program
/// downloads, the others wait.
#[derive(Debug)]
pub struct Cache {
    folder: PathBuf,
    _lock: File,
}

impl Cache {
    /// Waits for its turn.
    pub fn open() -> Result<Self> {
        let home = std::env::var_os("HOME").context("HOME is not set")?;
        let caches =
            std::env::var_os("XDG_CACHE_HOME").map_or_else(|| Path::new(&home).join(".cache"), PathBuf::from);
        let folder = caches.join("switchyard");
        std::fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        let lock = File::create(folder.join("lock"))?;
        lock.lock()?;
        Ok(Self { folder, _lock: lock })
    }

    /// Where the packages are.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The tree of `package`, fresh or from earlier; `finish` is called on a fresh one.
    pub fn unpacked(&self, package: &str, finish: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        let tree = self.folder.join(package);
        if tree.exists() {
            return Ok(tree);
        }
        eprintln!("downloading {package}");
        let work = tempfile::tempdir_in(&self.folder)?;
        let download =
            || output(Command::new("apt-get").args(["-qq", "download", package]).current_dir(&work));
        download().or_else(|error| {
            update(error)?;
            download()
        })?;
        let archive = std::fs::read_dir(&work)?.next().context("apt-get downloaded nothing")??.path();
        let unpacked = work.path().join("tree");
        output(Command::new("dpkg").arg("-x").arg(&archive).arg(&unpacked))?;
        finish(&unpacked)?;
        std::fs::rename(&unpacked, &tree)?;
        Ok(tree)
    }
}

/// Fetches the lists of packages as root; as another user, `error` with the line to run.
pub fn update(error: anyhow::Error) -> Result<()> {
    if !setup::is_root() {
        return Err(error.context("no package lists, or old ones; run: sudo apt-get update"));
    }
    words("apt-get -qq update").map(drop)
}
