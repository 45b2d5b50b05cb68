//! Adapters that come, go and change while their VM lives.

use hypervisor::control::{Command, NicKind};
use vswitch::fabric::PortChange;

use super::error::VmError;
use super::spec::{NicSpec, VmSpec};
use super::supervisor::{Life, Pending, Reply, Supervisor};

/// Adapters of one VM at most.
pub const MAX_NICS: usize = 32;

impl Supervisor {
    /// The port first, then the adapter: a guest's adapter is never without a port.
    pub fn add_nic(&mut self, nic: NicSpec, reply: Reply<()>) {
        if let Err(error) = self.may_add(&nic).and_then(|()| self.plug(&nic)) {
            let _ = reply.send(Err(error));
            return;
        }
        match &self.life {
            Life::Running(_) => {
                let command = Command::AddNic(nic.device(&self.spec.name));
                self.request(command, &[], self.settings.patience.answer, Pending::AddNic(nic, reply));
            }
            Life::Off | Life::Waiting(_) => {
                self.spec.nics.push(nic);
                let _ = reply.send(Ok(()));
            }
        }
    }

    fn may_add(&self, nic: &NicSpec) -> Result<(), VmError> {
        // A VM that runs may have one that its definition has not, and the other way round.
        if self.specs().any(|spec| spec.nics.iter().any(|other| other.name == nic.name))
            || self.nics.find(&nic.name).is_some()
        {
            return Err(VmError::Exists { what: "adapter", name: nic.name.clone() });
        }
        if self.specs().any(|spec| spec.nics.len() >= MAX_NICS) {
            let problem = format!("the VM has {MAX_NICS} adapters, expected no more");
            return Err(VmError::Invalid { key: "nic", problem });
        }
        match (&self.life, nic.kind) {
            (Life::Running(_), NicKind::Legacy) => {
                Err(self.wrong_state("off: a legacy adapter cannot be plugged in"))
            }
            _ => Ok(()),
        }
    }

    fn plug(&self, nic: &NicSpec) -> Result<(), VmError> {
        let plugged = self.settings.network.plug(&self.spec.name, nic);
        plugged.map_err(|source| VmError::Port { nic: nic.name.clone(), source })?;
        self.nics.lock().push(nic.clone());
        Ok(())
    }

    /// Takes a port away again.
    pub fn withdraw(&mut self, nic: &NicSpec) {
        self.nics.lock().retain(|other| other.name != nic.name);
        if let Err(error) = self.settings.network.unplug(&self.spec.name, nic) {
            tracing::warn!("VM {}: adapter {}: {error}", self.spec.name, nic.name);
        }
    }

    /// The guest has it.
    pub fn nic_added(&mut self, nic: NicSpec, reply: &Reply<()>) {
        self.change_specs(|spec| spec.nics.push(nic.clone()));
        let _ = reply.send(self.write_record());
    }

    pub fn remove_nic(&mut self, name: &str, reply: Reply<()>) {
        let refused = match (self.nics.find(name), &self.life) {
            (None, _) => Some(VmError::no_nic(name)),
            (Some(nic), Life::Running(_)) if nic.kind == NicKind::Legacy => {
                Some(self.wrong_state("off: a legacy adapter cannot be unplugged"))
            }
            _ => None,
        };
        match (refused, &self.life) {
            (Some(error), _) => {
                let _ = reply.send(Err(error));
            }
            (None, Life::Running(_)) => {
                let command = Command::RemoveNic { name: name.to_owned() };
                let pending = Pending::RemoveNic(name.to_owned(), reply);
                self.request(command, &[], self.settings.patience.answer, pending);
            }
            (None, Life::Off | Life::Waiting(_)) => self.nic_removed(name, &reply),
        }
    }

    /// The guest has it no more: the port goes too.
    pub fn nic_removed(&mut self, name: &str, reply: &Reply<()>) {
        if let Some(nic) = self.nics.find(name) {
            self.withdraw(&nic);
        }
        self.change_specs(|spec| spec.nics.retain(|nic| nic.name != name));
        let _ = reply.send(self.write_record());
    }

    /// Changes an adapter's port, now and for later starts.
    pub fn change_nic(&mut self, name: &str, change: PortChange) -> Result<(), VmError> {
        let nic = self.nics.find(name).ok_or_else(|| VmError::no_nic(name))?;
        let changed = self.settings.network.change(&self.spec.name, &nic, change.clone());
        changed.map_err(|source| VmError::Port { nic: nic.name.clone(), source })?;
        let apply = |nic: &mut NicSpec| {
            nic.mtu = change.mtu.unwrap_or(nic.mtu);
            nic.vlan = change.vlan.clone().unwrap_or_else(|| nic.vlan.clone());
            nic.spoofing = change.spoofing.unwrap_or(nic.spoofing);
            nic.coalesce = change.coalesce.unwrap_or(nic.coalesce);
            nic.address_limit = change.address_limit.unwrap_or(nic.address_limit);
        };
        self.nics.lock().iter_mut().filter(|nic| nic.name == name).for_each(apply);
        self.change_specs(|spec| spec.nics.iter_mut().filter(|nic| nic.name == name).for_each(apply));
        self.write_record()
    }

    /// The definition, and what runs.
    fn specs(&self) -> impl Iterator<Item = &VmSpec> {
        let running = match &self.life {
            Life::Running(run) => Some(&run.spec),
            Life::Off | Life::Waiting(_) => None,
        };
        std::iter::once(&self.spec).chain(running)
    }

    fn change_specs(&mut self, mut change: impl FnMut(&mut VmSpec)) {
        change(&mut self.spec);
        if let Life::Running(run) = &mut self.life {
            change(&mut run.spec);
        }
    }
}
