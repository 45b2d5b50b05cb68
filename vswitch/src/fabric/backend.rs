//! A port of the fabric, as the device model that carries its frames sees it.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vmq::Mac;
use vmq::rss::{HashTypes, IndirectionTable, Rss, ToeplitzKey};

use super::Fabric;
use super::attach::Attached;
use super::guest::GuestStatus;
use crate::backend::{FrameSink, FrameSource};
use crate::drops::DropReason;
use crate::error::FabricError;
use crate::port::PortCore;
use crate::ports::device::socket;
use crate::queue::{Sink, SinkQueue, Source, SourceQueue};
use crate::report::PortState;
use crate::spec::{Attachment, PortSpec};

/// What the operator wants of the port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackendSettings {
    /// The guest's address.
    pub mac: Option<Mac>,
    /// The guest may use other addresses.
    pub spoofing: bool,
    /// Largest IP packet in bytes.
    pub mtu: u16,
    /// Offer checksum and segmentation offloads.
    pub offloads: bool,
    /// Hand over merged TCP segments.
    pub coalesce: bool,
    /// Queues.
    pub queues: u16,
}

impl From<&PortSpec> for BackendSettings {
    fn from(spec: &PortSpec) -> Self {
        Self {
            mac: spec.mac,
            spoofing: spec.spoofing,
            mtu: spec.mtu,
            offloads: spec.offloads,
            coalesce: spec.coalesce,
            queues: spec.attachment.queues(),
        }
    }
}

/// What happens to the port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackendEvent {
    /// The operator changed its settings.
    Changed,
    /// A fault disconnected all queues.
    Faulted,
    /// The operator restarts it: what is connected is gone, and may be connected again.
    Restart,
    /// It is no more.
    Removed,
}

/// How the guest wants its frames spread.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestRss {
    /// Toeplitz key.
    pub key: [u8; 40],
    /// Queue numbers.
    pub table: Vec<u16>,
    /// What is hashed.
    pub types: HashTypes,
}

type Listener = Box<dyn Fn(BackendEvent) + Send + Sync>;

/// What fabric and device model share.
#[derive(Default)]
pub(super) struct Shared {
    pub(super) status: GuestStatus,
    settings: Mutex<Option<BackendSettings>>,
    steering: Mutex<Option<Rss>>,
    listener: Mutex<Option<Arc<Listener>>>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("status", &self.status).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// Tells the device model. It may call back, so no lock of its own is held; the fabric's may be.
    pub(super) fn notify(&self, event: BackendEvent) {
        let listener = lock(&self.listener).clone();
        if let Some(listener) = listener {
            listener(event);
        }
    }

    pub(super) fn set(&self, spec: &PortSpec) {
        *lock(&self.settings) = Some(spec.into());
    }

    /// The guest's own spread, if it asked for one that fits.
    pub(super) fn steering(&self) -> Option<Rss> {
        lock(&self.steering).clone()
    }
}

/// A port, for the device model that carries its frames. Clones stand for the same port.
#[derive(Debug, Clone)]
pub struct BackendPort {
    core: Arc<PortCore>,
    sources: Vec<Arc<SourceQueue>>,
    sinks: Vec<Arc<SinkQueue>>,
    shared: Arc<Shared>,
}

impl BackendPort {
    /// Queues of the port.
    pub fn queues(&self) -> u16 {
        u16::try_from(self.sinks.len()).unwrap_or(u16::MAX)
    }

    /// What the operator wants now.
    pub fn settings(&self) -> BackendSettings {
        let settings = lock(&self.shared.settings).clone();
        settings.unwrap_or(BackendSettings {
            mac: None,
            spoofing: false,
            mtu: PortSpec::MTU,
            offloads: true,
            coalesce: true,
            queues: self.queues(),
        })
    }

    /// Calls `listener` for all that happens to the port from now on. It is called with the fabric locked: it must not
    /// call the fabric, but may use the port.
    pub fn on_event(&self, listener: impl Fn(BackendEvent) + Send + Sync + 'static) {
        *lock(&self.shared.listener) = Some(Arc::new(Box::new(listener)));
    }

    /// Frames of queue number `queue` come from `source` and go to `sink` from now on.
    pub fn connect(&self, queue: u16, source: Box<dyn FrameSource>, sink: Box<dyn FrameSink>) {
        let index = usize::from(queue);
        let (Some(from), Some(to)) = (self.sources.get(index), self.sinks.get(index)) else { return };
        if self.core.is_faulted() {
            return;
        }
        to.swap(Sink::Backend(sink));
        self.shared.status.enabled.fetch_or(1 << (queue & 63), Ordering::SeqCst);
        self.core.changed();
        from.swap(Source::Backend(source));
        self.core.nudge(index);
    }

    /// Takes a queue's source and sink out. When this returns, no worker touches them any more.
    pub fn disconnect(&self, queue: u16) {
        let index = usize::from(queue);
        let (Some(from), Some(to)) = (self.sources.get(index), self.sinks.get(index)) else { return };
        from.swap(Source::Absent);
        // The worker lets go of the doorbell.
        self.core.nudge(index);
        let reason = if self.core.is_faulted() { DropReason::Faulted } else { DropReason::NotReady };
        to.swap(Sink::Absent(reason));
        self.shared.status.enabled.fetch_and(!(1 << (queue & 63)), Ordering::SeqCst);
        self.core.changed();
    }

    /// Lets the queue's worker look at it now.
    pub fn nudge(&self, queue: u16) {
        self.core.nudge(usize::from(queue));
    }

    /// Stops the port: `reason` is shown until the operator restarts it.
    pub fn fault(&self, reason: impl std::fmt::Display) {
        self.core.fault(reason);
    }

    /// As [`BackendPort::fault`], for what is no guest's doing: one that begins anew is not to end it.
    pub fn fault_for_good(&self, reason: impl std::fmt::Display) {
        self.core.fault_for_good(reason);
    }

    /// Ends a fault as the operator's restart does, for a guest that begins anew. All queues are disconnected.
    pub fn recover(&self) {
        tracing::info!(switch = %self.core.switch, port = %self.core.name, "port restarted, its guest begins anew");
        self.core.clear_fault("the guest's driver".into());
    }

    /// True from a fault until the restart.
    pub fn is_faulted(&self) -> bool {
        self.core.is_faulted()
    }

    /// True from [`BackendPort::fault_for_good`] until the operator's restart.
    pub fn is_faulted_for_good(&self) -> bool {
        self.core.is_faulted_for_good()
    }

    /// Changes the state that is shown, unless a fault is.
    pub fn set_state(&self, state: PortState) {
        self.core.set_state(state);
    }

    /// What was negotiated, in words, for the operator.
    pub fn set_features(&self, features: Vec<String>) {
        *lock(&self.shared.status.features) = features;
    }

    /// Spreads frames as the guest asks; `None`, or values that do not fit, leave it to the port's configuration.
    /// False if they do not fit.
    pub fn set_steering(&self, wanted: Option<&GuestRss>) -> bool {
        let rss = wanted.map(|wanted| {
            let key = ToeplitzKey::new(&wanted.key)?;
            let table = IndirectionTable::new(&wanted.table, self.queues())?;
            Ok::<_, vmq::rss::RssError>(Rss { key, table, types: wanted.types })
        });
        let rss = rss.transpose();
        let fits = rss.is_ok();
        *lock(&self.shared.steering) = rss.ok().flatten();
        self.core.changed();
        fits
    }
}

impl Fabric {
    /// The port, for the device model of a [`Attachment::Synthetic`] adapter.
    ///
    /// # Errors
    /// No such switch or port, or it is of another kind.
    pub fn backend(&self, switch: &str, port: &str) -> Result<BackendPort, FabricError> {
        let inner = self.lock();
        let port = inner.switch(switch)?.port(port)?;
        let Attached::Backend(shared) = &port.attached else {
            return Err(FabricError::invalid("port", format!("{} is no synthetic adapter", port.spec.name)));
        };
        Ok(BackendPort {
            core: Arc::clone(&port.core),
            sources: port.sources.iter().map(|(_, source)| Arc::clone(source)).collect(),
            sinks: port.sinks.clone(),
            shared: Arc::clone(shared),
        })
    }

    /// Connects a [`Attachment::Legacy`] adapter: `socket` is one end of a pair of sequenced packets, each a frame behind
    /// a virtio-net header of 12 bytes. A connection from before is closed, a fault cleared.
    ///
    /// # Errors
    /// No such switch or port, or it is of another kind.
    pub fn connect_legacy(&self, switch: &str, port: &str, socket: OwnedFd) -> Result<(), FabricError> {
        let inner = self.lock();
        let port = inner.switch(switch)?.port(port)?;
        if !matches!(port.spec.attachment, Attachment::Legacy { .. }) {
            return Err(FabricError::invalid("port", format!("{} is no legacy adapter", port.spec.name)));
        }
        port.core.clear_fault(port.spec.attachment.waits_for());
        let (from, to) = socket::open(&port.spec.attachment.describe(), socket);
        if let (Some((task, source)), Some(sink)) = (port.sources.first(), port.sinks.first()) {
            sink.swap(Sink::Device(Box::new(to)));
            source.swap(Source::Device(Box::new(from)));
            self.workers.nudge(*task);
        }
        port.core.set_state(PortState::Up);
        Ok(())
    }
}

/// Queues in use, one bit each.
pub(super) fn enabled(attached: &Attached) -> u64 {
    let status: &AtomicU64 = match attached {
        Attached::Guest(_, status) => &status.enabled,
        Attached::Backend(shared) => &shared.status.enabled,
        Attached::Local => return u64::MAX,
    };
    status.load(Ordering::SeqCst)
}
