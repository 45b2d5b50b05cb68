//! QUERY: the OIDs a guest reads (fact sheet §6).

use serde::{Deserialize, Serialize};
use zerocopy::IntoBytes;
use zerocopy::little_endian::{U16, U32, U64};

use super::{ETHERNET_BYTES, MAX_PACKETS_PER_MESSAGE, Nvsp, Offloads, Session, rss};
use crate::protocol::nvsp::Version;
use crate::protocol::oid::{self, Encapsulation, ObjectHeader, Oid, StatisticsInfo};
use crate::protocol::rndis::Status;

/// Group addresses a guest may list; with more it asks for all.
pub(super) const MAX_MULTICAST: usize = 32;
/// Units of UTF-16 that Linux has room for in a name.
const MAX_NAME_UNITS: usize = 255;
/// `NDIS_MAC_OPTION_*`: lookahead is a copy, no transfer pends, no loopback, priority and VLAN in packet information.
const MAC_OPTIONS: u32 = 0x1 | 0x4 | 0x8 | 0x40 | 0x200;
/// A vendor without a number of its own.
const VENDOR_ID: u32 = 0xff_ffff;
const VENDOR_DESCRIPTION: &[u8] = b"Switchyard synthetic NIC\0";
/// NDIS 6.30.
const DRIVER_VERSION: u16 = 0x061e;

/// What a NIC has moved, as the guest sees it: "in" is to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Statistics {
    /// Frames to the guest: unicast, multicast, broadcast.
    pub in_frames: [u64; 3],
    /// Bytes to the guest.
    pub in_bytes: u64,
    /// Frames for the guest that it had no room for, or that were dropped for another reason.
    pub in_dropped: u64,
    /// Frames from the guest: unicast, multicast, broadcast.
    pub out_frames: [u64; 3],
    /// Bytes from the guest.
    pub out_bytes: u64,
    /// Frames from the guest that were dropped.
    pub out_dropped: u64,
}

impl Statistics {
    /// Frames from the guest, those that were dropped with them.
    pub(crate) fn sent(&self) -> u64 {
        sum(&self.out_frames).wrapping_add(self.out_dropped)
    }
}

impl Nvsp {
    /// The value of `oid`. `info` came with the question, and `room` is how many bytes the guest says it has. Only called
    /// while RNDIS is initialised.
    pub(super) fn query(&mut self, oid: Oid, info: &[u8], room: u32) -> Result<Vec<u8>, Status> {
        let session = self.state.session().ok_or(Status::Failure)?;
        let version = session.version;
        match oid {
            Oid::ETHERNET_PERMANENT_ADDRESS => Ok(self.config.mac.0.to_vec()),
            Oid::ETHERNET_CURRENT_ADDRESS => Ok(self.mac.0.to_vec()),
            Oid::ETHERNET_MULTICAST_LIST => {
                Ok(session.device().map(|device| device.multicast.concat()).unwrap_or_default())
            }
            Oid::GEN_FRIENDLY_NAME => Ok(name(&self.config.name)),
            Oid::GEN_SUPPORTED_LIST => {
                Ok(Oid::SUPPORTED.iter().flat_map(|oid| oid.0.to_le_bytes()).collect())
            }
            Oid::GEN_VENDOR_DESCRIPTION => Ok(VENDOR_DESCRIPTION.to_vec()),
            Oid::GEN_DRIVER_VERSION => Ok(DRIVER_VERSION.to_le_bytes().to_vec()),
            Oid::GEN_STATISTICS => Ok(statistics(&self.statistics)),
            Oid::GEN_XMIT_OK => Ok(count(sum(&self.statistics.out_frames), room)),
            Oid::GEN_RCV_OK => Ok(count(sum(&self.statistics.in_frames), room)),
            Oid::GEN_XMIT_ERROR => Ok(count(self.statistics.out_dropped, room)),
            Oid::GEN_RCV_NO_BUFFER => Ok(count(self.statistics.in_dropped, room)),
            Oid::GEN_RCV_ERROR
            | Oid::ETHERNET_RCV_ERROR_ALIGNMENT
            | Oid::ETHERNET_XMIT_ONE_COLLISION
            | Oid::ETHERNET_XMIT_MORE_COLLISIONS => Ok(count(0, room)),
            Oid::OFFLOAD_HARDWARE_CAPABILITIES => {
                Ok(Offloads::offered(&self.config, session).describe(version, info))
            }
            Oid::OFFLOAD_CURRENT_CONFIG => {
                let offloads = session.device().map(|device| device.offloads).unwrap_or_default();
                Ok(offloads.describe(version, info))
            }
            Oid::OFFLOAD_ENCAPSULATION => Ok(encapsulation()),
            Oid::GEN_RECEIVE_SCALE_CAPABILITIES if version >= Version::V5 => {
                Ok(rss::capabilities(self.config.queues))
            }
            Oid::GEN_MEDIA_CONNECT_STATUS => {
                let up = self.link.is_up();
                let told = self.link.tell();
                self.learnt(|known| known.up = told.up);
                Ok(u32::from(!up).to_le_bytes().to_vec())
            }
            Oid::GEN_LINK_SPEED => {
                let mbps = self.link.mbps();
                self.learnt(|known| known.mbps = mbps);
                Ok(self.link.speed().to_le_bytes().to_vec())
            }
            _ => self.query_word(oid).map(|word| word.to_le_bytes().to_vec()),
        }
    }

    /// General OIDs whose value is one word.
    fn query_word(&self, oid: Oid) -> Result<u32, Status> {
        let mtu = u32::from(self.mtu());
        let frame = mtu + ETHERNET_BYTES;
        let data_path = self.data_path();
        let space = |buffer: Option<super::SectionedBuffer>| {
            buffer.map_or(frame, |buffer| u32::try_from(buffer.bytes()).unwrap_or(u32::MAX))
        };
        Ok(match oid {
            Oid::GEN_HARDWARE_STATUS
            | Oid::GEN_MEDIA_SUPPORTED
            | Oid::GEN_MEDIA_IN_USE
            | Oid::GEN_PHYSICAL_MEDIUM
            | Oid::GEN_PROTOCOL_OPTIONS
            | Oid::ETHERNET_MAC_OPTIONS => 0,
            Oid::GEN_MAXIMUM_FRAME_SIZE | Oid::GEN_MAXIMUM_LOOKAHEAD | Oid::GEN_CURRENT_LOOKAHEAD => mtu,
            Oid::GEN_MAXIMUM_TOTAL_SIZE | Oid::GEN_TRANSMIT_BLOCK_SIZE | Oid::GEN_RECEIVE_BLOCK_SIZE => frame,
            Oid::GEN_TRANSMIT_BUFFER_SPACE => space(data_path.send),
            Oid::GEN_RECEIVE_BUFFER_SPACE => space(data_path.receive),
            Oid::GEN_VENDOR_ID => VENDOR_ID,
            Oid::GEN_VENDOR_DRIVER_VERSION => 0x1_0000,
            Oid::GEN_CURRENT_PACKET_FILTER => data_path.filter.bits(),
            Oid::GEN_MAC_OPTIONS => MAC_OPTIONS,
            Oid::GEN_MAXIMUM_SEND_PACKETS => MAX_PACKETS_PER_MESSAGE,
            Oid::ETHERNET_MAXIMUM_LIST_SIZE => 32,
            _ if oid.name().is_some() => return Err(Status::NotSupported),
            _ => return Err(Status::InvalidOid),
        })
    }

    /// The guest asked about its link, so it need not be told.
    fn learnt(&mut self, learn: impl FnOnce(&mut super::link::Told)) {
        if let Some(device) = self.state.session_mut().and_then(Session::device_mut) {
            learn(&mut device.told);
        }
    }
}

const _: () = assert!(MAX_MULTICAST == 32);

/// Frames of all kinds. What was restored may be any number.
fn sum(frames: &[u64; 3]) -> u64 {
    frames.iter().fold(0, |sum, more| sum.wrapping_add(*more))
}

/// A counter: eight bytes if the guest has room for them, else the low four.
fn count(count: u64, room: u32) -> Vec<u8> {
    let bytes = count.to_le_bytes();
    if room >= 8 { bytes.to_vec() } else { bytes[..4].to_vec() }
}

/// `name` in UTF-16, cut to what guests have room for, never within a character.
fn name(name: &str) -> Vec<u8> {
    let mut units = 0;
    let fitting = name.chars().take_while(|character| {
        units += character.len_utf16();
        units <= MAX_NAME_UNITS
    });
    oid::utf16(&fitting.collect::<String>()).collect()
}

fn encapsulation() -> Vec<u8> {
    let ethernet = [U32::new(1), U32::new(2), U32::new(ETHERNET_BYTES)];
    let header = ObjectHeader { kind: oid::TYPE_ENCAPSULATION, revision: 1, size: U16::new(28) };
    Encapsulation { header, ipv4: ethernet, ipv6: ethernet }.as_bytes().to_vec()
}

fn statistics(statistics: &Statistics) -> Vec<u8> {
    /// `NDIS_STATISTICS_FLAGS_VALID_*`: frames by kind, bytes, and drops, both ways.
    const SUPPORTED: u32 = 0x1 | 0x2 | 0x4 | 0x8 | 0x10 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400;
    let info = StatisticsInfo {
        header: ObjectHeader { kind: oid::TYPE_DEFAULT, revision: 1, size: U16::new(152) },
        supported: U32::new(SUPPORTED),
        in_discards: U64::new(statistics.in_dropped),
        in_octets: U64::new(statistics.in_bytes),
        in_frames: statistics.in_frames.map(U64::new),
        out_octets: U64::new(statistics.out_bytes),
        out_frames: statistics.out_frames.map(U64::new),
        out_discards: U64::new(statistics.out_dropped),
        ..StatisticsInfo::default()
    };
    info.as_bytes().to_vec()
}
