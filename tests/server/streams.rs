//! Answers that come in pieces.

use serde_json::{Value, json};

use crate::chat_model::ChatModel;
use crate::running::{Running, user, with};

/// The pieces of each choice put together, and what is special about the stream.
struct Whole {
    texts: Vec<String>,
    reasons: Vec<Value>,
    pieces: usize,
    usage: Option<Value>,
    podium: Value,
}

fn whole(events: &[(String, Value)], choices: usize) -> Whole {
    assert_eq!(events.last().unwrap().1, "[DONE]");
    let mut whole = Whole {
        texts: vec![String::new(); choices],
        reasons: vec![Value::Null; choices],
        pieces: 0,
        usage: None,
        podium: Value::Null,
    };
    for (name, chunk) in &events[..events.len() - 1] {
        if !name.is_empty() {
            continue;
        }
        assert!(chunk["id"].is_string() && chunk["created"].is_number());
        if chunk["usage"].is_object() {
            assert_eq!(chunk["choices"], json!([]));
            whole.usage = Some(chunk["usage"].clone());
        }
        if chunk["podium"].is_object() {
            whole.podium = chunk["podium"].clone();
        }
        for choice in chunk["choices"].as_array().unwrap() {
            let index = choice["index"].as_u64().unwrap() as usize;
            let text = choice["delta"]["content"]
                .as_str()
                .or(choice["text"].as_str());
            let text = text.unwrap_or_default();
            whole.texts[index] += text;
            whole.pieces += usize::from(!text.is_empty());
            assert!(whole.reasons[index].is_null(), "text behind the end");
            whole.reasons[index] = choice["finish_reason"].clone();
        }
    }
    whole
}

#[test]
fn a_stream_is_the_answer_in_pieces() {
    let model = ChatModel::new(1);
    let option = format!("mine={}", model.ranker("mine", &[]).display());
    let server = Running::start(model.path(), &["--ranker", &option]);
    for more in [
        json!({}),
        json!({"n": 3}),
        json!({"best_of": 5}),
        json!({"best_of": 5, "n": 2, "ranker": "mine"}),
        json!({"best_of": 4, "select": "first"}),
        json!({"stop": "a"}),
    ] {
        for (path, base) in [
            (
                "/v1/chat/completions",
                json!({"messages": user("Hi"), "max_tokens": 12, "seed": 5}),
            ),
            (
                "/v1/completions",
                json!({"prompt": "Hi", "max_tokens": 12, "seed": 5}),
            ),
            (
                "/v1/completions",
                json!({"prompt": ["Hi", "Ho"], "max_tokens": 12, "seed": 5}),
            ),
            (
                "/v1/completions",
                json!({"prompt": "Hi", "max_tokens": 12, "seed": 5, "echo": true}),
            ),
            (
                "/v1/completions",
                json!({"prompt": "Hi", "max_tokens": 5, "seed": 5, "echo": true, "logprobs": 1}),
            ),
        ] {
            let body = with(&base, more.clone());
            let answer = server.answer(path, body.clone());
            let choices = answer["choices"].as_array().unwrap();
            let stream = json!({"stream": true, "stream_options": {"include_usage": true}});
            let events = server.events(path, &with(&body, stream));
            let whole = whole(&events, choices.len());
            for (place, choice) in choices.iter().enumerate() {
                let text = choice["message"]["content"]
                    .as_str()
                    .or(choice["text"].as_str());
                assert_eq!(whole.texts[place], text.unwrap(), "{body}");
                assert_eq!(whole.reasons[place], choice["finish_reason"], "{body}");
            }
            let completion = |usage: &Value| usage["completion_tokens"].clone();
            assert_eq!(
                completion(&whole.usage.unwrap()),
                completion(&answer["usage"])
            );
            assert_eq!(whole.podium["strategy"], answer["podium"]["strategy"]);
        }
    }
    let plain = json!({"messages": user("Hi"), "max_tokens": 12, "seed": 5, "stream": true,
        "ignore_eos": true});
    let events = server.events("/v1/chat/completions", &plain);
    assert_eq!(events[0].1["choices"][0]["delta"]["role"], "assistant");
    let whole = whole(&events, 1);
    assert!(whole.pieces > 3, "{} pieces", whole.pieces);
    assert!(whole.usage.is_none());
    server.wait_until_idle();
}

#[test]
fn logprobs_of_a_stream_are_those_of_the_answer() {
    let model = ChatModel::new(1);
    let server = Running::start(model.path(), &[]);
    for seed in 0..5 {
        for more in [
            json!({}),
            json!({"stop": ["e", "lo"]}),
            json!({"best_of": 3}),
        ] {
            let body = with(
                &json!({"messages": user("Hi"), "max_tokens": 20, "seed": seed, "logprobs": true,
                    "top_logprobs": 2, "temperature": 2.0}),
                more,
            );
            let answer = server.answer("/v1/chat/completions", body.clone());
            let events = server.events(
                "/v1/chat/completions",
                &with(&body, json!({"stream": true})),
            );
            let streamed: Vec<Value> = events
                .iter()
                .filter_map(|(_, chunk)| chunk["choices"][0]["logprobs"]["content"].as_array())
                .flatten()
                .cloned()
                .collect();
            let expected = answer["choices"][0]["logprobs"]["content"]
                .as_array()
                .unwrap();
            assert_eq!(&streamed, expected, "{body}");
        }
    }
}

#[test]
fn candidates_can_be_watched() {
    let model = ChatModel::new(1);
    let option = format!("mine={}", model.ranker("mine", &[]).display());
    let server = Running::start(model.path(), &["--ranker", &option]);
    let body = json!({"messages": user("Hi"), "max_tokens": 12, "seed": 5, "best_of": 4,
        "stream": true, "stream_candidates": true, "return_all": true});
    let events = server.events("/v1/chat/completions", &body);
    let mut texts = vec![String::new(); 4];
    let mut finished = vec![Value::Null; 4];
    let mut prefilled = false;
    for (name, event) in &events {
        match &name[..] {
            "podium.prefill" => prefilled = event["done"] == event["total"],
            "podium.candidates" => {
                for piece in event["pieces"].as_array().unwrap() {
                    let candidate = piece["candidate"].as_u64().unwrap() as usize;
                    assert!(finished[candidate].is_null());
                    texts[candidate] += piece["text"].as_str().unwrap();
                }
            }
            "podium.finished" => {
                let candidate = event["candidate"].as_u64().unwrap() as usize;
                finished[candidate] = event["finish_reason"].clone();
            }
            _ => assert!(name.is_empty(), "{name}"),
        }
    }
    assert!(prefilled);
    let whole = whole(&events, 1);
    let candidates = whole.podium["results"][0]["candidates"].as_array().unwrap();
    for (index, candidate) in candidates.iter().enumerate() {
        assert_eq!(texts[index], candidate["text"]);
        assert_eq!(finished[index], candidate["finish_reason"]);
        assert!(candidate["score"].is_number());
    }
    let selected = whole.podium["results"][0]["selected"].as_u64().unwrap() as usize;
    assert_eq!(whole.texts[0], texts[selected]);
}

#[test]
fn what_is_wrong_is_said_before_a_stream_begins() {
    let model = ChatModel::new(1);
    let server = Running::start(model.path(), &[]);
    let body = json!({"prompt": "word ".repeat(2000), "stream": true});
    let (status, refused) = server.post("/v1/completions", &body);
    assert_eq!(
        (status, &refused["error"]["param"]),
        (400, &json!("prompt"))
    );
}
