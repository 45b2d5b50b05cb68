//! How a run of a VM begins: started by an operator or by the restart policy, or taken back from an earlier daemon.

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::time::{Duration, Instant, SystemTime};

use hypervisor::control::{Command, NicKind, State, Status};
use serde::{Deserialize, Serialize};
use vswitch::error::FabricError;

use super::Settings;
use super::directory::Record;
use super::error::VmError;
use super::link::Link;
use super::network::Channels;
use super::process::Process;
use super::spec::{LinkState, NicSpec, VmSpec};
use super::supervisor::{Life, Order, Pending, Reply, Supervisor};

/// Events of a run that go to the log: a guest may cause them without end.
const LOGGED: u32 = 100;
/// Longest wait before the next attempt at a worker's channels.
const SLOWEST_RETRY: Duration = Duration::from_secs(5);
/// A service that lasted so long was no failure: the next attempt comes soon.
const STEADY: Duration = Duration::from_secs(10);
/// How soon, and how late, links are told again of adapters that the switch does not serve yet.
const SOON: Duration = Duration::from_millis(10);
const LATE: Duration = Duration::from_secs(1);

/// What a run is to come to.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Aim {
    /// Its guest is about to start.
    Begin,
    /// It is to go on.
    #[default]
    Run,
    /// An operator ends it.
    Stop,
    /// Its guest switched itself off.
    Off,
    /// Its guest crashed, and is to be started again.
    Again(String),
}

/// A worker, and what is known of it.
#[derive(Debug)]
pub(super) struct Run {
    /// As it runs, live changes included.
    pub spec: VmSpec,
    pub process: Process,
    /// None once there is nothing more to say.
    pub link: Option<Link<Pending>>,
    pub channels: Service,
    pub state: State,
    pub status: Option<Box<Status>>,
    pub since: Instant,
    /// Seconds from 1970.
    pub started: u64,
    /// Of the worker, if it has its own.
    pub user: Option<u32>,
    pub aim: Aim,
    /// An operator started it, and not the restart policy.
    pub by_operator: bool,
    /// An operator asked the guest to switch itself off.
    pub off_wanted: bool,
    /// What the worker did wrong before it ended.
    pub complaint: Option<String>,
    /// When patience with an ending worker is over.
    pub kill_at: Option<Instant>,
    /// Who waits for the guest's start, whose attempt has failed.
    pub starter: Option<Reply<()>>,
    /// Who waits for its end.
    pub mourners: Vec<Reply<()>>,
    logged: u32,
}

impl Run {
    fn new(record: Record, process: Process, link: Option<Link<Pending>>) -> Self {
        Self {
            spec: record.spec,
            process,
            link,
            channels: Service::default(),
            state: State::Ready,
            status: None,
            since: Instant::now(),
            started: record.started,
            user: record.user,
            aim: record.aim,
            by_operator: false,
            off_wanted: record.off_wanted,
            complaint: None,
            kill_at: None,
            starter: None,
            mourners: Vec::new(),
            logged: 0,
        }
    }

    /// Whether one more line about it may go to the log.
    pub fn may_log(&mut self) -> bool {
        self.logged = self.logged.saturating_add(1);
        self.logged <= LOGGED
    }
}

/// The connection over which a worker's channels are served: made again and again while the VM runs.
#[derive(Debug, Default)]
pub(super) struct Service {
    connection: Option<Box<dyn Channels>>,
    generation: u64,
    retry: Option<Instant>,
    failures: u32,
    since: Option<Instant>,
    pub links: Links,
    /// Why there is none.
    pub reason: Option<String>,
}

/// Which adapters' links the switch has been told of, and when it is told next.
#[derive(Debug, Default)]
pub(super) struct Links {
    up: BTreeSet<String>,
    at: Option<Instant>,
    wait: Duration,
}

impl Links {
    /// An adapter has come, or its link is to change.
    pub fn wanted(&mut self, name: &str, now: Instant) {
        self.up.remove(name);
        (self.at, self.wait) = (Some(now), SOON);
    }
}

impl Service {
    /// The switch serves the channels from now on.
    fn begun(&mut self, connection: Box<dyn Channels>, now: Instant) {
        (self.connection, self.since) = (Some(connection), Some(now));
        (self.retry, self.reason) = (None, None);
        self.links = Links { at: Some(now), wait: SOON, ..Links::default() };
    }

    /// When [`Service::set_links`] has something to do.
    pub fn links_due(&self) -> Option<Instant> {
        self.connection.as_ref().and(self.links.at)
    }

    /// Tells the switch of links.
    pub fn set_links(&mut self, nics: &[NicSpec], now: Instant) {
        let (Some(connection), Links { up: told, at, wait }) = (&self.connection, &mut self.links) else {
            return;
        };
        let (mut missing, mut down) = (false, false);
        for nic in nics.iter().filter(|nic| nic.kind == NicKind::Synthetic) {
            if told.contains(&nic.name) {
                continue;
            }
            let up = nic.link == LinkState::Up;
            match connection.set_link(&nic.name, up) {
                true if up => drop(told.insert(nic.name.clone())),
                true => {}
                false => missing = true,
            }
            down |= !up;
        }
        *wait = if missing { (*wait * 2).min(LATE) } else { LATE };
        *at = (missing || down).then(|| now + *wait);
    }

    /// When it is to be tried again.
    pub fn retry_at(&self) -> Option<Instant> {
        self.retry
    }

    /// Ends it; the guest's channels stay as they are.
    pub fn close(&mut self) {
        self.connection = None;
    }

    fn failed(&mut self, reason: String) {
        self.connection = None;
        self.reason = Some(reason);
        if self.since.take().is_some_and(|since| since.elapsed() >= STEADY) {
            self.failures = 0;
        }
        let delay = Duration::from_millis(100) * 2u32.saturating_pow(self.failures.min(6));
        self.failures = self.failures.saturating_add(1);
        self.retry = Some(Instant::now() + delay.min(SLOWEST_RETRY));
    }
}

impl Supervisor {
    /// An operator's start.
    pub fn start(&mut self, reply: Reply<()>) {
        if let Life::Running(_) = self.life {
            let _ = reply.send(Err(self.wrong_state("off")));
            return;
        }
        (self.restarts, self.stumbles) = (0, 0);
        match self.begin(true) {
            Ok(()) => {
                self.request(Command::Start, &[], self.settings.patience.start, Pending::Start(Some(reply)))
            }
            Err(error) => {
                self.life = Life::Off;
                self.ended = Some(format!("it could not be started: {error}"));
                let _ = reply.send(Err(error));
            }
        }
    }

    /// A start by the restart policy.
    pub fn restart(&mut self) {
        self.restarts = self.restarts.saturating_add(1);
        tracing::info!("VM {}: starting it again", self.spec.name);
        match self.begin(false) {
            Ok(()) => self.request(Command::Start, &[], self.settings.patience.start, Pending::Start(None)),
            Err(error) => {
                tracing::warn!("VM {}: {error}", self.spec.name);
                self.ended = Some(format!("it could not be started again: {error}"));
                self.life = Life::Waiting(Instant::now() + self.backoff());
            }
        }
    }

    /// Starts a worker and tells it everything; its guest does not run yet.
    fn begin(&mut self, by_operator: bool) -> Result<(), VmError> {
        self.vacant()?;
        let spec = self.spec.clone();
        self.settings.reserve(&spec)?;
        let mut run = self.new_run(spec).inspect_err(|_| self.leave())?;
        run.by_operator = by_operator;
        (self.faults, self.panic, self.ended) = (Vec::new(), None, None);
        self.tended = Instant::now();
        self.life = Life::Running(Box::new(run));
        self.connect_legacy(|_| true);
        self.serve_channels(Instant::now());
        Ok(())
    }

    /// No worker of an earlier run is there, as far as can be known: there must never be two for one VM.
    pub fn vacant(&self) -> Result<(), VmError> {
        match self.directory.read()? {
            Some(Record { pid, born, .. }) if Process::adopt(pid, born).is_some() => {
                Err(VmError::Refused(format!("process {pid}, its worker, is there already")))
            }
            _ => Ok(()),
        }
    }

    fn new_run(&mut self, spec: VmSpec) -> Result<Run, VmError> {
        for nic in &spec.nics {
            match self.settings.network.plug(&spec.name, nic) {
                // It has been there since the VM was defined, unless somebody took it away.
                Ok(()) | Err(FabricError::Exists { .. }) => {}
                Err(source) => return Err(VmError::Port { nic: nic.name.clone(), source }),
            }
        }
        self.nics.lock().clone_from(&spec.nics);
        self.unplugged.clear();
        self.join_cgroup(&spec);
        let user = self.settings.users.take(&spec.name);
        let mut refused = None;
        let (cgroup, directory, restarts) = (&self.cgroup, &self.directory, self.restarts);
        let ready = |process: &Process| {
            refused = cgroup.as_ref().ok().and_then(|cgroup| cgroup.enter(process.pid()).err());
            let started = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
            let started = started.map_or(0, |now| now.as_secs());
            let (pid, born) = (process.pid(), process.born());
            let (spec, aim) = (spec.clone(), Aim::Begin);
            let record = Record { spec, pid, born, started, restarts, aim, off_wanted: false, user };
            directory.write(&record).map(|()| record)
        };
        let (mut process, record) = self.settings.launcher.launch(&spec, user, directory, ready)?;
        if let Some(refused) = refused {
            self.cgroup = Err(refused);
        }
        match Link::connect(&self.directory.control()) {
            Ok(link) => Ok(Run::new(record, process, Some(link))),
            Err(error) => {
                process.kill();
                let ended = self.lament(&mut process, None);
                Err(VmError::Refused(format!("{ended} ({error})")))
            }
        }
    }

    fn join_cgroup(&mut self, spec: &VmSpec) {
        let group = self.settings.cgroups.group(&spec.name);
        self.cgroup = group.and_then(|group| group.apply(spec, self.settings.cpus.len()).map(|()| group));
        self.make_way(spec.cpu.pin.is_empty(), Instant::now());
    }

    /// Keeps the VM off the processors on which the switch polls, if it is `free` to run anywhere.
    pub fn make_way(&mut self, free: bool, now: Instant) {
        let Settings { parking, network, cpus, .. } = &*self.settings;
        let Ok(group) = &mut self.cgroup else { return };
        let mut allowed = Vec::new();
        if free {
            allowed = parking.allowed(now, cpus, || network.activity());
            if allowed.is_empty() {
                allowed.clone_from(cpus);
            }
        }
        if let Err(error) = group.keep_to(&allowed) {
            tracing::warn!("VM {}: {error}", self.spec.name);
        }
    }

    /// The guest runs.
    pub fn started(&mut self, reply: Option<Reply<()>>) {
        if let Life::Running(run) = &mut self.life {
            if run.aim == Aim::Begin {
                run.aim = Aim::Run;
            }
            if run.state == State::Ready {
                run.state = State::Running;
            }
        }
        if let Some(reply) = reply {
            let _ = reply.send(Ok(()));
        }
    }

    /// The worker would not start its guest: it is of no use.
    pub fn start_failed(&mut self, reply: Option<Reply<()>>, error: &VmError) {
        if let Some(reply) = reply {
            self.keep_starter(reply);
        }
        if let Life::Running(run) = &mut self.life {
            run.complaint.get_or_insert_with(|| error.to_string());
            run.process.kill();
        }
    }

    /// Who waits for a start that fails is told when the worker has ended, and how.
    pub fn keep_starter(&mut self, reply: Reply<()>) {
        match &mut self.life {
            Life::Running(run) => run.starter = Some(reply),
            Life::Off | Life::Waiting(_) => {
                let _ = reply.send(Err(VmError::Refused("the worker is gone".into())));
            }
        }
    }

    /// Sends each `wanted` emulated adapter a socket of the switch's.
    pub fn connect_legacy(&mut self, wanted: impl Fn(&NicSpec) -> bool) {
        let Life::Running(run) = &self.life else { return };
        let legacy = run.spec.nics.iter().filter(|nic| nic.kind == NicKind::Legacy && wanted(nic));
        for nic in legacy.cloned().collect::<Vec<_>>() {
            // Before its cable is in, so that its guest never sees it up.
            if nic.link == LinkState::Down {
                let command = Command::SetLink { name: nic.name.clone(), up: false };
                self.request(command, &[], self.settings.patience.answer, Pending::Nothing);
            }
            match self.settings.network.connect_legacy(&self.spec.name, &nic) {
                Ok(socket) => {
                    let command = Command::ConnectLegacy { name: nic.name };
                    self.request(command, &[socket.as_fd()], self.settings.patience.answer, Pending::Nothing);
                }
                Err(error) => self.unplugged.push(format!("adapter {}: {error}", nic.name)),
            }
        }
    }

    /// Has the channels served, if they are not and it is time.
    pub fn serve_channels(&mut self, now: Instant) {
        let Life::Running(run) = &mut self.life else { return };
        let due = run.channels.connection.is_none() && run.channels.retry.is_none_or(|retry| retry <= now);
        if !due || !matches!(run.aim, Aim::Begin | Aim::Run) {
            run.channels.retry = run.channels.retry.filter(|retry| *retry > now);
            return;
        }
        run.channels.generation += 1;
        let (mailbox, generation) = (self.mailbox.clone(), run.channels.generation);
        let on_end = Box::new(move |reason| {
            mailbox.send(Order::ChannelsEnded(generation, reason));
        });
        let socket = self.directory.channels();
        match self.settings.network.serve_channels(&self.spec.name, self.nics.clone(), &socket, on_end) {
            Ok(connection) => run.channels.begun(connection, now),
            Err(reason) => run.channels.failed(reason),
        }
    }

    pub fn channels_ended(&mut self, generation: u64, reason: String) {
        if let Life::Running(run) = &mut self.life
            && run.channels.generation == generation
        {
            if run.aim == Aim::Run && run.may_log() {
                tracing::warn!(
                    "VM {}: its channels are not served: {}",
                    self.spec.name,
                    reason.escape_debug()
                );
            }
            run.channels.failed(reason);
        }
    }

    /// Takes back what an earlier daemon started.
    pub fn adopt(&mut self, record: Record) {
        self.restarts = record.restarts;
        let Some(process) = Process::adopt(record.pid, record.born) else {
            let word = self.directory.last_word().map(|word| format!("; its last word: {word}"));
            let death = format!("its worker ended while no yardd ran{}", word.unwrap_or_default());
            let sequel = self.sequel(&record.aim, false, record.off_wanted, &death);
            self.conclude(&record.aim, sequel);
            return;
        };
        // It runs whatever others have been promised meanwhile.
        let _ = self.settings.reserve(&record.spec);
        self.join_cgroup(&record.spec);
        for nic in &record.spec.nics {
            match self.settings.network.plug(&record.spec.name, nic) {
                Ok(()) | Err(FabricError::Exists { .. }) => {}
                Err(error) => self.unplugged.push(format!("adapter {}: {error}", nic.name)),
            }
        }
        self.nics.lock().clone_from(&record.spec.nics);
        let aim = record.aim.clone();
        let (link, unreached) = match Link::connect(&self.directory.control()) {
            Ok(link) => (Some(link), None),
            Err(error) => (None, Some(format!("its worker could not be reached, and was ended: {error}"))),
        };
        tracing::info!("VM {}: taken back, process {}", self.spec.name, record.pid);
        let mut run = Box::new(Run::new(record, process, link));
        run.state = State::Running;
        match (aim, unreached) {
            (_, Some(unreached)) => {
                run.process.kill();
                run.complaint = Some(unreached);
                self.life = Life::Running(run);
            }
            (Aim::Begin | Aim::Run, None) => {
                run.aim = Aim::Run;
                self.life = Life::Running(run);
                self.request(Command::Show, &[], self.settings.patience.answer, Pending::Adopt);
            }
            // The earlier daemon did not live to see its end.
            (aim, None) => {
                self.life = Life::Running(run);
                self.end(aim);
            }
        }
    }

    /// A worker that was taken back has told how it is.
    pub fn adopted(&mut self) {
        self.connect_legacy(|_| true);
        self.serve_channels(Instant::now());
        let Life::Running(run) = &mut self.life else { return };
        match run.state.clone() {
            // The earlier daemon was ended before it could say this.
            State::Ready => {
                run.aim = Aim::Begin;
                self.request(Command::Start, &[], self.settings.patience.start, Pending::Start(None));
            }
            State::Off => self.switched_off(),
            State::Crashed { reason } => self.crashed(&reason),
            State::Running | State::Paused => {}
        }
    }

    /// Leaves to a later daemon what it must know.
    pub fn write_record(&self) -> Result<(), VmError> {
        let Life::Running(run) = &self.life else { return Ok(()) };
        self.directory.write(&Record {
            spec: run.spec.clone(),
            pid: run.process.pid(),
            born: run.process.born(),
            started: run.started,
            restarts: self.restarts,
            aim: run.aim.clone(),
            off_wanted: run.off_wanted,
            user: run.user,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::spec;
    use super::*;

    /// Serves no adapter before it is told of it for the third time.
    #[derive(Debug, Default)]
    struct Slow(std::sync::Arc<std::sync::Mutex<Vec<bool>>>);

    impl Channels for Slow {
        fn set_link(&self, _: &str, up: bool) -> bool {
            let mut told = self.0.lock().unwrap();
            told.push(up);
            told.len() >= 3
        }
    }

    #[test]
    fn link_is_told_until_it_is_heard_and_one_that_is_down_once_a_second() {
        let mut nics = spec("web").nics;
        nics[0].link = LinkState::Down;
        let (mut service, channels) = (Service::default(), Slow::default());
        let (told, mut now) = (std::sync::Arc::clone(&channels.0), Instant::now());
        service.begun(Box::new(channels), now);
        let mut waits = Vec::new();
        for _ in 0..5 {
            service.set_links(&nics, now);
            waits.push(service.links_due().unwrap() - now);
            now = service.links_due().unwrap();
        }
        assert_eq!(waits, [SOON * 2, SOON * 4, LATE, LATE, LATE]);
        assert_eq!(*told.lock().unwrap(), [false; 5]);
        nics[0].link = LinkState::Up;
        service.links.wanted("eth0", now);
        service.set_links(&nics, now);
        assert_eq!(service.links_due(), None, "nothing more to tell");
        assert_eq!(told.lock().unwrap().last(), Some(&true));
        service.links.wanted("eth0", now);
        service.close();
        assert_eq!(service.links_due(), None, "nobody to tell");
    }

    #[test]
    fn service_that_lasted_is_begun_again_soon_however_often_it_failed_before() {
        let mut service = Service::default();
        let wait = |service: &mut Service| {
            service.failed("broken".into());
            service.retry_at().unwrap().duration_since(Instant::now())
        };
        for _ in 0..8 {
            wait(&mut service);
        }
        assert!(wait(&mut service) > Duration::from_secs(1));
        service.begun(Box::new(Slow::default()), Instant::now());
        assert!(wait(&mut service) > Duration::from_secs(1), "it did not last");
        service.begun(Box::new(Slow::default()), Instant::now() - STEADY);
        assert!(wait(&mut service) <= Duration::from_millis(100));
    }
}
