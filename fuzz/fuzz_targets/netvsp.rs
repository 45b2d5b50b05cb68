//! A synthetic adapter against a guest that does anything.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| netvsp::fuzz::fuzz(data));
