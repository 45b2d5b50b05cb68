//! A stand-in for the switch, a server over it, and plain HTTP by hand.

#![allow(dead_code, reason = "each test program uses a part")]

pub mod played;
pub mod terminal;

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use self::played::FakeNetwork;
use host::api::{Api, Backend, Limits, Listener, Outcome, Recording, serve};
use host::vm::Manager;
use serde_json::Value;
use tempfile::TempDir;
use tokio::sync::watch;
use vmq::Mac;
use vswitch::DropReason;
use vswitch::error::FabricError;
use vswitch::fabric::{CaptureSpec, CapturedFrame, Direction, PortChange};
use vswitch::report::{
    AddressList, AddressReport, FabricReport, PortReport, PortState, QueueReport, SwitchReport, WorkerReport,
};
use vswitch::spec::{Attachment, PortSpec, SwitchKind, SwitchSpec};
use vswitch::tally::CounterValues;

/// A switch that only remembers what it is told.
#[derive(Debug, Default)]
pub struct Fake {
    state: Mutex<State>,
    /// Reports given so far.
    pub reports: AtomicUsize,
    /// Captures end when this is set.
    pub capture_ends: Arc<AtomicBool>,
}

#[derive(Debug, Default)]
pub struct State {
    pub switches: Vec<SwitchReport>,
    pub addresses: Vec<AddressReport>,
    /// The last change, pin or restart, in words.
    pub last: String,
}

impl Fake {
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// A switch `lab` with a port in each state.
    pub fn with_lab() -> Arc<Self> {
        let fake = Self::default();
        fake.add_switch(SwitchSpec {
            name: "lab".into(),
            kind: SwitchKind::Private,
            addresses: 16_384,
            aging: 300,
        })
        .unwrap();
        for name in ["red", "blue", "grey", "replay"] {
            let path = format!("/run/switchyard/{name}.sock").into();
            let attachment =
                Attachment::VhostUser { path, mode: vswitch::spec::SocketMode::Server, queues: 2 };
            fake.add_port("lab", PortSpec::new(name, attachment)).unwrap();
        }
        let counted = |frames, bytes, drops: &[(DropReason, u64)]| CounterValues {
            frames,
            bytes,
            drops: drops.iter().copied().collect(),
            ..CounterValues::default()
        };
        {
            let mut state = fake.state();
            let ports = &mut state.switches[0].ports;
            ports[0].state = PortState::Up;
            ports[0].received = counted(1_234_567, 80_000_000, &[(DropReason::Spoofed, 3)]);
            ports[0].sent = counted(12, 768, &[(DropReason::QueueFull, 4)]);
            ports[0].queues[0].received = ports[0].received.clone();
            ports[0].queues[0].sent = ports[0].sent.clone();
            ports[1].state = PortState::Waiting("a client to connect".into());
            ports[2].state = PortState::Faulted("queue 1: descriptor loop at \x1b[2Jindex 7".into());
            ports[2].last_error = Some("the client broke the protocol".into());
            ports[3].state = PortState::Finished;
        }
        Arc::new(fake)
    }

    fn change<T>(&self, switch: &str, port: &str, work: impl FnOnce(&mut PortReport) -> T) -> Outcome<T> {
        let mut state = self.state();
        let ports = &mut find(&mut state.switches, switch)?.ports;
        let found = ports.iter_mut().find(|found| found.name == port);
        found.map(work).ok_or(FabricError::NotFound { what: "port", name: port.into() })
    }
}

fn find<'a>(switches: &'a mut [SwitchReport], name: &str) -> Outcome<&'a mut SwitchReport> {
    let found = switches.iter_mut().find(|switch| switch.name == name);
    found.ok_or(FabricError::NotFound { what: "switch", name: name.into() })
}

fn port_report(spec: &PortSpec) -> PortReport {
    let (kind, attached, queues) = match &spec.attachment {
        Attachment::VhostUser { path, queues, .. } => ("vhost-user", path.display().to_string(), *queues),
        Attachment::Tap { queues, .. } => ("tap", "device".into(), *queues),
        Attachment::Uplink { device, queues } => ("uplink", device.clone(), *queues),
        Attachment::Pcap { .. } => ("pcap", "file".into(), 1),
        Attachment::Synthetic { queues, .. } => ("synthetic", "adapter".into(), *queues),
        Attachment::Legacy { .. } => ("legacy", "adapter".into(), 1),
    };
    let queue = |queue| QueueReport {
        queue,
        cpu: Some(1),
        pinned: false,
        enabled: true,
        load_permille: 125,
        received: CounterValues::default(),
        sent: CounterValues::default(),
    };
    PortReport {
        name: spec.name.clone(),
        kind,
        attached,
        state: PortState::Up,
        last_error: None,
        mtu: spec.mtu,
        mac: spec.mac.map(|mac| mac.to_string()),
        vlan: "passthrough".into(),
        features: vec!["mergeable buffers".into()],
        received: CounterValues::default(),
        sent: CounterValues::default(),
        queues: (0..queues).map(queue).collect(),
    }
}

impl Backend for Fake {
    fn report(&self) -> FabricReport {
        self.reports.fetch_add(1, Ordering::Relaxed);
        let worker = WorkerReport { cpu: 1, state: "polling", queues: 8, load_permille: 345, sleeps: 17 };
        FabricReport { switches: self.state().switches.clone(), workers: vec![worker] }
    }

    fn add_switch(&self, spec: SwitchSpec) -> Outcome<()> {
        let mut state = self.state();
        if state.switches.iter().any(|switch| switch.name == spec.name) {
            return Err(FabricError::Exists { what: "switch", name: spec.name });
        }
        let SwitchSpec { name, kind, addresses: capacity, .. } = spec;
        state.switches.push(SwitchReport { name, kind, addresses: 2, capacity, ports: Vec::new() });
        Ok(())
    }

    fn remove_switch(&self, name: &str) -> Outcome<()> {
        let mut state = self.state();
        find(&mut state.switches, name)?;
        state.switches.retain(|switch| switch.name != name);
        Ok(())
    }

    fn add_port(&self, switch: &str, spec: PortSpec) -> Outcome<()> {
        if spec.name == "broken" {
            return Err(FabricError::failed("opening broken", "no such device"));
        }
        let mut state = self.state();
        let ports = &mut find(&mut state.switches, switch)?.ports;
        if ports.iter().any(|port| port.name == spec.name) {
            return Err(FabricError::Exists { what: "port", name: spec.name });
        }
        ports.push(port_report(&spec));
        Ok(())
    }

    fn remove_port(&self, switch: &str, port: &str) -> Outcome<()> {
        self.change(switch, port, |_| ())?;
        find(&mut self.state().switches, switch)?.ports.retain(|found| found.name != port);
        Ok(())
    }

    fn change_port(&self, switch: &str, port: &str, change: PortChange) -> Outcome<()> {
        self.change(switch, port, |found| found.mtu = change.mtu.unwrap_or(found.mtu))?;
        self.state().last = format!("{change:?}");
        Ok(())
    }

    fn restart_port(&self, switch: &str, port: &str) -> Outcome<()> {
        self.change(switch, port, |found| found.state = PortState::Up)
    }

    fn pin_queue(&self, switch: &str, port: &str, queue: u16, cpu: Option<usize>) -> Outcome<()> {
        self.change(switch, port, |found| match found.queues.get_mut(usize::from(queue)) {
            Some(found) => {
                (found.cpu, found.pinned) = (cpu, cpu.is_some());
                Ok(())
            }
            None => Err(FabricError::NotFound { what: "queue", name: queue.to_string() }),
        })?
    }

    fn addresses(&self, switch: &str, port: Option<&str>, limit: usize) -> Outcome<AddressList> {
        let mut state = self.state();
        find(&mut state.switches, switch)?;
        let mut addresses = state.addresses.clone();
        addresses.retain(|address| port.is_none_or(|port| address.port == port));
        let total = addresses.len();
        addresses.truncate(limit);
        Ok(AddressList { total, addresses })
    }

    fn flush(&self, switch: &str, port: Option<&str>) -> Outcome<usize> {
        let mut state = self.state();
        find(&mut state.switches, switch)?;
        let before = state.addresses.len();
        state.addresses.retain(|address| address.fixed || port.is_some_and(|port| address.port != port));
        Ok(before - state.addresses.len())
    }

    fn add_address(&self, switch: &str, port: &str, mac: Mac, vlan: u16) -> Outcome<()> {
        self.change(switch, port, |_| ())?;
        let address = AddressReport { mac: mac.to_string(), vlan, port: port.into(), age: 0, fixed: true };
        self.state().addresses.push(address);
        Ok(())
    }

    fn remove_address(&self, switch: &str, mac: Mac, vlan: u16) -> Outcome<()> {
        let mut state = self.state();
        find(&mut state.switches, switch)?;
        let before = state.addresses.len();
        state.addresses.retain(|address| address.mac != mac.to_string() || address.vlan != vlan);
        if state.addresses.len() == before {
            return Err(FabricError::NotFound { what: "address", name: mac.to_string() });
        }
        Ok(())
    }

    fn capture(&self, spec: CaptureSpec) -> Outcome<Box<dyn Recording>> {
        find(&mut self.state().switches, &spec.switch)?;
        let frame = |time, port: &str, dropped| CapturedFrame {
            time,
            port: port.into(),
            direction: Direction::Inbound,
            original_len: 100,
            data: vec![0xab; 60].into(),
            dropped,
        };
        let frames = [
            frame(1_000_000_001, "red", None),
            frame(2, "blue", Some(DropReason::Spoofed)),
            frame(3, "red", None),
        ];
        let ends = Arc::clone(&self.capture_ends);
        Ok(Box::new(FakeRecording { frames: Mutex::new(frames.into()), ends }))
    }
}

struct FakeRecording {
    frames: Mutex<VecDeque<CapturedFrame>>,
    ends: Arc<AtomicBool>,
}

impl Recording for FakeRecording {
    fn receive(&self, wait: Duration) -> Vec<CapturedFrame> {
        let frames: Vec<_> = self.frames.lock().unwrap().drain(..).collect();
        if frames.is_empty() {
            std::thread::sleep(wait);
        }
        frames
    }

    fn missed(&self) -> u64 {
        5
    }

    fn ended(&self) -> bool {
        self.ends.load(Ordering::Relaxed)
    }
}

/// A server over a [`Fake`], ended when dropped.
pub struct Server {
    pub dir: TempDir,
    pub socket: PathBuf,
    pub vms: Arc<Manager>,
    pub network: Arc<FakeNetwork>,
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    pub fn start(backend: Arc<Fake>, limits: Limits) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("run/yardd.sock");
        let (stop, stopped) = watch::channel(false);
        let (ready, waiting) = std::sync::mpsc::channel();
        let network = Arc::new(FakeNetwork::default());
        let vms = Arc::new(played::manager(dir.path(), Arc::clone(&network)));
        let (path, machines) = (socket.clone(), Arc::clone(&vms));
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = Listener::bind(&path).unwrap();
                ready.send(()).unwrap();
                serve(listener, Api::new(backend, machines, limits), stopped).await;
            });
        });
        waiting.recv().unwrap();
        Self { dir, socket, vms, network, stop, thread: Some(thread) }
    }

    /// Ends it, and waits until it has.
    pub fn end(&mut self) {
        self.stop.send_replace(true);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }

    pub fn get(&self, path: &str) -> Answer {
        self.send("GET", path, "")
    }

    pub fn send(&self, method: &str, path: &str, body: &str) -> Answer {
        exchange(&self.socket, method, path, body)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        for vm in self.vms.list() {
            let _ = self.vms.stop(&vm.name);
        }
        self.end();
    }
}

/// An answer to a request.
#[derive(Debug, Clone)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    pub fn text(&self) -> String {
        String::from_utf8(self.body.clone()).unwrap()
    }

    /// The `kind` of a problem, after checking that it is one.
    pub fn problem(&self) -> String {
        assert!(self.head.contains("content-type: application/problem+json"), "{}", self.head);
        let json = self.json();
        assert_eq!(json["status"], self.status);
        json["kind"].as_str().unwrap().to_owned()
    }

    /// Reads an answer to its end.
    pub fn read(stream: &mut UnixStream) -> Option<Self> {
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes);
        let end = bytes.windows(4).position(|four| four == b"\r\n\r\n")?;
        let head = String::from_utf8(bytes[..end].to_vec()).unwrap().to_lowercase();
        let body = bytes[end + 4..].to_vec();
        let body = if head.contains("transfer-encoding: chunked") { unchunked(&body) } else { body };
        let status = head.split(' ').nth(1)?.parse().ok()?;
        Some(Self { status, head, body })
    }
}

/// The content of a chunked body.
fn unchunked(mut body: &[u8]) -> Vec<u8> {
    let mut content = Vec::new();
    while let Some(end) = body.windows(2).position(|two| two == b"\r\n") {
        let length = usize::from_str_radix(std::str::from_utf8(&body[..end]).unwrap(), 16).unwrap();
        content.extend_from_slice(&body[end + 2..end + 2 + length]);
        body = &body[end + 2 + length + 2..];
    }
    content
}

pub fn connect(socket: &Path) -> UnixStream {
    let stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    stream.set_write_timeout(Some(Duration::from_secs(30))).unwrap();
    stream
}

pub fn exchange(socket: &Path, method: &str, path: &str, body: &str) -> Answer {
    let mut stream = connect(socket);
    write!(stream, "{method} {path} HTTP/1.1\r\nhost: y\r\ncontent-length: {}\r\n\r\n{body}", body.len())
        .unwrap();
    Answer::read(&mut stream).expect("an answer")
}

/// Compares `found` with a file of the tree, or writes it there if `UPDATE_SNAPSHOTS` is set.
pub fn assert_file(path: &str, found: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, found).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    let line = expected.lines().zip(found.lines()).position(|(a, b)| a != b);
    assert!(
        expected == found,
        "{} differs at line {:?}; UPDATE_SNAPSHOTS=1 writes it anew\n{found}",
        path.display(),
        line.map(|line| line + 1)
    );
}
