//! `yard` on a daemon that carries traffic: what it shows and changes, live captures into tshark, exit statuses.

#![forbid(unsafe_code)]

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use switchyard_tests::capture::{fields, info};
use switchyard_tests::case;
use switchyard_tests::lab::{Lab, wait_for};
use switchyard_tests::numbered;
use switchyard_tests::packets::packets;
use switchyard_tests::player::{Player, PlayerSpec};
use switchyard_tests::process::{Process, command};
use switchyard_tests::witness::{Party, Witness};
use switchyard_tests::yardd::{Yardd, private_switch, programs};

const LIMIT: Duration = Duration::from_secs(30);

fn start(lab: &Lab) -> Result<Yardd> {
    Yardd::start(lab, &programs()?, &[0, 1], &private_switch(lab, &["left", "right"], 2))
}

fn witness(lab: &Lab) -> Result<Witness> {
    let spec = PlayerSpec { queues: 2, ..PlayerSpec::new() };
    let party = |name: &str, number| Party::connect(&lab.path(name), number, spec);
    let mut witness = Witness::start([party("left", 1)?, party("right", 2)?]);
    witness.see(200)?;
    Ok(witness)
}

/// The exit status of `yard` with these words.
fn status(yardd: &Yardd, words: &[&str]) -> Result<i32> {
    let output = yardd.yard_command(words).stdin(Stdio::null()).output()?;
    output.status.code().context("yard was killed")
}

fn json(yardd: &Yardd, words: &[&str]) -> Result<Value> {
    let text = yardd.yard(&[&["--json"], words].concat())?;
    serde_json::from_str(&text).with_context(|| format!("{words:?}: {text}"))
}

#[test]
fn switches_ports_and_queues_change_while_frames_flow() -> Result<()> {
    case::exclusive("switches_ports_and_queues_change_while_frames_flow", &[], |lab| {
        let yardd = start(lab)?;
        let mut witness = witness(lab)?;

        let screen = yardd.yard(&["show"])?;
        for word in ["lab", "left", "right", "vhost-user"] {
            ensure!(screen.contains(word), "no {word:?} in\n{screen}");
        }
        // Switches and ports come and go.
        let socket = lab.path("third").display().to_string();
        yardd.yard(&["switch", "add", "other", "--type", "private"])?;
        yardd.yard(&[
            "port",
            "add",
            "other/third",
            "--vhost-user",
            &socket,
            "--mtu",
            "2000",
            "--access",
            "7",
        ])?;
        let port = yardd.port("other", "third")?;
        ensure!(port["mtu"] == 2000 && port["vlan"] == "access 7" && port["state"] == "waiting", "{port}");
        yardd.yard(&["port", "set", "other/third", "--mtu", "9000", "--trunk", "5-6,9", "--native", "5"])?;
        let port = json(&yardd, &["port", "show", "other/third"])?;
        ensure!(port["mtu"] == 9000 && port["vlan"] == "trunk 5-6,9 native 5", "{port}");
        witness.see(100)?;
        for _ in 0..20 {
            yardd.yard(&["port", "del", "other/third"])?;
            yardd.yard(&["port", "add", "other/third", "--vhost-user", &socket])?;
        }
        yardd.yard(&["switch", "del", "other"])?;
        ensure!(!std::path::Path::new(&socket).exists(), "the socket of a removed port is still there");
        witness.see(100)?;

        // Addresses.
        let learnt = json(&yardd, &["fdb", "show", "lab"])?;
        let known = |table: &Value, mac: &str| {
            table["addresses"].as_array().is_some_and(|list| list.iter().any(|one| one["mac"] == mac))
        };
        ensure!(known(&learnt, "02:00:00:00:77:01") && known(&learnt, "02:00:00:00:77:02"), "{learnt}");
        yardd.yard(&["fdb", "add", "lab/left", "02:00:00:00:00:99", "--vlan", "3"])?;
        ensure!(
            known(&json(&yardd, &["fdb", "show", "lab", "--port", "left"])?, "02:00:00:00:00:99"),
            "not added"
        );
        yardd.yard(&["fdb", "flush", "lab"])?;
        ensure!(
            known(&json(&yardd, &["fdb", "show", "lab"])?, "02:00:00:00:00:99"),
            "flush took a static address"
        );
        yardd.yard(&["fdb", "del", "lab", "02:00:00:00:00:99", "--vlan", "3"])?;
        ensure!(!known(&json(&yardd, &["fdb", "show", "lab"])?, "02:00:00:00:00:99"), "not removed");
        witness.see(100)?;

        // Queues on processors.
        for (cpu, pinned) in [("0", true), ("1", true), ("auto", false), ("1", true)] {
            yardd.yard(&["queue", "pin", "lab/left", "0", cpu])?;
            let queues = json(&yardd, &["queue", "show", "lab/left"])?;
            ensure!(queues[0]["pinned"] == pinned, "{queues}");
            if pinned {
                ensure!(queues[0]["cpu"].as_u64() == cpu.parse().ok(), "{queues}");
            }
            witness.see(100)?;
        }
        let stats = json(&yardd, &["stats"])?;
        ensure!(stats["switches"][0]["ports"][0]["received"]["frames"].as_u64() > Some(0), "{stats}");
        ensure!(yardd.yard(&["stats", "lab/left"])?.contains("left"), "no counters");

        // A restarted port has its client cut off; the daemon and the others go on.
        let (_, conversation) = witness.finish()?;
        yardd.yard(&["port", "restart", "lab/left"])?;
        yardd.wait_for_port("lab", "left", "waiting")?;
        ensure!(yardd.port("lab", "right")?["state"] == "up", "the other port stopped");
        drop(conversation);
        Ok(())
    })
}

#[test]
fn exit_status_tells_what_went_wrong() -> Result<()> {
    case::exclusive("exit_status_tells_what_went_wrong", &[], |lab| {
        let yardd = start(lab)?;
        let bad = lab.path("no/such/directory/x.pcap").display().to_string();
        let socket = lab.path("left").display().to_string();
        let add: &[&str] = &["port", "add", "lab/left", "--vhost-user", &socket];
        for (words, expected) in [
            (["show"].as_slice(), 0),
            (&["port", "show", "lab/left"], 0),
            (&["capture", "lab", "-w", &bad], 1),
            (&["port", "add", "lab/play", "--pcap-read", &bad], 1),
            (&["port", "add", "lab/play"], 2),
            (&["no-such-command"], 2),
            (&["port", "show", "nonsense"], 2),
            (&["port", "show", "lab/nobody"], 3),
            (&["port", "del", "nowhere/left"], 3),
            (&["port", "del", "lab/nobody", "--if-exists"], 0),
            (&["fdb", "show", "nowhere"], 3),
            (&["queue", "pin", "lab/left", "7", "1"], 3),
            (add, 4),
            (&["switch", "add", "lab"], 4),
            (&["switch", "add", "lab", "--may-exist"], 0),
        ] {
            let found = status(&yardd, words)?;
            ensure!(found == expected, "yard {words:?} ended with {found}, not {expected}");
        }
        drop(yardd);
        let mut yard = command(programs()?.join("yard"));
        let alone = yard.arg("--socket").arg(lab.path("nobody.sock")).arg("show").output()?;
        ensure!(alone.status.code() == Some(5), "without a daemon: {}", alone.status);

        let broken = lab.path("broken.toml");
        std::fs::write(&broken, "[switch.lab]\ntype = \"private\"\n[switch.lab.port.a]\nmtu = 12\n")?;
        let check =
            command(programs()?.join("yardd")).arg("--check").arg("--config").arg(&broken).output()?;
        let told = String::from_utf8_lossy(&check.stderr).into_owned();
        ensure!(check.status.code() == Some(1), "{}", check.status);
        for word in ["broken.toml:4", "mtu", "12", "68"] {
            ensure!(told.contains(word), "no {word:?} in {told}");
        }
        Ok(())
    })
}

#[test]
fn live_capture_is_what_flows_with_names_and_drop_reasons() -> Result<()> {
    case::exclusive("live_capture_is_what_flows_with_names_and_drop_reasons", &[], |lab| {
        let yardd = start(lab)?;
        let mut witness = witness(lab)?;

        // Into a file, so many frames.
        let file = lab.path("live.pcapng");
        let shown = file.display().to_string();
        yardd.yard(&["capture", "lab", "-w", &shown, "--count", "500"])?;
        let summary = info(&file)?;
        ensure!(summary.packets == 500 && summary.file_type.contains("pcapng"), "{summary:?}");
        let names = fields(&file, "", &["frame.interface_name"])?;
        ensure!(
            names.iter().all(|name| name[0].contains("left") || name[0].contains("right")),
            "{:?}",
            names[0]
        );
        for packet in packets(&file)? {
            ensure!(numbered::numbers(&packet.data).is_some(), "a frame that nobody sent is in the capture");
        }

        // Into tshark through a pipe; cut frames know their length.
        let mut yard =
            yardd.yard_command(&["capture", "lab/left", "-w", "-", "--count", "200", "--snaplen", "64"]);
        let mut yard = yard.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let pipe = yard.stdout.take().context("no pipe")?;
        let tshark = command("tshark")
            .args(["-n", "-r", "-", "-T", "fields", "-e", "frame.interface_name", "-e", "frame.cap_len"])
            .args(["-e", "frame.len", "-e", "eth.src"])
            .stdin(pipe)
            .output()?;
        ensure!(yard.wait()?.success() && tshark.status.success(), "tshark: {}", tshark.status);
        let lines = String::from_utf8_lossy(&tshark.stdout).into_owned();
        ensure!(lines.lines().count() == 200, "tshark read {} frames", lines.lines().count());
        for line in lines.lines() {
            let words: Vec<_> = line.split('\t').collect();
            ensure!(words[0].contains("left") && words[1].parse::<u32>()? <= 64, "{line}");
            ensure!(words[2].parse::<u32>()? >= 64, "{line}");
        }
        witness.see(200)?;

        // Dropped frames, with the reason; ended by a signal as an operator ends it.
        let (_, conversation) = witness.finish()?;
        let [left, right] = conversation.into_parties();
        let drops = lab.path("drops.pcapng");
        let shown = drops.display().to_string();
        let capture = yardd.yard_command(&["capture", "lab", "--drops", "-w", &shown]);
        let mut capture = Process::spawn("yard capture", capture, lab.path("capture.log"))?;
        wait_for("the capture's head", LIMIT, || {
            Ok(std::fs::metadata(&drops).is_ok_and(|file| file.len() > 0))
        })?;
        let mut sender = left.player;
        let mut multicast = numbered::frame([3, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0x77, 2], 1, 1, 80);
        ensure!(send(&mut sender, &multicast)?, "ring full");
        multicast[6] = 2;
        ensure!(send(&mut sender, &multicast)?, "ring full");
        wait_for("both frames in the file", LIMIT, || Ok(info(&drops).is_ok_and(|info| info.packets >= 3)))?;
        capture.signal(rustix::process::Signal::INT)?;
        ensure!(capture.wait(LIMIT)?.success(), "{}", capture.log());
        let found = fields(&drops, "frame.comment", &["eth.src", "frame.comment"])?;
        ensure!(found.len() == 1 && found[0][0] == "03:00:00:00:00:01", "{found:?}");
        ensure!(found[0][1].contains("source is a multicast address"), "{found:?}");
        let whole = fields(&drops, "eth.src == 02:00:00:00:00:01", &["frame.interface_name"])?;
        ensure!(whole.len() == 2, "a frame that came through is once inbound and once outbound: {whole:?}");
        drop(right);
        Ok(())
    })
}

fn send(player: &mut Player, frame: &[u8]) -> Result<bool> {
    let sent = player.send(0, frame)?;
    player.flush(LIMIT)?;
    Ok(sent)
}
