//! Requests that the guest takes its time for: each waits on a thread of its own.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::daemon::Reply;
use crate::confine::{self, Confine};
use crate::control::{Answer, Command};
use crate::services::pump::Pump;
use crate::services::shutdown::ShutdownKind;
use crate::services::{Command as Request, CommandError};

/// Requests under way at once.
const MOST: usize = 16;

/// The daemon waits for an answer a little longer than this, so that it hears what came of its request.
const PATIENCE: Duration = Duration::from_secs(14);

/// File systems are thawed after this time if nobody does it earlier: a backup takes its snapshot within it.
const HOLD: Duration = Duration::from_secs(60);

/// Counts requests under way.
#[derive(Debug, Clone, Default)]
pub struct Waiting(Arc<AtomicUsize>);

impl Waiting {
    /// Has `command` carried out by a service, and responds when it is. `power_button` is pressed for a guest that is to switch
    /// itself off and does not run the service.
    pub fn request(
        &self,
        pump: &Arc<Pump>,
        command: &Command,
        reply: Reply,
        power_button: impl FnOnce() + Send + 'static,
    ) {
        let (pump, command) = (Arc::clone(pump), command.clone());
        self.wait(reply, move || match carry_out(&pump, &command) {
            Err(CommandError::Absent | CommandError::NotReady | CommandError::Closed)
                if matches!(command, Command::Shutdown { reboot: false }) =>
            {
                power_button();
                Ok(())
            }
            result => result.map_err(|error| error.to_string()),
        });
    }

    /// Responds with what `outcome` comes to, whenever it does.
    pub fn wait(&self, reply: Reply, outcome: impl FnOnce() -> Result<(), String> + Send + 'static) {
        if self.0.fetch_add(1, Ordering::Relaxed) >= MOST {
            self.0.fetch_sub(1, Ordering::Relaxed);
            reply.give(Err("the guest has not answered earlier requests".into()));
            return;
        }
        let waiting = self.clone();
        let wait = move || {
            let result = outcome();
            waiting.0.fetch_sub(1, Ordering::Relaxed);
            reply.give(result.map(|()| Answer::Done));
        };
        if let Err(error) = confine::spawn("request", Confine::STRICT.devices, wait) {
            self.0.fetch_sub(1, Ordering::Relaxed);
            tracing::error!(%error, "a request cannot be carried out");
        }
    }
}

fn carry_out(pump: &Pump, command: &Command) -> Result<(), CommandError> {
    match command.clone() {
        Command::Shutdown { reboot } => {
            let kind = if reboot { ShutdownKind::Reboot } else { ShutdownKind::PowerOff };
            pump.call(PATIENCE, |answer| Request::Shutdown { kind, answer })
        }
        Command::SetMemory { bytes } => pump.call(PATIENCE, |answer| Request::SetMemory { bytes, answer }),
        Command::SyncTime => pump.call(PATIENCE, |answer| Request::TimeSync { answer }),
        Command::SetValue { key, value: Some(value) } => {
            pump.call(PATIENCE, |answer| Request::KvpSet { key, value, answer })
        }
        Command::SetValue { key, value: None } => {
            pump.call(PATIENCE, |answer| Request::KvpDelete { key, answer })
        }
        Command::Freeze => pump.call(PATIENCE, |answer| Request::Freeze { hold: HOLD, answer }),
        Command::Thaw => pump.call(PATIENCE, |answer| Request::Thaw { answer }),
        _ => Err(CommandError::Absent),
    }
}
