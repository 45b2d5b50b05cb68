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
    pub fn end(&mut self, aim: Aim) {
        let Life::Running(run) = &mut self.life else { return };
        run.aim = aim;
        if run.link.is_none() {
            run.process.kill();
        }
        run.kill_at.get_or_insert_with(|| Instant::now() + self.settings.patience.closing);
        // On record before the worker is told: a daemon that takes the end for a death starts the VM again.
        if let Err(error) = self.write_record() {
            tracing::warn!("VM {}: a later yardd will not know that it was to end: {error}", self.spec.name);
        }
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
        if run.aim == Aim::Run && run.state == State::Off && orderly {
            run.aim = Aim::Off;
        }
        if run.since.elapsed() >= self.settings.patience.steady {
            self.stumbles = 0;
        }
        let sequel = self.sequel(&run.aim, run.by_operator, run.off_wanted, &death);
        self.conclude(&run.aim, sequel);
        self.tell_the_end(*run, &death);
    }

    /// What comes of a run that ended by `death` on its way to `aim`: the reason, if that needs saying, and whether the VM is
    /// started again.
    pub fn sequel(
        &self,
        aim: &Aim,
        by_operator: bool,
        off_wanted: bool,
        death: &str,
    ) -> (Option<String>, bool) {
        let policy = self.spec.restart;
        match aim {
            Aim::Stop => (None, false),
            // It was asked to.
            Aim::Off if off_wanted => (None, false),
            Aim::Off => (Some("its guest switched itself off".into()), policy == RestartPolicy::Always),
            Aim::Again(reason) => (Some(reason.clone()), true),
            Aim::Run => (Some(death.to_owned()), policy != RestartPolicy::Never),
            Aim::Begin => (Some(death.to_owned()), !by_operator && policy != RestartPolicy::Never),
        }
    }

    /// The worker is no more: removes what it left, and has the VM started again if that is the `sequel`.
    pub fn conclude(&mut self, aim: &Aim, (reason, again): (Option<String>, bool)) {
        let text = reason.as_deref().unwrap_or("stopped").escape_debug().to_string();
        if matches!(aim, Aim::Run | Aim::Begin | Aim::Again(_)) {
            tracing::warn!("VM {}: {text}", self.spec.name);
        } else {
            tracing::info!("VM {}: {text}", self.spec.name);
        }
        self.ended = reason;
        self.leave();
        if again {
            self.life = Life::Waiting(Instant::now() + self.backoff());
        }
    }

    /// What a worker that ended leaves is removed, but its logs.
    pub fn leave(&mut self) {
        self.directory.clear();
        self.settings.release(&self.spec.name);
        self.cgroup = Err(String::new());
        self.settings.cgroups.remove(&self.spec.name);
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
