//! A guest and devices that do as each test says.

mod hostile;
mod lifecycle;
mod property;
mod table;

use super::*;
use crate::guid::{Guid, interface};
use crate::protocol::*;

/// A root, and what it has said so far, written short.
struct Rig {
    root: Root,
    version: Version,
    said: Vec<String>,
}

fn spec(number: u8) -> OfferSpec {
    OfferSpec {
        interface: interface::NIC,
        instance: Guid::from_bytes([number; 16]),
        subchannels_max: 4,
        pipe: false,
    }
}

fn key(device: DeviceId, index: u16) -> ChannelKey {
    ChannelKey { device, index }
}

fn contact(version: u32, target_vp: u32) -> Vec<u8> {
    encode(&InitiateContact {
        version: version.into(),
        target_vp: target_vp.into(),
        sint: SINT,
        vtl: 0,
        reserved: 0.into(),
        features: 0.into(),
        monitor_page_1: 0.into(),
        monitor_page_2: 0.into(),
    })
}

fn pfns(count: u64) -> Vec<u8> {
    (0..count).flat_map(|page| (0x100 + page).to_le_bytes()).collect()
}

/// A header that promises `pages`, with the first `here` of them.
fn gpadl(relid: u32, gpadl: u32, pages: u32, here: u32) -> Vec<u8> {
    let header = GpadlHeader {
        relid: relid.into(),
        gpadl: gpadl.into(),
        range_bytes: u16::try_from(8 + 8 * pages).unwrap().into(),
        range_count: 1.into(),
        byte_count: (pages * PAGE).into(),
        byte_offset: 0.into(),
    };
    encode_with(&header, &pfns(here.into()))
}

fn body(gpadl: u32, here: u64) -> Vec<u8> {
    encode_with(&GpadlBody { number: 0.into(), gpadl: gpadl.into() }, &pfns(here))
}

fn teardown(relid: u32, gpadl: u32) -> Vec<u8> {
    encode(&GpadlTeardown { relid: relid.into(), gpadl: gpadl.into() })
}

fn open(relid: u32, gpadl: u32) -> Vec<u8> {
    open_at(relid, gpadl, 4, 1)
}

fn open_at(relid: u32, gpadl: u32, downstream_page: u32, target_vp: u32) -> Vec<u8> {
    encode(&OpenChannel {
        relid: relid.into(),
        open_id: relid.into(),
        gpadl: gpadl.into(),
        target_vp: target_vp.into(),
        downstream_page: downstream_page.into(),
        user_data: [7; 120],
    })
}

fn close(relid: u32) -> Vec<u8> {
    encode(&CloseChannel { relid: relid.into() })
}

fn modify(relid: u32, target_vp: u32) -> Vec<u8> {
    encode(&ModifyChannel { relid: relid.into(), target_vp: target_vp.into() })
}

fn released(relid: u32) -> Vec<u8> {
    encode(&RelidReleased { relid: relid.into() })
}

impl Rig {
    fn new(version: Version) -> Self {
        Self { root: Root::new(RootConfig::new(Version::V5_3, 4)), version, said: Vec::new() }
    }

    /// Connected, with one device whose primary is channel 1.
    fn offered(version: Version) -> (Self, DeviceId) {
        let mut rig = Self::new(version);
        let device = rig.root.offer(spec(1)).unwrap();
        rig.say(&contact(version.to_wire(), 0)).unwrap();
        rig.say(&encode(&RequestOffers {})).unwrap();
        rig.heard();
        (rig, device)
    }

    /// As before, with GPADL 0x10 of eight pages accepted and the primary open in it.
    fn opened(version: Version) -> (Self, DeviceId) {
        let (mut rig, device) = Self::offered(version);
        rig.share(device, 1, 0x10);
        rig.say(&open(1, 0x10)).unwrap();
        rig.root.opened(key(device, 0), true);
        rig.heard();
        (rig, device)
    }

    fn share(&mut self, device: DeviceId, relid: u32, handle: u32) {
        self.say(&gpadl(relid, handle, 8, 8)).unwrap();
        self.root.gpadl_accepted(device, GpadlId(handle), true);
        self.heard();
    }

    fn say(&mut self, message: &[u8]) -> Result<(), GuestError> {
        let connection = if self.version < Version::V5_0 { MESSAGE_CONNECTION } else { CONTACT_CONNECTION };
        self.root.message(connection, message)
    }

    /// All actions since the last call, written short.
    fn heard(&mut self) -> Vec<String> {
        while let Some(action) = self.root.next_action() {
            self.said.push(short(&action));
        }
        std::mem::take(&mut self.said)
    }
}

fn short(action: &Action) -> String {
    let ok = |status: u32| if status == 0 { "ok" } else { "no" };
    match action {
        Action::Post { payload, .. } => match HostMessage::parse(payload).unwrap() {
            HostMessage::OfferChannel(m) => format!("offer {}.{}", m.relid, m.subchannel),
            HostMessage::RescindChannelOffer(m) => format!("rescind {}", m.relid),
            HostMessage::AllOffersDelivered => "offers end".into(),
            HostMessage::OpenChannelResult(m) => format!("opened {} {}", m.relid, ok(m.status.get())),
            HostMessage::GpadlCreated(m) => format!("created {:#x} {}", m.gpadl, ok(m.status.get())),
            HostMessage::GpadlTorndown(m) => format!("torndown {:#x}", m.gpadl),
            HostMessage::VersionResponse(m) => {
                format!("version {}", if m.supported == 1 { "ok" } else { "no" })
            }
            HostMessage::UnloadResponse => "unloaded".into(),
            HostMessage::TlConnectResult(m) => format!("socket {:#x}", m.status.get()),
            HostMessage::ModifyChannelResponse(m) => format!("modified {} {}", m.relid, ok(m.status.get())),
        },
        Action::Gpadl { gpadl, pfns, .. } => format!("GPADL {:#x} {}", gpadl.0, pfns.len()),
        Action::GpadlTeardown { gpadl, .. } => format!("TEARDOWN {:#x}", gpadl.0),
        Action::Open { channel, gpadl, .. } => format!("OPEN {} {:#x}", channel.index, gpadl.0),
        Action::Close { channel } => format!("CLOSE {}", channel.index),
        Action::Modify { channel, vp } => format!("MODIFY {} {vp}", channel.index),
        Action::Reset => "RESET".into(),
        Action::Gone { .. } => "GONE".into(),
    }
}
