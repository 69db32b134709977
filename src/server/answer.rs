//! What a client gets: choices, log-probabilities, usage, and what the choice was made from.

use serde_json::{Map, Value, json};

use super::ask::{Ask, Form};
use crate::engine::select::{CandidateFacts, Strategy, select};
use crate::engine::{Candidate, Generated, TokenLogprob};
use crate::model::text::Tokenizer;

/// JSON has no -∞.
const LEAST_LOGPROB: f32 = -9999.0;

/// A token with its log-probability and its alternatives.
#[derive(Clone, Debug)]
pub struct ScoredToken {
    pub token: u32,
    /// `None`: the first of a prompt.
    pub logprob: Option<f32>,
    pub top: Vec<(u32, f32)>,
}

/// The tokens of an answer. Completions have the end token among them, as in vLLM: evaluations that ask
/// for one token behind a prompt count on it.
pub fn scored_tokens(form: Form, candidate: &Candidate) -> Vec<ScoredToken> {
    let end = candidate.end_token.iter().map(|(token, end)| ScoredToken {
        token: *token,
        logprob: Some(end.logprob),
        top: end.top.clone(),
    });
    let end = end.filter(|_| form == Form::Completion);
    let tokens = candidate.token_ids.iter().enumerate();
    tokens
        .map(|(place, &token)| ScoredToken {
            token,
            logprob: candidate.token_logprobs.get(place).copied(),
            top: candidate
                .top_logprobs
                .get(place)
                .cloned()
                .unwrap_or_default(),
        })
        .chain(end)
        .collect()
}

pub fn scored_prompt(prompt: &[u32], logprobs: &[TokenLogprob]) -> Vec<ScoredToken> {
    let known = logprobs
        .iter()
        .map(|known| (Some(known.logprob), known.top.clone()));
    let all = std::iter::once((None, Vec::new())).chain(known);
    prompt
        .iter()
        .zip(all)
        .map(|(&token, (logprob, top))| ScoredToken {
            token,
            logprob,
            top,
        })
        .collect()
}

fn facts(candidate: &Candidate) -> CandidateFacts<'_> {
    CandidateFacts {
        text: &candidate.text,
        cumulative_logprob: candidate.cumulative_logprob(),
        tokens: candidate.token_ids.len(),
        self_certainty: candidate.self_certainty,
        score: candidate.score,
    }
}

/// The `n` best candidates: the chosen one, then the one that would be chosen of the others, and so on.
pub fn order(generated: &Generated, strategy: Strategy, n: usize) -> Vec<usize> {
    let mut order = vec![generated.selected];
    let mut left: Vec<usize> = (0..generated.candidates.len())
        .filter(|&index| index != generated.selected)
        .collect();
    while order.len() < n && !left.is_empty() {
        let facts: Vec<CandidateFacts> = left
            .iter()
            .map(|&index| facts(&generated.candidates[index]))
            .collect();
        // What could be chosen from once can be chosen from again.
        let place = select(strategy, &facts).unwrap_or(0);
        order.push(left.remove(place));
    }
    order
}

/// What each strategy would choose of these candidates.
fn choices_by(generated: &Generated) -> Value {
    let facts: Vec<CandidateFacts> = generated.candidates.iter().map(facts).collect();
    let mut chosen = Map::new();
    for strategy in [
        Strategy::First,
        Strategy::Majority,
        Strategy::Logprob,
        Strategy::SelfCertainty,
        Strategy::Ranker,
    ] {
        if let Ok(index) = select(strategy, &facts) {
            chosen.insert(strategy.to_string(), json!(index));
        }
    }
    Value::Object(chosen)
}

/// What one prompt's choice was made from.
pub fn result(ask: &Ask, prompt_index: usize, generated: &Generated) -> Value {
    let candidates = &generated.candidates;
    let mut result = Map::new();
    result.insert("prompt_index".to_string(), json!(prompt_index));
    result.insert("selected".to_string(), json!(generated.selected));
    if (ask.return_scores || ask.return_all) && ask.ranker.is_some() {
        let scores: Vec<Option<f32>> = candidates.iter().map(|c| c.score).collect();
        result.insert("scores".to_string(), json!(scores));
    }
    if ask.return_all {
        let described = candidates.iter().map(|candidate| {
            json!({
                "index": candidate.index,
                "text": candidate.text,
                "token_ids": candidate.token_ids,
                "finish_reason": candidate.finish_reason,
                "mean_logprob": candidate.mean_logprob(),
                "cumulative_logprob": candidate.cumulative_logprob(),
                "self_certainty": candidate.self_certainty,
                "score": candidate.score,
            })
        });
        result.insert("candidates".to_string(), described.collect());
        result.insert("choices_by".to_string(), choices_by(generated));
    }
    let timings = &generated.timings;
    result.insert(
        "timings".to_string(),
        json!({
            "prefill_s": timings.prefill_s,
            "decode_s": timings.decode_s,
            "features_s": timings.features_s,
            "rank_s": timings.rank_s,
        }),
    );
    Value::Object(result)
}

/// The extra object of an answer.
pub fn podium(ask: &Ask, results: Vec<Value>) -> Value {
    json!({
        "seed": ask.request.seed,
        "best_of": ask.request.n,
        "strategy": ask.request.strategy,
        "ranker": ask.ranker,
        "results": results,
    })
}

/// Tokens of prompts and answers.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    pub prompt: usize,
    /// Of the prompt, those that were in the cache.
    pub cached: usize,
    /// Of all candidates: they are what was computed.
    pub completion: usize,
}

impl Usage {
    pub fn of(prompt: &[u32], generated: &Generated) -> Usage {
        Usage {
            prompt: prompt.len(),
            cached: generated.cached_tokens,
            completion: generated.candidates.iter().map(|c| c.token_ids.len()).sum(),
        }
    }

    pub fn add(self, other: Usage) -> Usage {
        Usage {
            prompt: self.prompt + other.prompt,
            cached: self.cached + other.cached,
            completion: self.completion + other.completion,
        }
    }

    pub fn json(self) -> Value {
        json!({
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        })
    }
}

/// A token's text, and its bytes, which need not be UTF-8 by themselves.
pub fn token_text(tokenizer: &Tokenizer, token: u32) -> String {
    String::from_utf8_lossy(tokenizer.token_bytes(token)).into_owned()
}

/// Log-probabilities in the shape of the route. `offset`: characters before the first token; grows.
pub fn logprobs_json(
    form: Form,
    tokenizer: &Tokenizer,
    tokens: &[ScoredToken],
    alternatives: usize,
    offset: &mut usize,
) -> Value {
    let number = |logprob: f32| logprob.max(LEAST_LOGPROB);
    match form {
        Form::Chat => {
            let entry = |token: u32, logprob: f32| {
                json!({
                    "token": token_text(tokenizer, token),
                    "logprob": number(logprob),
                    "bytes": tokenizer.token_bytes(token),
                })
            };
            let content = tokens.iter().map(|scored| {
                let mut described = entry(scored.token, scored.logprob.unwrap_or(0.0));
                let top = scored.top.iter().take(alternatives);
                described["top_logprobs"] =
                    top.map(|&(token, logprob)| entry(token, logprob)).collect();
                described
            });
            json!({"content": content.collect::<Vec<_>>(), "refusal": null})
        }
        Form::Completion => {
            let mut texts = Vec::with_capacity(tokens.len());
            let mut offsets = Vec::with_capacity(tokens.len());
            let mut top = Vec::with_capacity(tokens.len());
            for scored in tokens {
                let text = token_text(tokenizer, scored.token);
                offsets.push(*offset);
                *offset += text.chars().count();
                texts.push(text);
                top.push(match scored.logprob {
                    None => Value::Null,
                    Some(logprob) => {
                        let mut by_text = Map::new();
                        let most = scored.top.iter().take(alternatives);
                        for &(token, logprob) in most.chain([&(scored.token, logprob)]) {
                            // Of tokens with the same text, the more probable one.
                            let text = token_text(tokenizer, token);
                            by_text.entry(text).or_insert(json!(number(logprob)));
                        }
                        Value::Object(by_text)
                    }
                });
            }
            let logprobs: Vec<Option<f32>> = tokens.iter().map(|t| t.logprob.map(number)).collect();
            json!({
                "tokens": texts,
                "token_logprobs": logprobs,
                "top_logprobs": (alternatives > 0).then_some(top),
                "text_offset": offsets,
            })
        }
    }
}
