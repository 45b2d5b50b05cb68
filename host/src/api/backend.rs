//! What the API needs of the switch, as a trait: tests put a small stand-in behind the same requests.

use std::time::Duration;

use vmq::Mac;
use vswitch::error::FabricError;
use vswitch::fabric::{Capture, CaptureSpec, CapturedFrame, Fabric, PortChange};
use vswitch::report::{AddressList, FabricReport};
use vswitch::spec::{PortSpec, SwitchSpec};

/// Outcome of a request to the switch.
pub type Outcome<T> = Result<T, FabricError>;

/// The switch, as [`Fabric`] offers it; each method is that of the same name. They may block for a short time.
#[expect(missing_docs, reason = "documented at `Fabric`")]
pub trait Backend: Send + Sync + 'static {
    fn report(&self) -> FabricReport;
    fn add_switch(&self, spec: SwitchSpec) -> Outcome<()>;
    fn remove_switch(&self, name: &str) -> Outcome<()>;
    fn add_port(&self, switch: &str, spec: PortSpec) -> Outcome<()>;
    fn remove_port(&self, switch: &str, port: &str) -> Outcome<()>;
    fn change_port(&self, switch: &str, port: &str, change: PortChange) -> Outcome<()>;
    fn restart_port(&self, switch: &str, port: &str) -> Outcome<()>;
    fn pin_queue(&self, switch: &str, port: &str, queue: u16, cpu: Option<usize>) -> Outcome<()>;
    fn addresses(&self, switch: &str, port: Option<&str>, limit: usize) -> Outcome<AddressList>;
    fn flush(&self, switch: &str, port: Option<&str>) -> Outcome<usize>;
    fn add_address(&self, switch: &str, port: &str, mac: Mac, vlan: u16) -> Outcome<()>;
    fn remove_address(&self, switch: &str, mac: Mac, vlan: u16) -> Outcome<()>;
    fn capture(&self, spec: CaptureSpec) -> Outcome<Box<dyn Recording>>;
}

/// A running capture, as [`Capture`] offers it.
#[expect(missing_docs, reason = "documented at `Capture`")]
pub trait Recording: Send {
    fn receive(&self, wait: Duration) -> Vec<CapturedFrame>;
    fn missed(&self) -> u64;
    fn ended(&self) -> bool;
}

impl Backend for Fabric {
    fn report(&self) -> FabricReport {
        self.report()
    }

    fn add_switch(&self, spec: SwitchSpec) -> Outcome<()> {
        self.add_switch(spec)
    }

    fn remove_switch(&self, name: &str) -> Outcome<()> {
        self.remove_switch(name)
    }

    fn add_port(&self, switch: &str, spec: PortSpec) -> Outcome<()> {
        self.add_port(switch, spec)
    }

    fn remove_port(&self, switch: &str, port: &str) -> Outcome<()> {
        self.remove_port(switch, port)
    }

    fn change_port(&self, switch: &str, port: &str, change: PortChange) -> Outcome<()> {
        self.change_port(switch, port, change)
    }

    fn restart_port(&self, switch: &str, port: &str) -> Outcome<()> {
        self.restart_port(switch, port)
    }

    fn pin_queue(&self, switch: &str, port: &str, queue: u16, cpu: Option<usize>) -> Outcome<()> {
        self.pin_queue(switch, port, queue, cpu)
    }

    fn addresses(&self, switch: &str, port: Option<&str>, limit: usize) -> Outcome<AddressList> {
        self.addresses(switch, port, limit)
    }

    fn flush(&self, switch: &str, port: Option<&str>) -> Outcome<usize> {
        self.flush(switch, port)
    }

    fn add_address(&self, switch: &str, port: &str, mac: Mac, vlan: u16) -> Outcome<()> {
        self.add_address(switch, port, mac, vlan)
    }

    fn remove_address(&self, switch: &str, mac: Mac, vlan: u16) -> Outcome<()> {
        self.remove_address(switch, mac, vlan)
    }

    fn capture(&self, spec: CaptureSpec) -> Outcome<Box<dyn Recording>> {
        Ok(Box::new(self.capture(spec)?))
    }
}

impl Recording for Capture {
    fn receive(&self, wait: Duration) -> Vec<CapturedFrame> {
        self.receive(wait)
    }

    fn missed(&self) -> u64 {
        self.missed()
    }

    fn ended(&self) -> bool {
        self.ended()
    }
}
