//! Candidate groups: generation, sampling, stop conditions, selection.
