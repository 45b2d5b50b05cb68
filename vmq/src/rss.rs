//! Receive-side scaling: a Toeplitz hash of a flow's addresses picks one of a port's queues, so that a flow keeps its queue.
//!
//! **Cost model.** Toeplitz is linear: the hash of an input is the XOR of the hashes of its bits. The key is expanded once
//! into a table of 16 words per *nibble* of input: one cache line each. IPv4 with ports (12 bytes) is 24 independent loads and
//! XORs over 1.5 KiB of table, IPv6 with ports (36 bytes) 72 over 4.5 KiB: 4.5 and 14 ns measured at 2.7 GHz, and the table
//! leaves the L1 cache to the frames. A table per *byte* would halve the loads but touch up to 12 KiB (36 KiB for IPv6), more
//! than many an L1 cache has. A key's table is shared by its clones, so a thousand ports with the default key share one.

use std::fmt;
use std::sync::{Arc, LazyLock};

use bitflags::bitflags;
use thiserror::Error;

/// Most bytes a hash type feeds in: IPv6 addresses and ports (virtio 1.2, 5.1.6.4.3).
const MAX_INPUT_LEN: usize = 36;
/// Slots of the expanded indirection table, and the longest table accepted. virtio devices and NetVSP offer 128.
const SLOTS: usize = 512;
/// Entries of a table that nobody asked for, as NDIS has them.
const DEFAULT_ENTRIES: usize = 128;

/// Shortest key: 36 bytes of input and a 32-bit window. The length that virtio and NDIS use.
pub const MIN_KEY_LEN: usize = 40;
/// Longest key accepted, as several network cards use.
pub const MAX_KEY_LEN: usize = 52;

/// The key of Microsoft's RSS verification suite, and so of its published test vectors.
pub const DEFAULT_KEY: [u8; MIN_KEY_LEN] = [
    0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0, 0xd0,
    0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30, 0xf2, 0x0c, 0x6a, 0x42,
    0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
];

/// Why RSS parameters, which come from a guest or an operator, were refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum RssError {
    /// The key's length is not between [`MIN_KEY_LEN`] and [`MAX_KEY_LEN`].
    #[error("hash key of {0} bytes; expected {MIN_KEY_LEN} to {MAX_KEY_LEN}")]
    KeyLength(usize),
    /// The table's length is not a power of two, or zero, or too large.
    #[error("indirection table of {0} entries; expected a power of two up to {SLOTS}")]
    TableLength(usize),
    /// An entry names a queue that does not exist (the fault of CVE-2024-6505).
    #[error("indirection table entry {index} names queue {queue} of {queues}")]
    NoSuchQueue {
        /// Position in the table.
        index: usize,
        /// The queue it names.
        queue: u16,
        /// How many queues there are.
        queues: u16,
    },
    /// A port without queues cannot spread.
    #[error("a port needs at least one queue")]
    NoQueues,
}

/// What of a frame goes into the hash: its addresses, and its ports unless it is a fragment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Flow {
    /// Neither IPv4 nor IPv6, or unreadable.
    #[default]
    Other,
    /// IPv4, in wire order.
    V4 {
        /// Source address.
        src: [u8; 4],
        /// Destination address.
        dst: [u8; 4],
        /// TCP or UDP ports, when the frame shows them.
        ports: Option<Ports>,
    },
    /// IPv6, in wire order.
    V6 {
        /// Source address.
        src: [u8; 16],
        /// Destination address.
        dst: [u8; 16],
        /// TCP or UDP ports, when the frame shows them.
        ports: Option<Ports>,
    },
}

/// The ports of a TCP or UDP flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ports {
    /// Which protocol the ports belong to.
    pub transport: Transport,
    /// Source port.
    pub src: u16,
    /// Destination port.
    pub dst: u16,
}

/// A transport protocol that has ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

bitflags! {
    /// Which flows are hashed, and by what; the bit values are virtio's `VIRTIO_NET_RSS_HASH_TYPE_*` (virtio 1.2, 5.1.6.4.3.1).
    ///
    /// A TCP or UDP flow whose own bit is clear falls back to its addresses.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    pub struct HashTypes: u32 {
        /// IPv4 by addresses.
        const IPV4 = 1;
        /// TCP over IPv4 by addresses and ports.
        const TCP_V4 = 1 << 1;
        /// UDP over IPv4 by addresses and ports.
        const UDP_V4 = 1 << 2;
        /// IPv6 by addresses.
        const IPV6 = 1 << 3;
        /// TCP over IPv6 by addresses and ports.
        const TCP_V6 = 1 << 4;
        /// UDP over IPv6 by addresses and ports.
        const UDP_V6 = 1 << 5;
    }
}

/// 16 partial hashes for each of the input's nibbles.
type NibbleTable = [[u32; 16]; 2 * MAX_INPUT_LEN];

/// A Toeplitz key, expanded for fast hashing. Clones share the expansion.
#[derive(Clone)]
pub struct ToeplitzKey {
    key: Arc<[u8]>,
    table: Arc<NibbleTable>,
}

impl ToeplitzKey {
    /// Expands `key`.
    ///
    /// # Errors
    /// [`RssError::KeyLength`] unless it has [`MIN_KEY_LEN`] to [`MAX_KEY_LEN`] bytes.
    pub fn new(key: &[u8]) -> Result<Self, RssError> {
        if !(MIN_KEY_LEN..=MAX_KEY_LEN).contains(&key.len()) {
            return Err(RssError::KeyLength(key.len()));
        }
        Ok(Self { key: key.into(), table: Arc::new(expand(key)) })
    }

    /// The key's bytes, as given.
    pub fn bytes(&self) -> &[u8] {
        &self.key
    }

    /// Hash of an IPv4 flow by its addresses, in wire order.
    #[inline]
    pub fn hash_v4(&self, src: [u8; 4], dst: [u8; 4]) -> u32 {
        self.nibbles::<0, 4>(src) ^ self.nibbles::<4, 4>(dst)
    }

    /// Hash of an IPv4 flow by its addresses and ports.
    #[inline]
    pub fn hash_v4_ports(&self, src: [u8; 4], dst: [u8; 4], src_port: u16, dst_port: u16) -> u32 {
        self.hash_v4(src, dst)
            ^ self.nibbles::<8, 2>(src_port.to_be_bytes())
            ^ self.nibbles::<10, 2>(dst_port.to_be_bytes())
    }

    /// Hash of an IPv6 flow by its addresses, in wire order.
    #[inline]
    pub fn hash_v6(&self, src: [u8; 16], dst: [u8; 16]) -> u32 {
        self.nibbles::<0, 16>(src) ^ self.nibbles::<16, 16>(dst)
    }

    /// Hash of an IPv6 flow by its addresses and ports.
    #[inline]
    pub fn hash_v6_ports(&self, src: [u8; 16], dst: [u8; 16], src_port: u16, dst_port: u16) -> u32 {
        self.hash_v6(src, dst)
            ^ self.nibbles::<32, 2>(src_port.to_be_bytes())
            ^ self.nibbles::<34, 2>(dst_port.to_be_bytes())
    }

    /// What `N` bytes of input at byte `AT` add to the hash.
    #[inline(always)]
    fn nibbles<const AT: usize, const N: usize>(&self, input: [u8; N]) -> u32 {
        let mut hash = 0;
        for (i, byte) in input.into_iter().enumerate() {
            hash ^= self.table[2 * (AT + i)][usize::from(byte >> 4)];
            hash ^= self.table[2 * (AT + i) + 1][usize::from(byte & 15)];
        }
        hash
    }
}

impl Default for ToeplitzKey {
    /// [`DEFAULT_KEY`], expanded once.
    fn default() -> Self {
        static DEFAULT: LazyLock<ToeplitzKey> = LazyLock::new(|| ToeplitzKey {
            key: DEFAULT_KEY.as_slice().into(),
            table: Arc::new(expand(&DEFAULT_KEY)),
        });
        DEFAULT.clone()
    }
}

impl fmt::Debug for ToeplitzKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ToeplitzKey").field(&self.key).finish()
    }
}

impl PartialEq for ToeplitzKey {
    fn eq(&self, other: &Self) -> bool {
        self.key == other.key
    }
}

impl Eq for ToeplitzKey {}

/// The nibble table of `key`; input bit `i`, counted from the first byte's top bit, contributes the 32 key bits from bit `i`.
fn expand(key: &[u8]) -> NibbleTable {
    let byte = |i: usize| key.get(i).copied().unwrap_or(0);
    let window = |bit: usize| {
        let at = bit / 8;
        let wide =
            u64::from_be_bytes([0, 0, 0, byte(at), byte(at + 1), byte(at + 2), byte(at + 3), byte(at + 4)]);
        #[expect(clippy::cast_possible_truncation, reason = "the low 32 bits are the window")]
        let window = (wide >> (8 - bit % 8)) as u32;
        window
    };
    let mut table = [[0; 16]; 2 * MAX_INPUT_LEN];
    for (nibble, words) in table.iter_mut().enumerate() {
        for (value, word) in words.iter_mut().enumerate() {
            *word = (0..4)
                .filter(|bit| value & (8 >> bit) != 0)
                .fold(0, |hash, bit| hash ^ window(4 * nibble + bit));
        }
    }
    table
}

/// Maps the low bits of a hash to a queue; every entry names an existing queue, by construction.
#[derive(Clone, PartialEq, Eq)]
pub struct IndirectionTable {
    /// The entries repeated up to [`SLOTS`], so that a look-up masks by a constant and needs no bounds check.
    slots: Box<[u16; SLOTS]>,
    len: usize,
}

impl IndirectionTable {
    /// Takes `entries`, each below `queues`.
    ///
    /// # Errors
    /// [`RssError`] if there is no queue, the length is no power of two up to 512, or an entry names a missing queue.
    pub fn new(entries: &[u16], queues: u16) -> Result<Self, RssError> {
        if queues == 0 {
            return Err(RssError::NoQueues);
        }
        let len = entries.len();
        if !len.is_power_of_two() || len > SLOTS {
            return Err(RssError::TableLength(len));
        }
        if let Some((index, &queue)) = entries.iter().enumerate().find(|(_, queue)| **queue >= queues) {
            return Err(RssError::NoSuchQueue { index, queue, queues });
        }
        Ok(Self::of(len, entries.iter().copied()))
    }

    /// 128 entries that name `queues` in turn.
    ///
    /// # Errors
    /// [`RssError::NoQueues`] if there is none.
    pub fn in_turn(queues: &[u16]) -> Result<Self, RssError> {
        let table = Self::of(DEFAULT_ENTRIES, queues.iter().copied().cycle().take(DEFAULT_ENTRIES));
        if queues.is_empty() { Err(RssError::NoQueues) } else { Ok(table) }
    }

    /// The same table for a port that uses only the queues `enabled`: entries that name another are folded onto `others`.
    ///
    /// # Errors
    /// [`RssError::NoQueues`] if `others` has none.
    pub fn within(&self, enabled: &[u16], others: &[u16]) -> Result<Self, RssError> {
        let fold = |&queue: &u16| {
            let other = others.get(usize::from(queue) % others.len().max(1));
            if enabled.contains(&queue) { Some(queue) } else { other.copied() }
        };
        let entries: Option<Vec<u16>> = self.entries().iter().map(fold).collect();
        Ok(Self::of(self.len, entries.ok_or(RssError::NoQueues)?.into_iter()))
    }

    fn of(len: usize, entries: impl Iterator<Item = u16> + Clone) -> Self {
        let mut slots = Box::new([0; SLOTS]);
        slots.iter_mut().zip(entries.cycle()).for_each(|(slot, queue)| *slot = queue);
        Self { slots, len }
    }

    /// The entries, as given.
    pub fn entries(&self) -> &[u16] {
        self.slots.get(..self.len).unwrap_or_default()
    }

    /// The queue for `hash`: one of the entries.
    #[inline]
    pub fn queue(&self, hash: u32) -> u16 {
        self.slots[hash as usize % SLOTS]
    }
}

impl fmt::Debug for IndirectionTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("IndirectionTable").field(&self.entries()).finish()
    }
}

/// A port's receive-side scaling: key, table, and which flows are hashed by what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rss {
    /// The hash key.
    pub key: ToeplitzKey,
    /// Hash to queue.
    pub table: IndirectionTable,
    /// What is hashed.
    pub types: HashTypes,
}

impl Rss {
    /// The hash of `flow` and the one type it is of, or `None` if the configured types do not cover it.
    #[inline(always)]
    pub fn hash(&self, flow: &Flow) -> Option<(u32, HashTypes)> {
        let by_addresses = |kind| self.types.contains(kind).then_some(kind);
        match *flow {
            Flow::Other => None,
            Flow::V4 { src, dst, ports } => {
                match self.hashed_ports(ports, HashTypes::TCP_V4, HashTypes::UDP_V4) {
                    Some((ports, kind)) => {
                        Some((self.key.hash_v4_ports(src, dst, ports.src, ports.dst), kind))
                    }
                    None => by_addresses(HashTypes::IPV4).map(|kind| (self.key.hash_v4(src, dst), kind)),
                }
            }
            Flow::V6 { src, dst, ports } => {
                match self.hashed_ports(ports, HashTypes::TCP_V6, HashTypes::UDP_V6) {
                    Some((ports, kind)) => {
                        Some((self.key.hash_v6_ports(src, dst, ports.src, ports.dst), kind))
                    }
                    None => by_addresses(HashTypes::IPV6).map(|kind| (self.key.hash_v6(src, dst), kind)),
                }
            }
        }
    }

    /// The queue for `hash`.
    #[inline]
    pub fn queue(&self, hash: u32) -> u16 {
        self.table.queue(hash)
    }

    /// `ports` and their protocol's hash type, if that is on.
    #[inline(always)]
    fn hashed_ports(
        &self,
        ports: Option<Ports>,
        tcp: HashTypes,
        udp: HashTypes,
    ) -> Option<(Ports, HashTypes)> {
        let ports = ports?;
        let kind = match ports.transport {
            Transport::Tcp => tcp,
            Transport::Udp => udp,
        };
        self.types.contains(kind).then_some((ports, kind))
    }
}

#[cfg(test)]
mod tests;
