//! Who must not see each other does not: every port sends broadcasts, known and unknown unicasts with every tag, each
//! marked with its sender, and what every other port receives is compared with what its VLANs allow.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use switchyard_tests::case;
use switchyard_tests::numbered;
use switchyard_tests::player::{Player, PlayerSpec};
use switchyard_tests::yardd::{Yardd, programs};

const LIMIT: Duration = Duration::from_secs(30);

/// How a port takes part in VLANs.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Vlan {
    Passthrough,
    Access(u16),
    Trunk(&'static [u16], Option<u16>),
}

impl Vlan {
    fn toml(self) -> String {
        match self {
            Self::Passthrough => "vlan = \"passthrough\"".to_owned(),
            Self::Access(vlan) => format!("vlan = {{ access = {vlan} }}"),
            Self::Trunk(members, None) => format!("vlan = {{ trunk = {members:?} }}"),
            Self::Trunk(members, Some(native)) => {
                format!("vlan = {{ trunk = {members:?}, native = {native} }}")
            }
        }
    }

    /// The VLAN of a frame with this tag that the port sends, if it may send it.
    fn enters(self, tag: Option<u16>) -> Option<u16> {
        match (self, tag) {
            (Self::Passthrough, tag) => Some(tag.unwrap_or(0)),
            (Self::Access(vlan), None) => Some(vlan),
            (Self::Access(_), Some(_)) => None,
            (Self::Trunk(_, native), None) => native,
            (Self::Trunk(members, _), Some(tag)) => members.contains(&tag).then_some(tag),
        }
    }

    /// The tag that a frame of `vlan` has when it leaves through the port, if it does.
    fn leaves(self, vlan: u16) -> Option<Option<u16>> {
        let tagged = (vlan != 0).then_some(vlan);
        match self {
            Self::Passthrough => Some(tagged),
            Self::Access(own) => (own == vlan).then_some(None),
            Self::Trunk(_, Some(native)) if native == vlan => Some(None),
            Self::Trunk(members, _) => members.contains(&vlan).then_some(tagged),
        }
    }
}

/// Switch, name and VLANs of every port.
const PORTS: &[(&str, &str, Vlan)] = &[
    ("one", "ten-a", Vlan::Access(10)),
    ("one", "ten-b", Vlan::Access(10)),
    ("one", "twenty-a", Vlan::Access(20)),
    ("one", "twenty-b", Vlan::Access(20)),
    ("one", "trunk", Vlan::Trunk(&[10, 20], Some(30))),
    ("one", "trunk-20", Vlan::Trunk(&[20], None)),
    ("one", "thirty", Vlan::Access(30)),
    ("one", "all", Vlan::Passthrough),
    ("two", "ten-a", Vlan::Access(10)),
    ("two", "all", Vlan::Passthrough),
    ("two", "plain", Vlan::Passthrough),
];
const TAGS: &[Option<u16>] = &[None, Some(10), Some(20), Some(30), Some(40)];

fn mac(port: usize) -> [u8; 6] {
    [2, 0, 0, 0, 0x44, u8::try_from(port).unwrap_or(0xff)]
}

fn with_tag(mut frame: Vec<u8>, tag: Option<u16>) -> Vec<u8> {
    if let Some(tag) = tag {
        let [high, low] = tag.to_be_bytes();
        frame.splice(12..12, [0x81, 0x00, high, low]);
    }
    frame
}

struct Audit {
    players: Vec<Player>,
    /// Where each address was heard of, by switch, VLAN and address: what an obviously right switch would know.
    table: BTreeMap<(&'static str, u16, [u8; 6]), usize>,
    sequence: u64,
}

impl Audit {
    /// Port `from` sends a frame to `to` with `tag`; everybody receives exactly what it may.
    fn send(&mut self, from: usize, to: [u8; 6], tag: Option<u16>) -> Result<()> {
        let (switch, name, vlan) = PORTS[from];
        self.sequence += 1;
        let what = format!("{switch}/{name} to {to:02x?} with tag {tag:?}");
        let plain = numbered::frame(mac(from), to, u32::try_from(from)?, self.sequence, 90);
        let mut expected = BTreeMap::new();
        if let Some(entered) = vlan.enters(tag) {
            self.table.insert((switch, entered, mac(from)), from);
            let known = self.table.get(&(switch, entered, to)).filter(|_| to[0] & 1 == 0);
            for (port, &(other, _, vlan)) in PORTS.iter().enumerate() {
                let meant = known.is_none_or(|&known| known == port);
                if other == switch && port != from && meant && known != Some(&from) {
                    expected.extend(vlan.leaves(entered).map(|tag| (port, with_tag(plain.clone(), tag))));
                }
            }
        }
        let sender = &mut self.players[from];
        ensure!(sender.send(0, &with_tag(plain, tag))?, "{what}: ring full");
        sender.flush(LIMIT)?;
        // A frame is delivered before it is given back to its sender.
        for (port, player) in self.players.iter_mut().enumerate() {
            let found = player.receive()?.map(|received| received.frame);
            let (switch, name, _) = PORTS[port];
            ensure!(
                found.as_ref() == expected.get(&port),
                "{what}: {switch}/{name} received {found:02x?} instead of {:02x?}",
                expected.get(&port)
            );
            ensure!(player.receive()?.is_none(), "{what}: {switch}/{name} received it twice");
        }
        Ok(())
    }
}

#[test]
fn nobody_sees_frames_of_other_vlans_and_switches() -> Result<()> {
    case::exclusive("nobody_sees_frames_of_other_vlans_and_switches", &[], |lab| {
        let mut config = String::new();
        for switch in ["one", "two"] {
            config.push_str(&format!("[switch.{switch}]\ntype = \"private\"\n"));
            for (_, name, vlan) in PORTS.iter().filter(|(owner, ..)| *owner == switch) {
                let path = lab.path(&format!("{switch}-{name}"));
                config.push_str(&format!(
                    "[switch.{switch}.port.{name}]\nvhost-user = {{ path = {path:?} }}\n{}\n",
                    vlan.toml()
                ));
            }
        }
        let yardd = Yardd::start(lab, &programs()?, &[0, 1], &config)?;
        let connect = |(switch, name, _): &(&str, &str, Vlan)| {
            let player = Player::connect(&lab.path(&format!("{switch}-{name}")), PlayerSpec::new())?;
            yardd.wait_for_port(switch, name, "up")?;
            Ok(player)
        };
        let players = PORTS.iter().map(connect).collect::<Result<Vec<_>>>()?;
        let mut audit = Audit { players, table: BTreeMap::new(), sequence: 0 };

        // Broadcast, multicast and a stranger; then everybody is known in the VLANs that it may use.
        for from in 0..PORTS.len() {
            for &tag in TAGS {
                for to in [[0xff; 6], [1, 0, 0x5e, 0, 0, 9], [2, 0, 0, 0, 0x55, 0x55]] {
                    audit.send(from, to, tag)?;
                }
            }
        }
        for from in 0..PORTS.len() {
            for to in (0..PORTS.len()).filter(|&to| to != from) {
                for &tag in TAGS {
                    audit.send(from, mac(to), tag).with_context(|| format!("to {:?}", PORTS[to]))?;
                }
            }
        }
        // The same after the tables were forgotten.
        for switch in ["one", "two"] {
            yardd.yard(&["fdb", "flush", switch])?;
        }
        audit.table.clear();
        for from in 0..PORTS.len() {
            for to in (0..PORTS.len()).filter(|&to| to != from) {
                audit.send(from, mac(to), TAGS[(from + to) % TAGS.len()])?;
            }
        }
        Ok(())
    })
}

#[test]
fn port_moved_to_another_vlan_sees_the_new_one_only() -> Result<()> {
    case::exclusive("port_moved_to_another_vlan_sees_the_new_one_only", &[], |lab| {
        let mut config = "[switch.lab]\ntype = \"private\"\n".to_owned();
        for (name, vlan) in [("ten", 10), ("twenty", 20), ("mover", 10)] {
            let path = lab.path(name);
            config.push_str(&format!(
                "[switch.lab.port.{name}]\nvhost-user = {{ path = {path:?} }}\nvlan = {{ access = {vlan} }}\n"
            ));
        }
        let yardd = Yardd::start(lab, &programs()?, &[1], &config)?;
        let connect = |name: &str| Player::connect(&lab.path(name), PlayerSpec::new());
        let (mut ten, mut twenty, mut mover) = (connect("ten")?, connect("twenty")?, connect("mover")?);
        for (sequence, vlan) in (1..).zip([10, 20, 10, 20]) {
            yardd.yard(&["port", "set", "lab/mover", "--access", &vlan.to_string()])?;
            let frame =
                |from| numbered::frame(mac(from), [0xff; 6], u32::try_from(from).unwrap_or(0), sequence, 80);
            let (first, second) = (frame(1), frame(2));
            for (player, frame) in [(&mut ten, &first), (&mut twenty, &second)] {
                ensure!(player.send(0, frame)?, "ring full");
                player.flush(LIMIT)?;
            }
            let expected = if vlan == 10 { &first } else { &second };
            ensure!(mover.expect_frame(LIMIT)?.frame == *expected, "a frame of another VLAN came");
            ensure!(mover.receive()?.is_none(), "a frame of the VLAN that was left came");
        }
        Ok(())
    })
}
