//! GUIDs as VMBus carries them, and those that name device types.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// A GUID in wire order: u32, u16, u16 little-endian, then eight bytes in order.
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Default,
    FromBytes,
    IntoBytes,
    KnownLayout,
    Immutable,
    Unaligned,
    Serialize,
    Deserialize,
)]
#[serde(try_from = "String", into = "String")]
#[repr(transparent)]
pub struct Guid([u8; 16]);

const _: () = assert!(size_of::<Guid>() == 16);

/// What is wrong with the text of a GUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a guid: expected eight, four, four, four and twelve hexadecimal digits with hyphens between")]
pub struct GuidError;

impl Guid {
    /// The GUID of no thing: all zero.
    pub const ZERO: Self = Self([0; 16]);

    /// The GUID written `a-b-c-d-e`; of `e` the low 48 bits count.
    #[must_use]
    pub const fn new(a: u32, b: u16, c: u16, d: u16, e: u64) -> Self {
        let (a, b, c, d, e) =
            (a.to_le_bytes(), b.to_le_bytes(), c.to_le_bytes(), d.to_be_bytes(), e.to_be_bytes());
        Self([a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], d[0], d[1], e[2], e[3], e[4], e[5], e[6], e[7]])
    }

    /// The GUID of these sixteen bytes, in wire order.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The sixteen bytes, in wire order.
    #[must_use]
    pub const fn to_bytes(self) -> [u8; 16] {
        self.0
    }
}

impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let b = &self.0;
        let (x, y, z) = (
            u32::from_le_bytes([b[0], b[1], b[2], b[3]]),
            u16::from_le_bytes([b[4], b[5]]),
            u16::from_le_bytes([b[6], b[7]]),
        );
        write!(f, "{x:08x}-{y:04x}-{z:04x}-{:02x}{:02x}-", b[8], b[9])?;
        b[10..].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Guid {
    type Err = GuidError;

    /// Reads the form `Display` writes, in either case.
    fn from_str(text: &str) -> Result<Self, GuidError> {
        let fields: Vec<&str> = text.split('-').collect();
        let widths = [8, 4, 4, 4, 12];
        let fits = |field: &&str, width| {
            field.len() == width && field.bytes().all(|digit| digit.is_ascii_hexdigit())
        };
        if fields.len() != widths.len() || !fields.iter().zip(widths).all(|(field, width)| fits(field, width))
        {
            return Err(GuidError);
        }
        let short = |field| u16::from_str_radix(field, 16).map_err(|_| GuidError);
        Ok(Self::new(
            u32::from_str_radix(fields[0], 16).map_err(|_| GuidError)?,
            short(fields[1])?,
            short(fields[2])?,
            short(fields[3])?,
            u64::from_str_radix(fields[4], 16).map_err(|_| GuidError)?,
        ))
    }
}

impl TryFrom<String> for Guid {
    type Error = GuidError;

    fn try_from(text: String) -> Result<Self, GuidError> {
        text.parse()
    }
}

impl From<Guid> for String {
    fn from(guid: Guid) -> Self {
        guid.to_string()
    }
}

/// Device types: the interface GUID of an offer (vmbus.md §9; Linux `include/linux/hyperv.h`).
pub mod interface {
    use super::Guid;

    /// Synthetic network interface.
    pub const NIC: Guid = Guid::new(0xf861_5163, 0xdf3e, 0x46c5, 0x913f, 0xf2d2_f965_ed0e);
    /// Guest shutdown.
    pub const SHUTDOWN: Guid = Guid::new(0x0e0b_6031, 0x5213, 0x4934, 0x818b, 0x38d9_0ced_39db);
    /// Time synchronisation.
    pub const TIME_SYNC: Guid = Guid::new(0x9527_e630, 0xd0ae, 0x497b, 0xadce, 0xe80a_b017_5caf);
    /// Heartbeat.
    pub const HEARTBEAT: Guid = Guid::new(0x5716_4f39, 0x9115, 0x4e78, 0xab55, 0x382f_3bd5_422d);
    /// Key-value pair exchange.
    pub const KVP: Guid = Guid::new(0xa9a0_f4e7, 0x5a45, 0x4d96, 0xb827, 0x8a84_1e8c_03e6);
    /// Backup (freeze and thaw of file systems).
    pub const VSS: Guid = Guid::new(0x35fa_2e29, 0xea23, 0x4236, 0x96ae, 0x3a6e_bacb_a440);
    /// Dynamic memory (balloon and hot add).
    pub const DYNAMIC_MEMORY: Guid = Guid::new(0x5250_74dc, 0x8985, 0x46e2, 0x8057, 0xa307_dc18_a502);
}

/// Instance GUIDs of devices of which a machine has one (vmbus.md §9).
pub mod instance {
    use super::Guid;

    /// Guest shutdown.
    pub const SHUTDOWN: Guid = Guid::new(0xb665_0ff7, 0x33bc, 0x4840, 0x8048, 0xe067_6786_f393);
    /// Time synchronisation.
    pub const TIME_SYNC: Guid = Guid::new(0x2dd1_ce17, 0x079e, 0x403c, 0xb352, 0xa192_1ee2_07ee);
    /// Key-value pair exchange.
    pub const KVP: Guid = Guid::new(0x242f_f919, 0x07db, 0x4180, 0x9c2e, 0xb86c_b68c_8c55);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_three_fields_are_little_endian_on_the_wire() {
        assert_eq!(
            interface::NIC.to_bytes(),
            [0x63, 0x51, 0x61, 0xf8, 0x3e, 0xdf, 0xc5, 0x46, 0x91, 0x3f, 0xf2, 0xd2, 0xf9, 0x65, 0xed, 0x0e]
        );
    }

    #[test]
    fn known_guids_print_as_the_fact_sheet_has_them() {
        for (guid, text) in [
            (interface::NIC, "f8615163-df3e-46c5-913f-f2d2f965ed0e"),
            (interface::SHUTDOWN, "0e0b6031-5213-4934-818b-38d90ced39db"),
            (interface::TIME_SYNC, "9527e630-d0ae-497b-adce-e80ab0175caf"),
            (interface::HEARTBEAT, "57164f39-9115-4e78-ab55-382f3bd5422d"),
            (interface::KVP, "a9a0f4e7-5a45-4d96-b827-8a841e8c03e6"),
            (interface::VSS, "35fa2e29-ea23-4236-96ae-3a6ebacba440"),
            (interface::DYNAMIC_MEMORY, "525074dc-8985-46e2-8057-a307dc18a502"),
            (instance::SHUTDOWN, "b6650ff7-33bc-4840-8048-e0676786f393"),
            (instance::TIME_SYNC, "2dd1ce17-079e-403c-b352-a1921ee207ee"),
            (instance::KVP, "242ff919-07db-4180-9c2e-b86cb68c8c55"),
        ] {
            assert_eq!(guid.to_string(), text);
            assert_eq!(text.to_uppercase().parse(), Ok(guid));
        }
    }

    #[test]
    fn malformed_text_is_refused() {
        for text in [
            "",
            "f8615163",
            "{f8615163-df3e-46c5-913f-f2d2f965ed0e}",
            "f8615163-df3e-46c5-913f-f2d2f965ed0",
            "f8615163-df3e-46c5-913f-f2d2f965ed0g",
            "+8615163-df3e-46c5-913f-f2d2f965ed0e",
            "f8615163-df3e-46c5-913f-f2d2f965ed0e-",
        ] {
            assert_eq!(text.parse::<Guid>(), Err(GuidError), "{text:?}");
        }
    }
}
