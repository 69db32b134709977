//! Best-of-N decoding at hardware speed.
//!
//! A language model writes N candidate answers to one prompt as one batch; a ranker of fewer than
//! 0.5M parameters reads the hidden state of each candidate's last token about 60 % of the way up
//! the layers, and picks the best one (*Language Ranker*, arXiv 2510.21883).
//!
//! ```
//! use podium::backend::cpu::{Cpu, simd::Isa};
//! use podium::engine::{Engine, GenerateRequest, select::Strategy};
//! use podium::model::{files::ModelFiles, forward::Model};
//! use std::{ops::ControlFlow, path::Path};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // A Hugging Face folder or a GGUF file; this one is a tiny model with random weights.
//! let files = ModelFiles::open(Path::new("tests/golden/models/llama-tied"))?;
//! let model = Model::load(Cpu::new(2, Isa::best())?, &files, &mut |_| {})?;
//! let mut engine = Engine::without_text(model)?;
//!
//! let mut request = GenerateRequest::new(vec![17, 4, 99]);
//! request.n = 8;
//! request.max_tokens = 16;
//! request.strategy = Strategy::Logprob;
//! let generated = engine.generate(&request, &mut |_event| ControlFlow::Continue(()))?;
//!
//! let chosen = &generated.candidates[generated.selected];
//! assert_eq!(generated.candidates.len(), 8);
//! for candidate in &generated.candidates {
//!     assert!(candidate.mean_logprob() <= chosen.mean_logprob());
//! }
//! # Ok(())
//! # }
//! ```
//!
//! [`Engine::generate`](engine::Engine::generate) has an example with text and a ranker.
//!
//! The modules depend on each other downward in this order: [`cli`], [`server`] → [`engine`], [`eval`] → [`tasks`] → [`ranker`],
//! [`model`] → [`backend`]. `docs/ARCHITECTURE.md` is the map.

pub mod backend;
pub mod cli;
pub mod engine;
pub mod eval;
pub mod model;
pub mod ranker;
pub mod server;
pub mod tasks;
