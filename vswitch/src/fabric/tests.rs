//! Whole fabrics, with guests and device models at their ports.

mod addresses;
mod files;
mod headers;
mod ports;

use std::os::fd::AsFd;
use std::time::Duration;

use tempfile::TempDir;
use vmq::driver::Form;
use vmq::frame::{Accepts, BURST_FRAMES, Burst, Offload};
use vmq::worker::{Nanos, Wait};

use super::backend::BackendPort;
use super::*;
use crate::DropReason;
use crate::backend::{BackendFault, FrameSink, FrameSource};
use crate::offload::testing::flatten;
use crate::ports::vhost_user::features::{Features, Protocol};
use crate::ports::vhost_user::frontend::Frontend;
use crate::ports::vhost_user::message::{Request, VringFd, VringState};
use crate::ports::vhost_user::tests::rig::{Guest, connect, wait_for};
use crate::report::{PortReport, PortState};
use crate::spec::{Attachment, PortSpec, SocketMode, SwitchKind, VmqSpec};
use crate::tally::Tally;

type Frames = Arc<Mutex<Vec<Vec<u8>>>>;

/// Sends what lies in the list.
#[derive(Debug, Default)]
struct Feed {
    next: Frames,
    current: Vec<Vec<u8>>,
}

impl FrameSource for Feed {
    fn receive<'m>(&'m mut self, burst: &mut Burst<'m>, _: Nanos, _: &mut Tally) -> Result<(), BackendFault> {
        self.current = std::mem::take(&mut self.next.lock().unwrap());
        for frame in &self.current {
            assert!(burst.push(frame.as_slice().into(), Offload::NONE));
        }
        Ok(())
    }

    fn complete(&mut self) -> Result<bool, BackendFault> {
        Ok(false)
    }

    fn arm(&mut self) -> Wait {
        if self.next.lock().unwrap().is_empty() { Wait::Nudge } else { Wait::Nothing }
    }

    fn disarm(&mut self) {}
}

/// Takes so many frames and is full then.
#[derive(Debug)]
struct Taker {
    room: usize,
    taken: Frames,
}

impl FrameSink for Taker {
    fn accepts(&self) -> Accepts {
        Accepts::all()
    }

    fn put(
        &mut self,
        _: Nanos,
        burst: &Burst<'_>,
        list: &[u8],
        tally: &mut Tally,
    ) -> Result<bool, BackendFault> {
        for &index in list {
            let frame = &burst.frames()[usize::from(index)];
            let mut taken = self.taken.lock().unwrap();
            if taken.len() == self.room {
                tally.drop(DropReason::QueueFull);
                continue;
            }
            taken.push(flatten(burst, frame));
            tally.moved(frame.len);
        }
        Ok(false)
    }
}

struct Lab {
    fabric: Arc<Fabric>,
    dir: TempDir,
}

impl Lab {
    fn new() -> Self {
        let workers = WorkersSpec { cpus: vec![0], idle: WorkersSpec::IDLE, preempt: false, balance: false };
        let lab = Self { fabric: Fabric::start(workers).unwrap(), dir: tempfile::tempdir().unwrap() };
        lab.add_switch();
        lab
    }

    fn add_switch(&self) {
        let (kind, addresses, aging) = (SwitchKind::Private, SwitchSpec::ADDRESSES, SwitchSpec::AGING);
        self.fabric.add_switch(SwitchSpec { name: "lan".into(), kind, addresses, aging }).unwrap();
    }

    /// A port with a device model that sends what is put into the first list and takes `room` frames into the second.
    fn model(&self, name: &str, mtu: u16, room: usize) -> (BackendPort, Frames, Frames) {
        self.plug(PortSpec { mtu, ..adapter(name) }, room)
    }

    fn plug(&self, spec: PortSpec, room: usize) -> (BackendPort, Frames, Frames) {
        let name = spec.name.clone();
        self.fabric.add_port("lan", spec).unwrap();
        let port = self.fabric.backend("lan", &name).unwrap();
        let (next, taken) = (Frames::default(), Frames::default());
        let feed = Feed { next: Arc::clone(&next), current: Vec::new() };
        port.connect(0, Box::new(feed), Box::new(Taker { room, taken: Arc::clone(&taken) }));
        (port, next, taken)
    }

    fn guest_port(&self, name: &str) -> Result<PathBuf, FabricError> {
        let path = self.dir.path().join(name);
        let attachment = Attachment::VhostUser { path: path.clone(), mode: SocketMode::Server, queues: 1 };
        self.fabric.add_port("lan", PortSpec::new(name, attachment)).map(|()| path)
    }

    fn connect(&self, name: &str) -> Frontend {
        connect(&self.guest_port(name).unwrap())
    }

    fn port(&self, name: &str) -> PortReport {
        let report = self.fabric.report();
        report.switches[0].ports.iter().find(|port| port.name == name).unwrap().clone()
    }

    fn watch(&self, port: &str, drops: bool) -> Capture {
        let spec = CaptureSpec { switch: "lan".into(), port: Some(port.into()), snaplen: 100_000, drops };
        self.fabric.capture(spec).unwrap()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.fabric.shutdown();
    }
}

fn adapter(name: &str) -> PortSpec {
    PortSpec::new(name, Attachment::Synthetic { vm: "vm".into(), nic: name.into(), queues: 1 })
}

fn frame(number: u8, len: usize) -> Vec<u8> {
    let mut frame = vec![number; len];
    frame[..14].copy_from_slice(&[255, 255, 255, 255, 255, 255, 2, 0, 0, 0, 0, 1, 8, 0]);
    frame
}

#[test]
fn capture_shows_a_frame_as_sent_only_if_its_receiver_took_it() {
    let lab = Lab::new();
    let (left, next, _) = lab.model("left", 9000, 0);
    let (_, _, taken) = lab.model("right", 1500, 2);
    lab.guest_port("nobody").unwrap();
    let (all, sent, nobody) =
        (lab.watch("right", true), lab.watch("right", false), lab.watch("nobody", true));
    let send = |frames: &[Vec<u8>]| {
        next.lock().unwrap().extend_from_slice(frames);
        left.nudge(0);
        let mut seen = Vec::new();
        wait_for("all frames in the capture", || {
            seen.extend(all.receive(Duration::from_millis(1)));
            seen.len() >= frames.len()
        });
        seen.into_iter().map(|seen| (seen.direction, seen.data.into_vec(), seen.dropped)).collect::<Vec<_>>()
    };
    let out = |frame: &Vec<u8>, dropped| (Direction::Outbound, frame.clone(), dropped);

    let frames = [1, 2, 3, 4].map(|number| frame(number, 60));
    let full = Some(DropReason::QueueFull);
    let shown = send(&frames);
    assert_eq!(shown, [0, 1, 2, 3].map(|at: usize| out(&frames[at], if at < 2 { None } else { full })));

    // One that has to be translated, and cannot be.
    let long = [frame(5, 60), frame(6, 1515)];
    let shown = send(&long);
    assert_eq!(shown, [out(&long[0], full), out(&long[1], Some(DropReason::EgressMtu))]);

    let shown: Vec<_> = sent.receive(Duration::ZERO).into_iter().map(|seen| seen.data.into_vec()).collect();
    assert_eq!(shown, frames[..2]);
    assert_eq!(*taken.lock().unwrap(), frames[..2]);
    let counted = lab.port("right").sent;
    assert_eq!((counted.frames, counted.bytes, counted.dropped()), (2, 120, 4));
    assert_eq!(counted.drops[&DropReason::QueueFull], 3);
    let missing: Vec<_> =
        nobody.receive(Duration::ZERO).into_iter().filter_map(|seen| seen.dropped).collect();
    assert_eq!(missing, [[DropReason::NotReady; 5].as_slice(), &[DropReason::EgressMtu]].concat());
}

#[test]
fn disabled_transmit_ring_is_emptied_and_its_frames_are_counted_as_dropped() {
    for form in [Form::Split, Form::Packed] {
        let lab = Lab::new();
        let (_, _, taken) = lab.model("far", 1500, 100);
        let mut front = lab.connect("guest");
        let mut guest = Guest::new(form, 1);
        guest.start(&mut front, Protocol::REPLY_ACK, guest.fresh());
        let disabled = || lab.port("guest").received.drops.get(&DropReason::Disabled).copied().unwrap_or(0);
        for round in 1..=3u8 {
            front.enable_ring(1, false).unwrap();
            // More than a burst, a few at a time.
            for _ in 0..10 {
                (0..8).for_each(|_| guest.send(0, &frame(0, 60)));
                guest.pairs[0].kicks[1].ring();
                let mut back = 0;
                wait_for("what was sent to come back", || {
                    back += guest.reclaim(0);
                    back == 8
                });
            }
            front.enable_ring(1, true).unwrap();
            guest.send(0, &frame(round, 60));
            guest.pairs[0].kicks[1].ring();
            wait_for("the frame", || taken.lock().unwrap().len() == usize::from(round));
            assert_eq!(guest.reclaim(0), 1);
            assert_eq!(disabled(), 80 * u64::from(round));
        }
        assert_eq!(*taken.lock().unwrap(), [1, 2, 3].map(|round| frame(round, 60)));
        assert_eq!(lab.port("guest").received.frames, 3);
    }
}

#[test]
fn announced_guest_is_learnt_seen_by_the_others_and_counted() {
    let lab = Lab::new();
    let (_, _, taken) = lab.model("far", 1500, 100);
    let mut front = lab.connect("guest");
    front.negotiate(Features::empty(), Protocol::REPLY_ACK | Protocol::RARP).unwrap();
    let mac = Mac([2, 0, 0, 0, 0, 9]);
    front.tell(&Request::SendRarp(mac), &[]).unwrap();
    wait_for("the announcement", || !taken.lock().unwrap().is_empty());
    assert_eq!(*taken.lock().unwrap(), [guest::reverse_arp(mac)]);
    wait_for("the count", || lab.port("guest").received.frames == 1);
    let known = lab.fabric.addresses("lan", None, 100).unwrap().addresses;
    assert!(known.iter().any(|entry| entry.mac == mac.to_string() && entry.port == "guest"), "{known:?}");
}

#[test]
fn port_added_while_its_switch_is_removed_is_there_never_or_gone_with_it() {
    let lab = Lab::new();
    let sockets = || std::fs::read_dir(lab.dir.path()).unwrap().count();
    for round in 0..50 {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for port in 0..4 {
                    if let Err(error) = lab.guest_port(&format!("{round}-{port}")) {
                        assert!(matches!(error, FabricError::NotFound { .. }), "{error}");
                    }
                }
            });
            scope.spawn(|| lab.fabric.remove_switch("lan").unwrap());
        });
        assert_eq!(lab.fabric.report().switches.len(), 0);
        assert_eq!(sockets(), 0);
        assert_eq!(lab.fabric.report().workers[0].queues, 0);
        lab.add_switch();
    }
}

#[test]
fn mistake_of_the_switch_stops_the_port_it_comes_to_light_at_and_no_other() {
    let lab = Lab::new();
    let (wrong, next, _) = lab.model("wrong", 1500, 0);
    let (right, others, _) = lab.model("right", 1500, 0);
    let (_, _, taken) = lab.model("far", 1500, 100);
    // The model panics at more than a burst.
    next.lock().unwrap().extend(vec![frame(1, 60); BURST_FRAMES + 1]);
    wrong.nudge(0);
    wait_for("the fault", || matches!(lab.port("wrong").state, PortState::Faulted(_)));
    taken.lock().unwrap().clear();
    others.lock().unwrap().push(frame(2, 60));
    right.nudge(0);
    wait_for("the other port's frame", || *taken.lock().unwrap() == [frame(2, 60)]);
}

#[test]
fn frames_go_to_the_queue_of_that_number_whichever_others_are_enabled() {
    let lab = Lab::new();
    let (from, next, _) = lab.model("from", 1500, 0);
    let mac = Mac([2, 0, 0, 0, 0, 7]);
    let attachment = Attachment::Synthetic { vm: "vm".into(), nic: "to".into(), queues: 4 };
    let vmq = vec![VmqSpec { mac, vlan: 0, queues: vec![1] }];
    lab.fabric.add_port("lan", PortSpec { mac: Some(mac), vmq, ..PortSpec::new("to", attachment) }).unwrap();
    let port = lab.fabric.backend("lan", "to").unwrap();
    for queue in [1, 3] {
        port.connect(
            queue,
            Box::new(Feed::default()),
            Box::new(Taker { room: 100, taken: Frames::default() }),
        );
    }
    let mut to_it = frame(1, 60);
    to_it[..6].copy_from_slice(&mac.0);
    let sent = || lab.port("to").queues.iter().map(|queue| queue.sent.frames).collect::<Vec<_>>();
    // As soon as the switch knows of both queues, a broadcast goes to the one that no filter has.
    wait_for("the queues", || {
        next.lock().unwrap().push(frame(1, 60));
        from.nudge(0);
        sent()[3] > 0
    });
    let before = sent();
    next.lock().unwrap().push(to_it);
    from.nudge(0);
    wait_for("the frame", || sent()[1] > before[1]);
    assert_eq!((sent()[0], sent()[2]), (0, 0));
}

#[test]
fn changed_mtu_is_offered_to_the_next_client() {
    let lab = Lab::new();
    let path = lab.guest_port("guest").unwrap();
    let takes_jumbo = || {
        let mut front = connect(&path);
        front.negotiate(Features::MTU, Protocol::REPLY_ACK | Protocol::NET_MTU).unwrap();
        front.tell(&Request::NetSetMtu(9000), &[]).is_ok()
    };
    assert!(!takes_jumbo());
    lab.fabric.change_port("lan", "guest", PortChange { mtu: Some(9000), ..PortChange::default() }).unwrap();
    assert!(takes_jumbo());
}

#[test]
fn client_whose_interrupt_makes_the_control_thread_wait_stops_its_port() {
    let lab = Lab::new();
    let mut front = lab.connect("guest");
    let guest = Guest::new(Form::Split, 1);
    front.negotiate(guest.features(), Protocol::REPLY_ACK).unwrap();
    front.show_memory(&[guest.region()], &[guest.arena.fd()]).unwrap();
    let (ring, call) = (&guest.pairs[0].receive, &guest.pairs[0].calls[0]);
    let size = VringState { index: 0.into(), num: u32::from(ring.size()).into() };
    front.tell(&Request::SetVringNum(size), &[]).unwrap();
    front.set_addresses(0, &Guest::addresses(ring)).unwrap();
    front.tell(&Request::SetVringCall(VringFd { index: 0, polled: false }), &[call.as_fd()]).unwrap();
    rustix::io::ioctl_fionbio(call, false).unwrap();
    rustix::io::write(call, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    assert!(front.tell(&Request::SetVringKick(VringFd { index: 0, polled: true }), &[]).is_err());
    let faulted = |state| matches!(state, PortState::Faulted(reason) if reason.contains("full and blocking"));
    wait_for("the fault", || faulted(lab.port("guest").state));
}
