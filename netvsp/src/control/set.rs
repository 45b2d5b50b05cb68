//! SET: the OIDs a guest writes (fact sheet §6).

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, IntoBytes};

use super::query::MAX_MULTICAST;
use super::{Effect, Effects, Nvsp, Offloads, rss};
use crate::protocol::oid::{self, Oid};
use crate::protocol::rndis::{self, Event, Status};

impl Nvsp {
    /// Writes `info` to `oid`. Only called while RNDIS is initialised.
    pub(super) fn set(&mut self, oid: Oid, info: &[u8], effects: &mut Effects) -> Result<(), Status> {
        match oid {
            Oid::GEN_CURRENT_PACKET_FILTER => self.set_filter(info, effects),
            Oid::GEN_CURRENT_LOOKAHEAD | Oid::GEN_PROTOCOL_OPTIONS => word(info).map(drop),
            Oid::GEN_NETWORK_LAYER_ADDRESSES | Oid::GEN_TRANSPORT_HEADER_OFFSET => Ok(()),
            Oid::ETHERNET_MULTICAST_LIST => self.set_multicast(info, effects),
            Oid::GEN_RNDIS_CONFIG_PARAMETER => self.set_parameter(info, effects),
            Oid::GEN_RECEIVE_SCALE_PARAMETERS => self.set_rss(info, effects),
            Oid::OFFLOAD_PARAMETERS => self.set_offloads(info, effects),
            Oid::OFFLOAD_ENCAPSULATION => self.set_encapsulation(info),
            _ if oid.name().is_some() => Err(Status::NotSupported),
            _ => Err(Status::InvalidOid),
        }
    }

    fn device_mut(&mut self) -> Result<&mut super::Device, Status> {
        self.state.session_mut().and_then(super::Session::device_mut).ok_or(Status::Failure)
    }

    fn set_filter(&mut self, info: &[u8], effects: &mut Effects) -> Result<(), Status> {
        let filter = word(info)?;
        let device = self.device_mut()?;
        if device.filter != filter {
            device.filter = filter;
            effects.push(Effect::Changed);
        }
        Ok(())
    }

    fn set_multicast(&mut self, info: &[u8], effects: &mut Effects) -> Result<(), Status> {
        let (addresses, []) = info.as_chunks::<6>() else { return Err(Status::InvalidLength) };
        if addresses.len() > MAX_MULTICAST {
            return Err(Status::InvalidLength);
        }
        self.device_mut()?.multicast = addresses.to_vec();
        effects.push(Effect::Changed);
        Ok(())
    }

    /// The guest's own address, if it may choose one; other parameters are unknown.
    fn set_parameter(&mut self, info: &[u8], effects: &mut Effects) -> Result<(), Status> {
        let mac = oid::network_address(info).map_err(|()| Status::InvalidData)?;
        let mac = mac.ok_or(Status::NotSupported)?;
        if !mac.is_station() {
            return Err(Status::InvalidData);
        }
        if mac == self.mac {
            return Ok(());
        }
        if !self.config.spoofing && mac != self.config.mac {
            return Err(Status::Failure);
        }
        self.mac = mac;
        effects.push(Effect::Changed);
        Ok(())
    }

    fn set_rss(&mut self, info: &[u8], effects: &mut Effects) -> Result<(), Status> {
        let session = self.state.session().ok_or(Status::Failure)?;
        if session.version < super::Version::V5 {
            return Err(Status::NotSupported);
        }
        let spread = rss::parameters(session, info)?;
        self.device_mut()?.rss = spread;
        effects.push(Effect::Changed);
        Ok(())
    }

    /// The new offloads are indicated too, which Windows waits for.
    fn set_offloads(&mut self, info: &[u8], effects: &mut Effects) -> Result<(), Status> {
        let session = self.state.session().ok_or(Status::Failure)?;
        let (version, offered) = (session.version, Offloads::offered(&self.config, session));
        let device = self.device_mut()?;
        let offloads = device.offloads.with_parameters(offered, info)?;
        if device.offloads != offloads {
            device.offloads = offloads;
            effects.push(Effect::Changed);
        }
        let current = offloads.describe(version, &[]);
        effects.push(Effect::Indicate(rndis::indicate(Event::OffloadConfig, &current)));
        Ok(())
    }

    /// Frames are Ethernet, and nothing else is to be had: the guest only turns offloads on by it.
    fn set_encapsulation(&mut self, info: &[u8]) -> Result<(), Status> {
        let len = size_of::<oid::Encapsulation>();
        structure::<oid::Encapsulation>(info, len, oid::TYPE_ENCAPSULATION).map(drop)
    }
}

/// The NDIS structure of type `kind` at the start of `info`. One of `least` bytes and more, as older revisions are, has zeroes
/// for what it lacks.
pub(super) fn structure<T: FromBytes + IntoBytes>(info: &[u8], least: usize, kind: u8) -> Result<T, Status> {
    let mut value = T::new_zeroed();
    let len = info.len().min(size_of::<T>());
    match (value.as_mut_bytes().get_mut(..len), info.get(..len)) {
        (Some(to), Some(from)) if len >= least => to.copy_from_slice(from),
        _ => return Err(Status::InvalidLength),
    }
    // The header's first byte.
    if info.first() == Some(&kind) { Ok(value) } else { Err(Status::InvalidData) }
}

fn word(info: &[u8]) -> Result<u32, Status> {
    U32::read_from_prefix(info).map(|(word, _)| word.get()).map_err(|_| Status::InvalidLength)
}
