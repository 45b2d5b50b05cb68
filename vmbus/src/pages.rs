//! A GPADL's pages in guest memory.
//!
//! A guest grants memory to a device as a list of page numbers, its GPADL: rings, and the buffers of a NIC. The pages lie
//! anywhere and in any order. [`Pages`] makes one range of them; looking one up costs an index and an addition.
//!
//! Source: Linux `drivers/hv/channel.c` (`create_gpadl_header`).

pub use vmq::memory::{Pages, PagesError, SharedWord};

/// Page numbers in one GPADL: its length in bytes is a 16-bit field that also counts the range's header.
pub const MAX_GPADL_PAGES: usize = 8190;
