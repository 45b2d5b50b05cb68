//! Reads what testpmd prints for `show port stats all`.

use std::time::Duration;

/// Counters of one testpmd port since its start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PortStats {
    /// Packets received.
    pub rx_packets: u64,
    /// Bytes received, without frame check sequences.
    pub rx_bytes: u64,
    /// Packets sent.
    pub tx_packets: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Packets that found no room on receive.
    pub rx_missed: u64,
    /// Packets that could not be sent.
    pub tx_errors: u64,
}

/// Counters of all ports, in order, from testpmd's text; empty if there are none in it.
pub fn parse(text: &str) -> Vec<PortStats> {
    text.split("NIC statistics for port").skip(1).map(parse_port).collect()
}

fn parse_port(text: &str) -> PortStats {
    // The first of a name: later ones are rates or another port's.
    let value = |name: &str| {
        let rest = text.split_once(name).map_or("", |(_, rest)| rest);
        rest.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or_default()
    };
    PortStats {
        rx_packets: value("RX-packets:"),
        rx_bytes: value("RX-bytes:"),
        tx_packets: value("TX-packets:"),
        tx_bytes: value("TX-bytes:"),
        rx_missed: value("RX-missed:"),
        tx_errors: value("TX-errors:"),
    }
}

/// What went through between two looks at the counters, all ports added.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rate {
    /// Packets received a second.
    pub packets_per_second: f64,
    /// Bits received a second.
    pub bits_per_second: f64,
}

/// The rate between two looks that were `elapsed` apart.
pub fn rate(before: &[PortStats], after: &[PortStats], elapsed: Duration) -> Rate {
    let sum = |stats: &[PortStats], field: fn(&PortStats) -> u64| stats.iter().map(field).sum::<u64>() as f64;
    let per_second = |field| (sum(after, field) - sum(before, field)) / elapsed.as_secs_f64();
    Rate {
        packets_per_second: per_second(|port| port.rx_packets),
        bits_per_second: per_second(|port| port.rx_bytes) * 8.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// DPDK 22.11.
    const SAMPLE: &str = "
  ######################## NIC statistics for port 0  ########################
  RX-packets: 37587264   RX-missed: 7          RX-bytes:  2405584896
  RX-errors: 0
  RX-nombuf:  0         
  TX-packets: 37587712   TX-errors: 3          TX-bytes:  2405613568

  Throughput (since last show)
  Rx-pps:      5541482          Rx-bps:   2837239288
  Tx-pps:      5541459          Tx-bps:   2837227008
  ############################################################################

  ######################## NIC statistics for port 1  ########################
  RX-packets: 100        RX-missed: 0          RX-bytes:  6400
  RX-errors: 0
  RX-nombuf:  0         
  TX-packets: 200        TX-errors: 0          TX-bytes:  12800

  Throughput (since last show)
  Rx-pps:            0          Rx-bps:            0
  Tx-pps:            0          Tx-bps:            0
  ############################################################################
testpmd> ";

    #[test]
    fn counters_of_both_ports_are_read() {
        let stats = parse(SAMPLE);
        assert_eq!(stats.len(), 2);
        assert_eq!((stats[0].rx_packets, stats[0].tx_packets), (37_587_264, 37_587_712));
        assert_eq!((stats[0].rx_bytes, stats[0].tx_bytes), (2_405_584_896, 2_405_613_568));
        assert_eq!((stats[0].rx_missed, stats[0].tx_errors), (7, 3));
        assert_eq!((stats[1].rx_packets, stats[1].tx_bytes), (100, 12800));
    }

    #[test]
    fn other_text_has_no_ports() {
        assert!(parse("testpmd> ").is_empty());
    }

    #[test]
    fn rate_adds_both_directions() {
        let before = [PortStats::default(); 2];
        let mut after = before;
        after[0].rx_packets = 600;
        after[0].rx_bytes = 38_400;
        after[1].rx_packets = 400;
        let rate = rate(&before, &after, Duration::from_secs(2));
        assert_eq!((rate.packets_per_second, rate.bits_per_second), (500.0, 153_600.0));
    }
}
