//! Names that go into paths, metrics and terminals: what they may be made of.

use super::node::quoted;

/// Longest name of a switch or port, in bytes.
pub const MAX_NAME: usize = 32;
/// Longest name of a network device (`IFNAMSIZ` of `linux/if.h`, less its final zero).
pub const MAX_DEVICE: usize = 15;
/// Longest path of a Unix socket (`sun_path` of unix(7), less its final zero).
pub const MAX_SOCKET_PATH: usize = 107;

/// Whether `name` may name a switch or port.
///
/// # Errors
/// What is wrong with it, and what was expected.
pub fn check_name(name: &str) -> Result<(), String> {
    check(name, "name", MAX_NAME)
}

/// Whether `name` may name a network device. A `%` would make the kernel choose the name, `/` and blanks it refuses.
///
/// # Errors
/// What is wrong with it, and what was expected.
pub fn check_device(name: &str) -> Result<(), String> {
    check(name, "device name", MAX_DEVICE)
}

fn check(name: &str, what: &str, longest: usize) -> Result<(), String> {
    let expected = format!(
        "expected 1 to {longest} of the letters a to z, A to Z, digits, `-`, `_`, `.`, beginning with a letter or digit"
    );
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    match name.chars().next() {
        None => Err(format!("the {what} is empty, {expected}")),
        Some(_) if name.len() > longest => {
            Err(format!("{what} {} has {} bytes, {expected}", quoted(name), name.len()))
        }
        Some(first) if !first.is_ascii_alphanumeric() => {
            Err(format!("{what} {} begins with {}, {expected}", quoted(name), shown(first)))
        }
        Some(_) => match name.chars().find(|&c| !allowed(c)) {
            Some(bad) => Err(format!("{what} {} contains {}, {expected}", quoted(name), shown(bad))),
            None => Ok(()),
        },
    }
}

/// A character in backquotes, escaped if it cannot be printed.
fn shown(c: char) -> String {
    if c == '\'' || c == '"' { format!("`{c}`") } else { format!("`{}`", c.escape_debug()) }
}
