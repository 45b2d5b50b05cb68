//! DPDK in a guest of the nested host: testpmd, and what lends it the emulated adapters that the kernel drives.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::guest::Guest;
use super::host::Host;
use super::image::guest_initrd;
use crate::initrd::Image;
use crate::kernel::{Flavour, Kernel};
use crate::station::{Job, Station};
use crate::testpmd_stats::{PortStats, parse};
use crate::yardd::programs;

/// How long a driver may take over an adapter: it reads the EEPROM bit by bit, and each bit is several exits.
const LIMIT: Duration = Duration::from_secs(120);

/// DPDK loads whatever is in here: the driver of Intel's older cards, and pools made of rings.
const PLUGINS: &str = "/usr/lib/x86_64-linux-gnu/dpdk/pmds-23.0";
const WANTED: &[&str] = &["librte_net_e1000.so.23.0", "librte_mempool_ring.so.23.0"];
/// What `stdbuf` has a program load.
const STDBUF: &str = "/usr/libexec/coreutils/libstdbuf.so";
/// Lends a device to a program.
const LENDER: &str = "uio_pci_generic";
/// The kernel's own driver.
const KERNEL: &str = "e1000";

/// Where [`put`] makes it.
pub const INITRD: &str = "/guest/dpdk/initrd";

/// Makes [`INITRD`] in the host, a root file system with DPDK aboard: the full kernel's, and behind it an archive that Linux
/// unpacks over that.
pub fn put(host: &Host) -> Result<()> {
    let mut image = Image::empty();
    image.programs(&["dpdk-testpmd", "stdbuf"])?;
    for plugin in WANTED {
        image.program(&Path::new(PLUGINS).join(plugin))?;
    }
    image.copy_in_place(Path::new(STDBUF))?;
    image.directory("var");
    image.directory("var/run");
    image.numbered_modules(&Kernel::of(Flavour::Full)?, &[LENDER], "mod/uio")?;
    let archive = image.cached(&programs()?.join("nested"), "guest-dpdk")?;
    host.put("/guest/dpdk/archive", &std::fs::read(archive)?)?;
    let usual = guest_initrd(Flavour::Full);
    host.check(&format!("cat {usual} /guest/dpdk/archive > {INITRD}"), LIMIT).map(drop)
}

/// Takes all emulated adapters from the kernel's driver, for programs.
pub fn borrow_adapters(guest: &Guest) -> Result<()> {
    guest.check("for module in /mod/uio/*; do insmod $module || exit 1; done", LIMIT)?;
    bind(guest, LENDER)
}

/// Gives them back to the kernel's driver.
pub fn return_adapters(guest: &Guest) -> Result<()> {
    bind(guest, KERNEL)
}

fn bind(guest: &Guest, driver: &str) -> Result<()> {
    let line = format!(
        "cd /sys/bus/pci/devices; for device in *; do [ $(cat $device/device) = 0x100e ] || continue; \
         echo $device > $device/driver/unbind; echo {driver} > $device/driver_override; \
         echo $device > /sys/bus/pci/drivers_probe; [ -e /sys/bus/pci/drivers/{driver}/$device ] || exit 1; done"
    );
    guest.check(&line, LIMIT).map(drop)
}

/// Where testpmd reads its commands, and what it has written.
const COMMANDS: &str = "/run/testpmd";
const LOG: &str = "/run/testpmd.log";
const PROMPT: &str = "^testpmd> ";
/// Comes where the next prompt would be.
const ENDED: &str = "testpmd> ended";

/// A running testpmd with all borrowed adapters as its ports; killed when dropped.
pub struct Testpmd<'a> {
    guest: &'a Guest,
    job: Box<dyn Job>,
}

impl fmt::Debug for Testpmd<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Testpmd").finish_non_exhaustive()
    }
}

impl<'a> Testpmd<'a> {
    /// Starts it with these options of its own, and waits for its prompt. The thread that forwards runs on the processor that
    /// everything else does, and gives way.
    pub fn start(guest: &'a Guest, options: &str) -> Result<Self> {
        // DPDK loads no plugins below a folder that anybody may write to. Unbuffered, or testpmd's answers would stay in the C
        // library's buffer.
        let line = format!(
            "chmod 755 /; mkfifo {COMMANDS}; stdbuf -o0 dpdk-testpmd --lcores=0@0,1@0 --in-memory --iova-mode=pa \
             --no-telemetry -- -i --nb-cores=1 {options} <> {COMMANDS} > {LOG} 2>&1; echo '{ENDED}' >> {LOG}"
        );
        let testpmd = Self { guest, job: guest.spawn(&line)? };
        let prompt = format!(
            "until grep -qs '{PROMPT}' {LOG}; do sleep 0.2; done; ! grep '{ENDED}' {LOG} || cat {LOG}"
        );
        let ended = guest.check(&prompt, LIMIT)?;
        ensure!(ended.is_empty(), "{ended}");
        let worker = "grep -l worker /proc/$(pidof dpdk-testpmd)/task/*/comm | cut -d / -f 5";
        guest.check(&format!("renice -n 19 -p $({worker})"), LIMIT)?;
        Ok(testpmd)
    }

    /// Sends one command; what testpmd answers, after a line with the command.
    pub fn command(&self, line: &str) -> Result<String> {
        // Only the answer is fetched: each byte that the guest prints is an exit.
        let line = format!(
            "prompts() {{ grep -c '{PROMPT}' {LOG}; }}; before=$(prompts); from=$(stat -c %s {LOG}); \
             echo '{line}' > {COMMANDS}; until [ $(prompts) -gt $before ]; do sleep 0.2; done; \
             tail -c +$((from + 1)) {LOG}"
        );
        let answer = self.guest.check(&line, LIMIT)?;
        let refused = ["Bad arguments", "Command not found", ENDED];
        if refused.iter().any(|text| answer.contains(text)) {
            bail!("testpmd refused: {answer}");
        }
        Ok(answer)
    }

    /// The counters of its first port.
    pub fn stats(&self) -> Result<PortStats> {
        let shown = self.command("show port stats 0")?;
        parse(&shown).pop().with_context(|| format!("no counters: {shown}"))
    }

    /// Ends it in good order.
    pub fn quit(mut self) -> Result<()> {
        self.guest.check(&format!("echo quit > {COMMANDS}"), LIMIT)?;
        self.job.wait(LIMIT).map(drop)
    }
}
