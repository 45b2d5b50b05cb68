//! Backups: the guest's file systems are frozen while a snapshot is taken, and thawed whatever happens.
//!
//! ```text
//! Idle -> Preparing (hot backup) -> Freezing -> Frozen -> Thawing -> Idle
//! ```
//! A freeze that fails, is answered too late, is held too long, or whose asker has gone goes to `Thawing` by itself. A
//! thaw that is owed is remembered over a closed channel.

use std::time::Duration;

use vmbus::guid::{Guid, interface};
use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::framing::{Event, Kind, Link, STATUS_OK, Version};
use super::{Answer, CommandError, Contact, Mistake, Moment, Outbox, Service, instance};

/// How long a freeze may take: the guest's own limit, and a little.
pub const FREEZE_PATIENCE: Duration = Duration::from_secs(910);
/// How long other operations may take: the guest's own limit, and a little.
pub const PATIENCE: Duration = Duration::from_secs(40);
/// A thaw that the guest says failed is tried so many times.
const THAWS: u8 = 3;

const VERSIONS: [Version; 1] = [Version::new(5, 0)];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Operation {
    HotBackup = 2,
    Freeze = 5,
    Thaw = 6,
}

/// Body of a message.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Body {
    /// 2 hot backup, 5 freeze, 6 thaw.
    pub operation: u8,
    /// 0.
    pub reserved: [u8; 7],
    /// What the guest can do, in an answer to hot backup.
    pub flags: U32,
}

const _: () = assert!(size_of::<Body>() == 12);

#[derive(Debug)]
enum Stage {
    Idle,
    Preparing { hold: Duration, answer: Answer<()>, until: Moment },
    Freezing { hold: Duration, answer: Answer<()>, until: Moment },
    Frozen { until: Moment },
    Thawing { answer: Option<Answer<()>>, until: Moment, tries: u8 },
}

/// The service.
#[derive(Debug)]
pub struct Vss {
    link: Link,
    stage: Stage,
    asked: Option<Operation>,
    /// The guest was thawed before it was asked for: a snapshot taken meanwhile is worth nothing.
    expired: bool,
}

impl Vss {
    /// Before any contact.
    pub const fn new() -> Self {
        Self { link: Link::new(Kind::Vss, &VERSIONS), stage: Stage::Idle, asked: None, expired: false }
    }

    /// The file systems are frozen, or may be.
    pub fn is_frozen(&self) -> bool {
        matches!(self.stage, Stage::Freezing { .. } | Stage::Frozen { .. } | Stage::Thawing { .. })
    }

    /// Freezes the guest's file systems, for at most `hold`.
    pub fn freeze(&mut self, hold: Duration, answer: Answer<()>, now: Moment) {
        if let Err(error) = self.contact().ready() {
            answer.give(Err(error));
        } else if !self.link.is_ready() || !matches!(self.stage, Stage::Idle) {
            answer.give(Err(CommandError::Busy));
        } else {
            self.expired = false;
            self.stage = Stage::Preparing { hold, answer, until: now + PATIENCE };
        }
    }

    /// Thaws them. Only an answer without error says that they were frozen all the time.
    pub fn thaw(&mut self, given: Answer<()>, now: Moment) {
        match &mut self.stage {
            Stage::Frozen { .. } => self.stage = thawing(Some(given), now),
            Stage::Thawing { answer: answer @ None, .. } => *answer = Some(given),
            Stage::Idle if std::mem::take(&mut self.expired) => given.give(Err(CommandError::HoldExpired)),
            Stage::Idle => given.give(Err(CommandError::NotFrozen)),
            Stage::Preparing { .. } | Stage::Freezing { .. } | Stage::Thawing { .. } => {
                given.give(Err(CommandError::Busy));
            }
        }
    }

    /// The answer to `asked` came. One that nobody waits for any more changes nothing.
    fn answered(&mut self, asked: Operation, status: u32, now: Moment) {
        let refused = CommandError::Refused { status };
        let ok = status == STATUS_OK;
        self.stage = match (std::mem::replace(&mut self.stage, Stage::Idle), asked) {
            (Stage::Preparing { hold, answer, .. }, Operation::HotBackup) if ok => {
                Stage::Freezing { hold, answer, until: now + FREEZE_PATIENCE }
            }
            (Stage::Preparing { answer, .. }, Operation::HotBackup) => {
                answer.give(Err(refused));
                Stage::Idle
            }
            (Stage::Freezing { hold, answer, .. }, Operation::Freeze) if ok => {
                if answer.try_give(Ok(())) {
                    Stage::Frozen { until: now + hold }
                } else {
                    thawing(None, now)
                }
            }
            (Stage::Freezing { answer, .. }, Operation::Freeze) => {
                answer.give(Err(refused));
                thawing(None, now)
            }
            (Stage::Thawing { answer, tries, .. }, Operation::Thaw) if !ok && tries + 1 < THAWS => {
                Stage::Thawing { answer, until: now + PATIENCE, tries: tries + 1 }
            }
            (Stage::Thawing { answer: Some(answer), .. }, Operation::Thaw) => {
                let expired = std::mem::take(&mut self.expired);
                answer.give(match (ok, expired) {
                    (false, _) => Err(refused),
                    (true, true) => Err(CommandError::HoldExpired),
                    (true, false) => Ok(()),
                });
                Stage::Idle
            }
            (Stage::Thawing { answer: None, .. }, Operation::Thaw) => Stage::Idle,
            (stage, _) => stage,
        };
    }

    /// Whoever waited too long is told, and what may be frozen is thawed.
    fn expire(&mut self, now: Moment) {
        let silent = |limit: Duration| CommandError::NoAnswer { seconds: limit.as_secs() };
        self.stage = match std::mem::replace(&mut self.stage, Stage::Idle) {
            Stage::Preparing { answer, until, .. } if now >= until => {
                answer.give(Err(silent(PATIENCE)));
                Stage::Idle
            }
            Stage::Freezing { answer, until, .. } if now >= until => {
                answer.give(Err(silent(FREEZE_PATIENCE)));
                thawing(None, now)
            }
            Stage::Frozen { until } if now >= until => {
                self.expired = true;
                thawing(None, now)
            }
            Stage::Thawing { answer: Some(answer), until, tries } if now >= until => {
                answer.give(Err(silent(PATIENCE)));
                Stage::Thawing { answer: None, until, tries }
            }
            stage => stage,
        };
    }

    fn until(&self) -> Option<Moment> {
        match &self.stage {
            Stage::Preparing { until, .. }
            | Stage::Freezing { until, .. }
            | Stage::Frozen { until }
            | Stage::Thawing { answer: Some(_), until, .. } => Some(*until),
            Stage::Idle | Stage::Thawing { answer: None, .. } => None,
        }
    }
}

fn thawing(answer: Option<Answer<()>>, now: Moment) -> Stage {
    Stage::Thawing { answer, until: now + PATIENCE, tries: 0 }
}

impl Default for Vss {
    fn default() -> Self {
        Self::new()
    }
}

impl Service for Vss {
    fn name(&self) -> &'static str {
        "vss"
    }

    fn interface(&self) -> Guid {
        interface::VSS
    }

    fn instance(&self) -> Guid {
        instance::VSS
    }

    fn contact(&self) -> Contact {
        self.link.contact()
    }

    fn opened(&mut self, _now: Moment) {
        self.link.opened();
    }

    fn closed(&mut self) {
        self.link.closed();
        self.asked = None;
        self.stage = match std::mem::replace(&mut self.stage, Stage::Idle) {
            Stage::Idle => Stage::Idle,
            Stage::Preparing { answer, .. } => {
                answer.give(Err(CommandError::Closed));
                Stage::Idle
            }
            Stage::Freezing { answer, until, .. } => {
                answer.give(Err(CommandError::Closed));
                thawing(None, until)
            }
            Stage::Frozen { until } => {
                self.expired = true;
                thawing(None, until)
            }
            Stage::Thawing { answer, until, .. } => {
                if let Some(answer) = answer {
                    answer.give(Err(CommandError::Closed));
                }
                thawing(None, until)
            }
        };
    }

    fn reset(&mut self) {
        self.closed();
        self.stage = Stage::Idle;
    }

    fn receive(
        &mut self,
        packet: &[u8],
        transaction: u64,
        _out: &mut Outbox,
        now: Moment,
    ) -> Result<(), Mistake> {
        let Event::Reply { status, body } = self.link.receive(packet, transaction)? else { return Ok(()) };
        let (body, _) = super::take::<Body>(body)?;
        let Some(asked) = self.asked.take() else { return Ok(()) };
        if body.operation != asked as u8 {
            let (found, expected) = (body.operation.into(), asked as u64);
            return Err(Mistake::Differs { field: "operation", found, expected });
        }
        self.answered(asked, status, now);
        Ok(())
    }

    fn tick(&mut self, out: &mut Outbox, now: Moment) -> Option<Moment> {
        self.link.negotiate(out, now);
        self.expire(now);
        let operation = match self.stage {
            Stage::Preparing { .. } => Some(Operation::HotBackup),
            Stage::Freezing { .. } => Some(Operation::Freeze),
            Stage::Thawing { .. } => Some(Operation::Thaw),
            Stage::Idle | Stage::Frozen { .. } => None,
        };
        if self.link.is_ready()
            && let Some(operation) = operation
        {
            let body = Body { operation: operation as u8, reserved: [0; 7], flags: U32::ZERO };
            self.link.ask(body.as_bytes(), out, now);
            self.asked = Some(operation);
        }
        self.until()
    }
}
