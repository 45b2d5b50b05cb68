//! Network devices of the host: [`tap`] (the host itself, a container) and [`uplink`] (the network beyond), and a
//! [`socket`] behind which another process plays a device.
//!
//! Both are descriptors that carry a frame a system call, behind a virtio-net header, so offloads pass through as they
//! are: a frame of 64 KiB that one side's TCP sends is one read here, one write there, and is never cut. The kernel
//! copies twice (out of its buffers into a [`DeviceSource`]'s, then from there, or from a guest's memory, into buffers
//! of the receiver), and nothing is copied between.
//!
//! What measurements said (`examples/tap_relay`, two cores, Linux 6.18; medians, side by side):
//!
//! | question | answer |
//! |---|---|
//! | io_uring or plain calls | +19 % at 60 B (1.33 against 1.12 Mpps TAP to TAP, one core), +11 % at 1514 B; nothing for 64 KiB frames |
//! | frames a batch: 8, 16, 32, 64 | 1.17, 1.21, 1.27, 1.33 Mpps at 60 B |
//! | bytes a batch, 64 KiB to 2 MiB | no difference beyond the noise for 64 KiB frames; 256 KiB keeps the buffers in L2 |
//! | large frames off | TCP falls to a fifth |
//! | `IFF_NAPI` | −15 % at 60 B; nothing, or less than nothing, for TCP |
//! | transmit queue of 100 instead of 1000 frames | nothing |
//! | sleeping after 20 polls in vain, instead of polling | +10 % for TCP if sender and receiver may use the core meanwhile |
//!
//! Against Linux' bridge with veth, TCP in one stream reaches 0.7 of its rate: the bridge passes the sender's pages on,
//! so bytes are copied twice in all, and often on one core; here they are copied four times and change cores twice. The
//! relay's core spends 0.17 s a gigabyte, more than half of it in the kernel's copies.
//!
//! A receive ring shared with the kernel (TPACKET_V3) was not made, nor measured: it would save uplinks the system call
//! of a frame, of which batches have taken their share already, but not the copy; it hands a block over when it is full
//! or a millisecond old, and each block needs room for 64 KiB.

pub mod socket;
pub mod tap;
pub mod uplink;

mod sink;
mod source;
#[cfg(test)]
pub(crate) mod tests;

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
