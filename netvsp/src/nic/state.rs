//! What the switch must remember of an adapter over its own restart, in a memfd that the VMM keeps for it.
//!
//! The first half holds what was negotiated, as a blob, in two places written in turn, each with sequence number, length
//! and checksum: a switch that dies while it writes one leaves the other. Behind it lies the data path's journal.
//! The file passed through another process, so that nothing in it is believed before it is checked.

use std::sync::Arc;

use vmbus::handover::STATE_BYTES;
use vmq::memory::{GuestMemory, Mapping, Region};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, IntoBytes};

use crate::journal::{JOURNAL_BYTES, Journal};

/// Bytes of one place.
const PLACE: u64 = 128 * 1024;
/// Where the journal begins.
const JOURNAL: u64 = 2 * PLACE;
const _: () = assert!(JOURNAL + JOURNAL_BYTES <= STATE_BYTES as u64);

const MAGIC: u32 = u32::from_le_bytes(*b"NVS1");

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, zerocopy::Immutable, zerocopy::KnownLayout)]
#[repr(C)]
struct Head {
    magic: U32,
    len: U32,
    sequence: U64,
    checksum: U64,
}

const HEAD: usize = size_of::<Head>();
const _: () = assert!(HEAD == 24);

/// FNV-1a over sequence number and blob. It finds torn writes, not lies.
fn checksum(sequence: u64, blob: &[u8]) -> u64 {
    let bytes = sequence.to_le_bytes();
    bytes.iter().chain(blob).fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// The state file.
#[derive(Debug)]
pub(crate) struct State {
    memory: Arc<GuestMemory>,
    sequence: u64,
}

impl State {
    /// The state in `mapping`; `None` if it is too short.
    pub(crate) fn new(mapping: Arc<Mapping>) -> Option<Self> {
        let region = Region::new(0, 0, STATE_BYTES as u64, mapping, 0).ok()?;
        let memory = Arc::new(GuestMemory::new(vec![region], None).ok()?);
        Some(Self { memory, sequence: 0 })
    }

    /// How often it was written.
    #[cfg(test)]
    pub(crate) fn sequence(&self) -> u64 {
        self.sequence
    }

    /// The data path's journal.
    pub(crate) fn journal(&self) -> Journal {
        Journal::new(Arc::clone(&self.memory), JOURNAL)
    }

    /// Writes `blob` over the older of the two places. False if it is too long.
    pub(crate) fn write(&mut self, blob: &[u8]) -> bool {
        let Ok(len) = u32::try_from(blob.len()) else { return false };
        if u64::from(len) + HEAD as u64 > PLACE {
            return false;
        }
        self.sequence += 1;
        let at = (self.sequence % 2) * PLACE;
        let sequence = U64::new(self.sequence);
        let checksum = U64::new(checksum(self.sequence, blob));
        let head = Head { magic: MAGIC.into(), len: len.into(), sequence, checksum };
        let Some(room) = self.memory.room(at, len + 24) else { return false };
        room.write(head.as_bytes()).write(blob);
        true
    }

    /// The newest blob that is whole.
    pub(crate) fn read(&mut self) -> Option<Vec<u8>> {
        let places = [0, PLACE].into_iter().filter_map(|at| self.place(at));
        let (sequence, blob) = places.max_by_key(|(sequence, _)| *sequence)?;
        self.sequence = sequence;
        Some(blob)
    }

    fn place(&self, at: u64) -> Option<(u64, Vec<u8>)> {
        let head: [u8; HEAD] = self.memory.segment(at, 24)?.read()?;
        let head = Head::read_from_bytes(&head).ok()?;
        let len = head.len.get();
        if head.magic.get() != MAGIC || u64::from(len) + HEAD as u64 > PLACE {
            return None;
        }
        let mut blob = vec![0; len as usize];
        self.memory.segment(at + HEAD as u64, len)?.read_into(&mut blob);
        let sequence = head.sequence.get();
        // No switch writes so often: the number after it must not be 0.
        (sequence < u64::MAX / 2 && checksum(sequence, &blob) == head.checksum.get())
            .then_some((sequence, blob))
    }

    /// Forgets what was negotiated.
    pub(crate) fn clear(&mut self) {
        for at in [0, PLACE] {
            if let Some(room) = self.memory.room(at, 24) {
                room.write(&[0; HEAD]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> State {
        State::new(Arc::new(Mapping::memfd("state", STATE_BYTES).unwrap().0)).unwrap()
    }

    #[test]
    fn newest_blob_is_read_back() {
        let mut state = state();
        assert_eq!(state.read(), None);
        for n in 0..5u8 {
            assert!(state.write(&vec![n; usize::from(n) * 100]));
        }
        let mut successor = State { memory: Arc::clone(&state.memory), sequence: 0 };
        assert_eq!(successor.read(), Some(vec![4; 400]));
        assert!(successor.write(&[9]));
        assert_eq!(state.read(), Some(vec![9]));
        state.clear();
        assert_eq!(state.read(), None);
    }

    #[test]
    fn torn_write_leaves_the_blob_before_it() {
        let mut state = state();
        state.write(&[1; 64]);
        state.write(&[2; 64]);
        let at = (state.sequence % 2) * PLACE;
        state.memory.room(at + 40, 1).unwrap().write(&[7]);
        assert_eq!(state.read(), Some(vec![1; 64]));
    }

    #[test]
    fn blob_with_a_number_that_nobody_counted_to_is_none() {
        let mut state = state();
        state.sequence = u64::MAX / 2 - 1;
        assert!(state.write(&[1]));
        assert_eq!(state.read(), None);
        state.sequence = 6;
        assert!(state.write(&[2]));
        assert_eq!((state.read(), state.sequence), (Some(vec![2]), 7));
    }

    #[test]
    fn blob_that_does_not_fit_is_refused() {
        let room = usize::try_from(PLACE).unwrap() - HEAD;
        assert!(!state().write(&vec![0; room + 1]));
        assert!(state().write(&vec![0; room]));
    }
}
