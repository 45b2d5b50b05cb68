//! Offload translation: what a sender's offloads left undone is done in software for a receiver without them.
//!
//! Offloads travel as metadata and go whole to whoever takes them; this is for the others. [`check()`] is asked once for
//! every frame that comes in with work left to be done; [`Translator`] does the work, frame by frame, for one receiver:
//! VLAN tags, checksums, segmentation, and for a receiver of large frames coalescing.

pub mod check;
pub mod checksum;
mod coalesce;
mod header;
mod segment;
mod tag;
pub mod translate;

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

pub use check::{MAX_SEGMENTS, check};
pub use header::HEADER_MAX;
pub use translate::{FrameSink, TagForm, Translator, Want};
