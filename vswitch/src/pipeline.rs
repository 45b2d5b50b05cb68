//! The forwarding pipeline: a burst and the time in, a plan of deliveries out. It does no input or output, knows no
//! clock and no queue, so that a test can drive it and a replay is exact.
//!
//! Three stages, each a loop over the burst: *classify* (shape, VLAN, source check; hash both addresses and fetch their
//! buckets), *learn* the source, *look up* the destination. By the time a stage reads a bucket its line has arrived.
//! Frames in a row with the same addresses are one flow and share both accesses. Cost per 64-byte frame: about 10 cycles
//! within a run, 30 otherwise; two lines of the address table (shared by all workers, written only once a second per
//! address), no lock.
//!

use arrayvec::ArrayVec;
use vmq::frame::{BURST_FRAMES, Burst, Frame};

use crate::drops::DropReason;
use crate::fdb::{Key, PortIndex, Slot};
use crate::offload;
use crate::parse::ethertype::VLAN;
use crate::tally::Tally;
use crate::topology::{ETHERNET, Rules, TAG, Topology, VlanRule, is_member};

/// Frames of one burst that go to the same port, by their index in the burst.
pub type List = ArrayVec<u8, BURST_FRAMES>;

/// Who gets which frames of a burst. Kept and reused by a worker.
#[derive(Debug, Default)]
pub struct Plan {
    lists: Vec<List>,
    touched: Vec<PortIndex>,
    dropped: ArrayVec<(u8, DropReason), BURST_FRAMES>,
}

impl Plan {
    fn reset(&mut self, ports: usize) {
        for &port in &self.touched {
            self.lists[usize::from(port)].clear();
        }
        self.touched.clear();
        self.dropped.clear();
        if self.lists.len() < ports {
            self.lists.resize_with(ports, List::new);
        }
    }

    #[inline]
    fn deliver(&mut self, port: PortIndex, frames: &[u8]) {
        let list = &mut self.lists[usize::from(port)];
        if list.is_empty() {
            self.touched.push(port);
        }
        // Each frame is listed at most once per port, so there is room.
        let _ = list.try_extend_from_slice(frames);
    }

    #[cold]
    fn refuse(&mut self, index: u8, reason: DropReason, tally: &mut Tally) {
        tally.drop(reason);
        let _ = self.dropped.try_push((index, reason));
    }

    /// Receiving ports with the frames they get, each in the order of the burst.
    #[inline]
    pub fn deliveries(&self) -> impl Iterator<Item = (PortIndex, &List)> {
        self.touched.iter().map(|&port| (port, &self.lists[usize::from(port)]))
    }

    /// Frames that nobody gets, and why.
    pub fn dropped(&self) -> &[(u8, DropReason)] {
        &self.dropped
    }
}

/// What frames with the same addresses in the same VLAN, one after another, have in common. Traffic comes in runs, so a burst
/// has few.
struct Flow {
    addresses: Addresses,
    vlan: u16,
    group: bool,
    /// The head carries a tag: such a frame shares its flow with no other, as what follows the tag matters too.
    tagged: bool,
    /// How many frames, behind those of the flows before.
    frames: u8,
    source: (Key, Slot),
    destination: (Key, Slot),
}

/// The frames of a burst that were admitted, and their flows.
struct Admitted {
    flows: ArrayVec<Flow, BURST_FRAMES>,
    frames: ArrayVec<u8, BURST_FRAMES>,
}

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
    let unfit = if burst.is_plain() { 0 } else { unfit_offloads(burst) };
    let mut admitted = Admitted { flows: ArrayVec::new(), frames: ArrayVec::new() };
    classify(topology, rules, unfit, burst, &mut admitted, plan, tally);
    for flow in &admitted.flows {
        topology.fdb.learn(flow.source.0, flow.source.1, ingress, now);
    }
    look_up(topology, ingress, &admitted, burst.frames(), plan, tally);
}

/// One bit for each frame of a burst.
type Set = u128;
const _: () = assert!(BURST_FRAMES <= Set::BITS as usize);

/// The frames whose offload metadata contradicts the frame.
#[cold]
fn unfit_offloads(burst: &Burst<'_>) -> Set {
    let unfit = |frame: &Frame| !frame.offload.is_plain() && offload::check::check(burst, frame).is_err();
    burst.frames().iter().enumerate().filter(|(_, frame)| unfit(frame)).fold(0, |bits, (i, _)| bits | 1 << i)
}

#[inline]
fn classify(
    topology: &Topology,
    rules: &Rules,
    unfit: Set,
    burst: &mut Burst<'_>,
    admitted: &mut Admitted,
    plan: &mut Plan,
    tally: &mut Tally,
) {
    let longest = rules.longest_frame();
    let allowed = rules.source.map(|source| Key::new(source, 0));
    for (index, frame) in (0u8..).zip(burst.frames_mut()) {
        let addresses = Addresses::of(frame);
        if let Err(reason) = admit(frame, rules, longest).and_then(|()| addresses.check(allowed)) {
            plan.refuse(index, reason, tally);
            continue;
        }
        if unfit != 0 && unfit >> index & 1 != 0 {
            plan.refuse(index, DropReason::BadOffload, tally);
            continue;
        }
        let same = |flow: &Flow| {
            flow.addresses == addresses && flow.vlan == frame.vlan && !flow.tagged && !frame.tagged
        };
        // There is room: a frame, and a flow at most, for each of the burst.
        let _ = admitted.frames.try_push(index);
        match admitted.flows.last_mut() {
            Some(flow) if same(flow) => flow.frames += 1,
            _ => {
                let _ = admitted.flows.try_push(Flow::new(topology, addresses, frame));
            }
        }
    }
}

impl Flow {
    #[inline]
    fn new(topology: &Topology, addresses: Addresses, frame: &Frame) -> Self {
        let fdb = &*topology.fdb;
        let group = addresses.is_group();
        let source = Key::from_wire(addresses.source(), frame.vlan);
        let source = (source, fdb.hash(source));
        fdb.prefetch(source.1);
        let destination = Key::from_wire(addresses.destination(), frame.vlan);
        let destination = (destination, if group { Slot::default() } else { fdb.hash(destination) });
        if !group {
            fdb.prefetch(destination.1);
        }
        Self { addresses, vlan: frame.vlan, group, tagged: frame.tagged, frames: 1, source, destination }
    }
}

/// Destination and source address as they lie in the frame, in two words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Addresses(u64, u32);

impl Addresses {
    #[inline]
    fn of(frame: &Frame) -> Self {
        let [a, b, c, d, e, f, g, h, i, j, k, l, ..] = frame.head;
        Self(u64::from_le_bytes([a, b, c, d, e, f, g, h]), u32::from_le_bytes([i, j, k, l]))
    }

    #[inline]
    fn destination(self) -> u64 {
        self.0 & 0xffff_ffff_ffff
    }

    #[inline]
    fn source(self) -> u64 {
        self.0 >> 48 | u64::from(self.1) << 16
    }

    /// True if the destination is a group.
    #[inline]
    fn is_group(self) -> bool {
        self.0 & 1 != 0
    }

    /// Checks the source: no group, and the one address that is allowed if there is one.
    #[inline]
    fn check(self, allowed: Option<Key>) -> Result<(), DropReason> {
        if self.source() & 1 != 0 {
            return Err(DropReason::SourceGroup);
        }
        match allowed {
            Some(allowed) if allowed != Key::from_wire(self.source(), 0) => Err(DropReason::Spoofed),
            _ => Ok(()),
        }
    }
}

/// Checks a frame's shape and finds its VLAN.
#[inline]
fn admit(frame: &mut Frame, rules: &Rules, longest: u32) -> Result<(), DropReason> {
    if frame.len < ETHERNET {
        return Err(DropReason::Runt);
    }
    let ethertype = u16::from_be_bytes([frame.head[12], frame.head[13]]);
    frame.tagged = ethertype == VLAN;
    if frame.tagged && frame.len < ETHERNET + TAG {
        // Padded by whoever receives it, the rest of the tag would be zeros or worse.
        return Err(DropReason::Runt);
    }
    let tag = if frame.tagged { u16::from_be_bytes([frame.head[14], frame.head[15]]) & 0xfff } else { 0 };
    frame.vlan = match &rules.vlan {
        VlanRule::Passthrough => tag,
        other => vlan_of(other, tag)?,
    };
    if frame.len > longest + if frame.tagged { TAG } else { 0 } && frame.offload.gso.is_none() {
        return Err(DropReason::IngressMtu);
    }
    Ok(())
}

/// The VLAN of a frame with `tag` (0: untagged or priority-tagged) on an access or trunk port.
fn vlan_of(rule: &VlanRule, tag: u16) -> Result<u16, DropReason> {
    match rule {
        VlanRule::Passthrough => Ok(tag),
        VlanRule::Access(own) if tag == 0 => Ok(*own),
        VlanRule::Access(_) => Err(DropReason::VlanRefused),
        VlanRule::Trunk { native, .. } if tag == 0 => native.ok_or(DropReason::Untagged),
        VlanRule::Trunk { members, .. } if is_member(members, tag) => Ok(tag),
        VlanRule::Trunk { .. } => Err(DropReason::VlanRefused),
    }
}

#[inline]
fn look_up(
    topology: &Topology,
    ingress: PortIndex,
    admitted: &Admitted,
    frames: &[Frame],
    plan: &mut Plan,
    tally: &mut Tally,
) {
    let mut rest = &admitted.frames[..];
    for flow in &admitted.flows {
        let Some((own, others)) = rest.split_at_checked(flow.frames.into()) else { return };
        rest = others;
        let Some(first) = own.first().and_then(|&index| frames.get(usize::from(index))) else { continue };
        match known_port(topology, ingress, flow, first) {
            Some(port) if port == ingress => {
                own.iter().for_each(|&index| plan.refuse(index, DropReason::SamePort, tally));
            }
            Some(port) => {
                plan.deliver(port, own);
                own.iter().for_each(|&index| tally.moved(frames[usize::from(index)].len));
            }
            None => own.iter().for_each(|&index| flood(topology, ingress, index, frames, plan, tally)),
        }
    }
}

/// Where the flow's destination is, if that is known and `frame`, one of the flow, may go there.
#[inline]
fn known_port(topology: &Topology, ingress: PortIndex, flow: &Flow, frame: &Frame) -> Option<PortIndex> {
    let port = if flow.group { None } else { topology.fdb.lookup(flow.destination.0, flow.destination.1) };
    port.filter(|&port| port == ingress || reaches(topology, ingress, port, frame))
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
            plan.deliver(port, &[index]);
            receivers += 1;
        }
    }
    if receivers == 0 {
        plan.refuse(index, DropReason::NoReceiver, tally);
    } else {
        tally.moved(frame.len);
    }
}

#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;
