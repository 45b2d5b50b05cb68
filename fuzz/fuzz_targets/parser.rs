//! The header parser and the offload check against any frame.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vswitch::parse::fuzz::fuzz(data));
