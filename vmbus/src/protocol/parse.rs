//! Reading messages. The bytes must be a private copy: they are looked at more than once.

use zerocopy::FromBytes;

use super::wire::*;
use super::{Kind, MAX_MESSAGE};

/// Why bytes are not a message one side may send.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// Longer than any message can be.
    #[error("message of {0} bytes is longer than 240")]
    Oversized(usize),
    /// Shorter than the header.
    #[error("message of {0} bytes is shorter than its header")]
    NoHeader(usize),
    /// A type this host does not know.
    #[error("unknown message type {0}")]
    UnknownType(u32),
    /// A type that only the other side sends.
    #[error("message {0:?} travels the other way")]
    WrongWay(Kind),
    /// Shorter than its type needs.
    #[error("message {kind:?} of {len} bytes is too short")]
    Short {
        /// Its type.
        kind: Kind,
        /// Its bytes.
        len: usize,
    },
}

/// What a guest says. Bytes after a structure are ignored, as every side does, so that later versions may append.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "each variant is the structure of its name")]
pub enum GuestMessage<'a> {
    RequestOffers,
    OpenChannel(&'a OpenChannel),
    CloseChannel(&'a CloseChannel),
    /// With the bytes of the page numbers that follow.
    GpadlHeader(&'a GpadlHeader, &'a [u8]),
    /// With the bytes of the page numbers that follow.
    GpadlBody(&'a GpadlBody, &'a [u8]),
    GpadlTeardown(&'a GpadlTeardown),
    RelidReleased(&'a RelidReleased),
    InitiateContact(&'a InitiateContact),
    Unload,
    TlConnectRequest(&'a TlConnectRequest),
    ModifyChannel(&'a ModifyChannel),
}

/// What a host says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "each variant is the structure of its name")]
pub enum HostMessage<'a> {
    OfferChannel(&'a OfferChannel),
    RescindChannelOffer(&'a RescindChannelOffer),
    AllOffersDelivered,
    OpenChannelResult(&'a OpenChannelResult),
    GpadlCreated(&'a GpadlCreated),
    GpadlTorndown(&'a GpadlTorndown),
    VersionResponse(&'a VersionResponse),
    UnloadResponse,
    TlConnectResult(&'a TlConnectResult),
    ModifyChannelResponse(&'a ModifyChannelResponse),
}

/// Type and body of a message.
fn split(bytes: &[u8]) -> Result<(Kind, &[u8]), ParseError> {
    if bytes.len() > MAX_MESSAGE {
        return Err(ParseError::Oversized(bytes.len()));
    }
    let Ok((header, body)) = Header::ref_from_prefix(bytes) else {
        return Err(ParseError::NoHeader(bytes.len()));
    };
    let number = header.kind.get();
    Ok((Kind::from_wire(number).ok_or(ParseError::UnknownType(number))?, body))
}

/// The structure at the start of a body, and what follows it.
fn body<B: Body>(bytes: &[u8]) -> Result<(&B, &[u8]), ParseError> {
    B::ref_from_prefix(bytes)
        .map_err(|_| ParseError::Short { kind: B::KIND, len: size_of::<Header>() + bytes.len() })
}

impl<'a> GuestMessage<'a> {
    /// Reads a message that a guest posted.
    ///
    /// # Errors
    /// It is too long or short, of unknown type, or one that only a host sends.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, ParseError> {
        let (kind, rest) = split(bytes)?;
        Ok(match kind {
            Kind::RequestOffers => Self::RequestOffers,
            Kind::OpenChannel => Self::OpenChannel(body(rest)?.0),
            Kind::CloseChannel => Self::CloseChannel(body(rest)?.0),
            Kind::GpadlHeader => body(rest).map(|(header, pfns)| Self::GpadlHeader(header, pfns))?,
            Kind::GpadlBody => body(rest).map(|(header, pfns)| Self::GpadlBody(header, pfns))?,
            Kind::GpadlTeardown => Self::GpadlTeardown(body(rest)?.0),
            Kind::RelidReleased => Self::RelidReleased(body(rest)?.0),
            Kind::InitiateContact => Self::InitiateContact(body(rest)?.0),
            Kind::Unload => Self::Unload,
            Kind::TlConnectRequest => Self::TlConnectRequest(body(rest)?.0),
            Kind::ModifyChannel => Self::ModifyChannel(body(rest)?.0),
            Kind::OfferChannel
            | Kind::RescindChannelOffer
            | Kind::AllOffersDelivered
            | Kind::OpenChannelResult
            | Kind::GpadlCreated
            | Kind::GpadlTorndown
            | Kind::VersionResponse
            | Kind::UnloadResponse
            | Kind::TlConnectResult
            | Kind::ModifyChannelResponse => return Err(ParseError::WrongWay(kind)),
        })
    }

    /// Its type.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::RequestOffers => Kind::RequestOffers,
            Self::OpenChannel(_) => Kind::OpenChannel,
            Self::CloseChannel(_) => Kind::CloseChannel,
            Self::GpadlHeader(..) => Kind::GpadlHeader,
            Self::GpadlBody(..) => Kind::GpadlBody,
            Self::GpadlTeardown(_) => Kind::GpadlTeardown,
            Self::RelidReleased(_) => Kind::RelidReleased,
            Self::InitiateContact(_) => Kind::InitiateContact,
            Self::Unload => Kind::Unload,
            Self::TlConnectRequest(_) => Kind::TlConnectRequest,
            Self::ModifyChannel(_) => Kind::ModifyChannel,
        }
    }
}

impl<'a> HostMessage<'a> {
    /// Reads a message that a host posted: for whoever plays the guest.
    ///
    /// # Errors
    /// It is too long or short, of unknown type, or one that only a guest sends.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, ParseError> {
        let (kind, rest) = split(bytes)?;
        Ok(match kind {
            Kind::OfferChannel => Self::OfferChannel(body(rest)?.0),
            Kind::RescindChannelOffer => Self::RescindChannelOffer(body(rest)?.0),
            Kind::AllOffersDelivered => Self::AllOffersDelivered,
            Kind::OpenChannelResult => Self::OpenChannelResult(body(rest)?.0),
            Kind::GpadlCreated => Self::GpadlCreated(body(rest)?.0),
            Kind::GpadlTorndown => Self::GpadlTorndown(body(rest)?.0),
            Kind::VersionResponse => Self::VersionResponse(body(rest)?.0),
            Kind::UnloadResponse => Self::UnloadResponse,
            Kind::TlConnectResult => Self::TlConnectResult(body(rest)?.0),
            Kind::ModifyChannelResponse => Self::ModifyChannelResponse(body(rest)?.0),
            _ => return Err(ParseError::WrongWay(kind)),
        })
    }
}
