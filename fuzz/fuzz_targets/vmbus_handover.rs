//! Messages of a hand-over, with the memory and the pages that they describe.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmbus::handover::fuzz::fuzz(data));
