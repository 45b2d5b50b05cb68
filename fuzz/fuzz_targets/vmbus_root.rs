//! The VMBus root against a guest, and devices, that say anything.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmbus::root::fuzz::fuzz(data));
