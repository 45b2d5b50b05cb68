//! Nothing is lost, altered, doubled or put out of order between played guests that compare every byte, for every form
//! of ring, in both socket modes, with one queue and several, up to jumbo frames.

#![forbid(unsafe_code)]

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use switchyard_tests::case;
use switchyard_tests::lab::Lab;
use switchyard_tests::player::{Player, PlayerSpec};
use switchyard_tests::witness::{Conversation, Party};
use switchyard_tests::yardd::{Yardd, programs};

/// Frame lengths without check sequence.
const SIZES: &[usize] = &[60, 64, 128, 256, 1514, 1518, 4000, 9000];

fn start(lab: &Lab, queues: u16, mode: &str) -> Result<Yardd> {
    let port = |name: &str, mode: &str| {
        format!(
            "[switch.lab.port.{name}]\nvhost-user = {{ path = {:?}, queues = {queues}, mode = {mode:?} }}\nmtu = 9000\n",
            lab.path(name)
        )
    };
    let config = format!("[switch.lab]\ntype = \"private\"\n{}{}", port("red", "server"), port("blue", mode));
    Yardd::start(lab, &programs()?, &[1], &config)
}

/// Every combination of ring features.
fn forms() -> impl Iterator<Item = PlayerSpec> {
    (0u8..32).map(|bits| PlayerSpec {
        packed: bits & 1 != 0,
        mergeable: bits & 2 != 0,
        in_order: bits & 4 != 0,
        event_idx: bits & 8 != 0,
        indirect: bits & 16 != 0,
        max_frame: 9014,
        ..PlayerSpec::new()
    })
}

fn counters_agree(yardd: &Yardd) -> Result<()> {
    let (red, blue) = (yardd.port("lab", "red")?, yardd.port("lab", "blue")?);
    for (from, to) in [(&red, &blue), (&blue, &red)] {
        ensure!(from["received"]["frames"] == to["sent"]["frames"], "counters differ: {from} {to}");
        for drops in [&from["received"]["drops"], &to["sent"]["drops"]] {
            ensure!(drops.as_object().is_some_and(serde_json::Map::is_empty), "drops: {drops}");
        }
    }
    Ok(())
}

fn parties(lab: &Lab, red: PlayerSpec, blue: PlayerSpec) -> Result<[Party; 2]> {
    Ok([Party::connect(&lab.path("red"), 1, red)?, Party::connect(&lab.path("blue"), 2, blue)?])
}

#[test]
fn every_form_of_ring_carries_every_size() -> Result<()> {
    case::exclusive("every_form_of_ring_carries_every_size", &[], |lab| {
        let yardd = start(lab, 1, "server")?;
        // Each form meets another one: sender and receiver need not agree.
        for (red, blue) in forms().zip(forms().skip(11).chain(forms())) {
            let form = format!("{red:?} and {blue:?}");
            let mut conversation = Conversation::new(parties(lab, red, blue)?, SIZES, 1);
            conversation.run(400).with_context(|| form.clone())?;
            drop(conversation);
            for port in ["red", "blue"] {
                yardd.wait_for_port("lab", port, "waiting").with_context(|| form.clone())?;
            }
        }
        counters_agree(&yardd)
    })
}

#[test]
fn flows_spread_over_queues_and_keep_their_order() -> Result<()> {
    case::exclusive("flows_spread_over_queues_and_keep_their_order", &[], |lab| {
        let yardd = start(lab, 4, "server")?;
        for packed in [false, true] {
            let spec = PlayerSpec { queues: 4, packed, max_frame: 9014, ..PlayerSpec::new() };
            let mut conversation = Conversation::new(parties(lab, spec, spec)?, SIZES, 16);
            conversation.run(20_000)?;
            for party in 0..2 {
                let queues = conversation.by_queue(party);
                ensure!(queues.len() == 4, "16 flows came out of the queues {queues:?}");
            }
            drop(conversation);
            yardd.wait_for_port("lab", "red", "waiting")?;
            yardd.wait_for_port("lab", "blue", "waiting")?;
        }
        counters_agree(&yardd)
    })
}

#[test]
fn switch_connects_to_a_guest_that_listens_and_connects_again() -> Result<()> {
    case::exclusive("switch_connects_to_a_guest_that_listens_and_connects_again", &[], |lab| {
        let yardd = start(lab, 1, "client")?;
        let listen = |path: &Path| Player::listen(path, PlayerSpec::new());
        for _ in 0..3 {
            let red = Party::connect(&lab.path("red"), 1, PlayerSpec::new())?;
            let blue = Party { player: listen(&lab.path("blue"))?, mac: [2, 0, 0, 0, 0x77, 2] };
            let mut conversation = Conversation::new([red, blue], &[64, 1514], 1);
            conversation.run(2_000)?;
            drop(conversation);
            yardd.wait_for_port("lab", "red", "waiting")?;
            yardd.wait_for_port("lab", "blue", "waiting")?;
        }
        let reason = |port: &Value| port["reason"].as_str().map(str::to_owned);
        let waiting = reason(&yardd.port("lab", "blue")?);
        ensure!(waiting.is_some_and(|reason| !reason.is_empty()), "no word on what the port waits for");
        counters_agree(&yardd)
    })
}
