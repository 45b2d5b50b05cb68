//! The socket to the switch: it connects to us, one at a time, and again after its own restart.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use vmbus::handover::{FromVmm, Listener, VmmConnection};

use super::Ask;

/// A switch that reads nothing for so long is as good as gone.
const PATIENCE: Duration = Duration::from_secs(5);

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

    pub fn end(&self) {
        self.connection.shutdown();
    }

    /// Passes on what the switch says until it is gone.
    pub fn read(&self, asks: &Sender<Ask>) {
        loop {
            match self.connection.receive() {
                Ok(Some(said)) => {
                    if asks.send(Ask::SwitchSaid(self.number, said)).is_err() {
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
pub(super) fn listen(listener: OwnedFd, asks: Sender<Ask>) -> std::io::Result<()> {
    let listener = Listener::from(listener);
    let accept = move || {
        for number in 1.. {
            let connection = match listener.accept() {
                Ok(connection) => connection,
                Err(error) => {
                    tracing::error!(%error, "no switch can connect any more");
                    return;
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
    std::thread::Builder::new().name("switch".into()).spawn(accept)?;
    Ok(())
}
