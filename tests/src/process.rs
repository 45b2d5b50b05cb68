//! Child processes that end with their guard, and with this program if it dies first.
//!
//! `setpriv --pdeathsig KILL` (util-linux) asks the kernel to kill the child when the *thread* that started
//! it ends, so one thread that lives as long as the program starts them all.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::lab::wait_for;

/// A command that dies with this program.
pub fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}

/// The same, kept on the given processors from its first instruction.
pub fn command_on(cpus: &[usize], program: impl AsRef<OsStr>) -> Command {
    let list: Vec<_> = cpus.iter().map(usize::to_string).collect();
    let mut command = command("taskset");
    command.args(["-c", &list.join(",")]).arg(program);
    command
}

/// Has all commands that are run from now on inherit `fd`, under the number that is returned.
pub fn inheritable(fd: &OwnedFd) -> Result<RawFd> {
    rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?;
    Ok(fd.as_raw_fd())
}

/// Runs a short command to its end; its standard output, or an error with what it wrote to standard error.
pub fn output(command: &mut Command) -> Result<String> {
    let shown = show(command);
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot run {shown}"))?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("{shown}: {}: {}{}", output.status, stderr.trim(), stdout.trim());
    }
    Ok(stdout)
}

/// Runs a program given as words separated by blanks, as in `sh("ip link show")`, without a shell.
pub fn words(line: &str) -> Result<String> {
    let mut words = line.split_whitespace();
    let program = words.next().context("empty command")?;
    output(Command::new(program).args(words))
}

fn show(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// A running child: killed and waited for when dropped. Standard output and standard error go to its log.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command` (made by [`command`] or [`command_on`]); its standard input is a pipe.
    pub fn spawn(name: &str, mut command: Command, log: impl AsRef<Path>) -> Result<Self> {
        let log = log.as_ref().to_path_buf();
        let file = File::create(&log).with_context(|| format!("cannot create {}", log.display()))?;
        let shown = show(&command);
        command.stdin(Stdio::piped()).stdout(file.try_clone()?).stderr(file);
        let child = spawn_from_long_lived_thread(command).with_context(|| format!("cannot start {shown}"))?;
        Ok(Self { name: name.to_owned(), child, log })
    }

    /// The name it was given.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Where it logs.
    pub fn log_path(&self) -> &Path {
        &self.log
    }

    /// All it has written so far.
    pub fn log(&self) -> String {
        std::fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// Its last `lines` lines, for error messages.
    pub fn log_tail(&self, lines: usize) -> String {
        let log = self.log();
        let all: Vec<_> = log.lines().collect();
        all.get(all.len().saturating_sub(lines)..).unwrap_or_default().join("\n")
    }

    /// Writes to its standard input.
    pub fn write(&mut self, text: &str) -> Result<()> {
        let name = self.name.clone();
        let stdin = self.child.stdin.as_mut().context("standard input is closed")?;
        stdin.write_all(text.as_bytes()).with_context(|| format!("cannot write to {name}"))?;
        stdin.flush().with_context(|| format!("cannot write to {name}"))
    }

    /// Closes its standard input.
    pub fn close_stdin(&mut self) {
        self.child.stdin.take();
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// An error with the end of its log if it has ended.
    pub fn expect_running(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("{} ended early, {status}:\n{}", self.name, self.log_tail(20)),
        }
    }

    /// Waits for its end.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if start.elapsed() > limit {
                bail!("{} still runs after {:.0} s:\n{}", self.name, limit.as_secs_f64(), self.log_tail(20));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until its log contains `text`; an error if it ends before.
    pub fn wait_for_log(&mut self, text: &str, limit: Duration) -> Result<()> {
        let what = format!("{}: {text:?} in its log", self.name);
        wait_for(&what, limit, || {
            if self.log().contains(text) {
                return Ok(true);
            }
            self.expect_running().map(|()| false)
        })
        .with_context(|| self.log_tail(20))
    }

    /// Waits until `socket` exists; an error if it ends before.
    pub fn wait_for_socket(&mut self, socket: &Path, limit: Duration) -> Result<()> {
        let what = format!("{}: socket {}", self.name, socket.display());
        wait_for(&what, limit, || {
            if socket.exists() {
                return Ok(true);
            }
            self.expect_running().map(|()| false)
        })
        .with_context(|| self.log_tail(20))
    }

    /// Connects to `socket`, which has a name before it listens; an error if it ends before.
    pub fn connect(&mut self, socket: &Path, limit: Duration) -> Result<UnixStream> {
        let mut stream = None;
        let what = format!("{}: a connection to {}", self.name, socket.display());
        wait_for(&what, limit, || {
            stream = UnixStream::connect(socket).ok();
            if stream.is_some() {
                return Ok(true);
            }
            self.expect_running().map(|()| false)
        })
        .with_context(|| self.log_tail(20))?;
        stream.context("no connection")
    }

    /// Freezes it (SIGSTOP).
    pub fn freeze(&self) -> Result<()> {
        self.signal(Signal::STOP)
    }

    /// Lets it go on (SIGCONT).
    pub fn thaw(&self) -> Result<()> {
        self.signal(Signal::CONT)
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill_process(self.pid()?, signal).with_context(|| format!("cannot signal {}", self.name))
    }

    /// Kills it at once (SIGKILL) and waits for its end.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill().with_context(|| format!("cannot kill {}", self.name))?;
        self.child.wait().map(drop).with_context(|| format!("cannot wait for {}", self.name))
    }

    /// Asks it to end (SIGTERM), and kills it if it has not after `limit`.
    pub fn terminate(&mut self, limit: Duration) -> Result<ExitStatus> {
        if self.is_running() {
            self.signal(Signal::TERM)?;
        }
        self.wait(limit).or_else(|_| {
            self.kill()?;
            self.child.wait().context("cannot wait")
        })
    }

    /// Moves all its present threads to the given processors.
    pub fn pin(&self, cpus: &[usize]) -> Result<()> {
        let list: Vec<_> = cpus.iter().map(usize::to_string).collect();
        words(&format!("taskset -a -c -p {} {}", list.join(","), self.id())).map(drop)
    }

    /// Processor time used so far, all threads, user and system (`/proc/PID/stat`, proc(5)).
    pub fn cpu_time(&self) -> Result<Duration> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.id()))?;
        ticks(&stat).map(|ticks| Duration::from_millis(ticks * 10)).context("unexpected /proc/PID/stat")
    }

    /// Resident memory in KiB, huge pages not included (`VmRSS` in `/proc/PID/status`).
    pub fn resident_kib(&self) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        line.split_whitespace().next().context("no VmRSS")?.parse().context("VmRSS is not a number")
    }

    fn pid(&self) -> Result<Pid> {
        Pid::from_raw(i32::try_from(self.child.id())?).context("no process id")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself, and nobody could be told.
        let _ = self.kill();
    }
}

/// `utime` + `stime` in ticks of 10 ms (fields 14 and 15; the name in field 2 may hold blanks).
fn ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(") ")?.1.split(' ').skip(11);
    Some(fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?)
}

type Request = (Command, Sender<std::io::Result<Child>>);

fn spawn_from_long_lived_thread(command: Command) -> Result<Child> {
    static SPAWNER: OnceLock<Mutex<Sender<Request>>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (sender, requests): (_, Receiver<Request>) = channel();
        std::thread::spawn(move || {
            for (mut command, reply) in requests {
                // The asker waits for the reply.
                let _ = reply.send(command.spawn());
            }
        });
        Mutex::new(sender)
    });
    let (reply, child) = channel();
    let sender = spawner.lock().unwrap_or_else(PoisonError::into_inner);
    sender.send((command, reply)).ok().context("the spawning thread is gone")?;
    Ok(child.recv()??)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sleeper(dir: &Path) -> Process {
        let mut sleep = command("sleep");
        sleep.arg("60");
        Process::spawn("sleep", sleep, dir.join("sleep.log")).unwrap()
    }

    #[test]
    fn child_outlives_the_thread_that_asked_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let mut child = std::thread::scope(|scope| scope.spawn(|| sleeper(dir.path())).join().unwrap());
        std::thread::sleep(Duration::from_millis(100));
        assert!(child.is_running());
    }

    #[test]
    fn dropped_child_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let child = sleeper(dir.path());
        let proc = PathBuf::from(format!("/proc/{}", child.id()));
        assert!(proc.exists());
        drop(child);
        assert!(!proc.exists());
    }

    #[test]
    fn failed_command_tells_what_it_wrote() {
        let error = output(Command::new("sh").args(["-c", "echo no luck >&2; exit 3"])).unwrap_err();
        assert!(error.to_string().contains("no luck"), "{error}");
    }

    #[test]
    fn ticks_are_found_behind_a_name_with_blanks() {
        let stat = "7 (a b) c) S 1 7 7 0 -1 4194560 100 0 0 0 25 17 0 0 20 0 1 0 100 1 1";
        assert_eq!(ticks(stat), Some(42));
    }
}
