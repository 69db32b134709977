//! Candidates and their features on disk.

pub mod candidates;
pub mod collection;
pub mod feature_file;
pub mod training;
pub mod whole_file;
