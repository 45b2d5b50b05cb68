//! Ports and workers together: the host as a port, merging switched off, queues that move as the load does.

use super::*;
use crate::offload::testing::{Builder, Transport, payload};
use crate::ports::device::tests::{ip, isolated};
use crate::spec::TapSpec;

const HOST: [u8; 4] = [10, 9, 0, 1];
const GUEST: [u8; 4] = [10, 9, 0, 2];

/// An ARP packet of RFC 826 from the guest's address, or to it.
fn arp(operation: u8, sender: (&[u8], [u8; 4]), target: (&[u8], [u8; 4]), to: &[u8]) -> Vec<u8> {
    let head = [to, sender.0, &[8, 6, 0, 1, 8, 0, 6, 4, 0, operation]].concat();
    [&head, sender.0, &sender.1, target.0, &target.1].concat()
}

#[test]
fn host_is_a_station_of_an_internal_switch() {
    if !isolated() {
        return;
    }
    let lab = Lab::new();
    lab.fabric.remove_switch("lan").unwrap();
    let (addresses, aging) = (SwitchSpec::ADDRESSES, SwitchSpec::AGING);
    lab.fabric
        .add_switch(SwitchSpec { name: "lan".into(), kind: SwitchKind::Internal, addresses, aging })
        .unwrap();
    let tap = TapSpec::Name("yard-lan".into());
    lab.fabric.add_port("lan", PortSpec::new("host", Attachment::Tap { tap, queues: 1 })).unwrap();
    ip("addr add 10.9.0.1/24 dev yard-lan");
    ip("link set yard-lan address 02:00:00:00:00:99");
    let (guest, next, taken) = lab.model("guest", 1500, 100);
    let (own, host) = ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 0x99]);
    next.lock().unwrap().push(arp(1, (&own, GUEST), (&[0; 6], HOST), &[255; 6]));
    guest.nudge(0);
    let reply = arp(2, (&host, HOST), (&own, GUEST), &own);
    wait_for("the host's answer", || {
        taken.lock().unwrap().iter().any(|frame| frame[..reply.len().min(frame.len())] == reply)
    });
    let known = lab.fabric.addresses("lan", Some("host"), 10).unwrap().addresses;
    assert!(known.iter().any(|address| address.mac == Mac(host).to_string()), "{known:?}");
    lab.fabric.remove_port("lan", "host").unwrap();
    wait_for("the device to go with its port", || vmq::os::mtu("yard-lan").is_err());
}

#[test]
fn segments_reach_a_port_merged_or_as_they_were_sent_as_its_coalesce_says() {
    let lab = Lab::new();
    let (from, next, _) = lab.model("from", 1500, 0);
    let taken: Vec<Frames> = [true, false]
        .iter()
        .map(|&coalesce| lab.plug(PortSpec { coalesce, ..adapter(&coalesce.to_string()) }, 100).2)
        .collect();
    let first = Builder::new(false, Transport::Tcp);
    let second = Builder { sequence: first.sequence.wrapping_add(1000), id: first.id + 1, ..first.clone() };
    let mut segments = [first.frame(&payload(1000)), second.frame(&payload(1000))];
    segments.iter_mut().for_each(|frame| frame[..6].fill(255));
    let send = || {
        next.lock().unwrap().extend_from_slice(&segments);
        from.nudge(0);
    };
    let lengths = |at: usize| taken[at].lock().unwrap().iter().map(Vec::len).collect::<Vec<_>>();
    let (one, header) = (segments[0].len(), first.header_len());
    send();
    wait_for("both segments", || lengths(1).len() == 2);
    assert_eq!((lengths(0), lengths(1)), (vec![header + 2000], vec![one, one]));
    assert_eq!(*taken[1].lock().unwrap(), segments);

    // It can be changed while the port runs.
    let change = PortChange { coalesce: Some(true), ..PortChange::default() };
    lab.fabric.change_port("lan", "false", change).unwrap();
    send();
    wait_for("another frame", || lengths(1).len() > 2);
    assert_eq!(lengths(1)[2..], [header + 2000]);
}

#[test]
fn idle_queues_are_gathered_on_one_worker_and_spread_when_there_is_load() {
    if std::thread::available_parallelism().is_ok_and(|processors| processors.get() < 2) {
        eprintln!("skipped: needs two processors");
        return;
    }
    let workers = WorkersSpec { cpus: vec![0, 1], idle: WorkersSpec::IDLE, preempt: false, balance: true };
    let lab = Lab { fabric: Fabric::start(workers).unwrap(), dir: tempfile::tempdir().unwrap() };
    lab.add_switch();
    let (a, next, _) = lab.model("a", 1500, 0);
    let (_, _, taken) = lab.model("b", 1500, 100);
    let queues = || {
        let mut queues: Vec<_> = lab.fabric.report().workers.iter().map(|worker| worker.queues).collect();
        queues.sort_unstable();
        queues
    };
    let frames_pass = |number: u8| {
        next.lock().unwrap().push(frame(number, 60));
        a.nudge(0);
        wait_for("the frame", || taken.lock().unwrap().last() == Some(&frame(number, 60)));
    };
    assert_eq!(queues(), [1, 1]);
    frames_pass(1);
    // The control thread ticks, too: one tick now and then does not count as load.
    let tick_until = |what: &str, load: u64, wanted: [usize; 2]| {
        wait_for(what, || {
            let inner = lab.fabric.lock();
            for port in inner.switch("lan").unwrap().ports.values() {
                port.sources.iter().for_each(|(_, source)| source.counters.busy(load));
            }
            drop(inner);
            lab.fabric.workers.tick();
            queues() == wanted
        });
    };
    tick_until("the queues on one worker", 0, [0, 2]);
    wait_for("the other to park", || {
        lab.fabric.report().workers.iter().any(|worker| worker.state == "parked")
    });
    frames_pass(2);
    tick_until("a queue on each", 10_000_000_000, [1, 1]);
    frames_pass(3);
}
