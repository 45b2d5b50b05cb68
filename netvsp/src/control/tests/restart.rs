//! The process restarts under a running guest.

use super::*;

/// A guest in the middle of everything.
fn busy() -> Guest {
    let mut guest = Guest::running(NicConfig { spoofing: true, ..config() });
    guest.subchannels(2);
    guest.nic.channel_opened(1);
    guest.nic.channel_opened(2);
    guest.set(Oid::GEN_CURRENT_PACKET_FILTER, &[0x0d, 0, 0, 0]);
    let mac = crate::protocol::oid::network_address_parameter(Mac([2, 0, 0, 0, 0, 9]));
    guest.set(Oid::GEN_RNDIS_CONFIG_PARAMETER, &mac);
    guest
}

#[test]
fn restored_nic_goes_on_where_the_saved_one_was() {
    let saved = busy();
    let mut restored = Nvsp::new(NicConfig { spoofing: true, ..config() });
    restored.restore(&saved.nic.save()).unwrap();
    assert_eq!(restored.data_path(), saved.nic.data_path());
    assert_eq!(restored.save(), saved.nic.save());
    let mut fresh = Nvsp::new(config());
    fresh.restore(&Guest::new(config()).nic.save()).unwrap();
    assert_eq!(fresh.phase(), Phase::Closed);
}

#[test]
fn mapping_under_way_is_asked_for_again() {
    let mut guest = Guest::agreed(config());
    guest.send(Kind::SendReceiveBuffer, &guest::buffer(1), true);
    let saved = guest.nic.save();
    let mut guest = Guest::new(config());
    guest.nic.restore(&saved).unwrap();
    let effects = guest.send(Kind::SendReceiveBuffer, &guest::buffer(1), true);
    assert_eq!(effects, vec![Effect::MapReceive { gpadl: 1 }]);
}

#[test]
fn link_that_went_down_meanwhile_is_told() {
    let mut restored = Nvsp::new(config());
    restored.restore(&busy().nic.save()).unwrap();
    assert!(matches!(restored.link(false, 1).as_slice(), [Effect::Indicate(_)]));
}

#[test]
fn saved_state_that_is_cut_or_tampered_with_is_refused() {
    let saved = String::from_utf8(busy().nic.save()).unwrap();
    for len in 0..saved.len() {
        assert!(Nvsp::new(config()).restore(&saved.as_bytes()[..len]).is_err(), "{len}");
    }
    let groups = format!("\"multicast\":[{}]", vec!["[1,0,94,0,0,1]"; 33].join(","));
    let size = format!("\"section_size\":{}", receive_section_bytes(1500, true));
    for (from, to) in [
        ("\"format\":1", "\"format\":2"),
        ("\"mac\":[2,", "\"mac\":[3,"),
        (size.as_str(), "\"section_size\":4294967295"),
        (size.as_str(), "\"section_size\":0"),
        ("\"subchannels\":2", "\"subchannels\":64"),
        ("\"mtu\":1500", "\"mtu\":0"),
        ("\"multicast\":[]", &groups),
        ("\"rss\":null", "\"rss\":{\"key\":[],\"table\":[0],\"hash\":257}"),
    ] {
        assert!(saved.contains(from), "{from} in {saved}");
        let mut nic = Nvsp::new(config());
        assert!(nic.restore(saved.replacen(from, to, 1).as_bytes()).is_err(), "{to}");
        assert_eq!(nic.phase(), Phase::Closed);
    }
}

#[test]
fn saved_statistics_near_the_end_of_numbers_are_summed_all_the_same() {
    let saved = String::from_utf8(busy().nic.save()).unwrap();
    let none = "\"out_frames\":[0,0,0]";
    assert!(saved.contains(none), "{saved}");
    let saved = saved.replacen(none, "\"out_frames\":[18446744073709551615,5,0]", 1);
    let mut guest = Guest::new(config());
    guest.nic.restore(saved.as_bytes()).unwrap();
    assert_eq!(guest.nic.statistics().sent(), 4);
    assert_eq!(guest.query(Oid::GEN_XMIT_OK)[..4], 4u32.to_le_bytes());
}

/// What a released version saved must be read by every later one.
#[test]
fn state_saved_by_format_1_is_read() {
    let golden = r#"{"format":1,"mac":[2,0,94,16,0,1],"link_up":true,"state":{"Agreed":{"version":"V61","ndis":[6,30],
        "mtu":1500,"capabilities":172,"receive":{"Mapped":{"gpadl":1,"id":51966,"section_size":4288,"sections":3912}},
        "send":{"Mapped":{"gpadl":2,"id":0,"section_size":6144,"sections":170}},"subchannels":1,"open":2,
        "rndis":{"Initialised":{"filter":13,"multicast":[],"offloads":{"ipv4":{"tx":true,"rx":true},
        "tcp4":{"tx":true,"rx":true},"udp4":{"tx":true,"rx":true},"tcp6":{"tx":true,"rx":true},
        "udp6":{"tx":true,"rx":true},"lso_v4":true,"lso_v6":true,"rsc_v4":true,"rsc_v6":true},"rss":null,
        "told":{"up":true,"mbps":10000}}}}}}"#;
    let mut nic = Nvsp::new(config());
    nic.restore(golden.as_bytes()).unwrap();
    let path = nic.data_path();
    assert_eq!((path.state, path.rsc, path.subchannels), (Phase::Running, true, 1));
}
