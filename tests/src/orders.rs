//! Commands for a guest over a serial line: see `guest/init` for the other end.
//!
//! A request is one line, "id seconds command"; the answer is a byte 1, the line "id status length", and as many bytes of
//! output. What the guest's kernel prints between answers is skipped.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::station::{Job, Output};

/// How long a guest may take to answer after a command's own limit: both processors may be busy.
const GRACE: Duration = Duration::from_secs(30);
/// How long to wait for a guest to speak first before it is asked whether it is there.
const PATIENCE: Duration = Duration::from_secs(10);
/// For what takes next to no time.
const SHORT: Duration = Duration::from_secs(20);
/// The answer that a guest gives unasked once its drivers are loaded.
const READY: &str = "ready";
/// The question whether it is there, for a line on which the first word was lost.
const HELLO: &str = "hello";

/// The line to one guest.
#[derive(Debug)]
pub struct Orders {
    channel: Arc<Mutex<Channel>>,
}

impl Orders {
    /// Over this stream.
    pub fn new(stream: UnixStream) -> Self {
        Self { channel: Arc::new(Mutex::new(Channel::new(stream))) }
    }

    /// Waits until the guest obeys; its uptime in seconds when it first did, or just now.
    pub fn wait_ready(&self, limit: Duration) -> Result<f64> {
        let uptime = lock(&self.channel).wait_ready(limit)?;
        uptime.trim().parse().with_context(|| format!("not an uptime: {uptime:?}"))
    }

    /// Runs one line of shell to its end; it is killed after `limit` (status 137).
    pub fn run(&self, line: &str, limit: Duration) -> Result<Output> {
        lock(&self.channel).run(line, limit)
    }

    /// Starts one line of shell, which ends with the returned guard.
    pub fn spawn(&self, line: &str) -> Result<Box<dyn Job>> {
        let mut channel = lock(&self.channel);
        channel.jobs += 1;
        let base = format!("/run/job{}", channel.jobs);
        let quoted = line.replace('\'', r"'\''");
        // The session's leader writes its id first, so that kill reaches all that the line starts.
        let start = format!(
            "setsid dash -c 'echo $$ > {base}.id; ( {quoted} ) > {base}.log 2>&1; echo $? > {base}.status' < /dev/null \
             > /dev/null 2>&1 & until [ -s {base}.id ]; do sleep 0.02; done"
        );
        let output = channel.run(&start, SHORT)?;
        if output.status != 0 {
            bail!("cannot start {line:?}: status {}: {}", output.status, output.stdout);
        }
        Ok(Box::new(Background { base, channel: Arc::clone(&self.channel) }))
    }
}

fn lock(channel: &Mutex<Channel>) -> MutexGuard<'_, Channel> {
    channel.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug)]
struct Background {
    base: String,
    channel: Arc<Mutex<Channel>>,
}

impl Job for Background {
    fn wait(&mut self, limit: Duration) -> Result<Output> {
        let start = Instant::now();
        loop {
            // Short turns, so that other commands get in between.
            let line = format!(
                "n=0; until [ -s {0}.status ] || [ $n = 20 ]; do sleep 0.05; n=$((n+1)); done; \
                 [ -s {0}.status ] && cat {0}.log && exit $(cat {0}.status) || exit 250",
                self.base
            );
            let output = lock(&self.channel).run(&line, SHORT)?;
            if output.status != 250 {
                return Ok(output);
            }
            if start.elapsed() > limit {
                bail!("still runs after {:.0} s: {}", limit.as_secs_f64(), self.output()?);
            }
        }
    }

    fn output(&mut self) -> Result<String> {
        Ok(lock(&self.channel).run(&format!("cat {}.log", self.base), SHORT)?.stdout)
    }

    fn kill(&mut self) -> Result<()> {
        let line = format!("busybox kill -KILL -$(cat {}.id)", self.base);
        lock(&self.channel).run(&line, SHORT).map(drop)
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        // The guest may be gone.
        let _ = self.kill();
    }
}

#[derive(Debug)]
struct Channel {
    reader: BufReader<UnixStream>,
    next: u32,
    jobs: u32,
    broken: bool,
}

impl Channel {
    fn new(stream: UnixStream) -> Self {
        Self { reader: BufReader::new(stream), next: 0, jobs: 0, broken: false }
    }

    fn wait_ready(&mut self, limit: Duration) -> Result<String> {
        let start = Instant::now();
        loop {
            let left = limit.saturating_sub(start.elapsed());
            match self.answer(left.min(PATIENCE), &[READY, HELLO]) {
                Ok(output) => return Ok(output.stdout),
                Err(error) if left <= PATIENCE => return Err(error),
                Err(_) => self.send(&format!("\n{HELLO} 5 cut -d ' ' -f 1 /proc/uptime\n"))?,
            }
        }
    }

    fn run(&mut self, line: &str, limit: Duration) -> Result<Output> {
        if self.broken {
            bail!("the command channel broke earlier");
        }
        if line.contains('\n') {
            bail!("a guest's command is one line");
        }
        self.next += 1;
        let id = self.next.to_string();
        self.send(&format!("{id} {} {line}\n", limit.as_secs().max(1)))?;
        let answer = self.answer(limit + GRACE, &[&id]);
        self.broken = answer.is_err();
        answer
    }

    fn send(&mut self, text: &str) -> Result<()> {
        self.reader.get_mut().write_all(text.as_bytes()).context("the guest is gone")
    }

    /// The answer to one of these requests. Late answers to [`HELLO`], even a garbled one, are passed over.
    fn answer(&mut self, limit: Duration, ids: &[&str]) -> Result<Output> {
        self.reader.get_ref().set_read_timeout(Some(limit.max(Duration::from_millis(1))))?;
        let silent = || format!("no answer within {:.0} s", limit.as_secs_f64());
        loop {
            let mut skipped = Vec::new();
            if self.reader.read_until(1, &mut skipped).with_context(silent)? == 0 {
                bail!("the guest is gone");
            }
            let mut header = String::new();
            self.reader.read_line(&mut header).with_context(silent)?;
            let unexpected = || format!("unexpected answer {header:?}");
            let (id, status, length) = parse_header(&header).with_context(unexpected)?;
            let mut stdout = vec![0; length];
            self.reader.read_exact(&mut stdout).with_context(silent)?;
            if ids.contains(&id) {
                return Ok(Output { status, stdout: String::from_utf8_lossy(&stdout).into_owned() });
            }
            if id.parse::<u32>().is_ok() {
                bail!(unexpected());
            }
        }
    }
}

/// The request, the status and the length in an answer's header.
fn parse_header(header: &str) -> Option<(&str, i32, usize)> {
    let mut fields = header.split_whitespace();
    Some((fields.next()?, fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn channel_hearing(bytes: &[u8]) -> Channel {
        let (mut guest, host) = UnixStream::pair().unwrap();
        guest.write_all(bytes).unwrap();
        std::mem::forget(guest);
        Channel::new(host)
    }

    #[test]
    fn answer_may_hold_newlines_and_byte_one() {
        let mut channel = channel_hearing(b"boot noise\x011 3 6\na\n\x01b\nc");
        let output = channel.run("x", SECOND).unwrap();
        assert_eq!(output, Output { status: 3, stdout: "a\n\u{1}b\nc".to_owned() });
    }

    #[test]
    fn answer_to_another_request_breaks_the_channel() {
        let mut channel = channel_hearing(b"\x017 0 0\n");
        assert!(channel.run("x", SECOND).is_err());
        assert!(channel.run("x", SECOND).unwrap_err().to_string().contains("broke earlier"));
    }

    #[test]
    fn command_of_two_lines_is_refused() {
        assert!(channel_hearing(b"").run("a\nb", SECOND).is_err());
    }

    #[test]
    fn answers_to_greetings_come_late_without_harm() {
        let mut channel = channel_hearing(b"\x01ready 0 4\n1.25kernel\x01hello 0 3\n2.5\x011 0 2\nok");
        assert_eq!(channel.wait_ready(SECOND).unwrap(), "1.25");
        assert_eq!(channel.run("x", SECOND).unwrap().stdout, "ok");
    }

    #[test]
    fn guest_that_hangs_up_is_gone() {
        let (guest, host) = UnixStream::pair().unwrap();
        drop(guest);
        let error = Channel::new(host).answer(SECOND, &["1"]).unwrap_err();
        assert!(error.to_string().contains("gone"), "{error}");
    }
}
