//! Ports: added, changed, restarted and removed while the others carry traffic.

use std::sync::Arc;

use vmq::rss::ToeplitzKey;

use super::attach::{self, Attached};
use super::backend::BackendEvent;
use super::switch::{Port, Switch};
use super::{Fabric, validate};
use crate::drops::DropReason;
use crate::error::FabricError;
use crate::fdb::Filter;
use crate::port::{PortCore, PortId};
use crate::ports::file::FileSink;
use crate::queue::{Sink, SinkQueue, Source, SourceQueue};
use crate::report::PortState;
use crate::snapshot::Steering;
use crate::spec::{PortSpec, VlanMode};

/// What may be changed while a port runs. `None` leaves a value as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PortChange {
    /// MTU in bytes.
    pub mtu: Option<u16>,
    /// VLANs.
    pub vlan: Option<VlanMode>,
    /// Other sources than the configured address.
    pub spoofing: Option<bool>,
    /// Merge TCP segments.
    pub coalesce: Option<bool>,
    /// Most addresses learnt; `Some(None)` removes the limit.
    pub address_limit: Option<Option<u32>>,
}

/// Capture files of removed ports, which wait for their disks to be closed.
#[derive(Debug)]
#[must_use = "to be dropped when nothing is locked"]
pub(super) struct Remains {
    files: Vec<(Arc<str>, Box<FileSink>)>,
}

impl Drop for Remains {
    fn drop(&mut self) {
        for (port, file) in &mut self.files {
            if let Err(error) = file.close() {
                tracing::warn!(%port, %error, "capture file not closed cleanly");
            }
        }
    }
}

impl PortChange {
    fn applied_to(self, spec: &PortSpec) -> PortSpec {
        let mut spec = spec.clone();
        spec.mtu = self.mtu.unwrap_or(spec.mtu);
        spec.spoofing = self.spoofing.unwrap_or(spec.spoofing);
        spec.coalesce = self.coalesce.unwrap_or(spec.coalesce);
        spec.address_limit = self.address_limit.unwrap_or(spec.address_limit);
        spec.vlan = self.vlan.unwrap_or(spec.vlan);
        spec
    }
}

impl Fabric {
    /// Adds a port and opens what it is attached to. A vhost-user client may come later.
    ///
    /// # Errors
    /// The name is taken, a value is out of range, or the socket, device or file cannot be opened.
    pub fn add_port(&self, switch: &str, spec: PortSpec) -> Result<(), FabricError> {
        validate::port(&spec)?;
        let key = Steering::key(&spec)?;
        let mut inner = self.lock();
        inner.next_port += 1;
        let id = PortId(inner.next_port);
        let owner = inner.switch_mut(switch)?;
        if owner.ports.contains_key(&spec.name) {
            return Err(FabricError::Exists { what: "port", name: spec.name });
        }
        let index = owner
            .free_index()
            .ok_or_else(|| FabricError::invalid("port", "the switch has 1024 ports already"))?;
        let names = (Arc::from(switch), Arc::from(spec.name.as_str()));
        let waits_for = spec.attachment.waits_for();
        let snapshot = Arc::clone(&owner.snapshot);
        let core = Arc::new(PortCore::new(id, names, index, snapshot, waits_for, self.events.clone()));
        let name = spec.name.clone();
        let port = self.queues(spec, key, core)?;
        if let Err(error) = owner.pin_addresses(&port, &port.spec) {
            // Nothing was connected.
            let _ = self.dismantle(&port);
            owner.forget_port(index);
            return Err(error);
        }
        // The switch knows the port before its first frame comes.
        owner.ports.insert(name.clone(), port);
        owner.publish();
        let port = owner.port_mut(&name)?;
        let attached =
            attach::guest(&self.vhost, self.workers.clock(), &port.core, port).and_then(|attached| {
                port.attached = attached;
                self.attach(port)
            });
        let remains = if attached.is_err() { self.take_out(owner, &name) } else { None };
        drop(inner);
        drop(remains);
        attached
    }

    /// A port's queues, placed on workers.
    fn queues(&self, spec: PortSpec, key: ToeplitzKey, core: Arc<PortCore>) -> Result<Port, FabricError> {
        let mut port =
            Port { spec, key, core, sources: Vec::new(), sinks: Vec::new(), attached: Attached::Local };
        for queue in 0..port.spec.attachment.queues() {
            let source = Arc::new(SourceQueue::new(Arc::clone(&port.core), queue));
            let pin = port.spec.pin.get(usize::from(queue)).copied();
            match self.workers.add(&source, pin) {
                Ok(task) => port.sources.push((task, source)),
                Err(error) => {
                    let _ = self.dismantle(&port);
                    return Err(error);
                }
            }
            port.sinks.push(Arc::new(SinkQueue::new(queue)));
        }
        Ok(port)
    }

    /// Takes a port's queues from the workers and closes what it is attached to. What is returned is to be closed when
    /// nothing is locked.
    fn dismantle(&self, port: &Port) -> Remains {
        if let Attached::Guest(endpoint, _) = port.attached {
            self.vhost.remove_and_wait(endpoint);
        }
        port.tell(BackendEvent::Removed);
        for &(task, _) in &port.sources {
            self.workers.remove(task);
        }
        let sinks = port.sinks.iter().map(|sink| sink.swap(Sink::Absent(DropReason::NotReady)));
        let files = sinks.filter_map(|sink| match sink {
            Sink::File(file) => Some((Arc::clone(&port.core.name), file)),
            _ => None,
        });
        let files = files.collect();
        port.core.taps.end();
        Remains { files }
    }

    /// Removes a port. Frames on their way to it are dropped.
    ///
    /// # Errors
    /// No such switch or port.
    pub fn remove_port(&self, switch: &str, port: &str) -> Result<(), FabricError> {
        let mut inner = self.lock();
        let owner = inner.switch_mut(switch)?;
        owner.port(port)?;
        let remains = self.take_out(owner, port);
        drop(inner);
        drop(remains);
        Ok(())
    }

    pub(super) fn take_out(&self, owner: &mut Switch, port: &str) -> Option<Remains> {
        let removed = owner.ports.remove(port)?;
        owner.publish();
        let remains = self.dismantle(&removed);
        owner.forget_port(removed.core.index);
        Some(remains)
    }

    /// Changes what may be changed while a port runs.
    ///
    /// # Errors
    /// No such switch or port, a value is out of range, or the port's device does not take the MTU.
    pub fn change_port(&self, switch: &str, port: &str, change: PortChange) -> Result<(), FabricError> {
        change.mtu.map_or(Ok(()), validate::mtu)?;
        change.vlan.as_ref().map_or(Ok(()), validate::vlan_mode)?;
        let mut inner = self.lock();
        let owner = inner.switch_mut(switch)?;
        let target = owner.port(port)?;
        let (stricter, mtu) = (change.spoofing == Some(false), change.mtu);
        let spec = change.applied_to(&target.spec);
        owner.pin_addresses(target, &spec)?;
        if let Some(Err(error)) = mtu.map(|mtu| self.set_mtu(target, mtu)) {
            owner.unpin_own(&spec, &target.spec);
            owner.fdb.set_port_limit(target.core.index, target.spec.address_limit);
            return Err(error);
        }
        // From here on nothing fails.
        let target = owner.port_mut(port)?;
        let old = std::mem::replace(&mut target.spec, spec);
        if let Attached::Backend(shared) = &target.attached {
            shared.set(&target.spec);
            shared.notify(BackendEvent::Changed);
        }
        owner.publish();
        let target = owner.port(port)?;
        // Bursts that are switched by the old rules still learn by them.
        target.sources.iter().for_each(|(_, source)| source.with(|_| ()));
        let moved = old.vlan != target.spec.vlan;
        owner.unpin_own(&old, &target.spec);
        // Addresses were known in VLANs that the port may have left, or under other names that are not to be believed any
        // longer.
        if moved || stricter {
            let port = Some(target.core.index);
            owner.fdb.flush(Filter { port, vlan: None, dynamic_only: true });
        }
        Ok(())
    }

    /// Clears a fault, or plays a finished capture again; a connected client is cut off.
    ///
    /// # Errors
    /// No such switch or port, or its device or file cannot be opened.
    pub fn restart_port(&self, switch: &str, port: &str) -> Result<(), FabricError> {
        let inner = self.lock();
        let port = inner.switch(switch)?.port(port)?;
        for (_, source) in &port.sources {
            source.swap(Source::Absent);
        }
        // Workers let go of the old device or doorbell.
        for &(task, _) in &port.sources {
            self.workers.nudge(task);
        }
        for sink in &port.sinks {
            sink.swap(Sink::Absent(DropReason::NotReady));
        }
        port.core.clear_fault(port.spec.attachment.waits_for());
        if let Attached::Guest(endpoint, _) = port.attached {
            self.vhost.restart(endpoint);
        }
        port.tell(BackendEvent::Restart);
        self.attach(port).inspect_err(|error| port.core.fault(error))
    }

    /// Pins a queue to a worker's processor, or leaves it to the placement again.
    ///
    /// # Errors
    /// No such switch, port or queue, or no worker on that processor.
    pub fn pin_queue(
        &self,
        switch: &str,
        port: &str,
        queue: u16,
        cpu: Option<usize>,
    ) -> Result<(), FabricError> {
        let inner = self.lock();
        let port = inner.switch(switch)?.port(port)?;
        let (task, _) = port
            .sources
            .get(usize::from(queue))
            .ok_or_else(|| FabricError::NotFound { what: "queue", name: queue.to_string() })?;
        self.workers.pin(*task, cpu)
    }

    /// The state of a port, for whoever waits for it.
    ///
    /// # Errors
    /// No such switch or port.
    pub fn port_state(&self, switch: &str, port: &str) -> Result<PortState, FabricError> {
        Ok(self.lock().switch(switch)?.port(port)?.core.state())
    }
}
