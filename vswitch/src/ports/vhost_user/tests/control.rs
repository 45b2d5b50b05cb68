//! The control thread: listening, connecting, refusing, faults, and going away.

use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use vmq::driver::Form;

use super::rig::*;
use crate::ports::vhost_user::features::{Features, Protocol};
use crate::ports::vhost_user::frontend::Frontend;
use crate::ports::vhost_user::message::Request;
use crate::ports::vhost_user::server::{Control, EndpointId, PortEndpoint, PortEvent};
use crate::ports::vhost_user::session::SessionConfig;
use crate::spec::SocketMode;

/// One port under a control thread.
struct Site {
    control: Control,
    id: EndpointId,
    port: Port,
    events: Arc<Mutex<Vec<PortEvent>>>,
    path: PathBuf,
    _directory: tempfile::TempDir,
}

impl Site {
    fn new(mode: SocketMode) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("port.sock");
        let control = Control::start().unwrap();
        let (port, events) = (Port::default(), Arc::default());
        let id = add(&control, &path, mode, &port, &events);
        Self { control, id, port, events, path, _directory: directory }
    }

    fn seen(&self, event: &PortEvent) -> bool {
        self.events.lock().unwrap().contains(event)
    }

    fn count(&self, event: &PortEvent) -> usize {
        self.events.lock().unwrap().iter().filter(|seen| *seen == event).count()
    }

    /// The reason of the last disconnection.
    fn reason(&self) -> Option<String> {
        let events = self.events.lock().unwrap();
        events.iter().rev().find_map(|event| match event {
            PortEvent::Disconnected(reason) => Some(reason.clone()),
            _ => None,
        })?
    }

    fn connect(&self) -> Frontend {
        connect(&self.path)
    }
}

fn add(
    control: &Control,
    path: &Path,
    mode: SocketMode,
    port: &Port,
    events: &Arc<Mutex<Vec<PortEvent>>>,
) -> EndpointId {
    let events = Arc::clone(events);
    control.add(PortEndpoint {
        path: path.into(),
        mode,
        config: pairs(1),
        share: None,
        rings: Box::new(port.clone()),
        events: Box::new(move |event| events.lock().unwrap().push(event)),
    })
}

#[test]
fn server_port_serves_one_client_after_another_and_rings_resume() {
    let site = Site::new(SocketMode::Server);
    let mut guest = Guest::new(Form::Split, 1);
    for _ in 0..3 {
        let mut front = site.connect();
        guest.start(&mut front, Protocol::REPLY_ACK, 0);
        guest.round_trip(0, &site.port, 5);
        drop(front);
        wait_for("the rings to be gone", || site.port.installed() == 0);
    }
    assert_eq!(site.reason(), None);
}

#[test]
fn socket_has_mode_0660_and_is_removed_with_the_port() {
    let site = Site::new(SocketMode::Server);
    let listening = PortEvent::Waiting(format!("listening on {}", site.path.display()));
    wait_for("the socket", || site.seen(&listening));
    let meta = std::fs::metadata(&site.path).unwrap();
    assert!(meta.file_type().is_socket());
    assert_eq!(meta.permissions().mode() & 0o777, 0o660);
    site.control.remove_and_wait(site.id);
    assert!(!site.path.exists());
}

#[test]
fn second_client_is_refused_while_the_first_lives() {
    let site = Site::new(SocketMode::Server);
    let mut first = site.connect();
    first.ask(&Request::GetFeatures).unwrap();
    let mut second = Frontend::from(UnixStream::connect(&site.path).unwrap());
    assert!(second.ask(&Request::GetFeatures).is_err());
    first.ask(&Request::GetFeatures).unwrap();
    drop(first);
    let mut third = site.connect();
    third.ask(&Request::GetFeatures).unwrap();
}

#[test]
fn client_port_connects_and_reconnects_when_its_peer_comes_back() {
    let site = Site::new(SocketMode::Client);
    let mut guest = Guest::new(Form::Packed, 1);
    let mut base = [0x8000; 2];
    let waits = || site.events.lock().unwrap().iter().any(|event| matches!(event, PortEvent::Waiting(_)));
    wait_for("a first attempt in vain", waits);
    for _ in 0..3 {
        let listener = UnixListener::bind(&site.path).unwrap();
        let (stream, _) = listener.accept().unwrap();
        drop(listener);
        std::fs::remove_file(&site.path).unwrap();
        let mut front = Frontend::from(stream);
        front.negotiate(guest.features(), Protocol::REPLY_ACK).unwrap();
        front.show_memory(&[guest.region()], &[guest.arena.fd()]).unwrap();
        guest.start_rings(&mut front, &base);
        guest.round_trip(0, &site.port, 5);
        base = [0, 1].map(|index| front.stop_ring(index).unwrap());
        drop(front);
    }
    wait_for("the last to be noticed", || site.count(&PortEvent::Disconnected(None)) == 3);
}

#[test]
fn stale_socket_is_replaced_but_neither_a_living_one_nor_a_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("port.sock");
    drop(UnixListener::bind(&path).unwrap());
    let control = Control::start().unwrap();
    let (port, events) = (Port::default(), Arc::<Mutex<Vec<PortEvent>>>::default());
    let id = add(&control, &path, SocketMode::Server, &port, &events);
    wait_for("the stale socket to be replaced", || UnixStream::connect(&path).is_ok());

    // The same path once more: taken, said so, and free again when the first port goes.
    let second = Arc::<Mutex<Vec<PortEvent>>>::default();
    add(&control, &path, SocketMode::Server, &port, &second);
    let says = |events: &Arc<Mutex<Vec<PortEvent>>>, text: &str| {
        let events = events.lock().unwrap();
        events.iter().any(|event| matches!(event, PortEvent::Waiting(reason) if reason.contains(text)))
    };
    wait_for("the second port to be refused", || says(&second, "cannot listen"));
    control.remove_and_wait(id);
    wait_for("the second port to listen", || says(&second, "listening on"));

    let file = directory.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    let third = Arc::<Mutex<Vec<PortEvent>>>::default();
    add(&control, &file, SocketMode::Server, &port, &third);
    wait_for("the third port to be refused", || says(&third, "cannot listen"));
    drop(control);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");
    assert!(!path.exists());
}

#[test]
fn faulted_port_accepts_nobody_until_it_is_restarted() {
    let site = Site::new(SocketMode::Server);
    let mut guest = Guest::new(Form::Split, 1);
    let mut front = site.connect();
    guest.start(&mut front, Protocol::REPLY_ACK, 0);
    site.control.fault(site.id);
    wait_for("the rings to be gone", || site.port.installed() == 0);
    assert!(front.ask(&Request::GetFeatures).is_err());
    wait_for("the socket to be gone", || !site.path.exists());
    assert!(UnixStream::connect(&site.path).is_err());
    assert!(site.reason().is_some());
    site.control.restart(site.id);
    let mut front = site.connect();
    guest.start(&mut front, Protocol::REPLY_ACK, 0);
    guest.round_trip(0, &site.port, 5);
}

#[test]
fn changed_configuration_is_offered_to_the_next_client() {
    let site = Site::new(SocketMode::Server);
    let takes_jumbo = |front: &mut Frontend| {
        front.negotiate(Features::MTU, Protocol::REPLY_ACK | Protocol::NET_MTU).unwrap();
        front.tell(&Request::NetSetMtu(9000), &[]).is_ok()
    };
    let mut front = site.connect();
    assert!(!takes_jumbo(&mut front));
    site.control.configure(site.id, SessionConfig { mtu: 9000, ..pairs(1) });
    drop(front);
    assert!(takes_jumbo(&mut site.connect()));
}

#[test]
fn memory_that_does_not_come_back_is_what_the_port_waits_for() {
    let site = Site::new(SocketMode::Server);
    let guest = Guest::new(Form::Split, 1);
    let mut front = site.connect();
    guest.start(&mut front, Protocol::REPLY_ACK | Protocol::CONFIGURE_MEM_SLOTS, 0);
    front.tell(&Request::RemMemReg(guest.region()), &[]).unwrap();
    let waiting = PortEvent::Waiting("guest memory at the addresses of ring 0, 1".into());
    wait_for("the reason", || site.seen(&waiting));
    front.ask(&Request::GetFeatures).unwrap();
    assert_eq!((site.port.installed(), site.count(&waiting)), (0, 1));
}

#[test]
fn client_that_breaks_the_protocol_is_cut_off_with_a_reason() {
    let site = Site::new(SocketMode::Server);
    let mut front = site.connect();
    front.send_raw(&Request::SetFeatures(1 << 50).encode(false), &[]).unwrap();
    wait_for("a reason", || site.reason().is_some_and(|reason| reason.contains("bit 50")));
    let mut next = site.connect();
    next.ask(&Request::GetFeatures).unwrap();
}

#[test]
fn client_gone_in_the_middle_of_a_message_gives_its_rings_back() {
    let message = Request::SetMemTable(vec![Guest::new(Form::Split, 1).region()]).encode(false);
    for cut in 1..message.len() {
        let site = Site::new(SocketMode::Server);
        let guest = Guest::new(Form::Split, 1);
        let mut front = site.connect();
        guest.start(&mut front, Protocol::REPLY_ACK, 0);
        front.send_raw(&message[..cut], &[guest.arena.fd()]).unwrap();
        drop(front);
        wait_for("the rings to be gone", || site.port.installed() == 0);
        wait_for("a reason", || site.reason().is_some_and(|reason| reason.contains("middle of a message")));
    }
}

#[test]
fn stalled_client_does_not_hold_up_another_port() {
    let site = Site::new(SocketMode::Server);
    let mut stalled = site.connect();
    stalled.send_raw(&[1, 0, 0], &[]).unwrap();
    let path = site.path.with_extension("other");
    let (port, events) = (Port::default(), Arc::default());
    add(&site.control, &path, SocketMode::Server, &port, &events);
    wait_for("the other port to listen", || UnixStream::connect(&path).is_ok());
    // The answer of the stalled one comes once the message is complete.
    stalled.send_raw(&[0, 1, 0, 0, 0, 0, 0, 0, 0], &[]).unwrap();
    stalled.answer(crate::ports::vhost_user::message::Kind::GetFeatures).unwrap();
}

#[test]
fn client_that_asks_and_never_listens_is_not_read_any_further() {
    let site = Site::new(SocketMode::Server);
    let deaf = site.connect();
    rustix::io::ioctl_fionbio(&deaf, true).unwrap();
    let ask = Request::GetFeatures.encode(false);
    let mut sent = 0usize;
    let mut idle = 0;
    // Once the answers fill the socket, requests are left lying, too.
    while idle < 50 {
        match rustix::net::send(&deaf, &ask, rustix::net::SendFlags::NOSIGNAL) {
            Ok(_) => (sent, idle) = (sent + 1, 0),
            Err(_) => {
                idle += 1;
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
        }
        assert!(sent < 1_000_000, "requests are taken for ever");
    }
    assert_eq!(site.reason(), None, "it is slow, not wrong");
}

#[test]
fn many_silent_ports_come_and_go() {
    let directory = tempfile::tempdir().unwrap();
    let control = Control::start().unwrap();
    let (port, events) = (Port::default(), Arc::<Mutex<Vec<PortEvent>>>::default());
    let path = |n: usize| directory.path().join(n.to_string());
    let ids: Vec<_> = (0..384).map(|n| add(&control, &path(n), SocketMode::Server, &port, &events)).collect();
    wait_for("all sockets", || (0..384).all(|n| path(n).exists()));
    wait_for("all to listen", || events.lock().unwrap().len() == 384);
    let clients: Vec<Frontend> = (0..384).map(|n| UnixStream::connect(path(n)).unwrap().into()).collect();
    wait_for("all clients", || events.lock().unwrap().len() == 768);
    drop(clients);
    for id in ids {
        control.remove_and_wait(id);
    }
    wait_for("all sockets to be gone", || (0..384).all(|n| !path(n).exists()));
}
