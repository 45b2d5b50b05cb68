use std::fs;
use std::path::Path;

use etherparse::LaxSlicedPacket;
use etherparse::LinkExtSlice;
use etherparse::NetSlice;
use etherparse::PacketBuilder;
use etherparse::SlicedPacket;
use etherparse::TransportSlice;
use proptest::prelude::*;

use super::*;

const A4: [u8; 4] = [10, 0, 0, 1];
const B4: [u8; 4] = [10, 0, 0, 2];
const A6: [u8; 16] = [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
const B6: [u8; 16] = [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2];

fn parse(frame: &[u8]) -> Headers {
    Headers::parse(frame, frame.len())
}

/// An Ethernet header with `tags` (EtherType and control information), then `ethertype`, then `payload`.
fn ethernet(tags: &[(u16, u16)], ethertype: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];
    for (tpid, tci) in tags {
        frame.extend(tpid.to_be_bytes());
        frame.extend(tci.to_be_bytes());
    }
    frame.extend(ethertype.to_be_bytes());
    frame.extend(payload);
    frame
}

fn ipv4(total_len: u16, fragment: u16, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x45, 0];
    packet.extend(total_len.to_be_bytes());
    packet.extend([0, 1]);
    packet.extend(fragment.to_be_bytes());
    packet.extend([64, protocol, 0, 0]);
    packet.extend(A4);
    packet.extend(B4);
    packet.extend(payload);
    packet
}

fn ipv6(payload_len: u16, next: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend(payload_len.to_be_bytes());
    packet.extend([next, 64]);
    packet.extend(A6);
    packet.extend(B6);
    packet.extend(payload);
    packet
}

fn udp() -> Vec<u8> {
    vec![0x12, 0x34, 0x00, 0x35, 0, 12, 0, 0, 1, 2, 3, 4]
}

fn udp_frame() -> Vec<u8> {
    ethernet(&[], ethertype::IPV4, &ipv4(32, 0, 17, &udp()))
}

fn udp_ports() -> Ports {
    Ports { transport: Transport::Udp, src: 0x1234, dst: 0x35 }
}

#[test]
fn plain_udp_is_found_with_its_ports() {
    let frame = udp_frame();
    let headers = parse(&frame);
    let expected = Headers {
        l3_offset: 14,
        ethertype: ethertype::IPV4,
        vlan_tags: 0,
        l3: L3::Ipv4,
        l4: L4::Udp,
        fragment: false,
        ip_intact: true,
        ip_len: 32,
        l4_offset: 34,
        l4_header_len: 8,
    };
    assert_eq!(headers, expected);
    assert_eq!(headers.flow(&frame), Flow::V4 { src: A4, dst: B4, ports: Some(udp_ports()) });
    assert_eq!(headers.headers_len(), Some(42));
}

#[test]
fn tcp_with_options_reports_the_whole_header() {
    let mut frame = Vec::new();
    PacketBuilder::ethernet2([2; 6], [4; 6])
        .ipv6(A6, B6, 64)
        .tcp(80, 443, 1, 1000)
        .options_raw(&[1; 12])
        .unwrap()
        .write(&mut frame, b"data")
        .unwrap();
    let headers = parse(&frame);
    assert_eq!((headers.l4, headers.l4_offset, headers.l4_header_len), (L4::Tcp, 54, 32));
    let ports = Some(Ports { transport: Transport::Tcp, src: 80, dst: 443 });
    assert_eq!(headers.flow(&frame), Flow::V6 { src: A6, dst: B6, ports });
}

/// HOSTILE: nested tags 0..64 (flow keys, CVE-2016-2074's class).
#[test]
fn vlan_tags_beyond_two_are_opaque() {
    for count in 0..64 {
        for tpid in [ethertype::VLAN, ethertype::SERVICE_VLAN] {
            let frame = ethernet(&vec![(tpid, 7); count], ethertype::IPV4, &ipv4(32, 0, 17, &udp()));
            let headers = parse(&frame);
            assert_eq!(usize::from(headers.vlan_tags), count.min(2));
            assert_eq!(usize::from(headers.l3_offset), 14 + 4 * count.min(2));
            assert_eq!(headers.vlan_tci(&frame), (count > 0).then_some(7));
            let expected = if count <= 2 { (ethertype::IPV4, L4::Udp) } else { (tpid, L4::None) };
            assert_eq!((headers.ethertype, headers.l4), expected);
        }
    }
}

/// HOSTILE: total_len < header (CVE-2016-10377: IP length underflow in the flow key).
#[test]
fn ip_length_below_its_header_has_no_transport() {
    for total_len in 1..20 {
        let frame = ethernet(&[], ethertype::IPV4, &ipv4(total_len, 0, 17, &udp()));
        let headers = parse(&frame);
        assert_eq!((headers.l3, headers.l4, headers.ip_intact), (L3::Ipv4, L4::None, false));
        assert_eq!(headers.flow(&frame), Flow::V4 { src: A4, dst: B4, ports: None });
    }
    for total_len in 20..24 {
        let frame = ethernet(&[], ethertype::IPV4, &ipv4(total_len, 0, 17, &udp()));
        let headers = parse(&frame);
        assert_eq!((headers.l4, headers.l4_header_len, headers.ports(&frame)), (L4::Udp, 0, None));
    }
}

/// HOSTILE: frame ≫ ip total_len (CVE-2020-35498: over-long padding breaks the flow key).
#[test]
fn padding_after_the_ip_packet_is_no_header() {
    let mut padded = udp_frame();
    padded.resize(9018, 0xff);
    assert_eq!(parse(&padded), parse(&udp_frame()));
    let mut cut = ethernet(&[], ethertype::IPV4, &ipv4(20, 0, 17, &udp()));
    cut.resize(9018, 0xff);
    assert_eq!(parse(&cut).ports(&cut), None);
}

#[test]
fn ip_length_beyond_the_frame_is_cut_to_it() {
    let frame = ethernet(&[], ethertype::IPV4, &ipv4(u16::MAX, 0, 17, &udp()));
    let headers = parse(&frame);
    assert_eq!((headers.ip_len, headers.ip_intact), (32, false));
    assert_eq!(headers.ports(&frame), Some(udp_ports()));
    let frame = ethernet(&[], ethertype::IPV6, &ipv6(u16::MAX, 17, &udp()));
    assert_eq!((parse(&frame).ip_len, parse(&frame).ip_intact), (52, false));
}

#[test]
fn ip_length_of_zero_means_the_rest_of_a_large_frame() {
    let frame = ethernet(&[], ethertype::IPV4, &ipv4(0, 0, 17, &udp()));
    let headers = Headers::parse(&frame, 190_000);
    assert_eq!((headers.ip_len, headers.ip_intact, headers.l4_header_len), (189_986, false, 8));
    let frame = ethernet(&[], ethertype::IPV6, &ipv6(0, 17, &udp()));
    let headers = Headers::parse(&frame, 190_000);
    assert_eq!((headers.ip_len, headers.ip_intact, headers.l4_header_len), (189_986, false, 8));
}

/// HOSTILE 3.11: fragment with ports.
#[test]
fn fragments_have_no_ports() {
    for field in [0x2000, 0x2001, 0x0001, 0x1fff] {
        let frame = ethernet(&[], ethertype::IPV4, &ipv4(32, field, 17, &udp()));
        let headers = parse(&frame);
        assert!(headers.fragment);
        assert_eq!(headers.l4_offset, if field == 0x2000 { 34 } else { 0 });
        assert_eq!(headers.flow(&frame), Flow::V4 { src: A4, dst: B4, ports: None });
    }
    for (field, offset) in [(1, 62), (8, 0), (9, 0)] {
        let fragment = [&[17, 0, 0, field, 0, 0, 0, 1], udp().as_slice()].concat();
        let frame = ethernet(&[], ethertype::IPV6, &ipv6(20, 44, &fragment));
        let headers = parse(&frame);
        assert_eq!((headers.fragment, headers.l4, headers.l4_offset), (true, L4::Udp, offset));
        assert_eq!(headers.flow(&frame), Flow::V6 { src: A6, dst: B6, ports: None });
    }
}

#[test]
fn atomic_fragment_is_a_whole_packet() {
    let fragment = [&[17, 0, 0, 0, 0, 0, 0, 1], udp().as_slice()].concat();
    let frame = ethernet(&[], ethertype::IPV6, &ipv6(20, 44, &fragment));
    assert!(!parse(&frame).fragment);
    assert_eq!(parse(&frame).ports(&frame), Some(udp_ports()));
}

/// HOSTILE 3.11: IPv6 extension header chain 64 deep.
#[test]
fn extension_chain_is_walked_to_eight_headers_and_no_further() {
    for depth in 1..=64_usize {
        let mut payload = Vec::new();
        for left in (0..depth).rev() {
            payload.extend([if left == 0 { 17 } else { 60 }, 0, 1, 4, 0, 0, 0, 0]);
        }
        payload.extend(udp());
        let len = u16::try_from(payload.len()).unwrap();
        let frame = ethernet(&[], ethertype::IPV6, &ipv6(len, 60, &payload));
        let headers = parse(&frame);
        assert_eq!(headers.l4, if depth <= MAX_EXTENSIONS { L4::Udp } else { L4::Other(60) });
        assert_eq!(usize::from(headers.l4_offset), 54 + 8 * depth.min(MAX_EXTENSIONS));
        assert_eq!(headers.ports(&frame), (depth <= MAX_EXTENSIONS).then(udp_ports));
    }
}

#[test]
fn longest_extension_chain_does_not_overflow_the_offset() {
    let mut payload = Vec::new();
    for _ in 0..MAX_EXTENSIONS + 1 {
        payload.extend([43, 255]);
        payload.resize(payload.len() + 2046, 0);
    }
    let len = u16::try_from(payload.len()).unwrap();
    let frame = ethernet(&[(ethertype::VLAN, 1); 2], ethertype::IPV6, &ipv6(len, 43, &payload));
    assert_eq!(parse(&frame).l4, L4::Other(43));
    assert_eq!(parse(&frame).l4_offset, 22 + 40 + 8 * 2048);
}

#[test]
fn extension_beyond_the_packet_ends_the_walk() {
    for (next, len) in [(0, 200), (43, 2), (60, 2), (51, 20), (51, 0)] {
        let frame = ethernet(
            &[],
            ethertype::IPV6,
            &ipv6(20, next, &[&[17, len, 0, 0, 0, 0, 0, 0], &udp()[..]].concat()),
        );
        assert_eq!((parse(&frame).l4, parse(&frame).ports(&frame)), (L4::Other(next), None));
    }
}

#[test]
fn copy_shorter_than_the_frame_shows_what_is_there() {
    let frame = udp_frame();
    let whole = parse(&frame);
    for seen in 0..=frame.len() {
        let bytes = &frame[..seen];
        let headers = Headers::parse(bytes, frame.len());
        assert_eq!(headers.l3_offset, if seen < 14 { 0 } else { 14 });
        assert_eq!(headers.l3, if seen < 34 { L3::None } else { L3::Ipv4 });
        assert_eq!(headers.ports(bytes), (seen >= 38).then(udp_ports));
        assert_eq!(headers == whole, seen >= 42);
    }
}

#[test]
fn frame_length_below_the_copy_bounds_the_parse() {
    let frame = udp_frame();
    assert_eq!(Headers::parse(&frame, 20), parse(&frame[..20]));
    assert_eq!(Headers::parse(&frame, 0), Headers::default());
}

#[test]
fn wrong_version_or_header_length_is_not_ip() {
    for first in [0x00, 0x40, 0x44, 0x55, 0x65] {
        let mut frame = udp_frame();
        frame[14] = first;
        assert_eq!((parse(&frame).l3, parse(&frame).flow(&frame)), (L3::None, Flow::Other));
    }
}

/// Checks `frame` both ways: what etherparse accepts as TCP or UDP we find in the same place, and ports that we report
/// etherparse reads too. Returns whether there was something to compare.
fn agree_with_etherparse(frame: &[u8]) -> bool {
    let headers = parse(frame);
    if let (Some(ports), true) = (headers.ports(frame), headers.l4_header_len != 0) {
        let lax = LaxSlicedPacket::from_ethernet(frame).expect("an Ethernet header was found");
        assert_eq!(lax.transport.as_ref().and_then(transport_ports), Some(ports));
    }
    let Ok(packet) = SlicedPacket::from_ethernet(frame) else { return false };
    let known_tags = packet.link_exts.iter().all(|ext| matches!(ext, LinkExtSlice::Vlan(_)));
    let start = frame.as_ptr() as usize;
    let (Some(transport), Some(net)) = (&packet.transport, &packet.net) else { return false };
    let Some(ports) = transport_ports(transport) else { return false };
    if !known_tags || packet.link_exts.len() > 2 || has_old_service_tag(frame) {
        return false;
    }
    let l3 = 14 + 4 * packet.link_exts.len();
    assert_eq!(usize::from(headers.l3_offset), l3);
    let (payload, flow) = match net {
        NetSlice::Ipv4(ip) => {
            let (src, dst) = (ip.header().source(), ip.header().destination());
            (ip.payload().payload, Flow::V4 { src, dst, ports: Some(ports) })
        }
        NetSlice::Ipv6(ip) => {
            if ip.extensions().clone().into_iter().count() > MAX_EXTENSIONS {
                return false;
            }
            let (src, dst) = (ip.header().source(), ip.header().destination());
            (ip.payload().payload, Flow::V6 { src, dst, ports: Some(ports) })
        }
        NetSlice::Arp(_) => return false,
    };
    let l4 = payload.as_ptr() as usize - start;
    assert_eq!(usize::from(headers.l4_offset), l4);
    assert_eq!(headers.ip_end() as usize, l4 + payload.len());
    let header_len = match transport {
        TransportSlice::Tcp(tcp) => tcp.header_len(),
        _ => 8,
    };
    assert_eq!(usize::from(headers.l4_header_len), header_len);
    assert!(!headers.fragment);
    assert_eq!(headers.flow(frame), flow);
    true
}

/// etherparse also looks through 0x9100, a tag type that predates 802.1ad.
fn has_old_service_tag(frame: &[u8]) -> bool {
    [12, 16, 20].iter().any(|at| frame.get(*at..at + 2) == Some(&[0x91, 0]))
}

fn transport_ports(transport: &TransportSlice<'_>) -> Option<Ports> {
    let (transport, src, dst) = match transport {
        TransportSlice::Tcp(tcp) => (Transport::Tcp, tcp.source_port(), tcp.destination_port()),
        TransportSlice::Udp(udp) => (Transport::Udp, udp.source_port(), udp.destination_port()),
        _ => return None,
    };
    Some(Ports { transport, src, dst })
}

/// The whole frames of a classic pcap file with Ethernet link type; none of any other file.
fn pcap_frames(file: &[u8]) -> Vec<&[u8]> {
    let word = |at: usize| file.get(at..at + 4).and_then(|bytes| <[u8; 4]>::try_from(bytes).ok());
    let read: fn([u8; 4]) -> u32 = match word(0) {
        Some([0xd4, 0xc3, 0xb2, 0xa1] | [0x4d, 0x3c, 0xb2, 0xa1]) => u32::from_le_bytes,
        Some([0xa1, 0xb2, 0xc3, 0xd4] | [0xa1, 0xb2, 0x3c, 0x4d]) => u32::from_be_bytes,
        _ => return Vec::new(),
    };
    let mut frames = Vec::new();
    let mut at = 24;
    while word(20).map(read) == Some(1) {
        let (Some(captured), Some(original)) = (word(at + 8).map(read), word(at + 12).map(read)) else {
            break;
        };
        let Some(frame) = file.get(at + 16..at + 16 + captured as usize) else { break };
        if captured == original {
            frames.push(frame);
        }
        at += 16 + captured as usize;
    }
    frames
}

#[test]
fn all_shared_captures_agree_with_etherparse() {
    let captures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/pcaps");
    let mut compared = usize::from(agree_with_etherparse(&udp_frame()));
    assert_eq!(compared, 1);
    for kind in ["real", "hostile"] {
        let Ok(files) = fs::read_dir(captures.join(kind)) else { continue };
        for file in files {
            let file = fs::read(file.unwrap().path()).unwrap();
            compared += pcap_frames(&file).into_iter().filter(|frame| agree_with_etherparse(frame)).count();
        }
        assert!(compared > 1000, "only {compared} frames compared");
    }
}

/// A well-formed frame: tags, IP version and transport by choice.
fn valid_frame() -> impl Strategy<Value = Vec<u8>> {
    let payload = proptest::collection::vec(any::<u8>(), 0..64);
    let tags =
        proptest::collection::vec(prop_oneof![Just(ethertype::VLAN), Just(ethertype::SERVICE_VLAN)], 0..4);
    (any::<[bool; 3]>(), tags, any::<[u8; 4]>(), 0usize..3, payload).prop_map(
        |([v6, tcp, options], tags, ports, extensions, payload)| {
            let mut segment = ports.to_vec();
            if tcp {
                segment.extend([
                    0,
                    0,
                    0,
                    1,
                    0,
                    0,
                    0,
                    2,
                    if options { 0x80 } else { 0x50 },
                    0x10,
                    1,
                    0,
                    0,
                    0,
                    0,
                    0,
                ]);
                segment.extend(if options { vec![1; 12] } else { Vec::new() });
            } else {
                segment.extend(u16::try_from(8 + payload.len()).unwrap().to_be_bytes());
                segment.extend([0, 0]);
            }
            segment.extend(payload);
            let transport = if tcp { 6 } else { 17 };
            let tags: Vec<_> = tags.into_iter().map(|tpid| (tpid, 5)).collect();
            if !v6 {
                let total = u16::try_from(20 + segment.len()).unwrap();
                return ethernet(&tags, ethertype::IPV4, &ipv4(total, 0x4000, transport, &segment));
            }
            for i in 0..extensions {
                let next = if i == 0 { transport } else { 60 };
                segment = [&[next, 0, 1, 4, 0, 0, 0, 0], segment.as_slice()].concat();
            }
            let len = u16::try_from(segment.len()).unwrap();
            let first = if extensions == 0 { transport } else { 60 };
            ethernet(&tags, ethertype::IPV6, &ipv6(len, first, &segment))
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    #[test]
    fn valid_frames_agree_with_etherparse(frame in valid_frame()) {
        let opaque = parse(&frame).l3 == L3::None && parse(&frame).vlan_tags == MAX_VLAN_TAGS;
        prop_assert_eq!(agree_with_etherparse(&frame), !opaque);
    }

    #[test]
    fn mutated_frames_agree_with_etherparse(
        frame in valid_frame(),
        changes in proptest::collection::vec((0usize..120, any::<u8>()), 0..6),
        padding in 0usize..80,
    ) {
        let mut frame = frame;
        for (at, byte) in changes {
            if let Some(target) = frame.get_mut(at) {
                *target = byte;
            }
        }
        frame.resize(frame.len() + padding, 0);
        agree_with_etherparse(&frame);
    }

    #[test]
    fn random_bytes_never_panic_and_agree(
        mut frame in proptest::collection::vec(any::<u8>(), 0..200),
        ip in proptest::option::of(any::<bool>()),
        frame_len in 0usize..70_000,
    ) {
        if let (Some(v6), true) = (ip, frame.len() > 14) {
            frame[12..14].copy_from_slice(&if v6 { ethertype::IPV6 } else { ethertype::IPV4 }.to_be_bytes());
            frame[14] = if v6 { 0x60 } else { 0x45 };
        }
        agree_with_etherparse(&frame);
        let headers = Headers::parse(&frame, frame_len);
        headers.flow(&frame);
        headers.flow(&[]);
        prop_assert!(headers.l3 == L3::None || headers.ip_end() as usize <= frame_len);
    }

    #[test]
    fn a_shorter_copy_never_changes_what_is_reported(frame in valid_frame(), seen in 0usize..160) {
        let whole = parse(&frame);
        let bytes = frame.get(..seen).unwrap_or(&frame);
        let part = Headers::parse(bytes, frame.len());
        if let Some(ports) = part.ports(bytes) {
            prop_assert_eq!(Some(ports), whole.ports(&frame));
        }
        if part.l4_header_len != 0 {
            prop_assert_eq!(part, whole);
        }
    }
}
