//! The switch, as VMs need it.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use hypervisor::control::NicKind;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use vmq::worker::Activity;
use vswitch::error::FabricError;
use vswitch::fabric::{Fabric, PortChange};
use vswitch::spec::{Attachment, PortSpec};

use netvsp::control::NicConfig;
use netvsp::service::{Link, LinkError};
use vswitch::backend::BackendPort;

use super::network::{Channels, Network, Nics, OnEnd};
use super::spec::{NicSpec, port_name};

/// Speed that guests are told, in Mbit/s: what the usual synthetic adapter shows. Nothing is held back to it.
const LINK_MBPS: u64 = 10_000;

/// Ports and channels of a real switch.
#[derive(Debug)]
pub struct Wiring {
    fabric: Arc<Fabric>,
}

impl Wiring {
    /// Those of `fabric`.
    pub fn new(fabric: Arc<Fabric>) -> Self {
        Self { fabric }
    }
}

/// The port of `vm`'s adapter.
///
/// # Errors
/// The adapter's address is none.
pub fn port(vm: &str, nic: &NicSpec) -> Result<PortSpec, FabricError> {
    let (vm_name, nic_name) = (vm.to_owned(), nic.name.clone());
    let attachment = match nic.kind {
        NicKind::Synthetic => Attachment::Synthetic { vm: vm_name, nic: nic_name, queues: nic.queues },
        NicKind::Legacy => Attachment::Legacy { vm: vm_name, nic: nic_name },
    };
    let mac = nic.mac.parse().map_err(|error| FabricError::invalid("mac", format!("{error}")))?;
    Ok(PortSpec {
        mtu: nic.mtu,
        mac: Some(mac),
        spoofing: nic.spoofing,
        vlan: nic.vlan.clone(),
        private: nic.private,
        address_limit: nic.address_limit,
        offloads: nic.offloads,
        coalesce: nic.coalesce,
        ..PortSpec::new(port_name(vm, &nic.name), attachment)
    })
}

impl Network for Wiring {
    fn plug(&self, vm: &str, nic: &NicSpec) -> Result<(), FabricError> {
        self.fabric.add_port(&nic.switch, port(vm, nic)?)
    }

    fn unplug(&self, vm: &str, nic: &NicSpec) -> Result<(), FabricError> {
        self.fabric.remove_port(&nic.switch, &port_name(vm, &nic.name))
    }

    fn change(&self, vm: &str, nic: &NicSpec, change: PortChange) -> Result<(), FabricError> {
        self.fabric.change_port(&nic.switch, &port_name(vm, &nic.name), change)
    }

    fn activity(&self) -> Vec<(usize, Activity)> {
        let activity = |state| match state {
            "polling" => Activity::Polling,
            "asleep" => Activity::Asleep,
            _ => Activity::Parked,
        };
        self.fabric.report().workers.iter().map(|worker| (worker.cpu, activity(worker.state))).collect()
    }

    fn connect_legacy(&self, vm: &str, nic: &NicSpec) -> Result<OwnedFd, FabricError> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None);
        let (ours, theirs) = pair.map_err(|error| FabricError::failed("a socket pair", error))?;
        self.fabric.connect_legacy(&nic.switch, &port_name(vm, &nic.name), ours)?;
        Ok(theirs)
    }

    fn serve_channels(
        &self,
        vm: &str,
        nics: Nics,
        socket: &Path,
        on_end: OnEnd,
    ) -> Result<Box<dyn Channels>, String> {
        let (fabric, vm) = (Arc::clone(&self.fabric), vm.to_owned());
        let resolve = move |name: &str| {
            let nic = nics.find(name)?;
            let port = fabric.backend(&nic.switch, &port_name(&vm, name)).ok()?;
            let config = config(&nic, &port)?;
            Some((port, config))
        };
        let ended = move |error: Option<LinkError>| {
            on_end(error.map_or_else(|| "the worker closed the connection".into(), in_full));
        };
        let link = Link::connect(socket, Box::new(resolve), Box::new(ended)).map_err(in_full)?;
        Ok(Box::new(link))
    }
}

impl Channels for Link {
    fn set_link(&self, nic: &str, up: bool) -> bool {
        self.set_link(nic, up)
    }
}

/// An error with its causes.
fn in_full(error: LinkError) -> String {
    format!("{:#}", anyhow::Error::from(error))
}

/// An adapter as its device model is to show it: what the operator wants of the port now.
fn config(nic: &NicSpec, port: &BackendPort) -> Option<NicConfig> {
    let settings = port.settings();
    Some(NicConfig {
        mac: settings.mac.or_else(|| nic.mac.parse().ok())?,
        mtu: settings.mtu,
        queues: settings.queues,
        offloads: settings.offloads,
        rsc: settings.coalesce,
        link_mbps: LINK_MBPS,
        name: nic.name.clone(),
        spoofing: settings.spoofing,
    })
}
