//! NICs: devices that the switch serves. Here is what must be known of each to tell a switch that comes back, and what a switch
//! has yet to answer before the guest's memory may be taken away.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::Sender;
use std::time::Instant;

use rustix::fs::SealFlags;
use vmbus::guid::{Guid, interface};
use vmbus::handover::{FromVmm, STATE_BYTES};
use vmbus::root::DeviceId;
use vmq::memory::Mapping;

use crate::control::{Nic, NicKind, NicStatus};

/// One NIC.
#[derive(Debug)]
pub(super) struct Device {
    pub nic: Nic,
    pub instance: Guid,
    /// The switch's notes.
    state: OwnedFd,
    /// A switch has been told of it.
    served: bool,
    /// To be taken out once the switch says that it is quiet, or at this time.
    pub quiet_by: Option<Instant>,
    /// Taken out, and waits for the guest to release it. Dropped with it: whoever took it out may wait for that.
    pub gone: Option<Sender<()>>,
    pub fault: Option<String>,
    /// Channels the switch has, by index; true once it was asked to close one.
    pub channels: BTreeMap<u16, bool>,
    /// Of the channels, those that a switch is to take over and has not said that it did.
    pub resuming: BTreeSet<u16>,
    /// A channel could not be taken over: it is offered anew once the guest has released it.
    pub again: bool,
    /// GPADLs the switch has; true once it was asked to release one.
    pub gpadls: BTreeMap<u32, bool>,
}

impl Device {
    pub fn new(nic: Nic) -> Result<Self, String> {
        let instance = nic.instance.parse::<Guid>();
        let instance = instance.map_err(|error| format!("instance of adapter {}: {error}", nic.name))?;
        let state = state_file().map_err(|error| format!("adapter {}: {error}", nic.name))?;
        Ok(Self {
            nic,
            instance,
            state,
            served: false,
            quiet_by: None,
            gone: None,
            fault: None,
            channels: BTreeMap::new(),
            resuming: BTreeSet::new(),
            again: false,
            gpadls: BTreeMap::new(),
        })
    }

    /// What introduces it to a switch. `None` only if descriptors run out.
    pub fn introduction(&mut self, id: DeviceId) -> Option<FromVmm> {
        let state = self.state.as_fd().try_clone_to_owned().ok()?;
        let resumed = std::mem::replace(&mut self.served, true);
        Some(FromVmm::Device {
            device: id.0,
            interface: interface::NIC,
            instance: self.instance,
            name: self.nic.name.clone(),
            state,
            resumed,
        })
    }

    /// The switch is gone, and with it all it had.
    pub fn lost(&mut self) {
        // Nobody else will say that it is quiet.
        self.quiet_by = self.quiet_by.map(|_| Instant::now());
        self.channels.clear();
        self.resuming.clear();
        self.gpadls.clear();
    }

    /// It was taken out.
    pub fn is_leaving(&self) -> bool {
        self.gone.is_some()
    }

    /// The switch touches nothing of the guest's.
    pub fn is_idle(&self) -> bool {
        self.channels.is_empty() && self.gpadls.is_empty()
    }

    /// What has the switch let go of everything.
    pub fn let_go(&mut self, id: DeviceId) -> Vec<FromVmm> {
        let mut messages = Vec::new();
        // Subchannels before the primary.
        for (&index, asked) in self.channels.iter_mut().rev() {
            if !std::mem::replace(asked, true) {
                messages.push(FromVmm::Close { device: id.0, index });
            }
        }
        for (&gpadl, asked) in &mut self.gpadls {
            if !std::mem::replace(asked, true) {
                messages.push(FromVmm::GpadlTeardown { device: id.0, gpadl });
            }
        }
        messages
    }

    pub fn status(&self, connected: bool, channels: u16) -> NicStatus {
        NicStatus { name: self.nic.name.clone(), kind: NicKind::Synthetic, channels, connected }
    }
}

/// A file of zeroes whose size nobody changes.
fn state_file() -> Result<OwnedFd, Box<dyn std::error::Error>> {
    let (_, file) = Mapping::memfd("nic-state", STATE_BYTES)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file)
}
