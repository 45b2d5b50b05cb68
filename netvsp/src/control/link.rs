//! What a guest is told about its link (fact sheet §10): one event at a time, spaced.

use serde::{Deserialize, Serialize};
use vmq::worker::Nanos;

use crate::protocol::rndis::{self, Event};

/// Linux handles one link event in two seconds, and queues more.
const SPACING: Nanos = 2_000_000_000;

/// The link as it is.
#[derive(Debug)]
pub(super) struct Link {
    up: bool,
    mbps: u64,
    /// It was down, and up again before the guest could be told.
    flapped: bool,
    /// No event before.
    quiet_until: Nanos,
}

/// The link as the guest knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Told {
    pub(super) up: bool,
    pub(super) mbps: u64,
}

impl Link {
    pub(super) fn new(mbps: u64) -> Self {
        Self { up: true, mbps, flapped: false, quiet_until: 0 }
    }

    pub(super) fn set(&mut self, up: bool) {
        self.flapped |= self.up && !up;
        self.up = up;
    }

    pub(super) fn set_speed(&mut self, mbps: u64) {
        self.mbps = mbps;
    }

    /// What a guest that begins, or asks for the link's state, learns. It has missed nothing then.
    pub(super) fn tell(&mut self) -> Told {
        self.flapped = false;
        Told { up: self.up, mbps: self.mbps }
    }

    /// Its speed in Mbit/s.
    pub(super) fn mbps(&self) -> u64 {
        self.mbps
    }

    /// Whether it is up.
    pub(super) fn is_up(&self) -> bool {
        self.up
    }

    /// Its speed in units of 100 bit/s.
    pub(super) fn speed(&self) -> u32 {
        u32::try_from(self.mbps.saturating_mul(10_000)).unwrap_or(u32::MAX)
    }

    /// What the guest must still hear.
    fn event(&self, told: &Told, wants_speed: bool) -> Option<Event> {
        match (told.up, self.up) {
            (false, true) => Some(Event::MediaConnect),
            (true, false) => Some(Event::MediaDisconnect),
            (true, true) if self.flapped => Some(Event::NetworkChange),
            _ if wants_speed && told.mbps != self.mbps => Some(Event::LinkSpeedChange),
            _ => None,
        }
    }

    /// When there is something to tell, if there is.
    pub(super) fn due(&self, told: &Told, wants_speed: bool) -> Option<Nanos> {
        self.event(told, wants_speed).map(|_| self.quiet_until)
    }

    /// The next indication, if there is one and its time has come.
    pub(super) fn indicate(&mut self, told: &mut Told, wants_speed: bool, now: Nanos) -> Option<Vec<u8>> {
        let event = self.event(told, wants_speed).filter(|_| now >= self.quiet_until)?;
        self.quiet_until = now.saturating_add(SPACING);
        if event == Event::LinkSpeedChange {
            told.mbps = self.mbps;
            return Some(rndis::indicate(event, &self.speed().to_le_bytes()));
        }
        told.up = self.up;
        self.flapped = false;
        Some(rndis::indicate(event, &[]))
    }
}
