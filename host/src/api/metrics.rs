//! Counters in the text format of Prometheus. Labels are names that the operator chose, never addresses.

use std::fmt::Write;
use std::sync::Arc;

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use vswitch::report::{FabricReport, PortReport, PortState, QueueReport, SwitchReport};
use vswitch::tally::CounterValues;

use super::{Api, Failure};
use crate::vm::VmReport;

pub(super) async fn metrics(State(api): State<Arc<Api>>) -> Result<Response, Failure> {
    let report = api.blocking(|backend| Ok::<_, Failure>(backend.report())).await?;
    let vms = api.look_at_vms(|vms| vms.list()).await?;
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text(&report, &vms))
        .into_response())
}

/// The report as metrics.
fn text(report: &FabricReport, vms: &[VmReport]) -> String {
    let mut page = Page(String::new());
    page.head("switchyard_build_info", "gauge", "What runs.");
    page.value("switchyard_build_info", &format!("version=\"{}\"", env!("CARGO_PKG_VERSION")), 1);
    switch_metrics(&mut page, report);
    port_metrics(&mut page, report);
    queue_metrics(&mut page, report);
    worker_metrics(&mut page, report);
    vm_metrics(&mut page, vms);
    page.0
}

struct Page(String);

impl Page {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn value(&mut self, name: &str, labels: &str, value: impl std::fmt::Display) {
        let _ = writeln!(self.0, "{name}{{{labels}}} {value}");
    }
}

/// A label's value: names cannot hold what needs escaping, but a metric must stay a line whatever they hold.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

fn switch_metrics(page: &mut Page, report: &FabricReport) {
    let labels = |switch: &SwitchReport| format!("switch=\"{}\"", escaped(&switch.name));
    page.head("switchyard_switch_addresses", "gauge", "Addresses that the switch knows.");
    for switch in &report.switches {
        page.value("switchyard_switch_addresses", &labels(switch), switch.addresses);
    }
    page.head("switchyard_switch_addresses_max", "gauge", "Addresses that the switch can hold.");
    for switch in &report.switches {
        page.value("switchyard_switch_addresses_max", &labels(switch), switch.capacity);
    }
}

fn port_label(switch: &SwitchReport, port: &PortReport) -> String {
    format!("switch=\"{}\",port=\"{}\"", escaped(&switch.name), escaped(&port.name))
}

fn port_metrics(page: &mut Page, report: &FabricReport) {
    page.head("switchyard_port_state", "gauge", "1 for the state that the port is in.");
    for (switch, port) in ports(report) {
        let state = match port.state {
            PortState::Waiting(_) => "waiting",
            PortState::Up => "up",
            PortState::Finished => "finished",
            PortState::Faulted(_) => "faulted",
        };
        let labels = format!("{},kind=\"{}\",state=\"{state}\"", port_label(switch, port), port.kind);
        page.value("switchyard_port_state", &labels, 1);
    }
}

fn ports(report: &FabricReport) -> impl Iterator<Item = (&SwitchReport, &PortReport)> {
    report.switches.iter().flat_map(|switch| switch.ports.iter().map(move |port| (switch, port)))
}

/// A number of a queue's counters.
type Pick = fn(&CounterValues) -> u64;
/// A direction's counters of a queue; rx is what the switch receives from the port.
type Side = fn(&QueueReport) -> &CounterValues;

const COUNTERS: &[(&str, Pick, &str)] = &[
    ("frames_total", |values| values.frames, "Frames"),
    ("bytes_total", |values| values.bytes, "Bytes"),
    ("interrupts_total", |values| values.calls, "Interrupts sent"),
];
const SIDES: &[(&str, Side, &str)] = &[
    ("rx", |queue| &queue.received, "from the port into the switch"),
    ("tx", |queue| &queue.sent, "from the switch to the port"),
];

fn queue_metrics(page: &mut Page, report: &FabricReport) {
    let queues = || {
        ports(report).flat_map(|(switch, port)| {
            let labels = port_label(switch, port);
            port.queues.iter().map(move |queue| (format!("{labels},queue=\"{}\"", queue.queue), queue))
        })
    };
    for &(side, counters, way) in SIDES {
        for &(what, pick, help) in COUNTERS {
            let name = format!("switchyard_port_{side}_{what}");
            page.head(&name, "counter", &format!("{help} {way}."));
            for (labels, queue) in queues() {
                page.value(&name, &labels, pick(counters(queue)));
            }
        }
        let name = format!("switchyard_port_{side}_drops_total");
        page.head(&name, "counter", &format!("Frames {way} that were dropped, by reason."));
        for (labels, queue) in queues() {
            for (reason, count) in &counters(queue).drops {
                let reason = serde_json::to_value(reason).unwrap_or_default();
                let reason = reason.as_str().unwrap_or("unknown");
                page.value(&name, &format!("{labels},reason=\"{reason}\""), count);
            }
        }
    }
}

fn worker_metrics(page: &mut Page, report: &FabricReport) {
    page.head("switchyard_worker_load_ratio", "gauge", "Part of its time that the worker spends on frames.");
    for worker in &report.workers {
        let load = f64::from(worker.load_permille) / 1000.0;
        page.value("switchyard_worker_load_ratio", &format!("cpu=\"{}\"", worker.cpu), load);
    }
    page.head("switchyard_worker_sleeps_total", "counter", "Times the worker went to sleep.");
    for worker in &report.workers {
        page.value("switchyard_worker_sleeps_total", &format!("cpu=\"{}\"", worker.cpu), worker.sleeps);
    }
}

fn vm_metrics(page: &mut Page, vms: &[VmReport]) {
    let labels = |vm: &VmReport| format!("vm=\"{}\"", escaped(&vm.name));
    page.head("switchyard_vm_state", "gauge", "1 for the state that the VM is in.");
    for vm in vms {
        page.value("switchyard_vm_state", &format!("{},state=\"{}\"", labels(vm), vm.state.name()), 1);
    }
    page.head("switchyard_vm_memory_bytes", "gauge", "Memory that the guest has.");
    for vm in vms {
        page.value("switchyard_vm_memory_bytes", &labels(vm), vm.memory.assigned.unwrap_or(0));
    }
    page.head("switchyard_vm_restarts_total", "counter", "Times the restart policy started the VM.");
    for vm in vms {
        page.value("switchyard_vm_restarts_total", &labels(vm), vm.restarts);
    }
    page.head("switchyard_vm_faults", "gauge", "Devices and services stopped for what the guest did.");
    for vm in vms {
        page.value("switchyard_vm_faults", &labels(vm), vm.faults.len());
    }
}
