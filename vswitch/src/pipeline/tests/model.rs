//! Random ports, VLANs, frames, times and changes: the pipeline and the reference switch agree on every frame, and on
//! the address table after every step.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

use super::*;
use crate::fdb::{Filter, Key};
use crate::pipeline::reference::Switch;

/// Port numbers are below this; few, so that they meet.
const PORTS: u16 = 7;
const VLANS: [u16; 6] = [1, 2, 3, 10, 64, 4094];

#[derive(Debug, Clone)]
enum Step {
    Burst(u16, Vec<Vec<u8>>),
    Wait(u32),
    Age,
    SetPort(u16, Option<Port>),
    Limit(u16, Option<u32>),
    Pin(Mac, u16, u16),
    Unpin(Mac, u16),
    Flush(u16),
}

fn mac() -> impl Strategy<Value = Mac> {
    prop_oneof![
        20 => (0..8u32).prop_map(station),
        1 => Just([0; 6]),
        1 => Just([2, 0, 0, 0, 1, 0]),
    ]
}

fn any_mac() -> impl Strategy<Value = Mac> {
    prop_oneof![
        24 => mac(),
        4 => Just(BROADCAST),
        2 => Just([1, 0, 0x5e, 0, 0, 1]),
        // Around those that bridges do not relay.
        2 => (0..20u8).prop_map(|last| [1, 0x80, 0xc2, 0, 0, last]),
    ]
}

fn vlan() -> impl Strategy<Value = u16> {
    prop_oneof![8 => select(&VLANS[..]), 1 => Just(0), 1 => Just(4095)]
}

fn mode() -> impl Strategy<Value = VlanMode> {
    let members = proptest::sample::subsequence(VLANS.to_vec(), 0..=VLANS.len());
    prop_oneof![
        2 => Just(VlanMode::Passthrough),
        2 => select(&VLANS[..3]).prop_map(VlanMode::Access),
        3 => (members, proptest::option::of(select(&VLANS[..3])))
            .prop_map(|(members, native)| VlanMode::Trunk { members, native }),
    ]
}

fn place() -> impl Strategy<Value = Option<PrivateVlan>> {
    prop_oneof![
        4 => Just(None),
        1 => Just(Some(PrivateVlan::Isolated)),
        2 => (0..2u16).prop_map(|id| Some(PrivateVlan::Community(id))),
    ]
}

fn any_port() -> impl Strategy<Value = Port> {
    let mtu = prop_oneof![6 => Just(1500), 1 => Just(68), 1 => Just(9000)];
    (mode(), mtu, proptest::option::weighted(0.2, mac()), place())
        .prop_map(|(vlan, mtu, source, private)| Port { vlan, private, mtu, source })
}

/// Mostly ordinary frames, with up to three tags; some cut anywhere in their header.
fn any_frame() -> impl Strategy<Value = Vec<u8>> {
    let kind = prop_oneof![6 => Just(0x8100u16), 1 => Just(0x88a8), 1 => Just(0x9100)];
    let tag =
        (kind, vlan(), 0..16u16).prop_map(|(kind, vlan, priority)| (kind, vlan | priority << 12)).boxed();
    let tags = prop_oneof![3 => vec(tag.clone(), 0..=1), 1 => vec(tag, 2..=3)];
    let len = prop_oneof![
        12 => Just(64usize),
        2 => 0..24usize,
        2 => select(vec![82usize, 83, 86, 87, 1514, 1515, 1518, 1519, 9014, 9015, 9018, 9019, 65_550]),
    ];
    (any_mac(), any_mac(), tags, len).prop_map(|(to, from, tags, len)| frame(to, from, &tags, len))
}

fn step() -> impl Strategy<Value = Step> {
    let port = 0..PORTS;
    prop_oneof![
        16 => (port.clone(), vec(any_frame(), 1..20)).prop_map(|(port, frames)| Step::Burst(port, frames)),
        3 => (0..40u32).prop_map(Step::Wait),
        2 => Just(Step::Age),
        4 => (port.clone(), proptest::option::weighted(0.8, any_port())).prop_map(|(n, port)| Step::SetPort(n, port)),
        1 => (port.clone(), proptest::option::of(0..4u32)).prop_map(|(port, limit)| Step::Limit(port, limit)),
        1 => (mac(), vlan(), port.clone()).prop_map(|(mac, vlan, port)| Step::Pin(mac, vlan, port)),
        1 => (mac(), vlan()).prop_map(|(mac, vlan)| Step::Unpin(mac, vlan)),
        1 => port.prop_map(Step::Flush),
    ]
}

/// The pipeline and the reference, side by side.
struct Pair {
    rig: Rig,
    reference: Switch,
    now: u32,
}

impl Pair {
    fn new(capacity: u32, aging: u32, ports: Vec<Port>) -> Self {
        let config = Config { capacity, ports: PORTS, aging, flap: RESTLESS, ..Config::default() };
        let mut reference = Switch::new(capacity as usize, aging);
        reference.ports = (0..).zip(ports).collect();
        let mut pair = Self { rig: Rig::new(config), reference, now: 1_000 };
        pair.rig.set_ports(&pair.reference.ports);
        pair
    }

    fn take(&mut self, step: Step) {
        let (rig, reference, now) = (&mut self.rig, &mut self.reference, self.now);
        match step {
            Step::Burst(ingress, frames) => {
                let expected = reference.burst(ingress, now, &frames);
                let actual = rig.burst(ingress, now, &frames);
                for ((actual, expected), frame) in actual.iter().zip(&expected).zip(&frames) {
                    let start = &frame[..frame.len().min(22)];
                    assert_eq!(actual, expected, "{} bytes from port {ingress}: {start:02x?}", frame.len());
                }
            }
            Step::Wait(seconds) => self.now += seconds,
            Step::Age => {
                reference.age(now);
                rig.fdb.age(now, rig.fdb.buckets());
            }
            Step::SetPort(index, Some(port)) => {
                reference.ports.insert(index, port);
                rig.set_ports(&reference.ports);
            }
            Step::SetPort(index, None) => {
                reference.ports.remove(&index);
                rig.set_ports(&reference.ports);
            }
            Step::Limit(port, limit) => {
                match limit {
                    Some(limit) => reference.limits.insert(port, limit as usize),
                    None => reference.limits.remove(&port),
                };
                assert!(rig.fdb.set_port_limit(port, limit));
            }
            Step::Pin(mac, vlan, port) => {
                let fits = mac != [0; 6] && reference.pin(mac, vlan, port);
                assert_eq!(rig.fdb.insert_static(Key::new(mac, vlan), port).is_ok(), fits);
            }
            Step::Unpin(mac, vlan) => {
                let known = reference.table.remove(&(mac, vlan)).is_some();
                assert_eq!(rig.fdb.remove(Key::new(mac, vlan)), known);
            }
            Step::Flush(port) => {
                reference.flush(port);
                rig.fdb.flush(Filter { port: Some(port), dynamic_only: true, ..Filter::default() });
            }
        }
    }

    fn compare_tables(&self) {
        let mut expected: Vec<_> = self
            .reference
            .table
            .iter()
            .map(|(&(mac, vlan), entry)| {
                let age = if entry.fixed { 0 } else { self.now - entry.seen };
                (vlan, mac, entry.port, age, entry.fixed)
            })
            .collect();
        expected.sort_unstable();
        let actual: Vec<_> = self
            .rig
            .fdb
            .snapshot(self.now, None, usize::MAX)
            .1
            .iter()
            .map(|entry| (entry.key.vlan(), entry.key.mac(), entry.port, entry.age, entry.is_static))
            .collect();
        assert_eq!(actual, expected);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1024, ..ProptestConfig::default() })]

    #[test]
    fn every_frame_fares_as_in_the_reference_switch(
        capacity in prop_oneof![3 => Just(1000u32), 1 => 1..12u32],
        aging in 10..60u32,
        ports in vec(any_port(), 2..=usize::from(PORTS)),
        steps in vec(step(), 1..40),
    ) {
        let mut pair = Pair::new(capacity, aging, ports);
        for step in steps {
            pair.take(step);
            pair.compare_tables();
        }
    }

    #[test]
    fn frame_of_random_bytes_fares_as_in_the_reference_switch(
        ports in vec(any_port(), 2..=usize::from(PORTS)),
        frames in vec(vec(any::<u8>(), 0..100), 1..=BURST_FRAMES),
    ) {
        let mut pair = Pair::new(1000, 300, ports);
        pair.take(Step::Burst(0, frames));
        pair.compare_tables();
    }
}
