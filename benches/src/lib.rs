//! Load for measuring: the saturating generator. Criterion benches of the parts are in `benches/`.

#![forbid(unsafe_code)]

pub mod generator;
