//! A daemon under pressure: orders in any order while frames flow, guests that come and vanish, no descriptors left. Two
//! guests who number their frames and compare every byte lose nothing meanwhile.

#![forbid(unsafe_code)]

use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use switchyard_tests::case;
use switchyard_tests::draw::Draw;
use switchyard_tests::lab::{Lab, wait_for};
use switchyard_tests::numbered;
use switchyard_tests::player::{Player, PlayerSpec};
use switchyard_tests::process::words;
use switchyard_tests::witness::{Party, Witness};
use switchyard_tests::yardd::{Yardd, private_switch, programs};

const LIMIT: Duration = Duration::from_secs(30);
const PORTS: [&str; 3] = ["left", "right", "third"];

/// A switch on two processors, with two witnesses whose rings are of this kind and a third port.
fn start(lab: &Lab, spec: PlayerSpec) -> Result<(Yardd, Witness)> {
    let yardd = Yardd::start(lab, &programs()?, &[0, 1], &private_switch(lab, &PORTS, 2))?;
    let party = |name: &str, number| Party::connect(&lab.path(name), number, spec);
    let mut witness = Witness::start([party("left", 1)?, party("right", 2)?]);
    witness.see(200)?;
    Ok((yardd, witness))
}

/// A guest at the third port, once there is nobody.
fn third(lab: &Lab, yardd: &Yardd) -> Result<Player> {
    yardd.wait_for_port("lab", "third", "waiting")?;
    Player::connect(&lab.path("third"), PlayerSpec::new())
}

/// One order, about anything but whether the witnesses may talk.
fn order(draw: &mut Draw, extra: &str) -> Vec<String> {
    let port = draw.of(&["lab/left", "lab/right", "lab/third"]);
    let line = match draw.below(9) {
        // A queue that changes its worker between two frames: twice as often as the others.
        0 | 1 => format!("queue pin {port} {} {}", draw.below(2), draw.of(&["0", "1", "auto"])),
        2 => format!("port set {port} --mtu {}", draw.of(&["1500", "9000", "2000"])),
        3 => format!("port set {port} --coalesce {}", draw.of(&["true", "false"])),
        4 => format!("port set lab/third --access {}", 2 + draw.below(3)),
        5 => format!("port set lab/third --trunk 1-9 --native {}", 2 + draw.below(3)),
        6 => format!("port add lab/extra --vhost-user {extra} --access 3"),
        7 => "port del lab/extra".to_owned(),
        _ => format!("fdb {} 02:00:00:00:00:99", draw.of(&["add lab/third", "del lab"])),
    };
    line.split(' ').map(str::to_owned).collect()
}

fn orders_lose_no_frame(lab: &Lab, spec: PlayerSpec) -> Result<()> {
    let (mut yardd, mut witness) = start(lab, spec)?;
    let _third = third(lab, &yardd)?;
    let extra = lab.path("extra").display().to_string();
    let mut draw = Draw::new(0x5eed_1234);
    let mut obeyed = 0;
    for number in 0..400 {
        let words = order(&mut draw, &extra);
        // Some cannot be obeyed: there is no such port now, or no such address.
        let obeys = yardd
            .yard_command(&words.iter().map(String::as_str).collect::<Vec<_>>())
            .output()?
            .status
            .success();
        obeyed += u32::from(obeys);
        if number % 10 == 0 {
            witness.see(50).with_context(|| format!("after order {number}, {words:?}"))?;
        }
    }
    ensure!(obeyed > 250, "only {obeyed} orders were obeyed");
    witness.finish()?;
    for port in PORTS {
        let port = yardd.port("lab", port)?;
        ensure!(port["last_error"].is_null() && port["received"]["drops"] == serde_json::json!({}), "{port}");
    }
    yardd.process().expect_running()
}

#[test]
fn orders_in_any_order_lose_no_frame_of_split_rings() -> Result<()> {
    case::exclusive("orders_in_any_order_lose_no_frame_of_split_rings", &[], |lab| {
        orders_lose_no_frame(lab, PlayerSpec { queues: 2, event_idx: false, ..PlayerSpec::new() })
    })
}

#[test]
fn orders_in_any_order_lose_no_frame_of_packed_rings() -> Result<()> {
    case::exclusive("orders_in_any_order_lose_no_frame_of_packed_rings", &[], |lab| {
        orders_lose_no_frame(lab, PlayerSpec { queues: 2, packed: true, ..PlayerSpec::new() })
    })
}

/// Descriptors and mappings of a process.
fn held(process: u32) -> Result<[usize; 2]> {
    let descriptors = std::fs::read_dir(format!("/proc/{process}/fd"))?.count();
    Ok([descriptors, std::fs::read_to_string(format!("/proc/{process}/maps"))?.lines().count()])
}

#[test]
fn guests_that_vanish_under_load_leave_nothing_behind() -> Result<()> {
    case::exclusive("guests_that_vanish_under_load_leave_nothing_behind", &[], |lab| {
        let (mut yardd, mut witness) = start(lab, PlayerSpec::new())?;
        let mut draw = Draw::new(0x0bad_cafe);
        let mut before = [0; 2];
        for round in 0..200 {
            let mut guest = third(lab, &yardd).with_context(|| format!("round {round}"))?;
            for sequence in 0..draw.below(200) {
                let frame = numbered::frame([2, 0, 0, 0, 0, 3], [0xff; 6], 1, sequence.into(), 200);
                guest.send(0, &frame)?;
            }
            drop(guest);
            if round == 20 {
                yardd.wait_for_port("lab", "third", "waiting")?;
                before = held(yardd.process().id())?;
            }
        }
        yardd.wait_for_port("lab", "third", "waiting")?;
        let process = yardd.process().id();
        // Connections of `yard` end when they end.
        wait_for("what guests have left to be given back", LIMIT, || {
            let after = held(process)?;
            Ok(after[0] <= before[0] + 2 && after[1] <= before[1] + 8)
        })
        .with_context(|| format!("before {before:?}, after {:?}", held(process)))?;
        witness.see(200)?;
        witness.finish()?;
        yardd.process().expect_running()
    })
}

#[test]
fn daemon_without_descriptors_keeps_frames_flowing_and_recovers() -> Result<()> {
    case::exclusive("daemon_without_descriptors_keeps_frames_flowing_and_recovers", &[], |lab| {
        let (mut yardd, mut witness) = start(lab, PlayerSpec::new())?;
        let process = yardd.process().id();
        let limits =
            words(&format!("prlimit --pid {process} --nofile --noheadings --raw --output SOFT,HARD"))?;
        let [soft, hard] = limits.split_whitespace().collect::<Vec<_>>()[..] else {
            anyhow::bail!("no limits: {limits:?}");
        };
        words(&format!("prlimit --pid {process} --nofile=3:{hard}"))?;
        // Nobody can be let in: neither a guest nor who asks.
        let guest = UnixStream::connect(lab.path("third"))?;
        let mut asks = yardd.yard_command(&["show"]).stdout(Stdio::null()).spawn()?;
        witness.see(500)?;
        std::thread::sleep(Duration::from_secs(1));
        witness.see(500)?;
        let log = yardd.process().log_tail(1000);
        ensure!(log.lines().count() < 200, "the log is flooded:\n{log}");

        words(&format!("prlimit --pid {process} --nofile={soft}:{hard}"))?;
        drop(guest);
        wait_for("yard to be answered", LIMIT, || Ok(asks.try_wait()?.is_some()))?;
        let mut guest = third(lab, &yardd)?;
        yardd.wait_for_port("lab", "third", "up")?;
        guest.send(0, &numbered::frame([2, 0, 0, 0, 0, 3], [0xff; 6], 1, 1, 200))?;
        guest.flush(LIMIT)?;
        witness.see(200)?;
        witness.finish()?;
        yardd.process().expect_running()
    })
}
