//! Network devices of the host: [`tap`] (the host itself, a container) and [`uplink`] (the network beyond).
//!
//! Both are descriptors that carry a frame a system call, behind a virtio-net header, so offloads pass through as they
//! are: a frame of 64 KiB that one side's TCP sends is one read here, one write there, and is never cut. The kernel
//! copies twice (out of its buffers into a [`DeviceSource`]'s, then from there, or from a guest's memory, into buffers
//! of the receiver), and nothing is copied between.

pub mod tap;
pub mod uplink;

mod sink;
mod source;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;

use vmq::frame::Accepts;
use vmq::os;

pub use sink::DeviceSink;
pub use source::DeviceSource;

/// A queue of a device, both directions.
pub type DeviceQueue = (DeviceSource, DeviceSink);

/// What is wrong with a device.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// It was deleted, or moved to another network namespace.
    #[error("device `{device}` is gone: it was deleted or moved to another network namespace")]
    Gone {
        /// Its name.
        device: Arc<str>,
    },
    /// It cannot be opened or set up.
    #[error("cannot {action} device `{device}`")]
    Setup {
        /// Its name, or `fd 5` for an inherited descriptor.
        device: Arc<str>,
        /// What was tried, as in "cannot … device".
        action: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// Reading from it failed in a way that will not pass.
    #[error("cannot receive from device `{device}`")]
    Receive {
        /// Its name.
        device: Arc<str>,
        /// Why not.
        source: io::Error,
    },
}

/// Makes an [`io::Error`] a [`DeviceError::Setup`].
fn setup<'a>(device: &'a Arc<str>, action: &'static str) -> impl Fn(io::Error) -> DeviceError + 'a {
    move |source| DeviceError::Setup { device: Arc::clone(device), action, source }
}

/// What the kernel takes with a frame: it checksums and segments for any device. It learnt UDP's with Linux 6.2.
fn kernel_accepts() -> Accepts {
    let udp = if os::kernel_version() >= (6, 2) { Accepts::UDP } else { Accepts::empty() };
    Accepts::CHECKSUM | Accepts::TCP4 | Accepts::TCP6 | Accepts::ECN | udp
}
