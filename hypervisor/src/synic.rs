//! Synthetic interrupt controllers of a guest, the half that KVM leaves to us: the message page and the event flags page of each
//! processor (`hyperv-cpuid-msr-hypercall.md` sections 5 and 6).
//!
//! KVM keeps the registers and delivers SINT vectors; writes of the guest to SCONTROL, SIEFP and SIMP exit to us.

#![forbid(unsafe_code)]

use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError};

use vmq::doorbell::Doorbell;
use vmq::memory::GuestMemory;

/// The synthetic interrupt source of VMBus: messages and channel events.
pub const SINT: u32 = 2;

/// Bytes of a SINT's slot in the message page and of its flags in the event flags page.
const SLOT: u64 = 256;

// A type, a size with flags, a sender, a payload; and one bit for each of the event flags.
const _: () = assert!(SLOT == 16 + crate::hypercall::PAYLOAD as u64);
const _: () = assert!(SLOT * 8 == vmbus::channel::EVENT_FLAGS as u64);

/// Type of a message that a guest or host port posted.
const MESSAGE_TYPE: u32 = 1;

/// In the word behind the type: the guest is to write EOM once the slot is free.
const PENDING: u32 = 1 << 8;

/// Enable bit of SCONTROL, SIEFP and SIMP.
const ENABLED: u64 = 1;

/// Registers of one processor.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Registers {
    /// SCONTROL.
    pub control: u64,
    /// SIEFP.
    pub flags_page: u64,
    /// SIMP.
    pub message_page: u64,
}

impl Registers {
    fn page(control: u64, register: u64) -> Option<u64> {
        (control & ENABLED != 0 && register & ENABLED != 0).then_some(register & !0xfff)
    }

    /// Where the event flags of VMBus are, if they are enabled.
    pub fn flags(&self) -> Option<u64> {
        Some(Self::page(self.control, self.flags_page)?.wrapping_add(u64::from(SINT) * SLOT))
    }

    fn message(&self) -> Option<u64> {
        Some(Self::page(self.control, self.message_page)?.wrapping_add(u64::from(SINT) * SLOT))
    }
}

/// What became of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Posted {
    /// In the slot, the guest is interrupted.
    Done,
    /// The guest has not taken the last one yet.
    Busy,
    /// The guest has no message page, or one outside its memory.
    Off,
}

#[derive(Debug)]
struct Processor {
    registers: Mutex<Registers>,
    interrupt: Arc<Doorbell>,
}

/// The controllers of all processors.
#[derive(Debug)]
pub struct Synic {
    memory: Arc<GuestMemory>,
    processors: Vec<Processor>,
}

impl Synic {
    /// Controllers of as many processors, all off.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn new(memory: Arc<GuestMemory>, processors: u32) -> std::io::Result<Self> {
        let processor =
            |_| Ok(Processor { registers: Mutex::default(), interrupt: Arc::new(Doorbell::new()?) });
        let processors = (0..processors).map(processor).collect::<std::io::Result<_>>()?;
        Ok(Self { memory, processors })
    }

    /// The eventfd that raises SINT 2 of a processor (once it is tied to it).
    pub fn interrupt(&self, vp: u32) -> Option<&Arc<Doorbell>> {
        Some(&self.processors.get(usize::try_from(vp).ok()?)?.interrupt)
    }

    /// Registers of a processor.
    pub fn registers(&self, vp: u32) -> Option<Registers> {
        let processor = self.processors.get(usize::try_from(vp).ok()?)?;
        Some(*processor.registers.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Takes over what the guest wrote, before its processor goes on. Pages that were not there before start zeroed, as on
    /// Hyper-V. Returns true if anything changed.
    pub fn update(&self, vp: u32, new: Registers) -> bool {
        let Some(processor) = usize::try_from(vp).ok().and_then(|vp| self.processors.get(vp)) else {
            return false;
        };
        let mut registers = processor.registers.lock().unwrap_or_else(PoisonError::into_inner);
        let old = std::mem::replace(&mut *registers, new);
        for (before, after) in [(old.flags_page, new.flags_page), (old.message_page, new.message_page)] {
            if after & ENABLED != 0
                && before != after
                && let Some(room) = self.memory.room(after & !0xfff, 4096)
            {
                room.write(&[0; 4096]);
            }
        }
        old != new
    }

    /// Puts a message of at most 240 bytes into the slot of SINT 2 and interrupts the processor. `more`: others wait behind it.
    pub fn post(&self, vp: u32, payload: &[u8], more: bool) -> Posted {
        self.try_post(vp, payload, more).unwrap_or(Posted::Off)
    }

    fn try_post(&self, vp: u32, payload: &[u8], more: bool) -> Option<Posted> {
        let slot = self.registers(vp)?.message()?;
        let (kind, size) = (self.memory.word(slot)?, self.memory.word(slot.checked_add(4)?)?);
        if kind.load(Ordering::Acquire) != 0 {
            size.fetch_or(PENDING, Ordering::SeqCst);
            fence(Ordering::SeqCst);
            // The guest may have freed the slot before it could see the bit.
            if kind.load(Ordering::SeqCst) != 0 {
                return Some(Posted::Busy);
            }
        }
        let room = self.memory.room(slot.checked_add(8)?, 248)?;
        room.write(&[0; 8]).write(payload);
        let len = u32::try_from(payload.len().min(crate::hypercall::PAYLOAD)).ok()?;
        size.store(len | if more { PENDING } else { 0 }, Ordering::Relaxed);
        kind.store(MESSAGE_TYPE, Ordering::Release);
        self.interrupt(vp)?.ring();
        Some(Posted::Done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmq::memory::{Mapping, Region};

    fn synic() -> (Synic, Arc<GuestMemory>) {
        let mapping = Arc::new(Mapping::memfd("guest", 0x4000).unwrap().0);
        let region = Region::new(0, 0, 0x4000, mapping, 0).unwrap();
        let memory = Arc::new(GuestMemory::new(vec![region], None).unwrap());
        (Synic::new(Arc::clone(&memory), 2).unwrap(), memory)
    }

    fn on() -> Registers {
        Registers { control: 1, flags_page: 0x2001, message_page: 0x3001 }
    }

    #[test]
    fn message_lies_in_the_slot_of_sint_2_and_interrupts() {
        let (synic, memory) = synic();
        assert!(synic.update(1, on()));
        assert_eq!(synic.post(1, &[7; 20], false), Posted::Done);
        let slot: [u8; 40] = memory.segment(0x3200, 40).unwrap().read().unwrap();
        assert_eq!(slot[..16], [1, 0, 0, 0, 20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(slot[16..], [[7; 20].as_slice(), &[0; 4]].concat());
        assert!(synic.interrupt(1).unwrap().clear());
        assert!(!synic.interrupt(0).unwrap().clear());
    }

    #[test]
    fn full_slot_is_marked_pending_and_left_alone() {
        let (synic, memory) = synic();
        synic.update(0, on());
        assert_eq!(synic.post(0, &[1; 8], true), Posted::Done);
        assert_eq!(memory.word(0x3204).unwrap().load(Ordering::SeqCst), 8 | PENDING);
        assert_eq!(synic.post(0, &[2; 8], false), Posted::Busy);
        assert_eq!(memory.segment(0x3210, 8).unwrap().read(), Some([1; 8]));
        memory.word(0x3200).unwrap().store(0, Ordering::SeqCst);
        assert_eq!(synic.post(0, &[2; 8], false), Posted::Done);
        assert_eq!(memory.word(0x3204).unwrap().load(Ordering::SeqCst), 8);
    }

    #[test]
    fn pages_are_zeroed_when_they_are_enabled_and_not_again() {
        let (synic, memory) = synic();
        memory.room(0x2000, 0x1000).unwrap().write(&[0xff; 0x1000]);
        synic.update(0, Registers { message_page: 0, ..on() });
        assert_eq!(memory.segment(0x2ff8, 8).unwrap().read(), Some([0; 8]));
        assert_eq!(memory.segment(0x3000, 8).unwrap().read(), Some([0; 8]));
        memory.word(0x2200).unwrap().store(5, Ordering::SeqCst);
        synic.update(0, on());
        assert_eq!(memory.word(0x2200).unwrap().load(Ordering::SeqCst), 5);
        assert!(!synic.update(0, on()));
    }

    #[test]
    fn disabled_or_absent_pages_take_nothing() {
        let (synic, _) = synic();
        for registers in [
            Registers::default(),
            Registers { control: 0, ..on() },
            Registers { message_page: 0x3000, ..on() },
            Registers { message_page: 0x4001, ..on() },
            Registers { message_page: u64::MAX, ..on() },
        ] {
            synic.update(0, registers);
            assert_eq!(synic.post(0, &[1], false), Posted::Off, "{registers:x?}");
        }
        assert_eq!(synic.post(2, &[1], false), Posted::Off);
        assert_eq!(on().flags(), Some(0x2200));
        assert_eq!(Registers { control: 0, ..on() }.flags(), None);
    }

    /// Memory ends within the message page, or begins there: a slot is there as a whole or not at all.
    #[test]
    fn message_page_at_an_edge_of_memory_takes_a_message_or_nothing() {
        for (len, slot_is_there) in [(0x1200, false), (0x12fc, false), (0x1300, true)] {
            let mapping = Arc::new(Mapping::memfd("guest", 0x2000).unwrap().0);
            let region = Region::new(0, 0, len, mapping, 0).unwrap();
            let memory = Arc::new(GuestMemory::new(vec![region], None).unwrap());
            let synic = Synic::new(Arc::clone(&memory), 1).unwrap();
            synic.update(0, Registers { control: 1, flags_page: 0x1001, message_page: 0x1001 });
            let expected = if slot_is_there { Posted::Done } else { Posted::Off };
            assert_eq!(synic.post(0, &[1; 240], false), expected, "{len:#x}");
            assert_eq!(synic.interrupt(0).unwrap().clear(), slot_is_there);
        }
    }

    /// The guest may put both pages in one place, and where messages of others lie.
    #[test]
    fn message_page_that_is_the_flags_page_is_the_guests_own_trouble() {
        let (synic, memory) = synic();
        synic.update(0, Registers { control: 1, flags_page: 0x3001, message_page: 0x3001 });
        memory.word(0x3200).unwrap().store(u32::MAX, Ordering::SeqCst);
        assert_eq!(synic.post(0, &[1; 8], false), Posted::Busy);
        memory.word(0x3200).unwrap().store(0, Ordering::SeqCst);
        assert_eq!(synic.post(0, &[1; 8], false), Posted::Done);
        assert_eq!(memory.segment(0x3300, 8).unwrap().read(), Some([0; 8]), "nothing behind the slot");
    }
}
