//! One guest's network card, guest to host and back, in the nested host: the same guest kernel and root file system under
//! QEMU with each of its cards.
//!
//! All guests are booted side by side in one nested host, and stopped but for the one that is measured. The host's end is
//! the nested host itself: iperf3 there, on the same two software processors.

use std::time::Duration;

use anyhow::Result;
use switchyard_tests::iperf::{Load, iperf};
use switchyard_tests::lab::Lab;
use switchyard_tests::nested::peer::Card;
use switchyard_tests::nested::{Host, HostSpec, Peer as Qemu, PeerSpec};
use switchyard_tests::station::Station;

use super::guests::SHORT;
use super::plan::{Figure, Peer, Plan};
use super::table::{Report, Table};

const BOOT: Duration = Duration::from_secs(180);
/// For the host's own files and for four guests.
const HOST_MEMORY_MB: u32 = 3072;

/// Which VMM with which card.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Qemu(Card),
}

const KINDS: [Kind; 3] =
    [Kind::Qemu(Card::VirtioVhost), Kind::Qemu(Card::VirtioQemu), Kind::Qemu(Card::E1000)];

impl Kind {
    /// Its column in the table.
    fn column(self) -> &'static str {
        match self {
            Self::Qemu(Card::VirtioVhost) => "QEMU virtio-net, vhost-net",
            Self::Qemu(Card::VirtioQemu) => "QEMU virtio-net",
            Self::Qemu(Card::E1000) => "QEMU e1000",
        }
    }

    fn boot(self, host: &Host) -> Result<Machine> {
        let number = u8::try_from(host.serial() % 250)?;
        match self {
            Self::Qemu(card) => {
                let spec = PeerSpec::new(&format!("vm{number}")).with(card, number);
                Ok(Machine::Qemu(Qemu::boot_ready(host, &spec, BOOT)?))
            }
        }
    }
}

/// A guest that runs.
#[derive(Debug)]
enum Machine {
    Qemu(Qemu),
}

impl Machine {
    fn measure(&self, host: &Host, way: Way, load: Load, seconds: u32) -> Result<f64> {
        let Self::Qemu(qemu) = self;
        let guest: &dyn Station = qemu.guest();
        let report = match way {
            Way::Transmit => iperf(host, guest, qemu.host_address()?, load, seconds)?,
            Way::Receive => iperf(guest, host, qemu.guest_address()?, load, seconds)?,
        };
        Ok(match load {
            Load::Tcp { .. } => report.bits_per_second / 1e6,
            Load::Udp { .. } => report.packets_per_second / 1e3,
        })
    }
}

/// As the guest sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Transmit,
    Receive,
}

#[derive(Debug)]
struct Contender {
    kind: Kind,
    machine: Machine,
}

impl Peer for Contender {
    fn name(&self) -> &'static str {
        self.kind.column()
    }

    fn freeze(&mut self) -> Result<()> {
        let Machine::Qemu(qemu) = &self.machine;
        qemu.freeze()
    }

    fn thaw(&mut self) -> Result<()> {
        let Machine::Qemu(qemu) = &self.machine;
        qemu.thaw()
    }
}

/// Guests that are booted to be measured, and only for that.
#[derive(Debug)]
struct Fresh(Kind);

impl Peer for Fresh {
    fn name(&self) -> &'static str {
        self.0.column()
    }

    fn freeze(&mut self) -> Result<()> {
        Ok(())
    }

    fn thaw(&mut self) -> Result<()> {
        Ok(())
    }
}

/// TCP and UDP both ways, and the time to boot.
pub fn run(plan: &Plan, report: &mut Report) -> Result<()> {
    let lab = Lab::shared()?;
    let host =
        Host::boot(&lab, &HostSpec { memory_mb: HOST_MEMORY_MB, ..HostSpec::new(&plan.programs) }, BOOT)?;
    plan.say(format_args!("the nested host is up after {:.1} s", host.boot_time().as_secs_f64()));
    let mut table =
        Table::new("one guest with one processor in the nested host, guest ↔ host, MTU 1500, iperf3");
    table.rows.push(boots(plan, &host)?);
    let mut contenders = Vec::new();
    for kind in KINDS {
        let mut contender = Contender { kind, machine: kind.boot(&host)? };
        contender.freeze()?;
        plan.say(format_args!("{} is up", kind.column()));
        contenders.push(contender);
    }
    let tcp = Load::Tcp { streams: 1 };
    for (what, unit, way, load) in [
        ("TCP transmit", "Mbit/s", Way::Transmit, tcp),
        ("TCP receive", "Mbit/s", Way::Receive, tcp),
        ("UDP of 64 B frames, transmit", "kpps", Way::Transmit, SHORT),
    ] {
        table.rows.push(plan.interleave(&Figure::new(what, unit), &mut contenders, |contender| {
            contender.machine.measure(&host, way, load, plan.seconds())
        })?);
    }
    report.tables.push(table);
    Ok(())
}

/// From the VMM's start until the guest's first process obeys.
fn boots(plan: &Plan, host: &Host) -> Result<super::table::Row> {
    plan.interleave(&Figure::new("boot to init", "s"), &mut KINDS.map(Fresh), |fresh| {
        let Machine::Qemu(mut qemu) = fresh.0.boot(host)?;
        Ok(qemu.wait_ready(BOOT)?.as_secs_f64())
    })
}
