//! A TCP connection that carries random bytes until it is told to stop; what arrived is then compared with what was sent,
//! by digest.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::lab::{serial, wait_for};
use crate::station::{Job, Station};

/// For what takes next to no time.
const SHORT: Duration = Duration::from_secs(30);
/// Until all that was sent has arrived.
const END: Duration = Duration::from_secs(120);
const FIRST_PORT: u32 = 6000;
/// So many bytes are more than both ends (2 x 128 KiB) and the pipes between the programs (3 x 64 KiB) hold together.
pub const BEYOND_BUFFERS: u64 = 1 << 20;

/// A connection under load.
pub struct Stream<'a> {
    from: &'a dyn Station,
    base: String,
    sender: Box<dyn Job>,
    receiver: Box<dyn Job>,
}

impl std::fmt::Debug for Stream<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stream").field("base", &self.base).finish_non_exhaustive()
    }
}

impl<'a> Stream<'a> {
    /// Connects `from` to `to` at `address`, and begins to send. Both ends' buffers are kept small from then on.
    pub fn start(from: &'a dyn Station, to: &dyn Station, address: &str) -> Result<Self> {
        let number = serial();
        let (base, port) = (format!("/tmp/stream{number}"), FIRST_PORT + number);
        for station in [from, to] {
            let line =
                "for end in tcp_wmem tcp_rmem; do echo 4096 65536 131072 > /proc/sys/net/ipv4/$end; done";
            station.check(line, SHORT)?;
        }
        // A pipe that never ends as standard input: nc ends the connection with its input.
        let receiver = to.spawn(&format!(
            "mkfifo {base}.in; busybox nc -l -p {port} <> {base}.in | md5sum; rm {base}.in"
        ))?;
        let listens = format!("busybox netstat -ltn | grep -q ':{port} '");
        wait_for("nc to listen", SHORT, || Ok(to.run(&listens, SHORT)?.status == 0))?;
        let sender = from.spawn(&format!(
            "mkfifo {base}.hash; md5sum < {base}.hash > {base}.sum & \
             {{ cat /dev/urandom & echo $! > {base}.id; wait $!; }} | tee {base}.hash | \
             busybox nc -w 60 {address} {port}; wait; cat {base}.sum"
        ))?;
        let mut stream = Self { from, base, sender, receiver };
        stream.wait_for(BEYOND_BUFFERS, END)?;
        Ok(stream)
    }

    /// Bytes that were handed to the connection; some of them may still wait in buffers.
    pub fn sent(&self) -> Result<u64> {
        let line = format!("grep wchar: /proc/$(cat {}.id)/io", self.base);
        // It may be about to begin.
        let count = self.from.run(&line, SHORT)?.stdout;
        Ok(count.trim().strip_prefix("wchar: ").and_then(|count| count.parse().ok()).unwrap_or_default())
    }

    /// Waits until `more` bytes have been sent from now on.
    pub fn wait_for(&mut self, more: u64, limit: Duration) -> Result<()> {
        let before = self.sent()?;
        let moved = wait_for("the stream to go on", limit, || Ok(self.sent()? >= before + more));
        moved.or_else(|error| {
            let ends = [self.sender.output()?, self.receiver.output()?];
            bail!("{error:#}: {before} bytes, then {}: {ends:?}", self.sent()?)
        })
    }

    /// Ends it, waits until all has arrived, and compares. The number of bytes, at least.
    pub fn finish(mut self) -> Result<u64> {
        let bytes = self.sent()?;
        self.from.check(&format!("busybox kill $(cat {}.id)", self.base), SHORT)?;
        let sent = self.sender.wait(END).context("the sender")?.stdout;
        let received = self.receiver.wait(END).context("the receiver")?.stdout;
        let digest = |text: &str| text.split_whitespace().find(|word| word.len() == 32).map(str::to_owned);
        ensure!(
            digest(&sent).is_some() && digest(&sent) == digest(&received),
            "after {bytes} bytes: sent {:?}, received {:?}",
            sent.trim(),
            received.trim()
        );
        self.from.check(&format!("rm {}.*", self.base), SHORT)?;
        Ok(bytes)
    }
}
