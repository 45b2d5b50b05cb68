//! `cargo xtask bench`: every figure of the README, beside those of peers measured in the same run.

use anyhow::Result;

/// Options of `cargo xtask bench`.
#[derive(Debug, clap::Args)]
pub struct Options {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Clone, Copy, clap::Subcommand)]
enum What {
    /// Criterion benches of the parts.
    Micro,
}

/// Runs one bench.
pub fn run(options: &Options) -> Result<()> {
    match options.what {
        What::Micro => crate::build::cargo(&["bench", "--package", "switchyard-benches"]),
    }
}
