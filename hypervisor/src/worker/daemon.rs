//! The control socket: one daemon at a time, and the next one takes its place.

use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};

use super::Input;
use super::lines::Lines;
use crate::control::{Answer, Command, Event, Line, Request, Response};

/// A daemon that reads nothing for so long has lost us.
const PATIENCE: Duration = Duration::from_secs(5);

/// Before the next attempt to take a daemon in.
const AGAIN: Duration = Duration::from_millis(100);

/// A daemon's connection, for writing.
#[derive(Debug)]
struct Connection(Mutex<UnixStream>);

impl Connection {
    fn send(&self, line: &Line) {
        let Ok(mut bytes) = serde_json::to_vec(line) else { return };
        bytes.push(b'\n');
        let mut stream = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if stream.write_all(&bytes).is_err() {
            // Half a line may have gone out. The reader notices that this is the end.
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }
}

/// Whoever is the daemon now; clones mean the same one.
#[derive(Debug, Clone, Default)]
pub struct Daemon(Arc<Mutex<Option<Arc<Connection>>>>);

impl Daemon {
    /// Tells it, if it is there. A later daemon asks how things stand.
    pub fn tell(&self, event: Event) {
        let connection = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(connection) = connection {
            connection.send(&Line::Event(event));
        }
    }

    fn set(&self, connection: Option<Arc<Connection>>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = connection;
    }
}

/// Where the response to one request goes: to who asked, even if another daemon came meanwhile.
#[derive(Debug)]
pub struct Reply {
    connection: Arc<Connection>,
    id: u64,
}

impl Reply {
    /// Responds.
    pub fn give(self, result: Result<Answer, String>) {
        self.connection.send(&Line::Response(Response { id: self.id, result }));
    }
}

/// A request, with the descriptor that came beside it.
#[derive(Debug)]
pub struct Asked {
    /// What.
    pub command: Command,
    /// For [`Command::ConnectLegacy`].
    pub fd: Option<OwnedFd>,
    /// To whom.
    pub reply: Reply,
}

/// The daemon there is, as the serving thread sees it.
struct Current {
    stream: UnixStream,
    lines: Lines,
    connection: Arc<Connection>,
}

impl Current {
    fn new(stream: UnixStream) -> std::io::Result<Self> {
        stream.set_write_timeout(Some(PATIENCE))?;
        let connection = Arc::new(Connection(Mutex::new(stream.try_clone()?)));
        Ok(Self { stream, lines: Lines::default(), connection })
    }

    /// Passes on what has come; false if the connection is of no more use.
    fn read(&mut self, inputs: &Sender<Input>) -> bool {
        match self.lines.read(&self.stream) {
            Ok(true) => {}
            Ok(false) => return false,
            Err(error) => {
                tracing::warn!(%error, "the control connection fails");
                return false;
            }
        }
        while let Some(line) = self.lines.line() {
            let request: Request = match serde_json::from_slice(&line) {
                Ok(request) => request,
                Err(error) => {
                    tracing::warn!(%error, "the daemon is not understood; its connection is ended");
                    return false;
                }
            };
            let legacy = matches!(request.command, Command::ConnectLegacy { .. });
            let fd = if legacy { self.lines.fd() } else { None };
            let reply = Reply { connection: Arc::clone(&self.connection), id: request.id };
            if inputs.send(Input::Asked(Asked { command: request.command, fd, reply })).is_err() {
                return false;
            }
        }
        true
    }
}

/// Takes daemons in, for ever.
///
/// # Errors
/// Waiting for them fails.
pub fn serve(listener: &UnixListener, daemon: &Daemon, inputs: &Sender<Input>) -> std::io::Result<()> {
    let mut current: Option<Current> = None;
    loop {
        let (came, said) = {
            let fds = std::iter::once(listener.as_fd()).chain(current.iter().map(|it| it.stream.as_fd()));
            let mut fds: Vec<_> = fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
            match poll(&mut fds, None) {
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            let ready = |index: usize| fds.get(index).is_some_and(|fd| !fd.revents().is_empty());
            (ready(0), ready(1))
        };
        if said && !current.as_mut().is_some_and(|it| it.read(inputs)) {
            current = None;
            daemon.set(None);
        }
        if came {
            match listener.accept().and_then(|(stream, _)| Current::new(stream)) {
                Ok(next) => {
                    if let Some(old) = current.replace(next) {
                        let _ = old.stream.shutdown(std::net::Shutdown::Both);
                    }
                    daemon.set(current.as_ref().map(|it| Arc::clone(&it.connection)));
                }
                // Out of descriptors, or a daemon that went away again: a later one must get in.
                Err(error) => {
                    tracing::warn!(%error, "a daemon could not be taken in");
                    std::thread::sleep(AGAIN);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Read};
    use std::sync::mpsc::channel;

    use super::*;
    use crate::control::State;

    fn ask(stream: &mut UnixStream, id: u64, command: Command) {
        let mut line = serde_json::to_vec(&Request { id, command }).unwrap();
        line.push(b'\n');
        stream.write_all(&line).unwrap();
    }

    fn hear(stream: &UnixStream) -> Line {
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    #[test]
    fn next_daemon_takes_the_place_of_the_last_and_each_gets_its_own_answers() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let (inputs, asked) = channel();
        let daemon = Daemon::default();
        let teller = daemon.clone();
        std::thread::spawn(move || serve(&listener, &daemon, &inputs));

        let mut first = UnixStream::connect(&path).unwrap();
        ask(&mut first, 7, Command::Pause);
        let Input::Asked(Asked { command: Command::Pause, fd: None, reply }) = asked.recv().unwrap() else {
            panic!("another request came")
        };
        reply.give(Ok(Answer::Done));
        assert_eq!(hear(&first), Line::Response(Response { id: 7, result: Ok(Answer::Done) }));

        ask(&mut first, 8, Command::Show);
        let Input::Asked(late) = asked.recv().unwrap() else { panic!("no request") };
        let mut second = UnixStream::connect(&path).unwrap();
        ask(&mut second, 1, Command::Resume);
        let Input::Asked(Asked { command: Command::Resume, reply, .. }) = asked.recv().unwrap() else {
            panic!("another request came")
        };
        assert_eq!(first.read(&mut [0]).unwrap(), 0, "the first daemon is let go");
        late.reply.give(Ok(Answer::Done));
        reply.give(Err("no".into()));
        assert_eq!(hear(&second), Line::Response(Response { id: 1, result: Err("no".into()) }));
        teller.tell(Event::State(State::Off));
        assert_eq!(hear(&second), Line::Event(Event::State(State::Off)));

        second.write_all(b"nonsense\n").unwrap();
        assert_eq!(second.read(&mut [0]).unwrap(), 0, "nonsense ends the connection");
        let mut third = UnixStream::connect(&path).unwrap();
        ask(&mut third, 1, Command::Stop);
        assert!(matches!(asked.recv().unwrap(), Input::Asked(Asked { command: Command::Stop, .. })));
    }
}
