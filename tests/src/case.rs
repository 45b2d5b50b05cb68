//! The frame of a whole-system test: skipped with a reason where the machine cannot run it, and with the daemon's last
//! words where it fails.

use std::io::Write;

use anyhow::{Result, anyhow};

use crate::lab::Lab;
use crate::setup::{Need, lacks};

/// Lines of each log that a failed test shows.
const SHOWN_LINES: usize = 25;

/// Runs `test` in a lab that has the machine to itself.
pub fn exclusive(name: &str, needs: &[Need], test: impl FnOnce(&Lab) -> Result<()>) -> Result<()> {
    run(name, needs, Lab::exclusive, test)
}

/// Runs `test` in a lab that has one processor to itself.
pub fn on_one_processor(name: &str, test: impl FnOnce(&Lab) -> Result<()>) -> Result<()> {
    run(name, &[], Lab::on_one_processor, test)
}

fn run(
    name: &str,
    needs: &[Need],
    lab: impl FnOnce() -> Result<Lab>,
    test: impl FnOnce(&Lab) -> Result<()>,
) -> Result<()> {
    // What others hold is back then.
    let lab = lab()?;
    if let Some(reason) = lacks(needs) {
        // Past the test harness, which shows what is printed only for failed tests.
        let _ = writeln!(std::io::stderr(), "{name}: skipped: {reason}");
        return Ok(());
    }
    test(&lab).map_err(|error| {
        let logs = logs(&lab);
        let kept = std::env::var_os("SWITCHYARD_KEEP").and_then(|_| lab.keep().ok());
        let kept = kept.map(|path| format!("\nkept: {}", path.display())).unwrap_or_default();
        anyhow!("{error:#}\n{logs}{kept}")
    })
}

/// The ends of the lab's logs.
fn logs(lab: &Lab) -> String {
    let mut shown = String::new();
    let entries = std::fs::read_dir(lab.dir()).into_iter().flatten().flatten();
    for path in entries.map(|entry| entry.path()) {
        if !path
            .extension()
            .is_some_and(|extension| ["log", "qemu", "console"].iter().any(|shown| extension == *shown))
        {
            continue;
        }
        let text = std::fs::read(&path).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<_> = text.lines().collect();
        let end = lines.get(lines.len().saturating_sub(SHOWN_LINES)..).unwrap_or_default();
        if !end.is_empty() {
            shown.push_str(&format!("--- {}\n{}\n", path.display(), end.join("\n")));
        }
    }
    shown
}
