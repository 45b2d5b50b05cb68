//! Programs that die under load: what dies is reported and comes back, what does not is unharmed.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use switchyard_tests::kernel::Flavour;
use switchyard_tests::lab::wait_for;
use switchyard_tests::nested::scene::BOOT;
use switchyard_tests::nested::stream::BEYOND_BUFFERS;
use switchyard_tests::nested::{Guest, Host, Stream, VmNic, VmSpec, Yardd, scene};
use switchyard_tests::ping::{Ping, ping};
use switchyard_tests::station::Station;

const LIMIT: Duration = Duration::from_secs(120);
const CONFIG: &str = "[switch.lab]\ntype = \"private\"\n[switch.other]\ntype = \"private\"\n";

/// The guest `name`, whose address on the switch is 10.3.0.`number`.
fn vm(name: &str, number: u8, queues: u16) -> VmSpec {
    let nic = VmNic::new("eth0", "lab", &format!("02:00:00:00:03:{number:02x}"));
    let vm = VmSpec::new(name).with(VmNic { queues, ..nic }.at(&format!("10.3.0.{number}/24")));
    let settings = "restart = \"on-crash\"".to_owned();
    VmSpec { settings, vcpus: u32::from(queues), flavour: Flavour::Cloud, ..vm }
}

fn address(number: u8) -> String {
    format!("10.3.0.{number}")
}

fn reaches(from: &Guest, address: &str) -> Result<()> {
    wait_for(&format!("{} to reach {address}", from.name()), LIMIT, || {
        Ok(ping(from, address, Ping { count: 1, ..Ping::default() })?.received == 1)
    })
}

#[test]
fn guests_outlive_a_killed_daemon_and_a_killed_worker_comes_back() -> Result<()> {
    let name = "guests_outlive_a_killed_daemon_and_a_killed_worker_comes_back";
    let mut vms = [vm("a", 1, 2), vm("b", 2, 1), vm("c", 3, 1)];
    vms[2].settings += "\ncpu.pin = [1]";
    let config = vms.iter().fold(CONFIG.to_owned(), |config, vm| config + &vm.config());
    scene(name, &config, |host, yardd, steps| {
        let mut guests = Vec::new();
        for vm in &vms {
            let mut guest = yardd.start_vm(&vm.name)?;
            println!("guest: {:.1} s", guest.wait_ready(BOOT)?.as_secs_f64());
            guests.push(guest);
        }
        let [a, b, c] = &guests[..] else { bail!("three guests") };
        for number in [2, 3] {
            reaches(a, &address(number))?;
        }
        steps.step("every worker is a user of its own", || own_users(host, &yardd));
        steps.step("a pinned processor runs where it is pinned", || {
            let tasks = format!("/proc/{}/task", yardd.worker("c")?);
            let find = format!("grep -l -x vcpu0 {tasks}/*/comm | sed s/comm$/status/");
            let allowed = host.check(&format!("{find} | xargs grep -h Cpus_allowed_list:"), LIMIT)?;
            ensure!(allowed.trim() == "Cpus_allowed_list:\t1", "{allowed:?}");
            Ok(())
        });
        let mut daemon = Some(yardd);
        steps.step("kill -9 of yardd under load", || daemon_dies(host, &mut daemon, a, b));
        let mut yardd = match daemon {
            Some(yardd) => yardd,
            None => Yardd::run(host)?,
        };
        steps.step("live changes after that", || is_ruled(&yardd, a, b));
        steps.step("kill -9 of a worker under load", || worker_dies(host, &yardd, [a, b, c]));
        steps.step("the daemon is whole", || yardd.service().expect_running());
        steps.step("kill -9 of a worker without a daemon", || orphan_dies(host, yardd, a, b));
        Ok(())
    })
}

/// Each worker runs as the user that `yard` tells, and no two as the same.
fn own_users(host: &Host, yardd: &Yardd) -> Result<()> {
    let mut users = Vec::new();
    for vm in ["a", "b", "c"] {
        let user = yardd.vm(vm)?["user"].as_u64().context("no user")?;
        let status = format!("/proc/{}/status", yardd.worker(vm)?);
        // Four of each: real, effective, saved, of files.
        let same = format!("grep -c -x '[UG]id:\t{user}\t{user}\t{user}\t{user}' {status}");
        ensure!(host.check(&same, LIMIT)?.trim() == "2", "{vm} is another user than {user}");
        ensure!(!users.contains(&user), "{user} twice");
        users.push(user);
    }
    Ok(())
}

/// The daemon dies and comes back while two guests talk: their connections go on, and nothing is lost.
fn daemon_dies(host: &Host, daemon: &mut Option<Yardd>, a: &Guest, b: &Guest) -> Result<()> {
    let mut there = Stream::start(a, b, &address(2))?;
    let mut back = Stream::start(b, a, &address(1))?;
    for _ in 0..2 {
        there.wait_for(BEYOND_BUFFERS, LIMIT)?;
        back.wait_for(BEYOND_BUFFERS, LIMIT)?;
        let yardd = daemon.take().context("no daemon")?;
        let workers = ["a", "b", "c"].map(|vm| yardd.worker(vm).ok());
        yardd.crash()?;
        let report = ping(a, &address(2), Ping::default())?;
        ensure!(report.received == 0, "frames without a switch: {report:?}");
        let yardd = daemon.insert(Yardd::run(host)?);
        for (vm, worker) in ["a", "b", "c"].into_iter().zip(workers) {
            let shown = yardd.wait_for_vm_state(vm, "running")?;
            ensure!(worker.is_some() && shown["pid"].as_u64() == worker.map(u64::from), "{vm}: {shown:#}");
            yardd.wait_for_vm(vm, "its adapter to be served", |vm| vm["nics"][0]["connected"] == true)?;
            yardd.wait_for_port("lab", &format!("{vm}.eth0"), "up")?;
        }
        there.wait_for(BEYOND_BUFFERS, LIMIT).context("from a to b after the restart")?;
        back.wait_for(BEYOND_BUFFERS, LIMIT).context("from b to a after the restart")?;
    }
    let bytes = there.finish().context("from a to b")?.min(back.finish().context("from b to a")?);
    println!("         {} MiB each way", bytes >> 20);
    Ok(())
}

/// A VM that was taken back obeys, and new connections of its guest work.
fn is_ruled(yardd: &Yardd, a: &Guest, b: &Guest) -> Result<()> {
    yardd.yard("vm nic add b eth1 --switch lab --mac 02:00:00:00:03:f2")?;
    let found = "grep -q 02:00:00:00:03:f2 /sys/class/net/*/address";
    wait_for("a new card", LIMIT, || Ok(b.run(found, LIMIT)?.status == 0))?;
    yardd.yard("vm nic remove b eth1")?;
    wait_for("the card to go", LIMIT, || Ok(b.run(found, LIMIT)?.status != 0))?;
    yardd.yard("vm pause b")?;
    yardd.wait_for_vm_state("b", "paused")?;
    yardd.yard("vm resume b")?;
    reaches(a, &address(2))?;
    a.check("ethtool -L eth0 combined 1 && ethtool -L eth0 combined 2", LIMIT)?;
    reaches(a, &address(2))?;
    yardd.wait_for_vm("a", "heartbeat", |vm| vm["guest"]["heartbeat"] == "ok").map(drop)
}

/// A worker dies: the connection of the others goes on, and its VM starts again.
fn worker_dies(host: &Host, yardd: &Yardd, [a, b, c]: [&Guest; 3]) -> Result<()> {
    let mut others = Stream::start(a, b, &address(2))?;
    let mut victims = Stream::start(c, b, &address(2))?;
    victims.wait_for(BEYOND_BUFFERS, LIMIT)?;
    let worker = yardd.worker("c")?;
    let restarted = Instant::now();
    host.check(&format!("kill -9 {worker}"), LIMIT)?;
    let shown = yardd.wait_for_vm("c", "the restart", |vm| vm["restarts"] == 1)?;
    println!("         {}", shown["reason"]);
    others.wait_for(BEYOND_BUFFERS, LIMIT)?;
    let log = host.check("cat /run/yard/vm/c/worker.log; true", LIMIT)?;
    let mut again = yardd.guest("c", restarted)?;
    again.wait_ready(BOOT).with_context(|| log)?;
    ensure!(yardd.worker("c")? != worker, "the same worker");
    reaches(&again, &address(2))?;
    others.wait_for(BEYOND_BUFFERS, LIMIT)?;
    others.finish()?;
    ensure!(victims.finish().is_err(), "its guest is gone");
    for vm in ["a", "b"] {
        let shown = yardd.vm(vm)?;
        ensure!(shown["restarts"] == 0 && shown["state"] == "running", "{shown:#}");
    }
    Ok(())
}

/// A worker dies while no daemon runs: the next one finds out, says so, and starts the VM again.
fn orphan_dies(host: &Host, yardd: Yardd, a: &Guest, b: &Guest) -> Result<()> {
    let (worker, other) = (yardd.worker("c")?, yardd.worker("b")?);
    yardd.crash()?;
    host.check(&format!("kill -9 {worker}"), LIMIT)?;
    let restarted = Instant::now();
    let yardd = Yardd::run(host)?;
    yardd.wait_for_vm("c", "another worker", |vm| {
        vm["state"] == "running" && vm["pid"].as_u64().is_some_and(|pid| pid != u64::from(worker))
    })?;
    ensure!(yardd.vm("b")?["pid"] == other, "b has another worker");
    yardd.guest("c", restarted)?.wait_ready(BOOT)?;
    reaches(a, &address(2))?;
    reaches(b, &address(3))?;
    yardd.yard("vm stop c")?;
    yardd.wait_for_vm_state("c", "off").map(drop)
}
