//! The capture reader against any file.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vswitch::pcap::test_support::fuzz(data));
