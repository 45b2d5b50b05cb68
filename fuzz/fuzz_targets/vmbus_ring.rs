//! A channel's rings against a guest that writes anything.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmbus::ring::fuzz::fuzz(data));
