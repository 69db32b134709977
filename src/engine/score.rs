//! The scoring entrance: features and log-probabilities of candidates that came from elsewhere.
//!
//! The prompt is prefilled once; the candidates follow it as one ragged batch, cut into pieces by the
//! scheduler. Layers above the highest that is asked for are not run, and neither is the LM head,
//! unless log-probabilities are wanted.

use super::scheduler::{GroupId, GroupShape, Purpose, Work};
use super::step::{Job, last_rows};
use super::{Completion, Engine, EngineError, ScoreRequest, Scored};
use crate::backend::{Backend, BackendError};
use crate::model::forward::{Model, State};
use std::ops::ControlFlow;

/// Rows of logits that are kept at a time: 64 of a vocabulary of 150k are 38 MB.
const LOGITS_CHUNK: usize = 64;

/// Given candidates, and what is known of them.
pub(super) struct ScoreJob {
    pub request: ScoreRequest,
    /// The layers asked for, each once, ascending.
    pub layers: Vec<usize>,
    pub scored: Scored,
}

impl<B: Backend> Engine<B> {
    /// Computes features and log-probabilities of given candidates.
    ///
    /// # Errors
    /// An empty prompt, a token beyond the vocabulary, a candidate beyond the context, a layer that
    /// does not exist.
    pub fn score(&mut self, request: &ScoreRequest) -> Result<Scored, EngineError> {
        let group = self.submit_score(request.clone())?;
        match self.complete(group, &mut |_| ControlFlow::Continue(()))? {
            Completion::Scored(scored) => Ok(*scored),
            Completion::Generated(_) => unreachable!("the group was submitted to be scored"),
        }
    }

    /// Puts given candidates in the queue, to be computed by [`step`](Self::step).
    ///
    /// # Errors
    /// Those of [`score`](Self::score), and more tokens than the KV cache has room for.
    pub fn submit_score(&mut self, request: ScoreRequest) -> Result<GroupId, EngineError> {
        self.check_prompt(&request.prompt_token_ids)?;
        self.check_layers(&request.layers)?;
        let (prompt, context) = (
            &request.prompt_token_ids,
            self.config().max_position_embeddings,
        );
        if prompt.len() > context {
            return Err(EngineError::PromptTooLong {
                tokens: prompt.len(),
                context,
            });
        }
        for (candidate, tokens) in request.candidate_token_ids.iter().enumerate() {
            self.check_tokens(|| format!("candidate {candidate}"), tokens)?;
            let tokens = prompt.len() + tokens.len();
            if tokens > context {
                return Err(EngineError::CandidateTooLong {
                    candidate,
                    tokens,
                    context,
                });
            }
        }
        let shape = GroupShape {
            given: request.candidate_token_ids.iter().map(Vec::len).collect(),
            // Keys and values of the upper layers are there with log-probabilities only.
            shares_prompt: request.logprobs,
            ..GroupShape::write(0, 0)
        };
        self.check_pages(&shape, prompt.len())?;
        let group = self.next_group;
        self.scheduler
            .submit(group, request.prompt_token_ids[..].into(), shape)?;
        self.next_group += 1;
        let mut layers = request.layers.clone();
        layers.sort_unstable();
        layers.dedup();
        let candidates = &request.candidate_token_ids;
        let scored = Scored {
            prompt_features: Vec::new(),
            candidate_features: vec![Vec::new(); candidates.len()],
            token_logprobs: candidates
                .iter()
                .map(|tokens| vec![f32::NAN; if request.logprobs { tokens.len() } else { 0 }])
                .collect(),
        };
        let job = ScoreJob {
            request,
            layers,
            scored,
        };
        self.jobs.insert(group, Job::Score(Box::new(job)));
        Ok(group)
    }

    /// Log-probabilities of the tokens that follow those of a batch's rows.
    pub(super) fn score_logprobs(
        &mut self,
        job: &mut ScoreJob,
        work: &Work,
        first_row: usize,
    ) -> Result<(), BackendError> {
        if !job.request.logprobs {
            return Ok(());
        }
        let candidates = &job.request.candidate_token_ids;
        // (row, candidate, index of the token that the row predicts)
        let mut predictions = Vec::new();
        match work {
            Work::Prefill { tokens, .. } if tokens.end == job.request.prompt_token_ids.len() => {
                let row = first_row + tokens.len() - 1;
                let not_empty = (0..candidates.len()).filter(|&c| !candidates[c].is_empty());
                predictions.extend(not_empty.map(|candidate| (row, candidate, 0)));
            }
            Work::Prefill { .. } => {}
            Work::Candidates(pieces) => {
                for (last_row, piece) in last_rows(pieces, first_row) {
                    let last = piece.tokens.end - 1;
                    for index in piece.tokens.clone() {
                        if index + 1 < candidates[piece.candidate].len() {
                            let row = last_row - (last - index);
                            predictions.push((row, piece.candidate, index + 1));
                        }
                    }
                }
            }
        }
        for chunk in predictions.chunks(LOGITS_CHUNK) {
            let rows: Vec<u32> = chunk.iter().map(|&(row, ..)| row as u32).collect();
            let targets: Vec<u32> = chunk
                .iter()
                .map(|&(_, c, index)| candidates[c][index])
                .collect();
            let logits = self.model.logits(&mut self.state, &rows)?;
            let logprobs = self.model.backend.token_logprobs(logits, &targets)?;
            for (logprob, &(_, candidate, index)) in logprobs.into_iter().zip(chunk) {
                job.scored.token_logprobs[candidate][index] = logprob;
            }
        }
        Ok(())
    }
}

impl ScoreJob {
    /// Layers to run, of a model that has `all`.
    pub fn deepest(&self, all: usize) -> usize {
        match self.request.logprobs {
            true => all,
            false => self.layers.last().copied().unwrap_or(0),
        }
    }

    /// Keeps the features that are among a batch's rows.
    pub fn take_rows<B: Backend>(
        &mut self,
        model: &Model<B>,
        state: &State<B>,
        work: &Work,
        first_row: usize,
    ) -> Result<(), EngineError> {
        let read = |row: usize| -> Result<Vec<Vec<f32>>, BackendError> {
            let layers = self.request.layers.iter();
            layers
                .map(|&layer| model.backend.read_row(state.captured(layer), row))
                .collect()
        };
        match work {
            Work::Prefill { tokens, .. } => {
                if tokens.end == self.request.prompt_token_ids.len() {
                    let features = read(first_row + tokens.len() - 1)?;
                    // The prompt's end is the end of an empty candidate.
                    for (tokens, place) in self
                        .request
                        .candidate_token_ids
                        .iter()
                        .zip(&mut self.scored.candidate_features)
                    {
                        if tokens.is_empty() {
                            place.clone_from(&features);
                        }
                    }
                    self.scored.prompt_features = features;
                }
            }
            Work::Candidates(pieces) => {
                for (row, piece) in last_rows(pieces, first_row) {
                    if piece.purpose == Purpose::State {
                        self.scored.candidate_features[piece.candidate] = read(row)?;
                    }
                }
            }
        }
        Ok(())
    }
}
