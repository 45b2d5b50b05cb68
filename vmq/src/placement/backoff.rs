//! How long to leave a placement alone after it was changed: longer each time the change did not last.

/// Ticks to wait at least: ten seconds.
const BASE_TICKS: u32 = 40;
/// The wait doubles this often: to five minutes, the longest that an uneven load should have to bear.
const MAX_LEVEL: u32 = 5;
/// A change that outlives this many of its waits was right, and the next wait is short again. Together with the longest wait
/// this bounds the changes under any load: one in 640 ticks in the long run.
const LASTING_WAITS: u32 = 16;

/// A wait that doubles with each change that soon needed another.
#[derive(Debug, Clone, Default)]
pub(super) struct Backoff {
    level: u32,
    remaining: u32,
    /// Ticks since the last change, if there was one.
    since: Option<u32>,
}

impl Backoff {
    /// Time passes.
    pub(super) fn tick(&mut self) {
        self.remaining = self.remaining.saturating_sub(1);
        self.since = self.since.map(|ticks| ticks.saturating_add(1));
    }

    /// Whether another change may be made.
    pub(super) fn is_over(&self) -> bool {
        self.remaining == 0
    }

    /// The last change turns out not to fit any more: wait longer next time if it was recent, the base wait if it lasted.
    pub(super) fn reversed(&mut self) {
        let lasting = LASTING_WAITS * self.wait();
        self.level = match self.since {
            Some(ticks) if ticks < lasting => (self.level + 1).min(MAX_LEVEL),
            _ => 0,
        };
    }

    /// A change is made now.
    pub(super) fn acted(&mut self) {
        self.since = Some(0);
        self.hold();
    }

    /// Starts the wait anew.
    pub(super) fn hold(&mut self) {
        self.remaining = self.wait();
    }

    fn wait(&self) -> u32 {
        BASE_TICKS << self.level
    }
}
