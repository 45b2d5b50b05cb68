//! Root file systems packed as initramfs: busybox, programs of this host with their shared libraries, kernel modules.

use std::collections::BTreeMap;
use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::BufWriter;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};

use crate::cpio::Archive;
use crate::kernel::Kernel;
use crate::process::words;

const INIT: &str = include_str!("../guest/init");
const MODULES: &[&str] = &["virtio_pci", "virtio_net"];
/// First found on the host's path goes in; busybox has the rest, `sha256sum` and `nc` among it.
const PROGRAMS: &[&str] = &["dash", "iperf3", "ethtool", "ip", "ping", "tcpdump"];
const PATH: &[&str] = &["/usr/bin", "/usr/sbin", "/bin", "/sbin"];
/// Another program may be about to boot a cached image that is younger than this.
const CACHED_AT_LEAST: Duration = Duration::from_secs(600);

/// Packs the guests' root file system into `file`: the virtio drivers, network programs, and `guest/init`.
pub fn pack(kernel: &Kernel, file: &Path) -> Result<()> {
    let mut image = Image::new(INIT)?;
    image.programs(PROGRAMS)?;
    image.modules(kernel, MODULES)?;
    image.write(file)
}

#[derive(Debug, Hash)]
enum Content {
    Directory,
    Bytes(Vec<u8>),
    /// A file of this host, and what changes if its content does: length, and time of change.
    Copy(PathBuf, [i64; 3]),
}

/// What a root file system shall hold. Nothing is read before it is written.
#[derive(Debug, Hash)]
pub struct Image {
    entries: BTreeMap<String, Content>,
}

impl Image {
    /// Nothing, for what Linux is to unpack over another.
    pub fn empty() -> Self {
        Self { entries: BTreeMap::new() }
    }

    /// The usual folders, busybox, and `init` as the first process.
    pub fn new(init: &str) -> Result<Self> {
        let mut image = Self::empty();
        for directory in ["bin", "sbin", "dev", "proc", "sys", "run", "tmp", "etc", "mod", "root"] {
            image.directory(directory);
        }
        image.text("init", init);
        image.copy(Path::new("/bin/busybox"), "bin/busybox")?;
        Ok(image)
    }

    /// Adds programs that are on this host's path, and the shared libraries they need, at the places where they are here.
    pub fn programs(&mut self, programs: &[&str]) -> Result<()> {
        programs.iter().try_for_each(|program| self.program(&find(program)?))
    }

    /// Adds a program where it is on this host, with its shared libraries.
    pub fn program(&mut self, path: &Path) -> Result<()> {
        self.copy_in_place(path)?;
        self.libraries(path)
    }

    /// Adds the shared libraries of a program.
    pub fn libraries(&mut self, program: &Path) -> Result<()> {
        let ldd = words(&format!("ldd {}", program.display())).unwrap_or_default();
        libraries(&ldd).into_iter().try_for_each(|library| self.copy_in_place(Path::new(library)))
    }

    /// Adds modules and what they depend on; `/mod/order` names them in the order to load them.
    pub fn modules(&mut self, kernel: &Kernel, modules: &[&str]) -> Result<()> {
        let mut order = String::new();
        for module in kernel.modules(modules)? {
            let name = module.file_name().and_then(|name| name.to_str()).context("unexpected module name")?;
            self.copy(&module, &format!("mod/{name}"))?;
            order.push_str(&format!("{name}\n"));
        }
        self.text("mod/order", &order);
        Ok(())
    }

    /// Adds modules and what they depend on to `folder`, numbered in the order to load them.
    pub fn numbered_modules(&mut self, kernel: &Kernel, modules: &[&str], folder: &str) -> Result<()> {
        for (number, module) in kernel.modules(modules)?.iter().enumerate() {
            let name = module.file_name().and_then(|name| name.to_str()).context("unexpected module name")?;
            self.copy(module, &format!("{folder}/{number:02}-{name}"))?;
        }
        Ok(())
    }

    /// Adds a file where it is on this host.
    pub fn copy_in_place(&mut self, path: &Path) -> Result<()> {
        let inside = path.strip_prefix("/")?.to_str().context("path is not UTF-8")?.to_owned();
        self.copy(path, &inside)
    }

    /// Adds a file of this host under another name, relative as in "usr/bin/ip".
    pub fn copy(&mut self, from: &Path, to: &str) -> Result<()> {
        let about = std::fs::metadata(from).with_context(|| format!("cannot read {}", from.display()))?;
        let stamp = [about.size().cast_signed(), about.mtime(), about.mtime_nsec()];
        self.entry(to, Content::Copy(from.to_owned(), stamp));
        Ok(())
    }

    /// Adds a file with this content.
    pub fn text(&mut self, to: &str, content: &str) {
        self.entry(to, Content::Bytes(content.as_bytes().to_vec()));
    }

    /// Adds an empty directory.
    pub fn directory(&mut self, path: &str) {
        self.entry(path, Content::Directory);
    }

    /// Parents sort before what they hold.
    fn entry(&mut self, path: &str, content: Content) {
        let parents = path.match_indices('/').filter_map(|(end, _)| path.get(..end));
        for parent in parents {
            self.entries.entry(parent.to_owned()).or_insert(Content::Directory);
        }
        self.entries.entry(path.to_owned()).or_insert(content);
    }

    /// Packs everything into `file`. It is not compressed: QEMU hands it over in one piece, and unpacking would cost
    /// the software CPU a second.
    pub fn write(&self, file: &Path) -> Result<()> {
        let mut archive = Archive::new(BufWriter::with_capacity(1 << 20, File::create(file)?));
        for (path, content) in &self.entries {
            match content {
                Content::Directory => archive.directory(path)?,
                Content::Bytes(bytes) => archive.file(path, bytes)?,
                Content::Copy(from, _) => {
                    let bytes =
                        std::fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
                    archive.file(path, &bytes)?;
                }
            }
        }
        archive.finish().map(drop).with_context(|| format!("cannot write {}", file.display()))
    }

    /// The packed image in `folder`, written only if nothing that goes in has changed since the last time.
    pub fn cached(&self, folder: &Path, name: &str) -> Result<PathBuf> {
        std::fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        let file = folder.join(format!("{name}-{:016x}.cpio", hasher.finish()));
        // One makes it, others wait.
        let lock = File::create(folder.join("lock"))?;
        lock.lock()?;
        if !file.exists() {
            forget_old(folder, name)?;
            let part = tempfile::NamedTempFile::new_in(folder)?;
            self.write(part.path())?;
            part.persist(&file)?;
        }
        Ok(file)
    }
}

/// Removes images that nobody is about to use.
fn forget_old(folder: &Path, name: &str) -> Result<()> {
    let prefix = format!("{name}-");
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let ours = entry.file_name().to_str().is_some_and(|file| file.starts_with(&prefix));
        let age = SystemTime::now().duration_since(entry.metadata()?.modified()?).unwrap_or_default();
        if ours && age > CACHED_AT_LEAST {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Where a program is on this host.
pub fn find(program: &str) -> Result<PathBuf> {
    let candidates = PATH.iter().map(|directory| Path::new(directory).join(program));
    candidates.into_iter().find(|path| path.exists()).with_context(|| format!("{program} is not installed"))
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

    #[test]
    fn parents_come_before_what_they_hold() {
        let mut image = Image { entries: BTreeMap::new() };
        image.text("a/b/c", "x");
        image.text("a-b", "y");
        let names: Vec<_> = image.entries.keys().map(String::as_str).collect();
        assert_eq!(names, ["a", "a-b", "a/b", "a/b/c"]);
    }

    #[test]
    fn cached_image_is_written_again_only_if_something_changed() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source");
        std::fs::write(&source, "1").unwrap();
        let cached = || {
            let mut image = Image { entries: BTreeMap::new() };
            image.copy(&source, "copy").unwrap();
            image.cached(&dir.path().join("cache"), "image").unwrap()
        };
        let first = cached();
        std::fs::write(&first, "seen").unwrap();
        assert_eq!(cached(), first);
        assert_eq!(std::fs::read(&first).unwrap(), b"seen");
        std::fs::write(&source, "22").unwrap();
        let second = cached();
        assert_ne!(second, first);
        assert!(std::fs::read(second).unwrap().starts_with(b"070701"));
    }
}
