//! Data exchange: the guest's name, versions and addresses; values the host leaves for the guest's programs.
//!
//! A daemon in the guest answers. Until it has started the guest reads nothing at all, not even the versions, so nothing
//! here is urgent: jobs wait in a queue, one request is under way, and who waited too long is told so.

mod wire;

use std::collections::VecDeque;
use std::time::Duration;

use vmbus::guid::{Guid, interface};
use zerocopy::IntoBytes;
use zerocopy::little_endian::{U16, U32};

use super::framing::{Event, Kind, Link, STATUS_OK, Version};
use super::{Answer, CommandError, Contact, Mistake, Moment, Outbox, Service, instance};
pub use wire::Pool;
use wire::{Delete, Enumerate, Header, KEY, Operation, PairMessage, VALUE, Value};

/// Between two looks at all pairs.
pub const REFRESH: Duration = Duration::from_secs(30);
/// How long a request may take; the guest's kernel answers for a silent daemon after 30 s.
pub const PATIENCE: Duration = Duration::from_secs(45);
/// Pairs read from one pool; a guest could go on for ever.
pub const ITEMS: u32 = 256;

const VERSIONS: [Version; 3] = [Version::new(1, 0), Version::new(3, 0), Version::new(4, 0)];

const POOLS: [Pool; 3] = [Pool::Auto, Pool::Guest, Pool::External];

/// A pair.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// Where it was found.
    pub pool: Pool,
    /// Key.
    pub key: String,
    /// Value.
    pub value: String,
}

#[derive(Debug)]
enum Job {
    Read { pool: usize, index: u32, found: Vec<Item> },
    Set { key: String, value: String, answer: Answer<()> },
    Delete { key: String, answer: Answer<()> },
}

impl Job {
    fn fail(self, error: CommandError) {
        match self {
            Self::Read { .. } => {}
            Self::Set { answer, .. } | Self::Delete { answer, .. } => answer.give(Err(error)),
        }
    }

    fn operation(&self) -> Operation {
        match self {
            Self::Read { .. } => Operation::Enumerate,
            Self::Set { .. } => Operation::Set,
            Self::Delete { .. } => Operation::Delete,
        }
    }

    /// The next request of the job; none if a text is too long for it.
    fn request(&self) -> Option<Vec<u8>> {
        let header = |pool| Header { operation: self.operation() as u8, pool: pool as u8 };
        match self {
            Self::Read { pool, index, .. } => {
                let body = Enumerate { index: U32::new(*index), value: pair("", "")? };
                Some(padded(header(*POOLS.get(*pool)?), body))
            }
            Self::Set { key, value, .. } => Some(padded(header(Pool::External), pair(key, value)?)),
            Self::Delete { key, .. } => {
                let mut body = Delete { key_len: U32::ZERO, key: [0; KEY] };
                body.key_len = U32::new(wire::encode(key, &mut body.key)?);
                Some(padded(header(Pool::External), body))
            }
        }
    }
}

fn pair(key: &str, value: &str) -> Option<Value> {
    let mut block = Value {
        kind: U32::new(wire::TYPE_STRING),
        key_len: U32::ZERO,
        value_len: U32::ZERO,
        key: [0; KEY],
        value: [0; VALUE],
    };
    block.key_len = U32::new(wire::encode(key, &mut block.key)?);
    block.value_len = U32::new(wire::encode(value, &mut block.value)?);
    Some(block)
}

fn padded<T: IntoBytes + zerocopy::Immutable>(header: Header, body: T) -> Vec<u8> {
    [header.as_bytes(), U16::ZERO.as_bytes(), body.as_bytes()].concat()
}

/// The service.
#[derive(Debug)]
pub struct Kvp {
    link: Link,
    queue: VecDeque<Job>,
    /// The job whose request is under way, and until when its answer is waited for.
    current: Option<(Job, Moment)>,
    due: Moment,
    items: Vec<Item>,
}

impl Kvp {
    /// Before any contact.
    pub const fn new() -> Self {
        let link = Link::new(Kind::Kvp, &VERSIONS);
        Self { link, queue: VecDeque::new(), current: None, due: Moment::START, items: Vec::new() }
    }

    /// All pairs that were found last.
    pub fn items(&self) -> &[Item] {
        &self.items
    }

    /// Writes a pair for the guest's programs to read (pool 0).
    pub fn set(&mut self, key: String, value: String, answer: Answer<()>) {
        self.enqueue(Job::Set { key, value, answer });
    }

    /// Removes a pair from pool 0.
    pub fn delete(&mut self, key: String, answer: Answer<()>) {
        self.enqueue(Job::Delete { key, answer });
    }

    fn enqueue(&mut self, job: Job) {
        let stalled = !self.link.is_ready() && self.current.is_none();
        if let Err(error) = self.contact().ready() {
            job.fail(error);
        } else if stalled || self.queue.len() >= super::QUEUE {
            job.fail(CommandError::Busy);
        } else if job.request().is_none() {
            job.fail(CommandError::TooLong { key: KEY / 2 - 1, value: VALUE / 2 - 1 });
        } else {
            self.queue.push_back(job);
        }
    }

    /// Everybody who waits is told why they need not.
    fn give_up(&mut self, error: &CommandError) {
        let current = self.current.take().map(|(job, _)| job);
        for job in current.into_iter().chain(self.queue.drain(..)) {
            job.fail(error.clone());
        }
    }

    /// The answer to the current job's request.
    fn answered(&mut self, job: Job, status: u32, body: &[u8], now: Moment) -> Result<(), Mistake> {
        let done = if status == STATUS_OK { Ok(()) } else { Err(CommandError::Refused { status }) };
        match job {
            Job::Set { answer, .. } | Job::Delete { answer, .. } => answer.give(done),
            Job::Read { mut pool, mut index, mut found } => {
                match status {
                    STATUS_OK => {
                        let item = item(POOLS.get(pool).copied(), body)?;
                        found.extend(item);
                        index += 1;
                    }
                    // The end, or a daemon without this pool: the others are still worth asking for.
                    _ => (pool, index) = (pool + 1, 0),
                }
                if index >= ITEMS {
                    (pool, index) = (pool + 1, 0);
                }
                if pool < POOLS.len() {
                    self.queue.push_front(Job::Read { pool, index, found });
                } else {
                    (self.items, self.due) = (found, now + REFRESH);
                }
            }
        }
        Ok(())
    }
}

/// The pair of an enumeration's answer.
fn item(pool: Option<Pool>, body: &[u8]) -> Result<Option<Item>, Mistake> {
    let (message, _) = super::take::<PairMessage<Enumerate>>(body)?;
    let block = &message.body.value;
    let kind = block.kind.get();
    if kind != wire::TYPE_STRING {
        return Err(Mistake::ValueType(kind));
    }
    let key = wire::decode(&block.key, block.key_len.get())?;
    let value = wire::decode(&block.value, block.value_len.get())?;
    Ok(pool.map(|pool| Item { pool, key, value }))
}

impl Default for Kvp {
    fn default() -> Self {
        Self::new()
    }
}

impl Service for Kvp {
    fn name(&self) -> &'static str {
        "kvp"
    }

    fn interface(&self) -> Guid {
        interface::KVP
    }

    fn instance(&self) -> Guid {
        instance::KVP
    }

    fn contact(&self) -> Contact {
        self.link.contact()
    }

    fn opened(&mut self, now: Moment) {
        self.link.opened();
        self.due = now;
    }

    fn closed(&mut self) {
        self.link.closed();
        self.give_up(&CommandError::Closed);
    }

    fn reset(&mut self) {
        self.closed();
        self.items.clear();
    }

    fn receive(
        &mut self,
        packet: &[u8],
        transaction: u64,
        _out: &mut Outbox,
        now: Moment,
    ) -> Result<(), Mistake> {
        let Event::Reply { status, body } = self.link.receive(packet, transaction)? else { return Ok(()) };
        // Nobody waits any more for an answer that comes late.
        let Some((job, _)) = self.current.take() else { return Ok(()) };
        let (header, _) = super::take::<Header>(body)?;
        if header.operation != job.operation() as u8 {
            let (found, expected) = (header.operation.into(), job.operation() as u64);
            job.fail(CommandError::Closed);
            return Err(Mistake::Differs { field: "operation", found, expected });
        }
        self.answered(job, status, body, now)
    }

    fn tick(&mut self, out: &mut Outbox, now: Moment) -> Option<Moment> {
        self.link.negotiate(out, now);
        if self.current.as_ref().is_some_and(|(_, until)| now >= *until) {
            self.give_up(&CommandError::NoAnswer { seconds: PATIENCE.as_secs() });
        }
        if self.link.is_ready() && self.queue.is_empty() && now >= self.due {
            self.queue.push_back(Job::Read { pool: 0, index: 0, found: Vec::new() });
        }
        if self.link.is_ready()
            && let Some(job) = self.queue.pop_front()
            && let Some(request) = job.request()
        {
            self.link.ask(&request, out, now);
            self.current = Some((job, now + PATIENCE));
        }
        match &self.current {
            Some((_, until)) => Some(*until),
            None => self.link.is_ready().then_some(self.due),
        }
    }
}
