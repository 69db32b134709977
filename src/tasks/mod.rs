//! Candidates and their features on disk.

pub mod candidates;
pub mod feature_file;
pub mod whole_file;
