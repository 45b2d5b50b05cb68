//! The control connection to a worker: lines of JSON both ways. The worker serves a guest that may have broken it, so
//! what it says is bounded, and read as that of a stranger.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use hypervisor::control::{Answer, Command, Event, Line, Request};

use super::process::send_line;

/// A longer line is no answer, in bytes.
const MAX_LINE: usize = 1 << 20;
/// Requests that may be under way: more than the API's connections bring.
const MAX_WAITING: usize = 512;
/// Read at once, in bytes; what is left is read when the others had their turn.
const PIECE: usize = 64 << 10;

/// What came from a worker; `W` is what a request left to be remembered.
#[derive(Debug)]
pub enum Heard<W> {
    /// Of its own accord.
    Event(Event),
    /// To a request.
    Answer(W, Result<Answer, String>),
}

/// A connection.
#[derive(Debug)]
pub struct Link<W> {
    socket: UnixStream,
    partial: Vec<u8>,
    next: u64,
    waiting: BTreeMap<u64, (Instant, W)>,
}

impl<W> Link<W> {
    /// Connects to the worker that listens at `path`.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let socket = UnixStream::connect(path)?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket, partial: Vec::new(), next: 1, waiting: BTreeMap::new() })
    }

    /// Asks for `command`, with descriptors beside it; `waiter` comes back with the answer, or after `deadline`.
    ///
    /// # Errors
    /// Returns the waiter with the reason.
    pub fn request(
        &mut self,
        command: Command,
        fds: &[BorrowedFd<'_>],
        deadline: Instant,
        waiter: W,
    ) -> Result<(), (W, io::Error)> {
        if self.waiting.len() >= MAX_WAITING {
            return Err((waiter, io::Error::other("too many requests are under way")));
        }
        let id = self.next;
        self.next += 1;
        let sent =
            serde_json::to_vec(&Request { id, command }).map_err(io::Error::from).and_then(|mut line| {
                line.push(b'\n');
                send_line(&self.socket, &line, fds)
            });
        match sent {
            Ok(()) => {
                self.waiting.insert(id, (deadline, waiter));
                Ok(())
            }
            Err(error) => Err((waiter, error)),
        }
    }

    /// What has come; false with it if nothing more will.
    ///
    /// # Errors
    /// If the worker speaks nonsense.
    pub fn read(&mut self) -> io::Result<(Vec<Heard<W>>, bool)> {
        let mut piece = vec![0; PIECE];
        let mut open = true;
        match self.socket.read(&mut piece) {
            Ok(0) => open = false,
            Ok(length) => self.partial.extend_from_slice(piece.get(..length).unwrap_or_default()),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => open = false,
            Err(error) => return Err(error),
        }
        let whole = self.partial.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
        let rest = self.partial.split_off(whole);
        let lines = std::mem::replace(&mut self.partial, rest);
        if self.partial.len() > MAX_LINE {
            return Err(io::Error::other(format!("a line is longer than {MAX_LINE} bytes")));
        }
        let mut heard = Vec::new();
        for line in lines.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()) {
            match serde_json::from_slice(line)? {
                Line::Event(event) => heard.push(Heard::Event(event)),
                // An answer to nothing, or to a request whose time is over, is of no use to anybody.
                Line::Response(response) => {
                    let waiter = self.waiting.remove(&response.id);
                    heard.extend(waiter.map(|(_, waiter)| Heard::Answer(waiter, response.result)));
                }
            }
        }
        Ok((heard, open))
    }

    /// When the next waiter's time is over.
    pub fn deadline(&self) -> Option<Instant> {
        self.waiting.values().map(|(deadline, _)| *deadline).min()
    }

    /// The waiters whose time is over.
    pub fn overdue(&mut self, now: Instant) -> Vec<W> {
        let late = |(deadline, _): &(Instant, W)| *deadline <= now;
        let ids: Vec<u64> =
            self.waiting.iter().filter(|(_, waiting)| late(waiting)).map(|(&id, _)| id).collect();
        ids.iter().filter_map(|id| self.waiting.remove(id)).map(|(_, waiter)| waiter).collect()
    }

    /// All waiters: there will be no answers.
    pub fn abandon(&mut self) -> Vec<W> {
        std::mem::take(&mut self.waiting).into_values().map(|(_, waiter)| waiter).collect()
    }
}

impl<W> AsFd for Link<W> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixListener;
    use std::time::Duration;

    use super::*;

    fn pair() -> (tempfile::TempDir, Link<&'static str>, UnixStream) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let link = Link::connect(&path).unwrap();
        (dir, link, listener.accept().unwrap().0)
    }

    #[test]
    fn answers_find_their_waiters_in_any_order_and_piece_by_piece() {
        let (_dir, mut link, mut worker) = pair();
        let later = Instant::now() + Duration::from_secs(60);
        link.request(Command::Pause, &[], later, "pause").unwrap();
        link.request(Command::Show, &[], later, "show").unwrap();
        let answers = concat!(
            r#"{"response":{"id":2,"result":{"Err":"no"}}}"#,
            "\n",
            r#"{"event":{"state":"running"}}"#,
            "\n",
            r#"{"response":{"id":9,"result":{"Ok":"done"}}}"#,
            "\n",
            r#"{"response":{"id":1,"result":{"Ok":"done"}}}"#,
            "\n"
        );
        let (first, second) = answers.split_at(60);
        worker.write_all(first.as_bytes()).unwrap();
        let (heard, open) = link.read().unwrap();
        assert!(open);
        assert!(matches!(&heard[..], [Heard::Answer("show", Err(no))] if no == "no"), "{heard:?}");
        worker.write_all(second.as_bytes()).unwrap();
        let (heard, _) = link.read().unwrap();
        assert!(
            matches!(&heard[..], [Heard::Event(_), Heard::Answer("pause", Ok(Answer::Done))]),
            "{heard:?}"
        );
        drop(worker);
        assert!(!link.read().unwrap().1);
    }

    #[test]
    fn overdue_waiters_are_given_back_once() {
        let (_dir, mut link, _worker) = pair();
        let now = Instant::now();
        link.request(Command::Pause, &[], now, "pause").unwrap();
        link.request(Command::Show, &[], now + Duration::from_secs(60), "show").unwrap();
        assert_eq!(link.deadline(), Some(now));
        assert_eq!(link.overdue(now), ["pause"]);
        assert_eq!(link.overdue(now), [""; 0]);
        assert_eq!(link.abandon(), ["show"]);
    }

    #[test]
    fn nonsense_and_endless_lines_are_refused() {
        let (_dir, mut link, mut worker) = pair();
        worker.write_all(b"{\"event\": 5}\n").unwrap();
        assert!(link.read().is_err());
        let (_dir, mut link, mut worker) = pair();
        let endless = std::thread::spawn(move || while worker.write_all(&[b'x'; 4096]).is_ok() {});
        let refused = loop {
            if let Err(error) = link.read() {
                break error;
            }
        };
        assert!(refused.to_string().contains("longer than"), "{refused}");
        drop(link);
        endless.join().unwrap();
    }
}
