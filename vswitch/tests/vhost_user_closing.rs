//! A descriptor whose closing waits, here for a TCP socket's linger time, holds up no other port. A test binary of its
//! own with one test, as it looks at the threads of the process.

#![allow(clippy::unwrap_used, reason = "a test binary")]

mod support;

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vswitch::ports::vhost_user::frontend::Frontend;
use vswitch::ports::vhost_user::message::{Request, VringFd};
use vswitch::ports::vhost_user::server::{Control, PortEndpoint, PortEvent};
use vswitch::ports::vhost_user::session::SessionConfig;
use vswitch::spec::SocketMode;

use support::NoRings;

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(20), "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn connect(path: &Path) -> Frontend {
    let mut front = None;
    wait_for("a connection", || {
        front = UnixStream::connect(path).ok().map(Frontend::from);
        front.as_mut().is_some_and(|front| front.ask(&Request::GetFeatures).is_ok())
    });
    front.unwrap()
}

/// A socket that has more to send than its other end takes, and whose closing waits for that.
fn lingering() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let theirs = listener.accept().unwrap().0;
    ours.set_nonblocking(true).unwrap();
    while ours.write(&[0; 1 << 16]).is_ok() {}
    rustix::net::sockopt::set_socket_linger(&ours, Some(Duration::from_secs(600))).unwrap();
    (ours, theirs)
}

/// Threads that are closing something.
fn closing() -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    let name =
        |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
    tasks.map(name).filter(|name| name.trim() == "vhost-closer").count()
}

/// Two ports, and a gate that the control thread waits at whenever a client comes.
struct Site {
    _control: Control,
    paths: [PathBuf; 2],
    gate: Arc<Mutex<()>>,
    events: Arc<Mutex<Vec<PortEvent>>>,
    _directory: tempfile::TempDir,
}

impl Site {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (control, gate, events) = (Control::start().unwrap(), Arc::default(), Arc::default());
        let paths = ["evil", "good"].map(|name| directory.path().join(name));
        for path in &paths {
            let (gate, events): (Arc<Mutex<()>>, Arc<Mutex<Vec<PortEvent>>>) =
                (Arc::clone(&gate), Arc::clone(&events));
            control.add(PortEndpoint {
                path: path.clone(),
                mode: SocketMode::Server,
                config: SessionConfig::default(),
                share: None,
                rings: Box::new(NoRings),
                events: Box::new(move |event| {
                    events.lock().unwrap().push(event);
                    drop(gate.lock().unwrap());
                }),
            });
        }
        Self { _control: control, paths, gate, events, _directory: directory }
    }

    fn count(&self, of: impl Fn(&PortEvent) -> bool) -> usize {
        self.events.lock().unwrap().iter().filter(|event| of(event)).count()
    }

    /// Has a client of port `port` send `bytes` with a lingering socket, of which the control thread gets the last handle.
    /// Returns the socket's other end.
    fn send(&self, port: usize, bytes: &[u8]) -> TcpStream {
        let (ours, theirs) = lingering();
        let shut = self.gate.lock().unwrap();
        let came = |event: &PortEvent| *event == PortEvent::Connected;
        let before = self.count(came);
        let first = UnixStream::connect(&self.paths[0]).unwrap();
        wait_for("the control thread to stand still", || self.count(came) > before);
        let second = (port > 0).then(|| UnixStream::connect(&self.paths[port]).unwrap());
        let mut front = Frontend::from(second.unwrap_or(first));
        front.send_raw(bytes, &[ours.as_fd()]).unwrap();
        drop((ours, shut));
        theirs
    }
}

#[test]
fn descriptor_whose_closing_waits_holds_up_no_other_port() {
    let site = Site::new();
    drop(connect(&site.paths[0]));
    let mut good = connect(&site.paths[1]);
    wait_for("what came before to be closed", || closing() == 0);
    let message = Request::SetVringErr(VringFd { index: 0, polled: false }).encode(false);
    // With a whole message, with a part of one, and from a client that is refused because there is one already.
    let mut others = Vec::new();
    for (port, bytes) in [(0, &message[..]), (0, &message[..1]), (1, &message[..])] {
        others.push(site.send(port, bytes));
        wait_for("it to be closed", || closing() >= others.len());
        good.ask(&Request::GetFeatures).unwrap();
        assert!(closing() >= others.len(), "the answer waited for the closing");
    }
    let foreign = |event: &PortEvent| match event {
        PortEvent::Disconnected(Some(reason)) => reason.contains("socket:["),
        _ => false,
    };
    assert_eq!(site.count(foreign), 2);
    drop(others);
    wait_for("all to be closed", || closing() == 0);
}
