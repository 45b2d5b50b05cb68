//! `yardd` as a program, with the real switch.

#![allow(clippy::unwrap_used, reason = "a failure to set up is a failure of the test")]

mod support;

use std::io::Read;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use host::config::{Machine, load};
use rustix::process::{Pid, Signal, kill_process};
use support::exchange;
use support::terminal::Terminal;
use tempfile::TempDir;
use vswitch::pcap::{InterfaceId, Packet, Reader, SectionInfo, Writer};

fn yardd(config: &Path, words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_yardd")).arg("--config").arg(config).args(words).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn example_is_a_good_configuration() {
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/switchyard.toml");
    let config = load(&example, &Machine { cpus: vec![0, 1] }).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(config.switches.len(), 2);
    let output = yardd(&example, &["--check"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(text(&output.stdout).ends_with("switchyard.toml: good: 2 switches, 6 ports\n"));
}

#[test]
fn wrong_configuration_is_refused_with_all_its_mistakes() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("y.toml");
    std::fs::write(&file, "[switch.lab]\ntype = \"privat\"\n[switch.lab.port.red]\nmtu = 70000\n").unwrap();
    let output = yardd(&file, &["--check"]);
    assert_eq!(output.status.code(), Some(1));
    let stderr = text(&output.stderr).replace(dir.path().to_str().unwrap(), "");
    assert_eq!(
        stderr,
        "/y.toml:2: switch.lab.type: found \"privat\", expected \"external\", \"internal\" or \"private\" (did you mean `private`?)\n\
         /y.toml:3: switch.lab.port.red: is attached to nothing, expected one of vhost-user, tap, uplink, pcap\n\
         /y.toml:4: switch.lab.port.red.mtu: 70000 is out of range, expected 68 to 9216\n"
    );
    assert_eq!(yardd(&file, &["--colour"]).status.code(), Some(2));
    assert_eq!(yardd(&file, &["--check", "--offline"]).status.code(), Some(2));
    assert_eq!(yardd(&file, &["--log", "vswitch=loud"]).status.code(), Some(2));
    assert_eq!(yardd(Path::new("/nonexistent.toml"), &[]).status.code(), Some(1));
}

/// A running daemon, killed when dropped.
struct Daemon {
    child: Child,
    dir: TempDir,
    socket: PathBuf,
}

impl Daemon {
    /// Starts it with `keys` after an `[api]` table, and waits until it says that it is ready.
    fn start(keys: &str) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), keys, &[])
    }

    /// The same in a directory, with more words.
    fn start_in(dir: TempDir, keys: &str, words: &[&str]) -> Self {
        let text = format!("[api]\nsocket = \"api.sock\"\n[workers]\ncpus = [0]\n{keys}\n");
        std::fs::write(dir.path().join("y.toml"), text).unwrap();
        Self::run(dir, words)
    }

    /// A new daemon in the place of one that has ended.
    fn again(mut self, words: &[&str]) -> Self {
        let dir = std::mem::replace(&mut self.dir, tempfile::tempdir().unwrap());
        Self::run(dir, words)
    }

    fn run(dir: TempDir, words: &[&str]) -> Self {
        let (socket, notify) = (dir.path().join("api.sock"), dir.path().join("notify"));
        let _ = std::fs::remove_file(&notify);
        let manager = UnixDatagram::bind(&notify).unwrap();
        manager.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let config = dir.path().join("y.toml");
        let child = Command::new(env!("CARGO_BIN_EXE_yardd"))
            .arg("--config")
            .arg(&config)
            .args(words)
            .env("NOTIFY_SOCKET", &notify)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut daemon = Self { child, dir, socket };
        let mut word = [0; 16];
        let received = loop {
            match manager.recv(&mut word) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                received => break received,
            }
        };
        match received {
            Ok(length) => assert_eq!(&word[..length], b"READY=1"),
            Err(error) => panic!("not ready: {error}: {}", daemon.log()),
        }
        daemon
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Kills it and reads what it logged.
    fn log(&mut self) -> String {
        let _ = self.child.kill();
        let mut log = String::new();
        if let Some(mut stderr) = self.child.stderr.take() {
            stderr.read_to_string(&mut log).unwrap();
        }
        log
    }

    /// Exit status once it has ended by itself.
    fn wait(&mut self) -> Option<i32> {
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(30) {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("it does not end: {}", self.log());
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether `path` is there soon: sockets of ports are made by a thread of their own.
fn appears(path: &Path) -> bool {
    let began = Instant::now();
    while !path.exists() && began.elapsed() < Duration::from_secs(10) {
        std::thread::sleep(Duration::from_millis(5));
    }
    path.exists()
}

const LAB: &str = "[switch.lab]\ntype = \"private\"\n[switch.lab.port.red]\nvhost-user = { path = \"red.sock\", queues = 2 }\n";

#[test]
fn daemon_serves_survives_sighup_and_ends_in_good_order() {
    for end in [Signal::TERM, Signal::INT] {
        let mut daemon = Daemon::start(LAB);
        let red = daemon.dir.path().join("red.sock");
        assert!(appears(&red));
        let report = exchange(&daemon.socket, "GET", "/v1/report", "").json();
        assert_eq!(report["switches"][0]["ports"][0]["state"], "waiting");
        daemon.signal(Signal::HUP);
        // Two signals at once may be heard in either order, and the log is only to be had at the end.
        std::thread::sleep(Duration::from_millis(500));
        assert_eq!(exchange(&daemon.socket, "GET", "/v1/version", "").status, 200);
        daemon.signal(end);
        assert_eq!(daemon.wait(), Some(0));
        assert!(!daemon.socket.exists() && !red.exists(), "sockets are removed");
        let log = daemon.log();
        assert!(log.contains("SIGHUP") && log.contains("ending"), "{log}");
    }
}

#[test]
fn ports_are_added_and_removed_while_it_runs() {
    let daemon = Daemon::start(LAB);
    let blue = daemon.dir.path().join("blue.sock");
    let body = format!(
        r#"{{"name": "blue", "vhost-user": {{"path": "{}"}}, "vlan": {{"access": 10}}}}"#,
        blue.display()
    );
    let answer = exchange(&daemon.socket, "POST", "/v1/switches/lab/ports", &body);
    assert_eq!((answer.status, answer.json()["vlan"].as_str()), (201, Some("access 10")), "{answer:?}");
    assert!(appears(&blue));
    assert_eq!(exchange(&daemon.socket, "POST", "/v1/switches/lab/ports", &body).status, 409);
    assert_eq!(exchange(&daemon.socket, "DELETE", "/v1/switches/lab/ports/blue", "").status, 204);
    assert!(!blue.exists());
    assert_eq!(exchange(&daemon.socket, "DELETE", "/v1/switches/lab", "").status, 204);
    assert_eq!(exchange(&daemon.socket, "GET", "/v1/switches", "").text(), "[]");
}

#[test]
fn second_daemon_leaves_the_first_alone() {
    let daemon = Daemon::start(LAB);
    let output = yardd(&daemon.dir.path().join("y.toml"), &[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("another yardd answers there"), "{}", text(&output.stderr));
    assert_eq!(exchange(&daemon.socket, "GET", "/v1/version", "").status, 200);
}

#[test]
fn killed_daemon_leaves_a_socket_that_the_next_one_replaces() {
    let mut daemon = Daemon::start(LAB);
    daemon.signal(Signal::KILL);
    daemon.child.wait().unwrap();
    assert!(daemon.socket.exists());
    let child = Command::new(env!("CARGO_BIN_EXE_yardd"))
        .arg("--config")
        .arg(daemon.dir.path().join("y.toml"))
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    daemon.child = child;
    let began = Instant::now();
    while std::os::unix::net::UnixStream::connect(&daemon.socket).is_err() {
        assert!(began.elapsed() < Duration::from_secs(30), "{}", daemon.log());
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(exchange(&daemon.socket, "GET", "/v1/version", "").status, 200);
}

#[test]
fn port_that_cannot_be_made_is_named_and_the_daemon_does_not_start() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("y.toml");
    let keys = "[api]\nsocket = \"api.sock\"\n[workers]\ncpus = [0]\n[switch.lab]\ntype = \"private\"\n\
                [switch.lab.port.replay]\npcap = { read = \"absent.pcap\" }\n";
    std::fs::write(&config, keys).unwrap();
    let output = yardd(&config, &[]);
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("yardd: switch.lab.port.replay: ") && stderr.contains("absent.pcap"), "{stderr}");
    assert!(!dir.path().join("api.sock").exists());
}

/// A broadcast frame from station `source`.
fn frame(source: u8) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend([2, 0, 0, 0, 0, source, 0x88, 0xb5]);
    frame.resize(60, source);
    frame
}

fn record(path: &Path, frames: &[(u64, Vec<u8>)]) {
    let mut writer = Writer::new(std::fs::File::create(path).unwrap(), &SectionInfo::default()).unwrap();
    let interface: InterfaceId = writer.add_interface("in", "", 0).unwrap();
    for (time, data) in frames {
        writer.packet(&Packet::new(interface, *time, data)).unwrap();
    }
    writer.close().unwrap();
}

#[test]
fn offline_run_of_the_same_files_writes_the_same_bytes() {
    let mut runs = Vec::new();
    for _ in 0..2 {
        let dir = tempfile::tempdir().unwrap();
        record(&dir.path().join("a.pcapng"), &[(1_000, frame(1)), (3_000, frame(1))]);
        record(&dir.path().join("b.pcapng"), &[(2_000, frame(2))]);
        let config = dir.path().join("y.toml");
        let keys = "[workers]\ncpus = [0]\n[switch.lab]\ntype = \"private\"\n[switch.lab.port]\n\
                    a.pcap = { read = \"a.pcapng\", write = \"a-out.pcapng\" }\nb.pcap = { read = \"b.pcapng\" }\n\
                    c.pcap = { write = \"c-out.pcapng\" }\n";
        std::fs::write(&config, keys).unwrap();
        let output = yardd(&config, &["--offline"]);
        assert!(output.status.success(), "{}", text(&output.stderr));
        assert!(text(&output.stdout).contains("lab/a"), "{}", text(&output.stdout));
        let written =
            ["a-out.pcapng", "c-out.pcapng"].map(|name| std::fs::read(dir.path().join(name)).unwrap());
        runs.push(written);
    }
    assert_eq!(runs[0], runs[1]);
    let sources = |file: &[u8]| {
        let mut reader = Reader::open(file).unwrap();
        let mut sources = Vec::new();
        while let Some(record) = reader.next().unwrap() {
            sources.push(record.data[11]);
        }
        sources
    };
    assert_eq!((sources(&runs[0][0]), sources(&runs[0][1])), (vec![2], vec![1, 2, 1]));
}

/// The kinds of a capture's blocks.
fn blocks(mut capture: &[u8]) -> Vec<u32> {
    let mut kinds = Vec::new();
    let word = |bytes: &[u8], at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    while let (Some(kind), Some(length)) = (word(capture, 0), word(capture, 4)) {
        kinds.push(kind);
        capture = &capture[length as usize..];
    }
    kinds
}

/// Blocks of a capture: its header, its interface, and the statistics at its end.
const HEADER: u32 = 0x0a0d_0d0a;
const INTERFACE: u32 = 1;
const STATISTICS: u32 = 5;

#[test]
fn disk_that_hangs_keeps_nobody_from_the_daemon_nor_the_daemon_from_its_end() {
    let mut disk = Terminal::new();
    let path = disk.path.display();
    let mut daemon = Daemon::start(&format!("{LAB}[switch.lab.port.keep]\npcap.write = \"{path}\"\n"));
    if !disk.stop(&daemon.child) {
        return eprintln!("skipped: may not reach into the daemon");
    }
    let socket = daemon.socket.clone();
    let restart = move || exchange(&socket, "POST", "/v1/switches/lab/ports/keep/restart", "");
    let port = || exchange(&daemon.socket, "GET", "/v1/switches/lab/ports/keep", "").json();
    let restarted = std::thread::spawn(restart.clone());
    let began = Instant::now();
    while port()["state"] != "waiting" {
        assert!(began.elapsed() < Duration::from_secs(20), "{}", port());
    }
    assert_eq!(port()["reason"], "its disk to answer");
    let body =
        format!(r#"{{"name": "blue", "vhost-user": {{"path": "{}/blue"}}}}"#, daemon.dir.path().display());
    assert_eq!(exchange(&daemon.socket, "POST", "/v1/switches/lab/ports", &body).status, 201);
    assert_eq!(exchange(&daemon.socket, "DELETE", "/v1/switches/lab/ports/blue", "").status, 204);
    assert_eq!(restart().problem(), "state");
    assert!(!restarted.is_finished() && !blocks(disk.shown()).contains(&STATISTICS));

    disk.go_on();
    let answer = restarted.join().unwrap();
    assert_eq!((answer.status, port()["state"].as_str()), (204, Some("up")), "{answer:?}");
    while blocks(disk.shown()).get(..4) != Some(&[HEADER, INTERFACE, STATISTICS, HEADER]) {
        assert!(began.elapsed() < Duration::from_secs(20), "{:?}", blocks(disk.shown()));
    }

    assert!(disk.stop(&daemon.child));
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.wait(), Some(0));
    assert_eq!(blocks(disk.shown()).iter().filter(|&&kind| kind == STATISTICS).count(), 1);
    assert!(daemon.log().contains("does not answer"));
}

/// The configuration's VM `web`, run by a played worker.
const VM: &str = "[switch.lab]\ntype = \"private\"\n[vm.web]\nmemory = \"64M\"\nkernel = \"/dev/null\"\nautostart = true\n\
                  [[vm.web.nic]]\nname = \"eth0\"\nswitch = \"lab\"\n";

#[test]
fn example_with_vms_is_a_good_configuration() {
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/vm.toml");
    let output = yardd(&example, &["--check"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(text(&output.stdout).ends_with("vm.toml: good: 1 switches, 0 ports, 2 virtual machines\n"));
}

#[test]
fn vm_outlives_the_daemon_and_is_taken_back() {
    if !Path::new("/dev/kvm").exists() {
        eprintln!("no /dev/kvm on this machine, which a daemon hands to its workers");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let worker = support::played::program(dir.path());
    let worker = worker.to_str().unwrap();
    let mut daemon = Daemon::start_in(dir, VM, &["--worker", worker]);
    let show = |daemon: &Daemon| exchange(&daemon.socket, "GET", "/v1/vms/web", "").json();
    let before = show(&daemon);
    assert_eq!(before["state"], "running", "{before:#}");
    let report = exchange(&daemon.socket, "GET", "/v1/switches/lab/ports/web.eth0", "").json();
    assert_eq!((&report["kind"], &report["mac"]), (&"synthetic".into(), &before["nics"][0]["mac"]));
    for signal in [Signal::KILL, Signal::TERM] {
        daemon.signal(signal);
        daemon.wait();
        daemon = daemon.again(&["--worker", worker]);
        let after = show(&daemon);
        assert_eq!((&after["state"], &after["pid"]), (&"running".into(), &before["pid"]), "{after:#}");
    }
    assert_eq!(exchange(&daemon.socket, "POST", "/v1/vms/web/stop", "").status, 204);
    assert_eq!(show(&daemon)["state"], "off");
}

#[test]
fn tap_queue_that_the_daemon_inherited_carries_frames() {
    use std::os::fd::AsRawFd;
    let tap = vmq::os::new_network_namespace()
        .and_then(|()| vmq::os::tap::open("given", vmq::os::tap::Flags::default()));
    let tap = match tap {
        Ok(tap) => tap,
        Err(error) => {
            eprintln!("skipped: needs root and /dev/net/tun: {error}");
            return;
        }
    };
    rustix::io::fcntl_setfd(&tap, rustix::io::FdFlags::empty()).unwrap();
    let daemon = Daemon::start(&format!(
        "[switch.lab]\ntype = \"private\"\n[switch.lab.port.given]\ntap.fds = [{}]\nmtu = 1400",
        tap.as_raw_fd()
    ));
    // The daemon has its own.
    drop(tap);
    let port = || exchange(&daemon.socket, "GET", "/v1/switches/lab/ports/given", "").json();
    assert_eq!((port()["state"].clone(), vmq::os::mtu("given").unwrap()), ("up".into(), 1400));
    let socket = vmq::os::packet::open("given", vmq::os::packet::Flags::default()).unwrap();
    let before = port()["received"].clone();
    let frame = [[0xff; 6].as_slice(), &[2, 0, 0, 0, 0, 1, 0x88, 0xb5], &[0; 46]].concat();
    assert_eq!(rustix::io::write(&socket, &frame).unwrap(), 60);
    let began = Instant::now();
    while port()["received"] == before {
        assert!(began.elapsed() < Duration::from_secs(20), "no frame came: {}", port());
        std::thread::sleep(Duration::from_millis(10));
    }
}
