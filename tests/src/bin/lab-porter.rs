//! The porter of the nested host: obeys over the character device that is its only argument.

#![forbid(unsafe_code)]

use std::fs::File;

use anyhow::{Context, Result};

fn main() -> Result<()> {
    let path = std::env::args_os().nth(1).context("usage: lab-porter DEVICE")?;
    let port = File::options().read(true).write(true).open(&path);
    let port = port.with_context(|| format!("cannot open {}", path.display()))?;
    switchyard_tests::nested::porter::serve(port)
}
