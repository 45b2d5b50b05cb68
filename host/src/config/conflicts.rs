//! Mistakes that only show when all ports are seen together: two that want the same socket, device, file or address.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use vswitch::spec::{Attachment, PortSpec, StaticAddress, TapSpec};

use super::node::quoted;
use super::problem::{Problems, suggestion};
use super::switch::SwitchConfig;
use crate::vm::port;
use crate::vm::spec::{NicSpec, VmSpec, port_name};

/// A thing of the host that one port can have.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Claim {
    Socket(String),
    Device(String),
    Descriptor(i32),
    Output(String),
}

impl std::fmt::Display for Claim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Socket(path) => write!(f, "socket {path}"),
            Self::Device(name) => write!(f, "device {name}"),
            Self::Descriptor(fd) => write!(f, "descriptor {fd}"),
            Self::Output(path) => write!(f, "file {path}"),
        }
    }
}

/// The claims of a port, each with the key that makes it.
fn claims(port: &PortSpec) -> Vec<(&'static str, Claim)> {
    let text = |path: &Path| path.display().to_string();
    match &port.attachment {
        Attachment::VhostUser { path, .. } => vec![("vhost-user.path", Claim::Socket(text(path)))],
        Attachment::Tap { tap: TapSpec::Name(name), .. } => vec![("tap.name", Claim::Device(name.clone()))],
        Attachment::Tap { tap: TapSpec::Fds(fds), .. } => {
            fds.iter().map(|&fd| ("tap.fds", Claim::Descriptor(fd))).collect()
        }
        Attachment::Uplink { device, .. } => vec![("uplink.device", Claim::Device(device.clone()))],
        Attachment::Pcap { write: Some(path), .. } => vec![("pcap.write", Claim::Output(text(path)))],
        Attachment::Pcap { write: None, .. } | Attachment::Synthetic { .. } | Attachment::Legacy { .. } => {
            Vec::new()
        }
    }
}

/// Reports every claim made twice. `line` finds the line of a switch's port.
pub(super) fn check(
    switches: &[SwitchConfig],
    api: &Path,
    line: impl Fn(&str, &str) -> Option<usize>,
    problems: &Problems,
) {
    let mut claimed = BTreeMap::from([(Claim::Socket(api.display().to_string()), "api.socket".to_owned())]);
    for SwitchConfig { switch, ports } in switches {
        for (at, port) in ports.iter().enumerate() {
            let line = line(&switch.name, &port.name);
            let path = format!("switch.{}.port.{}", switch.name, port.name);
            for (key, claim) in claims(port) {
                if let Some(other) = claimed.get(&claim) {
                    let message = format!("{claim} is taken by {other}, expected another");
                    problems.add(line, format!("{path}.{key}"), message);
                } else {
                    claimed.insert(claim, path.clone());
                }
            }
            if let Some((other, address)) = clash(port, ports.iter().take(at)) {
                let key = if port.addresses.contains(&address) { "addresses" } else { "mac" };
                problems.add(line, format!("{path}.{key}"), already(other, address));
            }
        }
    }
}

/// The first of `others` that has an address of `port`'s.
fn clash<'a>(
    port: &PortSpec,
    mut others: impl Iterator<Item = &'a PortSpec>,
) -> Option<(&'a PortSpec, StaticAddress)> {
    others.find_map(|other| Some((other, port.clash(other)?)))
}

fn already(port: &PortSpec, StaticAddress { mac, vlan }: StaticAddress) -> String {
    format!("{mac} in VLAN {vlan} is the address of port {} already, expected another", port.name)
}

/// Reports adapters without a switch, whose port's name is taken, or whose address another has. `line` finds the line of
/// a VM's adapter.
pub(super) fn check_vms(
    vms: &[VmSpec],
    switches: &[SwitchConfig],
    line: impl Fn(&str, usize) -> Option<usize>,
    problems: &Problems,
) {
    let mut ports = BTreeSet::new();
    for (vm, index, nic) in nics(vms) {
        let path = format!("vm.{}.nic[{index}]", vm.name);
        let port = port_name(&vm.name, &nic.name);
        let Some(switch) = switches.iter().find(|config| config.switch.name == nic.switch) else {
            let names: Vec<_> = switches.iter().map(|config| config.switch.name.as_str()).collect();
            let expected = match names.as_slice() {
                [] => "a [switch.NAME] table".to_owned(),
                names => format!("one of {}", names.join(", ")),
            };
            let near = suggestion(&nic.switch, names.iter().copied());
            let message = format!("there is no switch {}, expected {expected}{near}", quoted(&nic.switch));
            problems.add(line(&vm.name, index), format!("{path}.switch"), message);
            continue;
        };
        let taken = switch.ports.iter().any(|other| other.name == port);
        // Two VMs meet here if one is named `a` with an adapter `b.c`, the other `a.b` with an adapter `c`.
        if taken || !ports.insert((nic.switch.clone(), port.clone())) {
            let message = format!("switch {} has a port {port} already, expected another name", nic.switch);
            problems.add(line(&vm.name, index), format!("{path}.name"), message);
        }
    }
    check_addresses(vms, switches, line, problems);
}

/// Reports station addresses that an adapter and another adapter or port on its switch have.
pub(super) fn check_addresses(
    vms: &[VmSpec],
    switches: &[SwitchConfig],
    line: impl Fn(&str, usize) -> Option<usize>,
    problems: &Problems,
) {
    let mut known: BTreeMap<_, _> =
        switches.iter().map(|config| (config.switch.name.as_str(), config.ports.clone())).collect();
    for (vm, index, nic) in nics(vms) {
        // One that is none was reported where it was read.
        let Ok(port) = port(&vm.name, nic) else { continue };
        let others = known.entry(nic.switch.as_str()).or_default();
        if let Some((other, address)) = clash(&port, others.iter()) {
            let path = format!("vm.{}.nic[{index}].mac", vm.name);
            problems.add(line(&vm.name, index), path, already(other, address));
        }
        others.push(port);
    }
}

fn nics(vms: &[VmSpec]) -> impl Iterator<Item = (&VmSpec, usize, &NicSpec)> {
    vms.iter().flat_map(|vm| vm.nics.iter().enumerate().map(move |(index, nic)| (vm, index, nic)))
}
