//! Ports: added, changed, restarted and removed while the others carry traffic.

use std::sync::Arc;

use super::attach::{self, Attached};
use super::backend::BackendEvent;
use super::switch::{Port, Switch, steering};
use super::{Fabric, validate};
use crate::drops::DropReason;
use crate::error::FabricError;
use crate::fdb::Filter;
use crate::port::{PortCore, PortId};
use crate::queue::{Sink, SinkQueue, Source, SourceQueue};
use crate::report::PortState;
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

impl Fabric {
    /// Adds a port and opens what it is attached to. A vhost-user client may come later.
    ///
    /// # Errors
    /// The name is taken, a value is out of range, or the socket, device or file cannot be opened.
    pub fn add_port(&self, switch: &str, spec: PortSpec) -> Result<(), FabricError> {
        validate::port(&spec)?;
        steering(&spec, spec.attachment.queues())?;
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
        let port = self.queues(spec, core)?;
        if let Err(error) = owner.pin_addresses(&port) {
            self.dismantle(&port);
            owner.forget_port(index);
            return Err(error);
        }
        // The switch knows the port before its first frame comes.
        owner.ports.insert(name.clone(), port);
        owner.publish();
        let port = owner.port_mut(&name)?;
        attach::guest(&self.vhost, self.workers.clock(), &port.core, port)
            .and_then(|attached| {
                port.attached = attached;
                self.attach(port)
            })
            .inspect_err(|_| self.take_out(owner, &name))
    }

    /// A port's queues, placed on workers.
    fn queues(&self, spec: PortSpec, core: Arc<PortCore>) -> Result<Port, FabricError> {
        let mut port = Port { spec, core, sources: Vec::new(), sinks: Vec::new(), attached: Attached::Local };
        for queue in 0..port.spec.attachment.queues() {
            let source = Arc::new(SourceQueue::new(Arc::clone(&port.core), queue));
            let pin = port.spec.pin.get(usize::from(queue)).copied();
            match self.workers.add(&source, pin) {
                Ok(task) => port.sources.push((task, source)),
                Err(error) => {
                    self.dismantle(&port);
                    return Err(error);
                }
            }
            port.sinks.push(Arc::new(SinkQueue::new(queue)));
        }
        Ok(port)
    }

    /// Takes a port's queues from the workers and closes what it is attached to.
    fn dismantle(&self, port: &Port) {
        if let Attached::Guest(endpoint, _) = port.attached {
            self.vhost.remove_and_wait(endpoint);
        }
        port.tell(BackendEvent::Removed);
        for &(task, _) in &port.sources {
            self.workers.remove(task);
        }
        for sink in &port.sinks {
            if let Sink::File(mut file) = sink.swap(Sink::Absent(DropReason::NotReady))
                && let Err(error) = file.close()
            {
                tracing::warn!(port = %port.core.name, %error, "capture file not closed cleanly");
            }
        }
        port.core.taps.end();
    }

    /// Removes a port. Frames on their way to it are dropped.
    ///
    /// # Errors
    /// No such switch or port.
    pub fn remove_port(&self, switch: &str, port: &str) -> Result<(), FabricError> {
        let mut inner = self.lock();
        let owner = inner.switch_mut(switch)?;
        owner.port(port)?;
        self.take_out(owner, port);
        Ok(())
    }

    pub(super) fn take_out(&self, owner: &mut Switch, port: &str) {
        if let Some(removed) = owner.ports.remove(port) {
            owner.publish();
            self.dismantle(&removed);
            owner.forget_port(removed.core.index);
        }
    }

    /// Changes what may be changed while a port runs.
    ///
    /// # Errors
    /// No such switch or port, or a value is out of range.
    pub fn change_port(&self, switch: &str, port: &str, change: PortChange) -> Result<(), FabricError> {
        change.mtu.map_or(Ok(()), validate::mtu)?;
        change.vlan.as_ref().map_or(Ok(()), validate::vlan_mode)?;
        let mut inner = self.lock();
        let owner = inner.switch_mut(switch)?;
        let target = owner.port_mut(port)?;
        let spec = &mut target.spec;
        spec.mtu = change.mtu.unwrap_or(spec.mtu);
        spec.spoofing = change.spoofing.unwrap_or(spec.spoofing);
        spec.coalesce = change.coalesce.unwrap_or(spec.coalesce);
        spec.address_limit = change.address_limit.unwrap_or(spec.address_limit);
        let index = target.core.index;
        let stricter = change.spoofing == Some(false);
        let moved = change.vlan.is_some_and(|vlan| std::mem::replace(&mut spec.vlan, vlan.clone()) != vlan);
        if let Attached::Backend(shared) = &target.attached {
            shared.set(&target.spec);
            shared.notify(BackendEvent::Changed);
        }
        if moved {
            // Addresses were known in VLANs that the port may have left.
            owner.forget_port(index);
        }
        owner.publish();
        if stricter {
            // What it learnt under other names is not to be believed any longer.
            owner.fdb.flush(Filter { port: Some(index), vlan: None, dynamic_only: true });
        }
        owner.pin_addresses(owner.port(port)?)
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
