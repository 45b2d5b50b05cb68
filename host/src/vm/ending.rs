//! How a run of a VM ends: by whom, for what reason, and what comes then.

use std::time::{Duration, Instant};

use hypervisor::control::{Command, State};

use super::error::VmError;
use super::process::{Ending, Process};
use super::run::{Aim, Run};
use super::show::state_text;
use super::spec::RestartPolicy;
use super::supervisor::{Life, Pending, Reply, Supervisor};

impl Supervisor {
    /// An operator's end.
    pub fn stop(&mut self, reply: Reply<()>) {
        match &mut self.life {
            Life::Off => {
                let _ = reply.send(Err(self.wrong_state("running")));
            }
            Life::Waiting(_) => {
                self.life = Life::Off;
                let _ = reply.send(Ok(()));
            }
            Life::Running(run) => {
                run.mourners.push(reply);
                self.end(Aim::Stop);
            }
        }
    }

    /// Has the worker end, by force if it does not do so soon.
    fn end(&mut self, aim: Aim) {
        let Life::Running(run) = &mut self.life else { return };
        run.aim = aim;
        if run.link.is_none() {
            run.process.kill();
        }
        run.kill_at.get_or_insert_with(|| Instant::now() + self.settings.patience.closing);
        self.request(Command::Stop, &[], self.settings.patience.closing, Pending::Nothing);
    }

    /// The guest switched itself off.
    pub fn switched_off(&mut self) {
        if let Life::Running(run) = &self.life
            && matches!(run.aim, Aim::Run | Aim::Begin)
        {
            self.end(Aim::Off);
        }
    }

    /// The guest crashed: its memory is kept, unless it is to be started again.
    pub fn crashed(&mut self, reason: &str) {
        if let Life::Running(run) = &self.life
            && run.aim == Aim::Run
            && self.spec.restart != RestartPolicy::Never
        {
            self.end(Aim::Again(format!("its guest crashed: {reason}")));
        }
    }

    /// The worker has ended: why, and what now?
    pub fn bury(&mut self) {
        let Life::Running(mut run) = std::mem::replace(&mut self.life, Life::Off) else { return };
        // The switch lets go of the guest's memory first.
        run.channels.close();
        let complaint = run.complaint.take();
        let orderly = run.process.epitaph() == Ending::Orderly;
        let death = self.lament(&mut run.process, complaint.as_deref());
        let death = format!("{death}, while it was {}", state_text(&run.state));
        let (reason, again) = match &run.aim {
            Aim::Stop => (None, false),
            Aim::Run if run.state == State::Off && orderly => self.after_off(&run),
            Aim::Off => self.after_off(&run),
            Aim::Again(reason) => (Some(reason.clone()), true),
            Aim::Run => (Some(death.clone()), self.spec.restart != RestartPolicy::Never),
            Aim::Begin => {
                (Some(death.clone()), !run.by_operator && self.spec.restart != RestartPolicy::Never)
            }
        };
        let text = reason.as_deref().unwrap_or("stopped").escape_debug().to_string();
        if matches!(run.aim, Aim::Run | Aim::Begin | Aim::Again(_)) {
            tracing::warn!("VM {}: {text}", self.spec.name);
        } else {
            tracing::info!("VM {}: {text}", self.spec.name);
        }
        self.ended = reason;
        self.leave();
        if run.since.elapsed() >= self.settings.patience.steady {
            self.stumbles = 0;
        }
        if again {
            self.life = Life::Waiting(Instant::now() + self.backoff());
        }
        self.tell_the_end(*run, &death);
    }

    /// The guest switched itself off: nothing needs saying if it was asked to.
    fn after_off(&self, run: &Run) -> (Option<String>, bool) {
        if run.off_wanted {
            return (None, false);
        }
        (Some("its guest switched itself off".into()), self.spec.restart == RestartPolicy::Always)
    }

    /// What a worker that ended leaves is removed, but its logs.
    fn leave(&mut self) {
        self.directory.clear();
        self.settings.release(&self.spec.name);
        if let Ok(cgroup) = std::mem::replace(&mut self.cgroup, Err(String::new())) {
            cgroup.remove();
        }
        self.unplugged.clear();
        self.nics.lock().clone_from(&self.spec.nics);
    }

    fn tell_the_end(&mut self, mut run: Run, death: &str) {
        if let Some(reply) = run.starter.take() {
            let _ = reply.send(Err(VmError::Refused(death.to_owned())));
        }
        let waiters = run.link.take().map(|mut link| link.abandon()).unwrap_or_default();
        for waiter in waiters {
            let error = VmError::Refused(death.to_owned());
            match waiter {
                Pending::Start(Some(reply)) => {
                    let _ = reply.send(Err(error));
                }
                Pending::Start(None) | Pending::Adopt => {}
                waiter => self.refuse(waiter, error),
            }
        }
        for reply in run.mourners {
            let _ = reply.send(Ok(()));
        }
    }

    /// How the worker ended, in words; waits until it has.
    pub fn lament(&self, process: &mut Process, complaint: Option<&str>) -> String {
        let ended = match (process.epitaph(), complaint) {
            (_, Some(complaint)) => complaint.to_owned(),
            (Ending::Orderly, None) => "its worker ended of its own accord".into(),
            (Ending::Died(how), None) => format!("its worker {how}"),
            (Ending::Unknown, None) => "its worker ended; an earlier yardd would have known how".into(),
        };
        match self.directory.last_word() {
            Some(word) => format!("{ended}; its last word: {word}"),
            None => ended,
        }
    }

    /// How long to wait before the next attempt: longer each time, until a run has lasted.
    pub fn backoff(&mut self) -> Duration {
        let patience = &self.settings.patience;
        let delay = patience.restart.saturating_mul(2u32.saturating_pow(self.stumbles.min(6)));
        self.stumbles = self.stumbles.saturating_add(1);
        delay.min(patience.slowest)
    }
}
