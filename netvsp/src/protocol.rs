//! What lies on the wire between a guest's `hv_netvsc` and its NIC: NVSP messages in ring packets, RNDIS messages within
//! them, and the NDIS structures that RNDIS queries carry.
//!
//! Every structure is little-endian and unaligned, has its size asserted, and is read from a private copy of the guest's
//! bytes. Offsets are decimal and count as the fact sheet counts them: from the message's first byte unless said otherwise.

#![expect(missing_debug_implementations, reason = "the types that zerocopy's derives generate have none")]

pub mod nvsp;
pub mod oid;
pub mod packet;
pub mod rndis;

/// Wire structures: each field documented, each size asserted.
macro_rules! wire {
    ($($(#[$doc:meta])* $name:ident = $size:literal { $($(#[$field_doc:meta])* $field:ident: $type:ty),* $(,)? })*) => { $(
        $(#[$doc])*
        #[derive(
            Debug, Clone, Copy, PartialEq, Eq, Default,
            zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::KnownLayout, zerocopy::Immutable, zerocopy::Unaligned,
        )]
        #[repr(C)]
        pub struct $name { $($(#[$field_doc])* pub $field: $type),* }

        const _: () = assert!(size_of::<$name>() == $size);
    )* };
}

/// A closed set of numbers, each with the name an operator reads.
macro_rules! numbers {
    ($(#[$doc:meta])* $name:ident { $($(#[$item_doc:meta])* $item:ident = $value:literal, $text:literal;)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u32)]
        pub enum $name { $($(#[$item_doc])* $item = $value),* }

        impl $name {
            /// All of them, in numerical order.
            pub const ALL: &[Self] = &[$(Self::$item),*];

            /// The number on the wire.
            pub const fn number(self) -> u32 {
                match self { $(Self::$item => $value),* }
            }

            /// What `number` means, if anything.
            pub const fn from_number(number: u32) -> Option<Self> {
                match number { $($value => Some(Self::$item),)* _ => None }
            }

            /// The name in the protocol's own words.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$item => $text),* }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.name())
            }
        }
    };
}

use {numbers, wire};

#[cfg(test)]
mod tests;
