//! A synthetic adapter: a port of the switch, the protocol state of the guest's driver, its buffers and open channels.
//!
//! [`Nic`] is what the VMM's side acts on: memory granted and taken back, channels opened and closed. [`Device`] is what
//! its queues act on, when they find a control message among the frames. One lock guards both; it is never held while a
//! queue is plugged into the switch or out of it, since that waits for a worker, which may be waiting for the lock; another
//! one, which no worker takes, keeps those who plug apart.

mod control;
mod device;
mod quiesce;
mod state;
mod throttle;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use vmbus::channel::{ChannelError, Interrupt, InterruptError, InterruptTarget, OpenChannel};
use vmbus::handover::FromSwitch;
use vmbus::pages::Pages;
use vmq::doorbell::{Doorbell, NotADoorbell};
use vmq::memory::{GuestMemory, Mapping};
use vswitch::backend::{BackendEvent, BackendPort};

use crate::control::NicConfig;
use crate::journal::Journal;
use crate::queue::Channel;

use control::Opened;
pub(crate) use device::{Answer, Device};
pub(crate) use state::State;

/// Memory that one adapter's guest grants at most, in pieces: buffers and rings.
const MAX_GPADLS: usize = 256;

/// Why an adapter, or a channel of it, cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum NicError {
    /// The state file is too short.
    #[error("state of {0} bytes is too short")]
    State(usize),
    /// More channels than the port has queues.
    #[error("channel {index} of a port with {queues} queues")]
    NoSuchQueue {
        /// The channel.
        index: u16,
        /// Queues of the port.
        queues: u16,
    },
    /// It is open.
    #[error("channel {0} is open already")]
    OpenTwice(u16),
    /// A predecessor served it, and what it knew cannot be read: the guest has to find the adapter anew.
    #[error("channel {0} is not known as a predecessor left it")]
    NotRestored(u16),
    /// The port is stopped by a fault, until the operator restarts it or the guest begins anew.
    #[error("port is stopped by a fault")]
    Faulted,
    /// The rings are in memory that the guest did not grant.
    #[error("channel {index} in gpadl {gpadl:#x}, which there is not")]
    NoSuchGpadl {
        /// The channel.
        index: u16,
        /// The guest's handle.
        gpadl: u32,
    },
    /// The rings are unusable.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// The interrupt goes nowhere.
    #[error(transparent)]
    Interrupt(#[from] InterruptError),
    /// The doorbell is none.
    #[error(transparent)]
    Doorbell(#[from] NotADoorbell),
}

/// A channel that the guest opens.
#[derive(Debug)]
pub struct OpenRequest {
    /// 0 is the primary, others are subchannels.
    pub index: u16,
    /// The GPADL with both rings.
    pub gpadl: u32,
    /// The page of it where the ring to the guest starts.
    pub downstream_page: u32,
    /// Where interrupts go.
    pub target: InterruptTarget,
    /// The eventfd that the guest's signals write.
    pub doorbell: OwnedFd,
    /// A predecessor has served it.
    pub resumed: bool,
}

/// An adapter. Dropped, it leaves the guest's channels as they are, for a successor.
#[derive(Debug)]
pub struct Nic {
    device: Arc<Device>,
}

impl Nic {
    /// An adapter that the VMM calls number `device`, on `port`. `state` outlives this process; if `resumed`, it says what a
    /// predecessor left. `requests` takes what is to be told to the VMM, and must not wait.
    ///
    /// # Errors
    /// [`NicError::State`].
    pub fn new(
        device: u32,
        port: BackendPort,
        config: NicConfig,
        state: Arc<Mapping>,
        resumed: bool,
        requests: Box<dyn Fn(FromSwitch) + Send + Sync>,
    ) -> Result<Self, NicError> {
        let len = state.len();
        let state = State::new(state).ok_or(NicError::State(len))?;
        let device = Arc::new(Device::new(device, port.clone(), config, state, resumed, requests));
        let listener = Arc::downgrade(&device);
        port.on_event(move |event| {
            let Some(device) = listener.upgrade() else { return };
            match event {
                BackendEvent::Changed => device.settings_changed(),
                BackendEvent::Restart => device.reconnect(),
                BackendEvent::Faulted | BackendEvent::Removed => {}
            }
        });
        Ok(Self { device })
    }

    /// What its queues act on.
    #[cfg(test)]
    pub(crate) fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// The guest grants `pages`. False if it granted too much, or the same twice.
    pub fn gpadl(&self, gpadl: u32, pages: Pages) -> bool {
        self.device.add_gpadl(gpadl, pages, MAX_GPADLS)
    }

    /// The guest takes memory back. When this returns, nothing touches it.
    pub fn gpadl_teardown(&self, gpadl: u32) {
        self.device.remove_gpadl(gpadl);
    }

    /// Opens a channel whose rings are in `memory`. Where a predecessor's are still being told it is silent until [`Nic::ready`].
    ///
    /// # Errors
    /// It cannot be opened; the guest is to be told.
    pub fn open(&self, memory: &Arc<GuestMemory>, request: OpenRequest) -> Result<(), NicError> {
        let OpenRequest { index, gpadl, downstream_page, target, doorbell, resumed } = request;
        let queues = self.device.queues();
        if index >= queues {
            return Err(NicError::NoSuchQueue { index, queues });
        }
        let rings = self.device.pages(gpadl).ok_or(NicError::NoSuchGpadl { index, gpadl })?;
        let interrupt = Interrupt::new(memory, target)?.trusting(self.device.trust());
        let doorbell = Arc::new(Doorbell::from_peer(doorbell)?);
        self.device.admit(index, &rings, resumed)?;
        let journal = self.device.journal();
        if !resumed {
            journal.forget(index);
        }
        let opened = Opened::new(index, rings, downstream_page, doorbell, interrupt, !resumed, journal)?;
        self.device.open(opened, resumed);
        Ok(())
    }

    /// Closes a channel. When this returns, nothing touches its rings.
    pub fn close(&self, index: u16) {
        self.device.close(index);
    }

    /// A channel's interrupts go elsewhere from now on, the first of them at once.
    ///
    /// # Errors
    /// The guest's event flags are not in its memory: they go where they went.
    pub fn retarget(&self, index: u16, target: InterruptTarget) -> Result<(), InterruptError> {
        self.device.retarget(index, target)
    }

    /// All that a predecessor served has been told: go on.
    pub fn ready(&self) {
        self.device.ready();
    }

    /// Plugs the cable in or out.
    pub fn set_link(&self, up: bool) {
        self.device.set_link(up);
    }

    /// The guest will lose the adapter: gets it quiet, and tells the VMM when it is.
    pub fn quiesce(&self) {
        self.device.quiesce();
    }

    /// Tells the guest of its link what had to wait. How long until there is more to tell, if there is.
    pub fn tick(&self) -> Option<Duration> {
        self.device.tick()
    }

    /// The guest has the adapter no more.
    pub fn gone(self) {
        self.device.forget();
    }
}

impl Drop for Nic {
    fn drop(&mut self) {
        self.device.leave();
    }
}

impl Opened {
    fn new(
        index: u16,
        rings: Pages,
        downstream_page: u32,
        doorbell: Arc<Doorbell>,
        interrupt: Interrupt,
        fresh: bool,
        journal: Journal,
    ) -> Result<Self, NicError> {
        let open =
            OpenChannel::new(&rings, downstream_page, Arc::clone(&doorbell), interrupt.clone(), fresh)?;
        let to_guest = rings.pages(downstream_page, u32::MAX);
        let channel = Channel::new(index, open.outgoing, &to_guest, open.doorbell, open.interrupt, journal);
        let split = ChannelError::Split { pages: rings.count(), downstream_page };
        let channel = Arc::new(channel.ok_or(split)?);
        Ok(Self { channel, rings, downstream_page, doorbell, interrupt, incoming: Some(open.incoming) })
    }

    /// The same channel, read and written on from where its rings stand.
    fn again(&self, index: u16, journal: Journal) -> Result<Self, NicError> {
        let (rings, doorbell) = (self.rings.clone(), Arc::clone(&self.doorbell));
        self.interrupt.revive();
        Self::new(index, rings, self.downstream_page, doorbell, self.interrupt.clone(), false, journal)
    }
}
