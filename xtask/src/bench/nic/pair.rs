//! Two guests on one switch, TCP from one to the other: what segmentation offload and long frames are worth; and beside it the
//! same guest to the nested host.

use anyhow::{Context, Result};
use switchyard_tests::station::Station;

use super::cost::{Cost, packets, watched};
use super::ours::{Machine, PAIR};
use super::{SHORT, Stage, TCP, Way, send};
use crate::bench::goal::Goal;
use crate::bench::plan::{Figure, Peer};
use crate::bench::table::Table;

/// How the pair is set up for a measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Setting {
    Offloads,
    Plain,
    Jumbo,
    ToHost,
}

const SETTINGS: [Setting; 4] = [Setting::Offloads, Setting::Plain, Setting::Jumbo, Setting::ToHost];
const PLAIN: usize = 1;
const JUMBO: usize = 2;
const TO_HOST: usize = 3;

impl Setting {
    fn mtu(self) -> u32 {
        if self == Self::Jumbo { 9000 } else { 1500 }
    }

    fn offloads(self) -> &'static str {
        if matches!(self, Self::Offloads | Self::ToHost) { "on" } else { "off" }
    }
}

#[derive(Debug)]
struct Couple<'a> {
    setting: Setting,
    red: &'a Machine,
    blue: &'a Machine,
}

impl Peer for Couple<'_> {
    fn name(&self) -> &'static str {
        match self.setting {
            Setting::Offloads => "LSO and RSC on",
            Setting::Plain => "both off",
            Setting::Jumbo => "both off, MTU 9000",
            Setting::ToHost => "guest → host, both on",
        }
    }

    fn freeze(&mut self) -> Result<()> {
        self.red.freeze()?;
        self.blue.freeze()
    }

    fn thaw(&mut self) -> Result<()> {
        for machine in [self.red, self.blue] {
            machine.thaw()?;
            let state = self.setting.offloads();
            // A change of what is so already does nothing to the card.
            let line = format!(
                "ethtool -K eth0 tso {state} lro {state} && \
                 {{ [ $(cat /sys/class/net/eth0/mtu) = {mtu} ] || ip link set eth0 mtu {mtu}; }}",
                mtu = self.setting.mtu()
            );
            machine.guest.check(&line, SHORT)?;
        }
        let (red, blue) = (&self.red.guest, &self.blue.address);
        red.check(&format!("until ping -c 1 -W 1 {blue}; do :; done"), SHORT).map(drop)
    }
}

impl Couple<'_> {
    /// The sender's cost is said first, then the receiver's.
    fn measure(&self, stage: &Stage<'_>) -> Result<f64> {
        let of = |machine: &Machine| Cost::now(machine.guest.host(), machine.worker);
        watched(
            stage,
            &format!("{}, Mbit/s", self.name()),
            || packets(&self.red.guest, "eth0"),
            || Ok([of(self.red)?, of(self.blue)?]),
            |seconds| self.send(seconds),
        )
    }

    fn send(&self, seconds: u32) -> Result<f64> {
        if self.setting == Setting::ToHost {
            return self.red.measure(Way::Transmit, TCP, seconds);
        }
        send(&self.red.guest, &self.blue.guest, &self.blue.address, TCP, seconds)
    }
}

/// All settings of one pair, in turns.
pub fn run(stage: &Stage<'_>) -> Result<Table> {
    let [red, blue] = PAIR.map(|vm| stage.ours.boot_ready(vm));
    let (red, blue) = (red?, blue?);
    red.freeze()?;
    blue.freeze()?;
    stage.plan.say("two guests are up");
    let mut couples = SETTINGS.map(|setting| Couple { setting, red: &red, blue: &blue });
    let row = stage
        .plan
        .interleave(&Figure::new("TCP", "Mbit/s"), &mut couples, |couple| couple.measure(stage))
        .with_context(|| PAIR.map(|vm| stage.ours.state(vm)).join("\n"))?;
    let mut table = Table::new("two guests with one processor each on one switch, guest → guest, iperf3");
    table.goal(&Goal::at_least("LSO and RSC on, to both off", row.ratio(PLAIN), 2.0));
    table.goal(&Goal::at_least("guest → guest, to guest → host", row.ratio(TO_HOST), 0.8));
    let jumbo = row.ratio(PLAIN) / row.ratio(JUMBO);
    table.goal(&Goal::at_least("both off, MTU 9000 to 1500", jumbo, 2.0));
    table.rows.push(row);
    Ok(table)
}
