//! Bytes through a TCP connection between two stations, compared by their digest (busybox nc).

use std::time::Duration;

use anyhow::{Result, bail, ensure};

use crate::lab::serial;
use crate::station::{Job, Station};

const LIMIT: Duration = Duration::from_secs(60);
const PORT: u32 = 5555;

/// Sends `count` random bytes from `from` to `to` at `address`; an error unless the same arrive.
pub fn transfer(from: &dyn Station, to: &dyn Station, address: &str, count: u32) -> Result<()> {
    Transfer::start(from, to, address, count)?.finish()
}

/// A transfer under way.
pub struct Transfer {
    sender: Box<dyn Job>,
    receiver: Box<dyn Job>,
}

impl std::fmt::Debug for Transfer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Transfer").finish_non_exhaustive()
    }
}

impl Transfer {
    /// Starts to send.
    pub fn start(from: &dyn Station, to: &dyn Station, address: &str, count: u32) -> Result<Self> {
        // Namespaces share the file system.
        let base = format!("/tmp/yard-{}-{}", std::process::id(), serial());
        // A pipe that never ends as standard input: nc ends the connection with its input.
        let receiver = to.spawn(&format!(
            "mkfifo {base}.in; busybox nc -l -p {PORT} <> {base}.in | sha256sum; rm {base}.in"
        ))?;
        let sender = from.spawn(&format!(
            "head -c {count} /dev/urandom > {base}.data; n=0; \
             until busybox nc -w 50 {address} {PORT} < {base}.data || [ $n = 50 ]; do sleep 0.2; n=$((n+1)); done; \
             sha256sum < {base}.data; rm {base}.data"
        ))?;
        Ok(Self { sender, receiver })
    }

    /// Waits for the end, and compares.
    pub fn finish(mut self) -> Result<()> {
        let sent = self.sender.wait(LIMIT)?.stdout;
        let Ok(received) = self.receiver.wait(LIMIT) else {
            bail!("sent {}, nothing came to an end: {}", sent.trim(), self.receiver.output()?);
        };
        let digest = |text: &str| text.split_whitespace().find(|word| word.len() == 64).map(str::to_owned);
        ensure!(
            digest(&sent).is_some() && digest(&sent) == digest(&received.stdout),
            "sent {:?}, received {:?}",
            sent.trim(),
            received.stdout.trim()
        );
        Ok(())
    }
}
