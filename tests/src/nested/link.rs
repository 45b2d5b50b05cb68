//! The test's end of the line to the porter.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::wire::{Frame, Kind, LONGEST};

/// How long the nested host may take to begin what it was asked for: its processors are software, and may be busy.
const START: Duration = Duration::from_secs(30);

/// The nested host is spoken to at least so often. Its processor, idle or waiting for a guest, now and then sleeps on when its timer
/// goes off (QEMU 7.2): all in it stood still for a minute, until the next order came.
const WAKE: Duration = Duration::from_secs(1);

#[derive(Debug)]
struct Mailbox {
    frames: Sender<Frame>,
    log: Option<File>,
}

/// The line: any number of conversations, from any thread.
#[derive(Debug)]
pub struct Link {
    stream: Mutex<UnixStream>,
    mailboxes: Mutex<Option<HashMap<u32, Mailbox>>>,
    next: AtomicU32,
}

impl Link {
    /// Over this stream. The second: where the porter says that it is there.
    pub fn new(stream: UnixStream) -> Result<(Arc<Self>, Conversation)> {
        let reader = stream.try_clone()?;
        let link = Arc::new(Self {
            stream: Mutex::new(stream),
            mailboxes: Mutex::new(Some(HashMap::new())),
            next: AtomicU32::new(0),
        });
        let ready = link.open(None)?;
        let receiving = Arc::downgrade(&link);
        std::thread::spawn(move || {
            while let Ok(frame) = Frame::read(&reader) {
                let Some(link) = receiving.upgrade() else { return };
                link.deliver(frame);
            }
            if let Some(link) = receiving.upgrade() {
                link.mailboxes().take();
            }
        });
        let waking = Arc::downgrade(&link);
        // Input for a conversation in which nothing runs: the porter passes it over.
        let nothing = Frame::new(ready.number, Kind::Input, Vec::new());
        std::thread::spawn(move || {
            while waking.upgrade().is_some_and(|link| link.send(&nothing).is_ok()) {
                std::thread::sleep(WAKE);
            }
        });
        Ok((link, ready))
    }

    /// Runs one line of shell. All it writes also goes to `log`, as it comes.
    pub fn run(self: &Arc<Self>, line: &str, log: Option<&Path>) -> Result<Conversation> {
        self.begin(Kind::Run, line, log).with_context(|| format!("cannot run {line:?}"))
    }

    /// Connects to a Unix socket of the nested host.
    pub fn connect(self: &Arc<Self>, path: &str) -> Result<Conversation> {
        self.begin(Kind::Connect, path, None)
    }

    fn begin(self: &Arc<Self>, kind: Kind, text: &str, log: Option<&Path>) -> Result<Conversation> {
        let log = log.map(File::create).transpose().context("cannot create a log")?;
        let mut conversation = self.open(log)?;
        self.send(&Frame::new(conversation.number, kind, text))?;
        conversation.wait_started(START)?;
        Ok(conversation)
    }

    fn open(self: &Arc<Self>, log: Option<File>) -> Result<Conversation> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, frames) = channel();
        let mailbox = Mailbox { frames: sender, log };
        self.mailboxes().as_mut().context("the nested host is gone")?.insert(number, mailbox);
        Ok(Conversation {
            link: Arc::clone(self),
            number,
            frames,
            id: None,
            output: Vec::new(),
            status: None,
        })
    }

    fn deliver(&self, frame: Frame) {
        let mut mailboxes = self.mailboxes();
        let Some(mailbox) = mailboxes.as_mut().and_then(|all| all.get_mut(&frame.conversation)) else {
            return;
        };
        if let (Kind::Output, Some(log)) = (frame.kind, &mut mailbox.log) {
            // A full disk shall not stop the test.
            let _ = log.write_all(&frame.payload);
        }
        // Forgotten conversations are still told.
        let _ = mailbox.frames.send(frame);
    }

    fn send(&self, frame: &Frame) -> Result<()> {
        let stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        frame.write(&*stream).context("the nested host is gone")
    }

    fn mailboxes(&self) -> MutexGuard<'_, Option<HashMap<u32, Mailbox>>> {
        self.mailboxes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A command that runs in the nested host, or a connection; ended when dropped.
#[derive(Debug)]
pub struct Conversation {
    link: Arc<Link>,
    number: u32,
    frames: Receiver<Frame>,
    id: Option<u32>,
    output: Vec<u8>,
    status: Option<i32>,
}

impl Conversation {
    /// The process id of the command's shell in the nested host.
    pub fn id(&self) -> Option<u32> {
        self.id
    }

    /// Waits until the porter says that it has begun.
    pub fn wait_started(&mut self, limit: Duration) -> Result<()> {
        let start = Instant::now();
        loop {
            let frame = self.next(limit.saturating_sub(start.elapsed()))?;
            match frame.map(|frame| (frame.kind, frame.number())) {
                Some((Kind::Started, id)) => {
                    self.id = id.map(u32::from_le_bytes);
                    return Ok(());
                }
                Some((Kind::Ended, _)) => bail!("{}", self.text().trim()),
                Some(_) => {}
                None => bail!("the nested host says nothing for {:.0} s", limit.as_secs_f64()),
            }
        }
    }

    /// The exit status once it has ended; `None` if it has not within `limit`.
    pub fn wait(&mut self, limit: Duration) -> Result<Option<i32>> {
        let start = Instant::now();
        while self.status.is_none() {
            if self.next(limit.saturating_sub(start.elapsed()))?.is_none() {
                break;
            }
        }
        Ok(self.status)
    }

    /// The next chunk of output; empty at the end, `None` if none comes within `limit`.
    pub fn chunk(&mut self, limit: Duration) -> Result<Option<Vec<u8>>> {
        let start = Instant::now();
        loop {
            if !self.output.is_empty() || self.status.is_some() {
                return Ok(Some(std::mem::take(&mut self.output)));
            }
            if self.next(limit.saturating_sub(start.elapsed()))?.is_none() {
                return Ok(None);
            }
        }
    }

    /// All it has written so far, unless it was taken as chunks.
    pub fn text(&mut self) -> String {
        while let Ok(Some(_)) = self.next(Duration::ZERO) {}
        String::from_utf8_lossy(&self.output).into_owned()
    }

    /// Takes the output as bytes.
    pub fn take(self) -> Vec<u8> {
        let mut this = self;
        std::mem::take(&mut this.output)
    }

    /// Gives it bytes to read.
    pub fn input(&self, bytes: &[u8]) -> Result<()> {
        let send = |chunk: &[u8]| self.link.send(&Frame::new(self.number, Kind::Input, chunk));
        bytes.chunks(LONGEST).try_for_each(send)
    }

    /// Tells it that no more bytes will come.
    pub fn end_input(&self) -> Result<()> {
        self.link.send(&Frame::new(self.number, Kind::Input, Vec::new()))
    }

    /// Kills it and all it has started, or closes the connection.
    pub fn kill(&self) -> Result<()> {
        self.link.send(&Frame::new(self.number, Kind::Kill, Vec::new()))
    }

    /// A handle for another thread that gives it bytes to read.
    pub fn feeder(&self) -> Feeder {
        Feeder { link: Arc::clone(&self.link), number: self.number }
    }

    fn next(&mut self, limit: Duration) -> Result<Option<Frame>> {
        let frame = match self.frames.recv_timeout(limit) {
            Ok(frame) => frame,
            Err(RecvTimeoutError::Timeout) => return Ok(None),
            Err(RecvTimeoutError::Disconnected) => bail!("the nested host is gone"),
        };
        match frame.kind {
            Kind::Output => self.output.extend(&frame.payload),
            Kind::Ended => self.status = Some(frame.number().map_or(-1, i32::from_le_bytes)),
            _ => {}
        }
        Ok(Some(frame))
    }
}

impl Drop for Conversation {
    fn drop(&mut self) {
        if self.status.is_none() {
            // The host may be gone.
            let _ = self.kill();
        }
        if let Some(mailboxes) = self.link.mailboxes().as_mut() {
            mailboxes.remove(&self.number);
        }
    }
}

/// Gives bytes to a conversation of another thread.
#[derive(Debug)]
pub struct Feeder {
    link: Arc<Link>,
    number: u32,
}

impl Feeder {
    /// Gives it bytes to read; none: there will be no more.
    pub fn input(&self, bytes: &[u8]) -> Result<()> {
        self.link.send(&Frame::new(self.number, Kind::Input, bytes))
    }
}
