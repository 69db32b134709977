//! What a server says of itself and of text: models, tokens, health, load, figures.

use std::collections::HashSet;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::ask::{base_name, check_model, token_id};
use super::chat::chat_prompt;
use super::error::ApiError;
use super::fields::Fields;
use super::state::{Phase, Server, Shared, unix_time};
use crate::model::text::ChatTemplate;

/// Candidates of the models that are listed beside the plain one.
const LISTED_BEST_OF: usize = 16;

fn model(state: &Server, id: &str) -> Value {
    json!({
        "id": id,
        "object": "model",
        "created": unix_time(state.started),
        "owned_by": "podium",
        "root": state.model.name,
        "max_model_len": state.model.context,
    })
}

/// `GET /v1/models`: the model, and what it can be called to get more of it.
pub async fn models(State(state): State<Shared>) -> Json<Value> {
    let mut ids = state.config.served_model_names.clone();
    let base = base_name(state.config.model_name());
    let best_of = LISTED_BEST_OF.min(state.config.max_candidates);
    ids.push(base.to_string());
    ids.push(format!("{base}:best-of-{best_of}"));
    let names = state.rankers.names().into_iter();
    ids.extend(names.map(|ranker| format!("{base}:best-of-{best_of}:{ranker}")));
    let mut seen = HashSet::new();
    ids.retain(|id| seen.insert(id.clone()));
    let data: Vec<Value> = ids.iter().map(|id| model(&state, id)).collect();
    Json(json!({"object": "list", "data": data}))
}

/// `GET /v1/models/{id}`, for every name that a request may use.
pub async fn model_by_id(
    State(state): State<Shared>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    check_model(&state, &id)?;
    Ok(Json(model(&state, &id)))
}

/// `POST /tokenize`: of a text (`prompt`) or a chat (`messages`).
pub async fn tokenize(
    State(state): State<Shared>,
    fields: Fields,
) -> Result<Json<Value>, ApiError> {
    let tokens = match fields.get("messages") {
        Some(_) => chat_prompt(&state, &fields)?.token_ids,
        None => {
            let missing = || ApiError::field("prompt", "give `prompt` (a text) or `messages`");
            let text = fields.string("prompt")?.ok_or_else(missing)?;
            let special = fields.bool("add_special_tokens")?.unwrap_or(true);
            let encoded = state.tokenizer.encode(text, special);
            encoded.map_err(|error| ApiError::from_text(&error, "prompt"))?
        }
    };
    let texts = match fields.bool("return_token_strs")?.unwrap_or(false) {
        false => Value::Null,
        true => tokens
            .iter()
            .map(|&id| state.tokenizer.token_text(id))
            .collect(),
    };
    Ok(Json(json!({
        "count": tokens.len(),
        "max_model_len": state.model.context,
        "tokens": tokens,
        "token_strs": texts,
    })))
}

/// `POST /detokenize`
pub async fn detokenize(
    State(state): State<Shared>,
    fields: Fields,
) -> Result<Json<Value>, ApiError> {
    let tokens = fields.typed("tokens", "a list of token ids", |value| {
        let ids = value.as_array()?.iter().map(token_id);
        ids.collect::<Option<Vec<u32>>>()
    })?;
    let missing = || ApiError::field("tokens", "`tokens` must be a list of token ids");
    let tokens = tokens.ok_or_else(missing)?;
    let last = state.model.vocab_size - 1;
    if let Some(token) = tokens.iter().find(|&&token| token as usize > last) {
        let message = format!("`tokens` has {token}, and the vocabulary ends at {last}");
        return Err(ApiError::field("tokens", message));
    }
    let skip_special = fields.bool("skip_special_tokens")?.unwrap_or(false);
    Ok(Json(
        json!({"prompt": state.tokenizer.decode(&tokens, skip_special)}),
    ))
}

/// `GET /tokenizer_info`: the special tokens by their names (`eos_token`), and the chat template,
/// which clients that tokenize here render by themselves.
pub async fn tokenizer_info(State(state): State<Shared>) -> Json<Value> {
    let tokenizer = &state.tokenizer;
    let special = tokenizer.special_token_texts();
    let mut info = json!({
        "vocab_size": tokenizer.vocab_size(),
        "bos_token_id": tokenizer.bos_token_id(),
        "eos_token_ids": tokenizer.eos_token_ids(),
        "chat_template": state.template.as_ref().ok().map(ChatTemplate::source),
        "max_model_len": state.model.context,
    });
    for (name, text) in special {
        info[name] = json!(text);
    }
    Json(info)
}

/// `GET /health`: 200 where requests are taken.
pub async fn health(State(state): State<Shared>) -> Response {
    let problem = match (state.phase(), state.engine.is_alive()) {
        (Phase::Serving, true) => return Json(json!({"status": "ok"})).into_response(),
        (_, true) => "shutting down",
        (_, false) => "the engine has stopped",
    };
    let body = Json(json!({"status": problem}));
    (StatusCode::SERVICE_UNAVAILABLE, body).into_response()
}

/// `GET /version`
pub async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION")}))
}

/// `GET /load`
pub async fn load(State(state): State<Shared>) -> Json<Value> {
    let load = state.engine.load();
    let in_flight = state.in_flight.load(std::sync::atomic::Ordering::Acquire);
    Json(json!({
        "server_load": in_flight,
        "running": load.running,
        "waiting": load.waiting,
        "candidates": load.candidates,
        "kv_pages": load.pages,
        "kv_pages_used": load.used_pages,
        "kv_pages_cached": load.cached_pages,
    }))
}

/// `GET /metrics`
pub async fn metrics(State(state): State<Shared>) -> Result<Response, ApiError> {
    let text = state
        .metrics
        .render(&state.engine.load())
        .map_err(|error| ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))?;
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    Ok(([(header::CONTENT_TYPE, kind)], text).into_response())
}

/// The page's own scripts and styles, and nothing from elsewhere.
const PAGE_POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; \
     connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// `GET /`: a page on which candidates write themselves side by side.
pub async fn page() -> Response {
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (header::CONTENT_SECURITY_POLICY, PAGE_POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::CACHE_CONTROL, "no-cache"),
    ];
    (headers, include_str!("page.html")).into_response()
}
