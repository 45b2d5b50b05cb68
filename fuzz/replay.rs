//! Replays checked-in inputs. Included by `tests/corpus.rs` of each crate that has fuzz targets.

use std::path::Path;

/// Runs every input of `target`. An input that fails is named on standard error.
pub fn replay(target: &str, run: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    let mut inputs: Vec<_> = std::fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.expect("a folder can be listed").path())
        .collect();
    inputs.sort();
    assert!(!inputs.is_empty(), "{} is empty", folder.display());
    for input in inputs {
        eprintln!("{}", input.display());
        run(&std::fs::read(&input).expect("an input can be read"));
    }
}
