//! Checks of what an operator asks for that do not depend on what exists already.

use vmq::filter::MAX_VLAN;

use crate::error::FabricError;
use crate::spec::{Attachment, PortSpec, SwitchSpec, TapSpec, VlanMode};

/// The longest name of a switch or port.
pub const MAX_NAME: usize = 32;

fn name(key: &'static str, name: &str) -> Result<(), FabricError> {
    let good = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(good) || name.starts_with(['.', '-']) {
        let expected = "1 to 32 letters, digits, `-`, `_` or `.`, not beginning with `.` or `-`";
        return Err(FabricError::invalid(key, format!("{name:?} is no name, expected {expected}")));
    }
    Ok(())
}

fn range(key: &'static str, value: u64, low: u64, high: u64) -> Result<(), FabricError> {
    if (low..=high).contains(&value) {
        return Ok(());
    }
    Err(FabricError::invalid(key, format!("{value} is out of range, expected {low} to {high}")))
}

fn vlan(key: &'static str, vlan: u16) -> Result<(), FabricError> {
    range(key, u64::from(vlan), 1, u64::from(MAX_VLAN))
}

pub(super) fn switch(spec: &SwitchSpec) -> Result<(), FabricError> {
    name("name", &spec.name)?;
    range("addresses", spec.addresses as u64, 1, SwitchSpec::MAX_ADDRESSES as u64)?;
    range("aging", u64::from(spec.aging), 10, 1_000_000.min(u64::from(crate::fdb::MAX_AGING)))
}

pub(super) fn mtu(mtu: u16) -> Result<(), FabricError> {
    range("mtu", u64::from(mtu), u64::from(PortSpec::MIN_MTU), u64::from(PortSpec::MAX_MTU))
}

pub(super) fn vlan_mode(mode: &VlanMode) -> Result<(), FabricError> {
    match mode {
        VlanMode::Passthrough => Ok(()),
        VlanMode::Access(id) => vlan("vlan.access", *id),
        VlanMode::Trunk { members, native } => {
            members.iter().try_for_each(|&id| vlan("vlan.trunk", id))?;
            native.map_or(Ok(()), |id| vlan("vlan.native", id))
        }
    }
}

pub(super) fn port(spec: &PortSpec) -> Result<(), FabricError> {
    name("name", &spec.name)?;
    mtu(spec.mtu)?;
    vlan_mode(&spec.vlan)?;
    let queues = spec.attachment.queues();
    range("queues", u64::from(queues), 1, u64::from(PortSpec::MAX_QUEUES))?;
    if let Attachment::Tap { tap: TapSpec::Fds(fds), .. } = &spec.attachment
        && fds.len() != usize::from(queues)
    {
        return Err(FabricError::invalid(
            "tap.fds",
            format!("{} descriptors for {queues} queues", fds.len()),
        ));
    }
    if let Some(mac) = spec.mac
        && !mac.is_station()
    {
        return Err(FabricError::invalid("mac", format!("{mac} is no address of a station")));
    }
    for address in &spec.addresses {
        if !address.mac.is_station() {
            return Err(FabricError::invalid(
                "addresses",
                format!("{} is no address of a station", address.mac),
            ));
        }
        range("addresses.vlan", u64::from(address.vlan), 0, u64::from(MAX_VLAN))?;
    }
    if spec.pin.len() > usize::from(queues) {
        return Err(FabricError::invalid(
            "pin",
            format!("{} processors for {queues} queues", spec.pin.len()),
        ));
    }
    Ok(())
}
