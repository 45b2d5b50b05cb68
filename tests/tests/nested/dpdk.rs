//! The emulated adapter under DPDK's own driver for it (`net_e1000_em`), in a Debian guest.

use std::time::Duration;

use anyhow::{Result, ensure};
use switchyard_tests::lab::wait_for;
use switchyard_tests::nested::dpdk::{self, Testpmd};
use switchyard_tests::nested::scene::BOOT;
use switchyard_tests::nested::{Guest, Host, Namespace, VmNic, VmSpec, Yardd, scene};
use switchyard_tests::ping::{Ping, ping};
use switchyard_tests::station::Station;
use switchyard_tests::transfer::transfer;

const LIMIT: Duration = Duration::from_secs(60);
const MAC: &str = "02:00:00:00:01:0c";
const GUEST: &str = "10.1.0.1";
const NEAR: (&str, &str) = ("10.1.0.2", "02:00:00:00:02:0c");
const FAR: (&str, &str) = ("10.1.0.3", "02:00:00:00:02:0d");
/// Buffers of 1 KiB, so that long frames take several descriptors both ways.
const OPTIONS: &str = "--forward-mode=icmpecho --total-num-mbufs=2048 --rxd=256 --txd=256 --mbuf-size=1152 \
                       --max-pkt-len=9018 --enable-scatter --enable-rx-cksum";
/// Pings: bytes of payload, how many, and how many at a time, for which there are descriptors. The rings go round.
const PINGS: [(u32, u32, u32); 3] = [(18, 200, 32), (1000, 50, 16), (8972, 60, 8)];
/// Bytes of a transfer.
const BYTES: u32 = 1_000_000;

/// The two ends take no offloads: the kernel there looks at every checksum.
fn config() -> String {
    let nic = VmNic { legacy: true, mtu: 9000, ..VmNic::new("eth0", "lab", MAC) };
    let vm = VmSpec {
        initrd: Some(dpdk::INITRD.to_owned()),
        memory_mb: 384,
        kernel_arguments: "hugepages=24".to_owned(),
        ..VmSpec::new("a").with(nic.at(&format!("{GUEST}/24")))
    };
    let port = |name| {
        format!("[switch.lab.port.{name}]\ntap = {{ name = {name:?} }}\nmtu = 9000\noffloads = false\n")
    };
    format!("[switch.lab]\ntype = \"private\"\n{}{}{}", port("near"), port("far"), vm.config())
}

/// An end which sends to the other by way of `via`, and nothing that the test does not send.
fn end(host: &Host, name: &str, own: (&str, &str), other: &str, via: &str) -> Result<Namespace> {
    let end = Namespace::new(host, name)?;
    end.check("sysctl -q net.ipv6.conf.default.disable_ipv6=1", LIMIT)?;
    host.check(&format!("ip link set {name} mtu 9000 address {}", own.1), LIMIT)?;
    end.plug(name, &format!("{}/24", own.0))?;
    end.check(&format!("ip neigh add {other} lladdr {via} dev {name} nud permanent"), LIMIT)?;
    Ok(end)
}

#[test]
fn dpdk_drives_the_emulated_adapter() -> Result<()> {
    scene("dpdk_drives_the_emulated_adapter", &config(), |host, yardd, steps| {
        dpdk::put(host)?;
        // What the near end sends to the far one goes to the guest, which hands it on; what comes back does not.
        let near = end(host, "near", NEAR, FAR.0, MAC)?;
        let far = end(host, "far", FAR, NEAR.0, NEAR.1)?;
        let mut guest = yardd.start_vm("a")?;
        println!("guest: {:.1} s", guest.wait_ready(BOOT)?.as_secs_f64());
        steps.step("the guest's kernel drives it", || reaches(&near));
        dpdk::borrow_adapters(&guest)?;
        let testpmd = Testpmd::start(&guest, OPTIONS)?;
        steps.step("DPDK drives it", || is_known(&testpmd));
        steps.step("pings of one to nine descriptors come back", || echoes(&testpmd, &near));
        steps.step("TCP goes through the guest, its checksums by the adapter", || {
            forwards(&testpmd, &near, &far)
        });
        steps.step("an interrupt tells of the link", || tells_of_the_link(&testpmd, &yardd));
        steps.step("the guest's kernel takes it back", || {
            testpmd.quit()?;
            dpdk::return_adapters(&guest)?;
            let up = format!("ip addr replace {GUEST}/24 dev eth0 && ip link set eth0 up");
            guest.check(&up, LIMIT)?;
            reaches(&near)
        });
        steps.step("no fault was reported", || unharmed(&yardd, &guest));
        Ok(())
    })
}

/// Waits until the guest answers: its card may be about to come up.
fn reaches(near: &Namespace) -> Result<()> {
    wait_for("an answer of the guest", LIMIT, || {
        Ok(ping(near, GUEST, Ping { count: 1, ..Ping::default() })?.received == 1)
    })
}

fn is_known(testpmd: &Testpmd<'_>) -> Result<()> {
    let info = testpmd.command("show port info 0")?;
    let address = format!("MAC address: {}", MAC.to_uppercase());
    for line in [
        "Driver name: net_e1000_em",
        &address,
        "Link status: up",
        "Link speed: 1 Gbps",
        "Link duplex: full-duplex",
        "MTU: 9000",
    ] {
        ensure!(info.contains(line), "not {line:?}: {info}");
    }
    Ok(())
}

/// Every ping is answered with what it held, and counted.
fn echoes(testpmd: &Testpmd<'_>, near: &Namespace) -> Result<()> {
    testpmd.command("start")?;
    for (size, count, ahead) in PINGS {
        let line = format!("ping -n -q -A -l {ahead} -c {count} -s {size} -M do -W 10 {GUEST}");
        let shown = near.run(&line, LIMIT)?.stdout;
        let all = shown.contains(&format!("{count} received, 0% packet loss"));
        ensure!(all && !shown.contains("error"), "{shown}");
    }
    testpmd.command("stop")?;
    let stats = testpmd.stats()?;
    let pings: u32 = PINGS.iter().map(|(_, count, _)| count).sum();
    ensure!(stats.rx_packets >= pings.into() && stats.rx_missed == 0, "{stats:?}");
    ensure!((stats.rx_packets, stats.rx_bytes) == (stats.tx_packets, stats.tx_bytes), "{stats:?}");
    Ok(())
}

/// Hands TCP on from one end to the other, with checksums that the adapter fills in.
fn forwards(testpmd: &Testpmd<'_>, near: &Namespace, far: &Namespace) -> Result<()> {
    testpmd.command("port stop 0")?;
    for protocol in ["ip", "tcp"] {
        let answer = testpmd.command(&format!("csum set {protocol} hw 0"))?;
        let by_adapter = format!("{} checksum offload is hw", protocol.to_uppercase());
        ensure!(answer.contains(&by_adapter) && !answer.contains("Warning"), "{answer}");
    }
    for line in [&format!("set eth-peer 0 {}", FAR.1), "set fwd csum", "port start 0", "start"] {
        testpmd.command(line)?;
    }
    transfer(near, far, FAR.0, BYTES)?;
    let summary = testpmd.command("stop")?;
    ensure!(summary.contains("Bad-ipcsum: 0 ") && summary.contains("Bad-l4csum: 0 "), "{summary}");
    Ok(())
}

/// DPDK looks at the link only when the adapter interrupts.
fn tells_of_the_link(testpmd: &Testpmd<'_>, yardd: &Yardd) -> Result<()> {
    for link in ["down", "up"] {
        yardd.yard(&format!("vm nic set a eth0 --link {link}"))?;
        wait_for(&format!("link {link}"), LIMIT, || {
            Ok(testpmd.command("show port info 0")?.contains(&format!("Link status: {link}")))
        })?;
    }
    Ok(())
}

fn unharmed(yardd: &Yardd, guest: &Guest) -> Result<()> {
    let shown = yardd.vm("a")?;
    ensure!(shown["faults"].as_array().is_some_and(Vec::is_empty), "{shown:#}");
    let port = yardd.port("lab", "a.eth0")?;
    ensure!(port["state"] == "up", "{port:#}");
    let bad = "dmesg | grep -A 20 -E 'BUG:|Oops|NETDEV WATCHDOG|WARNING:.* (drivers|net)/' | head -n 40";
    let found = guest.check(bad, LIMIT)?;
    ensure!(found.is_empty(), "the guest complains: {found}");
    Ok(())
}
