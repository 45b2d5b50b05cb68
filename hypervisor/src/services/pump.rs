//! The thread that serves the channels of all integration services of a VM.
//!
//! It sleeps in one `epoll` on the doorbells, its own eventfd for what the worker asks, and the next moment that a service
//! asked for. A few packets a second: nothing here is polled.
//!
//! A guest that breaks a ring or a protocol loses that one service, until it opens the channel again.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{Timespec, epoll};
use vmbus::channel::OpenChannel;
use vmbus::guid::Guid;
use vmbus::ring::{PacketBuffer, PacketHeader, PacketKind, WriteError};
use vmq::doorbell::Doorbell;
use vmq::worker::{Clock, Nanos};

use super::{Answer, Command, CommandError, Mistake, Moment, Outbox, Services};
use crate::control::GuestStatus;

/// Packets taken from one channel before the others have their turn.
const BUDGET: usize = 64;
/// Packets that wait for room in a ring; a guest that reads nothing gets no more.
const BACKLOG: usize = 64;
/// Event that stands for the worker's requests.
const WAKE: u64 = u64::MAX;

/// What all services tell.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Report {
    /// What is known of the guest.
    pub guest: GuestStatus,
    /// Services that are stopped: name and reason.
    pub faults: Vec<(String, String)>,
}

/// Why a request to the pump failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PumpError {
    /// No such service.
    #[error("no integration service has the instance {0}")]
    Unknown(Guid),
    /// The thread has ended.
    #[error("integration services have ended")]
    Gone,
}

enum Ask {
    Open(Guid, Box<OpenChannel>),
    Close(Guid, mpsc::Sender<()>),
    Reset(mpsc::Sender<()>),
    Command(Command),
    Report(mpsc::Sender<Report>),
    Pause,
    Resume,
}

/// Called on the pump's thread with a service's name and the reason when it is stopped; must not call the pump.
pub type OnFault = Box<dyn Fn(&str, &Mistake) + Send>;

/// The pump's handle. Dropping it ends the thread.
#[derive(Debug)]
pub struct Pump {
    asks: Option<mpsc::Sender<Ask>>,
    wake: Arc<Doorbell>,
    devices: Vec<(Guid, Guid)>,
    thread: Option<JoinHandle<()>>,
}

impl Pump {
    /// Starts the thread, which calls `confine` first, with no channel open.
    ///
    /// # Errors
    /// Out of descriptors or threads.
    pub fn start(
        services: Services,
        on_fault: OnFault,
        confine: fn() -> std::io::Result<()>,
    ) -> std::io::Result<Self> {
        let wake = Arc::new(Doorbell::new()?);
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        watch(&epoll, &wake, WAKE)?;
        let devices = services.devices();
        let seats = devices.iter().map(|(_, instance)| Seat::new(*instance)).collect();
        let (sender, asks) = mpsc::channel();
        let time = Timeline { clock: Clock::default(), stopped: None, lost: 0 };
        let run = Loop { services, seats, asks, epoll, time, buffer: PacketBuffer::new(), on_fault };
        let thread = crate::confine::spawn("services", confine, move || run.run())?;
        Ok(Self { asks: Some(sender), wake, devices, thread: Some(thread) })
    }

    /// Interface and instance of each service, to be offered to the guest.
    pub fn devices(&self) -> &[(Guid, Guid)] {
        &self.devices
    }

    fn ask(&self, ask: Ask) -> Result<(), PumpError> {
        let asks = self.asks.as_ref().ok_or(PumpError::Gone)?;
        asks.send(ask).map_err(|_| PumpError::Gone)?;
        self.wake.ring();
        Ok(())
    }

    /// Serves a channel that the guest opened just now, in place of any the device had.
    ///
    /// # Errors
    /// No such device, or the thread has ended.
    pub fn open(&self, instance: Guid, channel: OpenChannel) -> Result<(), PumpError> {
        if !self.devices.iter().any(|(_, known)| *known == instance) {
            return Err(PumpError::Unknown(instance));
        }
        self.ask(Ask::Open(instance, Box::new(channel)))
    }

    /// Lets a channel go. When this returns, nothing touches its rings any more.
    ///
    /// Not to be called with a lock held that [`super::balloon::Balloonable`] takes.
    pub fn close(&self, instance: Guid) {
        self.wait(|done| Ask::Close(instance, done));
    }

    /// Lets all channels go and forgets what was known of the guest, whose memory is what it was at its start. When this
    /// returns, nothing touches the guest. To be called while it does not run.
    pub fn reset(&self) {
        self.wait(Ask::Reset);
    }

    /// Has a command carried out. Its answer comes as it says.
    ///
    /// # Errors
    /// The thread has ended.
    pub fn command(&self, command: Command) -> Result<(), PumpError> {
        self.ask(Ask::Command(command))
    }

    /// Has a command carried out and waits for its answer, at most for `patience`. What comes later comes to nobody: a freeze
    /// is undone then.
    ///
    /// # Errors
    /// The command's.
    pub fn call<T>(
        &self,
        patience: Duration,
        command: impl FnOnce(Answer<T>) -> Command,
    ) -> Result<T, CommandError> {
        let (answer, given) = Answer::channel();
        self.command(command(answer)).map_err(|_| CommandError::Closed)?;
        match given.recv_timeout(patience) {
            Ok(result) => result,
            Err(RecvTimeoutError::Disconnected) => Err(CommandError::Closed),
            Err(RecvTimeoutError::Timeout) => Err(CommandError::NoAnswer { seconds: patience.as_secs() }),
        }
    }

    /// The VM is paused: no time passes for its services.
    pub fn pause(&self) {
        let _ = self.ask(Ask::Pause);
    }

    /// The VM goes on, and its clock is set.
    pub fn resume(&self) {
        let _ = self.ask(Ask::Resume);
    }

    /// What all services tell.
    pub fn status(&self) -> Report {
        self.wait(Ask::Report).unwrap_or_default()
    }

    fn wait<T>(&self, ask: impl FnOnce(mpsc::Sender<T>) -> Ask) -> Option<T> {
        let (done, answer) = mpsc::channel();
        self.ask(ask(done)).ok()?;
        answer.recv().ok()
    }
}

impl Drop for Pump {
    fn drop(&mut self) {
        self.asks = None;
        self.wake.ring();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Edge-triggered: a doorbell is never read, each ring of it is an event.
fn watch(epoll: &OwnedFd, doorbell: &Doorbell, event: u64) -> rustix::io::Result<()> {
    let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
    epoll::add(epoll, doorbell.as_fd(), epoll::EventData::new_u64(event), flags)
}

/// The time that the VM spends running.
struct Timeline {
    clock: Clock,
    stopped: Option<Nanos>,
    /// Spent paused.
    lost: Nanos,
}

impl Timeline {
    fn now(&self) -> Moment {
        let now = self.stopped.unwrap_or_else(|| self.clock.now());
        Moment::START + Duration::from_nanos(now.saturating_sub(self.lost))
    }

    fn pause(&mut self) {
        self.stopped.get_or_insert_with(|| self.clock.now());
    }

    fn resume(&mut self) {
        if let Some(stopped) = self.stopped.take() {
            self.lost = self.lost.saturating_add(self.clock.now().saturating_sub(stopped));
        }
    }
}

/// A service's place at the pump.
struct Seat {
    instance: Guid,
    channel: Option<Box<OpenChannel>>,
    out: Outbox,
    due: Option<Moment>,
    /// To be served in this round.
    called: bool,
}

impl Seat {
    fn new(instance: Guid) -> Self {
        Self { instance, channel: None, out: Outbox::default(), due: None, called: false }
    }

    /// Forgets the channel.
    fn leave(&mut self, epoll: &OwnedFd) {
        if let Some(channel) = self.channel.take() {
            let _ = epoll::delete(epoll, channel.doorbell.as_fd());
        }
        self.out = Outbox::default();
        self.due = None;
    }

    /// Writes what waits, as far as there is room. The doorbell rings when there is more.
    fn flush(&mut self) -> Result<(), Mistake> {
        let Some(channel) = &mut self.channel else { return Ok(()) };
        let outgoing = &mut channel.outgoing;
        while let Some(packet) = self.out.first() {
            match outgoing.write(&PacketHeader::in_band(packet.transaction), &[&packet.payload]) {
                Ok(()) => {
                    self.out.pop();
                }
                Err(WriteError::Full) if outgoing.wait_for_room(packet.payload.len()) => {}
                Err(WriteError::Full) if self.out.len() > BACKLOG => return Err(Mistake::NotReading),
                Err(WriteError::Full) => break,
                Err(WriteError::TooLong(len)) => return Err(Mistake::SmallRing { len }),
                Err(WriteError::Fault(fault)) => return Err(fault.into()),
            }
        }
        if outgoing.publish() {
            channel.interrupt.signal();
        }
        Ok(())
    }

    /// Takes what the guest sent, does what is due, and sends what comes of it. True if there is more to be taken.
    fn serve(
        &mut self,
        services: &mut Services,
        buffer: &mut PacketBuffer,
        now: Moment,
    ) -> Result<bool, Mistake> {
        let (Some(channel), Some(service)) = (&mut self.channel, services.get(self.instance)) else {
            return Ok(false);
        };
        for _ in 0..BUDGET {
            let Some(packet) = channel.incoming.next(buffer)? else { break };
            if packet.kind != PacketKind::InBand {
                return Err(Mistake::NotInBand);
            }
            service.receive(packet.payload, packet.transaction, &mut self.out, now)?;
        }
        if channel.incoming.commit() {
            channel.interrupt.signal();
        }
        let more = channel.incoming.arm();
        self.due = service.tick(&mut self.out, now);
        self.flush()?;
        Ok(more)
    }
}

struct Loop {
    services: Services,
    seats: Vec<Seat>,
    asks: mpsc::Receiver<Ask>,
    epoll: OwnedFd,
    time: Timeline,
    buffer: PacketBuffer,
    on_fault: OnFault,
}

impl Loop {
    fn run(mut self) {
        while self.take_asks() {
            self.round();
            self.sleep();
        }
    }

    /// False once the handle is gone.
    fn take_asks(&mut self) -> bool {
        loop {
            match self.asks.try_recv() {
                Ok(ask) => self.take(ask),
                Err(mpsc::TryRecvError::Empty) => return true,
                Err(mpsc::TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn take(&mut self, ask: Ask) {
        match ask {
            Ask::Open(instance, channel) => self.open(instance, channel),
            Ask::Close(instance, done) => {
                self.close(instance);
                let _ = done.send(());
            }
            Ask::Reset(done) => {
                self.seats.iter_mut().for_each(|seat| seat.leave(&self.epoll));
                self.services.reset();
                let _ = done.send(());
            }
            Ask::Command(command) => self.command(command),
            Ask::Report(to) => {
                let guest = self.services.status(self.time.now());
                let _ = to.send(Report { guest, faults: self.services.faults() });
            }
            Ask::Pause => self.time.pause(),
            Ask::Resume => {
                self.time.resume();
                let (answer, _) = Answer::channel();
                self.command(Command::TimeSync { answer });
            }
        }
    }

    fn command(&mut self, command: Command) {
        self.services.command(command, self.time.now());
        self.seats.iter_mut().for_each(|seat| seat.called = true);
    }

    fn open(&mut self, instance: Guid, channel: Box<OpenChannel>) {
        self.close(instance);
        let Some(index) = self.seats.iter().position(|seat| seat.instance == instance) else { return };
        if let Err(error) = watch(&self.epoll, &channel.doorbell, index as u64) {
            tracing::error!(%error, "cannot wait for a doorbell; an integration service stays silent");
            return;
        }
        self.services.opened(instance, self.time.now());
        let seat = &mut self.seats[index];
        seat.channel = Some(channel);
        seat.called = true;
    }

    fn close(&mut self, instance: Guid) {
        let Some(seat) = self.seats.iter_mut().find(|seat| seat.instance == instance) else { return };
        if seat.channel.is_some() {
            seat.leave(&self.epoll);
            if let Some(service) = self.services.get(instance) {
                service.closed();
            }
        }
    }

    /// Serves every channel whose doorbell rang, whose moment came, or that a command may concern.
    fn round(&mut self) {
        let now = self.time.now();
        for seat in &mut self.seats {
            let due = seat.due.is_some_and(|due| due <= now);
            if !std::mem::take(&mut seat.called) && !due {
                continue;
            }
            match seat.serve(&mut self.services, &mut self.buffer, now) {
                Ok(more) => seat.called = more,
                Err(mistake) => {
                    seat.leave(&self.epoll);
                    if let Some(service) = self.services.get(seat.instance) {
                        (self.on_fault)(service.name(), &mistake);
                    }
                    self.services.fault(seat.instance, mistake);
                }
            }
        }
    }

    fn sleep(&mut self) {
        let now = self.time.now();
        let due = self.seats.iter().filter_map(|seat| seat.due).min();
        let timeout = match due {
            _ if self.seats.iter().any(|seat| seat.called) => Some(Duration::ZERO),
            Some(due) if self.time.stopped.is_none() => Some(due.since(now)),
            _ => None,
        };
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        let mut events =
            [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }; 8];
        let count = epoll::wait(&self.epoll, &mut events, timeout.as_ref()).unwrap_or(0);
        for event in &events[..count] {
            let index = usize::try_from(event.data.u64()).unwrap_or(usize::MAX);
            if let Some(seat) = self.seats.get_mut(index) {
                seat.called = true;
            }
        }
    }
}
