//! Every key of the configuration file, once: the manual page switchyard.toml(5) and `docs/operators/configuration.md`
//! are made from this list, and a test compares it with the keys that are read.

use std::fmt::Write;

/// A key.
#[derive(Debug, Clone, Copy)]
pub struct Key {
    /// Dotted path; words in capitals stand for names that the operator chooses, `[]` for items of a list.
    pub path: &'static str,
    /// What it may be.
    pub range: &'static str,
    /// What it is when it is not given.
    pub default: &'static str,
    /// What it does.
    pub text: &'static str,
}

/// A group of keys, as they stand together in the file.
#[derive(Debug, Clone, Copy)]
pub struct Group {
    /// Table of the file.
    pub table: &'static str,
    /// What it is about.
    pub text: &'static str,
    /// Its keys.
    pub keys: &'static [Key],
}

const fn key(path: &'static str, range: &'static str, default: &'static str, text: &'static str) -> Key {
    Key { path, range, default, text }
}

/// Every key.
pub const GROUPS: &[Group] = &[
    Group {
        table: "[workers]",
        text: "The processors that switch frames, one thread pinned to each.",
        keys: &[
            key(
                "workers.cpus",
                "list of processor numbers, or text such as \"2-5,7\"",
                "the last processor",
                "Processors that switch frames.",
            ),
            key(
                "workers.idle",
                "0 to 1000000 microseconds",
                "50",
                "How long a worker polls in vain before it sleeps until a doorbell rings.",
            ),
            key(
                "workers.preempt",
                "true, false",
                "false",
                "Whether a worker that is woken takes its processor at once from a guest that runs there, and keeps it while it \
                 polls in vain. If not, it waits for its turn, some milliseconds where the guest never pauses: frames move in \
                 larger bursts, up to five times as many. Without effect on a processor of its own.",
            ),
            key(
                "workers.balance",
                "true, false",
                "true",
                "Move queues between workers as load changes, and park workers that are not needed.",
            ),
        ],
    },
    Group {
        table: "[api]",
        text: "Where yard and other programs reach the daemon.",
        keys: &[key(
            "api.socket",
            "path, at most 107 bytes",
            "/run/switchyard/yardd.sock",
            "Unix socket of the API, made with mode 0660; its directory is made if it is missing.",
        )],
    },
    Group {
        table: "[switch.NAME]",
        text: "A switch. Its name has 1 to 32 letters, digits, `-`, `_` and `.`, and begins with a letter or digit.",
        keys: &[
            key(
                "switch.NAME.type",
                "\"external\", \"internal\", \"private\"",
                "required",
                "Whom it connects: external also a network beyond the host, internal also the host, private only the ports named below.",
            ),
            key("switch.NAME.addresses", "1 to 1048576", "16384", "Addresses that the table holds."),
            key(
                "switch.NAME.aging",
                "10 to 524287 seconds",
                "300",
                "When an address that was not seen is forgotten.",
            ),
            key(
                "switch.NAME.uplink",
                "name of a network device",
                "none",
                "External switch: makes a port `uplink` on that device.",
            ),
            key(
                "switch.NAME.host",
                "true, or name of a TAP device",
                "true (yard-NAME)",
                "Internal switch: the TAP device behind its port `host`.",
            ),
        ],
    },
    Group {
        table: "[switch.NAME.port.PORT]",
        text: "A port. It has exactly one of `vhost-user`, `tap`, `uplink` and `pcap`. Relative paths are taken from the \
               directory of the configuration file. Names are as for switches.",
        keys: &[
            key(
                "switch.NAME.port.PORT.vhost-user.path",
                "path, at most 107 bytes",
                "required",
                "Socket of a guest or application that speaks vhost-user.",
            ),
            key(
                "switch.NAME.port.PORT.vhost-user.mode",
                "\"server\", \"client\"",
                "\"server\"",
                "Who listens: the switch (server) or the guest's VMM (client); a client connects again and again.",
            ),
            key("switch.NAME.port.PORT.vhost-user.queues", "1 to 64", "1", "Queue pairs offered."),
            key(
                "switch.NAME.port.PORT.tap.name",
                "1 to 15 letters, digits, `-`, `_`, `.`",
                "required, or `fds`",
                "TAP device, made if it is missing.",
            ),
            key(
                "switch.NAME.port.PORT.tap.fds",
                "list of descriptors from 3",
                "none",
                "Open TAP queues that the daemon inherited, instead of `name`; not over the API.",
            ),
            key(
                "switch.NAME.port.PORT.tap.queues",
                "1 to 64",
                "1, or the number of `fds`",
                "Queues of the device.",
            ),
            key(
                "switch.NAME.port.PORT.uplink.device",
                "name of a network device",
                "required",
                "Device of the host that leads out of an external switch.",
            ),
            key(
                "switch.NAME.port.PORT.uplink.queues",
                "1 to 64",
                "1",
                "Sockets among which the device's frames are spread.",
            ),
            key(
                "switch.NAME.port.PORT.pcap.read",
                "path",
                "none",
                "Capture (pcap or pcapng) whose frames enter the switch. Its disk must answer: the switch reads it as it \
                 goes.",
            ),
            key(
                "switch.NAME.port.PORT.pcap.write",
                "path",
                "none",
                "pcapng file for the frames that leave the switch; those the disk is too slow for are counted \
                 (`capture-loss`). A disk that does not answer keeps nothing but this port waiting: it cannot be restarted, \
                 nor its file be written anew, until the disk has closed the file.",
            ),
            key(
                "switch.NAME.port.PORT.pcap.pace",
                "\"recorded\", \"full\"",
                "\"recorded\"",
                "Play with the recorded gaps, or as fast as the switch takes it.",
            ),
            key(
                "switch.NAME.port.PORT.pcap.repeat",
                "true, false",
                "false",
                "Play the file again and again.",
            ),
            key(
                "switch.NAME.port.PORT.mtu",
                "68 to 9216 bytes",
                "1500",
                "Longest IP packet; longer frames are dropped and counted.",
            ),
            key(
                "switch.NAME.port.PORT.mac",
                "MAC address of a station",
                "none",
                "The guest's address. It belongs to this port in all its VLANs, and the port may send from no other.",
            ),
            key(
                "switch.NAME.port.PORT.security.mac-spoofing",
                "true, false",
                "false",
                "Allow other source addresses than `mac`.",
            ),
            key(
                "switch.NAME.port.PORT.security.address-limit",
                "1 to 1048576, \"none\"",
                "\"none\"",
                "Most addresses that are learnt on the port.",
            ),
            key(
                "switch.NAME.port.PORT.vlan",
                "\"passthrough\", or the table below",
                "\"passthrough\"",
                "Passthrough: frames keep the tag that they have.",
            ),
            key(
                "switch.NAME.port.PORT.vlan.access",
                "1 to 4094",
                "none",
                "Untagged frames only, all of this VLAN.",
            ),
            key(
                "switch.NAME.port.PORT.vlan.trunk",
                "list of 1 to 4094, or text such as \"10-20,30\"",
                "none",
                "Tagged frames of these VLANs.",
            ),
            key(
                "switch.NAME.port.PORT.vlan.native",
                "1 to 4094",
                "none",
                "With `trunk`: the VLAN of untagged frames.",
            ),
            key(
                "switch.NAME.port.PORT.private",
                "\"isolated\", or the number of a community from 1 to 65535",
                "none: it meets all ports of its VLANs",
                "Place in a private VLAN. An isolated port meets only ports without a place, one of a community those and its own community.",
            ),
            key(
                "switch.NAME.port.PORT.addresses[].mac",
                "MAC address of a station",
                "required",
                "An address pinned to the port.",
            ),
            key(
                "switch.NAME.port.PORT.addresses[].vlan",
                "0 to 4094",
                "the access or native VLAN, or 0",
                "Its VLAN; 0 is none.",
            ),
            key(
                "switch.NAME.port.PORT.offloads",
                "true, false",
                "true",
                "Offer checksum and segmentation offloads.",
            ),
            key(
                "switch.NAME.port.PORT.coalesce",
                "true, false",
                "true",
                "Merge TCP segments for a receiver that takes large frames.",
            ),
            key(
                "switch.NAME.port.PORT.vmq[].mac",
                "MAC address of a station",
                "required",
                "Frames for this address go to some queues only, by their hash; at most 1024 filters a port.",
            ),
            key(
                "switch.NAME.port.PORT.vmq[].vlan",
                "0 to 4094",
                "the access or native VLAN, or 0",
                "Its VLAN; 0 is none.",
            ),
            key(
                "switch.NAME.port.PORT.vmq[].queues",
                "list of queue numbers, or text such as \"0-3\"",
                "required",
                "Those queues, of them those that the guest has enabled. Without any the address has no filter.",
            ),
            key(
                "switch.NAME.port.PORT.rss.key",
                "40 bytes in hexadecimal",
                "the published default key",
                "Toeplitz key.",
            ),
            key(
                "switch.NAME.port.PORT.rss.table",
                "list of queue numbers, a power of two of them up to 512",
                "128 entries in turn, of queues that no filter has",
                "Indirection table, for frames whose address has no filter. A synthetic adapter's guest may bring its own.",
            ),
            key(
                "switch.NAME.port.PORT.pin",
                "list of processors of `workers.cpus`, one a queue",
                "placed by load",
                "The processor that polls each queue.",
            ),
        ],
    },
    Group {
        table: "[vm.NAME]",
        text: "A virtual machine. Names are as for switches. A VM goes on when the daemon ends, and is taken back by the next one; \
               a definition that has changed meanwhile is taken by the VM's next start.",
        keys: &[
            key(
                "vm.NAME.memory",
                "size such as \"512M\", or the table below",
                "required",
                "Memory; units are K, M, G and T. A size alone does not change while the VM runs.",
            ),
            key(
                "vm.NAME.memory.startup",
                "\"32M\" to \"4T\", multiple of \"2M\"",
                "required",
                "Memory at the start, if `memory` is a table.",
            ),
            key(
                "vm.NAME.memory.minimum",
                "as `startup`, at most that",
                "`startup`",
                "How far dynamic memory may shrink the guest.",
            ),
            key(
                "vm.NAME.memory.maximum",
                "as `startup`, at least that",
                "`startup`",
                "How far dynamic memory may grow the guest.",
            ),
            key(
                "vm.NAME.memory.huge",
                "true, false",
                "false",
                "Back it with the host's huge pages (2 MiB, from the pool); not with dynamic memory.",
            ),
            key("vm.NAME.vcpus", "1 to 64", "1", "Virtual processors."),
            key(
                "vm.NAME.kernel",
                "path",
                "required",
                "Linux kernel to boot, a bzImage; opened by the daemon at each start.",
            ),
            key("vm.NAME.initrd", "path", "none", "Initial RAM file system; likewise."),
            key("vm.NAME.cmdline", "text, at most 2047 bytes", "\"console=ttyS0\"", "Kernel command line."),
            key(
                "vm.NAME.cpu.reserve",
                "0 to 100 percent",
                "0",
                "Part of its virtual processors that the VM gets even when all want more: a floor under its weight, on a scale on which 10000 is the whole host. Reserves of running VMs together are at most the host.",
            ),
            key(
                "vm.NAME.cpu.limit",
                "1 to 100 percent",
                "100",
                "Part of its virtual processors that the VM gets at most (`cpu.max` of its control group).",
            ),
            key(
                "vm.NAME.cpu.weight",
                "1 to 10000",
                "100",
                "Its part of what is scarce, against the weights of others (`cpu.weight`).",
            ),
            key(
                "vm.NAME.cpu.pin",
                "list of processors, one for each of `vcpus`",
                "left to the scheduler",
                "Host processor of each virtual one.",
            ),
            key(
                "vm.NAME.cpu.baseline",
                "\"x86-64-v2\", \"x86-64-v3\", \"x86-64-v4\", \"nehalem\", \"haswell\", \"skylake-server\", \"icelake-server\", \"epyc\", \"epyc-rome\", \"epyc-milan\"",
                "all that the host has",
                "Processor that the guest sees, so that the VM can move between unlike hosts: a level of features, or a model of the host's maker. A host that lacks some of it refuses to start the VM, and names what it lacks.",
            ),
            key(
                "vm.NAME.services.heartbeat",
                "true, false",
                "true",
                "Integration service: is the guest alive?",
            ),
            key("vm.NAME.services.shutdown", "true, false", "true", "Integration service: orderly shutdown."),
            key(
                "vm.NAME.services.time-sync",
                "true, false",
                "true",
                "Integration service: the guest's clock.",
            ),
            key("vm.NAME.services.kvp", "true, false", "true", "Integration service: data exchange."),
            key(
                "vm.NAME.services.vss",
                "true, false",
                "true",
                "Integration service: freeze and thaw for backups.",
            ),
            key(
                "vm.NAME.services.dynamic-memory",
                "true, false",
                "true",
                "Integration service: balloon and hot add.",
            ),
            key(
                "vm.NAME.restart",
                "\"never\", \"on-crash\", \"always\"",
                "\"on-crash\"",
                "When it is started again by itself: on-crash if its worker died or its guest crashed, always also if its guest switched itself off. The first time after 1 second, then after twice as long each, up to 60 seconds, until a run lasts 60 seconds.",
            ),
            key(
                "vm.NAME.autostart",
                "true, false",
                "false",
                "Start it with the daemon, unless it runs already.",
            ),
        ],
    },
    Group {
        table: "[[vm.NAME.nic]]",
        text: "An adapter of a VM, and a port of a switch; at most 32. The guest sees them in the order of the file.",
        keys: &[
            key(
                "vm.NAME.nic[].name",
                "as for VMs",
                "required",
                "Name; the switch's port is named VM.NIC, at most 32 bytes.",
            ),
            key(
                "vm.NAME.nic[].switch",
                "name of a switch",
                "required",
                "Switch that the adapter is a port of.",
            ),
            key(
                "vm.NAME.nic[].type",
                "\"synthetic\", \"legacy\"",
                "\"synthetic\"",
                "What the guest sees: a VMBus adapter (hv_netvsc), or an emulated 82540EM (e1000), which can only be there from the start.",
            ),
            key(
                "vm.NAME.nic[].mac",
                "MAC address of a station",
                "made of the names",
                "Station address; the default is locally administered and the same after every restart.",
            ),
            key("vm.NAME.nic[].vlan", "as `vlan` of a port", "\"passthrough\"", "VLANs."),
            key("vm.NAME.nic[].private", "as `private` of a port", "none", "Place in a private VLAN."),
            key(
                "vm.NAME.nic[].queues",
                "1 to 64",
                "1",
                "Channels that the guest may use; 1 for a legacy adapter.",
            ),
            key("vm.NAME.nic[].mtu", "68 to 9216 bytes", "1500", "Longest IP packet."),
            key(
                "vm.NAME.nic[].mac-spoofing",
                "true, false",
                "false",
                "Allow other source addresses than `mac`.",
            ),
            key(
                "vm.NAME.nic[].address-limit",
                "1 to 1048576, \"none\"",
                "\"none\"",
                "Most addresses that are learnt on the port.",
            ),
            key("vm.NAME.nic[].offloads", "true, false", "true", "Offer checksum and segmentation offloads."),
            key(
                "vm.NAME.nic[].coalesce",
                "true, false",
                "true",
                "Merge TCP segments for a guest that takes large frames.",
            ),
            key(
                "vm.NAME.nic[].link",
                "\"up\", \"down\"",
                "\"up\"",
                "What the guest is told of its cable; `yard vm nic set` changes it live.",
            ),
        ],
    },
];

/// The reference as Markdown.
pub fn markdown() -> String {
    let mut out = String::from(
        "# Configuration\n\n\
         `yardd --config switchyard.toml` reads one TOML file; `yardd --check --config switchyard.toml` only checks it.\n\
         Every mistake is reported at once, each with file, line, key, what was found and what was expected. A key that is\n\
         not listed here is a mistake. `examples/switchyard.toml` is a commented example, `examples/vm.toml`\n\
         one with virtual machines.\n",
    );
    for group in GROUPS {
        let _ = write!(
            out,
            "\n## `{}`\n\n{}\n\n| key | values | default | meaning |\n|---|---|---|---|\n",
            group.table, group.text
        );
        for key in group.keys {
            let Key { range, default, text, .. } = key;
            let _ = writeln!(out, "| `{}` | {range} | {default} | {text} |", short(key.path));
        }
    }
    out
}

/// The path of a key inside its table.
pub fn short(path: &str) -> &str {
    let tables = ["switch.NAME.port.PORT.", "switch.NAME.", "vm.NAME.nic[].", "vm.NAME.", "workers.", "api."];
    tables.iter().find_map(|table| path.strip_prefix(table)).unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{API_KEYS, FILE_KEYS, WORKERS_KEYS, attach, port, switch, vm};

    /// The paths that the readers know, from their own lists.
    fn known() -> Vec<String> {
        let under =
            |prefix: &str, keys: &[&str]| keys.iter().map(|key| format!("{prefix}{key}")).collect::<Vec<_>>();
        let port_table = "switch.NAME.port.PORT.";
        let mut paths = Vec::new();
        for table in FILE_KEYS {
            paths.extend(match *table {
                "workers" => under("workers.", WORKERS_KEYS),
                "api" => under("api.", API_KEYS),
                "vm" => vm_keys(),
                _ => under("switch.NAME.", switch::SWITCH_KEYS),
            });
        }
        for key in port::PORT_KEYS {
            let (list, keys) = match *key {
                "vhost-user" => ("", attach::VHOST_USER_KEYS),
                "tap" => ("", attach::TAP_KEYS),
                "uplink" => ("", attach::UPLINK_KEYS),
                "pcap" => ("", attach::PCAP_KEYS),
                "security" => ("", port::SECURITY_KEYS),
                "rss" => ("", port::RSS_KEYS),
                "addresses" => ("[]", port::ADDRESS_KEYS),
                "vmq" => ("[]", port::VMQ_KEYS),
                "vlan" => {
                    paths.push(format!("{port_table}vlan"));
                    ("", port::VLAN_KEYS)
                }
                _ => {
                    paths.push(format!("{port_table}{key}"));
                    continue;
                }
            };
            paths.extend(under(&format!("{port_table}{key}{list}."), keys));
        }
        paths.retain(|path| path != "switch.NAME.port");
        paths
    }

    fn vm_keys() -> Vec<String> {
        let under =
            |table: &str, keys: &[&str]| keys.iter().map(|key| format!("vm.NAME.{table}.{key}")).collect();
        let of = |key: &&str| -> Vec<String> {
            let own = format!("vm.NAME.{key}");
            match *key {
                "memory" => [vec![own], under("memory", vm::MEMORY_KEYS)].concat(),
                "cpu" => under("cpu", vm::CPU_KEYS),
                "services" => under("services", vm::SERVICE_KEYS),
                "nic" => under("nic[]", vm::NIC_KEYS),
                _ => vec![own],
            }
        };
        vm::VM_KEYS.iter().flat_map(of).collect()
    }

    #[test]
    fn reference_lists_the_keys_that_are_read_and_no_others() {
        let mut listed: Vec<_> =
            GROUPS.iter().flat_map(|group| group.keys).map(|key| key.path.to_owned()).collect();
        let mut known = known();
        listed.sort();
        known.sort();
        assert_eq!(listed, known);
    }
}
