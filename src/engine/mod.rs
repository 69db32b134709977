//! Candidate groups: generation, sampling, stop conditions, selection.

pub mod answer;
pub mod pages;
pub mod select;
pub mod stop;
