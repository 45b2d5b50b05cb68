//! The services against a guest that is played here as Linux behaves, and against ones that do not.

mod balloon;
mod framing;
mod kvp;
mod pump;
mod simple;
mod vss;

use std::sync::Arc;
use std::time::Duration;

use super::framing::{HEADERS, Kind};
use super::shutdown::ShutdownKind;
use super::*;
use crate::control;

/// `seconds` after the start.
fn at(seconds: u64) -> Moment {
    Moment::START + Duration::from_secs(seconds)
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap())
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Edits a request into an answer as Linux's drivers do: negotiations by `preferred` message versions (best first) and
/// `frameworks`, all else by `answer`, which gets the whole message and returns its status.
fn linux(
    message: &mut [u8],
    frameworks: &[(u16, u16)],
    preferred: &[(u16, u16)],
    answer: impl FnOnce(&mut [u8]) -> u32,
) {
    if u16_at(message, 12) == Kind::Negotiate as u16 {
        let counts = (usize::from(u16_at(message, 28)), usize::from(u16_at(message, 30)));
        let version = |index: usize| (u16_at(message, 36 + 4 * index), u16_at(message, 38 + 4 * index));
        let offered: Vec<_> = (0..counts.0 + counts.1).map(version).collect();
        let pick = |list: &[(u16, u16)], offered: &[(u16, u16)]| {
            list.iter().find(|version| offered.contains(version)).copied()
        };
        let chosen = pick(frameworks, &offered[..counts.0]).zip(pick(preferred, &offered[counts.0..]));
        let count = u16::from(chosen.is_some()).to_le_bytes();
        message[28..30].copy_from_slice(&count);
        message[30..32].copy_from_slice(&count);
        if let Some(((a, b), (c, d))) = chosen {
            for (index, part) in [a, b, c, d].into_iter().enumerate() {
                message[36 + 2 * index..38 + 2 * index].copy_from_slice(&part.to_le_bytes());
            }
        }
        message[18] = 0x10;
    } else {
        let status = answer(message);
        message[20..24].copy_from_slice(&status.to_le_bytes());
    }
    message[25] = 5;
}

/// The only packet for the guest.
#[track_caller]
fn only(out: &mut Outbox) -> Packet {
    assert_eq!(out.len(), 1);
    out.pop().unwrap()
}

/// A service and its guest.
struct Play<S> {
    service: S,
    out: Outbox,
    frameworks: &'static [(u16, u16)],
    preferred: &'static [(u16, u16)],
}

impl<S: Service> Play<S> {
    fn new(service: S, preferred: &'static [(u16, u16)]) -> Self {
        Self { service, out: Outbox::default(), frameworks: &[(3, 0), (1, 0)], preferred }
    }

    /// Opens the channel, and lets the guest agree on versions.
    fn negotiated(mut self, now: Moment) -> Self {
        self.service.opened(now);
        self.tick(now);
        let request = only(&mut self.out);
        assert!(self.out.is_empty(), "nothing is sent before the versions are agreed on");
        self.answer(request, now, |_| unreachable!()).unwrap();
        assert!(matches!(self.service.contact(), Contact::Ready(_)));
        self
    }

    fn tick(&mut self, now: Moment) -> Option<Moment> {
        self.service.tick(&mut self.out, now)
    }

    /// The request that the service sends now.
    #[track_caller]
    fn request(&mut self, now: Moment) -> Packet {
        self.tick(now);
        only(&mut self.out)
    }

    fn silent(&mut self, now: Moment) -> bool {
        self.tick(now);
        self.out.is_empty()
    }

    /// The guest answers `request`.
    fn answer(
        &mut self,
        request: Packet,
        now: Moment,
        answer: impl FnOnce(&mut [u8]) -> u32,
    ) -> Result<(), Mistake> {
        let mut bytes = request.payload;
        linux(&mut bytes, self.frameworks, self.preferred, answer);
        bytes.resize(bytes.len().next_multiple_of(8), 0xee);
        self.service.receive(&bytes, request.transaction, &mut self.out, now)
    }
}

/// The body of a message.
fn body(packet: &Packet) -> &[u8] {
    &packet.payload[HEADERS..]
}
