//! What is asked of the switch, and what it answers.
//!
//! A switch that is not there touches nothing: what it would be asked to give up is given up at once, and what it would be
//! given waits in the root until one connects and is told everything.

use vmbus::handover::{FromSwitch, FromVmm};
use vmbus::root::{ChannelKey, DeviceId, GpadlId};

use super::host::Host;

/// Why an adapter is taken from the guest and offered anew.
const NOT_TAKEN_OVER: &str = "the switch could not take its channels over; it is plugged in anew";

impl Host {
    pub(super) fn give_gpadl(
        &mut self,
        id: DeviceId,
        gpadl: GpadlId,
        byte_count: u32,
        byte_offset: u32,
        pfns: Vec<u64>,
    ) {
        let (Some(link), Some(device)) = (&self.switch, self.nics.get_mut(&id)) else { return };
        device.gpadls.insert(gpadl.0, false);
        link.send(&FromVmm::Gpadl { device: id.0, gpadl: gpadl.0, byte_count, byte_offset, pfns });
    }

    pub(super) fn ask_for_gpadl(&mut self, id: DeviceId, gpadl: GpadlId) {
        let device = self.nics.get_mut(&id).and_then(|device| device.gpadls.get_mut(&gpadl.0));
        match (&self.switch, device) {
            (Some(link), Some(asked)) => {
                *asked = true;
                link.send(&FromVmm::GpadlTeardown { device: id.0, gpadl: gpadl.0 });
            }
            _ => self.root.gpadl_released(id, gpadl),
        }
    }

    /// Has the switch serve a channel whose wires are tied.
    pub(super) fn give_channel(
        &mut self,
        key: ChannelKey,
        relid: u32,
        gpadl: GpadlId,
        downstream_page: u32,
        resumed: bool,
    ) {
        let (Some(link), Some(device)) = (&self.switch, self.nics.get_mut(&key.device)) else { return };
        let doorbell = self.wires.get(key).and_then(|wire| {
            use std::os::fd::AsFd;
            Some((wire.vp(), wire.doorbell.as_fd().try_clone_to_owned().ok()?))
        });
        let (Some((vp, doorbell)), Some(target)) = (doorbell, self.wires.target(key)) else {
            self.root.opened(key, false);
            return;
        };
        device.channels.insert(key.index, false);
        if resumed {
            device.resuming.insert(key.index);
        }
        link.send(&FromVmm::Open {
            device: key.device.0,
            index: key.index,
            relid,
            gpadl: gpadl.0,
            downstream_page,
            vp,
            target,
            doorbell,
            resumed,
        });
    }

    pub(super) fn ask_for_channel(&mut self, key: ChannelKey) {
        let device = self.nics.get_mut(&key.device);
        let asked = device.and_then(|device| device.channels.get_mut(&key.index));
        match (&self.switch, asked) {
            (Some(link), Some(asked)) => {
                *asked = true;
                link.send(&FromVmm::Close { device: key.device.0, index: key.index });
            }
            _ => {
                self.wires.untie(key);
                self.root.closed(key);
            }
        }
    }

    /// The switch says something. What makes no sense is ignored: it may have crossed with what it was told.
    pub(super) fn hear(&mut self, number: u64, said: FromSwitch) {
        if self.switch.as_ref().is_none_or(|link| link.number != number) {
            return;
        }
        let draining = self.draining.is_some();
        match said {
            FromSwitch::Opened { device, index, ok } => {
                let key = ChannelKey { device: DeviceId(device), index };
                let Some(nic) = self.nics.get_mut(&key.device) else { return };
                let Some(asked) = nic.channels.get(&index).copied() else { return };
                let lost = nic.resuming.remove(&index) && !ok && !asked && !draining;
                if !ok && !asked {
                    nic.channels.remove(&index);
                    self.wires.untie(key);
                }
                if lost {
                    // The guest believes it open, and cannot be told otherwise.
                    nic.again = true;
                    (self.on_fault)(&nic.nic.name, NOT_TAKEN_OVER);
                    nic.fault = Some(NOT_TAKEN_OVER.into());
                    self.root.withdraw(key.device);
                }
                if !draining {
                    self.root.opened(key, ok);
                }
            }
            FromSwitch::Closed { device, index } => {
                let key = ChannelKey { device: DeviceId(device), index };
                let Some(nic) = self.nics.get_mut(&key.device) else { return };
                if nic.channels.remove(&index).is_none() {
                    return;
                }
                if index == 0 {
                    nic.fault = None;
                }
                self.wires.untie(key);
                if !draining {
                    self.root.closed(key);
                }
            }
            FromSwitch::GpadlAccepted { device, gpadl, ok } => {
                let Some(nic) = self.nics.get_mut(&DeviceId(device)) else { return };
                let Some(asked) = nic.gpadls.get(&gpadl).copied() else { return };
                if !ok && !asked {
                    nic.gpadls.remove(&gpadl);
                }
                if !draining {
                    self.root.gpadl_accepted(DeviceId(device), GpadlId(gpadl), ok);
                }
            }
            FromSwitch::GpadlReleased { device, gpadl } => {
                let Some(nic) = self.nics.get_mut(&DeviceId(device)) else { return };
                if nic.gpadls.remove(&gpadl).is_some() && !draining {
                    self.root.gpadl_released(DeviceId(device), GpadlId(gpadl));
                }
            }
            FromSwitch::Quiet { device } => {
                let nic = self.nics.get_mut(&DeviceId(device));
                if nic.is_some_and(|nic| nic.quiet_by.take().is_some()) {
                    self.root.withdraw(DeviceId(device));
                }
            }
            FromSwitch::Retargeted { device, index } => {
                if !draining {
                    self.root.modified(ChannelKey { device: DeviceId(device), index });
                }
            }
            FromSwitch::OfferSubchannels { device, count } => {
                if !draining && let Err(error) = self.root.offer_subchannels(DeviceId(device), count) {
                    tracing::warn!(%error, device, count, "subchannels cannot be offered");
                }
            }
            FromSwitch::Fault { device, reason } => {
                if let Some(nic) = self.nics.get_mut(&DeviceId(device)) {
                    (self.on_fault)(&nic.nic.name, &reason);
                    nic.fault = Some(reason);
                }
            }
        }
    }

    pub(super) fn switch_left(&mut self, number: u64) {
        if self.switch.as_ref().is_some_and(|link| link.number == number) {
            tracing::info!("the switch is gone; adapters wait for the next");
            self.switch = None;
            self.forget_switch();
        }
    }

    /// Whatever the switch was asked for has come about with its end.
    pub(super) fn forget_switch(&mut self) {
        let draining = self.draining.is_some();
        for (&id, device) in &mut self.nics {
            let closing: Vec<u16> =
                device.channels.iter().filter(|(_, asked)| **asked).map(|(index, _)| *index).collect();
            for index in closing {
                self.wires.untie(ChannelKey { device: id, index });
            }
            device.lost();
            if !draining {
                self.root.device_side_lost(id);
            }
        }
    }
}
