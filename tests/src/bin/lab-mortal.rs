//! A guest that lives as far as it is told and then waits to be killed; its diary is standard output.

#![forbid(unsafe_code)]

use std::path::Path;

use anyhow::{Context, Result};
use switchyard_tests::life::{Fate, live};

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let (socket, fate) = words.split_first().context("usage: lab-mortal SOCKET FATE")?;
    live(Path::new(socket), Fate::from_arguments(fate)?, std::io::stdout())
}
