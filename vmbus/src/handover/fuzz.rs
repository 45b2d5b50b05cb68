//! Body of the fuzz target for hand-over messages, and of its replayed corpus: bytes with any descriptors beside them, as
//! either side may receive them.
//!
//! What is understood must survive being sent on; memory and pages that a message describes are mapped and touched.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, OnceLock};

use vmq::doorbell::Doorbell;
use vmq::memory::{GuestMemory, Mapping, Region};

use super::{FromSwitch, FromVmm, Message, map_memory};
use crate::pages::Pages;

/// Bytes of the memory file beside a message.
const FILE: usize = 1 << 20;

/// Descriptors beside a message at most: more than any takes.
const FDS: u8 = 4;

/// Takes `data` as one message: the first byte says from whom, and what comes beside it.
///
/// # Panics
/// A promise is broken.
pub fn fuzz(data: &[u8]) {
    let Some((&shape, bytes)) = data.split_first() else { return };
    let fds: Option<Vec<OwnedFd>> =
        (0..shape >> 1 & 7).take(usize::from(FDS)).map(|_| descriptor(shape)).collect();
    let Some(fds) = fds else { return };
    if shape & 1 == 0 {
        if let Ok(message) = FromVmm::decode(bytes, fds) {
            sent_on(&message);
            describe(&message);
        }
    } else if let Ok(message) = FromSwitch::decode(bytes, fds) {
        sent_on(&message);
    }
}

fn descriptor(shape: u8) -> Option<OwnedFd> {
    if shape & 0x10 == 0 {
        return Doorbell::new().ok()?.as_fd().try_clone_to_owned().ok();
    }
    Some(Mapping::memfd("fuzz", FILE).ok()?.1)
}

/// A message that was understood is sent as the same message.
fn sent_on<M: Message>(message: &M) {
    let (bytes, fds) = message.encode().expect("what came can be sent");
    let copies = fds.iter().map(|fd| fd.try_clone_to_owned()).collect::<Result<_, _>>();
    let Ok(copies) = copies else { return };
    let again = M::decode(&bytes, copies).expect("what was sent is understood");
    let (twice, others) = again.encode().expect("what came can be sent");
    assert_eq!((bytes, fds.len()), (twice, others.len()));
}

/// Takes memory and pages as a switch does.
fn describe(message: &FromVmm) {
    match message {
        FromVmm::Memory { regions, fd } => {
            let Ok(memory) = map_memory(regions, fd.as_fd()) else { return };
            for region in regions {
                let last = region.gpa.wrapping_add(region.len).wrapping_sub(1);
                for address in [region.gpa, last] {
                    let byte = memory.segment(address, 1).expect("a byte of a region is there");
                    assert!(byte.read::<1>().is_some(), "the file is as long as its regions say");
                }
            }
        }
        FromVmm::Gpadl { byte_count, byte_offset, pfns, .. } => {
            let needed = (u64::from(*byte_count) + u64::from(*byte_offset)).div_ceil(4096);
            assert!(needed <= pfns.len() as u64, "fewer pages than bytes");
            let Ok(pages) = Pages::new(memory(), pfns) else { return };
            assert_eq!(pages.len() as usize, pfns.len() << 12);
            let end = pages.len();
            assert!(!pages.write(end, &[3]) && !pages.write(u32::MAX, &[3]), "written behind the end");
            if pages.is_empty() {
                return;
            }
            assert!(
                pages.write(0, &[1]) && pages.write(end - 1, &[2]),
                "pages that are there can be written"
            );
        }
        _ => {}
    }
}

/// What the page numbers of messages are looked up in.
fn memory() -> &'static Arc<GuestMemory> {
    static MEMORY: OnceLock<Arc<GuestMemory>> = OnceLock::new();
    MEMORY.get_or_init(|| {
        let (mapping, _) = Mapping::memfd("fuzz", FILE).expect("memory");
        let region = Region::new(0, 0, FILE as u64, Arc::new(mapping), 0).expect("a region");
        Arc::new(GuestMemory::new(vec![region], None).expect("guest memory"))
    })
}
