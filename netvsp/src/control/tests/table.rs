//! Every NVSP and every RNDIS message in every state: what the NIC does, cell by cell.

use super::*;

/// What a NIC does with a message, in short.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Does {
    /// Completes with a message of this status.
    Status(u32),
    /// Completes without a message.
    Empty,
    /// Asks for a buffer to be mapped, and completes later.
    Maps,
    /// The guest broke the order.
    Order,
    /// The guest sent the host's message.
    NotARequest,
    /// The version lacks it.
    Version,
    /// A buffer is in use.
    InUse,
}

use Does::{Empty, InUse, Maps, NotARequest, Order, Status as S, Version as V};

/// The states, each as a guest that is in it.
fn states() -> [(&'static str, Guest); 7] {
    let old = {
        let mut guest = Guest::new(config());
        completion(guest.init(2));
        guest
    };
    let mapping = {
        let mut guest = Guest::agreed(config());
        guest.send(Kind::SendReceiveBuffer, &guest::buffer(7), true);
        guest.send(Kind::SendSendBuffer, &guest::buffer(8), true);
        guest
    };
    let halted = {
        let mut guest = Guest::running(config());
        guest.nic.rndis(&rndis::request(rndis::Kind::Halt, 1)).unwrap();
        guest
    };
    [
        ("closed", Guest::new(config())),
        ("version 1", old),
        ("version 6.1", Guest::agreed(config())),
        ("mapping", mapping),
        ("ready", Guest::ready(config())),
        ("running", Guest::running(config())),
        ("halted", halted),
    ]
}

/// A well-formed message of each kind.
fn sample(kind: Kind) -> Vec<u8> {
    let word = U32::new;
    match kind {
        Kind::Init => nvsp::message(kind, &nvsp::Init { min: word(0x6_0001), max: word(0x6_0001) }),
        Kind::SendNdisVersion => nvsp::message(kind, &nvsp::NdisVersion { major: word(6), minor: word(30) }),
        Kind::SendReceiveBuffer | Kind::SendSendBuffer => nvsp::message(kind, &guest::buffer(99)),
        Kind::SendNdisConfig => nvsp::message(
            kind,
            &nvsp::NdisConfig { mtu: word(1514), reserved: word(0), capabilities: U64::new(0xac) },
        ),
        Kind::Subchannel => {
            nvsp::message(kind, &nvsp::SubchannelRequest { operation: word(1), count: word(1) })
        }
        other => nvsp::message(other, &[0u8; 36]),
    }
    .to_vec()
}

fn does(guest: &mut Guest, kind: Kind) -> Does {
    let effects = match guest.nic.request(&sample(kind), true) {
        Ok(effects) => effects,
        Err(Violation::OutOfOrder { kind: named, phase: Phase::Closed }) if named == kind => return Order,
        Err(Violation::NotARequest(named)) if named == kind => return NotARequest,
        Err(Violation::NotInVersion { kind: named, version: Version::V1 }) if named == kind => return V,
        Err(Violation::BufferInUse(named)) if named == kind => return InUse,
        Err(other) => panic!("{kind}: {other:?}"),
    };
    if effects.iter().any(|effect| matches!(effect, Effect::MapReceive { .. } | Effect::MapSend { .. })) {
        return Maps;
    }
    let answer = completion(effects);
    if answer.is_empty() {
        return Empty;
    }
    assert_eq!(answer.len(), 40, "{kind}");
    // INIT_COMPLETE and packet direct have their status elsewhere.
    let at = match kind {
        Kind::Init => 12,
        Kind::PacketDirectApi => 8,
        _ => 4,
    };
    S(u32::from_le_bytes(answer[at..at + 4].try_into().unwrap()))
}

/// Columns: closed, version 1, version 6.1, mapping, ready, running, halted.
fn expected(kind: Kind) -> [Does; 7] {
    match kind {
        Kind::Init => [S(1), S(1), S(1), S(2), S(2), S(2), S(2)],
        Kind::SendNdisVersion => [Order, Empty, Empty, Empty, Empty, Empty, Empty],
        Kind::SendReceiveBuffer | Kind::SendSendBuffer => [Order, Maps, Maps, S(2), S(2), S(2), S(2)],
        Kind::RevokeReceiveBuffer | Kind::RevokeSendBuffer => {
            [Order, Empty, Empty, InUse, Empty, Empty, Empty]
        }
        Kind::SendNdisConfig => [Order, V, Empty, InUse, InUse, InUse, InUse],
        Kind::Subchannel => [Order, S(7), S(2), S(2), S(1), S(1), S(1)],
        Kind::OidQueryEx => {
            let unsupported = S(0xc000_00bb);
            [Order, unsupported, unsupported, unsupported, unsupported, unsupported, unsupported]
        }
        Kind::SendChimneyBuffer
        | Kind::TerminateChimney
        | Kind::SendChimneyPacket
        | Kind::PostChimneyReceive
        | Kind::AllocateReceiveBuffer
        | Kind::SendVmqPacket
        | Kind::AllocateChimneyHandle
        | Kind::PacketDirectApi => [Order, S(7), S(7), S(7), S(7), S(7), S(7)],
        Kind::RevokeChimneyBuffer
        | Kind::ResumeChimneyReceive
        | Kind::FreeReceiveBuffer
        | Kind::SwitchDataPath
        | Kind::PacketDirectBatch => [Order, V, Empty, Empty, Empty, Empty, Empty],
        Kind::InitComplete
        | Kind::SendReceiveBufferComplete
        | Kind::SendSendBufferComplete
        | Kind::SendRndisPacket
        | Kind::SendRndisPacketComplete => {
            [Order, NotARequest, NotARequest, NotARequest, NotARequest, NotARequest, NotARequest]
        }
        // The host's, and not in version 1.
        _ => [Order, V, NotARequest, NotARequest, NotARequest, NotARequest, NotARequest],
    }
}

#[test]
fn every_nvsp_message_in_every_state() {
    for &kind in Kind::ALL {
        for ((name, mut guest), expected) in states().into_iter().zip(expected(kind)) {
            let before = guest.nic.save();
            assert_eq!(does(&mut guest, kind), expected, "{kind} while {name}");
            if matches!(expected, Order | NotARequest | V | InUse) {
                assert_eq!(guest.nic.save(), before, "{kind} while {name} changed the state");
            }
            // And once more: nothing panics, whatever the first did.
            let _ = guest.nic.request(&sample(kind), false);
        }
    }
}

#[test]
fn every_nvsp_message_cut_short_is_refused_or_has_no_fields() {
    for &kind in Kind::ALL {
        for (_, mut guest) in states() {
            for len in 0..4 {
                let violation = guest.nic.request(&sample(kind)[..len], true).unwrap_err();
                assert_eq!(violation, Violation::Nvsp(nvsp::Malformed::NoType(len)));
            }
        }
    }
    let fields = [
        (Kind::Init, 8),
        (Kind::SendNdisVersion, 8),
        (Kind::SendReceiveBuffer, 6),
        (Kind::SendSendBuffer, 6),
        (Kind::SendNdisConfig, 16),
        (Kind::SwitchDataPath, 4),
        (Kind::Subchannel, 8),
    ];
    for (kind, bytes) in fields {
        let mut guest = Guest::agreed(config());
        let short = nvsp::Malformed::Short { kind, len: bytes + 3, needed: bytes + 4 };
        assert_eq!(guest.nic.request(&sample(kind)[..bytes + 3], true), Err(Violation::Nvsp(short)));
    }
    let mut guest = Guest::agreed(config());
    let unknown = Err(Violation::Nvsp(nvsp::Malformed::Unknown(0x8000_0001)));
    assert_eq!(guest.nic.request(&0x8000_0001u32.to_le_bytes(), true), unknown);
}

/// What a NIC does with an RNDIS message: its answer's status, or what else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Says {
    Status(u32),
    Nothing,
    Halts,
    NoBuffer,
    Malformed,
}

fn says(guest: &mut Guest, kind: rndis::Kind) -> Says {
    let message = match kind {
        rndis::Kind::Initialize => rndis::initialize(5),
        rndis::Kind::Query => rndis::access(kind, 5, Oid::GEN_MAXIMUM_FRAME_SIZE, &[]),
        rndis::Kind::Set => rndis::access(kind, 5, Oid::GEN_CURRENT_PACKET_FILTER, &[0x0d, 0, 0, 0]),
        other => rndis::request(other, 5),
    };
    let effects = match guest.nic.rndis(&message) {
        Ok(effects) => effects,
        Err(Violation::NoReceiveBuffer { kind: named, .. }) if named == kind => return Says::NoBuffer,
        Err(Violation::Rndis(rndis::Malformed::Direction(named))) if named == kind => return Says::Malformed,
        Err(other) => panic!("{kind}: {other:?}"),
    };
    match effects.as_slice() {
        [] => return Says::Nothing,
        [Effect::Changed] => return Says::Halts,
        _ => {}
    }
    let answer = reply(effects);
    assert_eq!(answer[..4], (kind.number() | 1 << 31).to_le_bytes());
    let at = if kind == rndis::Kind::Reset { 8 } else { 12 };
    Says::Status(u32::from_le_bytes(answer[at..at + 4].try_into().unwrap()))
}

#[test]
fn every_rndis_message_in_every_state() {
    const FAILED: Says = Says::Status(0xc000_0001);
    const DONE: Says = Says::Status(0);
    for &kind in rndis::Kind::ALL {
        for (name, mut guest) in states() {
            let phase = guest.nic.phase();
            let request = kind.number() & 1 << 31 == 0;
            let expected = match (kind, phase) {
                (rndis::Kind::Packet | rndis::Kind::Indicate, _) => Says::Malformed,
                _ if !request => Says::Malformed,
                (_, Phase::Closed | Phase::Negotiating) => Says::NoBuffer,
                (rndis::Kind::Initialize, _) => DONE,
                (rndis::Kind::Halt, Phase::Ready) => Says::Nothing,
                (rndis::Kind::Halt, Phase::Running) => Says::Halts,
                (_, Phase::Ready) => FAILED,
                (_, Phase::Running) => DONE,
            };
            let before = guest.nic.save();
            assert_eq!(says(&mut guest, kind), expected, "{kind} while {name}");
            if !matches!(expected, DONE | Says::Halts) {
                assert_eq!(guest.nic.save(), before, "{kind} while {name} changed the state");
            }
        }
    }
}

#[test]
fn initialize_and_reset_forget_filter_and_spreading() {
    for message in [rndis::initialize(1), rndis::request(rndis::Kind::Reset, 0)] {
        let mut guest = Guest::running(config());
        guest.set(Oid::GEN_CURRENT_PACKET_FILTER, &[0x0d, 0, 0, 0]);
        let effects = guest.nic.rndis(&message).unwrap();
        assert_eq!(effects[0], Effect::Changed);
        assert_eq!(guest.nic.data_path().filter, PacketFilter::empty());
    }
}
