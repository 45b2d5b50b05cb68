//! Wire form of the hand-over's messages; the crate's README has the table.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{FromSwitch, FromVmm, MAX_REGIONS, MAX_TEXT, MemoryRegion};
use crate::channel::InterruptTarget;
use crate::guid::Guid;
use crate::pages::MAX_GPADL_PAGES;

/// Descriptors with one message.
pub(super) const MAX_FDS: usize = 2;

/// The longest message, in bytes: a GPADL of [`MAX_GPADL_PAGES`].
pub(super) const MAX_MESSAGE: usize = size_of::<Header>() + size_of::<Gpadl>() + 8 * MAX_GPADL_PAGES;

/// What is wrong with a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// Longer than any message.
    #[error("message of more than {MAX_MESSAGE} bytes")]
    TooLong,
    /// The length in the header is not what came.
    #[error("message of {got} bytes whose header says {said}")]
    Length {
        /// Bytes that came.
        got: usize,
        /// Bytes that were to come.
        said: usize,
    },
    /// A type that this direction does not have.
    #[error("message of type {0:#x}")]
    Kind(u16),
    /// Shorter or longer than its type, and the counts in it, ask for.
    #[error("message of type {0:#x} has the wrong length")]
    Body(u16),
    /// A field that has no such value.
    #[error("field {0} has a value that it may not have")]
    Value(&'static str),
    /// Not the descriptors that its type asks for.
    #[error("message of type {kind:#x} with {got} descriptors, {wanted} belong to it")]
    Descriptors {
        /// Its type.
        kind: u16,
        /// Descriptors that came.
        got: usize,
        /// Descriptors that were to come.
        wanted: usize,
    },
    /// More descriptors than any message carries, or more than this process can hold.
    #[error("more than {MAX_FDS} descriptors with one message")]
    TooManyDescriptors,
}

/// Bytes and descriptors of a message.
type Encoded<'a> = (Vec<u8>, Vec<BorrowedFd<'a>>);

/// A message of one direction.
pub trait Message: Sized {
    /// The message's bytes and descriptors.
    ///
    /// # Errors
    /// It holds more than a message may.
    fn encode(&self) -> Result<(Vec<u8>, Vec<BorrowedFd<'_>>), MessageError>;

    /// Reads a message.
    ///
    /// # Errors
    /// It is none, for one of many reasons.
    fn decode(bytes: &[u8], fds: Vec<OwnedFd>) -> Result<Self, MessageError>;
}

/// Declares wire structures and asserts their sizes.
macro_rules! wire {
    ($($(#[$doc:meta])* $name:ident = $len:literal { $($field:ident: $type:ty),* $(,)? })*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
        #[repr(C)]
        struct $name { $($field: $type),* }
        const _: () = assert!(size_of::<$name>() == $len);
    )*};
}

wire! {
    Header = 8 { kind: U16, fds: U16, len: U32 }
    Memory = 8 { count: U32, reserved: U32 }
    Region = 24 { gpa: U64, len: U64, offset: U64 }
    Device = 48 { device: U32, resumed: U32, interface: [u8; 16], instance: [u8; 16], name_len: U32, reserved: U32 }
    Gpadl = 24 { device: U32, gpadl: U32, byte_count: U32, byte_offset: U32, count: U32, reserved: U32 }
    /// Teardown, and with `ok` the answers about a GPADL.
    GpadlRef = 16 { device: U32, gpadl: U32, ok: U32, reserved: U32 }
    Open = 40 {
        device: U32, index: U16, flag: U16, relid: U32, gpadl: U32, downstream_page: U32, vp: U32, flags_gpa: U64,
        resumed: U32, reserved: U32,
    }
    /// Close, and with `ok` the answers about a channel.
    ChannelRef = 16 { device: U32, index: U16, pad: U16, ok: U32, reserved: U32 }
    Retarget = 24 { device: U32, index: U16, flag: U16, vp: U32, reserved: U32, flags_gpa: U64 }
    /// A device or version, and whatever number goes with it.
    Numbers = 8 { first: U32, second: U32 }
}

const HELLO: u16 = 1;
const MEMORY: u16 = 2;
const DEVICE: u16 = 3;
const GPADL: u16 = 4;
const GPADL_TEARDOWN: u16 = 5;
const OPEN: u16 = 6;
const CLOSE: u16 = 7;
const RETARGET: u16 = 8;
const GONE: u16 = 9;
const READY: u16 = 10;
const QUIESCE: u16 = 11;

const OPENED: u16 = 0x81;
const CLOSED: u16 = 0x82;
const GPADL_ACCEPTED: u16 = 0x83;
const GPADL_RELEASED: u16 = 0x84;
const OFFER_SUBCHANNELS: u16 = 0x85;
const FAULT: u16 = 0x86;
const QUIET: u16 = 0x87;
const RETARGETED: u16 = 0x88;

/// Puts a message together: header, fixed part, and what follows it.
fn message<'a>(
    kind: u16,
    fixed: &[u8],
    more: &[u8],
    fds: Vec<BorrowedFd<'a>>,
) -> Result<Encoded<'a>, MessageError> {
    let len = size_of::<Header>() + fixed.len() + more.len();
    if len > MAX_MESSAGE {
        return Err(MessageError::TooLong);
    }
    let count = U16::new(u16::try_from(fds.len()).unwrap_or(u16::MAX));
    let header =
        Header { kind: kind.into(), fds: count, len: U32::new(u32::try_from(len).unwrap_or(u32::MAX)) };
    Ok(([header.as_bytes(), fixed, more].concat(), fds))
}

/// A number of things that follow; `limit` is checked on both sides.
fn count(len: usize, limit: usize, name: &'static str) -> Result<U32, MessageError> {
    let count = u32::try_from(len).ok().filter(|_| len <= limit).ok_or(MessageError::Value(name))?;
    Ok(count.into())
}

impl Message for FromVmm {
    fn encode(&self) -> Result<Encoded<'_>, MessageError> {
        let zero = U32::ZERO;
        match self {
            Self::Hello { version } => numbers(HELLO, *version, 0),
            Self::Memory { regions, fd } => {
                let fixed =
                    Memory { count: count(regions.len(), MAX_REGIONS, "region count")?, reserved: zero };
                let wire = |it: &MemoryRegion| Region {
                    gpa: it.gpa.into(),
                    len: it.len.into(),
                    offset: it.offset.into(),
                };
                let regions: Vec<Region> = regions.iter().map(wire).collect();
                message(MEMORY, fixed.as_bytes(), regions.as_bytes(), vec![fd.as_fd()])
            }
            Self::Device { device, interface, instance, name, state, resumed } => {
                let fixed = Device {
                    device: (*device).into(),
                    resumed: u32::from(*resumed).into(),
                    interface: interface.to_bytes(),
                    instance: instance.to_bytes(),
                    name_len: count(name.len(), MAX_TEXT, "name length")?,
                    reserved: zero,
                };
                message(DEVICE, fixed.as_bytes(), name.as_bytes(), vec![state.as_fd()])
            }
            Self::Gpadl { device, gpadl, byte_count, byte_offset, pfns } => {
                let fixed = Gpadl {
                    device: (*device).into(),
                    gpadl: (*gpadl).into(),
                    byte_count: (*byte_count).into(),
                    byte_offset: (*byte_offset).into(),
                    count: count(pfns.len(), MAX_GPADL_PAGES, "page count")?,
                    reserved: zero,
                };
                let pfns: Vec<U64> = pfns.iter().map(|&pfn| pfn.into()).collect();
                message(GPADL, fixed.as_bytes(), pfns.as_bytes(), vec![])
            }
            Self::GpadlTeardown { device, gpadl } => gpadl_ref(GPADL_TEARDOWN, *device, *gpadl, false),
            Self::Open { device, index, relid, gpadl, downstream_page, vp, target, doorbell, resumed } => {
                let fixed = Open {
                    device: (*device).into(),
                    index: (*index).into(),
                    flag: target.flag.into(),
                    relid: (*relid).into(),
                    gpadl: (*gpadl).into(),
                    downstream_page: (*downstream_page).into(),
                    vp: (*vp).into(),
                    flags_gpa: target.flags_gpa.into(),
                    resumed: u32::from(*resumed).into(),
                    reserved: zero,
                };
                message(OPEN, fixed.as_bytes(), &[], vec![target.eventfd.as_fd(), doorbell.as_fd()])
            }
            Self::Close { device, index } => channel_ref(CLOSE, *device, *index, false),
            Self::Retarget { device, index, vp, target } => {
                let fixed = Retarget {
                    device: (*device).into(),
                    index: (*index).into(),
                    flag: target.flag.into(),
                    vp: (*vp).into(),
                    reserved: zero,
                    flags_gpa: target.flags_gpa.into(),
                };
                message(RETARGET, fixed.as_bytes(), &[], vec![target.eventfd.as_fd()])
            }
            Self::Quiesce { device } => numbers(QUIESCE, *device, 0),
            Self::Gone { device } => numbers(GONE, *device, 0),
            Self::Ready => message(READY, &[], &[], vec![]),
        }
    }

    fn decode(bytes: &[u8], fds: Vec<OwnedFd>) -> Result<Self, MessageError> {
        let (kind, body) = open_header(bytes, &fds)?;
        let parts = Parts { kind, body };
        match kind {
            HELLO => Ok(Self::Hello { version: parts.whole::<Numbers>()?.first.get() }),
            MEMORY => {
                let [fd] = take_fds(kind, fds)?;
                let (fixed, more) = parts.split::<Memory>()?;
                let regions = parts.list::<Region>(more, fixed.count.get(), MAX_REGIONS, "region count")?;
                let region = |it: &Region| MemoryRegion {
                    gpa: it.gpa.get(),
                    len: it.len.get(),
                    offset: it.offset.get(),
                };
                Ok(Self::Memory { regions: regions.iter().map(region).collect(), fd })
            }
            DEVICE => parts.device(fds),
            GPADL => parts.gpadl(),
            GPADL_TEARDOWN => {
                let body = parts.whole::<GpadlRef>()?;
                Ok(Self::GpadlTeardown { device: body.device.get(), gpadl: body.gpadl.get() })
            }
            OPEN => parts.open(fds),
            CLOSE => {
                let body = parts.whole::<ChannelRef>()?;
                Ok(Self::Close { device: body.device.get(), index: body.index.get() })
            }
            RETARGET => parts.retarget(fds),
            QUIESCE => Ok(Self::Quiesce { device: parts.whole::<Numbers>()?.first.get() }),
            GONE => Ok(Self::Gone { device: parts.whole::<Numbers>()?.first.get() }),
            READY if body.is_empty() => Ok(Self::Ready),
            READY => Err(MessageError::Body(kind)),
            other => Err(MessageError::Kind(other)),
        }
    }
}

impl Message for FromSwitch {
    fn encode(&self) -> Result<Encoded<'_>, MessageError> {
        match self {
            Self::Opened { device, index, ok } => channel_ref(OPENED, *device, *index, *ok),
            Self::Closed { device, index } => channel_ref(CLOSED, *device, *index, true),
            Self::GpadlAccepted { device, gpadl, ok } => gpadl_ref(GPADL_ACCEPTED, *device, *gpadl, *ok),
            Self::GpadlReleased { device, gpadl } => gpadl_ref(GPADL_RELEASED, *device, *gpadl, true),
            Self::Quiet { device } => numbers(QUIET, *device, 0),
            Self::Retargeted { device, index } => channel_ref(RETARGETED, *device, *index, true),
            Self::OfferSubchannels { device, count } => numbers(OFFER_SUBCHANNELS, *device, (*count).into()),
            Self::Fault { device, reason } => {
                let value = count(reason.len(), MAX_TEXT, "reason length")?;
                let fixed = Numbers { first: (*device).into(), second: value };
                message(FAULT, fixed.as_bytes(), reason.as_bytes(), vec![])
            }
        }
    }

    fn decode(bytes: &[u8], fds: Vec<OwnedFd>) -> Result<Self, MessageError> {
        let (kind, body) = open_header(bytes, &fds)?;
        let parts = Parts { kind, body };
        match kind {
            OPENED => {
                let body = parts.whole::<ChannelRef>()?;
                let (device, index) = (body.device.get(), body.index.get());
                Ok(Self::Opened { device, index, ok: truth(body.ok, "ok")? })
            }
            CLOSED => {
                let body = parts.whole::<ChannelRef>()?;
                Ok(Self::Closed { device: body.device.get(), index: body.index.get() })
            }
            GPADL_ACCEPTED => {
                let body = parts.whole::<GpadlRef>()?;
                let (device, gpadl) = (body.device.get(), body.gpadl.get());
                Ok(Self::GpadlAccepted { device, gpadl, ok: truth(body.ok, "ok")? })
            }
            GPADL_RELEASED => {
                let body = parts.whole::<GpadlRef>()?;
                Ok(Self::GpadlReleased { device: body.device.get(), gpadl: body.gpadl.get() })
            }
            QUIET => Ok(Self::Quiet { device: parts.whole::<Numbers>()?.first.get() }),
            RETARGETED => {
                let body = parts.whole::<ChannelRef>()?;
                Ok(Self::Retargeted { device: body.device.get(), index: body.index.get() })
            }
            OFFER_SUBCHANNELS => {
                let body = parts.whole::<Numbers>()?;
                let count =
                    u16::try_from(body.second.get()).map_err(|_| MessageError::Value("subchannel count"))?;
                Ok(Self::OfferSubchannels { device: body.first.get(), count })
            }
            FAULT => {
                let (fixed, more) = parts.split::<Numbers>()?;
                let reason = parts.text(more, fixed.second.get(), "reason")?;
                Ok(Self::Fault { device: fixed.first.get(), reason })
            }
            other => Err(MessageError::Kind(other)),
        }
    }
}

fn numbers(kind: u16, first: u32, second: u32) -> Result<Encoded<'static>, MessageError> {
    let fixed = Numbers { first: first.into(), second: second.into() };
    message(kind, fixed.as_bytes(), &[], vec![])
}

fn gpadl_ref(kind: u16, device: u32, gpadl: u32, ok: bool) -> Result<Encoded<'static>, MessageError> {
    let ok = u32::from(ok).into();
    let fixed = GpadlRef { device: device.into(), gpadl: gpadl.into(), ok, reserved: U32::ZERO };
    message(kind, fixed.as_bytes(), &[], vec![])
}

fn channel_ref(kind: u16, device: u32, index: u16, ok: bool) -> Result<Encoded<'static>, MessageError> {
    let ok = u32::from(ok).into();
    let (pad, reserved) = (U16::ZERO, U32::ZERO);
    let fixed = ChannelRef { device: device.into(), index: index.into(), pad, ok, reserved };
    message(kind, fixed.as_bytes(), &[], vec![])
}

/// Type and body of a message whose header agrees with what came.
fn open_header<'b>(bytes: &'b [u8], fds: &[OwnedFd]) -> Result<(u16, &'b [u8]), MessageError> {
    let short = MessageError::Length { got: bytes.len(), said: size_of::<Header>() };
    let (header, body) = Header::ref_from_prefix(bytes).map_err(|_| short)?;
    let said = header.len.get() as usize;
    if said != bytes.len() {
        return Err(MessageError::Length { got: bytes.len(), said });
    }
    let (kind, wanted) = (header.kind.get(), usize::from(header.fds.get()));
    if wanted != fds.len() {
        return Err(MessageError::Descriptors { kind, got: fds.len(), wanted });
    }
    let wanted = match kind {
        OPEN => 2,
        MEMORY | DEVICE | RETARGET => 1,
        _ => 0,
    };
    if wanted != fds.len() {
        return Err(MessageError::Descriptors { kind, got: fds.len(), wanted });
    }
    Ok((kind, body))
}

fn take_fds<const N: usize>(kind: u16, fds: Vec<OwnedFd>) -> Result<[OwnedFd; N], MessageError> {
    fds.try_into().map_err(|fds: Vec<_>| MessageError::Descriptors { kind, got: fds.len(), wanted: N })
}

fn truth(value: U32, name: &'static str) -> Result<bool, MessageError> {
    match value.get() {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(MessageError::Value(name)),
    }
}

/// A message's body, to be taken apart.
struct Parts<'b> {
    kind: u16,
    body: &'b [u8],
}

impl<'b> Parts<'b> {
    fn split<T: FromBytes + KnownLayout + Immutable + Unaligned>(
        &self,
    ) -> Result<(&'b T, &'b [u8]), MessageError> {
        T::ref_from_prefix(self.body).map_err(|_| MessageError::Body(self.kind))
    }

    fn whole<T: FromBytes + KnownLayout + Immutable + Unaligned>(&self) -> Result<&'b T, MessageError> {
        T::ref_from_bytes(self.body).map_err(|_| MessageError::Body(self.kind))
    }

    /// All of `more` as `count` things.
    fn list<T: FromBytes + KnownLayout + Immutable + Unaligned>(
        &self,
        more: &'b [u8],
        count: u32,
        limit: usize,
        name: &'static str,
    ) -> Result<&'b [T], MessageError> {
        let count = count as usize;
        if count > limit {
            return Err(MessageError::Value(name));
        }
        <[T]>::ref_from_bytes_with_elems(more, count).map_err(|_| MessageError::Body(self.kind))
    }

    fn text(&self, more: &'b [u8], len: u32, name: &'static str) -> Result<String, MessageError> {
        let bytes = self.list::<u8>(more, len, MAX_TEXT, name)?;
        std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| MessageError::Value(name))
    }

    /// The pages must be enough for the bytes.
    fn gpadl(&self) -> Result<FromVmm, MessageError> {
        let (fixed, more) = self.split::<Gpadl>()?;
        let pfns = self.list::<U64>(more, fixed.count.get(), MAX_GPADL_PAGES, "page count")?;
        let (byte_count, byte_offset) = (fixed.byte_count.get(), fixed.byte_offset.get());
        let end = u64::from(byte_count) + u64::from(byte_offset);
        if end.div_ceil(4096) > pfns.len() as u64 {
            return Err(MessageError::Value("byte count"));
        }
        Ok(FromVmm::Gpadl {
            device: fixed.device.get(),
            gpadl: fixed.gpadl.get(),
            byte_count,
            byte_offset,
            pfns: pfns.iter().map(|pfn| pfn.get()).collect(),
        })
    }

    fn device(&self, fds: Vec<OwnedFd>) -> Result<FromVmm, MessageError> {
        let [state] = take_fds(self.kind, fds)?;
        let (fixed, more) = self.split::<Device>()?;
        Ok(FromVmm::Device {
            device: fixed.device.get(),
            interface: Guid::from_bytes(fixed.interface),
            instance: Guid::from_bytes(fixed.instance),
            name: self.text(more, fixed.name_len.get(), "name")?,
            state,
            resumed: truth(fixed.resumed, "resumed")?,
        })
    }

    fn open(&self, fds: Vec<OwnedFd>) -> Result<FromVmm, MessageError> {
        let [eventfd, doorbell] = take_fds(self.kind, fds)?;
        let body = self.whole::<Open>()?;
        let target = InterruptTarget { flags_gpa: body.flags_gpa.get(), flag: body.flag.get(), eventfd };
        Ok(FromVmm::Open {
            device: body.device.get(),
            index: body.index.get(),
            relid: body.relid.get(),
            gpadl: body.gpadl.get(),
            downstream_page: body.downstream_page.get(),
            vp: body.vp.get(),
            target,
            doorbell,
            resumed: truth(body.resumed, "resumed")?,
        })
    }

    fn retarget(&self, fds: Vec<OwnedFd>) -> Result<FromVmm, MessageError> {
        let [eventfd] = take_fds(self.kind, fds)?;
        let body = self.whole::<Retarget>()?;
        let target = InterruptTarget { flags_gpa: body.flags_gpa.get(), flag: body.flag.get(), eventfd };
        let (device, index, vp) = (body.device.get(), body.index.get(), body.vp.get());
        Ok(FromVmm::Retarget { device, index, vp, target })
    }
}
