//! What a guest reads and writes.

use vmq::rss::{DEFAULT_KEY, HashTypes};
use vswitch::backend::GuestRss;
use zerocopy::IntoBytes;

use super::*;
use crate::protocol::oid::{self, ObjectHeader, OffloadParameters, RssParameters};

const NOT_SUPPORTED: u32 = 0xc000_00bb;
const INVALID_LENGTH: u32 = 0xc001_0014;
const INVALID_DATA: u32 = 0xc001_0015;
const INVALID_OID: u32 = 0xc001_0017;

#[test]
fn values_have_the_lengths_that_drivers_insist_on() {
    let mut guest = Guest::running(config());
    assert_eq!(guest.query(Oid::GEN_MAXIMUM_FRAME_SIZE), 1500u32.to_le_bytes());
    assert_eq!(guest.query(Oid::ETHERNET_PERMANENT_ADDRESS), [2, 0, 0x5e, 0x10, 0, 1]);
    assert_eq!(guest.query(Oid::GEN_FRIENDLY_NAME), b"e\0t\0h\0");
    assert_eq!(guest.query(Oid::GEN_MEDIA_CONNECT_STATUS), [0; 4]);
    assert_eq!(guest.query(Oid::GEN_LINK_SPEED), 100_000_000u32.to_le_bytes());
    assert_eq!(
        guest.query(Oid::GEN_RECEIVE_SCALE_CAPABILITIES),
        [0x88, 2, 18, 0, 1, 0x1f, 0, 0, 4, 0, 0, 0, 4, 0, 0, 0, 128, 0]
    );
    assert_eq!(guest.query(Oid::OFFLOAD_ENCAPSULATION).len(), 28);
    assert_eq!(guest.query(Oid::GEN_STATISTICS).len(), 152);
}

#[test]
fn every_supported_oid_is_read_or_written_or_declined_and_others_are_unknown() {
    let mut guest = Guest::running(config());
    let written_only = [
        Oid::GEN_NETWORK_LAYER_ADDRESSES,
        Oid::GEN_TRANSPORT_HEADER_OFFSET,
        Oid::GEN_RECEIVE_SCALE_PARAMETERS,
        Oid::GEN_RNDIS_CONFIG_PARAMETER,
        Oid::OFFLOAD_PARAMETERS,
    ];
    for &oid in Oid::SUPPORTED {
        let expected_failure = written_only.contains(&oid).then_some(NOT_SUPPORTED);
        assert_eq!(guest.ask(oid, &[]).err(), expected_failure, "{oid}");
        assert_ne!(guest.set(oid, &[]), INVALID_OID, "{oid}");
    }
    assert_eq!(guest.ask(Oid(0x0001_0199), &[]), Err(INVALID_OID));
    assert_eq!(guest.set(Oid(0x0001_0199), &[]), INVALID_OID);
    assert_eq!(guest.set(Oid::GEN_LINK_SPEED, &[0; 4]), NOT_SUPPORTED);
    assert_eq!(guest.query(Oid::GEN_SUPPORTED_LIST).len(), 4 * Oid::SUPPORTED.len());
}

#[test]
fn name_is_cut_between_characters() {
    let mut guest = Guest::running(NicConfig { name: "\u{1f980}".repeat(200), ..config() });
    assert_eq!(guest.query(Oid::GEN_FRIENDLY_NAME).len(), 508);
}

#[test]
fn counters_are_as_long_as_the_guest_has_room() {
    let mut guest = Guest::running(config());
    let statistics = Statistics { out_frames: [1 << 32, 2, 3], in_dropped: 9, ..Statistics::default() };
    guest.nic.set_statistics(statistics);
    assert_eq!(guest.query(Oid::GEN_XMIT_OK), 5u32.to_le_bytes());
    assert_eq!(guest.ask(Oid::GEN_XMIT_OK, &[0; 8]).unwrap(), (5 + (1u64 << 32)).to_le_bytes());
    let all = guest.query(Oid::GEN_STATISTICS);
    assert_eq!(all[..4], [0x80, 1, 152, 0]);
    assert_eq!(all[8..16], 9u64.to_le_bytes());
    assert_eq!(all[72..80], 2u64.to_le_bytes());
}

#[test]
fn capabilities_have_the_revision_of_the_version_and_what_linux_needs() {
    for (version, revision, size) in
        [(0x2u32, 1, 112usize), (0x3_0002, 1, 112), (0x4_0000, 2, 144), (0x5_0000, 3, 156)]
    {
        let mut guest = Guest::new(config());
        completion(guest.init(version));
        guest.map_buffers();
        guest.initialize();
        let offload = guest.query(Oid::OFFLOAD_HARDWARE_CAPABILITIES);
        assert_eq!(
            (offload.len(), &offload[..4]),
            (size, [0xa7, revision, u8::try_from(size).unwrap(), 0].as_slice())
        );
        assert_eq!(guest.ask(Oid::GEN_RECEIVE_SCALE_CAPABILITIES, &[]).is_ok(), version >= 0x5_0000);
    }
    let mut guest = Guest::running(config());
    let offload = guest.query(Oid::OFFLOAD_HARDWARE_CAPABILITIES);
    let word = |at: usize| u32::from_le_bytes(offload[at..at + 4].try_into().unwrap());
    assert_eq!((word(4), word(8), word(20), word(24)), (2, 0x155, 2, 0x55));
    assert_eq!((word(80), word(84), word(88)), (2, 65_415, 2));
    assert_eq!((word(92), word(96), word(100), word(104)), (2, 65_415, 2, 5));
    assert_eq!(offload[144..148], [1, 1, 0, 0]);
    // A guest with room for an older revision gets that.
    let older = guest.ask(Oid::OFFLOAD_HARDWARE_CAPABILITIES, &[0xa7, 2, 144, 0]).unwrap();
    assert_eq!((older.len(), &older[..4]), (144, [0xa7, 2, 144, 0].as_slice()));
}

#[test]
fn nic_without_offloads_offers_none_and_a_guest_cannot_turn_them_on() {
    let mut guest = Guest::running(NicConfig { offloads: false, rsc: false, ..config() });
    let offload = guest.query(Oid::OFFLOAD_HARDWARE_CAPABILITIES);
    assert_eq!(offload[..4], [0xa7, 3, 156, 0]);
    assert!(offload[4..].iter().all(|byte| *byte == 0));
    assert_eq!(guest.set(Oid::OFFLOAD_PARAMETERS, parameters().as_bytes()), 0);
    assert_eq!(guest.nic.data_path().offloads, Offloads::default());
}

/// Everything on.
fn parameters() -> OffloadParameters {
    OffloadParameters {
        header: ObjectHeader { kind: 0x80, revision: 3, size: U16::new(28) },
        ipv4: 4,
        tcp4: 4,
        udp4: 4,
        tcp6: 4,
        udp6: 4,
        lso_v4: 2,
        lso_v6: 2,
        rsc_v4: 2,
        rsc_v6: 2,
        ..OffloadParameters::default()
    }
}

#[test]
fn rsc_needs_version_capability_and_request() {
    let mut guest = Guest::running(config());
    assert!(!guest.nic.data_path().rsc);
    let message = rndis::access(rndis::Kind::Set, 1, Oid::OFFLOAD_PARAMETERS, parameters().as_bytes());
    let effects = guest.nic.rndis(&message).unwrap();
    assert!(matches!(
        effects.as_slice(),
        [Effect::Changed, Effect::RndisReply(_), Effect::Indicate(indication)] if indication.len() == 20 + 156
    ));
    assert!(guest.nic.data_path().rsc);
    // `ethtool -K lro off` says nothing of the others.
    let off = OffloadParameters {
        header: parameters().header,
        rsc_v4: 1,
        rsc_v6: 1,
        ..OffloadParameters::default()
    };
    assert_eq!(guest.set(Oid::OFFLOAD_PARAMETERS, off.as_bytes()), 0);
    let path = guest.nic.data_path();
    assert!(!path.rsc && path.offloads.lso_v4 && path.offloads.tcp4.tx);
    for (version, capabilities) in [(0x6_0000, 0xac), (0x6_0001, 0x2c)] {
        let mut guest = Guest::new(config());
        completion(guest.init(version));
        guest.ndis_config(1514, capabilities);
        guest.map_buffers();
        guest.initialize();
        assert_eq!(guest.set(Oid::OFFLOAD_PARAMETERS, parameters().as_bytes()), 0);
        assert!(!guest.nic.data_path().rsc);
    }
}

#[test]
fn offload_parameters_are_taken_from_20_bytes_on_and_their_values_checked() {
    let mut guest = Guest::running(config());
    assert_eq!(guest.set(Oid::OFFLOAD_PARAMETERS, &parameters().as_bytes()[..19]), INVALID_LENGTH);
    assert_eq!(guest.set(Oid::OFFLOAD_PARAMETERS, &parameters().as_bytes()[..22]), 0);
    assert!(!guest.nic.data_path().rsc);
    for wrong in [
        OffloadParameters { tcp4: 5, ..parameters() },
        OffloadParameters { lso_v6: 3, ..parameters() },
        OffloadParameters { header: ObjectHeader::default(), ..parameters() },
    ] {
        let before = guest.nic.save();
        assert_eq!(guest.set(Oid::OFFLOAD_PARAMETERS, wrong.as_bytes()), INVALID_DATA);
        assert_eq!(guest.nic.save(), before);
    }
    let off = OffloadParameters { tcp4: 1, udp4: 2, lso_v4: 1, ..parameters() };
    assert_eq!(guest.set(Oid::OFFLOAD_PARAMETERS, off.as_bytes()), 0);
    let offloads = guest.nic.data_path().offloads;
    assert!(
        !offloads.tcp4.tx && !offloads.tcp4.rx && offloads.udp4.tx && !offloads.udp4.rx && !offloads.lso_v4
    );
}

#[test]
fn address_changes_only_where_spoofing_is_allowed() {
    let mac = Mac([2, 0, 0, 0, 0, 9]);
    let info = oid::network_address_parameter(mac);
    let mut guest = Guest::running(config());
    assert_eq!(guest.set(Oid::GEN_RNDIS_CONFIG_PARAMETER, &info), 0xc000_0001);
    guest.nic.configure(1500, None, true);
    assert_eq!(guest.set(Oid::GEN_RNDIS_CONFIG_PARAMETER, &info), 0);
    assert_eq!(guest.query(Oid::ETHERNET_CURRENT_ADDRESS), mac.0);
    assert_eq!(guest.query(Oid::ETHERNET_PERMANENT_ADDRESS), config().mac.0);
    let group = oid::network_address_parameter(Mac::BROADCAST);
    assert_eq!(guest.set(Oid::GEN_RNDIS_CONFIG_PARAMETER, &group), INVALID_DATA);
    guest.nic.configure(1500, None, false);
    let own = oid::network_address_parameter(config().mac);
    assert_eq!(guest.set(Oid::GEN_RNDIS_CONFIG_PARAMETER, &own), 0);
    assert_eq!(guest.nic.data_path().mac, config().mac);
}

#[test]
fn group_addresses_are_kept_up_to_the_limit() {
    let mut guest = Guest::running(config());
    assert_eq!(guest.set(Oid::ETHERNET_MULTICAST_LIST, &[1, 0, 0x5e, 0, 0, 1]), 0);
    assert_eq!(guest.nic.data_path().multicast, [Mac([1, 0, 0x5e, 0, 0, 1])]);
    assert_eq!(guest.set(Oid::ETHERNET_MULTICAST_LIST, &[1; 7]), INVALID_LENGTH);
    assert_eq!(guest.set(Oid::ETHERNET_MULTICAST_LIST, &[1; 33 * 6]), INVALID_LENGTH);
}

/// RSS parameters as Linux sends them: header, table, key.
fn spread(table: &[u32], change: impl FnOnce(&mut RssParameters)) -> Vec<u8> {
    let table_bytes = table.len() * 4;
    let mut fields = RssParameters {
        header: ObjectHeader { kind: 0x89, revision: 2, size: U16::new(40) },
        hash: U32::new(0x1701),
        table_bytes: U16::new(u16::try_from(table_bytes).unwrap()),
        table_offset: U32::new(40),
        key_bytes: U16::new(40),
        key_offset: U32::new(40 + u32::try_from(table_bytes).unwrap()),
        ..RssParameters::default()
    };
    change(&mut fields);
    let mut bytes = fields.as_bytes().to_vec();
    bytes.extend(table.iter().flat_map(|entry| entry.to_le_bytes()));
    bytes.extend([0x5a; 40]);
    bytes
}

fn with_subchannels() -> Guest {
    let mut guest = Guest::running(config());
    guest.subchannels(3);
    for index in 1..=3 {
        guest.nic.channel_opened(index);
    }
    guest
}

#[test]
fn spreading_is_the_guests_own_until_it_or_its_channel_ends() {
    let mut guest = with_subchannels();
    let table: Vec<u32> = (0..128).map(|entry| entry % 4).collect();
    assert_eq!(
        guest.set(Oid::GEN_RECEIVE_SCALE_PARAMETERS, &spread(&table, |f| f.flags = U16::new(0x10))),
        0
    );
    assert_eq!(guest.nic.data_path().rss, None);
    assert_eq!(guest.set(Oid::GEN_RECEIVE_SCALE_PARAMETERS, &spread(&table, |_| {})), 0);
    let types = HashTypes::IPV4 | HashTypes::TCP_V4 | HashTypes::IPV6 | HashTypes::TCP_V6;
    let expected = GuestRss { key: [0x5a; 40], table: (0..128).map(|entry| entry % 4).collect(), types };
    assert_eq!(guest.nic.data_path().rss, Some(expected.clone()));
    // Only the hash changes: UDP too.
    let udp = spread(&[], |f| (f.flags, f.hash) = (U16::new(0xc), U32::new(0xd701)));
    assert_eq!(guest.set(Oid::GEN_RECEIVE_SCALE_PARAMETERS, &udp), 0);
    let types = types | HashTypes::UDP_V4 | HashTypes::UDP_V6;
    assert_eq!(guest.nic.data_path().rss, Some(GuestRss { types, ..expected }));
    assert_eq!(guest.nic.channel_closed(2), vec![Effect::Changed]);
    assert_eq!(guest.nic.data_path().rss, None);
}

#[test]
fn spreading_with_nothing_before_it_uses_the_default_key() {
    let mut guest = with_subchannels();
    let info = spread(&[0, 1], |f| f.flags = U16::new(8));
    assert_eq!(guest.set(Oid::GEN_RECEIVE_SCALE_PARAMETERS, &info), 0);
    assert_eq!(guest.nic.data_path().rss.unwrap().key, DEFAULT_KEY);
}

#[test]
fn spreading_to_channels_that_are_not_open_or_with_wrong_lengths_is_refused() {
    let mut guest = with_subchannels();
    guest.nic.channel_closed(3);
    let good = spread(&[0, 1, 2, 0], |_| {});
    let wrong: [(Vec<u8>, u32); 13] = [
        (spread(&[0, 3], |_| {}), INVALID_DATA),
        (spread(&[0, 4], |_| {}), INVALID_DATA),
        (spread(&[0, 0x1_0000], |_| {}), INVALID_DATA),
        (spread(&[0, 1, 2], |_| {}), INVALID_LENGTH),
        (spread(&[0; 256], |_| {}), INVALID_LENGTH),
        (spread(&[], |_| {}), INVALID_LENGTH),
        (spread(&[0, 1], |f| f.table_bytes = U16::new(6)), INVALID_LENGTH),
        (spread(&[0, 1], |f| f.table_offset = U32::new(u32::MAX)), INVALID_DATA),
        (spread(&[0, 1], |f| f.table_offset = U32::new(0)), INVALID_DATA),
        (spread(&[0, 1], |f| f.key_offset = U32::new(49)), INVALID_DATA),
        (spread(&[0, 1], |f| f.key_bytes = U16::new(39)), INVALID_LENGTH),
        (spread(&[0, 1], |f| f.hash = U32::new(0x1702)), INVALID_DATA),
        (good[..27].to_vec(), INVALID_LENGTH),
    ];
    for (at, (info, status)) in wrong.into_iter().enumerate() {
        let before = guest.nic.save();
        assert_eq!(guest.set(Oid::GEN_RECEIVE_SCALE_PARAMETERS, &info), status, "case {at}");
        assert_eq!(guest.nic.save(), before);
    }
    assert_eq!(guest.set(Oid::GEN_RECEIVE_SCALE_PARAMETERS, &good), 0);
}
