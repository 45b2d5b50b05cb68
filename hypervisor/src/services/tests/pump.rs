//! The pump's thread against a guest on real rings.

use std::os::fd::AsFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmbus::channel::{Interrupt, InterruptTarget, OpenChannel};
use vmbus::guid::Guid;
use vmbus::pages::Pages;
use vmbus::ring::{self, GuestIncoming, GuestOutgoing, PacketBuffer, PacketHeader, PacketKind};
use vmq::doorbell::Doorbell;
use vmq::memory::{GuestMemory, Mapping, Region};

use super::super::balloon::{Balloonable, Limits};
use super::super::pump::{Pump, PumpError};
use super::*;

/// For an answer that comes.
const LIMIT: Duration = Duration::from_secs(60);

/// A guest's end of a channel.
struct Line {
    memory: Arc<GuestMemory>,
    gpadl: Pages,
    incoming: GuestIncoming,
    outgoing: GuestOutgoing,
    doorbell: Arc<Doorbell>,
    interrupt: Doorbell,
    buffer: PacketBuffer,
}

impl Line {
    /// Rings of four pages each, as Linux's for services.
    fn open(pump: &Pump, instance: Guid) -> Self {
        let mapping = Arc::new(Mapping::memfd("guest", 9 << 12).unwrap().0);
        let region = Region::new(0, 0, 9 << 12, mapping, 0).unwrap();
        let memory = Arc::new(GuestMemory::new(vec![region], None).unwrap());
        let gpadl = Pages::new(&memory, &[1, 2, 3, 4, 5, 6, 7, 8]).unwrap();
        let (up, down) = (gpadl.pages(0, 4), gpadl.pages(4, 4));
        assert!(ring::clear(&up) && ring::clear(&down));
        let outgoing = GuestOutgoing::new(&up, true).unwrap();
        let incoming = GuestIncoming::new(&down, true).unwrap();
        let interrupt = Doorbell::new().unwrap();
        let doorbell = Arc::new(Doorbell::new().unwrap());
        let buffer = PacketBuffer::new();
        let mut line = Self { memory, gpadl, incoming, outgoing, doorbell, interrupt, buffer };
        line.incoming.arm();
        pump.open(instance, line.channel()).unwrap();
        line
    }

    fn channel(&self) -> OpenChannel {
        let eventfd = self.interrupt.as_fd().try_clone_to_owned().unwrap();
        let target = InterruptTarget { flags_gpa: 0, flag: 3, eventfd };
        let interrupt = Interrupt::new(&self.memory, target).unwrap();
        OpenChannel::new(&self.gpadl, 4, Arc::clone(&self.doorbell), interrupt, true).unwrap()
    }

    /// Waits for a packet from the host.
    #[track_caller]
    fn receive(&mut self) -> Packet {
        for _ in 0..1000 {
            if let Some(packet) = self.incoming.next(&mut self.buffer).unwrap() {
                assert_eq!(packet.kind, PacketKind::InBand);
                let packet = Packet { transaction: packet.transaction, payload: packet.payload.to_vec() };
                if self.incoming.commit() {
                    self.doorbell.ring();
                }
                return packet;
            }
            self.memory.word(0).unwrap().store(0, Ordering::SeqCst);
            if !self.incoming.arm() {
                self.wait(Duration::from_millis(100));
            }
        }
        panic!("no packet came");
    }

    /// Waits for an interrupt; false if none comes.
    fn wait(&self, time: Duration) -> bool {
        let time = Timespec::try_from(time).unwrap();
        poll(&mut [PollFd::new(&self.interrupt, PollFlags::IN)], Some(&time)).unwrap();
        self.interrupt.clear()
    }

    fn send(&mut self, header: &PacketHeader<'_>, payload: &[u8]) {
        self.outgoing.write(header, &[payload]).unwrap();
        if self.outgoing.publish() {
            self.doorbell.ring();
        }
    }

    /// Answers the next request as Linux does, and returns it.
    #[track_caller]
    fn answer(&mut self, act: impl FnOnce(&mut [u8])) -> Vec<u8> {
        let mut packet = self.receive();
        let request = packet.payload.clone();
        let versions = [(5, 0), (4, 0), (3, 2), (3, 0)];
        linux(&mut packet.payload, &[(3, 0)], &versions, |message| {
            act(message);
            0
        });
        self.send(&PacketHeader::in_band(packet.transaction), &packet.payload);
        request
    }
}

fn beat(message: &mut [u8]) {
    message[28] += 1;
}

type Faults = Arc<Mutex<Vec<String>>>;

fn pump() -> (Pump, Faults) {
    pump_with(None)
}

fn pump_with(memory: Option<(Limits, Arc<dyn Balloonable>)>) -> (Pump, Faults) {
    let faults = Faults::default();
    let seen = Arc::clone(&faults);
    let settings = Settings { offered: control::Services::default(), reference: Box::new(|| 77), memory };
    let report = move |name: &str, mistake: &Mistake| seen.lock().unwrap().push(format!("{name}: {mistake}"));
    (Pump::start(Services::new(settings), Box::new(report), || Ok(())).unwrap(), faults)
}

/// Asks for the report until it is as it should be.
#[track_caller]
fn until(pump: &Pump, right: impl Fn(&super::super::pump::Report) -> bool) {
    for _ in 0..1000 {
        if right(&pump.status()) {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("still {:?}", pump.status());
}

#[test]
fn guest_beats_is_shut_down_and_keeps_time_over_real_rings() {
    let (pump, _) = pump();
    assert_eq!(pump.status().guest.heartbeat, control::Heartbeat::NoContact);
    let mut heart = Line::open(&pump, instance::HEARTBEAT);
    heart.answer(|_| unreachable!());
    heart.answer(beat);
    until(&pump, |report| report.guest.heartbeat == control::Heartbeat::Ok);
    heart.answer(beat);
    let mut stop = Line::open(&pump, instance::SHUTDOWN);
    stop.answer(|_| unreachable!());
    until(&pump, |report| {
        report.guest.services.iter().any(|service| *service == ("shutdown".into(), "3.2".into()))
    });
    std::thread::scope(|scope| {
        let asked = scope
            .spawn(|| pump.call(LIMIT, |answer| Command::Shutdown { kind: ShutdownKind::Reboot, answer }));
        assert_eq!(stop.answer(|_| ())[36], 3);
        assert_eq!(asked.join().unwrap(), Ok(()));
    });
    let late = pump.call(Duration::ZERO, |answer| Command::Shutdown { kind: ShutdownKind::Reboot, answer });
    assert_eq!(late, Err(CommandError::NoAnswer { seconds: 0 }));
    let mut time = Line::open(&pump, instance::TIME_SYNC);
    time.answer(|_| unreachable!());
    let sync = time.answer(|_| ());
    assert_eq!((u64_at(&sync, 36), sync[44]), (77, 1));
    pump.pause();
    pump.resume();
    assert_eq!(time.answer(|_| ())[44], 1, "the clock is set after a pause");
}

#[test]
fn mistake_stops_one_service_until_its_channel_is_opened_again() {
    let (pump, faults) = pump();
    let mut heart = Line::open(&pump, instance::HEARTBEAT);
    let mut stop = Line::open(&pump, instance::SHUTDOWN);
    stop.answer(|_| unreachable!());
    let packet = heart.receive();
    heart.send(&PacketHeader::in_band(packet.transaction), &packet.payload);
    until(&pump, |report| report.guest.heartbeat == control::Heartbeat::Error);
    let report = pump.status();
    let reason = "the response flag of an answer is 0, not 4".to_owned();
    assert_eq!(report.faults, [("heartbeat".to_owned(), reason.clone())]);
    assert_eq!(*faults.lock().unwrap(), [format!("heartbeat: {reason}")]);
    assert_eq!(report.guest.services, [("shutdown".to_owned(), "3.2".to_owned())]);
    pump.close(instance::HEARTBEAT);
    assert_eq!(pump.status().faults.len(), 1, "the reason stays");
    let mut heart = Line::open(&pump, instance::HEARTBEAT);
    heart.answer(|_| unreachable!());
    heart.answer(beat);
    until(&pump, |report| report.guest.heartbeat == control::Heartbeat::Ok && report.faults.is_empty());
}

#[test]
fn packet_that_is_not_in_band_and_index_outside_the_ring_stop_the_service() {
    let (pump, _) = pump();
    let mut heart = Line::open(&pump, instance::HEARTBEAT);
    heart.send(&PacketHeader::completion(1), &[0; 64]);
    let time = Line::open(&pump, instance::TIME_SYNC);
    time.memory.word(1 << 12).unwrap().store(0xffff_fff8, Ordering::SeqCst);
    time.doorbell.ring();
    until(&pump, |report| report.faults.len() == 2);
    let faults = pump.status().faults;
    assert!(
        faults.iter().any(|(name, reason)| name == "heartbeat" && reason.contains("in-band")),
        "{faults:?}"
    );
    assert!(
        faults.iter().any(|(name, reason)| name == "time-sync" && reason.contains("index")),
        "{faults:?}"
    );
}

#[test]
fn closed_channel_is_not_touched_and_can_be_opened_again() {
    let (pump, _) = pump();
    for _ in 0..20 {
        let mut heart = Line::open(&pump, instance::HEARTBEAT);
        assert_eq!(u16_at(&heart.answer(|_| unreachable!()), 12), 0);
        pump.close(instance::HEARTBEAT);
        let control = heart.memory.word(5 << 12).unwrap().load(Ordering::SeqCst);
        heart.doorbell.ring();
        pump.status();
        assert_eq!(heart.memory.word(5 << 12).unwrap().load(Ordering::SeqCst), control);
        assert_eq!(Arc::strong_count(&heart.doorbell), 1, "the channel is let go");
    }
    pump.close(Guid::ZERO);
}

#[test]
fn unknown_device_is_refused_and_commands_without_contact_are_answered() {
    let (pump, _) = pump();
    let line = Line::open(&pump, instance::KVP);
    assert_eq!(pump.open(Guid::ZERO, line.channel()), Err(PumpError::Unknown(Guid::ZERO)));
    let key = "a".to_owned();
    let delete = pump.call(LIMIT, |answer| Command::KvpDelete { key, answer });
    assert_eq!(delete, Err(CommandError::NotReady));
    assert_eq!(pump.call(LIMIT, |answer| Command::Thaw { answer }), Err(CommandError::NotFrozen));
    let absent = pump.call(LIMIT, |answer| Command::SetMemory { bytes: 1 << 30, answer });
    assert_eq!(absent, Err(CommandError::Absent));
    assert_eq!(pump.devices().len(), 5);
}

#[test]
fn reset_lets_all_channels_go() {
    let (pump, _) = pump();
    let lines =
        [instance::HEARTBEAT, instance::KVP, instance::VSS].map(|instance| Line::open(&pump, instance));
    pump.reset();
    assert!(lines.iter().all(|line| Arc::strong_count(&line.doorbell) == 1));
    assert!(pump.status().guest.services.is_empty());
}

#[test]
fn doorbell_storm_leaves_the_other_services_served() {
    let (pump, _) = pump();
    let storm = Line::open(&pump, instance::VSS);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                storm.doorbell.ring();
            }
        });
        let mut heart = Line::open(&pump, instance::HEARTBEAT);
        heart.answer(|_| unreachable!());
        heart.answer(beat);
        until(&pump, |report| report.guest.heartbeat == control::Heartbeat::Ok);
        over.store(true, Ordering::Relaxed);
    });
}

#[test]
fn guest_that_asks_for_ever_and_reads_nothing_loses_its_service() {
    struct Nothing;
    impl Balloonable for Nothing {
        fn discard(&self, _: u64, _: u64) {}
        fn provide(&self, _: u64, _: u64) {}
    }
    let limits = Limits { startup: 512, minimum: 512, maximum: 512, ram: Vec::new(), room: None };
    let (pump, _) = pump_with(Some((limits, Arc::new(Nothing))));
    let mut memory = Line::open(&pump, instance::DYNAMIC_MEMORY);
    let unknown_version = [1, 0, 16, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0];
    let mut sent = 0;
    while sent < 2000 && pump.status().faults.is_empty() {
        while memory.outgoing.write(&PacketHeader::in_band(0), &[&unknown_version]).is_ok() {
            sent += 1;
        }
        memory.outgoing.publish();
        memory.doorbell.ring();
    }
    until(&pump, |report| report.faults.iter().any(|(_, reason)| reason.contains("reads no answers")));
}
