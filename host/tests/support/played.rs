//! A played worker: the test program itself, started by the daemon's code as if it were `yard-worker`. It speaks the control
//! protocol over the real sockets, and has no guest: values given to the "guest" make things happen.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::exit;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use host::vm::spec::NicSpec;
use host::vm::{
    Cgroups, Channels, Launcher, Manager, Network, Nics, OnEnd, PagePolicy, Parking, Patience, Reserves,
    Settings, Users,
};
use hypervisor::control::{
    Answer, Command, Event, GuestStatus, Handle, Heartbeat, Line, MemoryStatus, NicStatus, Panic, Request,
    Response, Setup, State, Status,
};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use vmq::worker::Activity;
use vswitch::error::FabricError;
use vswitch::fabric::PortChange;

/// A program that plays a worker, to be named as the worker's.
pub fn program(dir: &Path) -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let path = dir.join("played-worker");
    // The setup's socket becomes standard input, which safe code can reach.
    let script = format!(
        "#!/bin/sh\nPLAYED_WORKER=1 exec {} --exact support::played::played_worker --nocapture <&3 3<&-\n",
        own.display()
    );
    std::fs::write(&path, script).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// No test, but a whole worker, if it was started as one.
#[test]
fn played_worker() {
    if std::env::var_os("PLAYED_WORKER").is_some() {
        Worker::begin().serve();
    }
}

struct Worker {
    setup: Setup,
    state: State,
    control: UnixListener,
    /// Listens as long as the worker lives; nobody is answered.
    _channels: OwnedFd,
    legacy: Vec<String>,
    values: Vec<(String, String)>,
    memory: u64,
    faults: Vec<(String, String)>,
    panic: Option<Panic>,
}

/// A line, and the descriptors that came beside it.
fn receive(socket: impl AsFd) -> Option<(Vec<u8>, Vec<OwnedFd>)> {
    let (mut line, mut fds) = (Vec::new(), Vec::new());
    while line.last() != Some(&b'\n') {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
        let mut beside = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        let got = recvmsg(&socket, &mut [IoSliceMut::new(&mut byte)], &mut beside, RecvFlags::CMSG_CLOEXEC);
        for message in beside.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        match got {
            Ok(got) if got.bytes == 1 => line.push(byte[0]),
            _ => return None,
        }
    }
    Some((line, fds))
}

impl Worker {
    fn begin() -> Self {
        let (line, fds) = receive(std::io::stdin()).expect("a setup");
        let setup: Setup = serde_json::from_slice(&line).expect("a good setup");
        assert_eq!(setup.handles.len(), fds.len());
        if setup.cmdline.contains("die-at-once") {
            eprintln!("no room for the guest's memory");
            exit(7);
        }
        let (mut control, mut channels) = (None, None);
        for (handle, fd) in setup.handles.iter().zip(fds) {
            match handle {
                Handle::Control => control = Some(UnixListener::from(fd)),
                Handle::Channels => channels = Some(fd),
                Handle::Console => echo(UnixListener::from(fd)),
                Handle::SerialLog => std::fs::File::from(fd).write_all(b"Linux version\n").unwrap(),
                Handle::Kvm | Handle::Kernel | Handle::Initrd => {}
            }
        }
        let memory = setup.memory.startup;
        Self {
            setup,
            state: State::Ready,
            control: control.expect("a control listener"),
            _channels: channels.expect("a listener for channels"),
            legacy: Vec::new(),
            values: vec![
                ("OSName".into(), "Debian GNU/Linux 13".into()),
                ("OSVersion".into(), "6.12.48".into()),
                ("FullyQualifiedDomainName".into(), "web.example".into()),
                ("NetworkAddressIPv4".into(), "192.0.2.7;198.51.100.7".into()),
            ],
            memory,
            faults: Vec::new(),
            panic: None,
        }
    }

    fn serve(mut self) {
        for daemons in 1.. {
            let (mut daemon, _) = self.control.accept().unwrap();
            while let Some((line, fds)) = receive(&daemon) {
                let request: Request = serde_json::from_slice(&line).unwrap();
                let stop = request.command == Command::Stop
                    && !self.values.iter().any(|(key, _)| key == "deaf to its first daemon" && daemons == 1);
                if let Command::SetValue { key, .. } = &request.command
                    && key == "hang"
                {
                    std::thread::sleep(Duration::from_secs(600));
                }
                let (result, events) = self.obey(request.command, fds);
                let mut lines: Vec<_> = events.into_iter().map(Line::Event).collect();
                lines.insert(0, Line::Response(Response { id: request.id, result }));
                for line in lines {
                    let text = serde_json::to_string(&line).unwrap();
                    // A daemon that was killed does not read.
                    let _ = writeln!(daemon, "{text}");
                }
                if stop {
                    exit(0);
                }
                if self.values.iter().any(|(key, _)| key == "nonsense") {
                    let _ = daemon.write_all(b"\"what?\"\n");
                }
            }
        }
    }

    fn become_state(&mut self, state: State) -> Vec<Event> {
        self.state = state.clone();
        vec![Event::State(state)]
    }

    fn obey(&mut self, command: Command, fds: Vec<OwnedFd>) -> (Result<Answer, String>, Vec<Event>) {
        let events = match command {
            Command::Start if self.setup.cmdline.contains("refuse-start") => {
                return (Err("the kernel is no bzImage".into()), Vec::new());
            }
            Command::Start | Command::Resume | Command::Reset => self.become_state(State::Running),
            Command::Pause if self.state == State::Paused => {
                return (Err("the VM is paused already".into()), Vec::new());
            }
            Command::Pause => self.become_state(State::Paused),
            Command::Shutdown { .. } if self.values.iter().any(|(key, _)| key == "stubborn") => {
                return (Err("the guest is busy".into()), Vec::new());
            }
            Command::Shutdown { reboot: true } => self.become_state(State::Running),
            Command::Shutdown { reboot: false } => self.become_state(State::Off),
            Command::Show => return (Ok(Answer::Status(Box::new(self.status()))), Vec::new()),
            Command::AddNic(nic) if nic.name == "refused" => {
                return (Err("the guest has no driver".into()), Vec::new());
            }
            Command::AddNic(nic) => {
                self.setup.nics.push(nic);
                Vec::new()
            }
            Command::RemoveNic { name } => {
                self.setup.nics.retain(|nic| nic.name != name);
                Vec::new()
            }
            Command::ConnectLegacy { name } => {
                assert_eq!(fds.len(), 1, "a socket comes with {name}");
                self.legacy.push(name);
                Vec::new()
            }
            Command::SetMemory { bytes } => {
                self.memory = bytes;
                Vec::new()
            }
            Command::SetLink { name, up } => {
                self.values.push((format!("link {name}"), up.to_string()));
                Vec::new()
            }
            Command::Freeze => return (Err("the guest has no hv_vss_daemon".into()), Vec::new()),
            Command::SetValue { key, value } => self.happen(&key, value),
            Command::Stop | Command::SyncTime | Command::Thaw => Vec::new(),
        };
        (Ok(Answer::Done), events)
    }

    /// A value may be more than a value.
    fn happen(&mut self, key: &str, value: Option<String>) -> Vec<Event> {
        match key {
            "die" => {
                eprintln!("a bug in the worker");
                exit(9);
            }
            "crash" => {
                self.panic = Some(Panic { parameters: [1, 2, 3, 4, 5], log: Some("oops\n".into()) });
                let panic = Event::Panic(self.panic.clone().unwrap());
                let state = State::Crashed { reason: "kernel panic".into() };
                std::iter::once(panic).chain(self.become_state(state)).collect()
            }
            "fault" => {
                let (device, reason) = ("eth0".to_owned(), "packet longer than its ring\x1b[2J".to_owned());
                self.faults.push((device.clone(), reason.clone()));
                vec![Event::Fault { device, reason }]
            }
            "faults without end" => {
                let fault = |number| Event::Fault {
                    device: "eth0".into(),
                    reason: format!("{number}{}", "é".repeat(5000)),
                };
                (0..200).map(fault).collect()
            }
            "off" => self.become_state(State::Off),
            _ => {
                self.values.retain(|(other, _)| other != key);
                self.values.extend(value.map(|value| (key.to_owned(), value)));
                Vec::new()
            }
        }
    }

    fn status(&self) -> Status {
        let nics = self.setup.nics.iter().map(|nic| NicStatus {
            name: nic.name.clone(),
            kind: nic.kind,
            channels: 1,
            connected: self.legacy.contains(&nic.name),
        });
        Status {
            name: self.setup.name.clone(),
            state: self.state.clone(),
            setup: self.setup.clone(),
            uptime: 3700.0,
            memory: self.memory,
            vmbus: Some("5.3".into()),
            nics: nics.collect(),
            guest: GuestStatus {
                heartbeat: Heartbeat::Ok,
                values: self.values.clone(),
                services: vec![("heartbeat".into(), "3.0".into()), ("kvp".into(), "5.0".into())],
                memory: Some(MemoryStatus {
                    assigned: self.memory,
                    target: self.memory,
                    committed: 40 << 20,
                    available: 20 << 20,
                    ..MemoryStatus::default()
                }),
                frozen: false,
            },
            faults: self.faults.clone(),
            panic: self.panic.clone(),
            exits: vec![("hypercall".into(), 12), ("i/o port".into(), 3456)],
        }
    }
}

/// A console that says what it hears.
fn echo(listener: UnixListener) {
    std::thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let mut line = String::new();
            while reader.read_line(&mut line).is_ok_and(|length| length > 0) {
                let _ = (&stream).write_all(format!("heard {line}").as_bytes());
                line.clear();
            }
        }
    });
}

/// A switch that only remembers what it is told.
#[derive(Debug, Default)]
pub struct FakeNetwork {
    pub said: Arc<Mutex<Vec<String>>>,
    /// Held by whoever wants changes to take their time.
    pub slow: Mutex<()>,
    ends: Mutex<Vec<Ended>>,
}

/// An [`OnEnd`] that can be shown.
struct Ended(OnEnd);

impl std::fmt::Debug for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Ended")
    }
}

/// A connection that is held.
#[derive(Debug)]
struct FakeChannels {
    _held: OwnedFd,
    vm: String,
    said: Arc<Mutex<Vec<String>>>,
    down: Mutex<BTreeSet<String>>,
}

impl Channels for FakeChannels {
    fn set_link(&self, nic: &str, up: bool) -> bool {
        let mut down = self.down.lock().unwrap();
        let changed = if up { down.remove(nic) } else { down.insert(nic.into()) };
        if changed {
            self.said.lock().unwrap().push(format!(
                "link {}.{nic} {}",
                self.vm,
                if up { "up" } else { "down" }
            ));
        }
        true
    }
}

impl FakeNetwork {
    fn say(&self, text: String) {
        self.said.lock().unwrap().push(text);
    }

    pub fn heard(&self) -> Vec<String> {
        std::mem::take(&mut self.said.lock().unwrap())
    }

    /// Ends the service of channels, as if the worker had broken its protocol.
    pub fn break_channels(&self, reason: &str) {
        for Ended(end) in std::mem::take(&mut *self.ends.lock().unwrap()) {
            end(reason.to_owned());
        }
    }
}

impl Network for FakeNetwork {
    fn plug(&self, vm: &str, nic: &NicSpec) -> Result<(), FabricError> {
        if nic.switch != "lab" {
            return Err(FabricError::NotFound { what: "switch", name: nic.switch.clone() });
        }
        self.say(format!("plug {vm}.{}", nic.name));
        Ok(())
    }

    fn unplug(&self, vm: &str, nic: &NicSpec) -> Result<(), FabricError> {
        self.say(format!("unplug {vm}.{}", nic.name));
        Ok(())
    }

    fn activity(&self) -> Vec<(usize, Activity)> {
        vec![(1, Activity::Polling)]
    }

    fn change(&self, vm: &str, nic: &NicSpec, change: PortChange) -> Result<(), FabricError> {
        drop(self.slow.lock().unwrap());
        self.say(format!("change {vm}.{} {:?}", nic.name, change.mtu));
        Ok(())
    }

    fn connect_legacy(&self, vm: &str, nic: &NicSpec) -> Result<OwnedFd, FabricError> {
        self.say(format!("legacy {vm}.{}", nic.name));
        Ok(UnixStream::pair().unwrap().0.into())
    }

    fn serve_channels(
        &self,
        vm: &str,
        nics: Nics,
        socket: &Path,
        on_end: OnEnd,
    ) -> Result<Box<dyn Channels>, String> {
        let packets =
            rustix::net::socket(rustix::net::AddressFamily::UNIX, rustix::net::SocketType::SEQPACKET, None);
        let packets = packets.unwrap();
        let address = rustix::net::SocketAddrUnix::new(socket).unwrap();
        rustix::net::connect(&packets, &address).map_err(|error| error.to_string())?;
        self.say(format!("serve {vm} {}", nics.lock().len()));
        self.ends.lock().unwrap().push(Ended(on_end));
        let (said, down) = (Arc::clone(&self.said), Mutex::default());
        Ok(Box::new(FakeChannels { _held: packets, vm: vm.into(), said, down }))
    }
}

/// VMs below `dir` with played workers.
pub fn manager(dir: &Path, network: Arc<FakeNetwork>) -> Manager {
    Manager::new(settings(dir, network))
}

pub fn settings(dir: &Path, network: Arc<FakeNetwork>) -> Settings {
    let patience = Patience {
        look: Duration::from_millis(300),
        list: Duration::from_secs(2),
        answer: Duration::from_secs(2),
        start: Duration::from_secs(10),
        closing: Duration::from_millis(500),
        restart: Duration::from_millis(10),
        slowest: Duration::from_millis(40),
        ..Patience::default()
    };
    Settings {
        root: dir.join("vm"),
        launcher: Launcher { program: program(dir), kvm: "/dev/null".into() },
        network,
        cgroups: Cgroups::none("this is a test"),
        pages: PagePolicy::told_by("/nonexistent"),
        cpus: vec![0, 1],
        parking: Parking::default(),
        patience,
        reserves: Reserves::default(),
        users: Users::own(),
    }
}

/// A definition, as a request.
pub fn definition(name: &str, more: serde_json::Value) -> serde_json::Value {
    let mut body = serde_json::json!({
        "name": name,
        "memory": { "startup": "64M", "minimum": "32M", "maximum": "128M" },
        "vcpus": 2,
        "kernel": "/dev/null",
        "nic": [{ "name": "eth0", "switch": "lab", "queues": 2 }],
    });
    for (key, value) in more.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

/// Reads from `stream` until `text` came.
pub fn until(stream: &mut impl Read, text: &str) -> String {
    let (mut all, mut byte) = (Vec::new(), [0]);
    while !String::from_utf8_lossy(&all).contains(text) {
        assert_eq!(stream.read(&mut byte).unwrap(), 1, "{}", String::from_utf8_lossy(&all));
        all.push(byte[0]);
    }
    String::from_utf8(all).unwrap()
}
