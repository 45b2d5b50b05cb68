//! A guest's network card and what QEMU connects it to.

use std::path::{Path, PathBuf};

/// Which end of the socket a program takes; the other program takes the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It connects, and connects again whenever the connection is lost.
    Client,
    /// It listens. QEMU and testpmd then wait for the switch before they start.
    Server,
}

/// What carries the card's frames.
#[derive(Debug, Clone)]
pub enum Backend {
    /// A vhost-user switch.
    VhostUser {
        /// The socket.
        path: PathBuf,
        /// QEMU's role.
        role: Role,
    },
    /// A TAP device that exists.
    Tap {
        /// Its name.
        name: String,
        /// Whether the kernel's vhost-net moves the frames.
        vhost: bool,
    },
}

/// A virtio-net card: "eth0" for the first of a guest, and so on.
#[derive(Debug, Clone)]
pub struct Nic {
    /// What carries its frames.
    pub backend: Backend,
    /// Its address.
    pub mac: String,
    /// Queue pairs.
    pub queues: u16,
    /// Descriptors in each ring.
    pub queue_size: u16,
    /// Whether packed rings are offered.
    pub packed: bool,
    /// The MTU announced to the guest (VIRTIO_NET_F_MTU).
    pub host_mtu: Option<u16>,
    /// More properties of QEMU's device, such as "csum=off" or "guest_tso4=off".
    pub properties: Vec<String>,
}

impl Nic {
    /// A card with one queue pair, split rings of 256 and every offload offered.
    pub fn new(backend: Backend, mac: &str) -> Self {
        let mac = mac.to_owned();
        Self {
            backend,
            mac,
            queues: 1,
            queue_size: 256,
            packed: false,
            host_mtu: None,
            properties: Vec::new(),
        }
    }

    /// A card of a vhost-user switch.
    pub fn vhost_user(path: impl AsRef<Path>, role: Role, mac: &str) -> Self {
        Self::new(Backend::VhostUser { path: path.as_ref().to_path_buf(), role }, mac)
    }

    /// QEMU's options for the card with this index.
    pub fn arguments(&self, index: usize) -> Vec<String> {
        let mut arguments = Vec::new();
        match &self.backend {
            Backend::VhostUser { path, role } => {
                let role = match role {
                    Role::Client => "reconnect=1",
                    Role::Server => "server=on,wait=off",
                };
                arguments.push("-chardev".to_owned());
                arguments.push(format!("socket,id=switch{index},path={},{role}", path.display()));
                arguments.push("-netdev".to_owned());
                arguments
                    .push(format!("vhost-user,id=net{index},chardev=switch{index},queues={}", self.queues));
            }
            Backend::Tap { name, vhost } => {
                let vhost = if *vhost { "on" } else { "off" };
                arguments.push("-netdev".to_owned());
                arguments.push(format!(
                    "tap,id=net{index},ifname={name},script=no,downscript=no,vhost={vhost},queues={}",
                    self.queues
                ));
            }
        }
        arguments.extend(["-device".to_owned(), self.device(index)]);
        arguments
    }

    fn device(&self, index: usize) -> String {
        // vectors=0: QEMU 7.2 crashes with vhost-user and MSI-X under its software CPU.
        let mut device = format!("virtio-net-pci,netdev=net{index},mac={},vectors=0", self.mac);
        device.push_str(&format!(",rx_queue_size={0},tx_queue_size={0}", self.queue_size));
        if self.queues > 1 {
            device.push_str(",mq=on");
        }
        if self.packed {
            device.push_str(",packed=on");
        }
        if let Some(mtu) = self.host_mtu {
            device.push_str(&format!(",host_mtu={mtu}"));
        }
        for property in &self.properties {
            device.push(',');
            device.push_str(property);
        }
        device
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn multi_queue_packed_card_spells_every_option() {
        let mut nic = Nic::vhost_user("/tmp/a.sock", Role::Client, "02:00:00:00:00:0a");
        nic.queues = 2;
        nic.packed = true;
        nic.host_mtu = Some(9000);
        nic.properties.push("guest_tso4=off".to_owned());
        let arguments = nic.arguments(3);
        assert_eq!(arguments[1], "socket,id=switch3,path=/tmp/a.sock,reconnect=1");
        assert_eq!(arguments[3], "vhost-user,id=net3,chardev=switch3,queues=2");
        assert_eq!(
            arguments[5],
            "virtio-net-pci,netdev=net3,mac=02:00:00:00:00:0a,vectors=0,rx_queue_size=256,tx_queue_size=256,\
             mq=on,packed=on,host_mtu=9000,guest_tso4=off"
        );
    }
}
