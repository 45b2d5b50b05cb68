//! The control plane: switches, ports and workers, made, changed and unmade while frames flow.
//!
//! One lock guards it all. The data path never takes it: workers see a switch through an immutable snapshot that is
//! swapped as a whole, and queues through locks of their own.

mod attach;
pub mod backend;
mod control;
mod files;
mod guest;
mod offline;
mod ports;
mod show;
mod switch;
mod validate;
mod workers;

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::path::PathBuf;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use vmq::Mac;
use vmq::worker::Clock;

pub use crate::capture::{Capture, CapturedFrame, Direction};
pub use offline::run_offline;
pub use ports::PortChange;
pub use switch::MAX_PORTS;
pub use workers::WorkersSpec;

use crate::error::FabricError;
use crate::fdb::{Filter, Key};
use crate::port::{PortCore, PortEvent, PortId};
use crate::ports::vhost_user::server::Control;
use crate::spec::{StaticAddress, SwitchSpec};
use files::{Disks, SLOW};
use switch::{Port, Switch};
use workers::Workers;

/// Which frames a live capture sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaptureSpec {
    /// Switch.
    pub switch: String,
    /// One port, or all that the switch has now.
    pub port: Option<String>,
    /// Bytes kept of each frame.
    pub snaplen: u32,
    /// Dropped frames as well, with their reason.
    pub drops: bool,
}

/// All switches of a process.
#[derive(Debug)]
pub struct Fabric {
    inner: Mutex<Inner>,
    workers: Workers,
    vhost: Control,
    events: Sender<PortEvent>,
    disks: Disks,
    /// Wall-clock nanoseconds at the clock's zero.
    epoch: u64,
}

#[derive(Debug, Default)]
struct Inner {
    switches: BTreeMap<String, Switch>,
    next_port: u64,
}

impl Inner {
    fn switch(&self, name: &str) -> Result<&Switch, FabricError> {
        self.switches.get(name).ok_or_else(|| FabricError::NotFound { what: "switch", name: name.into() })
    }

    fn switch_mut(&mut self, name: &str) -> Result<&mut Switch, FabricError> {
        self.switches.get_mut(name).ok_or_else(|| FabricError::NotFound { what: "switch", name: name.into() })
    }

    /// A port that was there before, unless it was removed meanwhile.
    fn same_port(&mut self, core: &PortCore) -> Result<&mut Port, FabricError> {
        let port = self.switch_mut(&core.switch)?.port_mut(&core.name)?;
        if port.core.id == core.id {
            return Ok(port);
        }
        Err(FabricError::NotFound { what: "port", name: core.name.to_string() })
    }

    fn switch_of(&self, id: PortId) -> Option<&Switch> {
        self.switches.values().find(|switch| switch.port_by_id(id).is_some())
    }
}

impl Fabric {
    /// Starts the workers and the control threads.
    ///
    /// # Errors
    /// A processor is not available, or the process is out of threads or descriptors.
    pub fn start(workers: WorkersSpec) -> Result<Arc<Self>, FabricError> {
        let clock = Clock::default();
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let epoch = u64::try_from(since.as_nanos()).unwrap_or(0).saturating_sub(clock.now());
        let (events, inbox) = std::sync::mpsc::channel();
        let vhost = Control::start()
            .map_err(|error| FabricError::failed("starting the vhost-user control thread", error))?;
        let workers = Workers::start(&workers, clock)?;
        let fabric = Arc::new(Self {
            inner: Mutex::default(),
            workers,
            vhost,
            events,
            disks: Disks::default(),
            epoch,
        });
        let weak = Arc::downgrade(&fabric);
        std::thread::Builder::new()
            .name("control".into())
            .spawn(move || control::run(&weak, &inbox))
            .map_err(|error| FabricError::failed("starting the control thread", error))?;
        Ok(fabric)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Seconds of the workers' clock, as the address table counts them.
    fn seconds(&self) -> u32 {
        u32::try_from(self.workers.clock().now() / 1_000_000_000).unwrap_or(u32::MAX)
    }

    /// Makes a switch without ports; an internal one gets its host port by [`Fabric::add_port`] like any other.
    ///
    /// # Errors
    /// The name is taken or a value is out of range.
    pub fn add_switch(&self, spec: SwitchSpec) -> Result<(), FabricError> {
        validate::switch(&spec)?;
        let mut inner = self.lock();
        if inner.switches.contains_key(&spec.name) {
            return Err(FabricError::Exists { what: "switch", name: spec.name });
        }
        // Guests choose the addresses, so the hash must not be theirs to predict.
        let seed = [RandomState::new().hash_one(0), RandomState::new().hash_one(1)];
        inner.switches.insert(spec.name.clone(), Switch::new(spec, seed));
        Ok(())
    }

    /// Removes a switch with all its ports.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn remove_switch(&self, name: &str) -> Result<(), FabricError> {
        // Locked until all is gone, so that no port is added meanwhile.
        let mut inner = self.lock();
        let files = self.take_down(inner.switch_mut(name)?);
        inner.switches.remove(name);
        drop(inner);
        self.wait_for_disks(&files);
        Ok(())
    }

    /// Removes all ports; the files that they wrote.
    fn take_down(&self, switch: &mut Switch) -> Vec<PathBuf> {
        let names: Vec<_> = switch.ports.keys().cloned().collect();
        names.iter().filter_map(|port| self.take_out(switch, port)).collect()
    }

    /// Forgets learnt addresses of the switch, or of one port. Returns how many.
    ///
    /// # Errors
    /// There is no such switch or port.
    pub fn flush(&self, switch: &str, port: Option<&str>) -> Result<usize, FabricError> {
        let inner = self.lock();
        let switch = inner.switch(switch)?;
        let port = port.map(|name| switch.port(name)).transpose()?.map(|port| port.core.index);
        Ok(switch.fdb.flush(Filter { port, vlan: None, dynamic_only: true }))
    }

    /// Pins an address to a port.
    ///
    /// # Errors
    /// No such switch or port, no address of a station, pinned elsewhere, or the table is full.
    pub fn add_address(&self, switch: &str, port: &str, mac: Mac, vlan: u16) -> Result<(), FabricError> {
        let mut inner = self.lock();
        let switch = inner.switch_mut(switch)?;
        if !mac.is_station() || vlan > vmq::filter::MAX_VLAN {
            return Err(FabricError::invalid("mac", format!("{mac} in VLAN {vlan} cannot be a station")));
        }
        let address = StaticAddress { mac, vlan };
        switch.pin(switch.port(port)?, address)?;
        // Pinned for good: also when the port's VLANs change.
        let spec = &mut switch.port_mut(port)?.spec;
        if !spec.addresses.contains(&address) {
            spec.addresses.push(address);
        }
        Ok(())
    }

    /// Forgets an address, pinned or learnt.
    ///
    /// # Errors
    /// No such switch, the address is not known, or it is a port's own (`mac`).
    pub fn remove_address(&self, switch: &str, mac: Mac, vlan: u16) -> Result<(), FabricError> {
        let mut inner = self.lock();
        let switch = inner.switch_mut(switch)?;
        let address = StaticAddress { mac, vlan };
        if let Some(port) = switch.ports.values().find(|port| port.spec.own_address() == Some(address)) {
            let name = &port.core.name;
            return Err(FabricError::invalid("mac", format!("{mac} is the own address of port {name}")));
        }
        for port in switch.ports.values_mut() {
            port.spec.addresses.retain(|pinned| *pinned != address);
        }
        if switch.fdb.remove(Key::new(mac.0, vlan)) {
            return Ok(());
        }
        Err(FabricError::NotFound { what: "address", name: format!("{mac} vlan {vlan}") })
    }

    /// Starts a live capture.
    ///
    /// # Errors
    /// No such switch or port.
    pub fn capture(&self, spec: CaptureSpec) -> Result<Capture, FabricError> {
        let inner = self.lock();
        let switch = inner.switch(&spec.switch)?;
        let ports: Vec<_> = match &spec.port {
            Some(name) => vec![Arc::clone(&switch.port(name)?.core)],
            None => switch.ports.values().map(|port| Arc::clone(&port.core)).collect(),
        };
        Ok(Capture::start(spec.snaplen, spec.drops, &ports))
    }

    /// Removes every switch; sockets and devices made by the switch go with them. A capture file that its disk has not
    /// closed within a minute, or as long as it gives a sign of life, is left incomplete.
    pub fn shutdown(&self) {
        let mut inner = self.lock();
        for switch in inner.switches.values_mut() {
            self.take_down(switch);
        }
        inner.switches.clear();
        drop(inner);
        if let Err(error) = self.disks.wait(2 * SLOW, |_| true) {
            tracing::warn!(%error, "capture files are left incomplete");
        }
        let _ = self.events.send(PortEvent::Stop);
    }
}

impl Drop for Fabric {
    fn drop(&mut self) {
        let _ = self.events.send(PortEvent::Stop);
    }
}

#[cfg(test)]
mod tests;
