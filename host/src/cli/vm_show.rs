//! The tables of `yard vm`.

use std::fmt::Write;

use super::model::{NicStatus, Vm};
use super::table::{Cell, Ink, Table, plain, short_count};

/// A VM's state in its colour.
fn state_ink(state: &str) -> Ink {
    match state {
        "running" => Ink::Good,
        "crashed" => Ink::Bad,
        "off" => Ink::Plain,
        _ => Ink::Warn,
    }
}

fn heartbeat_cell(vm: &Vm) -> Cell {
    let ink = match vm.guest.heartbeat.as_str() {
        "ok" => Ink::Good,
        "lost" | "error" => Ink::Bad,
        _ => Ink::Plain,
    };
    match vm.pid {
        Some(_) => Cell::text(&vm.guest.heartbeat).ink(ink),
        None => Cell::text("-"),
    }
}

/// Bytes as an operator writes them.
fn size(bytes: u64) -> String {
    match bytes {
        bytes if bytes >= 1 << 30 && bytes % (1 << 30) == 0 => format!("{}G", bytes >> 30),
        bytes => format!("{}M", bytes >> 20),
    }
}

/// `3d 4h`, `4h 5m`, `5m 6s`.
fn duration(seconds: f64) -> String {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates at both ends")]
    let seconds = seconds as u64;
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m {}s", seconds % 60),
        (0, _, _) => format!("{hours}h {}m", minutes % 60),
        _ => format!("{days}d {}h", hours % 24),
    }
}

/// VMs, one a line.
pub fn list(vms: &[Vm], colour: bool) -> String {
    if vms.is_empty() {
        return "No virtual machines. `yard vm define FILE` makes some.\n".into();
    }
    let mut table = Table::new(&["VM", "STATE", "HEARTBEAT", "MEMORY", "VCPUS", "UPTIME", "ADDRESSES"]);
    for vm in vms {
        let memory = vm.memory.assigned.unwrap_or(vm.memory.startup);
        table.row([
            Cell::text(&vm.name),
            Cell::text(&vm.state).ink(state_ink(&vm.state)),
            heartbeat_cell(vm),
            Cell::number(size(memory)),
            Cell::number(vm.vcpus),
            Cell::number(vm.uptime.map_or_else(|| "-".into(), duration)),
            Cell::text(vm.guest.addresses.join(" ")),
        ]);
    }
    table.render("", colour)
}

/// What needs attention of all VMs: name, word, ink and text, the gravest first.
pub fn attention(vms: &[Vm]) -> Vec<(u8, String, &'static str, Ink, String)> {
    let mut rows = Vec::new();
    for vm in vms {
        let name = || format!("vm {}", vm.name);
        let reason = vm.reason.clone().unwrap_or_default();
        match vm.state.as_str() {
            "crashed" => {
                let text = format!("{reason} (`yard vm reset {}` or `stop` ends this)", vm.name);
                rows.push((0, name(), "crashed", Ink::Bad, text));
            }
            "waiting" => rows.push((1, name(), "restarts", Ink::Warn, reason)),
            "off" if !reason.is_empty() => rows.push((1, name(), "ended", Ink::Warn, reason)),
            _ if !reason.is_empty() => rows.push((1, name(), "error", Ink::Warn, reason)),
            _ => {}
        }
        for fault in &vm.faults {
            let text = format!("{}: {}", fault.device, fault.reason);
            rows.push((0, name(), "fault", Ink::Bad, text));
        }
        if matches!(vm.guest.heartbeat.as_str(), "lost" | "error") && vm.state == "running" {
            rows.push((0, name(), "heartbeat", Ink::Bad, vm.guest.heartbeat.clone()));
        }
        for nic in vm.nics.iter().filter(|nic| nic.link == "down") {
            let text =
                format!("adapter {0} (`yard vm nic set {1} {0} --link up` plugs it in)", nic.name, vm.name);
            rows.push((2, name(), "link down", Ink::Plain, text));
        }
        rows.extend(vm.warnings.iter().map(|text| (2, name(), "warning", Ink::Warn, text.clone())));
    }
    rows
}

fn worker(vm: &Vm) -> String {
    let user = vm.user.map(|user| format!(", user {user}")).unwrap_or_default();
    vm.pid.map(|pid| format!("process {pid}{user}")).unwrap_or_default()
}

/// Everything about one VM.
pub fn machine(vm: &Vm, colour: bool) -> String {
    let mut out = String::new();
    let _ = writeln!(out, "{}", Ink::Bold.paint(&plain(&vm.name), colour));
    let reason = vm.reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default();
    let changed = if vm.changed { " (defined anew since: the next start takes it)" } else { "" };
    let lines = [
        ("state", format!("{}{reason}{changed}", vm.state)),
        ("uptime", vm.uptime.map(duration).unwrap_or_default()),
        ("heartbeat", if vm.pid.is_some() { vm.guest.heartbeat.clone() } else { String::new() }),
        ("guest", guest(vm)),
        ("addresses", vm.guest.addresses.join(", ")),
        ("memory", memory(vm)),
        ("processors", processors(vm)),
        ("restart", restart(vm)),
        ("vmbus", vm.vmbus.clone().unwrap_or_default()),
        ("services", pairs(&vm.guest.services)),
        ("frozen", if vm.guest.frozen { "yes".into() } else { String::new() }),
        ("panic", panic(vm)),
        ("kernel", vm.kernel.clone()),
        ("initrd", vm.initrd.clone().unwrap_or_default()),
        ("cmdline", vm.cmdline.clone()),
        ("directory", vm.directory.clone()),
        ("worker", worker(vm)),
        ("cgroup", vm.cpu.cgroup.clone().unwrap_or_default()),
    ];
    for (key, value) in lines.iter().filter(|(_, value)| !value.is_empty()) {
        let _ = writeln!(out, "  {key:<11} {}", plain(value));
    }
    for warning in &vm.warnings {
        let _ = writeln!(out, "  {:<11} {}", Ink::Warn.paint("warning", colour), plain(warning));
    }
    out.push_str(&nics(&vm.nics, colour));
    out.push_str(&faults(vm, colour));
    out.push_str(&exits(vm, colour));
    out
}

fn guest(vm: &Vm) -> String {
    let guest = &vm.guest;
    let named = [&guest.os, &guest.version].into_iter().flatten().map(String::as_str);
    let named = named.collect::<Vec<_>>().join(" ");
    match &guest.hostname {
        Some(name) if named.is_empty() => name.clone(),
        Some(name) => format!("{named}, {name}"),
        None => named,
    }
}

fn memory(vm: &Vm) -> String {
    let memory = &vm.memory;
    let mut text = size(memory.assigned.unwrap_or(memory.startup));
    if memory.minimum != memory.maximum {
        let _ = write!(text, " of {} to {}", size(memory.minimum), size(memory.maximum));
    }
    if let Some(dynamic) = &memory.dynamic {
        let (committed, available) = (size(dynamic.committed), size(dynamic.available));
        let _ = write!(text, ", guest wants {committed}, has {available} free");
    }
    if memory.huge {
        text.push_str(", huge pages");
    }
    text
}

fn processors(vm: &Vm) -> String {
    let cpu = &vm.cpu;
    let mut text = format!("{}, weight {}", vm.vcpus, cpu.weight);
    if cpu.limit < 100 {
        let _ = write!(text, ", limit {} %", cpu.limit);
    }
    if cpu.reserve > 0 {
        let _ = write!(text, ", reserve {} %", cpu.reserve);
    }
    if !cpu.pin.is_empty() {
        let _ = write!(text, ", pinned to {:?}", cpu.pin);
    }
    if !cpu.allowed.is_empty() {
        let _ = write!(text, ", kept to {:?}", cpu.allowed);
    }
    if let Some(baseline) = &cpu.baseline {
        let _ = write!(text, ", as {baseline}");
    }
    text
}

fn restart(vm: &Vm) -> String {
    match vm.restarts {
        0 => vm.restart.clone(),
        1 => format!("{}, once so far", vm.restart),
        count => format!("{}, {count} times so far", vm.restart),
    }
}

fn panic(vm: &Vm) -> String {
    let Some(panic) = &vm.panic else { return String::new() };
    let registers: Vec<_> = panic.parameters.iter().map(|register| format!("{register:#x}")).collect();
    let log = panic.log.as_deref().and_then(|log| log.lines().rev().find(|line| !line.trim().is_empty()));
    match log {
        Some(line) => format!("{} ({line})", registers.join(" ")),
        None => registers.join(" "),
    }
}

fn pairs(pairs: &[(String, String)]) -> String {
    pairs.iter().map(|(name, value)| format!("{name} {value}")).collect::<Vec<_>>().join(", ")
}

fn nics(nics: &[NicStatus], colour: bool) -> String {
    let mut table = Table::new(&["NIC", "TYPE", "PORT", "MAC", "MTU", "LINK", "CHANNELS", "SERVED"]);
    for nic in nics {
        table.row([
            Cell::text(&nic.name),
            Cell::text(&nic.kind),
            Cell::text(format!("{}/{}", nic.switch, nic.port)),
            Cell::text(&nic.mac),
            Cell::number(nic.mtu),
            Cell::text(&nic.link).ink(if nic.link == "down" { Ink::Warn } else { Ink::Plain }),
            Cell::number(format!("{} of {}", nic.channels, nic.queues)),
            Cell::text(if nic.connected { "yes" } else { "no" }),
        ]);
    }
    if table.is_empty() { String::new() } else { format!("\n{}", table.render("  ", colour)) }
}

fn faults(vm: &Vm, colour: bool) -> String {
    let mut table = Table::new(&["FAULT", "REASON"]);
    for fault in &vm.faults {
        table.row([Cell::text(&fault.device).ink(Ink::Bad), Cell::text(&fault.reason)]);
    }
    if table.is_empty() { String::new() } else { format!("\n{}", table.render("  ", colour)) }
}

fn exits(vm: &Vm, colour: bool) -> String {
    let mut table = Table::new(&["EXIT", "COUNT"]);
    for exit in &vm.exits {
        table.row([Cell::text(&exit.kind), Cell::number(short_count(exit.count))]);
    }
    if table.is_empty() { String::new() } else { format!("\n{}", table.render("  ", colour)) }
}

/// What the guest tells, by key.
pub fn values(vm: &Vm, colour: bool) -> String {
    let mut table = Table::new(&["KEY", "VALUE"]);
    for (key, value) in &vm.guest.values {
        table.row([Cell::text(key), Cell::text(value)]);
    }
    if table.is_empty() { "The guest tells nothing.\n".into() } else { table.render("", colour) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_durations_are_short() {
        assert_eq!([size(512 << 20), size(2 << 30), size(1536 << 20)], ["512M", "2G", "1536M"]);
        let shown = [0.9, 59.0, 61.0, 3700.0, 90_000.0].map(duration);
        assert_eq!(shown, ["0s", "59s", "1m 1s", "1h 1m", "1d 1h"]);
    }
}
