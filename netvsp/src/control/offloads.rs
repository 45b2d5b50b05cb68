//! Offload capabilities and parameters (fact sheet §6a, §6b).

use serde::{Deserialize, Serialize};
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, IntoBytes};

use super::NicConfig;
use super::set::structure;
use super::state::Session;
use crate::protocol::nvsp::Version;
use crate::protocol::oid::{
    self, ChecksumCapability, LsoV4, LsoV6, ObjectHeader, Offload, OffloadParameters, checksum,
};
use crate::protocol::rndis::Status;

/// Bytes of a large send: what one IP packet holds, less the longest IPv4 and TCP headers. Guests take it for the limit of
/// payload or of the packet; it is safe as either.
pub(super) const MAX_LSO_BYTES: u32 = 65_535 - 60 - 60;
/// Fewer segments are no large send.
const MIN_SEGMENTS: u32 = 2;
/// `NDIS_ENCAPSULATION_IEEE_802_3`.
const ETHERNET: u32 = 2;
/// The shortest parameters that anybody sends.
const MIN_PARAMETERS: usize = 20;

/// Who computes a checksum: the host for frames sent, for frames received.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ChecksumDirections {
    /// The guest leaves it to the host.
    pub tx: bool,
    /// The host says whether it is right.
    pub rx: bool,
}

impl ChecksumDirections {
    const BOTH: Self = Self { tx: true, rx: true };

    const fn and(self, other: Self) -> Self {
        Self { tx: self.tx && other.tx, rx: self.rx && other.rx }
    }

    /// A parameter: 0 as before, 1 neither, 2 sent, 3 received, 4 both.
    fn parameter(self, value: u8) -> Result<Self, Status> {
        Ok(match value {
            0 => self,
            1 => Self::default(),
            2 => Self { tx: true, rx: false },
            3 => Self { tx: false, rx: true },
            4 => Self::BOTH,
            _ => return Err(Status::InvalidData),
        })
    }
}

/// A parameter: 0 as before, 1 off, 2 on.
fn switch(before: bool, value: u8) -> Result<bool, Status> {
    match value {
        0 => Ok(before),
        1 => Ok(false),
        2 => Ok(true),
        _ => Err(Status::InvalidData),
    }
}

/// What is offloaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Offloads {
    /// IPv4 header checksum.
    pub ipv4: ChecksumDirections,
    /// TCP over IPv4.
    pub tcp4: ChecksumDirections,
    /// UDP over IPv4.
    pub udp4: ChecksumDirections,
    /// TCP over IPv6.
    pub tcp6: ChecksumDirections,
    /// UDP over IPv6.
    pub udp6: ChecksumDirections,
    /// Large sends over IPv4.
    pub lso_v4: bool,
    /// Large sends over IPv6.
    pub lso_v6: bool,
    /// Coalesced segments over IPv4.
    pub rsc_v4: bool,
    /// Coalesced segments over IPv6.
    pub rsc_v6: bool,
}

impl Offloads {
    /// All that host and guest can do.
    pub(super) fn offered(config: &NicConfig, session: &Session) -> Self {
        let rsc = config.rsc && session.takes_rsc();
        let base = Self { rsc_v4: rsc, rsc_v6: rsc, ..Self::default() };
        if !config.offloads {
            return base;
        }
        let both = ChecksumDirections::BOTH;
        Self {
            ipv4: both,
            tcp4: both,
            udp4: both,
            tcp6: both,
            udp6: both,
            lso_v4: true,
            lso_v6: true,
            ..base
        }
    }

    /// What of an offer is on before the guest says anything: all but RSC, which guests ask for.
    pub(super) fn at_first(self) -> Self {
        Self { rsc_v4: false, rsc_v6: false, ..self }
    }

    /// What is in both.
    pub(super) fn and(self, other: Self) -> Self {
        Self {
            ipv4: self.ipv4.and(other.ipv4),
            tcp4: self.tcp4.and(other.tcp4),
            udp4: self.udp4.and(other.udp4),
            tcp6: self.tcp6.and(other.tcp6),
            udp6: self.udp6.and(other.udp6),
            lso_v4: self.lso_v4 && other.lso_v4,
            lso_v6: self.lso_v6 && other.lso_v6,
            rsc_v4: self.rsc_v4 && other.rsc_v4,
            rsc_v6: self.rsc_v6 && other.rsc_v6,
        }
    }

    /// As `OFFLOAD_PARAMETERS` change it. What was not offered stays off, whatever the guest says. Shorter parameters of
    /// older revisions say nothing about the fields they lack.
    pub(super) fn with_parameters(self, offered: Self, info: &[u8]) -> Result<Self, Status> {
        let parameters: OffloadParameters = structure(info, MIN_PARAMETERS, oid::TYPE_DEFAULT)?;
        let wanted = Self {
            ipv4: self.ipv4.parameter(parameters.ipv4)?,
            tcp4: self.tcp4.parameter(parameters.tcp4)?,
            udp4: self.udp4.parameter(parameters.udp4)?,
            tcp6: self.tcp6.parameter(parameters.tcp6)?,
            udp6: self.udp6.parameter(parameters.udp6)?,
            lso_v4: switch(self.lso_v4, parameters.lso_v4)?,
            lso_v6: switch(self.lso_v6, parameters.lso_v6)?,
            rsc_v4: switch(self.rsc_v4, parameters.rsc_v4)?,
            rsc_v6: switch(self.rsc_v6, parameters.rsc_v6)?,
        };
        Ok(wanted.and(offered))
    }

    /// As `NDIS_OFFLOAD`, in the revision that `version` brought, or in a shorter one that `asked` has room for.
    pub(super) fn describe(self, version: Version, asked: &[u8]) -> Vec<u8> {
        let newest: u16 = match version {
            Version::V1 | Version::V2 => 112,
            Version::V4 => 144,
            Version::V5 | Version::V6 | Version::V61 => 156,
        };
        let room = match ObjectHeader::read_from_prefix(asked) {
            Ok((header, _)) if header.kind == oid::TYPE_OFFLOAD => header.size.get(),
            _ => newest,
        };
        let (revision, size) = match newest.min(room) {
            156.. => (3, 156),
            144.. => (2, 144),
            _ => (1, 112),
        };
        let mut offload = self.capabilities();
        offload.header = ObjectHeader { kind: oid::TYPE_OFFLOAD, revision, size: U16::new(size) };
        let mut bytes = offload.as_bytes().to_vec();
        bytes.truncate(size.into());
        bytes
    }

    fn capabilities(self) -> Offload {
        let v4 = |tcp: bool, udp: bool, ip: bool| {
            capability(tcp, udp, if ip { checksum::IP_HEADER | checksum::IP_OPTIONS } else { 0 })
        };
        let v6 = |tcp: bool, udp: bool| capability(tcp, udp, if tcp { checksum::IP_OPTIONS } else { 0 });
        Offload {
            ipv4_tx: v4(self.tcp4.tx, self.udp4.tx, self.ipv4.tx),
            ipv4_rx: v4(self.tcp4.rx, self.udp4.rx, self.ipv4.rx),
            ipv6_tx: v6(self.tcp6.tx, self.udp6.tx),
            ipv6_rx: v6(self.tcp6.rx, self.udp6.rx),
            lso_v4: if self.lso_v4 {
                LsoV4 {
                    encapsulation: U32::new(ETHERNET),
                    max_size: U32::new(MAX_LSO_BYTES),
                    min_segments: U32::new(MIN_SEGMENTS),
                }
            } else {
                LsoV4::default()
            },
            lso_v6: if self.lso_v6 {
                LsoV6 {
                    encapsulation: U32::new(ETHERNET),
                    max_size: U32::new(MAX_LSO_BYTES),
                    min_segments: U32::new(MIN_SEGMENTS),
                    options: U32::new(checksum::IP_OPTIONS | checksum::TCP_OPTIONS),
                }
            } else {
                LsoV6::default()
            },
            rsc_v4: self.rsc_v4.into(),
            rsc_v6: self.rsc_v6.into(),
            ..Offload::default()
        }
    }
}

fn capability(tcp: bool, udp: bool, more: u32) -> ChecksumCapability {
    let tcp = if tcp { checksum::TCP | checksum::TCP_OPTIONS } else { 0 };
    let flags = tcp | if udp { checksum::UDP } else { 0 } | more;
    let encapsulation = if flags == 0 { 0 } else { ETHERNET };
    ChecksumCapability { encapsulation: U32::new(encapsulation), flags: U32::new(flags) }
}
