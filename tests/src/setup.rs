//! What this machine needs before a lab can run: Debian packages, huge pages, rights.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::janitor;
use crate::process::{output, words};

/// A purpose, and the Debian packages it takes.
pub type Packages = &'static [&'static str];

/// Namespaces, TAP, veth and bridges, with ping and iperf3.
pub const NETWORK: Packages = &["iproute2", "iputils-ping", "iperf3", "ethtool", "procps", "util-linux"];
/// Guests.
pub const GUESTS: Packages = &[
    "qemu-system-x86",
    "busybox-static",
    "iproute2",
    "iputils-ping",
    "iperf3",
    "ethtool",
    "kmod",
    "util-linux",
];
/// The nested host, and guests in it. Kernels and Hyper-V's daemons are only unpacked
/// ([`package`](crate::package)).
pub const NESTED: Packages = &[
    "qemu-system-x86",
    "seabios",
    "busybox-static",
    "dash",
    "iproute2",
    "iputils-ping",
    "iperf3",
    "ethtool",
    "kmod",
    "procps",
    "tcpdump",
    "util-linux",
];
/// The packet generator.
pub const TESTPMD: Packages = &["dpdk", "dpdk-dev", "util-linux"];
/// The switch to compare with.
pub const OVS: Packages = &["openvswitch-switch-dpdk", "util-linux"];
/// Capture files.
pub const CAPTURES: Packages = &["tcpdump", "tcpreplay", "tshark"];

/// All of them.
pub fn all_packages() -> Vec<&'static str> {
    let mut all = [NETWORK, GUESTS, NESTED, TESTPMD, OVS, CAPTURES].concat();
    all.sort_unstable();
    all.dedup();
    all
}

/// Whether this program runs as root.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Installs what is missing of `packages` as root; as another user, an error with the one line to run.
pub fn ensure(packages: &[&str]) -> Result<()> {
    let missing: Vec<_> = packages.iter().copied().filter(|package| !is_installed(package)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let list = missing.join(" ");
    if !is_root() {
        bail!("missing Debian packages; run: sudo apt-get update && sudo apt-get install -y {list}");
    }
    eprintln!("installing {list}");
    let install = || apt_get(&["install", "-y", "--no-install-recommends"], &missing);
    let had_openvswitch = is_installed("openvswitch-switch");
    install().or_else(|_| {
        apt_get(&["update"], &[])?;
        install()
    })?;
    if !had_openvswitch && list.contains("openvswitch") {
        // Its package starts a system-wide switch that nobody here asked for.
        let _ = words("systemctl disable --now openvswitch-switch");
    }
    Ok(())
}

fn apt_get(verb: &[&str], packages: &[&str]) -> Result<String> {
    output(
        Command::new("apt-get").env("DEBIAN_FRONTEND", "noninteractive").arg("-qq").args(verb).args(packages),
    )
}

fn is_installed(package: &str) -> bool {
    words(&format!("dpkg-query -W -f=${{db:Status-Status}} {package}"))
        .is_ok_and(|status| status == "installed")
}

/// What a test needs of this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// To be root.
    Root,
    /// TAP devices.
    Tap,
    /// Network namespaces.
    Namespaces,
    /// Huge pages of 2 MiB, so many of them.
    HugePages(usize),
    /// So many processors.
    Processors(usize),
}

/// Why this machine cannot serve `needs`, if it cannot: the reason a test gives for being skipped.
/// Raises the number of huge pages where that is all that lacks.
pub fn lacks(needs: &[Need]) -> Option<String> {
    needs.iter().find_map(|need| match *need {
        Need::Root if !is_root() => Some("not root".to_owned()),
        Need::Tap if !Path::new("/dev/net/tun").exists() => Some("no /dev/net/tun".to_owned()),
        Need::Namespaces => namespaces().err().map(|error| format!("no network namespaces: {error}")),
        Need::HugePages(count) => huge_pages(count).err().map(|error| format!("{error:#}")),
        Need::Processors(count) if processors() < count => Some(format!("fewer than {count} processors")),
        Need::Root | Need::Tap | Need::Processors(_) => None,
    })
}

/// Processors this program may use.
pub fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

fn namespaces() -> Result<()> {
    let name = format!("yard-try-{}-{}", std::process::id(), crate::lab::serial());
    words(&format!("ip netns add {name}"))?;
    words(&format!("ip netns del {name}")).map(drop)
}

const HUGE_PAGES: &str = "/proc/sys/vm/nr_hugepages";
/// The number of huge pages before the first of the lab programs that run now raised it.
const HUGE_PAGES_BEFORE: &str = "/run/switchyard-huge-pages";

/// Has at least `count` free huge pages of 2 MiB. The number that was set before returns when the last
/// program that uses the lab ends.
pub fn huge_pages(count: usize) -> Result<()> {
    janitor::at_last_exit(&format!("cat {HUGE_PAGES_BEFORE} > {HUGE_PAGES} && rm {HUGE_PAGES_BEFORE}"))?;
    let free = meminfo("HugePages_Free")?;
    if free >= count {
        return Ok(());
    }
    let before = meminfo("HugePages_Total")?;
    if let Ok(mut file) = File::create_new(HUGE_PAGES_BEFORE) {
        write!(file, "{before}")?;
    }
    let wanted = before + count - free;
    std::fs::write(HUGE_PAGES, wanted.to_string()).with_context(|| format!("cannot write {HUGE_PAGES}"))?;
    let got = meminfo("HugePages_Free")?;
    if got < count {
        bail!("only {got} of {count} huge pages of 2 MiB are to be had: memory is short or fragmented");
    }
    Ok(())
}

fn meminfo(key: &str) -> Result<usize> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    meminfo_value(&meminfo, key).with_context(|| format!("no {key} in /proc/meminfo"))
}

fn meminfo_value(meminfo: &str, key: &str) -> Option<usize> {
    let line = meminfo.lines().find(|line| line.split(':').next() == Some(key))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_key_is_matched_whole() {
        let meminfo = "HugePages_Total:    1024\nHugePages_Free:      391\nHugepagesize:       2048 kB\n";
        assert_eq!(meminfo_value(meminfo, "HugePages_Free"), Some(391));
        assert_eq!(meminfo_value(meminfo, "HugePages"), None);
    }

    #[test]
    fn package_that_does_not_exist_is_not_installed() {
        assert!(!is_installed("no-such-package-for-sure"));
    }
}
