//! Virtual machines in a configuration.

use super::*;

/// A VM `web` on a switch `lab`; `keys` begin in line 6, an adapter's keys follow `[[vm.web.nic]]`.
fn with_vm(keys: &str) -> String {
    format!("[switch.lab]\ntype = \"private\"\n[vm.web]\nmemory = \"512M\"\nkernel = \"vmlinuz\"\n{keys}\n")
}

#[test]
fn wrong_vm_key_names_line_key_found_and_expected() {
    const SIZE: &str = "expected a size from \"32M\" to \"4T\", a multiple of \"2M\"";
    for (keys, expected) in [
        ("memroy = 1", "6: vm.web.memroy: unknown key (did you mean `memory`?)"),
        ("vcpus = 0", "6: vm.web.vcpus: 0 is out of range, expected 1 to 64"),
        ("vcpus = 65", "6: vm.web.vcpus: 65 is out of range, expected 1 to 64"),
        ("initrd = 1", "6: vm.web.initrd: found 1, expected a path"),
        ("cmdline = [\"a\"]", "6: vm.web.cmdline: found a list, expected a kernel command line"),
        (
            "cmdline = \"a\\nb\"",
            "6: vm.web.cmdline: \"a\\nb\" contains a control character, expected a kernel command line",
        ),
        ("autostart = \"yes\"", "6: vm.web.autostart: found \"yes\", expected true or false"),
        (
            "restart = \"sometimes\"",
            "6: vm.web.restart: found \"sometimes\", expected \"never\", \"on-crash\" or \"always\"",
        ),
        ("cpu.reserve = 101", "6: vm.web.cpu.reserve: 101 is out of range, expected 0 to 100"),
        ("cpu.limit = 0", "6: vm.web.cpu.limit: 0 is out of range, expected 1 to 100"),
        (
            "cpu = { reserve = 60, limit = 50 }",
            "6: vm.web.cpu.reserve: is more than `limit`, expected at most 50",
        ),
        ("cpu.weight = 10001", "6: vm.web.cpu.weight: 10001 is out of range, expected 1 to 10000"),
        ("cpu.wight = 1", "6: vm.web.cpu.wight: unknown key (did you mean `weight`?)"),
        (
            "cpu.pin = [1, 2]",
            "6: vm.web.cpu.pin: 2 processors for 1 virtual ones, expected one for each of `vcpus`",
        ),
        ("cpu.pin = [9]", "6: vm.web.cpu.pin: [0] is processor 9, expected one of this machine's 0-3"),
        (
            "cpu.baseline = \"x86-64-v9\"",
            "6: vm.web.cpu.baseline: found \"x86-64-v9\", expected \"x86-64-v2\", \"x86-64-v3\", \"x86-64-v4\", \"nehalem\", \"haswell\", \"skylake-server\", \"icelake-server\", \"epyc\", \"epyc-rome\" or \"epyc-milan\" (did you mean `x86-64-v2`?)",
        ),
        (
            "[[vm.web.nic]]\nname = \"eth0\"\nswitch = \"lab\"\nlink = \"off\"",
            "9: vm.web.nic[0].link: found \"off\", expected \"up\" or \"down\"",
        ),
        ("services.vss = 1", "6: vm.web.services.vss: found 1, expected true or false"),
        (
            "services.clock = true",
            "6: vm.web.services.clock: unknown key, expected heartbeat, shutdown, time-sync, kvp, vss, dynamic-memory",
        ),
        ("nic = 1", "6: vm.web.nic: found 1, expected a list of adapters, [[vm.NAME.nic]]"),
        ("[[vm.web.nic]]\nswitch = \"lab\"", "6: vm.web.nic[0].name: is missing, expected a name"),
        (
            "[[vm.web.nic]]\nname = \"eth0\"",
            "6: vm.web.nic[0].switch: is missing, expected the name of a switch",
        ),
        (
            "[[vm.web.nic]]\nname = \"eth0\"\nswitch = \"lap\"",
            "6: vm.web.nic[0].switch: there is no switch \"lap\", expected one of lab (did you mean `lab`?)",
        ),
        (
            "[[vm.web.nic]]\nname = \"e/0\"\nswitch = \"lab\"",
            "7: vm.web.nic[0].name: name \"e/0\" contains `/`, expected 1 to 32 of the letters a to z, A to Z, digits, `-`, `_`, `.`, beginning with a letter or digit",
        ),
        (
            "[[vm.web.nic]]\nname = \"abcdefghijklmnopqrstuvwxyz0123\"\nswitch = \"lab\"",
            "7: vm.web.nic[0].name: the adapter's port would be named \"web.abcdefghijklmnopqrstuvwxyz0123\", which has 34 bytes, expected at most 32",
        ),
        (
            "[[vm.web.nic]]\nname = \"eth0\"\nswitch = \"lab\"\ntype = \"virtio\"",
            "9: vm.web.nic[0].type: found \"virtio\", expected \"synthetic\" or \"legacy\"",
        ),
        (
            "[[vm.web.nic]]\nname = \"eth0\"\nswitch = \"lab\"\ntype = \"legacy\"\nqueues = 2",
            "10: vm.web.nic[0].queues: 2 is too many for a legacy adapter, expected 1",
        ),
        (
            "[[vm.web.nic]]\nname = \"eth0\"\nswitch = \"lab\"\nqueues = 65",
            "9: vm.web.nic[0].queues: 65 is out of range, expected 1 to 64",
        ),
        (
            "[[vm.web.nic]]\nname = \"eth0\"\nswitch = \"lab\"\nmac = \"01:00:5e:00:00:01\"",
            "9: vm.web.nic[0].mac: 01:00:5e:00:00:01 is a group address, expected the address of one station",
        ),
        (
            "[[vm.web.nic]]\nname = \"eth0\"\nswitch = \"lab\"\nmtu = 9217",
            "9: vm.web.nic[0].mtu: 9217 is out of range, expected 68 to 9216",
        ),
        (
            "[[vm.web.nic]]\nname = \"eth0\"\nswitch = \"lab\"\nvlan.access = 4095",
            "9: vm.web.nic[0].vlan.access: 4095 is out of range, expected 1 to 4094",
        ),
        (
            "[[vm.web.nic]]\nname = \"eth0\"\nswitch = \"lab\"\nprivate = \"alone\"",
            "9: vm.web.nic[0].private: found \"alone\", expected \"isolated\" or the number of a community from 1 to 65535",
        ),
        (
            "[[vm.web.nic]]\nname = \"eth0\"\nswitch = \"lab\"\nmac-spoofing = 1",
            "9: vm.web.nic[0].mac-spoofing: found 1, expected true or false",
        ),
        (
            "[[vm.web.nic]]\nname = \"e\"\nswitch = \"lab\"\n[[vm.web.nic]]\nname = \"e\"\nswitch = \"lab\"",
            "9: vm.web.nic[1]: adapter e is there twice, expected another name",
        ),
        (
            "[[vm.web.nic]]\nname = \"a\"\nswitch = \"lab\"\nmac = \"02:00:00:00:00:01\"\n[[vm.web.nic]]\nname = \"b\"\nswitch = \"lab\"\nmac = \"02:00:00:00:00:01\"",
            "10: vm.web.nic[1].mac: 02:00:00:00:00:01 in VLAN 0 is the address of port web.a already, expected another",
        ),
        (
            "[[vm.web.nic]]\nname = \"a\"\nswitch = \"lab\"\nmac = \"02:00:00:00:00:01\"\n[[vm.web.nic]]\nname = \"b\"\nswitch = \"lab\"\nvlan.trunk = [7]\nmac = \"02:00:00:00:00:01\"",
            "10: vm.web.nic[1].mac: 02:00:00:00:00:01 in VLAN 7 is the address of port web.a already, expected another",
        ),
        (
            "[[vm.web.nic]]\nname = \"e\"\nswitch = \"lab\"\nmac = \"02:00:00:00:00:01\"\n[switch.lab.port.red]\ntap.name = \"t\"\nmac = \"02:00:00:00:00:01\"",
            "6: vm.web.nic[0].mac: 02:00:00:00:00:01 in VLAN 0 is the address of port red already, expected another",
        ),
        (
            "[[vm.web.nic]]\nname = \"e\"\nswitch = \"lab\"\n[switch.lab.port.\"web.e\"]\ntap.name = \"t\"",
            "6: vm.web.nic[0].name: switch lab has a port web.e already, expected another name",
        ),
    ] {
        let text = with_vm(keys);
        let message = refused(&text);
        assert!(
            message.lines().any(|line| line == format!("switchyard.toml:{expected}")),
            "{text}\n{message}"
        );
    }
    for (keys, expected) in [
        ("memory = 512", "2: vm.web.memory: found 512, expected a size such as \"512M\", or { startup = SIZE, minimum = SIZE, maximum = SIZE, huge = BOOL }".to_owned()),
        ("memory = \"much\"", format!("2: vm.web.memory: found \"much\", {SIZE}")),
        ("memory = \"512MB\"", format!("2: vm.web.memory: found \"512MB\", {SIZE}")),
        ("memory = \"31M\"", format!("2: vm.web.memory: \"31M\" is out of range, {SIZE}")),
        ("memory = \"99999999999T\"", format!("2: vm.web.memory: found \"99999999999T\", {SIZE}")),
        ("memory = \"33M\"", format!("2: vm.web.memory: \"33M\" is no whole number of 2M, {SIZE}")),
        ("memory = {}", format!("2: vm.web.memory.startup: is missing, {SIZE}")),
        (
            "memory = { startup = \"64M\", minimum = \"128M\" }",
            "2: vm.web.memory.minimum: is more than `startup`, expected at most that".to_owned(),
        ),
        (
            "memory = { startup = \"64M\", maximum = \"32M\" }",
            "2: vm.web.memory.maximum: is less than `startup`, expected at least that".to_owned(),
        ),
        (
            "memory = { startup = \"64M\", huge = 1 }",
            "2: vm.web.memory.huge: found 1, expected true or false".to_owned(),
        ),
        (
            "memory = { startup = \"64M\", maximum = \"128M\", huge = true }",
            "2: vm.web.memory.huge: is true with dynamic memory, expected false, or `minimum` and `maximum` equal to `startup`: huge pages cannot be given back in pieces".to_owned(),
        ),
        ("memory = \"64M\"", "1: vm.web.kernel: is missing, expected the path of a bzImage".to_owned()),
    ] {
        let message = refused(&format!("[vm.web]\n{keys}\n"));
        assert!(message.lines().any(|line| line == format!("switchyard.toml:{expected}")), "{keys}\n{message}");
    }
    assert!(refused("vm = 1\n").contains("1: vm: found 1, expected a table of virtual machines by name"));
    assert!(refused("[vm.\"a/b\"]\n").contains("1: vm.\"a/b\": name \"a/b\" contains `/`"));
}

#[test]
fn vm_keys_reach_the_specification() {
    let config = read(&with_vm(
        "vcpus = 2\ninitrd = \"/boot/initrd.img\"\ncmdline = \"\"\nrestart = \"always\"\nautostart = true\n\
         cpu = { reserve = 25, limit = 50, weight = 300, pin = [1, 1], baseline = \"x86-64-v3\" }\n\
         services = { vss = false }\n\
         [[vm.web.nic]]\nname = \"eth0\"\nswitch = \"lab\"\nqueues = 4\nmtu = 9000\nvlan = { access = 10 }\nprivate = 3\n\
         [[vm.web.nic]]\nname = \"eth1\"\nswitch = \"lab\"\ntype = \"legacy\"\nmac = \"02:00:00:00:00:0a\"\nlink = \"down\"",
    ))
    .unwrap();
    let vm = &config.vms[0];
    assert_eq!((vm.name.as_str(), vm.vcpus, vm.memory.startup), ("web", 2, 512 << 20));
    assert_eq!(vm.kernel, Path::new("/etc/switchyard/vmlinuz"));
    assert_eq!((vm.cpu.reserve, vm.cpu.limit, vm.cpu.weight), (25, 50, 300));
    assert!(!vm.services.vss && vm.services.kvp && vm.autostart);
    let [first, second] = vm.nics.as_slice() else { panic!("{vm:?}") };
    assert_eq!((first.queues, first.mtu, &first.vlan), (4, 9000, &VlanMode::Access(10)));
    assert_eq!(first.private, Some(vswitch::spec::PrivateVlan::Community(3)));
    assert_eq!(first.mac, crate::vm::identity::mac("web", "eth0").to_string());
    assert_eq!((first.link, second.link), (LinkState::Up, LinkState::Down));
    assert_eq!(second.mac, "02:00:00:00:00:0a");
}

#[test]
fn definitions_of_a_file_are_requests_with_absolute_paths() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vms.toml");
    std::fs::write(
        &path,
        "[vm.web]\nmemory = \"64M\"\nkernel = \"vmlinuz\"\nnic = [{ name = \"e\", switch = \"lab\" }]\n",
    )
    .unwrap();
    let machine = Machine { cpus: vec![0] };
    let requests = vm_definitions(&path, &machine).unwrap();
    let spec = vm_request(requests[0].clone(), &[0]).unwrap();
    assert_eq!((spec.name.as_str(), spec.kernel), ("web", dir.path().join("vmlinuz")));
    std::fs::write(&path, "[vm.web]\nmemory = \"64M\"\nkernal = \"vmlinuz\"\n[switch.lab]\n").unwrap();
    let refused = vm_definitions(&path, &machine).expect_err("wrong").to_string();
    for expected in
        ["vms.toml:3: vm.web.kernal: unknown key (did you mean `kernel`?)", ":4: switch: unknown key"]
    {
        assert!(refused.contains(expected), "{refused}");
    }
}

#[test]
fn every_baseline_can_be_asked_for() {
    for (name, baseline) in hypervisor::control::Baseline::NAMED {
        let config = read(&with_vm(&format!("cpu.baseline = \"{name}\""))).unwrap();
        assert_eq!(config.vms[0].cpu.baseline, Some(*baseline));
    }
}

#[test]
fn memory_ends_where_the_switch_cannot_map_it() {
    let most = u64::try_from(vmbus::handover::MAX_MEMORY).unwrap();
    assert_eq!(vm::MEMORY.into_inner().1, most);
    let size = |text: &str| vm_change_request(json!({ "memory": text }));
    assert_eq!(size("4T").unwrap().memory, Some(most));
    let message =
        refused("[vm.web]\nkernel = \"vmlinuz\"\nmemory.startup = \"1G\"\nmemory.maximum = \"5T\"\n");
    let expected = "4: vm.web.memory.maximum: \"5T\" is out of range, expected a size from \"32M\" to \"4T\", a multiple of \"2M\"";
    assert_eq!(message, format!("switchyard.toml:{expected}"));
}

#[test]
fn change_of_an_adapter_takes_what_may_change_and_says_what_may_not() {
    let change = json!({ "mac": "02:00:00:00:00:01", "link": "down", "mtu": 9000 });
    let change = nic_change_request(change).unwrap();
    assert_eq!(change.mac, Some(Mac([2, 0, 0, 0, 0, 1])));
    assert_eq!((change.link, change.port.mtu), (Some(LinkState::Down), Some(9000)));
    let refused = |json| nic_change_request(json).expect_err("wrong").to_string();
    assert_eq!(
        refused(json!({ "queues": 2 })),
        "queues: cannot change while the adapter exists, expected to remove it and add it again"
    );
    assert_eq!(refused(json!({ "link": 1 })), "link: found 1, expected \"up\" or \"down\"");
    assert!(refused(json!({ "mac": "ff:ff:ff:ff:ff:ff" })).starts_with("mac: ff:ff:ff:ff:ff:ff"));
    assert_eq!(refused(json!({ "lnik": "up" })), "lnik: unknown key (did you mean `link`?)");
}

#[test]
fn change_of_a_vm_takes_what_may_change_and_says_what_may_not() {
    let change = vm_change_request(json!({ "memory": "96M", "cpu": { "weight": 7 } })).unwrap();
    assert_eq!((change.memory, change.weight, change.limit), (Some(96 << 20), Some(7), None));
    assert_eq!(
        vm_change_request(json!({ "vcpus": 2 })).expect_err("fixed").to_string(),
        "vcpus: cannot change while the VM is defined, expected to delete it and define it again"
    );
    let pin = vm_change_request(json!({ "cpu": { "pin": [0] } })).expect_err("fixed").to_string();
    assert_eq!(pin, "cpu.pin: unknown key, expected reserve, limit, weight");
}
