//! All VMs by name.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hypervisor::control::Command;
use vswitch::error::FabricError;

use super::Settings;
use super::directory::{Directory, Record};
use super::error::VmError;
use super::report::{VmReport, VmState};
use super::spec::{NicChange, NicSpec, VmChange, VmSpec};
use super::supervisor::{Mailbox, Order, Reply, Supervisor};
use crate::config::check_name;

/// Supervisors answer within their own patience; one that does not has a bug.
const PATIENCE: Duration = Duration::from_secs(19);

/// The VMs of a daemon. Its methods may block for some seconds.
#[derive(Debug)]
pub struct Manager {
    settings: Arc<Settings>,
    machines: Mutex<BTreeMap<String, Machine>>,
}

#[derive(Debug)]
struct Machine {
    mailbox: Mailbox,
    /// As it was first defined: what is shown of it while its supervisor does not answer.
    spec: VmSpec,
    thread: JoinHandle<()>,
}

impl Manager {
    /// No VMs yet.
    pub fn new(settings: Settings) -> Self {
        Self { settings: Arc::new(settings), machines: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Machine>> {
        self.machines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Defines the VMs of a configuration and takes back all that still run from before, those too that were defined
    /// while the daemon ran. Returns what went wrong, a sentence each.
    pub fn begin(&self, configured: Vec<VmSpec>) -> Vec<String> {
        let (mut problems, mut records) = (Vec::new(), BTreeMap::new());
        let mut lost = BTreeSet::new();
        for (name, record) in self.records(|_| true) {
            match record {
                Ok(record) => {
                    // Before any VM that starts could take it.
                    record.user.inspect(|&user| self.settings.users.hold(&name, user));
                    records.insert(name, record);
                }
                Err(error) => {
                    problems.push(format!("vm.{name}: {error}"));
                    lost.insert(name);
                }
            }
        }
        let names: BTreeSet<_> = configured.iter().map(|spec| spec.name.clone()).collect();
        let known = configured.into_iter().map(|spec| {
            let record = records.remove(&spec.name);
            (spec, record)
        });
        let mut wanted: Vec<_> = known.collect();
        wanted.extend(records.into_values().map(|record| (record.spec.clone(), Some(record))));
        let mut starts = Vec::new();
        for (spec, record) in wanted {
            let name = spec.name.clone();
            let start = spec.autostart && record.is_none() && names.contains(&name) && !lost.contains(&name);
            let made = self.add(spec, record);
            // All start at once, and are waited for below.
            match made.and_then(|()| if start { self.order(&name, Order::Start).map(Some) } else { Ok(None) })
            {
                Ok(started) => starts.extend(started.map(|started| (name, started))),
                Err(error) => problems.push(format!("vm.{name}: {error}")),
            }
        }
        for (name, started) in starts {
            problems.extend(wait(&name, &started).err().map(|error| format!("vm.{name}: {error}")));
        }
        problems
    }

    /// What earlier daemons left of the `wanted` VMs, by name.
    fn records(&self, wanted: impl Fn(&str) -> bool) -> BTreeMap<String, Result<Record, VmError>> {
        let entries = match std::fs::read_dir(&self.settings.root) {
            Ok(entries) => entries,
            Err(_) => return BTreeMap::new(),
        };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let records = names.filter(|name| check_name(name).is_ok() && wanted(name)).filter_map(|name| {
            let record = Directory::new(&self.settings.root, &name).read().transpose()?;
            Some((name, record))
        });
        records.collect()
    }

    /// VMs that are not defined, of which an earlier daemon left what cannot be read.
    fn lost(&self) -> Vec<VmReport> {
        let known: BTreeSet<String> = self.lock().keys().cloned().collect();
        let left = self.records(|name| !known.contains(name)).into_iter();
        let report = |(name, record): (String, Result<Record, VmError>)| {
            let mut report =
                VmReport::new(&VmSpec::unknown(&name), &Directory::new(&self.settings.root, &name));
            report.state = VmState::Unknown;
            report.reason = Some(record.err()?.to_string());
            Some(report)
        };
        left.filter_map(report).collect()
    }

    /// Defines a VM; it is off.
    ///
    /// # Errors
    /// If there is one of that name, or the switch refuses a port.
    pub fn define(&self, spec: VmSpec) -> Result<(), VmError> {
        self.add(spec, None)
    }

    fn add(&self, spec: VmSpec, record: Option<Record>) -> Result<(), VmError> {
        let mut machines = self.lock();
        if machines.contains_key(&spec.name) {
            return Err(VmError::Exists { what: "VM", name: spec.name });
        }
        self.make_root()?;
        // What runs has its ports by right; a definition is refused without them.
        if record.is_none() {
            self.plug(&spec)?;
        }
        let name = spec.name.clone();
        let (mailbox, queue) = Mailbox::new()?;
        let supervisor = Supervisor::new(Arc::clone(&self.settings), spec.clone(), mailbox.clone(), queue);
        let thread = std::thread::Builder::new().name(format!("vm-{name}"));
        let thread = thread.spawn(move || supervisor.run(record));
        let thread = thread.map_err(|error| VmError::io("a supervisor thread", error))?;
        machines.insert(name, Machine { mailbox, spec, thread });
        Ok(())
    }

    /// The directory of directories, for the daemon's user alone.
    fn make_root(&self) -> Result<(), VmError> {
        let root = &self.settings.root;
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(root)
            .and_then(|()| std::fs::set_permissions(root, std::fs::Permissions::from_mode(0o700)))
            .map_err(VmError::file(root))
    }

    /// All ports, or none.
    fn plug(&self, spec: &VmSpec) -> Result<(), VmError> {
        let network = &self.settings.network;
        for (index, nic) in spec.nics.iter().enumerate() {
            if let Err(source) = network.plug(&spec.name, nic) {
                for plugged in spec.nics.iter().take(index) {
                    let _ = network.unplug(&spec.name, plugged);
                }
                return Err(VmError::Port { nic: nic.name.clone(), source });
            }
        }
        Ok(())
    }

    /// Gives an order; its outcome comes later.
    fn order<T>(
        &self,
        name: &str,
        order: impl FnOnce(Reply<T>) -> Order,
    ) -> Result<mpsc::Receiver<Result<T, VmError>>, VmError> {
        let machines = self.lock();
        let Some(machine) = machines.get(name) else {
            let left = check_name(name).is_ok().then(|| Directory::new(&self.settings.root, name).read());
            return Err(left.and_then(Result::err).unwrap_or_else(|| VmError::no_vm(name)));
        };
        let (reply, outcome) = mpsc::channel();
        if machine.mailbox.send(order(reply)) { Ok(outcome) } else { Err(VmError::Ending) }
    }

    fn outcome<T>(&self, name: &str, order: impl FnOnce(Reply<T>) -> Order) -> Result<T, VmError> {
        wait(name, &self.order(name, order)?)
    }

    /// How every VM is, by name.
    pub fn list(&self) -> Vec<VmReport> {
        let names: Vec<String> = self.lock().keys().cloned().collect();
        // All are asked before the first is waited for.
        let asked: Vec<_> = names.iter().map(|name| (name, self.order(name, Order::Show))).collect();
        let until = Instant::now() + self.settings.patience.list;
        let answer =
            |(name, asked): (&String, Result<mpsc::Receiver<Result<VmReport, VmError>>, _>)| match asked
                .ok()?
                .recv_timeout(until.saturating_duration_since(Instant::now()))
            {
                Ok(outcome) => outcome.ok(),
                Err(mpsc::RecvTimeoutError::Timeout) => self.unknown(name),
                Err(mpsc::RecvTimeoutError::Disconnected) => None,
            };
        let mut list: Vec<_> = asked.into_iter().filter_map(answer).chain(self.lost()).collect();
        list.sort_by(|one, other| one.name.cmp(&other.name));
        list
    }

    /// A VM of which nothing is heard.
    fn unknown(&self, name: &str) -> Option<VmReport> {
        let machines = self.lock();
        let mut report = VmReport::new(&machines.get(name)?.spec, &Directory::new(&self.settings.root, name));
        report.state = VmState::Unknown;
        report.warnings.push("its supervisor does not answer; it is shown as it was first defined".into());
        Some(report)
    }

    /// What the host does not do for any VM, a sentence each.
    pub fn warnings(&self) -> Vec<String> {
        let machines = self.lock();
        let polling = self.settings.cgroups.no_cpuset().filter(|_| !machines.is_empty());
        let polling = polling
            .map(|reason| format!("VMs are not kept off the processors on which the switch polls: {reason}"));
        // Dynamic memory is in small pages anyway, and what is set aside follows no policy.
        let asks = machines.values().any(|machine| machine.spec.memory.asks_for_huge_pages());
        let small = self.settings.pages.why_small().filter(|_| asks);
        polling.into_iter().chain(small).collect()
    }

    /// How a VM is.
    ///
    /// # Errors
    /// If there is no such VM.
    pub fn show(&self, name: &str) -> Result<VmReport, VmError> {
        self.outcome(name, Order::Show)
    }

    /// Starts a VM that is off.
    ///
    /// # Errors
    /// Why it cannot be started.
    pub fn start(&self, name: &str) -> Result<(), VmError> {
        self.outcome(name, Order::Start)
    }

    /// Ends a VM at once, as if its power were cut.
    ///
    /// # Errors
    /// If it is off.
    pub fn stop(&self, name: &str) -> Result<(), VmError> {
        self.outcome(name, Order::Stop)
    }

    /// Passes a command to the worker of a running VM.
    ///
    /// # Errors
    /// If it is off, or the worker refuses.
    pub fn command(&self, name: &str, command: Command) -> Result<(), VmError> {
        self.outcome(name, |reply| Order::Command(command, reply))
    }

    /// Changes a VM, now if it runs, and for later starts.
    ///
    /// # Errors
    /// If a value does not do.
    pub fn set(&self, name: &str, change: VmChange) -> Result<(), VmError> {
        self.outcome(name, |reply| Order::Set(change, reply))
    }

    /// Adds an adapter, with its port.
    ///
    /// # Errors
    /// If switch or worker refuse.
    pub fn add_nic(&self, name: &str, nic: NicSpec) -> Result<(), VmError> {
        self.outcome(name, |reply| Order::AddNic(nic, reply))
    }

    /// Removes an adapter, with its port.
    ///
    /// # Errors
    /// If there is none, or the worker refuses.
    pub fn remove_nic(&self, name: &str, nic: &str) -> Result<(), VmError> {
        self.outcome(name, |reply| Order::RemoveNic(nic.to_owned(), reply))
    }

    /// Changes an adapter and its port.
    ///
    /// # Errors
    /// If there is none, a value does not do, or the VM must be off for it.
    pub fn change_nic(&self, name: &str, nic: &str, change: NicChange) -> Result<(), VmError> {
        self.outcome(name, |reply| Order::ChangeNic(nic.to_owned(), change, reply))
    }

    /// The port of an emulated adapter was restarted: whichever VM has the adapter connects it again.
    pub fn reconnect(&self, switch: &str, port: &str) {
        for (name, machine) in &*self.lock() {
            if port.strip_prefix(name.as_str()).is_some_and(|nic| nic.starts_with('.')) {
                machine.mailbox.send(Order::Reconnect { switch: switch.to_owned(), port: port.to_owned() });
            }
        }
    }

    /// Forgets a VM that is off, with its directory.
    ///
    /// # Errors
    /// If it runs.
    pub fn delete(&self, name: &str) -> Result<(), VmError> {
        let outcome = self.outcome(name, Order::Delete);
        let mut machines = self.lock();
        // A supervisor that ended by a bug must not keep the name.
        if machines.get(name).is_some_and(|machine| outcome.is_ok() || machine.thread.is_finished())
            && let Some(machine) = machines.remove(name)
        {
            drop(machines);
            let _ = machine.thread.join();
        }
        outcome
    }

    /// Ends supervision; the VMs go on.
    pub fn end(&self) {
        let machines = std::mem::take(&mut *self.lock());
        for machine in machines.values() {
            machine.mailbox.send(Order::Detach);
        }
        for machine in machines.into_values() {
            let _ = machine.thread.join();
        }
    }
}

fn wait<T>(name: &str, outcome: &mpsc::Receiver<Result<T, VmError>>) -> Result<T, VmError> {
    match outcome.recv_timeout(PATIENCE) {
        Ok(outcome) => outcome,
        Err(mpsc::RecvTimeoutError::Disconnected) => Err(VmError::Ending),
        Err(mpsc::RecvTimeoutError::Timeout) => Err(VmError::Silent { name: name.to_owned() }),
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        self.end();
    }
}

/// The switch refused a name that is taken, or one that is not there.
impl VmError {
    /// Whether something of that name exists already.
    pub fn is_exists(&self) -> bool {
        matches!(self, Self::Exists { .. } | Self::Port { source: FabricError::Exists { .. }, .. })
    }
}
