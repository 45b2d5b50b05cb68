//! Interrupt causes, their mask, and throttling (manual, sections 13.4.17 to 13.4.21).

use std::time::{Duration, Instant};

/// Causes and what keeps them from the guest.
#[derive(Debug, Default)]
pub struct Interrupts {
    causes: u32,
    mask: u32,
    /// Least time between two interrupts.
    interval: Duration,
    last: Option<Instant>,
}

/// The state of the interrupt line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Line {
    /// Nothing to tell.
    Low,
    /// To be served.
    High,
    /// There is something, to be told at this moment.
    At(Instant),
}

/// Reads as set while any cause is pending and not masked.
const ASSERTED: u32 = 1 << 31;

impl Interrupts {
    /// Adds causes.
    pub fn raise(&mut self, causes: u32) {
        self.causes |= causes;
    }

    /// Reads and clears the causes.
    pub fn take(&mut self) -> u32 {
        let pending = self.causes & self.mask != 0;
        std::mem::take(&mut self.causes) | if pending { ASSERTED } else { 0 }
    }

    /// Clears the causes in `bits`.
    pub fn clear(&mut self, bits: u32) {
        self.causes &= !bits;
    }

    /// The mask.
    pub fn mask(&self) -> u32 {
        self.mask
    }

    /// Lets the causes in `bits` through.
    pub fn enable(&mut self, bits: u32) {
        self.mask |= bits;
    }

    /// Masks the causes in `bits`.
    pub fn disable(&mut self, bits: u32) {
        self.mask &= !bits;
    }

    /// Sets the least time between interrupts, in units of 256 ns.
    pub fn throttle(&mut self, units: u32) {
        self.interval = Duration::from_nanos(256) * (units & 0xffff);
    }

    /// Where the line is to be at `now`; `high` is where it is. An interrupt that is being served is not throttled.
    pub fn line(&mut self, now: Instant, high: bool) -> Line {
        if self.causes & self.mask == 0 {
            return Line::Low;
        }
        let due = self.last.map(|last| last + self.interval).filter(|&due| due > now && !high);
        match due {
            Some(due) => Line::At(due),
            None => {
                if !high {
                    self.last = Some(now);
                }
                Line::High
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cause_reaches_the_line_when_unmasked_and_leaves_it_when_read() {
        let (mut interrupts, now) = (Interrupts::default(), Instant::now());
        interrupts.raise(0x80);
        assert_eq!(interrupts.line(now, false), Line::Low);
        interrupts.enable(0x84);
        assert_eq!(interrupts.line(now, false), Line::High);
        assert_eq!(interrupts.take(), ASSERTED | 0x80);
        assert_eq!(interrupts.line(now, true), Line::Low);
        interrupts.raise(1);
        assert_eq!(interrupts.take(), 1, "masked causes are shown, and not as asserted");
    }

    #[test]
    fn throttled_interrupt_comes_when_its_time_has_come() {
        let (mut interrupts, now) = (Interrupts::default(), Instant::now());
        interrupts.enable(1);
        interrupts.throttle(1000);
        interrupts.raise(1);
        assert_eq!(interrupts.line(now, false), Line::High);
        interrupts.take();
        interrupts.raise(1);
        let due = now + Duration::from_micros(256);
        assert_eq!(interrupts.line(now + Duration::from_micros(1), false), Line::At(due));
        assert_eq!(interrupts.line(due, false), Line::High);
    }
}
