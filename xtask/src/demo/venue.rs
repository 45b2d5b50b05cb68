//! Where VMs run: on this machine, where its processor can, or in the nested host.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use switchyard_tests::janitor;
use switchyard_tests::kernel::Flavour;
use switchyard_tests::lab::{Lab, wait_for};
use switchyard_tests::nested::image::{Boot, guest, guest_initrd, guest_kernel};
use switchyard_tests::nested::{self, Host, HostSpec};
use switchyard_tests::orders::Orders;
use switchyard_tests::process::Process;
use switchyard_tests::setup;
use switchyard_tests::station::{Job, Output, Station};
use switchyard_tests::yardd::Yardd;

use super::Scene;

/// For a guest or the nested host to boot.
const BOOT: Duration = Duration::from_secs(180);
const SHORT: Duration = Duration::from_secs(30);
/// Of two guests: the first has an emulated card, for which only the full kernel has a driver; the other boots in half the time.
const FLAVOURS: [Flavour; 2] = [Flavour::Full, Flavour::Cloud];
/// For the nested host's own files, and for two guests.
const HOST_MEMORY_MB: u32 = 2048;
/// The nested host's processor that switches frames: it has one.
const SWITCH_CPU: usize = 0;
/// Where the daemon of the nested host listens, and keeps its VMs' logs.
const NESTED_SOCKET: &str = "/run/yard/yardd.sock";
const NESTED_CAPTURE: &str = "/tmp/capture.pcapng";

/// Our daemon, and its VMs. Dropping it ends them all.
#[derive(Debug)]
pub enum Venue {
    /// On this machine's KVM.
    Here(Box<Here>),
    /// In the nested host.
    Nested {
        /// Our daemon there.
        yardd: nested::Yardd,
        /// The nested host.
        host: Host,
        /// Its folder.
        _lab: Lab,
    },
}

/// Our daemon on this machine.
#[derive(Debug)]
pub struct Here {
    yardd: Yardd,
    lab: Lab,
}

/// Whether a guest may run on this machine's KVM: only a processor with VT-x or AMD-V of its own can run a kernel.
pub fn has_virtualization() -> bool {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = info.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let able = flags.split_whitespace().any(|flag| matches!(flag, "vmx" | "svm"));
    able && std::fs::File::options().read(true).write(true).open("/dev/kvm").is_ok()
}

impl Venue {
    /// Makes the guests' files, starts the daemon where it can run VMs; `config` gets the files of two guests.
    pub fn open(scene: &Scene, config: impl Fn(&Boot, &Boot) -> String) -> Result<Self> {
        let lab = Lab::shared()?;
        if has_virtualization() {
            scene.say("the processor has virtualization: the guests run on this machine's KVM");
            return Self::here(scene, lab, config);
        }
        scene.say("the processor has no virtualization (vmx, svm), or /dev/kvm cannot be used:");
        scene.say("booting a Linux host with KVM under QEMU's software CPU; the guests run in that, slowly");
        // With two processors the software CPU now and then loses a guest.
        let host = HostSpec { memory_mb: HOST_MEMORY_MB, cpus: 1, ..HostSpec::new(&scene.programs) };
        let host = Host::boot(&lab, &host, BOOT)?;
        scene.say(format_args!("the nested host is up after {:.1} s", host.boot_time().as_secs_f64()));
        let files = FLAVOURS.map(|flavour| Boot {
            kernel: guest_kernel(flavour).into(),
            initrd: guest_initrd(flavour).into(),
        });
        let yardd = nested::Yardd::start(&host, &[SWITCH_CPU], &config(&files[0], &files[1]))?;
        Ok(Self::Nested { yardd, host, _lab: lab })
    }

    fn here(scene: &Scene, lab: Lab, config: impl Fn(&Boot, &Boot) -> String) -> Result<Self> {
        let files = |flavour| match scene.guest.clone() {
            Some([kernel, initrd]) => Ok(Boot { kernel, initrd }),
            None => guest(&scene.programs.join("nested"), flavour),
        };
        let [red, blue] = [files(FLAVOURS[0])?, files(FLAVOURS[1])?];
        // Workers outlive their daemon. Where it was ended by Ctrl-C, they end here.
        janitor::at_exit(&format!(
            "grep -ho '\"pid\": *[0-9]*' {}/vm/*/setup.json | grep -o '[0-9]*$' | xargs -r kill -9",
            lab.dir().display()
        ))?;
        let cpu = setup::processors().saturating_sub(1);
        let yardd = Yardd::start(&lab, &scene.programs, &[cpu], &config(&red, &blue))?;
        Ok(Self::Here(Box::new(Here { yardd, lab })))
    }

    /// Runs `yard` with these words, none of which holds a blank; what it prints.
    pub fn yard(&self, words: &str) -> Result<String> {
        match self {
            Self::Here(here) => here.yardd.yard(&words.split_whitespace().collect::<Vec<_>>()),
            Self::Nested { yardd, .. } => yardd.yard(words),
        }
    }

    /// Starts a VM; its guest does not obey yet.
    pub fn start(&self, name: &str) -> Result<Guest> {
        let started = Instant::now();
        self.yard(&format!("vm start {name}"))?;
        match self {
            Self::Here(here) => {
                let console = here.lab.path("vm").join(name).join("console.sock");
                let orders = Orders::new(UnixStream::connect(&console)?);
                Ok(Guest::Here { name: name.to_owned(), orders, started })
            }
            Self::Nested { yardd, .. } => Ok(Guest::Nested(yardd.guest(name, started)?)),
        }
    }

    /// What is known of a VM when something went wrong.
    pub fn state(&self, vm: &str) -> String {
        let shown = self.yard(&format!("vm show {vm}")).unwrap_or_else(|error| format!("{error:#}"));
        let log = match self {
            Self::Here(here) => {
                std::fs::read_to_string(here.lab.path("vm").join(vm).join("worker.log")).unwrap_or_default()
            }
            Self::Nested { host, .. } => {
                let log = host.run(&format!("tail -n 20 /run/yard/vm/{vm}/worker.log"), SHORT);
                log.map_or_else(|error| format!("{error:#}"), |output| output.stdout)
            }
        };
        format!("{shown}\n{log}")
    }

    /// Begins to capture what passes a port.
    pub fn capture(&self, port: &str) -> Result<Capture> {
        match self {
            Self::Here(here) => {
                let file = here.lab.path("capture.pcapng");
                let mut yard = here.yardd.yard_command(&["capture", port, "-w"]);
                yard.arg(&file);
                let process = Process::spawn("yard capture", yard, here.lab.path("capture.log"))?;
                wait_for("the capture's begin", SHORT, || Ok(file.exists()))?;
                Ok(Capture::Here { process, file })
            }
            Self::Nested { host, .. } => {
                let line = format!("exec yard --socket {NESTED_SOCKET} capture {port} -w {NESTED_CAPTURE}");
                let service = host.service("capture", &line)?;
                host.wait_for_path(NESTED_CAPTURE, SHORT)?;
                Ok(Capture::Nested { service, host: host.clone() })
            }
        }
    }
}

impl Drop for Here {
    fn drop(&mut self) {
        let Ok(report) = self.yardd.report() else { return };
        for vm in report["vms"].as_array().into_iter().flatten() {
            // One that is off already cannot be stopped.
            let _ = vm["name"].as_str().map(|name| self.yardd.yard(&["vm", "stop", name]));
        }
    }
}

/// A guest of a VM.
#[derive(Debug)]
pub enum Guest {
    /// On this machine.
    Here {
        /// Of the VM.
        name: String,
        /// Over its console.
        orders: Orders,
        /// When its VM was started.
        started: Instant,
    },
    /// In the nested host.
    Nested(nested::Guest),
}

impl Guest {
    /// Waits until it obeys; how long that took from its VM's start.
    pub fn wait_ready(&mut self) -> Result<Duration> {
        match self {
            Self::Here { orders, started, .. } => {
                orders.wait_ready(BOOT)?;
                Ok(started.elapsed())
            }
            Self::Nested(guest) => guest.wait_ready(BOOT),
        }
    }
}

impl Station for Guest {
    fn name(&self) -> &str {
        match self {
            Self::Here { name, .. } => name,
            Self::Nested(guest) => guest.name(),
        }
    }

    fn run(&self, line: &str, limit: Duration) -> Result<Output> {
        match self {
            Self::Here { orders, .. } => orders.run(line, limit),
            Self::Nested(guest) => guest.run(line, limit),
        }
    }

    fn spawn(&self, line: &str) -> Result<Box<dyn Job>> {
        match self {
            Self::Here { orders, .. } => orders.spawn(line),
            Self::Nested(guest) => guest.spawn(line),
        }
    }
}

/// A capture under way.
#[derive(Debug)]
pub enum Capture {
    /// On this machine.
    Here {
        /// `yard`.
        process: Process,
        /// What it writes.
        file: PathBuf,
    },
    /// In the nested host.
    Nested {
        /// `yard`.
        service: nested::host::Service,
        /// Where.
        host: Host,
    },
}

impl Capture {
    /// Ends it; the file's content.
    pub fn finish(self) -> Result<Vec<u8>> {
        match self {
            Self::Here { mut process, file } => {
                process.terminate(SHORT)?;
                std::fs::read(&file).with_context(|| format!("no capture: {}", process.log()))
            }
            Self::Nested { mut service, host } => {
                host.check(&format!("kill -TERM {}", service.id()?), SHORT)?;
                let output = service.wait(SHORT)?;
                if output.status != 0 {
                    bail!("yard capture: status {}: {}", output.status, output.stdout);
                }
                host.get(NESTED_CAPTURE)
            }
        }
    }
}
