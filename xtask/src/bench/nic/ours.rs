//! Our daemon in the nested host, its switches and VMs.

use std::time::Instant;

use anyhow::{Context, Result};
use switchyard_tests::nested::{Guest, Host, VmNic, VmSpec, Yardd};
use switchyard_tests::station::Station;

use super::{BOOT, GUEST_MEMORY_MB, SHORT, Way, send};
use switchyard_tests::iperf::Load;

/// VMs: name, switch, last byte of the address, virtual processors and queues, whether the card is emulated. Each switch S
/// also has a TAP device in the nested host, 10.78.S.1.
const VMS: &[(Vm, u8, u8, u16, bool)] = &[
    (Vm("boot"), 1, 2, 1, false),
    (Vm("net"), 2, 2, 1, false),
    (Vm("old"), 3, 2, 1, true),
    (Vm("red"), 4, 2, 1, false),
    (Vm("blue"), 4, 3, 1, false),
    (Vm("one"), 5, 2, 1, false),
    (Vm("four"), 6, 2, 4, false),
];
/// Longest packet that a synthetic card may be set to; guests start with 1500.
const MTU: u16 = 9000;

/// A VM of the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Vm(&'static str);

/// A VM that is only booted.
pub const BOOTED: Vm = Vm("boot");
/// With a synthetic card.
pub const SYNTHETIC: Vm = Vm("net");
/// With an emulated card.
pub const EMULATED: Vm = Vm("old");
/// Two on one switch.
pub const PAIR: [Vm; 2] = [Vm("red"), Vm("blue")];
/// With one queue, one virtual processor.
pub const ONE_QUEUE: Vm = Vm("one");
/// With four of each.
pub const FOUR_QUEUES: Vm = Vm("four");

/// The daemon; its VMs are started when they are needed.
#[derive(Debug)]
pub struct Ours {
    yardd: Yardd,
    host: Host,
}

impl Ours {
    /// Starts the daemon, with the processors `cpus` to switch frames on.
    pub fn start(host: &Host, cpus: &[usize]) -> Result<Self> {
        let yardd = Yardd::start(host, cpus, &config())?;
        let mut switches: Vec<_> = VMS.iter().map(|vm| vm.1).collect();
        switches.dedup();
        for switch in switches {
            let tap = tap(switch);
            let line = format!("ip addr add 10.78.{switch}.1/24 dev {tap} && ip link set {tap} up");
            host.check(&line, SHORT)?;
        }
        Ok(Self { yardd, host: host.clone() })
    }

    /// Starts a VM.
    pub fn boot(&self, vm: Vm) -> Result<Machine> {
        let found = VMS.iter().find(|known| known.0 == vm).context("no such VM")?;
        let (switch, last) = (found.1, found.2);
        let started = Instant::now();
        self.yardd.yard(&format!("vm start {}", vm.0))?;
        let attached = self.yardd.guest(vm.0, started);
        let guest = attached.with_context(|| self.state(vm))?;
        Ok(Machine {
            vm,
            guest,
            worker: self.yardd.worker(vm.0)?,
            tap: tap(switch),
            host_address: format!("10.78.{switch}.1"),
            address: format!("10.78.{switch}.{last}"),
        })
    }

    /// Starts a VM and waits until its guest obeys and has its address.
    pub fn boot_ready(&self, vm: Vm) -> Result<Machine> {
        let mut machine = self.boot(vm)?;
        machine.guest.wait_ready(BOOT).with_context(|| self.state(vm))?;
        let up = format!("until ip addr show | grep -q ' {}/'; do sleep 0.1; done", machine.address);
        let output = machine.guest.run(&up, SHORT).with_context(|| self.state(vm))?;
        anyhow::ensure!(output.status == 0, "{}: no card\n{}", vm.0, self.state(vm));
        Ok(machine)
    }

    /// Ends a VM.
    pub fn stop(&self, machine: Machine) -> Result<()> {
        machine.thaw()?;
        self.yardd.yard(&format!("vm stop {}", machine.vm.0)).map(drop)
    }

    /// The daemon's counters.
    pub fn stats(&self) -> Result<String> {
        self.yardd.yard("stats")
    }

    /// What the daemon knows of a VM when something went wrong.
    pub fn state(&self, vm: Vm) -> String {
        let shown = self.yardd.yard(&format!("vm show {}", vm.0));
        let shown = shown.unwrap_or_else(|error| format!("{error:#}"));
        let log = self.host.run(&format!("tail -n 10 /run/yard/vm/{}/worker.log", vm.0), SHORT);
        format!("{shown}\n{}", log.map_or_else(|error| format!("{error:#}"), |output| output.stdout))
    }
}

fn tap(switch: u8) -> String {
    format!("yard-s{switch}")
}

fn config() -> String {
    let mut config = String::new();
    let mut last = 0;
    for &(Vm(name), switch, station, cpus, legacy) in VMS {
        if switch != last {
            config.push_str(&format!(
                "[switch.s{switch}]\ntype = \"private\"\n[switch.s{switch}.port.host]\ntap = {{ name = {:?} }}\n",
                tap(switch)
            ));
            last = switch;
        }
        let mac = format!("02:00:00:00:{switch:02x}:{station:02x}");
        let nic = VmNic { legacy, queues: cpus, ..VmNic::new("eth0", &format!("s{switch}"), &mac) };
        let nic = nic.at(&format!("10.78.{switch}.{station}/24"));
        let spec = VmSpec {
            vcpus: cpus.into(),
            memory_mb: GUEST_MEMORY_MB,
            settings: "restart = \"never\"\n".to_owned(),
            ..VmSpec::new(name).with(nic)
        };
        // The host's end takes long packets; what the guest sets its card to at boot is not changed.
        let table = spec.config();
        config.push_str(&if legacy { table } else { table.replace("mtu = 1500", &format!("mtu = {MTU}")) });
    }
    config
}

/// A VM that runs.
#[derive(Debug)]
pub struct Machine {
    vm: Vm,
    /// Its guest.
    pub guest: Guest,
    /// Process of its worker.
    pub worker: u32,
    /// The nested host's device on its switch.
    pub tap: String,
    /// The nested host, as the guest reaches it.
    pub host_address: String,
    /// The guest, as others reach it.
    pub address: String,
}

impl Machine {
    /// Stops the worker (SIGSTOP), and with it the guest.
    pub fn freeze(&self) -> Result<()> {
        self.signal("STOP")
    }

    /// Lets it go on.
    pub fn thaw(&self) -> Result<()> {
        self.signal("CONT")
    }

    fn signal(&self, signal: &str) -> Result<()> {
        self.guest.host().check(&format!("kill -{signal} {}", self.worker), SHORT).map(drop)
    }

    /// Sends `load` from the guest to the nested host, or back.
    pub fn measure(&self, way: Way, load: Load, seconds: u32) -> Result<f64> {
        let host = self.guest.host();
        match way {
            Way::Transmit => send(&self.guest, host, &self.host_address, load, seconds),
            Way::Receive => send(host, &self.guest, &self.address, load, seconds),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_switch_is_named_once_and_every_vm_has_its_table() {
        let config = config();
        for (Vm(name), switch, ..) in VMS {
            assert_eq!(config.matches(&format!("[switch.s{switch}]")).count(), 1, "{config}");
            assert_eq!(config.matches(&format!("[vm.{name}]")).count(), 1, "{config}");
        }
        assert!(config.contains("queues = 4") && config.contains("mtu = 9000"), "{config}");
    }
}
