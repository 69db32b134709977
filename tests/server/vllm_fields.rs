//! Fields that vLLM has beyond OpenAI's.

use serde_json::{Value, json};

use crate::chat_model::{CONTEXT, ChatModel};
use crate::running::{Running, user, with};

#[test]
fn an_answer_can_have_a_least_length() {
    let model = ChatModel::new(1);
    let server = Running::start(model.path(), &[]);
    let ask = json!({"prompt": "Hello", "max_tokens": 8, "temperature": 0, "return_all": true});
    let tokens = |more: Value| -> Vec<u64> {
        let answer = server.answer("/v1/completions", with(&ask, more));
        let tokens = answer["podium"]["results"][0]["candidates"][0]["token_ids"].clone();
        serde_json::from_value(tokens).unwrap()
    };
    let free = tokens(json!({"ignore_eos": true}));
    assert_eq!(free.len(), 8);
    let end = free[0];
    assert!(tokens(json!({"stop_token_ids": [end]})).is_empty());
    let held = tokens(json!({"stop_token_ids": [end], "min_tokens": 3}));
    assert!(held.len() >= 3 && !held.contains(&end), "{held:?}");
    let (status, refused) = server.post("/v1/completions", &with(&ask, json!({"min_tokens": 9})));
    assert_eq!(
        (status, &refused["error"]["param"]),
        (400, &json!("min_tokens"))
    );
}

/// Evaluations ask for one token behind a prompt, and leave the last of the log-probabilities out.
#[test]
fn an_end_token_is_among_a_completions_logprobs() {
    let model = ChatModel::new(1);
    let server = Running::start(model.path(), &[]);
    let ask = json!({"prompt": "Hello there", "max_tokens": 1, "temperature": 0, "echo": true,
        "logprobs": 1, "return_all": true});
    let free = server.answer("/v1/completions", with(&ask, json!({"ignore_eos": true})));
    let token = &free["podium"]["results"][0]["candidates"][0]["token_ids"][0];
    let ended = with(&ask, json!({"stop_token_ids": [token]}));
    for more in [json!({}), json!({"best_of": 3})] {
        let answer = server.answer("/v1/completions", with(&ended, more));
        assert_eq!(answer["usage"]["completion_tokens"], 0);
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
        for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
            let of_choice = |answer: &Value| answer["choices"][0]["logprobs"][list].clone();
            assert_eq!(of_choice(&answer), of_choice(&free), "{list}");
        }
    }
    let body = with(&ended, json!({"echo": false, "stream": true}));
    let events = server.events("/v1/completions", &body);
    let streamed: Vec<&Value> = events
        .iter()
        .filter_map(|(_, chunk)| chunk["choices"][0]["logprobs"]["token_logprobs"].as_array())
        .flatten()
        .collect();
    let all = free["choices"][0]["logprobs"]["token_logprobs"].as_array();
    assert_eq!(streamed, [all.unwrap().last().unwrap()]);
}

#[test]
fn prompts_are_truncated_where_that_is_asked_for() {
    let model = ChatModel::new(1);
    let server = Running::start(model.path(), &[]);
    let long: Vec<u32> = (0..2 * CONTEXT as u32).map(|i| 300 + i % 50).collect();
    let ask = json!({"max_tokens": 4, "seed": 1, "temperature": 0.5, "ignore_eos": true});
    let text = |prompt: &[u32], more: Value| {
        let body = with(&with(&ask, json!({"prompt": prompt})), more);
        let answer = server.answer("/v1/completions", body);
        (
            answer["choices"][0]["text"].clone(),
            answer["usage"]["prompt_tokens"].clone(),
        )
    };
    let truncated = text(&long, json!({"truncate_prompt_tokens": 20}));
    assert_eq!(truncated, text(&long[long.len() - 20..], json!({})));
    assert_eq!(truncated.1, 20);
    // One that is short enough stays as it is.
    assert_eq!(
        text(&long[..9], json!({"truncate_prompt_tokens": 20})),
        text(&long[..9], json!({}))
    );
}

#[test]
fn an_answer_can_go_on_with_the_last_message() {
    let model = ChatModel::new(1);
    let server = Running::start(model.path(), &[]);
    let messages = json!([
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well, "},
    ]);
    let ask = json!({"max_tokens": 6, "seed": 1});
    let chat = server.answer(
        "/v1/chat/completions",
        with(
            &ask,
            json!({"messages": messages, "continue_final_message": true}),
        ),
    );
    // The template's own text, without the line's end and the next turn's head.
    let bare = server.answer(
        "/tokenize",
        json!({"prompt": "<user>Hi\n<assistant>Well, "}),
    );
    let whole = server.answer(
        "/v1/completions",
        with(&ask, json!({"prompt": bare["tokens"]})),
    );
    assert_eq!(
        chat["choices"][0]["message"]["content"],
        whole["choices"][0]["text"]
    );
    assert_eq!(
        chat["usage"]["prompt_tokens"],
        whole["usage"]["prompt_tokens"]
    );
}

#[test]
fn constraints_are_refused_rather_than_ignored() {
    let model = ChatModel::new(1);
    let server = Running::start(model.path(), &[]);
    for (path, base) in [
        ("/v1/chat/completions", json!({"messages": user("Hi")})),
        ("/v1/completions", json!({"prompt": "Hi"})),
    ] {
        for (name, value) in [
            ("structured_outputs", json!({"json": {}})),
            ("guided_json", json!({"type": "object"})),
            ("guided_regex", json!("a+")),
            ("guided_choice", json!(["a", "b"])),
            ("guided_grammar", json!("root ::= \"a\"")),
            ("response_format", json!({"type": "json_object"})),
        ] {
            let (status, refused) = server.post(path, &with(&base, json!({name: value})));
            assert_eq!((status, &refused["error"]["param"]), (400, &json!(name)));
        }
    }
}
