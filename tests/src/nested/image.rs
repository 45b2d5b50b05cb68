//! What the nested host and the guests in it are made of.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::initrd::Image;
use crate::kernel::{Flavour, Kernel};
use crate::package::Cache;

const HOST_INIT: &str = include_str!("../../guest/host-init");
const GUEST_INIT: &str = include_str!("../../guest/init");

/// The host's drivers: KVM, both ways to lend a guest a card, bridges, and the line to the test.
const HOST_MODULES: &[&str] =
    &["virtio_pci", "virtio_console", "kvm-amd", "tun", "vhost_net", "veth", "bridge", "sch_netem", "8021q"];
/// First found on this host's path goes in; busybox has the rest.
const HOST_PROGRAMS: &[&str] =
    &["dash", "ip", "bridge", "tc", "ethtool", "iperf3", "ping", "tcpdump", "sysctl", "setpriv", "taskset"];
/// Firmware that QEMU loads for a machine without a screen. It looks for them in its own folder only.
const FIRMWARE: &[&str] = &["bios-256k.bin", "kvmvapic.bin", "linuxboot_dma.bin", "pvh.bin"];
const FIRMWARE_FOLDERS: &[&str] = &["/usr/share/qemu", "/usr/share/seabios"];

/// The guests' drivers: Hyper-V's, and those of the cards they are compared with.
const GUEST_MODULES: &[&str] =
    &["hv_vmbus", "hv_netvsc", "hv_utils", "hv_balloon", "virtio_pci", "virtio_net", "8021q"];
/// What only the full kernel has.
const FULL_MODULES: &[&str] = &["e1000"];
/// What the full kernel has aboard, but not loaded: a disk in memory with a file system that can be frozen.
const DISK_MODULES: &[&str] = &["brd", "ext4"];
const GUEST_PROGRAMS: &[&str] = &["dash", "ip", "ethtool", "iperf3", "ping", "tcpdump"];
const HYPERV_PACKAGE: &str = "hyperv-daemons";
const HYPERV_DAEMONS: &[&str] = &["hv_kvp_daemon", "hv_vss_daemon"];
/// What they run to learn about addresses.
const HYPERV_SCRIPTS: &[&str] = &["hv_get_dns_info", "hv_get_dhcp_info"];

/// tcpdump asks who it is.
const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n";

/// Where a guest's kernel is in the nested host.
pub fn guest_kernel(flavour: Flavour) -> &'static str {
    match flavour {
        Flavour::Full => "/guest/full/vmlinuz",
        Flavour::Cloud => "/guest/cloud/vmlinuz",
    }
}

/// Where a guest's root file system is in the nested host.
pub fn guest_initrd(flavour: Flavour) -> &'static str {
    match flavour {
        Flavour::Full => "/guest/full/initrd",
        Flavour::Cloud => "/guest/cloud/initrd",
    }
}

/// Files for a boot.
#[derive(Debug, Clone)]
pub struct Boot {
    /// Compressed kernel.
    pub kernel: PathBuf,
    /// Root file system.
    pub initrd: PathBuf,
}

/// What a guest in the nested host boots: Debian's kernel, unmodified; the root file system comes from `cache`.
pub fn guest(cache: &Path, flavour: Flavour) -> Result<Boot> {
    let kernel = Kernel::of(flavour)?;
    let mut image = Image::new(GUEST_INIT)?;
    image.programs(GUEST_PROGRAMS)?;
    image.text("etc/passwd", PASSWD);
    let package = Cache::open()?.unpacked(HYPERV_PACKAGE, |_| Ok(()))?;
    for daemon in HYPERV_DAEMONS {
        let program = package.join("usr/sbin").join(daemon);
        image.copy(&program, &format!("usr/sbin/{daemon}"))?;
        image.libraries(&program)?;
    }
    for script in HYPERV_SCRIPTS {
        let inside = format!("usr/libexec/hypervkvpd/{script}");
        image.copy(&package.join(&inside), &inside)?;
    }
    image.copy_in_place(Path::new("/etc/os-release"))?;
    let (modules, name) = match flavour {
        Flavour::Full => ([GUEST_MODULES, FULL_MODULES].concat(), "guest-full"),
        Flavour::Cloud => (GUEST_MODULES.to_vec(), "guest-cloud"),
    };
    image.modules(&kernel, &modules)?;
    if flavour == Flavour::Full {
        image.numbered_modules(&kernel, DISK_MODULES, "mod/disk")?;
    }
    Ok(Boot { kernel: kernel.image(), initrd: image.cached(cache, name)? })
}

/// What the nested host boots: Debian's cloud kernel, QEMU, the guests' files, and `programs`, which includes the porter.
pub fn host(cache: &Path, programs: &[PathBuf]) -> Result<Boot> {
    let kernel = Kernel::of(Flavour::Cloud)?;
    let mut image = Image::new(HOST_INIT)?;
    image.programs(HOST_PROGRAMS)?;
    image.text("etc/passwd", PASSWD);
    image.programs(&["qemu-system-x86_64"])?;
    for firmware in FIRMWARE {
        let found = FIRMWARE_FOLDERS.iter().map(|folder| Path::new(folder).join(firmware));
        let found = found.into_iter().find(|path| path.exists());
        let found = found.with_context(|| format!("{firmware} is not installed"))?;
        image.copy(&found, &format!("usr/share/qemu/{firmware}"))?;
    }
    for program in programs {
        let name = program.file_name().and_then(|name| name.to_str()).context("unexpected program name")?;
        image.copy(program, &format!("usr/local/bin/{}", name.trim_start_matches("lab-")))?;
        image.libraries(program)?;
    }
    for flavour in [Flavour::Full, Flavour::Cloud] {
        let guest = guest(cache, flavour)?;
        image.copy(&guest.kernel, guest_kernel(flavour).trim_start_matches('/'))?;
        image.copy(&guest.initrd, guest_initrd(flavour).trim_start_matches('/'))?;
    }
    image.modules(&kernel, HOST_MODULES)?;
    Ok(Boot { kernel: kernel.image(), initrd: image.cached(cache, "host")? })
}
