//! Messages as bytes.

use vmq::Mac;

use crate::ports::vhost_user::message::{
    ConfigArea, Header, InflightArea, Kind, LogArea, MAX_PAYLOAD, MemoryRegion, MessageError, Reply, Request,
    VringAddress, VringFd, VringState,
};

fn region() -> MemoryRegion {
    MemoryRegion { guest: 0x1000.into(), size: 0x2000.into(), user: 0x7f01.into(), offset: 0x3000.into() }
}

/// One of each request that has a parsed form.
fn samples() -> Vec<Request> {
    let state = VringState { index: 3.into(), num: 0x8000_0100.into() };
    let fd = VringFd { index: 5, polled: true };
    let area = ConfigArea { offset: 2.into(), size: 4.into(), flags: 1.into() };
    let inflight = InflightArea {
        size: 0x1000.into(),
        offset: 0x40.into(),
        rings: 4.into(),
        ring_size: 256.into(),
        padding: 0.into(),
    };
    vec![
        Request::GetFeatures,
        Request::SetFeatures(0x1_4000_0000),
        Request::SetOwner,
        Request::ResetOwner,
        Request::SetMemTable(vec![region(); 8]),
        Request::SetLogBase(LogArea { size: 7.into(), offset: 9.into() }),
        Request::SetLogFd,
        Request::SetVringNum(state),
        Request::SetVringAddr(VringAddress {
            index: 1.into(),
            flags: 1.into(),
            descriptors: 0x10.into(),
            used: 0x20.into(),
            available: 0x30.into(),
            log: 0x40.into(),
        }),
        Request::SetVringBase(state),
        Request::GetVringBase(state),
        Request::SetVringKick(fd),
        Request::SetVringCall(fd),
        Request::SetVringErr(fd),
        Request::GetProtocolFeatures,
        Request::SetProtocolFeatures(9),
        Request::GetQueueNum,
        Request::SetVringEnable(state),
        Request::SendRarp(Mac([1, 2, 3, 4, 5, 6])),
        Request::NetSetMtu(9000),
        Request::GetConfig(area),
        Request::SetConfig(area, vec![1, 2, 3, 4]),
        Request::GetInflightFd(inflight),
        Request::SetInflightFd(inflight),
        Request::ResetDevice,
        Request::GetMaxMemSlots,
        Request::AddMemReg(region()),
        Request::RemMemReg(region()),
        Request::SetStatus(4),
        Request::GetStatus,
    ]
}

#[test]
fn every_request_reads_back_as_written() {
    for request in samples() {
        let bytes = request.encode(true);
        assert_eq!(&bytes[..8], [request.kind() as u8, 0, 0, 0, 9, 0, 0, 0]);
        assert_eq!(Request::parse(request.kind(), &bytes[Header::LEN..]), Ok(request));
    }
}

#[test]
fn payload_one_byte_longer_or_shorter_is_refused() {
    for request in samples() {
        let payload = request.encode(false).split_off(Header::LEN);
        let longer = [&payload[..], &[0]].concat();
        assert!(Request::parse(request.kind(), &longer).is_err(), "{request:?}");
        if let Some((_, shorter)) = payload.split_last() {
            assert!(Request::parse(request.kind(), shorter).is_err(), "{request:?}");
        }
    }
}

#[test]
fn golden_message_of_each_shape() {
    let hex =
        |request: Request| request.encode(false).iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    assert_eq!(hex(Request::GetFeatures), "010000000100000000000000");
    assert_eq!(hex(Request::SetFeatures(0x1_4000_0000)), "0200000001000000080000000000004001000000");
    let state = VringState { index: 1.into(), num: 256.into() };
    assert_eq!(hex(Request::SetVringNum(state)), "0800000001000000080000000100000000010000");
    let kick = VringFd { index: 2, polled: true };
    assert_eq!(hex(Request::SetVringKick(kick)), "0c00000001000000080000000201000000000000");
    assert_eq!(
        hex(Request::SetMemTable(vec![region()])),
        "050000000100000028000000\
         0100000000000000\
         00100000000000000020000000000000017f0000000000000030000000000000"
    );
    assert_eq!(
        hex(Request::AddMemReg(region())),
        "250000000100000028000000\
         0000000000000000\
         00100000000000000020000000000000017f0000000000000030000000000000"
    );
    let address = VringAddress {
        index: 1.into(),
        flags: 1.into(),
        descriptors: 0x10.into(),
        used: 0x20.into(),
        available: 0x30.into(),
        log: 0x40.into(),
    };
    assert_eq!(
        hex(Request::SetVringAddr(address)),
        "090000000100000028000000\
         0100000001000000\
         1000000000000000200000000000000030000000000000004000000000000000"
    );
}

#[test]
fn reply_carries_version_and_reply_flag_and_nothing_else() {
    let reply = Reply::number(Kind::GetFeatures as u32, 0x0102_0304);
    assert_eq!(reply.bytes, [1, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0, 4, 3, 2, 1, 0, 0, 0, 0]);
}

#[test]
fn header_of_another_version_or_a_reply_or_a_huge_payload_is_refused() {
    let header = |flags: u32, size: u32| Header { request: 1.into(), flags: flags.into(), size: size.into() };
    assert_eq!(header(1, 4096).check(), Ok(MAX_PAYLOAD));
    assert_eq!(header(9, 0).check(), Ok(0));
    for flags in [0, 2, 3, 5, 13] {
        assert_eq!(header(flags, 0).check(), Err(MessageError::Flags(flags)));
    }
    for size in [4097, u32::MAX] {
        assert_eq!(header(1, size).check(), Err(MessageError::TooLong { request: 1, size }));
    }
}

#[test]
fn numbers_of_requests_are_those_of_the_specification() {
    for (kind, number) in Kind::ALL.into_iter().zip(1..) {
        assert_eq!(kind as u32, number);
        assert_eq!(Kind::from_number(number), Some(kind));
    }
    assert_eq!([0, 45, u32::MAX].map(Kind::from_number), [None; 3]);
}

#[test]
fn doorbell_index_beyond_eight_bits_is_refused() {
    for value in [0x1_0000u64, 0xffff_0000, 0x200, 1 << 63] {
        let parsed = Request::parse(Kind::SetVringKick, &value.to_le_bytes());
        assert_eq!(parsed, Err(MessageError::Field { kind: Kind::SetVringKick, value }));
    }
}

#[test]
fn memory_table_whose_count_contradicts_its_size_is_refused() {
    let mut payload = Request::SetMemTable(vec![region(); 2]).encode(false).split_off(Header::LEN);
    for count in [0u32, 1, 3, 9, u32::MAX] {
        payload[..4].copy_from_slice(&count.to_le_bytes());
        assert!(Request::parse(Kind::SetMemTable, &payload).is_err());
    }
    let nine = Request::SetMemTable(vec![region(); 9]).encode(false).split_off(Header::LEN);
    assert!(Request::parse(Kind::SetMemTable, &nine).is_err());
}

#[test]
fn inflight_description_is_read_with_and_without_padding() {
    let area =
        InflightArea { size: 64.into(), rings: 2.into(), ring_size: 16.into(), ..InflightArea::default() };
    let bytes = Request::GetInflightFd(area).encode(false).split_off(Header::LEN);
    assert_eq!(bytes.len(), 24);
    assert_eq!(Request::parse(Kind::GetInflightFd, &bytes[..20]), Ok(Request::GetInflightFd(area)));
    assert!(Request::parse(Kind::GetInflightFd, &bytes[..22]).is_err());
}
