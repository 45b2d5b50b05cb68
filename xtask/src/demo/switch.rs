//! The switch: QEMU guests over vhost-user, namespaces over TAP and a replayed capture, all on one.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use switchyard_tests::guest::{Guest, GuestSpec};
use switchyard_tests::iperf::{Load, iperf};
use switchyard_tests::lab::Lab;
use switchyard_tests::netns::Netns;
use switchyard_tests::nic::{Nic, Role};
use switchyard_tests::ping::{Ping, ping};
use switchyard_tests::setup::{self, Need};
use switchyard_tests::station::Station;
use switchyard_tests::yardd::Yardd;

use super::Scene;
use crate::build;

/// The configuration, and what it has replayed: two programs that talk (HTTP, ping, UDP), recorded between two namespaces,
/// one file a side. Played through two ports they talk again, through the switch.
const EXAMPLE: &str = "examples/demo.toml";
const REPLAYED: [&str; 2] = ["talk-client.pcapng", "talk-server.pcapng"];
/// What the example has written.
const WRITTEN: &str = "switch.pcapng";

/// Everything that takes part. Dropping it ends it all.
struct Stage {
    yardd: Yardd,
    stations: Vec<(Box<dyn Station>, &'static str)>,
}

/// Why this machine cannot show it, if it cannot.
pub fn lacks() -> Option<String> {
    setup::lacks(&[Need::Root, Need::Tap, Need::Namespaces])
}

/// Sets up what is needed, joins guests, namespaces and a capture to one switch, and shows traffic among them.
pub fn run(scene: &Scene) -> Result<()> {
    println!(
        "\n== One switch: QEMU guests over vhost-user, network namespaces over TAP, a capture replayed ==\n"
    );
    setup::ensure(&[setup::NETWORK, setup::GUESTS, setup::CAPTURES].concat())?;
    if let Some(reason) = lacks() {
        bail!("the switch cannot be shown here: {reason}");
    }
    let lab = Lab::shared()?;
    let stage = set_up(&lab, scene)?;
    talk(&stage, scene)?;
    show(&stage, scene)?;
    drop(stage);
    let capture = scene.output.join(WRITTEN);
    std::fs::copy(lab.path(WRITTEN), &capture).context("what the switch has written")?;
    look_at_capture(&capture, scene)
}

/// Lays the example's files out in the lab, where its relative paths belong; its text.
fn example(lab: &Lab) -> Result<String> {
    let path = build::root().join(EXAMPLE);
    for name in REPLAYED {
        std::fs::copy(path.with_file_name(name), lab.path(name)).with_context(|| name.to_owned())?;
    }
    std::fs::read_to_string(&path).with_context(|| path.display().to_string())
}

fn set_up(lab: &Lab, scene: &Scene) -> Result<Stage> {
    scene.say(format!("starting yardd with {EXAMPLE}: two guests, two namespaces, a capture replayed"));
    let cpu = setup::processors() - 1;
    let yardd = Yardd::start(lab, &scene.programs, &[cpu], &example(lab)?)?;
    scene.say("booting two Debian guests under QEMU (software CPU), virtio-net over vhost-user");
    let boot = |name: &str, mac: &str| {
        let nic = Nic::vhost_user(lab.path(&format!("{name}.sock")), Role::Client, mac);
        Guest::boot(lab, &GuestSpec::new(name).with(nic))
    };
    let mut red = boot("red", "02:00:00:00:00:01")?;
    let mut blue = boot("blue", "02:00:00:00:00:02")?;
    scene.say("two network namespaces get a TAP each");
    let left = Netns::new(lab, "left")?;
    left.plug("yard-left", "10.9.0.3/24", None)?;
    let right = Netns::new(lab, "right")?;
    right.plug("yard-right", "10.9.0.4/24", None)?;
    for (guest, address) in [(&mut red, "10.9.0.1"), (&mut blue, "10.9.0.2")] {
        let took = guest.wait_ready(Duration::from_secs(120))?;
        guest.configure("eth0", &format!("{address}/24"))?;
        scene.say(format!("guest {} is up after {:.1} s: {address}", guest.name(), took.as_secs_f32()));
    }
    let stations: Vec<(Box<dyn Station>, _)> = vec![
        (Box::new(red), "10.9.0.1"),
        (Box::new(blue), "10.9.0.2"),
        (Box::new(left), "10.9.0.3"),
        (Box::new(right), "10.9.0.4"),
    ];
    Ok(Stage { yardd, stations })
}

/// Names of the stations, in the order of [`Stage::stations`].
const NAMES: [&str; 4] = ["guest red", "guest blue", "namespace left", "namespace right"];

fn talk(stage: &Stage, scene: &Scene) -> Result<()> {
    scene.say("everyone pings everyone");
    for (from, (station, _)) in stage.stations.iter().enumerate() {
        for (to, (_, address)) in stage.stations.iter().enumerate().filter(|(to, _)| *to != from) {
            let report =
                ping(station.as_ref(), address, Ping { count: 2, interval: 0.05, ..Ping::default() })?;
            ensure!(report.received > 0, "{} does not reach {}", NAMES[from], NAMES[to]);
            println!("    {:15} -> {:15} {:7.3} ms", NAMES[from], NAMES[to], report.milliseconds[1]);
        }
    }
    for (from, to) in [(0, 1), (2, 3), (2, 0)] {
        let (client, server) = (stage.stations[from].0.as_ref(), stage.stations[to].0.as_ref());
        let address = stage.stations[to].1;
        let tcp = iperf(server, client, address, Load::Tcp { streams: 1 }, 1)?;
        let load = Load::Udp { payload: 512, bits_per_second: 8_000_000 };
        let udp = iperf(server, client, address, load, 1)?;
        scene.say(format!(
            "{} -> {}: TCP {:.0} Mbit/s, UDP {:.0} packets/s with {} lost",
            NAMES[from],
            NAMES[to],
            tcp.bits_per_second / 1e6,
            udp.packets_per_second,
            udp.lost_packets
        ));
    }
    Ok(())
}

/// The live table while traffic runs, then the whole topology.
fn show(stage: &Stage, scene: &Scene) -> Result<()> {
    scene.say("ports and queues, live, while left sends to right:");
    let (left, right) = (stage.stations[2].0.as_ref(), stage.stations[3].0.as_ref());
    let _server = right.spawn("iperf3 -s -1 --forceflush")?;
    let _client = left.spawn("sleep 0.3; iperf3 -c 10.9.0.4 -t 4")?;
    let status = stage.yardd.yard_command(&["top", "--count", "4"]).status().context("yard top")?;
    ensure!(status.success(), "yard top failed");
    scene.say("yard show:");
    println!("{}", stage.yardd.yard(&["show"])?);
    Ok(())
}

fn look_at_capture(capture: &Path, scene: &Scene) -> Result<()> {
    scene.say(format!("what left through the client's replay port, read by tshark: {}", capture.display()));
    let mut tshark = switchyard_tests::process::command("tshark");
    tshark.arg("-r").arg(capture).args(["-q", "-z", "io,phs"]);
    println!("{}", switchyard_tests::process::output(&mut tshark)?);
    Ok(())
}
