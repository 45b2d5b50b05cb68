//! Two guests and more, through a real switch.

use std::time::{Duration, Instant};

use smoltcp::iface::{Config as StackConfig, Interface, SocketSet};
use smoltcp::socket::tcp;
use smoltcp::wire::{EthernetAddress, IpAddress, IpCidr};

use super::phy::Adapter;
use super::rig::{Rig, address};
use super::*;

mod anew;
mod granted;
mod hostile;
mod interrupts;
mod known;
mod large;
mod life;
mod link;
mod resumed;
mod rounds;
mod storm;
mod succession;
mod waiting;

/// A stack waits a second and more for what was lost while nobody served its guest.
const TIMEOUT: Duration = Duration::from_secs(90);

fn frame(to: u8, from: u8, len: usize) -> Vec<u8> {
    let mut frame = [address(to).0, address(from).0].concat();
    frame.extend([0x88, 0xb5]);
    frame.extend((frame.len()..len).map(|at| u8::try_from(at % 251).unwrap()));
    frame
}

/// The next frame for `guest` from guest number `from`.
fn next(guest: &mut Guest, from: u8) -> Received {
    let end = Instant::now() + TIMEOUT;
    loop {
        while let Some(received) = guest.receive() {
            if received.frame[6..12] == address(from).0 {
                return received;
            }
        }
        assert!(Instant::now() < end, "no frame");
        guest.sleep(Duration::from_millis(10)).unwrap();
        guest.poll().unwrap();
    }
}

fn two(first: Config, second: Config) -> (Rig, Guest, Guest) {
    let mut rig = Rig::new(vec![0, 1]).unwrap();
    let one = rig.guest(1, |_| (), first).unwrap();
    let other = rig.guest(2, |_| (), second).unwrap();
    (rig, one, other)
}

#[test]
fn frames_of_every_length_and_form_arrive_as_they_were_sent() {
    let config = Config { mtu: 9000, ..Config::default() };
    let (_rig, mut one, mut two) = two(config.clone(), config);
    assert_eq!(one.address(), address(1));
    for form in [Form::Usual, Form::Direct, Form::Partial] {
        for len in [14, 15, 60, 64, 65, 1514, 4096, 9014] {
            let sent = frame(2, 1, len);
            assert!(one.send(&sent, &Transmit { form, ..Transmit::default() }).unwrap());
            one.flush();
            assert_eq!(next(&mut two, 1).frame, sent, "{form:?} {len}");
        }
    }
    one.wait("completions", |guest| (guest.outstanding == 0).then_some(())).unwrap();
}

#[test]
fn frames_of_the_largest_mtu_there_is_pass_both_ways_and_longer_ones_neither() {
    use vswitch::DropReason;
    let mut rig = Rig::new(vec![0]).unwrap();
    for rsc in [true, false] {
        let (mut source, mut destination) = if rsc { (1, 2) } else { (3, 4) };
        // More than the host allows: the driver takes what it is told.
        let config = Config { mtu: 16_000, rsc, ..Config::default() };
        let mut from = rig.guest(source, |spec| spec.mtu = 9216, config.clone()).unwrap();
        let mut to = rig.guest(destination, |spec| spec.mtu = 9216, config).unwrap();
        assert_eq!((from.config.mtu, to.config.mtu), (9216, 9216));
        for _ in 0..2 {
            for form in [Form::Usual, Form::Direct, Form::Partial] {
                let transmit = Transmit { form, ..Transmit::default() };
                for len in [9230, 9231, 16_014, 9229] {
                    assert!(from.send(&frame(destination, source, len), &transmit).unwrap());
                }
                from.flush();
                for len in [9230, 9229] {
                    assert_eq!(
                        next(&mut to, source).frame,
                        frame(destination, source, len),
                        "{form:?} {rsc}"
                    );
                }
            }
            // Counted when the burst is over.
            let (end, name) = (Instant::now() + TIMEOUT, format!("nic{source}"));
            let lost = || {
                let report = rig.fabric().report();
                let port = report.switches[0].ports.iter().find(|port| port.name == name).unwrap();
                port.received.drops.get(&DropReason::IngressMtu).copied()
            };
            while lost() != Some(6) {
                assert!(Instant::now() < end, "{:?}", lost());
            }
            std::mem::swap(&mut from, &mut to);
            std::mem::swap(&mut source, &mut destination);
        }
    }
    let refused = rig.port(5, |spec| spec.mtu = 9217).unwrap_err().to_string();
    assert!(refused.contains("mtu") && refused.contains("9217") && refused.contains("9216"), "{refused}");
}

/// A stack on a guest.
struct Host {
    adapter: Adapter,
    interface: Interface,
    sockets: SocketSet<'static>,
    started: Instant,
}

impl Host {
    fn new(guest: Guest, number: u8, mtu: usize) -> Self {
        let mut adapter = Adapter { trusting: guest.config.rsc, guest, mtu, queue: 0 };
        let hardware = EthernetAddress(address(number).0).into();
        let started = Instant::now();
        let mut interface =
            Interface::new(StackConfig::new(hardware), &mut adapter, smoltcp::time::Instant::ZERO);
        interface.update_ip_addrs(|addresses| {
            addresses.push(IpCidr::new(IpAddress::v4(10, 0, 0, number), 24)).unwrap();
        });
        Self { adapter, interface, sockets: SocketSet::new(vec![]), started }
    }

    fn tcp(&mut self) -> smoltcp::iface::SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; 256 << 10]);
        self.sockets.add(tcp::Socket::new(buffer(), buffer()))
    }

    fn poll(&mut self) {
        let now =
            smoltcp::time::Instant::from_micros(i64::try_from(self.started.elapsed().as_micros()).unwrap());
        self.interface.poll(now, &mut self.adapter, &mut self.sockets);
    }
}

/// Moves `bytes` over TCP from the first guest to the second; `meanwhile` is called now and then.
fn transfer(
    hosts: &mut [Host; 2],
    bytes: &[u8],
    mut meanwhile: impl FnMut(&mut [Host; 2], usize),
) -> Vec<u8> {
    let [client, server] = hosts.each_mut().map(Host::tcp);
    hosts[1].sockets.get_mut::<tcp::Socket<'_>>(server).listen(7).unwrap();
    let [first, _] = hosts;
    let socket = first.sockets.get_mut::<tcp::Socket<'_>>(client);
    socket.connect(first.interface.context(), (IpAddress::v4(10, 0, 0, 2), 7), 40_000).unwrap();
    let (mut sent, mut received) = (0, Vec::new());
    let end = Instant::now() + TIMEOUT;
    while received.len() < bytes.len() {
        assert!(Instant::now() < end, "{} of {} bytes", received.len(), bytes.len());
        hosts.iter_mut().for_each(Host::poll);
        let socket = hosts[0].sockets.get_mut::<tcp::Socket<'_>>(client);
        if socket.can_send() && sent < bytes.len() {
            sent += socket.send_slice(&bytes[sent..]).unwrap();
        }
        let socket = hosts[1].sockets.get_mut::<tcp::Socket<'_>>(server);
        if socket.can_recv() {
            socket
                .recv(|data| {
                    received.extend_from_slice(data);
                    (data.len(), ())
                })
                .unwrap();
        }
        meanwhile(hosts, received.len());
    }
    received
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| u8::try_from((at * 7 + at / 255) % 256).unwrap()).collect()
}

#[test]
fn tcp_stream_arrives_whole_at_either_mtu() {
    for (mtu, rsc) in [(1500u16, true), (1500, false), (9000, true), (9000, false)] {
        let config = Config { mtu, rsc, ..Config::default() };
        let (_rig, one, two) = two(config.clone(), config);
        let mut hosts = [Host::new(one, 1, mtu.into()), Host::new(two, 2, mtu.into())];
        let bytes = pattern(3 << 20);
        assert!(transfer(&mut hosts, &bytes, |_, _| ()) == bytes);
    }
}

#[test]
fn successor_of_a_killed_switch_goes_on_with_the_stream() {
    let config = Config { queues: 4, ..Config::default() };
    let (mut rig, one, two) = two(config.clone(), config);
    let mut hosts = [Host::new(one, 1, 1500), Host::new(two, 2, 1500)];
    let bytes = pattern(4 << 20);
    let mut at = 0;
    let received = transfer(&mut hosts, &bytes, |hosts, received| {
        if received > at + (800 << 10) {
            at = received;
            for (host, name) in hosts.iter_mut().zip(["nic1", "nic2"]) {
                rig.cut(name);
                let switch = host.adapter.guest.vmm().reconnect().unwrap();
                rig.serve(name, switch).unwrap();
            }
        }
    });
    assert!(received == bytes);
    assert!(at > 0);
    for host in &mut hosts {
        // The control path goes on as well.
        assert_eq!(host.adapter.guest.query(Oid::ETHERNET_PERMANENT_ADDRESS).unwrap().len(), 6);
        let config = Config { queues: 2, ..Config::default() };
        host.adapter.guest.restart(config).unwrap();
    }
}

#[test]
fn operators_restart_in_the_middle_of_a_stream_costs_time_only() {
    // Sections for little more than a window: were some lost with each restart, it would run dry.
    let (rig, one, two) = two(Config::default(), Config { receive_pages: 300, ..Config::default() });
    let mut hosts = [Host::new(one, 1, 1500), Host::new(two, 2, 1500)];
    let bytes = pattern(2 << 20);
    let (mut at, mut restarts) = (0, 0);
    let received = transfer(&mut hosts, &bytes, |_, received| {
        if received > at + (200 << 10) {
            at = received;
            restarts += 1;
            rig.fabric().restart_port("lan", if restarts % 2 == 0 { "nic1" } else { "nic2" }).unwrap();
        }
    });
    assert!(received == bytes);
    assert!(restarts > 5);
}

#[test]
fn adapter_taken_down_and_up_again_works_with_other_settings() {
    let (_rig, mut one, mut two) = two(Config::default(), Config::default());
    for (mtu, queues) in [(1500, 4), (9000, 2), (600, 1), (1500, 8)] {
        let config = Config { mtu, queues, ..Config::default() };
        one.restart(config.clone()).unwrap();
        two.restart(config).unwrap();
        assert_eq!(one.queues(), usize::from(queues));
        for queue in 0..one.queues() {
            let sent = frame(2, 1, usize::from(mtu) + 14);
            assert!(one.send(&sent, &Transmit { queue, ..Transmit::default() }).unwrap());
            one.flush();
            assert_eq!(next(&mut two, 1).frame, sent);
        }
        // Not longer than the receiver's MTU: the switch cannot know it, the adapter does.
        let sent = frame(1, 2, 60);
        two.send(&sent, &Transmit::default()).unwrap();
        two.flush();
        assert_eq!(next(&mut one, 2).frame, sent);
    }
}

#[test]
fn several_packets_in_one_message_are_several_frames() {
    let (_rig, mut one, mut two) = two(Config::default(), Config::default());
    let frames: Vec<Vec<u8>> = (0..8).map(|at| frame(2, 1, 60 + at * 13)).collect();
    let together: Vec<&[u8]> = frames.iter().map(Vec::as_slice).collect();
    assert!(one.send_together(&together, &Transmit::default()).unwrap());
    one.flush();
    for sent in &frames {
        assert_eq!(next(&mut two, 1).frame, *sent);
    }
}

#[test]
fn tag_travels_as_information_and_comes_back_as_it_was() {
    let (_rig, mut one, mut two) = two(Config::default(), Config::default());
    let vlan = crate::protocol::packet::Vlan { id: 0x123, priority: 5, dei: true };
    for (len, form) in [(60, Form::Usual), (1514, Form::Usual), (1514, Form::Direct), (200, Form::Partial)] {
        let sent = frame(2, 1, len);
        one.send(&sent, &Transmit { form, ..Transmit::default() }.vlan(vlan)).unwrap();
        one.flush();
        let received = next(&mut two, 1);
        assert_eq!((received.frame, received.vlan), (sent, Some(vlan)));
    }
}

#[test]
fn access_port_gets_untagged_frames_of_its_vlan_only() {
    use vswitch::spec::VlanMode;
    let mut rig = Rig::new(vec![0]).unwrap();
    let mut trunk = rig
        .guest(
            1,
            |spec| spec.vlan = VlanMode::Trunk { members: vec![10, 20], native: None },
            Config::default(),
        )
        .unwrap();
    let mut access = rig.guest(2, |spec| spec.vlan = VlanMode::Access(20), Config::default()).unwrap();
    for (id, len) in [(10, 100), (20, 200)] {
        let vlan = crate::protocol::packet::Vlan { id, priority: 0, dei: false };
        trunk.send(&frame(2, 1, len), &Transmit::default().vlan(vlan)).unwrap();
    }
    trunk.flush();
    let received = next(&mut access, 1);
    assert_eq!((received.frame.len(), received.vlan), (200, None));
    access.send(&frame(1, 2, 77), &Transmit::default()).unwrap();
    access.flush();
    assert_eq!(next(&mut trunk, 2).vlan.map(|vlan| vlan.id), Some(20));
}

#[test]
fn link_events_reach_the_guest() {
    let (rig, mut one, _two) = two(Config::default(), Config::default());
    // It was told of its offloads.
    one.indications.clear();
    assert!(rig.link("nic1").unwrap().set_link("nic1", false));
    assert!(!rig.link("nic1").unwrap().set_link("nic7", false));
    let event = one.wait("event", |guest| guest.indications.pop_front()).unwrap();
    assert_eq!(event, rndis::Event::MediaDisconnect.number());
    assert!(rig.link("nic1").unwrap().set_link("nic1", true));
    let event = one.wait("event", |guest| guest.indications.pop_front()).unwrap();
    assert_eq!(event, rndis::Event::MediaConnect.number());
}
