//! Managers that come after one that ended, in good order or not.

use std::path::PathBuf;

use super::*;

#[test]
fn later_manager_takes_running_vms_back_with_their_live_changes() {
    let (dir, _, vms) = start();
    vms.define(spec("configured", json!({ "cmdline": "one" }))).unwrap();
    vms.define(spec("live", json!({}))).unwrap();
    vms.start("configured").unwrap();
    vms.start("live").unwrap();
    vms.add_nic("live", nic_request(json!({ "name": "eth1", "switch": "lab" }), "live").unwrap()).unwrap();
    let workers = ["configured", "live"].map(|name| vms.show(name).unwrap().pid.unwrap());
    vms.end();
    drop(vms);
    assert!(workers.iter().all(|worker| test_kill_process(pid(*worker)).is_ok()));

    let network = Arc::new(FakeNetwork::default());
    let vms = manager(dir.path(), Arc::clone(&network));
    let _broom = Broom(&vms);
    let configured = vec![
        spec("configured", json!({ "cmdline": "two", "autostart": true })),
        spec("fresh", json!({ "autostart": true })),
        spec("broken", json!({ "autostart": true, "kernel": "/nonexistent" })),
    ];
    let problems = vms.begin(configured);
    assert_eq!(problems, ["vm.broken: /nonexistent: No such file or directory (os error 2)"]);
    let report = when_state(&vms, "configured", VmState::Running);
    assert_eq!((report.pid, report.cmdline.as_str(), report.changed), (Some(workers[0]), "one", true));
    let report = when_state(&vms, "live", VmState::Running);
    assert_eq!((report.pid, report.nics.len(), report.changed), (Some(workers[1]), 2, false));
    when_state(&vms, "fresh", VmState::Running);
    let heard = network.heard();
    for wanted in ["plug live.eth1", "serve live 2", "serve configured 1"] {
        assert!(heard.iter().any(|said| said == wanted), "{heard:?}");
    }
    // What an earlier daemon started dies without its status being known.
    kill_process(pid(workers[0]), Signal::KILL).unwrap();
    let again = |report: &VmReport| report.restarts == 1 && report.state == VmState::Running;
    assert_eq!(when(&vms, "configured", again).cmdline, "two");
}

#[test]
fn vm_that_died_while_nobody_watched_is_reported_and_started_again_by_policy() {
    let (dir, _, vms) = start();
    vms.define(spec("again", json!({}))).unwrap();
    vms.define(spec("never", json!({ "restart": "never" }))).unwrap();
    let workers = ["again", "never"].map(|name| {
        vms.start(name).unwrap();
        vms.show(name).unwrap().pid.unwrap()
    });
    vms.end();
    drop(vms);
    for worker in workers {
        kill_process(pid(worker), Signal::KILL).unwrap();
    }
    // They were children of this very process.
    while rustix::process::wait(rustix::process::WaitOptions::NOHANG).is_ok_and(|ended| ended.is_some()) {}
    std::thread::sleep(Duration::from_millis(50));
    let vms = manager(dir.path(), Arc::default());
    let _broom = Broom(&vms);
    assert!(vms.begin(Vec::new()).is_empty());
    when(&vms, "again", |report| report.restarts == 1 && report.state == VmState::Running);
    let report = vms.show("never").unwrap();
    assert_eq!(report.state, VmState::Off);
    assert!(report.reason.unwrap().starts_with("its worker ended while no yardd ran"));
}

/// Waits for a process that was this program's child.
fn bury(worker: u32) {
    kill_process(pid(worker), Signal::KILL).unwrap();
    let began = Instant::now();
    while test_kill_process(pid(worker)).is_ok() {
        let _ = rustix::process::waitpid(Some(pid(worker)), rustix::process::WaitOptions::NOHANG);
        assert!(began.elapsed() < Duration::from_secs(20), "process {worker} does not end");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn start_that_cannot_be_put_on_record_is_refused() {
    let (dir, _, vms) = start();
    vms.define(spec("web", json!({}))).unwrap();
    let directory = dir.path().join("vm/web");
    std::fs::create_dir_all(directory.join("setup.json~")).unwrap();
    let refused = vms.start("web").unwrap_err().to_string();
    assert!(refused.contains("setup.json"), "{refused}");
    assert!(!directory.join("control.sock").exists(), "what it left is removed");
    std::fs::remove_dir(directory.join("setup.json~")).unwrap();
    vms.start("web").unwrap();
    vms.stop("web").unwrap();
}

#[test]
fn vm_whose_record_is_not_understood_is_shown_and_not_started_twice() {
    let (dir, _, vms) = start();
    let workers = ["live", "web"].map(|name| {
        vms.define(spec(name, json!({}))).unwrap();
        vms.start(name).unwrap();
        vms.show(name).unwrap().pid.unwrap()
    });
    vms.end();
    drop(vms);
    let records = ["live", "web"].map(|name| dir.path().join("vm").join(name).join("setup.json"));
    for record in &records {
        let text = std::fs::read_to_string(record).unwrap();
        std::fs::write(record, text.replace("\"huge\"", "\"later\"")).unwrap();
    }
    let vms = manager(dir.path(), Arc::default());
    let problems = vms.begin(vec![spec("web", json!({ "autostart": true }))]);
    assert_eq!(problems.len(), 2, "{problems:?}");
    for ((problem, name), worker) in problems.iter().zip(["live", "web"]).zip(workers) {
        let expected = format!(
            "vm.{name}: the record of its last run is not understood, so its worker, process {worker},"
        );
        assert!(problem.starts_with(&expected) && problem.contains("unknown field `later`"), "{problem}");
    }
    let list = vms.list();
    assert_eq!((list[0].name.as_str(), list[0].state), ("live", VmState::Unknown));
    assert!(list[0].reason.as_ref().unwrap().contains("is not understood"), "{list:#?}");
    assert_eq!((list[1].name.as_str(), list[1].state), ("web", VmState::Off));
    assert!(list[1].warnings[0].contains("is not understood"), "{list:#?}");
    vms.define(spec("live", json!({}))).unwrap();
    for ((name, worker), record) in ["live", "web"].into_iter().zip(workers).zip(&records) {
        assert!(vms.start(name).unwrap_err().to_string().contains("is not understood"));
        assert!(vms.delete(name).unwrap_err().to_string().contains("is not understood"));
        bury(worker);
        std::fs::remove_file(record).unwrap();
        vms.start(name).unwrap();
        vms.stop(name).unwrap();
    }
}

#[test]
fn vm_with_a_worker_on_record_gets_no_second() {
    let (dir, _, vms) = start();
    vms.define(spec("web", json!({}))).unwrap();
    vms.start("web").unwrap();
    let worker = vms.show("web").unwrap().pid.unwrap();
    vms.end();
    drop(vms);
    let vms = manager(dir.path(), Arc::default());
    vms.define(spec("web", json!({}))).unwrap();
    let refused = vms.start("web").unwrap_err().to_string();
    assert_eq!(refused, format!("process {worker}, its worker, is there already"));
    bury(worker);
    vms.start("web").unwrap();
    vms.stop("web").unwrap();
}

/// A manager whose VM `web` is about to end, at `order`, when the manager goes.
fn ending(more: Value, order: impl FnOnce(&Manager) + Send) -> (TempDir, u32) {
    let dir = tempfile::tempdir().unwrap();
    let mut settings = settings(dir.path(), Arc::default());
    settings.patience.closing = Duration::from_secs(60);
    let vms = Manager::new(settings);
    vms.define(spec("web", more)).unwrap();
    vms.start("web").unwrap();
    vms.command("web", value("deaf to its first daemon")).unwrap();
    let worker = vms.show("web").unwrap().pid.unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| order(&vms));
        when_state(&vms, "web", VmState::Stopping);
        vms.end();
    });
    (dir, worker)
}

/// How the VM ends for the next manager.
fn ended(dir: &TempDir) -> (Option<String>, u32) {
    let vms = manager(dir.path(), Arc::default());
    assert!(vms.begin(Vec::new()).is_empty());
    let report = when_state(&vms, "web", VmState::Off);
    (report.reason, report.restarts)
}

#[test]
fn vm_that_was_being_stopped_is_stopped_by_the_next_manager() {
    let stop = |vms: &Manager| drop(vms.stop("web"));
    let (dir, _) = ending(json!({ "restart": "always" }), stop);
    assert_eq!(ended(&dir), (None, 0));
    let (dir, worker) = ending(json!({ "restart": "always" }), stop);
    bury(worker);
    assert_eq!(ended(&dir), (None, 0));
}

#[test]
fn vm_that_switched_itself_off_stays_off_for_the_next_manager() {
    let off = |vms: &Manager| drop(vms.command("web", value("off")));
    let itself = Some("its guest switched itself off".to_owned());
    let (dir, _) = ending(json!({}), off);
    assert_eq!(ended(&dir), (itself.clone(), 0));
    let (dir, worker) = ending(json!({}), off);
    bury(worker);
    assert_eq!(ended(&dir), (itself, 0));
    // It was asked to.
    let shutdown = |vms: &Manager| drop(vms.command("web", Command::Shutdown { reboot: false }));
    let (dir, worker) = ending(json!({ "restart": "always" }), shutdown);
    bury(worker);
    assert_eq!(ended(&dir), (None, 0));
}

#[test]
fn worker_that_cannot_be_reached_is_ended_and_started_again_by_policy() {
    let (dir, _, vms) = start();
    let workers = ["again", "never"].map(|name| {
        let policy = if name == "never" { name } else { "on-crash" };
        vms.define(spec(name, json!({ "restart": policy }))).unwrap();
        vms.start(name).unwrap();
        std::fs::remove_file(dir.path().join("vm").join(name).join("control.sock")).unwrap();
        vms.show(name).unwrap().pid.unwrap()
    });
    vms.end();
    drop(vms);
    let vms = manager(dir.path(), Arc::default());
    let _broom = Broom(&vms);
    assert!(vms.begin(Vec::new()).is_empty());
    let report = when(&vms, "again", |report| report.restarts == 1 && report.state == VmState::Running);
    assert_ne!(report.pid, Some(workers[0]));
    let report = when_state(&vms, "never", VmState::Off);
    assert!(report.reason.unwrap().starts_with("its worker could not be reached, and was ended:"));
}

/// A hierarchy of control groups whose groups lack the files of the kernel's: nothing can be set, all can be removed.
fn bare_groups(dir: &TempDir) -> (Settings, PathBuf) {
    let root = dir.path().join("cgroup");
    std::fs::create_dir_all(root.join("switchyard")).unwrap();
    for (file, text) in [("cgroup.controllers", "cpu"), ("cgroup.subtree_control", "cpu")] {
        std::fs::write(root.join(file), text).unwrap();
        std::fs::write(root.join("switchyard").join(file), text).unwrap();
    }
    let cgroups = Cgroups::below(&root);
    (Settings { cgroups, ..settings(dir.path(), Arc::default()) }, root.join("switchyard/web"))
}

#[test]
fn control_group_goes_with_its_worker_however_that_ends() {
    let dir = tempfile::tempdir().unwrap();
    let (settings, group) = bare_groups(&dir);
    let vms = Manager::new(settings);
    vms.define(spec("web", json!({ "kernel": "/nonexistent" }))).unwrap();
    vms.start("web").unwrap_err();
    assert!(!group.exists(), "a start that failed");
    std::fs::create_dir(&group).unwrap();
    vms.delete("web").unwrap();
    assert!(!group.exists(), "a VM that was deleted");
    vms.define(spec("web", json!({ "restart": "never" }))).unwrap();
    vms.start("web").unwrap();
    let report = vms.show("web").unwrap();
    assert!(group.exists() && report.warnings[0].contains("cpu.weight"), "{:?}", report.warnings);
    vms.stop("web").unwrap();
    assert!(!group.exists(), "a VM that was stopped");
    vms.start("web").unwrap();
    let worker = vms.show("web").unwrap().pid.unwrap();
    drop(vms);
    bury(worker);
    assert!(group.exists());
    let vms = Manager::new(bare_groups(&dir).0);
    assert!(vms.begin(Vec::new()).is_empty());
    when_state(&vms, "web", VmState::Off);
    assert!(!group.exists(), "a worker that died while nobody watched");
}
