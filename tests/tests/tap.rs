//! TAP devices in network namespaces, and the way out of an external switch.

#![forbid(unsafe_code)]

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use switchyard_tests::bridge::veth_pair;
use switchyard_tests::capture::{Pace, record, replay};
use switchyard_tests::case;
use switchyard_tests::iperf::{Load, iperf};
use switchyard_tests::lab::Lab;
use switchyard_tests::netns::Netns;
use switchyard_tests::numbered;
use switchyard_tests::offload;
use switchyard_tests::packets::{self, packets};
use switchyard_tests::ping::{Ping, ping};
use switchyard_tests::player::{Player, PlayerSpec};
use switchyard_tests::process::words;
use switchyard_tests::setup::Need;
use switchyard_tests::station::Station;
use switchyard_tests::transfer::transfer;
use switchyard_tests::witness::{Party, Witness};
use switchyard_tests::yardd::{Yardd, private_switch, programs};

const NEEDS: &[Need] = &[Need::Root, Need::Tap, Need::Namespaces];
const LIMIT: Duration = Duration::from_secs(30);
const MANY: u32 = 3_000_000;

/// A device name that no other test has.
fn device(hint: &str) -> String {
    format!("y{hint}{}", std::process::id() % 1_000_000)
}

/// A namespace that holds the TAP device of a port.
fn station(lab: &Lab, device: &str, address: &str, mtu: Option<u32>) -> Result<Netns> {
    let namespace = Netns::new(lab, "tap")?;
    namespace.plug(device, address, mtu)?;
    Ok(namespace)
}

fn all_answered(from: &dyn Station, address: &str, what: Ping) -> Result<()> {
    // The first may be lost while neighbours are found.
    let _ = ping(from, address, Ping { count: 1, ..what })?;
    let report = ping(from, address, what)?;
    ensure!(report.received == report.sent && report.sent > 0, "{address}: {report:?}");
    Ok(())
}

#[test]
fn namespaces_talk_over_tap() -> Result<()> {
    case::exclusive("namespaces_talk_over_tap", NEEDS, |lab| {
        let (red, blue) = (device("r"), device("b"));
        let port = |name: &str, device: &str, more: &str| {
            format!("[switch.lab.port.{name}]\ntap = {{ name = {device:?}, queues = 2 }}\nmtu = 9000\n{more}")
        };
        let config = format!(
            "[switch.lab]\ntype = \"private\"\n{}{}",
            port("red", &red, ""),
            port("blue", &blue, "coalesce = false\n")
        );
        let mut yardd = Yardd::start(lab, &programs()?, &[0, 1], &config)?;
        let a = station(lab, &red, "10.7.0.1/24", Some(9000))?;
        let b = station(lab, &blue, "10.7.0.2/24", Some(9000))?;

        all_answered(&a, "10.7.0.2", Ping::default())?;
        all_answered(&b, "10.7.0.1", Ping { size: 8972, whole: true, ..Ping::default() })?;
        transfer(&a, &b, "10.7.0.2", MANY)?;
        transfer(&b, &a, "10.7.0.1", MANY)?;
        for (server, client, address) in [(&a, &b, "10.7.0.1"), (&b, &a, "10.7.0.2")] {
            let report = iperf(server, client, address, Load::Tcp { streams: 2 }, 2)?;
            ensure!(report.bits_per_second > 0.0, "no TCP came through");
            // Queues of the device may overflow for a moment; a switch that loses more is broken.
            let segments = report.bits_per_second * 2.0 / 8.0 / 60_000.0;
            ensure!((report.retransmits as f64) < 100.0 + segments * 0.05, "{report:?}");
        }
        let report = iperf(&a, &b, "10.7.0.1", Load::Udp { payload: 1000, bits_per_second: 4_000_000 }, 2)?;
        ensure!(report.sent_packets > 500 && report.lost_packets * 100 <= report.sent_packets, "{report:?}");

        // Each offload off and on at one end, bytes compared each time.
        offload::each_off_and_on(&a, &red, || transfer(&a, &b, "10.7.0.2", MANY))?;
        a.ip(&format!("link set {red} mtu 1500"))?;
        transfer(&b, &a, "10.7.0.1", MANY).context("with an MTU of 1500 at one end")?;
        ensure!(yardd.process().is_running(), "the daemon ended");
        for port in ["red", "blue"] {
            let port = yardd.port("lab", port)?;
            ensure!(port["state"] == "up", "{port}");
            for queue in port["queues"].as_array().context("no queues")? {
                ensure!(queue["enabled"] == true, "{queue}");
            }
        }
        Ok(())
    })
}

#[test]
fn deleted_device_stops_its_port_only_and_restart_makes_it_anew() -> Result<()> {
    case::exclusive("deleted_device_stops_its_port_only_and_restart_makes_it_anew", NEEDS, |lab| {
        let gone = device("g");
        let config = format!(
            "{}[switch.lab.port.gone]\ntap = {{ name = {gone:?} }}\n",
            private_switch(lab, &["left", "right"], 1)
        );
        let yardd = Yardd::start(lab, &programs()?, &[1], &config)?;
        let party = |name: &str, number| Party::connect(&lab.path(name), number, PlayerSpec::new());
        let mut witness = Witness::start([party("left", 1)?, party("right", 2)?]);
        let namespace = station(lab, &gone, "10.7.0.1/24", None)?;
        // Traffic in both directions while it goes.
        let mut pings = namespace.spawn("ping -n -i 0.01 -b 10.7.0.255")?;
        witness.see(200)?;
        namespace.ip(&format!("link del {gone}"))?;
        yardd.wait_for_port("lab", "gone", "faulted")?;
        let port = yardd.port("lab", "gone")?;
        let reason = port["reason"].as_str().context("no reason")?;
        ensure!(!reason.is_empty(), "{port}");
        pings.kill()?;
        witness.see(200)?;

        yardd.yard(&["port", "restart", "lab/gone"])?;
        yardd.wait_for_port("lab", "gone", "up")?;
        namespace.plug(&gone, "10.7.0.1/24", None)?;
        let before = yardd.port("lab", "gone")?["received"]["frames"].as_u64();
        let _ = ping(&namespace, "10.7.0.9", Ping::default())?;
        let after = yardd.port("lab", "gone")?["received"]["frames"].as_u64();
        ensure!(after > before, "nothing came from the new device: {before:?}, {after:?}");
        witness.see(200)?;
        witness.finish().map(drop)
    })
}

#[test]
fn external_switch_reaches_the_network_beyond_with_tags_kept() -> Result<()> {
    case::exclusive("external_switch_reaches_the_network_beyond_with_tags_kept", NEEDS, |lab| {
        let outside = Netns::new(lab, "outside")?.without_ipv6()?;
        let (near, far) = veth_pair()?;
        outside.take(&far)?;
        outside.ip(&format!("link set {far} name eth0"))?;
        outside.ip("addr add 10.8.0.1/24 dev eth0")?;
        outside.ip("link set eth0 up")?;
        words(&format!("ip link set {near} up"))?;

        let inside = device("i");
        let guest = lab.path("guest");
        let config = format!(
            "[switch.wan]\ntype = \"external\"\nuplink = {near:?}\n\
             [switch.wan.port.inside]\ntap = {{ name = {inside:?} }}\n\
             [switch.wan.port.tagged]\nvhost-user = {{ path = {guest:?} }}\n"
        );
        let yardd = Yardd::start(lab, &programs()?, &[1], &config)?;
        let namespace = station(lab, &inside, "10.8.0.2/24", None)?;
        all_answered(&namespace, "10.8.0.1", Ping { size: 1472, whole: true, ..Ping::default() })?;
        all_answered(&outside, "10.8.0.2", Ping::default())?;
        transfer(&namespace, &outside, "10.8.0.1", MANY)?;
        transfer(&outside, &namespace, "10.8.0.2", MANY)?;

        // Tagged frames, byte for byte, out of the switch and into it. (Many kernels lack VLAN devices.)
        let mut player = Player::connect(&guest, PlayerSpec { max_frame: 1518, ..PlayerSpec::new() })?;
        let file = lab.path("outside.pcap");
        let recording = record(&outside, "eth0", &file)?;
        let tagged = |from: u8, to: [u8; 6], sequence| {
            let mut frame = numbered::frame([2, 0, 0, 0, 0x77, from], to, 4, sequence, 1510);
            frame.splice(12..12, [0x81, 0x00, 0x60, 30]);
            frame
        };
        let sent: Vec<_> = (0..5).map(|sequence| tagged(9, [0xff; 6], sequence)).collect();
        for frame in &sent {
            ensure!(player.send(0, frame)?, "ring full");
        }
        recording.finish(&file, 5, Duration::from_secs(5))?;
        let mut seen = packets(&file)?;
        seen.retain(|packet| packet.data[6..12] == [2, 0, 0, 0, 0x77, 9]);
        let seen: Vec<_> = seen.into_iter().map(|packet| packet.data).collect();
        ensure!(seen == sent, "{} of 5 tagged frames came out as they were sent", seen.len());

        let file = lab.path("replayed.pcap");
        let sent: Vec<_> = (0..5).map(|sequence| tagged(8, [2, 0, 0, 0, 0x77, 9], sequence)).collect();
        packets::write(&file, &packets::of_frames(&sent))?;
        replay(&outside, "eth0", &file, Pace::PacketsPerSecond(100))?;
        for frame in &sent {
            let received = loop {
                let received = player.expect_frame(LIMIT)?.frame;
                if received[6..12] == [2, 0, 0, 0, 0x77, 8] {
                    break received;
                }
            };
            ensure!(received == *frame, "tagged frame came in as {:02x?}", &received[..20]);
        }
        ensure!(yardd.port("wan", "uplink")?["state"] == "up", "the uplink is not up");
        Ok(())
    })
}
