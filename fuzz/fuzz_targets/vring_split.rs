//! A split ring against a guest that writes anything.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmq::ring::fuzz::split(data));
