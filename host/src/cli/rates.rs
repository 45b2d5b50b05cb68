//! Rates: the difference of two reports.

use std::collections::HashMap;
use std::time::Instant;

use super::model::{Counters, Port, Queue, Report};
use super::show::{ports, state_cell};
use super::table::{Cell, Ink, Table, percent, short};

/// Counters at one moment.
#[derive(Debug)]
pub struct Sample {
    pub time: Instant,
    pub report: Report,
}

/// What happened in a second.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Rate {
    pub frames: f64,
    pub bits: f64,
    pub dropped: f64,
}

impl Rate {
    /// From `before` to `after`; a counter that fell began anew, and counts from zero.
    #[expect(clippy::cast_precision_loss, reason = "a rate is shown with three digits")]
    fn between(before: &Counters, after: &Counters, seconds: f64) -> Self {
        let anew =
            after.frames < before.frames || after.bytes < before.bytes || after.dropped() < before.dropped();
        let zero = Counters::default();
        let before = if anew { &zero } else { before };
        let rate = |after: u64, before: u64| (after - before) as f64 / seconds.max(1e-3);
        Self {
            frames: rate(after.frames, before.frames),
            bits: 8.0 * rate(after.bytes, before.bytes),
            dropped: rate(after.dropped(), before.dropped()),
        }
    }

    fn sum(self, other: Self) -> Self {
        Self {
            frames: self.frames + other.frames,
            bits: self.bits + other.bits,
            dropped: self.dropped + other.dropped,
        }
    }
}

/// The earlier counters by port.
struct Before<'a> {
    ports: HashMap<(&'a str, &'a str), &'a Port>,
    seconds: f64,
}

impl<'a> Before<'a> {
    fn new(before: &'a Sample, after: &Sample) -> Self {
        let by_name = |(switch, port): (&'a super::model::Switch, &'a Port)| {
            ((switch.name.as_str(), port.name.as_str()), port)
        };
        Self {
            ports: ports(&before.report).map(by_name).collect(),
            seconds: after.time.duration_since(before.time).as_secs_f64(),
        }
    }

    fn port(&self, switch: &str, port: &Port) -> (Rate, Rate) {
        let before = self.ports.get(&(switch, port.name.as_str()));
        let none = Counters::default();
        let (received, sent) = before.map_or((&none, &none), |before| (&before.received, &before.sent));
        (Rate::between(received, &port.received, self.seconds), Rate::between(sent, &port.sent, self.seconds))
    }

    fn queue(&self, switch: &str, port: &Port, queue: &Queue) -> (Rate, Rate) {
        let before = self.ports.get(&(switch, port.name.as_str()));
        let before = before.and_then(|before| before.queues.iter().find(|other| other.queue == queue.queue));
        let none = Counters::default();
        let (received, sent) = before.map_or((&none, &none), |before| (&before.received, &before.sent));
        (
            Rate::between(received, &queue.received, self.seconds),
            Rate::between(sent, &queue.sent, self.seconds),
        )
    }
}

fn rate_cells((received, sent): (Rate, Rate)) -> [Cell; 5] {
    let dropped = received.dropped + sent.dropped;
    [
        Cell::number(short(received.frames)),
        Cell::number(short(received.bits)),
        Cell::number(short(sent.frames)),
        Cell::number(short(sent.bits)),
        Cell::number(short(dropped)).ink(if dropped > 0.0 { Ink::Warn } else { Ink::Plain }),
    ]
}

/// Rates of the ports that `wanted` names by switch and port, with a total.
pub fn port_rates(
    before: &Sample,
    after: &Sample,
    wanted: impl Fn(&str, &str) -> bool,
    colour: bool,
) -> String {
    let past = Before::new(before, after);
    let mut table = Table::new(&["PORT", "STATE", "IN/s", "IN bit/s", "OUT/s", "OUT bit/s", "DROPPED/s"]);
    let mut total = (Rate::default(), Rate::default());
    for (switch, port) in ports(&after.report).filter(|(switch, port)| wanted(&switch.name, &port.name)) {
        let rates = past.port(&switch.name, port);
        total = (total.0.sum(rates.0), total.1.sum(rates.1));
        let name = Cell::text(format!("{}/{}", switch.name, port.name));
        table.row([name, state_cell(port)].into_iter().chain(rate_cells(rates)));
    }
    table.row([Cell::text("all").ink(Ink::Bold), Cell::text("")].into_iter().chain(rate_cells(total)));
    table.render("", colour)
}

/// Rates of queues, the busiest first.
pub fn queue_rates(before: &Sample, after: &Sample, colour: bool) -> String {
    let past = Before::new(before, after);
    let mut rows: Vec<_> = ports(&after.report)
        .flat_map(|(switch, port)| port.queues.iter().map(move |queue| (switch, port, queue)))
        .map(|(switch, port, queue)| {
            let rates = past.queue(&switch.name, port, queue);
            (format!("{}/{}", switch.name, port.name), queue, rates)
        })
        .collect();
    let frames = |(received, sent): &(Rate, Rate)| received.frames + sent.frames;
    rows.sort_by(|a, b| frames(&b.2).total_cmp(&frames(&a.2)).then_with(|| a.0.cmp(&b.0)));
    let mut table =
        Table::new(&["PORT", "QUEUE", "CPU", "LOAD", "IN/s", "IN bit/s", "OUT/s", "OUT bit/s", "DROPPED/s"]);
    for (name, queue, rates) in rows {
        let cpu = queue.cpu.map_or_else(|| "-".into(), |cpu| cpu.to_string());
        let first = [
            Cell::text(name),
            Cell::number(queue.queue),
            Cell::number(cpu),
            Cell::number(percent(queue.load_permille)),
        ];
        table.row(first.into_iter().chain(rate_cells(rates)));
    }
    table.render("", colour)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_is_the_difference_a_second_and_a_restarted_counter_counts_from_zero() {
        let counters = |frames, bytes| Counters { frames, bytes, ..Counters::default() };
        let rate = Rate::between(&counters(100, 1000), &counters(300, 3000), 2.0);
        assert_eq!(rate, Rate { frames: 100.0, bits: 8000.0, dropped: 0.0 });
        let rate = Rate::between(&counters(100, 1000), &counters(10, 100), 1.0);
        assert_eq!(rate, Rate { frames: 10.0, bits: 800.0, dropped: 0.0 });
    }
}
