use std::net::Ipv4Addr;
use std::net::Ipv6Addr;

use proptest::prelude::*;

use super::*;

/// Microsoft's RSS verification suite, IPv4: source, destination, hash by addresses, hash by addresses and ports.
const V4_VECTORS: [(&str, u16, &str, u16, u32, u32); 5] = [
    ("66.9.149.187", 2794, "161.142.100.80", 1766, 0x323e_8fc2, 0x51cc_c178),
    ("199.92.111.2", 14230, "65.69.140.83", 4739, 0xd718_262a, 0xc626_b0ea),
    ("24.19.198.95", 12898, "12.22.207.184", 38024, 0xd2d0_a5de, 0x5c2b_394a),
    ("38.27.205.30", 48228, "209.142.163.6", 2217, 0x8298_9176, 0xafc7_327f),
    ("153.39.163.191", 44251, "202.188.127.2", 1303, 0x5d18_09c5, 0x10e8_28a2),
];

/// The same suite, IPv6.
const V6_VECTORS: [(&str, u16, &str, u16, u32, u32); 3] = [
    ("3ffe:2501:200:1fff::7", 2794, "3ffe:2501:200:3::1", 1766, 0x2cc1_8cd5, 0x4020_7d3d),
    ("3ffe:501:8::260:97ff:fe40:efab", 14230, "ff02::1", 4739, 0x0f0c_461c, 0xdde5_1bbf),
    (
        "3ffe:1900:4545:3:200:f8ff:fe21:67cf",
        44251,
        "fe80::200:f8ff:fe21:67cf",
        38024,
        0x4b61_e985,
        0x02d1_feef,
    ),
];

/// The definition, bit by bit: for each set bit of the input, XOR the key's leftmost 32 bits, then shift the key left.
fn reference(key: &[u8], input: &[u8]) -> u32 {
    let key_bit = |i: usize| u32::from(key[i / 8] >> (7 - i % 8) & 1);
    let mut hash = 0;
    for bit in 0..input.len() * 8 {
        if input[bit / 8] >> (7 - bit % 8) & 1 == 1 {
            hash ^= (0..32).fold(0, |window, i| window << 1 | key_bit(bit + i));
        }
    }
    hash
}

#[test]
fn published_ipv4_vectors_pass() {
    let key = ToeplitzKey::default();
    for (src, src_port, dst, dst_port, addresses, ports) in V4_VECTORS {
        let src = src.parse::<Ipv4Addr>().unwrap().octets();
        let dst = dst.parse::<Ipv4Addr>().unwrap().octets();
        assert_eq!(key.hash_v4(src, dst), addresses);
        assert_eq!(key.hash_v4_ports(src, dst, src_port, dst_port), ports);
    }
}

#[test]
fn published_ipv6_vectors_pass() {
    let key = ToeplitzKey::default();
    for (src, src_port, dst, dst_port, addresses, ports) in V6_VECTORS {
        let src = src.parse::<Ipv6Addr>().unwrap().octets();
        let dst = dst.parse::<Ipv6Addr>().unwrap().octets();
        assert_eq!(key.hash_v6(src, dst), addresses);
        assert_eq!(key.hash_v6_ports(src, dst, src_port, dst_port), ports);
    }
}

#[test]
fn key_of_wrong_length_is_refused() {
    for len in [0, 1, 16, 39, 53, 4096] {
        assert_eq!(ToeplitzKey::new(&vec![1; len]), Err(RssError::KeyLength(len)));
    }
    assert_eq!(ToeplitzKey::new(&[7; 52]).unwrap().bytes(), [7; 52]);
}

/// CVE-2024-6505: a guest's table names queues that do not exist.
#[test]
fn indirection_entry_at_or_above_queue_count_is_refused() {
    assert_eq!(
        IndirectionTable::new(&[0, 1, 2, 3], 3),
        Err(RssError::NoSuchQueue { index: 3, queue: 3, queues: 3 })
    );
    assert_eq!(
        IndirectionTable::new(&[u16::MAX], 4),
        Err(RssError::NoSuchQueue { index: 0, queue: u16::MAX, queues: 4 })
    );
}

/// CVE-2024-6505: a table of no entries.
#[test]
fn indirection_table_of_odd_size_is_refused() {
    for len in [0, 3, 127, 513, 1024] {
        assert_eq!(IndirectionTable::new(&vec![0; len], 1), Err(RssError::TableLength(len)));
    }
    assert_eq!(IndirectionTable::new(&[0], 0), Err(RssError::NoQueues));
    assert_eq!(IndirectionTable::in_turn(&[]), Err(RssError::NoQueues));
}

/// CVE-2024-6505: the queue count shrinks after the table was set.
#[test]
fn entries_of_queues_that_are_gone_are_folded_and_the_others_stay() {
    let table = IndirectionTable::new(&[0, 1, 2, 3, 4, 5, 6, 7], 8).unwrap();
    let fewer = table.within(&[1, 3, 6], &[1, 6]).unwrap();
    assert_eq!(fewer.entries(), [1, 1, 1, 3, 1, 6, 6, 6]);
    assert!((0..=u32::from(u16::MAX)).all(|hash| [1, 3, 6].contains(&fewer.queue(hash))));
    assert_eq!(table.within(&[1], &[]), Err(RssError::NoQueues));
}

#[test]
fn table_that_nobody_asked_for_names_the_queues_in_turn() {
    let table = IndirectionTable::in_turn(&[1, 4, 7]).unwrap();
    assert_eq!((table.entries().len(), &table.entries()[..4]), (128, &[1, 4, 7, 1][..]));
    assert_eq!(table.queue(128), 1);
}

#[test]
fn default_key_is_expanded_once() {
    assert!(Arc::ptr_eq(&ToeplitzKey::default().table, &ToeplitzKey::default().table));
}

#[test]
fn transport_without_its_hash_type_falls_back_to_addresses_and_says_so() {
    let ports = Some(Ports { transport: Transport::Udp, src: 1, dst: 2 });
    let udp = Flow::V4 { src: [10, 0, 0, 1], dst: [10, 0, 0, 2], ports };
    let fragment = Flow::V4 { src: [10, 0, 0, 1], dst: [10, 0, 0, 2], ports: None };
    let table = IndirectionTable::in_turn(&[0, 1, 2, 3]).unwrap();
    let mut rss = Rss { key: ToeplitzKey::default(), table, types: HashTypes::all() };
    assert_ne!(rss.hash(&udp), rss.hash(&fragment));
    assert_eq!(rss.hash(&udp).unwrap().1, HashTypes::UDP_V4);
    rss.types = HashTypes::IPV4 | HashTypes::TCP_V4;
    assert_eq!(rss.hash(&udp), rss.hash(&fragment));
    assert_eq!(rss.hash(&udp).unwrap().1, HashTypes::IPV4);
    rss.types = HashTypes::TCP_V4;
    assert_eq!(rss.hash(&udp), None);
    assert_eq!(rss.hash(&Flow::Other), None);
}

proptest! {
    #[test]
    fn hashes_equal_the_bitwise_definition(
        key in proptest::collection::vec(any::<u8>(), MIN_KEY_LEN..=MAX_KEY_LEN),
        src in any::<[u8; 16]>(),
        dst in any::<[u8; 16]>(),
        ports in any::<[u16; 2]>(),
    ) {
        let toeplitz = ToeplitzKey::new(&key).unwrap();
        let port_bytes = [ports[0].to_be_bytes(), ports[1].to_be_bytes()].concat();
        let v6 = [src, dst].concat();
        prop_assert_eq!(toeplitz.hash_v6(src, dst), reference(&key, &v6));
        prop_assert_eq!(
            toeplitz.hash_v6_ports(src, dst, ports[0], ports[1]),
            reference(&key, &[v6, port_bytes.clone()].concat())
        );
        let (src, dst) = ([src[0], src[1], src[2], src[3]], [dst[0], dst[1], dst[2], dst[3]]);
        let v4 = [src, dst].concat();
        prop_assert_eq!(toeplitz.hash_v4(src, dst), reference(&key, &v4));
        prop_assert_eq!(
            toeplitz.hash_v4_ports(src, dst, ports[0], ports[1]),
            reference(&key, &[v4, port_bytes].concat())
        );
    }

    #[test]
    fn every_hash_picks_the_masked_entry_of_an_existing_queue(
        bits in 0usize..=9,
        queues in 1u16..=300,
        seed in any::<u64>(),
        hash in any::<u32>(),
    ) {
        let entries: Vec<u16> = (0..1u64 << bits)
            .map(|i| u16::try_from((seed ^ i).wrapping_mul(0x9e37_79b9_7f4a_7c15) % u64::from(queues)).unwrap())
            .collect();
        let table = IndirectionTable::new(&entries, queues).unwrap();
        prop_assert_eq!(table.entries(), entries.as_slice());
        prop_assert_eq!(table.queue(hash), entries[hash as usize & (entries.len() - 1)]);
    }
}
