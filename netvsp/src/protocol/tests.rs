//! Sizes are asserted where the structures are; here are their bytes, and what does not fit.

use vmq::Mac;
use zerocopy::IntoBytes;
use zerocopy::little_endian::{U16, U32, U64};

use super::nvsp::{self, Kind};
use super::oid::{self, Oid};
use super::packet::{
    HEADER_BYTES, Lso, MAX_RX_HEADER, PacketError, RscPart, RxChecksums, RxHeader, RxPacket, TxChecksum,
    TxChecksums, TxHeader, TxPacket, Vlan,
};
use super::rndis::{self, Control};

/// Bytes from hexadecimal digits, blanks ignored.
fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> =
        text.chars().filter_map(|c| c.to_digit(16)).filter_map(|d| u8::try_from(d).ok()).collect();
    digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}

/// `bytes`, zeros up to an NVSP message's length.
fn padded(text: &str) -> Vec<u8> {
    let mut bytes = hex(text);
    bytes.resize(40, 0);
    bytes
}

#[test]
fn nvsp_messages_of_the_host_have_their_bytes() {
    let word = U32::new;
    let init = nvsp::InitComplete { version: word(0x6_0001), max_mdl_chain: word(34), status: word(1) };
    assert_eq!(nvsp::message(Kind::InitComplete, &init), *padded("02000000 01000600 22000000 01000000"));
    let receive = nvsp::ReceiveBufferComplete {
        status: word(1),
        count: word(1),
        offset: word(0),
        size: word(1728),
        parts: word(9709),
        end: word(16_777_152),
    };
    assert_eq!(
        nvsp::message(Kind::SendReceiveBufferComplete, &receive),
        *padded("66000000 01000000 01000000 00000000 c0060000 ed250000 c0ffff00")
    );
    let send = nvsp::SendBufferComplete { status: word(1), size: word(6144) };
    assert_eq!(nvsp::message(Kind::SendSendBufferComplete, &send), *padded("69000000 01000000 00180000"));
    let granted = nvsp::SubchannelComplete { status: word(1), count: word(3) };
    assert_eq!(nvsp::message(Kind::Subchannel, &granted), *padded("85000000 01000000 03000000"));
    let association = nvsp::VfAssociation { allocated: word(0), serial: word(7) };
    assert_eq!(nvsp::message(Kind::SendVfAssociation, &association), *padded("80000000 00000000 07000000"));
    let declined = nvsp::OidQueryComplete { status: word(nvsp::OID_NOT_SUPPORTED), bytes: word(0) };
    assert_eq!(nvsp::message(Kind::OidQueryExComplete, &declined), *padded("84000000 bb0000c0 00000000"));
    assert_eq!(nvsp::rndis_packet(true), *padded("6b000000 01000000 ffffffff 00000000"));
    assert_eq!(nvsp::rndis_packet(false), *padded("6b000000 00000000 ffffffff 00000000"));
    assert_eq!(nvsp::rndis_complete(nvsp::Status::Success), *padded("6c000000 01000000"));
}

#[test]
fn nvsp_messages_of_a_guest_have_their_bytes() {
    let word = U32::new;
    let init = nvsp::Init { min: word(0x5_0000), max: word(0x5_0000) };
    assert_eq!(nvsp::message(Kind::Init, &init), *padded("01000000 00000500 00000500"));
    let buffer = nvsp::SendBuffer { gpadl: word(0xe1e10), id: U16::new(0xcafe) };
    assert_eq!(nvsp::message(Kind::SendReceiveBuffer, &buffer), *padded("65000000 101e0e00 feca"));
    let ndis = nvsp::NdisVersion { major: word(6), minor: word(30) };
    assert_eq!(nvsp::message(Kind::SendNdisVersion, &ndis), *padded("64000000 06000000 1e000000"));
    let config = nvsp::NdisConfig { mtu: word(1514), reserved: word(0), capabilities: U64::new(0xac) };
    assert_eq!(
        nvsp::message(Kind::SendNdisConfig, &config),
        *padded("7d000000 ea050000 00000000 ac000000 00000000")
    );
    let revoke = nvsp::RevokeBuffer { id: U16::new(0xcafe) };
    assert_eq!(nvsp::message(Kind::RevokeReceiveBuffer, &revoke), *padded("67000000 feca"));
    let request = nvsp::SubchannelRequest { operation: word(1), count: word(3) };
    assert_eq!(nvsp::message(Kind::Subchannel, &request), *padded("85000000 01000000 03000000"));
    let switch = nvsp::SwitchDataPath { active: word(1) };
    assert_eq!(nvsp::message(Kind::SwitchDataPath, &switch), *padded("81000000 01000000"));
}

#[test]
fn send_table_is_104_bytes_with_its_entries_at_40() {
    let table = nvsp::send_table(3);
    assert_eq!(table.len(), 104);
    assert_eq!(table[..12], *hex("86000000 10000000 28000000"));
    assert_eq!(table[40..56], *hex("00000000 01000000 02000000 00000000"));
}

#[test]
fn kinds_and_versions_have_their_numbers() {
    for &kind in Kind::ALL {
        assert_eq!(Kind::from_number(kind.number()), Some(kind));
    }
    assert_eq!(Kind::ALL.len(), 39);
    assert_eq!(Kind::from_number(137), None);
    assert_eq!(nvsp::Version::newest_within(0, u32::MAX), Some(nvsp::Version::V61));
    assert_eq!(nvsp::Version::newest_within(0x3_0002, 0x3_0002), Some(nvsp::Version::V2));
    assert_eq!(nvsp::Version::newest_within(0x7_0000, 0x7_0000), None);
}

#[test]
fn announced_packet_names_its_section_or_none() {
    let in_section = padded("6b000000 00000000 05000000 f0000000");
    let announced = nvsp::announced(&in_section).unwrap();
    assert_eq!(announced, nvsp::Announced { control: false, section: Some((5, 240)) });
    let control = nvsp::announced(&nvsp::rndis_packet(true)).unwrap();
    assert_eq!(control, nvsp::Announced { control: true, section: None });
    assert_eq!(nvsp::announced(&padded("6b000000 02000000")), Err(nvsp::Malformed::Channel(2)));
    assert_eq!(nvsp::announced(&padded("6c000000")), Err(nvsp::Malformed::Unknown(108)));
    let short = nvsp::Malformed::Short { kind: Kind::SendRndisPacket, len: 15, needed: 16 };
    assert_eq!(nvsp::announced(&in_section[..15]), Err(short));
    assert_eq!(nvsp::announced(&in_section[..3]), Err(nvsp::Malformed::NoType(3)));
}

#[test]
fn rndis_messages_have_their_bytes() {
    assert_eq!(
        rndis::initialize_complete(2, 8, 0x2_0000),
        hex("02000080 34000000 02000000 00000000 01000000 00000000 01000000 00000000 08000000 00000200
             03000000 00000000 00000000")
    );
    assert_eq!(
        rndis::query_complete(3, Ok(&[0xdc, 5, 0, 0])),
        hex("04000080 1c000000 03000000 00000000 04000000 10000000 dc050000")
    );
    assert_eq!(
        rndis::query_complete(3, Err(rndis::Status::NotSupported)),
        hex("04000080 18000000 03000000 bb0000c0 00000000 00000000")
    );
    assert_eq!(rndis::set_complete(4, rndis::Status::Success), hex("05000080 10000000 04000000 00000000"));
    assert_eq!(rndis::reset_complete(rndis::Status::Success), hex("06000080 10000000 00000000 01000000"));
    assert_eq!(
        rndis::keepalive_complete(5, rndis::Status::Success),
        hex("08000080 10000000 05000000 00000000")
    );
    assert_eq!(
        rndis::indicate(rndis::Event::MediaConnect, &[]),
        hex("07000000 14000000 0b000140 00000000 00000000")
    );
    assert_eq!(
        rndis::indicate(rndis::Event::LinkSpeedChange, &100_000_000u32.to_le_bytes()),
        hex("07000000 18000000 13000140 04000000 0c000000 00e1f505")
    );
    assert_eq!(rndis::initialize(1), hex("02000000 18000000 01000000 01000000 00000000 00400000"));
    assert_eq!(
        rndis::access(rndis::Kind::Set, 9, Oid::GEN_CURRENT_PACKET_FILTER, &[0x0d, 0, 0, 0]),
        hex("05000000 20000000 09000000 0e010100 04000000 14000000 00000000 0d000000")
    );
    assert_eq!(rndis::request(rndis::Kind::Halt, 7), hex("03000000 0c000000 07000000"));
}

#[test]
fn control_messages_are_parsed() {
    let query = rndis::access(rndis::Kind::Query, 3, Oid::GEN_LINK_SPEED, &[]);
    let parsed = Control::Query { request: 3, oid: Oid::GEN_LINK_SPEED, info: &[], room: 0 };
    assert_eq!(Control::parse(&query), Ok(parsed));
    let set = rndis::access(rndis::Kind::Set, 4, Oid::GEN_CURRENT_PACKET_FILTER, &[1, 2, 3, 4]);
    let parsed = Control::Set { request: 4, oid: Oid::GEN_CURRENT_PACKET_FILTER, info: &[1, 2, 3, 4] };
    assert_eq!(Control::parse(&set), Ok(parsed));
    // Linux sends the room it has without as many bytes behind it.
    let mut roomy = query;
    roomy[16..20].copy_from_slice(&6u32.to_le_bytes());
    let parsed = Control::Query { request: 3, oid: Oid::GEN_LINK_SPEED, info: &[], room: 6 };
    assert_eq!(Control::parse(&roomy), Ok(parsed));
}

#[test]
fn control_messages_that_contradict_themselves_are_refused() {
    let set = rndis::access(rndis::Kind::Set, 4, Oid::GEN_CURRENT_PACKET_FILTER, &[1, 2, 3, 4]);
    let with = |at: usize, value: u32| {
        let mut bytes = set.clone();
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        Control::parse(&bytes).map(|_| ())
    };
    assert_eq!(with(0, 0x99), Err(rndis::Malformed::Unknown(0x99)));
    assert_eq!(with(0, 1), Err(rndis::Malformed::Direction(rndis::Kind::Packet)));
    assert_eq!(with(4, 33), Err(rndis::Malformed::Length { claimed: 33, len: 32 }));
    assert_eq!(with(4, 7), Err(rndis::Malformed::Length { claimed: 7, len: 32 }));
    assert_eq!(with(4, u32::MAX), Err(rndis::Malformed::Length { claimed: u32::MAX, len: 32 }));
    assert_eq!(with(4, 27), Err(rndis::Malformed::Short { kind: rndis::Kind::Set, len: 27, needed: 28 }));
    for (at, value) in [(16, 5), (16, u32::MAX), (20, 21), (20, 19), (20, u32::MAX)] {
        assert!(matches!(with(at, value), Err(rndis::Malformed::Information { .. })), "{at} {value}");
    }
    assert_eq!(Control::parse(&vec![0; 4097]), Err(rndis::Malformed::TooLong(4097)));
    for len in 0..set.len() {
        assert!(Control::parse(&set[..len]).is_err(), "{len}");
    }
}

/// As Linux 6.1 sends it: hash, VLAN, checksum.
fn sent() -> Vec<u8> {
    let mut bytes = hex(
        "01000000 66000000 54000000 0a000000 00000000 00000000 00000000 24000000 30000000 00000000 00000000
         10000000 08000000 0c000000 78563412
         10000000 06000000 0c000000 45060000
         10000000 00000000 0c000000 05002200",
    );
    bytes.extend([0xee; 10]);
    bytes
}

#[test]
fn sent_packet_is_parsed_and_built() {
    let packet = TxPacket::parse(&sent(), 102).unwrap();
    assert_eq!((packet.len, packet.data_offset, packet.data_len), (102, 92, 10));
    assert_eq!(packet.vlan, Some(Vlan { id: 100, priority: 5, dei: false }));
    let checksum = TxChecksum { what: TxChecksums::IPV4 | TxChecksums::TCP, transport_offset: 34 };
    assert_eq!(packet.checksum, Some(checksum));
    assert_eq!(packet.lso, None);
    let header =
        TxHeader { checksum: packet.checksum, lso: None, vlan: packet.vlan, hash: Some(0x1234_5678) };
    let mut built = [0; 128];
    let len = header.write(&mut built, 10).unwrap();
    assert_eq!(built[..len], sent()[..92]);
}

#[test]
fn large_send_is_version_2_with_a_segment_size() {
    let lso = Lso { mss: 1448, tcp_offset: 54, ipv6: true };
    assert_eq!(lso.word(), 0xc360_05a8);
    let write = |word: u32| {
        let mut bytes = sent();
        bytes[80..84].copy_from_slice(&2u32.to_le_bytes());
        bytes[88..92].copy_from_slice(&word.to_le_bytes());
        TxPacket::parse(&bytes, 102).map(|packet| packet.lso)
    };
    assert_eq!(write(lso.word()), Ok(Some(lso)));
    for wrong in [0, 0x8360_05a8, 0xc360_0000] {
        assert_eq!(write(wrong), Err(PacketError::Lso(wrong)));
    }
}

#[test]
fn sent_packet_that_contradicts_itself_is_refused() {
    let with = |at: usize, value: u32| {
        let mut bytes = sent();
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        TxPacket::parse(&bytes, 102).map(|_| ())
    };
    assert_eq!(with(0, 2), Err(PacketError::NotAPacket(2)));
    for len in [0, 43, 103, u32::MAX] {
        assert_eq!(with(4, len), Err(PacketError::Length { claimed: len, available: 102 }));
    }
    for (at, value) in [(8, 0), (8, 35), (8, 85), (8, u32::MAX), (12, 11), (12, u32::MAX), (4, 101)] {
        assert!(matches!(with(at, value), Err(PacketError::Data { .. })), "{at} {value}");
    }
    for (at, value) in [(28, 0), (28, u32::MAX), (28, 47), (32, 60), (32, u32::MAX)] {
        assert!(matches!(with(at, value), Err(PacketError::Information { .. })), "{at} {value}");
    }
    // Sizes that would never end the walk, or lead out of it; data before, at and after the end of a piece.
    for (at, value) in [(44, 0), (44, 11), (44, 49), (44, u32::MAX), (52, 11), (52, 13), (52, 17), (32, 47)] {
        assert!(matches!(with(at, value), Err(PacketError::Piece { .. })), "{at} {value}");
    }
    for len in 0..HEADER_BYTES {
        assert_eq!(TxPacket::parse(&sent()[..len], 102), Err(PacketError::Short(len)));
    }
    // Packet information beyond the bytes that were copied.
    assert!(matches!(TxPacket::parse(&sent()[..80], 102), Err(PacketError::Information { .. })));
}

#[test]
fn packet_without_information_and_unknown_information_are_taken() {
    let mut bytes = [0; 128];
    let len = TxHeader::default().write(&mut bytes, 60).unwrap();
    assert_eq!(len, 44);
    let packet = TxPacket::parse(&bytes[..44], 104).unwrap();
    assert_eq!((packet.len, packet.data_offset, packet.data_len), (104, 44, 60));
    let mut bytes = sent();
    bytes[64..68].copy_from_slice(&0x8000_0001u32.to_le_bytes());
    assert_eq!(TxPacket::parse(&bytes, 102).unwrap().vlan, None);
}

#[test]
fn received_packet_has_its_bytes() {
    let mut bytes = [0xaa; MAX_RX_HEADER];
    let header = RxHeader {
        checksums: RxChecksums::TCP_OK | RxChecksums::IP_OK,
        vlan: Some(Vlan { id: 5, priority: 0, dei: true }),
        hash: Some((0xdead_beef, oid::HASH_TOEPLITZ | oid::HASH_TCP_IPV4)),
        rsc: Some(RscPart { first: true, last: false, id: 0x102 }),
    };
    assert_eq!(header.write(&mut bytes, 1000), Some(124));
    assert_eq!(
        bytes.to_vec(),
        hex("01000000 64040000 74000000 e8030000 00000000 00000000 00000000 24000000 50000000 00000000 00000000
             10000000 00000000 0c000000 28000000
             10000000 06000000 0c000000 58000000
             10000000 08000000 0c000000 efbeadde
             10000000 09000000 0c000000 01020000
             10000000 01000080 0c000000 01030201")
    );
    let mut message = bytes.to_vec();
    message.resize(1124, 0);
    let packet = RxPacket::parse(&message).unwrap();
    assert_eq!(packet, RxPacket { len: 1124, data_offset: 124, data_len: 1000, header });
    assert_eq!(header.write(&mut bytes[..123], 1000), None);
    assert_eq!(header.write(&mut bytes, u32::MAX), None);
    // Linux complains about an offset to nothing.
    assert_eq!(RxHeader::default().write(&mut bytes, 60), Some(44));
    assert_eq!(bytes[28..36], [0; 8]);
}

#[test]
fn coalesced_parts_have_flags_3_1_5() {
    for (first, last, flags) in [(true, false, 3), (false, false, 1), (false, true, 5), (true, true, 7)] {
        let mut bytes = [0; MAX_RX_HEADER];
        let header = RxHeader { rsc: Some(RscPart { first, last, id: 0 }), ..RxHeader::default() };
        let len = header.write(&mut bytes, 4).unwrap();
        assert_eq!(bytes[len - 4..len], [1, flags, 0, 0]);
    }
}

#[test]
fn address_parameter_is_built_as_linux_does_and_parsed() {
    let mac = Mac([0x02, 0xab, 0, 0x10, 0xff, 0x09]);
    let info = oid::network_address_parameter(mac);
    assert_eq!(info.len(), 72);
    assert_eq!(info[..24], hex("14000000 1c000000 02000000 30000000 18000000 4e006500"));
    assert_eq!(info[48..56], hex("30003200 41004200"));
    assert_eq!(oid::network_address(&info), Ok(Some(mac)));
    for (at, value) in [(0, 0u32), (0, 45), (4, u32::MAX), (8, 1), (12, u32::MAX), (12, 49), (16, 22)] {
        let mut wrong = info.clone();
        wrong[at..at + 4].copy_from_slice(&value.to_le_bytes());
        assert_ne!(oid::network_address(&wrong), Ok(Some(mac)), "{at} {value}");
    }
    // A digit below '0' must not wrap around.
    let mut wrong = info.clone();
    wrong[48] = b'/';
    assert_eq!(oid::network_address(&wrong), Err(()));
    let mut other = info;
    other[20] = b'n';
    assert_eq!(oid::network_address(&other), Ok(None));
}

#[test]
fn rss_parameters_have_natural_alignment() {
    let fields = oid::RssParameters {
        header: oid::ObjectHeader { kind: oid::TYPE_RSS_PARAMETERS, revision: 2, size: U16::new(40) },
        hash: U32::new(0x1701),
        table_bytes: U16::new(512),
        table_offset: U32::new(40),
        key_bytes: U16::new(40),
        key_offset: U32::new(552),
        ..oid::RssParameters::default()
    };
    assert_eq!(
        fields.as_bytes(),
        hex("89022800 00000000 01170000 00020000 28000000 28000000 28020000 00000000 00000000 00000000")
    );
}
