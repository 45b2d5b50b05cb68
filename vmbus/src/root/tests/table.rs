//! Each message of a guest in each state: every cell has its outcome.

use super::*;

/// The messages: name and bytes. GPADL 0x10 is channel 1's ring, 0x20 another of its GPADLs, 0x30 is in progress.
fn messages() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("contact", contact(Version::V5_3.to_wire(), 0)),
        ("contact 6.0", contact(0x6_0000, 0)),
        ("request offers", encode(&RequestOffers {})),
        ("open", open(1, 0x20)),
        ("open badly", open(1, 0x99)),
        ("close", close(1)),
        ("gpadl", gpadl(1, 0x40, 8, 8)),
        ("gpadl begun", gpadl(1, 0x40, 8, 4)),
        ("gpadl again", gpadl(1, 0x20, 8, 8)),
        ("body", body(0x30, 4)),
        ("teardown ring", teardown(1, 0x10)),
        ("teardown other", teardown(1, 0x20)),
        ("teardown begun", teardown(1, 0x30)),
        ("released", released(1)),
        ("modify", modify(1, 2)),
        ("socket", encode(&TlConnectRequest { endpoint: Guid::ZERO, service: Guid::ZERO })),
        ("unload", encode(&Unload {})),
        ("open subchannel", open(2, 0x50)),
        ("close subchannel", close(2)),
        ("released subchannel", released(2)),
        ("host's own", encode(&AllOffersDelivered {})),
        ("unknown", vec![25, 0, 0, 0, 0, 0, 0, 0]),
    ]
}

/// A root brought to the state of this name.
fn state(name: &str) -> Rig {
    state_in(Version::V5_3, name)
}

fn state_in(version: Version, name: &str) -> Rig {
    if name == "disconnected" {
        let mut rig = Rig::new(version);
        rig.root.offer(spec(1)).unwrap();
        return rig;
    }
    if name == "connected" {
        let mut rig = state_in(version, "disconnected");
        rig.say(&contact(version.to_wire(), 0)).unwrap();
        rig.heard();
        return rig;
    }
    let (mut rig, device) = Rig::offered(version);
    let primary = key(device, 0);
    rig.share(device, 1, 0x10);
    rig.share(device, 1, 0x20);
    rig.say(&gpadl(1, 0x30, 8, 4)).unwrap();
    let opening = |rig: &mut Rig| rig.say(&open(1, 0x10)).unwrap();
    let opened = |rig: &mut Rig| {
        opening(rig);
        rig.root.opened(primary, true);
    };
    match name {
        "closed" => {}
        "opening" => opening(&mut rig),
        "abandoned" => {
            opening(&mut rig);
            rig.say(&close(1)).unwrap();
        }
        "open" => opened(&mut rig),
        "modifying" => {
            opened(&mut rig);
            if version >= Version::V4_1 {
                rig.say(&modify(1, 3)).unwrap();
            }
        }
        "closing" => {
            opened(&mut rig);
            rig.say(&close(1)).unwrap();
        }
        "reopening" => {
            opened(&mut rig);
            rig.say(&close(1)).unwrap();
            rig.say(&open(1, 0x10)).unwrap();
        }
        "rescinded open" => {
            opened(&mut rig);
            rig.root.withdraw(device);
        }
        "rescinded" => rig.root.withdraw(device),
        "released open" => {
            opened(&mut rig);
            rig.root.withdraw(device);
            rig.say(&released(1)).unwrap();
        }
        "gone" => {
            rig.root.withdraw(device);
            rig.say(&released(1)).unwrap();
            rig.root.gpadl_released(device, GpadlId(0x10));
            rig.root.gpadl_released(device, GpadlId(0x20));
        }
        "draining" => rig.say(&encode(&Unload {})).unwrap(),
        "renewing" => {
            opened(&mut rig);
            rig.say(&contact(version.to_wire(), 0)).unwrap();
        }
        "subchannel open" => {
            opened(&mut rig);
            rig.root.offer_subchannels(device, 1).unwrap();
            rig.share(device, 2, 0x50);
            rig.say(&open(2, 0x50)).unwrap();
            rig.root.opened(key(device, 1), true);
        }
        "subchannel rescinded" => {
            rig = state_in(version, "subchannel open");
            rig.say(&close(1)).unwrap();
        }
        "reset" => rig.root.reset(),
        other => panic!("no state {other}"),
    }
    rig.heard();
    rig
}

/// What a message brings about: the actions, or the mistake, and the state that follows if it is another.
fn outcome(rig: &mut Rig, message: &[u8]) -> String {
    match rig.say(message) {
        Ok(()) => {
            let heard = rig.heard();
            if heard.is_empty() { "-".into() } else { heard.join(", ") }
        }
        Err(error) => {
            assert!(rig.heard().is_empty(), "an error, and yet an action");
            format!("!{}", mistake(&error))
        }
    }
}

fn mistake(error: &GuestError) -> &'static str {
    match error {
        GuestError::Malformed(_) => "malformed",
        GuestError::WrongConnection(_) => "connection id",
        GuestError::NotConnected(_) => "not connected",
        GuestError::NoProcessor(_) => "processor",
        GuestError::OffersRequestedTwice => "twice",
        GuestError::UnknownChannel { .. } => "channel",
        GuestError::UnknownGpadl { .. } => "gpadl",
        GuestError::NotOpen { .. } => "not open",
        GuestError::NotRescinded(_) => "not rescinded",
        GuestError::NotInVersion { .. } => "version",
        GuestError::Busy => "busy",
    }
}

const STATES: [&str; 18] = [
    "disconnected",
    "connected",
    "closed",
    "opening",
    "abandoned",
    "open",
    "modifying",
    "closing",
    "reopening",
    "rescinded",
    "rescinded open",
    "released open",
    "gone",
    "draining",
    "reset",
    "renewing",
    "subchannel open",
    "subchannel rescinded",
];

#[test]
fn every_message_in_every_state_has_its_outcome() {
    let mut actual = String::new();
    for name in STATES {
        for (message, bytes) in messages() {
            let outcome = outcome(&mut state(name), &bytes);
            actual.push_str(&format!("{name} | {message} | {outcome}\n"));
        }
    }
    let expected = include_str!("table.txt");
    for (actual, expected) in actual.lines().zip(expected.lines()) {
        assert_eq!(actual, expected);
    }
    assert_eq!(actual.lines().count(), expected.lines().count());
}

/// What an older version changes: how redirections are answered, and that this guest's contact for 5.3 comes on the old
/// connection id.
#[test]
fn older_versions_have_the_same_outcomes_but_for_redirection() {
    for version in Version::ALL.into_iter().filter(|version| *version < Version::V5_3) {
        for name in STATES {
            for (message, bytes) in messages() {
                let actual = outcome(&mut state_in(version, name), &bytes);
                let expected = match (name, message) {
                    ("disconnected", "contact") if version < Version::V5_0 => "version no".into(),
                    ("open" | "subchannel open", "modify") if version >= Version::V4_1 => "MODIFY 0 2".into(),
                    ("modifying", "modify") if version >= Version::V4_1 => "-".into(),
                    ("disconnected" | "draining" | "reset" | "renewing", "modify") => "!not connected".into(),
                    (_, "modify") if version < Version::V4_1 => "!version".into(),
                    ("connected" | "gone" | "released open", "modify") => "!channel".into(),
                    (_, "modify") => "!not open".into(),
                    // No redirection is under way that would have to be answered.
                    ("modifying", _) => outcome(&mut state("open"), &bytes),
                    _ => outcome(&mut state(name), &bytes),
                };
                assert_eq!(actual, expected, "{version} {name}: {message}");
            }
        }
    }
}

#[test]
fn reset_in_any_state_lets_everything_go_and_the_next_guest_in() {
    for name in STATES {
        let mut rig = state(name);
        rig.root.reset();
        rig.heard();
        rig.root.unloaded();
        let left = rig.root.describe();
        assert_eq!(
            (left.connection, left.gpadls, left.gpadl_pages),
            (ConnectionStatus::Disconnected, 0, 0),
            "{name}"
        );
        assert!(left.devices.iter().all(|device| device.channels.len() == 1), "{name}");
        rig.say(&contact(Version::V5_3.to_wire(), 0)).unwrap();
        assert_eq!(rig.heard(), ["version ok"], "{name}");
    }
}
