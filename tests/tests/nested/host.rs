//! The nested host: guests with Debian's own kernel, under KVM, on any machine.

use std::time::Duration;

use anyhow::{Result, ensure};
use switchyard_tests::iperf::{Load, iperf};
use switchyard_tests::nested::peer::Card;
use switchyard_tests::nested::stream::BEYOND_BUFFERS;
use switchyard_tests::nested::{Namespace, Peer, PeerSpec, Stream, Yardd, nested};
use switchyard_tests::ping::{Ping, ping};
use switchyard_tests::station::Station;
use switchyard_tests::transfer::transfer;

const BOOT: Duration = Duration::from_secs(120);
const LIMIT: Duration = Duration::from_secs(30);

#[test]
fn nested_host_runs_commands_side_by_side_and_copies_files() -> Result<()> {
    nested("nested_host_runs_commands_side_by_side_and_copies_files", |_, host| {
        let mut slow = host.spawn("echo first; sleep 60")?;
        let output = host.run("echo out; echo err >&2; exit 3", LIMIT)?;
        ensure!((output.status, output.stdout.as_str()) == (3, "out\nerr\n"), "{output:?}");
        ensure!(host.run("sleep 60", Duration::from_secs(1))?.status == 137, "not killed at its limit");
        ensure!(slow.output()? == "first\n", "{:?}", slow.output()?);
        slow.kill()?;
        ensure!(
            host.run("sleep 77 & echo x", LIMIT)?.stdout == "x\n",
            "held up by what stays in the background"
        );

        let content: Vec<u8> = (0..3_000_000u32).flat_map(u32::to_le_bytes).collect();
        host.put("/tmp/there/file", &content)?;
        ensure!(host.get("/tmp/there/file")? == content, "another content came back");
        ensure!(host.get("/tmp/nothing").is_err(), "a file that is not there was read");
        Ok(())
    })
}

#[test]
fn debian_guest_finds_hyperv_under_kvm_in_the_nested_host() -> Result<()> {
    nested("debian_guest_finds_hyperv_under_kvm_in_the_nested_host", |_, host| {
        let spec = PeerSpec { hyperv: true, ..PeerSpec::new("alpha") }.with(Card::VirtioVhost, 1);
        let mut peer = Peer::boot(host, &spec)?;
        println!("guest: {:.1} s", peer.wait_ready(BOOT)?.as_secs_f64());
        // The whole log would take seconds over a serial line.
        for line in ["Hypervisor detected: Microsoft Hyper-V", "hv_vmbus: Vmbus version:"] {
            peer.guest().check(&format!("dmesg | grep '{line}'"), LIMIT)?;
        }
        let report = ping(host, peer.guest_address()?, Ping::default())?;
        ensure!(report.received > 0, "{report:?}");
        let tcp = Load::Tcp { streams: 1 };
        let there = iperf(host, peer.guest(), peer.host_address()?, tcp, 1)?;
        let back = iperf(peer.guest(), host, peer.guest_address()?, tcp, 1)?;
        ensure!(there.bits_per_second > 0.0 && back.bits_per_second > 0.0, "{there:?} {back:?}");
        let mut stream = Stream::start(peer.guest(), host, peer.host_address()?)?;
        stream.wait_for(BEYOND_BUFFERS, BOOT)?;
        ensure!(stream.finish()? > 1 << 19, "little was sent");
        Ok(())
    })
}

#[test]
fn daemon_runs_in_the_nested_host() -> Result<()> {
    nested("daemon_runs_in_the_nested_host", |_, host| {
        let config = "[switch.lab]\ntype = \"private\"\n[switch.lab.port.left]\ntap = { name = \"left\" }\n\
                      [switch.lab.port.right]\ntap = { name = \"right\" }\n";
        let yardd = Yardd::start(host, &[1], config)?;
        let left = Namespace::new(host, "left")?;
        left.plug("left", "10.1.0.1/24")?;
        host.check("ip addr add 10.1.0.2/24 dev right && ip link set right up", LIMIT)?;
        yardd.wait_for_port("lab", "left", "up")?;
        left.check("ping -c 1 -W 5 10.1.0.2 > '/tmp/a file'; cat '/tmp/a file'", LIMIT)?;
        transfer(&left, host, "10.1.0.2", 1_000_000)?;
        yardd.crash()?;
        let yardd = Yardd::run(host)?;
        yardd.wait_for_port("lab", "right", "up")
    })
}
