//! `yard vm console`: the terminal on a guest's serial line, byte for byte. Whatever the guest sends reaches the terminal,
//! as it would on a wire.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};

use super::failure::Failure;
use super::model::Vm;

/// Ctrl-].
const ESCAPE: u8 = 0x1d;

/// Joins the terminal and the console of `vm` until Ctrl-] or the end of either.
pub fn attach(vm: &Vm) -> Result<(), Failure> {
    if vm.pid.is_none() {
        return Err(Failure::failed(format!("VM `{}` is {}, so it has no console", vm.name, vm.state)));
    }
    let socket = UnixStream::connect(&vm.console).map_err(|error| {
        let advice = match error.kind() {
            io::ErrorKind::PermissionDenied => "\nonly the user of yardd may use consoles; try as root",
            _ => "",
        };
        Failure::failed(format!("{}: {error}{advice}", vm.console.display()))
    })?;
    let terminal = Raw::begin()?;
    if terminal.is_some() {
        eprint!("Connected to VM {}; Ctrl-] leaves.\r\n", vm.name);
    }
    let outcome = join(&socket, io::stdin().lock(), io::stdout().lock(), terminal.is_some());
    drop(terminal);
    eprintln!();
    Ok(outcome?)
}

/// Copies both ways.
fn join(
    socket: &UnixStream,
    mut input: impl Read + AsFd,
    mut output: impl Write,
    escapes: bool,
) -> io::Result<()> {
    let mut piece = vec![0; 4096];
    let mut listening = true;
    loop {
        let (typed, printed) = {
            let mut fds = vec![PollFd::new(socket, PollFlags::IN)];
            if listening {
                fds.push(PollFd::new(&input, PollFlags::IN));
            }
            match poll(&mut fds, None) {
                Err(rustix::io::Errno::INTR) => continue,
                polled => polled?,
            };
            let ready = |index: usize| fds.get(index).is_some_and(|fd| !fd.revents().is_empty());
            (ready(1), ready(0))
        };
        if printed {
            let length = (&mut &*socket).read(&mut piece)?;
            let bytes = piece.get(..length).unwrap_or_default();
            match output.write_all(bytes).and_then(|()| output.flush()) {
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
                written => written?,
            }
            if length == 0 {
                return Ok(());
            }
        }
        if typed {
            let length = input.read(&mut piece)?;
            let bytes = piece.get(..length).unwrap_or_default();
            let end = if escapes { bytes.iter().position(|&byte| byte == ESCAPE) } else { None };
            (&mut &*socket).write_all(bytes.get(..end.unwrap_or(length)).unwrap_or_default())?;
            if end.is_some() {
                return Ok(());
            }
            if length == 0 {
                // A script's input has ended; what the guest still says is wanted.
                listening = false;
            }
        }
    }
}

/// The terminal without line editing and signals, while it is there.
struct Raw(Termios);

impl Raw {
    /// None if standard input is no terminal.
    fn begin() -> io::Result<Option<Self>> {
        let terminal = io::stdin();
        if !isatty(&terminal) {
            return Ok(None);
        }
        let before = tcgetattr(&terminal)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&terminal, OptionalActions::Drain, &raw)?;
        Ok(Some(Self(before)))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), OptionalActions::Drain, &self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_go_both_ways_until_the_escape() {
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let (input, mut keyboard) = UnixStream::pair().unwrap();
        keyboard.write_all(b"ls\r\x1dnot this").unwrap();
        guest.write_all(b"login: ").unwrap();
        let mut screen = Vec::new();
        join(&ours, input, &mut screen, true).unwrap();
        drop(ours);
        let mut typed = Vec::new();
        guest.read_to_end(&mut typed).unwrap();
        assert_eq!((typed.as_slice(), screen.as_slice()), (&b"ls\r"[..], &b"login: "[..]));
    }

    #[test]
    fn script_may_end_before_the_guest_has_said_all() {
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let (input, mut script) = UnixStream::pair().unwrap();
        script.write_all(b"\x1dkept").unwrap();
        drop(script);
        let said = std::thread::spawn(move || {
            let mut typed = [0; 5];
            guest.read_exact(&mut typed).unwrap();
            guest.write_all(b"answer").unwrap();
            typed
        });
        let mut screen = Vec::new();
        join(&ours, input, &mut screen, false).unwrap();
        assert_eq!((said.join().unwrap(), screen.as_slice()), (*b"\x1dkept", &b"answer"[..]));
    }
}
