//! Undoes what outlives a process – namespaces, directories, kernel settings – even after Ctrl-C or kill -9.
//!
//! A shell, in a process group of its own, reads clean-up commands from a pipe until the pipe closes. The
//! kernel closes it when this program ends, however it ends; then the shell runs the commands, last first.
//! Guards still clean up themselves when dropped, so commands must not mind if there is nothing left to do.
//!
//! Every janitor holds a shared lock, so that the last one of several programs can know that it is.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::process::{ChildStdin, Command, Stdio};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};

/// The children were sent SIGKILL when this program died; a device or file of theirs may need a moment.
const SCRIPT: &str = r#"
exec 9> /tmp/switchyard-janitor.lock
flock -s 9
echo ready
while read -r line; do commands="$line
$commands"; done
sleep 0.3
eval "$commands" > /dev/null 2>&1
"#;

static JANITOR: Mutex<Option<ChildStdin>> = Mutex::new(None);

/// Has `command` (one line of shell, safe to run when there is nothing to do) run when this program ends.
pub fn at_exit(command: &str) -> Result<()> {
    let mut janitor = JANITOR.lock().unwrap_or_else(PoisonError::into_inner);
    if janitor.is_none() {
        *janitor = Some(start()?);
    }
    let pipe = janitor.as_mut().context("the janitor has no pipe")?;
    writeln!(pipe, "{command}").context("cannot talk to the janitor")
}

/// The same, unless another program on this machine still has a janitor.
pub fn at_last_exit(command: &str) -> Result<()> {
    at_exit(&format!("flock -n -x 9 && {{ {command}; }}"))
}

/// Starts the shell and waits until it holds its lock: then no other janitor is at work as the last one.
fn start() -> Result<ChildStdin> {
    let mut shell = Command::new("sh")
        .args(["-c", SCRIPT])
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot start sh")?;
    let mut ready = String::new();
    BufReader::new(shell.stdout.take().context("the janitor has no output")?).read_line(&mut ready)?;
    shell.stdin.take().context("the janitor has no pipe")
}
