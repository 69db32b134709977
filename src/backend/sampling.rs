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
    /// Keep the k most probable tokens, and those as probable as the k-th. 0: off.
    pub top_k: usize,
    /// Keep the smallest set of most probable tokens whose probabilities add up to at least this
    /// (the lower ids among equals). 1: off.
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

impl SamplingParams {
    /// Whether every number is one that sampling has a meaning for.
    pub fn validate(&self) -> Result<(), SamplingError> {
        // Comparisons are false for NaN, so each condition refuses it.
        if !(self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite()) {
            return Err(SamplingError::RepetitionPenalty(self.repetition_penalty));
        }
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return Err(SamplingError::Temperature(self.temperature));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(SamplingError::TopP(self.top_p));
        }
        if !(self.min_p >= 0.0 && self.min_p <= 1.0) {
            return Err(SamplingError::MinP(self.min_p));
        }
        Ok(())
    }
}

/// A sampling parameter without a meaning.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SamplingError {
    #[error("--repetition-penalty {0}: give a finite number above 0 (1 turns the penalty off)")]
    RepetitionPenalty(f32),
    #[error(
        "--temperature {0}: give a finite number of at least 0 (0 takes the most probable token)"
    )]
    Temperature(f32),
    #[error("--top-p {0}: give a number above 0 and up to 1 (1 keeps every token)")]
    TopP(f32),
    #[error("--min-p {0}: give a number from 0 to 1 (0 keeps every token)")]
    MinP(f32),
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
    /// Added to logits before everything else: (token, bias). Empty: none. Tokens beyond the
    /// vocabulary have no logit and are passed over, here and in `prompt` and `answer`.
    pub logit_bias: &'a [(u32, f32)],
    /// How many of the most probable tokens to report with their log-probabilities.
    pub top_logprobs: usize,
}

/// A drawn token. Log-probabilities are natural, of the model's own distribution: before bias,
/// penalty, temperature and filters.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    pub token: u32,
    pub logprob: f32,
    /// KL divergence of the model's distribution from the uniform one over the vocabulary, in nats:
    /// -log V - mean_j log p_j. Its mean over the tokens is self-certainty (arXiv 2502.18581).
    pub self_certainty: f32,
    /// The most probable tokens, best first (the lowest id first among equals).
    pub top_logprobs: Vec<(u32, f32)>,
}

/// Logits that no token can be drawn from.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum LogitsError {
    /// `value` is NaN or +∞ (-∞ is a token of probability 0, which is fine).
    #[error(
        "row {row}: the logit of token {token} is {value}, so no token can be drawn: the model's weights or its input are damaged"
    )]
    NotFinite {
        row: usize,
        token: usize,
        value: f32,
    },
    #[error("row {row}: every one of the {vocab_size} logits is -inf, so no token can be drawn")]
    NothingPossible { row: usize, vocab_size: usize },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meaningful_parameters_pass() {
        let limits = SamplingParams {
            repetition_penalty: f32::MIN_POSITIVE,
            temperature: 0.0,
            top_k: usize::MAX,
            top_p: f32::MIN_POSITIVE,
            min_p: 1.0,
        };
        for params in [SamplingParams::default(), limits] {
            assert_eq!(params.validate(), Ok(()));
        }
    }

    #[test]
    fn meaningless_parameters_are_refused_by_name_and_value() {
        type Set = fn(&mut SamplingParams, f32);
        let cases: [(&str, Set, &[f32]); 4] = [
            (
                "--repetition-penalty",
                |params, value| params.repetition_penalty = value,
                &[f32::NAN, f32::INFINITY, 0.0, -1.5],
            ),
            (
                "--temperature",
                |params, value| params.temperature = value,
                &[f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.1],
            ),
            (
                "--top-p",
                |params, value| params.top_p = value,
                &[f32::NAN, f32::INFINITY, 0.0, -0.5, 1.01],
            ),
            (
                "--min-p",
                |params, value| params.min_p = value,
                &[f32::NAN, f32::INFINITY, -0.01, 1.01],
            ),
        ];
        for (flag, set, values) in cases {
            for &value in values {
                let mut params = SamplingParams::default();
                set(&mut params, value);
                let message = params.validate().unwrap_err().to_string();
                assert!(
                    message.starts_with(&format!("{flag} {value}: give ")),
                    "{message}"
                );
                assert!(!message.contains('\n'));
            }
        }
    }
}
