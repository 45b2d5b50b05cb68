//! The serial port: output to a log and to every console that is connected, input from them.
//!
//! A console that does not read loses output; it never holds the guest up. The guest's processor only writes down what
//! consoles are to be shown: a thread of its own sends it, many bytes at once where the guest writes one at a time.

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::convert::Infallible;
use std::fmt;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, Trigger};
use vmq::doorbell::Doorbell;

use crate::devices::bus::BusDevice;

/// Output that a new console is shown.
const BACKLOG: usize = 4096;

/// The log is written when a line ends or this much is waiting.
const LINE: usize = 512;

/// From the first byte of output until consoles are shown it, with all that came meanwhile: unnoticed by who types, and time
/// for a burst of the driver's (16 bytes, an exit each).
const GATHER: Duration = Duration::from_millis(2);

/// Output that waits for a console to read; what comes beyond is lost to it. A socket takes few messages however short, so a
/// reader that is late by a screen must be waited for here.
const WAITING: usize = 64 << 10;

/// Consoles at once.
const CONSOLES: usize = 8;

/// Before another attempt to let a console in.
const RETRY: Duration = Duration::from_millis(100);

/// The port's interrupt.
#[derive(Debug)]
struct Line(Arc<Doorbell>);

impl Trigger for Line {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.ring();
        Ok(())
    }
}

/// Wakes whoever feeds input when the guest has taken it.
#[derive(Debug)]
struct Drained(Arc<Doorbell>);

impl SerialEvents for Drained {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        self.0.ring();
    }
}

/// Interrupt identification register: its offset, "none", and "received data available" (16550, table 3).
const IDENTIFICATION: u8 = 2;
const NONE: u8 = 1;
const RECEIVED: u8 = 4;
/// Interrupt enable register: its offset, and the bit for received data.
const ENABLE: u8 = 1;
const ENABLE_RECEIVED: u8 = 1;
/// Bytes of input that the model holds.
const FIFO: usize = 64;

trait Identify {
    /// What a level would say: the model takes "received data" back with each byte that is read, also while more are
    /// there. A driver that stops in between (Linux after 256 bytes) would find no reason for the interrupt that brings it
    /// back, and the rest would wait for the next input.
    fn identify(&mut self, identification: u8) -> u8;
}

impl<W: Write> Identify for Serial<Line, Drained, W> {
    fn identify(&mut self, identification: u8) -> u8 {
        let waits = self.fifo_capacity() < FIFO && self.read(ENABLE) & ENABLE_RECEIVED != 0;
        if waits && identification & NONE != 0 { (identification & !NONE) | RECEIVED } else { identification }
    }
}

/// Somebody who looks on.
#[derive(Debug)]
struct Console {
    stream: Arc<UnixStream>,
    waiting: VecDeque<u8>,
}

impl Console {
    /// Sends what waits; false if nobody is there any more.
    fn send(&mut self) -> bool {
        while !self.waiting.is_empty() {
            match (&*self.stream).write(self.waiting.as_slices().0) {
                Ok(sent) => drop(self.waiting.drain(..sent)),
                Err(error) => return error.kind() == ErrorKind::WouldBlock,
            }
        }
        true
    }

    /// Notes what is to be sent; true if nothing was waiting before.
    fn note(&mut self, bytes: &[u8]) -> bool {
        let first = self.waiting.is_empty();
        let room = WAITING.saturating_sub(self.waiting.len());
        self.waiting.extend(bytes.iter().take(room));
        first
    }
}

/// Where the guest's output goes.
#[derive(Debug)]
struct Output {
    log: Option<File>,
    /// The log is a terminal: nothing waits for the end of a line.
    prompt: bool,
    line: Vec<u8>,
    backlog: VecDeque<u8>,
    consoles: Vec<Console>,
    /// Wakes whoever serves consoles when there is something to send.
    wake: Arc<Doorbell>,
}

impl Output {
    fn flush_log(&mut self) {
        if let Some(log) = &mut self.log
            && log.write_all(&self.line).is_err()
        {
            // A full disk must not stop the guest; what could not be written is lost.
            self.log = None;
        }
        self.line.clear();
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.line.extend_from_slice(bytes);
        if self.prompt || self.line.len() >= LINE || self.line.ends_with(b"\n") {
            self.flush_log();
        }
        self.backlog.extend(bytes);
        let surplus = self.backlog.len().saturating_sub(BACKLOG);
        self.backlog.drain(..surplus);
        let mut first = false;
        self.consoles.iter_mut().for_each(|console| first |= console.note(bytes));
        if first {
            self.wake.ring();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        self.flush_log();
    }
}

/// The registers of a 16550, and what is behind them.
struct Port {
    serial: Option<Serial<Line, Drained, Output>>,
}

/// The serial port; clones are the same port.
#[derive(Clone)]
pub struct SerialPort {
    port: Arc<Mutex<Port>>,
    interrupt: Arc<Doorbell>,
    drained: Arc<Doorbell>,
}

impl fmt::Debug for SerialPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SerialPort").field("interrupt", &self.interrupt).finish_non_exhaustive()
    }
}

impl SerialPort {
    /// A port whose output is appended to `log`.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn new(log: Option<File>) -> std::io::Result<Self> {
        Self::with(log, false)
    }

    /// A port whose output goes to a terminal at once.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn on_terminal(terminal: File) -> std::io::Result<Self> {
        Self::with(Some(terminal), true)
    }

    fn with(log: Option<File>, prompt: bool) -> std::io::Result<Self> {
        let (interrupt, drained) = (Arc::new(Doorbell::new()?), Arc::new(Doorbell::new()?));
        let (line, backlog, consoles) = Default::default();
        let output = Output { log, prompt, line, backlog, consoles, wake: Arc::clone(&drained) };
        let serial = Serial::with_events(Line(Arc::clone(&interrupt)), Drained(Arc::clone(&drained)), output);
        Ok(Self { port: Arc::new(Mutex::new(Port { serial: Some(serial) })), interrupt, drained })
    }

    /// The eventfd that is to raise the port's interrupt.
    pub fn interrupt(&self) -> &Arc<Doorbell> {
        &self.interrupt
    }

    fn lock(&self) -> MutexGuard<'_, Port> {
        self.port.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers as after power-on; log and consoles stay.
    pub fn reset(&self) {
        let mut port = self.lock();
        if let Some(serial) = port.serial.take() {
            let output = serial.into_writer();
            let (line, drained) = (Line(Arc::clone(&self.interrupt)), Drained(Arc::clone(&self.drained)));
            port.serial = Some(Serial::with_events(line, drained, output));
        }
    }

    /// Writes what waits for the end of its line, and sends what consoles take.
    pub fn flush(&self) {
        if let Some(serial) = &mut self.lock().serial {
            serial.writer_mut().flush_log();
        }
        self.send_waiting();
    }

    /// Hands as much of `input` to the guest as its buffer takes.
    pub fn feed(&self, input: &mut VecDeque<u8>) {
        let mut port = self.lock();
        let Some(serial) = &mut port.serial else { return };
        while !input.is_empty() {
            let room = serial.fifo_capacity().min(input.len());
            let bytes: Vec<u8> = input.iter().take(room).copied().collect();
            match serial.enqueue_raw_bytes(&bytes) {
                Ok(taken) if taken > 0 => drop(input.drain(..taken)),
                _ => return,
            }
        }
    }

    /// Reads `input` to its end for the guest (a terminal).
    pub fn feed_from(&self, mut input: impl Read) {
        let mut bytes = [0; 64];
        while let Ok(count @ 1..) = input.read(&mut bytes) {
            let mut waiting: VecDeque<u8> = bytes[..count].iter().copied().collect();
            self.feed(&mut waiting);
            while !waiting.is_empty() {
                let mut fds = [PollFd::new(&*self.drained, PollFlags::IN)];
                let _ = poll(&mut fds, None);
                self.drained.clear();
                self.feed(&mut waiting);
            }
        }
    }

    /// The consoles, and whether output waits for them.
    fn consoles(&self) -> Vec<(Arc<UnixStream>, bool)> {
        let port = self.lock();
        let consoles = port.serial.iter().flat_map(|serial| &serial.writer().consoles);
        consoles.map(|console| (Arc::clone(&console.stream), !console.waiting.is_empty())).collect()
    }

    /// Sends what waits for consoles.
    fn send_waiting(&self) {
        if let Some(serial) = &mut self.lock().serial {
            serial.writer_mut().consoles.retain_mut(Console::send);
        }
    }

    /// A console connected: shows it what was written last. One too many is turned away.
    fn join(&self, stream: UnixStream) -> std::io::Result<()> {
        stream.set_nonblocking(true)?;
        let mut port = self.lock();
        let Some(serial) = &mut port.serial else { return Ok(()) };
        let output = serial.writer_mut();
        if output.consoles.len() >= CONSOLES {
            return Ok(());
        }
        let mut console = Console { stream: Arc::new(stream), waiting: output.backlog.clone() };
        if console.send() {
            output.consoles.push(console);
        }
        Ok(())
    }

    fn leave(&self, stream: &Arc<UnixStream>) {
        if let Some(serial) = &mut self.lock().serial {
            serial.writer_mut().consoles.retain(|console| !Arc::ptr_eq(&console.stream, stream));
        }
    }

    /// Serves consoles for as long as the listener works.
    ///
    /// # Errors
    /// The listener fails.
    pub fn serve(&self, listener: &UnixListener) -> std::io::Result<()> {
        let mut input = VecDeque::new();
        loop {
            let consoles = self.consoles();
            // While the guest does not take input, no more is read.
            let wanted = |waits: bool| {
                let input = if input.is_empty() { PollFlags::IN } else { PollFlags::empty() };
                if waits { input | PollFlags::OUT } else { input }
            };
            let mut fds =
                vec![PollFd::new(listener, PollFlags::IN), PollFd::new(&*self.drained, PollFlags::IN)];
            fds.extend(consoles.iter().map(|(console, waits)| PollFd::new(&**console, wanted(*waits))));
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            let ready: Vec<PollFlags> = fds.iter().map(PollFd::revents).collect();
            drop(fds);
            if !ready[0].is_empty() {
                // Out of descriptors, or it has left again: the next may have more luck.
                match listener.accept().and_then(|(stream, _)| self.join(stream)) {
                    Ok(()) => {}
                    Err(error) if error.kind() == ErrorKind::InvalidInput => return Err(error),
                    Err(error) => {
                        tracing::debug!(%error, "a console cannot connect");
                        std::thread::sleep(RETRY);
                    }
                }
            }
            if !ready[1].is_empty() {
                self.drained.clear();
            }
            if ready[2..].iter().any(|ready| ready.contains(PollFlags::OUT)) {
                std::thread::sleep(GATHER);
                self.send_waiting();
            }
            for ((console, _), ready) in consoles.iter().zip(&ready[2..]) {
                if (*ready - PollFlags::OUT).is_empty() {
                    continue;
                }
                let mut bytes = [0; 64];
                match (&**console).read(&mut bytes) {
                    Ok(count @ 1..) => input.extend(&bytes[..count]),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    _ => self.leave(console),
                }
            }
            self.feed(&mut input);
        }
    }
}

impl BusDevice for SerialPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let (Some(serial), Ok(offset)) = (&mut self.lock().serial, u8::try_from(offset)) {
            data.fill_with(|| match serial.read(offset) {
                identification if offset == IDENTIFICATION => serial.identify(identification),
                value => value,
            });
        }
    }

    /// Several bytes are a string written to one register.
    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (Some(serial), Ok(offset)) = (&mut self.lock().serial, u8::try_from(offset)) {
            for &byte in data {
                // Interrupts cannot fail, and output does not.
                let _ = serial.write(offset, byte);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Seek, SeekFrom};

    #[test]
    fn output_reaches_log_and_consoles_and_input_comes_back() {
        let log = tempfile::tempfile().unwrap();
        let mut port = SerialPort::new(Some(log.try_clone().unwrap())).unwrap();
        port.write(0, b"early ");
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        port.join(ours).unwrap();
        port.write(0, b"boot\n");
        port.flush();
        let mut bytes = [0; 11];
        theirs.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"early boot\n");
        let mut text = String::new();
        (&log).seek(SeekFrom::Start(0)).unwrap();
        (&log).read_to_string(&mut text).unwrap();
        assert_eq!(text, "early boot\n");

        let mut input: VecDeque<u8> = (0..100).collect();
        port.feed(&mut input);
        assert_eq!(input.len(), 36);
        let mut byte = [0];
        for expected in 0..64 {
            port.read(0, &mut byte);
            assert_eq!(byte, [expected]);
        }
        assert!(port.drained.clear());
        port.feed(&mut input);
        assert!(input.is_empty());
    }

    #[test]
    fn interrupt_is_told_apart_while_input_is_there_however_often_it_was_asked_for() {
        let mut port = SerialPort::new(None).unwrap();
        let mut reader = port.clone();
        let mut read = |offset| {
            let mut byte = [0];
            reader.read(offset, &mut byte);
            byte[0]
        };
        port.write(u64::from(ENABLE), &[ENABLE_RECEIVED]);
        port.feed(&mut VecDeque::from(vec![1, 2]));
        assert_eq!(read(2) & 0xf, RECEIVED);
        // One byte is taken, the other is not.
        assert_eq!(read(0), 1);
        assert_eq!(read(2) & 0xf, RECEIVED);
        assert_eq!(read(0), 2);
        assert_eq!(read(2) & 0xf, NONE);
    }

    #[test]
    fn console_that_reads_late_misses_nothing() {
        let port = SerialPort::new(None).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let server = port.clone();
        std::thread::spawn(move || server.serve(&listener));
        let mut late = UnixStream::connect(&path).unwrap();
        while port.consoles().is_empty() {
            std::thread::yield_now();
        }
        let text: Vec<u8> = (0..20_000u32).map(|count| b'a' + u8::try_from(count % 26).unwrap()).collect();
        let mut guest = port;
        text.iter().for_each(|byte| guest.write(0, &[*byte]));
        let mut read = vec![0; text.len()];
        late.read_exact(&mut read).unwrap();
        assert_eq!(read, text);
    }

    #[test]
    fn console_that_does_not_read_holds_nobody_up_and_one_that_left_is_forgotten() {
        let mut port = SerialPort::new(None).unwrap();
        let (stuck, _keep) = UnixStream::pair().unwrap();
        let (gone, _) = UnixStream::pair().unwrap();
        port.join(stuck).unwrap();
        port.join(gone).unwrap();
        for _ in 0..1000 {
            port.write(0, &[b'x'; 1000]);
            port.send_waiting();
        }
        assert_eq!(port.consoles().len(), 1);
    }

    #[test]
    fn log_that_cannot_be_written_is_given_up() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let mut port = SerialPort::new(Some(full)).unwrap();
        port.write(0, b"one\ntwo\n");
        port.reset();
        port.write(0, b"three\n");
    }
}
