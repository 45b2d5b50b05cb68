//! Virtual machines: one worker process each, started and watched by a supervisor thread.
//!
//! A worker outlives the daemon, whether that ends in good order, is killed, or is replaced by a newer one: the worker is in
//! a process group and control group of its own, its listening sockets lie in the VM's directory, and the directory's record
//! says what a later daemon must know. That daemon connects, asks how the VM is, and has its channels handed over again.
//!
//! | module | what it does |
//! |---|---|
//! | `spec`, `identity` | what a VM is |
//! | `manager` | all VMs by name |
//! | `supervisor`, `run`, `ending`, `nics`, `show` | the thread of one VM: what it hears, how runs begin and end, adapters, answers |
//! | `process`, `link` | the worker: its process, its control connection |
//! | `directory` | a VM's directory |
//! | `cgroup`, `parking` | its share of the host's processors, and which it leaves to the switch |
//! | `pages` | what its memory is made of |
//! | `users` | the user that a worker is |
//! | `network`, `wiring` | what VMs need of the switch, and the switch |
//! | `report` | what an operator is shown |

mod cgroup;
mod directory;
mod ending;
mod error;
pub mod identity;
mod link;
mod manager;
mod network;
mod nics;
mod pages;
mod parking;
mod process;
mod report;
mod run;
mod show;
pub mod spec;
mod supervisor;
#[cfg(test)]
mod tests;
mod users;
mod wiring;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

pub use cgroup::Cgroups;
pub use error::VmError;
pub use manager::Manager;
pub use network::{Channels, Network, Nics, OnEnd};
pub use nics::MAX_NICS;
pub use pages::PagePolicy;
pub use parking::Parking;
pub use process::Launcher;
pub use report::{
    CpuReport, ExitReport, FaultReport, GuestReport, MemoryReport, NicReport, VmReport, VmState,
};
pub use users::Users;
pub use wiring::{Wiring, port};

use spec::VmSpec;

/// What all supervisors share.
#[derive(Debug)]
pub struct Settings {
    /// Directory in which every VM has its own.
    pub root: PathBuf,
    /// How workers are started.
    pub launcher: Launcher,
    /// The switch.
    pub network: Arc<dyn Network>,
    /// The host's control groups.
    pub cgroups: Cgroups,
    /// What the host's memory comes in.
    pub pages: PagePolicy,
    /// Processors of the host.
    pub cpus: Vec<usize>,
    /// Which of them VMs leave to the switch.
    pub parking: Parking,
    /// How long to wait for what.
    pub patience: Patience,
    /// Percent of a processor that running VMs have reserved.
    pub reserves: Reserves,
    /// Users of workers.
    pub users: Users,
}

/// How long to wait for what.
#[derive(Debug, Clone)]
pub struct Patience {
    /// For a guest's first instruction: memory is being made ready.
    pub start: Duration,
    /// For other answers of a worker.
    pub answer: Duration,
    /// For a worker to tell how it is.
    pub look: Duration,
    /// For a supervisor to tell how its VM is, when all are listed.
    pub list: Duration,
    /// For a worker to end when asked.
    pub closing: Duration,
    /// Before the first restart; each further one waits twice as long.
    pub restart: Duration,
    /// The longest wait before a restart.
    pub slowest: Duration,
    /// A run that lasted so long was no stumble.
    pub steady: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            start: Duration::from_secs(18),
            answer: Duration::from_secs(15),
            look: Duration::from_secs(1),
            list: Duration::from_secs(5),
            closing: Duration::from_secs(5),
            restart: Duration::from_secs(1),
            slowest: Duration::from_secs(60),
            steady: Duration::from_secs(60),
        }
    }
}

/// What running VMs have reserved, in percent of a processor.
#[derive(Debug, Default)]
pub struct Reserves(Mutex<BTreeMap<String, u64>>);

impl Settings {
    /// Reserves what `spec` asks for, in place of what the VM had.
    fn reserve(&self, spec: &VmSpec) -> Result<(), VmError> {
        let mut reserves = self.reserves.0.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = u64::from(spec.cpu.reserve) * u64::from(spec.vcpus);
        let others: u64 =
            reserves.iter().filter(|(name, _)| **name != spec.name).map(|(_, amount)| amount).sum();
        let host = 100 * u64::try_from(self.cpus.len()).unwrap_or(u64::MAX / 100);
        if wanted > 0 && others.saturating_add(wanted) > host {
            let free = host.saturating_sub(others);
            let problem = format!(
                "{wanted} % of a processor are wanted, but only {free} of the host's {host} % are not reserved by others, expected less"
            );
            return Err(VmError::Invalid { key: "cpu.reserve", problem });
        }
        reserves.insert(spec.name.clone(), wanted);
        Ok(())
    }

    /// What a VM that ended had of the host.
    fn release(&self, name: &str) {
        self.users.release(name);
        self.reserves.0.lock().unwrap_or_else(PoisonError::into_inner).remove(name);
    }
}
