//! The configuration file `switchyard.toml`, and the same grammar as JSON for requests to the API.
//!
//! A text becomes a tree that knows its lines (`node`), which is read key by key (`field`); whatever is wrong goes to
//! one list (`problem`), so that an operator sees every mistake at once, each with file, line, key, what was found and
//! what was expected. [`mod@reference`] describes every key and makes the manual page.

mod attach;
mod conflicts;
mod field;
mod names;
mod node;
mod port;
mod problem;
pub mod reference;
mod switch;
#[cfg(test)]
mod tests;
mod vm;

use std::path::{Path, PathBuf};
use std::time::Duration;

use vmq::Mac;
use vmq::filter::MAX_VLAN;
use vswitch::fabric::{PortChange, WorkersSpec};
use vswitch::spec::{PortSpec, SwitchKind};

use crate::vm::spec::{NicChange, NicSpec, VmChange, VmSpec};

use attach::{Source, socket_path};
use field::{Field, Section};
use node::{Node, Value};
use problem::Problems;

pub use names::{MAX_DEVICE, MAX_NAME, MAX_SOCKET_PATH, check_device, check_name};
pub use problem::{ConfigError, Problem};
pub use switch::{HOST_PORT, SwitchConfig, UPLINK_PORT};

/// Where the daemon listens unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/switchyard/yardd.sock";
/// Where the configuration is unless told otherwise.
pub const DEFAULT_FILE: &str = "/etc/switchyard/switchyard.toml";
/// A longer file is no configuration, in bytes.
pub const MAX_FILE: u64 = 16 << 20;
/// Highest processor number that Linux can have.
const MAX_CPU: i128 = 8191;
/// Range of `workers.idle` in microseconds.
const IDLE: std::ops::RangeInclusive<i128> = 0..=1_000_000;

const FILE_KEYS: &[&str] = &["workers", "api", "switch", "vm"];
const WORKERS_KEYS: &[&str] = &["cpus", "idle", "preempt", "balance"];
const API_KEYS: &[&str] = &["socket"];

/// A whole configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The processors that switch.
    pub workers: WorkersSpec,
    /// Socket of the API.
    pub socket: PathBuf,
    /// Switches in the order of the file.
    pub switches: Vec<SwitchConfig>,
    /// Virtual machines in the order of the file.
    pub vms: Vec<VmSpec>,
}

/// What of the host the configuration is checked against.
#[derive(Debug, Clone)]
pub struct Machine {
    /// Numbers of the processors that are there, ascending.
    pub cpus: Vec<usize>,
}

impl Machine {
    /// This machine, as `/sys/devices/system/cpu/online` describes it.
    pub fn this() -> Self {
        let online = std::fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default();
        let cpus: Vec<usize> = online
            .trim()
            .split(',')
            .filter_map(|part| {
                let (first, last) = part.split_once('-').unwrap_or((part, part));
                Some(first.parse::<usize>().ok()?..=last.parse().ok()?)
            })
            .flatten()
            .collect();
        if cpus.is_empty() { Self { cpus: vec![0] } } else { Self { cpus } }
    }
}

/// Reads the file at `path`.
///
/// # Errors
/// Every mistake in it; or the one reason why it cannot be read.
pub fn load(path: &Path, machine: &Machine) -> Result<Config, ConfigError> {
    let (name, text) = read_text(path)?;
    let directory = path.parent().unwrap_or(Path::new(""));
    parse(&name, &text, directory, machine)
}

/// A file's name for errors, and its text.
fn read_text(path: &Path) -> Result<(String, String), ConfigError> {
    use std::io::Read;
    let name = path.display().to_string();
    let unreadable = |reason: String| ConfigError {
        file: Some(name.clone()),
        problems: vec![Problem { line: None, key: String::new(), message: reason }],
    };
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(|error| unreadable(format!("cannot be read: {error}")))?;
    file.take(MAX_FILE + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| unreadable(format!("cannot be read: {error}")))?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(unreadable(format!("is longer than {MAX_FILE} bytes, expected a configuration")));
    }
    let text = String::from_utf8(bytes).map_err(|error| {
        unreadable(format!("is not UTF-8 at byte {}, expected a text", error.utf8_error().valid_up_to()))
    })?;
    Ok((name, text))
}

/// Reads a configuration's text; `file` is its name in errors, relative paths are taken from `directory`.
///
/// # Errors
/// Every mistake in it.
pub fn parse(file: &str, text: &str, directory: &Path, machine: &Machine) -> Result<Config, ConfigError> {
    let problems = Problems::default();
    let tree = Node::from_toml(text)
        .map_err(|problem| ConfigError { file: Some(file.to_owned()), problems: vec![problem] })?;
    let config = Field::root(&tree, &problems)
        .section(FILE_KEYS)
        .and_then(|root| whole(&root, Source::File(directory), machine, &problems));
    problems.finish(Some(file), config)
}

fn whole(root: &Section<'_>, source: Source<'_>, machine: &Machine, problems: &Problems) -> Option<Config> {
    let workers = workers(root.get("workers").as_ref(), machine);
    let socket = root.get("api").map_or(Some(None), |field| api_socket(&field, source).map(Some));
    let mut switches = Vec::new();
    let table = root.get("switch").map(|field| field.entries("a table of switches by name"));
    let table = table.flatten();
    for (name, field) in table.iter().flat_map(Section::fields) {
        if let Err(message) = check_name(name) {
            field.refuse::<()>(message);
        }
        let section = field.section(switch::SWITCH_KEYS);
        // Without knowing the workers, pins are checked against the machine.
        let cpus = workers.as_ref().map_or(&machine.cpus, |workers| &workers.cpus);
        switches.extend(section.and_then(|section| switch::switch(name, &section, cpus, source)));
    }
    let machines = root.get("vm").map(|field| field.entries("a table of virtual machines by name"));
    let machines = machines.flatten();
    let around = vm::Surroundings { cpus: &machine.cpus, source };
    let vms =
        machines.iter().flat_map(Section::fields).filter_map(|(name, field)| named_vm(name, &field, around));
    let vms: Vec<_> = vms.collect();
    let socket = socket?.unwrap_or_else(|| DEFAULT_SOCKET.into());
    let line = |switch: &str, port: &str| {
        let switch = table.as_ref()?.get(switch)?;
        let named = switch.entries("").and_then(|switch| switch.get("port")?.entries("")?.get(port));
        named.map_or(switch.node.line, |port| port.node.line)
    };
    conflicts::check(&switches, &socket, line, problems);
    let nic = |vm: &str, index: usize| {
        let nics = machines.as_ref()?.get(vm)?.entries("")?.get("nic")?.items("")?;
        nics.get(index).and_then(|nic| nic.node.line)
    };
    conflicts::check_vms(&vms, &switches, nic, problems);
    Some(Config { workers: workers?, socket, switches, vms })
}

/// A VM under its name.
fn named_vm(name: &str, field: &Field<'_>, around: vm::Surroundings<'_>) -> Option<VmSpec> {
    if let Err(message) = check_name(name) {
        field.refuse::<()>(message);
    }
    vm::vm(name, &field.section(vm::VM_KEYS)?, around)
}

fn workers(field: Option<&Field<'_>>, machine: &Machine) -> Option<WorkersSpec> {
    // Processor 0 serves most interrupts: the last one is the quietest.
    let last = machine.cpus.last().copied().into_iter().collect();
    let mut spec = WorkersSpec { cpus: last, idle: WorkersSpec::IDLE, preempt: false, balance: true };
    let Some(section) = field.map(|field| field.section(WORKERS_KEYS)) else { return Some(spec) };
    let section = section?;
    if let Some(idle) = section.get("idle") {
        spec.idle = idle.integer(IDLE).map_or(spec.idle, Duration::from_micros);
    }
    if let Some(preempt) = section.get("preempt") {
        spec.preempt = preempt.boolean().unwrap_or(spec.preempt);
    }
    if let Some(balance) = section.get("balance") {
        spec.balance = balance.boolean().unwrap_or(spec.balance);
    }
    if let Some(field) = section.get("cpus") {
        spec.cpus = field.set(&(0..=MAX_CPU))?;
        if let Some(absent) = spec.cpus.iter().find(|cpu| !machine.cpus.contains(cpu)) {
            let there = numbers(&machine.cpus);
            return field
                .refuse(format!("processor {absent} is not on this machine, expected some of {there}"));
        }
    }
    Some(spec)
}

/// `0-3,5`.
fn numbers(sorted: &[usize]) -> String {
    let runs = sorted.chunk_by(|a, b| a + 1 == *b).map(|run| match run {
        [first, .., last] => format!("{first}-{last}"),
        _ => run.first().map(usize::to_string).unwrap_or_default(),
    });
    runs.collect::<Vec<_>>().join(",")
}

fn api_socket(field: &Field<'_>, source: Source<'_>) -> Option<PathBuf> {
    let section = field.section(API_KEYS)?;
    match section.get("socket") {
        Some(field) => socket_path(&field, source),
        None => Some(DEFAULT_SOCKET.into()),
    }
}

/// Reads a request for a switch: the table's grammar with a `name`.
///
/// # Errors
/// Every mistake in it.
pub fn switch_request(json: serde_json::Value, cpus: &[usize]) -> Result<SwitchConfig, ConfigError> {
    let problems = Problems::default();
    let tree = Node::from_json(json);
    let keys = [&["name"], switch::SWITCH_KEYS].concat();
    let root = Field::root(&tree, &problems).section(&keys);
    let config = root.and_then(|section| {
        let name = request_name(&section);
        let config = switch::switch(name.unwrap_or("switch"), &section, cpus, Source::Request);
        name.and(config)
    });
    if let Some(config) = &config {
        conflicts::check(std::slice::from_ref(config), Path::new(""), |_, _| None, &problems);
    }
    problems.finish(None, config)
}

/// Reads a request for a port of a switch of `kind`: the table's grammar with a `name`.
///
/// # Errors
/// Every mistake in it.
pub fn port_request(
    json: serde_json::Value,
    kind: SwitchKind,
    cpus: &[usize],
) -> Result<PortSpec, ConfigError> {
    let problems = Problems::default();
    let tree = Node::from_json(json);
    let keys = [&["name"], port::PORT_KEYS].concat();
    let root = Field::root(&tree, &problems).section(&keys);
    let spec = root.and_then(|section| {
        let name = request_name(&section);
        let around = port::Surroundings { kind, cpus, source: Source::Request };
        let spec = port::port(name.unwrap_or("port"), &section, around);
        name.and(spec)
    });
    problems.finish(None, spec)
}

fn request_name<'a>(section: &Section<'a>) -> Option<&'a str> {
    let field = section.require("name", "a name")?;
    let Value::Text(name) = &field.node.value else { return field.unexpected("a name") };
    match check_name(name) {
        Ok(()) => Some(name),
        Err(message) => field.refuse(message),
    }
}

/// Reads a request to change a port: what of the table may change while it runs.
///
/// # Errors
/// Every mistake in it.
pub fn change_request(json: serde_json::Value) -> Result<PortChange, ConfigError> {
    let why = "the port exists, expected to remove the port and add it again";
    change_of(json, (port::PORT_KEYS, port::CHANGE_KEYS), why, |section| Some(port::change(section)))
}

/// Reads a request to change an adapter of a VM.
///
/// # Errors
/// Every mistake in it.
pub fn nic_change_request(json: serde_json::Value) -> Result<NicChange, ConfigError> {
    let all = [port::PORT_KEYS, &["name", "switch", "type", "queues"]].concat();
    let keys = [vm::NIC_CHANGE_KEYS, port::CHANGE_KEYS].concat();
    let why = "the adapter exists, expected to remove it and add it again";
    change_of(json, (&all, &keys), why, |section| Some(vm::nic_change(section)))
}

/// Reads a change: of `keys.0`, only those in `keys.1` can change; `why` the others cannot, and what to do.
fn change_of<T>(
    json: serde_json::Value,
    (all, keys): (&[&'static str], &[&'static str]),
    why: &str,
    read: impl FnOnce(&Section<'_>) -> Option<T>,
) -> Result<T, ConfigError> {
    let problems = Problems::default();
    let tree = Node::from_json(json);
    let root = Field::root(&tree, &problems);
    let fixed = |key: &&str| all.contains(key) && !keys.contains(key);
    let change = root.entries("a table of what is to change").and_then(|entries| {
        let mut refused = false;
        for (_, field) in entries.fields().filter(|(key, _)| fixed(key)) {
            refused = true;
            field.refuse::<()>(format!("cannot change while {why}"));
        }
        if refused { None } else { root.section(keys).and_then(|section| read(&section)) }
    });
    problems.finish(None, change)
}

/// Reads a request for a VM: the table's grammar with a `name`, on a host with the processors `cpus`.
///
/// # Errors
/// Every mistake in it.
pub fn vm_request(json: serde_json::Value, cpus: &[usize]) -> Result<VmSpec, ConfigError> {
    let problems = Problems::default();
    let tree = Node::from_json(json);
    let keys = [&["name"], vm::VM_KEYS].concat();
    let root = Field::root(&tree, &problems).section(&keys);
    let spec = root.and_then(|section| {
        let name = request_name(&section);
        let around = vm::Surroundings { cpus, source: Source::Request };
        let spec = vm::vm(name.unwrap_or("vm"), &section, around);
        name.and(spec)
    });
    if let Some(spec) = &spec {
        conflicts::check_addresses(std::slice::from_ref(spec), &[], |_, _| None, &problems);
    }
    problems.finish(None, spec)
}

/// Reads a request for an adapter of `vm`: an item of the table's `nic`.
///
/// # Errors
/// Every mistake in it.
pub fn nic_request(json: serde_json::Value, vm: &str) -> Result<NicSpec, ConfigError> {
    let problems = Problems::default();
    let tree = Node::from_json(json);
    let nic = vm::nic(vm, &Field::root(&tree, &problems));
    problems.finish(None, nic)
}

/// Reads a request to change a VM while it lives.
///
/// # Errors
/// Every mistake in it.
pub fn vm_change_request(json: serde_json::Value) -> Result<VmChange, ConfigError> {
    let why = "the VM is defined, expected to delete it and define it again";
    change_of(json, (vm::VM_KEYS, vm::CHANGE_KEYS), why, vm::change)
}

/// Reads the VMs of a file that defines nothing else, each as the request that defines it. Paths become absolute.
///
/// # Errors
/// Every mistake in it; or the one reason why it cannot be read.
pub fn vm_definitions(path: &Path, machine: &Machine) -> Result<Vec<serde_json::Value>, ConfigError> {
    let directory = std::path::absolute(path).ok();
    let directory = directory.as_deref().and_then(Path::parent).unwrap_or(Path::new("/"));
    let (name, text) = read_text(path)?;
    let problems = Problems::default();
    let tree = Node::from_toml(&text)
        .map_err(|problem| ConfigError { file: Some(name.clone()), problems: vec![problem] })?;
    let root = Field::root(&tree, &problems).section(&["vm"]);
    let requests = root.and_then(|root| {
        let machines =
            root.require("vm", "[vm.NAME] tables")?.entries("a table of virtual machines by name")?;
        let around = vm::Surroundings { cpus: &machine.cpus, source: Source::File(directory) };
        let read = machines.fields().map(|(name, field)| {
            let spec = named_vm(name, &field, around)?;
            let mut request = field.node.to_json();
            let object = request.as_object_mut()?;
            object.insert("name".into(), name.into());
            object.insert("kernel".into(), spec.kernel.to_str()?.into());
            if let Some(initrd) = &spec.initrd {
                object.insert("initrd".into(), initrd.to_str()?.into());
            }
            Some(request)
        });
        // All are read before the first mistake counts.
        read.collect::<Vec<_>>().into_iter().collect()
    });
    problems.finish(Some(&name), requests)
}

/// Reads a request to pin a queue: `{"cpu": N}`, or `{"cpu": null}` to leave it to the placement.
///
/// # Errors
/// Every mistake in it.
pub fn pin_request(json: serde_json::Value) -> Result<Option<usize>, ConfigError> {
    let problems = Problems::default();
    let tree = Node::from_json(json);
    let cpu = Field::root(&tree, &problems).section(&["cpu"]).and_then(|section| {
        let field = section.require("cpu", "a processor number or null")?;
        match field.node.value {
            Value::Null => Some(None),
            _ => field.integer(0..=MAX_CPU).map(Some),
        }
    });
    problems.finish(None, cpu)
}

/// A static address that a request names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddressRequest {
    /// Port behind which it is.
    pub port: String,
    /// The address.
    pub mac: Mac,
    /// Its VLAN, 0 for none.
    pub vlan: u16,
}

/// Reads a request for a static address: `{"mac": MAC, "vlan": VLAN, "port": NAME}`.
///
/// # Errors
/// Every mistake in it.
pub fn address_request(json: serde_json::Value) -> Result<AddressRequest, ConfigError> {
    let problems = Problems::default();
    let tree = Node::from_json(json);
    let root = Field::root(&tree, &problems).section(&["mac", "vlan", "port"]);
    let request = root.and_then(|section| {
        let mac = section.require("mac", "a MAC address").and_then(|field| field.mac());
        let vlan = section.get("vlan").map_or(Some(0), |field| field.integer(0..=i128::from(MAX_VLAN)));
        let port =
            section.require("port", "the name of a port").and_then(|field| field.text("the name of a port"));
        Some(AddressRequest { port: port?.to_owned(), mac: mac?, vlan: vlan? })
    });
    problems.finish(None, request)
}
