//! The engine: candidate groups from prompt to choice.
//!
//! [`Engine::generate`] writes N candidates as one batch and chooses; [`Engine::score`] computes the
//! features and log-probabilities of candidates that came from elsewhere. What decides without a
//! model is in modules of its own: sampling parameters, stop conditions, selection, pages.

pub mod answer;
mod beam;
mod error;
mod generate;
mod request;
pub mod scheduler;
mod score;
pub mod select;

pub mod stop;
#[cfg(test)]
mod tests;

pub use error::EngineError;
pub use request::{
    Candidate, Event, GenerateRequest, Generated, Observer, ScoreRequest, Scored, Timings,
};

use crate::backend::{Backend, BackendError, Batch, Group};
use crate::model::config::ModelConfig;
use crate::model::forward::{Depth, Model, State};
use crate::model::text::Tokenizer;
use crate::ranker::Ranker;
use scheduler::Sequence;
use scheduler::pages::PagePool;
use std::sync::Arc;

/// Most candidates of a request: what a ranker is built for, and far beyond what pays.
pub const MAX_CANDIDATES: usize = 1024;
/// Prompt tokens that go through the model at a time.
const PREFILL_CHUNK: usize = 512;

/// A model ready to serve requests, one at a time.
pub struct Engine<B: Backend> {
    model: Model<B>,
    state: State<B>,
    pages: PagePool,
    tokenizer: Option<Arc<Tokenizer>>,
}

impl<B: Backend> Engine<B> {
    /// An engine with an empty KV cache that may grow without a limit.
    pub fn new(model: Model<B>, tokenizer: Arc<Tokenizer>) -> Result<Engine<B>, BackendError> {
        Ok(Engine {
            tokenizer: Some(tokenizer),
            ..Engine::without_text(model)?
        })
    }

    /// An engine for token ids alone: candidates have no text, and stop strings end nothing.
    pub fn without_text(model: Model<B>) -> Result<Engine<B>, BackendError> {
        let state = model.state()?;
        Ok(Engine {
            model,
            state,
            pages: PagePool::new(usize::MAX),
            tokenizer: None,
        })
    }

    pub fn model(&self) -> &Model<B> {
        &self.model
    }

    pub fn config(&self) -> &ModelConfig {
        &self.model.config
    }

    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.tokenizer.as_deref()
    }

    /// The layer that a ranker reads unless its file says otherwise: 60 % of the way up.
    pub fn default_layer(&self) -> usize {
        ((self.config().layers as f64 * 0.6).round() as usize).max(1)
    }

    fn check_ranker(&self, ranker: &Ranker) -> Result<(), EngineError> {
        let config = self.config();
        Ok(ranker.check_model(&self.model.fingerprint, config.hidden_size, config.layers)?)
    }

    fn check_layers(&self, wanted: &[usize]) -> Result<(), EngineError> {
        let layers = self.config().layers;
        match wanted.iter().find(|&&layer| layer == 0 || layer > layers) {
            Some(&layer) => Err(EngineError::UnknownLayer { layer, layers }),
            None => Ok(()),
        }
    }

    fn check_tokens(&self, what: impl Fn() -> String, tokens: &[u32]) -> Result<(), EngineError> {
        let vocab_size = self.config().vocab_size;
        match tokens.iter().find(|&&token| token as usize >= vocab_size) {
            Some(&token) => Err(EngineError::UnknownToken {
                what: what(),
                token,
                last: vocab_size - 1,
            }),
            None => Ok(()),
        }
    }

    fn check_prompt(&self, prompt: &[u32]) -> Result<(), EngineError> {
        if prompt.is_empty() {
            return Err(EngineError::EmptyPrompt);
        }
        self.check_tokens(|| "the prompt".to_string(), prompt)
    }

    /// Runs a prompt through the first `depth.layers` layers, in chunks. What the last chunk captured
    /// stays in the state; its last row is the prompt's last token, whose index is returned. An
    /// observer that breaks off gets [`EngineError::Interrupted`].
    fn prefill(
        &mut self,
        prompt: &[u32],
        depth: Depth,
        sequence: &mut Sequence,
        observer: &mut Observer,
    ) -> Result<u32, EngineError> {
        let mut last_row = 0;
        for chunk in prompt.chunks(PREFILL_CHUNK) {
            let segment = sequence.extend(&mut self.pages, chunk.len())?;
            let group = Group {
                segments: vec![segment],
                ..Group::default()
            };
            let batch = Batch {
                tokens: chunk.to_vec(),
                groups: vec![group],
            };
            self.model.forward(&mut self.state, &batch, depth)?;
            last_row = chunk.len() as u32 - 1;
            if observer(Event::Prefill {
                done: sequence.len(),
                total: prompt.len(),
            })
            .is_break()
            {
                return Err(EngineError::Interrupted);
            }
        }
        Ok(last_row)
    }
}
