//! QEMU with the nested host's KVM: the VMM that ours is compared with, with the same guest kernel and root file system.

use std::fmt::Write;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::guest::{Address, Guest, command_line};
use super::host::{Host, Service};
use super::image::{guest_initrd, guest_kernel};
use crate::kernel::Flavour;
use crate::station::{Job, Station};

const SHORT: Duration = Duration::from_secs(30);

/// Which card a guest gets, on a TAP whose other end is the nested host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Card {
    /// virtio-net, its data path in the host's kernel.
    VirtioVhost,
    /// virtio-net, its data path in QEMU.
    VirtioQemu,
    /// Emulated.
    E1000,
}

impl Card {
    /// The guest's driver.
    pub fn driver(self) -> &'static str {
        match self {
            Self::VirtioVhost | Self::VirtioQemu => "virtio_net",
            Self::E1000 => "e1000",
        }
    }
}

/// What to boot.
#[derive(Debug, Clone)]
pub struct PeerSpec {
    /// Its name: unique in the host.
    pub name: String,
    /// Memory in MiB.
    pub memory_mb: u32,
    /// Virtual processors.
    pub cpus: u32,
    /// Its card, if it has one: with the third number of its addresses, the host's being 10.77.N.1, the guest's 10.77.N.2.
    pub card: Option<(Card, u8)>,
    /// Whether to show the guest Hyper-V's interface and a VMBus (that carries nothing).
    pub hyperv: bool,
    /// Which of Debian's kernels.
    pub flavour: Flavour,
    /// More words for the kernel's command line.
    pub kernel_arguments: String,
}

impl PeerSpec {
    /// The full kernel, one processor, 256 MiB, no card.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            memory_mb: 256,
            cpus: 1,
            card: None,
            hyperv: false,
            flavour: Flavour::Full,
            kernel_arguments: String::new(),
        }
    }

    /// With a card; see [`PeerSpec::card`].
    pub fn with(mut self, card: Card, subnet: u8) -> Self {
        self.card = Some((card, subnet));
        self
    }

    fn tap(&self) -> String {
        format!("tap-{}", self.name)
    }

    fn addresses(&self) -> Vec<Address> {
        let address =
            |(card, subnet): &(Card, u8)| Address::new(card.driver(), &format!("10.77.{subnet}.2/24"));
        self.card.iter().map(address).collect()
    }

    fn line(&self) -> String {
        let Self { name, memory_mb, cpus, .. } = self;
        let hyperv =
            if self.hyperv { ",kvm=off,hv-relaxed,hv-vpindex,hv-time,hv-synic,hv-stimer" } else { "" };
        let (kernel, initrd) = (guest_kernel(self.flavour), guest_initrd(self.flavour));
        let append = command_line(&self.addresses(), &self.kernel_arguments);
        let mut line = format!(
            "exec qemu-system-x86_64 -machine q35,accel=kvm -cpu host{hyperv} -smp {cpus} -m {memory_mb}M \
             -nodefaults -display none -no-reboot -kernel {kernel} -initrd {initrd} -append '{append}' \
             -chardev socket,id=console,path=/run/{name}.console,server=on,wait=off,logfile=/run/{name}.log \
             -serial chardev:console"
        );
        if self.hyperv {
            line.push_str(" -device vmbus-bridge");
        }
        if let Some((card, subnet)) = self.card {
            let vhost = if card == Card::VirtioVhost { ",vhost=on" } else { "" };
            let device = if card == Card::E1000 { "e1000" } else { "virtio-net-pci" };
            let tap = self.tap();
            let _ = write!(
                line,
                " -netdev tap,id=net,ifname={tap},script=no,downscript=no{vhost} \
                 -device {device},netdev=net,romfile=,mac=02:00:00:00:{subnet:02x}:02"
            );
        }
        line
    }
}

/// A guest under QEMU, killed when dropped.
#[derive(Debug)]
pub struct Peer {
    guest: Guest,
    qemu: Service,
    host_address: Option<String>,
    guest_address: Option<String>,
}

impl Peer {
    /// Starts QEMU and returns.
    pub fn boot(host: &Host, spec: &PeerSpec) -> Result<Self> {
        let tap = spec.tap();
        if let Some((_, subnet)) = spec.card {
            let line = format!(
                "ip link del {tap} 2> /dev/null; ip tuntap add dev {tap} mode tap vnet_hdr && \
                 ip addr add 10.77.{subnet}.1/24 dev {tap} && ip link set {tap} up"
            );
            host.check(&line, SHORT)?;
        }
        let name = &spec.name;
        let socket = format!("/run/{name}.console");
        host.check(&format!("rm -f {socket}"), SHORT)?;
        let started = Instant::now();
        let mut qemu = host.service(&format!("{}-{name}", host.name()), &spec.line())?;
        if let Err(error) = host.wait_for_path(&socket, SHORT) {
            bail!("{error:#}: {}", qemu.output()?);
        }
        let guest = Guest::attach(host, name, &socket, &format!("/run/{name}.log"), started)
            .with_context(|| qemu.output().unwrap_or_default())?;
        let address = |end: u8| spec.card.map(|(_, subnet)| format!("10.77.{subnet}.{end}"));
        Ok(Self { guest, qemu, host_address: address(1), guest_address: address(2) })
    }

    /// Starts QEMU and waits until the guest obeys.
    pub fn boot_ready(host: &Host, spec: &PeerSpec, limit: Duration) -> Result<Self> {
        let mut peer = Self::boot(host, spec)?;
        peer.wait_ready(limit)?;
        Ok(peer)
    }

    /// Waits until the guest obeys; the time that took from QEMU's start.
    pub fn wait_ready(&mut self, limit: Duration) -> Result<Duration> {
        self.guest.wait_ready(limit).with_context(|| self.qemu.output().unwrap_or_default())
    }

    /// The guest.
    pub fn guest(&self) -> &Guest {
        &self.guest
    }

    /// The host's address, as the guest reaches it.
    pub fn host_address(&self) -> Result<&str> {
        self.host_address.as_deref().context("the guest has no card")
    }

    /// The guest's address, as the host reaches it.
    pub fn guest_address(&self) -> Result<&str> {
        self.guest_address.as_deref().context("the guest has no card")
    }

    /// QEMU.
    pub fn vmm(&mut self) -> &mut Service {
        &mut self.qemu
    }

    /// Stops QEMU (SIGSTOP), so that it takes no time from others.
    pub fn freeze(&self) -> Result<()> {
        self.signal("STOP")
    }

    /// Lets it go on.
    pub fn thaw(&self) -> Result<()> {
        self.signal("CONT")
    }

    fn signal(&self, signal: &str) -> Result<()> {
        self.guest.host().check(&format!("kill -{signal} {}", self.qemu.id()?), SHORT).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn card_and_address_go_together() {
        let line = PeerSpec::new("a").with(Card::E1000, 3).line();
        assert!(line.contains("nic=e1000,10.77.3.2/24"), "{line}");
        assert!(line.contains("-device e1000,netdev=net,romfile=,mac=02:00:00:00:03:02"), "{line}");
        assert!(line.contains("ifname=tap-a,") && !line.contains("vhost"), "{line}");
    }

    #[test]
    fn hyperv_is_shown_only_where_asked_for() {
        assert!(!PeerSpec::new("a").line().contains("vmbus"));
        let hyperv = PeerSpec { hyperv: true, ..PeerSpec::new("a") }.line();
        assert!(hyperv.contains("hv-synic") && hyperv.contains("vmbus-bridge"), "{hyperv}");
    }
}
