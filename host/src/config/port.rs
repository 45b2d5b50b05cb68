//! A port's table, in the file and in a request alike.

use vmq::Mac;
use vmq::filter::{MAX_FILTERS, MAX_VLAN};
use vmq::rss::MIN_KEY_LEN;
use vswitch::fabric::PortChange;
use vswitch::spec::{
    Attachment, Pace, PortSpec, PrivateVlan, RssSpec, StaticAddress, SwitchKind, SwitchSpec, VlanMode,
    VmqSpec,
};

use super::attach::{Source, attachment};
use super::field::{Field, Section, wide};
use super::node::Value;

pub(super) const PORT_KEYS: &[&str] = &[
    "vhost-user",
    "tap",
    "uplink",
    "pcap",
    "mtu",
    "mac",
    "security",
    "vlan",
    "private",
    "addresses",
    "offloads",
    "coalesce",
    "vmq",
    "rss",
    "pin",
];
pub(super) const SECURITY_KEYS: &[&str] = &["mac-spoofing", "address-limit"];
pub(super) const VLAN_KEYS: &[&str] = &["access", "trunk", "native"];
pub(super) const ADDRESS_KEYS: &[&str] = &["mac", "vlan"];
pub(super) const VMQ_KEYS: &[&str] = &["mac", "vlan", "queues"];
pub(super) const RSS_KEYS: &[&str] = &["key", "table"];

/// Most entries of an RSS table.
pub(super) const MAX_RSS_TABLE: usize = 512;

/// What a port's table is read against.
#[derive(Debug, Clone, Copy)]
pub(super) struct Surroundings<'a> {
    pub kind: SwitchKind,
    /// Processors of the workers.
    pub cpus: &'a [usize],
    pub source: Source<'a>,
}

/// Reads a port.
pub(super) fn port(name: &str, section: &Section<'_>, around: Surroundings<'_>) -> Option<PortSpec> {
    let attachment = attachment(section, around.source);
    if let Some(Attachment::Uplink { .. }) = attachment
        && around.kind != SwitchKind::External
        && let Some(field) = section.get("uplink")
    {
        field.refuse::<()>("only an external switch has an uplink, expected vhost-user, tap or pcap");
    }
    let vlan = section.get("vlan").map_or(Some(VlanMode::Passthrough), |field| vlan(&field));
    // What could not be read does not bound what follows.
    let queues = attachment.as_ref().map_or(*PortSpec::QUEUES_RANGE.end(), Attachment::queues);
    let carried = vlan.clone().unwrap_or_default();

    // Without an attachment the other keys are read all the same, for the sake of their mistakes.
    let attached = attachment.is_some();
    let nothing = Attachment::Pcap { read: None, write: None, pace: Pace::Recorded, repeat: false };
    let mut spec = PortSpec::new(name, attachment.unwrap_or(nothing));
    read_plain(section, &mut spec);
    if let Some(field) = section.get("security") {
        (spec.spoofing, spec.address_limit) = security(&field).unwrap_or_default();
    }
    if let Some(field) = section.get("addresses") {
        spec.addresses = addresses(&field, &carried).unwrap_or_default();
    }
    if let Some(field) = section.get("vmq") {
        spec.vmq = filters(&field, &carried, queues).unwrap_or_default();
    }
    if let Some(field) = section.get("rss") {
        spec.rss = rss(&field, queues).unwrap_or_default();
    }
    if let Some(field) = section.get("pin") {
        spec.pin = pin(&field, around.cpus, queues).unwrap_or_default();
    }
    spec.vlan = vlan?;
    attached.then_some(spec)
}

fn read_plain(section: &Section<'_>, spec: &mut PortSpec) {
    if let Some(mtu) = section.get("mtu").and_then(|field| mtu(&field)) {
        spec.mtu = mtu;
    }
    spec.mac = section.get("mac").and_then(|field| field.mac());
    spec.private = section.get("private").and_then(|field| private(&field));
    if let Some(offloads) = section.get("offloads").and_then(|field| field.boolean()) {
        spec.offloads = offloads;
    }
    if let Some(coalesce) = section.get("coalesce").and_then(|field| field.boolean()) {
        spec.coalesce = coalesce;
    }
}

/// Reads what may be changed while the port runs.
pub(super) fn change(section: &Section<'_>) -> PortChange {
    let mut change = PortChange {
        mtu: section.get("mtu").and_then(|field| mtu(&field)),
        vlan: section.get("vlan").and_then(|field| vlan(&field)),
        coalesce: section.get("coalesce").and_then(|field| field.boolean()),
        ..PortChange::default()
    };
    if let Some(security) = section.get("security").and_then(|field| field.section(SECURITY_KEYS)) {
        change.spoofing = security.get("mac-spoofing").and_then(|field| field.boolean());
        change.address_limit = security.get("address-limit").and_then(|field| address_limit(&field));
    }
    change
}

/// Keys of [`change`].
pub(super) const CHANGE_KEYS: &[&str] = &["mtu", "vlan", "security", "coalesce"];

pub(super) fn mtu(field: &Field<'_>) -> Option<u16> {
    field.integer(wide(PortSpec::MTU_RANGE))
}

fn security(field: &Field<'_>) -> Option<(bool, Option<u32>)> {
    let section = field.section(SECURITY_KEYS)?;
    let spoofing = section.get("mac-spoofing").and_then(|field| field.boolean());
    let limit = section.get("address-limit").and_then(|field| address_limit(&field));
    Some((spoofing.unwrap_or(false), limit.flatten()))
}

/// A number, or `"none"`.
#[expect(clippy::option_option, reason = "the outer one says whether the value could be read")]
pub(super) fn address_limit(field: &Field<'_>) -> Option<Option<u32>> {
    match &field.node.value {
        Value::Text(text) if text == "none" => Some(None),
        Value::Integer(_) => field.integer(wide(SwitchSpec::ADDRESSES_RANGE)).map(Some),
        _ => field.unexpected(format_args!(
            "an integer from 1 to {} or \"none\"",
            SwitchSpec::ADDRESSES_RANGE.end()
        )),
    }
}

pub(super) fn vlan(field: &Field<'_>) -> Option<VlanMode> {
    const EXPECTED: &str = "\"passthrough\", { access = VLAN } or { trunk = VLANS, native = VLAN }";
    match &field.node.value {
        Value::Text(text) if text == "passthrough" => return Some(VlanMode::Passthrough),
        Value::Table(_) => {}
        _ => return field.unexpected(EXPECTED),
    }
    let section = field.section(VLAN_KEYS)?;
    match (section.get("access"), section.get("trunk"), section.get("native")) {
        (Some(access), None, None) => access.integer(wide(VlanMode::IDS)).map(VlanMode::Access),
        (None, Some(trunk), native) => {
            let members = trunk.set(&wide(VlanMode::IDS));
            let native = native.map_or(Some(None), |native| native.integer(wide(VlanMode::IDS)).map(Some));
            let mut members: Vec<u16> = members?;
            members.sort_unstable();
            Some(VlanMode::Trunk { members, native: native? })
        }
        _ => field.refuse(format!("found another mixture of keys, expected {EXPECTED}")),
    }
}

/// A place in a private VLAN: `"isolated"`, or the number of a community.
pub(super) fn private(field: &Field<'_>) -> Option<PrivateVlan> {
    match &field.node.value {
        Value::Text(text) if text == "isolated" => Some(PrivateVlan::Isolated),
        Value::Integer(_) => field.integer(1..=i128::from(u16::MAX)).map(PrivateVlan::Community),
        _ => field.unexpected("\"isolated\" or the number of a community from 1 to 65535"),
    }
}

/// `mac` and `vlan` of a list's item. The VLAN of an access port need not be repeated.
fn station(section: &Section<'_>, carried: &VlanMode) -> Option<(Mac, u16)> {
    let mac = section.require("mac", "a MAC address").and_then(|field| field.mac());
    let vlan = match (section.get("vlan"), carried.untagged()) {
        (Some(field), _) => {
            let vlan = field.integer(0..=i128::from(MAX_VLAN))?;
            carries(carried, vlan).map_or_else(|expected| field.refuse(expected), |()| Some(vlan))
        }
        (None, Some(vlan)) => Some(vlan),
        (None, None) => {
            section.refuse("names no VLAN, expected `vlan`: the port is a trunk without native VLAN")
        }
    };
    Some((mac?, vlan?))
}

fn carries(carried: &VlanMode, vlan: u16) -> Result<(), String> {
    match carried {
        carried if carried.carries(vlan) => Ok(()),
        VlanMode::Access(access) => Err(format!("{vlan} is not the port's VLAN, expected {access}")),
        _ => Err(format!("{vlan} is no VLAN of the trunk, expected a member or the native VLAN")),
    }
}

fn addresses(field: &Field<'_>, carried: &VlanMode) -> Option<Vec<StaticAddress>> {
    let items = field.items("a list of { mac, vlan }")?;
    let mut list: Vec<StaticAddress> = Vec::with_capacity(items.len());
    for item in &items {
        let section = item.section(ADDRESS_KEYS);
        let Some((mac, vlan)) = section.and_then(|section| station(&section, carried)) else { continue };
        let address = StaticAddress { mac, vlan };
        list.push(address);
    }
    refuse_twice(&items, list.iter().map(|address| (address.mac, address.vlan)));
    Some(list)
}

fn filters(field: &Field<'_>, carried: &VlanMode, queues: u16) -> Option<Vec<VmqSpec>> {
    let items = field.items("a list of { mac, vlan, queues }")?;
    if items.len() > MAX_FILTERS {
        return field.refuse(format!("found {} filters, expected at most {MAX_FILTERS}", items.len()));
    }
    let mut list = Vec::with_capacity(items.len());
    for item in &items {
        let Some(section) = item.section(VMQ_KEYS) else { continue };
        let station = station(&section, carried);
        let served = section
            .require("queues", "a list of queue numbers")
            .and_then(|field| field.set(&(0..=i128::from(queues) - 1)));
        if let (Some((mac, vlan)), Some(queues)) = (station, served) {
            list.push(VmqSpec { mac, vlan, queues });
        }
    }
    refuse_twice(&items, list.iter().map(|filter| (filter.mac, filter.vlan)));
    Some(list)
}

/// No address may be listed twice. Only lists whose items were all read are looked at, so that positions agree.
fn refuse_twice(items: &[Field<'_>], read: impl ExactSizeIterator<Item = (Mac, u16)>) {
    if read.len() != items.len() {
        return;
    }
    let mut seen = std::collections::BTreeSet::new();
    for (item, (mac, vlan)) in items.iter().zip(read) {
        if !seen.insert((mac, vlan)) {
            item.refuse::<()>(format!("{mac} in VLAN {vlan} is listed twice, expected each address once"));
        }
    }
}

fn rss(field: &Field<'_>, queues: u16) -> Option<RssSpec> {
    let section = field.section(RSS_KEYS)?;
    let key = section.get("key").and_then(|field| rss_key(&field));
    let table = section.get("table").and_then(|field| {
        let table: Vec<u16> = field.sequence(&(0..=i128::from(queues) - 1))?;
        match table.len() {
            length if length.is_power_of_two() && length <= MAX_RSS_TABLE => Some(table),
            length => field.refuse(format!(
                "the table has {length} entries, expected a power of two up to {MAX_RSS_TABLE}"
            )),
        }
    });
    Some(RssSpec { key, table })
}

fn rss_key(field: &Field<'_>) -> Option<Vec<u8>> {
    let expected = format!("{MIN_KEY_LEN} bytes as {} hexadecimal digits", 2 * MIN_KEY_LEN);
    let digits: Option<Vec<u8>> = field
        .text(&expected)?
        .chars()
        .filter(|&c| c != ':')
        .map(|c| c.to_digit(16).and_then(|digit| u8::try_from(digit).ok()))
        .collect();
    match digits {
        Some(digits) if digits.len() == 2 * MIN_KEY_LEN => {
            Some(digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect())
        }
        Some(digits) => {
            field.refuse(format!("found {} hexadecimal digits, expected {expected}", digits.len()))
        }
        None => field.unexpected(expected),
    }
}

fn pin(field: &Field<'_>, cpus: &[usize], queues: u16) -> Option<Vec<usize>> {
    let list: Vec<usize> = field.sequence(&(0..=super::MAX_CPU))?;
    if let Some((index, cpu)) = list.iter().enumerate().find(|(_, cpu)| !cpus.contains(cpu)) {
        return field.refuse(format!("[{index}] is processor {cpu}, expected one of workers.cpus {cpus:?}"));
    }
    match list.len() {
        length if length == usize::from(queues) => Some(list),
        length => field.refuse(format!("{length} processors for {queues} queues, expected one a queue")),
    }
}
