//! What an address is looked up by, and the keyed hash that spreads it over the table.

use serde::Serialize;
use serde::Serializer;
use std::fmt;

/// Bits of a key: 48 of the address, 12 of the VLAN. The upper four are zero.
pub(super) const KEY_MASK: u64 = (1 << 60) - 1;
const VLAN_SHIFT: u32 = 48;
pub(super) const VLAN_MASK: u16 = 0xfff;
/// The group bit is the lowest of the first byte on the wire (IEEE 802-2014, 8.2.2), which comes first here.
const GROUP_BIT: u64 = 1;

/// A MAC address within a VLAN, in one word: the address in wire order from the low end, then the VLAN.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key(pub(super) u64);

impl Key {
    /// The key of `mac` in `vlan`. Only the low 12 bits of `vlan` count; untagged networks use 0.
    #[inline]
    pub fn new(mac: [u8; 6], vlan: u16) -> Self {
        let [a, b, c, d, e, f] = mac;
        Self(u64::from_le_bytes([a, b, c, d, e, f, 0, 0]) | u64::from(vlan & VLAN_MASK) << VLAN_SHIFT)
    }

    /// The key of the address whose bytes are, in wire order from the low end, the low 48 bits of `address`.
    #[inline]
    pub fn from_wire(address: u64, vlan: u16) -> Self {
        Self(address & ((1 << VLAN_SHIFT) - 1) | u64::from(vlan & VLAN_MASK) << VLAN_SHIFT)
    }

    /// The address.
    pub fn mac(self) -> [u8; 6] {
        let [a, b, c, d, e, f, _, _] = self.0.to_le_bytes();
        [a, b, c, d, e, f]
    }

    /// The address, in no VLAN.
    pub(super) fn address(self) -> Self {
        Self(self.0 & ((1 << VLAN_SHIFT) - 1))
    }

    /// The VLAN, 0 to 4095.
    pub fn vlan(self) -> u16 {
        let [.., low, high] = self.0.to_le_bytes();
        u16::from_le_bytes([low, high])
    }

    /// True for the address of a group.
    #[inline]
    pub fn is_group(self) -> bool {
        self.0 & GROUP_BIT != 0
    }

    /// True for an address that a station can have: neither a group address nor all zeros.
    pub fn is_station(self) -> bool {
        !self.is_group() && self.0 << (64 - VLAN_SHIFT) != 0
    }
}

impl fmt::Display for Key {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, f] = self.mac();
        write!(out, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x} vlan {}", self.vlan())
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, out)
    }
}

impl Serialize for Key {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// The secret of one table. Guests choose the keys, so they must not be able to choose the buckets.
#[derive(Clone, Copy)]
pub(super) struct Secret([u64; 2]);

impl Secret {
    pub fn new(seed: [u64; 2]) -> Self {
        // Digits of pi: an all-zero seed, as tests like to use, must still spread.
        Self([seed[0] ^ 0x243f_6a88_85a3_08d3, (seed[1] ^ 0x1319_8a2e_0370_7344) | 1])
    }

    /// A folded 64 × 64 → 128 bit product. One round suffices against guests: they do not see where a key went.
    #[inline]
    pub fn hash(self, key: Key) -> u64 {
        let Self([a, b]) = self;
        fold(key.0 ^ a, b)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("Secret")
    }
}

#[inline]
#[expect(clippy::cast_possible_truncation, reason = "the fold takes the two halves of the product")]
fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    product as u64 ^ (product >> 64) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_gives_back_its_address_and_vlan() {
        let key = Key::new([0x02, 0x11, 0x22, 0x33, 0x44, 0xfe], 4095);
        assert_eq!(key.mac(), [0x02, 0x11, 0x22, 0x33, 0x44, 0xfe]);
        assert_eq!(key.vlan(), 4095);
        assert_eq!(key.to_string(), "02:11:22:33:44:fe vlan 4095");
        assert_eq!(key.0 & !KEY_MASK, 0);
    }

    #[test]
    fn vlan_beyond_twelve_bits_is_cut() {
        assert_eq!(Key::new([2, 0, 0, 0, 0, 1], 0xf001), Key::new([2, 0, 0, 0, 0, 1], 1));
    }

    #[test]
    fn group_and_zero_addresses_are_no_stations() {
        assert!(!Key::new([0xff; 6], 0).is_station());
        assert!(!Key::new([0x01, 0, 0x5e, 0, 0, 1], 7).is_station());
        assert!(!Key::new([0; 6], 7).is_station());
        assert!(Key::new([0, 0, 0, 0, 0, 1], 0).is_station());
    }

    #[test]
    fn another_seed_puts_neighbours_elsewhere() {
        let (one, two) = (Secret::new([1, 2]), Secret::new([3, 4]));
        let key = |n: u8| Key::new([2, 0, 0, 0, 0, n], 0);
        let same = (0..=255).filter(|&n| one.hash(key(n)) & 0xfff == two.hash(key(n)) & 0xfff).count();
        assert!(same < 8, "{same} of 256 keys share the bucket under two seeds");
    }

    /// Each key bit alone must move the bucket: sequential and VLAN-only differences are the usual ones.
    #[test]
    fn every_key_bit_reaches_the_bucket_index() {
        let secret = Secret::new([0, 0]);
        for bit in 0..60 {
            let moved = (0..256u64)
                .filter(|n| (secret.hash(Key(n << 3)) ^ secret.hash(Key(n << 3 ^ 1 << bit))) & 0xffff != 0)
                .count();
            assert!(moved > 250, "bit {bit} moved only {moved} of 256 keys");
        }
    }
}
