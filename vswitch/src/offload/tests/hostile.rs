//! Metadata and frames that lie.

use std::fs::File;
use std::io::BufReader;
use std::path::PathBuf;

use vmq::frame::MAX_FRAME;

use super::*;
use crate::parse::{Headers, L3, L4};
use crate::pcap::Reader;

/// The verdict of [`check()`] on one frame.
fn checked(given: &Given) -> Result<(), DropReason> {
    let mut store = FrameStore::default();
    let mut burst = Burst::new(&mut store);
    push_cut(&mut burst, &given.bytes, &given.cuts, given.offload);
    check(&burst, &burst.frames()[0])
}

/// Translates one frame with whatever offload, checked or not; says what came out of it.
fn survive(given: &Given, want: &Want) -> Vec<Got> {
    let verdict = checked(given);
    let (got, dropped) = translate(std::slice::from_ref(given), want);
    for got in &got {
        assert!(want.accepts.covers(&got.offload));
    }
    if got.is_empty() {
        assert_eq!(dropped.len(), 1);
    } else {
        assert_eq!(dropped, []);
    }
    if let Err(reason) = verdict {
        assert_eq!(reason, DropReason::BadOffload);
    } else {
        // What passed the check is refused for its length alone.
        assert!(dropped.iter().all(|reason| *reason == DropReason::EgressMtu), "{given:02x?}");
    }
    got
}

fn any_offload() -> impl Strategy<Value = Offload> {
    let number = || prop_oneof![0u16..80, any::<u16>()];
    let checksum = prop_oneof![
        1 => Just(Checksum::Unknown),
        1 => Just(Checksum::Valid),
        6 => (number(), number()).prop_map(|(start, offset)| Checksum::Partial { start, offset }),
        6 => (prop_oneof![Just(34u16), Just(54), Just(38), Just(58)], prop_oneof![Just(16u16), Just(6)])
            .prop_map(|(start, offset)| Checksum::Partial { start, offset }),
    ];
    let kind = prop_oneof![Just(GsoKind::Tcp4), Just(GsoKind::Tcp6), Just(GsoKind::Udp)];
    let gso = proptest::option::of((kind, prop_oneof![any::<u16>(), 0u16..2000], any::<bool>()))
        .prop_map(|gso| gso.map(|(kind, size, ecn)| Gso { kind, size, ecn }));
    (checksum, gso).prop_map(|(checksum, gso)| Offload { checksum, gso })
}

fn any_want() -> impl Strategy<Value = Want> {
    let tag = prop_oneof![
        Just(TagForm::AsIs),
        Just(TagForm::Access),
        (0u16..4096).prop_map(|native| TagForm::Trunk { native })
    ];
    (0..=Accepts::all().bits(), any::<bool>(), prop_oneof![Just(1514u32), Just(u32::MAX), any::<u32>()], tag)
        .prop_map(|(bits, coalesce, max_frame, tag)| Want {
            accepts: Accepts::from_bits_truncate(bits),
            coalesce,
            max_frame,
            tag,
        })
}

fn any_frame() -> impl Strategy<Value = Vec<u8>> {
    let protocol = prop_oneof![Just(Transport::Tcp), Just(Transport::Udp)];
    let tag = proptest::option::of(any::<u16>());
    let change = proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 0..3);
    let built =
        (any::<bool>(), protocol, tag, 0usize..9000, change).prop_map(|(v6, protocol, tag, len, changes)| {
            let mut bytes = Builder { tag, ..Builder::new(v6, protocol) }.build(len);
            let end = bytes.len().min(80);
            for (at, value) in changes {
                bytes[at.index(end)] = value;
            }
            bytes
        });
    prop_oneof![4 => built, 1 => proptest::collection::vec(any::<u8>(), 14..400)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_metadata_on_any_frame_is_refused_or_translated(
        bytes in any_frame(),
        offload in any_offload(),
        vlan in proptest::option::of(0u16..4096),
        cuts in proptest::collection::vec(any::<usize>(), 0..8),
        want in any_want(),
    ) {
        survive(&Given { bytes, offload, vlan, cuts }, &want);
    }

    #[test]
    fn large_frame_that_passes_the_check_becomes_valid_segments(
        bytes in any_frame(),
        size in any::<u16>(),
        cuts in proptest::collection::vec(any::<usize>(), 0..8),
    ) {
        let headers = Headers::parse(&bytes, bytes.len());
        let Some(given) = enlarged(bytes, cuts, &headers, size) else { return Ok(()) };
        if checked(&given).is_err() {
            return Ok(());
        }
        let want = Want { accepts: Accepts::empty(), max_frame: MAX_FRAME, ..EVERYTHING };
        let got = survive(&given, &want);
        // With options the pseudo-header's sum is the sender's word.
        let bare = headers.l4_offset - headers.l3_offset == if headers.l3 == L3::Ipv4 { 20 } else { 40 };
        if bare {
            let seen: Vec<u8> = got.iter().flat_map(|got| got.verified().payload).collect();
            let header_len = usize::from(headers.headers_len().unwrap());
            prop_assert_eq!(seen, &given.bytes[header_len..]);
        }
    }

    #[test]
    fn random_frames_to_a_coalescing_port_lose_nothing(
        frames in proptest::collection::vec((any_frame(), any_offload()), 1..20),
        want in any_want(),
    ) {
        let given: Vec<Given> = frames.into_iter().map(|(bytes, offload)| Given::new(bytes, offload)).collect();
        let want = Want { coalesce: true, ..want };
        let (_, dropped) = translate(&given, &want);
        prop_assert!(dropped.len() <= given.len());
    }
}

/// The frame with a matching request to segment it, if it has a transport header.
fn enlarged(bytes: Vec<u8>, cuts: Vec<usize>, headers: &Headers, size: u16) -> Option<Given> {
    let (kind, offset) = match (headers.l3, headers.l4) {
        (L3::Ipv4, L4::Tcp) => (GsoKind::Tcp4, 16),
        (L3::Ipv6, L4::Tcp) => (GsoKind::Tcp6, 16),
        (_, L4::Udp) => (GsoKind::Udp, 6),
        _ => return None,
    };
    let offload = Offload {
        checksum: Checksum::Partial { start: headers.l4_offset, offset },
        gso: Some(Gso { kind, size, ecn: false }),
    };
    Some(Given { bytes, offload, vlan: None, cuts })
}

/// The frames of a capture from the set of hostile ones, as far as a burst takes them.
fn capture(name: &str) -> Vec<Vec<u8>> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared/pcaps/hostile").join(name);
    let Ok(file) = File::open(&path) else {
        eprintln!("{} is not there: skipped", path.display());
        return vec![];
    };
    let mut reader = Reader::open(BufReader::new(file)).unwrap();
    let mut frames = vec![];
    while let Ok(Some(record)) = reader.next() {
        // Longer ones no queue takes in.
        if record.data.len() >= 14 && record.data.len() <= MAX_FRAME as usize {
            frames.push(record.data.to_vec());
        }
    }
    frames
}

/// Every frame of the capture, as it is and with a request to segment it, in every combination of features.
fn replay(name: &str) {
    for bytes in capture(name) {
        let headers = Headers::parse(&bytes, bytes.len());
        for bits in 0..=Accepts::all().bits() {
            let accepts = Accepts::from_bits_truncate(bits);
            let want = Want { accepts, max_frame: MAX_FRAME, ..MERGING };
            let plain = Given::new(bytes.clone(), Offload::default());
            let got = survive(&plain, &want);
            assert_eq!(got.len(), 1);
            assert_eq!(got[0].bytes, bytes);
            for size in [100, 1448, 9000, u16::MAX] {
                let Some(given) = enlarged(bytes.clone(), vec![], &headers, size) else { continue };
                let fits = checked(&given).is_ok();
                let got = survive(&given, &want);
                if fits && !accepts.covers(&given.offload) {
                    let seen: Vec<u8> = got.iter().flat_map(|got| got.verified().payload).collect();
                    assert_eq!(seen, bytes[usize::from(headers.headers_len().unwrap())..], "{name}");
                }
            }
        }
    }
}

const MERGING: Want = Want { coalesce: true, ..EVERYTHING };

macro_rules! captures {
    ($($test:ident => $file:literal,)+) => {
        $(#[test]
        fn $test() {
            replay($file);
        })+
    };
}

captures! {
    gso_ipv4_is_segmented_or_refused => "gso-ipv4.pcap",
    gso_ipv6_is_segmented_or_refused => "gso-ipv6.pcap",
    gso_ipv4_geneve_ipv4_is_segmented_or_refused => "gso-ipv4-geneve-ipv4.pcap",
    gso_ipv4_geneve_ipv6_is_segmented_or_refused => "gso-ipv4-geneve-ipv6.pcap",
    gso_ipv4_vxlan_ipv6_is_segmented_or_refused => "gso-ipv4-vxlan-ipv6.pcap",
    gso_ipv6_vxlan_ipv4_is_segmented_or_refused => "gso-ipv6-vxlan-ipv4.pcap",
    gso_ipv6_vxlan_ipv6_is_segmented_or_refused => "gso-ipv6-vxlan-ipv6.pcap",
    bigtcp_ipv4_geneve_ipv4_is_segmented_or_refused => "bigtcp-ipv4-geneve-ipv4.pcap",
    bigtcp_ipv4_geneve_ipv6_is_segmented_or_refused => "bigtcp-ipv4-geneve-ipv6.pcap",
    bigtcp_ipv4_vxlan_ipv4_is_segmented_or_refused => "bigtcp-ipv4-vxlan-ipv4.pcap",
    bigtcp_ipv4_vxlan_ipv6_is_segmented_or_refused => "bigtcp-ipv4-vxlan-ipv6.pcap",
    bigtcp_ipv6_is_segmented_or_refused => "bigtcp-ipv6.pcap",
    bigtcp_ipv6_geneve_ipv4_is_segmented_or_refused => "bigtcp-ipv6-geneve-ipv4.pcap",
    bigtcp_ipv6_geneve_ipv6_is_segmented_or_refused => "bigtcp-ipv6-geneve-ipv6.pcap",
    bigtcp_ipv6_vxlan_ipv6_is_segmented_or_refused => "bigtcp-ipv6-vxlan-ipv6.pcap",
}
