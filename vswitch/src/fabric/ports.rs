//! Ports: added, changed, restarted and removed while the others carry traffic.

use std::path::PathBuf;
use std::sync::{Arc, MutexGuard};

use vmq::rss::ToeplitzKey;

use super::attach::{self, Attached};
use super::backend::BackendEvent;
use super::files::SLOW;
use super::switch::{Port, Switch};
use super::{Fabric, Inner, validate};
use crate::drops::DropReason;
use crate::error::FabricError;
use crate::fdb::Filter;
use crate::port::{PortCore, PortId};
use crate::queue::{Sink, SinkQueue, Source, SourceQueue};
use crate::report::PortState;
use crate::snapshot::Steering;
use crate::spec::{Attachment, PortSpec, VlanMode};

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
            self.dismantle(&port);
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
        if attached.is_err() {
            self.take_out(owner, &name);
            return attached;
        }
        let core = Arc::clone(&port.core);
        self.load(inner, &core, |inner, _| {
            if let Ok(owner) = inner.switch_mut(switch) {
                self.take_out(owner, &name);
            }
        })
    }

    /// Opens the files of a port that was just made or is restarted, if it has any, and lets others go on meanwhile. On
    /// failure the port is left to `give_up`.
    fn load(
        &self,
        mut inner: MutexGuard<'_, Inner>,
        core: &PortCore,
        give_up: impl FnOnce(&mut Inner, &FabricError),
    ) -> Result<(), FabricError> {
        let port = inner.same_port(core)?;
        if !matches!(port.spec.attachment, Attachment::Pcap { .. }) {
            return Ok(());
        }
        port.opening = true;
        let attachment = port.spec.attachment.clone();
        drop(inner);
        let opened = self.open_files(&core.name, &attachment);
        let mut inner = self.lock();
        // If the port was removed meanwhile, the files are dropped after the lock.
        let port = inner.same_port(core)?;
        port.opening = false;
        match opened {
            Ok(files) => {
                files.connect(port);
                self.nudge(port);
                Ok(())
            }
            Err(error) => {
                give_up(&mut inner, &error);
                Err(error)
            }
        }
    }

    /// A port's queues, placed on workers.
    fn queues(&self, spec: PortSpec, key: ToeplitzKey, core: Arc<PortCore>) -> Result<Port, FabricError> {
        let mut port = Port {
            spec,
            key,
            core,
            sources: Vec::new(),
            sinks: Vec::new(),
            attached: Attached::Local,
            opening: false,
        };
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

    /// Takes a port's queues from the workers and closes what it is attached to, files when their disk is ready.
    fn dismantle(&self, port: &Port) {
        if let Attached::Guest(endpoint, _) = port.attached {
            self.vhost.remove_and_wait(endpoint);
        }
        port.tell(BackendEvent::Removed);
        for &(task, _) in &port.sources {
            self.workers.remove(task);
        }
        for sink in &port.sinks {
            self.disks.end(&port.core, sink.swap(Sink::Absent(DropReason::NotReady)));
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
        let file = self.take_out(owner, port);
        drop(inner);
        self.wait_for_disks(file.as_slice());
        Ok(())
    }

    /// Whoever removes a port has its file complete, unless the disk does not answer, which is logged.
    pub(super) fn wait_for_disks(&self, files: &[PathBuf]) {
        let _ = self.disks.wait(SLOW, |path| files.iter().any(|file| file == path));
    }

    /// Removes a port, which may be none; the file that it wrote.
    pub(super) fn take_out(&self, owner: &mut Switch, port: &str) -> Option<PathBuf> {
        let removed = owner.ports.remove(port)?;
        owner.publish();
        self.dismantle(&removed);
        owner.forget_port(removed.core.index);
        match removed.spec.attachment {
            Attachment::Pcap { write, .. } => write,
            _ => None,
        }
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
    /// No such switch or port, its device or file cannot be opened, or its disk has yet to close or to open a file.
    pub fn restart_port(&self, switch: &str, port: &str) -> Result<(), FabricError> {
        let inner = self.lock();
        let port = inner.switch(switch)?.port(port)?;
        if port.opening {
            return Err(FabricError::Starting { port: port.core.name.to_string() });
        }
        for (_, source) in &port.sources {
            source.swap(Source::Absent);
        }
        // Workers let go of the old device or doorbell.
        self.nudge(port);
        for sink in &port.sinks {
            self.disks.end(&port.core, sink.swap(Sink::Absent(DropReason::NotReady)));
        }
        port.core.clear_fault(port.spec.attachment.waits_for());
        if let Attached::Guest(endpoint, _) = port.attached {
            self.vhost.restart(endpoint);
        }
        port.tell(BackendEvent::Restart);
        self.attach(port).inspect_err(|error| port.core.fault(error))?;
        let core = Arc::clone(&port.core);
        self.load(inner, &core, |_, error| core.fault(error))
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
