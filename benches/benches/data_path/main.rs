//! What each step of a frame's way costs on one core.
//!
//! `cargo bench -p switchyard-benches` takes less than a minute; a name picks some of them, such as `-- pipeline`. Figures
//! are per burst, or per 64 headers; the rate is in frames or bytes.

mod copy;
mod frames;
mod headers;
mod offload;
mod table;

use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};

/// Short, since these figures guide and do not decide: the ones that count are measured with real clients.
fn configuration() -> Criterion {
    Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_millis(1000))
        .sample_size(20)
        .nresamples(2000)
}

criterion_group! {
    name = data_path;
    config = configuration();
    targets =
        headers::parse, headers::toeplitz, headers::checksum,
        table::look_up, table::pipeline,
        offload::segmentation, offload::coalescing,
        copy::copy
}
criterion_main!(data_path);
