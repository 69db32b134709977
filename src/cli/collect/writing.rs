//! What the model writes of items, and the line that comes of it.

use serde_json::{Map, Value, json};

use super::{Candidate, CollectOptions};
use crate::cli::batch::{as_chat, item_seed};
use crate::cli::error::CliError;
use crate::cli::in_order::InOrder;
use crate::cli::session::Session;
use crate::engine::select::Strategy;
use crate::engine::stop::FinishReason;
use crate::engine::{Completion, GenerateRequest, Generated, ScoreRequest, Scored};
use crate::tasks::candidates::{Candidates, Item};

/// An item that is being written: its line so far, and how it is to be read.
pub struct Begun {
    line: Map<String, Value>,
    /// Whether the log-probabilities of given candidates were asked for: the item has none.
    logprobs: bool,
}

/// Puts the next item into the engine's queue: its candidates are to be written, or those that it came
/// with scored, and with `--greedy` one more answer is.
pub fn begin(
    writing: &mut InOrder<Begun>,
    session: &mut Session,
    options: &CollectOptions,
    item: &Item,
    layers: &[usize],
) -> Result<(), CliError> {
    let mut line = Map::new();
    line.insert("id".to_string(), item.id.clone());
    line.extend(item.fields.clone());
    line.insert("id".to_string(), item.id.clone());
    let mut groups = Vec::new();
    if item.candidates.is_some() {
        let request = ScoreRequest {
            layers: layers.to_vec(),
            logprobs: item.mean_logprob.is_none(),
            ..session.score_request(item)?
        };
        if item.length.is_none() {
            let lengths = request.candidate_token_ids.iter().map(Vec::len);
            line.insert("length".to_string(), lengths.collect());
        }
        let texts = given_texts(session, item, &line, &request)?;
        line.insert("candidates".to_string(), json!(texts));
        groups.push(session.engine.submit_score(request)?);
    } else {
        let prompt = match options.chat {
            true => as_chat(&item.prompt, options.system.as_deref(), &mut line),
            false => item.prompt.clone(),
        };
        let seed = item_seed(options.seed, writing.next() as u64);
        line.insert("seed".to_string(), json!(seed));
        let prompt = session.prompt_tokens(&prompt)?;
        let request = options.request(session, item, prompt, seed);
        let sampled = GenerateRequest {
            feature_layers: layers.to_vec(),
            ..request.clone()
        };
        groups.push(session.engine.submit(sampled)?);
        if options.greedy {
            let greedy = GenerateRequest {
                strategy: Strategy::Greedy,
                ..request
            };
            groups.push(session.engine.submit(greedy)?);
        }
    }
    let logprobs = item.candidates.is_some() && item.mean_logprob.is_none();
    writing.begin(Begun { line, logprobs }, &groups);
    Ok(())
}

/// Everything of an item but its verdicts, and the texts to be judged, from what came of its groups.
pub fn written(begun: Begun, completions: Vec<Completion>) -> Option<(Candidate, Vec<String>)> {
    let mut completions = completions.into_iter();
    match (completions.next()?, completions.next()) {
        (Completion::Generated(generated), greedy) => {
            let greedy = match greedy {
                Some(Completion::Generated(greedy)) => Some(*greedy),
                _ => None,
            };
            Some(generated_item(begun.line, *generated, greedy))
        }
        (Completion::Scored(scored), _) => Some(scored_item(begun.line, *scored, begun.logprobs)),
    }
}

fn generated_item(
    mut line: Map<String, Value>,
    generated: Generated,
    greedy: Option<Generated>,
) -> (Candidate, Vec<String>) {
    let candidates = generated.candidates;
    let mut texts: Vec<String> = candidates.iter().map(|c| c.text.clone()).collect();
    let token_ids: Vec<&Vec<u32>> = candidates.iter().map(|c| &c.token_ids).collect();
    let lengths: Vec<usize> = candidates.iter().map(|c| c.token_ids.len()).collect();
    let mean_logprob: Vec<f64> = candidates.iter().map(|c| c.mean_logprob()).collect();
    let self_certainty: Vec<f64> = candidates.iter().map(|c| c.self_certainty).collect();
    let reasons: Vec<Option<FinishReason>> = candidates.iter().map(|c| c.finish_reason).collect();
    let seed = line.shift_remove("seed");
    for (name, value) in [
        ("candidates", json!(texts)),
        ("candidate_token_ids", json!(token_ids)),
        ("labels", Value::Null),
        ("answers", Value::Null),
        ("mean_logprob", json!(mean_logprob)),
        ("length", json!(lengths)),
        ("self_certainty", json!(self_certainty)),
        ("finish_reasons", json!(reasons)),
        ("seed", json!(seed)),
    ] {
        line.insert(name.to_string(), value);
    }
    let greedy = greedy.map(|greedy| {
        let answer = &greedy.candidates[0];
        texts.push(answer.text.clone());
        let mut fields = Map::new();
        fields.insert("text".to_string(), json!(answer.text));
        fields.insert("mean_logprob".to_string(), json!(answer.mean_logprob()));
        fields
    });
    let candidate = Candidate {
        line,
        prompt_features: generated.prompt_features,
        features: candidates.into_iter().map(|c| c.features).collect(),
        greedy,
    };
    (candidate, texts)
}

/// The texts of candidates that came with the item.
fn given_texts(
    session: &Session,
    item: &Item,
    line: &Map<String, Value>,
    request: &ScoreRequest,
) -> Result<Vec<String>, CliError> {
    if let Some(Candidates::Texts(texts)) = &item.candidates {
        return Ok(texts.clone());
    }
    // The texts of token ids, where the line has them beside.
    if let Some(texts) = line.get("candidates").and_then(Value::as_array) {
        let texts = texts.iter().filter_map(Value::as_str);
        return Ok(texts.map(str::to_string).collect());
    }
    let tokenizer = session.tokenizer()?;
    let token_ids = &request.candidate_token_ids;
    Ok(token_ids
        .iter()
        .map(|ids| tokenizer.decode(ids, true))
        .collect())
}

fn scored_item(
    mut line: Map<String, Value>,
    scored: Scored,
    logprobs: bool,
) -> (Candidate, Vec<String>) {
    if logprobs {
        let means = scored.token_logprobs.iter().map(|logprobs| {
            let sum: f64 = logprobs.iter().map(|&logprob| f64::from(logprob)).sum();
            sum / logprobs.len().max(1) as f64
        });
        line.insert("mean_logprob".to_string(), means.collect());
    }
    let texts = line.get("candidates").and_then(Value::as_array);
    let texts = texts.into_iter().flatten().filter_map(Value::as_str);
    let texts = texts.map(str::to_string).collect();
    let candidate = Candidate {
        line,
        prompt_features: scored.prompt_features,
        features: scored.candidate_features,
        greedy: None,
    };
    (candidate, texts)
}
