//! One thread for each VM: it alone knows how the VM's life stands, and changes it. Orders come through a queue; the
//! worker's process, its control connection and the queue's bell are waited for together.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use hypervisor::control::{Answer, Command, Event, Panic, State};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::Settings;
use super::cgroup::Cgroup;
use super::directory::{Directory, Record};
use super::error::VmError;
use super::link::{Heard, Link};
use super::network::Nics;
use super::report::{FaultReport, VmReport};
use super::run::Run;
use super::spec::{NicChange, NicSpec, VmChange, VmSpec, port_name};

/// How often logs are looked after while a VM runs.
const TEND: Duration = Duration::from_secs(5);

/// A worker that ends closes its connection too: only one that does not end is told so.
const CLOSED: &str = "its worker closed the control connection";
/// Faults that are remembered of a run: a guest may cause them without end.
const MAX_FAULTS: usize = 64;

/// Characters of a fault's device and reason that are remembered: they are the worker's words.
const MAX_WORDS: usize = 1024;

/// Where the outcome of an order goes; whoever gave it may have gone.
pub(super) type Reply<T> = mpsc::Sender<Result<T, VmError>>;

/// What a supervisor is told.
#[derive(Debug)]
pub(super) enum Order {
    Start(Reply<()>),
    Stop(Reply<()>),
    /// To be passed to the worker of a running VM.
    Command(Command, Reply<()>),
    Show(Reply<VmReport>),
    Set(VmChange, Reply<()>),
    AddNic(NicSpec, Reply<()>),
    RemoveNic(String, Reply<()>),
    ChangeNic(String, NicChange, Reply<()>),
    /// The VM is to be forgotten; it must be off.
    Delete(Reply<()>),
    /// This port of that switch was restarted, and has let go of its adapter.
    Reconnect {
        switch: String,
        port: String,
    },
    /// The service of the channels of this generation ended.
    ChannelsEnded(u64, String),
    /// The daemon ends, the VM goes on.
    Detach,
}

/// Rings when orders are there.
#[derive(Debug, Clone)]
pub(super) struct Mailbox {
    orders: mpsc::Sender<Order>,
    bell: Arc<OwnedFd>,
}

impl Mailbox {
    pub fn new() -> Result<(Self, mpsc::Receiver<Order>), VmError> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let bell = bell.map_err(|error| VmError::io("an eventfd", error))?;
        let (orders, queue) = mpsc::channel();
        Ok((Self { orders, bell: Arc::new(bell) }, queue))
    }

    /// False if the supervisor is no more.
    pub fn send(&self, order: Order) -> bool {
        // A bell whose counter is full rings anyway.
        self.orders.send(order).is_ok() && {
            let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
            true
        }
    }
}

/// What a request to the worker is for.
#[derive(Debug)]
pub(super) enum Pending {
    /// The guest's first instruction; an operator may wait for it.
    Start(Option<Reply<()>>),
    /// A command of the operator's.
    Command(Reply<()>),
    /// A shutdown, and whether one was wanted before.
    Shutdown(Reply<()>, bool),
    /// A look at the VM.
    Show(Reply<VmReport>),
    /// The first look at a VM that an earlier daemon started.
    Adopt,
    /// An adapter, plugged into the switch already.
    AddNic(NicSpec, Reply<()>),
    RemoveNic(String, Reply<()>),
    /// Dynamic memory's target.
    Memory(Reply<()>),
    /// Nobody waits.
    Nothing,
}

/// Where a VM's life stands.
#[derive(Debug)]
pub(super) enum Life {
    Off,
    /// It ended unasked, and is started again at this time.
    Waiting(Instant),
    Running(Box<Run>),
}

/// A VM's supervisor.
#[derive(Debug)]
pub(super) struct Supervisor {
    pub settings: Arc<Settings>,
    /// As defined: what the next start takes.
    pub spec: VmSpec,
    pub directory: Directory,
    pub nics: Nics,
    pub life: Life,
    pub cgroup: Result<Cgroup, String>,
    /// Faults of this run, or of the last.
    pub faults: Vec<FaultReport>,
    /// The panic of this run, or of the last.
    pub panic: Option<Panic>,
    /// What of the switch does not do for the VM.
    pub unplugged: Vec<String>,
    /// How the last run ended, if that needs saying.
    pub ended: Option<String>,
    /// Times the restart policy started it since an operator did.
    pub restarts: u32,
    /// Those of them in quick succession.
    pub stumbles: u32,
    pub mailbox: Mailbox,
    pub queue: mpsc::Receiver<Order>,
    pub tended: Instant,
}

impl Supervisor {
    pub fn new(
        settings: Arc<Settings>,
        spec: VmSpec,
        mailbox: Mailbox,
        queue: mpsc::Receiver<Order>,
    ) -> Self {
        Self {
            directory: Directory::new(&settings.root, &spec.name),
            nics: Nics::new(spec.nics.clone()),
            life: Life::Off,
            cgroup: Err(String::new()),
            faults: Vec::new(),
            panic: None,
            unplugged: Vec::new(),
            ended: None,
            restarts: 0,
            stumbles: 0,
            mailbox,
            queue,
            tended: Instant::now(),
            settings,
            spec,
        }
    }

    /// Supervises until told to end; takes back the VM of `record` first.
    pub fn run(mut self, record: Option<Record>) {
        if let Some(record) = record {
            self.adopt(record);
        }
        loop {
            while let Ok(order) = self.queue.try_recv() {
                if !self.obey(order) {
                    return;
                }
            }
            self.tend(Instant::now());
            self.wait();
        }
    }

    /// Does what is told; false if that is to end.
    fn obey(&mut self, order: Order) -> bool {
        match order {
            Order::Start(reply) => self.start(reply),
            Order::Stop(reply) => self.stop(reply),
            Order::Command(command, reply) => self.command(command, reply),
            Order::Show(reply) => self.show(reply),
            Order::Set(change, reply) => self.set(&change, reply),
            Order::AddNic(nic, reply) => self.add_nic(nic, reply),
            Order::RemoveNic(name, reply) => self.remove_nic(&name, reply),
            Order::ChangeNic(name, change, reply) => self.change_nic(&name, &change, reply),
            Order::Delete(reply) => return !self.delete(&reply),
            Order::Reconnect { switch, port } => {
                let vm = self.spec.name.clone();
                self.connect_legacy(|nic| nic.switch == switch && port_name(&vm, &nic.name) == port);
            }
            Order::ChannelsEnded(generation, reason) => self.channels_ended(generation, reason),
            Order::Detach => return false,
        }
        true
    }

    /// Does what is due.
    fn tend(&mut self, now: Instant) {
        match &mut self.life {
            Life::Waiting(until) if *until <= now => self.restart(),
            Life::Off | Life::Waiting(_) => {}
            Life::Running(run) => {
                if run.kill_at.is_some_and(|at| at <= now) {
                    run.kill_at = None;
                    if run.link.is_none() {
                        run.complaint.get_or_insert_with(|| CLOSED.to_owned());
                    }
                    run.process.kill();
                }
                let free = run.spec.cpu.pin.is_empty();
                let overdue = run.link.as_mut().map(|link| link.overdue(now)).unwrap_or_default();
                for waiter in overdue {
                    self.unanswered(waiter);
                }
                self.serve_channels(now);
                self.set_links(now);
                if now.duration_since(self.tended) >= TEND {
                    self.tended = now;
                    self.make_way(free, now);
                    if let Err(error) = self.directory.cut_logs() {
                        tracing::warn!("VM {}: its logs cannot be cut: {error}", self.spec.name);
                    }
                }
            }
        }
    }

    /// When [`Supervisor::tend`] has something to do.
    fn deadline(&self) -> Option<Instant> {
        match &self.life {
            Life::Off => None,
            Life::Waiting(until) => Some(*until),
            Life::Running(run) => {
                let link = run.link.as_ref().and_then(Link::deadline);
                let (retry, links) = (run.channels.retry_at(), run.channels.links_due());
                let times = [run.kill_at, retry, links, link, Some(self.tended + TEND)];
                times.into_iter().flatten().min()
            }
        }
    }

    /// Sleeps until something happens, and hears the worker.
    fn wait(&mut self) {
        let time = self.deadline().map(|at| at.saturating_duration_since(Instant::now()));
        // A whole millisecond more, so that the deadline is over when the sleep is.
        let time = time.and_then(|time| Timespec::try_from(time + Duration::from_millis(1)).ok());
        let bell = Arc::clone(&self.mailbox.bell);
        let (ended, heard) = {
            let mut fds = vec![PollFd::from_borrowed_fd(bell.as_fd(), PollFlags::IN)];
            fds.extend(self.worker_fds().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
            if poll(&mut fds, time.as_ref()).is_err() {
                return;
            }
            let ready = |index: usize| fds.get(index).is_some_and(|fd| !fd.revents().is_empty());
            (ready(1), ready(2))
        };
        let _ = rustix::io::read(&bell, &mut [0; 8]);
        if heard || ended {
            self.hear(ended);
        }
        if ended {
            self.bury();
        }
    }

    /// The worker's process, then its control connection.
    fn worker_fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let run = match &self.life {
            Life::Running(run) => Some(run),
            _ => None,
        };
        let link = run.and_then(|run| run.link.as_ref()).map(AsFd::as_fd);
        run.map(|run| run.process.as_fd()).into_iter().chain(link)
    }

    /// Reads what the worker says; all of it if it has `ended`.
    fn hear(&mut self, ended: bool) {
        loop {
            let Life::Running(run) = &mut self.life else { return };
            let Some(link) = &mut run.link else { return };
            let (heard, open) = match link.read() {
                Ok(read) => read,
                Err(error) => {
                    self.cut_off(Some(&format!("its worker speaks nonsense: {error}")));
                    return;
                }
            };
            let silent = heard.is_empty();
            for heard in heard {
                match heard {
                    Heard::Event(event) => self.event(event),
                    Heard::Answer(waiter, answer) => self.answered(waiter, answer),
                }
            }
            if !open {
                self.cut_off(None);
                return;
            }
            if silent || !ended {
                return;
            }
        }
    }

    /// Without a control connection there is no way to steer a worker: it is ended, for the reason given, unless it is
    /// about to end anyway.
    fn cut_off(&mut self, reason: Option<&str>) {
        let Life::Running(run) = &mut self.life else { return };
        let waiters = run.link.take().map(|mut link| link.abandon()).unwrap_or_default();
        if let Some(reason) = reason {
            run.complaint.get_or_insert_with(|| reason.to_owned());
        }
        run.kill_at.get_or_insert_with(|| Instant::now() + self.settings.patience.closing);
        for waiter in waiters {
            match waiter {
                // How it ends is the better reason.
                Pending::Start(Some(reply)) => self.keep_starter(reply),
                Pending::Start(None) | Pending::Adopt => {}
                waiter => self.refuse(waiter, VmError::Refused(reason.unwrap_or(CLOSED).to_owned())),
            }
        }
    }

    /// An answer that did not come in time.
    fn unanswered(&mut self, waiter: Pending) {
        match waiter {
            Pending::Show(reply) => {
                let mut report = self.report();
                report.warnings.push("its worker does not answer".into());
                let _ = reply.send(Ok(report));
            }
            waiter => self.refuse(waiter, VmError::Silent { name: self.spec.name.clone() }),
        }
    }

    /// A request that came to nothing.
    pub fn refuse(&mut self, waiter: Pending, error: VmError) {
        match waiter {
            Pending::Start(reply) => self.start_failed(reply, &error),
            Pending::Shutdown(reply, before) => {
                if let Life::Running(run) = &mut self.life {
                    run.off_wanted = before;
                }
                let _ = self.write_record();
                let _ = reply.send(Err(error));
            }
            Pending::Command(reply) | Pending::RemoveNic(_, reply) | Pending::Memory(reply) => {
                let _ = reply.send(Err(error));
            }
            Pending::AddNic(nic, reply) => {
                self.withdraw(&nic);
                let _ = reply.send(Err(error));
            }
            Pending::Show(reply) => {
                let _ = reply.send(Ok(self.report()));
            }
            Pending::Adopt => self.cut_off(Some("its worker does not tell how it is")),
            Pending::Nothing => {}
        }
    }

    fn answered(&mut self, waiter: Pending, answer: Result<Answer, String>) {
        let answer = match answer {
            Ok(answer) => answer,
            Err(reason) => return self.refuse(waiter, VmError::Refused(reason)),
        };
        if let (Answer::Status(status), Life::Running(run)) = (answer, &mut self.life) {
            run.state = status.state.clone();
            run.status = Some(status);
        }
        match waiter {
            Pending::Start(reply) => self.started(reply),
            Pending::Command(reply) | Pending::Shutdown(reply, _) | Pending::Memory(reply) => {
                let _ = reply.send(Ok(()));
            }
            Pending::Show(reply) => {
                let _ = reply.send(Ok(self.report()));
            }
            Pending::Adopt => self.adopted(),
            Pending::AddNic(nic, reply) => self.nic_added(nic, &reply),
            Pending::RemoveNic(name, reply) => self.nic_removed(&name, &reply),
            Pending::Nothing => {}
        }
    }

    fn event(&mut self, event: Event) {
        let name = &self.spec.name;
        let Life::Running(run) = &mut self.life else { return };
        match event {
            Event::State(state) => {
                if run.may_log() {
                    tracing::info!("VM {name}: {}", super::show::state_text(&state).escape_debug());
                }
                run.state = state.clone();
                match state {
                    State::Off => self.switched_off(),
                    State::Crashed { reason } => self.crashed(&reason),
                    State::Ready | State::Running | State::Paused => {}
                }
            }
            Event::Panic(panic) => {
                if run.may_log() {
                    tracing::warn!("VM {name}: its guest's kernel panicked: {:x?}", panic.parameters);
                }
                self.panic = Some(panic);
            }
            Event::Fault { device, reason } => {
                if run.may_log() {
                    tracing::warn!("VM {name}: {} stopped: {}", device.escape_debug(), reason.escape_debug());
                }
                let cut = |words: String| words.chars().take(MAX_WORDS).collect();
                let fault = FaultReport { device: cut(device), reason: cut(reason) };
                if self.faults.len() < MAX_FAULTS && !self.faults.contains(&fault) {
                    self.faults.push(fault);
                }
            }
        }
    }

    /// Passes a request on; without a worker, or one that takes nothing more, it is refused.
    pub fn request(&mut self, command: Command, fds: &[BorrowedFd<'_>], time: Duration, waiter: Pending) {
        let link = match &mut self.life {
            Life::Running(run) => run.link.as_mut(),
            Life::Off | Life::Waiting(_) => None,
        };
        let Some(link) = link else {
            return self.refuse(waiter, VmError::Refused("its worker is not connected".into()));
        };
        if let Err((waiter, error)) = link.request(command, fds, Instant::now() + time, waiter) {
            self.refuse(waiter, VmError::io("asking the worker", error));
        }
    }
}
