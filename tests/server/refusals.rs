//! Bad requests: refused by the name of the field, in OpenAI's form.

use std::io::Write;
use std::net::TcpStream;

use serde_json::{Value, json};

use crate::chat_model::ChatModel;
use crate::running::{Running, rest, user, with};

#[test]
fn bad_values_are_refused_by_name() {
    let model = ChatModel::new(1);
    let server = Running::start(model.path(), &["--max-candidates", "32"]);
    let chat = json!({"messages": user("Hi"), "max_tokens": 2});
    let completion = json!({"prompt": "Hi", "max_tokens": 2});
    let common = [
        ("n", json!(0)),
        ("n", json!(33)),
        ("n", json!("two")),
        ("n", json!(1.5)),
        ("best_of", json!(0)),
        ("best_of", json!(-1)),
        ("best_of", json!(33)),
        ("max_tokens", json!(0)),
        ("max_tokens", json!(-4)),
        ("max_tokens", json!([])),
        ("max_completion_tokens", json!(0)),
        ("temperature", json!(-0.1)),
        ("temperature", json!(2.1)),
        ("temperature", json!("hot")),
        ("temperature", json!(1e300)),
        ("top_p", json!(0)),
        ("top_p", json!(1.1)),
        ("top_k", json!(-2)),
        ("top_k", json!(0.5)),
        ("min_p", json!(-0.1)),
        ("min_p", json!(1.5)),
        ("repetition_penalty", json!(0)),
        ("presence_penalty", json!(2.5)),
        ("frequency_penalty", json!(-2.5)),
        ("seed", json!("x")),
        ("seed", json!(0.5)),
        ("stop", json!(5)),
        ("stop", json!([""])),
        ("stop", json!("")),
        ("stop", json!(["a", 1])),
        ("stop", json!(vec!["x"; 17])),
        ("stop_token_ids", json!(["x"])),
        ("ignore_eos", json!("yes")),
        ("logit_bias", json!({"x": 1})),
        ("logit_bias", json!({"5": 101})),
        ("logit_bias", json!({"701": 1})),
        ("logit_bias", json!([1])),
        ("stream", json!("true")),
        ("stream_options", json!({"include_usage": true})),
        ("ranker", json!("nobody")),
        ("ranker", json!(3)),
        ("select", json!("best")),
        ("select", json!("beam")),
        ("return_all", json!(1)),
        ("return_scores", json!("")),
        ("stream_candidates", json!(1)),
        ("model", json!(7)),
    ];
    let refused = |path: &str, body: Value, param: &str| {
        let (status, answer) = server.post(path, &body);
        let error = &answer["error"];
        assert_eq!(status, 400, "{path} {body}: {answer}");
        assert_eq!(error["param"], param, "{path} {body}: {answer}");
        assert_eq!(error["type"], "invalid_request_error");
        let message = error["message"].as_str().unwrap();
        assert!(
            !message.contains('\n') && !message.contains("--"),
            "{message}"
        );
        assert!(message.len() < 400, "{message}");
    };
    for (param, value) in &common {
        refused(
            "/v1/chat/completions",
            with(&chat, json!({*param: value})),
            param,
        );
        refused(
            "/v1/completions",
            with(&completion, json!({*param: value})),
            param,
        );
    }
    refused(
        "/v1/completions",
        with(&completion, json!({"n": 3, "best_of": 2})),
        "best_of",
    );
    refused(
        "/v1/completions",
        with(&completion, json!({"select": "ranker"})),
        "ranker",
    );
    for (param, value) in [
        ("prompt", json!("")),
        ("prompt", json!([])),
        ("prompt", json!([""])),
        ("prompt", json!([[]])),
        ("prompt", json!({})),
        ("prompt", json!([701])),
        ("prompt", json!([1, "x"])),
        ("prompt", json!([-1])),
        ("prompt", json!(null)),
        ("prompt", json!("word ".repeat(2000))),
        ("logprobs", json!(21)),
        ("logprobs", json!(true)),
        ("echo", json!(1)),
        ("suffix", json!("end")),
    ] {
        refused(
            "/v1/completions",
            with(&completion, json!({param: value})),
            param,
        );
    }
    for (param, value) in [
        ("messages", json!([])),
        ("messages", json!("Hi")),
        ("messages", json!(null)),
        ("logprobs", json!(1)),
        ("top_logprobs", json!(1)),
        ("response_format", json!({"type": "json_object"})),
        ("response_format", json!("json")),
        ("tool_choice", json!("required")),
        ("tools", json!("x")),
        ("tools", json!([1])),
        ("chat_template_kwargs", json!([])),
        ("documents", json!(3)),
    ] {
        refused(
            "/v1/chat/completions",
            with(&chat, json!({param: value})),
            param,
        );
    }
    for (param, message) in [
        ("messages[0]", json!("Hi")),
        ("messages[0].role", json!({"content": "Hi"})),
        ("messages[0].content", json!({"role": "user"})),
        ("messages[0].content", json!({"role": "user", "content": 3})),
        (
            "messages[0].content[1]",
            json!({"role": "user", "content":
            [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "x"}}]}),
        ),
    ] {
        refused(
            "/v1/chat/completions",
            with(&chat, json!({"messages": [message]})),
            param,
        );
    }
    for (path, body, param) in [
        ("/tokenize", json!({}), "prompt"),
        ("/tokenize", json!({"prompt": 3}), "prompt"),
        ("/detokenize", json!({}), "tokens"),
        ("/detokenize", json!({"tokens": [701]}), "tokens"),
        ("/v1/rerank", json!({"query": "x"}), "documents"),
        (
            "/v1/rerank",
            json!({"query": "x", "documents": []}),
            "documents",
        ),
        ("/v1/rerank", json!({"documents": ["x"]}), "query"),
        (
            "/v1/rerank",
            json!({"query": "", "documents": ["x"]}),
            "query",
        ),
        (
            "/v1/rerank",
            json!({"query": "x", "documents": ["x"]}),
            "ranker",
        ),
        ("/score", json!({"text_1": "x"}), "text_2"),
        ("/score", json!({"text_2": ["x"]}), "text_1"),
    ] {
        refused(path, body, param);
    }
    let (status, unknown) = server.post(
        "/v1/completions",
        &with(&completion, json!({"model": "gpt-4"})),
    );
    assert_eq!(status, 404);
    assert_eq!(unknown["error"]["code"], "model_not_found");
    let (_, long) = server.post("/v1/completions", &json!({"prompt": "word ".repeat(2000)}));
    assert_eq!(long["error"]["code"], "context_length_exceeded");
    server.wait_until_idle();
}

#[test]
fn bodies_that_are_no_objects_or_too_large() {
    let model = ChatModel::new(1);
    let server = Running::start(model.path(), &["--max-body", "4"]);
    for body in [&b""[..], b"{", b"[1]", b"3", b"\xff"] {
        assert_eq!(server.post_bytes("/v1/completions", body).0, 400);
    }
    let large = json!({"prompt": "x".repeat(5000)}).to_string();
    assert_eq!(
        server.post_bytes("/v1/completions", large.as_bytes()).0,
        413
    );
    // Without saying how much, too.
    let mut stream = TcpStream::connect(&server.address).unwrap();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n";
    let chunk = format!("{:x}\r\n{}\r\n0\r\n\r\n", large.len(), large);
    write!(stream, "{head}{chunk}").unwrap();
    let answer = rest_until_close(stream);
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
    assert_eq!(server.get("/health").0, 200);
}

fn rest_until_close(stream: TcpStream) -> String {
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    rest(stream)
}

#[test]
fn keys_guard_every_route_but_health() {
    let model = ChatModel::new(1);
    let mut server = Running::start(model.path(), &["--api-key", "secret"]);
    let (_, described) = server.get("/openapi.json");
    for key in [
        None,
        Some("secre"),
        Some("secrets"),
        Some("Secret"),
        Some(""),
    ] {
        server.key = key.map(str::to_string);
        for (path, methods) in described["paths"].as_object().unwrap() {
            // The page is the same for everybody, and asks for the key itself.
            if path == "/health" || path == "/" {
                continue;
            }
            for method in methods.as_object().unwrap().keys() {
                let status = match &method[..] {
                    "get" => server.get_text(path).0,
                    "post" => server.post_bytes(path, b"{}").0,
                    _ => server.delete(path).0,
                };
                assert_eq!(status, 401, "{method} {path} with {key:?}");
            }
        }
        assert_eq!(server.get_text("/health").0, 200);
        // Other spellings are other paths.
        for path in [
            "/health/",
            "//health",
            "/%68ealth",
            "/health/../v1/models",
            "/HEALTH",
        ] {
            let mut stream = TcpStream::connect(&server.address).unwrap();
            write!(
                stream,
                "GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
            )
            .unwrap();
            let answer = rest(stream);
            assert!(answer.starts_with("HTTP/1.1 401"), "{path}: {answer}");
        }
    }
    server.key = Some("secret".to_string());
    assert_eq!(server.get_text("/v1/models").0, 200);
}
