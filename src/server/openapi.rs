//! `GET /openapi.json`: the routes, for tools that read such a thing.

use axum::Json;
use axum::extract::State;
use serde_json::{Map, Value, json};

use super::Answer;
use super::guard::OPEN;
use super::state::Shared;

/// Method, path, what it does, and the schema of its body.
const ROUTES: &[(&str, &str, &str, Option<&str>)] = &[
    (
        "post",
        "/v1/chat/completions",
        "Answer a chat with the best of N candidates",
        Some("Chat"),
    ),
    (
        "post",
        "/v1/completions",
        "Go on with a text, best of N",
        Some("Completion"),
    ),
    (
        "get",
        "/v1/models",
        "The model, and the names that ask for more of it",
        None,
    ),
    ("get", "/v1/models/{id}", "One of these names", None),
    (
        "get",
        "/v1/rankers",
        "The rankers that a request may name",
        None,
    ),
    (
        "post",
        "/v1/rankers",
        "Add a ranker: its file is the body; ?name= names it",
        Some("File"),
    ),
    ("delete", "/v1/rankers/{name}", "Remove a ranker", None),
    (
        "post",
        "/v1/rerank",
        "Score given candidates, best first",
        Some("Rerank"),
    ),
    ("post", "/rerank", "The same", Some("Rerank")),
    ("post", "/score", "Score given candidates", Some("Score")),
    ("post", "/v1/score", "The same", Some("Score")),
    (
        "post",
        "/tokenize",
        "Text or chat to token ids",
        Some("Tokenize"),
    ),
    (
        "post",
        "/detokenize",
        "Token ids to text",
        Some("Detokenize"),
    ),
    (
        "get",
        "/tokenizer_info",
        "The tokenizer's special tokens and sizes",
        None,
    ),
    (
        "get",
        "/health",
        "200 while requests are taken; needs no key",
        None,
    ),
    ("get", "/ping", "The same, behind the key", None),
    ("post", "/ping", "The same, behind the key", None),
    ("get", "/", "A page to try it on; needs no key", None),
    ("get", "/version", "The server's version", None),
    ("get", "/load", "What is being computed", None),
    ("get", "/metrics", "Figures for Prometheus", None),
    ("get", "/openapi.json", "This description", None),
];

/// `GET /openapi.json`
pub async fn openapi(State(state): State<Shared>) -> Answer {
    Json(document(!state.config.api_keys.is_empty()))
}

/// `keys`: whether the server asks for one.
fn document(keys: bool) -> Value {
    let mut paths = Map::new();
    for &(method, path, summary, schema) in ROUTES {
        let names = path
            .split('{')
            .skip(1)
            .filter_map(|part| part.split('}').next());
        let parameters: Vec<Value> = names
            .map(|name| {
                json!({"name": name, "in": "path", "required": true, "schema": {"type": "string"}})
            })
            .collect();
        let mut operation = json!({
            "summary": summary,
            "operationId": format!("{method}{}", path.replace(['/', '{', '}', '.'], "_")),
            "parameters": parameters,
            "responses": {
                "200": {"description": "As asked"},
                "default": {
                    "description": "Refused",
                    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
                },
            },
        });
        if OPEN.contains(&path) {
            operation["security"] = json!([]);
        }
        if let Some(schema) = schema {
            let kind = if schema == "File" {
                "application/octet-stream"
            } else {
                "application/json"
            };
            let schema = json!({"$ref": format!("#/components/schemas/{schema}")});
            operation["requestBody"] =
                json!({"required": true, "content": {kind: {"schema": schema}}});
        }
        let item = paths.entry(path).or_insert_with(|| json!({}));
        item[method] = operation;
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Podium",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Best-of-N decoding behind OpenAI's routes",
        },
        "paths": paths,
        "components": {
            "schemas": schemas(),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": if keys { json!([{"key": []}]) } else { json!([]) },
    })
}

fn schemas() -> Value {
    let object = |required: &[&str], own: Value| json!({"type": "object", "required": required, "properties": own});
    let integer = |least: i64| json!({"type": "integer", "minimum": least});
    let number =
        |least: f64, most: f64| json!({"type": "number", "minimum": least, "maximum": most});
    let (text, flag) = (json!({"type": "string"}), json!({"type": "boolean"}));
    let texts = json!({"oneOf": [text, {"type": "array", "items": text, "minItems": 1}]});
    let tokens = json!({"type": "array", "items": integer(0), "minItems": 1});
    let common = json!({
        "model": text, "n": integer(1), "best_of": integer(1), "seed": {"type": "integer"},
        "max_tokens": integer(0), "max_completion_tokens": integer(0),
        "temperature": number(0.0, 2.0), "top_p": number(0.0, 1.0), "min_p": number(0.0, 1.0),
        "top_k": integer(-1), "repetition_penalty": number(0.0, 100.0),
        "presence_penalty": number(-2.0, 2.0), "frequency_penalty": number(-2.0, 2.0),
        "logit_bias": {"type": "object", "additionalProperties": number(-100.0, 100.0)},
        "stop": texts, "stop_token_ids": tokens, "ignore_eos": flag, "min_tokens": integer(0),
        "truncate_prompt_tokens": integer(1),
        "stream": flag, "stream_options": object(&[], json!({"include_usage": flag})),
        "stream_candidates": flag, "ranker": text, "return_all": flag, "return_scores": flag,
        "select": {"enum": ["ranker", "first", "greedy", "majority", "logprob", "self-certainty"]},
    });
    let with = |required: &[&str], own: Value| {
        let mut schema = object(required, common.clone());
        if let (Some(all), Value::Object(own)) = (schema["properties"].as_object_mut(), own) {
            all.extend(own);
        }
        schema
    };
    let message = json!({
        "type": "object", "required": ["role"],
        "properties": {
            "role": {"type": "string", "minLength": 1},
            "content": {"oneOf": [text, {"type": "array"}, {"type": "null"}]},
        },
    });
    let messages = json!({"type": "array", "items": message, "minItems": 1});
    json!({
        "Chat": with(&["messages"], json!({
            "messages": messages, "logprobs": flag, "top_logprobs": integer(0),
            "tools": {"type": "array"}, "tool_choice": {"enum": ["none", "auto"]},
            "chat_template_kwargs": {"type": "object"}, "documents": {"type": "array"},
            "add_generation_prompt": flag, "continue_final_message": flag,
        })),
        "Completion": with(&["prompt"], json!({
            "prompt": {"oneOf": [texts, tokens, {"type": "array", "items": tokens}]},
            "logprobs": integer(0), "echo": flag,
        })),
        "Rerank": object(&["documents"], json!({
            "query": text, "messages": messages, "documents": texts, "ranker": text,
            "top_n": integer(1), "return_documents": flag,
        })),
        "Score": object(&["text_1", "text_2"], json!({
            "text_1": text, "text_2": texts, "ranker": text,
        })),
        "Tokenize": object(&[], json!({
            "prompt": text, "messages": messages, "add_special_tokens": flag, "return_token_strs": flag,
        })),
        "Detokenize": object(&["tokens"], json!({"tokens": tokens, "skip_special_tokens": flag})),
        "File": {"type": "string", "format": "binary"},
        "Error": object(&["error"], json!({"error": object(&["message"], json!({
            "message": text, "type": text, "param": {}, "code": {},
        }))})),
    })
}
