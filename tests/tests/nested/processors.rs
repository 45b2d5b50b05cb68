//! Virtual processors of unmodified Debian guests under our hypervisor: what they are told to be, and many of them.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use switchyard_tests::iperf::{Load, iperf};
use switchyard_tests::kernel::Flavour;
use switchyard_tests::lab::wait_for;
use switchyard_tests::nested::scene::BOOT;
use switchyard_tests::nested::{Guest, Host, HostSpec, Namespace, VmNic, VmSpec, Yardd, scene_on};
use switchyard_tests::ping::{Ping, ping};
use switchyard_tests::station::Station;
use switchyard_tests::transfer::Transfer;

const LIMIT: Duration = Duration::from_secs(120);
const LOADER: &str = "/lib64/ld-linux-x86-64.so.2";
const FAR: &str = "10.5.0.9";
/// Of a transfer.
const BYTES: u32 = 200_000;
/// What the nested host's processor has beyond the model `epyc`.
const BEYOND_EPYC: &str = "+erms,+clwb";

/// Features that tell levels and models apart: name, register of CPUID as the dynamic loader numbers it, bit.
const FEATURES: &[(&str, &str, u32)] = &[
    ("sse4.2", "[0x0].cpuid[0x2]", 20),
    ("popcnt", "[0x0].cpuid[0x2]", 23),
    ("movbe", "[0x0].cpuid[0x2]", 22),
    ("aes", "[0x0].cpuid[0x2]", 25),
    ("xsave", "[0x0].cpuid[0x2]", 26),
    ("avx", "[0x0].cpuid[0x2]", 28),
    ("avx2", "[0x1].cpuid[0x1]", 5),
    ("bmi2", "[0x1].cpuid[0x1]", 8),
    ("sha-ni", "[0x1].cpuid[0x1]", 29),
    ("lzcnt", "[0x2].cpuid[0x2]", 5),
    ("erms", "[0x1].cpuid[0x1]", 9),
    ("clwb", "[0x1].cpuid[0x1]", 24),
];
/// How many of them, from the first, each shows.
const OF_V2: usize = 2;
const OF_EPYC: usize = 10;

/// A VM with a channel for each processor, whose address is 10.5.0.`number`.
fn vm(name: &str, number: u8, vcpus: u16, baseline: &str) -> VmSpec {
    let nic = VmNic::new("eth0", "lab", &format!("02:00:00:00:05:{number:02x}"));
    let vm = VmSpec::new(name).with(VmNic { queues: vcpus, ..nic }.at(&format!("{}/24", address(number))));
    let settings = format!("cpu.baseline = {baseline:?}");
    VmSpec { settings, vcpus: u32::from(vcpus), flavour: Flavour::Cloud, ..vm }
}

fn address(number: u8) -> String {
    format!("10.5.0.{number}")
}

#[test]
fn guests_have_the_processors_of_their_definition() -> Result<()> {
    let name = "guests_have_the_processors_of_their_definition";
    let vms = [
        vm("level", 1, 4, "x86-64-v2"),
        vm("model", 2, 8, "epyc"),
        vm("wide", 3, 1, "x86-64-v4"),
        vm("later", 4, 1, "epyc-rome"),
    ];
    let switch =
        "[switch.lab]\ntype = \"private\"\n[switch.lab.port.far]\ntap = { name = \"far\" }\n".to_owned();
    let config = vms.iter().fold(switch, |config, vm| config + &vm.config());
    let host = |usual: HostSpec| usual.epyc(BEYOND_EPYC);
    scene_on(name, host, &config, |host, yardd, steps| {
        let far = Namespace::new(host, "far")?;
        far.plug("far", &format!("{FAR}/24"))?;
        steps.step("what the host lacks of a level or model is named", || {
            refused(&yardd, "wide", "x86-64-v4: it lacks avx512f, avx512dq, avx512cd, avx512bw, avx512vl")?;
            refused(&yardd, "later", "epyc-rome: it lacks umip, rdpid, wbnoinvd")
        });
        let up = |name: &str, number: u8| -> Result<Guest> {
            let mut guest = yardd.start_vm(name)?;
            println!("guest: {:.1} s", guest.wait_ready(BOOT)?.as_secs_f64());
            wait_for("an answer", LIMIT, || {
                Ok(ping(&far, &address(number), Ping { count: 1, ..Ping::default() })?.received == 1)
            })?;
            Ok(guest)
        };
        let (level, model) = (up("level", 1)?, up("model", 2)?);
        steps.step("a guest of a level has its features, and no others of the host", || {
            of_level(host, &level)
        });
        steps.step("a guest of a model has its name and features", || of_model(&model));
        let talk =
            |guest, number, count| Talk { yardd: &yardd, guest, address: address(number), count, far: &far };
        let (four, eight) = (talk(&level, 1, 4), talk(&model, 2, 8));
        for talk in [&four, &eight] {
            let what = |what: &str| format!("{} processors: {what}", talk.count);
            steps.step(&what("all are there, cores of one socket"), || talk.all_run());
            steps.step(&what("each has a channel"), || talk.channels_are_spread(talk.count));
            steps.step(&what("ping and TCP"), || talk.transfers());
        }
        steps.step("8 processors: channels and interrupts are used", || eight.channels_are_used());
        steps.step("8 processors: three channels are left", || {
            eight.guest.check("ethtool -L eth0 combined 3", LIMIT)?;
            eight.channels_are_spread(3)?;
            eight.pings()
        });
        steps.step("no fault was reported", || {
            for guest in [&level, &model] {
                let shown = yardd.vm(guest.name())?;
                ensure!(shown["faults"].as_array().is_some_and(Vec::is_empty), "{shown:#}");
                guest.expect_content()?;
            }
            Ok(())
        });
        Ok(())
    })
}

fn refused(yardd: &Yardd, vm: &str, why: &str) -> Result<()> {
    let error = yardd.yard(&format!("vm start {vm}")).err().context("it starts")?;
    let why = format!("this host's processor cannot present {why}");
    // The sentence ends there, or goes on with when that was.
    ensure!(format!("{error:#}").contains(&format!("{why}, while")), "{error:#}");
    Ok(())
}

/// The features that a station's dynamic loader reads from CPUID. The kernel's list would not do: under this software CPU the
/// guests of every VMM, QEMU's too, find their XSAVE leaf at odds with itself, and go without AVX.
fn features(at: &dyn Station) -> Result<Vec<&'static str>> {
    let text = at.check(&format!("{LOADER} --list-diagnostics | grep x86.cpu_features.*cpuid"), LIMIT)?;
    let word = |register: &str| -> Result<u32> {
        let line = format!("x86.cpu_features.features{register}=0x");
        let word = text.lines().find_map(|shown| shown.strip_prefix(&line)).context("no such register")?;
        Ok(u32::from_str_radix(word, 16)?)
    };
    let shown = FEATURES.iter().map(|&(name, register, bit)| Ok((name, word(register)? & (1 << bit) != 0)));
    let shown = shown.collect::<Result<Vec<_>>>()?;
    Ok(shown.into_iter().filter_map(|(name, there)| there.then_some(name)).collect())
}

/// That of `FEATURES` the first `count` are shown, and no others.
fn shows(at: &dyn Station, count: usize) -> Result<()> {
    let expected = FEATURES.iter().take(count).map(|(name, ..)| *name);
    let shown = features(at)?;
    ensure!(expected.eq(shown.iter().copied()), "{} shows {shown:?}", at.name());
    Ok(())
}

/// What `/proc/cpuinfo` says of the first processor.
fn cpuinfo(at: &dyn Station) -> Result<BTreeMap<String, String>> {
    let text = at.check("sed '/^$/q' /proc/cpuinfo", LIMIT)?;
    let lines = text.lines().filter_map(|line| line.split_once(':'));
    Ok(lines.map(|(key, value)| (key.trim().to_owned(), value.trim().to_owned())).collect())
}

fn finds_hyperv(guest: &Guest) -> Result<()> {
    guest.check("dmesg | grep 'Hypervisor detected: Microsoft Hyper-V'", LIMIT).map(drop)
}

fn of_level(host: &Host, guest: &Guest) -> Result<()> {
    finds_hyperv(guest)?;
    shows(host, FEATURES.len())?;
    shows(guest, OF_V2)?;
    let (own, theirs) = (cpuinfo(guest)?, cpuinfo(host)?);
    let has = |flag: &str| own["flags"].split(' ').any(|shown| shown == flag);
    let whole = ["cx16", "lahf_lm", "popcnt", "pni", "ssse3", "sse4_1", "sse4_2"].into_iter().all(has);
    let beyond =
        ["abm", "adx", "aes", "bmi1", "f16c", "fsgsbase", "rdrand", "sha_ni", "smap", "smep", "sse4a"];
    ensure!(whole && !beyond.into_iter().any(has), "{own:#?}");
    for key in ["model name", "cpu family", "model", "stepping"] {
        ensure!(own[key] == theirs[key], "{key} of {own:#?}, {theirs:#?}");
    }
    guest.check(&format!("{LOADER} --help | grep 'x86-64-v2 (supported'"), LIMIT).map(drop)
}

fn of_model(guest: &Guest) -> Result<()> {
    finds_hyperv(guest)?;
    shows(guest, OF_EPYC)?;
    let own = cpuinfo(guest)?;
    for (key, expected) in
        [("model name", "AMD EPYC 7001 (Naples)"), ("cpu family", "23"), ("model", "1"), ("stepping", "2")]
    {
        ensure!(own[key] == expected, "{key} of {own:#?}");
    }
    Ok(())
}

/// A guest with `count` processors and channels, and a namespace that talks to it: two such guests would take minutes.
struct Talk<'a> {
    yardd: &'a Yardd,
    guest: &'a Guest,
    address: String,
    count: u16,
    far: &'a Namespace,
}

impl Talk<'_> {
    /// Each processor is online and runs a program.
    fn all_run(&self) -> Result<()> {
        let (count, last) = (self.count, self.count - 1);
        let line = format!(
            "cat /sys/devices/system/cpu/online; grep -c ^processor /proc/cpuinfo; cd /sys/devices/system/cpu; \
             for cpu in $(seq 0 {last}); do (cd cpu$cpu/topology; cat package_cpus_list thread_siblings_list); \
             busybox taskset -c $cpu cut -d ' ' -f 39 /proc/self/stat; done"
        );
        let each = |cpu| format!("0-{last}\n{cpu}\n{cpu}\n");
        let expected = format!("0-{last}\n{count}\n") + &(0..count).map(each).collect::<String>();
        let shown = self.guest.check(&line, LIMIT)?;
        ensure!(shown == expected, "{shown}");
        Ok(())
    }

    /// Each of `count` channels interrupts another processor.
    fn channels_are_spread(&self, count: u16) -> Result<()> {
        let shown = self.guest.channels()?;
        ensure!(shown == u64::from(count), "{shown} channels");
        let name = self.guest.name();
        self.yardd.wait_for_vm(name, "its channels", |vm| vm["nics"][0]["channels"] == count)?;
        let mut cpus = self.numbers("cat /sys/class/net/eth0/device/channels/*/cpu")?;
        cpus.sort_unstable();
        cpus.dedup();
        ensure!(cpus.len() == usize::from(count), "{cpus:?}");
        Ok(())
    }

    fn numbers(&self, line: &str) -> Result<Vec<u64>> {
        let text = self.guest.check(line, LIMIT)?;
        text.split_whitespace().map(|word| Ok(word.parse()?)).collect::<Result<_>>().context(text)
    }

    /// Connections come in through more than a quarter of the channels, and of the processors: who takes which is by chance.
    fn channels_are_used(&self) -> Result<()> {
        let lines = [
            "ethtool -S eth0 | sed -n 's/.*rx_queue_[0-9]*_packets: //p'",
            r"sed -n 's/ *HYP:\([ 0-9]*\).*/\1/p' /proc/interrupts",
        ];
        let counters = || lines.into_iter().map(|line| self.numbers(line)).collect::<Result<Vec<_>>>();
        let before = counters()?;
        iperf(self.guest, self.far, &self.address, Load::Tcp { streams: 8 }, 1)?;
        for (before, after) in before.into_iter().zip(counters()?) {
            ensure!(before.len() == usize::from(self.count), "{before:?}");
            let used = before.iter().zip(&after).filter(|(before, after)| **after > **before + 5).count();
            ensure!(used * 4 > usize::from(self.count), "{before:?}, then {after:?}");
        }
        Ok(())
    }

    fn pings(&self) -> Result<()> {
        for (from, address) in [(self.guest as &dyn Station, FAR), (self.far, &self.address)] {
            let report = ping(from, address, Ping::default())?;
            ensure!(report.received == report.sent, "{}: {report:?}", from.name());
        }
        Ok(())
    }

    /// TCP both ways at once.
    fn transfers(&self) -> Result<()> {
        self.pings()?;
        let there = Transfer::start(self.guest, self.far, FAR, BYTES)?;
        let back = Transfer::start(self.far, self.guest, &self.address, BYTES)?;
        there.finish().context("from the guest")?;
        back.finish().context("to the guest")
    }
}
