//! What the engine is asked for and what it gives.

use super::error::EngineError;
use super::scheduler::GroupId;
use super::select::Strategy;
use super::stop::FinishReason;
use crate::backend::sampling::SamplingParams;
use crate::ranker::Ranker;
use std::ops::ControlFlow;
use std::sync::Arc;

/// N candidates for one prompt, and the choice among them.
#[derive(Clone, Debug)]
pub struct GenerateRequest {
    pub prompt_token_ids: Vec<u32>,
    /// Candidates to write. Greedy writes one whatever is asked; beam search keeps this many beams.
    pub n: usize,
    /// Longest answer, in tokens.
    pub max_tokens: usize,
    /// No end token is drawn before the answer has as many tokens. Stop strings end it all the same.
    pub min_tokens: usize,
    pub sampling: SamplingParams,
    /// With it, candidate k is the same whatever N is and whatever else is running.
    pub seed: u64,
    pub stop: Vec<String>,
    /// How the answer is chosen.
    pub strategy: Strategy,
    /// Scores the candidates; needed by [`Strategy::Ranker`].
    pub ranker: Option<Arc<Ranker>>,
    /// Layers whose features come back with the candidates, beside the ranker's.
    pub feature_layers: Vec<usize>,
    /// How many of the most probable tokens to report at each position.
    pub top_logprobs: usize,
    /// Report the log-probability of each token of the prompt too, with as many of the most probable
    /// ones.
    pub prompt_logprobs: Option<usize>,
    /// Added to logits: (token, bias).
    pub logit_bias: Vec<(u32, f32)>,
    /// Taken from the logit of every token that the answer has already.
    pub presence_penalty: f32,
    /// Taken from a token's logit for each time that the answer has it.
    pub frequency_penalty: f32,
    /// Tokens that end an answer beside the model's own.
    pub stop_token_ids: Vec<u32>,
    /// Go on behind the model's own end tokens.
    pub ignore_end: bool,
}

impl GenerateRequest {
    /// One candidate of at most 256 tokens at temperature 1; the first is chosen.
    pub fn new(prompt_token_ids: Vec<u32>) -> GenerateRequest {
        GenerateRequest {
            prompt_token_ids,
            n: 1,
            max_tokens: 256,
            min_tokens: 0,
            sampling: SamplingParams::default(),
            seed: 0,
            stop: Vec::new(),
            strategy: Strategy::First,
            ranker: None,
            feature_layers: Vec::new(),
            top_logprobs: 0,
            prompt_logprobs: None,
            logit_bias: Vec::new(),
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            stop_token_ids: Vec::new(),
            ignore_end: false,
        }
    }
}

/// One finished answer.
#[derive(Clone, Debug)]
pub struct Candidate {
    pub index: usize,
    pub text: String,
    /// Tokens of the text, without the end token. Where a stop string cut the text, tokens that lie
    /// wholly behind the cut are gone.
    pub token_ids: Vec<u32>,
    /// `None`: it was cut off by the caller.
    pub finish_reason: Option<FinishReason>,
    /// Natural log-probability of each token under the model's own distribution.
    pub token_logprobs: Vec<f32>,
    /// For each token, the most probable ones at its place.
    pub top_logprobs: Vec<Vec<(u32, f32)>>,
    /// The end token that was drawn behind them, if one ended the answer.
    pub end_token: Option<(u32, TokenLogprob)>,
    /// Mean over the tokens of the divergence from the uniform distribution, in nats.
    pub self_certainty: f64,
    /// From the ranker.
    pub score: Option<f32>,
    /// The state of its last token after each layer of `feature_layers`; the prompt's last token
    /// stands in for an empty answer's.
    pub features: Vec<Vec<f32>>,
}

impl Candidate {
    pub fn cumulative_logprob(&self) -> f64 {
        self.token_logprobs
            .iter()
            .map(|&logprob| f64::from(logprob))
            .sum()
    }

    /// 0 for an empty answer.
    pub fn mean_logprob(&self) -> f64 {
        self.cumulative_logprob() / self.token_ids.len().max(1) as f64
    }
}

/// What came of a request.
#[derive(Clone, Debug)]
pub struct Generated {
    pub candidates: Vec<Candidate>,
    /// Index of the chosen one.
    pub selected: usize,
    /// The state of the prompt's last token after each layer of `feature_layers`.
    pub prompt_features: Vec<Vec<f32>>,
    /// For each token of the prompt but the first, what was asked for in `prompt_logprobs`.
    pub prompt_logprobs: Vec<TokenLogprob>,
    /// Tokens of the prompt that were in the cache already.
    pub cached_tokens: usize,
    pub timings: Timings,
}

/// How probable a given token was.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenLogprob {
    /// Natural logarithm.
    pub logprob: f32,
    /// The most probable tokens at its place, best first.
    pub top: Vec<(u32, f32)>,
}

/// Wall times in seconds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Timings {
    pub prefill_s: f64,
    /// From the first sampled token to the last candidate's end.
    pub decode_s: f64,
    /// The pass through the lower layers for candidates that did not end with an end token.
    pub features_s: f64,
    pub rank_s: f64,
    /// Tokens of all candidates over `decode_s`.
    pub decode_tokens_per_s: f64,
}

/// What happens on the way.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// So many tokens of the prompt are done.
    Prefill { done: usize, total: usize },
    /// A candidate grew by a token, which a stop string may still take back. The end token is none.
    Token {
        candidate: usize,
        token: u32,
        logprob: f32,
        /// The most probable tokens at its place, as many as were asked for.
        top: &'a [(u32, f32)],
    },
    /// A candidate's text grew by a piece that will not be taken back.
    Text { candidate: usize, piece: &'a str },
    /// A candidate has ended.
    Finished {
        candidate: usize,
        reason: FinishReason,
    },
    /// A decode step is over: tokens of all candidates so far, candidates still running.
    Step { tokens: usize, running: usize },
}

/// What came of a request that was [submitted](super::Engine::submit).
#[derive(Debug)]
pub struct Completed {
    pub group: GroupId,
    pub result: Result<Completion, EngineError>,
}

/// A request's result, by its kind.
#[derive(Debug)]
pub enum Completion {
    Generated(Box<Generated>),
    Scored(Box<Scored>),
}

/// Told of every event of every group. `Break` ends that group, as for an [`Observer`].
pub type GroupObserver<'a> = dyn FnMut(GroupId, Event) -> ControlFlow<()> + 'a;

/// Told of every event; `Break` ends the request with the texts so far, or, before the first
/// token, with [`EngineError::Interrupted`](super::EngineError::Interrupted).
pub type Observer<'a> = dyn FnMut(Event) -> ControlFlow<()> + 'a;

/// Given candidates for a prompt.
#[derive(Clone, Debug, Default)]
pub struct ScoreRequest {
    pub prompt_token_ids: Vec<u32>,
    pub candidate_token_ids: Vec<Vec<u32>>,
    /// Layers whose features are wanted. Layers above the highest are not run unless log-probabilities
    /// are asked for.
    pub layers: Vec<usize>,
    /// Log-probability of every candidate token.
    pub logprobs: bool,
}

/// What the model computed of given candidates.
#[derive(Clone, Debug)]
pub struct Scored {
    /// The state of the prompt's last token after each of the layers asked for.
    pub prompt_features: Vec<Vec<f32>>,
    /// For each candidate and layer, the state of its last token (the prompt's, if it is empty).
    pub candidate_features: Vec<Vec<Vec<f32>>>,
    /// For each candidate, the natural log-probability of each of its tokens; empty unless asked for.
    pub token_logprobs: Vec<Vec<f32>>,
}
