//! The socket to the switch: it connects to us, one at a time, and again after its own restart.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use vmbus::handover::{FromVmm, HandoverError, Listener, VmmConnection};

use super::Ask;

/// A switch that reads nothing for so long is as good as gone.
const PATIENCE: Duration = Duration::from_secs(5);

/// What a switch has said and nobody has listened to, at most.
const UNHEARD: usize = 1024;

/// Before another attempt to take a switch in.
const RETRY: Duration = Duration::from_millis(100);

/// Dropped when what goes with it has been heard.
#[derive(Debug, Clone, Default)]
pub(super) struct Unheard(Arc<()>);

/// A connected switch.
#[derive(Debug, Clone)]
pub(super) struct Link {
    /// Unlike any before.
    pub number: u64,
    connection: Arc<VmmConnection>,
}

impl Link {
    pub fn new(number: u64, connection: VmmConnection) -> Self {
        Self { number, connection: Arc::new(connection) }
    }

    /// Sends a message. A connection that fails is ended; its reader reports that.
    pub fn send(&self, message: &FromVmm) {
        if let Err(error) = self.connection.send(message) {
            tracing::warn!(%error, "the switch takes no messages; its connection is ended");
            self.end();
        }
    }

    /// Asks the switch to end the connection, once it touches nothing any more.
    pub fn hang_up(&self) {
        self.connection.hang_up();
    }

    pub fn end(&self) {
        self.connection.shutdown();
    }

    /// Passes on what the switch says until it is gone. A switch that says more than is listened to waits.
    pub fn read(&self, asks: &Sender<Ask>) {
        let unheard = Unheard::default();
        loop {
            while Arc::strong_count(&unheard.0) > UNHEARD {
                std::thread::sleep(Duration::from_millis(1));
            }
            match self.connection.receive() {
                Ok(Some(said)) => {
                    if asks.send(Ask::SwitchSaid(self.number, said, unheard.clone())).is_err() {
                        return;
                    }
                }
                Ok(None) => break,
                Err(error) => {
                    tracing::warn!(%error, "the switch is not understood; its connection is ended");
                    break;
                }
            }
        }
        self.end();
        let _ = asks.send(Ask::SwitchLeft(self.number));
    }
}

/// Starts the thread that takes switches in.
pub(super) fn listen(
    listener: OwnedFd,
    asks: Sender<Ask>,
    confine: fn() -> std::io::Result<()>,
) -> std::io::Result<()> {
    let listener = Listener::from(listener);
    let accept = move || {
        for number in 1.. {
            let connection = match listener.accept() {
                Ok(connection) => connection,
                Err(HandoverError::Io(error @ (Errno::BADF | Errno::INVAL | Errno::NOTSOCK))) => {
                    tracing::error!(%error, "no switch can connect any more");
                    return;
                }
                // Out of descriptors, or it has gone again: the next may have more luck.
                Err(error) => {
                    tracing::debug!(%error, "a switch cannot connect");
                    std::thread::sleep(RETRY);
                    continue;
                }
            };
            if set_socket_timeout(&connection, Timeout::Send, Some(PATIENCE)).is_err() {
                continue;
            }
            let link = Link::new(number, connection);
            if asks.send(Ask::SwitchCame(link.clone())).is_err() {
                return;
            }
            link.read(&asks);
        }
    };
    crate::confine::spawn("switch", confine, accept)?;
    Ok(())
}
