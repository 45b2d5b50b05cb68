//! Saving and restoring a NIC's protocol state, because the process may restart under a running guest.
//!
//! What is restored was written by an earlier process, but lies where others may write: everything is checked as if a
//! guest had sent it.

use serde::{Deserialize, Serialize};
use thiserror::Error;
use vmq::Mac;

use super::query::MAX_MULTICAST;
use super::state::{Area, Session, State};
use super::{MAX_BUFFER_BYTES, MIN_MTU, Nvsp, Statistics, rss};
use crate::message::Waiting;

/// Version of the saved form.
const FORMAT: u32 = 1;
/// The smallest section that Linux takes.
const MIN_SECTION: u32 = 68;

#[derive(Serialize, Deserialize)]
struct Saved {
    format: u32,
    mac: [u8; 6],
    link_up: bool,
    state: State,
    /// As they were when something else changed, or the process ended in order.
    #[serde(default)]
    statistics: Statistics,
    #[serde(default)]
    waiting: Waiting,
}

/// Why saved state was refused.
#[derive(Debug, Error)]
pub enum RestoreError {
    /// It cannot be read.
    #[error("saved NIC state cannot be read")]
    Unreadable(#[source] serde_json::Error),
    /// Another program wrote it.
    #[error("saved NIC state has format {0}, expected {FORMAT}")]
    Format(u32),
    /// It contradicts itself, or limits that hold for any guest.
    #[error("saved NIC state is wrong: {0}")]
    Invalid(&'static str),
}

impl Nvsp {
    /// All that [`Nvsp::restore`] needs, in a few KiB.
    pub fn save(&self) -> Vec<u8> {
        let saved = Saved {
            format: FORMAT,
            mac: self.mac.0,
            link_up: self.link.is_up(),
            state: self.state.clone(),
            statistics: self.statistics,
            waiting: self.waiting.clone(),
        };
        // Cannot fail: no map, no foreign type. An empty answer would be refused by `restore`.
        serde_json::to_vec(&saved).unwrap_or_default()
    }

    /// What [`Nvsp::save`] says is kept.
    pub(crate) fn set_kept(&mut self) {
        self.kept = Some((self.state.clone(), self.mac, self.link.is_up(), self.waiting.clone()));
    }

    /// True if nothing but statistics has changed since.
    pub(crate) fn is_kept(&self) -> bool {
        self.kept.as_ref().is_some_and(|(state, mac, up, waiting)| {
            *state == self.state && *mac == self.mac && *up == self.link.is_up() && *waiting == self.waiting
        })
    }

    /// Takes up where the process that called [`Nvsp::save`] left off. A buffer whose mapping was under way is absent
    /// again: the guest's request was not completed, so it is read again.
    ///
    /// # Errors
    /// [`RestoreError`]; nothing has changed then.
    pub fn restore(&mut self, bytes: &[u8]) -> Result<(), RestoreError> {
        let saved: Saved = serde_json::from_slice(bytes).map_err(RestoreError::Unreadable)?;
        if saved.format != FORMAT {
            return Err(RestoreError::Format(saved.format));
        }
        let mac = Mac(saved.mac);
        if !mac.is_station() {
            return Err(RestoreError::Invalid("address of a group"));
        }
        let mut state = saved.state;
        if let State::Agreed(session) = &mut state {
            self.check(session)?;
        }
        self.mac = mac;
        self.link.set(saved.link_up);
        self.statistics = saved.statistics;
        self.waiting = saved.waiting;
        self.state = state;
        Ok(())
    }

    fn check(&self, session: &mut Session) -> Result<(), RestoreError> {
        for area in [&mut session.receive, &mut session.send] {
            match *area {
                Area::Mapped(buffer) => {
                    let fits = buffer.bytes() <= u64::from(MAX_BUFFER_BYTES) && buffer.sections != 0;
                    if !fits || buffer.section_size < MIN_SECTION {
                        return Err(RestoreError::Invalid("buffer of impossible size"));
                    }
                }
                Area::Mapping { .. } => *area = Area::Absent,
                Area::Absent => {}
            }
        }
        if session.mtu < MIN_MTU || session.subchannels >= super::MAX_QUEUES {
            return Err(RestoreError::Invalid("MTU or number of channels out of range"));
        }
        let offered = super::Offloads::offered(&self.config, session);
        if session.device().is_some_and(|device| device.multicast.len() > MAX_MULTICAST) {
            return Err(RestoreError::Invalid("too many group addresses"));
        }
        let subchannels = session.subchannels;
        let Some(device) = session.device_mut() else { return Ok(()) };
        device.offloads = device.offloads.and(offered);
        let Some(spread) = &device.rss else { return Ok(()) };
        let table = &spread.table;
        let fits = table.len().is_power_of_two()
            && table.len() <= usize::from(rss::TABLE_ENTRIES)
            && table.iter().all(|index| *index <= subchannels)
            && spread.key.len() == vmq::rss::MIN_KEY_LEN;
        if fits { Ok(()) } else { Err(RestoreError::Invalid("receive-side scaling out of range")) }
    }
}
