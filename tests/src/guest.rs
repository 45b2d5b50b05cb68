//! A Debian guest under QEMU's software CPU, with a command channel over its second serial port.
//!
//! The software CPU (TCG) runs anywhere; see `guest/init` for the other end of the channel.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::initrd;
use crate::kernel::Kernel;
use crate::lab::Lab;
use crate::nic::Nic;
use crate::process::{Process, command, command_on};
use crate::station::{Job, Output, Station};

/// How long a guest may take to answer after a command's own limit: both processors may be busy.
const GRACE: Duration = Duration::from_secs(30);

/// What to boot.
#[derive(Debug, Clone)]
pub struct GuestSpec {
    /// Its name: unique in the lab.
    pub name: String,
    /// Memory in MiB.
    pub memory_mb: u32,
    /// Virtual processors.
    pub cpus: u32,
    /// Network cards.
    pub nics: Vec<Nic>,
    /// The host's processors that QEMU may use; all if empty.
    pub pin: Vec<usize>,
    /// QEMU's CPU model.
    pub cpu_model: String,
    /// More words for the kernel's command line.
    pub kernel_arguments: String,
    /// More options for QEMU.
    pub qemu_arguments: Vec<String>,
}

impl GuestSpec {
    /// One processor, 256 MiB, no card.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            memory_mb: 256,
            cpus: 1,
            nics: Vec::new(),
            pin: Vec::new(),
            cpu_model: "EPYC".to_owned(),
            kernel_arguments: String::new(),
            qemu_arguments: Vec::new(),
        }
    }

    /// With one card more.
    pub fn with(mut self, nic: Nic) -> Self {
        self.nics.push(nic);
        self
    }

    fn arguments(&self, kernel: &Kernel, initrd: &Path, commands: &Path, console: &Path) -> Vec<String> {
        let memory = self.memory_mb;
        // Mitigations cost a software CPU time, and protect nothing here.
        let append = format!(
            "console=ttyS0 quiet panic=-1 tsc=reliable clocksource=tsc mitigations=off random.trust_cpu=on {}",
            self.kernel_arguments
        );
        let mut arguments: Vec<String> = [
            "-accel",
            "tcg,thread=multi",
            "-machine",
            "q35,memory-backend=memory",
            "-cpu",
            &self.cpu_model,
            "-nodefaults",
            "-display",
            "none",
            "-no-reboot",
            "-append",
            &append,
        ]
        .map(str::to_owned)
        .to_vec();
        arguments.extend(["-smp".to_owned(), self.cpus.to_string(), "-m".to_owned(), format!("{memory}M")]);
        arguments.extend([
            "-object".to_owned(),
            format!("memory-backend-memfd,id=memory,size={memory}M,share=on"),
        ]);
        arguments.extend(["-kernel".to_owned(), kernel.image().display().to_string()]);
        arguments.extend(["-initrd".to_owned(), initrd.display().to_string()]);
        arguments.extend(["-serial".to_owned(), format!("file:{}", console.display())]);
        let socket = format!("socket,id=commands,path={},server=on,wait=off", commands.display());
        arguments.extend([
            "-chardev".to_owned(),
            socket,
            "-serial".to_owned(),
            "chardev:commands".to_owned(),
        ]);
        arguments.extend(self.nics.iter().enumerate().flat_map(|(index, nic)| nic.arguments(index)));
        arguments.extend(self.qemu_arguments.iter().cloned());
        arguments
    }
}

/// A running guest; killed when dropped.
#[derive(Debug)]
pub struct Guest {
    name: String,
    qemu: Process,
    console: PathBuf,
    started: Instant,
    channel: Arc<Mutex<Channel>>,
    ready: bool,
    jobs: AtomicU32,
}

impl Guest {
    /// Starts QEMU and returns. With a card whose switch is not there yet, QEMU waits for it.
    pub fn boot(lab: &Lab, spec: &GuestSpec) -> Result<Self> {
        let kernel = Kernel::get()?;
        let initrd = lab.path("initrd");
        if !initrd.exists() {
            let part = lab.path(&format!("initrd-{}", spec.name));
            initrd::pack(&kernel, &part)?;
            std::fs::rename(part, &initrd)?;
        }
        let commands = lab.path(&format!("{}.commands", spec.name));
        let console = lab.path(&format!("{}.console", spec.name));
        let program = "qemu-system-x86_64";
        let mut qemu = if spec.pin.is_empty() { command(program) } else { command_on(&spec.pin, program) };
        qemu.args(spec.arguments(&kernel, &initrd, &commands, &console));
        let log = lab.path(&format!("{}.qemu", spec.name));
        let mut qemu = Process::spawn(&format!("guest {}", spec.name), qemu, log)?;
        qemu.close_stdin();
        let started = Instant::now();
        // QEMU throws away what the guest says while nobody listens.
        qemu.wait_for_socket(&commands, Duration::from_secs(20))?;
        let channel = Arc::new(Mutex::new(Channel::connect(&commands)?));
        let name = spec.name.clone();
        Ok(Self { name, qemu, console, started, channel, ready: false, jobs: AtomicU32::new(0) })
    }

    /// Boots and waits until it obeys.
    pub fn boot_ready(lab: &Lab, spec: &GuestSpec, limit: Duration) -> Result<Self> {
        let mut guest = Self::boot(lab, spec)?;
        guest.wait_ready(limit)?;
        Ok(guest)
    }

    /// Waits until the guest obeys, for `limit` after QEMU's start; the time it took if this waited for it.
    pub fn wait_ready(&mut self, limit: Duration) -> Result<Duration> {
        if !self.ready {
            let left = limit.saturating_sub(self.started.elapsed());
            let answer = self.channel.lock().unwrap_or_else(PoisonError::into_inner).answer(left, "ready");
            answer.with_context(|| {
                format!("guest {}\n{}\n{}", self.name, self.qemu.log_tail(10), self.console_tail())
            })?;
            self.ready = true;
        }
        Ok(self.started.elapsed())
    }

    /// QEMU.
    pub fn process(&mut self) -> &mut Process {
        &mut self.qemu
    }

    /// What the kernel has said.
    pub fn console(&self) -> String {
        std::fs::read(&self.console).map(|log| String::from_utf8_lossy(&log).into_owned()).unwrap_or_default()
    }

    /// Gives a card an address ("10.0.0.1/24") and brings it up.
    pub fn configure(&self, device: &str, address: &str) -> Result<()> {
        let line = format!("ip addr add {address} dev {device} nodad && ip link set {device} up");
        let line = if address.contains(':') { line } else { line.replace(" nodad", "") };
        self.check(&line, Duration::from_secs(20)).map(drop)
    }

    fn console_tail(&self) -> String {
        let console = self.console();
        let lines: Vec<_> = console.lines().collect();
        lines.get(lines.len().saturating_sub(20)..).unwrap_or_default().join("\n")
    }
}

impl Station for Guest {
    fn name(&self) -> &str {
        &self.name
    }

    fn run(&self, line: &str, limit: Duration) -> Result<Output> {
        if !self.ready {
            bail!("guest {} is not ready", self.name);
        }
        let mut channel = self.channel.lock().unwrap_or_else(PoisonError::into_inner);
        channel
            .run(line, limit)
            .with_context(|| format!("guest {}: {line}\n{}", self.name, self.console_tail()))
    }

    fn spawn(&self, line: &str) -> Result<Box<dyn Job>> {
        let base = format!("/run/job{}", self.jobs.fetch_add(1, Ordering::Relaxed));
        let quoted = line.replace('\'', r"'\''");
        // The session's leader writes its id first, so that kill reaches all that the line starts.
        let start = format!(
            "setsid dash -c 'echo $$ > {base}.id; ( {quoted} ) > {base}.log 2>&1; echo $? > {base}.status' < /dev/null \
             > /dev/null 2>&1 & until [ -s {base}.id ]; do sleep 0.02; done"
        );
        self.check(&start, Duration::from_secs(20))?;
        Ok(Box::new(GuestJob { base, channel: Arc::clone(&self.channel) }))
    }
}

#[derive(Debug)]
struct GuestJob {
    base: String,
    channel: Arc<Mutex<Channel>>,
}

impl GuestJob {
    fn run(&self, line: &str, limit: Duration) -> Result<Output> {
        self.channel.lock().unwrap_or_else(PoisonError::into_inner).run(line, limit)
    }
}

impl Job for GuestJob {
    fn wait(&mut self, limit: Duration) -> Result<Output> {
        let start = Instant::now();
        loop {
            // Short turns, so that other commands get in between.
            let line = format!(
                "n=0; until [ -s {0}.status ] || [ $n = 20 ]; do sleep 0.05; n=$((n+1)); done; \
                 [ -s {0}.status ] && cat {0}.log && exit $(cat {0}.status) || exit 250",
                self.base
            );
            let output = self.run(&line, Duration::from_secs(20))?;
            if output.status != 250 {
                return Ok(output);
            }
            if start.elapsed() > limit {
                bail!("still runs after {:.0} s: {}", limit.as_secs_f64(), self.output()?);
            }
        }
    }

    fn output(&mut self) -> Result<String> {
        Ok(self.run(&format!("cat {}.log", self.base), Duration::from_secs(20))?.stdout)
    }

    fn kill(&mut self) -> Result<()> {
        self.run(&format!("busybox kill -KILL -$(cat {}.id)", self.base), Duration::from_secs(20)).map(drop)
    }
}

impl Drop for GuestJob {
    fn drop(&mut self) {
        // The guest may be gone.
        let _ = self.kill();
    }
}

/// The host's end of the command channel.
#[derive(Debug)]
struct Channel {
    reader: BufReader<UnixStream>,
    next: u32,
    broken: bool,
}

impl Channel {
    fn connect(path: &Path) -> Result<Self> {
        let stream =
            UnixStream::connect(path).with_context(|| format!("cannot connect to {}", path.display()))?;
        Ok(Self { reader: BufReader::new(stream), next: 0, broken: false })
    }

    fn run(&mut self, line: &str, limit: Duration) -> Result<Output> {
        if self.broken {
            bail!("the command channel broke earlier");
        }
        if line.contains('\n') {
            bail!("a guest's command is one line");
        }
        self.next += 1;
        let id = self.next.to_string();
        let request = format!("{id} {} {line}\n", limit.as_secs().max(1));
        self.reader.get_mut().write_all(request.as_bytes()).context("the guest is gone")?;
        let answer = self.answer(limit + GRACE, &id);
        self.broken = answer.is_err();
        answer
    }

    fn answer(&mut self, limit: Duration, id: &str) -> Result<Output> {
        self.reader.get_ref().set_read_timeout(Some(limit.max(Duration::from_millis(1))))?;
        let silent = || format!("no answer within {:.0} s", limit.as_secs_f64());
        let mut skipped = Vec::new();
        self.reader.read_until(1, &mut skipped).with_context(silent)?;
        let mut header = String::new();
        self.reader.read_line(&mut header).with_context(silent)?;
        let (status, length) =
            parse_header(&header, id).with_context(|| format!("unexpected answer {header:?}"))?;
        let mut stdout = vec![0; length];
        self.reader.read_exact(&mut stdout).with_context(silent)?;
        Ok(Output { status, stdout: String::from_utf8_lossy(&stdout).into_owned() })
    }
}

/// The status and the length in an answer's header, if it answers the request `id`.
fn parse_header(header: &str, id: &str) -> Option<(i32, usize)> {
    let mut fields = header.split_whitespace();
    if fields.next()? != id {
        return None;
    }
    Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn channel_hearing(bytes: &[u8]) -> Channel {
        let (mut guest, host) = UnixStream::pair().unwrap();
        guest.write_all(bytes).unwrap();
        std::mem::forget(guest);
        Channel { reader: BufReader::new(host), next: 0, broken: false }
    }

    #[test]
    fn answer_may_hold_newlines_and_byte_one() {
        let mut channel = channel_hearing(b"boot noise\x011 3 6\na\n\x01b\nc");
        let output = channel.run("x", Duration::from_secs(1)).unwrap();
        assert_eq!(output, Output { status: 3, stdout: "a\n\u{1}b\nc".to_owned() });
    }

    #[test]
    fn answer_to_another_request_breaks_the_channel() {
        let mut channel = channel_hearing(b"\x017 0 0\n");
        assert!(channel.run("x", Duration::from_secs(1)).is_err());
        assert!(channel.run("x", Duration::from_secs(1)).unwrap_err().to_string().contains("broke earlier"));
    }

    #[test]
    fn command_of_two_lines_is_refused() {
        assert!(channel_hearing(b"").run("a\nb", Duration::from_secs(1)).is_err());
    }
}
