//! A root driven by bytes: a guest that says anything in any order, a host that adds, removes and resets, and devices that
//! answer late and in any order. For fuzzers and property tests.
//!
//! What must hold is checked after each step and panics: each request is answered as often as it was made and no oftener,
//! devices are told a consistent story, and what the root remembers stays within its limits.

use std::collections::{BTreeMap, BTreeSet};

use super::replay::Item;
use super::{Action, ChannelKey, DeviceId, GpadlId, OfferSpec, Root, RootConfig};
use crate::guid::{Guid, interface};
use crate::protocol::*;

const DEVICES: u8 = 4;
const HANDLES: u32 = 8;
const LIMITS: RootConfig =
    RootConfig { max_version: Version::V5_3, vps: 4, max_gpadls: 6, max_gpadl_pages: 256, max_actions: 64 };

/// Plays the bytes.
///
/// # Panics
/// If the root breaks a promise: that is what a fuzzer looks for.
pub fn fuzz(data: &[u8]) {
    let mut play = Play::new(Input(data));
    while !play.input.0.is_empty() {
        play.step();
        play.check();
    }
    play.finish();
}

/// Bytes to draw from; zeros when they have run out.
#[derive(Debug)]
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        match self.0 {
            [first, rest @ ..] => {
                self.0 = rest;
                *first
            }
            [] => 0,
        }
    }

    fn below(&mut self, bound: u32) -> u32 {
        u32::from(self.byte()) % bound
    }
}

/// What a device owes an answer to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owed {
    Accept(DeviceId, GpadlId),
    Release(DeviceId, GpadlId),
    Opened(ChannelKey),
    Closed(ChannelKey),
    Modified(ChannelKey),
    Unloaded,
}

/// A channel as its device sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Seen {
    Opening(GpadlId),
    Open(GpadlId),
    Closing(GpadlId),
}

#[derive(Debug)]
struct Play<'a> {
    input: Input<'a>,
    root: Root,
    owed: Vec<Owed>,
    /// GPADL and open requests the guest awaits answers to.
    gpadls_asked: BTreeMap<(u32, u32), u32>,
    opens_asked: BTreeMap<(u32, u32), u32>,
    /// Ids the guest was told of and did not release.
    offered: BTreeSet<u32>,
    rescinded: BTreeSet<u32>,
    /// GPADLs that devices hold, and channels that are not closed.
    held: BTreeSet<(DeviceId, GpadlId)>,
    channels: BTreeMap<ChannelKey, Seen>,
}

impl<'a> Play<'a> {
    fn new(input: Input<'a>) -> Self {
        let mut play = Self {
            input,
            root: Root::new(LIMITS),
            owed: Vec::new(),
            gpadls_asked: BTreeMap::new(),
            opens_asked: BTreeMap::new(),
            offered: BTreeSet::new(),
            rescinded: BTreeSet::new(),
            held: BTreeSet::new(),
            channels: BTreeMap::new(),
        };
        for number in 0..2 {
            play.offer(number);
        }
        // Most inputs shall get past contact; the others make it themselves.
        if play.input.byte() < 0xE0 {
            play.contact(Version::V5_3.to_wire());
            play.say(encode(&RequestOffers {}));
        }
        play
    }

    fn step(&mut self) {
        match self.input.below(32) {
            0..=4 => self.gpadl_header(),
            5..=7 => self.gpadl_body(),
            8..=11 => self.open(),
            12..=13 => {
                let relid = self.relid();
                self.say(encode(&CloseChannel { relid: relid.into() }));
            }
            14..=15 => {
                let message = GpadlTeardown { relid: self.relid().into(), gpadl: self.handle().into() };
                self.say(encode(&message));
            }
            16 => {
                let message =
                    ModifyChannel { relid: self.relid().into(), target_vp: self.input.below(5).into() };
                self.say(encode(&message));
            }
            17..=18 => self.release(),
            19 => match self.input.below(3) {
                0 => self.raw(),
                _ => self.rare(),
            },
            20 => {
                let number = self.input.byte() % DEVICES;
                self.offer(number);
            }
            21 => {
                let device = self.device();
                self.root.withdraw(device);
            }
            22..=23 => {
                let (device, count) = (self.device(), u16::from(self.input.byte() % 5));
                // Whether it is granted depends on the primary; the offers are checked as they come.
                let _ = self.root.offer_subchannels(device, count);
            }
            _ => self.answer(),
        }
        self.act();
    }

    fn rare(&mut self) {
        match self.input.below(10) {
            0 => {
                let version = Version::ALL[usize::from(self.input.byte() % 8)];
                self.contact(version.to_wire());
            }
            1 => self.contact(0x0006_0000),
            2 => self.say(encode(&Unload {})),
            3 => self.say(encode(&RequestOffers {})),
            4 => self.say(encode(&TlConnectRequest { endpoint: Guid::ZERO, service: Guid::ZERO })),
            5 => self.root.reset(),
            _ => self.lose(),
        }
    }

    /// A device side dies, and a new one is told all that is open.
    fn lose(&mut self) {
        let device = self.device();
        self.root.device_side_lost(device);
        self.owed.retain(|owed| owed.device() != Some(device));
        self.channels.retain(|key, _| key.device != device);
        let held = std::mem::take(&mut self.held);
        let (of_it, others) = held.into_iter().partition::<BTreeSet<_>, _>(|(of, _)| *of == device);
        self.held = others;
        for item in self.root.replay(|of| of == device) {
            match item {
                Item::Device { .. } => {}
                Item::Gpadl { gpadl, established: true, .. } => {
                    assert!(of_it.contains(&(device, gpadl)), "{gpadl:?} was never accepted");
                    self.held.insert((device, gpadl));
                }
                Item::Gpadl { gpadl, .. } => self.owed.push(Owed::Accept(device, gpadl)),
                Item::Open { channel, gpadl, resumed, .. } => {
                    assert!(
                        self.held.contains(&(device, gpadl)),
                        "{channel} open in pages that were not told"
                    );
                    let seen = if resumed { Seen::Open(gpadl) } else { Seen::Opening(gpadl) };
                    self.channels.insert(channel, seen);
                    if !resumed {
                        self.owed.push(Owed::Opened(channel));
                    }
                }
            }
        }
    }

    /// Mostly an id the guest was told of.
    fn relid(&mut self) -> u32 {
        let pick = self.input.byte();
        let known = self.offered.iter().nth(usize::from(pick) % self.offered.len().max(1));
        known.copied().filter(|_| pick < 0xF0).unwrap_or(u32::from(pick) % 12)
    }

    fn device(&mut self) -> DeviceId {
        let pick = self.input.byte();
        let known = self.root.devices.keys().nth(usize::from(pick) % self.root.devices.len().max(1));
        known.copied().filter(|_| pick < 0xF0).unwrap_or(DeviceId(pick.into()))
    }

    fn handle(&mut self) -> u32 {
        self.input.below(HANDLES)
    }

    fn offer(&mut self, number: u8) {
        let spec = OfferSpec {
            interface: interface::NIC,
            instance: Guid::from_bytes([number; 16]),
            subchannels_max: 3,
            pipe: number & 1 == 1,
        };
        // In use already: as good an outcome as any.
        let _ = self.root.offer(spec);
        self.act();
    }

    fn contact(&mut self, version: u32) {
        let message = InitiateContact {
            version: version.into(),
            target_vp: self.input.below(5).into(),
            sint: SINT,
            vtl: 0,
            reserved: 0.into(),
            features: 0.into(),
            monitor_page_1: 0.into(),
            monitor_page_2: 0.into(),
        };
        self.say(encode(&message));
    }

    /// Posts a message, and says whether the root took it.
    fn say(&mut self, message: Vec<u8>) {
        self.said(&message);
    }

    fn said(&mut self, message: &[u8]) -> bool {
        let connection = if self.input.0.len() % 16 == 1 { MESSAGE_CONNECTION } else { CONTACT_CONNECTION };
        self.root.message(connection, message).is_ok()
    }

    fn gpadl_header(&mut self) {
        let (relid, gpadl, pages) = (self.relid(), self.handle(), self.input.below(70));
        let lie = self.input.byte();
        let header = GpadlHeader {
            relid: relid.into(),
            gpadl: gpadl.into(),
            range_bytes: u16::try_from(8 + 8 * pages + u32::from(lie == 1)).unwrap_or(u16::MAX).into(),
            range_count: (1 + u16::from(lie == 2)).into(),
            byte_count: (pages * PAGE).wrapping_sub((lie == 3).into()).into(),
            byte_offset: u32::from(lie == 4).into(),
        };
        let here = pages.min(if lie == 5 { 3 } else { 26 });
        let message = encode_with(&header, &page_numbers(here, lie));
        if self.said(&message) {
            *self.gpadls_asked.entry((relid, gpadl)).or_default() += 1;
        }
    }

    fn gpadl_body(&mut self) {
        let (gpadl, count, lie) = (self.handle(), self.input.below(29), self.input.byte());
        let body = GpadlBody { number: 0.into(), gpadl: gpadl.into() };
        self.say(encode_with(&body, &page_numbers(count, lie)));
    }

    fn open(&mut self) {
        let (relid, open_id) = (self.relid(), self.input.below(3));
        let message = OpenChannel {
            relid: relid.into(),
            open_id: open_id.into(),
            gpadl: self.handle().into(),
            target_vp: self.input.below(5).into(),
            downstream_page: self.input.below(40).into(),
            user_data: [0; 120],
        };
        // One to a rescinded channel is not answered.
        if self.said(&encode(&message)) && !self.rescinded.contains(&relid) {
            *self.opens_asked.entry((relid, open_id)).or_default() += 1;
        }
    }

    fn release(&mut self) {
        let pick = usize::from(self.input.byte());
        let rescinded = self.rescinded.iter().nth(pick % self.rescinded.len().max(1)).copied();
        let relid = rescinded.unwrap_or_else(|| self.relid());
        if self.said(&encode(&RelidReleased { relid: relid.into() })) {
            assert!(self.rescinded.remove(&relid), "released channel {relid}, which was not rescinded");
            self.offered.remove(&relid);
            self.gpadls_asked.retain(|(of, _), _| *of != relid);
            self.opens_asked.retain(|(of, _), _| *of != relid);
        }
    }

    /// Bytes as they come. Requests that await an answer are left to those who count them.
    fn raw(&mut self) {
        let len = usize::from(self.input.byte());
        let mut message: Vec<u8> = (0..len).map(|_| self.input.byte()).collect();
        if let Ok(
            GuestMessage::GpadlHeader(..) | GuestMessage::OpenChannel(_) | GuestMessage::RelidReleased(_),
        ) = GuestMessage::parse(&message)
        {
            message[3] = 0x80;
        }
        self.say(message);
    }

    /// A device answers something that it owes.
    fn answer(&mut self) {
        if self.owed.is_empty() {
            return;
        }
        let pick = usize::from(self.input.byte()) % self.owed.len();
        let ok = self.input.byte() < 0xC0;
        let owed = self.owed.remove(pick);
        self.give(owed, ok);
    }

    fn give(&mut self, owed: Owed, ok: bool) {
        match owed {
            Owed::Accept(device, gpadl) => {
                if ok {
                    assert!(self.held.insert((device, gpadl)), "{gpadl:?} shared twice");
                }
                self.root.gpadl_accepted(device, gpadl, ok);
            }
            Owed::Release(device, gpadl) => {
                assert!(
                    self.held.remove(&(device, gpadl)),
                    "{gpadl:?} taken, which the device does not hold"
                );
                self.root.gpadl_released(device, gpadl);
            }
            Owed::Opened(key) => {
                match self.channels.get_mut(&key) {
                    Some(seen @ Seen::Opening(_)) if ok => *seen = Seen::Open(seen.gpadl()),
                    _ => drop(self.channels.remove(&key)),
                }
                self.root.opened(key, ok);
            }
            Owed::Closed(key) => {
                self.channels.remove(&key);
                self.root.closed(key);
            }
            Owed::Modified(key) => self.root.modified(key),
            Owed::Unloaded => self.root.unloaded(),
        }
        self.act();
    }

    /// Takes all actions, as a host would, and checks each against the story so far.
    fn act(&mut self) {
        while let Some(action) = self.root.next_action() {
            match action {
                Action::Post { vp, payload } => {
                    assert!(vp < LIMITS.vps && payload.len() <= MAX_MESSAGE);
                    self.hear(&payload);
                }
                Action::Gpadl { device, gpadl, byte_count, byte_offset, pfns } => {
                    assert!(!self.held.contains(&(device, gpadl)), "{gpadl:?} shared twice");
                    let pages = (u64::from(byte_count) + u64::from(byte_offset)).div_ceil(u64::from(PAGE));
                    assert_eq!(pages, pfns.len() as u64);
                    self.owed.push(Owed::Accept(device, gpadl));
                }
                Action::GpadlTeardown { device, gpadl } => {
                    assert!(self.held.contains(&(device, gpadl)), "{gpadl:?} is not the device's to release");
                    let ring =
                        self.channels.iter().any(|(key, seen)| key.device == device && seen.gpadl() == gpadl);
                    assert!(!ring, "{gpadl:?} wanted back while it holds rings");
                    self.owed.push(Owed::Release(device, gpadl));
                }
                Action::Open { channel, relid, gpadl, vp, .. } => {
                    assert!(
                        self.held.contains(&(channel.device, gpadl)),
                        "rings in pages the device does not hold"
                    );
                    assert!(self.offered.contains(&relid) && vp < LIMITS.vps);
                    assert!(
                        self.channels.insert(channel, Seen::Opening(gpadl)).is_none(),
                        "{channel} opened twice"
                    );
                    self.owed.push(Owed::Opened(channel));
                }
                Action::Close { channel } => {
                    let seen = self.channels.get_mut(&channel);
                    let Some(seen @ Seen::Open(_)) = seen else { panic!("{channel} is not open: {seen:?}") };
                    *seen = Seen::Closing(seen.gpadl());
                    // What was asked of the channel before is answered before.
                    while let Some(at) = self.owed.iter().position(|owed| *owed == Owed::Modified(channel)) {
                        self.owed.remove(at);
                    }
                    self.owed.push(Owed::Closed(channel));
                }
                Action::Modify { channel, .. } => {
                    assert!(
                        matches!(self.channels.get(&channel), Some(Seen::Open(_))),
                        "{channel} is not open"
                    );
                    assert!(!self.owed.contains(&Owed::Modified(channel)));
                    self.owed.push(Owed::Modified(channel));
                }
                Action::Reset => self.begin_anew(),
                Action::Gone { device } => {
                    let seen = self.channels.keys().any(|key| key.device == device)
                        || self.held.iter().any(|(of, _)| *of == device);
                    assert!(!seen && self.root.device(device).is_none(), "{device:?} is not gone");
                }
            }
        }
    }

    fn begin_anew(&mut self) {
        assert!(!self.owed.contains(&Owed::Unloaded), "reset twice");
        self.owed = vec![Owed::Unloaded];
        self.gpadls_asked.clear();
        self.opens_asked.clear();
        self.offered.clear();
        self.rescinded.clear();
        self.held.clear();
        self.channels.clear();
    }

    /// The guest reads a message: an answer to something it asked.
    fn hear(&mut self, payload: &[u8]) {
        match HostMessage::parse(payload) {
            Ok(HostMessage::OfferChannel(offer)) => {
                let relid = offer.relid.get();
                assert!(
                    (1..=MAX_RELID).contains(&relid) && self.offered.insert(relid),
                    "channel {relid} offered twice"
                );
            }
            Ok(HostMessage::RescindChannelOffer(rescind)) => {
                let relid = rescind.relid.get();
                assert!(
                    self.offered.contains(&relid) && self.rescinded.insert(relid),
                    "channel {relid} rescinded"
                );
                self.opens_asked.retain(|(of, _), _| *of != relid);
            }
            Ok(HostMessage::GpadlCreated(created)) => {
                answered(&mut self.gpadls_asked, (created.relid.get(), created.gpadl.get()));
            }
            Ok(HostMessage::OpenChannelResult(result)) => {
                answered(&mut self.opens_asked, (result.relid.get(), result.open_id.get()));
            }
            Ok(_) => {}
            Err(error) => panic!("the root said what no host says: {error}"),
        }
    }

    fn check(&self) {
        let description = self.root.describe();
        assert!(description.gpadls <= LIMITS.max_gpadls && description.gpadl_pages <= LIMITS.max_gpadl_pages);
        assert!(description.relids <= MAX_RELID as usize && self.root.actions.is_empty());
        let asked: usize = self.gpadls_asked.values().map(|times| *times as usize).sum();
        assert!(asked <= description.gpadls, "a gpadl was refused without an answer");
        let live: Vec<u32> = description.devices.iter().flat_map(|d| &d.channels).map(|c| c.relid).collect();
        assert_eq!(live.iter().collect::<BTreeSet<_>>().len(), live.len(), "two channels of one id");
    }

    /// When every device has answered, only GPADLs in progress are unanswered.
    fn finish(&mut self) {
        while let Some(owed) = self.owed.pop() {
            self.give(owed, true);
            self.check();
        }
        assert!(self.opens_asked.values().all(|times| *times == 0), "unanswered: {:?}", self.opens_asked);
        let collecting = self.root.gpadls.values().filter(|gpadl| gpadl.pfns.len() < gpadl.pages).count();
        let asked: usize = self.gpadls_asked.values().map(|times| *times as usize).sum();
        assert_eq!(asked, collecting, "unanswered: {:?}", self.gpadls_asked);
    }
}

impl Owed {
    fn device(self) -> Option<DeviceId> {
        match self {
            Self::Accept(device, _) | Self::Release(device, _) => Some(device),
            Self::Opened(key) | Self::Closed(key) | Self::Modified(key) => Some(key.device),
            Self::Unloaded => None,
        }
    }
}

impl Seen {
    fn gpadl(self) -> GpadlId {
        match self {
            Self::Opening(gpadl) | Self::Open(gpadl) | Self::Closing(gpadl) => gpadl,
        }
    }
}

fn answered(asked: &mut BTreeMap<(u32, u32), u32>, key: (u32, u32)) {
    match asked.get_mut(&key) {
        Some(times) if *times > 0 => *times -= 1,
        _ => panic!("an answer to {key:?}, which nobody asked"),
    }
}

/// Page numbers; some beyond any memory, some followed by a stray byte.
fn page_numbers(count: u32, lie: u8) -> Vec<u8> {
    let first: u64 = if lie == 6 { u64::MAX } else { 0x100 };
    let mut bytes: Vec<u8> =
        (0..u64::from(count)).flat_map(|page| first.wrapping_add(page).to_le_bytes()).collect();
    if lie == 7 {
        bytes.push(0);
    }
    bytes
}
