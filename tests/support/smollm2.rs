//! The default model, where `scripts/demo` or `scripts/test` has put it.

use podium::model::default_model;
use std::path::PathBuf;

/// `None`, said aloud, where it has not been fetched. A model that was named must be there.
pub fn path() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("PODIUM_TEST_MODEL") {
        return Some(path.into());
    }
    let path = default_model::path();
    if let Err(missing) = &path {
        println!("skipped: {missing}");
    }
    path.ok()
}
