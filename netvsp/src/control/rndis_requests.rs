//! RNDIS control messages of the guest (fact sheet §5).

use super::state::{Device, Rndis, State};
use super::{Effect, Effects, MAX_PACKETS_PER_MESSAGE, MAX_TRANSFER, Nvsp, Offloads, Phase, Violation};
use crate::protocol::rndis::{self, Control, Status};

impl Nvsp {
    /// Takes one RNDIS control message, a private copy. The ring packet that brought it is completed by the caller, with
    /// message 108.
    ///
    /// # Errors
    /// [`Violation`]; nothing has changed then.
    pub fn rndis(&mut self, message: &[u8]) -> Result<Effects, Violation> {
        let control = Control::parse(message)?;
        let phase = self.phase();
        if phase < Phase::Ready {
            return Err(Violation::NoReceiveBuffer { kind: control.kind(), phase });
        }
        let running = phase == Phase::Running;
        Ok(match control {
            Control::Initialize { request } => {
                self.begin();
                let reply = rndis::initialize_complete(request, MAX_PACKETS_PER_MESSAGE, MAX_TRANSFER);
                vec![Effect::Changed, Effect::RndisReply(reply)]
            }
            Control::Halt if running => {
                self.set_rndis(Rndis::Uninitialised);
                vec![Effect::Changed]
            }
            Control::Halt => Effects::new(),
            Control::Query { request, oid, info, room } => {
                let answer = if running { self.query(oid, info, room) } else { Err(Status::Failure) };
                vec![Effect::RndisReply(rndis::query_complete(request, answer.as_deref().map_err(|e| *e)))]
            }
            Control::Set { request, oid, info } => {
                let mut effects = Effects::new();
                let result = if running { self.set(oid, info, &mut effects) } else { Err(Status::Failure) };
                let reply = rndis::set_complete(request, result.err().unwrap_or(Status::Success));
                let indication = effects.iter().position(|effect| matches!(effect, Effect::Indicate(_)));
                effects.insert(indication.unwrap_or(effects.len()), Effect::RndisReply(reply));
                effects
            }
            Control::Reset if running => {
                self.begin();
                vec![Effect::Changed, Effect::RndisReply(rndis::reset_complete(Status::Success))]
            }
            Control::Reset => vec![Effect::RndisReply(rndis::reset_complete(Status::Failure))],
            Control::Keepalive { request } => {
                let status = if running { Status::Success } else { Status::Failure };
                vec![Effect::RndisReply(rndis::keepalive_complete(request, status))]
            }
        })
    }

    /// RNDIS begins, or begins anew: no filter, no RSS, offloads as they are by default.
    fn begin(&mut self) {
        let offered = self.state.session().map(|session| Offloads::offered(&self.config, session));
        let offloads = offered.unwrap_or_default().at_first();
        let told = self.link.tell();
        self.set_rndis(Rndis::Initialised(Device::new(offloads, told)));
    }

    fn set_rndis(&mut self, rndis: Rndis) {
        if let State::Agreed(session) = &mut self.state {
            session.rndis = rndis;
        }
    }
}
