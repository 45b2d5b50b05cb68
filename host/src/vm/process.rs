//! A worker's process, our child or one that an earlier daemon started: watched through a pidfd, which never means
//! another process.

use std::fs::{File, OpenOptions};
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use command_fds::{CommandFdExt, FdMapping};
use hypervisor::control::{Handle, SETUP_FD, Setup};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::directory::{Directory, Listeners};
use super::error::VmError;
use super::spec::VmSpec;

/// Name of the worker's program.
const PROGRAM: &str = "yard-worker";

/// A worker.
#[derive(Debug)]
pub struct Process {
    pidfd: OwnedFd,
    pid: u32,
    born: u64,
    /// None if an earlier daemon started it: then nobody tells us how it ended.
    child: Option<Child>,
}

/// How to start workers.
#[derive(Debug, Clone)]
pub struct Launcher {
    /// The worker's program.
    pub program: PathBuf,
    /// `/dev/kvm`.
    pub kvm: PathBuf,
}

impl Launcher {
    /// The worker that lies beside this program, or the first in `PATH`.
    pub fn installed() -> Self {
        let beside = std::env::current_exe().ok().and_then(|own| Some(own.parent()?.join(PROGRAM)));
        let path = std::env::var_os("PATH").unwrap_or_default();
        let found = beside.into_iter().chain(std::env::split_paths(&path).map(|dir| dir.join(PROGRAM)));
        let program = found.into_iter().find(|path| path.is_file()).unwrap_or_else(|| PROGRAM.into());
        Self { program, kvm: "/dev/kvm".into() }
    }

    /// Starts a worker for `spec` in `directory` and hands it all that it will ever have. `ready` puts the process where
    /// it belongs and on record before it is told anything: one that is never told ends by itself.
    pub fn launch<T>(
        &self,
        spec: &VmSpec,
        user: Option<u32>,
        directory: &Directory,
        ready: impl FnOnce(&Process) -> Result<T, VmError>,
    ) -> Result<(Process, T), VmError> {
        directory.make()?;
        let listeners = directory.listen()?;
        let (setup, fds) = self.setup(spec, user, directory, listeners)?;
        let log = Directory::log(&directory.worker_log())?;
        let (ours, theirs) = UnixStream::pair().map_err(|error| VmError::io("a socket pair", error))?;
        let mut process = self.spawn(log, theirs.into())?;
        let handed = ready(&process).and_then(|made| {
            let sent = send_setup(&ours, &setup, &fds);
            sent.map(|()| made).map_err(|error| VmError::io("handing the worker its setup", error))
        });
        match handed {
            Ok(made) => Ok((process, made)),
            Err(error) => {
                process.kill();
                process.epitaph();
                Err(error)
            }
        }
    }

    fn setup(
        &self,
        spec: &VmSpec,
        user: Option<u32>,
        directory: &Directory,
        listeners: Listeners,
    ) -> Result<(Setup, Vec<OwnedFd>), VmError> {
        let read = |path: &Path| File::open(path).map(OwnedFd::from).map_err(VmError::file(path));
        let kvm = OpenOptions::new().read(true).write(true).open(&self.kvm);
        let mut handed = vec![
            (Handle::Kvm, kvm.map_err(VmError::file(&self.kvm))?.into()),
            (Handle::Kernel, read(&spec.kernel)?),
        ];
        if let Some(initrd) = &spec.initrd {
            handed.push((Handle::Initrd, read(initrd)?));
        }
        handed.extend([
            (Handle::SerialLog, Directory::log(&directory.serial_log())?.into()),
            (Handle::Control, listeners.control),
            (Handle::Channels, listeners.channels),
            (Handle::Console, listeners.console),
        ]);
        let (handles, fds) = handed.into_iter().unzip();
        let setup = Setup {
            name: spec.name.clone(),
            user,
            memory: spec.memory,
            vcpus: spec.vcpus,
            pin: spec.cpu.pin.clone(),
            baseline: spec.cpu.baseline,
            cmdline: spec.cmdline.clone(),
            nics: spec.nics.iter().map(|nic| nic.device(&spec.name)).collect(),
            services: spec.services,
            handles,
        };
        Ok((setup, fds))
    }

    /// The process is in a group of its own, so that a signal to the daemon's terminal or group does not reach it.
    fn spawn(&self, log: File, setup: OwnedFd) -> Result<Process, VmError> {
        let starting = || format!("starting {}", self.program.display());
        let mut command = Command::new(&self.program);
        command.current_dir("/").process_group(0).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        command
            .fd_mappings(vec![FdMapping { parent_fd: setup, child_fd: SETUP_FD }])
            .map_err(|error| VmError::io(starting(), std::io::Error::other(error)))?;
        let mut child = command.spawn().map_err(|error| VmError::io(starting(), error))?;
        let pid = child.id();
        match Process::open(pid) {
            Ok((pidfd, born)) => Ok(Process { pidfd, pid, born, child: Some(child) }),
            Err(error) => {
                let _ = child.kill().and_then(|()| child.wait());
                Err(VmError::io(format!("watching process {pid}"), error))
            }
        }
    }
}

/// One line of JSON; the descriptors travel with its first byte.
fn send_setup(socket: &UnixStream, setup: &Setup, fds: &[OwnedFd]) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(setup)?;
    line.push(b'\n');
    send_line(socket, &line, &fds.iter().map(AsFd::as_fd).collect::<Vec<_>>())
}

/// Sends `line` with descriptors beside it; waits while the socket is full.
pub fn send_line(socket: &UnixStream, line: &[u8], fds: &[BorrowedFd<'_>]) -> std::io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
    let mut beside = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !beside.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(std::io::Error::other("more than 16 descriptors at once"));
    }
    let mut rest = line;
    while !rest.is_empty() {
        match sendmsg(socket, &[IoSlice::new(rest)], &mut beside, SendFlags::NOSIGNAL) {
            Ok(sent) => {
                rest = rest.get(sent..).unwrap_or_default();
                beside.clear();
            }
            Err(rustix::io::Errno::AGAIN) => wait_writable(socket)?,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// A worker that does not read for so long is not well.
fn wait_writable(socket: &UnixStream) -> std::io::Result<()> {
    let patience = rustix::event::Timespec { tv_sec: 2, tv_nsec: 0 };
    match poll(&mut [PollFd::new(socket, PollFlags::OUT)], Some(&patience)) {
        Ok(0) => Err(std::io::Error::from(std::io::ErrorKind::TimedOut)),
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

impl Process {
    /// The process `pid` that an earlier daemon started, if it is still that of which `born` was recorded.
    pub fn adopt(pid: u32, born: u64) -> Option<Self> {
        let (pidfd, now) = Self::open(pid).ok()?;
        let process = Self { pidfd, pid, born, child: None };
        (now == born && !process.ended()).then_some(process)
    }

    fn open(pid: u32) -> std::io::Result<(OwnedFd, u64)> {
        let number = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let number = number.ok_or_else(|| std::io::Error::from(std::io::ErrorKind::NotFound))?;
        let pidfd = pidfd_open(number, PidfdFlags::empty())?;
        Ok((pidfd, born(pid)?))
    }

    pub fn pid(&self) -> u32 {
        self.pid
    }

    pub fn born(&self) -> u64 {
        self.born
    }

    /// Ends it at once.
    pub fn kill(&self) {
        // Already gone is as good.
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }

    /// Whether it has ended.
    pub fn ended(&self) -> bool {
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        matches!(poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], Some(&now)), Ok(1..))
    }

    /// How it ended, in words; to be called when it has.
    pub fn epitaph(&mut self) -> Ending {
        match self.child.as_mut().map(Child::wait) {
            Some(Ok(status)) if status.success() => Ending::Orderly,
            Some(Ok(status)) => Ending::Died(describe(status)),
            Some(Err(error)) => Ending::Died(format!("cannot be asked how it ended: {error}")),
            None => Ending::Unknown,
        }
    }
}

impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

/// How a worker ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// With exit status 0.
    Orderly,
    /// By a signal, or with another status.
    Died(String),
    /// It was an earlier daemon's child: the kernel tells us only that it ended.
    Unknown,
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with exit status {code}"),
        (None, Some(signal)) => {
            let core = if status.core_dumped() { " (core dumped)" } else { "" };
            format!("was ended by {}{core}", signal_name(signal))
        }
        (None, None) => format!("ended: {status}"),
    }
}

fn signal_name(number: i32) -> String {
    const NAMES: &[(Signal, &str)] = &[
        (Signal::KILL, "SIGKILL"),
        (Signal::SEGV, "SIGSEGV"),
        (Signal::BUS, "SIGBUS"),
        (Signal::ABORT, "SIGABRT"),
        (Signal::SYS, "SIGSYS, a system call that it may not make"),
        (Signal::TERM, "SIGTERM"),
        (Signal::INT, "SIGINT"),
        (Signal::ILL, "SIGILL"),
        (Signal::FPE, "SIGFPE"),
        (Signal::XCPU, "SIGXCPU"),
    ];
    let known = NAMES.iter().find(|(signal, _)| signal.as_raw() == number);
    known.map_or_else(|| format!("signal {number}"), |(_, name)| (*name).to_owned())
}

/// Field 22 of `/proc/PID/stat` (proc_pid_stat(5)): when the process started, in clock ticks after the host.
fn born(pid: u32) -> std::io::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field is the program's name in brackets, which may hold anything.
    let after = stat.rsplit_once(')').map_or("", |(_, after)| after);
    let started = after.split_whitespace().nth(19).and_then(|field| field.parse().ok());
    started.ok_or_else(|| std::io::Error::other("/proc has no start time"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn process_is_adopted_only_if_it_is_the_one_that_was_recorded() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let born = born(child.id()).unwrap();
        assert!(Process::adopt(child.id(), born + 1).is_none());
        let mut process = Process::adopt(child.id(), born).unwrap();
        process.kill();
        child.wait().unwrap();
        assert!(process.ended());
        assert_eq!(process.epitaph(), Ending::Unknown);
        assert!(Process::adopt(child.id(), born).is_none());
    }

    #[test]
    fn worker_is_told_nothing_before_it_is_on_record() {
        let root = tempfile::tempdir().unwrap();
        let program = root.path().join("worker");
        std::fs::write(&program, "#!/bin/sh\nread -r setup <&3 && echo told >&2\n").unwrap();
        std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
        let launcher = Launcher { program, kvm: "/dev/null".into() };
        let directory = Directory::new(root.path(), "web");
        let launch = |ready: &dyn Fn(&Process) -> Result<u32, VmError>| {
            launcher.launch(&super::super::tests::spec("web"), None, &directory, ready)
        };
        let pid = std::cell::Cell::new(0);
        let failed = launch(&|process| {
            pid.set(process.pid());
            let while_looked_at = rustix::event::Timespec { tv_sec: 0, tv_nsec: 300_000_000 };
            let ended = poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&while_looked_at));
            assert_eq!(ended, Ok(0), "it waits to be told");
            Err(VmError::Refused("no record".into()))
        });
        assert_eq!(failed.unwrap_err().to_string(), "no record");
        assert!(Process::open(pid.get()).is_err(), "it has ended, and was waited for");
        assert_eq!(directory.last_word(), None);
        let (mut process, made) = launch(&|process| Ok(process.pid())).unwrap();
        assert_eq!((process.pid(), process.epitaph()), (made, Ending::Orderly));
        assert_eq!(directory.last_word().as_deref(), Some("told"));
    }

    #[test]
    fn endings_are_told_in_words() {
        let end = |script: &str| describe(Command::new("sh").args(["-c", script]).status().unwrap());
        assert_eq!(end("exit 3"), "ended with exit status 3");
        assert_eq!(end("kill -9 $$"), "was ended by SIGKILL");
        assert_eq!(end("kill -USR1 $$"), "was ended by signal 10");
    }
}
