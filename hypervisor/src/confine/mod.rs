//! What a worker may still do once it runs a guest: next to nothing.
//!
//! [`process`] takes everything from the process that it will not need: descriptors that were not handed to it, privileges,
//! paths, the network, core dumps. [`thread`] then limits a thread to the system calls of its [`Class`]; a thread and all that
//! it starts keep the limits of whoever started it, so the main thread becomes [`Class::Control`] before there is another.
//!
//! A guest that takes a thread over can compute, and reach its own memory, its own devices and the sockets that its VM has. A
//! system call outside the list ends the process by SIGSYS. Only opening files fails without that (EACCES): the
//! C library tries it by itself.

#![forbid(unsafe_code)]

mod filter;

use std::fmt;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use landlock::{
    ABI, Access, AccessFs, AccessNet, LandlockStatus, Ruleset, RulesetAttr, RulesetStatus, Scope,
};
use rustix::process::{
    DumpableBehavior, Gid, Resource, Rlimit, Uid, getrlimit, set_dumpable_behavior, setrlimit,
};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs, set_thread_groups,
    set_thread_res_gid, set_thread_res_uid,
};

pub use filter::Class;

/// Descriptors that a VM opens at most: three for each of 64 processors, two for each of the 2047 channels that a VMBus has,
/// and 512 for all else. A guest that opens every channel leaves enough to take a new daemon in.
pub const DESCRIPTORS: u64 = 3 * 64 + 2 * 2047 + 512;

/// Newest Landlock interface asked for; an older kernel gives what it has.
const LANDLOCK: ABI = ABI::V6;

/// What a process keeps.
#[derive(Debug, Clone, Copy)]
pub struct Limits<'a> {
    /// Descriptors handed over. All others above standard error are closed.
    pub keep: &'a [BorrowedFd<'a>],
    /// Descriptors that may be open at once, if the process may have so many.
    pub descriptors: u64,
    /// The user that the process becomes, and the group of the same number, without any other; none if it stays what it is.
    pub user: Option<u32>,
}

impl Default for Limits<'_> {
    fn default() -> Self {
        Self { keep: &[], descriptors: DESCRIPTORS, user: None }
    }
}

/// How far [`process`] got where the kernel or the caller's privileges decide.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Report {
    /// Version of Landlock's interface in force; none if the kernel has it not, or not switched on.
    pub landlock: Option<i32>,
    /// The bounding set is empty. Otherwise the process had no right to change it, and no way to gain from it either.
    pub bounding: bool,
    /// Descriptors closed that nobody handed over.
    pub closed: usize,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.landlock {
            Some(level) => write!(f, "confined: Landlock {level}")?,
            None => f.write_str("confined, without Landlock, which this kernel has not")?,
        }
        if !self.bounding {
            f.write_str(", bounding set as it was")?;
        }
        Ok(())
    }
}

/// Why a process or thread is not confined. It must not run a guest.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    /// Other threads would stay as they are.
    #[error("{0} threads run already; a process is confined while it has one")]
    Threads(usize),
    /// [`thread`] comes after [`process`].
    #[error("a thread is confined after its process")]
    Order,
    /// The kernel refuses.
    #[error("cannot {what}")]
    Kernel {
        /// What was to be done.
        what: &'static str,
        /// Its reason.
        #[source]
        source: std::io::Error,
    },
    /// Landlock is there, but does not take the rules.
    #[error("cannot close the file system with Landlock")]
    Landlock(#[from] landlock::RulesetError),
    /// A filter of system calls is wrong.
    #[error("cannot compile a filter of system calls")]
    Filter(#[from] seccompiler::BackendError),
    /// A filter of system calls is refused.
    #[error("cannot install a filter of system calls")]
    Install(#[from] seccompiler::Error),
}

impl From<ConfineError> for std::io::Error {
    fn from(error: ConfineError) -> Self {
        Self::other(error)
    }
}

fn kernel<E: Into<std::io::Error>>(what: &'static str) -> impl FnOnce(E) -> ConfineError {
    move |source| ConfineError::Kernel { what, source: source.into() }
}

/// What each new thread calls before it begins its work.
#[derive(Debug, Clone, Copy)]
pub struct Confine {
    /// Threads that run the guest.
    pub vcpu: fn() -> std::io::Result<()>,
    /// Threads of devices.
    pub devices: fn() -> std::io::Result<()>,
}

impl Confine {
    /// Threads of a worker that serves a daemon.
    pub const STRICT: Self =
        Self { vcpu: || Ok(thread(Class::Vcpu)?), devices: || Ok(thread(Class::Devices)?) };

    /// Threads of a program that was started by hand: they may do what the program may.
    pub fn none() -> Self {
        Self { vcpu: || Ok(()), devices: || Ok(()) }
    }
}

/// Starts a thread that is confined before it does anything else. The process ends if it cannot be.
///
/// # Errors
/// Out of threads.
pub fn spawn(
    name: &str,
    confine: fn() -> std::io::Result<()>,
    run: impl FnOnce() + Send + 'static,
) -> std::io::Result<JoinHandle<()>> {
    let confined = move || match confine() {
        Ok(()) => run(),
        Err(error) => {
            tracing::error!(%error, "a thread cannot be confined");
            std::process::exit(1);
        }
    };
    std::thread::Builder::new().name(name.into()).spawn(confined)
}

/// Set once the process is confined.
static CONFINED: AtomicBool = AtomicBool::new(false);

/// Confines the process. To be called when all that came from outside is open and the process still has one thread.
///
/// # Errors
/// Something that must be given up cannot be. The process may be confined in part.
pub fn process(limits: &Limits<'_>) -> Result<Report, ConfineError> {
    match std::fs::read_dir("/proc/self/task").map_err(kernel("count threads"))?.count() {
        1 => {}
        threads => return Err(ConfineError::Threads(threads)),
    }
    let closed = close_strays(limits.keep)?;
    let no_core = Rlimit { current: Some(0), maximum: Some(0) };
    setrlimit(Resource::Core, no_core).map_err(kernel("forbid core dumps"))?;
    let most =
        getrlimit(Resource::Nofile).maximum.map_or(limits.descriptors, |most| most.min(limits.descriptors));
    let few = Rlimit { current: Some(most), maximum: Some(most) };
    setrlimit(Resource::Nofile, few).map_err(kernel("limit descriptors"))?;
    set_no_new_privs(true).map_err(kernel("give up new privileges"))?;
    let bounding = drop_capabilities(limits.user)?;
    // After the change of user, which sets this anew.
    set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(kernel("forbid other processes to look in"))?;
    let landlock = close_file_system()?;
    filter::refuse_paths()?;
    CONFINED.store(true, Ordering::SeqCst);
    Ok(Report { landlock, bounding, closed })
}

/// Limits the calling thread, and all that it starts, to the system calls of `class`.
///
/// # Errors
/// The process is not confined, or the kernel refuses.
pub fn thread(class: Class) -> Result<(), ConfineError> {
    if !CONFINED.load(Ordering::SeqCst) {
        return Err(ConfineError::Order);
    }
    filter::limit(class)
}

/// Closes what was inherited by mistake; returns how much it was.
fn close_strays(keep: &[BorrowedFd<'_>]) -> Result<usize, ConfineError> {
    let list = std::fs::read_dir("/proc/self/fd").map_err(kernel("list open descriptors"))?;
    // One of them is the list itself; it is closed by the time the others are.
    let open: Vec<RawFd> = list.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    let handed = |fd: RawFd| fd <= 2 || keep.iter().any(|kept| kept.as_raw_fd() == fd);
    // Nobody in this process owns them: all that it opened itself is in `keep`.
    Ok(open.into_iter().filter(|&fd| !handed(fd)).filter(|&fd| nix::unistd::close(fd).is_ok()).count())
}

/// Becomes `user`, for good. The process has one thread.
fn become_user(user: u32) -> Result<(), ConfineError> {
    const WHAT: &str = "become a user of its own";
    let (user, group) = (Uid::from_raw(user), Gid::from_raw(user));
    set_thread_groups(&[]).map_err(kernel(WHAT))?;
    set_thread_res_gid(group, group, group).map_err(kernel(WHAT))?;
    set_thread_res_uid(user, user, user).map_err(kernel(WHAT))
}

/// Gives up all capabilities, and those that a program started later could get; in between, while it still may, becomes
/// `user`. False if the bounding set stays.
fn drop_capabilities(user: Option<u32>) -> Result<bool, ConfineError> {
    const WHAT: &str = "give up capabilities";
    clear_ambient_capability_set().map_err(kernel(WHAT))?;
    let mine = capabilities(None).map_err(kernel(WHAT))?;
    let bounding = mine.effective.contains(CapabilitySet::SETPCAP);
    if bounding {
        for bit in 0..u64::BITS {
            match remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << bit)) {
                Ok(()) => {}
                // Beyond the last one that the kernel knows.
                Err(rustix::io::Errno::INVAL) => break,
                Err(error) => return Err(kernel(WHAT)(error)),
            }
        }
    }
    user.map_or(Ok(()), become_user)?;
    let none = CapabilitySet::empty();
    let none = CapabilitySets { effective: none, permitted: none, inheritable: none };
    set_capabilities(None, none).map_err(kernel(WHAT))?;
    Ok(bounding)
}

/// No path, no network, no signal to and no abstract socket of anybody else, as far as the kernel has it.
fn close_file_system() -> Result<Option<i32>, ConfineError> {
    let rules = Ruleset::default()
        .handle_access(AccessFs::from_all(LANDLOCK))?
        .handle_access(AccessNet::from_all(LANDLOCK))?
        .scope(Scope::from_all(LANDLOCK))?
        .create()?;
    let status = rules.restrict_self()?;
    Ok(match (status.ruleset, status.landlock) {
        (RulesetStatus::NotEnforced, _) => None,
        (_, LandlockStatus::Available { effective_abi, .. }) => {
            Some((effective_abi as i32).min(LANDLOCK as i32))
        }
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use landlock::{CompatLevel, Compatible};

    use super::*;

    /// Filters of system calls answer first in a confined process, so that this is told from within.
    #[test]
    fn landlock_alone_closes_the_file_system_where_the_kernel_has_it() {
        let there = Ruleset::default()
            .set_compatibility(CompatLevel::HardRequirement)
            .handle_access(AccessFs::Execute)
            .and_then(Ruleset::create)
            .is_ok();
        let (path, inside) = (std::env::temp_dir(), std::env::current_exe().unwrap());
        // It binds the thread that asks for it.
        let thread = std::thread::spawn(move || {
            assert!(std::fs::read_dir(&path).is_ok() && std::fs::File::open(&inside).is_ok());
            let level = close_file_system().unwrap();
            let refused = [std::fs::read_dir(&path).map(drop), std::fs::File::open(&inside).map(drop)]
                .map(|result| result.is_err_and(|error| error.raw_os_error() == Some(libc::EACCES)));
            (level, refused)
        });
        let (level, refused) = thread.join().unwrap();
        assert_eq!((level.is_some(), refused), (there, [there; 2]));
        println!("Landlock: {level:?}");
    }
}
