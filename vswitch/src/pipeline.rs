//! The forwarding pipeline: a burst and the time in, a plan of deliveries out. It does no input or output, knows no
//! clock and no queue, so that a test can drive it and a replay is exact.
//!
//! Three stages, each a loop over the burst: *classify* (shape, VLAN, source check; hash both addresses and fetch their
//! buckets), *learn* the source, *look up* the destination. By the time a stage reads a bucket its line has arrived.
//! Frames in a row with the same header are one flow, found by comparing two words, and share both accesses. Cost per
//! 64-byte frame: about 5 cycles within a run, 35 otherwise; two lines of the address table (shared by all workers, written
//! only once a second per address), no lock. The stages are functions of their own: in one, the compiler spent a third
//! of the instructions on moving values between registers and stack.

mod classify;
mod plan;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

pub use plan::{List, Plan};

use vmq::frame::{Burst, Frame};

use crate::drops::DropReason;
use crate::fdb::{Fdb, PortIndex};
use crate::parse::ethertype::VLAN;
use crate::tally::Tally;
use crate::topology::Topology;
use classify::{Flow, Flows, classify};
use plan::Way;

/// Decides who gets the frames of `burst`, which came from port `ingress` at `now` (seconds of a monotonic clock).
/// Each frame is either in the plan's deliveries, to one port or several, and counted once in `tally` as moved; or it is in
/// the plan's drops, and counted as dropped.
pub fn forward(
    topology: &Topology,
    ingress: PortIndex,
    now: u32,
    burst: &mut Burst<'_>,
    plan: &mut Plan,
    tally: &mut Tally,
) {
    plan.reset(topology.members().last().map_or(0, |&last| usize::from(last) + 1));
    let Some(rules) = topology.rules(ingress) else {
        for index in (0u8..).take(burst.len()) {
            plan.refuse(index, DropReason::NotReady, tally);
        }
        return;
    };
    let mut flows = Flows::new();
    classify(&topology.fdb, rules, burst, &mut flows, plan, tally);
    learn(&topology.fdb, ingress, now, &flows);
    look_up(topology, ingress, &flows, burst.frames(), plan, tally);
}

#[inline(never)]
fn learn(fdb: &Fdb, ingress: PortIndex, now: u32, flows: &[Flow]) {
    for flow in flows {
        fdb.learn(flow.source.0, flow.source.1, ingress, now);
    }
}

/// Plans who gets the flows. Those in a row that go the same way are handed over together.
#[inline(never)]
fn look_up(
    topology: &Topology,
    ingress: PortIndex,
    flows: &[Flow],
    frames: &[Frame],
    plan: &mut Plan,
    tally: &mut Tally,
) {
    let (mut open, mut run) = (None, 0..0);
    for flow in flows {
        let way = flow.way(&topology.fdb);
        if way.is_some() && way == open && run.end == flow.frames.start && !flow.tagged {
            run.end = flow.frames.end;
            continue;
        }
        plan.hand_over(open, run, frames, tally);
        open = decide(topology, ingress, way, flow, frames, plan, tally);
        run = flow.frames.clone();
    }
    plan.hand_over(open, run, frames, tally);
}

/// `way` if `flow` may go it, and so may all untagged ones; else the flow's frames are flooded or refused.
#[inline(never)]
fn decide(
    topology: &Topology,
    ingress: PortIndex,
    way: Option<Way>,
    flow: &Flow,
    frames: &[Frame],
    plan: &mut Plan,
    tally: &mut Tally,
) -> Option<Way> {
    // What is asked of a frame here all of a flow answer alike.
    let first = &frames[usize::from(flow.frames.start)];
    match way {
        Some(way) if way.port == ingress => {
            flow.frames.clone().for_each(|index| plan.refuse(index, DropReason::SamePort, tally));
            None
        }
        Some(way) if reaches(topology, ingress, way.port, first) => Some(way),
        _ => {
            flow.frames.clone().for_each(|index| flood(topology, ingress, index, frames, plan, tally));
            None
        }
    }
}

/// True if `frame`, which came from `ingress`, may leave through `port`.
///
/// A second tag behind the first must not come to light where the first is taken off: whoever is behind that port
/// would believe it, and the frame would have hopped into a VLAN of the sender's choice.
#[inline]
fn reaches(topology: &Topology, ingress: PortIndex, port: PortIndex, frame: &Frame) -> bool {
    topology.carries(port, frame.vlan)
        && topology.meet(ingress, port)
        && !(frame.tagged && is_stacked(frame) && topology.untags(port, frame.vlan))
}

/// True if the destination is one that no bridge relays (IEEE 802.1Q-2018, table 8-1).
fn is_link_local(frame: &Frame) -> bool {
    matches!(frame.head, [0x01, 0x80, 0xc2, 0, 0, 0..=0x0f, ..])
}

/// True if a second 802.1Q tag follows the first.
#[cold]
fn is_stacked(frame: &Frame) -> bool {
    u16::from_be_bytes([frame.head[16], frame.head[17]]) == VLAN
}

#[cold]
fn flood(
    topology: &Topology,
    ingress: PortIndex,
    index: u8,
    frames: &[Frame],
    plan: &mut Plan,
    tally: &mut Tally,
) {
    let frame = &frames[usize::from(index)];
    if is_link_local(frame) {
        return plan.refuse(index, DropReason::LinkLocal, tally);
    }
    let mut receivers = 0;
    for &port in topology.members() {
        if port != ingress && reaches(topology, ingress, port, frame) {
            plan.deliver(port, index..index + 1);
            receivers += 1;
        }
    }
    if receivers == 0 {
        plan.refuse(index, DropReason::NoReceiver, tally);
    } else {
        tally.moved(frame.len);
    }
}
