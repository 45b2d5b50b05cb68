//! A real switch with adapters whose guests are played here: for tests and benches.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use vmbus::handover::SwitchConnection;
use vmq::Mac;
use vswitch::backend::BackendPort;
use vswitch::error::FabricError;
use vswitch::fabric::{Fabric, WorkersSpec};
use vswitch::spec::{Attachment, PortSpec, SwitchKind, SwitchSpec};

use super::{Config, Guest, Vmm, VscError};
use crate::control::NicConfig;
use crate::service::{Link, LinkError};

/// Bytes of a guest's memory.
const MEMORY: usize = 128 << 20;

/// Why there is no rig.
#[derive(Debug, thiserror::Error)]
pub enum RigError {
    /// The switch refuses.
    #[error(transparent)]
    Fabric(#[from] FabricError),
    /// The guest has trouble.
    #[error(transparent)]
    Guest(#[from] VscError),
    /// The switch's side of the connection has trouble.
    #[error(transparent)]
    Link(#[from] LinkError),
}

type Known = Arc<Mutex<BTreeMap<String, (BackendPort, NicConfig)>>>;

/// One switch, and the links to its guests.
#[derive(Debug)]
pub struct Rig {
    fabric: Arc<Fabric>,
    known: Known,
    links: BTreeMap<String, Link>,
}

impl Rig {
    /// A switch polled by workers on `cpus`.
    ///
    /// # Errors
    /// No threads.
    pub fn new(cpus: Vec<usize>) -> Result<Self, RigError> {
        let workers = WorkersSpec { cpus, idle: WorkersSpec::IDLE, preempt: false, balance: false };
        let fabric = Fabric::start(workers)?;
        fabric.add_switch(SwitchSpec {
            name: "lan".into(),
            kind: SwitchKind::Private,
            addresses: SwitchSpec::ADDRESSES,
            aging: SwitchSpec::AGING,
        })?;
        Ok(Self { fabric, known: Known::default(), links: BTreeMap::new() })
    }

    /// The switch.
    pub fn fabric(&self) -> &Arc<Fabric> {
        &self.fabric
    }

    /// Adds a port made by `change` from a default one, with an adapter for it. Its guest's address ends with `number`.
    ///
    /// # Errors
    /// The switch refuses.
    pub fn port(&mut self, number: u8, change: impl FnOnce(&mut PortSpec)) -> Result<String, RigError> {
        let name = format!("nic{number}");
        let attachment = Attachment::Synthetic { vm: format!("vm{number}"), nic: name.clone(), queues: 8 };
        let mut spec = PortSpec { mtu: 9000, ..PortSpec::new(name.clone(), attachment) };
        change(&mut spec);
        let config = NicConfig {
            mac: address(number),
            mtu: spec.mtu,
            queues: spec.attachment.queues(),
            offloads: spec.offloads,
            rsc: spec.coalesce,
            link_mbps: 10_000,
            name: name.clone(),
            spoofing: spec.spoofing,
        };
        self.fabric.add_port("lan", spec)?;
        let port = self.fabric.backend("lan", &name)?;
        self.known.lock().unwrap_or_else(PoisonError::into_inner).insert(name.clone(), (port, config));
        Ok(name)
    }

    /// Starts a guest whose adapter is called `name`.
    ///
    /// # Errors
    /// The adapter cannot be set up.
    pub fn start(&mut self, name: &str, config: Config) -> Result<Guest, RigError> {
        let (vmm, switch) = Vmm::new(name, MEMORY)?;
        self.serve(name, switch)?;
        Ok(Guest::start(vmm, config)?)
    }

    /// Serves the guest at the other end of `connection`.
    ///
    /// # Errors
    /// No thread.
    pub fn serve(&mut self, name: &str, connection: SwitchConnection) -> Result<(), RigError> {
        let known = Arc::clone(&self.known);
        let resolve =
            move |name: &str| known.lock().unwrap_or_else(PoisonError::into_inner).get(name).cloned();
        let end = |reason: Option<LinkError>| {
            if let Some(reason) = reason {
                tracing::warn!(%reason, "link ended");
            }
        };
        let link = Link::start(connection, Box::new(resolve), Box::new(end))?;
        self.links.insert(name.into(), link);
        Ok(())
    }

    /// Adds a port and starts its guest.
    ///
    /// # Errors
    /// As [`Rig::port`] and [`Rig::start`].
    pub fn guest(
        &mut self,
        number: u8,
        change: impl FnOnce(&mut PortSpec),
        config: Config,
    ) -> Result<Guest, RigError> {
        let name = self.port(number, change)?;
        self.start(&name, config)
    }

    /// The link to the guest called `name`.
    pub fn link(&self, name: &str) -> Option<&Link> {
        self.links.get(name)
    }

    /// Ends a guest's link and removes its port.
    ///
    /// # Errors
    /// No such port.
    pub fn unplug(&mut self, name: &str) -> Result<(), RigError> {
        self.cut(name);
        self.known.lock().unwrap_or_else(PoisonError::into_inner).remove(name);
        Ok(self.fabric.remove_port("lan", name)?)
    }

    /// Ends the switch's side of a guest's link, as its death would.
    pub fn cut(&mut self, name: &str) {
        self.links.remove(name);
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.links.clear();
        self.fabric.shutdown();
    }
}

/// The address of guest number `number`.
pub fn address(number: u8) -> Mac {
    Mac([2, 0, 0, 0, 0, number])
}
