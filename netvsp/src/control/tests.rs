//! A guest's conversation with its NIC, message by message; every message in every state is in [`table`].

use vmq::Mac;
use zerocopy::little_endian::{U16, U32, U64};

use super::*;
use crate::protocol::nvsp::{Kind, Status};
use crate::protocol::oid::Oid;

mod guest;
mod oids;
mod restart;
mod sweep;
mod table;

use guest::{Guest, completion, config, reply, status_of};

#[test]
fn linux_handshake_runs_through() {
    let mut guest = Guest::new(config());
    for refused in [0x7_0000u32, 0x6_0002] {
        let answer = completion(guest.init(refused));
        assert_eq!(answer[12..16], 3u32.to_le_bytes());
        assert_eq!(guest.nic.phase(), Phase::Closed);
    }
    assert_eq!(completion(guest.init(0x6_0001))[12..16], 1u32.to_le_bytes());
    guest.ndis_config(1514, 0xac);
    assert_eq!(guest.nic.phase(), Phase::Negotiating);
    assert_eq!(
        guest.send(Kind::SendReceiveBuffer, &guest::buffer(1), true),
        vec![Effect::MapReceive { gpadl: 1 }]
    );
    let effects = guest.nic.mapped(Buffer::Receive, Some(16 << 20));
    let answer = completion(effects);
    let size = receive_section_bytes(1500, true);
    let count = (16 << 20) / size;
    assert_eq!(answer[4..12], [1, 0, 0, 0, 1, 0, 0, 0]);
    assert_eq!(answer[16..24], [size.to_le_bytes(), count.to_le_bytes()].concat());
    assert_eq!(guest.send(Kind::SendSendBuffer, &guest::buffer(2), true), vec![Effect::MapSend { gpadl: 2 }]);
    assert_eq!(completion(guest.nic.mapped(Buffer::Send, Some(1 << 20)))[4..12], [1, 0, 0, 0, 0, 24, 0, 0]);
    assert_eq!(guest.nic.phase(), Phase::Ready);
    guest.initialize();
    let path = guest.nic.data_path();
    assert_eq!((path.state, path.filter, path.max_ranges), (Phase::Running, PacketFilter::empty(), 375));
    assert_eq!(
        path.receive,
        Some(SectionedBuffer { gpadl: 1, id: 0xcafe, section_size: size, sections: count })
    );
    assert_eq!(path.send, Some(SectionedBuffer { gpadl: 2, id: 0xcafe, section_size: 6144, sections: 170 }));
    guest.set(Oid::GEN_CURRENT_PACKET_FILTER, &0x0du32.to_le_bytes());
    let filter = PacketFilter::DIRECTED | PacketFilter::ALL_MULTICAST | PacketFilter::BROADCAST;
    assert_eq!(guest.nic.data_path().filter, filter);
}

#[test]
fn section_holds_the_longest_header_and_two_tags() {
    for mtu in [68, 1500, 9000, u16::MAX] {
        let size = receive_section_bytes(mtu, false);
        let header = u32::try_from(crate::protocol::packet::MAX_RX_HEADER).unwrap();
        assert!(size >= header + 14 + 8 + u32::from(mtu) && size.is_multiple_of(8));
        assert!(
            size >= receive_section_bytes(1500, false),
            "a buffer of more sections than the usual MTU needs"
        );
    }
}

#[test]
fn completion_only_when_wanted() {
    let mut guest = Guest::agreed(config());
    let ndis = nvsp::NdisVersion { major: U32::new(6), minor: U32::new(30) };
    assert_eq!(guest.send(Kind::SendNdisVersion, &ndis, false), vec![]);
    assert_eq!(guest.send(Kind::SendNdisVersion, &ndis, true), vec![Effect::Complete(vec![])]);
    guest.send(Kind::SendReceiveBuffer, &guest::buffer(1), false);
    assert_eq!(guest.nic.mapped(Buffer::Receive, Some(1 << 20)), vec![Effect::Changed]);
}

#[test]
fn buffer_that_cannot_be_mapped_is_refused_and_may_be_offered_again() {
    for bytes in [None, Some(3000), Some((32 << 20) + 1)] {
        let mut guest = Guest::agreed(config());
        guest.send(Kind::SendReceiveBuffer, &guest::buffer(1), true);
        let effects = guest.nic.mapped(Buffer::Receive, bytes);
        assert_eq!(status_of(&completion(effects)), Status::Failure as u32);
        assert_eq!(guest.nic.data_path().receive, None);
        let again = guest.send(Kind::SendReceiveBuffer, &guest::buffer(1), true);
        assert_eq!(again, vec![Effect::MapReceive { gpadl: 1 }]);
    }
}

#[test]
fn same_buffer_offered_twice_is_answered_alike_and_another_refused() {
    let mut guest = Guest::ready(config());
    let again = guest.send(Kind::SendReceiveBuffer, &guest::buffer(1), true);
    assert_eq!(status_of(&completion(again)), Status::Success as u32);
    let other = guest.send(Kind::SendReceiveBuffer, &guest::buffer(9), true);
    assert_eq!(status_of(&completion(other)), Status::Failure as u32);
    assert_eq!(guest.nic.data_path().receive.unwrap().gpadl, 1);
}

#[test]
fn subchannels_are_granted_once_up_to_the_limit_and_completed_before_they_are_offered() {
    let mut guest = Guest::running(config());
    let effects = guest.subchannels(63);
    let [Effect::Changed, Effect::Complete(answer), Effect::OfferSubchannels(3)] = effects.as_slice() else {
        panic!("{effects:?}");
    };
    assert_eq!(answer[4..12], [1, 0, 0, 0, 3, 0, 0, 0]);
    assert_eq!(status_of(&completion(guest.subchannels(1))), Status::Failure as u32);
    assert_eq!(guest.nic.channel_opened(0), vec![]);
    assert_eq!(guest.nic.channel_opened(4), vec![]);
    assert_eq!(guest.nic.channel_opened(2), vec![]);
    assert_eq!(guest.nic.channel_opened(2), vec![]);
    assert_eq!(guest.nic.channel_opened(1), vec![]);
    assert_eq!(guest.nic.channel_opened(3), vec![Effect::InBand(nvsp::send_table(4))]);
    assert_eq!(guest.nic.channel_opened(u16::MAX), vec![]);
}

#[test]
fn subchannels_of_a_nic_with_one_queue_are_none() {
    let mut guest = Guest::running(NicConfig { queues: 1, ..config() });
    let effects = guest.subchannels(7);
    assert_eq!(completion(effects.clone())[4..12], [1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(effects.len(), 1);
}

#[test]
fn mtu_change_and_suspend_go_through_halt_revoke_close_and_begin_again() {
    let mut guest = Guest::running(NicConfig { mtu: 9000, ..config() });
    assert_eq!(guest.nic.data_path().mtu, 1500);
    guest.set(Oid::GEN_CURRENT_PACKET_FILTER, &[0; 4]);
    assert_eq!(guest.nic.rndis(&rndis::request(rndis::Kind::Halt, 3)).unwrap(), vec![Effect::Changed]);
    let id = nvsp::RevokeBuffer { id: U16::new(0xcafe) };
    let revoked = guest.send(Kind::RevokeReceiveBuffer, &id, false);
    assert_eq!(revoked, vec![Effect::Changed]);
    let revoked = guest.send(Kind::RevokeSendBuffer, &id, false);
    assert_eq!(revoked, vec![Effect::Changed]);
    assert_eq!(guest.nic.channel_closed(0), vec![Effect::Changed]);
    assert_eq!(guest.nic.phase(), Phase::Closed);
    completion(guest.init(0x6_0001));
    guest.ndis_config(9014, 0xac);
    guest.map_buffers();
    guest.initialize();
    assert_eq!(guest.nic.data_path().mtu, 9000);
    assert_eq!(guest.query(Oid::GEN_MAXIMUM_FRAME_SIZE), 9000u32.to_le_bytes());
    assert!(guest.nic.data_path().receive.unwrap().section_size >= 9000 + 124 + 22);
}

#[test]
fn closed_primary_channel_forgets_all_but_the_address_and_unmaps() {
    let mut guest = Guest::running(NicConfig { spoofing: true, ..config() });
    let mac = Mac([2, 0, 0, 0, 0, 9]);
    guest.set(Oid::GEN_RNDIS_CONFIG_PARAMETER, &crate::protocol::oid::network_address_parameter(mac));
    let effects = guest.nic.channel_closed(0);
    assert_eq!(effects, vec![Effect::Changed]);
    let path = guest.nic.data_path();
    assert_eq!((path.state, path.version, path.receive, path.send), (Phase::Closed, None, None, None));
    assert_eq!((path.mac, path.subchannels, path.rss), (mac, 0, None));
    assert_eq!(guest.nic.channel_closed(0), vec![]);
}

#[test]
fn frame_size_below_ipv4_is_a_violation_and_beyond_the_host_is_cut() {
    let mut guest = Guest::agreed(config());
    let with = |mtu| nvsp::NdisConfig { mtu: U32::new(mtu), reserved: U32::ZERO, capabilities: U64::ZERO };
    for mtu in [0, 13, 81] {
        let message = nvsp::message(Kind::SendNdisConfig, &with(mtu));
        assert_eq!(guest.nic.request(&message, false), Err(Violation::FrameSize(mtu)));
    }
    guest.send(Kind::SendNdisConfig, &with(u32::MAX), false);
    assert_eq!(guest.nic.data_path().mtu, 1500);
    assert_eq!(guest.nic.configure(900, None, false), vec![Effect::Changed]);
    assert_eq!(guest.nic.configure(900, None, false), vec![]);
    assert_eq!(guest.nic.data_path().mtu, 900);
}

#[test]
fn link_events_are_spaced_and_a_flap_is_a_network_change() {
    const SECOND: Nanos = 1_000_000_000;
    let event = |effects: Effects| match effects.as_slice() {
        [Effect::Indicate(message)] => u32::from_le_bytes(message[8..12].try_into().unwrap()),
        [] => 0,
        other => panic!("{other:?}"),
    };
    let mut guest = Guest::running(config());
    assert_eq!(event(guest.nic.link(true, SECOND)), 0);
    assert_eq!(event(guest.nic.link(false, SECOND)), 0x4001_000c);
    assert_eq!(event(guest.nic.link(true, 2 * SECOND)), 0);
    assert_eq!(guest.nic.next_tick(), Some(3 * SECOND));
    assert_eq!(event(guest.nic.tick(3 * SECOND)), 0x4001_000b);
    assert_eq!(event(guest.nic.link(false, 4 * SECOND)), 0);
    assert_eq!(event(guest.nic.link(true, 4 * SECOND)), 0);
    assert_eq!(event(guest.nic.tick(5 * SECOND)), 0x4001_0018);
    assert_eq!(event(guest.nic.speed(40_000, 6 * SECOND)), 0);
    assert_eq!(event(guest.nic.tick(7 * SECOND)), 0x4001_0013);
    assert_eq!(guest.nic.next_tick(), None);
    // A guest that asks need not be told.
    guest.nic.link(false, 7 * SECOND);
    assert_eq!(guest.query(Oid::GEN_MEDIA_CONNECT_STATUS), [1, 0, 0, 0]);
    assert_eq!(guest.nic.next_tick(), None);
}

#[test]
fn link_of_a_guest_without_rndis_says_nothing() {
    let mut guest = Guest::ready(config());
    assert_eq!(guest.nic.link(false, 0), vec![]);
    assert_eq!(guest.nic.next_tick(), None);
    guest.initialize();
    assert_eq!(guest.query(Oid::GEN_MEDIA_CONNECT_STATUS), [1, 0, 0, 0]);
}

#[test]
fn set_whose_information_is_cut_off_is_a_violation() {
    let mut guest = Guest::running(config());
    let mut set = rndis::access(rndis::Kind::Set, 4, Oid::GEN_CURRENT_PACKET_FILTER, &[0; 4]);
    set[16..20].copy_from_slice(&0x1_0000u32.to_le_bytes());
    let violation = guest.nic.rndis(&set).unwrap_err();
    assert_eq!(violation.to_string(), "RNDIS SET of 32 bytes with information at 20 + 65536");
    assert!(reply(guest.nic.rndis(&rndis::request(rndis::Kind::Keepalive, 8)).unwrap())[12..16] == [0; 4]);
}
