//! The scoring entrance: features and log-probabilities of candidates that came from elsewhere.
//!
//! The prompt is prefilled once; the candidates follow it as one ragged batch, cut into pieces of
//! bounded size. Layers above the highest that is asked for are not run, and neither is the LM head,
//! unless log-probabilities are wanted.

use super::scheduler::Sequence;
use super::{Engine, EngineError, ScoreRequest, Scored};
use crate::backend::{Backend, Batch, Group};
use crate::model::forward::Depth;
use std::ops::ControlFlow;

/// Candidate tokens that go through the model at a time.
const SCORE_CHUNK: usize = 512;
/// Rows of logits that are kept at a time: 64 of a vocabulary of 150k are 38 MB.
const LOGITS_CHUNK: usize = 64;

impl<B: Backend> Engine<B> {
    /// Computes features and log-probabilities of given candidates.
    ///
    /// # Errors
    /// An empty prompt, a token beyond the vocabulary, a candidate beyond the context, a layer that
    /// does not exist.
    pub fn score(&mut self, request: &ScoreRequest) -> Result<Scored, EngineError> {
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
        let mut prefix = Sequence::default();
        let mut suffixes = Vec::new();
        let scored = self.score_in(request, &mut prefix, &mut suffixes);
        for sequence in suffixes.iter_mut().chain([&mut prefix]) {
            sequence.release(&mut self.pages);
        }
        scored
    }

    fn score_in(
        &mut self,
        request: &ScoreRequest,
        prefix: &mut Sequence,
        suffixes: &mut Vec<Sequence>,
    ) -> Result<Scored, EngineError> {
        let candidates = &request.candidate_token_ids;
        let highest = request.layers.iter().copied().max().unwrap_or(0);
        let layers = if request.logprobs {
            self.config().layers
        } else {
            highest
        };
        let depth = Depth {
            layers,
            capture: &request.layers,
        };
        let prompt = &request.prompt_token_ids;
        let proceed = &mut |_: super::Event| ControlFlow::Continue(());
        let last_row = self.prefill(prompt, depth, prefix, proceed)?;
        let prompt_features = self.captured_row(&request.layers, last_row as usize)?;
        let mut scored = Scored {
            candidate_features: vec![prompt_features.clone(); candidates.len()],
            prompt_features,
            token_logprobs: candidates.iter().map(|_| Vec::new()).collect(),
        };
        if request.logprobs {
            // The prompt's last row predicts every candidate's first token.
            let first = candidates.iter().map(|tokens| tokens.first());
            let targets: Vec<(usize, u32)> = first
                .enumerate()
                .filter_map(|(i, token)| Some((i, *token?)))
                .collect();
            for chunk in targets.chunks(LOGITS_CHUNK) {
                let rows: Vec<_> = chunk.iter().map(|&(_, token)| (last_row, token)).collect();
                for (logprob, (candidate, _)) in self.logprobs(&rows)?.into_iter().zip(chunk) {
                    scored.token_logprobs[*candidate].push(logprob);
                }
            }
        }
        suffixes.extend(candidates.iter().map(|_| Sequence::default()));
        for pieces in cut(candidates) {
            let mut group = Group {
                prefix: prefix.page_ids(),
                prefix_len: prefix.len(),
                segments: Vec::new(),
            };
            let mut tokens = Vec::new();
            // (row, token that it predicts, candidate)
            let mut predictions = Vec::new();
            let mut last_rows = Vec::new();
            for (candidate, range) in pieces {
                let all = &candidates[candidate];
                group
                    .segments
                    .push(suffixes[candidate].extend(&mut self.pages, range.len())?);
                for index in range {
                    let row = tokens.len();
                    tokens.push(all[index]);
                    match all.get(index + 1) {
                        Some(&next) => predictions.push((row as u32, next, candidate)),
                        None => last_rows.push((row, candidate)),
                    }
                }
            }
            let batch = Batch {
                tokens,
                groups: vec![group],
            };
            self.model.forward(&mut self.state, &batch, depth)?;
            for (row, candidate) in last_rows {
                scored.candidate_features[candidate] = self.captured_row(&request.layers, row)?;
                // Nothing reads this candidate's keys and values any more.
                suffixes[candidate].release(&mut self.pages);
            }
            if request.logprobs {
                for chunk in predictions.chunks(LOGITS_CHUNK) {
                    let rows: Vec<_> = chunk.iter().map(|&(row, token, _)| (row, token)).collect();
                    for (logprob, &(_, _, candidate)) in
                        self.logprobs(&rows)?.into_iter().zip(chunk)
                    {
                        scored.token_logprobs[candidate].push(logprob);
                    }
                }
            }
        }
        Ok(scored)
    }

    /// Log-probability of a token in each row of the last batch: `(row, token)`.
    fn logprobs(&mut self, rows: &[(u32, u32)]) -> Result<Vec<f32>, EngineError> {
        let (rows, tokens): (Vec<u32>, Vec<u32>) = rows.iter().copied().unzip();
        let logits = self.model.logits(&mut self.state, &rows)?;
        Ok(self.model.backend.token_logprobs(logits, &tokens)?)
    }

    /// One row of the last batch after each of the captured layers.
    pub(super) fn captured_row(
        &self,
        layers: &[usize],
        row: usize,
    ) -> Result<Vec<Vec<f32>>, EngineError> {
        let read = |&layer: &usize| self.model.backend.read_row(self.state.captured(layer), row);
        Ok(layers.iter().map(read).collect::<Result<_, _>>()?)
    }
}

/// Cuts candidates into batches of at most [`SCORE_CHUNK`] tokens: of each batch, the candidates and
/// the ranges of their tokens.
fn cut(candidates: &[Vec<u32>]) -> Vec<Vec<(usize, std::ops::Range<usize>)>> {
    let mut batches: Vec<Vec<_>> = Vec::new();
    let mut room = 0;
    for (candidate, tokens) in candidates.iter().enumerate() {
        let mut start = 0;
        while start < tokens.len() {
            if room == 0 {
                batches.push(Vec::new());
                room = SCORE_CHUNK;
            }
            let end = tokens.len().min(start + room);
            if let Some(batch) = batches.last_mut() {
                batch.push((candidate, start..end));
            }
            room -= end - start;
            start = end;
        }
    }
    batches
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_is_in_one_batch_and_none_is_too_large() {
        let lengths = [1, 0, SCORE_CHUNK, 3, 2 * SCORE_CHUNK + 5, 0, 7];
        let candidates: Vec<Vec<u32>> = lengths.iter().map(|&n| vec![0; n]).collect();
        let mut next = vec![0; candidates.len()];
        for batch in cut(&candidates) {
            assert!(batch.iter().map(|(_, range)| range.len()).sum::<usize>() <= SCORE_CHUNK);
            for (candidate, range) in batch {
                assert_eq!(range.start, next[candidate]);
                next[candidate] = range.end;
            }
        }
        assert_eq!(next, lengths);
    }
}
