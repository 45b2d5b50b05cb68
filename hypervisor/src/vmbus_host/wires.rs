//! The two wires of each open channel: the guest's signals to an eventfd, and interrupts to one of its processors.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::Arc;

use vmbus::channel::InterruptTarget;
use vmbus::protocol::MAX_RELID;
use vmbus::root::ChannelKey;
use vmq::doorbell::Doorbell;

use super::Machine;

/// Wires of one channel.
#[derive(Debug)]
pub(super) struct Wire {
    /// The channel's event flag.
    flag: u16,
    /// What the guest signals.
    connection: u32,
    /// Rung by those signals. The same over restarts of the switch.
    pub doorbell: Arc<Doorbell>,
    /// The processor that the guest chose.
    vp: u32,
    /// Where its event flags are.
    flags_gpa: u64,
}

impl Wire {
    pub fn vp(&self) -> u32 {
        self.vp
    }
}

/// Wires of all open channels.
#[derive(Debug, Default)]
pub(super) struct Wires {
    machine: Option<Machine>,
    wires: BTreeMap<ChannelKey, Wire>,
}

impl Wires {
    pub fn attach(&mut self, machine: Machine) {
        self.clear();
        self.machine = Some(machine);
    }

    pub fn detach(&mut self) {
        self.clear();
        self.machine = None;
    }

    pub fn machine(&self) -> Option<&Machine> {
        self.machine.as_ref()
    }

    /// Unties all channels.
    pub fn clear(&mut self) {
        for key in self.wires.keys().copied().collect::<Vec<_>>() {
            self.untie(key);
        }
    }

    /// Ties a channel that the guest opens. `None` if its processor takes no interrupts, or the kernel refuses.
    pub fn tie(&mut self, key: ChannelKey, relid: u32, connection: u32, vp: u32) -> Option<&Wire> {
        self.untie(key);
        let machine = self.machine.as_ref()?;
        let flag = u16::try_from(relid).ok().filter(|_| relid <= MAX_RELID)?;
        let flags_gpa = machine.synic.registers(vp)?.flags()?;
        let doorbell = Arc::new(Doorbell::new().ok()?);
        if let Err(error) = machine.events.tie(connection, &doorbell) {
            tracing::error!(%error, %key, "channel cannot be opened");
            return None;
        }
        let wire = Wire { flag, connection, doorbell, vp, flags_gpa };
        Some(self.wires.entry(key).or_insert(wire))
    }

    /// Unties a channel that is closed.
    pub fn untie(&mut self, key: ChannelKey) {
        if let Some(wire) = self.wires.remove(&key)
            && let Some(machine) = &self.machine
        {
            machine.events.untie(wire.connection);
        }
    }

    pub fn get(&self, key: ChannelKey) -> Option<&Wire> {
        self.wires.get(&key)
    }

    /// Where the channel's interrupts go.
    pub fn target(&self, key: ChannelKey) -> Option<InterruptTarget> {
        let wire = self.get(key)?;
        let eventfd = self.machine.as_ref()?.synic.interrupt(wire.vp)?;
        let eventfd = eventfd.as_fd().try_clone_to_owned().ok()?;
        Some(InterruptTarget { flags_gpa: wire.flags_gpa, flag: wire.flag, eventfd })
    }

    /// The guest chose another processor, or moved the flags of the one it has. True if interrupts go elsewhere now. While
    /// the new place takes none they stay where they are.
    pub fn retarget(&mut self, key: ChannelKey, vp: u32) -> bool {
        let registers = self.machine.as_ref().and_then(|machine| machine.synic.registers(vp));
        let flags = registers.and_then(|registers| registers.flags());
        let (Some(wire), Some(flags)) = (self.wires.get_mut(&key), flags) else { return false };
        let changed = (wire.vp, wire.flags_gpa) != (vp, flags);
        (wire.vp, wire.flags_gpa) = (vp, flags);
        changed
    }

    /// Channels whose interrupts go to a processor.
    pub fn of(&self, vp: u32) -> Vec<ChannelKey> {
        self.wires.iter().filter(|(_, wire)| wire.vp == vp).map(|(key, _)| *key).collect()
    }
}
