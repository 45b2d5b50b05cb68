//! The synthetic adapter of an unmodified Debian guest under our hypervisor: `hv_netvsc` with everything it can do.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use switchyard_tests::iperf::{Load, iperf};
use switchyard_tests::lab::wait_for;
use switchyard_tests::nested::scene::BOOT;
use switchyard_tests::nested::stream::BEYOND_BUFFERS;
use switchyard_tests::nested::{Guest, Namespace, Stream, VmNic, VmSpec, Yardd, scene};
use switchyard_tests::offload::{GSO, HASH, LRO, RX, State, TSO, TX};
use switchyard_tests::ping::{Ping, ping};
use switchyard_tests::station::Station;
use switchyard_tests::transfer::Transfer;

const LIMIT: Duration = Duration::from_secs(120);
const MAC: &str = "02:00:00:00:01:0a";
const HOT_MAC: &str = "02:00:00:00:01:0b";
const GUEST: &str = "10.1.0.1";
const FAR: &str = "10.1.0.2";
const DRIVER: &str = "/sys/bus/vmbus/drivers/hv_netvsc";
const QUEUES: u16 = 2;
/// Bytes of a transfer: many times what a connection holds in flight.
const BYTES: u32 = 600_000;

/// A guest, and a namespace behind a TAP port of the same switch.
struct Pair<'a> {
    yardd: &'a Yardd,
    guest: &'a Guest,
    far: &'a Namespace,
}

fn config(vm: &VmSpec) -> String {
    format!(
        "[switch.lab]\ntype = \"private\"\n[switch.lab.port.far]\ntap = {{ name = \"far\" }}\nmtu = 9000\n{}",
        vm.config()
    )
}

#[test]
fn debian_guest_drives_every_part_of_its_synthetic_adapter() -> Result<()> {
    // The guest begins with the usual MTU on an adapter that allows more.
    let nic = VmNic { queues: QUEUES, mtu: 9000, ..VmNic::new("eth0", "lab", MAC) };
    let vm = VmSpec { vcpus: u32::from(QUEUES), ..VmSpec::new("a") }.with(nic);
    let vm = VmSpec { kernel_arguments: format!("nic={MAC},{GUEST}/24"), ..vm };
    let name = "debian_guest_drives_every_part_of_its_synthetic_adapter";
    scene(name, &config(&vm), |host, yardd, steps| {
        let far = Namespace::new(host, "far")?;
        far.plug("far", &format!("{FAR}/24"))?;
        let mut guest = yardd.start_vm("a")?;
        println!("guest: {:.1} s", guest.wait_ready(BOOT)?.as_secs_f64());
        let pair = Pair { yardd: &yardd, guest: &guest, far: &far };
        steps.step("the guest finds a Hyper-V machine", || pair.finds_hyperv());
        steps.step("ping and TCP both ways", || pair.talks());
        steps.step("ethtool -l: several queues", || pair.queues_are_used());
        steps.step("ethtool -k and -K", || pair.offloads_switch());
        steps.step("ethtool -L under load", || pair.channels_change_live());
        steps.step("ethtool -X", || pair.table_changes_live());
        steps.step("ethtool -S", || pair.statistics_are_sane());
        steps.step("MTU 9000", || pair.jumbo());
        steps.step("VLAN of the port", || pair.access_vlan());
        steps.step("802.1Q in the guest", || pair.tagged_vlan());
        steps.step("hot add and remove under load", || pair.hot_plug());
        steps.step("unbind and bind under load", || {
            let device = guest.check("basename $(readlink /sys/class/net/eth0/device)", LIMIT)?;
            let tell = |file: &str| format!("echo {} > {DRIVER}/{file}", device.trim());
            let load = Stream::start(&guest, &far, FAR)?;
            pair.driver_changes(&tell("unbind"), &tell("bind"), load)
        });
        steps.step("rmmod and insmod under load", || {
            let load = Stream::start(&far, &guest, GUEST)?;
            pair.driver_changes("rmmod hv_netvsc", "insmod /mod/hv_netvsc.ko", load)
        });
        steps.step("no fault was reported", || pair.unharmed());
        Ok(())
    })
}

#[test]
fn synthetic_and_emulated_adapter_work_side_by_side() -> Result<()> {
    const OLD: &str = "02:00:00:00:01:0c";
    let legacy = VmNic { legacy: true, ..VmNic::new("eth1", "lab", OLD) };
    let vm = VmSpec::new("a").with(VmNic::new("eth0", "lab", MAC).at(&format!("{GUEST}/24")));
    let vm = vm.with(legacy.at("10.1.1.1/24"));
    scene("synthetic_and_emulated_adapter_work_side_by_side", &config(&vm), |host, yardd, steps| {
        let far = Namespace::new(host, "far")?;
        far.plug("far", &format!("{FAR}/24"))?;
        far.check("ip addr add 10.1.1.2/24 dev far", LIMIT)?;
        let mut guest = yardd.start_vm("a")?;
        println!("guest: {:.1} s", guest.wait_ready(BOOT)?.as_secs_f64());
        let pair = Pair { yardd: &yardd, guest: &guest, far: &far };
        steps.step("both drivers are there", || {
            wait_for("both cards", LIMIT, || Ok(pair.card(MAC)?.is_some() && pair.card(OLD)?.is_some()))?;
            for (mac, driver) in [(MAC, "hv_netvsc"), (OLD, "e1000")] {
                let card = pair.card(mac)?.context("no card")?;
                let info = guest.check(&format!("ethtool -i {card}"), LIMIT)?;
                ensure!(info.contains(&format!("driver: {driver}\n")), "{info}");
            }
            Ok(())
        });
        steps.step("both reach the far end", || {
            pair.reaches(&far, GUEST)?;
            pair.reaches(&far, "10.1.1.1")
        });
        steps.step("TCP over both at once", || {
            let mut synthetic = Stream::start(&guest, &far, FAR)?;
            let mut emulated = Stream::start(&guest, &far, "10.1.1.2")?;
            emulated.wait_for(BEYOND_BUFFERS, LIMIT)?;
            synthetic.wait_for(BEYOND_BUFFERS, LIMIT)?;
            emulated.finish()?;
            synthetic.finish()?;
            Stream::start(&far, &guest, "10.1.1.1").and_then(|mut stream| {
                stream.wait_for(BEYOND_BUFFERS, LIMIT)?;
                stream.finish()
            })?;
            Ok(())
        });
        steps.step("no fault was reported", || pair.unharmed());
        Ok(())
    })
}

impl Pair<'_> {
    fn finds_hyperv(&self) -> Result<()> {
        for line in ["Hypervisor detected: Microsoft Hyper-V", "hv_vmbus: Vmbus version:5"] {
            self.guest.check(&format!("dmesg | grep '{line}'"), LIMIT)?;
        }
        let clock = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
        let clock = self.guest.check(&format!("cat {clock}"), LIMIT)?;
        ensure!(clock.trim() == "hyperv_clocksource_tsc_page", "clock source {clock}");
        let info = self.guest.check("ethtool -i eth0", LIMIT)?;
        ensure!(info.contains("driver: hv_netvsc"), "{info}");
        let shown = self.yardd.vm("a")?;
        ensure!(shown["vmbus"].as_str().is_some_and(|version| version.starts_with("5.")), "{shown:#}");
        Ok(())
    }

    /// The far end gets answers from `address`, within a limit: a card may be about to come up.
    fn reaches(&self, from: &dyn Station, address: &str) -> Result<()> {
        wait_for(&format!("{} to reach {address}", from.name()), LIMIT, || {
            Ok(ping(from, address, Ping { count: 1, ..Ping::default() })?.received == 1)
        })
    }

    fn talks(&self) -> Result<()> {
        self.reaches(self.far, GUEST)?;
        self.reaches(self.guest, FAR)?;
        self.transfers()
    }

    /// TCP both ways at once.
    fn transfers(&self) -> Result<()> {
        let there = Transfer::start(self.guest, self.far, FAR, BYTES)?;
        let back = Transfer::start(self.far, self.guest, GUEST, BYTES)?;
        there.finish().context("from the guest")?;
        back.finish().context("to the guest")
    }

    /// The guest's interface of that address.
    fn card(&self, mac: &str) -> Result<Option<String>> {
        let found = self.guest.run(&format!("grep -l {mac} /sys/class/net/*/address"), LIMIT)?;
        Ok(found.stdout.split('/').nth(4).map(str::to_owned))
    }

    /// Channels in use, by the guest and by us.
    fn channels(&self) -> Result<u64> {
        let count = self.guest.channels()?;
        self.yardd.wait_for_vm("a", &format!("{count} channels"), |vm| vm["nics"][0]["channels"] == count)?;
        Ok(count)
    }

    fn queues_are_used(&self) -> Result<()> {
        ensure!(self.channels()? == u64::from(QUEUES), "{} channels", self.channels()?);
        let before = self.statistics()?;
        iperf(self.guest, self.far, GUEST, Load::Tcp { streams: 8 }, 1)?;
        let after = self.statistics()?;
        let used = (0..QUEUES).filter(|queue| grown(&before, &after, &rx_packets(*queue)) > 0).count();
        ensure!(used > 1, "{used} queues were used of 8 connections: {before:?} {after:?}");
        Ok(())
    }

    fn statistics(&self) -> Result<BTreeMap<String, u64>> {
        let text = self.guest.check("ethtool -S eth0", LIMIT)?;
        let lines = text.lines().filter_map(|line| line.trim().split_once(": "));
        let read = |(name, value): (&str, &str)| Ok((name.to_owned(), value.trim().parse()?));
        lines.map(read).collect::<Result<_>>().with_context(|| text.clone())
    }

    /// Mean bytes of what the guest sends in frames (a large send counts as one), and of what it receives, under TCP.
    fn mean_frames(&self) -> Result<[u64; 2]> {
        let counters = || -> Result<[u64; 4]> {
            let port = self.yardd.port("lab", "a.eth0")?;
            let folder = "/sys/class/net/eth0/statistics";
            let line = format!("cat {folder}/rx_packets {folder}/rx_bytes");
            let received = self.guest.check(&line, LIMIT)?;
            let received: Vec<u64> = received.lines().filter_map(|line| line.parse().ok()).collect();
            let sent = |key: &str| port["received"][key].as_u64().unwrap_or_default();
            let received = |index: usize| received.get(index).copied().unwrap_or_default();
            Ok([sent("frames"), sent("bytes"), received(0), received(1)])
        };
        // One after the other: acknowledgements would bring the mean down.
        let before = counters()?;
        Transfer::start(self.guest, self.far, FAR, BYTES)?.finish().context("from the guest")?;
        let middle = counters()?;
        Transfer::start(self.far, self.guest, GUEST, BYTES)?.finish().context("to the guest")?;
        let after = counters()?;
        let sent = (middle[1] - before[1]) / (middle[0] - before[0]).max(1);
        let received = (after[3] - middle[3]) / (after[2] - middle[2]).max(1);
        Ok([sent, received])
    }

    fn offloads_switch(&self) -> Result<()> {
        let outcome = self.each_offload_off_and_on();
        self.guest.check("ethtool -K eth0 tx on rx on tso on gso on lro on rxhash on", LIMIT)?;
        outcome
    }

    fn each_offload_off_and_on(&self) -> Result<()> {
        /// Longest frame without offloads: 1500 bytes and a header.
        const FRAME: u64 = 1514;
        for offload in [TX, RX, TSO, GSO, HASH] {
            let state = offload.state(self.guest, "eth0")?;
            ensure!(state == State { on: true, fixed: false }, "{} is {state:?} at first", offload.shown);
        }
        for offload in [TX, RX, TSO, GSO, LRO, HASH] {
            // A large frame that a peer did not cut has no checksum of its own.
            LRO.set(self.guest, "eth0", offload != RX)?;
            for on in [false, true] {
                offload.set(self.guest, "eth0", on)?;
                let [sent, received] = match offload {
                    TSO | LRO => self.mean_frames(),
                    _ => self.transfers().map(|()| [0, 0]),
                }
                .with_context(|| format!("{} {on}", offload.shown))?;
                let (sends, takes) = (sent > FRAME, received > FRAME);
                ensure!(offload != TSO || sends == on, "TSO {on}: {sent} bytes a frame");
                ensure!(offload != LRO || takes == on, "LRO {on}: {received} bytes a frame");
            }
            // Without checksums there is no segmentation either.
            TSO.set(self.guest, "eth0", true)?;
        }
        Ok(())
    }

    fn channels_change_live(&self) -> Result<()> {
        let mut there = Stream::start(self.guest, self.far, FAR)?;
        let mut back = Stream::start(self.far, self.guest, GUEST)?;
        for count in [1, u64::from(QUEUES)] {
            self.guest.check(&format!("ethtool -L eth0 combined {count}"), LIMIT)?;
            wait_for(&format!("{count} channels"), LIMIT, || Ok(self.channels()? == count))?;
            there.wait_for(BEYOND_BUFFERS, LIMIT).context("from the guest")?;
            back.wait_for(BEYOND_BUFFERS, LIMIT).context("to the guest")?;
        }
        there.finish()?;
        back.finish().map(drop)
    }

    /// All that comes in goes to the queue that the table names, and the link does not flap for it.
    fn table_changes_live(&self) -> Result<()> {
        let changes = || self.guest.check("cat /sys/class/net/eth0/carrier_changes", LIMIT);
        let before = changes()?;
        for queue in [1, 0] {
            let weights: Vec<_> = (0..QUEUES).map(|other| if other == queue { "1" } else { "0" }).collect();
            self.guest.check(&format!("ethtool -X eth0 weight {}", weights.join(" ")), LIMIT)?;
            let first = self.statistics()?;
            iperf(self.guest, self.far, GUEST, Load::Tcp { streams: 8 }, 1)?;
            let last = self.statistics()?;
            let all: u64 = (0..QUEUES).map(|queue| grown(&first, &last, &rx_packets(queue))).sum();
            let chosen = grown(&first, &last, &rx_packets(queue));
            // ARP has no hash.
            ensure!(
                all > 100 && chosen + all / 20 >= all,
                "queue {queue}: {chosen} of {all}: {first:?} {last:?}"
            );
        }
        self.guest.check("ethtool -X eth0 default", LIMIT)?;
        ensure!(changes()? == before, "the link went down: {} changes, {before} before", changes()?);
        self.transfers()
    }

    fn statistics_are_sane(&self) -> Result<()> {
        let kernel = || -> Result<u64> {
            let text = self.guest.check("cat /sys/class/net/eth0/statistics/rx_packets", LIMIT)?;
            Ok(text.trim().parse()?)
        };
        let before = kernel()?;
        let all = self.statistics()?;
        let after = kernel()?;
        let value = |name: &str| all.get(name).copied().with_context(|| format!("no {name} in {all:?}"));
        let mut received = 0;
        for queue in 0..QUEUES {
            received += value(&rx_packets(queue))?;
            value(&format!("tx_queue_{queue}_bytes"))?;
        }
        ensure!((before..=after).contains(&received), "queues {received}, in all {before} to {after}");
        for name in ["tx_no_memory", "tx_no_space", "tx_too_big", "rx_no_memory"] {
            ensure!(value(name)? == 0, "{name}: {all:?}");
        }
        let text = self.guest.check("cat /sys/class/net/eth0/statistics/rx_errors", LIMIT)?;
        ensure!(text.trim() == "0", "{text} receive errors");
        Ok(())
    }

    fn jumbo(&self) -> Result<()> {
        let large = Ping { count: 2, size: 8972, whole: true, ..Ping::default() };
        let set = |mtu: &str| -> Result<()> {
            self.guest.check(&format!("ip link set eth0 mtu {mtu}"), LIMIT)?;
            self.far.check(&format!("ip link set far mtu {mtu}"), LIMIT)?;
            self.reaches(self.far, GUEST)
        };
        set("9000")?;
        for (from, to) in [(self.guest as &dyn Station, FAR), (self.far, GUEST)] {
            let report = ping(from, to, large)?;
            ensure!(report.received == 2, "{}: {report:?}", from.name());
        }
        self.transfers()?;
        self.guest.check("ethtool -K eth0 tso off", LIMIT)?;
        let [sent, _] = self.mean_frames()?;
        ensure!(sent > 1514, "{sent} bytes a frame at MTU 9000");
        self.guest.check("ethtool -K eth0 tso on", LIMIT)?;
        set("1500")?;
        self.transfers()
    }

    fn access_vlan(&self) -> Result<()> {
        let place = |guest: &str, far: &str| -> Result<()> {
            self.yardd.yard(&format!("vm nic set a eth0 {guest}"))?;
            self.yardd.yard(&format!("port set lab/far {far}")).map(drop)
        };
        place("--access 10", "--access 10")?;
        self.reaches(self.guest, FAR)?;
        self.transfers()?;
        place("--access 10", "--access 20")?;
        for (from, to) in [(self.guest as &dyn Station, FAR), (self.far, GUEST)] {
            let report = ping(from, to, Ping { count: 2, ..Ping::default() })?;
            ensure!(report.received == 0, "{} sees another VLAN: {report:?}", from.name());
        }
        place("--passthrough", "--passthrough")?;
        self.reaches(self.guest, FAR)
    }

    fn tagged_vlan(&self) -> Result<()> {
        for (station, device, end) in [(self.guest as &dyn Station, "eth0", 1), (self.far, "far", 2)] {
            for vlan in [30, 40] {
                let line = format!(
                    "ip link add link {device} name v{vlan} type vlan id {vlan} && \
                     ip addr add 10.1.{vlan}.{end}/24 dev v{vlan} && ip link set v{vlan} up"
                );
                station.check(&line, LIMIT)?;
            }
        }
        for vlan in [30, 40] {
            self.reaches(self.guest, &format!("10.1.{vlan}.2"))?;
        }
        Transfer::start(self.guest, self.far, "10.1.30.2", BYTES)?.finish().context("from the guest")?;
        Transfer::start(self.far, self.guest, "10.1.30.1", BYTES)?.finish().context("to the guest")?;
        // A trunk carries its own VLANs only.
        self.yardd.yard("vm nic set a eth0 --trunk 30 --native 1")?;
        self.reaches(self.guest, "10.1.30.2")?;
        let report = ping(self.guest, "10.1.40.2", Ping::default())?;
        ensure!(report.received == 0, "a VLAN that the trunk has not: {report:?}");
        self.yardd.yard("vm nic set a eth0 --passthrough")?;
        self.reaches(self.guest, "10.1.40.2")?;
        self.guest.check("ip link del v30 && ip link del v40", LIMIT).map(drop)
    }

    fn hot_plug(&self) -> Result<()> {
        const HOT: &str = "10.1.1.1";
        self.far.check("ip addr add 10.1.1.2/24 dev far", LIMIT)?;
        let mut there = Stream::start(self.guest, self.far, FAR)?;
        let mut back = Stream::start(self.far, self.guest, GUEST)?;
        for _ in 0..2 {
            self.yardd.yard(&format!("vm nic add a eth1 --switch lab --mac {HOT_MAC} --queues 2"))?;
            wait_for("the new card", LIMIT, || Ok(self.card(HOT_MAC)?.is_some()))?;
            let card = self.card(HOT_MAC)?.context("the card went")?;
            let line = format!("ip addr add {HOT}/24 dev {card} && ip link set {card} up");
            self.guest.check(&line, LIMIT)?;
            self.reaches(self.far, HOT)?;
            Transfer::start(self.guest, self.far, "10.1.1.2", BYTES)?.finish()?;
            let mut flood = self.far.spawn(&format!("ping -n -q -i 0.005 {HOT}"))?;
            let nothing = self.yardd.port("lab", "a.eth1")?["sent"]["frames"].as_u64().unwrap_or_default();
            wait_for("pings to the new card", LIMIT, || {
                Ok(self.yardd.port("lab", "a.eth1")?["sent"]["frames"].as_u64() > Some(nothing + 10))
            })?;
            self.yardd.yard("vm nic remove a eth1")?;
            wait_for("the card to go", LIMIT, || Ok(self.card(HOT_MAC)?.is_none()))?;
            flood.kill()?;
            ensure!(self.yardd.port("lab", "a.eth1").is_err(), "its port is still there");
            there.wait_for(BEYOND_BUFFERS, LIMIT).context("from the guest")?;
            back.wait_for(BEYOND_BUFFERS, LIMIT).context("to the guest")?;
        }
        there.finish()?;
        back.finish().map(drop)
    }

    /// The driver leaves the adapter and takes it again, and a connection under load goes on.
    fn driver_changes(&self, leave: &str, take: &str, mut load: Stream<'_>) -> Result<()> {
        self.guest.check(leave, LIMIT)?;
        ensure!(self.card(MAC)?.is_none(), "the card is still there");
        let shown = self.yardd.wait_for_vm("a", "no channel", |vm| vm["nics"][0]["channels"] == 0)?;
        ensure!(shown["faults"].as_array().is_some_and(Vec::is_empty), "{shown:#}");
        let port = self.yardd.port("lab", "a.eth0")?;
        ensure!(port["state"] == "waiting" && port["reason"] == "the guest's driver", "{port:#}");
        self.guest.check(take, LIMIT)?;
        wait_for("the card", LIMIT, || Ok(self.card(MAC)?.is_some()))?;
        self.guest.check(&format!("ip addr add {GUEST}/24 dev eth0 && ip link set eth0 up"), LIMIT)?;
        let count = self.channels()?;
        ensure!(count == u64::from(QUEUES), "{count} channels");
        self.reaches(self.far, GUEST)?;
        load.wait_for(BEYOND_BUFFERS, LIMIT)?;
        load.finish().map(drop)
    }

    fn unharmed(&self) -> Result<()> {
        let shown = self.yardd.vm("a")?;
        ensure!(shown["faults"].as_array().is_some_and(Vec::is_empty), "{shown:#}");
        let port = self.yardd.port("lab", "a.eth0")?;
        ensure!(port["state"] == "up", "{port:#}");
        self.guest.expect_content()
    }
}

fn rx_packets(queue: u16) -> String {
    format!("rx_queue_{queue}_packets")
}

fn grown(before: &BTreeMap<String, u64>, after: &BTreeMap<String, u64>, name: &str) -> u64 {
    let value = |all: &BTreeMap<String, u64>| all.get(name).copied().unwrap_or_default();
    value(after).saturating_sub(value(before))
}
