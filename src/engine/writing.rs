//! Candidates that are being written: tokens, text, and the features that are kept of them.

use super::request::{Candidate, TokenLogprob};
use super::select::CandidateFacts;
use super::stop::{FinishReason, StopConditions, StopState};
use crate::backend::Backend;
use crate::backend::sampling::Sampled;
use crate::model::forward::State;
use crate::model::text::{Detokenizer, Tokenizer};
use crate::ranker::ExtraInputs;

/// A candidate that is being written.
#[derive(Clone)]
pub struct Writing {
    pub stop: StopState,
    detokenizer: Option<Detokenizer>,
    pub token_ids: Vec<u32>,
    pub sampled: Vec<Sampled>,
    end: Option<Sampled>,
}

impl Writing {
    /// A candidate without tokens.
    pub fn new(conditions: &StopConditions, tokenizer: Option<&Tokenizer>) -> Writing {
        Writing {
            stop: StopState::new(conditions),
            detokenizer: tokenizer.map(|tokenizer| tokenizer.detokenizer(true)),
            token_ids: Vec::new(),
            sampled: Vec::new(),
            end: None,
        }
    }

    /// Takes the next token; says why it was the last, if it was.
    pub fn push(&mut self, conditions: &StopConditions, sampled: Sampled) -> Option<FinishReason> {
        let piece = self
            .detokenizer
            .as_mut()
            .map_or("", |d| d.push(sampled.token));
        let reason = self.stop.push(conditions, sampled.token, piece);
        match reason {
            Some(FinishReason::Stop) => self.end = Some(sampled),
            _ => {
                self.token_ids.push(sampled.token);
                self.sampled.push(sampled);
            }
        }
        reason?;
        let rest = self.detokenizer.as_mut().map_or("", |d| d.finish());
        let reason = self.stop.close(conditions, rest);
        self.token_ids.truncate(self.stop.kept_tokens());
        self.sampled.truncate(self.stop.kept_tokens());
        reason
    }

    /// The finished candidate, without score and features.
    pub fn finished(self, index: usize) -> Candidate {
        let tokens = self.sampled.len().max(1) as f64;
        let certainty: f64 = self
            .sampled
            .iter()
            .map(|s| f64::from(s.self_certainty))
            .sum();
        Candidate {
            index,
            text: self.stop.text().to_string(),
            token_ids: self.token_ids,
            finish_reason: self.stop.finish_reason(),
            token_logprobs: self.sampled.iter().map(|s| s.logprob).collect(),
            self_certainty: certainty / tokens,
            top_logprobs: self.sampled.into_iter().map(|s| s.top_logprobs).collect(),
            end_token: self.end.map(|end| {
                let Sampled {
                    token,
                    logprob,
                    top_logprobs: top,
                    ..
                } = end;
                (token, TokenLogprob { logprob, top })
            }),
            score: None,
            features: Vec::new(),
        }
    }
}

/// Features of a group, kept on the device while its candidates end one by one.
pub struct Features<B: Backend> {
    /// Ascending.
    pub layers: Vec<usize>,
    /// For each layer `[1 + n, hidden_size]`: the prompt's, then the candidates'.
    pub rows: Vec<B::Rows>,
}

impl<B: Backend> Features<B> {
    /// Copies a row of the last batch's captured states to a place in the features.
    pub fn keep(&mut self, backend: &B, state: &State<B>, row: usize, place: usize) {
        for (layer, rows) in self.layers.iter().zip(&mut self.rows) {
            backend.copy_rows(state.captured(*layer), &[(row, place)], rows);
        }
    }

    /// An empty answer ends where the prompt does.
    pub fn keep_prompt(&mut self, backend: &B, candidate: usize) {
        for rows in &mut self.rows {
            backend.copy_row_within(rows, 0, 1 + candidate);
        }
    }
}

/// What decoding knows of a candidate beside its feature.
pub fn extra_inputs(candidate: &Candidate) -> ExtraInputs {
    ExtraInputs {
        mean_logprob: candidate.mean_logprob() as f32,
        length: candidate.token_ids.len() as f32,
    }
}

pub fn facts(candidate: &Candidate) -> CandidateFacts<'_> {
    CandidateFacts {
        text: &candidate.text,
        cumulative_logprob: candidate.cumulative_logprob(),
        tokens: candidate.token_ids.len(),
        self_certainty: candidate.self_certainty,
        score: candidate.score,
    }
}
