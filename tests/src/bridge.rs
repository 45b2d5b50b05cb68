//! The kernel's own switch, to compare with: a Linux bridge with a veth pair into each namespace.

use anyhow::Result;

use crate::janitor;
use crate::lab::{Lab, serial};
use crate::netns::Netns;

/// A bridge in a namespace of its own.
#[derive(Debug)]
pub struct LinuxBridge {
    namespace: Netns,
}

impl LinuxBridge {
    /// An empty bridge without spanning tree.
    pub fn new(lab: &Lab) -> Result<Self> {
        let namespace = Netns::new(lab, "bridge")?.without_ipv6()?;
        namespace.ip("link add bridge type bridge stp_state 0")?;
        namespace.ip("link set bridge up")?;
        Ok(Self { namespace })
    }

    /// Where the bridge is, as the device "bridge".
    pub fn namespace(&self) -> &Netns {
        &self.namespace
    }

    /// Gives `namespace` a veth device named "eth0" with this address and MTU, its other end in the bridge.
    pub fn connect(&self, namespace: &Netns, address: &str, mtu: u32) -> Result<()> {
        let (near, far) = veth_pair()?;
        self.namespace.take(&near)?;
        self.namespace.ip(&format!("link set {near} mtu {mtu} master bridge up"))?;
        namespace.take(&far)?;
        namespace.ip(&format!("link set {far} name eth0 mtu {mtu}"))?;
        namespace.ip(&format!("addr add {address} dev eth0"))?;
        namespace.ip("link set eth0 up")?;
        Ok(())
    }
}

/// A pair of veth devices on the host, with unique names. Deleted with the namespaces they move to, or when
/// this program ends.
pub fn veth_pair() -> Result<(String, String)> {
    let serial = serial();
    let near = format!("yv{}-{serial}a", std::process::id() % 100_000);
    let far = format!("yv{}-{serial}b", std::process::id() % 100_000);
    crate::process::words(&format!("ip link add {near} type veth peer name {far}"))?;
    janitor::at_exit(&format!("ip link del {near}"))?;
    Ok((near, far))
}
