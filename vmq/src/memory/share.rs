//! Who may have how many of the mappings that the process keeps track of.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::sigbus::SLOTS;

/// Mappings that are in use or promised. Its lock orders changes of [`Share::held`], too.
static COMMITTED: Mutex<usize> = Mutex::new(0);

/// Kept back from shares: for virtual machines and for what the process maps for itself.
const OWN: usize = 4096;

fn committed() -> MutexGuard<'static, usize> {
    COMMITTED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Mappings that one peer is sure to get, however many the others take: [`Share::PROMISED`]. What it takes beyond them is
/// of the rest that nobody was promised. Given back once the share and all mappings made in it are dropped.
#[derive(Debug)]
pub struct Share {
    held: AtomicUsize,
}

impl Share {
    /// The eight regions that every vhost-user client may have, a dirty log and a record of what is in flight; twice, as
    /// a client may put all of them in place of what it had.
    pub const PROMISED: usize = 20;

    /// A share of its own for a new peer. `None` if the process has not so many left to promise.
    pub fn new() -> Option<Arc<Self>> {
        let mut committed = committed();
        *committed = committed.checked_add(Self::PROMISED).filter(|&sum| sum <= SLOTS - OWN)?;
        Some(Arc::new(Self { held: AtomicUsize::new(0) }))
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        *committed() -= Self::PROMISED;
    }
}

/// One mapping's place, of a share or of the rest.
#[derive(Debug)]
pub(super) struct Place(Option<Arc<Share>>);

impl Place {
    /// `None` if neither the share nor the rest has one left.
    pub(super) fn take(share: Option<&Arc<Share>>) -> Option<Self> {
        let mut committed = committed();
        let held = share.map(|share| share.held.load(Ordering::Relaxed));
        if held.is_none_or(|held| held >= Share::PROMISED) {
            let limit = if held.is_some() { SLOTS - OWN } else { SLOTS };
            *committed = Some(*committed + 1).filter(|&sum| sum <= limit)?;
        }
        if let (Some(share), Some(held)) = (share, held) {
            share.held.store(held + 1, Ordering::Relaxed);
        }
        Some(Self(share.cloned()))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut committed = committed();
        let held = self.0.as_ref().map(|share| share.held.fetch_sub(1, Ordering::Relaxed));
        if held.is_none_or(|held| held > Share::PROMISED) {
            *committed -= 1;
        }
    }
}
