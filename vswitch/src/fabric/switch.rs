//! One switch of the fabric: its ports by name, its address table and the snapshot its workers see.

use std::collections::BTreeMap;
use std::sync::Arc;

use arc_swap::ArcSwap;
use vmq::rss::ToeplitzKey;
use vmq::worker::TaskId;

use super::attach::Attached;
use super::backend::BackendEvent;
use crate::error::FabricError;
use crate::fdb::{Config, Fdb, Filter, Key, Owner, PortIndex};
use crate::offload::translate::TagForm;
use crate::port::{PortCore, PortId};
use crate::queue::{SinkQueue, SourceQueue};
use crate::snapshot::{Outlet, Snapshot, Steering};
use crate::spec::{PortSpec, StaticAddress, SwitchSpec, VlanMode};
use crate::topology::{Rules, Topology};

/// Ports of one switch.
pub const MAX_PORTS: u16 = 1024;

/// A port of the fabric.
#[derive(Debug)]
pub(super) struct Port {
    pub(super) spec: PortSpec,
    pub(super) key: ToeplitzKey,
    pub(super) core: Arc<PortCore>,
    pub(super) sources: Vec<(TaskId, Arc<SourceQueue>)>,
    pub(super) sinks: Vec<Arc<SinkQueue>>,
    pub(super) attached: Attached,
    /// Somebody waits for the disk to open its files.
    pub(super) opening: bool,
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
        let mut owners = Vec::new();
        for port in self.ports.values() {
            let index = usize::from(port.core.index);
            rules[index] = Some(port.rules());
            outlets[index] = Some(port.outlet());
            owners.extend(
                port.spec.mac.map(|mac| Owner::new(mac.0, port.core.index, (&port.spec.vlan).into())),
            );
        }
        self.fdb.set_owners(owners);
        let topology = Topology::new(rules, Arc::clone(&self.fdb));
        self.snapshot.store(Arc::new(Snapshot { topology, outlets }));
    }

    /// Brings the table's limits and pinned addresses in line with what `spec` wants of `port`. An address that `port` has
    /// of another specification stays; if another port is in the way, all stays.
    pub(super) fn pin_addresses(&self, port: &Port, spec: &PortSpec) -> Result<(), FabricError> {
        self.others(port).try_for_each(|other| match spec.clash(&other.spec) {
            Some(address) => Err(pinned_to(other, address)),
            None => Ok(()),
        })?;
        spec.pinned().try_for_each(|address| self.insert(port, address))?;
        self.fdb.set_port_limit(port.core.index, spec.address_limit);
        Ok(())
    }

    /// Pins an address to `port`.
    pub(super) fn pin(&self, port: &Port, address: StaticAddress) -> Result<(), FabricError> {
        match self.others(port).find(|other| other.spec.owns(address)) {
            Some(other) => Err(pinned_to(other, address)),
            None => self.insert(port, address),
        }
    }

    fn insert(&self, port: &Port, address: StaticAddress) -> Result<(), FabricError> {
        let StaticAddress { mac, vlan } = address;
        self.fdb
            .insert_static(Key::new(mac.0, vlan), port.core.index)
            .map_err(|error| FabricError::invalid("mac", format!("{mac}: {error}")))
    }

    /// Forgets the own address of a port that was, or was to be, of `spec`, unless it is pinned by `kept`, too.
    pub(super) fn unpin_own(&self, spec: &PortSpec, kept: &PortSpec) {
        if let Some(own) = spec.own_address().filter(|&own| kept.pinned().all(|kept| kept != own)) {
            self.fdb.remove(Key::new(own.mac.0, own.vlan));
        }
    }

    fn others(&self, port: &Port) -> impl Iterator<Item = &Port> {
        let id = port.core.id;
        self.ports.values().filter(move |other| other.core.id != id)
    }

    /// Forgets every address on a port that is going away, and learns none there any more.
    pub(super) fn forget_port(&self, index: PortIndex) {
        self.fdb.set_port_limit(index, Some(0));
        self.fdb.flush(Filter { port: Some(index), vlan: None, dynamic_only: false });
    }
}

fn pinned_to(port: &Port, address: StaticAddress) -> FabricError {
    let StaticAddress { mac, vlan } = address;
    FabricError::invalid("mac", format!("{mac} in VLAN {vlan} is pinned to port {}", port.core.name))
}

impl Port {
    /// Tells the device model, if the port has one.
    pub(super) fn tell(&self, event: BackendEvent) {
        if let Attached::Backend(shared) = &self.attached {
            shared.notify(event);
        }
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
    fn steering(&self, enabled: &[u16]) -> Option<Steering> {
        let guest = if let Attached::Backend(shared) = &self.attached { shared.steering() } else { None };
        // The specification was checked when the port was made.
        Steering::new(&self.spec, &self.key, guest, enabled).ok()
    }

    fn outlet(&self) -> Outlet {
        let enabled = super::backend::enabled(&self.attached);
        let numbers = self.sinks.iter().map(|sink| sink.queue);
        let enabled: Vec<u16> = numbers.filter(|queue| enabled >> (queue & 63) & 1 != 0).collect();
        let (sinks, steering) = match enabled.as_slice() {
            [_, _, ..] => (self.sinks.clone(), self.steering(&enabled)),
            // With none enabled, somebody must count what is dropped.
            few => {
                let only = few.first().map_or(0, |&queue| usize::from(queue));
                (self.sinks.get(only).cloned().into_iter().collect(), None)
            }
        };
        Outlet {
            port: Arc::clone(&self.core),
            steering,
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
