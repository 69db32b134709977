//! The engine: candidate groups from prompt to choice.
//!
//! [`Engine::generate`] writes N candidates as one batch and chooses; [`Engine::score`] computes the
//! features and log-probabilities of candidates that came from elsewhere. Both are groups of the
//! [`scheduler`], which any number of requests share. What decides without a model is in modules of
//! its own: scheduling, stop conditions, selection.

pub mod answer;
mod beam;
mod error;
mod generate;
mod request;
pub mod scheduler;
mod score;
pub mod select;
#[cfg(test)]
mod shared_batch_tests;
mod step;
pub mod stop;
#[cfg(test)]
mod tests;
mod writing;

pub use error::EngineError;
pub use request::{
    Candidate, Completed, Completion, Event, GenerateRequest, Generated, GroupObserver, Observer,
    ScoreRequest, Scored, Timings, TokenLogprob,
};

use crate::backend::{Backend, BackendError};
use crate::model::config::ModelConfig;
use crate::model::forward::{Model, State};
use crate::model::text::Tokenizer;
use crate::ranker::Ranker;
use scheduler::{GroupId, GroupShape, Limits, Scheduler};
use std::collections::BTreeMap;
use std::sync::Arc;
use step::Job;

/// Most candidates of a request: what a ranker is built for, and far beyond what pays.
pub const MAX_CANDIDATES: usize = 1024;

/// A model ready to serve requests, many at a time.
///
/// [`submit`](Engine::submit) and [`submit_score`](Engine::submit_score) put requests in a queue,
/// [`step`](Engine::step) computes the next batch of all that run. [`generate`](Engine::generate) and
/// [`score`](Engine::score) do both for one request. What comes of a request does not depend on what
/// else is running.
pub struct Engine<B: Backend> {
    model: Model<B>,
    state: State<B>,
    scheduler: Scheduler,
    tokenizer: Option<Arc<Tokenizer>>,
    /// The scheduler's groups.
    jobs: BTreeMap<GroupId, Job<B>>,
    next_group: GroupId,
    /// Groups that ended while somebody waited for another one.
    completed: Vec<Completed>,
    preemptions: u64,
    computed_tokens: u64,
}

/// What an engine is busy with, and has been.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Groups that are being computed, and groups that wait for memory.
    pub running: usize,
    pub waiting: usize,
    /// Candidates of the running groups.
    pub candidates: usize,
    /// Pages of the KV cache: all, those of running groups, and those that keep earlier prompts (of
    /// which running groups may be using some).
    pub pages: usize,
    pub used_pages: usize,
    pub cached_pages: usize,
    /// Since the start: groups that lost their pages for a while, and rows that went through the model.
    pub preemptions: u64,
    pub computed_tokens: u64,
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
        let limits = Limits {
            step_rows: B::PROMPT_ROWS,
            ..Limits::default()
        };
        Ok(Engine {
            model,
            state,
            scheduler: Scheduler::new(limits),
            tokenizer: None,
            jobs: BTreeMap::new(),
            next_group: 0,
            completed: Vec::new(),
            preemptions: 0,
            computed_tokens: 0,
        })
    }

    /// The engine with other limits. Requests that were submitted are forgotten.
    pub fn with_limits(self, limits: Limits) -> Engine<B> {
        Engine {
            scheduler: Scheduler::new(limits),
            jobs: BTreeMap::new(),
            completed: Vec::new(),
            ..self
        }
    }

    /// Bytes of a page of the KV cache.
    pub fn page_bytes(&self) -> usize {
        self.model.backend.kv_page_bytes(self.model.kv_shape())
    }

    /// Refuses a request that the device has no memory for, where no limit of pages does.
    fn check_pages(&self, shape: &GroupShape, prompt: usize) -> Result<(), EngineError> {
        if self.scheduler.limits().pages != usize::MAX {
            return Ok(());
        }
        let pages = self.scheduler.pages().used_pages() + shape.most_pages(prompt);
        let there = self.state.kv_bytes(&self.model.backend);
        let bytes = pages
            .saturating_mul(self.page_bytes())
            .saturating_sub(there);
        let what = "the keys and values of the request (fewer or shorter candidates need less)";
        Ok(self
            .model
            .backend
            .check_memory(&[(what.to_string(), bytes)])?)
    }

    /// The engine with limits to its memory, where the device has that much.
    ///
    /// # Errors
    /// How much is needed, and how much there is.
    pub fn with_room_for(self, limits: Limits) -> Result<Engine<B>, BackendError> {
        let bytes = limits.pages.saturating_mul(self.page_bytes());
        let needs = [("the KV cache".to_string(), bytes)];
        self.model.backend.check_memory(&needs)?;
        Ok(self.with_limits(limits))
    }

    /// Forgets a request; its memory is free at once. Says whether it was there.
    pub fn cancel(&mut self, group: GroupId) -> bool {
        self.scheduler.cancel(group);
        self.jobs.remove(&group).is_some()
    }

    /// Whether nothing is left to be computed.
    pub fn is_idle(&self) -> bool {
        self.jobs.is_empty()
    }

    pub fn load(&self) -> Load {
        let (running, waiting) = self.scheduler.running_and_waiting();
        let pages = self.scheduler.pages();
        Load {
            running,
            waiting,
            candidates: self.scheduler.running_candidates(),
            pages: pages.capacity(),
            used_pages: pages.used_pages(),
            cached_pages: self.scheduler.cached_pages(),
            preemptions: self.preemptions,
            computed_tokens: self.computed_tokens,
        }
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
}
