//! The manager of virtual machines, with played workers over the real sockets.

#![allow(clippy::unwrap_used, reason = "a failure to set up is a failure of the test")]

mod support;
#[path = "vm/takeover.rs"]
mod takeover;

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use host::api::{Backend, Limits};
use host::config::{nic_change_request, nic_request, vm_request};
use host::vm::spec::{LinkState, VmChange, VmSpec};
use host::vm::{Cgroups, Manager, PagePolicy, Settings, VmReport, VmState};
use hypervisor::control::Command;
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use rustix::termios::{LocalModes, tcgetattr};
use serde_json::{Value, json};
use support::played::{FakeNetwork, definition, manager, settings, until};
use support::{Fake, Server, terminal};
use tempfile::TempDir;
use vswitch::spec::{Attachment, PortSpec};

fn start() -> (TempDir, Arc<FakeNetwork>, Manager) {
    let dir = tempfile::tempdir().unwrap();
    let network = Arc::new(FakeNetwork::default());
    let manager = manager(dir.path(), Arc::clone(&network));
    (dir, network, manager)
}

fn spec(name: &str, more: Value) -> VmSpec {
    vm_request(definition(name, more), &[0, 1]).unwrap()
}

fn value(key: &str) -> Command {
    Command::SetValue { key: key.into(), value: Some("now".into()) }
}

/// The VM's report once `wanted` is true of it.
fn when(vms: &Manager, name: &str, wanted: impl Fn(&VmReport) -> bool) -> VmReport {
    let began = Instant::now();
    loop {
        let report = vms.show(name).unwrap();
        if wanted(&report) {
            return report;
        }
        assert!(began.elapsed() < Duration::from_secs(20), "{report:#?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn when_state(vms: &Manager, name: &str, state: VmState) -> VmReport {
    when(vms, name, |report| report.state == state)
}

fn pid(number: u32) -> Pid {
    Pid::from_raw(i32::try_from(number).unwrap()).unwrap()
}

/// Ends what a test left running.
struct Broom<'a>(&'a Manager);

impl Drop for Broom<'_> {
    fn drop(&mut self) {
        for report in self.0.list() {
            let _ = self.0.stop(&report.name);
        }
    }
}

#[test]
fn vm_lives_from_its_definition_to_its_deletion() {
    let (dir, network, vms) = start();
    let _broom = Broom(&vms);
    vms.define(spec("web", json!({}))).unwrap();
    assert_eq!(network.heard(), ["plug web.eth0"]);
    assert_eq!(vms.show("web").unwrap().state, VmState::Off);
    assert_eq!(vms.stop("web").unwrap_err().to_string(), "VM `web` is off, expected running");
    vms.start("web").unwrap();
    assert_eq!(network.heard(), ["plug web.eth0", "serve web 1"]);
    let report = when_state(&vms, "web", VmState::Running);
    assert_eq!(report.guest.os.as_deref(), Some("Debian GNU/Linux 13"));
    assert_eq!(report.guest.addresses, ["192.0.2.7", "198.51.100.7"]);
    assert_eq!((report.vmbus.as_deref(), report.uptime), (Some("5.3"), Some(3700.0)));
    assert!(report.warnings[0].contains("no control group: this is a test"), "{:?}", report.warnings);
    assert!(vms.start("web").unwrap_err().to_string().contains("is running, expected off"));
    vms.command("web", Command::Pause).unwrap();
    when_state(&vms, "web", VmState::Paused);
    assert_eq!(vms.command("web", Command::Pause).unwrap_err().to_string(), "the VM is paused already");
    vms.command("web", Command::Resume).unwrap();
    when_state(&vms, "web", VmState::Running);
    assert!(vms.delete("web").unwrap_err().to_string().contains("expected off"));
    vms.command("web", Command::Shutdown { reboot: false }).unwrap();
    assert_eq!(when_state(&vms, "web", VmState::Off).reason, None);
    let log = std::fs::read_to_string(dir.path().join("vm/web/serial.log")).unwrap();
    assert_eq!(log, "Linux version\n");
    vms.delete("web").unwrap();
    assert!(network.heard().contains(&"unplug web.eth0".to_owned()));
    assert!(!dir.path().join("vm/web").exists());
    assert_eq!(vms.show("web").unwrap_err().to_string(), "there is no VM `web`");
}

#[test]
fn definition_without_its_switch_is_refused_and_leaves_no_port() {
    let (_dir, network, vms) = start();
    let nics = json!([{ "name": "a", "switch": "lab" }, { "name": "b", "switch": "none" }]);
    let refused = vms.define(spec("web", json!({ "nic": nics }))).unwrap_err();
    assert_eq!(refused.to_string(), "adapter `b`: there is no switch `none`");
    assert_eq!(network.heard(), ["plug web.a", "unplug web.a"]);
    assert!(vms.list().is_empty());
}

#[test]
fn start_that_fails_says_why() {
    let (_dir, _, vms) = start();
    let _broom = Broom(&vms);
    for (name, more, expected) in [
        ("nowhere", json!({ "kernel": "/nonexistent/vmlinuz" }), "/nonexistent/vmlinuz: No such file"),
        (
            "died",
            json!({ "cmdline": "die-at-once" }),
            "its worker ended with exit status 7; its last word: no room for the guest's memory",
        ),
        ("refused", json!({ "cmdline": "refuse-start", "restart": "always" }), "the kernel is no bzImage"),
        ("greedy", json!({ "vcpus": 3, "cpu": { "reserve": 100 } }), "300 % of a processor are wanted"),
    ] {
        vms.define(spec(name, more)).unwrap();
        let said = vms.start(name).unwrap_err().to_string();
        // A worker that dies may do so before its connection is made.
        let report = when_state(&vms, name, VmState::Off);
        assert!(said.contains(expected), "{name}: {said}");
        assert!(report.reason.unwrap().contains(expected), "{name}");
    }
}

#[test]
fn worker_that_dies_is_reported_and_stays_off_by_policy() {
    let (_dir, _, vms) = start();
    vms.define(spec("web", json!({ "restart": "never" }))).unwrap();
    vms.start("web").unwrap();
    assert!(vms.command("web", value("die")).is_err());
    let report = when_state(&vms, "web", VmState::Off);
    assert_eq!(
        report.reason.as_deref(),
        Some("its worker ended with exit status 9; its last word: a bug in the worker, while it was running")
    );
    vms.start("web").unwrap();
    let worker = when_state(&vms, "web", VmState::Running).pid.unwrap();
    kill_process(pid(worker), Signal::KILL).unwrap();
    let report = when_state(&vms, "web", VmState::Off);
    assert!(report.reason.as_ref().unwrap().starts_with("its worker was ended by SIGKILL"), "{report:?}");
}

#[test]
fn worker_that_dies_is_started_again_by_policy() {
    let (_dir, _, vms) = start();
    let _broom = Broom(&vms);
    vms.define(spec("web", json!({}))).unwrap();
    vms.start("web").unwrap();
    for time in 1..=3 {
        let before = when_state(&vms, "web", VmState::Running).pid.unwrap();
        kill_process(pid(before), Signal::KILL).unwrap();
        let again = |report: &VmReport| {
            report.state == VmState::Running && report.pid.is_some_and(|pid| pid != before)
        };
        assert_eq!(when(&vms, "web", again).restarts, time);
    }
    vms.stop("web").unwrap();
    let report = vms.show("web").unwrap();
    assert_eq!((report.state, report.reason), (VmState::Off, None));
}

#[test]
fn crashed_guest_is_kept_or_started_again_by_policy() {
    let (_dir, _, vms) = start();
    let _broom = Broom(&vms);
    vms.define(spec("kept", json!({ "restart": "never" }))).unwrap();
    vms.start("kept").unwrap();
    vms.command("kept", value("crash")).unwrap();
    let report = when_state(&vms, "kept", VmState::Crashed);
    assert_eq!(report.reason.as_deref(), Some("kernel panic"));
    assert_eq!(report.panic.unwrap().parameters, [1, 2, 3, 4, 5]);
    vms.command("kept", Command::Reset).unwrap();
    when_state(&vms, "kept", VmState::Running);

    vms.define(spec("again", json!({}))).unwrap();
    vms.start("again").unwrap();
    vms.command("again", value("crash")).unwrap();
    when(&vms, "again", |report| report.restarts == 1 && report.state == VmState::Running);
}

#[test]
fn guest_that_switches_itself_off_is_started_again_if_it_is_always_to_run() {
    let (_dir, _, vms) = start();
    let _broom = Broom(&vms);
    vms.define(spec("web", json!({ "restart": "always" }))).unwrap();
    vms.start("web").unwrap();
    vms.command("web", value("off")).unwrap();
    when(&vms, "web", |report| report.restarts == 1 && report.state == VmState::Running);
    vms.define(spec("once", json!({}))).unwrap();
    vms.start("once").unwrap();
    vms.command("once", value("off")).unwrap();
    let report = when_state(&vms, "once", VmState::Off);
    assert_eq!(report.reason.as_deref(), Some("its guest switched itself off"));
    vms.command("web", Command::Shutdown { reboot: false }).unwrap();
    when_state(&vms, "web", VmState::Off);
}

#[test]
fn worker_that_speaks_nonsense_is_ended() {
    let (_dir, _, vms) = start();
    vms.define(spec("web", json!({ "restart": "never" }))).unwrap();
    vms.start("web").unwrap();
    let _ = vms.command("web", value("nonsense"));
    let report = when_state(&vms, "web", VmState::Off);
    assert!(report.reason.as_ref().unwrap().starts_with("its worker speaks nonsense"), "{report:?}");
}

#[test]
fn worker_that_hangs_is_shown_and_can_be_stopped() {
    let (_dir, _, vms) = start();
    vms.define(spec("web", json!({}))).unwrap();
    vms.define(spec("other", json!({}))).unwrap();
    vms.start("web").unwrap();
    let refused = vms.command("web", value("hang")).unwrap_err().to_string();
    assert!(refused.contains("does not answer; `yard vm stop web` ends it"), "{refused}");
    let list = vms.list();
    assert_eq!(list.iter().map(|report| report.name.as_str()).collect::<Vec<_>>(), ["other", "web"]);
    assert!(list[1].warnings.contains(&"its worker does not answer".to_owned()), "{:?}", list[1]);
    vms.stop("web").unwrap();
    assert_eq!(vms.show("web").unwrap().state, VmState::Off);
}

#[test]
fn faults_are_shown_once_and_forgotten_with_the_next_run() {
    let (_dir, _, vms) = start();
    let _broom = Broom(&vms);
    vms.define(spec("web", json!({}))).unwrap();
    vms.start("web").unwrap();
    vms.command("web", value("fault")).unwrap();
    let report = when(&vms, "web", |report| !report.faults.is_empty());
    assert_eq!(report.faults.len(), 1);
    assert_eq!(report.faults[0].device, "eth0");
    vms.stop("web").unwrap();
    vms.start("web").unwrap();
    assert!(vms.show("web").unwrap().faults.is_empty());
}

#[test]
fn faults_without_end_are_remembered_in_part() {
    let (_dir, _, vms) = start();
    let _broom = Broom(&vms);
    vms.define(spec("web", json!({}))).unwrap();
    vms.start("web").unwrap();
    vms.command("web", value("faults without end")).unwrap();
    let report = when(&vms, "web", |report| report.faults.len() == 64);
    assert!(report.faults.iter().all(|fault| fault.reason.chars().count() == 1024));
}

#[test]
fn adapters_come_go_and_change_while_the_vm_runs() {
    let (_dir, network, vms) = start();
    let _broom = Broom(&vms);
    vms.define(spec("web", json!({}))).unwrap();
    vms.start("web").unwrap();
    network.heard();
    let nic = |json| nic_request(json, "web").unwrap();
    vms.add_nic("web", nic(json!({ "name": "eth1", "switch": "lab" }))).unwrap();
    let twice = vms.add_nic("web", nic(json!({ "name": "eth1", "switch": "lab" }))).unwrap_err();
    assert_eq!(twice.to_string(), "adapter `eth1` exists already");
    let refused = vms.add_nic("web", nic(json!({ "name": "refused", "switch": "lab" }))).unwrap_err();
    assert_eq!(refused.to_string(), "the guest has no driver");
    let legacy = nic(json!({ "name": "eth2", "switch": "lab", "type": "legacy" }));
    let late = vms.add_nic("web", legacy.clone()).unwrap_err().to_string();
    assert!(late.contains("a legacy adapter cannot be plugged in"), "{late}");
    vms.change_nic("web", "eth1", nic_change_request(json!({ "mtu": 9000 })).unwrap()).unwrap();
    let report = vms.show("web").unwrap();
    assert_eq!(report.nics.iter().map(|nic| nic.mtu).collect::<Vec<_>>(), [1500, 9000]);
    vms.remove_nic("web", "eth0").unwrap();
    assert_eq!(vms.remove_nic("web", "eth0").unwrap_err().to_string(), "there is no adapter `eth0`");
    assert_eq!(
        network.heard(),
        [
            "plug web.eth1",
            "plug web.refused",
            "unplug web.refused",
            "change web.eth1 Some(9000)",
            "unplug web.eth0"
        ]
    );
    vms.stop("web").unwrap();
    vms.add_nic("web", legacy).unwrap();
    vms.start("web").unwrap();
    assert!(network.heard().contains(&"legacy web.eth2".to_owned()));
    let report = when(&vms, "web", |report| report.nics.iter().any(|nic| nic.connected));
    assert_eq!(report.nics.iter().map(|nic| nic.name.as_str()).collect::<Vec<_>>(), ["eth1", "eth2"]);
}

#[test]
fn links_go_down_and_up_and_stay_so_for_a_later_manager() {
    let (dir, network, vms) = start();
    let nics = json!([
        { "name": "eth0", "switch": "lab", "link": "down" },
        { "name": "eth1", "switch": "lab", "type": "legacy", "link": "down" },
        { "name": "eth2", "switch": "lab" },
    ]);
    vms.define(spec("web", json!({ "nic": nics }))).unwrap();
    vms.start("web").unwrap();
    let links = |vms: &Manager| vms.show("web").unwrap().nics.iter().map(|nic| nic.link).collect::<Vec<_>>();
    let told = |vms: &Manager| {
        let values = vms.show("web").unwrap().guest.values;
        values.into_iter().filter(|(key, _)| key == "link eth1").map(|(_, up)| up).collect::<Vec<_>>()
    };
    let (up, down) = (LinkState::Up, LinkState::Down);
    assert_eq!((links(&vms), told(&vms)), (vec![down, down, up], vec!["false".into()]));
    let set = |vms: &Manager, nic: &str, link: &str| {
        vms.change_nic("web", nic, nic_change_request(json!({ "link": link })).unwrap()).unwrap();
    };
    set(&vms, "eth0", "up");
    set(&vms, "eth1", "up");
    set(&vms, "eth2", "down");
    let heard = network.heard().into_iter().filter(|said| said.starts_with("link")).collect::<Vec<_>>();
    assert_eq!(heard, ["link web.eth0 down", "link web.eth0 up", "link web.eth2 down"]);
    assert_eq!((links(&vms), told(&vms)), (vec![up, up, down], vec!["false".into(), "true".into()]));
    vms.end();
    drop(vms);

    let network = Arc::new(FakeNetwork::default());
    let vms = manager(dir.path(), Arc::clone(&network));
    let _broom = Broom(&vms);
    assert!(vms.begin(Vec::new()).is_empty());
    when_state(&vms, "web", VmState::Running);
    assert_eq!(links(&vms), [up, up, down]);
    assert!(network.heard().contains(&"link web.eth2 down".to_owned()));
}

#[test]
fn address_of_an_adapter_changes_while_the_vm_is_off() {
    let (_dir, network, vms) = start();
    let _broom = Broom(&vms);
    let nics = json!([{ "name": "eth0", "switch": "lab" }, { "name": "eth1", "switch": "lab" }]);
    vms.define(spec("web", json!({ "nic": nics }))).unwrap();
    let set = |mac: &str| {
        let change = nic_change_request(json!({ "mac": mac, "mtu": 9000 })).unwrap();
        vms.change_nic("web", "eth1", change)
    };
    let (first, second) = ("02:00:00:00:00:07", "02:00:00:00:00:08");
    network.heard();
    set(first).unwrap();
    assert_eq!(network.heard(), ["unplug web.eth1", "plug web.eth1"]);
    let nics = vms.show("web").unwrap().nics;
    assert_eq!((nics[1].mac.as_str(), nics[1].mtu), (first, 9000));
    let taken = set(&nics[0].mac).unwrap_err().to_string();
    assert!(taken.contains("is the address of eth0 already"), "{taken}");
    vms.start("web").unwrap();
    set(first).unwrap();
    let refused = set(second).unwrap_err().to_string();
    assert!(refused.contains("VM `web` is running, expected off: drivers ask"), "{refused}");
    assert_eq!(vms.show("web").unwrap().nics[1].mac, first);
    vms.stop("web").unwrap();
    set(second).unwrap();
    assert_eq!(vms.show("web").unwrap().nics[1].mac, second);
}

#[test]
fn vm_whose_supervisor_does_not_answer_is_listed_as_unknown() {
    let (_dir, network, vms) = start();
    vms.define(spec("stuck", json!({}))).unwrap();
    vms.define(spec("web", json!({}))).unwrap();
    let slow = network.slow.lock().unwrap();
    std::thread::scope(|scope| {
        let change = nic_change_request(json!({ "mtu": 9000 })).unwrap();
        scope.spawn(|| vms.change_nic("stuck", "eth0", change).unwrap());
        // The order is on its way before the question is.
        let list = loop {
            let list = vms.list();
            if list[0].state != VmState::Off {
                break list;
            }
        };
        let states: Vec<_> = list.iter().map(|report| (report.name.as_str(), report.state)).collect();
        assert_eq!(states, [("stuck", VmState::Unknown), ("web", VmState::Off)]);
        assert!(list[0].warnings[0].contains("its supervisor does not answer"), "{:?}", list[0].warnings);
        drop(slow);
    });
    assert_eq!(vms.list()[0].nics[0].mtu, 9000);
}

#[test]
fn shutdown_that_the_worker_refused_does_not_count_as_wanted() {
    let (_dir, _, vms) = start();
    let _broom = Broom(&vms);
    vms.define(spec("web", json!({ "restart": "always" }))).unwrap();
    vms.start("web").unwrap();
    vms.command("web", value("stubborn")).unwrap();
    let refused = vms.command("web", Command::Shutdown { reboot: false }).unwrap_err();
    assert_eq!(refused.to_string(), "the guest is busy");
    vms.command("web", value("off")).unwrap();
    when(&vms, "web", |report| report.restarts == 1 && report.state == VmState::Running);
}

#[test]
fn memory_and_shares_change_within_their_bounds() {
    let (_dir, _, vms) = start();
    let _broom = Broom(&vms);
    vms.define(spec("web", json!({}))).unwrap();
    vms.define(spec("fixed", json!({ "memory": "64M" }))).unwrap();
    let memory = |bytes| VmChange { memory: Some(bytes), ..VmChange::default() };
    vms.start("web").unwrap();
    vms.set("web", memory(96 << 20)).unwrap();
    assert_eq!(vms.show("web").unwrap().memory.assigned, Some(96 << 20));
    let far = vms.set("web", memory(256 << 20)).unwrap_err().to_string();
    assert_eq!(far, "memory: 256 MiB is out of range, expected 32 to 128 MiB");
    vms.set("fixed", memory(80 << 20)).unwrap();
    assert_eq!(vms.show("fixed").unwrap().memory.configured.maximum, 80 << 20);
    vms.start("fixed").unwrap();
    assert!(vms.set("fixed", memory(96 << 20)).unwrap_err().to_string().contains("is not dynamic"));
    vms.set("web", VmChange { weight: Some(300), limit: Some(50), ..VmChange::default() }).unwrap();
    let report = vms.show("web").unwrap();
    assert_eq!((report.cpu.weight, report.cpu.limit, report.changed), (300, 50, false));
    vms.set("web", VmChange { reserve: Some(50), ..VmChange::default() }).unwrap();
    let too_much = vms.set("fixed", VmChange { reserve: Some(60), ..VmChange::default() });
    assert!(too_much.unwrap_err().to_string().contains("only 100 of the host's 200 %"));
}

#[test]
fn service_of_channels_that_ends_is_begun_again() {
    let (_dir, network, vms) = start();
    let _broom = Broom(&vms);
    vms.define(spec("web", json!({}))).unwrap();
    vms.start("web").unwrap();
    network.heard();
    network.break_channels("a message of unknown kind 77");
    let began = Instant::now();
    while !network.heard().contains(&"serve web 1".to_owned()) {
        assert!(began.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn console_is_reached_through_its_socket() {
    let (_dir, _, vms) = start();
    let _broom = Broom(&vms);
    vms.define(spec("web", json!({}))).unwrap();
    vms.start("web").unwrap();
    let mut console = UnixStream::connect(vms.show("web").unwrap().console).unwrap();
    console.write_all(b"ls\n").unwrap();
    assert_eq!(until(&mut console, "ls"), "heard ls");
}

#[test]
fn deletion_that_fails_leaves_a_vm_that_can_be_deleted() {
    let (dir, network, vms) = start();
    vms.define(spec("web", json!({}))).unwrap();
    // A file in its place.
    std::fs::write(dir.path().join("vm/web"), "").unwrap();
    let refused = vms.delete("web").unwrap_err().to_string();
    assert!(refused.contains("vm/web"), "{refused}");
    assert_eq!(vms.show("web").unwrap().state, VmState::Off);
    assert_eq!(network.heard(), ["plug web.eth0"]);
    std::fs::remove_file(dir.path().join("vm/web")).unwrap();
    vms.delete("web").unwrap();
    assert!(vms.list().is_empty());
}

#[test]
fn workers_have_users_of_their_own_and_keep_them_for_a_later_manager() {
    let (dir, _, vms) = start();
    for name in ["db", "late", "web"] {
        vms.define(spec(name, json!({}))).unwrap();
        vms.start(name).unwrap();
    }
    let users = |vms: &Manager| ["db", "web"].map(|name| vms.show(name).unwrap().user.unwrap());
    let first = users(&vms);
    assert_ne!(first[0], first[1]);
    vms.stop("db").unwrap();
    assert_eq!(vms.show("db").unwrap().user, None);
    vms.start("db").unwrap();
    let late = vms.show("late").unwrap().user.unwrap();
    vms.stop("late").unwrap();
    vms.end();
    drop(vms);
    // Two names may come to the same number.
    let record = dir.path().join("vm/web/setup.json");
    let text = std::fs::read_to_string(&record).unwrap();
    std::fs::write(&record, text.replace(&first[1].to_string(), &late.to_string())).unwrap();
    let vms = manager(dir.path(), Arc::default());
    let _broom = Broom(&vms);
    assert!(vms.begin(vec![spec("late", json!({ "autostart": true }))]).is_empty());
    assert_eq!(users(&vms), [first[0], late]);
    assert_eq!(when_state(&vms, "late", VmState::Running).user, Some(late + 1));
}

#[test]
fn restarted_port_of_a_legacy_adapter_is_connected_again() {
    let fake = Fake::with_lab();
    let server = Server::start(Arc::clone(&fake), Limits::default());
    let nics = json!(["eth0", "eth1"].map(|name| json!({ "name": name, "switch": "lab", "type": "legacy" })));
    for name in ["web", "web.two"] {
        server.vms.define(spec(name, json!({ "nic": nics }))).unwrap();
        server.vms.start(name).unwrap();
        let attachment = Attachment::Legacy { vm: name.into(), nic: "eth1".into() };
        fake.add_port("lab", PortSpec::new(format!("{name}.eth1"), attachment)).unwrap();
    }
    server.network.heard();
    let restarted = server.send("POST", "/v1/switches/lab/ports/web.two.eth1/restart", "");
    assert_eq!(restarted.status, 204, "{restarted:?}");
    for name in ["web", "web.two"] {
        server.vms.show(name).unwrap();
    }
    assert_eq!(server.network.heard(), ["legacy web.two.eth1"]);
}

#[test]
fn host_that_gives_small_pages_is_warned_of_if_a_vm_asks_for_huge_ones() {
    let dir = TempDir::new().unwrap();
    let policy = dir.path().join("shmem_enabled");
    std::fs::write(&policy, "always advise [never]\n").unwrap();
    let vms = Manager::new(Settings {
        pages: PagePolicy::told_by(&policy),
        ..settings(dir.path(), Arc::new(FakeNetwork::default()))
    });
    vms.define(spec("dynamic", json!({}))).unwrap();
    vms.define(spec("pool", json!({ "memory": { "startup": "64M", "huge": true } }))).unwrap();
    assert!(vms.warnings().is_empty(), "neither asks: {:?}", vms.warnings());
    vms.define(spec("web", json!({ "memory": "64M" }))).unwrap();
    assert!(matches!(&vms.warnings()[..], [told] if told.contains("small pages")), "{:?}", vms.warnings());
    std::fs::write(&policy, "always [advise] never\n").unwrap();
    assert!(vms.warnings().is_empty());
}

#[test]
fn console_on_a_terminal_passes_every_key_and_leaves_the_terminal_as_it_was() {
    let server = Server::start(Fake::with_lab(), Limits::default());
    server.vms.define(spec("web", json!({}))).unwrap();
    server.vms.start("web").unwrap();
    let (mut screen, terminal, _) = terminal::open();
    let modes = || {
        let now = tcgetattr(&terminal).unwrap();
        (now.input_modes, now.output_modes, now.local_modes)
    };
    let before = modes();
    let mut console = std::process::Command::new(env!("CARGO_BIN_EXE_yard"))
        .args(["vm", "console", "web"])
        .env("YARD_SOCKET", &server.socket)
        .stdin(terminal.try_clone().unwrap())
        .stdout(terminal.try_clone().unwrap())
        .stderr(terminal.try_clone().unwrap())
        .spawn()
        .unwrap();
    until(&mut screen, "Ctrl-] leaves.\r\n");
    let local = modes().2;
    assert!(!local.intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG), "{local:?}");
    // Ctrl-C is for the guest; what is typed comes back from there alone.
    screen.write_all(b"a\x03b\n").unwrap();
    assert_eq!(until(&mut screen, "b\n"), "heard a\x03b\n");
    screen.write_all(b"\x1d").unwrap();
    assert!(console.wait().unwrap().success());
    assert_eq!(modes(), before);
}
