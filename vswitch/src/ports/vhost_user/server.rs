//! The control thread: one for all vhost-user ports of the process.
//!
//! It sleeps in epoll over listeners, connections and its command queue; a silent port costs nothing but its
//! descriptors. Ports that have nobody to talk to are tried again every quarter of a second, all on one timer.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use crossbeam_queue::SegQueue;
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::io::Errno;
use vmq::doorbell::Doorbell;
use vmq::memory::Share;

use super::endpoint::{Endpoint, Watch};
use super::session::{Rings, SessionConfig};
use crate::spec::SocketMode;

/// Events taken from the kernel at a time.
const EVENTS: usize = 64;

/// Epoll's word for the command queue; ports count from 1.
const COMMANDS: u64 = 0;

/// What happens to a port's connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PortEvent {
    /// Nobody is connected; why, or where the port waits. Or rings of a client wait for their memory.
    Waiting(String),
    /// A peer is there.
    Connected,
    /// It is gone and all rings were given back. A reason, unless it left in good order or by the operator's will.
    Disconnected(Option<String>),
}

/// A vhost-user port to be served.
pub struct PortEndpoint {
    /// Socket.
    pub path: PathBuf,
    /// Who listens.
    pub mode: SocketMode,
    /// What is offered.
    pub config: SessionConfig,
    /// The mappings that its clients are sure to get.
    pub share: Option<Arc<Share>>,
    /// The port's side.
    pub rings: Box<dyn Rings + Send>,
    /// Told about the connection, on the control thread; must not wait for it.
    pub events: Box<dyn Fn(PortEvent) + Send>,
}

impl std::fmt::Debug for PortEndpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { path, mode, config, .. } = self;
        f.debug_struct("PortEndpoint")
            .field("path", path)
            .field("mode", mode)
            .field("config", config)
            .finish()
    }
}

/// A port of a [`Control`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct EndpointId(u64);

enum Command {
    Port(u64, Order),
    Stop,
}

/// What is to happen to a port.
enum Order {
    Add(PortEndpoint),
    Remove(std::sync::mpsc::SyncSender<()>),
    Configure(SessionConfig),
    Restart,
    Fault,
}

struct Shared {
    commands: SegQueue<Command>,
    bell: Doorbell,
}

impl Shared {
    fn command(&self, command: Command) {
        self.commands.push(command);
        self.bell.ring();
    }
}

/// The control thread. Dropping it ends all connections, gives all rings back and removes the sockets.
pub struct Control {
    shared: Arc<Shared>,
    next: AtomicU64,
    thread: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control").field("next", &self.next).finish_non_exhaustive()
    }
}

impl Control {
    /// Starts the thread.
    ///
    /// # Errors
    /// The kernel grants no thread, eventfd or epoll.
    pub fn start() -> std::io::Result<Self> {
        let shared = Arc::new(Shared { commands: SegQueue::new(), bell: Doorbell::new()? });
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, shared.bell.as_fd(), EventData::new_u64(COMMANDS), EventFlags::IN)?;
        let thread = Thread { shared: Arc::clone(&shared), epoll, ports: HashMap::new() };
        let thread = std::thread::Builder::new().name("vhost-user".into()).spawn(move || thread.run())?;
        Ok(Self { shared, next: AtomicU64::new(1), thread: Some(thread) })
    }

    /// Serves one more port.
    pub fn add(&self, port: PortEndpoint) -> EndpointId {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.shared.command(Command::Port(id, Order::Add(port)));
        EndpointId(id)
    }

    /// Serves a port no longer: its rings are given back, its socket goes. Waits until it is done; not to be called from
    /// a port's own callbacks.
    pub fn remove_and_wait(&self, id: EndpointId) {
        let (done, wait) = std::sync::mpsc::sync_channel(1);
        self.shared.command(Command::Port(id.0, Order::Remove(done)));
        let _ = wait.recv();
    }

    /// Changes what the port offers to the next client.
    pub fn configure(&self, id: EndpointId, config: SessionConfig) {
        self.shared.command(Command::Port(id.0, Order::Configure(config)));
    }

    /// Cuts the port's connection and waits for a new one, also after a fault.
    pub fn restart(&self, id: EndpointId) {
        self.shared.command(Command::Port(id.0, Order::Restart));
    }

    /// The data path found the port's rings unusable: cuts the connection, and makes no new one until
    /// [`Control::restart`]. Does not wait, so a worker may call it.
    pub fn fault(&self, id: EndpointId) {
        self.shared.command(Command::Port(id.0, Order::Fault));
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.shared.command(Command::Stop);
        if let Some(thread) = self.thread.take() {
            // The thread cannot wait for itself, should the last owner be one of its ports.
            if thread.thread().id() != std::thread::current().id() {
                let _ = thread.join();
            }
        }
    }
}

struct Thread {
    shared: Arc<Shared>,
    epoll: OwnedFd,
    ports: HashMap<u64, Endpoint>,
}

impl Thread {
    fn run(mut self) {
        self.serve();
        for (&id, port) in &mut self.ports {
            port.end(&Watch { epoll: &self.epoll, id });
        }
    }

    fn serve(&mut self) {
        let mut events: Vec<Event> = Vec::with_capacity(EVENTS);
        loop {
            let timeout = self.attempt_due();
            events.clear();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => {
                    tracing::error!("vhost-user control thread cannot wait: {error}");
                    return;
                }
            }
            for event in &events {
                let data = event.data.u64();
                if data == COMMANDS {
                    self.shared.bell.clear();
                    if !self.obey() {
                        return;
                    }
                    continue;
                }
                let (id, source) = Watch::decode(data);
                // A port that was removed by a command just now may still have an event in this batch.
                if let Some(port) = self.ports.get_mut(&id) {
                    port.ready(source, &Watch { epoll: &self.epoll, id });
                }
            }
        }
    }

    /// Lets every port that is due try to listen or connect; returns how long until the next is due.
    fn attempt_due(&mut self) -> Option<Timespec> {
        let now = Instant::now();
        let mut next: Option<Instant> = None;
        for (&id, port) in &mut self.ports {
            if port.due().is_some_and(|due| due <= now) {
                port.attempt(now, &Watch { epoll: &self.epoll, id });
            }
            next = [next, port.due()].into_iter().flatten().min();
        }
        Timespec::try_from(next?.saturating_duration_since(now)).ok()
    }

    /// Does what was commanded; false to stop.
    fn obey(&mut self) -> bool {
        while let Some(command) = self.shared.commands.pop() {
            let Command::Port(id, order) = command else { return false };
            let watch = Watch { epoll: &self.epoll, id };
            match (order, self.ports.get_mut(&id)) {
                (Order::Add(port), _) => drop(self.ports.insert(id, Endpoint::new(port))),
                (Order::Remove(done), Some(port)) => {
                    port.end(&watch);
                    self.ports.remove(&id);
                    drop(done);
                }
                (Order::Configure(config), Some(port)) => port.configure(config),
                (Order::Restart, Some(port)) => port.restart(Instant::now(), &watch),
                (Order::Fault, Some(port)) => port.fault(&watch),
                (_, None) => {}
            }
        }
        true
    }
}
