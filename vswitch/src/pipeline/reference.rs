//! The reference switch: what the pipeline must do, said as plainly as possible. One frame at a time, maps and sets, no
//! bits, no hashing of its own, nothing shared with the code under test but the names of the drop reasons and VLAN
//! modes.
//!
//! One rule is the pipeline's own: frames come in bursts from one port, and *all source addresses of a burst are learnt
//! before any destination is looked up*. (Within a burst, an address can only turn out to be on the sending port.)

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::drops::DropReason;
use crate::spec::{PrivateVlan, VlanMode};

pub type Mac = [u8; 6];

/// A port as an operator configures it.
#[derive(Debug, Clone)]
pub struct Port {
    pub vlan: VlanMode,
    pub private: Option<PrivateVlan>,
    pub mtu: usize,
    /// The only source address allowed.
    pub source: Option<Mac>,
}

/// What becomes of a frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    Delivered(BTreeSet<u16>),
    Dropped(DropReason),
}

/// An entry of the address table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    pub port: u16,
    pub seen: u32,
    pub fixed: bool,
}

#[derive(Debug)]
pub struct Switch {
    pub ports: BTreeMap<u16, Port>,
    pub limits: HashMap<u16, usize>,
    pub table: HashMap<(Mac, u16), Entry>,
    pub capacity: usize,
    pub aging: u32,
}

impl Switch {
    pub fn new(capacity: usize, aging: u32) -> Self {
        Self { ports: BTreeMap::new(), limits: HashMap::new(), table: HashMap::new(), capacity, aging }
    }

    /// What becomes of the frames of a burst from `ingress` at `now`.
    pub fn burst(&mut self, ingress: u16, now: u32, frames: &[Vec<u8>]) -> Vec<Fate> {
        let Some(port) = self.ports.get(&ingress).cloned() else {
            return frames.iter().map(|_| Fate::Dropped(DropReason::NotReady)).collect();
        };
        let admitted: Vec<_> = frames.iter().map(|frame| admit(&port, frame)).collect();
        for (frame, vlan) in frames.iter().zip(&admitted) {
            if let Ok(vlan) = *vlan {
                self.learn(source(frame), vlan, ingress, now);
            }
        }
        let decide = |(frame, vlan): (&Vec<u8>, Result<u16, DropReason>)| match vlan {
            Ok(vlan) => self.decide(ingress, frame, vlan),
            Err(reason) => Fate::Dropped(reason),
        };
        frames.iter().zip(admitted).map(decide).collect()
    }

    fn learn(&mut self, mac: Mac, vlan: u16, port: u16, now: u32) {
        if mac == [0; 6] {
            return;
        }
        let full = self.table.len() >= self.capacity;
        let learnt_here = self.table.values().filter(|entry| entry.port == port && !entry.fixed).count();
        let at_limit = self.limits.get(&port).is_some_and(|&limit| learnt_here >= limit);
        let entry = Entry { port, seen: now, fixed: false };
        match self.table.get_mut(&(mac, vlan)) {
            Some(known) if known.fixed => {}
            Some(known) if known.port == port => known.seen = now,
            Some(known) if !at_limit => *known = entry,
            None if !at_limit && !full => {
                self.table.insert((mac, vlan), entry);
            }
            _ => {}
        }
    }

    fn decide(&self, ingress: u16, frame: &[u8], vlan: u16) -> Fate {
        let destination = destination(frame);
        let is_group = destination[0] & 1 == 1;
        if !is_group && let Some(known) = self.table.get(&(destination, vlan)) {
            if known.port == ingress {
                return Fate::Dropped(DropReason::SamePort);
            }
            if self.may_leave(known.port, frame, vlan) && self.meet(ingress, known.port) {
                return Fate::Delivered([known.port].into());
            }
        }
        if destination[..5] == [0x01, 0x80, 0xc2, 0, 0] && destination[5] < 16 {
            return Fate::Dropped(DropReason::LinkLocal);
        }
        let others = self.ports.keys().filter(|&&port| port != ingress);
        let receivers: BTreeSet<_> = others
            .copied()
            .filter(|&port| self.may_leave(port, frame, vlan) && self.meet(ingress, port))
            .collect();
        if receivers.is_empty() { Fate::Dropped(DropReason::NoReceiver) } else { Fate::Delivered(receivers) }
    }

    /// An isolated port meets no other port that has a place; a community keeps to itself.
    fn meet(&self, one: u16, other: u16) -> bool {
        match (self.ports[&one].private, self.ports.get(&other).and_then(|port| port.private)) {
            (Some(PrivateVlan::Isolated), Some(_)) | (Some(_), Some(PrivateVlan::Isolated)) => false,
            (Some(PrivateVlan::Community(one)), Some(PrivateVlan::Community(other))) => one == other,
            _ => true,
        }
    }

    /// A port carries its own VLANs, and takes no tag off that hides another one.
    fn may_leave(&self, port: u16, frame: &[u8], vlan: u16) -> bool {
        let Some(port) = self.ports.get(&port) else { return false };
        let (carries, without_tag) = match &port.vlan {
            VlanMode::Passthrough => (true, false),
            VlanMode::Access(own) => (*own == vlan, true),
            VlanMode::Trunk { members, native } => {
                (members.contains(&vlan) || *native == Some(vlan), *native == Some(vlan))
            }
        };
        let hides_a_tag = ethertype(frame, 12) == Some(0x8100) && ethertype(frame, 16) == Some(0x8100);
        carries && !(without_tag && hides_a_tag)
    }

    /// Forgets what was not seen for the aging time.
    pub fn age(&mut self, now: u32) {
        let aging = self.aging;
        self.table.retain(|_, entry| entry.fixed || now - entry.seen < aging);
    }

    /// Pins an address; false if there is no room.
    pub fn pin(&mut self, mac: Mac, vlan: u16, port: u16) -> bool {
        let fits = self.table.len() < self.capacity || self.table.contains_key(&(mac, vlan));
        if fits {
            self.table.insert((mac, vlan), Entry { port, seen: 0, fixed: true });
        }
        fits
    }

    /// Forgets what was learnt on a port.
    pub fn flush(&mut self, port: u16) {
        self.table.retain(|_, entry| entry.fixed || entry.port != port);
    }
}

/// The VLAN of a frame that `port` sends, or the first reason to refuse it.
fn admit(port: &Port, frame: &[u8]) -> Result<u16, DropReason> {
    if frame.len() < 14 {
        return Err(DropReason::Runt);
    }
    let tagged = ethertype(frame, 12) == Some(0x8100);
    if tagged && frame.len() < 18 {
        return Err(DropReason::Runt);
    }
    // A priority tag (VLAN 0) says as much as no tag.
    let tag = if tagged { u16::from_be_bytes([frame[14], frame[15]]) % 4096 } else { 0 };
    let vlan = match &port.vlan {
        VlanMode::Passthrough => tag,
        VlanMode::Access(own) if tag == 0 => *own,
        VlanMode::Access(_) => return Err(DropReason::VlanRefused),
        VlanMode::Trunk { native: Some(native), .. } if tag == 0 => *native,
        VlanMode::Trunk { native: None, .. } if tag == 0 => return Err(DropReason::Untagged),
        VlanMode::Trunk { members, .. } if members.contains(&tag) => tag,
        VlanMode::Trunk { .. } => return Err(DropReason::VlanRefused),
    };
    if frame.len() > 14 + port.mtu + if tagged { 4 } else { 0 } {
        return Err(DropReason::IngressMtu);
    }
    if source(frame)[0] & 1 == 1 {
        return Err(DropReason::SourceGroup);
    }
    if port.source.is_some_and(|allowed| allowed != source(frame)) {
        return Err(DropReason::Spoofed);
    }
    Ok(vlan)
}

fn destination(frame: &[u8]) -> Mac {
    frame[..6].try_into().unwrap()
}

fn source(frame: &[u8]) -> Mac {
    frame[6..12].try_into().unwrap()
}

fn ethertype(frame: &[u8], at: usize) -> Option<u16> {
    frame.get(at..at + 2).map(|bytes| u16::from_be_bytes([bytes[0], bytes[1]]))
}
