//! Two QEMU guests that talk over virtio-net: does the switch carry their offloads?
//!
//! The guests' processors are software (TCG) and may run wherever the host has time: a switch that polls in vain takes a
//! processor from them, here as in earnest.

use std::time::Duration;

use anyhow::Result;
use switchyard_tests::guest::{Guest, GuestSpec};
use switchyard_tests::iperf::{Load, iperf};
use switchyard_tests::nic::{Nic, Role};
use switchyard_tests::station::Station;

use super::peers::{Kind, Needs, Switch};
use super::plan::{Figure, Peer, Plan};
use super::table::{Bounds, Report, Table};

const MACS: [&str; 2] = ["02:00:00:00:00:01", "02:00:00:00:00:02"];
const BLUE: &str = "10.9.0.2";
const BOOT: Duration = Duration::from_secs(180);

/// OVS-DPDK's column.
const OVS: usize = 1;

/// The shortest Ethernet frames, as many as the sender can make.
pub const SHORT: Load = Load::Udp { payload: 18, bits_per_second: 0 };

/// A switch with two guests.
struct Couple {
    // Dropped before the switch.
    red: Guest,
    blue: Guest,
    switch: Switch,
}

impl Couple {
    fn start(plan: &Plan, kind: Kind) -> Result<Self> {
        let switch = Switch::start(plan, kind, &Needs { frame: 1518, macs: Some(MACS), addresses: None })?;
        let [a, b] = switch.sockets();
        let boot = |name: &str, socket, mac| {
            let nic = Nic::vhost_user(socket, Role::Client, mac);
            Guest::boot(switch.lab(), &GuestSpec::new(name).with(nic))
        };
        let (mut red, mut blue) = (boot("red", a, MACS[0])?, boot("blue", b, MACS[1])?);
        for (guest, address) in [(&mut red, "10.9.0.1/24"), (&mut blue, "10.9.0.2/24")] {
            guest.wait_ready(BOOT)?;
            guest.configure("eth0", address)?;
        }
        let mut couple = Self { red, blue, switch };
        couple.freeze()?;
        Ok(couple)
    }

    fn measure(&self, load: Load, seconds: u32) -> Result<f64> {
        let report = iperf(&self.blue, &self.red, BLUE, load, seconds)?;
        Ok(match load {
            Load::Tcp { .. } => report.bits_per_second / 1e6,
            Load::Udp { .. } => report.packets_per_second / 1e3,
        })
    }

    /// Turns every offload of both cards off; what a card has not is passed over.
    fn without_offloads(&mut self) -> Result<()> {
        self.thaw()?;
        for guest in [&self.red, &self.blue] {
            for offload in ["gro", "tso", "gso", "tx-udp-segmentation", "tx", "rx"] {
                guest.run(&format!("ethtool -K eth0 {offload} off"), Duration::from_secs(20))?;
            }
        }
        self.freeze()
    }
}

impl Peer for Couple {
    fn name(&self) -> &'static str {
        self.switch.name()
    }

    fn freeze(&mut self) -> Result<()> {
        self.red.process().freeze()?;
        self.blue.process().freeze()?;
        self.switch.freeze()
    }

    fn thaw(&mut self) -> Result<()> {
        self.switch.thaw()?;
        self.red.process().thaw()?;
        self.blue.process().thaw()
    }
}

/// TCP and UDP with the offloads that each switch offers, then TCP without any.
pub fn run(plan: &Plan, report: &mut Report) -> Result<()> {
    let mut couples = Vec::new();
    for kind in [Kind::Yardd, Kind::Ovs] {
        plan.say(format_args!("booting two guests at {kind:?}"));
        couples.push(Couple::start(plan, kind)?);
    }
    let mut table = Table::new("two QEMU guests (software CPU), virtio-net over vhost-user, iperf3");
    let tcp = Load::Tcp { streams: 1 };
    let loads: [(_, _, _, &Bounds); 2] = [
        ("TCP, offloads as offered", "Mbit/s", tcp, &[(OVS, 4.0)]),
        ("UDP of 64 B frames", "kpps", SHORT, &[]),
    ];
    for (what, unit, load, wanted) in loads {
        let figure = Figure::new(what, unit);
        let row = plan.interleave(&figure, &mut couples, |couple| couple.measure(load, plan.seconds()))?;
        table.row(row, wanted);
    }
    couples.iter_mut().try_for_each(Couple::without_offloads)?;
    let figure = Figure::new("TCP, all offloads off (ethtool -K)", "Mbit/s");
    table.rows.push(plan.interleave(&figure, &mut couples, |couple| couple.measure(tcp, plan.seconds()))?);
    report.tables.push(table);
    Ok(())
}
