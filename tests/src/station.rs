//! A station: a place on the network where commands run, be it a namespace on this host or a guest.

use std::time::Duration;

use anyhow::{Result, bail};

/// What a command left behind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// The exit status; 128 + N after signal N.
    pub status: i32,
    /// Standard output and standard error together, in the order written.
    pub stdout: String,
}

/// A place on the network where commands run.
pub trait Station: Sync {
    /// Its name, for messages.
    fn name(&self) -> &str;

    /// Runs one line of shell to its end; it is killed after `limit` (status 137).
    fn run(&self, line: &str, limit: Duration) -> Result<Output>;

    /// Starts one line of shell, which ends with the returned guard.
    fn spawn(&self, line: &str) -> Result<Box<dyn Job>>;

    /// As [`Station::run`]; the output, or an error if the status is not 0.
    fn check(&self, line: &str, limit: Duration) -> Result<String> {
        let output = self.run(line, limit)?;
        if output.status != 0 {
            bail!("{}: {line}: status {}: {}", self.name(), output.status, output.stdout.trim());
        }
        Ok(output.stdout)
    }
}

/// A command in the background; killed when dropped.
pub trait Job: Send {
    /// Waits for its end.
    fn wait(&mut self, limit: Duration) -> Result<Output>;

    /// What it has written so far.
    fn output(&mut self) -> Result<String>;

    /// Kills it.
    fn kill(&mut self) -> Result<()>;
}
