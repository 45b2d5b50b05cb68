//! `yard` as a program, over a stand-in for the switch.

#![allow(clippy::unwrap_used, reason = "a failure to set up is a failure of the test")]

mod support;

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use host::api::Limits;
use host::cli::manual;
use host::config::reference;
use support::{Fake, Server, assert_file};
use vswitch::pcap::Reader;

fn yard(socket: &Path, words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_yard"))
        .args(words)
        .env("YARD_SOCKET", socket)
        .env_remove("NO_COLOR")
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn start() -> (Arc<Fake>, Server) {
    let fake = Fake::with_lab();
    let server = Server::start(Arc::clone(&fake), Limits::default());
    (fake, server)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Standard output of a command that succeeds.
fn said(socket: &Path, words: &[&str]) -> String {
    let output = yard(socket, words);
    assert!(output.status.success(), "{words:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

#[test]
fn help_of_every_command_is_as_recorded() {
    let helps: Vec<_> =
        manual::helps().into_iter().map(|(name, help)| format!("==== {name}\n{help}")).collect();
    assert_file("tests/snapshots/help.txt", &helps.join("\n"));
}

#[test]
fn documents_are_as_the_program_says() {
    assert_file("../docs/operators/yard.md", &manual::markdown());
    assert_file("../docs/operators/configuration.md", &reference::markdown());
}

#[test]
fn tables_are_as_recorded() {
    let (_, server) = start();
    for (words, name) in [
        (["show"].as_slice(), "show"),
        (&["switch", "list"], "switch-list"),
        (&["port", "list"], "port-list"),
        (&["port", "show", "lab/red"], "port-show"),
        (&["queue", "show"], "queue-show"),
        (&["stats"], "stats"),
    ] {
        let table = said(&server.socket, words).replace(server.dir.path().to_str().unwrap(), "");
        assert!(!table.contains('\x1b'), "no colour in a pipe, and no control characters of others");
        assert_file(
            &format!("tests/snapshots/{name}.txt"),
            &table.replace(env!("CARGO_PKG_VERSION"), "VERSION"),
        );
    }
}

#[test]
fn exit_status_tells_failures_apart() {
    let (_, server) = start();
    let gone = Path::new("/nonexistent/yardd.sock");
    let add_broken = ["port", "add", "lab/broken", "--tap", "t"];
    for (socket, words, status, says) in [
        (server.socket.as_path(), ["show"].as_slice(), 0, ""),
        (&server.socket, &add_broken, 1, "opening broken: no such device"),
        (
            &server.socket,
            &["port", "add", "lab/x", "--tap", "t", "--mtu", "5"],
            1,
            "mtu: 5 is out of range, expected 68 to 9216",
        ),
        (&server.socket, &["shwo"], 2, "unrecognized subcommand"),
        (&server.socket, &["port", "show", "red"], 2, "expected SWITCH/PORT, such as lab/red"),
        (&server.socket, &["port", "set", "lab/red"], 2, "required"),
        (&server.socket, &["port", "add", "lab/x"], 2, "required"),
        (&server.socket, &["port", "add", "lab/x", "--tap", "t", "--uplink", "e"], 2, "cannot be used with"),
        (&server.socket, &["port", "show", "lab/none"], 3, "there is no port `lab/none`"),
        (&server.socket, &["port", "show", "lab/../red"], 2, "expected SWITCH/PORT"),
        (&server.socket, &["switch", "del", "../report"], 3, "there is no switch `../report`"),
        (&server.socket, &["stats", "none"], 3, "there is no switch `none`"),
        (&server.socket, &["capture", "none", "-w", "-"], 3, "there is no switch and no port `none`"),
        (&server.socket, &["switch", "add", "lab"], 4, "switch `lab` exists already"),
        (&server.socket, &["-j", "top"], 2, "--json gives one answer"),
        (gone, &["show"], 5, "is yardd running? tried /nonexistent/yardd.sock"),
    ] {
        let output = yard(socket, words);
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{words:?}: {stderr}");
        assert!(stderr.contains(says), "{words:?}: {stderr}");
    }
}

#[test]
fn silent_daemon_is_unreachable() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let hangs_up = std::thread::spawn(move || drop(listener.accept().unwrap()));
    let output = yard(&socket, &["show"]);
    hangs_up.join().unwrap();
    assert_eq!(output.status.code(), Some(5), "{}", text(&output.stderr));
}

#[test]
fn switches_and_ports_are_added_changed_and_removed() {
    let (fake, server) = start();
    let socket = &server.socket;
    for words in [
        ["switch", "add", "wan", "--type", "external", "--uplink", "eth0"].as_slice(),
        &["switch", "add", "wan", "--may-exist"],
        &[
            "port",
            "add",
            "wan/a",
            "--vhost-user",
            "/run/a",
            "--queues",
            "4",
            "--mtu",
            "9000",
            "--trunk",
            "10-20",
            "--native",
            "1",
        ],
        &[
            "port",
            "add",
            "wan/b",
            "--tap",
            "t0",
            "--pin",
            "1",
            "--mac-spoofing",
            "--address-limit",
            "9",
            "--no-offloads",
        ],
        &[
            "port",
            "add",
            "wan/c",
            "--pcap-read",
            "in.pcap",
            "--full-speed",
            "--repeat",
            "--with",
            r#"{"coalesce": false}"#,
        ],
        &[
            "port",
            "set",
            "wan/a",
            "--mtu",
            "1400",
            "--passthrough",
            "--address-limit",
            "none",
            "--coalesce",
            "false",
        ],
        &["queue", "pin", "wan/a", "3", "1"],
        &["port", "restart", "lab/grey"],
        &["port", "del", "wan/b"],
        &["port", "del", "wan/b", "--if-exists"],
        &["switch", "del", "lab"],
    ] {
        assert_eq!(said(socket, words), "", "{words:?}");
    }
    let state = fake.state();
    let names: Vec<_> = state.switches[0].ports.iter().map(|port| port.name.as_str()).collect();
    assert_eq!((state.switches.len(), names), (1, vec!["uplink", "a", "c"]));
    assert_eq!(
        state.last,
        "PortChange { mtu: Some(1400), vlan: Some(Passthrough), spoofing: None, coalesce: Some(false), address_limit: Some(None) }"
    );
    let queue = &state.switches[0].ports[1].queues[3];
    assert_eq!((queue.cpu, queue.pinned), (Some(1), true));
}

#[test]
fn addresses_are_shown_pinned_and_forgotten() {
    let (_, server) = start();
    let socket = &server.socket;
    said(socket, &["fdb", "add", "lab/red", "02:00:00:00:00:01", "--vlan", "7"]);
    let table = said(socket, &["fdb", "show", "lab"]);
    assert_eq!(table, "MAC                VLAN  PORT  AGE\n02:00:00:00:00:01     7  red     -  static\n");
    assert_eq!(said(socket, &["fdb", "flush", "lab"]), "0 addresses forgotten\n");
    said(socket, &["fdb", "del", "lab", "02:00:00:00:00:01", "--vlan", "7"]);
    assert_eq!(yard(socket, &["fdb", "del", "lab", "02:00:00:00:00:01"]).status.code(), Some(3));
}

#[test]
fn json_is_the_answer_of_the_api() {
    let (_, server) = start();
    let report: serde_json::Value = serde_json::from_str(&said(&server.socket, &["-j", "show"])).unwrap();
    assert_eq!(report, server.get("/v1/report").json());
    let port: serde_json::Value =
        serde_json::from_str(&said(&server.socket, &["port", "show", "lab/red", "--json"])).unwrap();
    assert_eq!(port["name"], "red");
}

#[test]
fn capture_ends_after_the_wanted_frames() {
    let (_, server) = start();
    let output = yard(&server.socket, &["capture", "--count", "2", "--drops", "-w", "-"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(text(&output.stderr), "2 frames captured, 5 missed\n");
    assert_eq!(frames(&output.stdout), 2);
    let file = server.dir.path().join("out.pcapng");
    said(&server.socket, &["capture", "red", "--count", "1", "-w", file.to_str().unwrap()]);
    assert_eq!(frames(&std::fs::read(file).unwrap()), 1);
}

fn frames(capture: &[u8]) -> usize {
    let mut reader = Reader::open(capture).unwrap();
    std::iter::from_fn(|| reader.next().unwrap().map(drop)).count()
}

#[test]
fn interrupted_capture_leaves_a_whole_file() {
    let (_, server) = start();
    let file = server.dir.path().join("out.pcapng");
    let mut capture = Command::new(env!("CARGO_BIN_EXE_yard"))
        .args(["capture", "lab", "-w", file.to_str().unwrap()])
        .env("YARD_SOCKET", &server.socket)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // Three frames with their interfaces are longer than this.
    while std::fs::metadata(&file).map_or(0, |file| file.len()) < 400 {
        assert!(capture.try_wait().unwrap().is_none());
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let pid = rustix::process::Pid::from_child(&capture);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let status = capture.wait().unwrap();
    assert_eq!((status.code(), status.signal()), (Some(0), None));
    assert_eq!(frames(&std::fs::read(file).unwrap()), 3);
}

#[test]
fn rates_and_top_come_as_often_as_asked() {
    let (_, server) = start();
    let table = said(&server.socket, &["stats", "lab/red", "--watch", "1", "--count", "1"]);
    assert!(table.contains("lab/red") && !table.contains("lab/blue") && table.contains("IN/s"), "{table}");
    let table = said(&server.socket, &["top", "--count", "1"]);
    assert!(
        table.contains("cpu 1 polling 34%") && table.contains("QUEUE") && !table.contains('\x1b'),
        "{table}"
    );
}

#[test]
fn closed_pipe_is_no_failure() {
    let (_, server) = start();
    let mut show = Command::new(env!("CARGO_BIN_EXE_yard"))
        .args(["top", "--count", "3"])
        .env("YARD_SOCKET", &server.socket)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(show.stdout.take());
    let output = show.wait_with_output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{}", text(&output.stderr));
}

#[test]
fn completions_and_manual_pages_are_written() {
    let nowhere = Path::new("/nonexistent");
    for shell in ["bash", "zsh", "fish"] {
        assert!(said(nowhere, &["completions", shell]).contains("capture"), "{shell}");
    }
    let dir = tempfile::tempdir().unwrap();
    said(nowhere, &["man", dir.path().to_str().unwrap()]);
    let page = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
    for section in ["EXAMPLES", "FILES", "ENVIRONMENT", "\"EXIT STATUS\"", "\"SEE ALSO\""] {
        assert!(page("yard.1").contains(section) && page("yardd.8").contains(section), "{section}");
    }
    assert!(page("yard-port-add.1").contains("vhost"));
    assert!(page("switchyard.toml.5").contains("mac\\-spoofing"));
}

/// A VM `web` that runs, with one fault, and one that could not be started.
fn machines(server: &Server) {
    let socket = &server.socket;
    let nics =
        ["--nic", "name=eth0,switch=lab,queues=2,access=10", "--nic", "name=eth1,switch=lab,type=legacy"];
    let words = ["vm", "define", "web", "--kernel", "/dev/null", "--memory", "64M", "--maximum", "128M"];
    said(socket, &[&words, &nics[..], &["--vcpus", "2", "--start"]].concat());
    said(socket, &["vm", "value", "set", "web", "fault", "now"]);
    let words = ["vm", "define", "db", "--kernel", "/nonexistent/vmlinuz", "--memory", "64M", "--start"];
    assert_eq!(yard(socket, &words).status.code(), Some(1));
}

#[test]
fn tables_of_vms_are_as_recorded() {
    let (_, server) = start();
    machines(&server);
    let pid = server.vms.show("web").unwrap().pid.unwrap().to_string();
    for (words, name) in [
        (["vm", "list"].as_slice(), "vm-list"),
        (&["vm", "show", "web"], "vm-show"),
        (&["vm", "show", "db"], "vm-show-off"),
        (&["vm", "value", "show", "web"], "vm-value-show"),
        (&["show"], "vm-in-show"),
    ] {
        let table = said(&server.socket, words).replace(server.dir.path().to_str().unwrap(), "");
        let table = table.replace(&format!("process {pid}"), "process PID");
        assert!(!table.contains('\x1b'), "what a guest says cannot move the cursor");
        let table = table.replace(env!("CARGO_PKG_VERSION"), "VERSION");
        assert_file(&format!("tests/snapshots/{name}.txt"), &table);
    }
    let vm: serde_json::Value =
        serde_json::from_str(&said(&server.socket, &["-j", "vm", "show", "web"])).unwrap();
    assert_eq!((&vm["state"], &vm["nics"][0]["vlan"]["access"]), (&"running".into(), &10.into()));
}

#[test]
fn vms_are_steered() {
    let (_, server) = start();
    let socket = &server.socket;
    let file = server.dir.path().join("vms.toml");
    let text = "[vm.web]\nmemory = { startup = \"64M\", maximum = \"96M\" }\nkernel = \"vmlinuz\"\n";
    std::fs::write(&file, text).unwrap();
    std::fs::write(server.dir.path().join("vmlinuz"), "a kernel").unwrap();
    let file = file.to_str().unwrap();
    for words in [
        ["vm", "define", file].as_slice(),
        &["vm", "define", file, "--may-exist", "--start"],
        &["vm", "pause", "web"],
        &["vm", "resume", "web"],
        &["vm", "reset", "web"],
        &["vm", "set", "web", "--memory", "96M", "--cpu-weight", "200", "--cpu-limit", "50"],
        &["vm", "nic", "add", "web", "eth0", "--switch", "lab", "--access", "10", "--mtu", "9000"],
        &["vm", "nic", "set", "web", "eth0", "--mtu", "1400", "--passthrough"],
        &["vm", "nic", "set", "web", "eth0", "--link", "down"],
        &["vm", "nic", "remove", "web", "eth0"],
        &["vm", "value", "set", "web", "role", "front end"],
        &["vm", "value", "remove", "web", "role"],
        &["vm", "thaw", "web"],
        &["vm", "sync-time", "web"],
        &["vm", "shutdown", "web", "--reboot"],
        &["vm", "stop", "web"],
        &["vm", "delete", "web"],
        &["vm", "delete", "web", "--if-exists"],
    ] {
        assert_eq!(said(socket, words), "", "{words:?}");
    }
    assert_eq!(said(socket, &["vm", "list"]), "No virtual machines. `yard vm define FILE` makes some.\n");
}

#[test]
fn exit_status_tells_failures_of_vms_apart() {
    let (_, server) = start();
    machines(&server);
    let wrong = server.dir.path().join("wrong.toml");
    std::fs::write(&wrong, "[vm.a]\nmemory = \"64M\"\nkernal = \"k\"\n").unwrap();
    let wrong = wrong.to_str().unwrap();
    for (words, status, says) in [
        (["vm", "freeze", "web"].as_slice(), 1, "the guest has no hv_vss_daemon"),
        (&["vm", "start", "web"], 1, "VM `web` is running, expected off"),
        (&["vm", "define", wrong], 1, "wrong.toml:3: vm.a.kernal: unknown key (did you mean `kernel`?)"),
        (
            &["vm", "define", "a", "--kernel", "/k", "--memory", "1M"],
            1,
            "memory.startup: \"1M\" is out of range",
        ),
        (
            &["vm", "define", "a", "--kernel", "/k", "--memory", "64M", "--nic", "eth0"],
            2,
            "expected KEY=VALUE,...",
        ),
        (&["vm", "define", "a", "--kernel", "/k"], 2, "--memory"),
        (&["vm", "set", "web"], 2, "required"),
        (&["vm", "nic", "set", "web", "eth0"], 2, "required"),
        (&["vm", "nic", "set", "web", "eth0", "--link", "off"], 2, "possible values: up, down"),
        (&["vm", "nic", "set", "web", "eth0", "--mac", "02:00:00:00:00:07"], 1, "is running, expected off"),
        (&["vm", "console", "db"], 1, "VM `db` is off, so it has no console"),
        (&["vm", "start", "none"], 3, "there is no VM `none`"),
        (&["vm", "nic", "remove", "web", "none"], 3, "there is no adapter `none`"),
        (&["vm", "define", "web", "--kernel", "/k", "--memory", "64M"], 4, "VM `web` exists already"),
    ] {
        let output = yard(&server.socket, words);
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{words:?}: {stderr}");
        assert!(stderr.contains(says), "{words:?}: {stderr}");
    }
}

#[test]
fn console_takes_a_script_and_prints_what_the_guest_says() {
    let (_, server) = start();
    machines(&server);
    let mut console = Command::new(env!("CARGO_BIN_EXE_yard"))
        .args(["vm", "console", "web"])
        .env("YARD_SOCKET", &server.socket)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    std::io::Write::write_all(console.stdin.as_mut().unwrap(), b"uname\n").unwrap();
    let mut printed = console.stdout.take().unwrap();
    assert_eq!(support::played::until(&mut printed, "uname"), "heard uname");
    // The console ends with its VM.
    said(&server.socket, &["vm", "stop", "web"]);
    assert!(console.wait().unwrap().success());
}
