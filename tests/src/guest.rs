//! A Debian guest under QEMU's software CPU, with a command channel over its second serial port.
//!
//! The software CPU (TCG) runs anywhere; the channel is that of [`orders`](crate::orders).

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::initrd;
use crate::kernel::Kernel;
use crate::lab::Lab;
use crate::nic::Nic;
use crate::orders::Orders;
use crate::process::{Process, command, command_on};
use crate::station::{Job, Output, Station};

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
    orders: Orders,
    ready: bool,
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
        let stream = qemu.connect(&commands, Duration::from_secs(20))?;
        let name = spec.name.clone();
        Ok(Self { name, qemu, console, started, orders: Orders::new(stream), ready: false })
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
            self.orders.wait_ready(left).with_context(|| {
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
        let output = self.orders.run(line, limit);
        output.with_context(|| format!("guest {}: {line}\n{}", self.name, self.console_tail()))
    }

    fn spawn(&self, line: &str) -> Result<Box<dyn Job>> {
        self.orders.spawn(line).with_context(|| format!("guest {}", self.name))
    }
}
