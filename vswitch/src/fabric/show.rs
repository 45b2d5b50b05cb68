//! What is shown to operators.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError};

use vmq::worker::TaskId;

use super::Fabric;
use super::attach::Attached;
use super::switch::{Port, Switch};
use super::workers::Place;
use crate::error::FabricError;
use crate::fdb::FdbEntry;
use crate::queue::{SinkQueue, SourceQueue};
use crate::report::{AddressList, AddressReport, FabricReport, PortReport, QueueReport, SwitchReport};
use crate::spec::VlanMode;
use crate::tally::CounterValues;

impl Fabric {
    /// Everything: switches, ports, queues, workers, faults.
    pub fn report(&self) -> FabricReport {
        let inner = self.lock();
        FabricReport {
            switches: inner
                .switches
                .values()
                .map(|switch| switch.report(&|task| self.workers.place(task)))
                .collect(),
            workers: self.workers.report(),
        }
    }

    /// The first `limit` addresses that a switch knows, or those of one port, by VLAN and address.
    ///
    /// # Errors
    /// No such switch or port.
    pub fn addresses(
        &self,
        switch: &str,
        port: Option<&str>,
        limit: usize,
    ) -> Result<AddressList, FabricError> {
        let inner = self.lock();
        let switch = inner.switch(switch)?;
        let port = port.map(|name| switch.port(name)).transpose()?.map(|port| port.core.index);
        let names: HashMap<_, _> =
            switch.ports.values().map(|port| (port.core.index, Arc::clone(&port.core.name))).collect();
        let fdb = Arc::clone(&switch.fdb);
        // A million addresses must not keep others from the switches.
        drop(inner);
        let (total, entries) = fdb.snapshot(self.seconds(), port, limit);
        let report = |entry: FdbEntry| AddressReport {
            mac: vmq::Mac(entry.key.mac()).to_string(),
            vlan: entry.key.vlan(),
            port: names.get(&entry.port).map(ToString::to_string).unwrap_or_default(),
            age: entry.age,
            fixed: entry.is_static,
        };
        Ok(AddressList { total, addresses: entries.into_iter().map(report).collect() })
    }
}

/// Where a queue is polled.
type Places<'a> = &'a dyn Fn(TaskId) -> Option<Place>;

impl Switch {
    /// The report of a switch that no worker polls.
    pub(super) fn report_offline(&self) -> SwitchReport {
        self.report(&|_| None)
    }

    fn report(&self, places: Places<'_>) -> SwitchReport {
        SwitchReport {
            name: self.spec.name.clone(),
            kind: self.spec.kind,
            addresses: self.fdb.stats().entries as usize,
            capacity: self.spec.addresses,
            ports: self.ports.values().map(|port| port.report(places)).collect(),
        }
    }
}

impl Port {
    fn report(&self, places: Places<'_>) -> PortReport {
        let queues: Vec<_> = self.queue_reports(places);
        let sum = |pick: fn(&QueueReport) -> &CounterValues| {
            let mut total = CounterValues::default();
            queues.iter().for_each(|queue| total.merge(pick(queue)));
            total
        };
        let features = match &self.attached {
            Attached::Guest(_, status) => {
                status.features.lock().unwrap_or_else(PoisonError::into_inner).clone()
            }
            Attached::Backend(shared) => {
                shared.status.features.lock().unwrap_or_else(PoisonError::into_inner).clone()
            }
            Attached::Local => Vec::new(),
        };
        PortReport {
            name: self.spec.name.clone(),
            kind: self.spec.attachment.kind(),
            attached: self.spec.attachment.describe(),
            state: self.core.state(),
            last_error: self.core.last_error(),
            mtu: self.spec.mtu,
            mac: self.spec.mac.map(|mac| mac.to_string()),
            vlan: describe_vlan(&self.spec.vlan),
            features,
            received: sum(|queue| &queue.received),
            sent: sum(|queue| &queue.sent),
            queues,
        }
    }

    fn queue_reports(&self, places: Places<'_>) -> Vec<QueueReport> {
        let enabled = super::backend::enabled(&self.attached);
        let describe = |((task, source), sink): (&(TaskId, Arc<SourceQueue>), &Arc<SinkQueue>)| {
            let place = places(*task);
            QueueReport {
                queue: source.queue,
                cpu: place.map(|place| place.cpu),
                pinned: place.is_some_and(|place| place.pinned),
                enabled: enabled >> (source.queue & 63) & 1 != 0,
                load_permille: place.map_or(0, |place| place.load),
                received: source.counters.snapshot(),
                sent: sink.counters.snapshot(),
            }
        };
        self.sources.iter().zip(&self.sinks).map(describe).collect()
    }
}

fn describe_vlan(mode: &VlanMode) -> String {
    match mode {
        VlanMode::Passthrough => "passthrough".into(),
        VlanMode::Access(vlan) => format!("access {vlan}"),
        VlanMode::Trunk { members, native } => {
            let native = native.map(|vlan| format!(" native {vlan}")).unwrap_or_default();
            format!("trunk {}{native}", ranges(members))
        }
    }
}

/// `1-3,7` for 1, 2, 3, 7.
fn ranges(members: &[u16]) -> String {
    let mut runs: Vec<(u16, u16)> = Vec::new();
    for &vlan in members {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == vlan => *last = vlan,
            _ => runs.push((vlan, vlan)),
        }
    }
    let text = |(first, last): (u16, u16)| {
        if first == last { first.to_string() } else { format!("{first}-{last}") }
    };
    runs.into_iter().map(text).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vlans_are_shown_as_ranges() {
        let trunk = VlanMode::Trunk { members: vec![1, 2, 3, 7, 9, 10], native: Some(7) };
        assert_eq!(describe_vlan(&trunk), "trunk 1-3,7,9-10 native 7");
        assert_eq!(describe_vlan(&VlanMode::Access(10)), "access 10");
    }
}
