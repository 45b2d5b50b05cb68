//! A guest in the nested host, driven over its serial console, whichever VMM runs it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::host::Host;
use crate::orders::Orders;
use crate::station::{Job, Output, Station};

/// For a look at a log.
const SHORT: Duration = Duration::from_secs(30);

/// A card of a guest, by its MAC address or its driver, and the address it gets at boot.
#[derive(Debug, Clone)]
pub struct Address {
    /// "02:00:00:00:00:01", or "hv_netvsc".
    pub card: String,
    /// "10.0.0.1/24".
    pub address: String,
    /// Bytes, if not the card's own.
    pub mtu: Option<u32>,
}

impl Address {
    /// The card's own MTU.
    pub fn new(card: &str, address: &str) -> Self {
        Self { card: card.to_owned(), address: address.to_owned(), mtu: None }
    }
}

/// The kernel command line that every VMM gives a guest, so that all boot alike.
pub fn command_line(addresses: &[Address], more: &str) -> String {
    let mut line = String::from(
        "console=ttyS0 quiet panic=-1 mitigations=off random.trust_cpu=on net.ifnames=0 orders=ttyS0",
    );
    for Address { card, address, mtu } in addresses {
        line.push_str(&format!(" nic={card},{address}"));
        mtu.iter().for_each(|mtu| line.push_str(&format!(",{mtu}")));
    }
    if !more.is_empty() {
        line.push_str(&format!(" {more}"));
    }
    line
}

/// A guest that runs.
#[derive(Debug)]
pub struct Guest {
    name: String,
    host: Host,
    log: String,
    orders: Orders,
    started: Instant,
    boot: Option<Duration>,
}

impl Guest {
    /// The guest behind the console socket `console` of the host, whose VMM was started at `started` and writes what the
    /// guest says into the file `log` too.
    pub fn attach(host: &Host, name: &str, console: &str, log: &str, started: Instant) -> Result<Self> {
        let stream = host.connect(console).with_context(|| format!("guest {name}"))?;
        let (name, log) = (name.to_owned(), log.to_owned());
        Ok(Self { name, host: host.clone(), log, orders: Orders::new(stream), started, boot: None })
    }

    /// Waits until it obeys; the time that took from the start of its VMM.
    pub fn wait_ready(&mut self, limit: Duration) -> Result<Duration> {
        let boot = match self.boot {
            Some(boot) => boot,
            None => {
                let left = limit.saturating_sub(self.started.elapsed());
                self.orders.wait_ready(left).with_context(|| self.state())?;
                self.started.elapsed()
            }
        };
        self.boot = Some(boot);
        Ok(boot)
    }

    /// Waits until it obeys anew, after a reset that it has had just now.
    pub fn wait_rebooted(&mut self, limit: Duration) -> Result<Duration> {
        (self.boot, self.started) = (None, Instant::now());
        self.wait_ready(limit)
    }

    /// The host it runs in.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// What its kernel has said to the console.
    pub fn console(&self) -> Result<String> {
        Ok(self.host.run(&format!("cat {}", self.log), SHORT)?.stdout)
    }

    /// Channels of its first card that are in use.
    pub fn channels(&self) -> Result<u64> {
        let shown = self.check("ethtool -l eth0", SHORT)?;
        let current = shown.split("Current hardware settings").nth(1).context("no settings")?;
        let count = current.lines().find_map(|line| line.strip_prefix("Combined:")).context("no channels")?;
        Ok(count.trim().parse()?)
    }

    /// An error if its kernel complains about itself or about drivers.
    pub fn expect_content(&self) -> Result<()> {
        // Stalls are this machine's: its processors are software, and may be busy.
        let bad = "dmesg | grep -A 20 -E 'BUG:|Oops|NETDEV WATCHDOG|WARNING:.* (drivers|net)/' | head -n 40";
        let found = self.check(bad, SHORT)?;
        ensure!(found.is_empty(), "guest {} complains: {found}", self.name);
        Ok(())
    }

    /// What is known of it when something went wrong.
    fn state(&self) -> String {
        let tail = self.host.run(&format!("tail -n 20 {}", self.log), SHORT);
        let tail = tail.map_or_else(|error| format!("{error:#}"), |output| output.stdout);
        format!("guest {}\n{tail}", self.name)
    }
}

impl Station for Guest {
    fn name(&self) -> &str {
        &self.name
    }

    fn run(&self, line: &str, limit: Duration) -> Result<Output> {
        if self.boot.is_none() {
            bail!("guest {} is not ready", self.name);
        }
        self.orders.run(line, limit).with_context(|| format!("{line}\n{}", self.state()))
    }

    fn spawn(&self, line: &str) -> Result<Box<dyn Job>> {
        self.orders.spawn(line).with_context(|| self.state())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_words_of_the_command_line() {
        let jumbo = Address { mtu: Some(9000), ..Address::new("02:00:00:00:00:01", "10.0.0.1/24") };
        let line = command_line(&[jumbo, Address::new("e1000", "10.0.1.1/24")], "x=y");
        assert!(
            line.ends_with("orders=ttyS0 nic=02:00:00:00:00:01,10.0.0.1/24,9000 nic=e1000,10.0.1.1/24 x=y"),
            "{line}"
        );
    }
}
