//! `cargo xtask test`: everything that must pass.

use anyhow::Result;

use crate::build::cargo;
use crate::lint;

/// Options of `cargo xtask test`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Only tests that need no other program (no guests, no DPDK, no namespaces).
    #[arg(long)]
    quick: bool,
    /// Only tests whose name contains this.
    filter: Option<String>,
}

/// Formatting and lints, then unit and property tests, then whole-system tests, each of which waits for the processors it needs.
pub fn run(options: &Options) -> Result<()> {
    let filter = options.filter.as_deref();
    if !options.quick {
        // Unit tests, too, compare with these programs where they find them.
        switchyard_tests::setup::ensure(&switchyard_tests::setup::all_packages())?;
    }
    if filter.is_none() {
        lint::run()?;
    }
    let quick = ["test", "--workspace", "--exclude", "switchyard-tests"];
    cargo(&[&quick[..], &filter.into_iter().collect::<Vec<_>>()].concat())?;
    if options.quick {
        return Ok(());
    }
    cargo(&["build", "--package", "host", "--package", "hypervisor", "--bins"])?;
    cargo(&[&["test", "--package", "switchyard-tests"], &filter.into_iter().collect::<Vec<_>>()[..]].concat())
}
