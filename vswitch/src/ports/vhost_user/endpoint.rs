//! One vhost-user port as the control thread sees it: waiting for a peer, connected to one, or stopped by a fault.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::fs::{FileType, Mode, Stat};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::closer::Closer;
use super::server::{PortEndpoint, PortEvent};
use super::session::{Session, SessionConfig};
use super::socket::{Connection, Received, SocketError};
use crate::spec::SocketMode;

/// How long to wait before the next attempt to listen or to connect.
const RETRY: Duration = Duration::from_millis(250);

/// Messages taken from one peer before the others have their turn.
const TURN: usize = 32;

/// What a port waits for that accepts nobody.
const BEHIND: &str = "what its last clients sent to be let go of";

/// What an epoll event of a port refers to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    Listener,
    Connection,
}

/// Whom the port talks to.
#[derive(Debug)]
enum Link {
    /// Nobody, and no listener: the next attempt is due.
    Down { retry: Instant },
    /// Nobody yet; clients may come.
    Listening(Listener),
    /// A peer.
    Connected(Box<Peer>),
    /// Nobody, until the operator restarts the port.
    Faulted,
}

#[derive(Debug)]
struct Peer {
    connection: Connection,
    session: Session,
    /// Epoll waits for the peer to take an answer, not for requests.
    sending: bool,
    /// Stays open so that others are refused rather than left waiting.
    listener: Option<Listener>,
}

/// One port.
pub(super) struct Endpoint {
    port: PortEndpoint,
    link: Link,
    /// What the port last said about its waiting, so as not to repeat it at each attempt.
    said: Option<String>,
    closer: Closer,
    /// Nobody is accepted until then: the closer is behind.
    held: Option<Instant>,
}

impl Endpoint {
    pub(super) fn new(port: PortEndpoint) -> Self {
        let link = Link::Down { retry: Instant::now() };
        Self { port, link, said: None, closer: Closer::threaded(), held: None }
    }

    /// When [`Endpoint::attempt`] is due.
    pub(super) fn due(&self) -> Option<Instant> {
        match self.link {
            Link::Down { retry } => Some(retry),
            _ => self.held,
        }
    }

    /// Tries to listen, to connect, or to accept again.
    pub(super) fn attempt(&mut self, now: Instant, watch: &Watch<'_>) {
        let Link::Down { retry } = &mut self.link else { return self.accept_again(now, watch) };
        *retry = now + RETRY;
        let path = self.port.path.clone();
        match self.port.mode {
            SocketMode::Server => match Listener::open(&path).and_then(|listener| {
                watch.add(listener.socket.as_fd(), Source::Listener)?;
                Ok(listener)
            }) {
                Ok(listener) => {
                    self.link = Link::Listening(listener);
                    self.wait(format!("listening on {}", path.display()));
                }
                Err(error) => self.wait(format!("cannot listen on {}: {error}", path.display())),
            },
            SocketMode::Client if self.closer.is_behind() => self.wait(BEHIND.into()),
            SocketMode::Client => match connect(&path) {
                Ok(socket) => self.connected(socket, None, watch),
                Err(error) => self.wait(format!("cannot connect to {}: {error}", path.display())),
            },
        }
    }

    /// Something happened at the port's listener or connection.
    pub(super) fn ready(&mut self, source: Source, watch: &Watch<'_>) {
        match source {
            Source::Connection => self.serve(watch),
            Source::Listener => {
                // The old peer may have gone just before the new one came.
                self.serve(watch);
                self.accept(watch);
            }
        }
    }

    /// What the next client is offered.
    pub(super) fn configure(&mut self, config: SessionConfig) {
        self.port.config = config;
    }

    /// Cuts the connection; nobody gets a new one until [`Endpoint::restart`].
    pub(super) fn fault(&mut self, watch: &Watch<'_>) {
        drop(self.hang_up(Some("the switch stopped the port".into()), watch));
        self.link = Link::Faulted;
    }

    /// Cuts the connection, if there is one, and starts anew.
    pub(super) fn restart(&mut self, now: Instant, watch: &Watch<'_>) {
        self.end(watch);
        (self.said, self.held) = (None, None);
        self.link = Link::Down { retry: now };
    }

    /// Cuts the connection, if there is one, and listens no more.
    pub(super) fn end(&mut self, watch: &Watch<'_>) {
        drop(self.hang_up(None, watch));
    }

    fn wait(&mut self, reason: String) {
        if self.said.as_ref() != Some(&reason) {
            (self.port.events)(PortEvent::Waiting(reason.clone()));
            self.said = Some(reason);
        }
    }

    fn listener(&self) -> Option<&Listener> {
        match &self.link {
            Link::Listening(listener) => Some(listener),
            Link::Connected(peer) => peer.listener.as_ref(),
            Link::Down { .. } | Link::Faulted => None,
        }
    }

    /// Accepts nobody for a while: each would leave something that has to be let go of.
    fn hold(&mut self, now: Instant, watch: &Watch<'_>) {
        self.held = Some(now + RETRY);
        if let Some(listener) = self.listener() {
            let _ = watch.modify(listener.socket.as_fd(), Source::Listener, EventFlags::empty());
        }
        if let Link::Listening(_) = self.link {
            self.wait(BEHIND.into());
        }
    }

    fn accept_again(&mut self, now: Instant, watch: &Watch<'_>) {
        if self.closer.is_behind() {
            return self.hold(now, watch);
        }
        self.held = None;
        if let Some(listener) = self.listener() {
            let _ = watch.modify(listener.socket.as_fd(), Source::Listener, EventFlags::IN);
        }
        if let Link::Listening(_) = self.link {
            self.wait(format!("listening on {}", self.port.path.display()));
        }
    }

    fn accept(&mut self, watch: &Watch<'_>) {
        if self.closer.is_behind() {
            return self.hold(Instant::now(), watch);
        }
        let Some(listener) = self.listener() else { return };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = match rustix::net::accept_with(&listener.socket, flags) {
            Ok(socket) => socket,
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => return,
            // Out of descriptors: the client would be announced for ever, so the listener has to go for a while.
            Err(error) => return self.stop_listening(error),
        };
        match std::mem::replace(&mut self.link, Link::Faulted) {
            Link::Listening(listener) => self.connected(socket, Some(listener), watch),
            // A second client is refused.
            other => {
                self.link = other;
                self.closer.dispose(socket);
            }
        }
    }

    fn stop_listening(&mut self, error: Errno) {
        if let Link::Connected(peer) = &mut self.link {
            peer.listener = None;
        } else {
            self.link = Link::Down { retry: Instant::now() + RETRY };
            self.wait(format!("cannot accept on {}: {error}", self.port.path.display()));
        }
    }

    fn connected(&mut self, socket: OwnedFd, listener: Option<Listener>, watch: &Watch<'_>) {
        let mut session = Session::new(self.port.config.clone(), self.port.share.clone());
        session.close_with(self.closer.clone());
        let connection = Connection::new(socket).and_then(|connection| {
            watch.add(connection.as_fd(), Source::Connection)?;
            Ok(connection)
        });
        match connection {
            Ok(connection) => {
                self.link = Link::Connected(Box::new(Peer { connection, session, sending: false, listener }));
                self.said = None;
                (self.port.events)(PortEvent::Connected);
            }
            Err(error) => {
                self.link = listener.map_or(Link::Down { retry: Instant::now() + RETRY }, Link::Listening);
                self.wait(describe(&error));
            }
        }
    }

    fn serve(&mut self, watch: &Watch<'_>) {
        let Link::Connected(peer) = &mut self.link else { return };
        match peer.serve(&mut *self.port.rings, watch) {
            Ok(true) => match peer.session.waits_for() {
                Some(what) => self.wait(what),
                None => self.said = None,
            },
            Ok(false) => self.disconnect(None, watch),
            Err(reason) => self.disconnect(Some(reason), watch),
        }
    }

    /// Ends the connection and waits for another.
    fn disconnect(&mut self, reason: Option<String>, watch: &Watch<'_>) {
        match self.hang_up(reason, watch) {
            Some(listener) => {
                self.link = Link::Listening(listener);
                self.wait(format!("listening on {}", self.port.path.display()));
            }
            None => self.link = Link::Down { retry: Instant::now() + RETRY },
        }
    }

    /// Takes all rings back, then lets go of connection and mappings. The listener is left.
    fn hang_up(&mut self, reason: Option<String>, watch: &Watch<'_>) -> Option<Listener> {
        match std::mem::replace(&mut self.link, Link::Faulted) {
            Link::Connected(peer) => {
                let Peer { connection, mut session, listener, .. } = *peer;
                session.close(&mut *self.port.rings);
                watch.remove(connection.as_fd());
                self.closer.dispose((connection, session));
                (self.port.events)(PortEvent::Disconnected(reason));
                listener
            }
            Link::Listening(listener) => Some(listener),
            Link::Down { .. } | Link::Faulted => None,
        }
    }
}

impl Peer {
    /// Serves what has come; false if the peer left in good order.
    fn serve(&mut self, rings: &mut dyn super::session::Rings, watch: &Watch<'_>) -> Result<bool, String> {
        let io = |error: SocketError| describe(&error);
        self.connection.flush().map_err(io)?;
        for _ in 0..TURN {
            match self.connection.receive().map_err(io)? {
                Received::Closed => return Ok(false),
                Received::Pending => break,
                Received::Message(message) => {
                    let reply = self.session.handle(message, rings).map_err(|error| error.report())?;
                    if let Some(reply) = reply {
                        self.connection.send(reply).map_err(io)?;
                    }
                }
            }
        }
        if self.connection.is_sending() != self.sending {
            self.sending = self.connection.is_sending();
            let flags = if self.sending { EventFlags::OUT } else { EventFlags::IN };
            watch
                .modify(self.connection.as_fd(), Source::Connection, flags)
                .map_err(|error| error.to_string())?;
        }
        Ok(true)
    }
}

fn describe(error: &dyn std::error::Error) -> String {
    error.source().map_or_else(|| error.to_string(), |cause| format!("{error}: {cause}"))
}

/// Registers descriptors of one port with the control thread's epoll.
pub(super) struct Watch<'e> {
    pub epoll: &'e OwnedFd,
    pub id: u64,
}

impl Watch<'_> {
    fn data(&self, source: Source) -> EventData {
        EventData::new_u64(self.id << 1 | u64::from(source == Source::Connection))
    }

    /// What [`Watch::data`] wrote: the port and the source.
    pub(super) fn decode(data: u64) -> (u64, Source) {
        (data >> 1, if data & 1 == 1 { Source::Connection } else { Source::Listener })
    }

    fn add(&self, fd: BorrowedFd<'_>, source: Source) -> Result<(), Errno> {
        epoll::add(self.epoll, fd, self.data(source), EventFlags::IN)
    }

    /// What is closed elsewhere later must not be announced any more.
    fn remove(&self, fd: BorrowedFd<'_>) {
        let _ = epoll::delete(self.epoll, fd);
    }

    fn modify(&self, fd: BorrowedFd<'_>, source: Source, flags: EventFlags) -> Result<(), Errno> {
        epoll::modify(self.epoll, fd, self.data(source), flags)
    }
}

/// A listening socket, whose file goes with it.
#[derive(Debug)]
struct Listener {
    socket: OwnedFd,
    path: PathBuf,
    /// The socket file's device and inode, so that nobody else's is removed.
    file: (u64, u64),
}

fn socket() -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

fn connect(path: &Path) -> Result<OwnedFd, Errno> {
    let socket = socket()?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

fn identity(stat: &Stat) -> (u64, u64) {
    (stat.st_dev, stat.st_ino)
}

/// A socket that nobody answers on was left behind by a crash. Anything but a socket is not ours to remove.
fn is_stale(path: &Path) -> bool {
    let is_socket = |stat: Stat| FileType::from_raw_mode(stat.st_mode) == FileType::Socket;
    rustix::fs::lstat(path).is_ok_and(is_socket) && connect(path).err() == Some(Errno::CONNREFUSED)
}

impl Listener {
    fn open(path: &Path) -> Result<Self, Errno> {
        let address = SocketAddrUnix::new(path)?;
        let socket = socket()?;
        match rustix::net::bind(&socket, &address) {
            Err(Errno::ADDRINUSE) if is_stale(path) => {
                rustix::fs::unlink(path)?;
                rustix::net::bind(&socket, &address)?;
            }
            bound => bound?,
        }
        let file = identity(&rustix::fs::stat(path)?);
        let listener = Self { socket, path: path.to_owned(), file };
        // Before anybody can connect.
        rustix::fs::chmod(path, Mode::from_raw_mode(0o660))?;
        rustix::net::listen(&listener.socket, 8)?;
        Ok(listener)
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if rustix::fs::stat(&self.path).is_ok_and(|stat| identity(&stat) == self.file) {
            let _ = rustix::fs::unlink(&self.path);
        }
    }
}
