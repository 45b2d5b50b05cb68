//! Debian's kernels for guests, downloaded once into `~/.cache/switchyard`.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::package::{Cache, update};
use crate::process::{output, words};

/// Which of Debian's kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flavour {
    /// For clouds: small, boots fast, has virtio, KVM, TUN and bridges, but no emulated network card.
    Cloud,
    /// With every driver: e1000 and all of Hyper-V's.
    Full,
}

impl Flavour {
    /// Pulls in the current kernel.
    fn meta_package(self) -> &'static str {
        match self {
            Self::Cloud => "linux-image-cloud-amd64",
            Self::Full => "linux-image-amd64",
        }
    }

    fn is(self, release: &str) -> bool {
        let full = release.strip_suffix("-amd64").is_some_and(|version| !version.ends_with("-cloud"));
        match self {
            Self::Cloud => release.ends_with("-cloud-amd64"),
            Self::Full => full,
        }
    }
}

/// An unpacked kernel package.
#[derive(Debug, Clone)]
pub struct Kernel {
    tree: PathBuf,
    release: String,
}

impl Kernel {
    /// The cloud kernel: cached, or a fresh download.
    pub fn get() -> Result<Self> {
        Self::of(Flavour::Cloud)
    }

    /// The cached kernel of that flavour, or a fresh download.
    pub fn of(flavour: Flavour) -> Result<Self> {
        let cache = Cache::open()?;
        match Self::cached(cache.folder(), flavour)? {
            Some(kernel) => Ok(kernel),
            None => Self::download(&cache, flavour),
        }
    }

    /// The compressed kernel, for QEMU's `-kernel`.
    pub fn image(&self) -> PathBuf {
        self.tree.join(format!("boot/vmlinuz-{}", self.release))
    }

    /// Its version and flavour, as `uname -r` tells.
    pub fn release(&self) -> &str {
        &self.release
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

    fn cached(cache: &Path, flavour: Flavour) -> Result<Option<Self>> {
        let mut trees = Vec::new();
        for entry in std::fs::read_dir(cache)? {
            let tree = entry?.path();
            let name = tree.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if let Some(release) = name.strip_prefix("linux-image-").filter(|release| flavour.is(release)) {
                trees.push(Self { release: release.to_owned(), tree });
            }
        }
        trees.sort_by(|a, b| a.release.cmp(&b.release));
        Ok(trees.pop())
    }

    fn download(cache: &Cache, flavour: Flavour) -> Result<Self> {
        let package = package(flavour).or_else(|error| {
            update(error)?;
            package(flavour)
        })?;
        let release = package.strip_prefix("linux-image-").context("unexpected package name")?.to_owned();
        let depmod = |tree: &Path| output(Command::new("depmod").arg("-b").arg(tree).arg(&release)).map(drop);
        let tree = cache.unpacked(&package, depmod)?;
        Ok(Self { tree, release })
    }
}

/// The package that the meta package stands for today.
fn package(flavour: Flavour) -> Result<String> {
    let meta = flavour.meta_package();
    let depends = words(&format!("apt-cache depends {meta}"))?;
    depended_image(&depends).map(str::to_owned).with_context(|| format!("apt knows no {meta}"))
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

    #[test]
    fn flavours_are_told_apart_by_release() {
        assert!(Flavour::Cloud.is("6.1.0-56-cloud-amd64") && !Flavour::Full.is("6.1.0-56-cloud-amd64"));
        assert!(Flavour::Full.is("6.1.0-56-amd64") && !Flavour::Cloud.is("6.1.0-56-amd64"));
        assert!(!Flavour::Full.is("6.1.0-56-arm64"));
    }
}
