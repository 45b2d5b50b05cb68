//! The isolation audit: each frame names in its payload the VLAN that it was sent in, and whoever receives it compares
//! that with the VLAN it takes the frame for. Frames try all they can to get elsewhere: tags of any depth, addresses
//! known in other VLANs, and configurations that change under way.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use vmq::frame::Accepts;

use super::*;
use crate::offload::{TagForm, Translator, Want};

const VLANS: [u16; 4] = [1, 10, 20, 4094];
const PORTS: usize = 6;

fn mode() -> impl Strategy<Value = VlanMode> {
    let members = proptest::sample::subsequence(VLANS.to_vec(), 0..=VLANS.len());
    prop_oneof![
        1 => Just(VlanMode::Passthrough),
        3 => select(&VLANS[..]).prop_map(VlanMode::Access),
        4 => (members, proptest::option::of(select(&VLANS[..])))
            .prop_map(|(members, native)| VlanMode::Trunk { members, native }),
    ]
}

/// A frame with any tags; its payload is still to be marked.
fn any_frame() -> impl Strategy<Value = Vec<u8>> {
    let kind = prop_oneof![6 => Just(0x8100u16), 1 => Just(0x88a8)];
    let vlan = prop_oneof![6 => select(&VLANS[..]), 1 => Just(0), 1 => Just(4095)];
    let tags = vec((kind, vlan), 0..=3);
    let destination = prop_oneof![3 => (0..6u32).prop_map(station), 1 => Just(BROADCAST)];
    (destination, (0..6u32).prop_map(station), tags, 40..100usize)
        .prop_map(|(to, from, tags, len)| frame(to, from, &tags, len))
}

/// The VLAN for which whoever stands at a port takes a frame, going by the bytes alone.
fn reads(mode: &VlanMode, bytes: &[u8]) -> u16 {
    let outer = u16::from_be_bytes([bytes[12], bytes[13]]);
    let tag = if outer == 0x8100 { u16::from_be_bytes([bytes[14], bytes[15]]) & 0xfff } else { 0 };
    match mode {
        VlanMode::Access(own) => *own,
        VlanMode::Trunk { native, .. } if tag == 0 => native.unwrap_or(0),
        VlanMode::Passthrough | VlanMode::Trunk { .. } => tag,
    }
}

/// Whether an operator put the port into the VLAN.
fn belongs(mode: &VlanMode, vlan: u16) -> bool {
    match mode {
        VlanMode::Passthrough => true,
        VlanMode::Access(own) => *own == vlan,
        VlanMode::Trunk { members, native } => members.contains(&vlan) || *native == Some(vlan),
    }
}

fn want(mode: &VlanMode) -> Want {
    let tag = match mode {
        VlanMode::Passthrough => TagForm::AsIs,
        VlanMode::Access(_) => TagForm::Access,
        VlanMode::Trunk { native, .. } => TagForm::Trunk { native: native.unwrap_or(0) },
    };
    Want { accepts: Accepts::empty(), coalesce: false, max_frame: 1514, tag }
}

/// Sends `frames` from port `ingress`, and audits what every port receives. Says how many frames were received.
fn audit(rig: &mut Rig, modes: &[VlanMode], ingress: usize, mut frames: Vec<Vec<u8>>) -> usize {
    for frame in &mut frames {
        let mark = reads(&modes[ingress], frame).to_be_bytes();
        let end = frame.len() - 2;
        frame[end..].copy_from_slice(&mark);
    }
    let mut store = FrameStore::default();
    let mut burst = Burst::new(&mut store);
    for frame in &frames {
        assert!(burst.push(frame.as_slice().into(), Offload::default()));
    }
    let number = u16::try_from(ingress).unwrap();
    forward(&rig.topology, number, 0, &mut burst, &mut rig.plan, &mut Tally::default());
    let mut received = 0;
    for (port, list) in rig.plan.deliveries() {
        let mode = &modes[usize::from(port)];
        let mut take = |burst: &Burst<'_>, list: &[u8]| {
            for &index in list {
                let bytes = flatten(burst, &burst.frames()[usize::from(index)]);
                let sent_in = u16::from_be_bytes([bytes[bytes.len() - 2], bytes[bytes.len() - 1]]);
                assert_eq!(reads(mode, &bytes), sent_in, "port {port} ({mode:?}) got {bytes:02x?}");
                assert!(belongs(mode, sent_in) && belongs(&modes[ingress], sent_in));
                received += 1;
            }
        };
        Translator::new().run(&burst, list, &want(mode), &mut take, &mut |_, reason| panic!("{reason}"));
    }
    received
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1024, ..ProptestConfig::default() })]

    #[test]
    fn no_frame_is_received_in_another_vlan_than_it_was_sent_in(
        rounds in vec((vec(mode(), PORTS), vec((0..PORTS, vec(any_frame(), 1..=20)), 1..12)), 1..4),
    ) {
        let mut rig = Rig::new(Config { flap: RESTLESS, ..Config::default() });
        for (modes, bursts) in rounds {
            rig.set_ports(&(0..).zip(modes.iter().cloned().map(port)).collect());
            for (ingress, frames) in bursts {
                audit(&mut rig, &modes, ingress, frames);
            }
        }
    }
}

#[test]
fn audit_sees_frames_at_all() {
    let modes = [VlanMode::Access(10), trunk(&[10, 20], None), trunk(&[20], Some(10)), VlanMode::Passthrough];
    let mut rig = Rig::with_ports(modes.iter().cloned().map(port));
    let plain = frame(BROADCAST, station(1), &[], 60);
    let tagged = frame(BROADCAST, station(2), &[(0x8100, 20)], 60);
    assert_eq!(audit(&mut rig, &modes, 0, vec![plain.clone(), plain]), 6);
    assert_eq!(audit(&mut rig, &modes, 1, vec![tagged]), 2);
}

#[test]
fn isolated_ports_and_communities_meet_routers_and_their_own_only() {
    let place = |private| Port { private, ..port(VlanMode::Access(10)) };
    let community = |id| place(Some(PrivateVlan::Community(id)));
    let isolated = || place(Some(PrivateVlan::Isolated));
    // 0 is the router; 1 and 2 are isolated; 3 and 4 are a community, 5 is another.
    let mut rig =
        Rig::with_ports([place(None), isolated(), isolated(), community(1), community(1), community(2)]);
    let broadcast = |from: u16| frame(BROADCAST, station(from.into()), &[], 60);
    for (from, receivers) in [(0, vec![1, 2, 3, 4, 5]), (1, vec![0]), (3, vec![0, 4]), (5, vec![0])] {
        assert_eq!(rig.send(from, 1, broadcast(from)), Fate::Delivered(receivers.into_iter().collect()));
    }
    // Knowing where somebody is does not help.
    let unicast = |from: u16, to: u16| frame(station(to.into()), station(from.into()), &[], 60);
    assert_eq!(rig.send(1, 2, unicast(1, 3)), to([0]));
    assert_eq!(rig.send(3, 2, unicast(3, 5)), to([0, 4]));
    assert_eq!(rig.send(0, 2, unicast(0, 1)), to([1]));
    assert_eq!(rig.send(5, 2, unicast(5, 0)), to([0]));
}
