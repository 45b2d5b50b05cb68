//! Chores of Switchyard: `cargo xtask demo`, `test`, `bench`, `nested`, `lint`.

#![forbid(unsafe_code)]

mod bench;
mod build;
mod demo;
mod lint;
mod nested;
mod test;

use clap::{Parser, Subcommand};

/// Chores of Switchyard.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Debug, Subcommand)]
enum Chore {
    /// Set up what is needed and show the switch at work: guests, namespaces and a replayed capture on one switch.
    Demo(demo::Options),
    /// Set up what is needed and run all tests, those with real clients included.
    Test(test::Options),
    /// Print measured figures, beside those of peers from the same run.
    Bench(bench::Options),
    /// A shell in the nested host: a Linux machine with KVM, under QEMU's software CPU.
    Nested(nested::Options),
    /// Formatting, lints, licences of dependencies, sizes of files.
    Lint,
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().chore {
        Chore::Demo(options) => demo::run(&options),
        Chore::Test(options) => test::run(&options),
        Chore::Bench(options) => bench::run(&options),
        Chore::Nested(options) => nested::run(&options),
        Chore::Lint => lint::run(),
    }
}
