//! The Switchyard daemon.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(host::daemon::main(std::env::args_os()))
}
