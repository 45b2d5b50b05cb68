//! A user for each worker: what a guest that took its worker over could do as a user of the host, it can do to nobody else.
//!
//! The numbers have no names, and own nothing: all that a worker needs it is handed open.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::thread::{CapabilitySet, capabilities};

use super::identity;

/// Within 1879048192 to 2147352575, which nobody uses on a host with systemd ("Users, Groups, UIDs and GIDs" of its manual).
const RANGE: Range<u32> = 1_900_000_000..2_100_000_000;

/// Which VMs have which users, the group of the same number with it; none have any where they cannot.
#[derive(Debug)]
pub struct Users(Option<Mutex<BTreeMap<String, u32>>>);

impl Users {
    /// Each VM has one of its own.
    pub fn own() -> Self {
        Self(Some(Mutex::default()))
    }

    /// Workers stay what the daemon is.
    pub fn same() -> Self {
        Self(None)
    }

    /// As this daemon may: root, with the rights to change a user and to end another's process, where the numbers exist.
    pub fn of_this_host() -> Self {
        let needed = CapabilitySet::SETUID | CapabilitySet::SETGID | CapabilitySet::KILL;
        let may = rustix::process::geteuid().is_root()
            && capabilities(None).is_ok_and(|mine| mine.effective.contains(needed));
        let exist = |map| std::fs::read_to_string(map).is_ok_and(|map| mapped(&map));
        if may && exist("/proc/self/uid_map") && exist("/proc/self/gid_map") {
            Self::own()
        } else {
            Self::same()
        }
    }

    fn lock(&self) -> Option<MutexGuard<'_, BTreeMap<String, u32>>> {
        self.0.as_ref().map(|held| held.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The user for the worker of `vm`, until [`Users::release`]; always the same, unless another VM holds that.
    pub fn take(&self, vm: &str) -> Option<u32> {
        let mut held = self.lock()?;
        held.remove(vm);
        let first = identity::user(vm, RANGE.end - RANGE.start);
        let candidates = (first..RANGE.end - RANGE.start).chain(0..first).map(|number| RANGE.start + number);
        let user = { candidates }.find(|user| !held.values().any(|other| other == user))?;
        held.insert(vm.to_owned(), user);
        Some(user)
    }

    /// `vm` runs as `user` already.
    pub fn hold(&self, vm: &str, user: u32) {
        if let Some(mut held) = self.lock() {
            held.insert(vm.to_owned(), user);
        }
    }

    /// `vm` has ended.
    pub fn release(&self, vm: &str) {
        if let Some(mut held) = self.lock() {
            held.remove(vm);
        }
    }
}

/// Whether a map of a user namespace (user_namespaces(7): inside, outside, length) has the whole range.
fn mapped(map: &str) -> bool {
    map.lines().any(|line| {
        let mut numbers = line.split_whitespace().map(str::parse::<u64>);
        let (Some(Ok(first)), Some(Ok(length))) = (numbers.next(), numbers.nth(1)) else { return false };
        first <= u64::from(RANGE.start) && first.saturating_add(length) >= u64::from(RANGE.end)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_the_vms_own_and_the_same_again() {
        let users = Users::own();
        let web = users.take("web").unwrap();
        assert!(RANGE.contains(&web));
        assert_eq!(users.take("web"), Some(web));
        users.release("web");
        users.hold("live", web);
        let other = users.take("web").unwrap();
        assert_eq!(other, web + 1, "what another VM holds is left to it");
        users.hold("last", RANGE.start);
        assert_ne!(users.take("db"), users.take("web"));
        assert_eq!(Users::same().take("web"), None);
    }

    #[test]
    fn container_without_the_numbers_gives_no_users() {
        assert!(mapped("         0          0 4294967295\n"));
        assert!(mapped("0 100000 65536\n65536 1000000 4000000000\n"));
        for map in ["0 100000 65536\n", "", "0 0\n", "1900000001 0 4294967295\n", "x y z\n"] {
            assert!(!mapped(map), "{map}");
        }
    }
}
