//! TAP devices: a network interface of the host, or of a container, whose wire ends in the switch.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use vmq::os::{self, tap};
use vmq::uring::{Link, Reader, Tuning, Writer};

use super::{DeviceError, DeviceQueue, DeviceSink, DeviceSource, kernel_accepts, setup};
use crate::spec::TapSpec;

/// How long a busy device is waited for.
const PATIENCE: Duration = Duration::from_millis(300);

/// How a TAP device is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Queues; for inherited descriptors there is one queue for each of them instead.
    pub queues: u16,
    /// The device's MTU.
    pub mtu: u16,
    /// Take partial checksums and large frames from the host.
    pub offloads: bool,
    /// See [`tap::Flags::napi`]. Off by default, because it costs and, with one frame a write, coalesces nothing.
    pub napi: bool,
    /// How frames are moved.
    pub tuning: Tuning,
}

impl Options {
    /// One queue, with all offloads.
    pub fn new(mtu: u16) -> Self {
        Self { queues: 1, mtu, offloads: true, napi: false, tuning: Tuning::default() }
    }
}

/// Opens a TAP device, which is made if `spec` names one that does not exist, sets its MTU and sets it up. A device that
/// was made ends with its last queue.
///
/// A device that came by descriptors may be in another network namespace; then MTU and state are left to whoever made it.
///
/// # Errors
/// [`DeviceError::Setup`] says what could not be done: no permission, a device of another kind or with other queues, one
/// in use.
pub fn open(spec: &TapSpec, options: &Options) -> Result<Vec<DeviceQueue>, DeviceError> {
    let (fds, named) = match spec {
        TapSpec::Name(name) => (open_name(name, options)?, true),
        TapSpec::Fds(numbers) => (adopt(numbers)?, false),
    };
    let mut queues = Vec::with_capacity(fds.len());
    for (device, fd) in fds {
        let info = tap::prepare(fd.as_fd()).map_err(setup(&device, "use"))?;
        tap::set_offloads(fd.as_fd(), options.offloads);
        let device: Arc<str> = info.name.into();
        if queues.is_empty() {
            configure(&device, named, options.mtu)?;
        }
        let fd = Arc::new(fd);
        let reader = Reader::new(Arc::clone(&fd), Link::Tap, options.tuning);
        let writer = Writer::new(fd, Link::Tap, options.tuning);
        queues.push((
            DeviceSource::new(Arc::clone(&device), Link::Tap, reader),
            DeviceSink::new(device, Link::Tap, kernel_accepts(), writer),
        ));
    }
    Ok(queues)
}

fn open_name(name: &str, options: &Options) -> Result<Vec<(Arc<str>, OwnedFd)>, DeviceError> {
    let device: Arc<str> = name.into();
    let flags = tap::Flags { multi_queue: options.queues > 1, napi: options.napi };
    let first = match open_patiently(name, flags) {
        // It exists, and was made with several queues.
        Err(error) if error.kind() == io::ErrorKind::InvalidInput && !flags.multi_queue => {
            open_patiently(name, tap::Flags { multi_queue: true, ..flags })
        }
        result => result,
    };
    let mut fds = vec![first.map_err(setup(&device, "open"))?];
    for _ in 1..options.queues {
        fds.push(open_patiently(name, flags).map_err(setup(&device, "open another queue of"))?);
    }
    Ok(fds.into_iter().map(|fd| (Arc::clone(&device), fd)).collect())
}

/// Opens a queue. One that is busy may be free in a moment: a daemon that was killed, or a child process between `fork`
/// and `exec`, holds its descriptors a little longer.
fn open_patiently(name: &str, flags: tap::Flags) -> io::Result<OwnedFd> {
    let end = Instant::now() + PATIENCE;
    loop {
        match tap::open(name, flags) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(5));
            }
            result => return result,
        }
    }
}

fn adopt(numbers: &[i32]) -> Result<Vec<(Arc<str>, OwnedFd)>, DeviceError> {
    let adopt = |&number: &i32| {
        let device: Arc<str> = format!("fd {number}").into();
        let fd = tap::adopt(number).map_err(setup(&device, "use"))?;
        Ok((device, fd))
    };
    numbers.iter().map(adopt).collect()
}

fn configure(device: &Arc<str>, named: bool, mtu: u16) -> Result<(), DeviceError> {
    let elsewhere = |error: &io::Error| !named && error.raw_os_error() == Some(Errno::NODEV.raw_os_error());
    for (action, result) in
        [("set the MTU of", os::set_mtu(device, mtu)), ("set up", os::set_up(device, true))]
    {
        match result {
            Err(error) if !elsewhere(&error) => return Err(setup(device, action)(error)),
            _ => {}
        }
    }
    Ok(())
}
