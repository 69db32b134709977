//! Tasks: their data, their verifiers, and candidates with features on disk.

pub mod candidates;
pub mod collect;
pub mod collection;
pub mod data;
pub mod feature_file;
pub mod forms;
pub mod sandbox;
pub mod training;
pub mod verify;
pub mod whole_file;
