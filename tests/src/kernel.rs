//! Debian's cloud kernel for guests, downloaded once into `~/.cache/switchyard`.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::process::{output, words};
use crate::setup;

/// Pulls in the current kernel for clouds: small, and with virtio.
const META_PACKAGE: &str = "linux-image-cloud-amd64";

/// An unpacked kernel package.
#[derive(Debug, Clone)]
pub struct Kernel {
    tree: PathBuf,
    release: String,
}

impl Kernel {
    /// The cached kernel, or a fresh download.
    pub fn get() -> Result<Self> {
        let home = std::env::var_os("HOME").context("HOME is not set")?;
        let cache =
            std::env::var_os("XDG_CACHE_HOME").map_or_else(|| Path::new(&home).join(".cache"), PathBuf::from);
        let cache = cache.join("switchyard");
        std::fs::create_dir_all(&cache).with_context(|| format!("cannot create {}", cache.display()))?;
        // One downloads, the others wait.
        let lock = std::fs::File::create(cache.join("lock"))?;
        lock.lock()?;
        match Self::cached(&cache)? {
            Some(kernel) => Ok(kernel),
            None => Self::download(&cache),
        }
    }

    /// The compressed kernel, for QEMU's `-kernel`.
    pub fn image(&self) -> PathBuf {
        self.tree.join(format!("boot/vmlinuz-{}", self.release))
    }

    /// The files of `modules` and of what they depend on, in the order to load them.
    pub fn modules(&self, modules: &[&str]) -> Result<Vec<PathBuf>> {
        let tree = self.tree.to_str().context("the cache's path is not UTF-8")?;
        let mut files = Vec::new();
        for module in modules {
            let shown = words(&format!("modprobe -d {tree} -S {} --show-depends {module}", self.release))?;
            for line in shown.lines() {
                let Some(path) = line.strip_prefix("insmod ") else { continue };
                let path = PathBuf::from(path.trim());
                if !files.contains(&path) {
                    files.push(path);
                }
            }
        }
        Ok(files)
    }

    fn cached(cache: &Path) -> Result<Option<Self>> {
        let mut trees = Vec::new();
        for entry in std::fs::read_dir(cache)? {
            let tree = entry?.path();
            let name = tree.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if let Some(release) = name.strip_prefix("linux-image-") {
                trees.push(Self { release: release.to_owned(), tree });
            }
        }
        trees.sort_by(|a, b| a.release.cmp(&b.release));
        Ok(trees.pop())
    }

    fn download(cache: &Path) -> Result<Self> {
        let package = package().or_else(|error| {
            if !setup::is_root() {
                return Err(error.context("no package lists; run: sudo apt-get update"));
            }
            words("apt-get -qq update")?;
            package()
        })?;
        let release = package.strip_prefix("linux-image-").context("unexpected package name")?.to_owned();
        eprintln!("downloading {package}");
        let work = tempfile::tempdir_in(cache)?;
        output(Command::new("apt-get").args(["-qq", "download", &package]).current_dir(&work))?;
        let archive = std::fs::read_dir(&work)?.next().context("apt-get downloaded nothing")??.path();
        let unpacked = work.path().join("tree");
        output(Command::new("dpkg").arg("-x").arg(&archive).arg(&unpacked))?;
        output(Command::new("depmod").arg("-b").arg(&unpacked).arg(&release))?;
        let tree = cache.join(&package);
        std::fs::rename(&unpacked, &tree)?;
        Ok(Self { tree, release })
    }
}

/// The package that the meta package stands for today.
fn package() -> Result<String> {
    let depends = words(&format!("apt-cache depends {META_PACKAGE}"))?;
    match depended_image(&depends) {
        Some(package) => Ok(package.to_owned()),
        None => bail!("apt knows no {META_PACKAGE}"),
    }
}

fn depended_image(depends: &str) -> Option<&str> {
    depends
        .lines()
        .find_map(|line| line.trim().strip_prefix("Depends: "))
        .filter(|name| name.starts_with("linux-image-"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meta_package_leads_to_the_image() {
        let depends = "linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-56-cloud-amd64\n";
        assert_eq!(depended_image(depends), Some("linux-image-6.1.0-56-cloud-amd64"));
        assert_eq!(depended_image("linux-image-cloud-amd64\n"), None);
    }
}
