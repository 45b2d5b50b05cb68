//! What a port is attached to: `vhost-user`, `tap`, `uplink` or `pcap`.

use std::path::{Path, PathBuf};

use vswitch::spec::{Attachment, Pace, PortSpec, SocketMode, TapSpec};

use super::field::{Field, Section, wide};
use super::names::{MAX_SOCKET_PATH, check_device};

/// Keys of which a port has exactly one.
pub(super) const KINDS: &[&str] = &["vhost-user", "tap", "uplink", "pcap"];
pub(super) const VHOST_USER_KEYS: &[&str] = &["path", "mode", "queues"];
pub(super) const TAP_KEYS: &[&str] = &["name", "fds", "queues"];
pub(super) const UPLINK_KEYS: &[&str] = &["device", "queues"];
pub(super) const PCAP_KEYS: &[&str] = &["read", "write", "pace", "repeat"];

/// Where a configuration comes from.
#[derive(Debug, Clone, Copy)]
pub enum Source<'a> {
    /// A file: relative paths are taken from this directory.
    File(&'a Path),
    /// A request: paths are absolute, and descriptors cannot be meant.
    Request,
}

impl Source<'_> {
    pub(super) fn path(self, field: &Field<'_>) -> Option<PathBuf> {
        let path = Path::new(field.text("a path")?);
        match self {
            Self::File(directory) => Some(directory.join(path)),
            Self::Request if path.is_absolute() => Some(path.to_owned()),
            Self::Request => field.unexpected("an absolute path"),
        }
    }
}

/// Path of a Unix socket.
pub(super) fn socket_path(field: &Field<'_>, source: Source<'_>) -> Option<PathBuf> {
    let path = source.path(field)?;
    match path.as_os_str().len() {
        0..=MAX_SOCKET_PATH => Some(path),
        length => field.refuse(format!(
            "the path has {length} bytes, expected at most {MAX_SOCKET_PATH} for a Unix socket"
        )),
    }
}

/// Reads the one attachment of a port.
pub(super) fn attachment(port: &Section<'_>, source: Source<'_>) -> Option<Attachment> {
    let found: Vec<_> = KINDS.iter().filter_map(|&kind| Some((kind, port.get(kind)?))).collect();
    match found.as_slice() {
        [] => port.refuse(format!("is attached to nothing, expected one of {}", KINDS.join(", "))),
        [(kind, field)] => match *kind {
            "vhost-user" => vhost_user(&field.section(VHOST_USER_KEYS)?, source),
            "tap" => tap(&field.section(TAP_KEYS)?, source),
            "uplink" => uplink(&field.section(UPLINK_KEYS)?),
            _ => pcap(&field.section(PCAP_KEYS)?, source),
        },
        [(first, _), (second, field), ..] => {
            field.refuse(format!("the port has `{first}` as well as `{second}`, expected one of them"))
        }
    }
}

/// `queues`, 1 unless given; none if it is wrong.
fn queues(section: &Section<'_>) -> Option<u16> {
    match section.get("queues") {
        Some(field) => field.integer(wide(PortSpec::QUEUES_RANGE)),
        None => Some(1),
    }
}

fn vhost_user(section: &Section<'_>, source: Source<'_>) -> Option<Attachment> {
    let path = section.require("path", "the path of a Unix socket");
    let path = path.and_then(|field| socket_path(&field, source));
    let mode = match section.get("mode") {
        Some(field) => field.choice(&[("server", SocketMode::Server), ("client", SocketMode::Client)]),
        None => Some(SocketMode::Server),
    };
    let queues = queues(section);
    Some(Attachment::VhostUser { path: path?, mode: mode?, queues: queues? })
}

/// Name of a network device.
pub(super) fn device(field: &Field<'_>, expected: &str) -> Option<String> {
    let name = field.text(expected)?;
    match check_device(name) {
        Ok(()) => Some(name.to_owned()),
        Err(message) => field.refuse(message),
    }
}

fn tap(section: &Section<'_>, source: Source<'_>) -> Option<Attachment> {
    let queues = queues(section);
    match (section.get("name"), section.get("fds")) {
        (Some(name), None) => {
            let name = device(&name, "the name of a TAP device");
            Some(Attachment::Tap { tap: TapSpec::Name(name?), queues: queues? })
        }
        (None, Some(fds)) => {
            let list = descriptors(&fds, source)?;
            let queues =
                if section.get("queues").is_some() { queues? } else { u16::try_from(list.len()).ok()? };
            if list.len() != usize::from(queues) {
                let found = list.len();
                return fds.refuse(format!("{found} descriptors for {queues} queues, expected one a queue"));
            }
            Some(Attachment::Tap { tap: TapSpec::Fds(list), queues })
        }
        (Some(_), Some(fds)) => fds.refuse("found `fds` as well as `name`, expected one of them"),
        (None, None) => section.refuse("names no device, expected `name` or `fds`"),
    }
}

/// Descriptors that the daemon inherited: 0 to 2 are its standard streams.
fn descriptors(field: &Field<'_>, source: Source<'_>) -> Option<Vec<i32>> {
    if let Source::Request = source {
        return field.refuse("descriptors are inherited when the daemon starts, expected `name`");
    }
    let list: Vec<i32> = field.sequence(&(3..=i128::from(i32::MAX)))?;
    let most = *PortSpec::QUEUES_RANGE.end();
    if list.len() > usize::from(most) {
        let found = list.len();
        return field.refuse(format!("found {found} descriptors, expected at most {most}"));
    }
    match list.iter().enumerate().find(|&(index, fd)| list[..index].contains(fd)) {
        Some((_, twice)) => field.refuse(format!("{twice} is listed twice, expected one descriptor a queue")),
        None => Some(list),
    }
}

fn uplink(section: &Section<'_>) -> Option<Attachment> {
    const EXPECTED: &str = "the name of a network device";
    let device = section.require("device", EXPECTED).and_then(|field| device(&field, EXPECTED));
    let queues = queues(section);
    Some(Attachment::Uplink { device: device?, queues: queues? })
}

fn pcap(section: &Section<'_>, source: Source<'_>) -> Option<Attachment> {
    let file = |key| section.get(key).map(|field| source.path(&field));
    let (read, write) = (file("read"), file("write"));
    if read.is_none() && write.is_none() {
        return section.refuse("names no file, expected `read`, `write` or both");
    }
    let mut repeat = false;
    if let Some(field) = section.get("repeat") {
        repeat = field.boolean()?;
        if repeat && read.is_none() {
            return field.refuse("there is nothing to repeat, expected `read` as well");
        }
    }
    let mut pace = Pace::Recorded;
    if let Some(field) = section.get("pace") {
        pace = field.choice(&[("recorded", Pace::Recorded), ("full", Pace::Full)])?;
    }
    // A file that was given and refused must not look like one that was not given.
    let (read, write) = (
        read.map_or(Some(None), |path| path.map(Some))?,
        match write {
            Some(path) => Some(path?),
            None => None,
        },
    );
    if read.is_some() && read == write {
        return section.refuse("`read` and `write` are the same file, expected two");
    }
    Some(Attachment::Pcap { read, write, pace, repeat })
}
