//! Where the VM's life stands, and what moves it on: requests of the daemon and what becomes of the guest.

use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use super::Input;
use super::daemon::{Asked, Daemon};
use super::service::Waiting;
use crate::control::{Answer, Command, Event, NicKind, NicStatus, Panic, Setup, State, Status};
use crate::devices::power::Wish;
use crate::guest::Guest;
use crate::vcpu::{Outcome, describe};

/// How long a guest may take to release an adapter that is taken out: less than the daemon waits for the answer.
const RELEASE: Duration = Duration::from_secs(12);

/// Keeps one VM.
#[derive(Debug)]
pub struct Keeper {
    guest: Guest,
    /// As it was handed over; adapters come and go.
    setup: Setup,
    daemon: Daemon,
    state: State,
    /// When the guest's first instruction was, if it was.
    since: Option<Instant>,
    panic: Option<Panic>,
    /// Emulated adapters that are stopped: name and reason.
    faults: Vec<(String, String)>,
    waiting: Waiting,
}

impl Keeper {
    /// For a guest that is ready to run.
    pub fn new(guest: Guest, setup: Setup, daemon: Daemon) -> Self {
        let (faults, waiting) = Default::default();
        Self { guest, setup, daemon, state: State::Ready, since: None, panic: None, faults, waiting }
    }

    /// Until the daemon ends the VM.
    pub fn run(mut self, inputs: &Receiver<Input>) {
        while let Ok(input) = inputs.recv() {
            match input {
                Input::Asked(Asked { command: Command::Stop, reply, .. }) => {
                    self.guest.stop();
                    reply.give(Ok(Answer::Done));
                    return;
                }
                Input::Asked(asked) => self.obey(asked),
                Input::Outcome(machine, outcome) if machine == self.guest.partition.generation() => {
                    self.became(outcome);
                }
                Input::Outcome(..) => {}
                Input::Fault { device, reason } => self.fault(device, reason),
            }
        }
    }

    fn enter(&mut self, state: State) {
        self.state = state.clone();
        self.daemon.tell(Event::State(state));
    }

    fn obey(&mut self, asked: Asked) {
        let Asked { command, fd, reply } = asked;
        let result = match command {
            Command::Start => self.start(),
            Command::Pause => self.pause(),
            Command::Resume => self.resume(),
            Command::Reset if self.state == State::Ready => Err("the guest has not been started".into()),
            Command::Reset => self.reset(true),
            Command::Stop => Ok(()),
            Command::Show => {
                reply.give(Ok(Answer::Status(Box::new(self.status()))));
                return;
            }
            Command::AddNic(nic) => self.guest.vmbus.add_nic(nic.clone()).map(|()| self.setup.nics.push(nic)),
            Command::RemoveNic { name } => match self.remove_nic(&name) {
                // The daemon takes the port away after this, and a guest may wait for the end of all that it has sent.
                Ok(gone) => {
                    let released = move || {
                        let _ = gone.recv_timeout(RELEASE);
                        Ok(())
                    };
                    return self.waiting.wait(reply, released);
                }
                Err(error) => Err(error),
            },
            Command::ConnectLegacy { name } => {
                match fd.map(|fd| self.guest.partition.connect_legacy(&name, fd)) {
                    Some(true) => Ok(()),
                    Some(false) => Err(format!("there is no legacy adapter {name}")),
                    None => Err("no socket came".into()),
                }
            }
            Command::SetLink { name, up } if !self.guest.partition.set_legacy_link(&name, up) => {
                Err(format!("there is no legacy adapter {name}"))
            }
            Command::SetLink { .. } => Ok(()),
            service => {
                if !matches!(self.state, State::Running) {
                    reply.give(Err(format!("the guest does not run: {}", word(&self.state))));
                    return;
                }
                let press = self.guest.partition.power_button();
                self.waiting.request(&self.guest.services, &service, reply, press);
                return;
            }
        };
        reply.give(result.map(|()| Answer::Done));
    }

    fn start(&mut self) -> Result<(), String> {
        match self.state {
            State::Ready => {
                self.guest.run();
                self.since = Some(Instant::now());
                self.enter(State::Running);
                Ok(())
            }
            _ => Err(format!("the guest cannot be started: {}", word(&self.state))),
        }
    }

    fn pause(&mut self) -> Result<(), String> {
        match self.state {
            State::Running => {
                self.guest.pause();
                self.enter(State::Paused);
                Ok(())
            }
            _ => Err(format!("only a running guest can be paused: {}", word(&self.state))),
        }
    }

    fn resume(&mut self) -> Result<(), String> {
        match self.state {
            State::Paused => {
                self.guest.run();
                self.enter(State::Running);
                Ok(())
            }
            _ => Err(format!("the guest is not paused: {}", word(&self.state))),
        }
    }

    /// Starts the guest anew. It stays paused if it is not to run.
    fn reset(&mut self, run: bool) -> Result<(), String> {
        match self.guest.reset() {
            Ok(()) => {
                (self.panic, self.since) = (None, Some(Instant::now()));
                self.faults.clear();
                if run {
                    self.guest.run();
                }
                self.enter(if run { State::Running } else { State::Paused });
                Ok(())
            }
            Err(error) => {
                let reason = format!("it cannot be started anew: {:#}", anyhow::Error::from(error));
                self.guest.stop();
                self.enter(State::Crashed { reason: reason.clone() });
                Err(reason)
            }
        }
    }

    /// Takes an adapter from the guest. What comes back hangs up once the guest has released it.
    fn remove_nic(&mut self, name: &str) -> Result<Receiver<()>, String> {
        if self.setup.nics.iter().any(|nic| nic.name == name && nic.kind == NicKind::Legacy) {
            return Err(format!(
                "{name} is a legacy adapter, which cannot be unplugged from a running guest"
            ));
        }
        let gone = self.guest.vmbus.remove_nic(name)?;
        self.setup.nics.retain(|nic| nic.name != name);
        Ok(gone)
    }

    /// What the guest brought about.
    fn became(&mut self, outcome: Outcome) {
        match turn(&self.state, outcome) {
            None => {}
            Some(Turn::Off) => {
                self.guest.stop();
                self.enter(State::Off);
            }
            // What goes wrong is in the state.
            Some(Turn::Anew { run }) => drop(self.reset(run)),
            Some(Turn::Crash(reason, panic)) => {
                self.guest.pause();
                if let Some(panic) = panic {
                    self.daemon.tell(Event::Panic(panic.clone()));
                    self.panic = Some(panic);
                }
                self.enter(State::Crashed { reason });
            }
        }
    }

    fn fault(&mut self, device: String, reason: String) {
        let legacy =
            |name: &str| self.setup.nics.iter().any(|nic| nic.kind == NicKind::Legacy && nic.name == name);
        if legacy(&device) {
            self.faults.retain(|(name, _)| *name != device);
            self.faults.push((device.clone(), reason.clone()));
        }
        self.daemon.tell(Event::Fault { device, reason });
    }

    fn status(&self) -> Status {
        let (vmbus, services) = (self.guest.vmbus.report(), self.guest.services.status());
        let (root, nics, faults) = match vmbus {
            Some(report) => (Some(report.root), report.nics, report.faults),
            None => (None, Vec::new(), Vec::new()),
        };
        let legacy = self.guest.partition.legacy().into_iter().map(|nic| NicStatus {
            name: nic.name,
            kind: NicKind::Legacy,
            channels: u16::from(nic.running),
            connected: nic.connected,
        });
        let assigned = services.guest.memory.map(|memory| memory.assigned);
        Status {
            name: self.setup.name.clone(),
            state: self.state.clone(),
            setup: self.setup.clone(),
            uptime: self.since.map_or(0.0, |since| since.elapsed().as_secs_f64()),
            memory: assigned.unwrap_or(self.setup.memory.startup),
            vmbus: root.and_then(|root| root.version),
            nics: nics.into_iter().chain(legacy).collect(),
            guest: services.guest,
            faults: [faults, services.faults, self.faults.clone()].concat(),
            panic: self.panic.clone(),
            exits: self.guest.partition.exits(),
        }
    }
}

/// What an outcome makes of the VM.
#[derive(Debug, PartialEq, Eq)]
enum Turn {
    /// It is off.
    Off,
    /// It starts anew, and runs or is paused.
    Anew { run: bool },
    /// It stands still for good, for this reason.
    Crash(String, Option<Panic>),
}

/// Outcomes come late: by then the VM may be paused, which only the operator undoes, or at its end. One that has not been
/// started can fail already.
fn turn(state: &State, outcome: Outcome) -> Option<Turn> {
    match (state, outcome) {
        (State::Off | State::Crashed { .. }, _) => None,
        (_, Outcome::Crashed(reason)) => Some(Turn::Crash(reason, None)),
        (State::Ready, _) => None,
        (_, Outcome::Panic(panic)) => Some(Turn::Crash(describe(&panic), Some(panic))),
        (_, Outcome::Wish(Wish::Off)) => Some(Turn::Off),
        (state, Outcome::Wish(Wish::Reset)) => Some(Turn::Anew { run: *state == State::Running }),
    }
}

fn word(state: &State) -> String {
    match state {
        State::Ready => "it has not been started".into(),
        State::Running => "it runs".into(),
        State::Paused => "it is paused".into(),
        State::Off => "it is switched off".into(),
        State::Crashed { reason } => format!("it crashed ({reason})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_that_resets_itself_while_it_is_paused_stays_paused() {
        let reset = || Outcome::Wish(Wish::Reset);
        assert_eq!(turn(&State::Running, reset()), Some(Turn::Anew { run: true }));
        assert_eq!(turn(&State::Paused, reset()), Some(Turn::Anew { run: false }));
        assert_eq!(turn(&State::Ready, reset()), None);
        assert_eq!(turn(&State::Off, reset()), None);
    }

    #[test]
    fn processor_that_fails_before_the_start_is_a_crash() {
        let crashed = || Outcome::Crashed("no such processor".into());
        let crash = Turn::Crash("no such processor".into(), None);
        assert_eq!(turn(&State::Ready, crashed()), Some(crash));
        assert_eq!(turn(&State::Off, crashed()), None);
    }
}
