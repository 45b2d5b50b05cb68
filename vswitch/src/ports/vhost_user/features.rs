//! What a port offers its guest, and what came of it.
//!
//! A feature is offered only if the switch keeps its word for it. Three bits (`CTRL_VQ`, `CTRL_RX`,
//! `GUEST_ANNOUNCE`) are the front-end's own affair, but front-ends strip from the guest what the back-end does not
//! list, so they are listed.
//!
//! Source: VIRTIO 1.2, 5.1.3 and 6; vhost-user, "Protocol features".

use bitflags::bitflags;
use vmq::frame::Accepts;

use super::queue::NetFeatures;
use super::session::SessionConfig;

bitflags! {
    /// Feature bits of a virtio-net device.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct Features: u64 {
        /// The guest may leave checksums to us.
        const CSUM = 1;
        /// We may leave checksums to the guest.
        const GUEST_CSUM = 1 << 1;
        /// The configuration holds the MTU.
        const MTU = 1 << 3;
        /// The configuration holds the MAC address.
        const MAC = 1 << 5;
        /// The guest takes large TCP frames over IPv4.
        const GUEST_TSO4 = 1 << 7;
        /// The guest takes large TCP frames over IPv6.
        const GUEST_TSO6 = 1 << 8;
        /// The guest takes large TCP frames with ECN.
        const GUEST_ECN = 1 << 9;
        /// The guest may send large TCP frames over IPv4.
        const HOST_TSO4 = 1 << 11;
        /// The guest may send large TCP frames over IPv6.
        const HOST_TSO6 = 1 << 12;
        /// The guest may send large TCP frames with ECN.
        const HOST_ECN = 1 << 13;
        /// A frame may fill several receive buffers.
        const MRG_RXBUF = 1 << 15;
        /// The configuration holds the link's state.
        const STATUS = 1 << 16;
        /// There is a control queue (the front-end's).
        const CTRL_VQ = 1 << 17;
        /// The control queue sets receive modes.
        const CTRL_RX = 1 << 18;
        /// The guest can announce itself.
        const GUEST_ANNOUNCE = 1 << 21;
        /// Several queue pairs.
        const MQ = 1 << 22;
        /// Log every write to guest memory (`VHOST_F_LOG_ALL`).
        const LOG_ALL = 1 << 26;
        /// Legacy guests may lay headers out as they like.
        const ANY_LAYOUT = 1 << 27;
        /// Tables of descriptors.
        const INDIRECT_DESC = 1 << 28;
        /// Exact doorbell suppression.
        const EVENT_IDX = 1 << 29;
        /// There are protocol features (`VHOST_USER_F_PROTOCOL_FEATURES`).
        const PROTOCOL_FEATURES = 1 << 30;
        /// Virtio 1.x.
        const VERSION_1 = 1 << 32;
        /// Packed rings.
        const RING_PACKED = 1 << 34;
        /// Buffers are used in the order in which they were made available.
        const IN_ORDER = 1 << 35;
        /// The guest takes large UDP frames over IPv4.
        const GUEST_USO4 = 1 << 54;
        /// The guest takes large UDP frames over IPv6.
        const GUEST_USO6 = 1 << 55;
        /// The guest may send large UDP frames.
        const HOST_USO = 1 << 56;
    }
}

bitflags! {
    /// Features of the protocol itself.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct Protocol: u64 {
        /// Several queue pairs.
        const MQ = 1;
        /// The dirty log comes as a descriptor.
        const LOG_SHMFD = 1 << 1;
        /// A migrated guest can be announced.
        const RARP = 1 << 2;
        /// Any message can ask for an acknowledgement.
        const REPLY_ACK = 1 << 3;
        /// The front-end tells the MTU.
        const NET_MTU = 1 << 4;
        /// The back-end holds the device configuration.
        const CONFIG = 1 << 9;
        /// In-flight records.
        const INFLIGHT_SHMFD = 1 << 12;
        /// `RESET_DEVICE`.
        const RESET_DEVICE = 1 << 13;
        /// Memory regions come one by one.
        const CONFIGURE_MEM_SLOTS = 1 << 15;
        /// The device status is told.
        const STATUS = 1 << 16;
    }
}

impl Features {
    /// All that lets a guest leave work to the switch, or the switch to the guest.
    pub const OFFLOADS: Self = Self::CSUM
        .union(Self::GUEST_CSUM)
        .union(Self::GUEST_TSO4)
        .union(Self::GUEST_TSO6)
        .union(Self::GUEST_ECN)
        .union(Self::HOST_TSO4)
        .union(Self::HOST_TSO6)
        .union(Self::HOST_ECN)
        .union(Self::GUEST_USO4)
        .union(Self::GUEST_USO6)
        .union(Self::HOST_USO);

    /// What a port with `config` offers.
    pub fn offered(config: &SessionConfig) -> Self {
        let mut offered = Self::VERSION_1
            | Self::RING_PACKED
            | Self::EVENT_IDX
            | Self::INDIRECT_DESC
            | Self::IN_ORDER
            | Self::ANY_LAYOUT
            | Self::MRG_RXBUF
            | Self::MTU
            | Self::CTRL_VQ
            | Self::CTRL_RX
            | Self::GUEST_ANNOUNCE
            | Self::LOG_ALL
            | Self::PROTOCOL_FEATURES;
        offered.set(Self::OFFLOADS, config.offloads);
        offered.set(Self::MQ, config.queues > 1);
        offered.set(Self::STATUS, config.config_space);
        offered.set(Self::MAC, config.config_space && config.mac.is_some());
        offered
    }

    /// What these features, acknowledged by a guest, mean for its rings.
    pub fn net(self) -> NetFeatures {
        NetFeatures {
            full_header: self.intersects(Self::VERSION_1 | Self::MRG_RXBUF),
            mergeable: self.contains(Self::MRG_RXBUF),
            offered: self.accepts(&SENDS),
            accepts: self.accepts(&TAKES),
        }
    }

    /// A bit counts only together with those it depends on (5.1.3.1).
    fn accepts(self, map: &Map) -> Accepts {
        let mut accepts = Accepts::empty();
        if !self.contains(map.checksum) {
            return accepts;
        }
        accepts |= Accepts::CHECKSUM;
        accepts.set(Accepts::TCP4, self.contains(map.tcp4));
        accepts.set(Accepts::TCP6, self.contains(map.tcp6));
        accepts.set(Accepts::UDP, self.contains(map.udp));
        let tcp = accepts.intersects(Accepts::TCP4 | Accepts::TCP6);
        accepts.set(Accepts::ECN, tcp && self.contains(map.ecn));
        accepts
    }

    /// Names of the bits, for people; unknown ones as numbers.
    pub fn names(self) -> Vec<String> {
        names(self)
    }
}

impl Protocol {
    /// What a port with `config` offers.
    pub fn offered(config: &SessionConfig) -> Self {
        let mut offered = Self::all();
        // QEMU warns about a configuration it does not ask for, so it is there only on demand.
        offered.set(Self::CONFIG, config.config_space);
        offered
    }

    /// Names of the bits, for people; unknown ones as numbers.
    pub fn names(self) -> Vec<String> {
        names(self)
    }
}

fn names<F: bitflags::Flags<Bits = u64> + Copy>(flags: F) -> Vec<String> {
    let mut names: Vec<String> = flags.iter_names().map(|(name, _)| name.to_ascii_lowercase()).collect();
    let unknown = flags.bits() & !F::all().bits();
    names.extend((0..u64::BITS).filter(|bit| unknown >> bit & 1 == 1).map(|bit| format!("bit {bit}")));
    names
}

struct Map {
    checksum: Features,
    tcp4: Features,
    tcp6: Features,
    ecn: Features,
    udp: Features,
}

const SENDS: Map = Map {
    checksum: Features::CSUM,
    tcp4: Features::HOST_TSO4,
    tcp6: Features::HOST_TSO6,
    ecn: Features::HOST_ECN,
    udp: Features::HOST_USO,
};

const TAKES: Map = Map {
    checksum: Features::GUEST_CSUM,
    tcp4: Features::GUEST_TSO4,
    tcp6: Features::GUEST_TSO6,
    ecn: Features::GUEST_ECN,
    // A frame's metadata does not tell the two apart, so the guest must take both.
    udp: Features::GUEST_USO4.union(Features::GUEST_USO6),
};

/// What a connection agreed on so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Negotiated {
    /// Device features the guest acknowledged.
    pub features: Features,
    /// Protocol features the front-end acknowledged.
    pub protocol: Protocol,
}

impl Negotiated {
    /// What it means for rings.
    pub fn net(&self) -> NetFeatures {
        self.features.net()
    }

    /// Packed rings.
    pub fn packed(&self) -> bool {
        self.features.contains(Features::RING_PACKED)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segmentation_without_checksum_counts_for_nothing() {
        let acked = Features::HOST_TSO4 | Features::GUEST_TSO6 | Features::GUEST_USO4 | Features::GUEST_USO6;
        assert_eq!(acked.net().offered, Accepts::empty());
        assert_eq!(acked.net().accepts, Accepts::empty());
    }

    #[test]
    fn ecn_counts_only_with_tcp_and_udp_only_for_both_families() {
        let ecn = Features::GUEST_CSUM | Features::GUEST_ECN;
        assert_eq!(ecn.net().accepts, Accepts::CHECKSUM);
        let tcp = ecn | Features::GUEST_TSO6 | Features::GUEST_USO4;
        assert_eq!(tcp.net().accepts, Accepts::CHECKSUM | Accepts::TCP6 | Accepts::ECN);
        let udp = tcp | Features::GUEST_USO6;
        assert!(udp.net().accepts.contains(Accepts::UDP));
    }

    #[test]
    fn header_is_short_only_for_legacy_guests_without_mergeable_buffers() {
        assert!(!Features::CSUM.net().full_header);
        assert!(Features::VERSION_1.net().full_header);
        assert!(Features::MRG_RXBUF.net().full_header);
    }

    #[test]
    fn port_without_offloads_offers_none() {
        let config = SessionConfig { offloads: false, ..SessionConfig::default() };
        assert!(!Features::offered(&config).intersects(Features::OFFLOADS));
        assert!(Features::offered(&SessionConfig::default()).contains(Features::OFFLOADS));
    }

    #[test]
    fn bit_values_are_those_of_the_specification() {
        let bits = |features: Features| features.bits();
        assert_eq!(bits(Features::OFFLOADS), 0x01c0_0000_0000_3b83);
        assert_eq!(bits(Features::VERSION_1 | Features::RING_PACKED | Features::IN_ORDER), 0xd_0000_0000);
        assert_eq!(Protocol::all().bits(), 0x1_b21f);
    }

    #[test]
    fn unknown_bits_are_named_by_number() {
        let odd = Features::from_bits_retain(1 | 1 << 10 | 1 << 63);
        assert_eq!(odd.names(), ["csum", "bit 10", "bit 63"]);
    }
}
