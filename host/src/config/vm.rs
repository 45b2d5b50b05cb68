//! A VM's table, in the file and in a request alike.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;

use hypervisor::control::{Baseline, MAX_VCPUS, Memory, NicKind, Services};
use vswitch::spec::{PortSpec, VlanMode};

use super::attach::Source;
use super::field::{Field, Section, wide};
use super::names::{MAX_NAME, check_name};
use super::node::{Value, quoted};
use super::port::{self, address_limit, mtu, private, vlan};
use crate::vm::spec::{CpuSpec, LinkState, NicChange, NicSpec, RestartPolicy, VmChange, VmSpec, port_name};
use crate::vm::{MAX_NICS, identity};

pub(super) const VM_KEYS: &[&str] =
    &["memory", "vcpus", "kernel", "initrd", "cmdline", "nic", "cpu", "services", "restart", "autostart"];
pub(super) const MEMORY_KEYS: &[&str] = &["startup", "minimum", "maximum", "huge"];
pub(super) const CPU_KEYS: &[&str] = &["reserve", "limit", "weight", "pin", "baseline"];
pub(super) const SERVICE_KEYS: &[&str] =
    &["heartbeat", "shutdown", "time-sync", "kvp", "vss", "dynamic-memory"];
pub(super) const NIC_KEYS: &[&str] = &[
    "name",
    "switch",
    "type",
    "mac",
    "vlan",
    "private",
    "queues",
    "mtu",
    "mac-spoofing",
    "address-limit",
    "offloads",
    "coalesce",
    "link",
];
/// What may be changed of an adapter, besides its port.
pub(super) const NIC_CHANGE_KEYS: &[&str] = &["mac", "link"];
/// What may be changed while a VM runs.
pub(super) const CHANGE_KEYS: &[&str] = &["memory", "cpu"];
const CPU_CHANGE_KEYS: &[&str] = &["reserve", "limit", "weight"];

/// Memory comes in pieces of this many bytes.
const MEMORY_UNIT: u64 = 2 << 20;
/// A kernel needs some, and the switch maps no more (`vmbus::handover::MAX_MEMORY`): 32 MiB to 4 TiB.
pub(super) const MEMORY: RangeInclusive<u64> = 32 << 20..=4 << 40;
const MEMORY_EXPECTED: &str = "a size from \"32M\" to \"4T\", a multiple of \"2M\"";
const MEMORY_FORMS: &str =
    "a size such as \"512M\", or { startup = SIZE, minimum = SIZE, maximum = SIZE, huge = BOOL }";
/// `COMMAND_LINE_SIZE` of arch/x86/include/asm/setup.h, less its final zero.
const MAX_CMDLINE: usize = 2047;
/// The serial console, and an early word on it if the kernel does not get far.
const CMDLINE: &str = "console=ttyS0";
const PERCENT: RangeInclusive<i128> = 0..=100;

const KINDS: &[(&str, NicKind)] = &[("synthetic", NicKind::Synthetic), ("legacy", NicKind::Legacy)];
const RESTARTS: &[(&str, RestartPolicy)] = &[
    ("never", RestartPolicy::Never),
    ("on-crash", RestartPolicy::OnCrash),
    ("always", RestartPolicy::Always),
];
const LINKS: &[(&str, LinkState)] = &[("up", LinkState::Up), ("down", LinkState::Down)];

/// What a VM's table is read against.
#[derive(Debug, Clone, Copy)]
pub(super) struct Surroundings<'a> {
    /// Processors of the host.
    pub cpus: &'a [usize],
    pub source: Source<'a>,
}

/// Reads a VM.
pub(super) fn vm(name: &str, section: &Section<'_>, around: Surroundings<'_>) -> Option<VmSpec> {
    let memory = section.require("memory", MEMORY_FORMS).and_then(|field| memory(&field));
    let vcpus = section.get("vcpus").map_or(Some(1), |field| field.integer(1..=i128::from(MAX_VCPUS)));
    let kernel = section.require("kernel", "the path of a bzImage");
    let kernel = kernel.and_then(|field| around.source.path(&field));
    let initrd = section.get("initrd").map_or(Some(None), |field| around.source.path(&field).map(Some));
    let cmdline = section.get("cmdline").map_or(Some(CMDLINE.to_owned()), |field| cmdline(&field));
    let nics = section.get("nic").map_or(Some(Vec::new()), |field| nics(name, &field));
    // What could not be read does not bound what follows.
    let most = vcpus.unwrap_or(MAX_VCPUS);
    let cpu = section.get("cpu").map_or(Some(CpuSpec::default()), |field| cpu(&field, most, around.cpus));
    let services = section.get("services").map_or(Some(Services::default()), |field| services(&field));
    let restart =
        section.get("restart").map_or(Some(RestartPolicy::default()), |field| field.choice(RESTARTS));
    let autostart = section.get("autostart").map_or(Some(false), |field| field.boolean());
    Some(VmSpec {
        name: name.to_owned(),
        memory: memory?,
        vcpus: vcpus?,
        kernel: kernel?,
        initrd: initrd?,
        cmdline: cmdline?,
        nics: nics?,
        cpu: cpu?,
        services: services?,
        restart: restart?,
        autostart: autostart?,
    })
}

/// A number of bytes such as `"512M"`.
fn size(field: &Field<'_>) -> Option<u64> {
    let Value::Text(text) = &field.node.value else { return field.unexpected(MEMORY_EXPECTED) };
    let Some(bytes) = parse_size(text) else { return field.unexpected(MEMORY_EXPECTED) };
    if !MEMORY.contains(&bytes) {
        return field.refuse(format!("{} is out of range, expected {MEMORY_EXPECTED}", quoted(text)));
    }
    if bytes % MEMORY_UNIT != 0 {
        return field
            .refuse(format!("{} is no whole number of 2M, expected {MEMORY_EXPECTED}", quoted(text)));
    }
    Some(bytes)
}

/// Bytes of `512M`, `512MiB` or `536870912`.
fn parse_size(text: &str) -> Option<u64> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let shift = match unit.strip_suffix("iB").unwrap_or(unit) {
        "" if unit.is_empty() => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(1 << shift)
}

fn memory(field: &Field<'_>) -> Option<Memory> {
    match &field.node.value {
        Value::Text(_) => {
            let bytes = size(field)?;
            return Some(Memory { startup: bytes, minimum: bytes, maximum: bytes, huge: false });
        }
        Value::Table(_) => {}
        _ => return field.unexpected(MEMORY_FORMS),
    }
    let section = field.section(MEMORY_KEYS)?;
    let startup = section.require("startup", MEMORY_EXPECTED).and_then(|field| size(&field));
    let bound = |key| section.get(key).map_or(Some(startup), |field| size(&field).map(Some));
    let (minimum, maximum) = (bound("minimum"), bound("maximum"));
    let huge = section.get("huge").map_or(Some(false), |field| field.boolean());
    let (startup, minimum, maximum) = (startup?, minimum??, maximum??);
    if minimum > startup {
        let field = section.get("minimum")?;
        return field.refuse("is more than `startup`, expected at most that");
    }
    if maximum < startup {
        let field = section.get("maximum")?;
        return field.refuse("is less than `startup`, expected at least that");
    }
    let huge = huge?;
    if huge && minimum < maximum {
        let field = section.get("huge")?;
        return field.refuse(
            "is true with dynamic memory, expected false, or `minimum` and `maximum` equal to `startup`: huge pages cannot be given back in pieces",
        );
    }
    Some(Memory { startup, minimum, maximum, huge })
}

fn cmdline(field: &Field<'_>) -> Option<String> {
    const EXPECTED: &str = "a kernel command line";
    match &field.node.value {
        // No words at all are a command line too.
        Value::Text(text) if text.is_empty() => Some(String::new()),
        _ => match field.text(EXPECTED)? {
            text if text.len() > MAX_CMDLINE => field
                .refuse(format!("has {} bytes, expected {EXPECTED} of at most {MAX_CMDLINE}", text.len())),
            text => Some(text.to_owned()),
        },
    }
}

fn cpu(field: &Field<'_>, vcpus: u32, cpus: &[usize]) -> Option<CpuSpec> {
    let section = field.section(CPU_KEYS)?;
    let mut spec = CpuSpec::default();
    let change = shares(&section)?;
    spec.reserve = change.reserve.unwrap_or(spec.reserve);
    spec.limit = change.limit.unwrap_or(spec.limit);
    spec.weight = change.weight.unwrap_or(spec.weight);
    if spec.reserve > spec.limit {
        let field = section.get("reserve")?;
        return field.refuse(format!("is more than `limit`, expected at most {}", spec.limit));
    }
    if let Some(field) = section.get("pin") {
        spec.pin = pin(&field, vcpus, cpus)?;
    }
    if let Some(field) = section.get("baseline") {
        spec.baseline = Some(field.choice(Baseline::NAMED)?);
    }
    Some(spec)
}

/// What of `cpu` may change while the VM runs.
fn shares(section: &Section<'_>) -> Option<VmChange> {
    let read = |key: &str, range: RangeInclusive<i128>| {
        section.get(key).map_or(Some(None), |field| field.integer(range).map(Some))
    };
    let reserve = read("reserve", PERCENT);
    let limit = read("limit", 1..=100);
    let weight = read("weight", 1..=i128::from(CpuSpec::MAX_WEIGHT));
    Some(VmChange { memory: None, reserve: reserve?, limit: limit?, weight: weight? })
}

fn pin(field: &Field<'_>, vcpus: u32, cpus: &[usize]) -> Option<Vec<usize>> {
    let list: Vec<usize> = field.sequence(&(0..=super::MAX_CPU))?;
    if let Some((index, cpu)) = list.iter().enumerate().find(|(_, cpu)| !cpus.contains(cpu)) {
        let there = super::numbers(cpus);
        return field.refuse(format!("[{index}] is processor {cpu}, expected one of this machine's {there}"));
    }
    match list.len() {
        length if u32::try_from(length) == Ok(vcpus) => Some(list),
        length => field.refuse(format!(
            "{length} processors for {vcpus} virtual ones, expected one for each of `vcpus`"
        )),
    }
}

fn services(field: &Field<'_>) -> Option<Services> {
    let section = field.section(SERVICE_KEYS)?;
    let read = |key: &str| section.get(key).map_or(Some(true), |field| field.boolean());
    let (heartbeat, shutdown, time_sync) = (read("heartbeat"), read("shutdown"), read("time-sync"));
    let (kvp, vss, dynamic_memory) = (read("kvp"), read("vss"), read("dynamic-memory"));
    Some(Services {
        heartbeat: heartbeat?,
        shutdown: shutdown?,
        time_sync: time_sync?,
        kvp: kvp?,
        vss: vss?,
        dynamic_memory: dynamic_memory?,
    })
}

fn nics(vm: &str, field: &Field<'_>) -> Option<Vec<NicSpec>> {
    let items = field.items("a list of adapters, [[vm.NAME.nic]]")?;
    if items.len() > MAX_NICS {
        return field.refuse(format!("found {} adapters, expected at most {MAX_NICS}", items.len()));
    }
    let read: Vec<_> = items.iter().map(|item| nic(vm, item)).collect();
    let mut names = BTreeSet::new();
    for (item, nic) in items.iter().zip(&read) {
        if let Some(nic) = nic
            && !names.insert(nic.name.as_str())
        {
            item.refuse::<()>(format!("adapter {} is there twice, expected another name", nic.name));
        }
    }
    read.into_iter().collect()
}

/// Reads an adapter of `vm`.
pub(super) fn nic(vm: &str, field: &Field<'_>) -> Option<NicSpec> {
    let section = field.section(NIC_KEYS)?;
    let name = section.require("name", "a name").and_then(|field| nic_name(vm, &field));
    let switch = section.require("switch", "the name of a switch");
    let switch = switch.and_then(|field| field.text("the name of a switch"));
    let kind = section.get("type").map_or(Some(NicKind::Synthetic), |field| field.choice(KINDS));
    let mac = section.get("mac").map_or(Some(None), |field| field.mac().map(Some));
    let vlan = section.get("vlan").map_or(Some(VlanMode::Passthrough), |field| vlan(&field));
    let private = section.get("private").map_or(Some(None), |field| private(&field).map(Some));
    let queues = queues(&section, kind);
    let mtu = section.get("mtu").map_or(Some(PortSpec::MTU), |field| mtu(&field));
    let boolean = |key: &str, default| section.get(key).map_or(Some(default), |field| field.boolean());
    let (spoofing, offloads, coalesce) =
        (boolean("mac-spoofing", false), boolean("offloads", true), boolean("coalesce", true));
    let limit = section.get("address-limit").map_or(Some(None), |field| address_limit(&field));
    let link = section.get("link").map_or(Some(LinkState::Up), |field| field.choice(LINKS));
    let name = name?;
    let mac = mac?.unwrap_or_else(|| identity::mac(vm, &name));
    Some(NicSpec {
        name,
        switch: switch?.to_owned(),
        kind: kind?,
        mac: mac.to_string(),
        vlan: vlan?,
        private: private?,
        queues: queues?,
        mtu: mtu?,
        spoofing: spoofing?,
        address_limit: limit?,
        offloads: offloads?,
        coalesce: coalesce?,
        link: link?,
    })
}

/// The name of an adapter goes into that of its port.
fn nic_name(vm: &str, field: &Field<'_>) -> Option<String> {
    let Value::Text(name) = &field.node.value else { return field.unexpected("a name") };
    if let Err(message) = check_name(name) {
        return field.refuse(message);
    }
    let port = port_name(vm, name);
    match port.len() {
        0..=MAX_NAME => Some(name.clone()),
        length => field.refuse(format!(
            "the adapter's port would be named {}, which has {length} bytes, expected at most {MAX_NAME}",
            quoted(&port)
        )),
    }
}

fn queues(section: &Section<'_>, kind: Option<NicKind>) -> Option<u16> {
    let Some(field) = section.get("queues") else { return Some(1) };
    let queues = field.integer(wide(PortSpec::QUEUES_RANGE))?;
    if queues > 1 && kind == Some(NicKind::Legacy) {
        return field.refuse(format!("{queues} is too many for a legacy adapter, expected 1"));
    }
    Some(queues)
}

/// Reads a request to change a VM while it lives.
pub(super) fn change(section: &Section<'_>) -> Option<VmChange> {
    let memory = section.get("memory").map_or(Some(None), |field| size(&field).map(Some));
    let change = match section.get("cpu") {
        Some(field) => field.section(CPU_CHANGE_KEYS).and_then(|section| shares(&section)),
        None => Some(VmChange::default()),
    };
    Some(VmChange { memory: memory?, ..change? })
}

/// Reads a request to change an adapter.
pub(super) fn nic_change(section: &Section<'_>) -> NicChange {
    NicChange {
        mac: section.get("mac").and_then(|field| field.mac()),
        link: section.get("link").and_then(|field| field.choice(LINKS)),
        port: port::change(section),
    }
}
