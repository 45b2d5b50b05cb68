//! The kinds of requests: their numbers, their names, and how many descriptors each may carry.
//!
//! Source: QEMU, `docs/interop/vhost-user`, "Front-end message types".

use std::ops::RangeInclusive;

use super::message::MAX_FDS;

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $number:literal $text:literal $fds:expr;)*) => {
        /// The kinds of requests that front-ends send.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(u32)]
        pub enum Kind { $($(#[$doc])* $name = $number,)* }

        impl Kind {
            /// Every kind.
            pub const ALL: [Self; 44] = [$(Self::$name,)*];

            /// The kind with this number.
            pub fn from_number(number: u32) -> Option<Self> {
                match number { $($number => Some(Self::$name),)* _ => None }
            }

            /// Its name in the specification, without the prefix.
            pub fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            /// How many descriptors it may carry.
            pub fn fds(self) -> RangeInclusive<usize> {
                match self { $(Self::$name => $fds,)* }
            }
        }
    };
}

kinds! {
    /// The features on offer.
    GetFeatures = 1 "GET_FEATURES" 0..=0;
    /// The features chosen.
    SetFeatures = 2 "SET_FEATURES" 0..=0;
    /// Start of a session.
    SetOwner = 3 "SET_OWNER" 0..=0;
    /// Disables all rings (deprecated).
    ResetOwner = 4 "RESET_OWNER" 0..=0;
    /// All memory regions at once.
    SetMemTable = 5 "SET_MEM_TABLE" 0..=MAX_FDS;
    /// The dirty log.
    SetLogBase = 6 "SET_LOG_BASE" 0..=1;
    /// An eventfd to be rung after logging.
    SetLogFd = 7 "SET_LOG_FD" 0..=1;
    /// A ring's size.
    SetVringNum = 8 "SET_VRING_NUM" 0..=0;
    /// A ring's addresses.
    SetVringAddr = 9 "SET_VRING_ADDR" 0..=0;
    /// Where a ring starts.
    SetVringBase = 10 "SET_VRING_BASE" 0..=0;
    /// Stops a ring and asks where.
    GetVringBase = 11 "GET_VRING_BASE" 0..=0;
    /// A ring's doorbell; starts it.
    SetVringKick = 12 "SET_VRING_KICK" 0..=1;
    /// A ring's interrupt.
    SetVringCall = 13 "SET_VRING_CALL" 0..=1;
    /// An eventfd for errors of a ring.
    SetVringErr = 14 "SET_VRING_ERR" 0..=1;
    /// The protocol features on offer.
    GetProtocolFeatures = 15 "GET_PROTOCOL_FEATURES" 0..=0;
    /// The protocol features chosen.
    SetProtocolFeatures = 16 "SET_PROTOCOL_FEATURES" 0..=0;
    /// Queue pairs on offer.
    GetQueueNum = 17 "GET_QUEUE_NUM" 0..=0;
    /// Enables or disables a ring.
    SetVringEnable = 18 "SET_VRING_ENABLE" 0..=0;
    /// A migrated guest asks to be announced.
    SendRarp = 19 "SEND_RARP" 0..=0;
    /// The MTU the guest is told.
    NetSetMtu = 20 "NET_SET_MTU" 0..=0;
    /// A channel for requests the other way.
    SetBackendReqFd = 21 "SET_BACKEND_REQ_FD" 0..=1;
    /// Address translation.
    IotlbMsg = 22 "IOTLB_MSG" 0..=0;
    /// Byte order of a legacy ring.
    SetVringEndian = 23 "SET_VRING_ENDIAN" 0..=0;
    /// Reads the device configuration.
    GetConfig = 24 "GET_CONFIG" 0..=0;
    /// Writes the device configuration.
    SetConfig = 25 "SET_CONFIG" 0..=0;
    /// Crypto devices.
    CreateCryptoSession = 26 "CREATE_CRYPTO_SESSION" 0..=0;
    /// Crypto devices.
    CloseCryptoSession = 27 "CLOSE_CRYPTO_SESSION" 0..=0;
    /// Postcopy migration.
    PostcopyAdvise = 28 "POSTCOPY_ADVISE" 0..=0;
    /// Postcopy migration.
    PostcopyListen = 29 "POSTCOPY_LISTEN" 0..=0;
    /// Postcopy migration.
    PostcopyEnd = 30 "POSTCOPY_END" 0..=0;
    /// Asks for a new in-flight record.
    GetInflightFd = 31 "GET_INFLIGHT_FD" 0..=0;
    /// Gives an in-flight record.
    SetInflightFd = 32 "SET_INFLIGHT_FD" 0..=1;
    /// Graphics devices.
    GpuSetSocket = 33 "GPU_SET_SOCKET" 0..=1;
    /// Resets the device.
    ResetDevice = 34 "RESET_DEVICE" 0..=0;
    /// An in-band doorbell.
    VringKick = 35 "VRING_KICK" 0..=0;
    /// Memory slots on offer.
    GetMaxMemSlots = 36 "GET_MAX_MEM_SLOTS" 0..=0;
    /// One more memory region.
    AddMemReg = 37 "ADD_MEM_REG" 0..=1;
    /// One memory region less. A descriptor is tolerated, as the specification allows.
    RemMemReg = 38 "REM_MEM_REG" 0..=1;
    /// The virtio device status.
    SetStatus = 39 "SET_STATUS" 0..=0;
    /// Asks for the virtio device status.
    GetStatus = 40 "GET_STATUS" 0..=0;
    /// Shared objects.
    GetSharedObject = 41 "GET_SHARED_OBJECT" 0..=0;
    /// Migration of a device's internal state.
    SetDeviceStateFd = 42 "SET_DEVICE_STATE_FD" 0..=1;
    /// Migration of a device's internal state.
    CheckDeviceState = 43 "CHECK_DEVICE_STATE" 0..=0;
    /// Shared memory regions of the device.
    GetShmemConfig = 44 "GET_SHMEM_CONFIG" 0..=0;
}
