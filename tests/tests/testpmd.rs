//! DPDK's testpmd on the switch: frames of every size loop through it and none is lost inside; what testpmd sends back
//! is what it was sent; either side may be killed.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use switchyard_tests::case;
use switchyard_tests::lab::{Lab, wait_for};
use switchyard_tests::nic::Role;
use switchyard_tests::numbered;
use switchyard_tests::player::{Player, PlayerSpec};
use switchyard_tests::setup::Need;
use switchyard_tests::testpmd::{Forward, HUGE_PAGES, Testpmd, TestpmdSpec, VirtioUser};
use switchyard_tests::witness::{Party, Witness};
use switchyard_tests::yardd::{Yardd, programs};

const NEEDS: &[Need] = &[Need::Root, Need::HugePages(HUGE_PAGES), Need::Processors(2)];
const LIMIT: Duration = Duration::from_secs(30);
const SIZES: &[u32] = &[60, 64, 128, 256, 1518, 4000, 9000];
const ALPHA: [u8; 6] = [2, 0, 0, 0, 0, 0x0a];

/// Starts a private switch with jumbo ports, each in the mode that its client is not.
fn start(lab: &Lab, ports: &[(&str, Role, u16)]) -> Result<Yardd> {
    let mut config = "[switch.lab]\ntype = \"private\"\n".to_owned();
    for &(name, client, queues) in ports {
        let mode = if client == Role::Client { "server" } else { "client" };
        let path = lab.path(name);
        config.push_str(&format!(
            "[switch.lab.port.{name}]\nmtu = 9000\n\
             vhost-user = {{ path = {path:?}, mode = {mode:?}, queues = {queues} }}\n"
        ));
    }
    Yardd::start(lab, &programs()?, &[1], &config)
}

fn pair(lab: &Lab) -> TestpmdSpec {
    let mut spec = TestpmdSpec::pair(lab.path("alpha"), lab.path("beta"));
    spec.max_frame = 9000;
    spec
}

/// What entered at one port left at the other, but for full queues.
fn nothing_is_lost(yardd: &Yardd) -> Result<()> {
    let frames = |from: &str, to: &str| -> Result<(u64, u64)> {
        let (from, to) = (yardd.port("lab", from)?, yardd.port("lab", to)?);
        let (received, sent) = (&from["received"], &to["sent"]);
        let full = sent["drops"]["queue-full"].as_u64().unwrap_or(0);
        let absent = sent["drops"]["not-ready"].as_u64().unwrap_or(0);
        let drops = sent["drops"].as_object().map_or(0, serde_json::Map::len);
        ensure!(drops == usize::from(full > 0) + usize::from(absent > 0), "{}", sent["drops"]);
        ensure!(
            received["drops"].as_object().is_some_and(serde_json::Map::is_empty),
            "{}",
            received["drops"]
        );
        let count = |value: &serde_json::Value| value["frames"].as_u64().context("no counter");
        Ok((count(received)?, count(sent)? + full + absent))
    };
    for (from, to) in [("alpha", "beta"), ("beta", "alpha")] {
        let (received, sent) = frames(from, to)?;
        ensure!(
            received == sent && received > 0,
            "{received} from {from}, {sent} to {to} or counted as dropped"
        );
    }
    Ok(())
}

#[test]
fn frames_of_every_size_loop_through_the_switch() -> Result<()> {
    case::exclusive("frames_of_every_size_loop_through_the_switch", NEEDS, |lab| {
        let variants = [
            // packed, queues, mergeable, in order, alpha's role
            (false, 1, true, true, Role::Client),
            (false, 2, false, false, Role::Server),
            (true, 1, false, true, Role::Client),
            (true, 2, true, false, Role::Client),
            (false, 1, false, true, Role::Client),
        ];
        for (packed, queues, mergeable, in_order, role) in variants {
            let what = format!(
                "packed {packed}, {queues} queues, mergeable {mergeable}, in order {in_order}, {role:?}"
            );
            let yardd = start(lab, &[("alpha", role, queues), ("beta", Role::Client, queues)])?;
            let mut spec = pair(lab);
            spec.memory_mb = 512;
            spec.ports[0].role = role;
            for port in &mut spec.ports {
                (port.packed, port.queues, port.mergeable, port.in_order) =
                    (packed, queues, mergeable, in_order);
                port.queue_size = 256;
            }
            let mut testpmd = Testpmd::start(lab, &spec).with_context(|| what.clone())?;
            for &size in SIZES {
                testpmd.start_loop(size, 2).with_context(|| format!("{what}, {size} bytes"))?;
                let before = testpmd.stats()?;
                loops(&mut testpmd, before[0].rx_packets + 1000, before[1].rx_packets + 1000)
                    .with_context(|| format!("{what}, {size} bytes"))?;
                testpmd.stop()?;
            }
            wait_for("all frames to leave the switch", LIMIT, || Ok(nothing_is_lost(&yardd).is_ok()))
                .or_else(|_| nothing_is_lost(&yardd))
                .with_context(|| what.clone())?;
            testpmd.quit()?;
            for port in ["alpha", "beta"] {
                yardd.wait_for_port("lab", port, "waiting").with_context(|| what.clone())?;
            }
        }
        Ok(())
    })
}

/// Waits until both ports have received so many.
fn loops(testpmd: &mut Testpmd, first: u64, second: u64) -> Result<()> {
    let start = Instant::now();
    loop {
        let stats = testpmd.stats()?;
        if stats[0].rx_packets >= first && stats[1].rx_packets >= second {
            return Ok(());
        }
        ensure!(start.elapsed() < LIMIT, "the loop ran dry: {stats:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn testpmd_sends_back_what_it_was_sent() -> Result<()> {
    case::exclusive("testpmd_sends_back_what_it_was_sent", NEEDS, |lab| {
        let yardd = start(lab, &[("alpha", Role::Client, 1), ("beta", Role::Client, 1)])?;
        for packed in [false, true] {
            let mut port = VirtioUser::new(lab.path("alpha"), "02:00:00:00:00:0a");
            port.packed = packed;
            let mut spec = TestpmdSpec::new(vec![port]);
            (spec.forward, spec.max_frame) = (Forward::MacSwap, 9000);
            let mut testpmd = Testpmd::start(lab, &spec)?;
            testpmd.forward()?;
            yardd.wait_for_port("lab", "alpha", "up")?;
            let player = PlayerSpec { packed: !packed, max_frame: 9014, ..PlayerSpec::new() };
            echo(&mut Player::connect(&lab.path("beta"), player)?, 4_000)
                .with_context(|| format!("packed: {packed}"))?;
            testpmd.quit()?;
            yardd.wait_for_port("lab", "alpha", "waiting")?;
            yardd.wait_for_port("lab", "beta", "waiting")?;
        }
        Ok(())
    })
}

/// Sends numbered frames of all sizes to testpmd, which swaps their addresses, and compares what comes back.
fn echo(player: &mut Player, count: u64) -> Result<()> {
    let own = [2, 0, 0, 0, 0x77, 1];
    let frame = |from, to, sequence: u64| {
        let size = SIZES[usize::try_from(sequence).unwrap_or(0) % SIZES.len()] as usize;
        numbered::frame(from, to, 0, sequence, size)
    };
    let (mut sent, mut returned, mut last) = (0, 0, Instant::now());
    while returned < count {
        while sent < count && sent - returned < 16 && player.send(0, &frame(own, ALPHA, sent))? {
            sent += 1;
        }
        match player.receive()? {
            Some(received) => {
                let mut expected = frame(own, ALPHA, returned);
                expected[..6].copy_from_slice(&own);
                expected[6..12].copy_from_slice(&ALPHA);
                ensure!(
                    received.frame == expected,
                    "frame {returned} of {} bytes came back altered",
                    expected.len()
                );
                returned += 1;
                last = Instant::now();
            }
            None => std::thread::sleep(Duration::from_micros(20)),
        }
        ensure!(last.elapsed() < LIMIT, "{sent} sent, {returned} came back and no more");
    }
    Ok(())
}

#[test]
fn testpmd_carries_on_after_the_daemon_was_killed() -> Result<()> {
    case::exclusive("testpmd_carries_on_after_the_daemon_was_killed", NEEDS, |lab| {
        for packed in [false, true] {
            let ports = [("alpha", Role::Server, 1), ("beta", Role::Server, 1)];
            let mut yardd = start(lab, &ports)?;
            let mut spec = pair(lab);
            for port in &mut spec.ports {
                (port.role, port.packed) = (Role::Server, packed);
            }
            let mut testpmd = Testpmd::start(lab, &spec)?;
            testpmd.start_loop(256, 4)?;
            // From here on it sends without end, whatever becomes of the frames.
            testpmd.stop()?;
            testpmd.command("set fwd txonly")?;
            testpmd.forward()?;
            for round in 0..2 {
                std::thread::sleep(Duration::from_millis(200));
                yardd = yardd.crash_and_restart()?;
                for port in ["alpha", "beta"] {
                    yardd.wait_for_port("lab", port, "up")?;
                    wait_for("frames of the same client", LIMIT, || {
                        Ok(yardd.port("lab", port)?["received"]["frames"].as_u64() > Some(1000))
                    })
                    .with_context(|| format!("packed {packed}, round {round}, {port}"))?;
                }
            }
            testpmd.stop()?;
            testpmd.command("set fwd mac")?;
            testpmd.start_loop(1518, 4).with_context(|| format!("packed {packed}"))?;
            let before = testpmd.stats()?;
            loops(&mut testpmd, before[0].rx_packets + 1000, before[1].rx_packets + 1000)?;
            testpmd.quit()?;
        }
        Ok(())
    })
}

#[test]
fn killed_testpmd_is_replaced_while_others_lose_nothing() -> Result<()> {
    case::exclusive("killed_testpmd_is_replaced_while_others_lose_nothing", NEEDS, |lab| {
        let ports = ["alpha", "beta", "left", "right"].map(|name| (name, Role::Client, 1));
        let yardd = start(lab, &ports)?;
        let party = |name: &str, number| Party::connect(&lab.path(name), number, PlayerSpec::new());
        let mut witness = Witness::start([party("left", 1)?, party("right", 2)?]);
        witness.see(200)?;
        for packed in [false, true, false] {
            let mut spec = pair(lab);
            spec.ports.iter_mut().for_each(|port| port.packed = packed);
            let mut testpmd = Testpmd::start(lab, &spec)?;
            testpmd.start_loop(256, 4)?;
            witness.see(500)?;
            testpmd.process().kill()?;
            for port in ["alpha", "beta"] {
                yardd.wait_for_port("lab", port, "waiting")?;
            }
            witness.see(500)?;
        }
        let (_, conversation) = witness.finish()?;
        drop(conversation);
        Ok(())
    })
}
