//! A guest's life over vhost-user, step by step, for a process that is killed at one of them: it says when it begins a
//! step and when it is through, and never goes beyond the one at which it is to die.

use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use vmq::memory::Mapping;
use vswitch::ports::vhost_user::features::{Features, Protocol};
use vswitch::ports::vhost_user::message::{
    InflightArea, Kind, LogArea, Request, VringAddress, VringFd, VringState,
};
use zerocopy::FromBytes;
use zerocopy::little_endian::{U32, U64};

use crate::numbered;
use crate::player::{Lane, Player, PlayerSpec};

/// The guest's address.
pub const OWN: [u8; 6] = [2, 0, 0, 0, 0x88, 1];

/// The address of whom it talks to, who sends every frame back.
pub const ECHO: [u8; 6] = [2, 0, 0, 0, 0x88, 2];

/// What a step's number is joined with once it is done.
pub const DONE: u8 = 0x80;

/// Entries of each ring.
const ENTRIES: u16 = 64;

/// Frames that may be under way.
const WINDOW: u64 = 16;

const LIMIT: Duration = Duration::from_secs(10);

/// A step of a life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The connection.
    Connect,
    /// A message about the whole device.
    Device(Kind),
    /// A message about one of the two rings.
    Ring(u8, Kind),
    /// Frames both ways, without end if the guest is to die here.
    Traffic,
    /// Everything is given back.
    HangUp,
}

impl Step {
    /// A life from beginning to end.
    pub const LIFE: [Self; 26] = [
        Self::Connect,
        Self::Device(Kind::GetFeatures),
        Self::Device(Kind::GetProtocolFeatures),
        Self::Device(Kind::SetProtocolFeatures),
        Self::Device(Kind::SetOwner),
        Self::Device(Kind::SetFeatures),
        Self::Device(Kind::SetMemTable),
        Self::Device(Kind::GetInflightFd),
        Self::Device(Kind::SetInflightFd),
        Self::Device(Kind::SetLogBase),
        Self::Ring(0, Kind::SetVringNum),
        Self::Ring(0, Kind::SetVringBase),
        Self::Ring(0, Kind::SetVringAddr),
        Self::Ring(0, Kind::SetVringCall),
        Self::Ring(0, Kind::SetVringKick),
        Self::Ring(0, Kind::SetVringEnable),
        Self::Ring(1, Kind::SetVringNum),
        Self::Ring(1, Kind::SetVringBase),
        Self::Ring(1, Kind::SetVringAddr),
        Self::Ring(1, Kind::SetVringCall),
        Self::Ring(1, Kind::SetVringKick),
        Self::Ring(1, Kind::SetVringEnable),
        Self::Traffic,
        Self::Ring(0, Kind::GetVringBase),
        Self::Ring(1, Kind::GetVringBase),
        Self::HangUp,
    ];
}

/// How a life goes, and how far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fate {
    /// Its last step, in [`Step::LIFE`].
    pub last: usize,
    /// Of the last step's message only a part is sent; which, says this number.
    pub torn: Option<u32>,
    /// Packed rings.
    pub packed: bool,
    /// Waits for an acknowledgement of each message.
    pub acknowledged: bool,
}

impl Fate {
    /// As a program's arguments.
    pub fn to_arguments(&self) -> [String; 4] {
        [
            self.last.to_string(),
            self.torn.map_or("whole".to_owned(), |part| part.to_string()),
            if self.packed { "packed" } else { "split" }.to_owned(),
            if self.acknowledged { "acknowledged" } else { "unanswered" }.to_owned(),
        ]
    }

    /// What [`Fate::to_arguments`] wrote.
    pub fn from_arguments(words: &[String]) -> Result<Self> {
        let [last, torn, rings, answers] = words else { anyhow::bail!("four words expected: {words:?}") };
        Ok(Self {
            last: last.parse()?,
            torn: if torn == "whole" { None } else { Some(torn.parse()?) },
            packed: rings == "packed",
            acknowledged: answers == "acknowledged",
        })
    }
}

/// Lives at `socket`, and waits after the last step. The number of each step, and of each that is done, goes to `diary`.
pub fn live(socket: &Path, fate: Fate, mut diary: impl Write) -> Result<()> {
    let mut life = None;
    for (number, &step) in (0u8..).zip(Step::LIFE.iter().take(fate.last + 1)) {
        diary.write_all(&[number])?;
        diary.flush()?;
        let last = usize::from(number) == fate.last;
        match step {
            Step::Connect => life = Some(Life::connect(socket, fate)?),
            Step::HangUp => life = None,
            Step::Device(_) | Step::Ring(..) | Step::Traffic => {
                let life = life.as_mut().context("not connected")?;
                let torn = fate.torn.filter(|_| last && step != Step::Traffic);
                match torn {
                    Some(part) => return life.break_off(step, part),
                    None => life.step(step).with_context(|| format!("{step:?}"))?,
                }
            }
        }
        diary.write_all(&[number | DONE])?;
        diary.flush()?;
        if last && step == Step::Traffic {
            life.as_mut().context("not connected")?.talk(|_| false)?;
        }
    }
    wait()
}

/// For the end.
fn wait() -> ! {
    loop {
        std::thread::park();
    }
}

struct Life {
    fate: Fate,
    player: Player,
    /// The dirty log.
    log: OwnedFd,
    /// Where the in-flight record is.
    record: Option<(InflightArea, OwnedFd)>,
    acknowledged: bool,
    flow: u32,
    sent: u64,
    back: u64,
}

impl Life {
    fn connect(socket: &Path, fate: Fate) -> Result<Self> {
        let spec = PlayerSpec { size: ENTRIES, packed: fate.packed, ..PlayerSpec::new() };
        let player = Player::silent(UnixStream::connect(socket)?, spec)?;
        let (_, log) = Mapping::memfd("log", 4096)?;
        let flow = std::process::id();
        Ok(Self { fate, player, log, record: None, acknowledged: false, flow, sent: 0, back: 0 })
    }

    fn step(&mut self, step: Step) -> Result<()> {
        if step == Step::Traffic {
            // Frames in a ring that is not enabled yet are dropped, and an answer comes after all that was asked before.
            self.player.frontend().ask(&Request::GetFeatures)?;
            // Until each entry of the rings was used.
            return self.talk(|life| life.back > u64::from(ENTRIES));
        }
        let (request, fds) = self.message(step)?;
        let kind = request.kind();
        let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let frontend = self.player.frontend();
        frontend.send_raw(&request.encode(self.acknowledged), &borrowed)?;
        let asks = matches!(
            kind,
            Kind::GetFeatures
                | Kind::GetProtocolFeatures
                | Kind::GetInflightFd
                | Kind::SetLogBase
                | Kind::GetVringBase
        );
        if asks || self.acknowledged {
            let (payload, fds) = frontend.answer(kind)?;
            if kind == Kind::GetInflightFd {
                let area = InflightArea::read_from_bytes(&payload).ok().context("an odd answer")?;
                self.record = Some((area, fds.into_iter().next().context("no record")?));
            }
        }
        self.acknowledged |= kind == Kind::SetProtocolFeatures && self.fate.acknowledged;
        Ok(())
    }

    /// Sends a part of a step's message, with all descriptors, and waits for the end.
    fn break_off(&mut self, step: Step, part: u32) -> Result<()> {
        let (request, fds) = self.message(step)?;
        let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let bytes = request.encode(self.acknowledged);
        let len = 1 + usize::try_from(part)? % (bytes.len() - 1);
        self.player.frontend().send_raw(&bytes[..len], &borrowed)?;
        wait()
    }

    /// A step's message and its descriptors.
    fn message(&mut self, step: Step) -> Result<(Request, Vec<OwnedFd>)> {
        match step {
            Step::Device(kind) => self.device(kind),
            Step::Ring(index, kind) => self.ring(index, kind),
            _ => anyhow::bail!("{step:?} is no message"),
        }
    }

    fn device(&mut self, kind: Kind) -> Result<(Request, Vec<OwnedFd>)> {
        let protocol = Protocol::MQ | Protocol::LOG_SHMFD | Protocol::INFLIGHT_SHMFD;
        let spec = PlayerSpec { packed: self.fate.packed, ..PlayerSpec::new() };
        let area = InflightArea { rings: 2.into(), ring_size: ENTRIES.into(), ..InflightArea::default() };
        let request = match kind {
            Kind::SetProtocolFeatures if self.fate.acknowledged => {
                Request::SetProtocolFeatures((protocol | Protocol::REPLY_ACK).bits())
            }
            Kind::SetProtocolFeatures => Request::SetProtocolFeatures(protocol.bits()),
            Kind::SetFeatures => Request::SetFeatures((spec.features() | Features::LOG_ALL).bits()),
            Kind::SetMemTable => Request::SetMemTable(vec![self.player.region()]),
            Kind::GetInflightFd => Request::GetInflightFd(area),
            Kind::SetInflightFd => {
                let (area, _) = self.record.as_ref().context("no record")?;
                Request::SetInflightFd(*area)
            }
            Kind::SetLogBase => Request::SetLogBase(LogArea { size: 4096.into(), offset: U64::ZERO }),
            plain => Request::parse(plain, &[])?,
        };
        let fd = match kind {
            Kind::SetMemTable => Some(self.player.arena().fd()),
            Kind::SetInflightFd => self.record.as_ref().map(|(_, fd)| fd.as_fd()),
            Kind::SetLogBase => Some(self.log.as_fd()),
            _ => None,
        };
        let fds = fd.iter().map(|fd| fd.try_clone_to_owned()).collect::<Result<_, _>>()?;
        Ok((request, fds))
    }

    fn ring(&mut self, index: u8, kind: Kind) -> Result<(Request, Vec<OwnedFd>)> {
        let lane: &Lane = if index == 0 { self.player.receive_lane(0) } else { self.player.transmit(0) };
        let setup = lane.setup();
        let state = |num: u32| VringState { index: U32::new(index.into()), num: U32::new(num) };
        let bell = VringFd { index, polled: false };
        let (request, fd) = match kind {
            Kind::SetVringNum => (Request::SetVringNum(state(setup.size.into())), None),
            Kind::SetVringBase => (Request::SetVringBase(state(setup.base)), None),
            Kind::SetVringAddr => {
                let wire = VringAddress {
                    index: U32::new(index.into()),
                    descriptors: U64::new(setup.addresses.descriptors),
                    used: U64::new(setup.addresses.device),
                    available: U64::new(setup.addresses.driver),
                    ..VringAddress::default()
                };
                (Request::SetVringAddr(wire), None)
            }
            Kind::SetVringCall => (Request::SetVringCall(bell), setup.call),
            Kind::SetVringKick => (Request::SetVringKick(bell), setup.kick),
            Kind::SetVringEnable => (Request::SetVringEnable(state(1)), None),
            Kind::GetVringBase => (Request::GetVringBase(state(0)), None),
            _ => anyhow::bail!("{kind:?} is not about a ring"),
        };
        let fds = fd.iter().map(|fd| fd.try_clone_to_owned()).collect::<Result<_, _>>()?;
        Ok((request, fds))
    }

    /// Sends frames and looks at what comes back, until it is enough.
    fn talk(&mut self, enough: impl Fn(&Self) -> bool) -> Result<()> {
        let mut progress = Instant::now();
        while !enough(self) {
            while self.sent < self.back + WINDOW {
                let frame = numbered::frame(OWN, ECHO, self.flow, self.sent, 300);
                if !self.player.send(0, &frame)? {
                    break;
                }
                self.sent += 1;
            }
            while let Some(received) = self.player.receive()? {
                // A predecessor's may come, too.
                if numbered::numbers(&received.frame).is_some_and(|(flow, _)| flow == self.flow) {
                    self.back += 1;
                    progress = Instant::now();
                }
            }
            ensure!(progress.elapsed() < LIMIT, "{} of {} frames came back", self.back, self.sent);
            std::thread::sleep(Duration::from_micros(20));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fate_survives_a_command_line() {
        for torn in [None, Some(7)] {
            let fate = Fate { last: 3, torn, packed: true, acknowledged: false };
            assert_eq!(Fate::from_arguments(&fate.to_arguments()).unwrap(), fate);
        }
        assert!(Fate::from_arguments(&[]).is_err());
    }
}
