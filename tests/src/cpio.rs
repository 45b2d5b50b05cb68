//! Writes cpio archives in the "newc" form, the one that Linux unpacks as an initramfs
//! (Linux, `Documentation/driver-api/early-userspace/buffer-format.rst`).

use std::io::{self, Write};

const DIRECTORY: u32 = 0o040_755;
const FILE: u32 = 0o100_755;
const SYMLINK: u32 = 0o120_777;
const TRAILER: &str = "TRAILER!!!";

/// An archive being written. Parents must be added before what they hold.
#[derive(Debug)]
pub struct Archive<W> {
    out: W,
    inode: u32,
}

impl<W: Write> Archive<W> {
    /// An empty archive.
    pub fn new(out: W) -> Self {
        Self { out, inode: 0 }
    }

    /// Adds a directory; paths are relative, as in "usr/bin".
    pub fn directory(&mut self, path: &str) -> io::Result<()> {
        self.entry(path, DIRECTORY, &[])
    }

    /// Adds an executable file.
    pub fn file(&mut self, path: &str, content: &[u8]) -> io::Result<()> {
        self.entry(path, FILE, content)
    }

    /// Adds a symbolic link to `target`.
    pub fn symlink(&mut self, path: &str, target: &str) -> io::Result<()> {
        self.entry(path, SYMLINK, target.as_bytes())
    }

    /// Writes the end mark; the writer comes back.
    pub fn finish(mut self) -> io::Result<W> {
        self.inode = 0;
        self.entry(TRAILER, 0, &[])?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        let too_long = |_| io::Error::new(io::ErrorKind::InvalidInput, "too long for a cpio archive");
        let size = u32::try_from(content.len()).map_err(too_long)?;
        let name_size = u32::try_from(path.len() + 1).map_err(too_long)?;
        self.inode += 1;
        // Inode, mode, uid, gid, links, mtime, size, device (major, minor), rdev (major, minor), name size, sum.
        let fields = [self.inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        write!(self.out, "070701")?;
        for field in fields {
            write!(self.out, "{field:08x}")?;
        }
        self.out.write_all(path.as_bytes())?;
        self.out.write_all(&[0])?;
        self.pad(110 + path.len() + 1)?;
        self.out.write_all(content)?;
        self.pad(content.len())
    }

    /// Header with name, and content, each end on a multiple of four bytes.
    fn pad(&mut self, written: usize) -> io::Result<()> {
        self.out.write_all(&[0; 3][..written.next_multiple_of(4) - written])
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    fn sample() -> Vec<u8> {
        let mut archive = Archive::new(Vec::new());
        archive.directory("bin").unwrap();
        archive.file("bin/a", b"12345").unwrap();
        archive.symlink("bin/b", "a").unwrap();
        archive.finish().unwrap()
    }

    #[test]
    fn every_part_is_aligned_to_four_bytes() {
        let bytes = sample();
        assert_eq!(bytes.len() % 4, 0);
        let starts: Vec<_> =
            bytes.windows(6).enumerate().filter(|(_, w)| w == b"070701").map(|(i, _)| i).collect();
        assert_eq!(starts.len(), 4);
        assert!(starts.iter().all(|start| start % 4 == 0), "{starts:?}");
    }

    #[test]
    fn cpio_program_reads_what_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let cpio =
            Command::new("cpio").args(["-i", "--quiet"]).current_dir(&dir).stdin(Stdio::piped()).spawn();
        let Ok(mut cpio) = cpio else {
            eprintln!("skipped: no cpio program");
            return;
        };
        cpio.stdin.take().unwrap().write_all(&sample()).unwrap();
        assert!(cpio.wait().unwrap().success());
        assert_eq!(std::fs::read(dir.path().join("bin/b")).unwrap(), b"12345");
        assert_eq!(std::fs::read_link(dir.path().join("bin/b")).unwrap().to_str(), Some("a"));
    }
}
