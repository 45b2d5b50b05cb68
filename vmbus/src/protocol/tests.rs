//! Golden bytes: each message as the fact sheet lays it out, written by hand.

use super::*;
use crate::guid::{Guid, interface};

/// Bytes from hexadecimal digits; spaces and line breaks are for the eye.
fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
}

const INSTANCE: Guid = Guid::new(0x0011_2233, 0x4455, 0x6677, 0x8899, 0xaabb_ccdd_eeff);

fn offer() -> OfferChannel {
    OfferChannel {
        interface: interface::NIC,
        instance: INSTANCE,
        reserved: [0.into(); 2],
        flags: offer_flags::ENUMERATE.into(),
        mmio_megabytes: 0.into(),
        user_defined: [0; 120],
        subchannel: 3.into(),
        reserved2: 0.into(),
        relid: 0x0102.into(),
        monitor_id: 0xFF,
        monitor_allocated: 0,
        dedicated: 1.into(),
        connection: event_connection(0x0102).into(),
    }
}

#[test]
fn offer_has_its_golden_bytes() {
    let mut golden = hex("01000000 00000000
        635161f8 3edf c546 913f f2d2f965ed0e  33221100 5544 7766 8899 aabbccddeeff
        0000000000000000 0000000000000000 0100 0000");
    golden.extend([0; 120]);
    golden.extend(hex("0300 0000 02010000 ff 00 0100 02210000"));
    assert_eq!(golden.len(), 196);
    assert_eq!(encode(&offer()), golden);
    assert_eq!(HostMessage::parse(&golden), Ok(HostMessage::OfferChannel(&offer())));
}

#[test]
fn messages_of_the_host_have_their_golden_bytes() {
    let relid = 0x7ff.into();
    for (bytes, golden) in [
        (encode(&RescindChannelOffer { relid }), "02000000 00000000 ff070000"),
        (encode(&AllOffersDelivered {}), "04000000 00000000"),
        (
            encode(&OpenChannelResult { relid, open_id: 0x11.into(), status: status::UNSUCCESSFUL.into() }),
            "06000000 00000000 ff070000 11000000 010000c0",
        ),
        (
            encode(&GpadlCreated { relid, gpadl: 0xE1E10.into(), status: 0.into() }),
            "0a000000 00000000 ff070000 101e0e00 00000000",
        ),
        (encode(&GpadlTorndown { gpadl: 0xE1E10.into() }), "0c000000 00000000 101e0e00"),
        (
            encode(&VersionResponse {
                supported: 1,
                connection_state: 0,
                reserved: 0.into(),
                connection_or_version: CONTACT_CONNECTION.into(),
            }),
            "0f000000 00000000 01 00 0000 04000000",
        ),
        (encode(&UnloadResponse {}), "11000000 00000000"),
        (
            encode(&TlConnectResult {
                endpoint: INSTANCE,
                service: Guid::ZERO,
                status: status::CONNECTION_REFUSED.cast_signed().into(),
            }),
            "17000000 00000000 33221100 5544 7766 8899 aabbccddeeff 00000000000000000000000000000000 360200c0",
        ),
        (encode(&ModifyChannelResponse { relid, status: 0.into() }), "18000000 00000000 ff070000 00000000"),
    ] {
        assert_eq!(bytes, hex(golden));
        assert!(HostMessage::parse(&bytes).is_ok(), "{golden}");
        assert!(matches!(GuestMessage::parse(&bytes), Err(ParseError::WrongWay(_))), "{golden}");
    }
}

#[test]
fn messages_of_the_guest_have_their_golden_bytes() {
    let relid = 5.into();
    let contact = InitiateContact {
        version: Version::V5_3.to_wire().into(),
        target_vp: 1.into(),
        sint: SINT,
        vtl: 0,
        reserved: 0.into(),
        features: 0.into(),
        monitor_page_1: 0x1000.into(),
        monitor_page_2: 0x2000.into(),
    };
    let header = GpadlHeader {
        relid,
        gpadl: 0xE1E10.into(),
        range_bytes: 24.into(),
        range_count: 1.into(),
        byte_count: 0x2000.into(),
        byte_offset: 0.into(),
    };
    for (bytes, golden) in [
        (encode(&RequestOffers {}), "03000000 00000000"),
        (encode(&CloseChannel { relid }), "07000000 00000000 05000000"),
        (
            encode_with(&header, &hex("3412000000000000 7856000000000000")),
            "08000000 00000000 05000000 101e0e00 1800 0100 00200000 00000000 3412000000000000 7856000000000000",
        ),
        (
            encode_with(&GpadlBody { number: 0.into(), gpadl: 0xE1E10.into() }, &hex("0100000000000000")),
            "09000000 00000000 00000000 101e0e00 0100000000000000",
        ),
        (encode(&GpadlTeardown { relid, gpadl: 0xE1E10.into() }), "0b000000 00000000 05000000 101e0e00"),
        (encode(&RelidReleased { relid }), "0d000000 00000000 05000000"),
        (
            encode(&contact),
            "0e000000 00000000 03000500 01000000 02 00 0000 00000000 0010000000000000 0020000000000000",
        ),
        (encode(&Unload {}), "10000000 00000000"),
        (
            encode(&TlConnectRequest { endpoint: Guid::ZERO, service: INSTANCE }),
            "15000000 00000000 00000000000000000000000000000000 33221100 5544 7766 8899 aabbccddeeff",
        ),
        (encode(&ModifyChannel { relid, target_vp: 2.into() }), "16000000 00000000 05000000 02000000"),
    ] {
        assert_eq!(bytes, hex(golden));
        assert!(GuestMessage::parse(&bytes).is_ok(), "{golden}");
        assert!(matches!(HostMessage::parse(&bytes), Err(ParseError::WrongWay(_))), "{golden}");
    }
}

#[test]
fn open_has_its_golden_bytes() {
    let mut golden = hex("05000000 00000000 05000000 05000000 101e0e00 03000000 80000000");
    golden.extend([0xAB; 120]);
    let open = OpenChannel {
        relid: 5.into(),
        open_id: 5.into(),
        gpadl: 0xE1E10.into(),
        target_vp: 3.into(),
        downstream_page: 128.into(),
        user_data: [0xAB; 120],
    };
    assert_eq!(golden.len(), 148);
    assert_eq!(encode(&open), golden);
    assert_eq!(GuestMessage::parse(&golden), Ok(GuestMessage::OpenChannel(&open)));
}

#[test]
fn any_message_one_byte_short_is_refused() {
    for kind in Kind::ALL {
        let least = least(kind);
        let mut bytes = vec![0; least];
        bytes[0] = u8::try_from(kind.to_wire()).unwrap();
        let parses = |bytes: &[u8]| GuestMessage::parse(bytes).is_ok() || HostMessage::parse(bytes).is_ok();
        assert!(parses(&bytes), "{kind:?} of {least} bytes");
        assert!(!parses(&bytes[..least - 1]), "{kind:?} of {} bytes", least - 1);
    }
}

/// Least bytes of a message, from the tables of the fact sheet.
fn least(kind: Kind) -> usize {
    match kind {
        Kind::RequestOffers | Kind::AllOffersDelivered | Kind::Unload | Kind::UnloadResponse => 8,
        Kind::RescindChannelOffer | Kind::CloseChannel | Kind::GpadlTorndown | Kind::RelidReleased => 12,
        Kind::GpadlBody | Kind::GpadlTeardown | Kind::VersionResponse => 16,
        Kind::ModifyChannel | Kind::ModifyChannelResponse => 16,
        Kind::OpenChannelResult | Kind::GpadlCreated => 20,
        Kind::GpadlHeader => 28,
        Kind::InitiateContact | Kind::TlConnectRequest => 40,
        Kind::TlConnectResult => 44,
        Kind::OpenChannel => 148,
        Kind::OfferChannel => 196,
    }
}

#[test]
fn odd_bytes_are_not_messages() {
    assert_eq!(GuestMessage::parse(&[]), Err(ParseError::NoHeader(0)));
    assert_eq!(GuestMessage::parse(&[3, 0, 0, 0, 0, 0, 0]), Err(ParseError::NoHeader(7)));
    assert_eq!(GuestMessage::parse(&[3; 241]), Err(ParseError::Oversized(241)));
    for number in [0, 18, 19, 20, 25, 29, 0x8000_0000, u32::MAX] {
        let bytes = u64::from(number).to_le_bytes();
        assert_eq!(GuestMessage::parse(&bytes), Err(ParseError::UnknownType(number)));
        assert_eq!(HostMessage::parse(&bytes), Err(ParseError::UnknownType(number)));
    }
}

#[test]
fn later_versions_may_append_to_a_message() {
    let mut bytes = encode(&TlConnectRequest { endpoint: INSTANCE, service: INSTANCE });
    bytes.extend([0; 16]);
    assert!(matches!(GuestMessage::parse(&bytes), Ok(GuestMessage::TlConnectRequest(_))));
}

#[test]
fn versions_are_those_of_the_fact_sheet_and_no_others() {
    let numbers = [0x2_0004, 0x3_0000, 0x4_0000, 0x4_0001, 0x5_0000, 0x5_0001, 0x5_0002, 0x5_0003];
    assert_eq!(Version::ALL.map(Version::to_wire), numbers);
    assert!(Version::ALL.is_sorted());
    for other in [0, 0xD, 0x1_0001, 0x2_0003, 0x2_0005, 0x4_0002, 0x5_0004, 0x6_0000, u32::MAX] {
        assert_eq!(Version::from_wire(other), None);
    }
    assert_eq!(Version::V5_3.to_string(), "5.3");
}
