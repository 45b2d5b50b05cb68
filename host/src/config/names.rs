//! Names that go into paths, metrics and terminals: what they may be made of.

pub use vswitch::spec::{MAX_NAME, check_name};

/// Longest name of a network device (`IFNAMSIZ` of `linux/if.h`, less its final zero).
pub const MAX_DEVICE: usize = 15;
/// Longest path of a Unix socket (`sun_path` of unix(7), less its final zero).
pub const MAX_SOCKET_PATH: usize = 107;

/// Whether `name` may name a network device. A `%` would make the kernel choose the name, `/` and blanks it refuses.
///
/// # Errors
/// What is wrong with it, and what was expected.
pub fn check_device(name: &str) -> Result<(), String> {
    vswitch::spec::check_word(name, "device name", MAX_DEVICE)
}
