//! VMQ filters: which of a port's queues receive the frames for a MAC address on a VLAN.
//!
//! A filter picks a [`QueueSet`], within which flows are spread by their hash. Filters are few (one for each NIC behind
//! the port) and come from guests and operators, so the table is a sorted array: a look-up among the limit of 1024 is ten
//! compares whatever addresses an attacker picks, and none when a port has no filter, the common case.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// Most filters a port may hold.
pub const MAX_FILTERS: usize = 1024;
/// Highest VLAN identifier: 4095 is reserved (IEEE 802.1Q table 9-2). 0 means untagged.
pub const MAX_VLAN: u16 = 4094;

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Mac(pub [u8; 6]);

/// The text is no MAC address.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("`{0}` is no MAC address; expected six hexadecimal pairs such as 02:00:5e:10:00:01")]
pub struct MacParseError(pub String);

impl Mac {
    /// All stations.
    pub const BROADCAST: Self = Self([0xff; 6]);
    /// No address.
    pub const ZERO: Self = Self([0; 6]);

    /// The address as the low 48 bits of an integer, first octet highest.
    #[inline]
    pub const fn to_u48(self) -> u64 {
        let [a, b, c, d, e, f] = self.0;
        u64::from_be_bytes([0, 0, a, b, c, d, e, f])
    }

    /// The address in the low 48 bits of `bits`; the high 16 are ignored.
    #[inline]
    pub const fn from_u48(bits: u64) -> Self {
        let [_, _, a, b, c, d, e, f] = bits.to_be_bytes();
        Self([a, b, c, d, e, f])
    }

    /// Whether it names a group of stations, broadcast included.
    #[inline]
    pub const fn is_multicast(self) -> bool {
        self.0[0] & 1 == 1
    }

    /// Whether it names all stations.
    #[inline]
    pub const fn is_broadcast(self) -> bool {
        self.to_u48() == 0xffff_ffff_ffff
    }

    /// Whether it may be a station's own address: neither a group nor zero.
    #[inline]
    pub const fn is_station(self) -> bool {
        !self.is_multicast() && self.to_u48() != 0
    }
}

impl From<[u8; 6]> for Mac {
    fn from(octets: [u8; 6]) -> Self {
        Self(octets)
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Mac {
    type Err = MacParseError;

    /// Reads `02:00:5e:10:00:01`, or Windows' `02-00-5E-10-00-01`.
    fn from_str(text: &str) -> Result<Self, MacParseError> {
        let refused = || MacParseError(text.chars().take(32).collect());
        let separator = if text.contains('-') { '-' } else { ':' };
        let mut octets = [0; 6];
        let mut pairs = text.split(separator);
        for octet in &mut octets {
            let pair = pairs.next().ok_or_else(refused)?;
            if pair.len() != 2 || !pair.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(refused());
            }
            *octet = u8::from_str_radix(pair, 16).map_err(|_| refused())?;
        }
        if pairs.next().is_some() { Err(refused()) } else { Ok(Self(octets)) }
    }
}

/// Why a filter was refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum FilterError {
    /// A group's frames go to every queue set; a filter needs one station's address.
    #[error("{0} is not the address of one station")]
    NotAStation(Mac),
    /// The VLAN is above [`MAX_VLAN`].
    #[error("VLAN {0}; expected 0 (untagged) to {MAX_VLAN}")]
    Vlan(u16),
    /// The queue set is empty.
    #[error("a queue set needs at least one queue")]
    EmptySet,
    /// The set names a queue that does not exist.
    #[error("queue {queue} of {queues}")]
    NoSuchQueue {
        /// The queue it names.
        queue: u16,
        /// How many queues the port has.
        queues: u16,
    },
    /// The address already has a filter on that VLAN.
    #[error("{mac} on VLAN {vlan} already has a filter")]
    Duplicate {
        /// The address.
        mac: Mac,
        /// The VLAN.
        vlan: u16,
    },
    /// The port holds [`MAX_FILTERS`] already.
    #[error("more than {MAX_FILTERS} filters")]
    Full,
}

/// Some of a port's queues, by index: never empty, in order, each once, each existing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueueSet {
    queues: Box<[u16]>,
}

impl QueueSet {
    /// The set of `indices` among a port's `queues` queues.
    ///
    /// # Errors
    /// [`FilterError::EmptySet`] or [`FilterError::NoSuchQueue`].
    pub fn new(indices: &[u16], queues: u16) -> Result<Self, FilterError> {
        if let Some(&queue) = indices.iter().find(|queue| **queue >= queues) {
            return Err(FilterError::NoSuchQueue { queue, queues });
        }
        if indices.is_empty() {
            return Err(FilterError::EmptySet);
        }
        let mut indices = indices.to_vec();
        indices.sort_unstable();
        indices.dedup();
        Ok(Self { queues: indices.into() })
    }

    /// The queue for `hash`: one of the set.
    #[inline]
    pub fn pick(&self, hash: u32) -> u16 {
        self.queues.get(hash as usize % self.queues.len().max(1)).copied().unwrap_or(0)
    }

    /// The queues' indices in order.
    pub fn queues(&self) -> &[u16] {
        &self.queues
    }
}

/// A port's filters.
#[derive(Debug, Clone, Default)]
pub struct VmqFilter {
    /// Sorted by key: address, then VLAN.
    keys: Vec<u64>,
    sets: Vec<QueueSet>,
}

impl VmqFilter {
    /// Sends the frames for `mac` on `vlan` (0: untagged) to `set`.
    ///
    /// # Errors
    /// [`FilterError`] if `mac` is no station's address, `vlan` is out of range, the pair has a filter, or the table is full.
    pub fn insert(&mut self, mac: Mac, vlan: u16, set: QueueSet) -> Result<(), FilterError> {
        if !mac.is_station() {
            return Err(FilterError::NotAStation(mac));
        }
        if vlan > MAX_VLAN {
            return Err(FilterError::Vlan(vlan));
        }
        match self.keys.binary_search(&key(mac, vlan)) {
            Ok(_) => Err(FilterError::Duplicate { mac, vlan }),
            Err(_) if self.keys.len() >= MAX_FILTERS => Err(FilterError::Full),
            Err(at) => {
                self.keys.insert(at, key(mac, vlan));
                self.sets.insert(at, set);
                Ok(())
            }
        }
    }

    /// Takes the filter for `mac` on `vlan` away; `None` if there was none.
    pub fn remove(&mut self, mac: Mac, vlan: u16) -> Option<QueueSet> {
        let at = self.keys.binary_search(&key(mac, vlan)).ok()?;
        self.keys.remove(at);
        Some(self.sets.remove(at))
    }

    /// The queue set for frames to `dst` on `vlan` (0: untagged), if a filter matches.
    #[inline]
    pub fn lookup(&self, dst: Mac, vlan: u16) -> Option<&QueueSet> {
        self.sets.get(self.keys.binary_search(&key(dst, vlan)).ok()?)
    }

    /// How many filters there are.
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// The filters, ordered by address and VLAN.
    pub fn iter(&self) -> impl Iterator<Item = (Mac, u16, &QueueSet)> {
        self.keys.iter().zip(&self.sets).map(|(&key, set)| {
            #[expect(clippy::cast_possible_truncation, reason = "the low 16 bits are the VLAN")]
            let vlan = key as u16;
            (Mac::from_u48(key >> 16), vlan, set)
        })
    }
}

/// Address and VLAN in one word.
#[inline]
const fn key(mac: Mac, vlan: u16) -> u64 {
    mac.to_u48() << 16 | vlan as u64
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    const MAC: Mac = Mac([2, 0, 0x5e, 0x10, 0, 1]);

    fn set(queue: u16) -> QueueSet {
        QueueSet::new(&[queue], u16::MAX).unwrap()
    }

    #[test]
    fn address_is_read_in_both_notations_and_shown_with_colons() {
        assert_eq!("02:00:5e:10:00:01".parse(), Ok(MAC));
        assert_eq!("02-00-5E-10-00-01".parse(), Ok(MAC));
        assert_eq!(MAC.to_string(), "02:00:5e:10:00:01");
        assert_eq!(format!("{MAC:?}"), "02:00:5e:10:00:01");
    }

    #[test]
    fn text_that_is_no_address_is_refused() {
        for text in ["", "02", "02:00:5e:10:00", "02:00:5e:10:00:01:02", "2:0:5e:10:0:1", "+2:00:5e:10:00:01"]
        {
            assert_eq!(text.parse::<Mac>(), Err(MacParseError(text.into())));
        }
        for text in ["02:00-5e:10:00:01", "02:00:5e:10:00:0g", "02:00:5e:10:00:é", "02005e100001"] {
            assert!(text.parse::<Mac>().is_err(), "{text}");
        }
    }

    #[test]
    fn group_and_zero_addresses_are_no_stations() {
        assert!(
            Mac::BROADCAST.is_broadcast() && Mac::BROADCAST.is_multicast() && !Mac::BROADCAST.is_station()
        );
        assert!(!Mac::ZERO.is_multicast() && !Mac::ZERO.is_station());
        assert!(
            Mac([0x33, 0x33, 0, 0, 0, 1]).is_multicast() && !Mac([0x33, 0x33, 0, 0, 0, 1]).is_broadcast()
        );
        assert!(MAC.is_station());
    }

    #[test]
    fn queue_set_is_ordered_unique_and_never_empty() {
        assert_eq!(QueueSet::new(&[3, 1, 3], 4).unwrap().queues(), [1, 3]);
        assert_eq!(QueueSet::new(&[], 4), Err(FilterError::EmptySet));
        assert_eq!(QueueSet::new(&[0, 4], 4), Err(FilterError::NoSuchQueue { queue: 4, queues: 4 }));
    }

    #[test]
    fn hashes_pick_the_queues_of_a_set_in_turn() {
        let set = QueueSet::new(&[2, 5, 7], 8).unwrap();
        assert_eq!([0, 1, 2, 3, 4, u32::MAX].map(|hash| set.pick(hash)), [2, 5, 7, 2, 5, 2]);
    }

    #[test]
    fn wrong_filters_are_refused() {
        let mut filter = VmqFilter::default();
        assert_eq!(filter.insert(Mac::BROADCAST, 0, set(1)), Err(FilterError::NotAStation(Mac::BROADCAST)));
        assert_eq!(filter.insert(Mac::ZERO, 0, set(1)), Err(FilterError::NotAStation(Mac::ZERO)));
        assert_eq!(filter.insert(MAC, 4095, set(1)), Err(FilterError::Vlan(4095)));
        assert_eq!(filter.insert(MAC, 7, set(1)), Ok(()));
        assert_eq!(filter.insert(MAC, 7, set(2)), Err(FilterError::Duplicate { mac: MAC, vlan: 7 }));
        for i in 1..MAX_FILTERS as u64 {
            filter.insert(Mac::from_u48(i << 1), 0, set(1)).unwrap();
        }
        assert_eq!(filter.insert(MAC, 9, set(1)), Err(FilterError::Full));
    }

    #[test]
    fn same_address_on_another_vlan_matches_nothing() {
        let mut filter = VmqFilter::default();
        filter.insert(MAC, 7, set(1)).unwrap();
        assert_eq!(filter.lookup(MAC, 7), Some(&set(1)));
        assert_eq!(filter.lookup(MAC, 0), None);
        assert_eq!(filter.remove(MAC, 7), Some(set(1)));
        assert_eq!(filter.remove(MAC, 7), None);
        assert_eq!(filter.lookup(MAC, 7), None);
    }

    proptest! {
        #[test]
        fn filters_behave_as_a_map(
            steps in proptest::collection::vec((any::<bool>(), 0u64..16, 0u16..3, 1u16..9), 0..100),
        ) {
            let mut filter = VmqFilter::default();
            let mut model = HashMap::new();
            for (insert, mac, vlan, queue) in steps {
                let mac = Mac::from_u48(mac << 1 | 2 << 40);
                if insert {
                    let fresh = !model.contains_key(&(mac, vlan));
                    prop_assert_eq!(filter.insert(mac, vlan, set(queue)).is_ok(), fresh);
                    model.entry((mac, vlan)).or_insert(queue);
                } else {
                    prop_assert_eq!(filter.remove(mac, vlan), model.remove(&(mac, vlan)).map(set));
                }
                prop_assert_eq!(filter.lookup(mac, vlan).cloned(), model.get(&(mac, vlan)).copied().map(set));
            }
            prop_assert_eq!(filter.len(), model.len());
            prop_assert!(filter.iter().all(|(mac, vlan, queues)| set(model[&(mac, vlan)]) == *queues));
        }

        #[test]
        fn any_address_survives_text_and_integer(octets in any::<[u8; 6]>()) {
            let mac = Mac(octets);
            prop_assert_eq!(mac.to_string().parse(), Ok(mac));
            prop_assert_eq!(Mac::from_u48(mac.to_u48()), mac);
        }
    }
}
