//! Orderly shutdown and restart, asked of the guest.
//!
//! The guest answers first and begins afterwards: an answer says that it will try, the power-off that it did.

use std::time::Duration;

use vmbus::guid::{Guid, interface};
use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::framing::{Event, Kind, Link, STATUS_OK, Version};
use super::{Answer, CommandError, Contact, Mistake, Moment, Outbox, Service, instance};

/// How long whoever asked waits for the guest's answer.
pub const PATIENCE: Duration = Duration::from_secs(30);

const VERSIONS: [Version; 4] =
    [Version::new(1, 0), Version::new(3, 0), Version::new(3, 1), Version::new(3, 2)];

/// Planned, by the operator.
const REASON_PLANNED: u32 = 0x8000_0000;

/// Body of a request.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Order {
    /// Why.
    pub reason: U32,
    /// Seconds the guest may take.
    pub timeout: U32,
    /// 1 force, 2 restart.
    pub flags: U32,
    /// To be shown to users.
    pub text: [u8; 2048],
}

const _: () = assert!(size_of::<Order>() == 2060);

/// What the guest shall do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShutdownKind {
    /// Switch itself off.
    PowerOff,
    /// Start again.
    Reboot,
}

impl ShutdownKind {
    fn flags(self) -> u32 {
        const FORCE: u32 = 1;
        match self {
            Self::PowerOff => FORCE,
            Self::Reboot => 2 | FORCE,
        }
    }
}

#[derive(Debug)]
enum Job {
    None,
    Wanted(ShutdownKind, Answer<()>),
    Asked { until: Moment, answer: Answer<()> },
}

/// The service.
#[derive(Debug)]
pub struct Shutdown {
    link: Link,
    job: Job,
}

impl Shutdown {
    /// Before any contact.
    pub const fn new() -> Self {
        Self { link: Link::new(Kind::Shutdown, &VERSIONS), job: Job::None }
    }

    /// Asks the guest. The answer is its word that it will.
    pub fn order(&mut self, kind: ShutdownKind, answer: Answer<()>) {
        if let Err(error) = self.contact().ready() {
            answer.give(Err(error));
        } else if !self.link.is_ready() || !matches!(self.job, Job::None) {
            answer.give(Err(CommandError::Busy));
        } else {
            self.job = Job::Wanted(kind, answer);
        }
    }

    fn give_up(&mut self, error: CommandError) {
        match std::mem::replace(&mut self.job, Job::None) {
            Job::Wanted(_, answer) | Job::Asked { answer, .. } => answer.give(Err(error)),
            Job::None => {}
        }
    }
}

impl Default for Shutdown {
    fn default() -> Self {
        Self::new()
    }
}

impl Service for Shutdown {
    fn name(&self) -> &'static str {
        "shutdown"
    }

    fn interface(&self) -> Guid {
        interface::SHUTDOWN
    }

    fn instance(&self) -> Guid {
        instance::SHUTDOWN
    }

    fn contact(&self) -> Contact {
        self.link.contact()
    }

    fn opened(&mut self, _now: Moment) {
        self.link.opened();
    }

    fn closed(&mut self) {
        self.link.closed();
        self.give_up(CommandError::Closed);
    }

    fn receive(
        &mut self,
        packet: &[u8],
        transaction: u64,
        _out: &mut Outbox,
        _now: Moment,
    ) -> Result<(), Mistake> {
        let Event::Reply { status, .. } = self.link.receive(packet, transaction)? else { return Ok(()) };
        // Nobody waits any more for an answer that comes late.
        if let Job::Asked { answer, .. } = std::mem::replace(&mut self.job, Job::None) {
            answer.give(if status == STATUS_OK { Ok(()) } else { Err(CommandError::Refused { status }) });
        }
        Ok(())
    }

    fn tick(&mut self, out: &mut Outbox, now: Moment) -> Option<Moment> {
        self.link.negotiate(out, now);
        self.job = match std::mem::replace(&mut self.job, Job::None) {
            Job::Wanted(kind, answer) => {
                let order = Order {
                    reason: U32::new(REASON_PLANNED),
                    timeout: U32::ZERO,
                    flags: U32::new(kind.flags()),
                    text: [0; 2048],
                };
                self.link.ask(order.as_bytes(), out, now);
                Job::Asked { until: now + PATIENCE, answer }
            }
            Job::Asked { until, answer } if now >= until => {
                answer.give(Err(CommandError::NoAnswer { seconds: PATIENCE.as_secs() }));
                Job::None
            }
            job => job,
        };
        match self.job {
            Job::Asked { until, .. } => Some(until),
            _ => None,
        }
    }
}
