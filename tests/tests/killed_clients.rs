//! Clients killed at a thousand points of their lives: everything they gave the daemon is given back, the next one is
//! served at once, and two guests who number their frames and compare every byte lose nothing meanwhile.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::io::Read;
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use switchyard_tests::case;
use switchyard_tests::draw::Draw;
use switchyard_tests::lab::{Lab, wait_for};
use switchyard_tests::life::{DONE, ECHO, Fate, OWN, Step};
use switchyard_tests::numbered;
use switchyard_tests::player::{Player, PlayerSpec};
use switchyard_tests::process::command;
use switchyard_tests::witness::{Conversation, Party, Witness};
use switchyard_tests::yardd::{Yardd, private_switch, programs};

const LIVES: u32 = 1000;
const SEED: u64 = 0x1dea_dead_90a7_5eed;
const LIMIT: Duration = Duration::from_secs(30);

/// After how many lives the daemon's memory has grown to what it takes to serve them.
const GROWN_UP: u32 = 200;

/// Kilobytes by which the rest may make it grow.
const GROWTH: u64 = 1024;

/// A guest that sends all frames back that come to its address.
struct Echo {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Player>>,
}

impl Echo {
    fn start(mut player: Player) -> Result<Self> {
        // The switch learns where it is.
        ensure!(player.send(0, &numbered::frame(ECHO, ECHO, 0, 0, 64))?, "ring full");
        player.flush(LIMIT)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::SeqCst) {
                while let Some(mut received) = player.receive()? {
                    if received.frame.starts_with(&ECHO) {
                        let [to, from] = [6..12, 0..6].map(|half| received.frame[half].to_vec());
                        received.frame[..12].copy_from_slice(&[to, from].concat());
                        // One that does not fit is lost to nobody who minds.
                        player.send(0, &received.frame)?;
                    }
                }
                std::thread::sleep(Duration::from_micros(50));
            }
            Ok(player)
        });
        Ok(Self { stop, thread })
    }

    fn finish(self) -> Result<Player> {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.join().map_err(|_| anyhow!("the echo panicked"))?.context("the echo")
    }
}

/// What a process holds that a client could have left there.
#[derive(Debug, PartialEq, Eq)]
struct Held {
    /// Descriptors of each kind.
    descriptors: BTreeMap<String, usize>,
    /// Mappings of files that came over a socket.
    memory_files: usize,
    threads: usize,
}

impl Held {
    fn by(process: u32) -> Result<Self> {
        let mut descriptors = BTreeMap::new();
        for entry in std::fs::read_dir(format!("/proc/{process}/fd"))? {
            // It may be closed by now.
            if let Ok(link) = std::fs::read_link(entry?.path()) {
                // Without the numbers of sockets, which are never the same.
                let kind = link.to_string_lossy().replace(|c: char| c.is_ascii_digit(), "");
                *descriptors.entry(kind).or_default() += 1;
            }
        }
        let maps = std::fs::read_to_string(format!("/proc/{process}/maps"))?;
        let memory_files = maps.lines().filter(|line| line.contains("memfd:")).count();
        let threads = std::fs::read_dir(format!("/proc/{process}/task"))?.count();
        Ok(Self { descriptors, memory_files, threads })
    }

    /// The same, once it does not change any more: `yard` was here just now.
    fn settled(process: u32) -> Result<Self> {
        let mut last = Self::by(process)?;
        wait_for("descriptors, mappings and threads to stay the same", LIMIT, || {
            std::thread::sleep(Duration::from_millis(100));
            let now = Self::by(process)?;
            let before = std::mem::replace(&mut last, now);
            Ok(last == before)
        })?;
        Ok(last)
    }

    /// Nothing is left of what came after `before`. Threads of then may have ended.
    fn is_back_at(&self, before: &Self) -> bool {
        self.descriptors == before.descriptors
            && self.memory_files == before.memory_files
            && self.threads <= before.threads
    }
}

/// What became of one life.
struct Death {
    /// The step that it was in, or had just done.
    step: usize,
    /// It was through with the step.
    done: bool,
}

/// A life as `fate` has it, ended `delay` after its last step began.
fn life(lab: &Lab, fate: Fate, delay: Duration) -> Result<Death> {
    let mut mortal = command(env!("CARGO_BIN_EXE_lab-mortal"));
    mortal.arg(lab.path("mortal")).args(fate.to_arguments());
    let mut child = mortal.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let mut diary = child.stdout.take().context("no diary")?;
    let (mut entry, last) = ([DONE], u8::try_from(fate.last)?);
    while entry != [last] {
        if diary.read(&mut entry)? == 0 {
            return Err(complaint(child));
        }
    }
    std::thread::sleep(delay);
    child.kill()?;
    child.wait()?;
    let mut rest = Vec::new();
    diary.read_to_end(&mut rest)?;
    let end = rest.last().copied().unwrap_or(last);
    Ok(Death { step: (end & !DONE).into(), done: end & DONE != 0 })
}

/// Why a client ended by itself.
fn complaint(mut child: Child) -> anyhow::Error {
    let mut text = String::new();
    if let Some(mut stderr) = child.stderr.take() {
        let _ = stderr.read_to_string(&mut text);
    }
    let _ = child.wait();
    anyhow!("the client ended by itself: {}", text.trim())
}

/// A life that ends at any step, five times as often under traffic; at once or some milliseconds after the step began, with
/// a part of its message or all of it.
fn draw_fate(draw: &mut Draw) -> Result<(Fate, Duration)> {
    let traffic = Step::LIFE.iter().position(|step| *step == Step::Traffic).context("no traffic")?;
    let drawn = usize::try_from(draw.below(u32::try_from(Step::LIFE.len() + 4)?))?;
    let last = if drawn < Step::LIFE.len() { drawn } else { traffic };
    let torn = (draw.below(4) == 0).then(|| draw.below(1000));
    let [packed, acknowledged] = [draw.below(2) == 0, draw.below(2) == 0];
    let delay = Duration::from_micros((draw.below(500) * (1 + draw.below(8))).into());
    Ok((Fate { last, torn, packed, acknowledged }, delay))
}

/// How many deaths each step saw: in the middle of it, and after it.
#[derive(Debug, Default)]
struct Toll([[u32; 2]; Step::LIFE.len()]);

impl Toll {
    fn count(&mut self, death: &Death) -> Result<()> {
        let of_step = self.0.get_mut(death.step).context("a step that no life has")?;
        of_step[usize::from(death.done)] += 1;
        Ok(())
    }

    fn show(&self) {
        println!("seed {SEED:#x}; killed in a step, after it:");
        for (step, [during, after]) in Step::LIFE.iter().zip(self.0) {
            println!("{during:4} {after:4}  {step:?}");
        }
    }

    fn check(&self) -> Result<()> {
        if let Some(at) = self.0.iter().position(|deaths| deaths.iter().sum::<u32>() == 0) {
            bail!("nobody died at {:?}", Step::LIFE[at]);
        }
        let during: u32 = self.0.iter().map(|deaths| deaths[0]).sum();
        ensure!(during > LIVES / 10, "only {during} died in the middle of something");
        Ok(())
    }
}

/// A whole client after all of them: its frames reach the echo's port and come from there, with either form of ring.
fn whole_life(lab: &Lab, echo: Player) -> Result<()> {
    let mut echo = Party { player: echo, mac: ECHO };
    for packed in [false, true] {
        let start = Instant::now();
        let player = Player::connect(&lab.path("mortal"), PlayerSpec { packed, ..PlayerSpec::new() })?;
        let mut conversation = Conversation::new([Party { player, mac: OWN }, echo], &[64, 1514], 1);
        conversation.run(1)?;
        println!("a whole client had a frame through after {:?}", start.elapsed());
        conversation.run(2_000)?;
        let [_, party] = conversation.into_parties();
        echo = party;
    }
    Ok(())
}

#[test]
fn thousand_clients_killed_at_any_step_leave_nothing_behind() -> Result<()> {
    case::exclusive("thousand_clients_killed_at_any_step_leave_nothing_behind", &[], |lab| {
        let config = private_switch(lab, &["left", "right", "echo", "mortal"], 1);
        let mut yardd = Yardd::start(lab, &programs()?, &[1], &config)?;
        let party = |name: &str, number| Party::connect(&lab.path(name), number, PlayerSpec::new());
        let mut witness = Witness::start([party("left", 1)?, party("right", 2)?]);
        let echo = Echo::start(Player::connect(&lab.path("echo"), PlayerSpec::new())?)?;
        witness.see(500)?;
        yardd.wait_for_port("lab", "mortal", "waiting")?;
        let process = yardd.process().id();
        let before = Held::settled(process)?;

        let (mut draw, mut toll, mut grown_up) = (Draw::new(SEED), Toll::default(), 0);
        let start = Instant::now();
        for number in 0..LIVES {
            let (fate, delay) = draw_fate(&mut draw)?;
            let death = life(lab, fate, delay)
                .with_context(|| format!("seed {SEED:#x}, life {number}: {fate:?}, {delay:?}"))?;
            toll.count(&death)?;
            if number % 50 == 0 {
                witness.see(20).with_context(|| format!("after life {number}"))?;
            }
            if number == GROWN_UP {
                grown_up = yardd.process().resident_kib()?;
            }
        }
        println!("{LIVES} lives took {:?}", start.elapsed());
        toll.show();
        toll.check()?;

        yardd.wait_for_port("lab", "mortal", "waiting")?;
        // What is let go of is let go of by others than who serves the next client; `yard` asks over a descriptor.
        wait_for("all to be given back", LIMIT, || Ok(Held::by(process)?.is_back_at(&before)))
            .with_context(|| format!("before {before:?}, after {:?}", Held::by(process)))?;
        let grown = yardd.process().resident_kib()?.saturating_sub(grown_up);
        println!("{grown} KiB more than after {GROWN_UP} lives ({grown_up} KiB)");
        ensure!(grown < GROWTH, "{grown} KiB more than after {GROWN_UP} lives");
        whole_life(lab, echo.finish()?)?;
        witness.see(200)?;
        let (frames, _) = witness.finish()?;
        println!("{frames} frames of the witnesses");
        yardd.process().expect_running()
    })
}
