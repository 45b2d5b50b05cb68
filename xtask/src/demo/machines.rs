//! VMs: two Debian guests under our hypervisor, joined by synthetic network cards on a private switch, and one of them with an
//! emulated card beside it.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use switchyard_tests::iperf::{Load, iperf};
use switchyard_tests::nested::guest::{Address, command_line};
use switchyard_tests::nested::image::Boot;
use switchyard_tests::ping::{Ping, ping};
use switchyard_tests::process::{command, output};
use switchyard_tests::setup;
use switchyard_tests::station::Station;
use switchyard_tests::transfer::transfer;

use super::Scene;
use super::venue::{Guest, Venue, has_virtualization};

const LIMIT: Duration = Duration::from_secs(30);
/// Of an iperf3 run.
const SECONDS: u32 = 1;

/// Red's cards: synthetic on the switch `lab`, emulated on `old`.
const RED: [&str; 2] = ["02:00:00:00:00:01", "02:00:00:00:01:01"];
/// Blue's: synthetic on `lab`; and one that is plugged in while it runs, synthetic on `old`.
const BLUE: [&str; 2] = ["02:00:00:00:00:02", "02:00:00:00:01:02"];
/// Of each on both switches.
const RED_AT: [&str; 2] = ["10.10.0.1", "10.10.1.1"];
const BLUE_AT: [&str; 2] = ["10.10.0.2", "10.10.1.2"];

/// Two guests that run.
struct Stage {
    red: Guest,
    blue: Guest,
    // Ends them.
    venue: Venue,
}

/// Boots the guests and shows traffic between them.
pub fn run(scene: &Scene) -> Result<()> {
    println!("\n== Two Debian guests under our hypervisor, synthetic network cards on a private switch ==\n");
    if scene.guest.is_none() {
        setup::ensure(&[setup::NESTED, setup::CAPTURES].concat())?;
    }
    play(scene).or_else(|error| {
        if has_virtualization() {
            return Err(error);
        }
        println!("{error:#}\n");
        scene.say("that failed; it may be that the software CPU has lost a guest, as happens now and then: once more");
        play(scene)
    })
}

fn play(scene: &Scene) -> Result<()> {
    let stage = set_up(scene)?;
    let shown = show(&stage, scene);
    shown.with_context(|| format!("{}\n{}", stage.venue.state("red"), stage.venue.state("blue")))
}

fn config(red_boots: &Boot, blue_boots: &Boot) -> String {
    let line = |addresses: &[(&str, &str)]| {
        let addresses: Vec<_> =
            addresses.iter().map(|(mac, at)| Address::new(mac, &format!("{at}/24"))).collect();
        command_line(&addresses, "")
    };
    let red = line(&[(RED[0], RED_AT[0]), (RED[1], RED_AT[1])]);
    let blue = line(&[(BLUE[0], BLUE_AT[0])]);
    format!(
        r#"
[switch.lab]
type = "private"
[switch.old]
type = "private"
[vm.red]
memory = "256M"
kernel = {:?}
initrd = {:?}
cmdline = {red:?}
[[vm.red.nic]]
name = "eth0"
switch = "lab"
mac = "{red0}"
[[vm.red.nic]]
name = "eth1"
switch = "old"
type = "legacy"
mac = "{red1}"
[vm.blue]
memory = "256M"
kernel = {:?}
initrd = {:?}
cmdline = {blue:?}
[[vm.blue.nic]]
name = "eth0"
switch = "lab"
mac = "{blue0}"
"#,
        red_boots.kernel,
        red_boots.initrd,
        blue_boots.kernel,
        blue_boots.initrd,
        red0 = RED[0],
        red1 = RED[1],
        blue0 = BLUE[0],
    )
}

fn set_up(scene: &Scene) -> Result<Stage> {
    let venue = Venue::open(scene, config)?;
    scene.say("yardd runs with two private switches, lab and old; it starts the VMs red and blue, a yard-worker each");
    // One after the other: the software CPU does not bear two guests that boot at once.
    let up = |name: &str| {
        let mut guest = venue.start(name)?;
        let took = guest.wait_ready().with_context(|| venue.state(name))?;
        let system =
            guest.check("uname -sr; dmesg | grep -o 'Hypervisor detected.*\\|Vmbus version.*'", LIMIT)?;
        let system = system.lines().collect::<Vec<_>>().join("; ");
        scene.say(format_args!("{} is up after {:.1} s: {system}", guest.name(), took.as_secs_f32()));
        Ok::<_, anyhow::Error>(guest)
    };
    let (red, blue) = (up("red")?, up("blue")?);
    for (guest, addresses) in [(&red, &RED_AT[..]), (&blue, &BLUE_AT[..1])] {
        for address in addresses {
            let line = format!("until ip -o addr show | grep -q ' {address}/'; do sleep 0.1; done");
            let output = guest.run(&line, LIMIT)?;
            let state = || venue.state(guest.name());
            ensure!(output.status == 0, "{} has no card for {address}\n{}", guest.name(), state());
        }
        cards(guest)?;
    }
    Ok(Stage { red, blue, venue })
}

/// Prints a guest's cards with their drivers and addresses.
fn cards(guest: &Guest) -> Result<()> {
    let line = "cd /sys/class/net; for card in */device; do card=${card%/device}; \
                driver=$(readlink $card/device/driver); \
                echo $card ${driver##*/} $(ip -o -4 addr show dev $card | awk '{ print $4 }'); done";
    for card in guest.check(line, LIMIT)?.lines() {
        println!("          {} {card}", guest.name());
    }
    Ok(())
}

fn show(stage: &Stage, scene: &Scene) -> Result<()> {
    let Stage { red, blue, venue } = stage;
    scene.say("capturing what passes red's port (yard capture lab/red.eth0), while they ping each other and copy a file");
    let capture = venue.capture("lab/red.eth0")?;
    pings(red, blue, BLUE_AT[0])?;
    pings(blue, red, RED_AT[0])?;
    transfer(red, blue, BLUE_AT[0], 500_000).context("the copy of a file")?;
    let file = scene.output.join("machines.pcapng");
    std::fs::write(&file, capture.finish()?)?;
    scene.say("the file has arrived whole; tshark reads the capture:");
    tshark(&file)?;

    let tcp = iperf(blue, red, BLUE_AT[0], Load::Tcp { streams: 1 }, SECONDS)?;
    let udp = Load::Udp { payload: 512, bits_per_second: 4_000_000 };
    let udp = iperf(blue, red, BLUE_AT[0], udp, 1)?;
    scene.say(format_args!(
        "red -> blue: TCP {:.0} Mbit/s, UDP {:.0} packets/s with {} lost",
        tcp.bits_per_second / 1e6,
        udp.packets_per_second,
        udp.lost_packets
    ));

    plug_in(stage, scene)?;
    compare(red, blue, scene)?;
    scene.say("yard vm list, and yard show:");
    println!("{}\n{}", venue.yard("vm list")?, venue.yard("show")?);
    Ok(())
}

fn pings(from: &Guest, to: &Guest, address: &str) -> Result<()> {
    let report = ping(from, address, Ping { count: 3, interval: 0.1, ..Ping::default() })?;
    ensure!(report.received > 0, "{} does not reach {} at {address}", from.name(), to.name());
    println!("          {} -> {} {address}: {:.3} ms", from.name(), to.name(), report.milliseconds[1]);
    Ok(())
}

fn tshark(file: &Path) -> Result<()> {
    let shown = output(command("tshark").arg("-r").arg(file).args(["-q", "-z", "io,phs"]))?;
    for line in shown.lines().filter(|line| line.contains("frames:")) {
        println!("          {line}");
    }
    Ok(())
}

/// Hot add: a second card for blue, on the switch where red's emulated card is.
fn plug_in(stage: &Stage, scene: &Scene) -> Result<()> {
    let words = format!("vm nic add blue eth1 --switch old --mac {}", BLUE[1]);
    scene.say(format_args!("blue gets another card while it runs: yard {words}"));
    let start = Instant::now();
    stage.venue.yard(&words)?;
    let line = format!(
        "until file=$(grep -l {} /sys/class/net/*/address); do sleep 0.05; done; card=${{file%/address}}; \
         ip addr add {}/24 dev ${{card##*/}} && ip link set ${{card##*/}} up",
        BLUE[1], BLUE_AT[1]
    );
    stage.blue.check(&line, LIMIT).context("no card appeared in blue")?;
    scene.say(format_args!("it has it after {:.1} s", start.elapsed().as_secs_f32()));
    cards(&stage.blue)?;
    stage.red.check(&format!("until ping -c 1 -W 1 {}; do :; done", BLUE_AT[1]), LIMIT)?;
    pings(&stage.red, &stage.blue, BLUE_AT[1])
}

/// Red's two cards beside each other: both meet a synthetic card of blue.
fn compare(red: &Guest, blue: &Guest, scene: &Scene) -> Result<()> {
    scene.say(format_args!("red's synthetic card beside its emulated one, iperf3, {SECONDS} s each:"));
    let tcp = Load::Tcp { streams: 1 };
    let mut rates = [[0.0; 2]; 2];
    for (card, rates) in rates.iter_mut().enumerate() {
        rates[0] = iperf(blue, red, BLUE_AT[card], tcp, SECONDS)?.bits_per_second / 1e6;
        rates[1] = iperf(red, blue, RED_AT[card], tcp, SECONDS)?.bits_per_second / 1e6;
    }
    let [synthetic, emulated] = rates;
    println!("          {:22} {:>16} {:>16} {:>8}", "TCP, Mbit/s", "hv_netvsc", "e1000", "ratio");
    for (what, way) in [("red transmits", 0), ("red receives", 1)] {
        let (fast, slow): (f64, f64) = (synthetic[way], emulated[way]);
        println!("          {what:22} {fast:16.0} {slow:16.0} {:8.1}", fast / slow);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_guest_has_both_kinds_of_card() {
        let boot = Boot { kernel: "/k".into(), initrd: "/i".into() };
        let config = config(&boot, &boot);
        assert_eq!(config.matches("type = \"legacy\"").count(), 1);
        assert!(
            config.contains("nic=02:00:00:00:00:01,10.10.0.1/24 nic=02:00:00:00:01:01,10.10.1.1/24"),
            "{config}"
        );
    }
}
