//! Who may have how many of the mappings that the process keeps track of, and how much of its address space.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::MappingError;
use super::sigbus::SLOTS;

/// Mappings and their bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Amount {
    mappings: usize,
    bytes: usize,
}

impl Amount {
    fn plus(self, other: Self) -> Self {
        let bytes = self.bytes.saturating_add(other.bytes);
        Self { mappings: self.mappings.saturating_add(other.mappings), bytes }
    }

    fn minus(self, other: Self) -> Self {
        let bytes = self.bytes.saturating_sub(other.bytes);
        Self { mappings: self.mappings.saturating_sub(other.mappings), bytes }
    }
}

/// What is in use or promised.
static COMMITTED: Mutex<Amount> = Mutex::new(Amount { mappings: 0, bytes: 0 });

/// All there is: of the 128 TiB that a process has for addresses, 16 TiB are for code, heaps and stacks.
const ALL: Amount = Amount { mappings: SLOTS, bytes: 112 << 40 };

/// Kept back from shares: for virtual machines and for what the process maps for itself.
const OWN: Amount = Amount { mappings: 4096, bytes: 16 << 40 };

/// A whole share's promise.
const PROMISE: Amount = Amount { mappings: Share::PROMISED, bytes: Share::PROMISED_BYTES };

fn lock(amount: &Mutex<Amount>) -> MutexGuard<'_, Amount> {
    amount.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Adds `more` to what is committed, if it fits into `limit`.
fn commit(committed: &mut Amount, more: Amount, limit: Amount) -> Result<(), MappingError> {
    let sum = committed.plus(more);
    if more.mappings > 0 && sum.mappings > limit.mappings {
        return Err(MappingError::TooMany(SLOTS));
    }
    if more.bytes > 0 && sum.bytes > limit.bytes {
        return Err(MappingError::TooMuch(more.bytes));
    }
    *committed = sum;
    Ok(())
}

/// Mappings that one peer is sure to get, however many the others take: [`Share::PROMISED`] of them with
/// [`Share::PROMISED_BYTES`] in all. What it takes beyond them is of the rest that nobody was promised. Given back once
/// the share and all mappings made in it are dropped.
#[derive(Debug)]
pub struct Share {
    held: Mutex<Amount>,
}

impl Share {
    /// The eight regions that every vhost-user client may have, a dirty log and a record of what is in flight; twice, as
    /// a client may put all of them in place of what it had.
    pub const PROMISED: usize = 20;

    /// 32 GiB of addresses: the largest usual guest of a host with many. All the ports that there may be are promised
    /// 45 TiB of the 96 TiB that are for shares.
    pub const PROMISED_BYTES: usize = 32 << 30;

    /// 8 TiB: the most that one peer gets, four times the memory of a large host.
    pub const MOST_BYTES: usize = 8 << 40;

    /// A share of its own for a new peer. `None` if the process has not so many left to promise.
    pub fn new() -> Option<Arc<Self>> {
        commit(&mut lock(&COMMITTED), PROMISE, ALL.minus(OWN)).ok()?;
        Some(Arc::new(Self { held: Mutex::default() }))
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut committed = lock(&COMMITTED);
        *committed = committed.minus(PROMISE);
    }
}

/// One mapping's place, of a share or of the rest.
#[derive(Debug)]
pub(super) struct Place {
    share: Option<Arc<Share>>,
    amount: Amount,
}

impl Place {
    /// A place for a mapping of `bytes`.
    ///
    /// # Errors
    /// Neither the share nor the rest has one left.
    pub(super) fn take(share: Option<&Arc<Share>>, bytes: usize) -> Result<Self, MappingError> {
        let amount = Amount { mappings: 1, bytes };
        let mut committed = lock(&COMMITTED);
        match share {
            None => commit(&mut committed, amount, ALL)?,
            Some(share) => {
                let mut held = lock(&share.held);
                let sum = held.plus(amount);
                if sum.bytes > Share::MOST_BYTES {
                    return Err(MappingError::TooMuch(bytes));
                }
                let more = sum.minus(PROMISE).minus(held.minus(PROMISE));
                commit(&mut committed, more, ALL.minus(OWN))?;
                *held = sum;
            }
        }
        Ok(Self { share: share.cloned(), amount })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut committed = lock(&COMMITTED);
        let mut less = self.amount;
        if let Some(share) = &self.share {
            let mut held = lock(&share.held);
            let rest = held.minus(self.amount);
            less = held.minus(PROMISE).minus(rest.minus(PROMISE));
            *held = rest;
        }
        *committed = committed.minus(less);
    }
}
