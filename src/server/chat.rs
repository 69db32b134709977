//! `POST /v1/chat/completions`

use axum::extract::State;
use axum::response::Response;
use serde_json::{Map, Value};

use super::ask::{Ask, Form};
use super::error::ApiError;
use super::fields::{Fields, bad};
use super::respond::{PromptInput, respond};
use super::state::{Server, Shared};
use crate::model::text::{ChatMessage, ChatRequest};

/// Answers a chat.
pub async fn chat(State(state): State<Shared>, fields: Fields) -> Result<Response, ApiError> {
    let ask = Ask::read(&state, &fields, Form::Chat)?;
    check_tool_choice(&fields)?;
    let prompt = chat_prompt(&state, &fields)?;
    respond(state, ask, vec![prompt], "messages").await
}

/// Calls cannot be enforced.
fn check_tool_choice(fields: &Fields) -> Result<(), ApiError> {
    if let Some(choice) = fields.get("tool_choice")
        && !matches!(choice.as_str(), Some("none" | "auto"))
    {
        return Err(bad("tool_choice", "\"none\" or \"auto\"", choice));
    }
    Ok(())
}

/// The prompt that the model's template makes of a request's messages.
pub fn chat_prompt(state: &Server, fields: &Fields) -> Result<PromptInput, ApiError> {
    let messages = messages(fields)?;
    let continues = fields.bool("continue_final_message")?.unwrap_or(false);
    let list = |name: &str| -> Result<Option<Vec<Value>>, ApiError> {
        fields.typed(name, "a list of objects", |value| {
            let items = value.as_array()?;
            items.iter().all(Value::is_object).then(|| items.clone())
        })
    };
    let tools = match fields.get("tool_choice").and_then(Value::as_str) {
        Some("none") => None,
        _ => list("tools")?.filter(|tools| !tools.is_empty()),
    };
    let documents = list("documents")?;
    let variables: Option<Map<String, Value>> =
        fields.typed("chat_template_kwargs", "an object", |value| {
            value.as_object().cloned()
        })?;
    let template = state
        .template
        .as_ref()
        .map_err(|error| ApiError::from_text(error, "messages"))?;
    let rendered = template.render(&ChatRequest {
        tools: tools.as_deref(),
        documents: documents.as_deref(),
        variables: variables.as_ref(),
        add_generation_prompt: fields.bool("add_generation_prompt")?.unwrap_or(!continues),
        ..ChatRequest::new(&messages)
    });
    let mut text = rendered.map_err(|error| ApiError::from_text(&error, "messages"))?;
    if continues {
        cut_behind_last(&mut text, &messages)?;
    }
    let token_ids = state
        .tokenizer
        .encode(&text, false)
        .map_err(|error| ApiError::from_text(&error, "messages"))?;
    Ok(PromptInput { text, token_ids })
}

/// Takes away what the template puts behind the last message, so that the answer goes on with it.
fn cut_behind_last(prompt: &mut String, messages: &[ChatMessage]) -> Result<(), ApiError> {
    let last = messages.last().and_then(|message| message.0.get("content"));
    let last = last.and_then(Value::as_str).unwrap_or_default();
    // Templates may trim what a message has around it.
    let found = [last, last.trim()]
        .into_iter()
        .filter(|content| !content.is_empty())
        .find_map(|content| Some(prompt.rfind(content)? + content.len()));
    let Some(end) = found else {
        let message = "`continue_final_message`: the last message's text is not in the prompt";
        return Err(ApiError::field("continue_final_message", message));
    };
    prompt.truncate(end);
    Ok(())
}

fn messages(fields: &Fields) -> Result<Vec<ChatMessage>, ApiError> {
    let missing = || {
        ApiError::field(
            "messages",
            "`messages` must be a list of at least one message",
        )
    };
    let value = fields.get("messages").ok_or_else(missing)?;
    let items = value
        .as_array()
        .filter(|items| !items.is_empty())
        .ok_or_else(missing)?;
    let messages = items
        .iter()
        .enumerate()
        .map(|(index, item)| message(index, item));
    messages.collect()
}

/// A message; content in parts becomes one text.
fn message(index: usize, item: &Value) -> Result<ChatMessage, ApiError> {
    let at = |part: &str| format!("messages[{index}]{part}");
    let Value::Object(fields) = item else {
        return Err(bad(&at(""), "an object with `role` and `content`", item));
    };
    let mut fields = fields.clone();
    match fields.get("role") {
        Some(Value::String(role)) if !role.is_empty() => {}
        other => {
            let found = other.unwrap_or(&Value::Null);
            return Err(bad(&at(".role"), "a string such as \"user\"", found));
        }
    }
    let content = match fields.get("content") {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => {
            let mut text = String::new();
            for (place, part) in parts.iter().enumerate() {
                let of_part = (part["type"] == "text")
                    .then(|| part["text"].as_str())
                    .flatten();
                let expected = "{\"type\": \"text\", \"text\": …}: this model reads text alone";
                text += of_part
                    .ok_or_else(|| bad(&at(&format!(".content[{place}]")), expected, part))?;
            }
            text
        }
        // An assistant's turn may be calls alone.
        None | Some(Value::Null) if fields.contains_key("tool_calls") => {
            return Ok(ChatMessage(fields));
        }
        other => {
            let found = other.unwrap_or(&Value::Null);
            return Err(bad(&at(".content"), "a string or a list of parts", found));
        }
    };
    fields.insert("content".to_string(), Value::String(content));
    Ok(ChatMessage(fields))
}
