//! The guests' root file system, packed as an initramfs: busybox, a few network programs with their shared
//! libraries, the virtio drivers, and `guest/init`.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::BufWriter;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::cpio::Archive;
use crate::kernel::Kernel;
use crate::process::words;

const INIT: &str = include_str!("../guest/init");
const MODULES: &[&str] = &["virtio_pci", "virtio_net"];
/// First found on the host's path goes in; busybox has the rest, `sha256sum` and `nc` among it.
const PROGRAMS: &[&str] = &["dash", "iperf3", "ethtool", "ip", "ping", "tcpdump"];
const PATH: &[&str] = &["/usr/bin", "/usr/sbin", "/bin", "/sbin"];

/// Packs the archive into `file`. It is not compressed: QEMU hands it over in one piece, and unpacking would
/// cost the software CPU a second.
pub fn pack(kernel: &Kernel, file: &Path) -> Result<()> {
    let mut tree = Tree {
        archive: Archive::new(BufWriter::new(File::create(file)?)),
        directories: BTreeSet::new(),
        files: BTreeSet::new(),
    };
    for directory in ["bin", "sbin", "dev", "proc", "sys", "run", "tmp", "etc", "mod", "root"] {
        tree.directory(directory)?;
    }
    tree.archive.file("init", INIT.as_bytes())?;
    tree.copy(Path::new("/bin/busybox"), "bin/busybox")?;
    for program in PROGRAMS {
        tree.program(&find(program)?)?;
    }
    let mut order = String::new();
    for module in kernel.modules(MODULES)? {
        let name = module.file_name().and_then(|name| name.to_str()).context("unexpected module name")?;
        tree.copy(&module, &format!("mod/{name}"))?;
        order.push_str(&format!("{name}\n"));
    }
    tree.archive.file("mod/order", order.as_bytes())?;
    tree.archive.finish()?;
    Ok(())
}

fn find(program: &str) -> Result<PathBuf> {
    let candidates = PATH.iter().map(|directory| Path::new(directory).join(program));
    candidates.into_iter().find(|path| path.exists()).with_context(|| format!("{program} is not installed"))
}

#[derive(Debug)]
struct Tree {
    archive: Archive<BufWriter<File>>,
    directories: BTreeSet<String>,
    files: BTreeSet<String>,
}

impl Tree {
    /// Adds a program where it is on the host, with its shared libraries.
    fn program(&mut self, path: &Path) -> Result<()> {
        self.copy_in_place(path)?;
        for library in libraries(&words(&format!("ldd {}", path.display())).unwrap_or_default()) {
            self.copy_in_place(Path::new(library))?;
        }
        Ok(())
    }

    fn copy_in_place(&mut self, path: &Path) -> Result<()> {
        let inside = path.strip_prefix("/")?.to_str().context("path is not UTF-8")?.to_owned();
        self.copy(path, &inside)
    }

    fn copy(&mut self, from: &Path, to: &str) -> Result<()> {
        if !self.files.insert(to.to_owned()) {
            return Ok(());
        }
        if let Some((parent, _)) = to.rsplit_once('/') {
            self.directory(parent)?;
        }
        let content = std::fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        Ok(self.archive.file(to, &content)?)
    }

    fn directory(&mut self, path: &str) -> Result<()> {
        if self.directories.contains(path) {
            return Ok(());
        }
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.directory(parent)?;
        }
        self.directories.insert(path.to_owned());
        Ok(self.archive.directory(path)?)
    }
}

/// The files in the output of `ldd`: "name => /path (address)" or "/path (address)".
fn libraries(ldd: &str) -> Vec<&str> {
    ldd.split_whitespace().filter(|word| word.starts_with('/')).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ldd_output_names_libraries_and_loader() {
        let ldd = "\tlinux-vdso.so.1 (0x00007fc52b229000)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x1)\n\
                   \t/lib64/ld-linux-x86-64.so.2 (0x2)\n";
        assert_eq!(libraries(ldd), ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"]);
        assert!(libraries("\tnot a dynamic executable\n").is_empty());
    }
}
