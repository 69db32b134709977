//! What sampling one token takes and gives, whichever device does it.

/// How tokens are drawn. The filters apply in the order of the fields, as in transformers:
/// repetition penalty, temperature, top-k, top-p, min-p; then one token is drawn from what is left,
/// renormalised.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// Divides the logit of every token that stands in the prompt or the answer so far, if positive,
    /// and multiplies it if negative. 1: off.
    pub repetition_penalty: f32,
    /// 0: the most probable token (the lowest id among equals).
    pub temperature: f32,
    /// Keep the k most probable tokens. 0: off.
    pub top_k: usize,
    /// Keep the smallest set of most probable tokens whose probabilities add up to at least this. 1: off.
    pub top_p: f32,
    /// Keep tokens with at least this fraction of the most probable token's probability. 0: off.
    pub min_p: f32,
}

impl Default for SamplingParams {
    fn default() -> Self {
        SamplingParams {
            repetition_penalty: 1.0,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
        }
    }
}

/// One row of logits to draw a token from.
#[derive(Clone, Debug)]
pub struct SampleRow<'a> {
    /// Row of the logits.
    pub row: usize,
    pub params: &'a SamplingParams,
    /// Key of the random number, with the position below.
    pub seed: u64,
    pub candidate: u32,
    /// Position in the sequence of the token to be drawn.
    pub position: u32,
    /// Prompt and answer so far, read only where the repetition penalty is on.
    pub prompt: &'a [u32],
    pub answer: &'a [u32],
    /// Added to logits before everything else: (token, bias). Empty: none.
    pub logit_bias: &'a [(u32, f32)],
    /// How many of the most probable tokens to report with their log-probabilities.
    pub top_logprobs: usize,
}

/// A drawn token. Log-probabilities are natural, of the model's own distribution: before penalty,
/// temperature and filters.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    pub token: u32,
    pub logprob: f32,
    /// KL divergence of the model's distribution from the uniform one over the vocabulary, in nats:
    /// -log V - mean_j log p_j. Its mean over the tokens is self-certainty (arXiv 2502.18581).
    pub self_certainty: f32,
    /// The most probable tokens, best first.
    pub top_logprobs: Vec<(u32, f32)>,
}
