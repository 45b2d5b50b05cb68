//! From the VMM's start until the guest's init obeys, same kernel, same root file system.

use anyhow::{Context, Result};
use switchyard_tests::nested::peer::Card;
use switchyard_tests::nested::{Peer as Qemu, PeerSpec};

use super::ours::BOOTED;
use super::{BOOT, GUEST_MEMORY_MB, Stage};
use crate::bench::goal::Goal;
use crate::bench::plan::{Figure, Peer};
use crate::bench::table::Table;

/// Who boots. Nothing of it runs before and after.
#[derive(Debug)]
enum Vmm {
    Ours,
    Qemu,
}

impl Peer for Vmm {
    fn name(&self) -> &'static str {
        match self {
            Self::Ours => "ours, netvsp",
            Self::Qemu => "QEMU, virtio-net with vhost-net",
        }
    }

    fn freeze(&mut self) -> Result<()> {
        Ok(())
    }

    fn thaw(&mut self) -> Result<()> {
        Ok(())
    }
}

/// Ours against QEMU.
pub fn run(stage: &Stage<'_>) -> Result<Table> {
    let mut table = Table::new(format!(
        "boot in the nested host: one virtual processor, {GUEST_MEMORY_MB} MiB, from the VMM's start until init obeys"
    ));
    let figure = Figure::new("boot to init", "s");
    let row = stage.plan.interleave(&figure, &mut [Vmm::Ours, Vmm::Qemu], |vmm| match vmm {
        Vmm::Ours => {
            let mut machine = stage.ours.boot(BOOTED)?;
            let took = machine.guest.wait_ready(BOOT).with_context(|| stage.ours.state(BOOTED))?;
            stage.ours.stop(machine)?;
            Ok(took.as_secs_f64())
        }
        Vmm::Qemu => {
            let number = u8::try_from(stage.host.serial() % 250)?;
            let spec = PeerSpec { memory_mb: GUEST_MEMORY_MB, ..PeerSpec::new(&format!("vm{number}")) };
            let mut qemu = Qemu::boot(&stage.host, &spec.with(Card::VirtioVhost, number))?;
            Ok(qemu.wait_ready(BOOT)?.as_secs_f64())
        }
    })?;
    table.goal(&Goal::at_most("boot, to QEMU's", row.ratio(1), 1.3));
    table.rows.push(row);
    Ok(table)
}
