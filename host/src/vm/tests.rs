//! What the tests of this module share.

use hypervisor::control::{Memory, NicKind, Services};
use vswitch::spec::{PortSpec, VlanMode};

use super::identity;
use super::spec::{CpuSpec, LinkState, NicSpec, RestartPolicy, VmSpec};

/// A VM with one adapter.
pub fn spec(name: &str) -> VmSpec {
    let bytes = 64 << 20;
    VmSpec {
        name: name.to_owned(),
        memory: Memory { startup: bytes, minimum: bytes, maximum: bytes, huge: false },
        vcpus: 1,
        kernel: "/dev/null".into(),
        initrd: None,
        cmdline: "console=ttyS0".into(),
        nics: vec![NicSpec {
            name: "eth0".into(),
            switch: "lab".into(),
            kind: NicKind::Synthetic,
            mac: identity::mac(name, "eth0").to_string(),
            vlan: VlanMode::Passthrough,
            private: None,
            queues: 2,
            mtu: PortSpec::MTU,
            spoofing: false,
            address_limit: None,
            offloads: true,
            coalesce: true,
            link: LinkState::Up,
        }],
        cpu: CpuSpec::default(),
        services: Services::default(),
        restart: RestartPolicy::OnCrash,
        autostart: false,
    }
}
