//! Dynamic memory: pages are taken from a guest and given back, so that its memory follows a target.
//!
//! ```text
//! Closed -> Greeting (version) -> Introduced (capabilities) -> Running: Idle <-> Ballooning | Unballooning | HotAdding
//! ```
//! One request is under way at a time; with none, [`Balloon::tick`] takes the next step towards the target. A page is
//! discarded only when the guest has given it in a response, and is there again before the guest is told so.

mod pages;
mod wire;

use std::sync::Arc;
use std::time::Duration;

use vmbus::guid::{Guid, interface};
use zerocopy::little_endian::{U32, U64};

use super::{CommandError, Contact, Mistake, Moment, Outbox, Service, instance, take};
use crate::control::MemoryStatus;
use pages::PageSet;
pub use wire::PageRange;
use wire::{kind, message};

/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// Pages of a hot-added region: 128 MiB, which is also how it is aligned.
pub const REGION: u64 = (128 << 20) / PAGE;
/// Pages asked for at a time, so that a new target takes effect soon.
pub const BATCH: u64 = (512 << 20) / PAGE;
/// Until a guest that gave or took less than asked is asked again.
pub const RETRY: Duration = Duration::from_secs(10);

/// Versions of the protocol, in words: major, minor.
const VERSIONS: [(u16, u16); 3] = [(2, 0), (1, 0), (0, 3)];

const CAN_BALLOON: u64 = 1;
const CAN_HOT_ADD: u64 = 2;
/// The coarsest alignment of hot-added memory that [`REGION`] meets, as a power of two of MiB.
const ALIGNMENT: u64 = 7;

/// What pages are made of.
pub trait Balloonable: Send + Sync {
    /// The guest does not use these pages any more: their contents are lost, their memory goes back to the host.
    fn discard(&self, first_pfn: u64, count: u64);
    /// The guest is about to use these pages.
    fn provide(&self, first_pfn: u64, count: u64);
}

/// How much memory a guest may have, and where.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Pages at start.
    pub startup: u64,
    /// Pages at least.
    pub minimum: u64,
    /// Pages at most.
    pub maximum: u64,
    /// Where the pages of the start are.
    pub ram: Vec<PageRange>,
    /// Where pages may be hot-added: the host has room for them. Begins and ends at a multiple of [`REGION`].
    pub room: Option<PageRange>,
}

#[derive(Debug, Clone, Copy)]
enum Activity {
    Idle,
    /// The guest may still give so many pages.
    Ballooning {
        left: u64,
    },
    Unballooning,
    HotAdding(PageRange),
}

#[derive(Debug)]
enum Stage {
    Closed,
    /// The guest proposes versions.
    Greeting,
    /// It shall say what it can.
    Introduced {
        version: (u16, u16),
    },
    Running {
        version: (u16, u16),
        balloon: bool,
        hot_add: bool,
        activity: Activity,
        retry: Moment,
    },
    /// It proposed its last version, and we do not know it.
    Incompatible,
}

/// The service.
pub struct Balloon {
    stage: Stage,
    limits: Limits,
    memory: Arc<dyn Balloonable>,
    target: u64,
    taken: PageSet,
    /// Pages of the room that the guest uses, from its first on.
    added: u64,
    /// Pages of the room that are accessible, from its first on.
    provided: u64,
    /// The channel was closed while pages were being added: nobody knows what became of them.
    unsure: bool,
    available: u64,
    committed: u64,
    transaction: u32,
}

impl std::fmt::Debug for Balloon {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut show = f.debug_struct("Balloon");
        show.field("stage", &self.stage).field("target", &self.target).field("taken", &self.taken.len());
        show.field("added", &self.added).finish_non_exhaustive()
    }
}

impl Balloon {
    /// Before any contact; the target is what the guest starts with.
    pub fn new(limits: Limits, memory: Arc<dyn Balloonable>) -> Self {
        Self {
            stage: Stage::Closed,
            target: limits.startup,
            limits,
            memory,
            taken: PageSet::default(),
            added: 0,
            provided: 0,
            unsure: false,
            available: 0,
            committed: 0,
            transaction: 0,
        }
    }

    /// Moves the guest towards this much memory; goes on whenever it is connected.
    ///
    /// # Errors
    /// [`CommandError::Limits`]: below the minimum or above the maximum.
    pub fn set_target(&mut self, bytes: u64) -> Result<(), CommandError> {
        let (minimum, maximum) = (self.limits.minimum, self.limits.maximum);
        let target = bytes / PAGE;
        if !(minimum..=maximum).contains(&target) {
            let (minimum, maximum) = (minimum.saturating_mul(PAGE), maximum.saturating_mul(PAGE));
            return Err(CommandError::Limits { bytes, minimum, maximum });
        }
        self.target = target;
        if let Stage::Running { retry, .. } = &mut self.stage {
            *retry = Moment::START;
        }
        Ok(())
    }

    /// Pages the guest has.
    pub fn assigned(&self) -> u64 {
        self.limits.startup.saturating_add(self.added).saturating_sub(self.taken.len())
    }

    /// In bytes.
    pub fn status(&self) -> MemoryStatus {
        let bytes = |pages: u64| pages.saturating_mul(PAGE);
        MemoryStatus {
            assigned: bytes(self.assigned()),
            target: bytes(self.target),
            ballooned: bytes(self.taken.len()),
            added: bytes(self.added),
            // What is in the balloon counts as promised to programs in the guest's figures.
            committed: bytes(self.committed.saturating_sub(self.taken.len())),
            available: bytes(self.available),
        }
    }

    fn send(&mut self, out: &mut Outbox, build: impl FnOnce(u32) -> Vec<u8>) {
        self.transaction = self.transaction.wrapping_add(1);
        out.send(self.transaction.into(), build(self.transaction));
    }

    fn greeted(&mut self, request: wire::VersionRequest, out: &mut Outbox) {
        let version = (request.major.get(), request.minor.get());
        let accepted = VERSIONS.contains(&version);
        let verdict = wire::Verdict { accepted: U64::new(accepted.into()) };
        self.send(out, |transaction| message(kind::VERSION_RESPONSE, transaction, &verdict));
        if accepted {
            self.stage = Stage::Introduced { version };
        } else if request.last.get() & 1 != 0 {
            self.stage = Stage::Incompatible;
        }
    }

    fn introduced(&mut self, version: (u16, u16), can: wire::Capabilities, out: &mut Outbox) {
        let verdict = wire::Verdict { accepted: U64::new(1) };
        self.send(out, |transaction| message(kind::CAPABILITIES_RESPONSE, transaction, &verdict));
        let pages = U64::new(self.limits.maximum);
        let info =
            wire::Info { reserved: U32::ZERO, len: U32::new(16), kind: U32::ZERO, size: U32::new(8), pages };
        self.send(out, |transaction| message(kind::INFO, transaction, &info));
        let bits = can.bits.get();
        self.stage = Stage::Running {
            version,
            balloon: bits & CAN_BALLOON != 0,
            hot_add: bits & CAN_HOT_ADD != 0 && bits >> 2 & 0xf <= ALIGNMENT,
            activity: Activity::Idle,
            retry: Moment::START,
        };
    }

    /// The guest gave pages. Returns how many it may still give for this request; none if this was its last response.
    fn ballooned(&mut self, left: u64, body: &[u8]) -> Result<(bool, u64), Mistake> {
        let (head, rest) = take::<wire::Ballooned>(body)?;
        let word = head.more_and_count.get();
        let (more, count) = (word & 1 != 0, word >> 1);
        let need = usize::try_from(count).ok().and_then(|count| count.checked_mul(8)).unwrap_or(usize::MAX);
        let ranges = rest.get(..need).ok_or(Mistake::Short { len: rest.len(), need })?;
        let mut left = left;
        for range in ranges.chunks_exact(8) {
            let (range, _) = take::<U64>(range)?;
            let range = PageRange::from_wire(range.get());
            let excess = range.count.saturating_sub(left);
            left = left.checked_sub(range.count).ok_or(Mistake::MoreThanAsked { excess })?;
            self.accept(range)?;
        }
        Ok((more, left))
    }

    /// Takes one range out of the guest.
    fn accept(&mut self, range: PageRange) -> Result<(), Mistake> {
        let added = self.limits.room.map(|room| PageRange { first: room.first, count: self.added });
        let PageRange { first, count } = range;
        if count == 0 || !self.limits.ram.iter().chain(&added).any(|ram| ram.holds(range)) {
            return Err(Mistake::NotMemory { first, count });
        }
        if !self.taken.insert(range) {
            return Err(Mistake::TakenTwice { first, count });
        }
        self.memory.discard(first, count);
        Ok(())
    }

    /// The guest uses the first pages of `range`, or could not. True if it may be asked again.
    fn hot_added(&mut self, range: PageRange, reply: wire::HotAdded) -> Result<bool, Mistake> {
        let pages = u64::from(reply.pages.get());
        if pages > range.count {
            return Err(Mistake::MoreThanAsked { excess: pages - range.count });
        }
        let room = self.limits.room.map_or(0, |room| room.first);
        self.added = (range.first - room).saturating_add(pages);
        if pages < range.count {
            self.memory.discard(range.first + pages, range.count - pages);
            self.provided = self.added;
        }
        Ok(pages > 0 || reply.result.get() != 1)
    }

    /// The next step towards the target, if there is one.
    fn step(&mut self, balloon: bool, hot_add: bool, out: &mut Outbox) -> Activity {
        let assigned = self.assigned();
        let excess = assigned.saturating_sub(self.target).min(BATCH);
        let missing = self.target.saturating_sub(assigned).min(BATCH);
        if excess > 0 && balloon {
            let pages = U32::new(u32::try_from(excess).unwrap_or(u32::MAX));
            let body = wire::Balloon { pages, reserved: U32::ZERO };
            self.send(out, |transaction| message(kind::BALLOON_REQUEST, transaction, &body));
            Activity::Ballooning { left: excess }
        } else if missing > 0 && !self.taken.is_empty() {
            let ranges = self.taken.take(missing, wire::RANGES);
            for range in &ranges {
                self.memory.provide(range.first, range.count);
            }
            let ranges: Vec<u64> = ranges.into_iter().filter_map(PageRange::to_wire).collect();
            self.send(out, |transaction| wire::unballoon(transaction, &ranges));
            Activity::Unballooning
        } else if missing > 0
            && hot_add
            && let Some(range) = self.next_region()
        {
            self.memory.provide(range.first, range.count);
            self.provided = self.added + range.count;
            let region = PageRange { first: range.first / REGION * REGION, count: REGION };
            let word = |range: PageRange| U64::new(range.to_wire().unwrap_or(0));
            let body = wire::HotAdd { range: word(range), region: word(region) };
            self.send(out, |transaction| message(kind::HOT_ADD_REQUEST, transaction, &body));
            Activity::HotAdding(range)
        } else {
            Activity::Idle
        }
    }

    /// The pages of the room after those in use, up to the end of their region.
    fn next_region(&self) -> Option<PageRange> {
        let room = self.limits.room.filter(|_| !self.unsure)?;
        let first = room.first.checked_add(self.added)?;
        let range = PageRange { first, count: REGION - first % REGION };
        (room.holds(range) && range.to_wire().is_some()).then_some(range)
    }

    /// A message while the service runs; returns what is under way now, and if the guest may be asked at once.
    fn running(&mut self, activity: Activity, kind: u16, body: &[u8]) -> Result<(Activity, Next), Mistake> {
        match (activity, kind) {
            (_, kind::STATUS_REPORT) => {
                let (report, _) = take::<wire::Report>(body)?;
                self.available = report.available.get();
                self.committed = report.committed.get();
                Ok((activity, Next::AsBefore))
            }
            (Activity::Ballooning { left }, kind::BALLOON_RESPONSE) => match self.ballooned(left, body)? {
                (true, left) => Ok((Activity::Ballooning { left }, Next::AsBefore)),
                (false, 0) => Ok((Activity::Idle, Next::Now)),
                (false, _) => Ok((Activity::Idle, Next::Later)),
            },
            (Activity::Unballooning, kind::UNBALLOON_RESPONSE) => Ok((Activity::Idle, Next::Now)),
            (Activity::HotAdding(range), kind::HOT_ADD_RESPONSE) => {
                let (reply, _) = take::<wire::HotAdded>(body)?;
                let again = self.hot_added(range, reply)?;
                let next = match u64::from(reply.pages.get()) == range.count {
                    true => Next::Now,
                    false if again => Next::Later,
                    false => Next::NoHotAdd,
                };
                Ok((Activity::Idle, next))
            }
            _ => Err(Mistake::OutOfOrder { kind }),
        }
    }
}

/// When the guest is asked for the next step.
#[derive(Debug, Clone, Copy)]
enum Next {
    AsBefore,
    Now,
    Later,
    NoHotAdd,
}

impl Service for Balloon {
    fn name(&self) -> &'static str {
        "dynamic-memory"
    }

    fn interface(&self) -> Guid {
        interface::DYNAMIC_MEMORY
    }

    fn instance(&self) -> Guid {
        instance::DYNAMIC_MEMORY
    }

    fn contact(&self) -> Contact {
        match self.stage {
            Stage::Closed => Contact::Closed,
            Stage::Greeting | Stage::Introduced { .. } => Contact::Opened,
            Stage::Running { version: (major, minor), .. } => Contact::Ready(format!("{major}.{minor}")),
            Stage::Incompatible => Contact::Incompatible,
        }
    }

    fn opened(&mut self, _now: Moment) {
        self.stage = Stage::Greeting;
    }

    /// Pages in the balloon are given back: a guest that starts anew uses all of its memory.
    fn closed(&mut self) {
        if let Stage::Running { activity: Activity::HotAdding(_), .. } = self.stage {
            self.unsure = true;
        }
        self.stage = Stage::Closed;
        (self.available, self.committed) = (0, 0);
        while !self.taken.is_empty() {
            for range in self.taken.take(u64::MAX, wire::RANGES) {
                self.memory.provide(range.first, range.count);
            }
        }
    }

    /// A guest that starts anew knows nothing of what was hot-added.
    fn reset(&mut self) {
        self.closed();
        if let Some(room) = self.limits.room
            && self.provided > 0
        {
            self.memory.discard(room.first, self.provided);
        }
        (self.added, self.provided, self.unsure) = (0, 0, false);
    }

    fn receive(
        &mut self,
        packet: &[u8],
        _transaction: u64,
        out: &mut Outbox,
        now: Moment,
    ) -> Result<(), Mistake> {
        let (header, body) = wire::parse(packet)?;
        let kind = header.kind.get();
        match (&self.stage, kind) {
            (Stage::Greeting, kind::VERSION_REQUEST) => self.greeted(take(body)?.0, out),
            (&Stage::Introduced { version }, kind::CAPABILITIES_REPORT) => {
                self.introduced(version, take(body)?.0, out);
            }
            (&Stage::Running { activity, .. }, _) => {
                let (then, next) = self.running(activity, kind, body)?;
                if let Stage::Running { activity, retry, hot_add, .. } = &mut self.stage {
                    *activity = then;
                    match next {
                        Next::AsBefore => {}
                        Next::Now => *retry = now,
                        Next::Later => *retry = now + RETRY,
                        Next::NoHotAdd => *hot_add = false,
                    }
                }
            }
            _ => return Err(Mistake::OutOfOrder { kind }),
        }
        Ok(())
    }

    fn tick(&mut self, out: &mut Outbox, now: Moment) -> Option<Moment> {
        let Stage::Running { balloon, hot_add, activity: Activity::Idle, retry, .. } = self.stage else {
            return None;
        };
        if now < retry {
            return Some(retry);
        }
        let then = self.step(balloon, hot_add, out);
        if let Stage::Running { activity, .. } = &mut self.stage {
            *activity = then;
        }
        None
    }
}
