//! Throughput between two stations (iperf3).

use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::lab::wait_for;
use crate::station::Station;

/// What to send.
#[derive(Debug, Clone, Copy)]
pub enum Load {
    /// As much TCP as goes through.
    Tcp {
        /// Connections side by side.
        streams: u32,
    },
    /// UDP datagrams.
    Udp {
        /// Bytes of payload: 18 make the shortest Ethernet frame, 64 bytes with its check sequence.
        payload: u32,
        /// Bits of payload a second; 0: as many as the sender can.
        bits_per_second: u64,
    },
}

/// What came through.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Report {
    /// Bits of payload received a second.
    pub bits_per_second: f64,
    /// TCP segments sent again.
    pub retransmits: u64,
    /// UDP datagrams sent.
    pub sent_packets: u64,
    /// UDP datagrams that did not arrive.
    pub lost_packets: u64,
    /// UDP datagrams received a second.
    pub packets_per_second: f64,
}

/// Sends `load` from `client` to `server` at `address` for `seconds`. A fresh server runs for each call: one
/// whose client died stays busy.
pub fn iperf(
    server: &dyn Station,
    client: &dyn Station,
    address: &str,
    load: Load,
    seconds: u32,
) -> Result<Report> {
    let mut listening = server.spawn("iperf3 -s -1 -i 0 --forceflush")?;
    wait_for("iperf3 server", Duration::from_secs(20), || Ok(listening.output()?.contains("listening")))?;
    let what = match load {
        Load::Tcp { streams } => format!("-P {streams}"),
        Load::Udp { payload, bits_per_second } => format!("-u -l {payload} -b {bits_per_second}"),
    };
    let line = format!("iperf3 -c {address} -J -i 0 -t {seconds} {what}");
    let output = client.run(&line, Duration::from_secs(u64::from(seconds) + 30))?;
    parse(&output.stdout, load).with_context(|| format!("{}: {line}", client.name()))
}

fn parse(text: &str, load: Load) -> Result<Report> {
    let json: Value = serde_json::from_str(text).with_context(|| format!("not JSON: {text}"))?;
    if let Some(error) = json["error"].as_str() {
        bail!("iperf3: {error}");
    }
    let end = &json["end"];
    match load {
        Load::Tcp { .. } => Ok(Report {
            bits_per_second: end["sum_received"]["bits_per_second"].as_f64().context("no rate")?,
            retransmits: end["sum_sent"]["retransmits"].as_u64().unwrap_or_default(),
            sent_packets: 0,
            lost_packets: 0,
            packets_per_second: 0.0,
        }),
        Load::Udp { .. } => parse_udp(&end["sum"]),
    }
}

/// For UDP, `sum` has what was sent, and how much of it the server missed.
fn parse_udp(sum: &Value) -> Result<Report> {
    let sent_packets = sum["packets"].as_u64().context("no count of packets")?;
    let lost_packets = sum["lost_packets"].as_u64().context("no count of lost packets")?;
    let sent_bits = sum["bits_per_second"].as_f64().context("no rate")?;
    let seconds = sum["seconds"].as_f64().filter(|&seconds| seconds > 0.0).context("no duration")?;
    let received = sent_packets.saturating_sub(lost_packets) as f64;
    Ok(Report {
        bits_per_second: sent_bits * received / (sent_packets.max(1) as f64),
        retransmits: 0,
        sent_packets,
        lost_packets,
        packets_per_second: received / seconds,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tcp_rate_is_the_receivers() {
        let text = r#"{"start":{},"end":{"sum_sent":{"bits_per_second":2.0e9,"retransmits":7,"bytes":1},
            "sum_received":{"bits_per_second":1.5e9,"bytes":1}}}"#;
        let report = parse(text, Load::Tcp { streams: 1 }).unwrap();
        assert_eq!((report.bits_per_second, report.retransmits), (1.5e9, 7));
    }

    #[test]
    fn udp_rate_counts_only_what_arrived() {
        let text = r#"{"end":{"sum":{"start":0,"end":2.0,"seconds":2.0,"bytes":18000,"bits_per_second":72000.0,
            "jitter_ms":0.1,"lost_packets":250,"packets":1000,"lost_percent":25,"sender":true}}}"#;
        let report = parse(text, Load::Udp { payload: 18, bits_per_second: 0 }).unwrap();
        assert_eq!((report.packets_per_second, report.bits_per_second), (375.0, 54000.0));
        assert_eq!((report.sent_packets, report.lost_packets), (1000, 250));
    }

    #[test]
    fn refused_connection_is_an_error() {
        let text = r#"{"start":{},"end":{},"error":"unable to connect to server: Connection refused"}"#;
        assert!(parse(text, Load::Tcp { streams: 1 }).unwrap_err().to_string().contains("refused"));
    }
}
