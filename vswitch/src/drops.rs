//! Why a frame was dropped: every frame that is not delivered has exactly one reason, and each reason is counted.

use serde::{Deserialize, Serialize};

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $name:ident => $text:literal,)+) => {
        /// Why a frame was dropped.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(rename_all = "kebab-case")]
        #[repr(u8)]
        pub enum DropReason {
            $($(#[doc = $doc])+ $name,)+
        }

        impl DropReason {
            /// Every reason, in the order of its number.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];

            /// A few words for an operator.
            pub fn text(self) -> &'static str {
                match self { $(Self::$name => $text,)+ }
            }
        }
    };
}

reasons! {
    /// Shorter than an Ethernet header.
    Runt => "shorter than an Ethernet header",
    /// Longer than the sending port's MTU allows.
    IngressMtu => "longer than the sending port's MTU",
    /// Longer than the receiving port's MTU allows, and not to be segmented.
    EgressMtu => "longer than the receiving port's MTU",
    /// The source is a group address.
    SourceGroup => "source is a multicast address",
    /// The source is not the address configured for the port.
    Spoofed => "source is not the port's MAC address",
    /// Tagged on an access port, or in a VLAN that the port is no member of.
    VlanRefused => "VLAN not allowed on the sending port",
    /// Untagged on a trunk that has no native VLAN.
    Untagged => "untagged on a trunk without native VLAN",
    /// The destination is learnt on the very port the frame came from.
    SamePort => "destination is on the sending port",
    /// The destination is one of those that bridges do not relay (01:80:c2:00:00:00 to 0f: spanning tree, link aggregation,
    /// PAUSE, LLDP; IEEE 802.1Q-2018, 8.6.3). A physical switch must not take such a frame of a guest for this host's.
    LinkLocal => "for the next bridge only (spanning tree, LACP, LLDP)",
    /// Nobody else is in the VLAN.
    NoReceiver => "no other port in the VLAN",
    /// The client has disabled the queue that the frame was sent through.
    Disabled => "sending queue is disabled",
    /// The offload metadata contradicts the frame.
    BadOffload => "checksum or segmentation request does not fit the frame",
    /// The frame came in more pieces than the switch takes, or is longer than any frame.
    Malformed => "too long or in too many pieces",
    /// The virtio-net header is incomplete or asks for what was not negotiated.
    BadHeader => "virtio-net header incomplete or not as negotiated",
    /// The receiving queue has no free buffer.
    QueueFull => "receiving queue is full",
    /// The receiver's buffers cannot hold the frame.
    NoBuffer => "receiver's buffers are too small",
    /// The receiving port has no client, or its queues are not enabled.
    NotReady => "receiving port is not connected",
    /// The receiving port is stopped after a fault.
    Faulted => "receiving port is faulted",
    /// The switch was too slow to take the frame from the host's device, and the host had no room for more.
    DeviceOverrun => "switch is too slow for the host device",
    /// The host's device refused the frame.
    DeviceError => "host device refused the frame",
    /// The disk is too slow for the capture file that the frame was to be written to.
    CaptureLoss => "capture file is written too slowly",
}

impl DropReason {
    /// How many reasons there are.
    pub const COUNT: usize = Self::ALL.len();
}

impl std::fmt::Display for DropReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.text())
    }
}
