//! Round trips between stations (iputils ping).

use std::time::Duration;

use anyhow::{Context, Result};

use crate::station::Station;

/// What to send.
#[derive(Debug, Clone, Copy)]
pub struct Ping {
    /// Echo requests.
    pub count: u32,
    /// Seconds from one to the next.
    pub interval: f64,
    /// Bytes of payload (28 less than the IPv4 packet).
    pub size: u32,
    /// Whether to forbid fragments.
    pub whole: bool,
}

impl Default for Ping {
    /// Three, a tenth of a second apart, of the usual size.
    fn default() -> Self {
        Self { count: 3, interval: 0.1, size: 56, whole: false }
    }
}

/// What came back.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Report {
    /// Requests sent.
    pub sent: u32,
    /// Replies received.
    pub received: u32,
    /// Shortest, mean and longest round trip in milliseconds; zero without replies.
    pub milliseconds: [f64; 3],
}

/// Pings `address` from `station`. That nobody answers is a report, not an error.
pub fn ping(station: &dyn Station, address: &str, ping: Ping) -> Result<Report> {
    let whole = if ping.whole { "-M do" } else { "" };
    let line =
        format!("ping -n -q -W 2 -c {} -i {} -s {} {whole} {address}", ping.count, ping.interval, ping.size);
    let limit = Duration::from_secs_f64(f64::from(ping.count) * ping.interval + 15.0);
    let output = station.run(&line, limit)?;
    parse(&output.stdout).with_context(|| format!("{}: {line}: {}", station.name(), output.stdout.trim()))
}

fn parse(text: &str) -> Option<Report> {
    let summary = text.lines().find(|line| line.contains("packets transmitted"))?;
    let mut fields = summary.split(", ");
    let sent = fields.next()?.split(' ').next()?.parse().ok()?;
    let received = fields.next()?.split(' ').next()?.parse().ok()?;
    let mut milliseconds = [0.0; 3];
    if let Some((_, times)) =
        text.lines().find(|line| line.starts_with("rtt ")).and_then(|line| line.split_once("= "))
    {
        for (value, word) in milliseconds.iter_mut().zip(times.split('/')) {
            *value = word.parse().ok()?;
        }
    }
    Some(Report { sent, received, milliseconds })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_and_times_are_read() {
        let text = "PING 10.0.0.2 (10.0.0.2) 56(84) bytes of data.\n\n--- 10.0.0.2 ping statistics ---\n\
                    3 packets transmitted, 2 received, 33.3333% packet loss, time 202ms\n\
                    rtt min/avg/max/mdev = 0.041/0.052/0.070/0.012 ms\n";
        let report = parse(text).unwrap();
        assert_eq!(report, Report { sent: 3, received: 2, milliseconds: [0.041, 0.052, 0.070] });
    }

    #[test]
    fn silence_is_a_report() {
        let text = "3 packets transmitted, 0 received, +3 errors, 100% packet loss, time 2040ms\n";
        assert_eq!(parse(text).unwrap(), Report { sent: 3, received: 0, milliseconds: [0.0; 3] });
    }

    #[test]
    fn refusal_is_no_report() {
        assert!(parse("ping: connect: Network is unreachable\n").is_none());
    }
}
