#![allow(missing_docs, missing_debug_implementations, clippy::unimplemented, unused)]
pub mod device {
    use vmq::frame::{Accepts, Burst}; use crate::tally::Tally; use vmq::worker::Wait;
    #[derive(Debug)] pub struct DeviceSource; #[derive(Debug)] pub struct DeviceSink;
    #[derive(Debug, thiserror::Error)] #[error("x")] pub struct DeviceError;
    impl DeviceSource { pub fn receive<'m>(&'m mut self, b: &mut Burst<'m>, t: &mut Tally) -> Result<(), DeviceError> { Ok(()) } pub fn complete(&mut self) {} pub fn arm(&mut self) -> Wait { Wait::Nudge } }
    impl DeviceSink { pub fn put(&mut self, b: &Burst<'_>, l: &[u8], t: &mut Tally) -> Result<(), DeviceError> { Ok(()) } pub fn accepts(&self) -> Accepts { Accepts::empty() } }
    pub mod tap { use super::*; pub fn open(t: &crate::spec::TapSpec, q: u16, m: u16, o: bool) -> Result<Vec<(DeviceSource, DeviceSink)>, DeviceError> { Err(DeviceError) } }
    pub mod uplink { use super::*; pub fn open(t: &str, q: u16, m: u16) -> Result<Vec<(DeviceSource, DeviceSink)>, DeviceError> { Err(DeviceError) } }
}
pub mod session {
    use crate::ports::vhost_user::queue::ActiveRing; use vmq::doorbell::Doorbell;
    pub struct SessionConfig { pub queues: u16, pub mtu: u16, pub offloads: bool, pub mac: Option<[u8; 6]> }
    pub struct Negotiated; impl Negotiated { pub fn words(&self) -> Vec<String> { Vec::new() } }
    pub trait Rings { fn install(&mut self, index: usize, ring: ActiveRing, enabled: bool); fn remove(&mut self, index: usize) -> Option<ActiveRing>; fn set_enabled(&mut self, index: usize, enabled: bool); fn set_call(&mut self, index: usize, call: Option<Doorbell>); fn negotiated(&mut self, n: &Negotiated); }
}
pub mod server {
    use super::session::*;
    #[derive(Debug, Clone, Copy)] pub struct EndpointId(u64);
    pub enum EndpointEvent { Waiting(String), Connected, Disconnected(Option<String>) }
    pub struct PortEndpoint { pub path: std::path::PathBuf, pub mode: crate::spec::SocketMode, pub config: SessionConfig, pub rings: Box<dyn Rings + Send>, pub events: Box<dyn Fn(EndpointEvent) + Send> }
    #[derive(Debug)] pub struct Control;
    impl Control { pub fn start() -> std::io::Result<Self> { Ok(Self) } pub fn add(&self, e: PortEndpoint) -> std::io::Result<EndpointId> { Ok(EndpointId(0)) } pub fn remove(&self, id: EndpointId) {} pub fn restart(&self, id: EndpointId) {} pub fn fault(&self, id: EndpointId) {} }
}
