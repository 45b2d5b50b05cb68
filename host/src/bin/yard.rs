//! The command line of Switchyard.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(host::cli::main(std::env::args_os()))
}
