//! A terminal in the place of a disk: it takes what is written, and hangs while its output is stopped.

use std::fs::{File, read_dir, read_link};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::Child;

use rustix::fs::{Mode, OFlags, fcntl_getfl, fcntl_setfl};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Action, OptionalActions, tcflow, tcgetattr, tcsetattr};

/// A new terminal: its screen, the line that programs have, and the line's path.
pub fn open() -> (File, OwnedFd, PathBuf) {
    let screen = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
    grantpt(&screen).unwrap();
    unlockpt(&screen).unwrap();
    let name = ptsname(&screen, Vec::new()).unwrap();
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let line = rustix::fs::open(&name, flags, Mode::empty()).unwrap();
    (screen.into(), line, name.into_string().unwrap().into())
}

pub struct Terminal {
    screen: File,
    line: OwnedFd,
    pub path: PathBuf,
    shown: Vec<u8>,
}

impl Terminal {
    pub fn new() -> Self {
        let (screen, line, path) = open();
        let mut modes = tcgetattr(&line).unwrap();
        modes.make_raw();
        tcsetattr(&line, OptionalActions::Now, &modes).unwrap();
        rustix::io::ioctl_fionbio(&screen, true).unwrap();
        Self { screen, line, path, shown: Vec::new() }
    }

    /// From now on it takes nothing, and keeps `process` waiting, which has opened it and would rather not wait. False if
    /// that cannot be had from the process.
    pub fn stop(&self, process: &Child) -> bool {
        let files = read_dir(format!("/proc/{}/fd", process.id())).unwrap().flatten();
        let ours = |file: &std::fs::DirEntry| read_link(file.path()).is_ok_and(|path| path == self.path);
        let number = files.filter(ours).find_map(|file| file.file_name().to_str()?.parse().ok());
        let process = pidfd_open(Pid::from_child(process), PidfdFlags::empty());
        let Ok(file) = process.and_then(|process| {
            pidfd_getfd(process, number.expect("it has not opened the terminal"), PidfdGetfdFlags::empty())
        }) else {
            return false;
        };
        fcntl_setfl(&file, fcntl_getfl(&file).unwrap() - OFlags::NONBLOCK).unwrap();
        tcflow(&self.line, Action::OOff).unwrap();
        true
    }

    pub fn go_on(&self) {
        tcflow(&self.line, Action::OOn).unwrap();
    }

    /// Everything that it was given so far.
    pub fn shown(&mut self) -> &[u8] {
        // Ends when there is nothing more for now.
        let _ = self.screen.read_to_end(&mut self.shown);
        &self.shown
    }
}
