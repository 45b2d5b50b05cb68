//! A switch's table, with its ports.

use vswitch::spec::{Attachment, PortSpec, SwitchKind, SwitchSpec, TapSpec};

use super::attach::{Source, device};
use super::field::{Field, Section, wide};
use super::names::{MAX_DEVICE, check_name};
use super::node::Value;
use super::port::{PORT_KEYS, Surroundings, port};

pub(super) const SWITCH_KEYS: &[&str] = &["type", "addresses", "aging", "uplink", "host", "port"];

/// Name of the port that `uplink = "eth0"` makes.
pub const UPLINK_PORT: &str = "uplink";
/// Name of the port that an internal switch has for the host.
pub const HOST_PORT: &str = "host";

/// A switch with the ports that it begins with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SwitchConfig {
    /// The switch.
    pub switch: SwitchSpec,
    /// Its ports, in the order of the file.
    pub ports: Vec<PortSpec>,
}

/// Reads a switch.
pub(super) fn switch(
    name: &str,
    section: &Section<'_>,
    cpus: &[usize],
    source: Source<'_>,
) -> Option<SwitchConfig> {
    let kind = section.require("type", KINDS_EXPECTED).and_then(|field| field.choice(KINDS));
    let mut spec = SwitchSpec {
        name: name.to_owned(),
        // Keys that depend on the kind are not complained about if it is unknown.
        kind: kind.unwrap_or(SwitchKind::External),
        addresses: SwitchSpec::ADDRESSES,
        aging: SwitchSpec::AGING,
    };
    if let Some(field) = section.get("addresses") {
        spec.addresses = field.integer(wide(SwitchSpec::ADDRESSES_RANGE)).unwrap_or(spec.addresses);
    }
    if let Some(field) = section.get("aging") {
        spec.aging = field.integer(wide(SwitchSpec::AGING_RANGE)).unwrap_or(spec.aging);
    }
    let mut ports: Vec<_> = kind.and_then(|kind| outer_port(section, name, kind)).into_iter().collect();
    if let Some(table) = section.get("port").and_then(|field| field.entries("a table of ports by name")) {
        for (port_name, field) in table.fields() {
            let around = Surroundings { kind: spec.kind, cpus, source };
            ports.extend(named_port(port_name, &field, around, &ports));
        }
    }
    kind?;
    Some(SwitchConfig { switch: spec, ports })
}

const KINDS: &[(&str, SwitchKind)] = &[
    ("external", SwitchKind::External),
    ("internal", SwitchKind::Internal),
    ("private", SwitchKind::Private),
];
const KINDS_EXPECTED: &str = "\"external\", \"internal\" or \"private\"";

/// A port under its name; `others` are those made by `uplink` and `host`, and those before it.
fn named_port(
    name: &str,
    field: &Field<'_>,
    around: Surroundings<'_>,
    others: &[PortSpec],
) -> Option<PortSpec> {
    if let Err(message) = check_name(name) {
        field.refuse::<()>(message);
    }
    if others.iter().any(|other| other.name == name) {
        return field.refuse("the name is taken by the port that `uplink` or `host` makes, expected another");
    }
    port(name, &field.section(PORT_KEYS)?, around)
}

/// The port that leads out of the switch: `uplink` of an external, `host` of an internal one.
fn outer_port(section: &Section<'_>, name: &str, kind: SwitchKind) -> Option<PortSpec> {
    if let (Some(field), false) = (section.get("uplink"), kind == SwitchKind::External) {
        field.refuse::<()>("only an external switch has an uplink, expected type = \"external\"");
    }
    if let (Some(field), false) = (section.get("host"), kind == SwitchKind::Internal) {
        field.refuse::<()>("only an internal switch has a port for the host, expected type = \"internal\"");
    }
    match kind {
        SwitchKind::External => {
            let device = device(&section.get("uplink")?, "the name of a network device")?;
            Some(PortSpec::new(UPLINK_PORT, Attachment::Uplink { device, queues: 1 }))
        }
        SwitchKind::Internal => {
            let tap = TapSpec::Name(host_device(section, name)?);
            Some(PortSpec::new(HOST_PORT, Attachment::Tap { tap, queues: 1 }))
        }
        SwitchKind::Private => None,
    }
}

/// Name of the TAP device of an internal switch.
fn host_device(section: &Section<'_>, switch: &str) -> Option<String> {
    const EXPECTED: &str = "true or the name of a TAP device";
    let own = format!("yard-{switch}");
    match section.get("host") {
        Some(field) => match &field.node.value {
            Value::Text(_) => device(&field, EXPECTED),
            Value::Bool(true) if own.len() <= MAX_DEVICE => Some(own),
            Value::Bool(true) => field.refuse(too_long(&own)),
            Value::Bool(false) => {
                field.refuse("found false, but the host is a port of an internal switch, expected true or type = \"private\"")
            }
            _ => field.unexpected(EXPECTED),
        },
        None if own.len() <= MAX_DEVICE => Some(own),
        None => section.refuse(too_long(&own)),
    }
}

fn too_long(own: &str) -> String {
    format!(
        "the host's TAP device cannot be named \"{own}\", which has {} bytes, expected host = \"NAME\" of at most {MAX_DEVICE}",
        own.len()
    )
}
