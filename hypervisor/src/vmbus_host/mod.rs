//! VMBus of one guest: the root, its devices here (integration services) and in the switch (NICs), and the guest's two ends of
//! signalling: messages through the synthetic interrupt controller, events through eventfds.
//!
//! One thread owns it all. Processors leave messages of the guest in a bounded queue and are told to try again while it is
//! full or they come too fast, so a guest that posts without end keeps nobody busy but itself. While a message waits for the guest to take the
//! last one, the thread looks again after 0.2 ms, later after up to 20 ms.

#![forbid(unsafe_code)]

mod answers;
mod host;
mod inbox;
mod nics;
mod switch;
mod wires;

#[cfg(test)]
mod chaos;
#[cfg(test)]
mod tests;

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use vmbus::handover::FromSwitch;
use vmbus::root::Description;
use vmq::doorbell::Doorbell;

use crate::control::{Nic, NicStatus};
use crate::kvm::{EventId, KvmError, Vm};
use crate::memory::Memory;
use crate::services::pump::Pump;
use crate::synic::Synic;

use host::Host;
use inbox::Inbox;
pub use inbox::Port;
use switch::{Link, Unheard};

/// Ties a guest's signal-event hypercalls to eventfds.
pub trait Events: Send + Sync + fmt::Debug {
    /// From now on the hypercall for connection `id` rings `doorbell`.
    ///
    /// # Errors
    /// The kernel refuses.
    fn tie(&self, id: EventId, doorbell: &Doorbell) -> Result<(), KvmError>;
    /// Undoes it.
    fn untie(&self, id: EventId);
}

impl Events for Vm {
    fn tie(&self, id: EventId, doorbell: &Doorbell) -> Result<(), KvmError> {
        self.signal_event_rings(id, doorbell)
    }

    fn untie(&self, id: EventId) {
        if let Err(error) = self.signal_event_is_over(id) {
            tracing::warn!(id, %error, "connection was not tied");
        }
    }
}

/// The parts of a machine that VMBus works with; they change with a reset.
#[derive(Debug, Clone)]
pub struct Machine {
    /// Signals from the guest.
    pub events: Arc<dyn Events>,
    /// Messages and interrupts to it.
    pub synic: Arc<Synic>,
}

/// What the thread is told.
#[derive(Debug)]
enum Ask {
    /// There is something new in the inbox.
    Guest,
    Attach(Machine),
    /// Let go of the guest; who asked waits.
    Detach(Sender<()>),
    AddNic(Nic, Sender<Result<(), String>>),
    RemoveNic(String, Sender<Result<Receiver<()>, String>>),
    Report(Sender<Report>),
    SwitchCame(Link),
    SwitchSaid(u64, FromSwitch, Unheard),
    SwitchLeft(u64),
    End,
}

/// What VMBus tells of itself.
#[derive(Debug, Clone)]
pub struct Report {
    /// The root.
    pub root: Description,
    /// NICs.
    pub nics: Vec<NicStatus>,
    /// Devices that the switch stopped: name, reason.
    pub faults: Vec<(String, String)>,
}

/// Called with a device's name and the reason when it is stopped.
pub type OnFault = Box<dyn Fn(&str, &str) + Send>;

/// VMBus before it has its guest's memory: processors need its port to be made.
#[derive(Debug)]
pub struct Setup {
    inbox: Arc<Inbox>,
    sender: Sender<Ask>,
    asks: Receiver<Ask>,
}

impl Default for Setup {
    fn default() -> Self {
        let (sender, asks) = channel();
        Self { inbox: Arc::default(), sender, asks }
    }
}

impl Setup {
    /// The processors' end.
    pub fn port(&self) -> Arc<Port> {
        Arc::new(Port { inbox: Arc::clone(&self.inbox), asks: self.sender.clone() })
    }

    /// Starts the threads, which call `confine` first. `services` are offered at once; a switch may connect at `listener` whenever it likes.
    ///
    /// # Errors
    /// Out of threads.
    pub fn start(
        self,
        memory: Arc<Memory>,
        vcpus: u32,
        services: Arc<Pump>,
        listener: Option<OwnedFd>,
        on_fault: OnFault,
        confine: fn() -> std::io::Result<()>,
    ) -> std::io::Result<Vmbus> {
        let Self { inbox, sender, asks } = self;
        let host = Host::new(memory, vcpus, services, inbox, on_fault);
        let thread = crate::confine::spawn("vmbus", confine, move || host.run(&asks))?;
        if let Some(listener) = listener {
            switch::listen(listener, sender.clone(), confine)?;
        }
        Ok(Vmbus { asks: sender, thread: Some(thread) })
    }
}

/// The thread's handle. Dropping it ends the thread.
#[derive(Debug)]
pub struct Vmbus {
    asks: Sender<Ask>,
    thread: Option<JoinHandle<()>>,
}

impl Vmbus {
    /// There is a machine to work with.
    pub fn attach(&self, machine: Machine) {
        let _ = self.asks.send(Ask::Attach(machine));
    }

    /// Closes everything and forgets what was known of the guest. When this returns nothing touches the guest's memory any
    /// more. To be called while it does not run.
    pub fn detach(&self) {
        self.wait(Ask::Detach);
    }

    /// Plugs a NIC in.
    ///
    /// # Errors
    /// A sentence for the operator.
    pub fn add_nic(&self, nic: Nic) -> Result<(), String> {
        self.wait(|done| Ask::AddNic(nic, done)).unwrap_or_else(|| Err(GONE.into()))
    }

    /// Unplugs a NIC. What is returned is hung up once the guest has released it.
    ///
    /// # Errors
    /// A sentence for the operator.
    pub fn remove_nic(&self, name: &str) -> Result<Receiver<()>, String> {
        self.wait(|done| Ask::RemoveNic(name.into(), done)).unwrap_or_else(|| Err(GONE.into()))
    }

    /// What VMBus tells of itself.
    pub fn report(&self) -> Option<Report> {
        self.wait(Ask::Report)
    }

    fn wait<T>(&self, ask: impl FnOnce(Sender<T>) -> Ask) -> Option<T> {
        let (done, answer) = channel();
        self.asks.send(ask(done)).ok()?;
        answer.recv().ok()
    }
}

const GONE: &str = "VMBus of this guest has ended";

impl Drop for Vmbus {
    fn drop(&mut self) {
        let _ = self.asks.send(Ask::End);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
