//! `cargo xtask lint`: formatting, lints, dependencies, sizes.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::build::{cargo, root};

/// No file of code is longer than this.
const LONGEST_FILE: usize = 800;

/// Lines of code in `src` folders, tests excluded.
const BUDGET: usize = 65_000;

/// Runs all checks that need no other program. `cargo deny` is run if it is installed.
pub fn run() -> Result<()> {
    cargo(&["fmt", "--all", "--check"])?;
    cargo(&["clippy", "--workspace", "--all-targets", "--", "--deny", "warnings"])?;
    deny()?;
    sizes()
}

/// Licences, sources and duplicates of dependencies. The advisory database is not fetched: it is not in a registry.
fn deny() -> Result<()> {
    let installed =
        Command::new("cargo").args(["deny", "--version"]).output().is_ok_and(|out| out.status.success());
    if !installed {
        eprintln!(
            "cargo deny is not installed, dependencies are not checked: cargo install cargo-deny --locked"
        );
        return Ok(());
    }
    cargo(&["deny", "--offline", "check", "bans", "licenses", "sources"])
}

fn sizes() -> Result<()> {
    let listed = Command::new("git").args(["ls-files", "*.rs"]).current_dir(root()).output();
    let listed = listed.context("git ls-files")?;
    ensure!(listed.status.success(), "git ls-files failed");
    let (mut total, mut long) = (0, Vec::new());
    for name in String::from_utf8(listed.stdout)?.lines() {
        let Ok(text) = std::fs::read_to_string(root().join(name)) else { continue };
        let lines = text.lines().count();
        if lines > LONGEST_FILE {
            long.push(format!("{name}: {lines} lines, expected at most {LONGEST_FILE}"));
        }
        if is_product(Path::new(name)) {
            total += text.split("#[cfg(test)]").next().unwrap_or("").lines().count();
        }
    }
    eprintln!("{total} lines of code without tests (budget {BUDGET})");
    if !long.is_empty() || total > BUDGET {
        bail!("too long:\n{}", long.join("\n"));
    }
    Ok(())
}

fn is_product(name: &Path) -> bool {
    let text = name.to_string_lossy();
    text.contains("/src/") && !text.contains("test") && !text.starts_with("fuzz")
}
