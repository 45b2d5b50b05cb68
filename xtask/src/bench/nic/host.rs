//! One guest with one virtual processor, to the nested host and back: each of our cards, each of QEMU's.
//!
//! The host's end is a TAP device of the nested host, and iperf3 there, on the same software processors.

use anyhow::{Context, Result};
use switchyard_tests::iperf::Load;
use switchyard_tests::nested::peer::Card;
use switchyard_tests::nested::{Peer as Qemu, PeerSpec};
use switchyard_tests::station::Station;

use super::cost::{Cost, packets, watched};
use super::ours::{EMULATED, Machine, SYNTHETIC, Vm};
use super::{BOOT, GUEST_MEMORY_MB, Line, SHORT, Stage, TCP, Way, send};
use crate::bench::goal::Goal;
use crate::bench::guests;
use crate::bench::plan::Peer;
use crate::bench::table::{Row, Table};

/// Which VMM with which card.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Ours(Vm),
    Qemu(Card),
}

/// In the order of the table's columns; our synthetic card first, to which the others are related.
const KINDS: [Kind; 5] = [
    Kind::Ours(SYNTHETIC),
    Kind::Ours(EMULATED),
    Kind::Qemu(Card::VirtioVhost),
    Kind::Qemu(Card::VirtioQemu),
    Kind::Qemu(Card::E1000),
];
/// For the shortest frames. The fewer guests there are, the more seldom one is lost.
const FEW: [Kind; 2] = [Kind::Ours(SYNTHETIC), Kind::Qemu(Card::VirtioQemu)];
const OUR_E1000: usize = 1;
const VHOST: usize = 2;
const QEMU_E1000: usize = 4;

const TRANSMIT: Line = Line { what: "TCP transmit", unit: "Mbit/s", way: Way::Transmit, load: TCP };
const RECEIVE: Line = Line { what: "TCP receive", unit: "Mbit/s", way: Way::Receive, load: TCP };
const UDP: Line =
    Line { what: "UDP of 64 B frames, transmit", unit: "kpps", way: Way::Transmit, load: guests::SHORT };

impl Kind {
    /// Its column in the table.
    fn column(self) -> &'static str {
        match self {
            Self::Ours(SYNTHETIC) => "netvsp",
            Self::Ours(_) => "our e1000",
            Self::Qemu(Card::VirtioVhost) => "QEMU virtio-net, vhost-net",
            Self::Qemu(Card::VirtioQemu) => "QEMU virtio-net",
            Self::Qemu(Card::E1000) => "QEMU e1000",
        }
    }

    fn boot(self, stage: &Stage<'_>) -> Result<Guest> {
        match self {
            Self::Ours(vm) => Ok(Guest::Ours(stage.ours.boot_ready(vm)?)),
            Self::Qemu(card) => {
                let number = u8::try_from(stage.host.serial() % 250)?;
                let name = format!("vm{number}");
                let spec = PeerSpec { memory_mb: GUEST_MEMORY_MB, ..PeerSpec::new(&name) };
                let qemu = Qemu::boot_ready(&stage.host, &spec.with(card, number), BOOT)?;
                Ok(Guest::Qemu(qemu, name))
            }
        }
    }
}

/// A guest that runs.
#[derive(Debug)]
enum Guest {
    Ours(Machine),
    Qemu(Qemu, String),
}

#[derive(Debug)]
struct Contender {
    kind: Kind,
    guest: Guest,
}

impl Contender {
    fn measure(&self, stage: &Stage<'_>, line: Line) -> Result<f64> {
        let what = format!("{}, {}, {}", self.name(), line.what, line.unit);
        watched(
            stage,
            &what,
            || packets(&stage.host, &self.tap()),
            || Ok([Cost::now(&stage.host, self.process()?)?]),
            |seconds| self.send(line.way, line.load, seconds),
        )
    }

    /// Its end of the wire in the nested host.
    fn tap(&self) -> String {
        match &self.guest {
            Guest::Ours(machine) => machine.tap.clone(),
            Guest::Qemu(_, name) => format!("tap-{name}"),
        }
    }

    /// The VMM's process.
    fn process(&self) -> Result<u32> {
        match &self.guest {
            Guest::Ours(machine) => Ok(machine.worker),
            Guest::Qemu(qemu, name) => {
                let line = format!("grep -l '/run/{name}[.]console,' /proc/[0-9]*/cmdline; true");
                let found = qemu.guest().host().check(&line, SHORT)?;
                found.split('/').nth(2).and_then(|process| process.parse().ok()).context("no QEMU")
            }
        }
    }

    fn send(&self, way: Way, load: Load, seconds: u32) -> Result<f64> {
        match &self.guest {
            Guest::Ours(machine) => machine.measure(way, load, seconds),
            Guest::Qemu(qemu, _) => {
                let (guest, host) = (qemu.guest(), qemu.guest().host());
                match way {
                    Way::Transmit => send(guest, host, qemu.host_address()?, load, seconds),
                    Way::Receive => send(host, guest, qemu.guest_address()?, load, seconds),
                }
            }
        }
    }
}

impl Peer for Contender {
    fn name(&self) -> &'static str {
        self.kind.column()
    }

    fn freeze(&mut self) -> Result<()> {
        match &self.guest {
            Guest::Ours(machine) => machine.freeze(),
            Guest::Qemu(qemu, _) => qemu.freeze(),
        }
    }

    fn thaw(&mut self) -> Result<()> {
        match &self.guest {
            Guest::Ours(machine) => machine.thaw(),
            Guest::Qemu(qemu, _) => qemu.thaw(),
        }
    }
}

/// TCP both ways.
pub fn tcp(stage: &Stage<'_>) -> Result<Table> {
    let mut contenders = boot(stage, &KINDS)?;
    let mut table = table();
    for (line, to_vhost) in [(TRANSMIT, 0.8), (RECEIVE, 0.5)] {
        let row = measure(stage, &mut contenders, line)?;
        if stage.costs {
            stage.plan.say(stage.ours.stats()?);
        }
        tcp_goals(&row, to_vhost).iter().for_each(|goal| table.goal(goal));
        table.rows.push(row);
    }
    Ok(table)
}

/// The shortest frames.
pub fn udp(stage: &Stage<'_>) -> Result<Table> {
    let mut contenders = boot(stage, &FEW)?;
    let mut table = table();
    let row = measure(stage, &mut contenders, UDP)?;
    table.goal(&Goal::at_least(format!("{}, to QEMU virtio-net", row.what), row.ratio(1), 1.0));
    table.rows.push(row);
    Ok(table)
}

fn table() -> Table {
    Table::new("one guest with one processor in the nested host, guest ↔ host, MTU 1500, iperf3")
}

fn boot(stage: &Stage<'_>, kinds: &[Kind]) -> Result<Vec<Contender>> {
    kinds
        .iter()
        .map(|&kind| {
            let mut contender = Contender { kind, guest: kind.boot(stage)? };
            contender.freeze()?;
            stage.plan.say(format_args!("{} is up", kind.column()));
            Ok(contender)
        })
        .collect()
}

fn measure(stage: &Stage<'_>, contenders: &mut [Contender], line: Line) -> Result<Row> {
    stage
        .plan
        .interleave(&line.figure(), contenders, |contender| contender.measure(stage, line))
        .with_context(|| format!("{}\n{}", stage.ours.state(SYNTHETIC), stage.ours.state(EMULATED)))
}

fn tcp_goals(row: &Row, to_vhost: f64) -> [Goal; 3] {
    let what = &row.what;
    [
        Goal::at_least(format!("{what}, netvsp to vhost-net"), row.ratio(VHOST), to_vhost),
        Goal::at_least(format!("{what}, netvsp to our e1000"), row.ratio(OUR_E1000), 5.0),
        Goal::at_least(
            format!("{what}, our e1000 to QEMU's"),
            row.ratio(QEMU_E1000) / row.ratio(OUR_E1000),
            1.0,
        ),
    ]
}
