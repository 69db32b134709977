//! `POST /v1/completions`

use axum::extract::State;
use axum::response::Response;
use serde_json::Value;

use super::ask::{Ask, Form, token_id};
use super::error::ApiError;
use super::fields::{Fields, bad};
use super::respond::{PromptInput, respond};
use super::state::{Server, Shared};

/// Goes on with a text, or with each of several.
pub async fn completions(
    State(state): State<Shared>,
    fields: Fields,
) -> Result<Response, ApiError> {
    let ask = Ask::read(&state, &fields, Form::Completion)?;
    let prompts = prompts(&state, &fields)?;
    respond(state, ask, prompts, "prompt").await
}

const EXPECTED: &str = "a text, a list of texts, a list of token ids, or a list of such lists";

fn prompts(state: &Server, fields: &Fields) -> Result<Vec<PromptInput>, ApiError> {
    let Some(value) = fields.get("prompt") else {
        return Err(ApiError::field(
            "prompt",
            format!("`prompt` must be {EXPECTED}"),
        ));
    };
    let refused = || bad("prompt", EXPECTED, value);
    let most = state.config.max_queue;
    match value {
        Value::String(text) => Ok(vec![of_text(state, text)?]),
        Value::Array(items) if items.is_empty() => Err(refused()),
        Value::Array(items) if items[0].is_number() => {
            Ok(vec![of_tokens(state, items).ok_or_else(refused)?])
        }
        Value::Array(items) if items.len() > most => Err(ApiError::field(
            "prompt",
            format!(
                "`prompt` has {} texts; at most {most} are answered together",
                items.len()
            ),
        )),
        Value::Array(items) => items
            .iter()
            .map(|item| match item {
                Value::String(text) => of_text(state, text),
                Value::Array(tokens) => of_tokens(state, tokens).ok_or_else(refused),
                _ => Err(refused()),
            })
            .collect(),
        _ => Err(refused()),
    }
}

/// A text with the tokens that the model expects around it.
pub fn of_text(state: &Server, text: &str) -> Result<PromptInput, ApiError> {
    if text.is_empty() {
        return Err(ApiError::field("prompt", "`prompt` must not be empty"));
    }
    let token_ids = state
        .tokenizer
        .encode(text, true)
        .map_err(|error| ApiError::from_text(&error, "prompt"))?;
    Ok(PromptInput {
        text: text.to_string(),
        token_ids,
    })
}

fn of_tokens(state: &Server, items: &[Value]) -> Option<PromptInput> {
    let token_ids: Vec<u32> = items.iter().map(token_id).collect::<Option<_>>()?;
    Some(PromptInput {
        text: state.tokenizer.decode(&token_ids, false),
        token_ids,
    })
}
