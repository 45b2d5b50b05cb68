//! One virtual machine's adapters: a thread that hears from its VMM which channels are open, and serves them.
//!
//! The thread does control work only; frames are moved by the switch's workers. What goes back to the VMM goes through a
//! second thread, since a worker that found a guest's request must not wait for a VMM that does not read.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
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
    /// A device twice under one number.
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

type Nics = Arc<Mutex<BTreeMap<u32, (String, Nic)>>>;

/// The link to one VMM. Dropped, it closes: the guest's channels stay as they are, for a successor to take over.
#[derive(Debug)]
pub struct Link {
    connection: Arc<SwitchConnection>,
    nics: Nics,
    answers: Option<Sender<Errand>>,
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
            thread: None,
        };
        let (answers, outbox) = channel::<Errand>();
        link.answers = Some(answers.clone());
        let (writer, known) = (Arc::clone(&connection), Arc::clone(&nics));
        let write = move || run_errands(&writer, &known, &outbox);
        let writing = std::thread::Builder::new().name("netvsp-answers".into()).spawn(write)?;
        let serve = move || {
            let mut session = Session { nics, resolve, memory: None, answers };
            let outcome = session.run(&connection);
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
            let _ = answers.send(Errand::Tick);
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
                // When sending fails the reader finds out as well.
                let _ = connection.send(&message);
            }
            Ok(Errand::Tick) | Err(RecvTimeoutError::Timeout) => {}
            Ok(Errand::End) | Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
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
    nics: Nics,
    resolve: Resolve,
    memory: Option<Arc<GuestMemory>>,
    answers: Sender<Errand>,
}

impl Session {
    fn nics(&self) -> std::sync::MutexGuard<'_, BTreeMap<u32, (String, Nic)>> {
        self.nics.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn answer(&self, message: FromSwitch) {
        // The writer is gone only if the connection is.
        let _ = self.answers.send(Errand::Answer(message));
    }

    fn run(&mut self, connection: &SwitchConnection) -> Result<(), LinkError> {
        while let Some(message) = connection.receive()? {
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
                let memory = self.memory()?;
                let pages = Pages::new(memory, &pfns).ok();
                let pages = pages.filter(|pages| byte_offset == 0 && byte_count == pages.len());
                let ok = match (self.nics().get(&device), pages) {
                    (Some((_, nic)), Some(pages)) => nic.gpadl(gpadl, pages),
                    _ => false,
                };
                self.answer(FromSwitch::GpadlAccepted { device, gpadl, ok });
            }
            FromVmm::GpadlTeardown { device, gpadl } => {
                if let Some((_, nic)) = self.nics().get(&device) {
                    nic.gpadl_teardown(gpadl);
                }
                self.answer(FromSwitch::GpadlReleased { device, gpadl });
            }
            FromVmm::Open { device, index, gpadl, downstream_page, target, doorbell, resumed, .. } => {
                let memory = Arc::clone(self.memory()?);
                let request =
                    OpenRequest { index, gpadl, downstream_page, target: Some(target), doorbell, resumed };
                let opened = self.nics().get(&device).map(|(_, nic)| nic.open(&memory, request));
                let ok = matches!(opened, Some(Ok(())));
                if let Some(Err(error)) = opened {
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
                if let Some((_, nic)) = self.nics().get(&device) {
                    nic.retarget(index, target);
                }
            }
            FromVmm::Gone { device } => {
                if let Some((_, nic)) = self.nics().remove(&device) {
                    nic.gone();
                }
            }
            FromVmm::Ready => self.nics().values().for_each(|(_, nic)| nic.ready()),
        }
        Ok(())
    }

    fn device(
        &mut self,
        device: u32,
        name: String,
        state: &std::os::fd::OwnedFd,
        resumed: bool,
    ) -> Result<(), LinkError> {
        self.memory()?;
        if self.nics().contains_key(&device) {
            return Err(LinkError::DeviceTwice(device));
        }
        if self.nics().len() == MAX_DEVICES {
            return Err(LinkError::TooManyDevices);
        }
        let Some((port, config)) = (self.resolve)(&name) else {
            tracing::warn!(device, name, "adapter that no port belongs to");
            return Ok(());
        };
        let state = Mapping::shared(std::os::fd::AsFd::as_fd(state), 0, handover::STATE_BYTES)?;
        let answers = self.answers.clone();
        let requests = Box::new(move |message| {
            let _ = answers.send(Errand::Answer(message));
        });
        let nic = Nic::new(device, port, config, Arc::new(state), resumed, requests)?;
        self.nics().insert(device, (name, nic));
        Ok(())
    }
}
