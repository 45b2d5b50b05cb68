//! A vhost-user session against a front-end that says anything.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vswitch::ports::vhost_user::fuzz::fuzz(data));
