//! Ports made real: sockets, devices and files opened and put into a port's queues.

use std::sync::Arc;

use vmq::memory::Share;
use vmq::os;
use vmq::worker::Clock;

use crate::error::FabricError;
use crate::port::PortCore;
use crate::ports::device::{DeviceQueue, tap, uplink};
use crate::ports::vhost_user::server::{self, Control, EndpointId, PortEndpoint};
use crate::ports::vhost_user::session::SessionConfig;
use crate::queue::{Sink, Source};
use crate::report::PortState;
use crate::spec::{Attachment, PortSpec, SocketMode, TapSpec};

use super::guest::{GuestRings, GuestStatus};
use super::{Fabric, Port, backend};

/// What a port holds beside its queues.
#[derive(Debug)]
pub(super) enum Attached {
    /// A place in the vhost-user control thread.
    Guest(EndpointId, Arc<GuestStatus>),
    /// A device model plugs itself in.
    Backend(Arc<backend::Shared>),
    /// Devices and files live in the queues.
    Local,
}

impl Attachment {
    /// The word for it in configuration and reports.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::VhostUser { .. } => "vhost-user",
            Self::Tap { .. } => "tap",
            Self::Uplink { .. } => "uplink",
            Self::Synthetic { .. } => "synthetic",
            Self::Legacy { .. } => "legacy",
            Self::Pcap { .. } => "pcap",
        }
    }

    /// Queue pairs.
    pub fn queues(&self) -> u16 {
        match self {
            Self::VhostUser { queues, .. }
            | Self::Tap { queues, .. }
            | Self::Uplink { queues, .. }
            | Self::Synthetic { queues, .. } => *queues,
            Self::Legacy { .. } | Self::Pcap { .. } => 1,
        }
    }

    /// Socket, device or files.
    pub fn describe(&self) -> String {
        match self {
            Self::VhostUser { path, mode, .. } => {
                let mode = if *mode == SocketMode::Server { "server" } else { "client" };
                format!("{} ({mode})", path.display())
            }
            Self::Tap { tap: TapSpec::Name(name), .. } => name.clone(),
            Self::Tap { tap: TapSpec::Fds(fds), .. } => format!("descriptors {fds:?}"),
            Self::Uplink { device, .. } => device.clone(),
            Self::Synthetic { vm, nic, .. } | Self::Legacy { vm, nic } => format!("adapter {nic} of VM {vm}"),
            Self::Pcap { read, write, .. } => {
                let part = |what, path: &Option<std::path::PathBuf>| {
                    path.as_ref().map(|path| format!("{what} {}", path.display()))
                };
                [part("read", read), part("write", write)]
                    .into_iter()
                    .flatten()
                    .collect::<Vec<_>>()
                    .join(", ")
            }
        }
    }

    /// What a port that is not up waits for.
    pub(super) fn waits_for(&self) -> String {
        match self {
            Self::VhostUser { mode: SocketMode::Server, .. } => "a client to connect".into(),
            Self::VhostUser { mode: SocketMode::Client, .. } => "the socket to appear".into(),
            Self::Synthetic { .. } => "the guest's driver".into(),
            Self::Legacy { .. } => "its VM to start".into(),
            Self::Pcap { .. } => "its disk to answer".into(),
            Self::Tap { .. } | Self::Uplink { .. } => "its device".into(),
        }
    }
}

/// Registers a vhost-user port with the control thread, and makes place for a device model.
pub(super) fn guest(
    control: &Control,
    clock: Clock,
    core: &Arc<PortCore>,
    port: &Port,
) -> Result<Attached, FabricError> {
    let (path, mode, queues) = match &port.spec.attachment {
        Attachment::VhostUser { path, mode, queues } => (path, mode, queues),
        Attachment::Synthetic { .. } => {
            let shared = backend::Shared::default();
            shared.set(&port.spec);
            return Ok(Attached::Backend(Arc::new(shared)));
        }
        _ => return Ok(Attached::Local),
    };
    let share = Share::new()
        .ok_or_else(|| FabricError::invalid("port", "as many ports as there are memory mappings for"))?;
    let status = Arc::new(GuestStatus::default());
    let rings = GuestRings {
        core: Arc::clone(core),
        sources: port.sources.iter().map(|(_, source)| Arc::clone(source)).collect(),
        sinks: port.sinks.clone(),
        status: Arc::clone(&status),
        clock,
        disabled: (0..2 * usize::from(*queues)).map(|_| None).collect(),
    };
    let events = {
        let core = Arc::clone(core);
        move |event| match event {
            server::PortEvent::Waiting(what) => core.set_state(PortState::Waiting(what)),
            server::PortEvent::Connected => {
                core.set_state(PortState::Waiting("the client to set up its queues".into()));
            }
            server::PortEvent::Disconnected(Some(error)) => core.set_error(error),
            server::PortEvent::Disconnected(None) => {}
        }
    };
    let endpoint = PortEndpoint {
        path: path.clone(),
        mode: *mode,
        config: session_config(&port.spec, *queues),
        share: Some(share),
        rings: Box::new(rings),
        events: Box::new(events),
    };
    Ok(Attached::Guest(control.add(endpoint), status))
}

fn session_config(spec: &PortSpec, queues: u16) -> SessionConfig {
    SessionConfig { queues, mtu: spec.mtu, offloads: spec.offloads, mac: spec.mac, config_space: false }
}

/// Opens a TAP or uplink device and connects its queues.
pub(super) fn device(port: &Port) -> Result<(), FabricError> {
    let spec = &port.spec;
    let opened: Vec<DeviceQueue> = match &spec.attachment {
        Attachment::Tap { tap, queues } => {
            let options =
                tap::Options { queues: *queues, offloads: spec.offloads, ..tap::Options::new(spec.mtu) };
            tap::open(tap, &options)
        }
        Attachment::Uplink { device, queues } => {
            uplink::open(device, &uplink::Options { queues: *queues, ..uplink::Options::new(spec.mtu) })
        }
        _ => return Ok(()),
    }
    .map_err(|error| FabricError::failed(format!("opening {}", spec.attachment.describe()), error))?;
    for (((_, source), sink), (from, to)) in port.sources.iter().zip(&port.sinks).zip(opened) {
        sink.swap(Sink::Device(Box::new(to)));
        source.swap(Source::Device(Box::new(from)));
    }
    port.core.set_state(PortState::Up);
    Ok(())
}

impl Fabric {
    /// Gives the port's device the MTU, or its next client. A device that was handed over keeps the one it has until the
    /// port is restarted.
    pub(super) fn set_mtu(&self, port: &Port, mtu: u16) -> Result<(), FabricError> {
        let (name, raise) = match (&port.attached, &port.spec.attachment) {
            (Attached::Guest(endpoint, _), attachment) => {
                let config = session_config(&port.spec, attachment.queues());
                self.vhost.configure(*endpoint, SessionConfig { mtu, ..config });
                return Ok(());
            }
            (_, Attachment::Tap { tap: TapSpec::Name(name), .. }) => (name, false),
            // The network beyond may need more.
            (_, Attachment::Uplink { device, .. }) => (device, true),
            _ => return Ok(()),
        };
        // A restart sets it, too, once the device is there again.
        if port.core.is_faulted() || (raise && os::mtu(name).is_ok_and(|now| now >= i32::from(mtu))) {
            return Ok(());
        }
        os::set_mtu(name, mtu)
            .map_err(|error| FabricError::failed(format!("setting the MTU of device `{name}`"), error))
    }

    /// Connects a port that was just made, or that is restarted. A pcap port's files are connected when they are open.
    pub(super) fn attach(&self, port: &Port) -> Result<(), FabricError> {
        device(port)?;
        self.nudge(port);
        Ok(())
    }

    /// Workers look at the port's queues: there is something else in them now.
    pub(super) fn nudge(&self, port: &Port) {
        for &(task, _) in &port.sources {
            self.workers.nudge(task);
        }
    }
}
