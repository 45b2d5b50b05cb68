//! OIDs: the objects of a NIC that a guest reads and writes, and the NDIS structures that are their values (fact sheet
//! §6). Numbers of general OIDs: `ntddndis.h`.

use std::fmt;

use vmq::Mac;
use zerocopy::FromBytes;
use zerocopy::little_endian::{U16, U32, U64};

use super::wire;

/// Number of an object.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Oid(pub u32);

/// The known OIDs: constants, their list, and their names.
macro_rules! oids {
    ($($name:ident = $value:literal;)*) => {
        #[expect(missing_docs, reason = "the names are NDIS's, OID_ left off, and say what they are")]
        impl Oid {
            $(pub const $name: Self = Self($value);)*

            /// All that a NIC knows, as `SUPPORTED_LIST` tells.
            pub const SUPPORTED: &[Self] = &[$(Self::$name),*];

            /// Its name, if it is known.
            pub const fn name(self) -> Option<&'static str> {
                match self.0 { $($value => Some(stringify!($name)),)* _ => None }
            }
        }
    };
}

oids! {
    GEN_SUPPORTED_LIST = 0x0001_0101;
    GEN_HARDWARE_STATUS = 0x0001_0102;
    GEN_MEDIA_SUPPORTED = 0x0001_0103;
    GEN_MEDIA_IN_USE = 0x0001_0104;
    GEN_MAXIMUM_LOOKAHEAD = 0x0001_0105;
    GEN_MAXIMUM_FRAME_SIZE = 0x0001_0106;
    GEN_LINK_SPEED = 0x0001_0107;
    GEN_TRANSMIT_BUFFER_SPACE = 0x0001_0108;
    GEN_RECEIVE_BUFFER_SPACE = 0x0001_0109;
    GEN_TRANSMIT_BLOCK_SIZE = 0x0001_010A;
    GEN_RECEIVE_BLOCK_SIZE = 0x0001_010B;
    GEN_VENDOR_ID = 0x0001_010C;
    GEN_VENDOR_DESCRIPTION = 0x0001_010D;
    GEN_CURRENT_PACKET_FILTER = 0x0001_010E;
    GEN_CURRENT_LOOKAHEAD = 0x0001_010F;
    GEN_DRIVER_VERSION = 0x0001_0110;
    GEN_MAXIMUM_TOTAL_SIZE = 0x0001_0111;
    GEN_PROTOCOL_OPTIONS = 0x0001_0112;
    GEN_MAC_OPTIONS = 0x0001_0113;
    GEN_MEDIA_CONNECT_STATUS = 0x0001_0114;
    GEN_MAXIMUM_SEND_PACKETS = 0x0001_0115;
    GEN_VENDOR_DRIVER_VERSION = 0x0001_0116;
    GEN_NETWORK_LAYER_ADDRESSES = 0x0001_0118;
    GEN_TRANSPORT_HEADER_OFFSET = 0x0001_0119;
    GEN_PHYSICAL_MEDIUM = 0x0001_0202;
    GEN_RECEIVE_SCALE_CAPABILITIES = 0x0001_0203;
    GEN_RECEIVE_SCALE_PARAMETERS = 0x0001_0204;
    GEN_RNDIS_CONFIG_PARAMETER = 0x0001_021B;
    GEN_XMIT_OK = 0x0002_0101;
    GEN_RCV_OK = 0x0002_0102;
    GEN_XMIT_ERROR = 0x0002_0103;
    GEN_RCV_ERROR = 0x0002_0104;
    GEN_RCV_NO_BUFFER = 0x0002_0105;
    GEN_STATISTICS = 0x0002_0106;
    GEN_FRIENDLY_NAME = 0x0002_0216;
    ETHERNET_PERMANENT_ADDRESS = 0x0101_0101;
    ETHERNET_CURRENT_ADDRESS = 0x0101_0102;
    ETHERNET_MULTICAST_LIST = 0x0101_0103;
    ETHERNET_MAXIMUM_LIST_SIZE = 0x0101_0104;
    ETHERNET_MAC_OPTIONS = 0x0101_0105;
    OFFLOAD_ENCAPSULATION = 0x0101_010A;
    ETHERNET_RCV_ERROR_ALIGNMENT = 0x0102_0101;
    ETHERNET_XMIT_ONE_COLLISION = 0x0102_0102;
    ETHERNET_XMIT_MORE_COLLISIONS = 0x0102_0103;
    OFFLOAD_CURRENT_CONFIG = 0xFC01_020B;
    OFFLOAD_PARAMETERS = 0xFC01_020C;
    OFFLOAD_HARDWARE_CAPABILITIES = 0xFC01_020D;
}

impl fmt::Display for Oid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "OID {:#010x}", self.0),
        }
    }
}

impl fmt::Debug for Oid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// `NDIS_OBJECT_TYPE_DEFAULT`, of offload parameters and statistics.
pub const TYPE_DEFAULT: u8 = 0x80;
/// `NDIS_OBJECT_TYPE_RSS_CAPABILITIES`.
pub const TYPE_RSS_CAPABILITIES: u8 = 0x88;
/// `NDIS_OBJECT_TYPE_RSS_PARAMETERS`.
pub const TYPE_RSS_PARAMETERS: u8 = 0x89;
/// `NDIS_OBJECT_TYPE_OFFLOAD`.
pub const TYPE_OFFLOAD: u8 = 0xA7;
/// `NDIS_OBJECT_TYPE_OFFLOAD_ENCAPSULATION`.
pub const TYPE_ENCAPSULATION: u8 = 0xA8;

/// `NDIS_HASH_FUNCTION`: Toeplitz.
pub const HASH_TOEPLITZ: u32 = 1;
/// `NDIS_HASH_IPV4`.
pub const HASH_IPV4: u32 = 0x100;
/// `NDIS_HASH_TCP_IPV4`.
pub const HASH_TCP_IPV4: u32 = 0x200;
/// `NDIS_HASH_IPV6`.
pub const HASH_IPV6: u32 = 0x400;
/// `NDIS_HASH_IPV6_EX`: home address instead of source address; hashed as [`HASH_IPV6`].
pub const HASH_IPV6_EX: u32 = 0x800;
/// `NDIS_HASH_TCP_IPV6`.
pub const HASH_TCP_IPV6: u32 = 0x1000;
/// `NDIS_HASH_TCP_IPV6_EX`.
pub const HASH_TCP_IPV6_EX: u32 = 0x2000;
/// `NDIS_HASH_UDP_IPV4`.
pub const HASH_UDP_IPV4: u32 = 0x4000;
/// `NDIS_HASH_UDP_IPV6`.
pub const HASH_UDP_IPV6: u32 = 0x8000;
/// `NDIS_HASH_UDP_IPV6_EX`.
pub const HASH_UDP_IPV6_EX: u32 = 0x1_0000;

/// Capability flags of RSS: TCP over IPv4, over IPv6, with extension headers; UDP over IPv4, over IPv6.
pub const RSS_CAPS: u32 = 0x100 | 0x200 | 0x400 | 0x800 | 0x1000;

/// [`RssParameters::flags`]: the hash information is as before.
pub const RSS_HASH_UNCHANGED: u16 = 2;
/// [`RssParameters::flags`]: the table is as before.
pub const RSS_TABLE_UNCHANGED: u16 = 4;
/// [`RssParameters::flags`]: the key is as before.
pub const RSS_KEY_UNCHANGED: u16 = 8;
/// [`RssParameters::flags`]: no RSS.
pub const RSS_DISABLE: u16 = 0x10;

wire! {
    /// `NDIS_OBJECT_HEADER`.
    ObjectHeader = 4 {
        /// Type of the object.
        kind: u8,
        /// Its revision.
        revision: u8,
        /// Its bytes.
        size: U16,
    }
    /// Checksums that one direction of one protocol offloads.
    ChecksumCapability = 8 {
        /// 2 for Ethernet, 0 for nothing.
        encapsulation: U32,
        /// See [`checksum`].
        flags: U32,
    }
    /// `NDIS_TCP_LARGE_SEND_OFFLOAD_V2`, IPv4 half.
    LsoV4 = 12 {
        /// 2 for Ethernet, 0 for nothing.
        encapsulation: U32,
        /// Bytes that may be sent at once.
        max_size: U32,
        /// Fewest segments it is worth.
        min_segments: U32,
    }
    /// `NDIS_TCP_LARGE_SEND_OFFLOAD_V2`, IPv6 half.
    LsoV6 = 16 {
        /// 2 for Ethernet, 0 for nothing.
        encapsulation: U32,
        /// Bytes that may be sent at once.
        max_size: U32,
        /// Fewest segments it is worth.
        min_segments: U32,
        /// 1 extension headers, 4 TCP options.
        options: U32,
    }
    /// `NDIS_OFFLOAD`, revision 3; older revisions are its first 144 or 112 bytes.
    Offload = 156 {
        /// [`TYPE_OFFLOAD`].
        header: ObjectHeader,
        /// IPv4 checksums to compute.
        ipv4_tx: ChecksumCapability,
        /// IPv4 checksums to check.
        ipv4_rx: ChecksumCapability,
        /// IPv6 checksums to compute.
        ipv6_tx: ChecksumCapability,
        /// IPv6 checksums to check.
        ipv6_rx: ChecksumCapability,
        /// Large send offload, version 1: not offered.
        lso_v1: [U32; 4],
        /// IPsec, version 1: not offered.
        ipsec_v1: [U32; 7],
        /// Large send offload over IPv4.
        lso_v4: LsoV4,
        /// Large send offload over IPv6.
        lso_v6: LsoV6,
        /// 0.
        flags: U32,
        /// IPsec, version 2: not offered.
        ipsec_v2: [U32; 8],
        /// Coalescing of IPv4 segments.
        rsc_v4: u8,
        /// Coalescing of IPv6 segments.
        rsc_v6: u8,
        /// 0.
        padding: [u8; 2],
        /// NVGRE: not offered.
        nvgre: [U32; 2],
    }
    /// `NDIS_OFFLOAD_PARAMETERS`, revision 3.
    OffloadParameters = 28 {
        /// [`TYPE_DEFAULT`].
        header: ObjectHeader,
        /// Checksum of IPv4's header: see [`super::super::control::Offloads`] for the values.
        ipv4: u8,
        /// Checksum of TCP over IPv4.
        tcp4: u8,
        /// Checksum of UDP over IPv4.
        udp4: u8,
        /// Checksum of TCP over IPv6.
        tcp6: u8,
        /// Checksum of UDP over IPv6.
        udp6: u8,
        /// Large send offload, version 1.
        lso_v1: u8,
        /// IPsec, version 1.
        ipsec_v1: u8,
        /// Large send offload over IPv4.
        lso_v4: u8,
        /// Large send offload over IPv6.
        lso_v6: u8,
        /// Connection offload.
        connection: [u8; 2],
        /// 0.
        reserved: u8,
        /// 0.
        flags: U32,
        /// IPsec, version 2.
        ipsec_v2: [u8; 2],
        /// Coalescing of IPv4 segments.
        rsc_v4: u8,
        /// Coalescing of IPv6 segments.
        rsc_v6: u8,
        /// Encapsulated packets.
        encapsulation: [u8; 2],
        /// 0.
        padding: [u8; 2],
    }
    /// `NDIS_OFFLOAD_ENCAPSULATION`.
    Encapsulation = 28 {
        /// [`TYPE_ENCAPSULATION`].
        header: ObjectHeader,
        /// 1 on, 2 off; type; header bytes: for IPv4.
        ipv4: [U32; 3],
        /// The same for IPv6.
        ipv6: [U32; 3],
    }
    /// `NDIS_RECEIVE_SCALE_CAPABILITIES`, revision 2: exactly 18 bytes, Linux has no room for padding.
    RssCapabilities = 18 {
        /// [`TYPE_RSS_CAPABILITIES`].
        header: ObjectHeader,
        /// [`RSS_CAPS`] and [`HASH_TOEPLITZ`].
        flags: U32,
        /// Interrupts.
        interrupts: U32,
        /// Receive queues.
        queues: U32,
        /// Entries of the indirection table.
        entries: U16,
    }
    /// `NDIS_RECEIVE_SCALE_PARAMETERS`, revision 2, in natural alignment; table and key follow.
    RssParameters = 40 {
        /// [`TYPE_RSS_PARAMETERS`].
        header: ObjectHeader,
        /// `RSS_*`.
        flags: U16,
        /// Unused.
        base_cpu: U16,
        /// Hash function and types: `HASH_*`.
        hash: U32,
        /// Bytes of the table.
        table_bytes: U16,
        /// 0.
        padding: U16,
        /// Where the table begins.
        table_offset: U32,
        /// Bytes of the key.
        key_bytes: U16,
        /// 0.
        padding2: U16,
        /// Where the key begins.
        key_offset: U32,
        /// Processor masks: unused.
        masks: [U32; 3],
    }
    /// `RNDIS_CONFIG_PARAMETER_INFO`: offsets count from its first byte.
    ConfigParameter = 20 {
        /// Where the name begins.
        name_offset: U32,
        /// Bytes of the name.
        name_len: U32,
        /// 2 for text.
        kind: U32,
        /// Where the value begins.
        value_offset: U32,
        /// Bytes of the value.
        value_len: U32,
    }
    /// `NDIS_STATISTICS_INFO`.
    StatisticsInfo = 152 {
        /// [`TYPE_DEFAULT`].
        header: ObjectHeader,
        /// Which of the following count.
        supported: U32,
        /// Frames for the guest that were dropped.
        in_discards: U64,
        /// Frames for the guest that were damaged.
        in_errors: U64,
        /// Bytes to the guest.
        in_octets: U64,
        /// Frames to the guest: unicast, multicast, broadcast.
        in_frames: [U64; 3],
        /// Bytes from the guest.
        out_octets: U64,
        /// Frames from the guest: unicast, multicast, broadcast.
        out_frames: [U64; 3],
        /// Frames from the guest that were damaged.
        out_errors: U64,
        /// Frames from the guest that were dropped.
        out_discards: U64,
        /// Bytes by kind of frame: not counted.
        octets_by_kind: [U64; 6],
    }
}

/// Flags of a [`ChecksumCapability`].
pub mod checksum {
    /// IP options, or extension headers.
    pub const IP_OPTIONS: u32 = 0x1;
    /// TCP options.
    pub const TCP_OPTIONS: u32 = 0x4;
    /// TCP.
    pub const TCP: u32 = 0x10;
    /// UDP.
    pub const UDP: u32 = 0x40;
    /// IPv4's header.
    pub const IP_HEADER: u32 = 0x100;
}

/// Name of the parameter by which a guest changes its address.
const NETWORK_ADDRESS: &str = "NetworkAddress";

/// The address in a `CONFIG_PARAMETER`: `Ok(None)` if the parameter is another.
///
/// # Errors
/// `Err(())` if lengths, offsets or digits are wrong.
#[expect(clippy::result_unit_err, reason = "the guest is told one status whatever is wrong")]
pub fn network_address(info: &[u8]) -> Result<Option<Mac>, ()> {
    let (parameter, _) = ConfigParameter::read_from_prefix(info).map_err(|_| ())?;
    let field = |offset: U32, len: U32| -> Result<&[u8], ()> {
        let start = usize::try_from(offset.get()).map_err(|_| ())?;
        let end = start.checked_add(usize::try_from(len.get()).map_err(|_| ())?).ok_or(())?;
        info.get(start..end).filter(|_| start >= size_of::<ConfigParameter>()).ok_or(())
    };
    let name = field(parameter.name_offset, parameter.name_len)?;
    let value = field(parameter.value_offset, parameter.value_len)?;
    if !units(name).eq(NETWORK_ADDRESS.encode_utf16()) {
        return Ok(None);
    }
    if parameter.kind.get() != 2 || value.len() != 24 {
        return Err(());
    }
    let mut octets = [0u8; 6];
    for (at, unit) in units(value).enumerate() {
        let digit = char::from_u32(u32::from(unit)).and_then(|digit| digit.to_digit(16)).ok_or(())?;
        let octet = octets.get_mut(at / 2).ok_or(())?;
        *octet = *octet << 4 | u8::try_from(digit).map_err(|_| ())?;
    }
    Ok(Some(Mac(octets)))
}

/// A guest's `CONFIG_PARAMETER` that asks for `mac`, as Linux builds it.
pub fn network_address_parameter(mac: Mac) -> Vec<u8> {
    use zerocopy::IntoBytes;
    let parameter = ConfigParameter {
        name_offset: U32::new(20),
        name_len: U32::new(28),
        kind: U32::new(2),
        value_offset: U32::new(48),
        value_len: U32::new(24),
    };
    let mut info = parameter.as_bytes().to_vec();
    let digits = mac.0.map(|octet| format!("{octet:02X}")).concat();
    info.extend(utf16(NETWORK_ADDRESS));
    info.extend(utf16(&digits));
    info
}

/// `text` in UTF-16LE.
pub fn utf16(text: &str) -> impl Iterator<Item = u8> {
    text.encode_utf16().flat_map(u16::to_le_bytes)
}

/// 16-bit units of UTF-16LE; an odd last byte is no unit.
fn units(bytes: &[u8]) -> impl Iterator<Item = u16> {
    bytes.chunks_exact(2).map(|unit| match unit {
        [low, high] => u16::from_le_bytes([*low, *high]),
        _ => 0,
    })
}
