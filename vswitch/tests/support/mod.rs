//! What test binaries of their own share.

use vmq::doorbell::Doorbell;
use vswitch::ports::vhost_user::features::Negotiated;
use vswitch::ports::vhost_user::queue::ActiveRing;
use vswitch::ports::vhost_user::session::Rings;

/// A port whose clients bring no rings.
pub struct NoRings;

impl Rings for NoRings {
    fn install(&mut self, _: usize, _: ActiveRing, _: bool) {}

    fn remove(&mut self, _: usize) -> Option<ActiveRing> {
        None
    }

    fn set_enabled(&mut self, _: usize, _: bool) {}

    fn set_call(&mut self, _: usize, _: Option<Doorbell>) {}

    fn negotiated(&mut self, _: &Negotiated) {}
}
