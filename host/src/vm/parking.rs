//! Which of the host's processors VMs get: all but those on which a worker of the switch polls.
//!
//! A worker that polls makes good use of a whole processor, and a virtual one beside it would take half of that; one that is
//! parked has given its processor back. What workers do changes by the microsecond, while a VM that moves loses its caches:
//! so a processor changes hands only after several looks in a row. Pure: looks and their times come from outside.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use vmq::worker::Activity;

/// Looks are at least so far apart: supervisors come every five seconds, each by its own clock.
const LOOK: Duration = Duration::from_secs(4);
/// Looks in a row that find a worker polling, until VMs leave its processor.
const LEAVE: u32 = 2;
/// What it takes for them to come back: looks in a row, of which one at a parked worker counts for three.
const RETURN: u32 = 6;
const PARKED: u32 = 3;

/// Processors that VMs have at least; where fewer would be left, they get all.
const FEWEST: usize = 2;

/// A worker's processor.
#[derive(Debug, Clone, Copy, Default)]
struct Seat {
    /// VMs are kept off it.
    taken: bool,
    /// How much speaks against that, in a row.
    against: u32,
}

impl Seat {
    fn look(self, activity: Activity) -> Self {
        let (against, enough) = match (self.taken, activity) {
            (false, Activity::Polling) => (self.against + 1, LEAVE),
            (true, Activity::Asleep) => (self.against + 1, RETURN),
            (true, Activity::Parked) => (self.against + PARKED, RETURN),
            (true, Activity::Polling) | (false, _) => (0, u32::MAX),
        };
        if against >= enough { Self { taken: !self.taken, against: 0 } } else { Self { against, ..self } }
    }
}

/// The policy.
#[derive(Debug, Default)]
struct Policy(BTreeMap<usize, Seat>);

impl Policy {
    /// The processors of `online` that VMs get now that `workers` do this; none if they may use all.
    fn look(&mut self, workers: &[(usize, Activity)], online: &[usize]) -> Vec<usize> {
        let seat = |&(cpu, activity): &(usize, Activity)| match self.0.get(&cpu) {
            Some(seat) => (cpu, seat.look(activity)),
            // A worker that is new is taken at its word.
            None => (cpu, Seat { taken: activity == Activity::Polling, against: 0 }),
        };
        self.0 = workers.iter().map(seat).collect();
        let free = |cpu: &usize| !self.0.get(cpu).is_some_and(|seat| seat.taken);
        let left: Vec<usize> = online.iter().copied().filter(free).collect();
        if left.len() == online.len() || left.len() < FEWEST { Vec::new() } else { left }
    }
}

/// The policy, as all VMs share it.
#[derive(Debug, Default)]
pub struct Parking(Mutex<(Policy, Option<Instant>, Vec<usize>)>);

impl Parking {
    /// The processors for VMs; none if they may use all of `online`. `activity` is asked if it is time for a look.
    pub fn allowed(
        &self,
        now: Instant,
        online: &[usize],
        activity: impl FnOnce() -> Vec<(usize, Activity)>,
    ) -> Vec<usize> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (policy, last, allowed) = &mut *state;
        if last.is_none_or(|last| now.duration_since(last) >= LOOK) {
            *last = Some(now);
            *allowed = policy.look(&activity(), online);
        }
        allowed.clone()
    }
}

#[cfg(test)]
mod tests {
    use Activity::{Asleep, Parked, Polling};

    use super::*;

    const ALL: [usize; 0] = [];

    #[test]
    fn vms_leave_polling_workers_and_get_what_parked_ones_give_back() {
        let mut policy = Policy::default();
        let mut look = |two, three| policy.look(&[(2, two), (3, three)], &[0, 1, 2, 3]);
        assert_eq!(look(Parked, Polling), [0, 1, 2], "a new worker is taken at its word");
        assert_eq!(look(Polling, Polling), [0, 1, 2]);
        assert_eq!(look(Polling, Polling), [0, 1], "two looks in a row");
        assert_eq!(look(Parked, Polling), [0, 1]);
        assert_eq!(look(Parked, Polling), [0, 1, 2]);
        assert_eq!(look(Parked, Parked), [0, 1, 2]);
        assert_eq!(look(Parked, Parked), ALL);
    }

    #[test]
    fn worker_that_sleeps_and_wakes_changes_nothing() {
        let mut policy = Policy::default();
        let mut looks = |activity: Activity, count| {
            (0..count).map(|_| policy.look(&[(1, activity)], &[0, 1, 2])).collect::<Vec<_>>()
        };
        assert_eq!(looks(Asleep, 1), [ALL]);
        for _ in 0..10 {
            assert_eq!([looks(Polling, 1), looks(Asleep, 1)].concat(), [ALL, ALL]);
        }
        assert_eq!(looks(Polling, 2), [vec![], vec![0, 2]]);
        for _ in 0..10 {
            assert!([looks(Asleep, 5), looks(Polling, 1)].concat().iter().all(|cpus| *cpus == [0, 2]));
        }
        assert_eq!(looks(Asleep, 6).last(), Some(&vec![]), "half a minute of sleep");
    }

    #[test]
    fn machine_that_would_leave_vms_one_processor_or_none_leaves_them_all() {
        let mut policy = Policy::default();
        assert_eq!(policy.look(&[(0, Polling), (1, Polling)], &[0, 1]), ALL);
        assert_eq!(policy.look(&[(0, Polling), (1, Polling)], &[0, 1, 2]), ALL);
        assert_eq!(policy.look(&[(1, Polling)], &[0, 1, 2]), [0, 2], "a worker that is gone holds nothing");
        assert_eq!(policy.look(&[(9, Polling)], &[0, 1, 2]), ALL, "nor does one that is elsewhere");
    }

    #[test]
    fn looks_of_many_vms_are_one_look() {
        let (parking, mut now, mut asked) = (Parking::default(), Instant::now(), 0);
        for _ in 0..20 {
            parking.allowed(now, &[0, 1], || {
                asked += 1;
                vec![(1, Polling)]
            });
            now += Duration::from_secs(1);
        }
        assert_eq!(asked, 5);
    }
}
