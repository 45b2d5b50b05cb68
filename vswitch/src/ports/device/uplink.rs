//! Uplinks: a network device of the host, by packet socket (AF_PACKET).
//!
//! The switch sees what the device receives beside the host's own stack, and sends through it. VLAN tags that the kernel
//! takes off on receipt are put back.

use std::sync::Arc;

use vmq::os::{self, packet};
use vmq::uring::{Link, Reader, Tuning, Writer};

use super::{DeviceError, DeviceQueue, DeviceSink, DeviceSource, kernel_accepts, setup};

/// How an uplink is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Sockets that share the device's frames by flow.
    pub queues: u16,
    /// Raises the device's MTU to this if it is smaller. It is never lowered: the host uses the device too.
    pub mtu: u16,
    /// See [`packet::Flags::bypass`].
    pub bypass: bool,
    /// How frames are moved.
    pub tuning: Tuning,
}

impl Options {
    /// One queue.
    pub fn new(mtu: u16) -> Self {
        Self { queues: 1, mtu, bypass: false, tuning: Tuning::default() }
    }
}

/// Opens the network device `name` as an uplink and sets it up.
///
/// # Errors
/// [`DeviceError::Setup`] says what could not be done: no such device, no permission, or an MTU beyond its range.
pub fn open(name: &str, options: &Options) -> Result<Vec<DeviceQueue>, DeviceError> {
    let device: Arc<str> = name.into();
    let mtu = os::mtu(name).map_err(setup(&device, "find"))?;
    if mtu < i32::from(options.mtu) {
        os::set_mtu(name, options.mtu).map_err(setup(&device, "set the MTU of"))?;
    }
    os::set_up(name, true).map_err(setup(&device, "set up"))?;
    let flags = packet::Flags { header: true, bypass: options.bypass };
    let open = || packet::open(name, flags).map_err(setup(&device, "open"));
    let sockets = (0..options.queues.max(1)).map(|_| open()).collect::<Result<Vec<_>, _>>()?;
    if sockets.len() > 1 {
        packet::share(&sockets).map_err(setup(&device, "share the frames of"))?;
    }
    let accepts = kernel_accepts();
    let queue = |fd| {
        let fd = Arc::new(fd);
        let reader = Reader::new(Arc::clone(&fd), Link::Packet, options.tuning);
        let writer = Writer::new(fd, Link::Packet, options.tuning);
        (
            DeviceSource::new(Arc::clone(&device), Link::Packet, reader),
            DeviceSink::new(Arc::clone(&device), Link::Packet, accepts, writer),
        )
    };
    Ok(sockets.into_iter().map(queue).collect())
}
