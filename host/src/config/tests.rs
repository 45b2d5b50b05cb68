//! Configurations, good and bad; each bad one with the very message it gets.

mod ranges;
mod vms;

use std::path::Path;
use std::time::Duration;

use serde_json::json;
use vswitch::spec::{Attachment, Pace, SocketMode, SwitchKind, TapSpec, VlanMode};

use super::*;
use crate::vm::spec::LinkState;

fn read(text: &str) -> Result<Config, ConfigError> {
    parse("switchyard.toml", text, Path::new("/etc/switchyard"), &Machine { cpus: vec![0, 1, 2, 3] })
}

fn refused(text: &str) -> String {
    read(text).expect_err(text).to_string()
}

/// A private switch `lab` with a port `red` on a TAP device; `keys` begin in line 5.
fn with_port(keys: &str) -> String {
    format!(
        "[switch.lab]\ntype = \"private\"\n[switch.lab.port.red]\ntap = {{ name = \"red\", queues = 2 }}\n{keys}\n"
    )
}

#[test]
fn wrong_text_names_line_key_found_and_expected() {
    for (text, expected) in [
        ("[workers\ncpus = [1]", "1: unclosed table, expected `]`"),
        ("[api]\nsocket = \"a\nb\"", "2: invalid basic string, expected `\"`"),
        ("[switch.a]\ntype = \"private\"\n[switch.a]\n", "3: duplicate key"),
        ("[worker]\n", "1: worker: unknown key (did you mean `workers`?)"),
        ("[colour]\n", "1: colour: unknown key, expected workers, api, switch, vm"),
        ("workers = 3\n", "1: workers: found 3, expected a table with the keys cpus, idle, preempt, balance"),
        ("[workers]\ncpu = [1]\n", "2: workers.cpu: unknown key (did you mean `cpus`?)"),
        (
            "[workers]\n\ncpus = [7]\n",
            "3: workers.cpus: processor 7 is not on this machine, expected some of 0-3",
        ),
        (
            "[workers]\ncpus = [1, 1]\n",
            "2: workers.cpus: 1 is listed twice, expected a list of integers from 0 to 8191, or a text such as \"10-20,30\"",
        ),
        (
            "[workers]\ncpus = []\n",
            "2: workers.cpus: the list is empty, expected a list of integers from 0 to 8191",
        ),
        ("[workers]\ncpus = [0,\n  -1]\n", "3: workers.cpus[1]: -1 is out of range, expected 0 to 8191"),
        (
            "[workers]\ncpus = \"3-1\"\n",
            "2: workers.cpus: found \"3-1\", expected a list of integers from 0 to 8191, or a text such as \"10-20,30\"",
        ),
        ("[workers]\nidle = 1.5\n", "2: workers.idle: found 1.5, expected an integer from 0 to 1000000"),
        ("[workers]\nbalance = \"on\"\n", "2: workers.balance: found \"on\", expected true or false"),
        ("[api]\nsocket = \"\"\n", "2: api.socket: found \"\", expected a path"),
        (
            "[api]\nsocket = \"/run/\\u001b[31m\"\n",
            "2: api.socket: \"/run/\\u{1b}[31m\" contains a control character, expected a path",
        ),
        ("switch = []\n", "1: switch: found a list, expected a table of switches by name"),
        (
            "[switch.lab]\n",
            "1: switch.lab.type: is missing, expected \"external\", \"internal\" or \"private\"",
        ),
        (
            "[switch.lab]\ntype = \"privat\"\n",
            "2: switch.lab.type: found \"privat\", expected \"external\", \"internal\" or \"private\" (did you mean `private`?)",
        ),
        (
            "[switch.lab]\ntype = 1979-05-27\n",
            "2: switch.lab.type: found 1979-05-27, expected \"external\", \"internal\" or \"private\"",
        ),
        (
            "[switch.lab]\ntype = \"private\"\naging = 9\n",
            "3: switch.lab.aging: 9 is out of range, expected 10 to 524287",
        ),
        (
            "[switch.lab]\ntype = \"private\"\naging = 524288\n",
            "3: switch.lab.aging: 524288 is out of range, expected 10 to 524287",
        ),
        (
            "[switch.lab]\ntype = \"private\"\naddresses = 1048577\n",
            "3: switch.lab.addresses: 1048577 is out of range, expected 1 to 1048576",
        ),
        (
            "[switch.lab]\ntype = \"private\"\nuplink = \"eth0\"\n",
            "3: switch.lab.uplink: only an external switch has an uplink, expected type = \"external\"",
        ),
        (
            "[switch.lab]\ntype = \"external\"\nhost = true\n",
            "3: switch.lab.host: only an internal switch has a port for the host, expected type = \"internal\"",
        ),
        (
            "[switch.lab]\ntype = \"internal\"\nhost = false\n",
            "3: switch.lab.host: found false, but the host is a port of an internal switch, expected true or type = \"private\"",
        ),
        (
            "[switch.laboratory-2]\ntype = \"internal\"\n",
            "1: switch.laboratory-2: the host's TAP device cannot be named \"yard-laboratory-2\", which has 17 bytes, expected host = \"NAME\" of at most 15",
        ),
        (
            "[switch.\"a b\"]\ntype = \"private\"\n",
            "1: switch.\"a b\": name \"a b\" contains ` `, expected 1 to 32 of the letters a to z, A to Z, digits, `-`, `_`, `.`, beginning with a letter or digit",
        ),
        (
            "[switch.\"../up\"]\ntype = \"private\"\n",
            "1: switch.\"../up\": name \"../up\" begins with `.`, expected 1 to 32 of the letters a to z, A to Z, digits, `-`, `_`, `.`, beginning with a letter or digit",
        ),
        (
            "[switch.\"\\u001b[2J\"]\ntype = \"private\"\n",
            "1: switch.\"\\u{1b}[2J\": name \"\\u{1b}[2J\" begins with `\\u{1b}`, expected 1 to 32 of the letters a to z, A to Z, digits, `-`, `_`, `.`, beginning with a letter or digit",
        ),
        (
            "[switch.\"\"]\ntype = \"private\"\n",
            "1: switch.\"\": the name is empty, expected 1 to 32 of the letters a to z, A to Z, digits, `-`, `_`, `.`, beginning with a letter or digit",
        ),
        (
            "[switch.abcdefghijklmnopqrstuvwxyz-0123456]\ntype = \"private\"\n",
            "1: switch.abcdefghijklmnopqrstuvwxyz-0123456: name \"abcdefghijklmnopqrstuvwxyz-0123456\" has 34 bytes, expected 1 to 32 of the letters a to z, A to Z, digits, `-`, `_`, `.`, beginning with a letter or digit",
        ),
        (
            "[switch.wan]\ntype = \"external\"\nuplink = \"eth0/1\"\n",
            "3: switch.wan.uplink: device name \"eth0/1\" contains `/`, expected 1 to 15 of the letters a to z, A to Z, digits, `-`, `_`, `.`, beginning with a letter or digit",
        ),
        (
            "[switch.wan]\ntype = \"external\"\nuplink = \"eth0\"\nport.uplink.tap.name = \"t0\"\n",
            "4: switch.wan.port.uplink: the name is taken by the port that `uplink` or `host` makes, expected another",
        ),
        (
            "[switch.lab]\ntype = \"private\"\n[switch.lab.port.red]\nmtu = 1500\n",
            "3: switch.lab.port.red: is attached to nothing, expected one of vhost-user, tap, uplink, pcap",
        ),
        (
            "[switch.lab]\ntype = \"private\"\n[switch.lab.port.red]\nuplink = { device = \"eth0\" }\n",
            "4: switch.lab.port.red.uplink: only an external switch has an uplink, expected vhost-user, tap or pcap",
        ),
        (
            "[switch.lab]\ntype = \"private\"\n[switch.lab.port.red]\nvhost_user = { path = \"/a\" }\n",
            "3: switch.lab.port.red: is attached to nothing, expected one of vhost-user, tap, uplink, pcap\n\
             switchyard.toml:4: switch.lab.port.red.vhost_user: unknown key (did you mean `vhost-user`?)",
        ),
        (
            "[switch.lab]\ntype = \"private\"\n[switch.lab.port.red]\nvhost-user = { mode = \"serve\" }\n",
            "4: switch.lab.port.red.vhost-user.path: is missing, expected the path of a Unix socket\n\
             switchyard.toml:4: switch.lab.port.red.vhost-user.mode: found \"serve\", expected \"server\" or \"client\" (did you mean `server`?)",
        ),
        (
            "[switch.lab]\ntype = \"private\"\n[switch.lab.port.red]\nvhost-user = { path = \"/a\", queues = 65 }\n",
            "4: switch.lab.port.red.vhost-user.queues: 65 is out of range, expected 1 to 64",
        ),
        (
            "[switch.lab]\ntype = \"private\"\n[switch.lab.port.red]\ntap = { queues = 2 }\n",
            "4: switch.lab.port.red.tap: names no device, expected `name` or `fds`",
        ),
        (
            "[switch.lab]\ntype = \"private\"\n[switch.lab.port.red]\ntap = { name = \"tap%d\" }\n",
            "4: switch.lab.port.red.tap.name: device name \"tap%d\" contains `%`, expected 1 to 15 of the letters a to z, A to Z, digits, `-`, `_`, `.`, beginning with a letter or digit",
        ),
        (
            "[switch.lab]\ntype = \"private\"\n[switch.lab.port.red]\ntap = { fds = [3, 4], queues = 3 }\n",
            "4: switch.lab.port.red.tap.fds: 2 descriptors for 3 queues, expected one a queue",
        ),
        (
            "[switch.lab]\ntype = \"private\"\n[switch.lab.port.red]\ntap = { fds = [1] }\n",
            "4: switch.lab.port.red.tap.fds[0]: 1 is out of range, expected 3 to 2147483647",
        ),
        (
            "[switch.lab]\ntype = \"private\"\n[switch.lab.port.red]\npcap = {}\n",
            "4: switch.lab.port.red.pcap: names no file, expected `read`, `write` or both",
        ),
        (
            "[switch.lab]\ntype = \"private\"\n[switch.lab.port.red]\npcap = { write = \"o\", repeat = true }\n",
            "4: switch.lab.port.red.pcap.repeat: there is nothing to repeat, expected `read` as well",
        ),
        (
            "[switch.lab]\ntype = \"private\"\n[switch.lab.port.red]\npcap = { read = \"o\", write = \"./o\", pace = \"fast\" }\n",
            "4: switch.lab.port.red.pcap.pace: found \"fast\", expected \"recorded\" or \"full\"",
        ),
        (
            "[switch.lab]\ntype = \"private\"\n[switch.lab.port.red]\npcap = { read = \"o\", write = \"./o\" }\n",
            "4: switch.lab.port.red.pcap: `read` and `write` are the same file, expected two",
        ),
    ] {
        assert_eq!(refused(text), format!("switchyard.toml:{expected}"), "{text}");
    }
}

#[test]
fn wrong_port_key_names_line_key_found_and_expected() {
    for (keys, expected) in [
        ("mtu = 70000", "mtu: 70000 is out of range, expected 68 to 9216"),
        ("mtu = 67", "mtu: 67 is out of range, expected 68 to 9216"),
        (
            "mtu = 99999999999999999999999999",
            "mtu: 99999999999999999999999999 is out of range, expected 68 to 9216",
        ),
        ("mut = 1500", "mut: unknown key (did you mean `mtu`?)"),
        (
            "vhost-user = { path = \"/a\" }",
            "tap: the port has `vhost-user` as well as `tap`, expected one of them",
        ),
        ("mac = 5", "mac: found 5, expected a MAC address such as \"02:00:5e:10:00:01\""),
        ("mac = \"2:0:5e\"", "mac: found \"2:0:5e\", expected a MAC address such as \"02:00:5e:10:00:01\""),
        (
            "mac = \"ff:ff:ff:ff:ff:ff\"",
            "mac: ff:ff:ff:ff:ff:ff is a group address, expected the address of one station",
        ),
        ("mac = \"00:00:00:00:00:00\"", "mac: 00:00:00:00:00:00 is no address, expected that of a station"),
        ("security.spoofing = true", "security.spoofing: unknown key, expected mac-spoofing, address-limit"),
        ("security.mac-spoofing = 1", "security.mac-spoofing: found 1, expected true or false"),
        ("security.address-limit = 0", "security.address-limit: 0 is out of range, expected 1 to 1048576"),
        (
            "security.address-limit = \"all\"",
            "security.address-limit: found \"all\", expected an integer from 1 to 1048576 or \"none\"",
        ),
        ("vlan.access = 0", "vlan.access: 0 is out of range, expected 1 to 4094"),
        ("vlan.access = 4095", "vlan.access: 4095 is out of range, expected 1 to 4094"),
        (
            "vlan = 10",
            "vlan: found 10, expected \"passthrough\", { access = VLAN } or { trunk = VLANS, native = VLAN }",
        ),
        (
            "vlan = { access = 10, trunk = [11] }",
            "vlan: found another mixture of keys, expected \"passthrough\", { access = VLAN } or { trunk = VLANS, native = VLAN }",
        ),
        ("vlan = { trunk = [1, 5000] }", "vlan.trunk[1]: 5000 is out of range, expected 1 to 4094"),
        (
            "vlan.trunk = \"20-10\"",
            "vlan.trunk: found \"20-10\", expected a list of integers from 1 to 4094, or a text such as \"10-20,30\"",
        ),
        ("vlan = { trunk = \"10-20\", native = 0 }", "vlan.native: 0 is out of range, expected 1 to 4094"),
        ("offloads = \"yes\"", "offloads: found \"yes\", expected true or false"),
        ("coalesce = 0", "coalesce: found 0, expected true or false"),
        ("addresses = [{ vlan = 3 }]", "addresses[0].mac: is missing, expected a MAC address"),
        (
            "addresses = [{ mac = \"02:00:00:00:00:01\", vlan = 4095 }]",
            "addresses[0].vlan: 4095 is out of range, expected 0 to 4094",
        ),
        (
            "addresses = [{ mac = \"02:00:00:00:00:01\" }, { mac = \"02:00:00:00:00:01\" }]",
            "addresses[1]: 02:00:00:00:00:01 in VLAN 0 is listed twice, expected each address once",
        ),
        (
            "vlan.access = 10\naddresses = [{ mac = \"02:00:00:00:00:01\", vlan = 11 }]",
            "addresses[0].vlan: 11 is not the port's VLAN, expected 10",
        ),
        (
            "vlan.trunk = [10]\naddresses = [{ mac = \"02:00:00:00:00:01\", vlan = 11 }]",
            "addresses[0].vlan: 11 is no VLAN of the trunk, expected a member or the native VLAN",
        ),
        (
            "vlan.trunk = [10]\naddresses = [{ mac = \"02:00:00:00:00:01\" }]",
            "addresses[0]: names no VLAN, expected `vlan`: the port is a trunk without native VLAN",
        ),
        (
            "vmq = [{ mac = \"02:00:00:00:00:01\", queues = [2] }]",
            "vmq[0].queues[0]: 2 is out of range, expected 0 to 1",
        ),
        (
            "vmq = [{ mac = \"02:00:00:00:00:01\" }]",
            "vmq[0].queues: is missing, expected a list of queue numbers",
        ),
        ("rss.table = [0, 2]", "rss.table[1]: 2 is out of range, expected 0 to 1"),
        ("rss.table = [0, 1, 0]", "rss.table: the table has 3 entries, expected a power of two up to 512"),
        (
            "rss.key = \"6d5a\"",
            "rss.key: found 4 hexadecimal digits, expected 40 bytes as 80 hexadecimal digits",
        ),
        ("rss.key = \"xyz\"", "rss.key: found \"xyz\", expected 40 bytes as 80 hexadecimal digits"),
        ("pin = [3]", "pin: 1 processors for 2 queues, expected one a queue"),
        ("pin = [3, 0]", "pin: [1] is processor 0, expected one of workers.cpus [3]"),
    ] {
        let text = with_port(keys);
        let message = refused(&text);
        let line = match expected {
            _ if expected.starts_with("tap:") => 4,
            _ => 4 + keys.lines().count(),
        };
        assert_eq!(message, format!("switchyard.toml:{line}: switch.lab.port.red.{expected}"), "{text}");
    }
}

#[test]
fn things_wanted_by_two_ports_are_refused() {
    let text = |a: &str, b: &str| {
        format!(
            "[api]\nsocket = \"/run/api\"\n[switch.lab]\ntype = \"private\"\n[switch.lab.port.a]\n{a}\n[switch.lab.port.b]\n{b}\n"
        )
    };
    for (a, b, expected) in [
        (
            "vhost-user.path = \"/run/a\"",
            "vhost-user.path = \"/run/a\"",
            "7: switch.lab.port.b.vhost-user.path: socket /run/a is taken by switch.lab.port.a, expected another",
        ),
        (
            "tap.name = \"t\"",
            "vhost-user.path = \"/run/api\"",
            "7: switch.lab.port.b.vhost-user.path: socket /run/api is taken by api.socket, expected another",
        ),
        (
            "tap.name = \"t\"",
            "tap.name = \"t\"",
            "7: switch.lab.port.b.tap.name: device t is taken by switch.lab.port.a, expected another",
        ),
        (
            "tap.fds = [5]",
            "tap.fds = [4, 5]",
            "7: switch.lab.port.b.tap.fds: descriptor 5 is taken by switch.lab.port.a, expected another",
        ),
        (
            "pcap.write = \"o.pcapng\"",
            "pcap.write = \"/etc/switchyard/o.pcapng\"",
            "7: switch.lab.port.b.pcap.write: file /etc/switchyard/o.pcapng is taken by switch.lab.port.a, expected another",
        ),
        (
            "tap.name = \"t\"\naddresses = [{ mac = \"02:00:00:00:00:01\" }]",
            "tap.name = \"u\"\naddresses = [{ mac = \"02:00:00:00:00:01\" }]",
            "8: switch.lab.port.b.addresses: 02:00:00:00:00:01 in VLAN 0 is the address of port a already, expected another",
        ),
        (
            "tap.name = \"t\"\nmac = \"02:00:00:00:00:01\"",
            "tap.name = \"u\"\nmac = \"02:00:00:00:00:01\"",
            "8: switch.lab.port.b.mac: 02:00:00:00:00:01 in VLAN 0 is the address of port a already, expected another",
        ),
        (
            "tap.name = \"t\"\naddresses = [{ mac = \"02:00:00:00:00:01\" }]",
            "tap.name = \"u\"\nmac = \"02:00:00:00:00:01\"",
            "8: switch.lab.port.b.mac: 02:00:00:00:00:01 in VLAN 0 is the address of port a already, expected another",
        ),
        (
            "tap.name = \"t\"\nmac = \"02:00:00:00:00:01\"",
            "tap.name = \"u\"\naddresses = [{ mac = \"02:00:00:00:00:01\", vlan = 7 }]",
            "8: switch.lab.port.b.addresses: 02:00:00:00:00:01 in VLAN 7 is the address of port a already, expected another",
        ),
        (
            "tap.name = \"t\"\nmac = \"02:00:00:00:00:01\"\nvlan.access = 7",
            "tap.name = \"u\"\nmac = \"02:00:00:00:00:01\"\nvlan = { trunk = [6, 7] }",
            "9: switch.lab.port.b.mac: 02:00:00:00:00:01 in VLAN 7 is the address of port a already, expected another",
        ),
    ] {
        assert_eq!(refused(&text(a, b)), format!("switchyard.toml:{expected}"));
    }
    let apart = text(
        "tap.name = \"t\"\nmac = \"02:00:00:00:00:01\"\nvlan.access = 8",
        "tap.name = \"u\"\nmac = \"02:00:00:00:00:01\"\nvlan = { trunk = [6, 7] }",
    );
    read(&apart).expect("ports that share no VLAN may share an address");
    let host = "[switch.one]\ntype = \"internal\"\n[switch.two]\ntype = \"internal\"\nhost = \"yard-one\"\n";
    assert_eq!(
        refused(host),
        "switchyard.toml:3: switch.two.port.host.tap.name: device yard-one is taken by switch.one.port.host, expected another"
    );
}

#[test]
fn every_mistake_is_reported_at_once_in_the_order_of_the_lines() {
    let message = refused(&with_port("mtu = 1\ncoalesce = 2\nvlan.access = 9999\n[api]\nsock = \"a\""));
    let lines: Vec<_> = message.lines().filter_map(|line| line.split(' ').next()).collect();
    assert_eq!(
        lines,
        ["switchyard.toml:5:", "switchyard.toml:6:", "switchyard.toml:7:", "switchyard.toml:9:"],
        "{message}"
    );
}

#[test]
fn unreadable_file_says_why() {
    let machine = Machine { cpus: vec![0] };
    let error = load(Path::new("/nonexistent/y.toml"), &machine).expect_err("no file").to_string();
    assert_eq!(error, "/nonexistent/y.toml: cannot be read: No such file or directory (os error 2)");
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), b"[api]\n\xff").unwrap();
    let error = load(file.path(), &machine).expect_err("no text").to_string();
    assert!(error.ends_with(": is not UTF-8 at byte 6, expected a text"), "{error}");
}

#[test]
fn empty_file_has_defaults() {
    let config = read("").unwrap();
    assert_eq!(
        config.workers,
        WorkersSpec { cpus: vec![3], idle: WorkersSpec::IDLE, preempt: false, balance: true }
    );
    assert_eq!(config.socket, Path::new(DEFAULT_SOCKET));
    assert!(config.switches.is_empty());
}

#[test]
fn switch_kinds_make_their_outer_ports() {
    let config = read(
        "[switch.wan]\ntype = \"external\"\nuplink = \"eth0\"\n[switch.lan]\ntype = \"internal\"\naddresses = 10\naging = 60\n[switch.lab]\ntype = \"private\"\n",
    )
    .unwrap();
    let [wan, lan, lab] = config.switches.as_slice() else { panic!("{config:?}") };
    assert_eq!(wan.switch.kind, SwitchKind::External);
    assert_eq!(
        (wan.ports[0].name.as_str(), &wan.ports[0].attachment),
        (UPLINK_PORT, &Attachment::Uplink { device: "eth0".into(), queues: 1 })
    );
    assert_eq!((lan.switch.addresses, lan.switch.aging), (10, 60));
    assert_eq!(
        (lan.ports[0].name.as_str(), &lan.ports[0].attachment),
        (HOST_PORT, &Attachment::Tap { tap: TapSpec::Name("yard-lan".into()), queues: 1 })
    );
    assert_eq!(lab.ports, []);
}

#[test]
fn port_keys_reach_the_specification() {
    let config = read(&format!(
        "[workers]\ncpus = \"1-2\"\nidle = 20\npreempt = true\nbalance = false\n{}",
        with_port(
            "mtu = 9000\nmac = \"02:00:00:00:00:0a\"\nsecurity = {{ mac-spoofing = true, address-limit = 5 }}\n\
             vlan = { trunk = \"10-12,20\", native = 1 }\naddresses = [{ mac = \"02:00:00:00:00:01\", vlan = 20 }]\n\
             offloads = false\ncoalesce = false\nvmq = [{ mac = \"02:00:00:00:00:02\", queues = [1] }]\n\
             rss.table = [0, 1, 1, 0]\npin = [2, 1]"
        )
        .replace("{{", "{")
        .replace("}}", "}")
    ))
    .unwrap();
    assert_eq!(
        config.workers,
        WorkersSpec { cpus: vec![1, 2], idle: Duration::from_micros(20), preempt: true, balance: false }
    );
    let port = &config.switches[0].ports[0];
    assert_eq!((port.mtu, port.spoofing, port.address_limit), (9000, true, Some(5)));
    assert_eq!(port.mac.unwrap().to_string(), "02:00:00:00:00:0a");
    assert_eq!(port.vlan, VlanMode::Trunk { members: vec![10, 11, 12, 20], native: Some(1) });
    assert_eq!((port.addresses[0].vlan, port.vmq[0].vlan), (20, 1));
    assert_eq!((port.offloads, port.coalesce), (false, false));
    assert_eq!(port.rss.table.as_deref(), Some([0, 1, 1, 0].as_slice()));
    assert_eq!(port.pin, [2, 1]);
}

#[test]
fn attachments_are_read_and_relative_paths_belong_to_the_file() {
    let config = read(
        "[switch.lab]\ntype = \"private\"\n[switch.lab.port]\n\
         a.vhost-user = { path = \"/run/a.sock\", mode = \"client\", queues = 4 }\n\
         b.tap.fds = [7, 8]\n\
         c.pcap = { read = \"in.pcap\", write = \"/tmp/out.pcapng\", pace = \"full\", repeat = true }\n",
    )
    .unwrap();
    let attachments: Vec<_> = config.switches[0].ports.iter().map(|port| port.attachment.clone()).collect();
    assert_eq!(
        attachments,
        [
            Attachment::VhostUser { path: "/run/a.sock".into(), mode: SocketMode::Client, queues: 4 },
            Attachment::Tap { tap: TapSpec::Fds(vec![7, 8]), queues: 2 },
            Attachment::Pcap {
                read: Some("/etc/switchyard/in.pcap".into()),
                write: Some("/tmp/out.pcapng".into()),
                pace: Pace::Full,
                repeat: true
            },
        ]
    );
}

#[test]
fn access_port_lends_its_vlan_to_its_addresses() {
    let config = read(&with_port("vlan.access = 7\naddresses = [{ mac = \"02:00:00:00:00:01\" }]")).unwrap();
    assert_eq!(config.switches[0].ports[0].addresses[0].vlan, 7);
}

#[test]
fn request_is_read_like_the_table() {
    let spec = port_request(
        json!({"name": "red", "tap": {"name": "t0", "queues": 2}, "mtu": 9000, "pin": [1, 1]}),
        SwitchKind::Private,
        &[1],
    )
    .unwrap();
    let same = read(&format!("workers.cpus = [1]\n{}", with_port("mtu = 9000\npin = [1, 1]"))).unwrap();
    let same = PortSpec {
        attachment: Attachment::Tap { tap: TapSpec::Name("t0".into()), queues: 2 },
        ..same.switches[0].ports[0].clone()
    };
    assert_eq!(spec, same);
}

#[test]
fn wrong_request_is_refused_in_the_same_words() {
    let refused = |json| port_request(json, SwitchKind::Private, &[0]).expect_err("wrong").to_string();
    for (json, expected) in [
        (json!([]), "found a list, expected a table with the keys"),
        (json!({}), "name: is missing, expected a name\nis attached to nothing, expected one of"),
        (
            json!({"name": "a/b", "tap": {"name": "t"}}),
            "name: name \"a/b\" contains `/`, expected 1 to 32 of",
        ),
        (
            json!({"name": "a", "tap": {"name": "t"}, "mtu": 70000}),
            "mtu: 70000 is out of range, expected 68 to 9216",
        ),
        (
            json!({"name": "a", "tap": {"name": "t"}, "mtu": null}),
            "mtu: found null, expected an integer from 68 to 9216",
        ),
        (
            json!({"name": "a", "tap": {"name": "t"}, "mtu": 1.5}),
            "mtu: found 1.5, expected an integer from 68",
        ),
        (
            json!({"name": "a", "tap": {"fds": [9]}}),
            "tap.fds: descriptors are inherited when the daemon starts",
        ),
        (
            json!({"name": "a", "vhost-user": {"path": "a.sock"}}),
            "vhost-user.path: found \"a.sock\", expected an absolute path",
        ),
    ] {
        let message = refused(json);
        assert!(message.contains(expected), "{message}\n{expected}");
    }
    let message = switch_request(json!({"name": "a", "type": "private", "aging": 1}), &[0]);
    assert_eq!(message.expect_err("wrong").to_string(), "aging: 1 is out of range, expected 10 to 524287");
}

#[test]
fn change_takes_what_may_change_and_says_what_may_not() {
    let change = change_request(json!({"mtu": 9000, "security": {"address-limit": "none"}})).unwrap();
    let expected = PortChange { mtu: Some(9000), address_limit: Some(None), ..PortChange::default() };
    assert_eq!(change, expected);
    assert_eq!(
        change_request(json!({"mac": "02:00:00:00:00:01"})).expect_err("fixed").to_string(),
        "mac: cannot change while the port exists, expected to remove the port and add it again"
    );
    let unknown = change_request(json!({"mut": 1})).expect_err("unknown").to_string();
    assert_eq!(unknown, "mut: unknown key (did you mean `mtu`?)");
}
