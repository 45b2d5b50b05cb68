//! Who has which address, and how ports change and go under it.

use std::sync::mpsc;

use super::*;
use crate::report::AddressReport;
use crate::spec::VlanMode;
use crate::topology::VlanRule;

const MINE: Mac = Mac([2, 0, 0, 0, 0, 1]);

fn in_vlan(name: &str, vlan: VlanMode, mac: Option<Mac>) -> PortSpec {
    PortSpec { vlan, mac, ..adapter(name) }
}

fn trunk(members: &[u16]) -> VlanMode {
    VlanMode::Trunk { members: members.to_vec(), native: None }
}

/// A broadcast of [`MINE`] in `vlan`.
fn tagged(vlan: u16) -> Vec<u8> {
    let mut frame = frame(0, 64);
    frame[12..14].copy_from_slice(&[0x81, 0]);
    frame[14..16].copy_from_slice(&vlan.to_be_bytes());
    frame
}

impl Lab {
    fn known(&self) -> Vec<(u16, String, bool)> {
        let list = self.fabric.addresses("lan", None, 100).unwrap().addresses;
        let short = |AddressReport { mac, vlan, port, fixed, .. }: AddressReport| {
            assert_eq!(mac, MINE.to_string());
            (vlan, port, fixed)
        };
        list.into_iter().map(short).collect()
    }

    fn to_vlan(&self, port: &str, vlan: VlanMode) -> Result<(), FabricError> {
        self.fabric.change_port("lan", port, PortChange { vlan: Some(vlan), ..PortChange::default() })
    }
}

fn message(refused: Result<(), FabricError>) -> String {
    refused.unwrap_err().to_string()
}

#[test]
fn pinned_address_is_pinned_to_no_other_port_and_a_ports_own_is_not_unpinned() {
    let lab = Lab::new();
    lab.fabric.add_port("lan", in_vlan("own", VlanMode::Access(10), Some(MINE))).unwrap();
    lab.fabric.add_port("lan", adapter("listed")).unwrap();
    lab.fabric.add_port("lan", adapter("other")).unwrap();
    lab.fabric.add_address("lan", "listed", MINE, 20).unwrap();
    for (vlan, owner) in [(10, "own"), (20, "listed")] {
        let refused = message(lab.fabric.add_address("lan", "other", MINE, vlan));
        assert!(refused.contains(&format!("pinned to port {owner}")), "{refused}");
    }
    let refused = message(lab.fabric.remove_address("lan", MINE, 10));
    assert!(refused.contains("own address of port own"), "{refused}");
    let both = [(10, "own".to_owned(), true), (20, "listed".to_owned(), true)];
    assert_eq!(lab.known(), both);
    lab.fabric.remove_address("lan", MINE, 20).unwrap();
    assert_eq!(lab.known(), both[..1]);
    lab.fabric.add_address("lan", "other", MINE, 20).unwrap();
}

#[test]
fn change_into_the_vlan_of_the_same_address_is_refused_and_changes_nothing() {
    let lab = Lab::new();
    let (a, next, _) = lab.plug(in_vlan("a", VlanMode::Access(10), Some(MINE)), 0);
    lab.fabric.add_port("lan", in_vlan("b", VlanMode::Access(20), Some(MINE))).unwrap();
    let before = lab.known();
    assert_eq!(before, [(10, "a".to_owned(), true), (20, "b".to_owned(), true)]);
    let change = PortChange { mtu: Some(9000), vlan: Some(VlanMode::Access(20)), ..PortChange::default() };
    let refused = message(lab.fabric.change_port("lan", "a", change));
    assert!(refused.contains("pinned to port b"), "{refused}");
    assert!(message(lab.to_vlan("a", VlanMode::Passthrough)).contains("pinned to port b"));
    let port = lab.port("a");
    assert_eq!((lab.known(), port.vlan.as_str(), port.mtu), (before, "access 10", 1500));
    // The workers have not seen it either: what is longer than the old MTU is refused.
    next.lock().unwrap().push(frame(0, 2000));
    a.nudge(0);
    wait_for("the drop", || lab.port("a").received.drops.contains_key(&DropReason::IngressMtu));

    lab.to_vlan("a", VlanMode::Access(30)).unwrap();
    assert_eq!(lab.known(), [(20, "b".to_owned(), true), (30, "a".to_owned(), true)]);
    lab.to_vlan("a", trunk(&[40, 41])).unwrap();
    assert_eq!(lab.known(), [(20, "b".to_owned(), true)], "a trunk without native VLAN carries none");
}

#[test]
fn own_address_belongs_to_its_port_in_every_vlan_that_the_port_carries() {
    let lab = Lab::new();
    lab.model("listener", 1500, 0);
    let (thief, next, _) = lab.plug(adapter("thief"), 0);
    let send = |vlans: &[u16]| {
        let offered = || {
            let counted = lab.port("thief").received;
            counted.frames + counted.dropped()
        };
        let before = offered();
        next.lock().unwrap().extend(vlans.iter().map(|&vlan| tagged(vlan)));
        thief.nudge(0);
        wait_for("the frames", || offered() == before + vlans.len() as u64);
    };
    send(&[9, 10, 11]);
    assert_eq!(lab.known(), [9, 10, 11].map(|vlan| (vlan, "thief".to_owned(), false)));
    // What was learnt before is forgotten, in the owner's VLANs.
    let (owner, mine, _) = lab.plug(in_vlan("owner", trunk(&[10, 11, 12]), Some(MINE)), 100);
    assert_eq!(lab.known(), [(9, "thief".to_owned(), false)]);
    send(&[9, 10, 11, 12]);
    assert_eq!(lab.known(), [(9, "thief".to_owned(), false)]);
    mine.lock().unwrap().push(tagged(11));
    owner.nudge(0);
    wait_for("the owner", || lab.known().len() == 2);
    send(&[10, 11, 12]);
    assert_eq!(lab.known(), [(9, "thief".to_owned(), false), (11, "owner".to_owned(), false)]);
    // With its VLANs the address is given up.
    lab.to_vlan("owner", trunk(&[11])).unwrap();
    send(&[10, 11, 12]);
    assert_eq!(lab.known(), [9, 10, 12].map(|vlan| (vlan, "thief".to_owned(), false)));
    lab.fabric.remove_port("lan", "owner").unwrap();
    send(&[11]);
    assert_eq!(lab.known().len(), 4);
}

/// Says that it is asked for frames, and gives one when told to.
#[derive(Debug)]
struct Slow {
    asked: Sender<()>,
    go: mpsc::Receiver<()>,
    frame: Vec<u8>,
}

impl FrameSource for Slow {
    fn receive<'m>(&'m mut self, burst: &mut Burst<'m>, _: Nanos, _: &mut Tally) -> Result<(), BackendFault> {
        if self.asked.send(()).is_ok() && self.go.recv().is_ok() {
            assert!(burst.push(self.frame.as_slice().into(), Offload::NONE));
        }
        Ok(())
    }

    fn complete(&mut self) -> Result<bool, BackendFault> {
        Ok(false)
    }

    fn arm(&mut self) -> Wait {
        Wait::Nudge
    }

    fn disarm(&mut self) {}
}

#[test]
fn burst_under_way_while_the_vlan_changes_leaves_no_address_in_the_old_one() {
    let lab = Lab::new();
    let (port, ..) = lab.plug(in_vlan("a", VlanMode::Access(10), None), 0);
    let snapshot = Arc::clone(&lab.fabric.lock().switch("lan").unwrap().snapshot);
    let ((asked, is_asked), (tell, go)) = (mpsc::channel(), mpsc::channel());
    let slow = Slow { asked, go, frame: frame(0, 60) };
    port.connect(0, Box::new(slow), Box::new(Taker { room: 0, taken: Frames::default() }));
    is_asked.recv().unwrap();
    std::thread::scope(|scope| {
        let change = scope.spawn(|| lab.to_vlan("a", VlanMode::Access(20)));
        let vlan = || snapshot.load().topology.rules(0).map(|rules| rules.vlan.clone());
        wait_for("the new rules", || vlan() == Some(VlanRule::Access(20)));
        // It waits for the burst; one that does not is given the time to end.
        (0..50)
            .take_while(|_| !change.is_finished())
            .for_each(|_| std::thread::sleep(Duration::from_millis(1)));
        tell.send(()).unwrap();
        drop(tell);
        change.join().unwrap().unwrap();
    });
    wait_for("the frame", || !lab.port("a").received.drops.is_empty());
    assert!(lab.known().iter().all(|(vlan, ..)| *vlan == 20), "{:?}", lab.known());
    drop(is_asked);
}

#[test]
fn addresses_are_listed_in_order_by_port_and_up_to_a_limit() {
    let lab = Lab::new();
    for name in ["a", "b"] {
        lab.fabric.add_port("lan", adapter(name)).unwrap();
    }
    for (vlan, port) in (1..=9).rev().zip(["a", "b", "b"].into_iter().cycle()) {
        lab.fabric.add_address("lan", port, MINE, vlan).unwrap();
    }
    let vlans = |port, limit| {
        let list = lab.fabric.addresses("lan", port, limit).unwrap();
        (list.total, list.addresses.iter().map(|address| address.vlan).collect::<Vec<_>>())
    };
    assert_eq!(vlans(None, 4), (9, vec![1, 2, 3, 4]));
    assert_eq!(vlans(None, 9), (9, (1..=9).collect()));
    assert_eq!(vlans(Some("a"), 100), (3, vec![3, 6, 9]));
    assert_eq!(vlans(Some("b"), 0), (6, Vec::new()));
    assert!(matches!(lab.fabric.addresses("lan", Some("c"), 1), Err(FabricError::NotFound { .. })));
}
