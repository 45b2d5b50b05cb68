//! An emulated adapter against a guest that writes anything to it.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| hypervisor::devices::e1000::fuzz::fuzz(data));
