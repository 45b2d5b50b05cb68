//! What a supervisor answers: how its VM is, and orders that change a VM while it lives.

use hypervisor::control::{Command, State};

use super::error::VmError;
use super::report::{VmReport, VmState};
use super::run::Aim;
use super::spec::{VmChange, VmSpec};
use super::supervisor::{Life, Pending, Reply, Supervisor};

/// In words.
pub(super) fn state_text(state: &State) -> String {
    match state {
        State::Ready => "not started".into(),
        State::Running => "running".into(),
        State::Paused => "paused".into(),
        State::Off => "switched off".into(),
        State::Crashed { reason } => format!("crashed: {reason}"),
    }
}

impl Supervisor {
    pub fn show(&mut self, reply: Reply<VmReport>) {
        match &self.life {
            Life::Running(run) if run.link.is_some() => {
                self.request(Command::Show, &[], self.settings.patience.look, Pending::Show(reply));
            }
            _ => {
                let _ = reply.send(Ok(self.report()));
            }
        }
    }

    /// What is known at this moment.
    pub fn report(&self) -> VmReport {
        let spec = match &self.life {
            Life::Running(run) => &run.spec,
            Life::Off | Life::Waiting(_) => &self.spec,
        };
        let mut report = VmReport::new(spec, &self.directory);
        report.state = self.state();
        report.restarts = self.restarts;
        report.reason.clone_from(&self.ended);
        report.faults.clone_from(&self.faults);
        report.panic.clone_from(&self.panic);
        let Life::Running(run) = &self.life else {
            report.warnings.extend(self.directory.read().err().map(|error| error.to_string()));
            return report;
        };
        report.changed = run.spec != self.spec;
        report.pid = Some(run.process.pid());
        report.user = run.user;
        report.uptime = Some(run.since.elapsed().as_secs_f64());
        if let Some(status) = &run.status {
            report.tell(status);
        }
        if report.panic.is_none() {
            report.panic.clone_from(&self.panic);
        }
        report.reason = match &run.state {
            State::Crashed { reason } => Some(reason.clone()),
            _ => run.complaint.clone(),
        };
        match &self.cgroup {
            Ok(group) => {
                report.cpu.cgroup = Some(group.path().to_owned());
                let kept = Some(group.kept_to()).filter(|kept| kept.len() < self.settings.cpus.len());
                report.cpu.allowed = kept.unwrap_or_default().to_vec();
            }
            Err(reason) => report.warnings.push(format!(
                "processor weight, limit and reserve are not in force: no control group: {reason}"
            )),
        }
        report.warnings.extend(self.unplugged.iter().cloned());
        if let Some(reason) = &run.channels.reason {
            report.warnings.push(format!("the switch does not serve its adapters: {reason}"));
        }
        report
    }

    fn state(&self) -> VmState {
        match &self.life {
            Life::Off => VmState::Off,
            Life::Waiting(_) => VmState::Waiting,
            Life::Running(run) => match (&run.aim, &run.state) {
                (Aim::Stop | Aim::Off | Aim::Again(_), _) | (_, State::Off) => VmState::Stopping,
                (_, State::Ready) => VmState::Starting,
                (_, State::Running) => VmState::Running,
                (_, State::Paused) => VmState::Paused,
                (_, State::Crashed { .. }) => VmState::Crashed,
            },
        }
    }

    /// The VM is not in the state that an order needs.
    pub fn wrong_state(&self, expected: &'static str) -> VmError {
        let state = self.state().name().to_owned();
        VmError::State { name: self.spec.name.clone(), state, expected }
    }

    /// Passes an operator's command to the worker.
    pub fn command(&mut self, command: Command, reply: Reply<()>) {
        let Life::Running(run) = &mut self.life else {
            let _ = reply.send(Err(self.wrong_state("running")));
            return;
        };
        let pending = match command {
            // A guest may be quicker than the answer.
            Command::Shutdown { reboot } => {
                let before = std::mem::replace(&mut run.off_wanted, !reboot);
                if let Err(error) = self.write_record() {
                    let _ = reply.send(Err(error));
                    return;
                }
                Pending::Shutdown(reply, before)
            }
            _ => Pending::Command(reply),
        };
        self.request(command, &[], self.settings.patience.answer, pending);
    }

    /// Changes memory and share of the processors, now and for later starts.
    pub fn set(&mut self, change: &VmChange, reply: Reply<()>) {
        if let Err(error) = self.change_memory(change.memory) {
            let _ = reply.send(Err(error));
            return;
        }
        let apply = |spec: &mut VmSpec| {
            let cpu = &mut spec.cpu;
            cpu.weight = change.weight.unwrap_or(cpu.weight);
            cpu.limit = change.limit.unwrap_or(cpu.limit);
            cpu.reserve = change.reserve.unwrap_or(cpu.reserve);
        };
        let mut wanted = self.spec.clone();
        apply(&mut wanted);
        let changed = match &mut self.life {
            Life::Running(run) => {
                let mut running = run.spec.clone();
                apply(&mut running);
                let kept = self.settings.reserve(&running).and_then(|()| match &self.cgroup {
                    Ok(group) => group.apply(&running, self.settings.cpus.len()).map_err(VmError::Refused),
                    // `show` says that there is none.
                    Err(_) => Ok(()),
                });
                kept.map(|()| run.spec = running)
            }
            Life::Off | Life::Waiting(_) => Ok(()),
        };
        if changed.is_ok() {
            self.spec = wanted;
        }
        let outcome = changed.and_then(|()| self.write_record());
        match (outcome, change.memory, &self.life) {
            (Ok(()), Some(bytes), Life::Running(_)) => {
                let command = Command::SetMemory { bytes };
                self.request(command, &[], self.settings.patience.answer, Pending::Memory(reply));
            }
            (outcome, _, _) => {
                let _ = reply.send(outcome);
            }
        }
    }

    /// A running VM's memory moves within its bounds; that of one that is off may be anything, if it is not dynamic.
    fn change_memory(&mut self, bytes: Option<u64>) -> Result<(), VmError> {
        let Some(bytes) = bytes else { return Ok(()) };
        let running = match &self.life {
            Life::Running(run) => Some(&run.spec.memory),
            Life::Off | Life::Waiting(_) => None,
        };
        let memory = running.unwrap_or(&self.spec.memory);
        let dynamic = memory.minimum < memory.maximum;
        if dynamic && !(memory.minimum..=memory.maximum).contains(&bytes) {
            let (low, high) = (memory.minimum >> 20, memory.maximum >> 20);
            let problem = format!("{} MiB is out of range, expected {low} to {high} MiB", bytes >> 20);
            return Err(VmError::Invalid { key: "memory", problem });
        }
        if !dynamic && running.is_some() {
            let problem =
                "is not dynamic, expected a VM that is off, or one with memory.minimum and memory.maximum";
            return Err(VmError::Invalid { key: "memory", problem: problem.into() });
        }
        if running.is_none() {
            let memory = &mut self.spec.memory;
            memory.startup = bytes;
            if !dynamic {
                (memory.minimum, memory.maximum) = (bytes, bytes);
            }
        }
        Ok(())
    }

    /// Forgets the VM; true if that was possible.
    pub fn delete(&mut self, reply: &Reply<()>) -> bool {
        if let Life::Running(_) = self.life {
            let _ = reply.send(Err(self.wrong_state("off")));
            return false;
        }
        let deleted = self
            .vacant()
            .and_then(|()| self.directory.delete().map_err(VmError::file(self.directory.path())));
        let gone = deleted.is_ok();
        if gone {
            self.settings.cgroups.remove(&self.spec.name);
            for nic in &self.spec.nics {
                // A port that somebody removed already is as good.
                let _ = self.settings.network.unplug(&self.spec.name, nic);
            }
        }
        let _ = reply.send(deleted);
        gone
    }
}
