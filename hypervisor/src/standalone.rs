//! `yard-worker --standalone`: one guest in the foreground, its console on standard input and output, no switch and no daemon.
//!
//! For looking at a kernel, or at this machine's KVM. The program's exit status is 0 if the guest switched itself off.

#![forbid(unsafe_code)]

use std::fs::File;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::channel;

use anyhow::{Context, bail};

use crate::confine::Confine;
use crate::control::{Baseline, Memory, Services};
use crate::devices::power::Wish;
use crate::guest::{Guest, OnFault};
use crate::legacy::LegacyNic;
use crate::memory::GRAIN;
use crate::partition::Parts;
use crate::serial::SerialPort;
use crate::vcpu::{Outcome, describe};

/// What to run.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Linux kernel (bzImage)
    // Without --standalone there is none.
    #[arg(long, required = false)]
    pub kernel: PathBuf,
    /// Initial RAM file system
    #[arg(long)]
    pub initrd: Option<PathBuf>,
    /// Memory, such as 512M or 4G; a multiple of 2M
    #[arg(long, default_value = "512M", value_parser = parse_size)]
    pub memory: u64,
    /// Take the memory from the pool of huge pages
    #[arg(long)]
    pub huge: bool,
    /// Virtual processors
    #[arg(long, default_value_t = 1)]
    pub vcpus: u32,
    /// Processor that the guest sees, such as x86-64-v2 or haswell; all the host has if not given
    #[arg(long, value_parser = parse_baseline)]
    pub baseline: Option<Baseline>,
    /// Kernel command line
    #[arg(long, default_value = "console=ttyS0")]
    pub cmdline: String,
    /// Give the guest an emulated adapter with this MAC address, its cable not plugged in; may be given several times
    #[arg(long, value_name = "MAC", value_parser = parse_mac)]
    pub legacy: Vec<Mac>,
    /// Say on standard error how often the guest left guest mode, and why, when it ends
    #[arg(long)]
    pub exits: bool,
}

fn parse_size(text: &str) -> Result<u64, String> {
    let (number, factor) = match text.strip_suffix(['M', 'm']) {
        Some(number) => (number, 1 << 20),
        None => (text.strip_suffix(['G', 'g']).ok_or("a number with M or G is expected")?, 1 << 30),
    };
    let number: u64 = number.parse().map_err(|_| "a number with M or G is expected")?;
    let size = number.checked_mul(factor).ok_or("too large")?;
    if size == 0 || !size.is_multiple_of(GRAIN) {
        Err("a multiple of 2M is expected".into())
    } else {
        Ok(size)
    }
}

/// A station's MAC address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mac(pub [u8; 6]);

fn parse_mac(text: &str) -> Result<Mac, String> {
    let bytes = text.split(':').map(|part| u8::from_str_radix(part, 16).ok().filter(|_| part.len() == 2));
    let mac: Option<[u8; 6]> = bytes.collect::<Option<Vec<u8>>>().and_then(|bytes| bytes.try_into().ok());
    let station = mac
        .filter(|mac| mac[0] & 1 == 0)
        .ok_or("a station's address such as 02:00:00:00:00:01 is expected")?;
    Ok(Mac(station))
}

fn parse_baseline(text: &str) -> Result<Baseline, String> {
    let found = Baseline::NAMED.iter().find(|(name, _)| *name == text);
    let names = || Baseline::NAMED.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
    found.map(|(_, baseline)| *baseline).ok_or_else(|| format!("one of {} is expected", names()))
}

/// Runs a guest to its end.
///
/// # Errors
/// It cannot be started, or it crashed.
pub fn run(options: Options) -> anyhow::Result<()> {
    let open = |path: &PathBuf| File::open(path).with_context(|| format!("cannot open {}", path.display()));
    let kvm = File::options().read(true).write(true).open("/dev/kvm").context("cannot open /dev/kvm")?;
    let terminal = File::from(std::io::stdout().as_fd().try_clone_to_owned()?);
    let serial = SerialPort::on_terminal(terminal)?;
    let size = options.memory;
    let on_fault: OnFault = Arc::new(|name, reason| eprintln!("{name} stopped: {reason}"));
    let parts = Parts {
        name: "standalone".into(),
        kvm: kvm.into(),
        memory: Memory { minimum: size, startup: size, maximum: size, huge: options.huge },
        vcpus: options.vcpus,
        pin: Vec::new(),
        baseline: options.baseline,
        kernel: open(&options.kernel)?,
        initrd: options.initrd.as_ref().map(open).transpose()?,
        cmdline: options.cmdline.clone(),
        serial: serial.clone(),
        legacy: (0..)
            .zip(&options.legacy)
            .map(|(index, &Mac(mac))| LegacyNic { name: format!("legacy{index}"), mac })
            .collect(),
        on_fault: Arc::clone(&on_fault),
    };
    let (sender, outcomes) = channel();
    let mut guest = Guest::new(parts, Services::default(), None, sender, &on_fault, Confine::none())?;
    std::thread::spawn(move || serial.feed_from(std::io::stdin()));
    guest.run();
    let result = loop {
        let (machine, outcome) = outcomes.recv().context("the guest's machine is gone")?;
        tracing::debug!(machine, ?outcome, "outcome");
        if machine != guest.partition.generation() {
            continue;
        }
        match outcome {
            Outcome::Wish(Wish::Off) => break Ok(()),
            Outcome::Wish(Wish::Reset) => {
                guest.reset()?;
                guest.run();
            }
            Outcome::Panic(panic) => break Err(describe(&panic)),
            Outcome::Crashed(reason) => break Err(reason),
        }
    };
    guest.pause();
    if options.exits {
        eprintln!("vmbus: {:?}", guest.vmbus.report());
        for (kind, count) in guest.partition.exits() {
            eprintln!("{kind}: {count}");
        }
    }
    guest.stop();
    if let Err(reason) = result {
        bail!("the guest crashed: {reason}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_is_six_bytes_of_a_single_station() {
        assert_eq!(parse_mac("02:00:00:00:ab:01"), Ok(Mac([2, 0, 0, 0, 0xab, 1])));
        for wrong in [
            "",
            "02:00:00:00:ab",
            "02:00:00:00:ab:01:02",
            "2:0:0:0:0:+1",
            "01:00:5e:00:00:01",
            "02:00:00:00:ab:0g",
        ] {
            assert!(parse_mac(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn sizes_are_numbers_with_a_unit_and_whole_huge_pages() {
        assert_eq!(parse_size("512M"), Ok(512 << 20));
        assert_eq!(parse_size("4g"), Ok(4 << 30));
        for wrong in ["", "M", "512", "-1M", "3M", "0G", "99999999999999999G", "1.5G"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }
}
