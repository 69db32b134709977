//! What each route answers.

use std::process::Command;

use podium::ranker::ExtraInput;
use serde_json::{Value, json};

use crate::chat_model::{CONTEXT, ChatModel, VOCAB_SIZE};
use crate::running::{Running, user, with};
use crate::smollm2;

/// What a command prints about a model.
pub fn podium(model: &ChatModel, arguments: &[&str]) -> Value {
    let output = Command::new(env!("CARGO_BIN_EXE_podium"))
        .args(arguments)
        .arg("--model")
        .arg(model.path())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Equal, numbers as the float32 that they were.
pub fn same(ours: &Value, theirs: &Value) -> bool {
    match (ours.as_f64(), theirs.as_f64()) {
        (Some(ours), Some(theirs)) => ours as f32 == theirs as f32,
        _ => ours == theirs,
    }
}

#[test]
fn a_chat_is_answered_as_generate_answers_it() {
    let model = ChatModel::new(1);
    let ranker = model.ranker("mine", &[ExtraInput::MeanLogprob]);
    let ranker = ranker.to_str().unwrap();
    let server = Running::start(model.path(), &["--ranker", &format!("mine={ranker}")]);
    let generated = podium(
        &model,
        &[
            "generate",
            "Hello",
            "--n",
            "6",
            "--max-tokens",
            "9",
            "--seed",
            "7",
            "--ranker",
            ranker,
            "--json",
        ],
    );
    let answer = server.answer(
        "/v1/chat/completions",
        json!({
            "messages": user("Hello"), "best_of": 6, "max_tokens": 9, "seed": 7, "ranker": "mine",
            "return_all": true,
        }),
    );
    let result = &answer["podium"]["results"][0];
    let selected = generated["selected"].as_u64().unwrap() as usize;
    assert_eq!(result["selected"], generated["selected"]);
    assert_eq!(result["choices_by"]["ranker"], generated["selected"]);
    let expected = generated["candidates"].as_array().unwrap();
    let candidates = result["candidates"].as_array().unwrap();
    assert_eq!(candidates.len(), 6);
    for (ours, theirs) in candidates.iter().zip(expected) {
        for field in [
            "text",
            "token_ids",
            "finish_reason",
            "score",
            "mean_logprob",
        ] {
            assert!(
                same(&ours[field], &theirs[field]),
                "{field}: {ours} {theirs}"
            );
        }
    }
    let texts: std::collections::HashSet<&str> = candidates
        .iter()
        .map(|c| c["text"].as_str().unwrap())
        .collect();
    assert!(texts.len() > 1, "candidates of one seed differ");
    let choice = &answer["choices"][0];
    assert_eq!(choice["message"]["content"], expected[selected]["text"]);
    assert_eq!(choice["message"]["role"], "assistant");
    assert_eq!(choice["candidate"], generated["selected"]);
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(answer["podium"]["ranker"], "mine");
    assert_eq!(answer["podium"]["strategy"], "ranker");
    assert_eq!(
        answer["usage"]["completion_tokens"],
        generated["usage"]["completion_tokens"]
    );
    assert_eq!(
        answer["usage"]["prompt_tokens"],
        generated["usage"]["prompt_tokens"]
    );
}

#[test]
fn n_are_the_best_in_the_order_of_choice() {
    let model = ChatModel::new(2);
    let ranker = model.ranker("mine", &[]);
    let option = format!("mine={}", ranker.display());
    let server = Running::start(model.path(), &["--ranker", &option]);
    let ask = json!({"prompt": "Once", "best_of": 7, "n": 3, "max_tokens": 6, "seed": 3,
        "return_all": true});
    for (select, fact) in [("ranker", "score"), ("logprob", "mean_logprob")] {
        let answer = server.answer(
            "/v1/completions",
            with(&ask, json!({"select": select, "ranker": "mine"})),
        );
        let result = &answer["podium"]["results"][0];
        let facts: Vec<f64> = result["candidates"]
            .as_array()
            .unwrap()
            .iter()
            .map(|candidate| candidate[fact].as_f64().unwrap())
            .collect();
        let mut order: Vec<usize> = (0..7).collect();
        order.sort_by(|&a, &b| facts[b].total_cmp(&facts[a]));
        let choices = answer["choices"].as_array().unwrap();
        assert_eq!(choices.len(), 3);
        for (place, choice) in choices.iter().enumerate() {
            assert_eq!(choice["candidate"], order[place], "{select}");
            assert_eq!(choice["index"], place);
            assert_eq!(choice["text"], result["candidates"][order[place]]["text"]);
        }
        assert_eq!(result["scores"].as_array().unwrap().len(), 7);
    }
    // Without a reason to choose, candidates come as they are.
    let plain = server.answer(
        "/v1/completions",
        json!({"prompt": "Once", "n": 3, "max_tokens": 6, "seed": 3}),
    );
    assert_eq!(plain["podium"]["strategy"], "first");
    for (place, choice) in plain["choices"].as_array().unwrap().iter().enumerate() {
        assert_eq!(choice["candidate"], place);
        assert!(choice.get("score").is_none());
    }
}

#[test]
fn the_models_name_and_the_servers_defaults_ask_for_more_candidates() {
    let model = ChatModel::new(1);
    let option = format!("mine={}", model.ranker("mine", &[]).display());
    let server = Running::start(
        model.path(),
        &[
            "--ranker",
            &option,
            "--best-of",
            "3",
            "--served-model-name",
            "org/small",
        ],
    );
    let ask = json!({"messages": user("Hi"), "max_tokens": 4, "seed": 1});
    let asked = |more: Value| {
        let answer = server.answer("/v1/chat/completions", with(&ask, more));
        let podium = &answer["podium"];
        (
            podium["best_of"].as_u64().unwrap(),
            podium["strategy"].as_str().unwrap().to_string(),
        )
    };
    let ranked = |best_of| (best_of, "ranker".to_string());
    assert_eq!(asked(json!({})), ranked(3));
    assert_eq!(asked(json!({"model": "org/small"})), ranked(3));
    assert_eq!(asked(json!({"model": "org/small:best-of-5"})), ranked(5));
    assert_eq!(
        asked(json!({"model": "org/small:best-of-5:mine"})),
        ranked(5)
    );
    assert_eq!(
        asked(json!({"model": "org/small:best-of-5", "best_of": 2})),
        ranked(2)
    );
    assert_eq!(asked(json!({"best_of": 1})), (1, "first".to_string()));
    assert_eq!(
        asked(json!({"select": "majority"})),
        (3, "majority".to_string())
    );
    // What gateways add is nobody's.
    assert_eq!(
        asked(json!({"user": "me", "store": true, "x": {"y": []}})),
        ranked(3)
    );

    let (status, models) = server.get("/v1/models");
    assert_eq!((status, &models["object"]), (200, &json!("list")));
    let ids: Vec<&str> = models["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| m["id"].as_str().unwrap())
        .collect();
    assert_eq!(
        ids,
        [
            "org/small",
            "org/small:best-of-16",
            "org/small:best-of-16:mine"
        ]
    );
    for id in ids.iter().chain(&["org/small:best-of-1024"]) {
        let (status, found) = server.get(&format!("/v1/models/{id}"));
        assert_eq!(
            (status, &found["id"], &found["max_model_len"]),
            (200, &json!(id), &json!(CONTEXT))
        );
    }
    for id in ["other", "org/small:best-of-0", "org/small:best-of-4:nobody"] {
        let (status, refused) = server.get(&format!("/v1/models/{id}"));
        assert_eq!(
            (status, &refused["error"]["param"]),
            (404, &json!("model")),
            "{id}"
        );
    }
}

/// Gateways take the first name for the only one.
#[test]
fn a_served_name_may_ask_for_more_candidates_itself() {
    let model = ChatModel::new(1);
    let option = format!("mine={}", model.ranker("mine", &[]).display());
    let name = "small:best-of-4:mine";
    let options = ["--ranker", &option, "--served-model-name", name];
    let server = Running::start(
        model.path(),
        &[&options[..], &["--served-model-name", "other"]].concat(),
    );
    let asked = |more: Value| {
        let ask = json!({"messages": user("Hi"), "max_tokens": 3});
        let answer = server.answer("/v1/chat/completions", with(&ask, more));
        (answer["model"].clone(), answer["podium"]["best_of"].clone())
    };
    assert_eq!(asked(json!({})), (json!(name), json!(4)));
    assert_eq!(asked(json!({"model": name})), (json!(name), json!(4)));
    for (model, best_of) in [("small", 1), ("other", 1), ("other:best-of-3", 3)] {
        let expected = (json!(model), json!(best_of));
        assert_eq!(asked(json!({"model": model})), expected);
    }
    let (_, models) = server.get("/v1/models");
    assert_eq!(models["data"][0]["id"], name);
    let output = Command::new(env!("CARGO_BIN_EXE_podium"))
        .args(["serve", "--port", "0", "--model"])
        .arg(model.path())
        .args(["--served-model-name", "small:best-of-4:nobody"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn prompts_come_as_texts_and_as_tokens() {
    let model = ChatModel::new(1);
    let server = Running::start(model.path(), &[]);
    let tokens = server.answer(
        "/tokenize",
        json!({"prompt": "Hello there", "return_token_strs": true}),
    );
    let ids = tokens["tokens"].clone();
    assert_eq!(tokens["count"], ids.as_array().unwrap().len());
    assert_eq!(
        tokens["token_strs"].as_array().unwrap().len(),
        ids.as_array().unwrap().len()
    );
    let bare = server.answer(
        "/tokenize",
        json!({"prompt": "Hello there", "add_special_tokens": false}),
    );
    let text = server.answer("/detokenize", json!({"tokens": bare["tokens"]}));
    assert_eq!(text["prompt"], "Hello there");
    let chat = server.answer("/tokenize", json!({"messages": user("Hello")}));
    assert!(chat["count"].as_u64().unwrap() > 3);

    let ask = json!({"max_tokens": 5, "seed": 3, "temperature": 0.5});
    let texts = |prompt: Value| -> Vec<String> {
        let answer = server.answer("/v1/completions", with(&ask, json!({"prompt": prompt})));
        let choices = answer["choices"].as_array().unwrap();
        choices
            .iter()
            .map(|choice| choice["text"].as_str().unwrap().to_string())
            .collect()
    };
    let one = texts(json!("Hello there"));
    assert_eq!(one.len(), 1);
    assert_eq!(texts(ids.clone()), one);
    assert_eq!(
        texts(json!(["Hello there", "Hello there"])),
        [&one[..], &one[..]].concat()
    );
    assert_eq!(texts(json!([ids, ids])), [&one[..], &one[..]].concat());

    let (_, info) = server.get("/tokenizer_info");
    assert_eq!(info["eos_token_ids"], json!([1, 2]));
    assert_eq!(info["eos_token"], "<|end_of_text|>");
    assert!(
        info["chat_template"]
            .as_str()
            .unwrap()
            .contains("<assistant>")
    );
}

#[test]
fn logprobs_echo_and_penalties() {
    let model = ChatModel::new(1);
    let server = Running::start(model.path(), &[]);
    let ask = json!({"prompt": "Hello there", "max_tokens": 4, "temperature": 0, "logprobs": 3,
        "echo": true, "ignore_eos": true});
    let answer = server.answer("/v1/completions", ask.clone());
    let choice = &answer["choices"][0];
    assert!(choice["text"].as_str().unwrap().starts_with("Hello there"));
    let prompt_tokens = answer["usage"]["prompt_tokens"].as_u64().unwrap() as usize;
    let logprobs = &choice["logprobs"];
    for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(
            logprobs[list].as_array().unwrap().len(),
            prompt_tokens + 4,
            "{list}"
        );
    }
    assert_eq!(logprobs["token_logprobs"][0], Value::Null);
    for place in prompt_tokens..prompt_tokens + 4 {
        // Greedy: the token that was drawn is the first of the most probable.
        let drawn = logprobs["token_logprobs"][place].as_f64().unwrap();
        let top = logprobs["top_logprobs"][place].as_object().unwrap();
        let most = top
            .values()
            .map(|v| v.as_f64().unwrap())
            .fold(f64::MIN, f64::max);
        assert_eq!(drawn, most);
        assert!(drawn < 0.0 && (1..=4).contains(&top.len()));
    }
    // The prompt alone, as lm-eval asks for it: the same numbers.
    let alone = server.answer("/v1/completions", with(&ask, json!({"max_tokens": 0})));
    assert_eq!(alone["choices"][0]["text"], "Hello there");
    let numbers =
        |value: &Value| value["token_logprobs"].as_array().unwrap()[..prompt_tokens].to_vec();
    assert_eq!(numbers(&alone["choices"][0]["logprobs"]), numbers(logprobs));
    assert_eq!(alone["usage"]["completion_tokens"], 0);

    let chat = json!({"messages": user("Hi"), "max_tokens": 3, "temperature": 0, "ignore_eos": true,
        "logprobs": true, "top_logprobs": 2});
    let answer = server.answer("/v1/chat/completions", chat.clone());
    let content = answer["choices"][0]["logprobs"]["content"]
        .as_array()
        .unwrap()
        .clone();
    assert_eq!(content.len(), 3);
    for token in &content {
        assert_eq!(token["top_logprobs"].as_array().unwrap().len(), 2);
        assert_eq!(token["top_logprobs"][0]["logprob"], token["logprob"]);
        assert!(token["bytes"].is_array());
    }

    // A bias of -100 takes a token out, one of 100 makes it certain, a penalty ends repetition.
    let ids = |more: Value| {
        let all = with(
            &json!({"prompt": "Hello", "max_tokens": 6, "temperature": 0,
            "ignore_eos": true, "return_all": true}),
            more,
        );
        let answer = server.answer("/v1/completions", all);
        let ids = answer["podium"]["results"][0]["candidates"][0]["token_ids"].clone();
        serde_json::from_value::<Vec<u64>>(ids).unwrap()
    };
    let free = ids(json!({}));
    let banned = ids(json!({"logit_bias": {free[0].to_string(): -100}}));
    assert_ne!(free[0], banned[0]);
    assert_eq!(ids(json!({"logit_bias": {"300": 100}})), [300; 6]);
    let penalised =
        ids(json!({"logit_bias": {"300": 2.5}, "frequency_penalty": 2.0, "presence_penalty": 2.0}));
    assert!(
        penalised.iter().filter(|&&id| id == 300).count() < 6,
        "{penalised:?}"
    );
    assert_eq!(ids(json!({"stop_token_ids": [free[0]]})), Vec::<u64>::new());
}

#[test]
fn stop_strings_end_an_answer() {
    let model = ChatModel::new(1);
    let server = Running::start(model.path(), &[]);
    let ask = json!({"prompt": "Hello", "max_tokens": 30, "seed": 5, "ignore_eos": true});
    let whole = server.answer("/v1/completions", ask.clone());
    assert_eq!(whole["choices"][0]["finish_reason"], "length");
    let text = whole["choices"][0]["text"].as_str().unwrap();
    let stop: String = text.chars().skip(6).take(2).collect();
    let cut = server.answer("/v1/completions", with(&ask, json!({"stop": stop})));
    assert_eq!(cut["choices"][0]["finish_reason"], "stop");
    assert_eq!(cut["choices"][0]["text"], text[..text.find(&stop).unwrap()]);
}

#[test]
fn given_candidates_are_scored() {
    let model = ChatModel::new(1);
    for extra in [&[][..], &[ExtraInput::MeanLogprob, ExtraInput::Length][..]] {
        let ranker = model.ranker("mine", extra);
        let server = Running::start(
            model.path(),
            &["--ranker", &format!("mine={}", ranker.display())],
        );
        let file = model.path().join("items.jsonl");
        let documents = ["four", " five", "", "twenty-two"];
        let item = json!({"id": "1", "prompt": "2 + 2 =", "candidates": documents});
        std::fs::write(&file, item.to_string()).unwrap();
        let expected = podium(
            &model,
            &[
                "score",
                file.to_str().unwrap(),
                "--ranker",
                ranker.to_str().unwrap(),
            ],
        );
        let scored = server.answer("/score", json!({"text_1": "2 + 2 =", "text_2": documents}));
        let scores: Vec<f64> = scored["data"]
            .as_array()
            .unwrap()
            .iter()
            .map(|d| d["score"].as_f64().unwrap())
            .collect();
        assert_eq!(json!(scores), expected["scores"]);
        assert_eq!(scored["ranker"], "mine");
        let reranked = server.answer(
            "/v1/rerank",
            json!({"query": "2 + 2 =", "documents": documents, "top_n": 2, "ranker": "mine"}),
        );
        let results = reranked["results"].as_array().unwrap();
        assert_eq!(results.len(), 2);
        assert_eq!(results[0]["index"], expected["selected"]);
        let index = results[0]["index"].as_u64().unwrap() as usize;
        assert_eq!(results[0]["document"]["text"], documents[index]);
        assert_eq!(results[0]["relevance_score"], expected["scores"][index]);
        server.wait_until_idle();
    }
}

#[test]
fn rankers_come_and_go() {
    let model = ChatModel::new(1);
    let file = std::fs::read(model.ranker("uploaded", &[])).unwrap();
    let server = Running::start(model.path(), &["--api-key", "secret"]);
    assert_eq!(server.get("/v1/rankers").1["data"], json!([]));
    let (status, added) = server.post_bytes("/v1/rankers", &file);
    assert_eq!(status, 201, "{added}");
    assert_eq!(server.post_bytes("/v1/rankers?name=second", &file).0, 201);
    assert_eq!(server.post_bytes("/v1/rankers?name=second", &file).0, 200);
    let (_, listed) = server.get("/v1/rankers");
    assert_eq!(listed["data"][0]["id"], "second");
    assert_eq!(listed["data"][1]["id"], "uploaded");
    assert_eq!(listed["data"][1]["origin"], "uploaded");
    let ask = json!({"messages": user("Hi"), "best_of": 3, "max_tokens": 4, "ranker": "second",
        "return_scores": true});
    let answer = server.answer("/v1/chat/completions", ask.clone());
    assert_eq!(answer["podium"]["ranker"], "second");
    assert_eq!(
        answer["podium"]["results"][0]["scores"]
            .as_array()
            .unwrap()
            .len(),
        3
    );
    assert!(answer["choices"][0]["score"].is_number());
    assert_eq!(server.delete("/v1/rankers/second").0, 200);
    assert_eq!(server.delete("/v1/rankers/second").0, 404);
    let (status, refused) = server.post("/v1/chat/completions", &ask);
    assert_eq!(
        (status, &refused["error"]["param"]),
        (400, &json!("ranker"))
    );

    let other = ChatModel::new(9);
    let foreign = std::fs::read(other.ranker("foreign", &[])).unwrap();
    for (path, body, param) in [
        ("/v1/rankers", &b"no ranker"[..], "file"),
        ("/v1/rankers", &foreign[..], "file"),
        ("/v1/rankers?name=a%2Fb", &file[..], "name"),
    ] {
        let (status, text) = server.post_bytes(path, body);
        let refused: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(
            (status, &refused["error"]["param"]),
            (400, &json!(param)),
            "{text}"
        );
    }
    // Nobody changes the rankers of a server without keys.
    let open = Running::start(model.path(), &[]);
    assert_eq!(open.post_bytes("/v1/rankers", &file).0, 403);
    assert_eq!(open.delete("/v1/rankers/x").0, 403);
}

#[test]
fn a_server_tells_of_itself() {
    let model = ChatModel::new(1);
    let server = Running::start(model.path(), &[]);
    for path in ["/health", "/ping"] {
        assert_eq!(server.get(path), (200, json!({"status": "ok"})));
    }
    assert_eq!(
        server.get("/version").1["version"],
        env!("CARGO_PKG_VERSION")
    );
    assert_eq!(server.get("/load").1["server_load"], 0);
    let body = json!({"prompt": "Hello", "best_of": 4, "max_tokens": 5, "ignore_eos": true});
    let usage = server.answer("/v1/completions", body)["usage"].clone();
    assert_eq!(usage["completion_tokens"], 20);
    assert_eq!(server.metric("vllm:generation_tokens_total"), 20.0);
    assert_eq!(
        server.metric("vllm:prompt_tokens_total"),
        usage["prompt_tokens"].as_f64().unwrap()
    );
    assert_eq!(
        server.metric("vllm:request_success_total{finished_reason=\"length\"}"),
        1.0
    );
    assert_eq!(server.metric("podium_request_candidates_sum"), 4.0);
    server.wait_until_idle();

    // Every route that is described is there, and takes the method.
    let (_, described) = server.get("/openapi.json");
    let mut routes = 0;
    for (path, methods) in described["paths"].as_object().unwrap() {
        for method in methods.as_object().unwrap().keys() {
            let path = path.replace("{id}", "x").replace("{name}", "x");
            let (status, text) = match &method[..] {
                "get" => server.get_text(&path),
                "post" => server.post_bytes(&path, b"{}"),
                _ => {
                    let (status, value) = server.delete(&path);
                    (status, value.to_string())
                }
            };
            assert_ne!(status, 405, "{method} {path}");
            assert!(!text.contains("there is no "), "{method} {path}: {text}");
            routes += 1;
        }
    }
    assert!(routes > 15);
    assert!(described["components"]["schemas"]["Chat"]["properties"]["best_of"].is_object());
    let (status, page) = server.get_text("/");
    assert_eq!(status, 200);
    // It is whole in itself.
    assert!(page.starts_with("<!doctype html>") && page.ends_with("</html>\n"));
    for elsewhere in ["http://", "https://", "src=", "@import", "<link"] {
        assert!(!page.contains(elsewhere), "{elsewhere}");
    }
    assert_eq!(server.get("/nowhere").0, 404);
    assert_eq!(server.get("/v1/completions").0, 405);
    assert!(described.to_string().len() > VOCAB_SIZE);
}

#[test]
fn the_default_model_and_its_ranker() {
    let Some(path) = smollm2::path() else {
        return;
    };
    let server = Running::start(&path, &["--ranker", "gcd"]);
    let prompt = std::fs::read_to_string("models/demo-gcd.txt").unwrap();
    let ask = json!({"prompt": prompt, "best_of": 8, "seed": 0, "stop": "\n", "max_tokens": 64,
        "return_all": true});
    let answer = server.answer("/v1/completions", ask);
    let generated = Command::new(env!("CARGO_BIN_EXE_podium"))
        .args([
            "generate", "--raw", "--stop", "\\n", "--n", "8", "--seed", "0", "--ranker", "gcd",
        ])
        .args(["--max-tokens", "64", "--json", "--model"])
        .arg(&path)
        .arg(&prompt)
        .output()
        .unwrap();
    let generated: Value = serde_json::from_slice(&generated.stdout).unwrap();
    assert_eq!(
        answer["podium"]["results"][0]["selected"],
        generated["selected"]
    );
    for (ours, theirs) in answer["podium"]["results"][0]["candidates"]
        .as_array()
        .unwrap()
        .iter()
        .zip(generated["candidates"].as_array().unwrap())
    {
        assert_eq!(ours["text"], theirs["text"]);
        assert!(same(&ours["score"], &theirs["score"]));
    }
    server.wait_until_idle();
}
