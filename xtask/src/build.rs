//! Runs of cargo from within cargo.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// The workspace's folder.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

/// Runs cargo in the workspace, its output shown.
pub fn cargo(arguments: &[&str]) -> Result<()> {
    let line = format!("cargo {}", arguments.join(" "));
    eprintln!("$ {line}");
    let cargo = std::env::var_os("CARGO").unwrap_or("cargo".into());
    let status = Command::new(cargo).args(arguments).current_dir(root()).status().context(line.clone())?;
    ensure!(status.success(), "`{line}` failed ({status})");
    Ok(())
}

/// Builds the daemon and its tools as they ship; where they are.
pub fn release() -> Result<PathBuf> {
    cargo(&["build", "--release", "--package", "host", "--package", "switchyard-benches", "--bins"])?;
    Ok(target().join("release"))
}

/// Builds everything that the nested host runs as it ships: the daemon, the VMs' worker, and the lab's porter.
pub fn release_for_nested() -> Result<PathBuf> {
    let packages = ["--package", "host", "--package", "hypervisor", "--package", "switchyard-tests"];
    cargo(&[&["build", "--release", "--bins"][..], &packages].concat())?;
    Ok(target().join("release"))
}

/// Where cargo puts what it builds.
pub fn target() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(target) => root().join(target),
        None => root().join("target"),
    }
}
