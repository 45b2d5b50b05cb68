use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Mutex;
use std::sync::atomic::Ordering;
use std::time::Duration;

use vmbus::handover::{FromVmm, Listener, SwitchConnection};
use vmbus::protocol::event_connection;

use super::inbox::INBOX;
use super::*;
use crate::control::{NicKind, Services as Offered};
use crate::hypercall::Status;
use crate::services::{Services, Settings};
use crate::synic::Registers;
use crate::vcpu::MessagePort;

pub(super) const INSTANCE: &str = "11111111-2222-3333-4444-555555555555";

#[derive(Debug, Default)]
pub(super) struct Ties(pub Mutex<BTreeSet<EventId>>);

impl Events for Ties {
    fn tie(&self, id: EventId, _: &Doorbell) -> Result<(), KvmError> {
        assert!(self.0.lock().unwrap().insert(id), "tied twice");
        Ok(())
    }
    fn untie(&self, id: EventId) {
        assert!(self.0.lock().unwrap().remove(&id), "not tied");
    }
}

/// A guest's kernel in as many lines as it takes, and the worker's side of VMBus.
pub(super) struct Bench {
    pub memory: Arc<Memory>,
    pub synic: Arc<Synic>,
    pub ties: Arc<Ties>,
    pub port: Arc<Port>,
    pub vmbus: Vmbus,
    dir: tempfile::TempDir,
}

impl Bench {
    pub fn new() -> Self {
        let size = 4 << 20;
        let sizes = crate::control::Memory { minimum: size, startup: size, maximum: size, huge: false };
        let memory = Arc::new(Memory::new("guest", sizes).unwrap());
        let none = Offered {
            heartbeat: false,
            shutdown: false,
            time_sync: false,
            kvp: false,
            vss: false,
            dynamic_memory: false,
        };
        let services = Services::new(Settings { offered: none, reference: Box::new(|| 0), memory: None });
        let pump = Arc::new(Pump::start(services, Box::new(|_, _| {}), || Ok(())).unwrap());
        let dir = tempfile::tempdir().unwrap();
        let listener: OwnedFd = Listener::bind(&dir.path().join("switch")).unwrap().into();
        let setup = Setup::default();
        let port = setup.port();
        let vmbus = setup
            .start(Arc::clone(&memory), 2, pump, Some(listener), Box::new(|_, _| {}), || Ok(()))
            .unwrap();
        let synic = Arc::new(Synic::new(Arc::clone(memory.guest()), 2).unwrap());
        let ties = Arc::new(Ties::default());
        let bench = Self { memory, synic, ties, port, vmbus, dir };
        bench.attach();
        bench
    }

    pub fn attach(&self) {
        for vp in 0..2u64 {
            let page = 0x2000 + vp * 0x2000;
            let registers = Registers { control: 1, flags_page: page | 1, message_page: (page + 0x1000) | 1 };
            self.synic.update(u32::try_from(vp).unwrap(), registers);
        }
        self.vmbus.attach(Machine { events: self.ties.clone(), synic: self.synic.clone() });
    }

    pub fn nic(&self, name: &str, instance: &str) -> Nic {
        Nic {
            name: name.into(),
            kind: NicKind::Synthetic,
            mac: "02:00:00:00:00:01".into(),
            instance: instance.into(),
            queues: 4,
        }
    }

    pub fn connect(&self) -> SwitchConnection {
        SwitchConnection::connect(&self.dir.path().join("switch")).unwrap()
    }

    pub fn post(&self, words: &[u32]) {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        assert_eq!(self.port.post(4, &bytes), Status::Success);
    }

    /// The next message for the guest: its type and the words behind the header.
    fn message(&self) -> (u32, Vec<u32>) {
        let kind = self.memory.guest().word(0x3200).unwrap();
        for _ in 0..5000 {
            if kind.load(Ordering::SeqCst) != 0 {
                let slot: [u8; 256] = self.memory.guest().segment(0x3200, 256).unwrap().read().unwrap();
                kind.store(0, Ordering::SeqCst);
                let words = slot[16..16 + usize::from(slot[4])].as_chunks::<4>().0;
                let words: Vec<u32> = words.iter().map(|word| u32::from_le_bytes(*word)).collect();
                return (words[0], words[2..].to_vec());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        panic!("no message came");
    }

    /// Contact, offers; returns the NIC's channel id.
    fn begin(&self) -> u32 {
        self.post(&[14, 0, 0x0005_0003, 0, 2, 0, 0, 0, 0, 0]);
        assert_eq!(self.message(), (15, vec![1, 4]));
        self.post(&[3, 0]);
        let (kind, offer) = self.message();
        assert_eq!(kind, 1);
        assert_eq!(self.message().0, 4);
        offer[(184 - 8) / 4]
    }

    /// Eight pages from 0x100000 for rings.
    fn share(&self, relid: u32, gpadl: u32) {
        let mut words = vec![8, 0, relid, gpadl, 72 | (1 << 16), 8 * 4096, 0];
        words.extend((0x100..0x108).flat_map(|pfn| [pfn, 0]));
        self.post(&words);
    }

    fn open(&self, relid: u32, gpadl: u32) {
        let mut words = vec![5, 0, relid, relid, gpadl, 0, 4];
        words.resize(37, 0);
        self.post(&words);
    }
}

fn next(switch: &SwitchConnection) -> FromVmm {
    switch.receive().unwrap().unwrap()
}

/// What a switch is told first, for one NIC; its number and whether it was served before.
fn greeting(switch: &SwitchConnection) -> (u32, bool) {
    assert!(matches!(next(switch), FromVmm::Hello { version: 1 }));
    assert!(matches!(next(switch), FromVmm::Memory { .. }));
    let FromVmm::Device { device, resumed, name, .. } = next(switch) else { panic!() };
    assert_eq!(name, "eth0");
    (device, resumed)
}

/// Opens the NIC's channel over `switch`, which was greeted; returns (device, relid, doorbell).
fn opened(bench: &Bench, switch: &SwitchConnection, device: u32) -> (u32, OwnedFd) {
    let relid = bench.begin();
    bench.share(relid, 7);
    let FromVmm::Gpadl { gpadl: 7, byte_count: 32768, pfns, .. } = next(switch) else { panic!() };
    assert_eq!(pfns, (0x100..0x108).collect::<Vec<u64>>());
    switch.send(&FromSwitch::GpadlAccepted { device, gpadl: 7, ok: true }).unwrap();
    assert_eq!(bench.message(), (10, vec![relid, 7, 0]));
    bench.open(relid, 7);
    let FromVmm::Open { target, doorbell, resumed: false, vp: 0, .. } = next(switch) else { panic!() };
    assert_eq!((target.flags_gpa, u32::from(target.flag)), (0x2200, relid));
    switch.send(&FromSwitch::Opened { device, index: 0, ok: true }).unwrap();
    assert_eq!(bench.message(), (6, vec![relid, relid, 0]));
    (relid, doorbell)
}

/// A bench with one adapter, of which a switch has been told everything.
fn greeted() -> (Bench, SwitchConnection, u32) {
    let bench = Bench::new();
    bench.vmbus.add_nic(bench.nic("eth0", INSTANCE)).unwrap();
    let switch = bench.connect();
    let (device, _) = greeting(&switch);
    assert!(matches!(next(&switch), FromVmm::Ready));
    (bench, switch, device)
}

#[test]
fn switch_that_comes_back_is_told_what_is_open_and_gets_the_same_doorbell() {
    let bench = Bench::new();
    bench.vmbus.add_nic(bench.nic("eth0", INSTANCE)).unwrap();
    let first = bench.connect();
    let (device, resumed) = greeting(&first);
    assert!(!resumed && matches!(next(&first), FromVmm::Ready));
    let (relid, doorbell) = opened(&bench, &first, device);
    assert!(bench.ties.0.lock().unwrap().contains(&event_connection(relid)));
    drop(first);

    let second = bench.connect();
    assert_eq!(greeting(&second), (device, true));
    assert!(matches!(next(&second), FromVmm::Gpadl { gpadl: 7, .. }));
    let FromVmm::Open { doorbell: again, resumed: true, .. } = next(&second) else { panic!() };
    assert!(matches!(next(&second), FromVmm::Ready));
    Doorbell::from(doorbell).ring();
    assert!(Doorbell::from(again).clear());
    assert!(bench.vmbus.report().unwrap().nics[0].connected);
}

#[test]
fn guest_goes_on_with_what_it_asked_for_while_no_switch_was_there() {
    let bench = Bench::new();
    bench.vmbus.add_nic(bench.nic("eth0", INSTANCE)).unwrap();
    let relid = bench.begin();
    bench.share(relid, 7);
    let switch = bench.connect();
    let (device, _) = greeting(&switch);
    assert!(matches!(next(&switch), FromVmm::Gpadl { gpadl: 7, .. }));
    switch.send(&FromSwitch::GpadlAccepted { device, gpadl: 7, ok: true }).unwrap();
    assert_eq!(bench.message(), (10, vec![relid, 7, 0]));
    drop(switch);
    bench.open(relid, 7);
    let switch = bench.connect();
    greeting(&switch);
    assert!(matches!(next(&switch), FromVmm::Gpadl { gpadl: 7, .. }));
    let mut told = next(&switch);
    if matches!(told, FromVmm::Ready) {
        // It connected before the guest's message was looked at.
        told = next(&switch);
    }
    assert!(matches!(told, FromVmm::Open { resumed: false, .. }));
    switch.send(&FromSwitch::Opened { device, index: 0, ok: true }).unwrap();
    assert_eq!(bench.message(), (6, vec![relid, relid, 0]));
}

#[test]
fn memory_is_not_given_up_before_the_switch_has_let_go() {
    let (bench, switch, device) = greeted();
    let (_, _doorbell) = opened(&bench, &switch, device);
    std::thread::scope(|scope| {
        let detach = scope.spawn(|| bench.vmbus.detach());
        assert!(matches!(next(&switch), FromVmm::Close { index: 0, .. }));
        assert!(matches!(next(&switch), FromVmm::GpadlTeardown { gpadl: 7, .. }));
        assert!(!detach.is_finished());
        switch.send(&FromSwitch::Closed { device, index: 0 }).unwrap();
        switch.send(&FromSwitch::GpadlReleased { device, gpadl: 7 }).unwrap();
    });
    assert!(bench.ties.0.lock().unwrap().is_empty());
    // The next kernel finds the device again.
    bench.attach();
    opened(&bench, &switch, device);
}

/// Nobody can take memory from a switch that hangs, but its end is waited for, for a time.
#[test]
fn switch_that_does_not_let_go_is_asked_to_end_and_then_cut_off() {
    for ends in [true, false] {
        let (bench, switch, device) = greeted();
        opened(&bench, &switch, device);
        std::thread::scope(|scope| {
            let detach = scope.spawn(|| bench.vmbus.detach());
            assert!(matches!(next(&switch), FromVmm::Close { .. }));
            assert!(matches!(next(&switch), FromVmm::GpadlTeardown { .. }));
            assert!(switch.receive().unwrap().is_none());
            assert!(!detach.is_finished(), "given up before the switch has ended");
            // What it says until then is heard.
            switch.send(&FromSwitch::Closed { device, index: 0 }).unwrap();
            let kept = (!ends).then_some(switch);
            detach.join().unwrap();
            drop(kept);
        });
        assert!(bench.ties.0.lock().unwrap().is_empty());
    }
}

#[test]
fn switch_that_dies_while_the_guest_unloads_holds_nobody_up() {
    let (bench, switch, device) = greeted();
    opened(&bench, &switch, device);
    bench.post(&[16, 0]);
    assert!(matches!(next(&switch), FromVmm::Close { .. }));
    drop(switch);
    assert_eq!(bench.message(), (17, vec![]));
}

#[test]
fn adapters_come_and_go_while_the_guest_runs() {
    let (bench, switch, device) = greeted();
    let (relid, _doorbell) = opened(&bench, &switch, device);
    assert!(bench.vmbus.add_nic(bench.nic("eth0", "21111111-2222-3333-4444-555555555555")).is_err());
    assert!(bench.vmbus.add_nic(bench.nic("eth1", INSTANCE)).is_err());
    assert!(bench.vmbus.add_nic(bench.nic("eth1", "nonsense")).is_err());
    assert!(bench.vmbus.remove_nic("eth1").is_err());

    bench.vmbus.remove_nic("eth0").unwrap();
    assert!(bench.vmbus.report().unwrap().nics.is_empty());
    assert!(matches!(next(&switch), FromVmm::Quiesce { .. }));
    switch.send(&FromSwitch::Quiet { device }).unwrap();
    assert_eq!(bench.message(), (2, vec![relid]));
    assert!(matches!(next(&switch), FromVmm::Close { .. }));
    switch.send(&FromSwitch::Closed { device, index: 0 }).unwrap();
    bench.post(&[13, 0, relid]);
    assert!(matches!(next(&switch), FromVmm::GpadlTeardown { gpadl: 7, .. }));
    switch.send(&FromSwitch::GpadlReleased { device, gpadl: 7 }).unwrap();
    assert!(matches!(next(&switch), FromVmm::Gone { .. }));
    bench.vmbus.add_nic(bench.nic("eth0", INSTANCE)).unwrap();
    assert!(matches!(next(&switch), FromVmm::Device { resumed: false, .. }));
    assert_eq!(bench.message().0, 1);
}

#[test]
fn guest_that_moves_a_channel_while_the_switch_dies_is_answered() {
    let (bench, switch, device) = greeted();
    let (relid, _doorbell) = opened(&bench, &switch, device);
    bench.post(&[22, 0, relid, 1]);
    assert!(matches!(next(&switch), FromVmm::Retarget { vp: 1, .. }));
    drop(switch);
    assert_eq!(bench.message(), (24, vec![relid, 0]));
    // With none there it is answered at once, and the next one is told.
    bench.post(&[22, 0, relid, 0]);
    assert_eq!(bench.message(), (24, vec![relid, 0]));
    let switch = bench.connect();
    greeting(&switch);
    assert!(matches!(next(&switch), FromVmm::Gpadl { .. }));
    assert!(matches!(next(&switch), FromVmm::Open { vp: 0, resumed: true, .. }));
}

/// A guest may go on sending, and a switch may be killed.
#[test]
fn adapter_that_nobody_gets_quiet_is_taken_all_the_same() {
    for killed in [true, false] {
        let (bench, switch, device) = greeted();
        let (relid, _doorbell) = opened(&bench, &switch, device);
        let told = bench.vmbus.remove_nic("eth0").unwrap();
        assert!(matches!(next(&switch), FromVmm::Quiesce { .. }));
        // Not it.
        switch.send(&FromSwitch::Quiet { device: device + 1 }).unwrap();
        bench.vmbus.report().unwrap();
        assert_eq!(told.try_recv(), Err(std::sync::mpsc::TryRecvError::Empty));
        let kept = (!killed).then_some(switch);
        assert_eq!(bench.message(), (2, vec![relid]));
        drop(kept);
    }
}

#[test]
fn moved_event_flags_retarget_the_channels_of_that_processor() {
    let (bench, switch, device) = greeted();
    let (relid, _doorbell) = opened(&bench, &switch, device);
    bench.post(&[22, 0, relid, 1]);
    let FromVmm::Retarget { vp: 1, target, .. } = next(&switch) else { panic!() };
    assert_eq!(target.flags_gpa, 0x4200);
    // The guest may take the old processor away once it is answered.
    bench.vmbus.report().unwrap();
    assert_eq!(bench.memory.guest().word(0x3200).unwrap().load(Ordering::SeqCst), 0, "answered too early");
    switch.send(&FromSwitch::Retargeted { device, index: 0 }).unwrap();
    assert_eq!(bench.message(), (24, vec![relid, 0]));
    let registers = Registers { control: 1, flags_page: 0x8001, message_page: 0x5001 };
    bench.synic.update(1, registers);
    bench.port.synic_changed(1);
    let FromVmm::Retarget { vp: 1, target, .. } = next(&switch) else { panic!() };
    assert_eq!(target.flags_gpa, 0x8200);
    // Switched off: they stay.
    bench.synic.update(1, Registers { flags_page: 0, ..registers });
    bench.port.synic_changed(1);
    switch.send(&FromSwitch::OfferSubchannels { device, count: 3 }).unwrap();
    for _ in 0..3 {
        assert_eq!(bench.message().0, 1);
    }
}

#[test]
fn channel_without_interrupts_is_refused() {
    const NONE: u32 = vmbus::protocol::NO_INTERRUPTS;
    let (bench, switch, device) = greeted();
    let (relid, _doorbell) = opened(&bench, &switch, device);
    bench.post(&[22, 0, relid, NONE]);
    let (kind, answer) = bench.message();
    assert!(kind == 24 && answer[1] != 0, "{answer:?}");
    bench.post(&[7, 0, relid]);
    assert!(matches!(next(&switch), FromVmm::Close { .. }));
    switch.send(&FromSwitch::Closed { device, index: 0 }).unwrap();
    let mut words = vec![5, 0, relid, relid, 7, NONE, 4];
    words.resize(37, 0);
    bench.post(&words);
    let (kind, answer) = bench.message();
    assert!(kind == 6 && answer[2] != 0, "{answer:?}");
    // The switch may be heard after the guest.
    let end = std::time::Instant::now() + Duration::from_secs(10);
    while !bench.ties.0.lock().unwrap().is_empty() {
        assert!(std::time::Instant::now() < end, "still tied");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn messages_without_end_are_put_off_and_unknown_connections_refused() {
    let setup = Setup::default();
    let port = setup.port();
    assert_eq!(port.post(2, &[0; 8]), Status::InvalidConnectionId);
    let accepted = (0..1000).filter(|_| port.post(1, &[0; 8]) == Status::Success).count();
    assert_eq!(accepted, INBOX);
    assert_eq!(port.post(4, &[0; 8]), Status::InsufficientBuffers);
}

#[test]
fn interrupt_eventfd_is_the_processors() {
    let (bench, switch, device) = greeted();
    let relid = bench.begin();
    bench.share(relid, 7);
    next(&switch);
    switch.send(&FromSwitch::GpadlAccepted { device, gpadl: 7, ok: true }).unwrap();
    bench.message();
    bench.open(relid, 7);
    let FromVmm::Open { target, .. } = next(&switch) else { panic!() };
    bench.synic.interrupt(0).unwrap().clear();
    Doorbell::from(target.eventfd.as_fd().try_clone_to_owned().unwrap()).ring();
    assert!(bench.synic.interrupt(0).unwrap().clear());
}

/// A guest whose messages never end, all of them wrong, is no reason for the operator to wait.
#[test]
fn flood_of_malformed_messages_and_changed_controllers_leaves_the_thread_to_others() {
    let bench = Bench::new();
    bench.vmbus.add_nic(bench.nic("eth0", INSTANCE)).unwrap();
    let over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                bench.port.post(4, &[0xff; 240]);
                bench.port.synic_changed(1);
            }
        });
        for _ in 0..50 {
            bench.vmbus.report().unwrap();
        }
        bench.vmbus.remove_nic("eth0").unwrap();
        over.store(true, Ordering::Relaxed);
    });
}

#[test]
fn event_flags_moved_without_end_are_followed_no_faster_than_every_ten_milliseconds() {
    let (bench, switch, device) = greeted();
    let _wires = opened(&bench, &switch, device);
    let start = std::time::Instant::now();
    let mut page = 0;
    while start.elapsed() < Duration::from_millis(100) {
        page = 0x10_0000 + (page + 0x1000) % 0x10_0000;
        bench.synic.update(0, Registers { control: 1, flags_page: page | 1, message_page: 0x3001 });
        bench.port.synic_changed(0);
    }
    // The last place is followed, too.
    let mut places = Vec::new();
    while places.last() != Some(&(page + 0x200)) {
        let FromVmm::Retarget { vp: 0, target, .. } = next(&switch) else { panic!() };
        places.push(target.flags_gpa);
    }
    let most = start.elapsed().as_millis() / 10 + 2;
    assert!(places.len() as u128 <= most, "{} in {most} times ten milliseconds", places.len());
}

/// Answers to what nobody asked, about what is not there: from a switch that went wrong.
#[test]
fn switch_that_answers_nonsense_changes_nothing() {
    let (bench, switch, device) = greeted();
    for device in [device, 0, u32::MAX] {
        for index in [0, 1, u16::MAX] {
            for ok in [true, false] {
                switch.send(&FromSwitch::Opened { device, index, ok }).unwrap();
                switch.send(&FromSwitch::GpadlAccepted { device, gpadl: 7, ok }).unwrap();
            }
            switch.send(&FromSwitch::Closed { device, index }).unwrap();
            switch.send(&FromSwitch::GpadlReleased { device, gpadl: 7 }).unwrap();
        }
        switch.send(&FromSwitch::OfferSubchannels { device, count: u16::MAX }).unwrap();
    }
    switch.send(&FromSwitch::Fault { device: u32::MAX, reason: "x".repeat(1024) }).unwrap();
    let (relid, _doorbell) = opened(&bench, &switch, device);
    // More subchannels than the adapter has queues are not offered.
    switch.send(&FromSwitch::OfferSubchannels { device, count: u16::MAX }).unwrap();
    for _ in 0..3 {
        assert_eq!(bench.message().0, 1);
    }
    assert_eq!(bench.vmbus.report().unwrap().root.relids, 4);
    assert!(bench.vmbus.report().unwrap().faults.is_empty());
    bench.post(&[7, 0, relid]);
    while !matches!(next(&switch), FromVmm::Close { index: 0, .. }) {}
}

/// A switch that talks faster than it is listened to waits: what it said does not pile up.
#[test]
fn switch_that_talks_without_end_is_held_back() {
    let (vmm, talker) = vmbus::handover::pair().unwrap();
    let timeout = rustix::net::sockopt::Timeout::Send;
    rustix::net::sockopt::set_socket_timeout(&talker, timeout, Some(Duration::from_millis(300))).unwrap();
    let link = Link::new(1, vmm);
    let (asks, heard) = channel();
    std::thread::scope(|scope| {
        scope.spawn(|| link.read(&asks));
        let said = FromSwitch::OfferSubchannels { device: 1, count: 1 };
        let sent = (0..1_000_000).take_while(|_| talker.send(&said).is_ok()).count();
        assert!(sent < 100_000, "nobody listens, and yet all of it was taken");
        drop(talker);
        let waiting: Vec<Ask> = heard.try_iter().collect();
        assert!((1..=1024).contains(&waiting.len()), "{}", waiting.len());
        drop(waiting);
        // What was sent before the end is still told, then the end.
        let rest = heard.iter().take_while(|ask| !matches!(ask, Ask::SwitchLeft(1))).count();
        assert!(rest < sent);
    });
}

/// The guest cannot be told that an open channel is closed, but its adapter can be taken and given anew.
#[test]
fn adapter_whose_channel_the_next_switch_refuses_is_plugged_in_anew() {
    let (bench, first, device) = greeted();
    let (relid, _doorbell) = opened(&bench, &first, device);
    drop(first);
    let second = bench.connect();
    greeting(&second);
    assert!(matches!(next(&second), FromVmm::Gpadl { gpadl: 7, .. }));
    assert!(matches!(next(&second), FromVmm::Open { resumed: true, .. }));
    assert!(matches!(next(&second), FromVmm::Ready));
    second.send(&FromSwitch::Opened { device, index: 0, ok: false }).unwrap();
    assert_eq!(bench.message(), (2, vec![relid]));
    assert!(bench.vmbus.report().unwrap().faults[0].1.contains("could not take its channels over"));
    assert!(bench.ties.0.lock().unwrap().is_empty());
    bench.post(&[13, 0, relid]);
    assert!(matches!(next(&second), FromVmm::GpadlTeardown { gpadl: 7, .. }));
    second.send(&FromSwitch::GpadlReleased { device, gpadl: 7 }).unwrap();
    assert!(matches!(next(&second), FromVmm::Gone { .. }));
    let FromVmm::Device { device: anew, resumed: false, .. } = next(&second) else { panic!() };
    assert_ne!(anew, device);
    assert_eq!(bench.message().0, 1);
    assert!(bench.vmbus.report().unwrap().faults.is_empty());
}
