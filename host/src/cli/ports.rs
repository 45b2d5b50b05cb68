//! Requests for switches and ports, from the words of the command line.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::args::{ChangeArgs, Kind, PortAdd, SwitchAdd};
use super::failure::Failure;

/// The request that adds a switch.
pub fn new_switch(args: &SwitchAdd) -> Value {
    let kind = match args.kind {
        Kind::External => "external",
        Kind::Internal => "internal",
        Kind::Private => "private",
    };
    let mut body = Map::from_iter([("name".into(), json!(args.switch)), ("type".into(), json!(kind))]);
    put(&mut body, "uplink", args.uplink.as_ref());
    put(&mut body, "host", args.host.as_ref());
    put(&mut body, "addresses", args.addresses);
    put(&mut body, "aging", args.aging);
    body.into()
}

/// The request that adds a port. Paths are made absolute, as the daemon is elsewhere.
pub fn new_port(args: &PortAdd) -> Result<Value, Failure> {
    let mut body = extra(args.with.as_deref())?;
    body.insert("name".into(), json!(args.port.port));
    let (kind, attachment) = attachment(args)?;
    body.insert(kind.into(), attachment);
    put(&mut body, "mtu", args.mtu);
    put(&mut body, "mac", args.mac.as_ref());
    put(&mut body, "pin", args.pin.as_ref());
    put(&mut body, "vlan", vlan(args.vlan.access, args.vlan.trunk.as_deref(), args.vlan.native));
    put(&mut body, "offloads", args.no_offloads.then_some(false));
    put(&mut body, "coalesce", args.no_coalesce.then_some(false));
    let mut security = Map::new();
    put(&mut security, "mac-spoofing", args.mac_spoofing.then_some(true));
    put(&mut security, "address-limit", args.address_limit);
    put(&mut body, "security", Some(security).filter(|security| !security.is_empty()));
    Ok(body.into())
}

/// The request that changes a port.
pub fn port_change(args: &ChangeArgs) -> Result<Map<String, Value>, Failure> {
    let mut body = Map::new();
    put(&mut body, "mtu", args.mtu);
    put(&mut body, "vlan", vlan(args.access, args.trunk.as_deref(), args.native));
    put(&mut body, "vlan", args.passthrough.then_some("passthrough"));
    put(&mut body, "coalesce", args.coalesce);
    let mut security = Map::new();
    put(&mut security, "mac-spoofing", args.mac_spoofing);
    match args.address_limit.as_deref() {
        None => {}
        Some("none") => put(&mut security, "address-limit", Some("none")),
        Some(text) => match text.parse::<u64>() {
            Ok(limit) => put(&mut security, "address-limit", Some(limit)),
            Err(_) => {
                return Err(Failure::usage(format!(
                    "--address-limit: found {text:?}, expected a number or none"
                )));
            }
        },
    }
    put(&mut body, "security", Some(security).filter(|security| !security.is_empty()));
    Ok(body)
}

/// What `--with` adds.
pub fn extra(with: Option<&str>) -> Result<Map<String, Value>, Failure> {
    let Some(text) = with else { return Ok(Map::new()) };
    match serde_json::from_str(text) {
        Ok(Value::Object(body)) => Ok(body),
        Ok(_) => Err(Failure::usage("--with: expected a JSON object")),
        Err(error) => Err(Failure::usage(format!("--with: {error}"))),
    }
}

pub fn put<T: serde::Serialize>(body: &mut Map<String, Value>, key: &str, value: Option<T>) {
    if let Some(value) = value {
        body.insert(key.into(), json!(value));
    }
}

pub fn vlan(access: Option<u16>, trunk: Option<&str>, native: Option<u16>) -> Option<Value> {
    match (access, trunk, native) {
        (Some(access), _, _) => Some(json!({ "access": access })),
        (None, Some(trunk), Some(native)) => Some(json!({ "trunk": trunk, "native": native })),
        (None, Some(trunk), None) => Some(json!({ "trunk": trunk })),
        (None, None, _) => None,
    }
}

fn attachment(args: &PortAdd) -> Result<(&'static str, Value), Failure> {
    let queues = args.queues.unwrap_or(1);
    if let Some(path) = &args.vhost_user {
        let mode = if args.client { "client" } else { "server" };
        return Ok(("vhost-user", json!({ "path": absolute(path)?, "mode": mode, "queues": queues })));
    }
    if let Some(name) = &args.tap {
        return Ok(("tap", json!({ "name": name, "queues": queues })));
    }
    if let Some(device) = &args.uplink {
        return Ok(("uplink", json!({ "device": device, "queues": queues })));
    }
    let mut files = Map::new();
    put(&mut files, "read", args.pcap_read.as_deref().map(absolute).transpose()?);
    put(&mut files, "write", args.pcap_write.as_deref().map(absolute).transpose()?);
    put(&mut files, "pace", args.full_speed.then_some("full"));
    put(&mut files, "repeat", args.repeat.then_some(true));
    Ok(("pcap", files.into()))
}

pub fn absolute(path: &Path) -> Result<String, Failure> {
    let path =
        std::path::absolute(path).map_err(|error| Failure::usage(format!("{}: {error}", path.display())))?;
    match path.into_os_string().into_string() {
        Ok(path) => Ok(path),
        Err(path) => Err(Failure::usage(format!("{}: expected a path in UTF-8", path.display()))),
    }
}
