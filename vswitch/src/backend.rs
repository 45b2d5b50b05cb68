//! Ports whose frames come from a device model outside this crate: it brings a [`FrameSource`] and a [`FrameSink`] for
//! each queue, and plugs them in through a [`BackendPort`].

use vmq::frame::{Accepts, Burst};
use vmq::worker::{Nanos, Wait};

use crate::tally::Tally;

pub use crate::fabric::backend::{BackendEvent, BackendPort, BackendSettings, GuestRss};

/// Why a queue stopped, in words for the operator.
pub type BackendFault = Box<dyn std::error::Error + Send + Sync>;

/// Frames that a guest sends. Polled by one worker at a time.
pub trait FrameSource: Send + std::fmt::Debug {
    /// Takes up to a burst of frames, and counts in `tally` what it drops itself; the switch counts what is in the burst.
    ///
    /// # Errors
    /// The port faults; what is in the burst is dropped.
    fn receive<'m>(
        &'m mut self,
        burst: &mut Burst<'m>,
        now: Nanos,
        tally: &mut Tally,
    ) -> Result<(), BackendFault>;

    /// The burst was delivered: its buffers go back to the guest. True if the guest was interrupted.
    ///
    /// # Errors
    /// The port faults.
    fn complete(&mut self) -> Result<bool, BackendFault>;

    /// Asks for doorbells; [`Wait::Nothing`] if there is work already.
    fn arm(&mut self) -> Wait;

    /// Says that doorbells are not needed.
    fn disarm(&mut self);
}

/// Frames for a guest. Called by any worker, one at a time.
pub trait FrameSink: Send + std::fmt::Debug {
    /// What need not be done before a frame is handed over.
    fn accepts(&self) -> Accepts;

    /// Hands over the frames of `list`, and counts each in `tally` as moved or dropped. True if the guest was
    /// interrupted.
    ///
    /// # Errors
    /// The port faults; the frames count as dropped.
    fn put(
        &mut self,
        now: Nanos,
        burst: &Burst<'_>,
        list: &[u8],
        tally: &mut Tally,
    ) -> Result<bool, BackendFault>;
}
