//! Large sends, coalesced segments, checksums and receive-side scaling.

use std::collections::BTreeSet;

use smoltcp::wire::{Ipv4Packet, TcpPacket};
use vswitch::offload::checksum;

use super::*;
use crate::protocol::packet::{Lso, RxChecksums, TxChecksum, TxChecksums};

const HEADERS: usize = 54;

/// A TCP segment over IPv4 as Linux leaves it for a large send: lengths and IP checksum 0, pseudo-header without length.
fn large(to: u8, from: u8, port: u16, payload: usize) -> Vec<u8> {
    let mut frame = [address(to).0, address(from).0].concat();
    frame.extend([8, 0, 0x45, 0, 0, 0, 0x12, 0x34, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, from, 10, 0, 0, to]);
    frame.extend(port.to_be_bytes());
    frame.extend([0, 80, 0, 0, 1, 0, 0, 0, 2, 0, 0x50, 0x18, 1, 0, 0, 0, 0, 0]);
    let sum = checksum::pseudo_v4([10, 0, 0, from], [10, 0, 0, to], 6, 0);
    frame[50..52].copy_from_slice(&checksum::fold(sum).to_be_bytes());
    frame.extend(pattern(payload));
    frame
}

/// A whole segment whose checksum is left to the host.
fn partial(to: u8, from: u8, port: u16, payload: usize) -> Vec<u8> {
    let mut frame = large(to, from, port, payload);
    let len = u16::try_from(frame.len() - 14).unwrap();
    frame[16..18].copy_from_slice(&len.to_be_bytes());
    let sum = checksum::sum(&frame[14..34], 0);
    frame[24..26].copy_from_slice(&checksum::finish(sum).to_be_bytes());
    let sum = checksum::pseudo_v4([10, 0, 0, from], [10, 0, 0, to], 6, u32::from(len) - 20);
    frame[50..52].copy_from_slice(&checksum::fold(sum).to_be_bytes());
    frame
}

const LSO: Lso = Lso { mss: 1448, tcp_offset: 34, ipv6: false };
const TCP: TxChecksum = TxChecksum { what: TxChecksums::IPV4.union(TxChecksums::TCP), transport_offset: 34 };

/// The payload of a segment whose headers are right.
fn payload(frame: &[u8], verify_tcp: bool) -> (u32, Vec<u8>) {
    let ip = Ipv4Packet::new_checked(&frame[14..]).unwrap();
    assert!(ip.verify_checksum());
    assert_eq!(usize::from(ip.total_len()), frame.len() - 14);
    let tcp = TcpPacket::new_checked(ip.payload()).unwrap();
    if verify_tcp {
        assert!(tcp.verify_checksum(&ip.src_addr().into(), &ip.dst_addr().into()));
    }
    (u32::from_be_bytes(frame[38..42].try_into().unwrap()), tcp.payload().to_vec())
}

#[test]
fn large_send_arrives_whole_at_a_guest_that_coalesces() {
    let (_rig, mut one, mut two) = two(Config::default(), Config::default());
    let vlan = crate::protocol::packet::Vlan { id: 7, priority: 3, dei: false };
    for (len, tag) in [(1449, None), (5000, None), (62_000, None), (62_000, Some(vlan))] {
        for form in [Form::Usual, Form::Direct, Form::Partial] {
            let sent = large(2, 1, 4000, len);
            let mut transmit = Transmit { form, ..Transmit::default() }.large(LSO);
            transmit.header.vlan = tag;
            assert!(one.send(&sent, &transmit).unwrap());
            one.flush();
            let received = next(&mut two, 1);
            assert_eq!(payload(&received.frame, false).1, sent[HEADERS..], "{len} {form:?}");
            assert_eq!((received.vlan, received.checksums), (tag, RxChecksums::TCP_OK));
            assert_eq!(received.parts, received.frame.len().div_ceil(4128).max(1));
        }
    }
}

#[test]
fn large_send_is_segmented_for_a_guest_that_does_not_coalesce() {
    let (_rig, mut one, mut two) = two(Config::default(), Config { rsc: false, ..Config::default() });
    for form in [Form::Usual, Form::Direct] {
        let sent = large(2, 1, 4000, 40_000);
        one.send(&sent, &Transmit { form, ..Transmit::default() }.large(LSO)).unwrap();
        one.flush();
        let mut whole = Vec::new();
        while whole.len() < 40_000 {
            let (sequence, data) = payload(&next(&mut two, 1).frame, true);
            assert!(data.len() <= 1448);
            assert_eq!(sequence as usize, 256 + whole.len());
            whole.extend(data);
        }
        assert!(whole == sent[HEADERS..]);
    }
}

#[test]
fn checksum_left_to_the_host_is_right_or_vouched_for() {
    let (_rig, mut one, mut two) = two(Config::default(), Config { rsc: false, ..Config::default() });
    one.send(&partial(2, 1, 9, 333), &Transmit::default().checksum(TCP)).unwrap();
    // The transport header is looked for if the guest does not say where it is.
    let search = TxChecksum { transport_offset: 0, ..TCP };
    one.send(&partial(2, 1, 9, 334), &Transmit::default().checksum(search)).unwrap();
    one.flush();
    assert_eq!(payload(&next(&mut two, 1).frame, true).1.len(), 333);
    assert_eq!(payload(&next(&mut two, 1).frame, true).1.len(), 334);
    two.send(&partial(1, 2, 9, 444), &Transmit::default().checksum(TCP)).unwrap();
    two.flush();
    let received = next(&mut one, 2);
    assert_eq!(received.checksums, RxChecksums::TCP_OK);
}

/// As a guest sees it that does not believe the host, and as every program on it that reads whole frames.
#[test]
fn checksum_left_to_the_host_is_right_for_a_guest_that_coalesces() {
    let (_rig, mut one, mut two) = two(Config::default(), Config::default());
    let tag = crate::protocol::packet::Vlan { id: 7, priority: 3, dei: false };
    // Short of the private head, across it, odd, longer than what is summed at once; where pieces of memory end in between.
    for len in [0, 1, 2, 9, 10, 11, 333, 334, 1445, 1446] {
        for form in [Form::Usual, Form::Direct, Form::Partial] {
            for vlan in [None, Some(tag)] {
                let mut transmit = Transmit { form, ..Transmit::default() }.checksum(TCP);
                transmit.header.vlan = vlan;
                assert!(one.send(&partial(2, 1, 9, len), &transmit).unwrap());
                one.flush();
                let received = next(&mut two, 1);
                assert_eq!(payload(&received.frame, true).1, pattern(len), "{len} {form:?} {vlan:?}");
                assert_eq!((received.vlan, received.checksums), (vlan, RxChecksums::TCP_OK));
            }
        }
    }
}

#[test]
fn checksum_of_a_long_frame_is_right() {
    let config = Config { mtu: 9000, ..Config::default() };
    let (_rig, mut one, mut two) = two(config.clone(), config);
    for len in [4000, 8191, 8946] {
        one.send(&partial(2, 1, 9, len), &Transmit::default().checksum(TCP)).unwrap();
        one.flush();
        assert_eq!(payload(&next(&mut two, 1).frame, true).1, pattern(len));
    }
}

#[test]
fn udp_checksum_left_to_the_host_is_never_zero() {
    let (_rig, mut one, mut two) = two(Config::default(), Config::default());
    let udp = TxChecksum { what: TxChecksums::UDP, transport_offset: 34 };
    let (from, to) = ([10, 0, 0, 1], [10, 0, 0, 2]);
    let mut zeroes = 0;
    for word in 0..=u16::MAX {
        let mut frame = [address(2).0, address(1).0].concat();
        frame.extend([8, 0, 0x45, 0, 0, 30, 0, 1, 0x40, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        frame.extend([0x10, 0, 0, 80, 0, 10, 0, 0]);
        frame.extend(word.to_be_bytes());
        let pseudo = checksum::pseudo_v4(from, to, 17, 10);
        let field = checksum::finish(checksum::sum(&frame[34..], pseudo));
        frame[40..42].copy_from_slice(&checksum::fold(pseudo).to_be_bytes());
        // All of them would take long; the one whose sum is all ones is among these.
        if field != 0 && word % 1000 != 0 {
            continue;
        }
        zeroes += usize::from(field == 0);
        one.send(&frame, &Transmit::default().checksum(udp)).unwrap();
        one.flush();
        let received = next(&mut two, 1);
        let expected = if field == 0 { 0xffff } else { field };
        assert_eq!(received.frame[40..42], expected.to_be_bytes(), "{word}");
        assert_eq!(received.checksums, RxChecksums::UDP_OK);
    }
    assert_eq!(zeroes, 1);
}

#[test]
fn flows_spread_over_channels_and_each_keeps_its_own() {
    let config = Config { queues: 4, ..Config::default() };
    let (_rig, mut one, mut two) = two(config.clone(), config);
    assert_eq!(two.queues(), 4);
    let rss = vmq::rss::ToeplitzKey::default();
    let mut used = BTreeSet::new();
    for round in 0..3 {
        for port in 1000..1040u16 {
            let queue = usize::from(port) % 4;
            let mut transmit = Transmit { queue, ..Transmit::default() }.checksum(TCP);
            // What the sender says its hash is has no say.
            transmit.header.hash = Some(round).filter(|_| round > 0);
            one.send(&partial(2, 1, port, 100), &transmit).unwrap();
            one.flush();
            let received = next(&mut two, 1);
            let hash = rss.hash_v4_ports([10, 0, 0, 1], [10, 0, 0, 2], port, 80);
            assert_eq!(received.hash, Some((hash, oid::HASH_TOEPLITZ | oid::HASH_TCP_IPV4)), "{round}");
            assert_eq!(received.queue, hash as usize % 4);
            used.insert(received.queue);
        }
    }
    assert_eq!(used.len(), 4);
}

#[test]
fn hash_of_udp_is_shown_as_what_it_is_by_addresses_unless_ports_were_asked_for() {
    let config = Config { queues: 4, ..Config::default() };
    let (_rig, mut one, mut two) = two(config.clone(), config);
    let key = vmq::rss::ToeplitzKey::default();
    for (protocol, hash, kind) in [
        (6, key.hash_v4_ports([10, 0, 0, 1], [10, 0, 0, 2], 7, 80), oid::HASH_TCP_IPV4),
        (17, key.hash_v4([10, 0, 0, 1], [10, 0, 0, 2]), oid::HASH_IPV4),
    ] {
        let mut frame = life::datagram(2, 1, 7);
        frame[23] = protocol;
        one.send(&frame, &Transmit::default()).unwrap();
        one.flush();
        let received = next(&mut two, 1);
        assert_eq!(received.hash, Some((hash, oid::HASH_TOEPLITZ | kind)));
        assert_eq!(received.queue, hash as usize % 4);
    }
}
