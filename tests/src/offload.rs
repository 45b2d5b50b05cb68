//! Offloads of a station's network card, as `ethtool` shows and switches them.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::station::Station;

const LIMIT: Duration = Duration::from_secs(60);

/// An offload: what `ethtool -K` takes, and what `ethtool -k` shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offload {
    /// For `ethtool -K`.
    pub key: &'static str,
    /// In `ethtool -k`.
    pub shown: &'static str,
}

const fn offload(key: &'static str, shown: &'static str) -> Offload {
    Offload { key, shown }
}

/// Checksums of received frames, taken from whoever brings them.
pub const RX: Offload = offload("rx", "rx-checksumming");
/// Large frames received.
pub const LRO: Offload = offload("lro", "large-receive-offload");
/// Checksums of frames to send.
pub const TX: Offload = offload("tx", "tx-checksumming");
/// TCP segmentation by the card.
pub const TSO: Offload = offload("tso", "tcp-segmentation-offload");
/// Segmentation as late as possible.
pub const GSO: Offload = offload("gso", "generic-segmentation-offload");
/// Hashes of received frames.
pub const HASH: Offload = offload("rxhash", "receive-hashing");
/// Those that every card of a switch's client can turn off and on. Without the first two there is no segmentation.
pub const SWITCHABLE: [Offload; 5] =
    [TX, offload("sg", "scatter-gather"), TSO, GSO, offload("gro", "generic-receive-offload")];

/// What `ethtool -k` says of an offload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct State {
    /// It is on.
    pub on: bool,
    /// It cannot be changed.
    pub fixed: bool,
}

impl Offload {
    /// As it is now.
    pub fn state(self, at: &dyn Station, device: &str) -> Result<State> {
        let text = at.check(&format!("ethtool -k {device}"), LIMIT)?;
        parse(&text, self.shown).with_context(|| format!("no {} in {text}", self.shown))
    }

    /// Turns it on or off, and sees that it is so: `ethtool -K` also ends well where nothing can be changed.
    pub fn set(self, at: &dyn Station, device: &str, on: bool) -> Result<()> {
        let Self { key, shown } = self;
        at.check(&format!("ethtool -K {device} {key} {}", if on { "on" } else { "off" }), LIMIT)?;
        let state = self.state(at, device)?;
        let wanted = State { on, fixed: false };
        ensure!(state == wanted, "{}: {shown} of {device} is {state:?} after it was set to {on}", at.name());
        Ok(())
    }
}

/// Has `try_it` run with each offload that can be switched off, and on again.
pub fn each_off_and_on(at: &dyn Station, device: &str, try_it: impl Fn() -> Result<()>) -> Result<()> {
    if !RX.state(at, device)?.fixed {
        bail!("{}: {} of {device} can be switched, and is not tried", at.name(), RX.shown);
    }
    for offload in SWITCHABLE {
        for on in [false, true] {
            offload.set(at, device, on)?;
            try_it().with_context(|| format!("{}: {device}: {} {on}", at.name(), offload.shown))?;
        }
        // What went off with it comes back.
        for other in SWITCHABLE {
            other.set(at, device, true)?;
        }
    }
    Ok(())
}

fn parse(text: &str, name: &str) -> Option<State> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))?;
    let mut words = line.split_whitespace();
    Some(State { on: words.next()? == "on", fixed: words.any(|word| word == "[fixed]") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fixed_and_changeable_features_are_told_apart() {
        let text =
            "Features for eth0:\nrx-checksumming: on [fixed]\ntx-checksumming: off\n\ttx-checksum-ipv4: on\n";
        assert_eq!(parse(text, RX.shown), Some(State { on: true, fixed: true }));
        assert_eq!(parse(text, TX.shown), Some(State { on: false, fixed: false }));
        assert_eq!(parse(text, LRO.shown), None);
    }
}
