//! A guest that says what Linux says.

use vmq::Mac;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{Immutable, IntoBytes};

use crate::control::{Buffer, Effect, Effects, NicConfig, Nvsp};
use crate::protocol::nvsp::{self, Kind};
use crate::protocol::oid::Oid;
use crate::protocol::rndis;

pub(super) struct Guest {
    pub(super) nic: Nvsp,
}

pub(super) fn config() -> NicConfig {
    NicConfig {
        mac: Mac([2, 0, 0x5e, 0x10, 0, 1]),
        mtu: 1500,
        queues: 4,
        offloads: true,
        rsc: true,
        link_mbps: 10_000,
        name: "eth".into(),
        spoofing: false,
    }
}

pub(super) fn buffer(gpadl: u32) -> nvsp::SendBuffer {
    nvsp::SendBuffer { gpadl: U32::new(gpadl), id: U16::new(0xcafe) }
}

/// The completion among `effects`.
pub(super) fn completion(effects: Effects) -> Vec<u8> {
    let found = effects.into_iter().find_map(|effect| match effect {
        Effect::Complete(message) => Some(message),
        _ => None,
    });
    found.unwrap()
}

/// The RNDIS reply among `effects`.
pub(super) fn reply(effects: Effects) -> Vec<u8> {
    let found = effects.into_iter().find_map(|effect| match effect {
        Effect::RndisReply(message) => Some(message),
        _ => None,
    });
    found.unwrap()
}

/// The first word behind an NVSP message's type.
pub(super) fn status_of(message: &[u8]) -> u32 {
    u32::from_le_bytes(message[4..8].try_into().unwrap())
}

impl Guest {
    pub(super) fn new(config: NicConfig) -> Self {
        Self { nic: Nvsp::new(config) }
    }

    pub(super) fn agreed(config: NicConfig) -> Self {
        let mut guest = Self::new(config);
        completion(guest.init(0x6_0001));
        guest
    }

    pub(super) fn ready(config: NicConfig) -> Self {
        let mut guest = Self::agreed(config);
        guest.ndis_config(1514, 0xac);
        guest.map_buffers();
        guest
    }

    pub(super) fn running(config: NicConfig) -> Self {
        let mut guest = Self::ready(config);
        guest.initialize();
        guest
    }

    pub(super) fn send<T: IntoBytes + Immutable>(&mut self, kind: Kind, fields: &T, wanted: bool) -> Effects {
        self.nic.request(&nvsp::message(kind, fields), wanted).unwrap()
    }

    pub(super) fn init(&mut self, version: u32) -> Effects {
        self.send(Kind::Init, &nvsp::Init { min: U32::new(version), max: U32::new(version) }, true)
    }

    pub(super) fn ndis_config(&mut self, mtu: u32, capabilities: u64) {
        let (mtu, capabilities) = (U32::new(mtu), U64::new(capabilities));
        let config = nvsp::NdisConfig { mtu, reserved: U32::ZERO, capabilities };
        assert_eq!(self.send(Kind::SendNdisConfig, &config, false), vec![]);
    }

    pub(super) fn map_buffers(&mut self) {
        self.send(Kind::SendReceiveBuffer, &buffer(1), true);
        completion(self.nic.mapped(Buffer::Receive, Some(16 << 20)));
        self.send(Kind::SendSendBuffer, &buffer(2), true);
        completion(self.nic.mapped(Buffer::Send, Some(1 << 20)));
    }

    pub(super) fn initialize(&mut self) {
        let answer = reply(self.nic.rndis(&rndis::initialize(2)).unwrap());
        assert_eq!(answer, rndis::initialize_complete(2, 16, 0x2_0000));
    }

    pub(super) fn subchannels(&mut self, count: u32) -> Effects {
        let request = nvsp::SubchannelRequest { operation: U32::new(1), count: U32::new(count) };
        self.send(Kind::Subchannel, &request, true)
    }

    /// SETs `oid` and says with which status.
    pub(super) fn set(&mut self, oid: Oid, info: &[u8]) -> u32 {
        let message = rndis::access(rndis::Kind::Set, 77, oid, info);
        let answer = reply(self.nic.rndis(&message).unwrap());
        assert_eq!((answer.len(), answer[8]), (16, 77));
        u32::from_le_bytes(answer[12..16].try_into().unwrap())
    }

    /// The value of `oid`; panics if there is none.
    pub(super) fn query(&mut self, oid: Oid) -> Vec<u8> {
        self.ask(oid, &[]).unwrap()
    }

    /// The value of `oid`, or the status.
    pub(super) fn ask(&mut self, oid: Oid, info: &[u8]) -> Result<Vec<u8>, u32> {
        let answer = reply(self.nic.rndis(&rndis::access(rndis::Kind::Query, 78, oid, info)).unwrap());
        assert_eq!(answer[8], 78);
        let word = |at: usize| u32::from_le_bytes(answer[at..at + 4].try_into().unwrap());
        assert_eq!(word(4) as usize, answer.len());
        if word(12) != 0 {
            assert_eq!((word(16), word(20), answer.len()), (0, 0, 24));
            return Err(word(12));
        }
        assert_eq!(word(16) as usize, answer.len() - 24);
        Ok(answer[24..].to_vec())
    }
}
