//! Our daemon in the nested host, and the VMs that it runs there.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::guest::{Address, Guest, command_line};
use super::host::{Host, Service};
use super::image::{guest_initrd, guest_kernel};
use crate::kernel::Flavour;
use crate::lab::wait_for;
use crate::station::{Job, Station};
use crate::yardd::find_port;

/// How long the daemon may take to start, and a port to change its state.
const LIMIT: Duration = Duration::from_secs(60);
const FOLDER: &str = "/run/yard";
const SOCKET: &str = "/run/yard/yardd.sock";
const CONFIG: &str = "/etc/switchyard.toml";

/// An adapter of a VM.
#[derive(Debug, Clone)]
pub struct VmNic {
    /// Unique in its VM.
    pub name: String,
    /// The switch.
    pub switch: String,
    /// An emulated e1000 rather than a synthetic adapter.
    pub legacy: bool,
    /// "02:00:00:00:00:01".
    pub mac: String,
    /// The address the guest gives it at boot.
    pub address: Option<String>,
    /// Channels at most.
    pub queues: u16,
    /// Bytes.
    pub mtu: u16,
    /// More lines of its table.
    pub settings: String,
}

impl VmNic {
    /// A synthetic adapter with one channel and an MTU of 1500.
    pub fn new(name: &str, switch: &str, mac: &str) -> Self {
        Self {
            name: name.to_owned(),
            switch: switch.to_owned(),
            legacy: false,
            mac: mac.to_owned(),
            address: None,
            queues: 1,
            mtu: 1500,
            settings: String::new(),
        }
    }

    /// With an address that the guest gives it at boot, such as "10.0.0.1/24".
    pub fn at(mut self, address: &str) -> Self {
        self.address = Some(address.to_owned());
        self
    }
}

/// A VM for a configuration.
#[derive(Debug, Clone)]
pub struct VmSpec {
    /// Its name.
    pub name: String,
    /// Memory in MiB.
    pub memory_mb: u32,
    /// Virtual processors.
    pub vcpus: u32,
    /// Which of Debian's kernels.
    pub flavour: Flavour,
    /// Its root file system, a path of the host, if not the usual one.
    pub initrd: Option<String>,
    /// Adapters.
    pub nics: Vec<VmNic>,
    /// More words for the kernel's command line.
    pub kernel_arguments: String,
    /// More lines of its table.
    pub settings: String,
}

impl VmSpec {
    /// The full kernel, one processor, 256 MiB, no adapter.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            memory_mb: 256,
            vcpus: 1,
            flavour: Flavour::Full,
            initrd: None,
            nics: Vec::new(),
            kernel_arguments: String::new(),
            settings: String::new(),
        }
    }

    /// With one adapter more.
    pub fn with(mut self, nic: VmNic) -> Self {
        self.nics.push(nic);
        self
    }

    /// Its tables in a configuration.
    pub fn config(&self) -> String {
        let Self { name, memory_mb, vcpus, settings, .. } = self;
        let addresses: Vec<_> = self
            .nics
            .iter()
            .filter_map(|nic| {
                let address = nic.address.as_ref()?;
                let mtu = (nic.mtu != 1500).then_some(u32::from(nic.mtu));
                Some(Address { mtu, ..Address::new(&nic.mac, address) })
            })
            .collect();
        let cmdline = command_line(&addresses, &self.kernel_arguments);
        let usual = guest_initrd(self.flavour);
        let (kernel, initrd) = (guest_kernel(self.flavour), self.initrd.as_deref().unwrap_or(usual));
        let mut config = format!(
            "[vm.{name}]\nmemory = \"{memory_mb}M\"\nvcpus = {vcpus}\nkernel = {kernel:?}\ninitrd = {initrd:?}\n\
             cmdline = {cmdline:?}\n{settings}\n"
        );
        for VmNic { name: nic, switch, legacy, mac, queues, mtu, settings, .. } in &self.nics {
            let kind = if *legacy { "legacy" } else { "synthetic" };
            let queues = if *legacy { String::new() } else { format!("queues = {queues}\n") };
            config.push_str(&format!(
                "[[vm.{name}.nic]]\nname = {nic:?}\nswitch = {switch:?}\ntype = {kind:?}\nmac = {mac:?}\n{queues}\
                 mtu = {mtu}\n{settings}\n"
            ));
        }
        config
    }
}

/// A running daemon; killed when dropped. Its VMs' workers go on.
#[derive(Debug)]
pub struct Yardd {
    host: Host,
    service: Service,
}

impl Yardd {
    /// Starts the daemon with `[api]` and `[workers]` written for it in front of `config`, and waits until it answers.
    pub fn start(host: &Host, cpus: &[usize], config: &str) -> Result<Self> {
        let head = format!("[workers]\ncpus = {cpus:?}\n[api]\nsocket = {SOCKET:?}\n");
        host.put(CONFIG, format!("{head}{config}").as_bytes())?;
        host.check(&format!("mkdir -p {FOLDER}"), LIMIT)?;
        Self::run(host)
    }

    /// Starts the daemon with the configuration of the one before it.
    pub fn run(host: &Host) -> Result<Self> {
        let name = format!("{}-yardd-{}", host.name(), host.serial());
        let service = host.service(&name, &format!("exec yardd --config {CONFIG}"))?;
        let mut yardd = Self { host: host.clone(), service };
        let start = Instant::now();
        while let Err(error) = yardd.yard("--json show") {
            yardd.service.expect_running()?;
            if start.elapsed() > LIMIT {
                bail!("yardd does not answer: {error:#}\n{}", yardd.service.output()?);
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(yardd)
    }

    /// Kills the daemon as a crash would; it comes back with [`Yardd::run`].
    pub fn crash(mut self) -> Result<()> {
        self.service.kill()
    }

    /// The daemon's process.
    pub fn service(&mut self) -> &mut Service {
        &mut self.service
    }

    /// Runs `yard` with these words, as a shell reads them; what it prints.
    pub fn yard(&self, words: &str) -> Result<String> {
        self.host.check(&format!("yard --socket {SOCKET} {words}"), LIMIT)
    }

    /// Everything that `yard show` knows.
    pub fn report(&self) -> Result<Value> {
        let text = self.yard("--json show")?;
        serde_json::from_str(&text).with_context(|| format!("not JSON: {text}"))
    }

    /// One port of the report.
    pub fn port(&self, switch: &str, port: &str) -> Result<Value> {
        find_port(&self.report()?, switch, port)
    }

    /// Everything that `yard vm show` knows of a VM.
    pub fn vm(&self, name: &str) -> Result<Value> {
        let text = self.yard(&format!("--json vm show {name}"))?;
        serde_json::from_str(&text).with_context(|| format!("not JSON: {text}"))
    }

    /// Waits until a VM is as `ready` wants it; what `yard vm show` then knew of it.
    pub fn wait_for_vm(&self, name: &str, what: &str, ready: impl Fn(&Value) -> bool) -> Result<Value> {
        let mut seen = Value::Null;
        let reached = wait_for(&format!("VM {name}: {what}"), LIMIT, || {
            seen = self.vm(name)?;
            Ok(ready(&seen))
        });
        reached.with_context(|| format!("{seen:#}"))?;
        Ok(seen)
    }

    /// Waits until a VM is in `state` (`off`, `running`, `paused`, `crashed`, ...).
    pub fn wait_for_vm_state(&self, name: &str, state: &str) -> Result<Value> {
        self.wait_for_vm(name, state, |vm| vm["state"] == state)
    }

    /// Waits until a port is in `state` (`up`, `waiting`, `faulted`, `finished`).
    pub fn wait_for_port(&self, switch: &str, port: &str, state: &str) -> Result<()> {
        let reached = wait_for(&format!("{switch}/{port} to be {state}"), LIMIT, || {
            Ok(self.port(switch, port)?["state"] == state)
        });
        reached.or_else(|error| bail!("{error:#}: {}", self.port(switch, port)?))
    }

    /// Starts a VM of the configuration and returns its guest, which is not ready yet.
    pub fn start_vm(&self, name: &str) -> Result<Guest> {
        let started = Instant::now();
        self.yard(&format!("vm start {name}"))?;
        self.guest(name, started)
    }

    /// The guest of a running VM, whose start was asked for at `started`.
    pub fn guest(&self, name: &str, started: Instant) -> Result<Guest> {
        let folder = format!("{FOLDER}/vm/{name}");
        self.host.wait_for_path(&format!("{folder}/console.sock"), LIMIT)?;
        Guest::attach(
            &self.host,
            name,
            &format!("{folder}/console.sock"),
            &format!("{folder}/serial.log"),
            started,
        )
    }

    /// Process of a VM's worker.
    pub fn worker(&self, vm: &str) -> Result<u32> {
        let shown = self.host.check(&format!("cat {FOLDER}/vm/{vm}/*.json"), LIMIT)?;
        let record: Value = serde_json::from_str(&shown).with_context(|| format!("not JSON: {shown}"))?;
        let id = record["pid"].as_u64().and_then(|id| u32::try_from(id).ok());
        id.with_context(|| format!("no process of a worker: {shown}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn legacy_adapter_has_no_queues_and_an_address_by_mac() {
        let legacy = VmNic { legacy: true, ..VmNic::new("old", "lab", "02:00:00:00:00:07") };
        let config = VmSpec::new("a").with(legacy.at("10.0.0.1/24")).config();
        assert!(config.contains("nic=02:00:00:00:00:07,10.0.0.1/24"), "{config}");
        assert!(config.contains("type = \"legacy\"") && !config.contains("queues"), "{config}");
    }
}
