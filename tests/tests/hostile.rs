//! Guests that break the rules, against a running daemon: their own port stops with a reason and can be restarted, and
//! two other guests, who number their frames and compare every byte, lose nothing meanwhile.

#![forbid(unsafe_code)]

use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use switchyard_tests::case;
use switchyard_tests::draw::Draw;
use switchyard_tests::lab::{Lab, wait_for};
use switchyard_tests::numbered;
use switchyard_tests::player::{Player, PlayerSpec};
use switchyard_tests::witness::{Conversation, Party, Witness};
use switchyard_tests::yardd::{Yardd, private_switch, programs};
use vmq::driver::{Buffer, RawDescriptor};

const LIMIT: Duration = Duration::from_secs(30);
const EVIL: [u8; 6] = [2, 0, 0, 0, 0x66, 6];
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A switch with two witnesses that talk, and a port for the guest that breaks the rules.
struct Scene<'a> {
    lab: &'a Lab,
    yardd: Yardd,
    witness: Witness,
}

impl<'a> Scene<'a> {
    fn new(lab: &'a Lab) -> Result<Self> {
        let config = private_switch(lab, &["left", "right", "evil"], 1);
        let yardd = Yardd::start(lab, &programs()?, &[1], &config)?;
        let party = |name: &str, number| Party::connect(&lab.path(name), number, PlayerSpec::new());
        let mut witness = Witness::start([party("left", 1)?, party("right", 2)?]);
        witness.see(200)?;
        Ok(Self { lab, yardd, witness })
    }

    fn evil(&self, spec: PlayerSpec) -> Result<Player> {
        self.yardd.wait_for_port("lab", "evil", "waiting")?;
        Player::connect(&self.lab.path("evil"), spec)
    }

    /// The port is stopped for a reason with `words`, its client is cut off, and after a restart a good guest has it.
    fn expect_fault(&mut self, mut player: Player, words: &str) -> Result<()> {
        self.yardd.wait_for_port("lab", "evil", "faulted")?;
        player.wait_for_hang_up(LIMIT)?;
        let port = self.yardd.port("lab", "evil")?;
        let reason = port["reason"].as_str().context("no reason")?;
        ensure!(reason.contains(words), "the reason is {reason:?}, without {words:?}");
        let screen = self.yardd.yard(&["show"])?;
        ensure!(screen.contains(reason), "yard show does not tell {reason:?}:\n{screen}");
        self.witness.see(200)?;
        self.recover()
    }

    /// Restarts the port and has a good guest send and receive there.
    fn recover(&mut self) -> Result<()> {
        self.yardd.yard(&["port", "restart", "lab/evil"])?;
        let mut good = self.evil(PlayerSpec::new())?;
        self.yardd.wait_for_port("lab", "evil", "up")?;
        let frame = numbered::frame(EVIL, EVIL.map(|byte| byte ^ 0x10), 1, 1, 100);
        ensure!(good.send(0, &frame)?, "the ring of a new guest is full");
        good.flush(LIMIT)?;
        drop(good);
        self.yardd.wait_for_port("lab", "evil", "waiting")
    }

    /// Ends the witness: nothing was lost.
    fn finish(mut self) -> Result<()> {
        self.witness.see(200)?;
        let (_, conversation) = self.witness.finish()?;
        drop(conversation);
        for port in ["left", "right"] {
            for direction in ["received", "sent"] {
                let drops = self.yardd.drops("lab", port, direction)?;
                // The evil port's broadcasts may come while a witness is not there yet, or any more.
                let only_absent =
                    drops.as_object().is_some_and(|drops| drops.keys().all(|key| key == "not-ready"));
                ensure!(only_absent, "{port} {direction}: {drops}");
            }
        }
        Ok(())
    }
}

fn split() -> PlayerSpec {
    PlayerSpec { indirect: false, ..PlayerSpec::new() }
}

/// Pokes one descriptor into a split transmit ring and makes it available.
fn offer_raw(player: &mut Player, descriptors: &[(u16, RawDescriptor)]) {
    let lane = player.transmit(0);
    for &(index, raw) in descriptors {
        lane.ring.poke_descriptor(index, raw);
    }
    lane.ring.poke_available_entry(0, 0);
    lane.ring.poke_available_index(1);
    lane.ring_doorbell();
}

#[test]
fn broken_split_ring_stops_its_port_only() -> Result<()> {
    case::exclusive("broken_split_ring_stops_its_port_only", &[], |lab| {
        let mut scene = Scene::new(lab)?;

        let mut evil = scene.evil(split())?;
        evil.transmit(0).ring.poke_available_index(1000);
        evil.transmit(0).ring_doorbell();
        scene.expect_fault(evil, "jumped by 1000").context("index jump")?;

        let mut evil = scene.evil(split())?;
        evil.transmit(0).ring.poke_available_entry(0, 700);
        evil.transmit(0).ring.poke_available_index(1);
        evil.transmit(0).ring_doorbell();
        scene.expect_fault(evil, "index 700 is outside").context("head outside the table")?;

        let mut evil = scene.evil(split())?;
        let inside = evil.arena().guest() + 0x8000;
        let link = |next| RawDescriptor { addr: inside, len: 64, flags: NEXT, next };
        offer_raw(&mut evil, &[(0, link(1)), (1, link(0))]);
        scene.expect_fault(evil, "chain is longer").context("descriptor loop")?;

        let mut evil = scene.evil(split())?;
        offer_raw(&mut evil, &[(0, RawDescriptor { addr: inside, len: 64, flags: NEXT, next: 900 })]);
        scene.expect_fault(evil, "index 900 is outside").context("next outside the table")?;

        for (what, addr, len) in [
            ("address below memory", 0, 64),
            ("address above memory", 1 << 40, 64),
            ("address that wraps", u64::MAX - 8, 64),
            ("length past the end", inside, u32::MAX),
        ] {
            let mut evil = scene.evil(split())?;
            offer_raw(&mut evil, &[(0, RawDescriptor { addr, len, flags: 0, next: 0 })]);
            scene.expect_fault(evil, "are not guest memory").context(what)?;
        }

        let mut evil = scene.evil(split())?;
        offer_raw(&mut evil, &[(0, RawDescriptor { addr: inside, len: 64, flags: WRITE, next: 0 })]);
        scene.expect_fault(evil, "wrong direction").context("buffer of the wrong direction")?;

        let mut evil = scene.evil(PlayerSpec { indirect: true, ..split() })?;
        offer_raw(&mut evil, &[(0, RawDescriptor { addr: inside, len: 17, flags: INDIRECT, next: 0 })]);
        scene.expect_fault(evil, "table of 17 bytes").context("indirect table of a broken size")?;

        scene.finish()
    })
}

#[test]
fn broken_receive_ring_stops_its_port_only() -> Result<()> {
    case::exclusive("broken_receive_ring_stops_its_port_only", &[], |lab| {
        let mut scene = Scene::new(lab)?;
        for (what, addr, flags) in [("are not guest memory", 1u64 << 40, WRITE), ("wrong direction", 0, 0)] {
            let mut evil = scene.evil(split())?;
            let addr = if addr == 0 { evil.arena().guest() + 0x8000 } else { addr };
            let lane = evil.receive_lane(0);
            for index in 0..lane.ring.size() {
                lane.ring.poke_descriptor(index, RawDescriptor { addr, len: 2048, flags, next: 0 });
            }
            flood(&scene)?;
            scene.expect_fault(evil, what)?;
        }
        scene.finish()
    })
}

/// Has the switch flood: forgotten addresses make the next frames of the witnesses unknown.
fn flood(scene: &Scene<'_>) -> Result<()> {
    scene.yardd.yard(&["fdb", "flush", "lab"]).map(drop)
}

#[test]
fn garbage_in_packed_and_split_rings_never_reaches_other_ports() -> Result<()> {
    case::exclusive("garbage_in_packed_and_split_rings_never_reaches_other_ports", &[], |lab| {
        let mut scene = Scene::new(lab)?;
        let mut draw = Draw::new(0x2545_f491_4f6c_dd1d);
        for round in 0..12 {
            let spec = PlayerSpec { packed: round % 2 == 0, indirect: round % 3 == 0, ..PlayerSpec::new() };
            let mut evil = scene.evil(spec)?;
            for _ in 0..40 {
                let at = evil.transmit(0).ring.addresses();
                let arena = evil.arena().clone();
                // From the descriptors to the end of both indices, whatever the form.
                for gpa in (at.descriptors..at.device + 64).step_by(8) {
                    arena.write_u64(gpa, draw.number());
                }
                evil.transmit(0).ring_doorbell();
                let at = evil.receive_lane(0).ring.addresses();
                for gpa in (at.descriptors..at.driver).step_by(8) {
                    arena.write_u64(gpa, draw.number());
                }
                evil.receive_lane(0).ring_doorbell();
                std::thread::sleep(Duration::from_millis(2));
            }
            flood(&scene)?;
            scene.witness.see(100).with_context(|| format!("round {round}"))?;
            drop(evil);
            let state = scene.yardd.port("lab", "evil")?["state"].clone();
            ensure!(state == "faulted" || state == "waiting" || state == "up", "{state}");
            scene.recover().with_context(|| format!("round {round}"))?;
        }
        scene.finish()
    })
}

#[test]
fn memory_cut_short_under_traffic_stops_its_port_only() -> Result<()> {
    case::exclusive("memory_cut_short_under_traffic_stops_its_port_only", &[], |lab| {
        let mut scene = Scene::new(lab)?;
        for keep in [0, 4096, 1 << 20] {
            let mut evil = scene.evil(PlayerSpec::new())?;
            for sequence in 0..100 {
                ensure!(evil.send(0, &numbered::frame(EVIL, [0xff; 6], 1, sequence, 1000))?, "ring full");
            }
            // This side must not touch its memory any more either.
            evil.cut_memory(keep)?;
            evil.transmit(0).ring_doorbell();
            flood(&scene)?;
            // With a megabyte left the rings may all be there still; what counts is that the witness talks.
            if keep == 0 {
                scene.expect_fault(evil, "memory").with_context(|| format!("cut to {keep} bytes"))?;
            } else {
                scene.witness.see(500)?;
                drop(evil);
                scene.recover()?;
            }
        }
        scene.finish()
    })
}

#[test]
fn doorbell_storm_and_full_ring_harm_nobody_else() -> Result<()> {
    case::exclusive("doorbell_storm_and_full_ring_harm_nobody_else", &[], |lab| {
        let mut scene = Scene::new(lab)?;
        let mut evil = scene.evil(PlayerSpec::new())?;
        scene.yardd.wait_for_port("lab", "evil", "up")?;
        for _ in 0..10 {
            for _ in 0..100_000 {
                evil.transmit(0).ring_doorbell();
                evil.receive_lane(0).ring_doorbell();
            }
            scene.witness.see(50)?;
        }
        ensure!(scene.yardd.port("lab", "evil")?["state"] == "up", "a storm of doorbells stopped the port");

        // It receives and never gives back: what is flooded is dropped there, and there only.
        let mut stranger = scene_stranger(&scene)?;
        for sequence in 0..600 {
            let frame = numbered::frame([2, 0, 0, 0, 0x55, 5], [0xff; 6], 9, sequence, 200);
            wait_for("room in the ring", LIMIT, || stranger.send(0, &frame))?;
            // The witnesses get them as well, and need a moment to read them.
            if sequence % 32 == 31 {
                stranger.flush(LIMIT)?;
                scene.witness.see(50)?;
            }
        }
        let drops = scene.yardd.drops("lab", "evil", "sent")?;
        ensure!(drops["queue-full"].as_u64().is_some_and(|count| count > 0), "nothing was dropped: {drops}");
        ensure!(scene.yardd.port("lab", "evil")?["state"] == "up", "a full ring stopped the port");
        drop(stranger);
        scene.yardd.yard(&["port", "del", "lab/stranger"])?;
        scene.finish()
    })
}

fn scene_stranger(scene: &Scene<'_>) -> Result<Player> {
    let path = scene.lab.path("stranger");
    let shown = path.display().to_string();
    scene.yardd.yard(&["port", "add", "lab/stranger", "--vhost-user", &shown])?;
    Player::connect(&path, PlayerSpec::new())
}

#[test]
fn broken_conversation_ends_its_connection_only() -> Result<()> {
    use std::io::Write;
    case::exclusive("broken_conversation_ends_its_connection_only", &[], |lab| {
        let mut scene = Scene::new(lab)?;
        let messages: [&[u8]; 6] = [
            // Gone in the middle of a header, and of a payload.
            &[1, 0, 0],
            &[2, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 1, 2, 3],
            // A wrong version, a request that does not exist, a length beyond reason, and noise.
            &[1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0],
            &[0xff, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0],
            &[5, 0, 0, 0, 1, 0, 0, 0, 0xff, 0xff, 0xff, 0x7f],
            &[0xa5; 400],
        ];
        for message in messages {
            scene.yardd.wait_for_port("lab", "evil", "waiting")?;
            let mut stream = UnixStream::connect(lab.path("evil"))?;
            stream.write_all(message)?;
            std::thread::sleep(Duration::from_millis(30));
            drop(stream);
            // The port may be stopped for it, or just wait for a better client.
            scene.witness.see(100)?;
            scene.recover().with_context(|| format!("after {message:02x?}"))?;
        }
        // Every request in turn, without descriptors and with nonsense in it, in one connection after another.
        for kind in 0..45u8 {
            let mut stream = UnixStream::connect(lab.path("evil"))?;
            let mut message = vec![kind, 0, 0, 0, 9, 0, 0, 0, 40, 0, 0, 0];
            message.extend([0xee; 40]);
            let _ = stream.write_all(&message);
            std::thread::sleep(Duration::from_millis(5));
        }
        scene.witness.see(100)?;
        scene.recover()?;
        scene.finish()
    })
}

#[test]
fn misshapen_frames_are_dropped_and_counted() -> Result<()> {
    case::exclusive("misshapen_frames_are_dropped_and_counted", &[], |lab| {
        let scene = Scene::new(lab)?;
        let mut evil = scene.evil(PlayerSpec { max_frame: 9500, ..PlayerSpec::new() })?;
        let broadcast = |len: usize| {
            let mut frame = numbered::frame(EVIL, [0xff; 6], 3, 3, len.max(60));
            frame.truncate(len);
            frame
        };
        let mut send = |header: [u8; 12], frame: &[u8]| -> Result<()> {
            wait_for("room in the ring", LIMIT, || evil.send_with_header(0, &header, frame))
        };
        for len in 0..14 {
            send([0; 12], &broadcast(len))?;
        }
        send([0; 12], &broadcast(1515))?;
        send([0; 12], &broadcast(9500))?;
        let mut multicast = broadcast(64);
        multicast[6] = 0x33;
        send([0; 12], &multicast)?;
        // NEEDS_CSUM that was not negotiated, with a place past the end; a segment size of 0; an unknown kind.
        send([1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0], &broadcast(64))?;
        send([0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], &broadcast(64))?;
        send([0, 0x7f, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], &broadcast(64))?;
        evil.flush(LIMIT)?;
        let port = scene.yardd.port("lab", "evil")?;
        ensure!(port["state"] == "up", "{port}");
        let drops = &port["received"]["drops"];
        ensure!(drops["runt"] == 14 && drops["source-group"] == 1, "{drops}");
        ensure!(drops["ingress-mtu"] == 2, "{drops}");
        let headers = drops["bad-header"].as_u64().unwrap_or(0) + drops["bad-offload"].as_u64().unwrap_or(0);
        ensure!(headers == 3, "{drops}");
        drop(evil);
        scene.finish()
    })
}

#[test]
fn flood_of_source_addresses_stays_within_the_ports_limit() -> Result<()> {
    case::exclusive("flood_of_source_addresses_stays_within_the_ports_limit", &[], |lab| {
        let scene = Scene::new(lab)?;
        scene.yardd.yard(&["port", "set", "lab/evil", "--address-limit", "50"])?;
        let mut evil = scene.evil(PlayerSpec::new())?;
        // To the first of them: it goes nowhere, and no ring of a witness runs full.
        for number in 0..20_000u32 {
            let [_, a, b, c] = number.to_be_bytes();
            let frame = numbered::frame([2, 0x66, a, b, c, 1], [2, 0x66, 0, 0, 0, 1], 3, 3, 64);
            wait_for("room in the ring", LIMIT, || evil.send(0, &frame))?;
        }
        evil.flush(LIMIT)?;
        let shown: serde_json::Value =
            serde_json::from_str(&scene.yardd.yard(&["--json", "fdb", "show", "lab", "--port", "evil"])?)?;
        let learnt = shown["addresses"].as_array().map_or(0, Vec::len);
        ensure!(learnt == 50, "{learnt} addresses were learnt");
        drop(evil);
        scene.finish()
    })
}

#[test]
fn learnt_address_that_was_stolen_comes_back_with_its_owners_next_frame() -> Result<()> {
    let name = "learnt_address_that_was_stolen_comes_back_with_its_owners_next_frame";
    case::exclusive(name, &[], |lab| {
        let scene = Scene::new(lab)?;
        let mut evil = scene.evil(PlayerSpec::new())?;
        // A witness may lose nothing, and would lose what goes to the thief.
        let [mut owner, mut peer] = scene.witness.finish()?.1.into_parties();
        let yardd = scene.yardd;
        let place = || -> Result<String> {
            let shown: serde_json::Value =
                serde_json::from_str(&yardd.yard(&["--json", "fdb", "show", "lab"])?)?;
            let addresses = shown["addresses"].as_array().context("no addresses")?;
            let found = addresses.iter().find(|entry| entry["mac"] == "02:00:00:00:77:01");
            Ok(found.and_then(|entry| entry["port"].as_str()).unwrap_or("nowhere").to_owned())
        };
        ensure!(place()? == "left", "it is at {}", place()?);
        let theft = numbered::frame(owner.mac, peer.mac, 3, 0, 64);
        ensure!(evil.send(0, &theft)?, "ring full");
        evil.flush(LIMIT)?;
        ensure!(place()? == "evil", "it is at {}", place()?);

        let own = numbered::frame(owner.mac, peer.mac, 3, 1, 64);
        ensure!(owner.player.send(0, &own)?, "ring full");
        owner.player.flush(LIMIT)?;
        ensure!(place()? == "left", "it is at {}", place()?);
        let answer = numbered::frame(peer.mac, owner.mac, 3, 2, 64);
        ensure!(peer.player.send(0, &answer)?, "ring full");
        wait_for("the answer", LIMIT, || Ok(owner.player.receive()?.is_some_and(|got| got.frame == answer)))?;
        ensure!(evil.receive()?.is_none_or(|got| got.frame != answer), "the thief has the answer");
        Ok(())
    })
}

#[test]
fn configured_address_cannot_be_stolen() -> Result<()> {
    case::exclusive("configured_address_cannot_be_stolen", &[], |lab| {
        let port = |name: &str, mac: &str| {
            format!(
                "[switch.lab.port.{name}]\nvhost-user = {{ path = {:?} }}\nmac = \"{mac}\"\n",
                lab.path(name)
            )
        };
        let config = format!(
            "[switch.lab]\ntype = \"private\"\n{}{}{}",
            port("left", "02:00:00:00:77:01"),
            port("right", "02:00:00:00:77:02"),
            port("evil", "02:00:00:00:66:06")
        );
        let yardd = Yardd::start(lab, &programs()?, &[1], &config)?;
        let party = |name: &str, number| Party::connect(&lab.path(name), number, PlayerSpec::new());
        let conversation = Conversation::new([party("left", 1)?, party("right", 2)?], &[64, 900], 1);
        let mut witness = Witness::of(conversation);
        let mut evil = Player::connect(&lab.path("evil"), PlayerSpec::new())?;
        for sequence in 0..2_000 {
            let frame = numbered::frame([2, 0, 0, 0, 0x77, 1], [2, 0, 0, 0, 0x77, 2], 5, sequence, 64);
            wait_for("room in the ring", LIMIT, || evil.send(0, &frame))?;
        }
        evil.flush(LIMIT)?;
        witness.see(500)?;
        let (_, conversation) = witness.finish()?;
        drop(conversation);
        let drops = yardd.drops("lab", "evil", "received")?;
        ensure!(drops["spoofed"] == 2_000, "{drops}");
        ensure!(evil.receive()?.is_none(), "a frame for another guest came");
        Ok(())
    })
}

/// The class of CVE-2022-2132. What becomes of the bytes, and legacy headers of 10: `vswitch/src/fabric/tests/headers.rs`.
#[test]
fn header_in_up_to_twelve_descriptors_is_read_or_counted_as_bad() -> Result<()> {
    case::exclusive("header_in_up_to_twelve_descriptors_is_read_or_counted_as_bad", &[], |lab| {
        let scene = Scene::new(lab)?;
        let frame = numbered::frame(EVIL, EVIL.map(|byte| byte ^ 0x10), 1, 1, 100);
        let len = u32::try_from(frame.len())?;
        let whole = (1..=12).map(|cut| vec![cut, 12 - cut, len]).chain([[vec![1; 12], vec![len]].concat()]);
        let short = (1..=12).map(|total| vec![1; total]);
        let shapes: Vec<Vec<u32>> = whole.chain(short).collect();
        for (packed, rounds) in [(false, 1), (true, 2)] {
            let mut evil = scene.evil(PlayerSpec { packed, ..split() })?;
            let arena = evil.arena().clone();
            let at = arena.alloc(12 + u64::from(len), 64).context("no room")?;
            arena.write(at, &[&[0; 12][..], &frame].concat());
            let lane = evil.transmit(0);
            for shape in &shapes {
                let mut addr = at;
                let buffers = shape.iter().map(|&len| {
                    let buffer = Buffer { addr, len, writable: false };
                    addr += u64::from(len);
                    buffer
                });
                let buffers: Vec<Buffer> = buffers.collect();
                lane.ring.add(&buffers, false).context("the ring is full")?;
                lane.publish();
                wait_for("the chain to come back", LIMIT, || Ok(lane.ring.poll_used()?.is_some()))?;
            }
            // A header without a frame is one that is too short.
            wait_for("the counts", LIMIT, || {
                let received = scene.yardd.port("lab", "evil")?["received"].clone();
                let counted =
                    [&received["frames"], &received["drops"]["bad-header"], &received["drops"]["runt"]];
                Ok(counted.map(|count| count.as_u64()) == [13, 11, 1].map(|count| Some(rounds * count)))
            })?;
        }
        scene.finish()
    })
}
