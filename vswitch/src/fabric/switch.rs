//! One switch of the fabric: its ports by name, its address table and the snapshot its workers see.

use std::collections::BTreeMap;
use std::sync::Arc;

use arc_swap::ArcSwap;
use vmq::filter::{QueueSet, VmqFilter};
use vmq::rss::{HashTypes, IndirectionTable, Rss, ToeplitzKey};
use vmq::worker::TaskId;

use super::attach::Attached;
use super::backend::BackendEvent;
use crate::error::FabricError;
use crate::fdb::{Config, Fdb, Filter, Key, PortIndex};
use crate::offload::translate::TagForm;
use crate::port::{PortCore, PortId};
use crate::queue::{SinkQueue, SourceQueue};
use crate::snapshot::{Outlet, Snapshot, Steering};
use crate::spec::{PortSpec, SwitchSpec, VlanMode};
use crate::topology::{Rules, Topology};

/// Ports of one switch.
pub const MAX_PORTS: u16 = 1024;

/// A port of the fabric.
#[derive(Debug)]
pub(super) struct Port {
    pub(super) spec: PortSpec,
    pub(super) core: Arc<PortCore>,
    pub(super) sources: Vec<(TaskId, Arc<SourceQueue>)>,
    pub(super) sinks: Vec<Arc<SinkQueue>>,
    pub(super) attached: Attached,
}

/// A switch of the fabric.
#[derive(Debug)]
pub(super) struct Switch {
    pub(super) spec: SwitchSpec,
    pub(super) fdb: Arc<Fdb>,
    pub(super) snapshot: Arc<ArcSwap<Snapshot>>,
    pub(super) ports: BTreeMap<String, Port>,
}

impl Switch {
    pub(super) fn new(spec: SwitchSpec, seed: [u64; 2]) -> Self {
        let config = Config {
            capacity: u32::try_from(spec.addresses).unwrap_or(u32::MAX),
            ports: MAX_PORTS,
            aging: spec.aging,
            ..Config::default()
        };
        let fdb = Arc::new(Fdb::new(config, seed));
        let topology = Topology::new(Vec::new(), Arc::clone(&fdb));
        let snapshot = Arc::new(ArcSwap::from_pointee(Snapshot { topology, outlets: Vec::new() }));
        Self { spec, fdb, snapshot, ports: BTreeMap::new() }
    }

    pub(super) fn port(&self, name: &str) -> Result<&Port, FabricError> {
        self.ports.get(name).ok_or_else(|| FabricError::NotFound { what: "port", name: name.into() })
    }

    pub(super) fn port_mut(&mut self, name: &str) -> Result<&mut Port, FabricError> {
        self.ports.get_mut(name).ok_or_else(|| FabricError::NotFound { what: "port", name: name.into() })
    }

    pub(super) fn port_by_id(&self, id: PortId) -> Option<&Port> {
        self.ports.values().find(|port| port.core.id == id)
    }

    pub(super) fn port_of_sink(&self, sink: &Arc<SinkQueue>) -> Option<&Port> {
        self.ports.values().find(|port| port.sinks.iter().any(|own| Arc::ptr_eq(own, sink)))
    }

    pub(super) fn port_by_index(&self, index: PortIndex) -> Option<&Port> {
        self.ports.values().find(|port| port.core.index == index)
    }

    pub(super) fn free_index(&self) -> Option<PortIndex> {
        (0..MAX_PORTS).find(|&index| self.port_by_index(index).is_none())
    }

    /// Shows the workers the ports as they are now.
    pub(super) fn publish(&self) {
        let len = self.ports.values().map(|port| usize::from(port.core.index) + 1).max().unwrap_or(0);
        let mut rules = vec![None; len];
        let mut outlets: Vec<Option<Outlet>> = std::iter::repeat_with(|| None).take(len).collect();
        for port in self.ports.values() {
            let index = usize::from(port.core.index);
            rules[index] = Some(port.rules());
            outlets[index] = Some(port.outlet());
        }
        let topology = Topology::new(rules, Arc::clone(&self.fdb));
        self.snapshot.store(Arc::new(Snapshot { topology, outlets }));
    }

    /// Brings the table's limits and pinned addresses in line with a port's specification.
    pub(super) fn pin_addresses(&self, port: &Port) -> Result<(), FabricError> {
        let index = port.core.index;
        self.fdb.set_port_limit(index, port.spec.address_limit);
        let own = port.spec.mac.map(|mac| (mac, access_vlan(&port.spec.vlan)));
        let fixed = port.spec.addresses.iter().map(|address| (address.mac, address.vlan));
        for (mac, vlan) in own.into_iter().chain(fixed) {
            let other =
                self.ports.values().find(|other| other.core.id != port.core.id && other.pins(mac, vlan));
            if let Some(other) = other {
                return Err(FabricError::invalid(
                    "mac",
                    format!("{mac} is pinned to port {}", other.core.name),
                ));
            }
            self.fdb
                .insert_static(Key::new(mac.0, vlan), index)
                .map_err(|error| FabricError::invalid("mac", format!("{mac}: {error}")))?;
        }
        Ok(())
    }

    /// Forgets every address on a port that is going away, and learns none there any more.
    pub(super) fn forget_port(&self, index: PortIndex) {
        self.fdb.set_port_limit(index, Some(0));
        self.fdb.flush(Filter { port: Some(index), vlan: None, dynamic_only: false });
    }
}

fn access_vlan(mode: &VlanMode) -> u16 {
    match mode {
        VlanMode::Access(vlan) => *vlan,
        VlanMode::Trunk { native, .. } => native.unwrap_or(0),
        VlanMode::Passthrough => 0,
    }
}

impl Port {
    /// Tells the device model, if the port has one.
    pub(super) fn tell(&self, event: BackendEvent) {
        if let Attached::Backend(shared) = &self.attached {
            shared.notify(event);
        }
    }

    /// True if the specification pins the address here.
    fn pins(&self, mac: vmq::Mac, vlan: u16) -> bool {
        self.spec.mac == Some(mac) && access_vlan(&self.spec.vlan) == vlan
            || self.spec.addresses.iter().any(|address| address.mac == mac && address.vlan == vlan)
    }

    fn rules(&self) -> Rules {
        Rules {
            source: self.spec.mac.filter(|_| !self.spec.spoofing).map(|mac| mac.0),
            vlan: (&self.spec.vlan).into(),
            private: self.spec.private,
            mtu: self.spec.mtu,
        }
    }

    /// The operator's choice of queues, unless the guest has its own.
    fn steering(&self, queues: u16) -> Option<Steering> {
        let mut steering = steering(&self.spec, queues).ok()?;
        if let Attached::Backend(shared) = &self.attached
            && let Some(rss) = shared.steering(queues)
        {
            steering.rss = rss;
        }
        Some(steering)
    }

    fn outlet(&self) -> Outlet {
        let enabled = super::backend::enabled(&self.attached);
        let active = |queue: u16| enabled >> (queue & 63) & 1 != 0;
        let mut sinks: Vec<_> = self.sinks.iter().filter(|sink| active(sink.queue)).cloned().collect();
        if sinks.is_empty() {
            // Somebody must count what is dropped.
            sinks.extend(self.sinks.first().cloned());
        }
        let queues = u16::try_from(sinks.len()).unwrap_or(1);
        Outlet {
            port: Arc::clone(&self.core),
            // The specification was checked when the port was made.
            steering: (queues > 1).then(|| self.steering(queues)).flatten(),
            sinks,
            tag: tag_form(&self.spec.vlan),
            longest: u32::from(self.spec.mtu) + crate::topology::ETHERNET,
            coalesce: self.spec.coalesce,
        }
    }
}

fn tag_form(mode: &VlanMode) -> TagForm {
    match mode {
        VlanMode::Passthrough => TagForm::AsIs,
        VlanMode::Access(_) => TagForm::Access,
        VlanMode::Trunk { native, .. } => TagForm::Trunk { native: native.unwrap_or(0) },
    }
}

/// Default entries of an indirection table, as NDIS has them.
const TABLE: usize = 128;

/// Queue selection among `queues` enabled queues, checked.
pub(super) fn steering(spec: &PortSpec, queues: u16) -> Result<Steering, FabricError> {
    let bad_key = |error: vmq::rss::RssError| FabricError::invalid("rss.key", error.to_string());
    let bad_table = |error: vmq::rss::RssError| FabricError::invalid("rss.table", error.to_string());
    let key = match &spec.rss.key {
        Some(key) => ToeplitzKey::new(key).map_err(bad_key)?,
        None => ToeplitzKey::default(),
    };
    let table = match &spec.rss.table {
        Some(entries) => {
            let whole = IndirectionTable::new(entries, spec.attachment.queues()).map_err(bad_table)?;
            whole.for_queues(queues).map_err(bad_table)?
        }
        None => IndirectionTable::round_robin(TABLE, queues).map_err(bad_table)?,
    };
    let bad_vmq = |error: vmq::filter::FilterError| FabricError::invalid("vmq", error.to_string());
    let mut filter = VmqFilter::new(QueueSet::all(queues).map_err(bad_vmq)?);
    for entry in &spec.vmq {
        // Queues that the client has not enabled are folded onto those it has.
        let mut folded: Vec<u16> = entry.queues.iter().map(|queue| queue % queues.max(1)).collect();
        folded.sort_unstable();
        folded.dedup();
        filter
            .insert(entry.mac, entry.vlan, QueueSet::new(&folded, queues).map_err(bad_vmq)?)
            .map_err(bad_vmq)?;
    }
    Ok(Steering { rss: Rss { key, table, types: HashTypes::all() }, filter })
}
