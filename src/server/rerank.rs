//! Candidates that came from elsewhere, scored: `POST /v1/rerank` and `POST /score`.

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

use super::answer::Usage;
use super::ask::{base_name, random_id};
use super::chat::chat_prompt;
use super::completions::of_text;
use super::error::ApiError;
use super::fields::{Fields, bad};
use super::respond::{PromptInput, score};
use super::state::Shared;
use crate::engine::ScoreRequest;
use crate::ranker::{ExtraInput, ExtraInputs, Ranker};

/// `POST /v1/rerank` (Jina's and Cohere's form): `query` is the prompt, `documents` are candidates.
pub async fn rerank(State(state): State<Shared>, fields: Fields) -> Result<Json<Value>, ApiError> {
    let documents = texts(&fields, "documents")?;
    let prompt = match fields.get("messages") {
        Some(_) => chat_prompt(&state, &fields)?,
        None => text_prompt(&state, &fields, "query")?,
    };
    let top_n = fields.integer("top_n", 1..=u64::MAX)?.unwrap_or(usize::MAX);
    let with_texts = fields.bool("return_documents")?.unwrap_or(true);
    let (ranker, scores, usage) = scores(&state, &fields, &prompt, &documents).await?;
    let mut order: Vec<usize> = (0..documents.len()).collect();
    // Stable: of equals, the first goes first. Scores are finite.
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    let results = order.into_iter().take(top_n).map(|index| {
        let mut result = json!({"index": index, "relevance_score": scores[index]});
        if with_texts {
            result["document"] = json!({"text": documents[index]});
        }
        result
    });
    Ok(Json(json!({
        "id": random_id("rerank"),
        "model": state.config.model_name(),
        "ranker": ranker,
        "results": results.collect::<Vec<_>>(),
        "usage": usage.json(),
    })))
}

/// `POST /score` (vLLM's form): `text_1` is the prompt, `text_2` one candidate or a list.
pub async fn score_route(
    State(state): State<Shared>,
    fields: Fields,
) -> Result<Json<Value>, ApiError> {
    let candidates = texts(&fields, "text_2")?;
    let prompt = text_prompt(&state, &fields, "text_1")?;
    let (ranker, scores, usage) = scores(&state, &fields, &prompt, &candidates).await?;
    let data = scores.iter().enumerate();
    let data =
        data.map(|(index, score)| json!({"index": index, "object": "score", "score": score}));
    Ok(Json(json!({
        "id": random_id("score"),
        "object": "list",
        "model": state.config.model_name(),
        "ranker": ranker,
        "data": data.collect::<Vec<_>>(),
        "usage": usage.json(),
    })))
}

fn text_prompt(state: &Shared, fields: &Fields, name: &str) -> Result<PromptInput, ApiError> {
    let missing = || ApiError::field(name, format!("`{name}` must be a text: the prompt"));
    let text = fields.string(name)?.ok_or_else(missing)?;
    of_text(state, text).map_err(|error| ApiError {
        param: Some(name.to_string()),
        message: error.message.replace("`prompt`", &format!("`{name}`")),
        ..error
    })
}

/// One text or several, as strings or as objects with `text`.
fn texts(fields: &Fields, name: &str) -> Result<Vec<String>, ApiError> {
    let expected = "a text or a list of texts";
    let missing = || ApiError::field(name, format!("`{name}` must be {expected}"));
    let value = fields.get(name).ok_or_else(missing)?;
    let text = |item: &Value| item.as_str().or(item["text"].as_str()).map(str::to_string);
    let texts = match value {
        Value::Array(items) => items.iter().map(text).collect(),
        one => text(one).map(|text| vec![text]),
    };
    texts
        .filter(|texts: &Vec<String>| !texts.is_empty())
        .ok_or_else(|| bad(name, expected, value))
}

async fn scores(
    state: &Shared,
    fields: &Fields,
    prompt: &PromptInput,
    candidates: &[String],
) -> Result<(String, Vec<f32>, Usage), ApiError> {
    let most = state.config.max_candidates;
    if candidates.len() > most {
        let message = format!(
            "{} candidates are too many: at most {most}",
            candidates.len()
        );
        return Err(ApiError::field("documents", message));
    }
    let (name, ranker) = ranker(state, fields)?;
    let candidate_token_ids: Vec<Vec<u32>> = candidates
        .iter()
        .map(|text| state.tokenizer.encode(text, false))
        .collect::<Result<_, _>>()
        .map_err(|error| ApiError::from_text(&error, "documents"))?;
    let lengths: Vec<usize> = candidate_token_ids.iter().map(Vec::len).collect();
    let config = ranker.config();
    let request = ScoreRequest {
        prompt_token_ids: prompt.token_ids.clone(),
        candidate_token_ids,
        layers: vec![config.layer],
        logprobs: config.extra_inputs.contains(&ExtraInput::MeanLogprob),
    };
    let scored = score(state, request, "query").await?;
    let extra = lengths.iter().enumerate().map(|(k, &length)| {
        let logprobs = scored.token_logprobs[k].iter();
        let sum: f64 = logprobs.map(|&logprob| f64::from(logprob)).sum();
        ExtraInputs {
            mean_logprob: (sum / length.max(1) as f64) as f32,
            length: length as f32,
        }
    });
    let extra: Vec<ExtraInputs> = extra.collect();
    let features: Vec<f32> = scored
        .candidate_features
        .iter()
        .flat_map(|of_layers| of_layers[0].iter().copied())
        .collect();
    let scores = ranker
        .score(&scored.prompt_features[0], &features, &extra)
        .map_err(|error| ApiError::field("ranker", error.to_string()))?;
    let usage = Usage {
        prompt: prompt.token_ids.len() + lengths.iter().sum::<usize>(),
        ..Usage::default()
    };
    Ok((name, scores, usage))
}

/// The ranker that is named in `ranker`, or as the model, or the server's default, or its only one.
fn ranker(state: &Shared, fields: &Fields) -> Result<(String, std::sync::Arc<Ranker>), ApiError> {
    let config = &state.config;
    let as_model = fields.string("model")?.and_then(|model| {
        let mut served = config.served_model_names.iter();
        let after = served.find_map(|served| model.strip_prefix(base_name(served)))?;
        after.rsplit_once(':').map(|(_, ranker)| ranker)
    });
    let only = || match &state.rankers.names()[..] {
        [only] => Some(only.clone()),
        _ => None,
    };
    let as_model = as_model.filter(|name| !name.starts_with("best-of-"));
    let name = fields
        .string("ranker")?
        .or(as_model)
        .map(str::to_string)
        .or_else(|| config.default_ranker.clone())
        .or_else(only)
        .ok_or_else(|| ApiError::field("ranker", "name a ranker: the server has no default"))?;
    let ranker = state.rankers.find(&name)?;
    Ok((name, ranker))
}
