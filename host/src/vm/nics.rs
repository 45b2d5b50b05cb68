//! Adapters that come, go and change while their VM lives.

use std::time::Instant;

use hypervisor::control::{Command, NicKind};
use vswitch::fabric::PortChange;

use super::error::VmError;
use super::spec::{LinkState, NicChange, NicSpec, VmSpec};
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
        self.link_wanted(&nic.name);
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

    /// Changes an adapter and its port, now and for later starts.
    pub fn change_nic(&mut self, name: &str, change: &NicChange, reply: Reply<()>) {
        let apply = |nic: &mut NicSpec| {
            let port = &change.port;
            nic.mac = change.mac.map_or_else(|| nic.mac.clone(), |mac| mac.to_string());
            nic.link = change.link.unwrap_or(nic.link);
            nic.mtu = port.mtu.unwrap_or(nic.mtu);
            nic.vlan = port.vlan.clone().unwrap_or_else(|| nic.vlan.clone());
            nic.spoofing = port.spoofing.unwrap_or(nic.spoofing);
            nic.coalesce = port.coalesce.unwrap_or(nic.coalesce);
            nic.address_limit = port.address_limit.unwrap_or(nic.address_limit);
        };
        let nic = self.nics.find(name).ok_or_else(|| VmError::no_nic(name));
        let changed = nic.and_then(|nic| {
            let mut wanted = nic.clone();
            apply(&mut wanted);
            match nic.mac == wanted.mac {
                true => self.change_port(&nic, &change.port),
                false => self.exchange(&nic, &wanted),
            }?;
            self.nics.lock().iter_mut().filter(|nic| nic.name == name).for_each(apply);
            self.change_specs(|spec| spec.nics.iter_mut().filter(|nic| nic.name == name).for_each(apply));
            self.write_record().map(|()| nic.kind)
        });
        match (changed, change.link, &self.life) {
            (Ok(NicKind::Legacy), Some(link), Life::Running(_)) => {
                let command = Command::SetLink { name: name.to_owned(), up: link == LinkState::Up };
                self.request(command, &[], self.settings.patience.answer, Pending::Command(reply));
            }
            (changed, ..) => {
                self.link_wanted(name);
                let _ = reply.send(changed.map(|_| ()));
            }
        }
    }

    fn change_port(&self, nic: &NicSpec, change: &PortChange) -> Result<(), VmError> {
        if *change == PortChange::default() {
            return Ok(());
        }
        let changed = self.settings.network.change(&self.spec.name, nic, change.clone());
        changed.map_err(|source| VmError::Port { nic: nic.name.clone(), source })
    }

    /// Puts a port with another address in the place of the one that is there.
    fn exchange(&self, nic: &NicSpec, wanted: &NicSpec) -> Result<(), VmError> {
        if let Life::Running(_) = self.life {
            return Err(self.wrong_state(
                "off: drivers ask for an adapter's address when they start; or remove the adapter, and add it with the other address",
            ));
        }
        let same = |other: &NicSpec| {
            (&other.mac, &other.switch, &other.vlan) == (&wanted.mac, &wanted.switch, &wanted.vlan)
        };
        if let Some(other) = self.nics.lock().iter().find(|other| other.name != nic.name && same(other)) {
            let problem =
                format!("{} is the address of {} already, expected another", wanted.mac, other.name);
            return Err(VmError::Invalid { key: "mac", problem });
        }
        let (network, vm) = (&self.settings.network, &self.spec.name);
        // A port that somebody removed already is as good.
        let _ = network.unplug(vm, nic);
        network.plug(vm, wanted).map_err(|source| {
            let _ = network.plug(vm, nic);
            VmError::Port { nic: nic.name.clone(), source }
        })
    }

    /// The switch is to be told of this adapter's link.
    fn link_wanted(&mut self, name: &str) {
        let now = Instant::now();
        if let Life::Running(run) = &mut self.life {
            run.channels.links.wanted(name, now);
        }
        self.set_links(now);
    }

    /// Tells the switch of links, while any is down again and again: an adapter that it serves anew has its link up.
    pub fn set_links(&mut self, now: Instant) {
        let Life::Running(run) = &mut self.life else { return };
        if run.channels.links_due().is_some_and(|due| due <= now) {
            // A copy: no lock is held while the switch is told.
            let nics = self.nics.lock().clone();
            run.channels.set_links(&nics, now);
        }
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
