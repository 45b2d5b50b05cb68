//! Integration services, life and death of an unmodified Debian guest under our hypervisor.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use switchyard_tests::lab::wait_for;
use switchyard_tests::nested::scene::BOOT;
use switchyard_tests::nested::{Guest, Host, Namespace, VmNic, VmSpec, Yardd, scene};
use switchyard_tests::ping::{Ping, ping};
use switchyard_tests::station::Station;

const LIMIT: Duration = Duration::from_secs(120);
const MAC: &str = "02:00:00:00:02:0a";
const GUEST: &str = "10.2.0.1";
const STARTUP_MB: u64 = 384;
/// What dynamic memory takes, and gives back.
const TAKEN_MB: u64 = 64;
/// What is added beyond the start: memory sections that Linux can add have 128 MiB.
const ADDED_MB: u64 = 128;

fn config() -> String {
    let memory = format!(
        "memory = {{ startup = \"{STARTUP_MB}M\", minimum = \"192M\", maximum = \"{}M\" }}",
        STARTUP_MB + ADDED_MB
    );
    let vm = VmSpec::new("a").with(VmNic::new("eth0", "lab", MAC).at(&format!("{GUEST}/24")));
    let vm = VmSpec { settings: "restart = \"never\"".to_owned(), ..vm };
    // The harness knows fixed sizes only.
    let fixed = format!("memory = \"{}M\"", vm.memory_mb);
    let vm = vm.config().replace(&fixed, &memory);
    format!("[switch.lab]\ntype = \"private\"\n[switch.lab.port.far]\ntap = {{ name = \"far\" }}\n{vm}")
}

#[test]
fn debian_guest_is_served_and_told_by_integration_services() -> Result<()> {
    let name = "debian_guest_is_served_and_told_by_integration_services";
    scene(name, &config(), |host, yardd, steps| {
        let far = Namespace::new(host, "far")?;
        far.plug("far", "10.2.0.2/24")?;
        let mut guest = yardd.start_vm("a")?;
        println!("guest: {:.1} s", guest.wait_ready(BOOT)?.as_secs_f64());
        steps.step("heartbeat and services in use", || heartbeat(&yardd));
        steps.step("synthetic timer", || timer(&guest));
        steps.step("memory of nobody else", || own_memory(&yardd, &guest));
        steps.step("KVP: the guest tells of itself", || guest_tells(&yardd, &guest));
        steps.step("KVP: the guest is told", || guest_is_told(&yardd, &guest));
        steps.step("VSS: freeze and thaw", || freeze(&yardd, &guest));
        steps.step("time set anew", || clock_is_set(host, &yardd, &guest));
        steps.step("pause, resume, and the time after it", || pause(host, &yardd, &guest, &far));
        steps.step("balloon down and up", || balloon(&yardd, &guest));
        steps.step("memory beyond the start", || hot_add(&yardd, &guest));
        steps.step("reset", || reset(&yardd, &mut guest));
        steps.step("shutdown and start again", || reboot(&yardd, &mut guest));
        steps.step("panic", || panic(&yardd, &mut guest));
        steps.step("shutdown", || shutdown(host, &yardd, &guest));
        steps.step("start once more, and stop", || start_and_stop(&yardd));
        Ok(())
    })
}

fn heartbeat(yardd: &Yardd) -> Result<()> {
    yardd.wait_for_vm("a", "heartbeat", |vm| vm["guest"]["heartbeat"] == "ok")?;
    let list = yardd.yard("vm list")?;
    ensure!(list.lines().any(|line| line.contains("running") && line.contains("ok")), "{list}");
    let shown = yardd.wait_for_vm("a", "all services", |vm| {
        vm["guest"]["services"].as_array().is_some_and(|services| services.len() >= 6)
    })?;
    println!("         {}", shown["guest"]["services"]);
    Ok(())
}

fn guest_tells(yardd: &Yardd, guest: &Guest) -> Result<()> {
    let line = ". /etc/os-release; echo \"$NAME\"; echo \"$VERSION_ID\"; uname -r";
    let truth = guest.check(line, LIMIT)?;
    let [os, version, release] = truth.lines().collect::<Vec<_>>()[..] else { bail!("{truth}") };
    let shown = yardd.wait_for_vm("a", "its system and address", |vm| {
        let about = &vm["guest"];
        let addresses = about["addresses"].as_array();
        about["os"] == os && addresses.is_some_and(|all| all.iter().any(|address| address == GUEST))
    })?;
    let values = shown["guest"]["values"].to_string();
    ensure!(values.contains(version) && values.contains(release), "{version}, {release}: {values}");
    let table = yardd.yard("vm value show a")?;
    ensure!(table.contains("OSName") && table.contains(os), "{table}");
    Ok(())
}

fn guest_is_told(yardd: &Yardd, guest: &Guest) -> Result<()> {
    const POOL: &str = "/var/lib/hyperv/.kvp_pool_0";
    let holds = |text: &str| -> Result<bool> {
        Ok(guest.run(&format!("grep -a -q {text} {POOL}"), LIMIT)?.status == 0)
    };
    yardd.yard("vm value set a rack 'row-seven'")?;
    wait_for("the value in the guest", LIMIT, || Ok(holds("rack")? && holds("row-seven")?))?;
    yardd.yard("vm value set a rack 'row-eight'")?;
    wait_for("the other value in the guest", LIMIT, || Ok(holds("row-eight")? && !holds("row-seven")?))?;
    yardd.yard("vm value remove a rack")?;
    wait_for("the value to go", LIMIT, || Ok(!holds("row-eight")?))
}

/// A program that writes to a frozen file system waits until it is thawed.
fn freeze(yardd: &Yardd, guest: &Guest) -> Result<()> {
    let line = "for module in /mod/disk/*; do insmod $module || true; done; mkdir -p /disk; \
                until [ -b /dev/ram0 ]; do sleep 0.05; done; mke2fs -q /dev/ram0 2> /dev/null; \
                mount -t ext4 /dev/ram0 /disk && echo before > /disk/file";
    guest.check(line, LIMIT)?;
    yardd.yard("vm freeze a")?;
    ensure!(yardd.vm("a")?["guest"]["frozen"] == true, "not shown as frozen");
    let mut writer = guest.spawn("echo $$; echo during > /disk/other; echo written")?;
    // It sleeps in the kernel, not to be woken by any signal.
    let asleep = "for task in /proc/[0-9]*; do [ \"$(cut -d ' ' -f 3 $task/stat)\" = D ] && cat $task/comm; done; true";
    wait_for("the writer to be stuck", LIMIT, || Ok(guest.check(asleep, LIMIT)?.contains("dash")))?;
    ensure!(!writer.output()?.contains("written"), "written to a frozen file system");
    yardd.yard("vm thaw a")?;
    let output = writer.wait(LIMIT)?;
    ensure!(output.stdout.contains("written"), "{output:?}");
    ensure!(yardd.vm("a")?["guest"]["frozen"] == false, "still shown as frozen");
    guest.check("umount /disk", LIMIT).map(drop)
}

/// Puts the guest's clock wrong by decades.
fn forget_the_time(guest: &Guest) -> Result<()> {
    guest.check("busybox date -s @1000000000", LIMIT).map(drop)
}

fn wait_for_the_time(host: &Host, guest: &Guest) -> Result<()> {
    let clock = |station: &dyn Station| -> Result<i64> {
        let text = station.check("date +%s", LIMIT)?;
        text.trim().parse().with_context(|| format!("not a time: {text}"))
    };
    wait_for("the right time in the guest", LIMIT, || Ok((clock(guest)? - clock(host)?).abs() < 10))
}

fn clock_is_set(host: &Host, yardd: &Yardd, guest: &Guest) -> Result<()> {
    forget_the_time(guest)?;
    yardd.yard("vm sync-time a")?;
    wait_for_the_time(host, guest)
}

/// What interrupts the guest when its time has come is the hypervisor's timer, not an emulated one.
fn timer(guest: &Guest) -> Result<()> {
    let count = || -> Result<u64> {
        let text = guest.check("grep HVS: /proc/interrupts", LIMIT)?;
        Ok(text.split_whitespace().filter_map(|word| word.parse::<u64>().ok()).sum())
    };
    let before = count()?;
    wait_for("synthetic timer's interrupts", LIMIT, || Ok(count()? > before))
}

/// A worker maps the memory of its own guest only.
fn own_memory(yardd: &Yardd, guest: &Guest) -> Result<()> {
    let line = format!("grep -o 'memfd:[^ ]*' /proc/{}/maps | sort -u", yardd.worker("a")?);
    let mapped = guest.host().check(&line, LIMIT)?;
    ensure!(mapped.trim() == "memfd:a", "{mapped}");
    Ok(())
}

/// Seconds that a machine has run, by its own clock.
fn uptime(station: &dyn Station) -> Result<f64> {
    let text = station.check("cut -d ' ' -f 1 /proc/uptime", LIMIT)?;
    text.trim().parse().with_context(|| format!("not a time: {text}"))
}

/// The least time that a guest is paused for, and how far its clock and the host's may differ meanwhile, in seconds.
const PAUSED: f64 = 6.0;
const SKEW: f64 = 1.0;

fn pause(host: &Host, yardd: &Yardd, guest: &Guest, far: &Namespace) -> Result<()> {
    let answers = || Ok(ping(far, GUEST, Ping { count: 1, ..Ping::default() })?.received == 1);
    wait_for("the guest's network", LIMIT, answers)?;
    forget_the_time(guest)?;
    let count = "n=0; while :; do n=$((n+1)); echo $n > /run/counted; sleep 0.01; done";
    let _counter = guest.spawn(count)?;
    let (start, early) = (uptime(host)?, uptime(guest)?);
    yardd.yard("vm pause a")?;
    yardd.wait_for_vm_state("a", "paused")?;
    let stopped = uptime(host)?;
    let report = ping(far, GUEST, Ping::default())?;
    ensure!(report.received == 0, "a paused guest answered: {report:?}");
    wait_for("the pause to have its length", LIMIT, || Ok(uptime(host)? - stopped >= PAUSED))?;
    let paused = uptime(host)? - stopped;
    yardd.yard("vm resume a")?;
    yardd.wait_for_vm_state("a", "running")?;
    let (passed, ran) = (uptime(guest)? - early, uptime(host)? - start - paused);
    println!(
        "         paused for {paused:.1} s; {passed:.1} s passed in the guest, {ran:.1} s outside of the pause"
    );
    ensure!(passed > 0.0 && passed < ran + SKEW, "{passed} s passed in a guest that ran for {ran} s");
    wait_for("the guest's network", LIMIT, answers)?;
    let counted = || guest.check("cat /run/counted", LIMIT);
    let before = counted()?;
    wait_for("the guest's programs to go on", LIMIT, || Ok(counted()? != before))?;
    wait_for_the_time(host, guest)?;
    yardd.wait_for_vm("a", "heartbeat", |vm| vm["guest"]["heartbeat"] == "ok").map(drop)
}

/// MiB of memory that the guest's kernel has.
fn guest_memory(guest: &Guest) -> Result<u64> {
    let text = guest.check("grep MemTotal: /proc/meminfo", LIMIT)?;
    let kilobytes: u64 = text.split_whitespace().nth(1).context("no figure")?.parse()?;
    Ok(kilobytes >> 10)
}

/// KiB that the worker's processes keep of guest memory and their own.
fn worker_memory(yardd: &Yardd, guest: &Guest) -> Result<u64> {
    let pid = yardd.worker("a")?;
    let text = guest.host().check(&format!("grep VmRSS: /proc/{pid}/status"), LIMIT)?;
    Ok(text.split_whitespace().nth(1).context("no figure")?.parse()?)
}

fn ballooned(vm: &Value) -> u64 {
    vm["memory"]["dynamic"]["ballooned"].as_u64().unwrap_or_default() >> 20
}

fn balloon(yardd: &Yardd, guest: &Guest) -> Result<()> {
    yardd.wait_for_vm("a", "a report of memory pressure", |vm| {
        vm["memory"]["dynamic"]["available"].as_u64().is_some_and(|bytes| bytes > 0)
    })?;
    // It is touched, so that something can be given back.
    guest.check(&format!("dd if=/dev/zero of=/tmp/fill bs=1M count={TAKEN_MB} && rm /tmp/fill"), LIMIT)?;
    let (before, resident) = (guest_memory(guest)?, worker_memory(yardd, guest)?);
    yardd.yard(&format!("vm set a --memory {}M", STARTUP_MB - TAKEN_MB))?;
    yardd.wait_for_vm("a", "memory in the balloon", |vm| ballooned(vm) >= TAKEN_MB)?;
    wait_for("the guest's memory to shrink", LIMIT, || Ok(guest_memory(guest)? + TAKEN_MB <= before + 1))?;
    let left = worker_memory(yardd, guest)?;
    ensure!(
        left + (TAKEN_MB << 9) < resident,
        "the host got too little back: {resident} KiB before, {left} after"
    );
    yardd.yard(&format!("vm set a --memory {STARTUP_MB}M"))?;
    yardd.wait_for_vm("a", "memory back", |vm| ballooned(vm) == 0)?;
    wait_for("the guest's memory to grow", LIMIT, || Ok(guest_memory(guest)? + 1 >= before))?;
    // What came back is memory.
    let line = format!(
        "dd if=/dev/urandom of=/tmp/fill bs=1M count={TAKEN_MB} 2> /dev/null && md5sum /tmp/fill && md5sum /tmp/fill && rm /tmp/fill"
    );
    let sums = guest.check(&line, LIMIT)?;
    let [first, second] = sums.lines().collect::<Vec<_>>()[..] else { bail!("{sums}") };
    ensure!(first == second && first.len() > 32, "memory changes: {sums}");
    Ok(())
}

fn hot_add(yardd: &Yardd, guest: &Guest) -> Result<()> {
    let before = guest_memory(guest)?;
    // No udev does that here.
    guest.check("echo online > /sys/devices/system/memory/auto_online_blocks", LIMIT)?;
    yardd.yard(&format!("vm set a --memory {}M", STARTUP_MB + ADDED_MB))?;
    wait_for("the guest's memory to grow", LIMIT, || Ok(guest_memory(guest)? + 8 >= before + ADDED_MB))?;
    let shown = yardd.vm("a")?;
    ensure!(shown["memory"]["assigned"] == (STARTUP_MB + ADDED_MB) << 20, "{}", shown["memory"]);
    Ok(())
}

fn boot_id(guest: &Guest) -> Result<String> {
    guest.check("cat /proc/sys/kernel/random/boot_id", LIMIT)
}

fn reset(yardd: &Yardd, guest: &mut Guest) -> Result<()> {
    let before = boot_id(guest)?;
    let worker = yardd.worker("a")?;
    yardd.yard("vm reset a")?;
    guest.wait_rebooted(BOOT)?;
    ensure!(boot_id(guest)? != before, "it was not reset");
    ensure!(yardd.worker("a")? == worker, "another worker");
    yardd.wait_for_vm("a", "heartbeat", |vm| vm["guest"]["heartbeat"] == "ok").map(drop)
}

/// What the guest's kernel runs when it is asked to end.
fn say_goodbye(guest: &Guest, name: &str) -> Result<()> {
    let line = format!(
        "printf '#!/bin/sh\\necho {name}: goodbye > /dev/ttyS0\\nexec busybox {name} -f\\n' > /sbin/{name}; \
         chmod +x /sbin/{name}"
    );
    guest.check(&line, LIMIT).map(drop)
}

fn reboot(yardd: &Yardd, guest: &mut Guest) -> Result<()> {
    let before = boot_id(guest)?;
    say_goodbye(guest, "reboot")?;
    yardd.yard("vm shutdown --reboot a")?;
    guest.wait_rebooted(BOOT)?;
    ensure!(boot_id(guest)? != before, "it did not start again");
    ensure!(guest.console()?.contains("reboot: goodbye"), "the guest was not asked");
    Ok(())
}

fn panic(yardd: &Yardd, guest: &mut Guest) -> Result<()> {
    guest.check("(sleep 0.2; echo c > /proc/sysrq-trigger) > /dev/null 2>&1 &", LIMIT)?;
    let shown = yardd.wait_for_vm_state("a", "crashed")?;
    let panic = shown["panic"].to_string();
    ensure!(panic.contains("sysrq"), "the panic does not say why: {panic}");
    ensure!(shown["reason"].as_str().is_some_and(|reason| !reason.is_empty()), "{shown:#}");
    let text = yardd.yard("vm show a")?;
    ensure!(text.contains("panic"), "{text}");
    yardd.yard("vm reset a")?;
    guest.wait_rebooted(BOOT)?;
    yardd.wait_for_vm_state("a", "running").map(drop)
}

fn shutdown(host: &Host, yardd: &Yardd, guest: &Guest) -> Result<()> {
    say_goodbye(guest, "poweroff")?;
    let worker = yardd.worker("a")?;
    yardd.wait_for_vm("a", "the shutdown service", |vm| {
        vm["guest"]["services"].to_string().contains("shutdown")
    })?;
    yardd.yard("vm shutdown a")?;
    let shown = yardd.wait_for_vm_state("a", "off")?;
    ensure!(shown["reason"].is_null(), "it was asked to: {}", shown["reason"]);
    ensure!(guest.console()?.contains("poweroff: goodbye"), "the guest was not asked");
    let gone = host.run(&format!("[ -e /proc/{worker}/exe ]"), LIMIT)?;
    ensure!(gone.status != 0, "its worker is still there");
    Ok(())
}

fn start_and_stop(yardd: &Yardd) -> Result<()> {
    yardd.yard("vm start a")?;
    yardd.wait_for_vm_state("a", "running")?;
    yardd.yard("vm stop a")?;
    let shown = yardd.wait_for_vm_state("a", "off")?;
    ensure!(shown["reason"].is_null(), "an operator did it: {}", shown["reason"]);
    yardd.yard("vm delete a")?;
    ensure!(yardd.vm("a").is_err(), "it was deleted");
    Ok(())
}
