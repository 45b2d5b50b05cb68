//! Checks of what an operator asks for that do not depend on what exists already.

use std::ops::RangeInclusive;

use vmq::filter::MAX_VLAN;

use crate::error::FabricError;
use crate::spec::{Attachment, PortSpec, SwitchSpec, TapSpec, VlanMode, check_name};

fn name(name: &str) -> Result<(), FabricError> {
    check_name(name).map_err(|error| FabricError::invalid("name", error))
}

fn range<T: PartialOrd + std::fmt::Display>(
    key: &'static str,
    value: T,
    range: RangeInclusive<T>,
) -> Result<(), FabricError> {
    if range.contains(&value) {
        return Ok(());
    }
    let (low, high) = range.into_inner();
    Err(FabricError::invalid(key, format!("{value} is out of range, expected {low} to {high}")))
}

pub(super) fn switch(spec: &SwitchSpec) -> Result<(), FabricError> {
    name(&spec.name)?;
    range("addresses", spec.addresses, SwitchSpec::ADDRESSES_RANGE)?;
    range("aging", spec.aging, SwitchSpec::AGING_RANGE)
}

pub(super) fn mtu(mtu: u16) -> Result<(), FabricError> {
    range("mtu", mtu, PortSpec::MTU_RANGE)
}

pub(super) fn vlan_mode(mode: &VlanMode) -> Result<(), FabricError> {
    match mode {
        VlanMode::Passthrough => Ok(()),
        VlanMode::Access(id) => range("vlan.access", *id, VlanMode::IDS),
        VlanMode::Trunk { members, native } => {
            members.iter().try_for_each(|&id| range("vlan.trunk", id, VlanMode::IDS))?;
            native.map_or(Ok(()), |id| range("vlan.native", id, VlanMode::IDS))
        }
    }
}

pub(super) fn port(spec: &PortSpec) -> Result<(), FabricError> {
    name(&spec.name)?;
    mtu(spec.mtu)?;
    vlan_mode(&spec.vlan)?;
    let queues = spec.attachment.queues();
    range("queues", queues, PortSpec::QUEUES_RANGE)?;
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
        range("addresses.vlan", address.vlan, 0..=MAX_VLAN)?;
    }
    if spec.pin.len() > usize::from(queues) {
        return Err(FabricError::invalid(
            "pin",
            format!("{} processors for {queues} queues", spec.pin.len()),
        ));
    }
    Ok(())
}
