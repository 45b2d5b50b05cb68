//! A Linux host with KVM of its own, on any machine: QEMU's software CPU with AMD-V and nested paging.

use std::fmt::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::image;
use super::link::{Conversation, Link};
use crate::lab::Lab;
use crate::process::{Process, command, command_on};
use crate::station::{Job, Output, Station};

/// How long QEMU may take to open its sockets.
const START: Duration = Duration::from_secs(20);
/// For what takes next to no time in the host.
const SHORT: Duration = Duration::from_secs(30);
/// Bytes a second that a copy moves at least.
const COPY_RATE: u64 = 1 << 20;

/// What to boot.
#[derive(Debug, Clone)]
pub struct HostSpec {
    /// Its name: unique in the lab.
    pub name: String,
    /// Memory in MiB: for the guests, and for the host's own files (about 200).
    pub memory_mb: u32,
    /// Processors.
    pub cpus: u32,
    /// Their kind and features, as QEMU names them.
    pub cpu: String,
    /// This machine's processors that QEMU may use; all if empty.
    pub pin: Vec<usize>,
    /// Folder of the programs that the host shall have: the porter, and those of `wanted`.
    pub programs: PathBuf,
    /// Programs of that folder: they are on the host's path.
    pub wanted: Vec<String>,
    /// More words for the kernel's command line.
    pub kernel_arguments: String,
}

impl HostSpec {
    /// Two processors, 2 GiB, and whichever of our programs were built into the folder `programs`.
    pub fn new(programs: &Path) -> Self {
        let wanted = ["yardd", "yard", "yard-worker"].into_iter();
        Self {
            name: "host".to_owned(),
            memory_mb: 2048,
            cpus: 2,
            cpu: "EPYC,+svm,+npt".to_owned(),
            pin: Vec::new(),
            programs: programs.to_owned(),
            wanted: wanted.filter(|name| programs.join(name).exists()).map(str::to_owned).collect(),
            kernel_arguments: String::new(),
        }
    }

    /// The same on the lab's own processor, if it is on one: where the emulated ones take turns, the software CPU seldom loses a guest.
    #[must_use]
    pub fn steady(self, lab: &Lab) -> Self {
        Self { pin: lab.processor().into_iter().collect(), ..self }
    }

    /// The same with a processor that is whole enough for the model `epyc`, and has `more` features. A software CPU that says
    /// so has not all that it says (sha-ni, clzero): nothing here uses them unasked. What the kernel would use stays away.
    #[must_use]
    pub fn epyc(self, more: &str) -> Self {
        let claimed = "x-force-features=on,+clzero,-xsavec,-nrip-save,-osvw,-topoext";
        Self { cpu: format!("{},{claimed},{more}", self.cpu), ..self }
    }

    fn arguments(&self, boot: &image::Boot, orders: &Path, console: &Path) -> Vec<String> {
        // Another clock source than the counter leaves guests without Hyper-V's reference page.
        let append = format!(
            "console=ttyS0 quiet panic=-1 tsc=reliable clocksource=tsc mitigations=off random.trust_cpu=on {}",
            self.kernel_arguments
        );
        let mut line = String::from(
            "-machine q35 -accel tcg,thread=multi -nodefaults -display none -no-reboot \
             -device virtio-serial-pci -device virtserialport,chardev=orders,nr=1",
        );
        let _ = write!(line, " -cpu {} -smp {} -m {}M", self.cpu, self.cpus, self.memory_mb);
        let mut arguments: Vec<_> = line.split_whitespace().map(str::to_owned).collect();
        let chardev = format!("socket,id=orders,path={},server=on,wait=off", orders.display());
        for (option, value) in [
            ("-append", append),
            ("-kernel", boot.kernel.display().to_string()),
            ("-initrd", boot.initrd.display().to_string()),
            ("-serial", format!("file:{}", console.display())),
            ("-chardev", chardev),
        ] {
            arguments.extend([option.to_owned(), value]);
        }
        arguments
    }
}

/// A running nested host; the last handle to be dropped kills it. Any thread may use it.
#[derive(Debug, Clone)]
pub struct Host(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: String,
    folder: PathBuf,
    console: PathBuf,
    link: Arc<Link>,
    qemu: Mutex<Process>,
    boot: Duration,
    serial: AtomicU32,
}

impl Host {
    /// Boots it and waits until it obeys.
    pub fn boot(lab: &Lab, spec: &HostSpec, limit: Duration) -> Result<Self> {
        let programs: Vec<_> = std::iter::once("lab-porter")
            .chain(spec.wanted.iter().map(String::as_str))
            .map(|name| spec.programs.join(name))
            .collect();
        let boot = image::host(&spec.programs.join("nested"), &programs)?;
        let orders = lab.path(&format!("{}.orders", spec.name));
        let console = lab.path(&format!("{}.console", spec.name));
        let program = "qemu-system-x86_64";
        let mut qemu = if spec.pin.is_empty() { command(program) } else { command_on(&spec.pin, program) };
        qemu.args(spec.arguments(&boot, &orders, &console));
        let started = Instant::now();
        let log = lab.path(&format!("{}.qemu", spec.name));
        let mut qemu = Process::spawn(&format!("nested host {}", spec.name), qemu, log)?;
        qemu.close_stdin();
        let (link, mut ready) = Link::new(qemu.connect(&orders, START)?)?;
        ready.wait_started(limit).with_context(|| {
            format!("nested host {}\n{}\n{}", spec.name, qemu.log_tail(10), tail(&console, 20))
        })?;
        Ok(Self(Arc::new(Inner {
            name: spec.name.clone(),
            folder: lab.dir().to_owned(),
            console,
            link,
            qemu: Mutex::new(qemu),
            boot: started.elapsed(),
            serial: AtomicU32::new(0),
        })))
    }

    /// How long it took from QEMU's start until it obeyed.
    pub fn boot_time(&self) -> Duration {
        self.0.boot
    }

    /// QEMU.
    pub fn process(&self) -> MutexGuard<'_, Process> {
        self.0.qemu.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The last lines that its kernel has said.
    pub fn console_tail(&self, lines: usize) -> String {
        tail(&self.0.console, lines)
    }

    /// A number that no other caller gets, for names.
    pub fn serial(&self) -> u32 {
        self.0.serial.fetch_add(1, Ordering::Relaxed)
    }

    /// Starts a line of shell that goes on for long. What it writes is also in the lab's folder, in `name.log`.
    pub fn service(&self, name: &str, line: &str) -> Result<Service> {
        let log = self.0.folder.join(format!("{name}.log"));
        let conversation = self.start(line, Some(&log))?;
        Ok(Service { name: name.to_owned(), line: line.to_owned(), conversation })
    }

    /// Starts a line of shell whose input and output the caller handles.
    pub fn open(&self, line: &str) -> Result<Conversation> {
        self.start(line, None)
    }

    /// Copies bytes into a file of the host; its folder is made.
    pub fn put(&self, path: &str, content: &[u8]) -> Result<()> {
        let folder = path.rsplit_once('/').map_or(".", |(folder, _)| folder);
        let mut copy = self.start(&format!("mkdir -p {folder}/ && cat > {path}"), None)?;
        copy.input(content)?;
        copy.end_input()?;
        let status = copy.wait(copy_limit(content.len()))?;
        ensure!(status == Some(0), "cannot copy to {path} of {}: {}", self.0.name, copy.text());
        Ok(())
    }

    /// The content of a file of the host.
    pub fn get(&self, path: &str) -> Result<Vec<u8>> {
        let size = self.check(&format!("stat -c %s {path}"), SHORT)?.trim().parse().unwrap_or_default();
        let mut copy = self.start(&format!("cat {path}"), None)?;
        let status = copy.wait(copy_limit(size))?;
        ensure!(status == Some(0), "cannot read {path} of {}: {}", self.0.name, copy.text());
        Ok(copy.take())
    }

    fn start(&self, line: &str, log: Option<&Path>) -> Result<Conversation> {
        self.0.link.run(line, log).with_context(|| self.state())
    }

    /// What is known of it when something went wrong.
    fn state(&self) -> String {
        let mut qemu = self.process();
        let ended = match qemu.wait(Duration::ZERO) {
            Ok(status) => format!("QEMU ended, {status}"),
            Err(_) => "QEMU runs".to_owned(),
        };
        let (log, console) = (qemu.log_tail(3), self.console_tail(20));
        format!("nested host {}: {ended}\n{log}\n{console}", self.0.name)
    }

    /// A stream that is connected to a Unix socket of the host.
    pub fn connect(&self, path: &str) -> Result<UnixStream> {
        let mut far = self.0.link.connect(path)?;
        let feeder = far.feeder();
        let (ours, theirs) = UnixStream::pair()?;
        let (mut reader, mut writer) = (theirs.try_clone()?, theirs);
        std::thread::spawn(move || {
            let mut buffer = vec![0; super::wire::LONGEST];
            loop {
                let length = std::io::Read::read(&mut reader, &mut buffer).unwrap_or_default();
                let chunk = buffer.get(..length).unwrap_or_default();
                if feeder.input(chunk).is_err() || length == 0 {
                    return;
                }
            }
        });
        std::thread::spawn(move || {
            while let Ok(chunk) = far.chunk(Duration::from_secs(1)) {
                let Some(chunk) = chunk else { continue };
                if chunk.is_empty() || std::io::Write::write_all(&mut writer, &chunk).is_err() {
                    break;
                }
            }
            // The other side may have gone first.
            let _ = writer.shutdown(std::net::Shutdown::Both);
        });
        Ok(ours)
    }

    /// Waits until a path exists in the host.
    pub fn wait_for_path(&self, path: &str, limit: Duration) -> Result<()> {
        let line = format!("until [ -e {path} ]; do sleep 0.02; done");
        let output = self.run(&line, limit)?;
        ensure!(output.status == 0, "{}: no {path} after {:.0} s", self.0.name, limit.as_secs_f64());
        Ok(())
    }
}

impl Station for Host {
    fn name(&self) -> &str {
        &self.0.name
    }

    fn run(&self, line: &str, limit: Duration) -> Result<Output> {
        let mut running = self.start(line, None)?;
        running.end_input()?;
        let status = running.wait(limit).with_context(|| self.state())?;
        if status.is_none() {
            running.kill()?;
        }
        Ok(Output { status: status.unwrap_or(137), stdout: running.text() })
    }

    fn spawn(&self, line: &str) -> Result<Box<dyn Job>> {
        let conversation = self.start(line, None)?;
        conversation.end_input()?;
        Ok(Box::new(Service { name: self.0.name.clone(), line: line.to_owned(), conversation }))
    }
}

/// A command in the background of the nested host; killed with all that it has started when dropped.
#[derive(Debug)]
pub struct Service {
    name: String,
    line: String,
    conversation: Conversation,
}

impl Service {
    /// Its process id in the host.
    pub fn id(&self) -> Result<u32> {
        self.conversation.id().context("it has no process id")
    }

    /// An error with the end of what it wrote if it has ended.
    pub fn expect_running(&mut self) -> Result<()> {
        let status = self.conversation.wait(Duration::ZERO)?;
        ensure!(
            status.is_none(),
            "{} ended early, status {status:?}:\n{}",
            self.name,
            self.conversation.text()
        );
        Ok(())
    }

    /// Gives it bytes to read.
    pub fn input(&self, bytes: &[u8]) -> Result<()> {
        self.conversation.input(bytes)
    }
}

impl Job for Service {
    fn wait(&mut self, limit: Duration) -> Result<Output> {
        let status = self.conversation.wait(limit)?;
        let stdout = self.conversation.text();
        let status = status.with_context(|| {
            format!("{}: {}: still runs after {:.0} s: {stdout}", self.name, self.line, limit.as_secs_f64())
        })?;
        Ok(Output { status, stdout })
    }

    fn output(&mut self) -> Result<String> {
        Ok(self.conversation.text())
    }

    fn kill(&mut self) -> Result<()> {
        self.conversation.kill()?;
        self.conversation.wait(SHORT).map(drop)
    }
}

fn copy_limit(bytes: usize) -> Duration {
    SHORT + Duration::from_secs(u64::try_from(bytes).unwrap_or(u64::MAX) / COPY_RATE)
}

fn tail(file: &Path, lines: usize) -> String {
    let text = std::fs::read(file).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let all: Vec<_> = text.lines().collect();
    all.get(all.len().saturating_sub(lines)..).unwrap_or_default().join("\n")
}
