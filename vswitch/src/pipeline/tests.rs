//! The pipeline against the reference switch, and the abuse it must withstand.

mod hostile;
mod isolation;
mod model;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use vmq::frame::{BURST_FRAMES, FrameStore, Offload};

use super::reference::{Fate, Mac, Port};
use super::*;
use crate::fdb::{Config, Fdb, Flap};
use crate::offload::testing::flatten;
use crate::spec::{PrivateVlan, VlanMode};
use crate::topology::{Rules, VlanRule};

/// Never flapping: each move starts a new window.
const RESTLESS: Flap = Flap { moves: u8::MAX, window: 0, hold: 0 };

const BROADCAST: Mac = [0xff; 6];

/// The address of station `n`.
fn station(n: u32) -> Mac {
    let [a, b, c, d] = n.to_be_bytes();
    [2, 0, a, b, c, d]
}

/// A frame of `len` bytes with `tags` (type, control information) as far as it is long enough for them.
fn frame(destination: Mac, source: Mac, tags: &[(u16, u16)], len: usize) -> Vec<u8> {
    let mut bytes = [destination, source].concat();
    for (kind, control) in tags {
        bytes.extend(kind.to_be_bytes());
        bytes.extend(control.to_be_bytes());
    }
    bytes.extend([0x88, 0xb5]);
    bytes.resize(len, 0xa5);
    bytes
}

fn port(vlan: VlanMode) -> Port {
    Port { vlan, private: None, mtu: 1500, source: None }
}

fn trunk(members: &[u16], native: Option<u16>) -> VlanMode {
    VlanMode::Trunk { members: members.to_vec(), native }
}

/// A switch as the pipeline sees it.
struct Rig {
    fdb: Arc<Fdb>,
    topology: Topology,
    plan: Plan,
}

impl Rig {
    fn new(config: Config) -> Self {
        let fdb = Arc::new(Fdb::new(config, [1, 2]));
        Self { topology: Topology::new(Vec::new(), Arc::clone(&fdb)), fdb, plan: Plan::default() }
    }

    /// A switch with ports 0, 1, …
    fn with_ports(ports: impl IntoIterator<Item = Port>) -> Self {
        let mut rig = Self::new(Config::default());
        rig.set_ports(&(0..).zip(ports).collect());
        rig
    }

    fn set_ports(&mut self, ports: &BTreeMap<u16, Port>) {
        let rules = |port: &Port| Rules {
            source: port.source,
            vlan: VlanRule::from(&port.vlan),
            private: port.private,
            mtu: u16::try_from(port.mtu).unwrap(),
        };
        let count = ports.keys().last().map_or(0, |last| last + 1);
        let rules = (0..count).map(|index| ports.get(&index).map(rules)).collect();
        self.topology = Topology::new(rules, Arc::clone(&self.fdb));
    }

    /// Sends frames in one burst, and checks that plan and counters account for each exactly once.
    fn burst(&mut self, ingress: u16, now: u32, frames: &[Vec<u8>]) -> Vec<Fate> {
        self.burst_of(ingress, now, frames, Offload::default())
    }

    fn burst_of(&mut self, ingress: u16, now: u32, frames: &[Vec<u8>], offload: Offload) -> Vec<Fate> {
        let mut store = FrameStore::default();
        let mut burst = Burst::new(&mut store);
        for frame in frames {
            assert!(burst.push(frame.as_slice().into(), offload));
        }
        let mut tally = Tally::default();
        forward(&self.topology, ingress, now, &mut burst, &mut self.plan, &mut tally);
        let mut receivers = vec![BTreeSet::new(); frames.len()];
        for (port, list) in self.plan.deliveries() {
            assert!(list.is_sorted_by(|a, b| a < b), "port {port} gets {list:?}: not in order, or twice");
            assert_ne!(port, ingress, "a frame came back");
            list.iter().for_each(|&index| assert!(receivers[usize::from(index)].insert(port)));
        }
        let mut fates: Vec<_> = receivers.into_iter().map(Fate::Delivered).collect();
        for &(index, reason) in self.plan.dropped() {
            let fate = &mut fates[usize::from(index)];
            assert_eq!(
                *fate,
                Fate::Delivered(BTreeSet::new()),
                "frame {index} is delivered or dropped already"
            );
            *fate = Fate::Dropped(reason);
        }
        assert!(!fates.contains(&Fate::Delivered(BTreeSet::new())), "a frame is lost without a reason");
        for &reason in DropReason::ALL {
            let count = fates.iter().filter(|fate| **fate == Fate::Dropped(reason)).count();
            assert_eq!(tally.dropped(reason) as usize, count, "{reason:?}");
        }
        let moved: Vec<_> =
            fates.iter().zip(frames).filter(|(fate, _)| matches!(fate, Fate::Delivered(_))).collect();
        let bytes: usize = moved.iter().map(|(_, frame)| frame.len()).sum();
        assert_eq!((tally.frames, tally.bytes), (moved.len() as u64, bytes as u64), "each is counted once");
        fates
    }

    fn send(&mut self, ingress: u16, now: u32, frame: Vec<u8>) -> Fate {
        self.burst(ingress, now, &[frame]).remove(0)
    }

    /// Makes `mac` known on `port` in the VLAN of untagged frames.
    fn teach(&mut self, port: u16, now: u32, mac: Mac) {
        self.send(port, now, frame(BROADCAST, mac, &[], 60));
    }
}

fn to<const N: usize>(ports: [u16; N]) -> Fate {
    Fate::Delivered(ports.into())
}

fn dropped(reason: DropReason) -> Fate {
    Fate::Dropped(reason)
}
