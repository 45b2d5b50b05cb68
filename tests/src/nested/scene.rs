//! The frame of a test of our daemon and its VMs: a fresh nested host, the daemon, and steps that are all tried.

use std::fmt::Write as _;
use std::io::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};

use super::host::{Host, HostSpec};
use super::yardd::Yardd;
use crate::case;
use crate::lab::Lab;
use crate::station::Station;
use crate::yardd::programs;

/// How long a nested host or a guest may take to boot on a busy machine.
pub const BOOT: Duration = Duration::from_secs(90);
/// The processor of the nested host that the switch polls on.
const SWITCH_CPU: usize = 1;
/// Tests are made so often at most while the emulator fails.
const ATTEMPTS: u32 = 4;
/// For a look at logs.
const SHORT: Duration = Duration::from_secs(20);

/// Boots a nested host, starts the daemon there with `config`, and runs `test`, as [`nested`] does. A failure comes with
/// what workers and guests have said last.
pub fn scene(name: &str, config: &str, test: impl Fn(&Host, Yardd, &mut Steps) -> Result<()>) -> Result<()> {
    scene_on(name, |host| host, config, test)
}

/// As [`scene`], in another nested host than the usual.
pub fn scene_on(
    name: &str,
    other: impl Fn(HostSpec) -> HostSpec,
    config: &str,
    test: impl Fn(&Host, Yardd, &mut Steps) -> Result<()>,
) -> Result<()> {
    nested_on(name, other, |_, host| {
        let mut steps = Steps::default();
        Yardd::start(host, &[SWITCH_CPU], config)
            .and_then(|yardd| test(host, yardd, &mut steps))
            .map_err(|error| anyhow!("{}{error:#}", steps.failures))
            .and_then(|()| steps.end())
            .map_err(|error| anyhow!("{error:#}\n{}", last_words(host)))
    })
}

/// Boots a nested host and runs `test`, whose lab it is in.
///
/// The software CPU (QEMU 7.2) loses a nested guest's state now and then, QEMU's own guests' as well: page tables are read
/// where there is no memory, the guest triple-faults or never gets out of one instruction, or the nested host itself dies.
/// On one processor of this machine, where the emulated ones take turns, that is rare. A test in which it is seen says
/// nothing about us, and is made again; any other failure counts, and so does one that comes each time.
pub fn nested(name: &str, test: impl Fn(&Lab, &Host) -> Result<()>) -> Result<()> {
    nested_on(name, |host| host, test)
}

/// As [`nested`], with what `other` makes of the usual host.
fn nested_on(
    name: &str,
    other: impl Fn(HostSpec) -> HostSpec,
    test: impl Fn(&Lab, &Host) -> Result<()>,
) -> Result<()> {
    case::on_one_processor(name, |lab| {
        for attempt in 1..=ATTEMPTS {
            let usual = HostSpec::new(&programs()?).steady(lab);
            let spec = HostSpec { name: format!("host{attempt}"), ..other(usual) };
            let host = Host::boot(lab, &spec, BOOT)?;
            println!("nested host: {:.1} s", host.boot_time().as_secs_f64());
            let Err(error) = test(lab, &host) else { return Ok(()) };
            let Some(sign) = emulator_failed(lab, &host) else { return Err(error) };
            // Past the test harness, which shows what is printed only for failed tests.
            let _ =
                writeln!(std::io::stderr(), "{name}: attempt {attempt}: the software CPU failed ({sign})");
            println!("{error:#}");
        }
        bail!(
            "the software CPU failed {ATTEMPTS} times, or it is not its fault; try a machine with virtualization"
        )
    })
}

/// The sign by which it is known that the emulator failed, and neither the guest nor we.
fn emulator_failed(lab: &Lab, host: &Host) -> Option<&'static str> {
    let Ok(seen) = host.run(SIGNS, SHORT) else { return Some("the nested host is gone") };
    let logs = std::fs::read_dir(lab.dir()).into_iter().flatten().flatten();
    let own = logs.filter(|log| log.file_name().to_string_lossy().starts_with(host.name()));
    let mut logs = own.filter_map(|log| std::fs::read_to_string(log.path()).ok());
    if logs.any(|log| log.contains("triple fault on processor")) {
        return Some("triple fault");
    }
    ["oops", "stuck instruction"].into_iter().find(|sign| seen.stdout.contains(sign))
}

/// A guest that is emulated tens of thousands of times a second cannot get beyond one instruction: without a device in
/// its way, KVM has no reason to emulate it at all.
const SIGNS: &str = "dmesg | grep -qE 'Oops|BUG:|soft lockup' && echo oops
    [ -d /sys/kernel/debug/kvm ] || mount -t debugfs debugfs /sys/kernel/debug
    count() { cat /sys/kernel/debug/kvm/insn_emulation; }
    before=$(count); sleep 1; [ $(($(count) - before)) -gt 10000 ] && echo stuck instruction
    true";

/// What workers and guests have said last.
fn last_words(host: &Host) -> String {
    let line = "cd /run/yard/vm && for log in */worker.log */serial.log; do echo \"--- $log\"; tail -n 15 $log; done; \
                echo --- dmesg; dmesg | tail -n 10";
    host.run(line, SHORT).map_or_else(|error| format!("{error:#}"), |output| output.stdout)
}

/// The steps of a test. One that fails does not keep the others from being tried: a boot is dear.
#[derive(Debug, Default)]
pub struct Steps {
    failures: String,
    count: usize,
}

impl Steps {
    /// Tries one, and says how long it took. If the environment names steps (`SWITCHYARD_STEPS=hot`), only those with
    /// that text in their names are.
    pub fn step(&mut self, name: &str, step: impl FnOnce() -> Result<()>) {
        if std::env::var("SWITCHYARD_STEPS").is_ok_and(|wanted| !name.contains(&wanted)) {
            return println!("   not asked for: {name}");
        }
        let start = Instant::now();
        let outcome = step();
        println!("{:5.1} s  {name}", start.elapsed().as_secs_f64());
        if let Err(error) = outcome {
            self.count += 1;
            println!("         failed: {error:#}");
            let _ = writeln!(self.failures, "{name}: {error:#}");
        }
    }

    fn end(&self) -> Result<()> {
        if self.count > 0 {
            bail!("{} steps failed:\n{}", self.count, self.failures);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_after_a_failed_one_are_tried_and_the_failure_is_told() {
        let mut steps = Steps::default();
        let mut tried = false;
        steps.step("first", || bail!("broken"));
        steps.step("second", || {
            tried = true;
            Ok(())
        });
        assert!(tried);
        assert!(steps.end().unwrap_err().to_string().contains("first: broken"));
        assert!(Steps::default().end().is_ok());
    }
}
