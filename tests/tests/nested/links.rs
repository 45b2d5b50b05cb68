//! Links, addresses and processors of a VM with unmodified Debian, changed by the operator.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use switchyard_tests::lab::wait_for;
use switchyard_tests::nested::scene::BOOT;
use switchyard_tests::nested::{Guest, Namespace, VmNic, VmSpec, Yardd, scene};
use switchyard_tests::ping::{Ping, ping};
use switchyard_tests::station::Station;

const LIMIT: Duration = Duration::from_secs(60);
const NEW: &str = "02:00:00:00:01:0a";
const OLD: &str = "02:00:00:00:01:0c";
const OTHER: &str = "02:00:00:00:01:0d";
const AT_NEW: &str = "10.1.0.1";
const AT_OLD: &str = "10.1.1.1";

#[test]
fn links_and_addresses_are_as_the_operator_wants_them() -> Result<()> {
    let legacy = VmNic { legacy: true, settings: "link = \"down\"".into(), ..VmNic::new("eth1", "lab", OLD) };
    let vm = VmSpec::new("a").with(VmNic::new("eth0", "lab", NEW).at(&format!("{AT_NEW}/24")));
    let vm = vm.with(legacy.at(&format!("{AT_OLD}/24")));
    // The nested host's processor is AMD's.
    let foreign = VmSpec { settings: "cpu.baseline = \"haswell\"".into(), ..VmSpec::new("b") };
    let tables = format!("{}{}", vm.config(), foreign.config());
    let config = format!(
        "[switch.lab]\ntype = \"private\"\n[switch.lab.port.far]\ntap = {{ name = \"far\" }}\n{tables}"
    );
    scene("links_and_addresses_are_as_the_operator_wants_them", &config, |host, yardd, steps| {
        // A daemon looks for control groups when it starts.
        let mount = "grep -q cgroup2 /proc/self/mounts || mount -t cgroup2 none /sys/fs/cgroup";
        host.check(mount, LIMIT)?;
        yardd.crash()?;
        let yardd = Yardd::run(host)?;
        let far = Namespace::new(host, "far")?;
        plug(&far)?;
        steps.step("a model of another maker is refused", || {
            let refused = yardd.yard("vm start b").err().context("it starts")?;
            ensure!(format!("{refused:#}").contains("cannot present haswell: it lacks Intel"), "{refused:#}");
            Ok(())
        });
        let mut guest = yardd.start_vm("a")?;
        println!("guest: {:.1} s", guest.wait_ready(BOOT)?.as_secs_f64());
        let set = |yardd: &Yardd, what: &str| yardd.yard(&format!("vm nic set a {what}"));
        steps.step("an emulated adapter begins with its link down", || carrier(&guest, OLD, "0"));
        steps.step("its link goes up", || {
            set(&yardd, "eth1 --link up")?;
            carrier(&guest, OLD, "1")?;
            answers(&far, AT_OLD)
        });
        steps.step("a synthetic adapter's link goes down and up", || {
            carrier(&guest, NEW, "1")?;
            answers(&far, AT_NEW)?;
            set(&yardd, "eth0 --link down")?;
            carrier(&guest, NEW, "0")?;
            ensure!(!reaches(&far, AT_NEW)?, "an answer over a link that is down");
            set(&yardd, "eth0 --link up")?;
            carrier(&guest, NEW, "1")?;
            answers(&far, AT_NEW)
        });
        steps.step("the kernel takes the processors that the VM is kept to", || {
            let cpus = host.check("cat /sys/fs/cgroup/switchyard/a/cpuset.cpus", LIMIT)?;
            ensure!(cpus.trim() == "0-1", "{cpus}");
            Ok(())
        });
        steps.step("the kernel takes shares of the processors that change while it runs", || {
            for (options, expected) in [
                ("--cpu-weight 300 --cpu-limit 50", "300 50000 100000"),
                ("--cpu-limit 100 --cpu-reserve 80", "4000 max 100000"),
                ("--cpu-reserve 0 --cpu-weight 100", "100 max 100000"),
            ] {
                yardd.yard(&format!("vm set a {options}"))?;
                let found = host.check("cd /sys/fs/cgroup/switchyard/a; cat cpu.weight cpu.max", LIMIT)?;
                let found: Vec<_> = found.split_whitespace().collect();
                ensure!(found.join(" ") == expected, "{options}: {found:?}");
            }
            Ok(())
        });
        steps.step("an emulated adapter outlives a restart of its port", || {
            yardd.yard("port restart lab/a.eth1")?;
            answers(&far, AT_OLD)
        });
        steps.step("another address is refused while it runs", || {
            let refused = set(&yardd, &format!("eth0 --mac {OTHER}")).err().context("it is taken")?;
            ensure!(format!("{refused:#}").contains("is running, expected off"), "{refused:#}");
            Ok(())
        });
        steps.step("both links go down", || {
            set(&yardd, "eth0 --link down")?;
            set(&yardd, "eth1 --link down")?;
            carrier(&guest, NEW, "0")?;
            carrier(&guest, OLD, "0")
        });
        yardd.crash()?;
        let yardd = Yardd::run(host)?;
        steps.step("they stay so when the daemon comes back, until they go up", || {
            plug(&far)?;
            yardd.wait_for_vm("a", "both served", |vm| {
                (0..2).all(|nic| vm["nics"][nic]["connected"] == true)
            })?;
            let words = "grep . /sys/class/net/e*/carrier";
            let shown = guest.check(words, LIMIT)?;
            ensure!(shown.lines().all(|line| line.ends_with(":0")), "{shown}");
            set(&yardd, "eth0 --link up")?;
            set(&yardd, "eth1 --link up")?;
            answers(&far, AT_NEW)?;
            answers(&far, AT_OLD)
        });
        steps.step("another address is there at the next start", || {
            yardd.yard("vm stop a")?;
            host.check("! test -e /sys/fs/cgroup/switchyard/a", LIMIT)?;
            set(&yardd, &format!("eth0 --mac {OTHER}"))?;
            let mut guest = yardd.start_vm("a")?;
            guest.wait_ready(BOOT)?;
            guest.check(&format!("grep -q {OTHER} /sys/class/net/*/address"), LIMIT).map(drop)
        });
        Ok(())
    })
}

/// Gives the far end its addresses.
fn plug(far: &Namespace) -> Result<()> {
    far.plug("far", "10.1.0.2/24")?;
    far.check("ip addr add 10.1.1.2/24 dev far", LIMIT).map(drop)
}

/// Waits until the guest's card says so.
fn carrier(guest: &Guest, mac: &str, wanted: &str) -> Result<()> {
    wait_for(&format!("carrier {wanted} of {mac}"), LIMIT, || {
        let line = format!("cat $(dirname $(grep -l {mac} /sys/class/net/*/address))/carrier");
        Ok(guest.run(&line, LIMIT)?.stdout.trim() == wanted)
    })
}

fn reaches(far: &Namespace, address: &str) -> Result<bool> {
    Ok(ping(far, address, Ping { count: 1, ..Ping::default() })?.received == 1)
}

fn answers(far: &Namespace, address: &str) -> Result<()> {
    wait_for(&format!("an answer of {address}"), LIMIT, || reaches(far, address))
}
