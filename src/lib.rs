//! Best-of-N decoding at hardware speed.
//!
//! A language model writes N candidate answers to one prompt as one batch; a ranker of fewer than
//! 0.5M parameters reads the hidden state of each candidate's last token about 60 % of the way up
//! the layers, and picks the best one (*Language Ranker*, arXiv 2510.21883).
//!
//! The modules depend on each other downward in this order: [`cli`] → [`engine`], [`eval`] → [`tasks`] → [`ranker`],
//! [`model`] → [`backend`]. `docs/ARCHITECTURE.md` is the map.

pub mod backend;
pub mod cli;
pub mod engine;
pub mod eval;
pub mod model;
pub mod ranker;
pub mod tasks;
