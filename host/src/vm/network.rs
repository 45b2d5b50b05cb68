//! What VMs need of the switch, as a trait: tests put a small stand-in behind the same supervisors.

use std::fmt::Debug;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmq::worker::Activity;
use vswitch::error::FabricError;
use vswitch::fabric::PortChange;

use super::spec::NicSpec;

/// The adapters that a VM has now; its supervisor writes them, the thread that serves its channels reads them.
#[derive(Debug, Clone, Default)]
pub struct Nics(Arc<Mutex<Vec<NicSpec>>>);

impl Nics {
    /// These.
    pub fn new(nics: Vec<NicSpec>) -> Self {
        Self(Arc::new(Mutex::new(nics)))
    }

    /// The list.
    pub fn lock(&self) -> MutexGuard<'_, Vec<NicSpec>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The one of that name.
    pub fn find(&self, name: &str) -> Option<NicSpec> {
        self.lock().iter().find(|nic| nic.name == name).cloned()
    }
}

/// A connection over which a VM's channels are served; dropping it ends the service, not the channels.
pub trait Channels: Send + Debug {
    /// Plugs the cable of a synthetic adapter in or out; false if there is no such adapter, or none yet.
    fn set_link(&self, nic: &str, up: bool) -> bool;
}

/// Called once when the service of a VM's channels has ended, with the reason.
pub type OnEnd = Box<dyn FnOnce(String) + Send>;

/// The switch.
pub trait Network: Send + Sync + Debug + 'static {
    /// Makes the port of `vm`'s adapter.
    ///
    /// # Errors
    /// If there is no such switch, or a port of that name.
    fn plug(&self, vm: &str, nic: &NicSpec) -> Result<(), FabricError>;

    /// Removes it.
    ///
    /// # Errors
    /// If it is not there.
    fn unplug(&self, vm: &str, nic: &NicSpec) -> Result<(), FabricError>;

    /// Changes it.
    ///
    /// # Errors
    /// If it is not there, or a value does not do.
    fn change(&self, vm: &str, nic: &NicSpec, change: PortChange) -> Result<(), FabricError>;

    /// What the switch's workers do now, by processor.
    fn activity(&self) -> Vec<(usize, Activity)>;

    /// Connects an emulated adapter; the worker's end of the socket is returned.
    ///
    /// # Errors
    /// If the port is not there, or the host refuses a socket.
    fn connect_legacy(&self, vm: &str, nic: &NicSpec) -> Result<OwnedFd, FabricError>;

    /// Serves the channels that the worker of `vm` hands over at `socket`.
    ///
    /// # Errors
    /// Why the worker cannot be reached.
    fn serve_channels(
        &self,
        vm: &str,
        nics: Nics,
        socket: &Path,
        on_end: OnEnd,
    ) -> Result<Box<dyn Channels>, String>;
}
