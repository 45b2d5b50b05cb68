//! The lab: real network clients that Switchyard did not write, run from plain blocking Rust.
//!
//! Whole-system tests, `cargo xtask demo` and `cargo xtask bench` share it. A [`lab::Lab`] owns one run's
//! directory; everything started in it is a guard that stops what it started when dropped, and nothing
//! survives the program, even if it is killed: children die with it ([`process`]), and what outlives a
//! process (namespaces, directories, huge pages) is undone by the [`janitor`].
//!
//! | module | what it runs |
//! |---|---|
//! | [`setup`] | Debian packages, huge pages, what this machine can do |
//! | [`station`] | the trait of a place where commands run: a namespace or a guest |
//! | [`netns`], [`bridge`] | network namespaces, veth, TAP; a Linux bridge to compare with |
//! | [`guest`], [`nic`], [`orders`] | Debian guests under QEMU's software CPU |
//! | [`nested`] | a host with KVM of its own, under QEMU's software CPU, and guests in it |
//! | [`package`], [`kernel`], [`initrd`], [`cpio`] | Debian's kernels, and root file systems made on the spot |
//! | [`testpmd`] | DPDK's packet generator over virtio-user, or as a switch |
//! | [`ovs`] | a private OVS-DPDK |
//! | [`iperf`], [`ping`], [`transfer`] | throughput, round trips and compared bytes between two stations |
//! | [`offload`] | a station's card by `ethtool` |
//! | [`player`], [`witness`], [`numbered`], [`draw`] | guests played in this process; frames compared byte for byte |
//! | [`life`] | a guest that is to be killed at one of its steps |
//! | [`yardd`], [`case`] | the daemon and its command line; the frame of a whole-system test |
//! | [`capture`], [`packets`] | tcpdump, tcpreplay, tshark, capinfos |
#![forbid(unsafe_code)]

pub mod bridge;
pub mod capture;
pub mod case;
pub mod cpio;
pub mod draw;
pub mod guest;
pub mod initrd;
pub mod iperf;
pub mod janitor;
pub mod kernel;
pub mod lab;
pub mod life;
pub mod nested;
pub mod netns;
pub mod nic;
pub mod numbered;
pub mod offload;
pub mod orders;
pub mod ovs;
pub mod package;
pub mod packets;
pub mod ping;
pub mod player;
pub mod process;
pub mod setup;
pub mod station;
pub mod testpmd;
pub mod testpmd_stats;
pub mod transfer;
pub mod witness;
pub mod yardd;
