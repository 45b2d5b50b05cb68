//! The adapter's thread: frames from the cable, frames that the cable did not take at once, and interrupts when their time
//! has come.

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Instant;

use rustix::buffer::spare_capacity;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::interrupt::Line;
use super::registers::{BPTC, CAUSE_TXDW, CAUSE_TXQE, GOTC, GPTC, MPTC, TOT, TPT, TSCTC};
use super::ring::E1000Fault;
use super::transmit::{Backlog, LONGEST, Transmitter, VNET};
use super::{Core, Shared, octets};

/// Frames in a row before the lock is given up: a virtual processor may wait for it.
const BATCH: usize = 16;

/// What the thread waits for.
struct Plan {
    cable: Option<Arc<OwnedFd>>,
    events: PollFlags,
    until: Option<Instant>,
}

/// Frames sent, for the statistics.
#[derive(Debug, Default)]
struct Sent {
    frames: u32,
    bytes: usize,
    broadcast: u32,
    multicast: u32,
}

impl Sent {
    fn count(&mut self, frame: &[u8]) {
        self.frames += 1;
        self.bytes += octets(frame.len());
        match frame.first_chunk::<6>() {
            Some([0xff, 0xff, 0xff, 0xff, 0xff, 0xff]) => self.broadcast += 1,
            Some([first, ..]) if first & 1 != 0 => self.multicast += 1,
            _ => {}
        }
    }
}

impl Core {
    fn count_sent(&mut self, sent: &Sent) {
        [GPTC, TPT].into_iter().for_each(|register| self.count(register, sent.frames));
        [GOTC, TOT].into_iter().for_each(|register| self.count_bytes(register, sent.bytes));
        self.count(BPTC, sent.broadcast);
        self.count(MPTC, sent.multicast);
    }

    fn plan(&mut self) -> Plan {
        // What comes while the link is down is lost then, and not delivered later.
        self.listening = self.down && !self.held || self.receives() && self.receive.available() > 0;
        let (mut events, mut until) = (PollFlags::empty(), self.alarm.filter(|_| !self.held));
        events.set(PollFlags::IN, self.listening);
        match self.backlog {
            Backlog::Blocked if self.transmits() && self.link() => events |= PollFlags::OUT,
            Backlog::Blocked | Backlog::More if self.transmits() => until = Some(Instant::now()),
            _ => {}
        }
        Plan { cable: self.cable.clone().filter(|_| !self.held), events, until }
    }

    /// The cable is still the one that was waited for.
    fn has(&self, cable: &Arc<OwnedFd>) -> bool {
        self.cable.as_ref().is_some_and(|now| Arc::ptr_eq(now, cable))
    }
}

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Brings the interrupt line up to date. True if the thread must be told when to look again.
    pub(super) fn update_line(&self, core: &mut Core) -> bool {
        if core.held {
            return false;
        }
        let line = core.interrupts.line(Instant::now(), core.line);
        let (high, again) = match line {
            Line::Low => (false, None),
            Line::High => (true, None),
            Line::At(moment) => (false, Some(moment)),
        };
        core.line = high;
        let level = high && !core.forbidden;
        if core.pin != level {
            core.pin = level;
            self.line.set(level);
        }
        let before = std::mem::replace(&mut core.alarm, again);
        // A thread that wakes too early only looks; one that is set already need not be told.
        again.is_some_and(|again| before.is_none_or(|before| before > again))
    }

    /// Does what came of an access or a frame. True if the thread must be told.
    pub(super) fn settle(&self, core: &mut Core, outcome: Result<(), E1000Fault>) -> bool {
        if let Err(fault) = outcome
            && !core.dead
        {
            core.dead = true;
            (self.on_fault.0)(&fault);
        }
        self.update_line(core)
    }

    pub(super) fn transmitter(&self) -> MutexGuard<'_, Transmitter> {
        self.transmitter.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn run(&self) {
        let mut message = Vec::with_capacity(VNET + LONGEST + 4);
        while !self.ended.load(Ordering::SeqCst) {
            let plan = self.lock().plan();
            let seen = self.wait(&plan);
            if let Some(cable) = &plan.cable {
                self.look_at(cable, seen, &mut message);
            }
            self.send_frames();
        }
    }

    fn look_at(&self, cable: &Arc<OwnedFd>, seen: PollFlags, message: &mut Vec<u8>) {
        if seen.contains(PollFlags::IN) {
            self.take_frames(cable, message);
        } else if seen.intersects(PollFlags::HUP | PollFlags::ERR) {
            let mut core = self.lock();
            // A cable that was pulled meanwhile is not looked at any more.
            if core.has(cable) {
                core.unplug();
            }
        }
    }

    /// Sends what the guest gave, as far as the cable takes it, and brings the line up to date.
    pub(super) fn send_frames(&self) {
        let mut transmitter = self.transmitter();
        let mut core = self.lock();
        if core.backlog == Backlog::None || !core.transmits() {
            self.update_line(&mut core);
            return;
        }
        let (mut ring, tag) = (core.transmit, core.filters.strip.then_some(core.filters.tag));
        let cable = core.cable.clone().filter(|_| !core.down);
        drop(core);
        let mut sent = Sent::default();
        let mut send = |bytes: &[u8]| {
            let write = |cable| rustix::io::retry_on_intr(|| rustix::io::write(cable, bytes));
            // Without a link, or with nobody at its other end, frames are lost.
            let taken = cable.as_deref().map(write) != Some(Err(Errno::AGAIN));
            if taken {
                sent.count(&bytes[VNET..]);
            }
            taken
        };
        let turn = transmitter.run(&self.memory, &mut ring, tag, &mut send);
        let mut core = self.lock();
        // Nothing but the tail changed meanwhile: all else needs the transmitter.
        core.transmit.head = ring.head;
        core.count_sent(&sent);
        let outcome = turn.map(|turn| {
            let more = turn.backlog == Backlog::None && core.transmit.available() > 0;
            core.backlog = if more { Backlog::More } else { turn.backlog };
            core.count(TSCTC, turn.segmentations);
            let written_back = if turn.reported { CAUSE_TXDW } else { 0 };
            let empty = if core.backlog == Backlog::None { CAUSE_TXQE } else { 0 };
            core.interrupts.raise(written_back | empty);
        });
        self.settle(&mut core, outcome);
    }

    /// Takes frames from the cable, until there are none or a batch is full.
    pub(super) fn take_frames(&self, cable: &Arc<OwnedFd>, message: &mut Vec<u8>) {
        message.reserve(VNET + LONGEST + 4);
        for _ in 0..BATCH {
            message.clear();
            // Unlocked: virtual processors go on meanwhile.
            let result = rustix::io::retry_on_intr(|| rustix::io::read(cable, spare_capacity(message)));
            let mut core = self.lock();
            if !core.has(cable) {
                break;
            }
            let outcome = match result {
                Ok(0) => {
                    core.unplug();
                    break;
                }
                Err(_) => break,
                Ok(_) if core.down => continue,
                // A frame for a receiver that was stopped meanwhile is lost.
                Ok(_) if !core.receives() => break,
                Ok(_) => core.receive(&self.memory, message),
            };
            if outcome.is_err() {
                self.settle(&mut core, outcome);
            }
            if !core.receives() || core.receive.available() == 0 {
                break;
            }
        }
    }

    /// Waits for the cable, a wake-up or a moment; returns what the cable has.
    fn wait(&self, plan: &Plan) -> PollFlags {
        let mut fds = vec![PollFd::new(&self.wake, PollFlags::IN)];
        fds.extend(plan.cable.as_deref().map(|cable| PollFd::new(cable, plan.events)));
        let left = plan.until.map(|until| until.saturating_duration_since(Instant::now()));
        let timeout = left.and_then(|left| Timespec::try_from(left).ok());
        // Interrupted or not: everything is looked at again.
        let _ = poll(&mut fds, timeout.as_ref());
        if fds.first().is_some_and(|wake| !wake.revents().is_empty()) {
            self.wake.clear();
        }
        fds.get(1).map_or(PollFlags::empty(), |cable| cable.revents())
    }
}
