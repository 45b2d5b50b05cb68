//! Every object that there may be, read and written with information of every kind of length: CVE-2021-28476 was an object
//! of a virtual switch, logged by a host that took a number of the guest's for an address.

use tracing_subscriber::filter::LevelFilter;

use super::*;

/// Bytes of the section that an answer goes into.
fn section() -> usize {
    receive_section_bytes(1500, false) as usize
}

/// Has `kind` of `oid` carried out, and checks the answer's form.
fn answered(guest: &mut Guest, kind: rndis::Kind, oid: u32, message: &mut [u8]) {
    // Behind type, length and request.
    message[12..16].copy_from_slice(&oid.to_le_bytes());
    let effects = guest.nic.rndis(message).unwrap();
    let replies = effects.iter().filter_map(|effect| match effect {
        Effect::RndisReply(reply) => Some(reply),
        _ => None,
    });
    let mut count = 0;
    for reply in replies {
        count += 1;
        let word = |at: usize| u32::from_le_bytes(reply[at..at + 4].try_into().unwrap());
        assert_eq!(
            (word(0), word(4) as usize, word(8)),
            (kind.number() | 1 << 31, reply.len(), 9),
            "{oid:#x}"
        );
        assert!(reply.len() <= section(), "{oid:#x}: {} bytes", reply.len());
        match kind {
            rndis::Kind::Set => assert_eq!(reply.len(), 16, "{oid:#x}"),
            _ if word(12) != 0 => assert_eq!((word(16), word(20), reply.len()), (0, 0, 24), "{oid:#x}"),
            _ => {
                let len = reply.len() - 24;
                assert_eq!((word(16) as usize, word(20)), (len, if len == 0 { 0 } else { 16 }), "{oid:#x}");
            }
        }
    }
    assert_eq!(count, 1, "{oid:#x}");
}

#[test]
fn every_object_is_answered_whatever_comes_with_it() {
    // Whatever is logged, at any level, is formatted.
    let sink =
        tracing_subscriber::fmt().with_max_level(LevelFilter::TRACE).with_writer(std::io::sink).finish();
    let informations: [&[u8]; 4] = [&[], &[0xff; 4], &[0x80; 3], &[0x41; 1024]];
    tracing::subscriber::with_default(sink, || {
        let mut guest = Guest::running(config());
        for kind in [rndis::Kind::Query, rndis::Kind::Set] {
            for info in informations {
                let mut message = rndis::access(kind, 9, Oid(0), info);
                for family in [0x0001_0000, 0x0101_0000, 0xfc01_0000, 0xfd01_0000] {
                    (0..=0xffff).for_each(|low| answered(&mut guest, kind, family | low, &mut message));
                }
            }
            // Those that are known, also with headers that look right and lengths around theirs.
            for &oid in Oid::SUPPORTED {
                for header in [0x80, 0x88, 0x89, 0xa7, 0xa8] {
                    for len in 0..=200 {
                        let mut info = vec![0xff; len];
                        let start = [header, 1, 0xff, 0xff];
                        let known = len.min(4);
                        info[..known].copy_from_slice(&start[..known]);
                        answered(&mut guest, kind, oid.0, &mut rndis::access(kind, 9, oid, &info));
                    }
                }
            }
        }
        assert_eq!(guest.nic.phase(), Phase::Running);
    });
}
