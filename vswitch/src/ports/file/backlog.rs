//! Bytes on their way into a file, which a thread of their own writes: a slow disk holds up nobody who switches frames.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{JoinHandle, sleep};
use std::time::Duration;

/// Pieces of about 64 KiB that wait for the disk before it counts as too slow.
const MOST: usize = 256;

/// Pieces that may follow all the same: what was gathered before, and the end.
const REST: usize = 8;

/// Writes, and says at its end how that went.
pub type Thread = JoinHandle<io::Result<()>>;

/// What happens to frames that come faster than the disk takes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhenFull {
    /// They wait: whoever writes has all the time in the world.
    Wait,
    /// They are lost, and counted.
    Lose,
}

/// The writing end. What was written before it is dropped reaches the stream in its own time.
#[derive(Debug)]
pub struct Backlog {
    pieces: SyncSender<Vec<u8>>,
    /// `None` once it was told why it ended.
    thread: Option<Thread>,
    /// Pieces that wait or are being written.
    pending: Arc<AtomicUsize>,
    when_full: WhenFull,
}

impl Backlog {
    /// Starts the thread that writes to `stream`.
    ///
    /// # Errors
    /// The kernel grants no thread.
    pub fn start(stream: impl Write + Send + 'static, when_full: WhenFull) -> io::Result<Self> {
        let (pieces, inbox) = sync_channel(MOST + REST);
        let pending = Arc::new(AtomicUsize::new(0));
        let theirs = Arc::clone(&pending);
        let thread = std::thread::Builder::new().name("capture-file".into());
        let thread = thread.spawn(move || write_out(stream, &inbox, &theirs))?;
        Ok(Self { pieces, thread: Some(thread), pending, when_full })
    }

    fn pending(&self) -> usize {
        self.pending.load(Ordering::Acquire)
    }

    /// False while the disk is so far behind that nothing more may be written.
    pub fn has_room(&self) -> bool {
        self.when_full == WhenFull::Wait || self.pending() < MOST
    }

    /// Waits until the stream has taken everything.
    ///
    /// # Errors
    /// It failed.
    pub fn drain(&mut self) -> io::Result<()> {
        while self.pending() > 0 && self.thread.as_ref().is_some_and(|thread| !thread.is_finished()) {
            sleep(Duration::from_millis(1));
        }
        self.flush()
    }

    /// Nothing more comes: the thread writes what is left, closes the stream and ends. With it comes how much is left.
    ///
    /// # Errors
    /// The stream has failed, and said why.
    pub fn end(self) -> io::Result<(Thread, Arc<AtomicUsize>)> {
        let thread = self.thread.ok_or(io::ErrorKind::BrokenPipe)?;
        Ok((thread, self.pending))
    }
}

/// The stream is closed when this returns.
fn write_out(mut stream: impl Write, inbox: &Receiver<Vec<u8>>, pending: &AtomicUsize) -> io::Result<()> {
    for piece in inbox {
        stream.write_all(&piece)?;
        pending.fetch_sub(1, Ordering::Release);
    }
    stream.flush()
}

/// What the thread has to say; it is waited for.
pub fn outcome(thread: Option<Thread>) -> io::Result<()> {
    let broken = || Err(io::ErrorKind::BrokenPipe.into());
    thread.map_or_else(broken, |thread| thread.join().unwrap_or_else(|_| broken()))
}

impl Write for Backlog {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.pending.fetch_add(1, Ordering::Relaxed);
        if self.pieces.send(bytes.to_vec()).is_err() {
            outcome(self.thread.take())?;
        }
        Ok(bytes.len())
    }

    /// What was written is on its way; a stream that has failed says so.
    fn flush(&mut self) -> io::Result<()> {
        if self.thread.as_ref().is_none_or(JoinHandle::is_finished) {
            outcome(self.thread.take())
        } else {
            Ok(())
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::Mutex;
    use std::sync::mpsc::{Sender, channel};

    use super::*;

    /// A disk that takes nothing until it is told to go on, and then everything.
    pub struct Disk {
        stuck: Receiver<()>,
        pub taken: Arc<Mutex<Vec<u8>>>,
    }

    impl Disk {
        pub fn new() -> (Self, Sender<()>, Arc<Mutex<Vec<u8>>>) {
            let ((go, stuck), taken) = (channel(), Arc::default());
            (Self { stuck, taken: Arc::clone(&taken) }, go, taken)
        }
    }

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            // Ends when the other end is dropped.
            let _ = self.stuck.recv();
            self.taken.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn writer_that_waits_loses_nothing_on_a_slow_disk() {
        let (disk, go, taken) = Disk::new();
        let mut backlog = Backlog::start(disk, WhenFull::Wait).unwrap();
        let pending = Arc::clone(&backlog.pending);
        let writer = std::thread::spawn(move || {
            for number in 0..1000u32 {
                backlog.write_all(&number.to_le_bytes()).unwrap();
            }
            outcome(Some(backlog.end()?.0))
        });
        // One is being written, and one more wants to be sent.
        while pending.load(Ordering::Acquire) < MOST + REST + 2 {
            std::thread::yield_now();
        }
        assert!(!writer.is_finished());
        drop(go);
        writer.join().unwrap().unwrap();
        assert_eq!(*taken.lock().unwrap(), (0..1000u32).flat_map(u32::to_le_bytes).collect::<Vec<_>>());
    }

    #[test]
    fn stream_that_fails_is_told_of_and_closed() {
        let mut backlog =
            Backlog::start(std::fs::File::create("/dev/full").unwrap(), WhenFull::Lose).unwrap();
        backlog.write_all(&[1]).unwrap();
        let full = Some(rustix::io::Errno::NOSPC.raw_os_error());
        assert_eq!(backlog.drain().unwrap_err().raw_os_error(), full);
        assert!(backlog.write(&[1]).is_err() && backlog.flush().is_err() && backlog.end().is_err());
    }
}
