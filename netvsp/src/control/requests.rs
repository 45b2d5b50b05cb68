//! NVSP messages of the guest (fact sheet §2 to §4).

use zerocopy::little_endian::U32;

use super::state::{Area, Session, State};
use super::{Buffer, ETHERNET_BYTES, Effect, Effects, MIN_MTU, Nvsp, Phase, SectionedBuffer, Violation};
use crate::protocol::nvsp::{self, Kind, MESSAGE_BYTES, Status, Version};

/// What the completion of a request holds.
enum Answer {
    /// It comes later, from [`Nvsp::mapped`].
    Later,
    /// Nothing: the request has no answer of its own.
    Empty,
    /// A message.
    Message([u8; MESSAGE_BYTES]),
}

impl Nvsp {
    /// Takes one NVSP message of the primary channel, any but 107 and 108. `message` is a private copy;
    /// `completion_wanted` is the ring packet's flag: without it nothing is completed, whatever the message.
    ///
    /// # Errors
    /// [`Violation`]; nothing has changed then.
    pub fn request(&mut self, message: &[u8], completion_wanted: bool) -> Result<Effects, Violation> {
        let (kind, body) = nvsp::split(message)?;
        let mut effects = Effects::new();
        let answer = self.answer(kind, body, completion_wanted, &mut effects)?;
        let completion = match answer {
            Answer::Later => return Ok(effects),
            Answer::Empty => Vec::new(),
            Answer::Message(message) => message.to_vec(),
        };
        if completion_wanted {
            // The guest must find its NIC as the answer says it is; but offers come after the grant.
            let offer = effects.iter().position(|effect| matches!(effect, Effect::OfferSubchannels(_)));
            effects.insert(offer.unwrap_or(effects.len()), Effect::Complete(completion));
        }
        Ok(effects)
    }

    fn answer(
        &mut self,
        kind: Kind,
        body: &[u8],
        wanted: bool,
        effects: &mut Effects,
    ) -> Result<Answer, Violation> {
        if kind == Kind::Init {
            return self.init(nvsp::body(kind, body)?);
        }
        let most = self.config.queues - 1;
        let State::Agreed(session) = &mut self.state else {
            return Err(Violation::OutOfOrder { kind, phase: Phase::Closed });
        };
        match kind {
            Kind::Subchannel => return Ok(subchannels(session, most, nvsp::body(kind, body)?, effects)),
            Kind::OidQueryEx => {
                let (status, bytes) = (U32::new(nvsp::OID_NOT_SUPPORTED), U32::ZERO);
                let fields = nvsp::OidQueryComplete { status, bytes };
                return Ok(Answer::Message(nvsp::message(Kind::OidQueryExComplete, &fields)));
            }
            Kind::PacketDirectApi => {
                let operation = nvsp::body::<U32>(kind, body)?;
                let fields = [operation, U32::new(Status::Unsupported as u32)];
                return Ok(Answer::Message(nvsp::message(kind, &fields)));
            }
            _ => {}
        }
        if let Some(answer) = kind.declined_by() {
            return Ok(Answer::Message(nvsp::completion(answer, Status::Unsupported)));
        }
        if kind.since() > session.version {
            return Err(Violation::NotInVersion { kind, version: session.version });
        }
        match kind {
            Kind::SendNdisVersion => {
                let version: nvsp::NdisVersion = nvsp::body(kind, body)?;
                session.ndis = (version.major.get(), version.minor.get());
            }
            Kind::SendNdisConfig => ndis_config(session, nvsp::body(kind, body)?)?,
            Kind::SendReceiveBuffer => {
                return Ok(offer_buffer(session, Buffer::Receive, nvsp::body(kind, body)?, wanted, effects));
            }
            Kind::SendSendBuffer => {
                return Ok(offer_buffer(session, Buffer::Send, nvsp::body(kind, body)?, wanted, effects));
            }
            Kind::RevokeReceiveBuffer => revoke(&mut session.receive, kind, effects)?,
            Kind::RevokeSendBuffer => revoke(&mut session.send, kind, effects)?,
            // There is no virtual function to switch to: the path stays synthetic, which Linux accepts.
            Kind::SwitchDataPath => {
                let _: nvsp::SwitchDataPath = nvsp::body(kind, body)?;
            }
            // Never sent by anyone, and without an answer of their own.
            Kind::RevokeChimneyBuffer
            | Kind::ResumeChimneyReceive
            | Kind::FreeReceiveBuffer
            | Kind::PacketDirectBatch => {}
            _ => return Err(Violation::NotARequest(kind)),
        }
        Ok(Answer::Empty)
    }

    fn init(&mut self, init: nvsp::Init) -> Result<Answer, Violation> {
        let (min, max) = (init.min.get(), init.max.get());
        let mut status = Status::Failure;
        if self.state.session().is_none_or(Session::is_fresh) {
            status = match Version::newest_within(min, max) {
                Some(version) => {
                    self.state = State::Agreed(Session::new(version));
                    Status::Success
                }
                None if max < Version::V1.number() => Status::TooOld,
                None => Status::TooNew,
            };
        }
        let fields = nvsp::InitComplete {
            version: init.max,
            max_mdl_chain: U32::new(nvsp::MAX_MDL_CHAIN),
            status: U32::new(status as u32),
        };
        Ok(Answer::Message(nvsp::message(Kind::InitComplete, &fields)))
    }
}

/// The MTU decides the size of receive sections, so it may change only while there are none.
fn ndis_config(session: &mut Session, config: nvsp::NdisConfig) -> Result<(), Violation> {
    if session.receive != Area::Absent {
        return Err(Violation::BufferInUse(Kind::SendNdisConfig));
    }
    let frame = config.mtu.get();
    let mtu = frame.checked_sub(ETHERNET_BYTES).map(|mtu| u16::try_from(mtu).unwrap_or(u16::MAX));
    session.mtu = mtu.filter(|mtu| *mtu >= MIN_MTU).ok_or(Violation::FrameSize(frame))?;
    session.set_capabilities(config.capabilities.get());
    Ok(())
}

fn offer_buffer(
    session: &mut Session,
    kind: Buffer,
    offer: nvsp::SendBuffer,
    reply: bool,
    effects: &mut Effects,
) -> Answer {
    let (gpadl, id) = (offer.gpadl.get(), offer.id.get());
    let area = session.area_mut(kind);
    match *area {
        Area::Absent => {
            *area = Area::Mapping { gpadl, id, reply };
            effects.push(match kind {
                Buffer::Receive => Effect::MapReceive { gpadl },
                Buffer::Send => Effect::MapSend { gpadl },
            });
            Answer::Later
        }
        // Offered again, as when the answer was lost with the process that gave it: answered again.
        Area::Mapped(buffer) if (buffer.gpadl, buffer.id) == (gpadl, id) => {
            Answer::Message(buffer_answer(kind, Some(buffer)))
        }
        Area::Mapped(_) | Area::Mapping { .. } => Answer::Message(buffer_answer(kind, None)),
    }
}

/// The answer to a buffer that was offered: how it is cut, or that it is not taken.
pub(super) fn buffer_answer(kind: Buffer, buffer: Option<SectionedBuffer>) -> [u8; MESSAGE_BYTES] {
    let status = U32::new(if buffer.is_some() { Status::Success } else { Status::Failure } as u32);
    let (size, parts) = buffer.map_or((0, 0), |buffer| (buffer.section_size, buffer.sections));
    match kind {
        Buffer::Receive => {
            let fields = nvsp::ReceiveBufferComplete {
                status,
                count: U32::new(buffer.is_some().into()),
                offset: U32::ZERO,
                size: U32::new(size),
                parts: U32::new(parts),
                end: U32::new(size.saturating_mul(parts)),
            };
            nvsp::message(Kind::SendReceiveBufferComplete, &fields)
        }
        Buffer::Send => {
            let fields = nvsp::SendBufferComplete { status, size: U32::new(size) };
            nvsp::message(Kind::SendSendBufferComplete, &fields)
        }
    }
}

/// Withdrawing what is not there is harmless: a guest cleans up after a refusal.
fn revoke(area: &mut Area, kind: Kind, effects: &mut Effects) -> Result<(), Violation> {
    match area {
        Area::Absent => Ok(()),
        Area::Mapping { .. } => Err(Violation::BufferInUse(kind)),
        Area::Mapped(_) => {
            *area = Area::Absent;
            effects.push(Effect::Changed);
            Ok(())
        }
    }
}

/// Grants exactly what will be offered: Linux waits for ever for every subchannel that it was granted.
fn subchannels(
    session: &mut Session,
    most: u16,
    request: nvsp::SubchannelRequest,
    effects: &mut Effects,
) -> Answer {
    let mut count = 0;
    let status = if session.version < Version::V5 || request.operation.get() != nvsp::ALLOCATE_SUBCHANNELS {
        Status::Unsupported
    } else if session.subchannels != 0 || session.receive.mapped().is_none() {
        Status::Failure
    } else {
        count = u16::try_from(request.count.get()).unwrap_or(u16::MAX).min(most);
        Status::Success
    };
    if count != 0 {
        session.subchannels = count;
        effects.extend([Effect::Changed, Effect::OfferSubchannels(count)]);
    }
    let fields = nvsp::SubchannelComplete { status: U32::new(status as u32), count: U32::new(count.into()) };
    Answer::Message(nvsp::message(Kind::Subchannel, &fields))
}
