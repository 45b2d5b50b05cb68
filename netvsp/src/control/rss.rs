//! Receive-side scaling by the guest's own key and table (fact sheet §6c).

use vmq::rss::{DEFAULT_KEY, HashTypes, MIN_KEY_LEN};
use zerocopy::IntoBytes;
use zerocopy::little_endian::{U16, U32};

use super::set::structure;
use super::state::{Session, Spread};
use crate::protocol::oid::{self, ObjectHeader, RssCapabilities, RssParameters};
use crate::protocol::rndis::Status;

/// Entries of the indirection table: what Linux and DPDK take.
pub(super) const TABLE_ENTRIES: u16 = 128;
/// Bytes of the parameters' first revision: without processor masks.
const MIN_PARAMETERS: usize = 28;

/// `RECEIVE_SCALE_CAPABILITIES` of a NIC with `queues`.
pub(super) fn capabilities(queues: u16) -> Vec<u8> {
    let capabilities = RssCapabilities {
        header: ObjectHeader { kind: oid::TYPE_RSS_CAPABILITIES, revision: 2, size: U16::new(18) },
        flags: U32::new(oid::RSS_CAPS | oid::HASH_TOEPLITZ),
        interrupts: U32::new(queues.into()),
        queues: U32::new(queues.into()),
        entries: U16::new(TABLE_ENTRIES),
    };
    capabilities.as_bytes().to_vec()
}

/// NDIS's hash types in the switch's words. UDP is hashed by ports only where the guest asks.
pub(super) fn types(hash: u32) -> HashTypes {
    let pairs = [
        (oid::HASH_IPV4, HashTypes::IPV4),
        (oid::HASH_TCP_IPV4, HashTypes::TCP_V4),
        (oid::HASH_UDP_IPV4, HashTypes::UDP_V4),
        (oid::HASH_IPV6 | oid::HASH_IPV6_EX, HashTypes::IPV6),
        (oid::HASH_TCP_IPV6 | oid::HASH_TCP_IPV6_EX, HashTypes::TCP_V6),
        (oid::HASH_UDP_IPV6 | oid::HASH_UDP_IPV6_EX, HashTypes::UDP_V6),
    ];
    pairs.into_iter().filter(|(bits, _)| hash & bits != 0).map(|(_, types)| types).collect()
}

/// What `RECEIVE_SCALE_PARAMETERS` ask for: `None` turns RSS off. What they leave as it was comes from the session, or is
/// the default.
pub(super) fn parameters(session: &Session, info: &[u8]) -> Result<Option<Spread>, Status> {
    let fields: RssParameters = structure(info, MIN_PARAMETERS, oid::TYPE_RSS_PARAMETERS)?;
    let flags = fields.flags.get();
    let before = session.device().and_then(|device| device.rss.clone());
    let before = before.unwrap_or_else(|| Spread { key: DEFAULT_KEY.to_vec(), table: vec![0], hash: 0 });
    let hash = if flags & oid::RSS_HASH_UNCHANGED != 0 { before.hash } else { fields.hash.get() };
    if flags & oid::RSS_DISABLE != 0 || hash == 0 {
        return Ok(None);
    }
    if hash & 0xff != oid::HASH_TOEPLITZ {
        return Err(Status::InvalidData);
    }
    let table = if flags & oid::RSS_TABLE_UNCHANGED != 0 {
        before.table
    } else {
        table(session, part(info, fields.table_offset, fields.table_bytes)?)?
    };
    let key = if flags & oid::RSS_KEY_UNCHANGED != 0 {
        before.key
    } else {
        let key = part(info, fields.key_offset, fields.key_bytes)?;
        if key.len() != MIN_KEY_LEN {
            return Err(Status::InvalidLength);
        }
        key.to_vec()
    };
    Ok(Some(Spread { key, table, hash }))
}

/// A part of the parameters, behind their fixed fields.
fn part(info: &[u8], offset: U32, len: U16) -> Result<&[u8], Status> {
    let start = usize::try_from(offset.get()).map_err(|_| Status::InvalidData)?;
    let end = start.checked_add(len.get().into()).ok_or(Status::InvalidData)?;
    info.get(start..end).filter(|_| start >= MIN_PARAMETERS).ok_or(Status::InvalidData)
}

/// The table's entries: a power of two of them, each an open channel.
fn table(session: &Session, bytes: &[u8]) -> Result<Vec<u16>, Status> {
    let entries = bytes.len() / 4;
    let fits =
        bytes.len().is_multiple_of(4) && entries.is_power_of_two() && entries <= usize::from(TABLE_ENTRIES);
    if !fits {
        return Err(Status::InvalidLength);
    }
    bytes
        .chunks_exact(4)
        .map(|entry| {
            let entry = entry.try_into().map(u32::from_le_bytes).unwrap_or(u32::MAX);
            u16::try_from(entry).ok().filter(|index| session.is_open(*index)).ok_or(Status::InvalidData)
        })
        .collect()
}
