//! An open channel as a device sees it: two rings, a doorbell, an interrupt.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arc_swap::ArcSwapOption;
use vmq::doorbell::{Doorbell, NotADoorbell};
use vmq::memory::GuestMemory;

use crate::pages::{Pages, SharedWord};
use crate::ring::{Incoming, Outgoing, RingFault};

/// Event flags of one SINT on one virtual processor, in bits. Channel ids are below it.
pub const EVENT_FLAGS: u16 = 2048;

/// Both directions of a channel, and how its two sides wake each other.
#[derive(Debug)]
pub struct OpenChannel {
    /// Guest to host.
    pub incoming: Incoming,
    /// Host to guest.
    pub outgoing: Outgoing,
    /// Rung by the guest.
    pub doorbell: Arc<Doorbell>,
    /// Interrupts the guest.
    pub interrupt: Interrupt,
}

/// Why a channel cannot be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChannelError {
    /// The second ring starts at no page of the GPADL, or leaves a ring without data.
    #[error("rings of {pages} pages cannot be split at page {downstream_page}")]
    Split {
        /// Pages of the GPADL.
        pages: u32,
        /// Where the host-to-guest ring was said to start.
        downstream_page: u32,
    },
    /// A ring's indices make no sense.
    #[error(transparent)]
    Ring(#[from] RingFault),
}

impl OpenChannel {
    /// Opens a channel over its ring GPADL, whose pages from `downstream_page` on are the host-to-guest ring.
    ///
    /// A channel that is not `fresh` was served by a predecessor that may have died at any point: its rings go on where
    /// they stand, and the guest is interrupted once, since its last interrupt may have been decided and not sent.
    ///
    /// # Errors
    /// The pages make no two rings, or their indices make no sense.
    pub fn new(
        gpadl: &Pages,
        downstream_page: u32,
        doorbell: Arc<Doorbell>,
        interrupt: Interrupt,
        fresh: bool,
    ) -> Result<Self, ChannelError> {
        let pages = gpadl.count();
        if downstream_page < 2 || pages.saturating_sub(downstream_page) < 2 {
            return Err(ChannelError::Split { pages, downstream_page });
        }
        let incoming = Incoming::new(&gpadl.pages(0, downstream_page), fresh)?;
        let outgoing = Outgoing::new(&gpadl.pages(downstream_page, pages), fresh)?;
        if !fresh {
            interrupt.signal_again();
        }
        Ok(Self { incoming, outgoing, doorbell, interrupt })
    }
}

/// Where a channel's interrupts go: an event flag, and an eventfd that raises the vector of its SINT.
#[derive(Debug)]
pub struct InterruptTarget {
    /// Guest-physical address of the 256 bytes of event flags of the SINT, in the processor's SIEF page.
    pub flags_gpa: u64,
    /// Bit among them, below [`EVENT_FLAGS`]: the channel's id.
    pub flag: u16,
    /// Written when the bit was clear before.
    pub eventfd: OwnedFd,
}

/// Why interrupts cannot go where they are to go.
#[derive(Debug, thiserror::Error)]
pub enum InterruptError {
    /// More than there are.
    #[error("event flag {0} of {EVENT_FLAGS}")]
    Flag(u16),
    /// The flags are not in guest memory.
    #[error("event flags at {0:#x} are not guest memory or not aligned")]
    NotMemory(u64),
    /// The descriptor is no eventfd.
    #[error(transparent)]
    Eventfd(#[from] NotADoorbell),
}

/// Whether the eventfds of a device's interrupts may be rung. One that makes us wait ([`Doorbell::is_broken`]) loses it for all
/// channels that share it: its VMM has more of them, and retargets interrupts whenever it likes.
#[derive(Debug, Clone, Default)]
pub struct Trust(Arc<AtomicBool>);

impl Trust {
    /// True if no eventfd is rung any more.
    #[inline]
    pub fn is_lost(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Has no eventfd rung any more.
    pub fn lose(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// The operator wants it tried again.
    pub fn restore(&self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

/// Interrupts the guest for a channel. Clones go to the same target, also after it changes.
///
/// Cost of a signal: one locked `or`, and a system call only if the guest has taken the last one.
#[derive(Debug, Clone)]
pub struct Interrupt {
    memory: Arc<GuestMemory>,
    line: Arc<ArcSwapOption<Line>>,
    trust: Trust,
}

#[derive(Debug)]
struct Line {
    flags: SharedWord,
    bit: u32,
    eventfd: Doorbell,
}

impl Interrupt {
    /// Interrupts that go to `target`, whose flags are in `memory`.
    ///
    /// # Errors
    /// The target makes no sense.
    pub fn new(memory: &Arc<GuestMemory>, target: InterruptTarget) -> Result<Self, InterruptError> {
        let interrupt = Self::disabled(memory);
        interrupt.retarget(target)?;
        Ok(interrupt)
    }

    /// Interrupts that go nowhere, until they get a target.
    pub fn disabled(memory: &Arc<GuestMemory>) -> Self {
        Self { memory: Arc::clone(memory), line: Arc::default(), trust: Trust::default() }
    }

    /// The same, rung only as long as `trust` is not lost.
    #[must_use]
    pub fn trusting(self, trust: &Trust) -> Self {
        Self { trust: trust.clone(), ..self }
    }

    /// True if trust is lost: the guest is not interrupted any more.
    #[inline]
    pub fn is_dead(&self) -> bool {
        self.trust.is_lost()
    }

    /// Takes an eventfd that made us wait for a good one again. It is set non-blocking anew.
    pub fn revive(&self) {
        let line = self.line.load_full().filter(|line| line.eventfd.is_broken());
        let Some(line) = line else { return };
        let again = line.eventfd.as_fd().try_clone_to_owned().ok();
        let Some(eventfd) = again.and_then(|fd| Doorbell::from_peer(fd).ok()) else { return };
        let mended = Arc::new(Line { flags: line.flags.clone(), bit: line.bit, eventfd });
        // Unless it was retargeted meanwhile.
        self.line.compare_and_swap(&line, Some(mended));
    }

    /// Sends interrupts to `target` from now on, and one at once: one that is being sent meanwhile goes to the old target,
    /// where nobody may listen any more. What it is about was visible before it was sent, so that the guest finds it.
    ///
    /// # Errors
    /// The target makes no sense; the old one stays.
    pub fn retarget(&self, target: InterruptTarget) -> Result<(), InterruptError> {
        self.aim(target.flags_gpa, target.flag, Doorbell::from_peer(target.eventfd)?)
    }

    /// As [`Interrupt::retarget`], with an eventfd of our own.
    ///
    /// # Errors
    /// The flags are not in memory; the old target stays.
    pub fn aim(&self, flags_gpa: u64, flag: u16, eventfd: Doorbell) -> Result<(), InterruptError> {
        if flag >= EVENT_FLAGS {
            return Err(InterruptError::Flag(flag));
        }
        let gpa = flags_gpa.checked_add(u64::from(flag / 32) * 4);
        let flags = gpa.and_then(|gpa| self.memory.word(gpa)).ok_or(InterruptError::NotMemory(flags_gpa))?;
        if self.line.swap(Some(Arc::new(Line { flags, bit: 1 << (flag % 32), eventfd }))).is_some() {
            self.signal_again();
        }
        Ok(())
    }

    /// Sends interrupts nowhere from now on.
    pub fn disable(&self) {
        self.line.store(None);
    }

    /// Interrupts the guest, unless it has not taken the last interrupt yet. True if the eventfd was rung.
    #[inline]
    pub fn signal(&self) -> bool {
        self.raise(false)
    }

    /// Interrupts the guest even if its flag is set: the one who set it may have died before the eventfd was rung.
    pub fn signal_again(&self) {
        self.raise(true);
    }

    #[inline]
    fn raise(&self, again: bool) -> bool {
        let line = self.line.load();
        let Some(line) = line.as_ref() else { return false };
        // Sequentially consistent: what the guest is to find is visible before the flag.
        let ring = line.flags.fetch_or(line.bit, Ordering::SeqCst) & line.bit == 0 || again;
        if !ring || self.trust.is_lost() {
            return false;
        }
        line.eventfd.ring();
        if line.eventfd.is_broken() {
            self.trust.lose();
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use vmq::memory::{Mapping, Region};

    use super::*;
    use crate::ring::{self, PacketBuffer, PacketHeader};

    fn memory(pages: u64) -> Arc<GuestMemory> {
        let len = usize::try_from(pages << 12).unwrap();
        let mapping = Arc::new(Mapping::memfd("guest", len).unwrap().0);
        let region = Region::new(0, 0, pages << 12, mapping, 0).unwrap();
        Arc::new(GuestMemory::new(vec![region], None).unwrap())
    }

    fn target(flags_gpa: u64, flag: u16) -> (InterruptTarget, Doorbell) {
        let theirs = Doorbell::new().unwrap();
        let eventfd = theirs.as_fd().try_clone_to_owned().unwrap();
        (InterruptTarget { flags_gpa, flag, eventfd }, theirs)
    }

    #[test]
    fn signal_sets_the_flag_and_rings_once_until_the_guest_clears_it() {
        let memory = memory(1);
        let (target, eventfd) = target(0x200, 37);
        let interrupt = Interrupt::new(&memory, target).unwrap();
        let flags = memory.word(0x204).unwrap();
        assert!(interrupt.signal() && eventfd.clear());
        assert_eq!(flags.load(Ordering::Acquire), 1 << 5);
        assert!(!interrupt.signal() && !eventfd.clear());
        interrupt.signal_again();
        assert!(eventfd.clear());
        flags.store(0, Ordering::Release);
        assert!(interrupt.signal() && eventfd.clear());
    }

    #[test]
    fn retargeted_interrupt_goes_to_the_new_processor_also_from_clones() {
        let memory = memory(1);
        let (first, first_eventfd) = target(0x200, 3);
        let (second, second_eventfd) = target(0x400, 3);
        let interrupt = Interrupt::new(&memory, first).unwrap();
        let clone = interrupt.clone();
        interrupt.retarget(second).unwrap();
        // What was sent to the first at the same moment may be lost there.
        assert!(second_eventfd.clear());
        memory.word(0x400).unwrap().store(0, Ordering::Release);
        assert!(clone.signal());
        assert!(!first_eventfd.clear() && second_eventfd.clear());
        assert_eq!(memory.word(0x200).unwrap().load(Ordering::Acquire), 0);
        assert_eq!(memory.word(0x400).unwrap().load(Ordering::Acquire), 8);
        interrupt.disable();
        assert!(!clone.signal() && !second_eventfd.clear());
    }

    #[test]
    fn signals_during_retargeting_each_reach_a_target() {
        let memory = memory(1);
        let lines: Vec<_> = (0..2u64).map(|i| memory.word(0x100 * i).unwrap()).collect();
        let interrupt = Interrupt::new(&memory, target(0, 0).0).unwrap();
        std::thread::scope(|scope| {
            let signalling = interrupt.clone();
            let sender = scope.spawn(move || {
                for _ in 0..20_000 {
                    signalling.signal();
                    let taken = lines.iter().map(|line| line.swap(0, Ordering::SeqCst)).sum::<u32>();
                    assert!(taken > 0, "a signal was lost");
                }
            });
            for round in 0..2000 {
                interrupt.retarget(target(0x100 * (round % 2), 0).0).unwrap();
            }
            sender.join().unwrap();
        });
    }

    /// Has what is written to `eventfd`, which was rung once, wait.
    fn stop_up(eventfd: &Doorbell) {
        rustix::io::ioctl_fionbio(eventfd, false).unwrap();
        rustix::io::write(eventfd, &(u64::MAX - 2).to_ne_bytes()).unwrap();
    }

    /// Each costs its ringer up to a fifth of a second.
    #[test]
    fn eventfd_that_makes_a_signal_wait_is_the_last_one_of_its_device_that_is_rung() {
        let memory = memory(1);
        let (flags, trust) = (memory.word(0).unwrap(), Trust::default());
        let interrupt = |number: u16| {
            let (target, eventfd) = target(0, number);
            (Interrupt::new(&memory, target).unwrap().trusting(&trust), eventfd)
        };
        let [(first, stopped), (second, good)] = [1, 2].map(interrupt);
        assert!(first.signal());
        stop_up(&stopped);
        flags.store(0, Ordering::SeqCst);
        // Rung, to no avail.
        assert!(first.signal());
        assert!(first.is_dead() && second.is_dead());
        let (other, retargeted) = target(0, 3);
        first.retarget(other).unwrap();
        assert!(!retargeted.clear(), "where it is retargeted to");
        assert!(!second.signal() && !good.clear(), "another channel's");
        trust.restore();
        second.signal_again();
        assert!(good.clear() && !second.is_dead());
    }

    #[test]
    fn eventfd_that_made_a_signal_wait_is_rung_again_when_it_is_revived() {
        let memory = memory(1);
        let (target, eventfd) = target(0, 1);
        let interrupt = Interrupt::new(&memory, target).unwrap();
        interrupt.signal_again();
        stop_up(&eventfd);
        interrupt.signal_again();
        rustix::io::ioctl_fionbio(&eventfd, true).unwrap();
        assert!(interrupt.is_dead() && eventfd.clear());
        interrupt.trust.restore();
        interrupt.signal_again();
        assert!(interrupt.is_dead() && !eventfd.clear(), "it is not known to be mended");
        interrupt.trust.restore();
        interrupt.revive();
        interrupt.signal_again();
        assert!(!interrupt.is_dead() && eventfd.clear());
    }

    #[test]
    fn target_outside_memory_or_flags_is_refused_and_the_old_one_stays() {
        let memory = memory(1);
        let (good, eventfd) = target(0xf00, 2047);
        let interrupt = Interrupt::new(&memory, good).unwrap();
        assert!(matches!(interrupt.retarget(target(0, 2048).0), Err(InterruptError::Flag(2048))));
        for gpa in [0x1000, 0xf04, 0xf01, u64::MAX, u64::MAX - 251] {
            let refused = interrupt.retarget(target(gpa, 2047).0);
            assert!(matches!(refused, Err(InterruptError::NotMemory(_))), "{gpa:#x}");
        }
        let (_, pipe) = std::io::pipe().unwrap();
        let no_eventfd = InterruptTarget { flags_gpa: 0, flag: 0, eventfd: pipe.into() };
        assert!(matches!(interrupt.retarget(no_eventfd), Err(InterruptError::Eventfd(_))));
        assert!(interrupt.signal() && eventfd.clear());
        assert_eq!(memory.word(0xffc).unwrap().load(Ordering::Acquire), 1 << 31);
    }

    #[test]
    fn rings_without_data_are_refused() {
        let pages = Pages::new(&memory(8), &[0, 1, 2, 3, 4]).unwrap();
        let interrupt = Interrupt::disabled(pages.memory());
        let open = |at| {
            let doorbell = Arc::new(Doorbell::new().unwrap());
            OpenChannel::new(&pages, at, doorbell, interrupt.clone(), true)
        };
        for at in [0, 1, 4, 5, u32::MAX] {
            assert!(matches!(open(at), Err(ChannelError::Split { .. })), "{at}");
        }
        assert_eq!(open(2).unwrap().outgoing.size(), 2 * 4096);
    }

    #[test]
    fn channel_taken_over_goes_on_where_it_stood_and_interrupts_the_guest() {
        let memory = memory(9);
        let gpadl = Pages::new(&memory, &[1, 2, 3, 4, 5, 6, 7, 8]).unwrap();
        let (up, down) = (gpadl.pages(0, 4), gpadl.pages(4, 4));
        assert!(ring::clear(&up) && ring::clear(&down));
        let (target, eventfd) = target(0, 9);
        let interrupt = Interrupt::new(&memory, target).unwrap();
        let open = |fresh| {
            let doorbell = Arc::new(Doorbell::new().unwrap());
            OpenChannel::new(&gpadl, 4, doorbell, interrupt.clone(), fresh).unwrap()
        };
        let mut guest = ring::GuestOutgoing::new(&up, true).unwrap();
        let mut buffer = PacketBuffer::new();
        let mut first = open(true);
        assert!(!eventfd.clear());
        for transaction in 0..3 {
            guest.write(&PacketHeader::in_band(transaction), &[b"hello"]).unwrap();
        }
        guest.publish();
        first.incoming.next(&mut buffer).unwrap().unwrap();
        first.incoming.commit();
        first.incoming.next(&mut buffer).unwrap().unwrap();
        interrupt.signal();
        assert!(eventfd.clear());
        // Killed: the second packet was taken and not committed, and the guest's flag is still set.
        drop(first);
        let mut second = open(false);
        assert!(eventfd.clear());
        assert_eq!(second.incoming.next(&mut buffer).unwrap().unwrap().transaction, 1);
        assert_eq!(second.incoming.next(&mut buffer).unwrap().unwrap().transaction, 2);
        assert_eq!(second.incoming.next(&mut buffer).unwrap(), None);
    }
}
