//! Debian guests under QEMU: bytes compared over TCP both ways, with every offload off and on, jumbo frames and queues
//! changed while frames flow.

#![forbid(unsafe_code)]

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use switchyard_tests::case;
use switchyard_tests::guest::{Guest, GuestSpec};
use switchyard_tests::iperf::{Load, iperf};
use switchyard_tests::lab::Lab;
use switchyard_tests::netns::Netns;
use switchyard_tests::nic::{Nic, Role};
use switchyard_tests::offload;
use switchyard_tests::ping::{Ping, ping};
use switchyard_tests::setup::Need;
use switchyard_tests::station::Station;
use switchyard_tests::transfer::{Transfer, transfer};
use switchyard_tests::yardd::{Yardd, programs};

const NEEDS: &[Need] = &[Need::Root, Need::Tap, Need::Namespaces];
const LIMIT: Duration = Duration::from_secs(30);
const BOOT: Duration = Duration::from_secs(180);
const MANY: u32 = 4_000_000;
const FEW: u32 = 400_000;

const ALPHA: &str = "10.9.0.1";
const BETA: &str = "10.9.0.2";
const GAMMA: &str = "10.9.0.3";

/// Two guests and a namespace on one switch.
struct Scene {
    yardd: Yardd,
    alpha: Guest,
    beta: Guest,
    gamma: Netns,
    /// Gamma's device.
    tap: String,
}

impl Scene {
    /// Alpha's QEMU connects, beta's listens; beta may have packed rings.
    fn boot(lab: &Lab, packed: bool) -> Result<Self> {
        let tap = format!("yg{}", std::process::id() % 1_000_000);
        let port = |name: &str, mode: &str| {
            let path = lab.path(name);
            format!(
                "[switch.lab.port.{name}]\nvhost-user = {{ path = {path:?}, mode = {mode:?}, queues = 2 }}\nmtu = 9000\n"
            )
        };
        let config = format!(
            "[switch.lab]\ntype = \"private\"\n{}{}[switch.lab.port.gamma]\ntap = {{ name = {tap:?} }}\nmtu = 9000\n",
            port("alpha", "server"),
            port("beta", "client")
        );
        let yardd = Yardd::start(lab, &programs()?, &[1], &config)?;
        let spec = |name: &str, role, mac: &str, packed| {
            let mut nic = Nic::vhost_user(lab.path(name), role, mac);
            (nic.queues, nic.packed, nic.host_mtu) = (2, packed, Some(9000));
            let mut spec = GuestSpec::new(name).with(nic);
            spec.cpus = 2;
            spec
        };
        let mut alpha = Guest::boot(lab, &spec("alpha", Role::Client, "02:00:00:00:09:01", false))?;
        let mut beta = Guest::boot(lab, &spec("beta", Role::Server, "02:00:00:00:09:02", packed))?;
        let gamma = Netns::new(lab, "gamma")?;
        plug(&gamma, &tap)?;
        for (guest, address) in [(&mut alpha, ALPHA), (&mut beta, BETA)] {
            guest.wait_ready(BOOT)?;
            guest.configure("eth0", &format!("{address}/24"))?;
        }
        for port in ["alpha", "beta"] {
            yardd.wait_for_port("lab", port, "up")?;
        }
        Ok(Self { yardd, alpha, beta, gamma, tap })
    }
}

fn plug(gamma: &Netns, tap: &str) -> Result<()> {
    gamma.plug(tap, &format!("{GAMMA}/24"), Some(9000))
}

fn answered(from: &dyn Station, address: &str, what: Ping) -> Result<()> {
    // The first may be lost while neighbours are found.
    let _ = ping(from, address, Ping { count: 1, ..what })?;
    let report = ping(from, address, what)?;
    ensure!(report.received == report.sent && report.sent > 0, "{} to {address}: {report:?}", from.name());
    Ok(())
}

#[test]
fn guests_exchange_bytes_with_every_offload_off_and_on() -> Result<()> {
    case::exclusive("guests_exchange_bytes_with_every_offload_off_and_on", NEEDS, |lab| {
        let mut scene = Scene::boot(lab, true)?;
        let (alpha, beta, gamma) = (&scene.alpha, &scene.beta, &scene.gamma);
        let features =
            |port: &str| -> Result<String> { Ok(scene.yardd.port("lab", port)?["features"].to_string()) };
        ensure!(features("beta")?.to_lowercase().contains("packed"), "{}", features("beta")?);

        answered(alpha, BETA, Ping::default())?;
        answered(beta, GAMMA, Ping::default())?;
        let whole = Ping { size: 8972, whole: true, ..Ping::default() };
        for (from, to) in [(alpha, BETA), (beta, ALPHA), (alpha, GAMMA)] {
            answered(from, to, whole).context("9000 bytes, not fragmented")?;
        }
        transfer(alpha, beta, BETA, MANY)?;
        transfer(beta, alpha, ALPHA, MANY)?;
        transfer(alpha, gamma, GAMMA, MANY).context("guest to namespace")?;
        transfer(gamma, beta, BETA, MANY).context("namespace to guest")?;
        let udp = Load::Udp { payload: 1200, bits_per_second: 2_000_000 };
        for (server, client, address) in [(alpha, beta, ALPHA), (beta, alpha, BETA)] {
            let report = iperf(server, client, address, udp, 2)?;
            ensure!(
                report.sent_packets > 100 && report.lost_packets * 20 <= report.sent_packets,
                "{report:?}"
            );
        }

        for (guest, other, address) in [(alpha, beta, BETA), (beta, alpha, ALPHA)] {
            offload::each_off_and_on(guest, "eth0", || transfer(guest, other, address, FEW))?;
        }

        // Jumbo frames with everything, then the usual size at one end.
        alpha.check("ip link set eth0 mtu 1500", LIMIT)?;
        transfer(beta, alpha, ALPHA, MANY).context("MTU 1500 at the receiver")?;
        transfer(alpha, beta, BETA, MANY).context("MTU 1500 at the sender")?;
        alpha.check("ip link set eth0 mtu 9000", LIMIT)?;

        // Queues come and go while bytes flow.
        for queues in [1, 2, 1, 2] {
            let one = Transfer::start(alpha, beta, BETA, MANY)?;
            for guest in [alpha, beta] {
                guest.check(&format!("ethtool -L eth0 combined {queues}"), LIMIT)?;
            }
            one.finish().with_context(|| format!("ethtool -L eth0 combined {queues}"))?;
            answered(beta, ALPHA, Ping::default())?;
        }
        let queues = scene.yardd.port("lab", "alpha")?["queues"].clone();
        ensure!(queues[0]["enabled"] == true && queues[1]["enabled"] == true, "{queues}");
        for port in ["alpha", "beta", "gamma"] {
            let port = scene.yardd.port("lab", port)?;
            ensure!(port["state"] == "up" && port["last_error"].is_null(), "{port}");
        }
        scene.yardd.process().expect_running()
    })
}

#[test]
fn guests_carry_on_after_the_daemon_was_killed() -> Result<()> {
    case::exclusive("guests_carry_on_after_the_daemon_was_killed", NEEDS, |lab| {
        // QEMU forgets where a packed ring stood when its switch dies.
        let Scene { mut yardd, mut alpha, beta, gamma, tap } = Scene::boot(lab, false)?;
        answered(&alpha, BETA, Ping::default())?;
        for round in 0..3 {
            // Connections that are open across the crash, both ways.
            let there = Transfer::start(&alpha, &beta, BETA, 10 * MANY)?;
            let back = Transfer::start(&beta, &alpha, ALPHA, 10 * MANY)?;
            std::thread::sleep(Duration::from_millis(1000 + 300 * round));
            yardd = yardd.crash_and_restart()?;
            for port in ["alpha", "beta"] {
                yardd.wait_for_port("lab", port, "up").with_context(|| format!("round {round}"))?;
            }
            answered(&beta, ALPHA, Ping::default()).with_context(|| format!("round {round}"))?;
            there.finish().with_context(|| format!("there, round {round}"))?;
            back.finish().with_context(|| format!("back, round {round}"))?;
        }

        // And a guest that dies under load is waited for again, while its peer goes on.
        let lost = Transfer::start(&alpha, &beta, BETA, 10 * MANY)?;
        std::thread::sleep(Duration::from_millis(500));
        alpha.process().kill()?;
        yardd.wait_for_port("lab", "alpha", "waiting")?;
        drop(lost);
        ensure!(yardd.port("lab", "beta")?["state"] == "up", "the other guest's port stopped");
        // The daemon has made the device anew, outside of the namespace.
        plug(&gamma, &tap)?;
        transfer(&beta, &gamma, GAMMA, MANY)?;
        transfer(&gamma, &beta, BETA, MANY)?;
        yardd.process().expect_running()
    })
}
