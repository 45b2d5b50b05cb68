//! The tables of `show`, `list` and their kin.

use std::fmt::Write;

use vswitch::report::FabricReport;

use super::model::{Addresses, Port, Report, Switch, Version, reason_text};
use super::table::{Cell, Ink, Table, percent, plain, short_count};
use super::vm_show;

/// A port's state in its colour.
pub fn state_cell(port: &Port) -> Cell {
    let ink = match port.state.as_str() {
        "up" => Ink::Good,
        "waiting" => Ink::Warn,
        "faulted" => Ink::Bad,
        _ => Ink::Plain,
    };
    Cell::text(&port.state).ink(ink)
}

/// Everything on one screen, what needs attention first.
pub fn everything(version: &Version, socket: &str, report: &Report, colour: bool) -> String {
    let mut out = format!("yardd {} at {}\n\n", plain(&version.version), plain(socket));
    out.push_str(&faults(report, colour));
    out.push_str(&workers(report, colour));
    for switch in &report.switches {
        let _ = write!(out, "\n{}", switch_table(switch, colour));
    }
    if report.switches.is_empty() {
        out.push_str("\nNo switches. `yard switch add NAME` makes one.\n");
    }
    if !report.vms.is_empty() {
        let _ = write!(out, "\n{}", vm_show::list(&report.vms, colour));
    }
    out
}

/// Every fault, then every port that waits for something.
fn faults(report: &Report, colour: bool) -> String {
    let mut rows = Vec::new();
    for (switch, port) in ports(report) {
        let name = format!("{}/{}", switch.name, port.name);
        match port.state.as_str() {
            "faulted" => {
                let text = format!("{} (`yard port restart {name}` tries again)", port.reason);
                rows.push((0, name.clone(), "faulted", Ink::Bad, text));
            }
            "waiting" => rows.push((2, name.clone(), "waiting", Ink::Warn, port.reason.clone())),
            _ => {}
        }
        if let Some(error) = &port.last_error {
            rows.push((1, name, "error", Ink::Warn, error.clone()));
        }
    }
    rows.extend(vm_show::attention(&report.vms));
    let warnings = report.warnings.iter();
    rows.extend(warnings.map(|text| (2, "host".into(), "warning", Ink::Warn, text.clone())));
    rows.sort_by_key(|&(gravity, ..)| gravity);
    let mut table = Table::new(&["ATTENTION", "", ""]);
    for (_, name, what, ink, text) in rows {
        table.row([Cell::text(name), Cell::text(what).ink(ink), Cell::text(text)]);
    }
    if table.is_empty() { "No faults.\n\n".to_owned() } else { format!("{}\n", table.render("", colour)) }
}

fn workers(report: &Report, colour: bool) -> String {
    let mut table = Table::new(&["CPU", "WORKER", "QUEUES", "LOAD", "SLEEPS"]);
    for worker in &report.workers {
        table.row([
            Cell::number(worker.cpu),
            Cell::text(&worker.state),
            Cell::number(worker.queues),
            Cell::number(percent(worker.load_permille)),
            Cell::number(short_count(worker.sleeps)),
        ]);
    }
    table.render("", colour)
}

fn switch_table(switch: &Switch, colour: bool) -> String {
    let head = format!("switch {}", plain(&switch.name));
    format!(
        "{}: {}, {} of {} addresses\n{}",
        Ink::Bold.paint(&head, colour),
        plain(&switch.kind),
        switch.addresses,
        switch.capacity,
        port_table(std::iter::once(switch), false, colour)
    )
}

/// All ports of a report with their switches.
pub fn ports(report: &Report) -> impl Iterator<Item = (&Switch, &Port)> {
    report.switches.iter().flat_map(|switch| switch.ports.iter().map(move |port| (switch, port)))
}

/// Ports of `switches`; with `full` names if several switches are shown in one table.
pub fn port_table<'a>(switches: impl IntoIterator<Item = &'a Switch>, full: bool, colour: bool) -> String {
    let mut table =
        Table::new(&["PORT", "KIND", "STATE", "QUEUES", "VLAN", "MTU", "IN", "OUT", "DROPPED", "ATTACHED"]);
    for switch in switches {
        for port in &switch.ports {
            let name = if full { format!("{}/{}", switch.name, port.name) } else { port.name.clone() };
            let dropped = port.received.dropped() + port.sent.dropped();
            table.row([
                Cell::text(name),
                Cell::text(&port.kind),
                state_cell(port),
                Cell::number(port.queues.len()),
                Cell::text(&port.vlan),
                Cell::number(port.mtu),
                Cell::number(short_count(port.received.frames)),
                Cell::number(short_count(port.sent.frames)),
                Cell::number(short_count(dropped)).ink(if dropped > 0 { Ink::Warn } else { Ink::Plain }),
                Cell::text(&port.attached),
            ]);
        }
    }
    if table.is_empty() { "  no ports\n".into() } else { table.render("  ", colour) }
}

/// Switches, one a line.
pub fn switch_list(switches: &[Switch], colour: bool) -> String {
    let mut table = Table::new(&["SWITCH", "TYPE", "PORTS", "ADDRESSES", "MOST"]);
    for switch in switches {
        table.row([
            Cell::text(&switch.name),
            Cell::text(&switch.kind),
            Cell::number(switch.ports.len()),
            Cell::number(switch.addresses),
            Cell::number(switch.capacity),
        ]);
    }
    table.render("", colour)
}

/// Everything about one port.
pub fn port(switch: &str, port: &Port, colour: bool) -> String {
    let mut out = String::new();
    let name = format!("{}/{}", plain(switch), plain(&port.name));
    let _ = writeln!(out, "{}", Ink::Bold.paint(&name, colour));
    let reason = if port.reason.is_empty() { String::new() } else { format!(": {}", port.reason) };
    let lines = [
        ("state", format!("{}{reason}", port.state)),
        ("last error", port.last_error.clone().unwrap_or_default()),
        ("attached", format!("{} {}", port.kind, port.attached)),
        ("mtu", port.mtu.to_string()),
        ("mac", port.mac.clone().unwrap_or_default()),
        ("vlan", port.vlan.clone()),
        ("features", port.features.join(", ")),
    ];
    for (key, value) in lines.iter().filter(|(_, value)| !value.is_empty()) {
        let _ = writeln!(out, "  {key:<11} {}", plain(value));
    }
    out.push('\n');
    out.push_str(&queue_table(std::iter::once((name.as_str(), port)), colour));
    out.push_str(&drop_table(std::iter::once((name.as_str(), port)), colour));
    out
}

/// Queues with their processors.
pub fn queue_table<'a>(ports: impl IntoIterator<Item = (&'a str, &'a Port)>, colour: bool) -> String {
    let mut table = Table::new(&[
        "PORT",
        "QUEUE",
        "CPU",
        "PLACED",
        "LOAD",
        "ENABLED",
        "IN",
        "OUT",
        "DROPPED",
        "INTERRUPTS",
    ]);
    for (name, port) in ports {
        for queue in &port.queues {
            table.row([
                Cell::text(name),
                Cell::number(queue.queue),
                Cell::number(queue.cpu.map_or_else(|| "-".into(), |cpu| cpu.to_string())),
                Cell::text(if queue.pinned { "pinned" } else { "by load" }),
                Cell::number(percent(queue.load_permille)),
                Cell::text(if queue.enabled { "yes" } else { "no" }),
                Cell::number(short_count(queue.received.frames)),
                Cell::number(short_count(queue.sent.frames)),
                Cell::number(short_count(queue.received.dropped() + queue.sent.dropped())),
                Cell::number(short_count(queue.received.calls + queue.sent.calls)),
            ]);
        }
    }
    table.render("", colour)
}

/// Why frames were dropped; nothing if none was.
pub fn drop_table<'a>(ports: impl IntoIterator<Item = (&'a str, &'a Port)>, colour: bool) -> String {
    let mut table = Table::new(&["PORT", "WAY", "DROPPED", "REASON"]);
    for (name, port) in ports {
        for (way, counters) in [("in", &port.received), ("out", &port.sent)] {
            for (reason, &count) in &counters.drops {
                table.row([
                    Cell::text(name),
                    Cell::text(way),
                    Cell::number(count),
                    Cell::text(reason_text(reason)),
                ]);
            }
        }
    }
    if table.is_empty() { String::new() } else { format!("\n{}", table.render("", colour)) }
}

/// Addresses of a switch.
pub fn address_table(list: &Addresses, colour: bool) -> String {
    let mut table = Table::new(&["MAC", "VLAN", "PORT", "AGE", ""]);
    for address in &list.addresses {
        let vlan = if address.vlan == 0 { "-".into() } else { address.vlan.to_string() };
        let age = if address.fixed { "-".into() } else { format!("{}s", address.age) };
        table.row([
            Cell::text(&address.mac),
            Cell::number(vlan),
            Cell::text(&address.port),
            Cell::number(age),
            Cell::text(if address.fixed { "static" } else { "" }),
        ]);
    }
    let more = list.total.saturating_sub(list.addresses.len());
    let mut out = table.render("", colour);
    if more > 0 {
        let _ = writeln!(out, "… and {more} more; --limit N shows them");
    }
    out
}

/// The outcome of an offline run.
pub fn offline_table(report: &FabricReport, colour: bool) -> String {
    let report = serde_json::to_value(report).and_then(serde_json::from_value::<Report>).unwrap_or_default();
    let names: Vec<_> =
        ports(&report).map(|(switch, port)| (format!("{}/{}", switch.name, port.name), port)).collect();
    let named = || names.iter().map(|(name, port)| (name.as_str(), *port));
    let mut out = port_table(&report.switches, true, colour);
    out.push_str(&drop_table(named(), colour));
    for (name, port) in named().filter(|(_, port)| port.state == "faulted") {
        let _ = writeln!(out, "\n{} {name}: {}", Ink::Bad.paint("faulted", colour), plain(&port.reason));
    }
    out
}
