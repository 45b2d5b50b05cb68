//! One virtual machine's adapters: a thread that hears from its VMM which channels are open, and serves them.
//!
//! The thread does control work only; frames are moved by the switch's workers. What goes back to the VMM goes through a
//! second thread, since a worker that found a guest's request must not wait for a VMM that does not read. A VMM that asks
//! and does not read the answers is not heard any more until it does; one that leaves what workers have to say unread
//! loses its link.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use vmbus::guid::interface;
use vmbus::handover::{self, FromSwitch, FromVmm, HandoverError, MemoryError, SwitchConnection};
use vmbus::pages::Pages;
use vmq::memory::{GuestMemory, Mapping, MappingError};
use vswitch::backend::BackendPort;

use crate::control::NicConfig;
use crate::nic::{Nic, NicError, OpenRequest};

/// Finds the port of the adapter that the VMM calls by this name.
pub type Resolve = Box<dyn Fn(&str) -> Option<(BackendPort, NicConfig)> + Send>;

/// Called when a link has ended by itself, with the reason; `None` if the VMM closed it.
pub type OnEnd = Box<dyn FnOnce(Option<LinkError>) + Send>;

/// Why a link to a VMM ended.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The connection failed, or the VMM broke its protocol.
    #[error(transparent)]
    Handover(#[from] HandoverError),
    /// It speaks another version.
    #[error("vmm speaks version {0} of the hand-over protocol, not {version}", version = handover::VERSION)]
    Version(u32),
    /// The guest's memory cannot be mapped.
    #[error("cannot map the guest's memory")]
    Memory(#[from] MemoryError),
    /// A device's state cannot be mapped.
    #[error("cannot map a device's state")]
    State(#[from] MappingError),
    /// The guest's memory was not told first, or told twice.
    #[error("guest memory told {0}")]
    MemoryOrder(&'static str),
    /// A device twice under one number, or one adapter under two.
    #[error("device {0} told twice")]
    DeviceTwice(u32),
    /// More devices than any guest has.
    #[error("more than {MAX_DEVICES} devices")]
    TooManyDevices,
    /// An adapter cannot be made.
    #[error(transparent)]
    Nic(#[from] NicError),
    /// No thread.
    #[error("cannot start a thread")]
    Thread(#[from] std::io::Error),
}

/// Devices of one VM.
const MAX_DEVICES: usize = 256;

/// Pages that a VM's adapters are granted at most: 1 GiB, each with an entry in our tables. As much as a VMBus root lets
/// a guest grant in all (`RootConfig::max_gpadl_pages`).
const MAX_PAGES: usize = 1 << 18;

/// What waits to be told to the VMM at most.
const MAX_ERRANDS: usize = 1024;

/// Lines that a link writes to the log about what its guest does wrong.
const MAX_LINES: u32 = 100;

type Nics = Arc<Mutex<BTreeMap<u32, (String, Nic)>>>;

/// The link to one VMM. Dropped, it closes: the guest's channels stay as they are, for a successor to take over.
#[derive(Debug)]
pub struct Link {
    connection: Arc<SwitchConnection>,
    nics: Nics,
    answers: Option<SyncSender<Errand>>,
    /// Nothing the VMM says is acted on, and nothing answered.
    ending: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Link {
    /// Connects to the VMM that listens at `path`, and serves its guest's adapters.
    ///
    /// # Errors
    /// Nobody listens, or there is no thread to be had.
    pub fn connect(path: &Path, resolve: Resolve, on_end: OnEnd) -> Result<Self, LinkError> {
        Self::start(SwitchConnection::connect(path)?, resolve, on_end)
    }

    /// As [`Link::connect`], over a connection that exists.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn start(connection: SwitchConnection, resolve: Resolve, on_end: OnEnd) -> Result<Self, LinkError> {
        let connection = Arc::new(connection);
        let nics = Nics::default();
        let mut link = Self {
            connection: Arc::clone(&connection),
            nics: Arc::clone(&nics),
            answers: None,
            ending: Arc::default(),
            thread: None,
        };
        let (answers, outbox) = sync_channel::<Errand>(MAX_ERRANDS);
        link.answers = Some(answers.clone());
        let (writer, known) = (Arc::clone(&connection), Arc::clone(&nics));
        let write = move || run_errands(&writer, &known, &outbox);
        let writing = std::thread::Builder::new().name("netvsp-answers".into()).spawn(write)?;
        let ending = Arc::clone(&link.ending);
        let serve = move || {
            let mut session = Session::new(&connection, nics, resolve, answers, ending);
            let outcome = session.run();
            session.nics().clear();
            connection.shutdown();
            let _ = session.answers.send(Errand::End);
            let _ = writing.join();
            on_end(outcome.err());
        };
        link.thread = Some(std::thread::Builder::new().name("netvsp-link".into()).spawn(serve)?);
        Ok(link)
    }

    /// Plugs the cable of an adapter in or out. False if there is no such adapter.
    pub fn set_link(&self, name: &str, up: bool) -> bool {
        let nics = self.nics.lock().unwrap_or_else(PoisonError::into_inner);
        let found = nics.values().find(|(known, _)| known == name);
        let found = found.map(|(_, nic)| nic.set_link(up)).is_some();
        if let Some(answers) = &self.answers {
            // Before each errand that waits there is a look anyway.
            let _ = answers.try_send(Errand::Tick);
        }
        found
    }
}

/// What the second thread does.
enum Errand {
    /// Tell the VMM.
    Answer(FromSwitch),
    /// See what guests are to be told.
    Tick,
    /// The link has ended.
    End,
}

fn run_errands(connection: &SwitchConnection, nics: &Nics, errands: &Receiver<Errand>) {
    loop {
        let due = {
            let nics = nics.lock().unwrap_or_else(PoisonError::into_inner);
            nics.values().filter_map(|(_, nic)| nic.tick()).min()
        };
        let errand = match due {
            Some(due) => errands.recv_timeout(due),
            None => errands.recv().map_err(Into::into),
        };
        match errand {
            Ok(Errand::Answer(message)) => {
                if connection.send(&message).is_err() {
                    connection.shutdown();
                }
            }
            Ok(Errand::Tick) | Err(RecvTimeoutError::Timeout) => {}
            Ok(Errand::End) | Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // A VMM that sees the end takes what it asked for as done: nothing of the guest's may be touched by then.
        self.ending.store(true, Ordering::SeqCst);
        self.nics.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.connection.shutdown();
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join();
        }
    }
}

/// What the thread knows.
struct Session {
    connection: Arc<SwitchConnection>,
    nics: Nics,
    resolve: Resolve,
    memory: Option<Arc<GuestMemory>>,
    answers: SyncSender<Errand>,
    ending: Arc<AtomicBool>,
    /// Pages of each GPADL, by device and handle, and of all together.
    granted: BTreeMap<(u32, u32), usize>,
    pages: usize,
    /// Lines that may still be logged.
    lines: u32,
}

impl Session {
    fn new(
        connection: &Arc<SwitchConnection>,
        nics: Nics,
        resolve: Resolve,
        answers: SyncSender<Errand>,
        ending: Arc<AtomicBool>,
    ) -> Self {
        Self {
            connection: Arc::clone(connection),
            nics,
            resolve,
            memory: None,
            answers,
            ending,
            granted: BTreeMap::new(),
            pages: 0,
            lines: MAX_LINES,
        }
    }

    /// False if the guest has had enough of the log.
    fn may_log(&mut self) -> bool {
        let may = self.lines > 0;
        self.lines = self.lines.saturating_sub(1);
        may
    }

    fn nics(&self) -> std::sync::MutexGuard<'_, BTreeMap<u32, (String, Nic)>> {
        self.nics.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits while the VMM does not read.
    fn answer(&self, message: FromSwitch) {
        if self.ending.load(Ordering::SeqCst) {
            // Its adapters may be gone already.
            return;
        }
        // The writer is gone only if the connection is.
        let _ = self.answers.send(Errand::Answer(message));
    }

    fn run(&mut self) -> Result<(), LinkError> {
        while let Some(message) = self.connection.receive()? {
            if self.ending.load(Ordering::SeqCst) {
                break;
            }
            self.handle(message)?;
        }
        Ok(())
    }

    fn memory(&self) -> Result<&Arc<GuestMemory>, LinkError> {
        self.memory.as_ref().ok_or(LinkError::MemoryOrder("not at all"))
    }

    fn handle(&mut self, message: FromVmm) -> Result<(), LinkError> {
        match message {
            FromVmm::Hello { version: handover::VERSION } => {}
            FromVmm::Hello { version } => return Err(LinkError::Version(version)),
            FromVmm::Memory { .. } if self.memory.is_some() => return Err(LinkError::MemoryOrder("twice")),
            FromVmm::Memory { regions, fd } => {
                self.memory = Some(handover::map_memory(&regions, std::os::fd::AsFd::as_fd(&fd))?);
            }
            FromVmm::Device { device, interface, name, state, resumed, .. } => {
                if interface == interface::NIC {
                    self.device(device, name, &state, resumed)?;
                }
            }
            FromVmm::Gpadl { device, gpadl, byte_count, byte_offset, pfns } => {
                self.memory()?;
                let ok = byte_offset == 0 && self.grant((device, gpadl), byte_count, &pfns);
                self.answer(FromSwitch::GpadlAccepted { device, gpadl, ok });
            }
            FromVmm::GpadlTeardown { device, gpadl } => {
                if let Some((_, nic)) = self.nics().get(&device) {
                    nic.gpadl_teardown(gpadl);
                }
                self.pages -= self.granted.remove(&(device, gpadl)).unwrap_or(0);
                self.answer(FromSwitch::GpadlReleased { device, gpadl });
            }
            FromVmm::Open { device, index, gpadl, downstream_page, target, doorbell, resumed, .. } => {
                let memory = Arc::clone(self.memory()?);
                let request = OpenRequest { index, gpadl, downstream_page, target, doorbell, resumed };
                let opened = self.nics().get(&device).map(|(_, nic)| nic.open(&memory, request));
                let ok = matches!(opened, Some(Ok(())));
                if let Some(Err(error)) = opened
                    && self.may_log()
                {
                    tracing::warn!(device, index, %error, "channel not opened");
                }
                self.answer(FromSwitch::Opened { device, index, ok });
            }
            FromVmm::Close { device, index } => {
                if let Some((_, nic)) = self.nics().get(&device) {
                    nic.close(index);
                }
                self.answer(FromSwitch::Closed { device, index });
            }
            FromVmm::Retarget { device, index, target, .. } => {
                let moved = self.nics().get(&device).map(|(_, nic)| nic.retarget(index, target));
                if let Some(Err(error)) = moved
                    && self.may_log()
                {
                    tracing::warn!(device, index, %error, "interrupt not moved");
                }
                self.answer(FromSwitch::Retargeted { device, index });
            }
            FromVmm::Quiesce { device } => {
                if let Some((_, nic)) = self.nics().get(&device) {
                    nic.quiesce();
                }
                // The second thread looks after it.
                let _ = self.answers.send(Errand::Tick);
            }
            FromVmm::Gone { device } => {
                let gone = self.nics().remove(&device);
                if let Some((_, nic)) = gone {
                    nic.gone();
                }
                let pages = &mut self.pages;
                self.granted.retain(|&(of, _), count| {
                    *pages -= if of == device { *count } else { 0 };
                    of != device
                });
            }
            FromVmm::Ready => {
                self.nics().values().for_each(|(_, nic)| nic.ready());
                // What guests are to be told had to wait for it.
                let _ = self.answers.send(Errand::Tick);
            }
        }
        Ok(())
    }

    /// Takes memory that the guest grants. False if it is none, or too much.
    fn grant(&mut self, (device, gpadl): (u32, u32), byte_count: u32, pfns: &[u64]) -> bool {
        let count = pfns.len();
        if self.pages.saturating_add(count) > MAX_PAGES {
            return false;
        }
        let pages = self.memory.as_ref().and_then(|memory| Pages::new(memory, pfns).ok());
        let Some(pages) = pages.filter(|pages| byte_count == pages.len()) else { return false };
        let ok = self.nics().get(&device).is_some_and(|(_, nic)| nic.gpadl(gpadl, pages));
        if ok {
            self.granted.insert((device, gpadl), count);
            self.pages += count;
        }
        ok
    }

    fn device(
        &mut self,
        device: u32,
        name: String,
        state: &std::os::fd::OwnedFd,
        resumed: bool,
    ) -> Result<(), LinkError> {
        self.memory()?;
        let known = |nics: &BTreeMap<u32, (String, Nic)>| {
            nics.contains_key(&device) || nics.values().any(|(known, _)| *known == name)
        };
        if known(&self.nics()) {
            return Err(LinkError::DeviceTwice(device));
        }
        if self.nics().len() == MAX_DEVICES {
            return Err(LinkError::TooManyDevices);
        }
        let Some((port, config)) = (self.resolve)(&name) else {
            if self.may_log() {
                tracing::warn!(device, name, "adapter that no port belongs to");
            }
            return Ok(());
        };
        let state = Mapping::from_peer(std::os::fd::AsFd::as_fd(state), 0, handover::STATE_BYTES)?;
        let (answers, connection) = (self.answers.clone(), Arc::clone(&self.connection));
        let requests = Box::new(move |message| {
            if let Err(TrySendError::Full(_)) = answers.try_send(Errand::Answer(message)) {
                // Whoever asks must not wait, and a VMM that missed a message must not go on as if there was none.
                connection.shutdown();
            }
        });
        let nic = Nic::new(device, port, config, Arc::new(state), resumed, requests)?;
        self.nics().insert(device, (name, nic));
        Ok(())
    }
}
