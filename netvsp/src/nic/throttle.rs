//! How many control requests a guest may make: each costs the switch's worker tens of microseconds, and some have all
//! ports told of a change. A driver makes a few dozen when it starts and hardly any later.

use std::sync::atomic::{AtomicU64, Ordering};

use vmq::worker::Nanos;

/// Time that a request is worth: 1000 in a second.
const PRICE: Nanos = 1_000_000;
/// Requests that may come at once.
const AT_ONCE: u64 = 256;

/// When all requests so far are paid for.
#[derive(Debug, Default)]
pub(super) struct Throttle(AtomicU64);

impl Throttle {
    /// There was a request.
    pub(super) fn count(&self, now: Nanos) {
        let paid = self.0.load(Ordering::Relaxed).max(now).saturating_add(PRICE);
        // Channels that count at the same moment may lose one.
        self.0.store(paid, Ordering::Relaxed);
    }

    /// When the next request may come, if that is not now.
    pub(super) fn until(&self, now: Nanos) -> Option<Nanos> {
        let next = self.0.load(Ordering::Relaxed).saturating_sub(AT_ONCE * PRICE);
        (next > now).then_some(next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_beyond_the_burst_wait_for_their_turn_and_rest_earns_a_burst() {
        let throttle = Throttle::default();
        let start = 1_000_000_000;
        for _ in 0..AT_ONCE {
            assert_eq!(throttle.until(start), None);
            throttle.count(start);
        }
        assert_eq!(throttle.until(start), None);
        throttle.count(start);
        assert_eq!(throttle.until(start), Some(start + PRICE));
        assert_eq!(throttle.until(start + PRICE), None);
        throttle.count(start + PRICE);
        assert_eq!(throttle.until(start + PRICE), Some(start + 2 * PRICE));
        let later = start + 2 * AT_ONCE * PRICE;
        throttle.count(later);
        assert_eq!(throttle.until(later), None);
    }
}
