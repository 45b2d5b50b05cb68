//! The nested host: a Linux machine with a KVM of its own, on machines whose processor has none to lend.
//!
//! QEMU's software CPU emulates AMD-V with nested paging. Debian's cloud kernel boots in it as the *host*, with our programs
//! and QEMU aboard; unmodified Debian kernels boot in that as *guests*, under our VMM or under QEMU to compare with.
//! Absolute figures mean little there; ratios of what ran side by side carry over.
//!
//! | module | what it is |
//! |---|---|
//! | [`host`] | the nested host: commands, files, streams |
//! | [`namespace`] | its network namespaces |
//! | [`guest`] | a guest in it, driven over its console |
//! | [`peer`] | QEMU as the guest's VMM |
//! | [`yardd`] | our daemon in it, and its VMs |
//! | [`dpdk`] | testpmd in a guest |
//! | [`stream`] | a TCP connection under load, its bytes compared |
//! | [`scene`] | the frame of a test |
//! | [`image`] | what both are made of |
//! | [`link`], [`wire`], [`porter`] | the line between a test and the host |

pub mod dpdk;
pub mod guest;
pub mod host;
pub mod image;
pub mod link;
pub mod namespace;
pub mod peer;
pub mod porter;
pub mod scene;
pub mod stream;
pub mod wire;
pub mod yardd;

pub use guest::Guest;
pub use host::{Host, HostSpec};
pub use namespace::Namespace;
pub use peer::{Peer, PeerSpec};
pub use scene::{Steps, nested, scene, scene_on};
pub use stream::Stream;
pub use yardd::{VmNic, VmSpec, Yardd};
