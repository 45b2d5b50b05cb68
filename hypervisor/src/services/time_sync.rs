//! Time synchronisation: the guest's clock is set once per contact and after a pause, then given a sample every five
//! seconds, which its PTP clock serves to a time daemon.
//!
//! A sample pairs the host's time with the guest's own reference counter, so that the way of the message costs no
//! accuracy.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use vmbus::guid::{Guid, interface};
use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::framing::{Event, Kind, Link, STATUS_OK, Version};
use super::{Answer, CommandError, Contact, Mistake, Moment, Outbox, Service, instance};

/// Between two samples.
pub const PERIOD: Duration = Duration::from_secs(5);
/// How long whoever asked for a sync waits for the guest.
pub const PATIENCE: Duration = Duration::from_secs(30);

const VERSIONS: [Version; 3] = [Version::new(1, 0), Version::new(3, 0), Version::new(4, 0)];

/// 1970-01-01 in units of 100 ns since 1601-01-01.
const UNIX: u64 = 116_444_736_000_000_000;

/// Set the clock.
const FLAG_SYNC: u8 = 1;
/// Know the time.
const FLAG_SAMPLE: u8 = 2;

/// Body of a message from version 4.0 on.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Sample {
    /// The host's time, in units of 100 ns since 1601.
    pub host: U64,
    /// The guest's reference counter at that moment, in units of 100 ns.
    pub reference: U64,
    /// 1 sync, 2 sample.
    pub flags: u8,
    /// Leap second indicator: none.
    pub leap: u8,
    /// Distance from a reference clock: not told.
    pub stratum: u8,
    /// 0.
    pub reserved: [u8; 5],
}

/// Body of a message before version 4.0.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct OldSample {
    /// The host's time, in units of 100 ns since 1601.
    pub host: U64,
    /// The guest's time, if it were known.
    pub guest: U64,
    /// The message's way, if it were known.
    pub round_trip: U64,
    /// 1 sync, 2 sample.
    pub flags: u8,
    /// 0.
    pub reserved: [u8; 3],
}

const _: () = assert!(size_of::<Sample>() == 24);
const _: () = assert!(size_of::<OldSample>() == 28);

/// Reads a clock, in units of 100 ns.
pub type Clock = Box<dyn Fn() -> u64 + Send>;

/// The host's time in units of 100 ns since 1601-01-01 UTC.
pub fn host_time() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    UNIX.saturating_add(u64::try_from(since.as_nanos() / 100).unwrap_or(u64::MAX))
}

/// The service.
pub struct TimeSync {
    link: Link,
    host: Clock,
    reference: Clock,
    due: Moment,
    /// The next message sets the clock.
    sync: bool,
    /// Who waits for the clock to be set, and until when.
    waiting: Vec<(Moment, Answer<()>)>,
    /// The message under way sets the clock for the first so many of those who wait.
    asked_for: usize,
}

impl std::fmt::Debug for TimeSync {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TimeSync").field("link", &self.link).field("sync", &self.sync).finish_non_exhaustive()
    }
}

impl TimeSync {
    /// Before any contact. `host` is [`host_time`] but in tests; `reference` reads the guest's reference counter.
    pub fn new(host: Clock, reference: Clock) -> Self {
        let link = Link::new(Kind::TimeSync, &VERSIONS);
        Self { link, host, reference, due: Moment::START, sync: false, waiting: Vec::new(), asked_for: 0 }
    }

    /// Sets the guest's clock, now or as soon as it is listening.
    pub fn sync(&mut self, answer: Answer<()>, now: Moment) {
        self.sync = true;
        match self.contact().ready() {
            Ok(()) if self.waiting.len() < super::QUEUE => self.waiting.push((now + PATIENCE, answer)),
            Ok(()) => answer.give(Err(CommandError::Busy)),
            Err(error) => answer.give(Err(error)),
        }
    }

    fn body(&self, version: Version, flags: u8) -> Vec<u8> {
        // The counter is read on both sides of the clock, and the middle belongs to it.
        let before = (self.reference)();
        let host = U64::new((self.host)());
        let after = (self.reference)();
        let reference = U64::new(before.saturating_add(after.saturating_sub(before) / 2));
        if version.major() >= 4 {
            Sample { host, reference, flags, leap: 0, stratum: 0, reserved: [0; 5] }.as_bytes().to_vec()
        } else {
            let zero = U64::ZERO;
            OldSample { host, guest: zero, round_trip: zero, flags, reserved: [0; 3] }.as_bytes().to_vec()
        }
    }

    fn expire(&mut self, now: Moment) {
        let before = self.waiting.len();
        self.waiting.retain(|(until, answer)| {
            if now >= *until {
                answer.give(Err(CommandError::NoAnswer { seconds: PATIENCE.as_secs() }));
            }
            now < *until
        });
        // Who waits longest stands first, so those who left were the first.
        self.asked_for = self.asked_for.saturating_sub(before - self.waiting.len());
    }
}

impl Service for TimeSync {
    fn name(&self) -> &'static str {
        "time-sync"
    }

    fn interface(&self) -> Guid {
        interface::TIME_SYNC
    }

    fn instance(&self) -> Guid {
        instance::TIME_SYNC
    }

    fn contact(&self) -> Contact {
        self.link.contact()
    }

    fn opened(&mut self, now: Moment) {
        self.link.opened();
        self.due = now;
        self.sync = true;
    }

    fn closed(&mut self) {
        self.link.closed();
        self.asked_for = 0;
        for (_, answer) in self.waiting.drain(..) {
            answer.give(Err(CommandError::Closed));
        }
    }

    fn receive(
        &mut self,
        packet: &[u8],
        transaction: u64,
        _out: &mut Outbox,
        now: Moment,
    ) -> Result<(), Mistake> {
        if let Event::Reply { status, .. } = self.link.receive(packet, transaction)? {
            for (_, answer) in self.waiting.drain(..self.asked_for.min(self.waiting.len())) {
                answer.give(if status == STATUS_OK { Ok(()) } else { Err(CommandError::Refused { status }) });
            }
            self.asked_for = 0;
            self.due = now + PERIOD;
        }
        Ok(())
    }

    fn tick(&mut self, out: &mut Outbox, now: Moment) -> Option<Moment> {
        self.link.negotiate(out, now);
        self.expire(now);
        if self.link.is_ready()
            && (self.sync || now >= self.due)
            && let Some(version) = self.link.version()
        {
            let flags = if self.sync { FLAG_SYNC } else { FLAG_SAMPLE };
            let body = self.body(version, flags);
            self.link.ask(&body, out, now);
            if self.sync {
                self.sync = false;
                self.asked_for = self.waiting.len();
            }
        }
        let sample = self.link.is_ready().then_some(self.due);
        sample.into_iter().chain(self.waiting.first().map(|(until, _)| *until)).min()
    }
}
