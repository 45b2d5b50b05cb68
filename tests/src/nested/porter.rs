//! The porter: runs in the nested host and does what the test asks over the virtio-serial port.

use std::collections::HashMap;
use std::fs::File;
use std::io::{ErrorKind, PipeReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process_group};

use super::wire::{Frame, Kind, LONGEST};

/// Status of a command that could not be started, as of a shell that finds no program.
const NOT_STARTED: i32 = 127;
/// Chunks of input that may wait for a command to read them; then the whole port waits.
const INPUTS: usize = 64;

/// Something that goes on in a conversation.
#[derive(Debug)]
struct Activity {
    input: SyncSender<Vec<u8>>,
    handle: Handle,
}

#[derive(Debug)]
enum Handle {
    Group(Pid),
    Connection(UnixStream),
}

impl Handle {
    fn kill(&self) {
        // It may have ended in this moment.
        let _ = match self {
            Self::Group(group) => kill_process_group(*group, Signal::KILL).map_err(Into::into),
            Self::Connection(stream) => stream.shutdown(Shutdown::Both),
        };
    }
}

#[derive(Debug)]
struct Porter {
    port: Mutex<File>,
    activities: Mutex<HashMap<u32, Activity>>,
}

/// Obeys over `port` until the other end is gone.
pub fn serve(port: File) -> Result<()> {
    let mut orders = port.try_clone().context("cannot duplicate the port")?;
    let porter = Arc::new(Porter { port: Mutex::new(port), activities: Mutex::default() });
    porter.say(0, Kind::Started, Vec::new());
    loop {
        match Frame::read(&mut orders) {
            Ok(frame) => porter.obey(frame),
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(error).context("cannot read orders"),
        }
    }
}

impl Porter {
    fn obey(self: &Arc<Self>, frame: Frame) {
        let Frame { conversation, kind, payload } = frame;
        let text = || String::from_utf8_lossy(&payload).into_owned();
        let started = match kind {
            Kind::Run => self.run(conversation, &text()),
            Kind::Connect => self.connect(conversation, &text()),
            Kind::Input => {
                let input = self.activities().get(&conversation).map(|activity| activity.input.clone());
                // Whoever should read it may have ended.
                let _ = input.map(|input| input.send(payload));
                Ok(())
            }
            Kind::Kill => {
                if let Some(activity) = self.activities().get(&conversation) {
                    activity.handle.kill();
                }
                Ok(())
            }
            Kind::Started | Kind::Output | Kind::Ended => Ok(()),
        };
        if let Err(error) = started {
            self.say(conversation, Kind::Output, format!("{error:#}\n"));
            self.end(conversation, NOT_STARTED);
        }
    }

    fn run(self: &Arc<Self>, conversation: u32, line: &str) -> Result<()> {
        let (output, write_end) = std::io::pipe()?;
        let mut command = Command::new("dash");
        command.args(["-c", line]).process_group(0).stdin(Stdio::piped());
        command.stdout(write_end.try_clone()?).stderr(write_end);
        let mut child = command.spawn().context("cannot start a shell")?;
        // It holds the write end, and the end of output would not be seen.
        drop(command);
        let stdin = child.stdin.take();
        let group = Pid::from_child(&child);
        let inputs = self.begin(conversation, Handle::Group(group), &child.id().to_le_bytes());
        std::thread::spawn(move || stdin.map(|stdin| feed(&inputs, stdin)));
        let porter = Arc::clone(self);
        std::thread::spawn(move || {
            let status = porter.follow(conversation, &mut child, output);
            porter.end(conversation, status);
        });
        Ok(())
    }

    fn connect(self: &Arc<Self>, conversation: u32, path: &str) -> Result<()> {
        let stream = UnixStream::connect(path).with_context(|| format!("cannot connect to {path}"))?;
        let inputs = self.begin(conversation, Handle::Connection(stream.try_clone()?), &[]);
        let writer = stream.try_clone()?;
        std::thread::spawn(move || {
            feed(&inputs, &writer);
            // The other end may have closed first.
            let _ = writer.shutdown(Shutdown::Write);
        });
        let porter = Arc::clone(self);
        std::thread::spawn(move || {
            porter.pass_on(conversation, stream);
            porter.end(conversation, 0);
        });
        Ok(())
    }

    /// Passes output on until the command has ended. What it left behind in the background may hold the pipe open.
    fn follow(&self, conversation: u32, child: &mut Child, mut output: PipeReader) -> i32 {
        let mut buffer = vec![0; LONGEST];
        let mut ended = None;
        loop {
            let patience = if ended.is_some() { 0 } else { 50_000_000 };
            let ready = poll(
                &mut [PollFd::new(&output, PollFlags::IN)],
                Some(&Timespec { tv_sec: 0, tv_nsec: patience }),
            );
            match (ready, ended) {
                (Ok(0), Some(status)) => return status,
                (Ok(0) | Err(_), _) => ended = child.try_wait().ok().flatten().map(code),
                (Ok(_), _) => match output.read(&mut buffer) {
                    Ok(0) | Err(_) => return child.wait().map_or(NOT_STARTED, code),
                    Ok(length) => {
                        self.say(conversation, Kind::Output, buffer.get(..length).unwrap_or_default())
                    }
                },
            }
        }
    }

    fn pass_on(&self, conversation: u32, mut from: impl Read) {
        let mut buffer = vec![0; LONGEST];
        while let Ok(length @ 1..) = from.read(&mut buffer) {
            self.say(conversation, Kind::Output, buffer.get(..length).unwrap_or_default());
        }
    }

    fn begin(&self, conversation: u32, handle: Handle, id: &[u8]) -> Receiver<Vec<u8>> {
        let (input, inputs) = sync_channel(INPUTS);
        self.activities().insert(conversation, Activity { input, handle });
        self.say(conversation, Kind::Started, id);
        inputs
    }

    fn end(&self, conversation: u32, status: i32) {
        self.activities().remove(&conversation);
        self.say(conversation, Kind::Ended, status.to_le_bytes());
    }

    fn say(&self, conversation: u32, kind: Kind, payload: impl Into<Vec<u8>>) {
        let port = self.port.lock().unwrap_or_else(PoisonError::into_inner);
        // Nobody listens any more: then the orders end too.
        let _ = Frame::new(conversation, kind, payload).write(&*port);
    }

    fn activities(&self) -> std::sync::MutexGuard<'_, HashMap<u32, Activity>> {
        self.activities.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writes what comes in, until an empty chunk or the end.
fn feed(inputs: &Receiver<Vec<u8>>, mut to: impl Write) {
    for chunk in inputs {
        if chunk.is_empty() || to.write_all(&chunk).is_err() {
            return;
        }
    }
}

fn code(status: ExitStatus) -> i32 {
    status.code().or(status.signal().map(|signal| 128 + signal)).unwrap_or(NOT_STARTED)
}
