//! Heartbeat: the guest answers every two seconds, or it hangs.

use std::time::Duration;

use vmbus::guid::{Guid, interface};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::framing::{Event, Kind, Link, Version};
use super::{Contact, Mistake, Moment, Outbox, Service, instance};
use crate::control;

/// Between two beats.
pub const PERIOD: Duration = Duration::from_secs(2);
/// A guest that owes an answer for this long is lost.
pub const LOST: Duration = Duration::from_secs(10);

const VERSIONS: [Version; 2] = [Version::new(1, 0), Version::new(3, 0)];

/// Body of a heartbeat.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Beat {
    /// The guest adds 1.
    pub sequence: U64,
    /// 0; where some guests say how their programs are.
    pub reserved: [U32; 8],
}

const _: () = assert!(size_of::<Beat>() == 40);

/// The service.
#[derive(Debug)]
pub struct Heartbeat {
    link: Link,
    sequence: u64,
    due: Moment,
    /// When the guest last answered, on this channel or one before.
    beat: Option<Moment>,
}

impl Heartbeat {
    /// Before any contact.
    pub const fn new() -> Self {
        Self { link: Link::new(Kind::Heartbeat, &VERSIONS), sequence: 0, due: Moment::START, beat: None }
    }

    /// How the guest is. What the guest did wrong is not known here: see [`super::Services::status`].
    pub fn state(&self, now: Moment) -> control::Heartbeat {
        match (self.link.contact(), self.link.asked_since()) {
            (Contact::Incompatible, _) => control::Heartbeat::Error,
            (Contact::Ready(_), Some(since)) if now.since(since) >= LOST => control::Heartbeat::Lost,
            (Contact::Ready(_), _) => control::Heartbeat::Ok,
            (_, _) if self.beat.is_some_and(|beat| now.since(beat) >= LOST) => control::Heartbeat::Lost,
            _ => control::Heartbeat::NoContact,
        }
    }
}

impl Default for Heartbeat {
    fn default() -> Self {
        Self::new()
    }
}

impl Service for Heartbeat {
    fn name(&self) -> &'static str {
        "heartbeat"
    }

    fn interface(&self) -> Guid {
        interface::HEARTBEAT
    }

    fn instance(&self) -> Guid {
        instance::HEARTBEAT
    }

    fn contact(&self) -> Contact {
        self.link.contact()
    }

    fn opened(&mut self, now: Moment) {
        self.link.opened();
        self.due = now;
    }

    fn closed(&mut self) {
        self.link.closed();
    }

    fn reset(&mut self) {
        self.closed();
        self.beat = None;
    }

    fn receive(
        &mut self,
        packet: &[u8],
        transaction: u64,
        _out: &mut Outbox,
        now: Moment,
    ) -> Result<(), Mistake> {
        if let Event::Reply { body, .. } = self.link.receive(packet, transaction)? {
            let (beat, _) = super::take::<Beat>(body)?;
            let expected = self.sequence.wrapping_add(1);
            let found = beat.sequence.get();
            if found != expected {
                return Err(Mistake::Differs { field: "sequence", found, expected });
            }
            self.sequence = expected;
            self.beat = Some(now);
        }
        Ok(())
    }

    fn tick(&mut self, out: &mut Outbox, now: Moment) -> Option<Moment> {
        self.link.negotiate(out, now);
        if !self.link.is_ready() {
            return None;
        }
        if now >= self.due {
            let beat = Beat { sequence: U64::new(self.sequence), reserved: [U32::ZERO; 8] };
            self.link.ask(beat.as_bytes(), out, now);
            self.due = now + PERIOD;
        }
        Some(self.due)
    }
}
