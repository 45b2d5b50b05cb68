//! A vhost-user client's rings, put into the port's queues as its session sets them up.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vmq::Mac;
use vmq::doorbell::Doorbell;
use vmq::worker::Clock;

use crate::drops::DropReason;
use crate::port::PortCore;
use crate::ports::vhost_user::features::Negotiated;
use crate::ports::vhost_user::queue::ActiveRing;
use crate::ports::vhost_user::session::Rings;
use crate::queue::{Sink, SinkQueue, Source, SourceQueue};
use crate::report::PortState;

/// What the control plane wants to know of a client.
#[derive(Debug, Default)]
pub(super) struct GuestStatus {
    /// One bit per queue that the client enabled to receive.
    pub(super) enabled: AtomicU64,
    /// What was negotiated, in words.
    pub(super) features: Mutex<Vec<String>>,
}

/// The rings of one port, as its session sees them. Even indices are receive rings, odd ones transmit rings.
pub(super) struct GuestRings {
    pub(super) core: Arc<PortCore>,
    pub(super) sources: Vec<Arc<SourceQueue>>,
    pub(super) sinks: Vec<Arc<SinkQueue>>,
    pub(super) status: Arc<GuestStatus>,
    /// Receive rings that are set up and not enabled. Transmit rings are the workers' all the same.
    pub(super) disabled: Vec<Option<ActiveRing>>,
    /// The workers' clock.
    pub(super) clock: Clock,
}

impl GuestRings {
    fn start(&mut self, index: usize, ring: ActiveRing) {
        let queue = index / 2;
        if index.is_multiple_of(2) {
            if let Some(sink) = self.sinks.get(queue) {
                let mut ring = ring;
                // Buffers are taken when there are frames for them; their arrival is no news.
                ring.disarm();
                sink.swap(Sink::Ring(Box::new(ring)));
                self.status.enabled.fetch_or(1 << queue, Ordering::SeqCst);
                self.core.changed();
            }
        } else if let Some(source) = self.sources.get(queue) {
            let enabled = ring.enabled;
            source.swap(Source::Ring(Box::new(ring)));
            self.core.nudge(queue);
            if !enabled {
                return;
            }
        }
        self.core.set_state(PortState::Up);
    }

    fn stop(&mut self, index: usize) -> Option<ActiveRing> {
        let queue = index / 2;
        if index.is_multiple_of(2) {
            let sink = self.sinks.get(queue)?;
            let reason = if self.core.is_faulted() { DropReason::Faulted } else { DropReason::NotReady };
            let removed = sink.swap(Sink::Absent(reason));
            // Also if a fault has emptied the queue already: the next client may have fewer.
            self.status.enabled.fetch_and(!(1 << queue), Ordering::SeqCst);
            self.core.changed();
            match removed {
                Sink::Ring(ring) => Some(*ring),
                _ => None,
            }
        } else {
            let removed = self.sources.get(queue)?.swap(Source::Absent);
            // The worker lets go of the doorbell.
            self.core.nudge(queue);
            match removed {
                Source::Ring(ring) => Some(*ring),
                _ => None,
            }
        }
    }
}

impl Rings for GuestRings {
    fn install(&mut self, index: usize, mut ring: ActiveRing, enabled: bool) {
        ring.enabled = enabled;
        if enabled || !index.is_multiple_of(2) {
            self.start(index, ring);
        } else if let Some(place) = self.disabled.get_mut(index) {
            *place = Some(ring);
        }
    }

    fn remove(&mut self, index: usize) -> Option<ActiveRing> {
        let disabled = self.disabled.get_mut(index).and_then(Option::take);
        disabled.or_else(|| self.stop(index))
    }

    fn set_enabled(&mut self, index: usize, enabled: bool) {
        if !index.is_multiple_of(2) {
            if let Some(source) = self.sources.get(index / 2) {
                source.set_enabled(enabled);
            }
            if enabled {
                self.core.set_state(PortState::Up);
            }
        } else if enabled {
            if let Some(ring) = self.disabled.get_mut(index).and_then(Option::take) {
                self.start(index, ring);
            }
        } else if let Some(ring) = self.stop(index)
            && let Some(place) = self.disabled.get_mut(index)
        {
            *place = Some(ring);
        }
    }

    fn set_call(&mut self, index: usize, call: Option<Doorbell>) {
        if let Some(Some(ring)) = self.disabled.get_mut(index) {
            ring.call = call;
            return;
        }
        let queue = index / 2;
        if index.is_multiple_of(2) {
            if let Some(sink) = self.sinks.get(queue) {
                sink.with(|sink| {
                    if let Sink::Ring(ring) = sink {
                        ring.call = call;
                    }
                });
            }
        } else if let Some(source) = self.sources.get(queue) {
            source.with(|source| {
                if let Source::Ring(ring) = source {
                    ring.call = call;
                }
            });
        }
    }

    fn fault(&mut self, reason: String) {
        self.core.fault(reason);
    }

    /// A guest that came here by migration is announced with a reverse ARP request, as QEMU would have sent it: this
    /// switch and those behind its uplinks learn where the address is now.
    fn announce(&mut self, mac: Mac) {
        if let Some(source) = self.sources.first() {
            source.inject(&reverse_arp(mac), self.clock.now());
        }
    }

    fn negotiated(&mut self, negotiated: &Negotiated) {
        *self.status.features.lock().unwrap_or_else(PoisonError::into_inner) = negotiated.features.names();
    }
}

/// A reverse ARP request of a station for its own address (RFC 903), padded to the shortest frame.
pub(super) fn reverse_arp(Mac(mac): Mac) -> [u8; 60] {
    let mut frame = [0; 60];
    frame[..6].fill(0xff);
    frame[6..12].copy_from_slice(&mac);
    // Type; Ethernet and IPv4 with their address lengths; operation 3.
    frame[12..22].copy_from_slice(&[0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
    frame[22..28].copy_from_slice(&mac);
    frame[32..38].copy_from_slice(&mac);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn announcement_is_a_reverse_arp_request() {
        let frame = reverse_arp(Mac([2, 0, 0, 0, 0, 9]));
        let packet = etherparse::Ethernet2Slice::from_slice_without_fcs(&frame).unwrap();
        assert_eq!(packet.source(), [2, 0, 0, 0, 0, 9]);
        assert_eq!(packet.destination(), [0xff; 6]);
        assert_eq!(packet.ether_type(), etherparse::EtherType(0x8035));
        let body = [0, 1, 8, 0, 6, 4, 0, 3, 2, 0, 0, 0, 0, 9, 0, 0, 0, 0, 2, 0, 0, 0, 0, 9, 0, 0, 0, 0];
        assert_eq!(packet.payload_slice()[..28], body);
    }
}
