//! What a crash of the switch costs its clients: frames flow at a steady pace, `yardd` is killed (SIGKILL) and started again at
//! once, and the clients do what they have to.

use std::collections::BTreeSet;
use std::fmt::{Display, Formatter};
use std::net::UdpSocket;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use switchyard_tests::lab::{Lab, serial, wait_for};
use switchyard_tests::netns::Netns;
use switchyard_tests::numbered;
use switchyard_tests::player::{Player, PlayerSpec};
use switchyard_tests::process::inheritable;
use switchyard_tests::yardd::Yardd;
use vmq::os::tap;

use super::goal::Goal;
use super::namespaces::RIGHT;
use super::peers::{CLIENT_CPU, SWITCH, SWITCH_CPU};
use super::plan::{Plan, join};
use super::table::{Report, Row, Table};

/// From one frame to the next, in microseconds.
const PACE: u128 = 100;

/// Entries of a guest's ring: about as many frames as a TAP device keeps for a switch that does not read them.
const ENTRIES: u16 = 1024;

/// Bytes of a frame.
const FRAME: usize = 100;

/// How long frames may still come after the last one was sent.
const TAIL: Duration = Duration::from_millis(500);

const LIMIT: Duration = Duration::from_secs(30);
const MACS: [[u8; 6]; 2] = [[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]];

/// A crash seen by guests, and by namespaces whose devices outlive it, and do not.
pub fn run(plan: &Plan, report: &mut Report) -> Result<()> {
    let title = format!("kill -9 of yardd and its start, {} frames/s one way", 1_000_000 / PACE);
    let mut table = Table::new(title);
    measure(plan, "vhost-user", guests(plan)?, &mut table)?;
    measure(plan, "TAP by descriptor", namespaces(plan, true)?, &mut table)?;
    measure(plan, "TAP by name", namespaces(plan, false)?, &mut table)?;
    report.tables.push(table);
    Ok(())
}

/// Both ends of a flow.
trait Ends: Send {
    /// Sends a frame, unless there is no room for it.
    fn send(&mut self, number: u64) -> Result<()>;

    /// The number of a frame that has come.
    fn receive(&mut self) -> Result<Option<u64>>;

    /// Takes up with a switch that was started again.
    fn follow(&mut self) -> Result<()>;
}

/// Two guests that listen for the switch, and go on with the rings they have.
struct Guests {
    listeners: [UnixListener; 2],
    players: [Player; 2],
}

impl Ends for Guests {
    fn send(&mut self, number: u64) -> Result<()> {
        self.players[0].send(0, &numbered::frame(MACS[0], MACS[1], 0, number, FRAME)).map(drop)
    }

    fn receive(&mut self) -> Result<Option<u64>> {
        let Some(received) = self.players[1].receive()? else { return Ok(None) };
        let (flow, number) = numbered::numbers(&received.frame).context("a frame that nobody sent")?;
        let sent = numbered::frame(MACS[0], MACS[1], flow, number, FRAME);
        ensure!(received.frame == sent, "frame {number} was altered");
        Ok(Some(number))
    }

    /// The receiver first if the switch has come to both: what is sent to a guest that is not back is lost.
    fn follow(&mut self) -> Result<()> {
        for (listener, player) in self.listeners.iter().zip(&mut self.players).rev() {
            if let Ok((stream, _)) = listener.accept() {
                player.attach_again(stream)?;
            }
        }
        Ok(())
    }
}

/// Datagrams from one namespace to another.
struct Datagrams([UdpSocket; 2]);

impl Ends for Datagrams {
    fn send(&mut self, number: u64) -> Result<()> {
        let mut payload = [0; FRAME - 42];
        payload[..8].copy_from_slice(&number.to_be_bytes());
        // Without its device there is no way to the other one.
        let _ = self.0[0].send_to(&payload, (RIGHT, 9));
        Ok(())
    }

    fn receive(&mut self) -> Result<Option<u64>> {
        let mut number = [0; 8];
        // The rest is cut off, and no error but "nothing there" is to be expected.
        Ok(self.0[1].recv(&mut number).is_ok().then(|| u64::from_be_bytes(number)))
    }

    fn follow(&mut self) -> Result<()> {
        Ok(())
    }
}

/// Two namespaces and their TAP devices.
struct Spaces {
    ends: [(Netns, String, &'static str); 2],
    /// The devices' queues, if they are ours and outlive the daemon.
    kept: Vec<OwnedFd>,
}

impl Spaces {
    fn plug(&self) -> Result<()> {
        self.ends.iter().try_for_each(|(space, device, address)| space.plug(device, address, None))
    }

    /// What an operator's script would do: plugs devices in again that the daemon has made anew.
    fn plug_again(&self) -> Result<()> {
        if !self.kept.is_empty() {
            return Ok(());
        }
        // The receiver first: a request for its address that it does not hear is repeated a second later.
        for (space, device, address) in self.ends.iter().rev() {
            let start = Instant::now();
            // The old one may be a moment longer in the namespace.
            while !is_up(device) || space.plug(device, address, None).is_err() {
                ensure!(start.elapsed() < LIMIT, "{device} cannot be plugged in again");
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        Ok(())
    }
}

/// A device of this namespace is there, and was set up: the last that the daemon does to it.
fn is_up(device: &str) -> bool {
    let flags = std::fs::read_to_string(format!("/sys/class/net/{device}/flags")).unwrap_or_default();
    flags
        .trim()
        .strip_prefix("0x")
        .and_then(|hex| u32::from_str_radix(hex, 16).ok())
        .is_some_and(|f| f & 1 != 0)
}

/// A switch, and what flows through it.
struct Site {
    yardd: Yardd,
    ends: Box<dyn Ends>,
    spaces: Option<Spaces>,
    _lab: Lab,
}

fn config(attachments: [String; 2]) -> String {
    let port = |(name, attachment)| format!("[switch.{SWITCH}.port.{name}]\n{attachment}\n");
    let ports: String = ["a", "b"].into_iter().zip(attachments).map(port).collect();
    format!("[switch.{SWITCH}]\ntype = \"private\"\n{ports}")
}

fn guests(plan: &Plan) -> Result<Site> {
    let lab = Lab::shared()?;
    let sockets = ["a.sock", "b.sock"].map(|name| lab.path(name));
    let [a, b] = sockets.each_ref().map(|path| listen(path));
    let listeners = [a?, b?];
    let attachments =
        sockets.each_ref().map(|path| format!("vhost-user = {{ path = {path:?}, mode = \"client\" }}"));
    let yardd = Yardd::start(&lab, &plan.programs, &[SWITCH_CPU], &config(attachments))?;
    let [a, b] = listeners.each_ref().map(meet);
    let ends = Box::new(Guests { listeners, players: [a?, b?] });
    Ok(Site { yardd, ends, spaces: None, _lab: lab })
}

fn listen(path: &Path) -> Result<UnixListener> {
    let listener = UnixListener::bind(path)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// A guest whose listener the switch comes to.
fn meet(listener: &UnixListener) -> Result<Player> {
    let mut stream = None;
    wait_for("the switch to connect", LIMIT, || {
        stream = listener.accept().ok();
        Ok(stream.is_some())
    })?;
    let (stream, _) = stream.context("no connection")?;
    Player::start(stream, PlayerSpec { size: ENTRIES, max_frame: FRAME, ..PlayerSpec::new() })
}

/// `kept`: the devices' queues are handed to the daemon, each time it starts.
fn namespaces(plan: &Plan, kept: bool) -> Result<Site> {
    let lab = Lab::shared()?;
    let unique = format!("yt{}-{}", std::process::id() % 100_000, serial());
    let space = |name| Netns::new(&lab, name)?.without_ipv6();
    let ends = [
        (space("left")?, format!("{unique}a"), "10.9.0.1/24"),
        (space("right")?, format!("{unique}b"), "10.9.0.2/24"),
    ];
    let names = ends.each_ref().map(|(_, device, _)| device.clone());
    let (kept, attachments) = if kept {
        let fds = names.iter().map(|name| tap::open(name, tap::Flags { multi_queue: false, napi: false }));
        let fds = fds.collect::<Result<Vec<_>, _>>().context("cannot make a TAP device")?;
        let [a, b] = [inheritable(&fds[0])?, inheritable(&fds[1])?];
        (fds, [a, b].map(|fd| format!("tap = {{ fds = [{fd}] }}")))
    } else {
        (Vec::new(), names.map(|name| format!("tap = {{ name = {name:?} }}")))
    };
    let yardd = Yardd::start(&lab, &plan.programs, &[SWITCH_CPU], &config(attachments))?;
    let spaces = Spaces { ends, kept };
    spaces.plug()?;
    let sockets = [spaces.ends[0].0.udp(0)?, spaces.ends[1].0.udp(9)?];
    sockets.iter().try_for_each(|socket| socket.set_nonblocking(true))?;
    Ok(Site { yardd, ends: Box::new(Datagrams(sockets)), spaces: Some(spaces), _lab: lab })
}

/// Rows of `name`, of one restart a round.
fn measure(plan: &Plan, name: &str, site: Site, table: &mut Table) -> Result<()> {
    // Dropped from the last to the first.
    let Site { _lab, spaces, mut ends, mut yardd } = site;
    let mut rounds = Vec::new();
    for round in 0..=plan.runs() {
        let crashed = crash(plan.window(), yardd, &mut *ends, spaces.as_ref());
        let (started, outcome) = crashed.with_context(|| name.to_owned())?;
        yardd = started;
        let which = if round == 0 { "warm-up".to_owned() } else { format!("round {round}/{}", plan.runs()) };
        plan.say(format_args!("{name}, {which}: {outcome}"));
        if round > 0 {
            rounds.push(outcome);
        }
    }
    let twice = rounds.iter().map(|round| round.doubled).fold(0.0, f64::max);
    table.goal(&Goal::at_most(format!("{name}, frames that came twice in any round"), twice, 0.0));
    let of = |figure: fn(&Outcome) -> f64| rounds.iter().map(figure).collect();
    let mut row = |what, unit, samples| {
        table.rows.push(Row::alone(format!("{name}, {what}"), unit, "yardd", samples));
    };
    row("without a frame", "ms", of(|round| round.gap));
    row("lost", "frames", of(|round| round.lost));
    row("came twice", "frames", of(|round| round.doubled));
    Ok(())
}

/// Kills the daemon after a quarter of the window and starts it again, while frames flow until the window is over.
fn crash(
    window: Duration,
    yardd: Yardd,
    ends: &mut dyn Ends,
    spaces: Option<&Spaces>,
) -> Result<(Yardd, Outcome)> {
    let (start, over) = (Instant::now(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let flow = scope.spawn(|| flow(ends, &over));
        std::thread::sleep(window / 4);
        let again = scope.spawn(|| spaces.map_or(Ok(()), Spaces::plug_again));
        let (yardd, again) = (yardd.crash_and_restart(), join(again));
        std::thread::sleep(window.saturating_sub(start.elapsed()));
        over.store(true, Ordering::SeqCst);
        let outcome = join(flow);
        again?;
        Ok((yardd?, outcome?))
    })
}

/// Sends at a steady pace until it is `over` and frames come again, and looks at what comes until a little later.
fn flow(ends: &mut dyn Ends, over: &AtomicBool) -> Result<Outcome> {
    vmq::os::pin_thread(CLIENT_CPU)?;
    let start = Instant::now();
    let (mut sent, mut arrivals) = (0, Vec::new());
    // When it was over, and what was sent by then.
    let mut mark = None;
    let mut end = None;
    while end.is_none_or(|end| start.elapsed() < end) {
        ends.follow()?;
        let due = u64::try_from(start.elapsed().as_micros() / PACE)?;
        while end.is_none() && sent < due {
            ends.send(sent)?;
            sent += 1;
        }
        while let Some(number) = ends.receive()? {
            arrivals.push((number, start.elapsed()));
        }
        if over.load(Ordering::SeqCst) {
            let (at, before) = *mark.get_or_insert((start.elapsed(), sent));
            let again = arrivals.last().is_some_and(|(number, _)| *number >= before);
            ensure!(
                again || start.elapsed() < at + LIMIT,
                "of {sent} frames none came after {:?}",
                arrivals.last()
            );
            end = end.or_else(|| again.then(|| start.elapsed() + TAIL));
        }
        std::thread::sleep(Duration::from_micros(100));
    }
    Ok(Outcome::of(sent, &arrivals))
}

/// What became of the frames of one round.
#[derive(Debug, PartialEq)]
struct Outcome {
    /// The longest time without a frame, in milliseconds.
    gap: f64,
    lost: f64,
    doubled: f64,
}

impl Outcome {
    /// Of so many frames, those that came, and when.
    fn of(sent: u64, arrivals: &[(u64, Duration)]) -> Self {
        let distinct: BTreeSet<u64> = arrivals.iter().map(|(number, _)| *number).collect();
        let waits = arrivals.windows(2).map(|pair| pair[1].1.saturating_sub(pair[0].1));
        Self {
            gap: waits.max().unwrap_or_default().as_secs_f64() * 1e3,
            lost: sent.saturating_sub(distinct.len() as u64) as f64,
            doubled: (arrivals.len() - distinct.len()) as f64,
        }
    }
}

impl Display for Outcome {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        let Self { gap, lost, doubled } = self;
        write!(f, "{gap:.1} ms without a frame, {lost} lost, {doubled} came twice")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(number: u64, milliseconds: u64) -> (u64, Duration) {
        (number, Duration::from_millis(milliseconds))
    }

    #[test]
    fn gap_loss_and_frames_that_came_twice_are_told() {
        let outcome = Outcome::of(6, &[at(0, 0), at(1, 1), at(4, 31), at(1, 32), at(5, 33)]);
        assert_eq!(outcome, Outcome { gap: 30.0, lost: 2.0, doubled: 1.0 });
    }
}
