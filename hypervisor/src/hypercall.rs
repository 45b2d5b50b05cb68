//! Hypercalls that KVM leaves to us: post-message, and signal-event for connections without an eventfd.
//!
//! `hyperv-cpuid-msr-hypercall.md` section 3.

#![forbid(unsafe_code)]

use vmq::memory::GuestMemory;

const POST_MESSAGE: u64 = 0x5c;
const SIGNAL_EVENT: u64 = 0x5d;

/// Control word: parameters are in registers.
const FAST: u64 = 1 << 16;

/// Payload of a message at most.
pub const PAYLOAD: usize = 240;

/// Input of post-message: connection, padding, type, size, payload.
const INPUT: usize = 16 + PAYLOAD;

const _: () = assert!(INPUT == 256);

/// Result of a hypercall.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Status {
    /// Done.
    Success = 0,
    /// No such call.
    InvalidCode = 2,
    /// Wrong control word.
    InvalidInput = 3,
    /// An address is not a multiple of 8.
    InvalidAlignment = 4,
    /// A parameter is out of range.
    InvalidParameter = 5,
    /// No such connection.
    InvalidConnectionId = 0x12,
    /// Try again later.
    InsufficientBuffers = 0x13,
}

/// Carries out a hypercall. `post` takes a message's connection and payload and must not block.
pub fn handle(
    memory: &GuestMemory,
    input: u64,
    parameters: [u64; 2],
    post: impl FnOnce(u32, &[u8]) -> Status,
) -> Status {
    let code = input & 0xffff;
    // Anything but the code and the kind: header size, repetitions, reserved bits.
    let plain = input & !(0xffff | FAST) == 0;
    match code {
        POST_MESSAGE if plain && input & FAST == 0 => post_message(memory, parameters[0], post),
        SIGNAL_EVENT if plain => Status::InvalidConnectionId,
        POST_MESSAGE | SIGNAL_EVENT => Status::InvalidInput,
        _ => Status::InvalidCode,
    }
}

fn post_message(memory: &GuestMemory, gpa: u64, post: impl FnOnce(u32, &[u8]) -> Status) -> Status {
    if !gpa.is_multiple_of(8) {
        return Status::InvalidAlignment;
    }
    // One page holds the block: it cannot cross into another region either.
    if gpa % 4096 > (4096 - INPUT) as u64 {
        return Status::InvalidParameter;
    }
    let copy = memory.segment(gpa, 256).and_then(|segment| segment.read::<INPUT>());
    let Some(copy) = copy else { return Status::InvalidParameter };
    let word = |at: usize| u32::from_le_bytes([copy[at], copy[at + 1], copy[at + 2], copy[at + 3]]);
    let (connection, kind, size) = (word(0), word(8), word(12));
    let payload = usize::try_from(size).ok().and_then(|size| copy[16..].get(..size));
    match payload {
        // The type's top bit marks messages of the hypervisor itself.
        Some(payload) if kind != 0 && kind >> 31 == 0 => post(connection, payload),
        _ => Status::InvalidParameter,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use vmq::memory::{Mapping, Region};

    fn memory() -> GuestMemory {
        let mapping = Arc::new(Mapping::memfd("guest", 0x3000).unwrap().0);
        GuestMemory::new(vec![Region::new(0, 0, 0x3000, mapping, 0).unwrap()], None).unwrap()
    }

    fn put(memory: &GuestMemory, gpa: u64, connection: u32, kind: u32, size: u32) {
        let mut bytes = Vec::new();
        for word in [connection, 0, kind, size] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend([0xab; PAYLOAD]);
        memory.room(gpa, 256).unwrap().write(&bytes);
    }

    fn call(memory: &GuestMemory, input: u64, gpa: u64) -> (Status, Option<(u32, usize)>) {
        let mut posted = None;
        let status = handle(memory, input, [gpa, 0], |connection, payload| {
            posted = Some((connection, payload.len()));
            Status::Success
        });
        (status, posted)
    }

    #[test]
    fn message_reaches_its_connection_with_the_size_it_says() {
        let memory = memory();
        for size in [0, 1, 240] {
            put(&memory, 0x1f00, 4, 1, size);
            assert_eq!(call(&memory, POST_MESSAGE, 0x1f00), (Status::Success, Some((4, size as usize))));
        }
    }

    #[test]
    fn malformed_post_message_is_refused() {
        let memory = memory();
        put(&memory, 0x1000, 4, 1, 241);
        assert_eq!(call(&memory, POST_MESSAGE, 0x1000), (Status::InvalidParameter, None));
        put(&memory, 0x1000, 4, 1, u32::MAX);
        assert_eq!(call(&memory, POST_MESSAGE, 0x1000), (Status::InvalidParameter, None));
        for kind in [0, 0x8000_0010] {
            put(&memory, 0x1000, 4, kind, 8);
            assert_eq!(call(&memory, POST_MESSAGE, 0x1000), (Status::InvalidParameter, None));
        }
        put(&memory, 0x1000, 4, 1, 8);
        assert_eq!(call(&memory, POST_MESSAGE, 0x1004).0, Status::InvalidAlignment);
        assert_eq!(call(&memory, POST_MESSAGE, 0x1f08).0, Status::InvalidParameter);
        for gpa in [0x3000, 0xffff_ffff_ffff_f000, 1 << 52] {
            assert_eq!(call(&memory, POST_MESSAGE, gpa).0, Status::InvalidParameter, "{gpa:#x}");
        }
        for more in [FAST, 1 << 17, 1 << 32, 1 << 48, 1 << 63] {
            assert_eq!(call(&memory, POST_MESSAGE | more, 0x1000), (Status::InvalidInput, None), "{more:#x}");
        }
    }

    #[test]
    fn other_calls_are_refused() {
        let memory = memory();
        assert_eq!(call(&memory, SIGNAL_EVENT | FAST, 0x2001).0, Status::InvalidConnectionId);
        for code in [0, 1, 0x46, 0x5b, 0x5e, 0xffff] {
            assert_eq!(call(&memory, code, 0x1000), (Status::InvalidCode, None));
        }
    }

    #[test]
    fn message_that_changes_while_it_is_read_has_the_size_that_was_checked() {
        use std::sync::atomic::{AtomicBool, Ordering};
        let memory = memory();
        put(&memory, 0x1000, 4, 1, 240);
        let size = memory.word(0x100c).unwrap();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    size.store(u32::MAX, Ordering::Relaxed);
                    size.store(240, Ordering::Relaxed);
                }
            });
            for _ in 0..100_000 {
                let outcome = call(&memory, POST_MESSAGE, 0x1000);
                let allowed = [(Status::Success, Some((4, 240))), (Status::InvalidParameter, None)];
                assert!(allowed.contains(&outcome), "{outcome:?}");
            }
            stop.store(true, Ordering::Relaxed);
        });
    }
}
