//! Captures of real programs replayed through the switch, each frame compared with the one that went in: offline in
//! virtual time, live from file to file, and by tcpreplay on TAP devices.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use switchyard_tests::capture::{Pace, fields, record, replay};
use switchyard_tests::case;
use switchyard_tests::lab::{Lab, wait_for};
use switchyard_tests::netns::Netns;
use switchyard_tests::packets::{self, Packet, expect_same, packets};
use switchyard_tests::player::PlayerSpec;
use switchyard_tests::process::{command, output};
use switchyard_tests::setup::Need;
use switchyard_tests::witness::{Party, Witness};
use switchyard_tests::yardd::{Yardd, private_switch, programs};

const LIMIT: Duration = Duration::from_secs(30);
/// The longest frame that a port with the largest MTU takes, without and with tag.
const LONGEST: usize = 9216 + 14;

/// The project's own recording, and those of others if they are at hand.
fn captures() -> Result<Vec<PathBuf>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut found = vec![root.join("examples/talk.pcapng")];
    for entry in std::fs::read_dir(root.join("../shared/pcaps/real")).into_iter().flatten() {
        found.push(entry?.path());
    }
    found.sort();
    found.retain(|file| is_ethernet(file));
    ensure!(!found.is_empty(), "there is no capture to replay");
    Ok(found)
}

fn talk() -> Result<PathBuf> {
    Ok(Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/talk.pcapng").canonicalize()?)
}

fn is_ethernet(file: &Path) -> bool {
    output(Command::new("capinfos").args(["-T", "-r", "-E"]).arg(file))
        .is_ok_and(|text| text.contains("ether"))
}

/// Whether the switch forwards such a frame at all: it was captured whole, has a header and the source of a station,
/// no port's MTU forbids it, and it is not one that bridges keep to themselves.
fn is_forwarded(packet: &Packet) -> bool {
    let data = &packet.data;
    let tagged = data.get(12..14) == Some(&[0x81, 0]);
    let longest = LONGEST + if tagged { 4 } else { 0 };
    let shortest = if tagged { 18 } else { 14 };
    let relayed = !matches!(data[..], [0x01, 0x80, 0xc2, 0, 0, 0..=0x0f, ..]);
    is_whole(packet) && relayed && (shortest..=longest).contains(&data.len()) && data[6] & 1 == 0
}

/// Whether the frame was captured to its end.
fn is_whole(packet: &Packet) -> bool {
    packet.data.len() == packet.original_len as usize && packet.data.len() <= 65_550
}

/// `addresses = […]` with every station that a frame goes to, so that a recording of both ends of a conversation, which
/// comes in at one port, leaves at another.
fn pinned(packets: &[Packet]) -> String {
    let mut stations = BTreeSet::new();
    for data in packets.iter().map(|packet| &packet.data).filter(|data| data.len() >= 18) {
        let vlan =
            if data[12..14] == [0x81, 0] { u16::from_be_bytes([data[14], data[15]]) & 0xfff } else { 0 };
        if data[0] & 1 == 0 && data[..6] != [0; 6] && vlan < 4095 {
            stations.insert((data[..6].to_vec(), vlan));
        }
    }
    let item = |(mac, vlan): &(Vec<u8>, u16)| {
        let mac: Vec<_> = mac.iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{{ mac = \"{}\", vlan = {vlan} }}", mac.join(":"))
    };
    format!("addresses = [{}]\n", stations.iter().map(item).collect::<Vec<_>>().join(", "))
}

/// Plays `file` through a switch in virtual time; what left it and what was dropped is in `out` and `dropped`.
fn play_offline(lab: &Lab, file: &Path, pace: &str, out: &Path, dropped: &Path) -> Result<String> {
    let config = format!(
        "[switch.lab]\ntype = \"private\"\n\
         [switch.lab.port.play]\nmtu = 9216\npcap = {{ read = {file:?}, write = {dropped:?}, pace = {pace:?} }}\n\
         [switch.lab.port.keep]\nmtu = 9216\npcap = {{ write = {out:?} }}\n{}",
        pinned(&packets(file)?)
    );
    let toml = lab.path("offline.toml");
    std::fs::write(&toml, config)?;
    output(command(programs()?.join("yardd")).arg("--offline").arg("--config").arg(&toml))
}

#[test]
fn every_frame_of_a_capture_is_written_or_dropped_with_its_reason() -> Result<()> {
    case::exclusive("every_frame_of_a_capture_is_written_or_dropped_with_its_reason", &[], |lab| {
        let mut forwarded = 0;
        for file in captures()? {
            let (out, dropped) = (lab.path("out.pcapng"), lab.path("dropped.pcapng"));
            play_offline(lab, &file, "recorded", &out, &dropped)
                .with_context(|| file.display().to_string())?;
            let input = packets(&file)?;
            let kept: Vec<_> = input.iter().filter(|packet| is_forwarded(packet)).cloned().collect();
            let lost: Vec<_> =
                input.iter().filter(|packet| is_whole(packet) && !is_forwarded(packet)).cloned().collect();
            let found = packets(&out)?;
            expect_same(&kept, &found).with_context(|| file.display().to_string())?;
            expect_same(&lost, &packets(&dropped)?)
                .with_context(|| format!("dropped frames of {}", file.display()))?;
            // In virtual time the pace is exact. Time does not run backwards in a switch, as it may in a capture.
            let mut clock = 0;
            let mut clocks = input.iter().map(|packet| {
                clock = clock.max(packet.time);
                (clock, is_forwarded(packet))
            });
            let due: Vec<_> = clocks.by_ref().filter(|(_, kept)| *kept).map(|(time, _)| time).collect();
            let times: Vec<_> = found.iter().map(|packet| packet.time).collect();
            ensure!(due == times, "{}: recorded times are not kept", file.display());
            for comment in fields(&dropped, "", &["frame.comment"])? {
                ensure!(comment[0].starts_with("dropped: "), "{}: {comment:?}", file.display());
            }
            forwarded += found.len();
        }
        ensure!(forwarded > 150, "only {forwarded} frames went through");
        Ok(())
    })
}

#[test]
fn same_files_in_are_same_bytes_out() -> Result<()> {
    case::exclusive("same_files_in_are_same_bytes_out", &[], |lab| {
        for pace in ["recorded", "full"] {
            let mut runs = Vec::new();
            for run in 0..2 {
                let (out, dropped) = (lab.path(&format!("out-{run}")), lab.path(&format!("dropped-{run}")));
                let shown = play_offline(lab, &talk()?, pace, &out, &dropped)?;
                runs.push((
                    std::fs::read(out)?,
                    std::fs::read(dropped)?,
                    shown.replace(&format!("-{run}"), ""),
                ));
            }
            ensure!(runs[0] == runs[1], "two runs at {pace} pace differ");
        }
        Ok(())
    })
}

#[test]
fn capture_played_live_comes_out_frame_by_frame() -> Result<()> {
    case::exclusive("capture_played_live_comes_out_frame_by_frame", &[], |lab| {
        let (file, out) = (talk()?, lab.path("out.pcapng"));
        let input = packets(&file)?;
        let config = format!(
            "[switch.lab]\ntype = \"private\"\n\
             [switch.lab.port.first]\nmtu = 9216\npcap = {{ read = {file:?}, pace = \"full\" }}\n\
             [switch.lab.port.keep]\nmtu = 9216\npcap = {{ write = {out:?} }}\n{}",
            pinned(&input)
        );
        let yardd = Yardd::start(lab, &programs()?, &[1], &config)?;
        // The same again, for as often as it is restarted.
        for round in 1..=3 {
            yardd.wait_for_port("lab", "first", "finished")?;
            let expected: Vec<_> = std::iter::repeat_n(&input, round).flatten().cloned().collect();
            let whole = wait_for("all frames in the file", LIMIT, || {
                Ok(packets(&out).is_ok_and(|found| found.len() >= expected.len()))
            });
            expect_same(&expected, &packets(&out)?).with_context(|| format!("round {round}"))?;
            whole.with_context(|| format!("{}", yardd.report().unwrap_or_default()))?;
            yardd.yard(&["port", "restart", "lab/first"])?;
        }
        Ok(())
    })
}

/// What comes from stations of `input`; a device that appears on the host says a word of its own.
fn replayed(file: &Path, input: &[Packet]) -> Result<Vec<Packet>> {
    let source = |packet: &Packet| packet.data.get(6..12).map(<[u8]>::to_vec);
    let stations: BTreeSet<_> = input.iter().map(source).collect();
    Ok(packets(file)?.into_iter().filter(|packet| stations.contains(&source(packet))).collect())
}

#[test]
fn frames_of_tcpreplay_come_out_of_tap_and_file() -> Result<()> {
    let needs = [Need::Root, Need::Tap, Need::Namespaces];
    case::exclusive("frames_of_tcpreplay_come_out_of_tap_and_file", &needs, |lab| {
        let device = |hint: &str| format!("yc{hint}{}", std::process::id() % 1_000_000);
        let devices = ["a", "b", "c"].map(device);
        let (file, out) = (talk()?, lab.path("out.pcapng"));
        let input = packets(&file)?;
        let pinned = pinned(&input);
        let config = format!(
            "[switch.one]\ntype = \"private\"\n\
             [switch.one.port.in]\nmtu = 9000\ntap = {{ name = {:?} }}\n\
             [switch.one.port.out]\nmtu = 9000\ncoalesce = false\ntap = {{ name = {:?} }}\n{pinned}\
             [switch.two]\ntype = \"private\"\n\
             [switch.two.port.in]\nmtu = 9000\ntap = {{ name = {:?} }}\n\
             [switch.two.port.out]\nmtu = 9000\npcap = {{ write = {out:?} }}\n{pinned}",
            devices[0], devices[1], devices[2]
        );
        let yardd = Yardd::start(lab, &programs()?, &[1], &config)?;
        let mut stations = Vec::new();
        for device in &devices {
            let station = Netns::new(lab, "replay")?.without_ipv6()?;
            station.take(device)?;
            station.ip(&format!("link set {device} mtu 9000 up"))?;
            stations.push(station);
        }
        // What the kernel sends of its own accord while devices come up may find the switch not ready.
        let drops = |yardd: &Yardd| -> Result<Vec<serde_json::Value>> {
            let ports = ["one", "two"].map(|switch| ["in", "out"].map(|port| (switch, port)));
            let sides = ports.as_flattened().iter().flat_map(|at| [(at, "received"), (at, "sent")]);
            sides.map(|(&(switch, port), direction)| yardd.drops(switch, port, direction)).collect()
        };
        for (switch, port) in [("one", "in"), ("one", "out"), ("two", "in")] {
            yardd.wait_for_port(switch, port, "up")?;
        }
        let before = drops(&yardd)?;
        let count = u64::try_from(input.len())?;
        let seen = lab.path("seen.pcap");
        let recording = record(&stations[1], &devices[1], &seen)?;
        ensure!(
            replay(&stations[0], &devices[0], &file, Pace::PacketsPerSecond(500))? == count,
            "tcpreplay failed"
        );
        recording.finish(&seen, count, LIMIT)?;
        expect_same(&input, &replayed(&seen, &input)?).context("from TAP to TAP")?;

        ensure!(replay(&stations[2], &devices[2], &file, Pace::Top)? == count, "tcpreplay failed");
        wait_for("all frames in the file", LIMIT, || {
            Ok(replayed(&out, &input).is_ok_and(|found| found.len() >= input.len()))
        })?;
        expect_same(&input, &replayed(&out, &input)?).context("from TAP to file")?;
        let after = drops(&yardd)?;
        ensure!(before == after, "frames were dropped: {before:?}, {after:?}");
        Ok(())
    })
}

#[test]
fn broken_file_stops_its_port_only() -> Result<()> {
    case::exclusive("broken_file_stops_its_port_only", &[], |lab| {
        let yardd = Yardd::start(lab, &programs()?, &[1], &private_switch(lab, &["left", "right"], 1))?;
        let party = |name: &str, number| Party::connect(&lab.path(name), number, PlayerSpec::new());
        let mut witness = Witness::start([party("left", 1)?, party("right", 2)?]);
        witness.see(200)?;

        let frames: Vec<Vec<u8>> = (0..20u8).map(|number| vec![number & 0xfe; 60]).collect();
        let file = lab.path("broken.pcap");
        let shown = file.display().to_string();
        packets::write(&file, &packets::of_frames(&frames))?;
        let good = std::fs::read(&file)?;

        // Another link type is refused at once, as is what is no capture; nothing is added.
        let mut wrong = good.clone();
        wrong[20] = 101;
        for (bytes, word) in
            [(wrong.as_slice(), "101"), (b"no capture at all, but long enough".as_slice(), "")]
        {
            std::fs::write(&file, bytes)?;
            let add = ["port", "add", "lab/play", "--pcap-read", &shown, "--full-speed"];
            let refused = yardd.yard(&add).err().context("a file that is no Ethernet capture was taken")?;
            let refused = refused.to_string();
            ensure!(refused.contains("broken.pcap") && refused.contains(word), "{refused}");
            ensure!(yardd.port("lab", "play").is_err(), "the port is there all the same");
        }

        // Broken at a byte in the middle: the frames before come through, then the port says where.
        let record = 16 + 60;
        for (broken, offset) in [
            (good[..24 + 10 * record + 30].to_vec(), 24 + 10 * record),
            (
                [&good[..24 + 5 * record + 8], &[0xff; 8], &good[24 + 5 * record + 16..]].concat(),
                24 + 5 * record,
            ),
        ] {
            std::fs::write(&file, broken)?;
            yardd.yard(&["port", "add", "lab/play", "--pcap-read", &shown, "--full-speed"])?;
            yardd.wait_for_port("lab", "play", "faulted")?;
            let port = yardd.port("lab", "play")?;
            let reason = port["reason"].as_str().context("no reason")?;
            ensure!(reason.contains(&shown), "no path in {reason:?}");
            let named: Vec<usize> =
                reason.split(|c: char| !c.is_ascii_digit()).filter_map(|word| word.parse().ok()).collect();
            ensure!(
                named.iter().any(|place| (offset..offset + record).contains(place)),
                "no offset from {offset} on in {reason:?}"
            );
            let before = u64::try_from((offset - 24) / record)?;
            let received = &port["received"];
            let dropped: u64 = received["drops"]
                .as_object()
                .map_or(0, |drops| drops.values().filter_map(serde_json::Value::as_u64).sum());
            let all = received["frames"].as_u64().unwrap_or(0);
            ensure!(all == before || all + dropped == before, "{before} frames before the break: {received}");
            witness.see(100)?;
            // A good file, and the port plays again.
            std::fs::write(&file, &good)?;
            yardd.yard(&["port", "restart", "lab/play"])?;
            yardd.wait_for_port("lab", "play", "finished")?;
            yardd.yard(&["port", "del", "lab/play"])?;
        }
        witness.finish().map(drop)
    })
}
