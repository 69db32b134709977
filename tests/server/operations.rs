//! Crowds, clients that vanish or dawdle, and the end.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::chat_model::ChatModel;
use crate::routes::{podium, same};
use crate::running::{PATIENCE, Running, outcome, parse_events, rest, user, with};

/// A model with room for answers that take long.
fn long_model() -> ChatModel {
    ChatModel::with_context(1, 1 << 17)
}

/// Minutes of work, if nobody stops it.
fn endless() -> Value {
    json!({"prompt": "Hello", "max_tokens": 120_000, "ignore_eos": true, "seed": 1})
}

/// Reads until the stream has said something.
fn read_some(stream: &mut TcpStream) -> String {
    let mut buffer = [0; 4096];
    let count = stream.read(&mut buffer).unwrap();
    String::from_utf8_lossy(&buffer[..count]).into_owned()
}

#[test]
fn clients_that_vanish_leave_no_page_held() {
    let model = long_model();
    let server = Running::start(model.path(), &["--max-batch", "4"]);
    let aborted = || server.metric("vllm:request_success_total{finished_reason=\"abort\"}");
    let running = |count: f64| {
        server.wait_for("a running request", || {
            server.metric("vllm:num_requests_running") == count
        })
    };
    let mut expected = 0.0;
    for body in [
        // While decoding, with and without a stream, and with candidates that are ranked later.
        endless(),
        with(&endless(), json!({"stream": true})),
        with(&endless(), json!({"best_of": 4, "stream": true})),
        with(
            &endless(),
            json!({"best_of": 4, "stream": true, "stream_candidates": true}),
        ),
        // During prefill.
        json!({"prompt": vec![300; 100_000], "max_tokens": 1}),
    ] {
        let stream = server.open("/v1/completions", &body);
        running(1.0);
        assert!(server.metric("podium_kv_pages_used") > 0.0);
        drop(stream);
        server.wait_until_idle();
        expected += 1.0;
        assert_eq!(aborted(), expected);
    }
    // While it waits: the first has all the candidates that run.
    let first = server.open("/v1/completions", &with(&endless(), json!({"n": 4})));
    running(1.0);
    let second = server.open("/v1/completions", &endless());
    server.wait_for("a waiting request", || {
        server.metric("vllm:num_requests_waiting") == 1.0
    });
    drop(second);
    server.wait_for("the end of the waiting request", || {
        server.metric("vllm:num_requests_waiting") == 0.0
    });
    assert_eq!(server.metric("vllm:num_requests_running"), 1.0);
    drop(first);
    server.wait_until_idle();
    assert_eq!(aborted(), expected + 2.0);
    assert_eq!(server.get("/load").1["server_load"], 0);
    server.answer("/v1/completions", json!({"prompt": "Hello"}));
}

#[test]
fn a_request_in_a_crowd_is_the_request_alone() {
    let model = ChatModel::with_context(1, 2048);
    let ranker = model.ranker("mine", &[]);
    let option = format!("mine={}", ranker.display());
    // So little memory that they wait for each other, and lose it: a group that is alone has room.
    let server = Running::start(model.path(), &["--ranker", &option, "--kv-memory", "1"]);
    let prompt = |index: usize| "x ".repeat(1 + index % 7);
    let (best_of, max_tokens) = (|index| 1 + index % 4, |index| 100 + 20 * (index % 11));
    let request = |index: usize| {
        json!({"messages": user(&prompt(index)), "best_of": best_of(index),
            "max_tokens": max_tokens(index), "seed": index, "ranker": "mine", "return_all": true})
    };
    let post = |index| outcome(&server.answer("/v1/chat/completions", request(index)));
    let alone: Vec<_> = (0..24).map(post).collect();
    std::thread::scope(|scope| {
        let crowd: Vec<_> = (0..24)
            .map(|index| scope.spawn(move || post(index)))
            .collect();
        for (index, thread) in crowd.into_iter().enumerate() {
            assert_eq!(thread.join().unwrap(), alone[index], "request {index}");
        }
    });
    server.wait_until_idle();
    assert!(server.metric("vllm:num_preemptions_total") > 0.0);

    for (index, alone) in alone.iter().enumerate().step_by(3) {
        let number = |number: usize| number.to_string();
        let generated = podium(
            &model,
            &[
                "generate",
                &prompt(index),
                "--n",
                &number(best_of(index)),
                "--max-tokens",
                &number(max_tokens(index)),
                "--seed",
                &number(index),
                "--ranker",
                ranker.to_str().unwrap(),
                "--json",
            ],
        );
        let candidates = alone[1].as_array().unwrap();
        let expected = generated["candidates"].as_array().unwrap();
        assert_eq!(candidates.len(), expected.len());
        for (ours, theirs) in candidates.iter().zip(expected) {
            for field in ["text", "token_ids", "finish_reason", "score"] {
                let (ours, theirs) = (&ours[field], &theirs[field]);
                assert!(
                    same(ours, theirs),
                    "request {index}, {field}: {ours} {theirs}"
                );
            }
        }
        assert_eq!(alone[2], generated["selected"]);
    }
}

#[test]
fn a_full_queue_says_so() {
    let model = long_model();
    let server = Running::start(model.path(), &["--max-queue", "2"]);
    let first = server.open("/v1/completions", &endless());
    let second = server.open(
        "/v1/completions",
        &with(&endless(), json!({"stream": true})),
    );
    server.wait_for("two requests", || server.get("/load").1["server_load"] == 2);
    let mut third = server.open(
        "/v1/completions",
        &with(&endless(), json!({"user": "third"})),
    );
    let refused = read_some(&mut third);
    assert!(refused.starts_with("HTTP/1.1 429"), "{refused}");
    assert!(refused.contains("retry-after: 1"), "{refused}");
    drop((first, second));
    server.wait_for("an empty queue", || {
        server.get("/load").1["server_load"] == 0
    });
    server.answer("/v1/completions", json!({"prompt": "Hello"}));
}

#[test]
fn the_signal_lets_requests_end() {
    let model = long_model();
    let server = Running::start(model.path(), &["--drain-timeout", "60"]);
    let body = json!({"prompt": "Hello", "max_tokens": 3000, "ignore_eos": true, "stream": true});
    let mut running = server.open("/v1/completions", &body);
    let begun = read_some(&mut running);
    assert!(begun.starts_with("HTTP/1.1 200"), "{begun}");
    server.signal("TERM");
    server.wait_for("the drain", || server.get("/health").0 == 503);
    let (status, refused) = server.post("/v1/completions", &json!({"prompt": "Hello"}));
    assert_eq!(
        (status, &refused["error"]["code"]),
        (503, &json!("shutting_down"))
    );
    let text = rest(running);
    assert!(text.contains("data: [DONE]"), "the answer came whole");
    assert!(server.wait().success());
}

#[test]
fn what_does_not_end_in_time_is_told() {
    let model = long_model();
    let server = Running::start(model.path(), &["--drain-timeout", "0.2"]);
    let mut streamed = server.open(
        "/v1/completions",
        &with(&endless(), json!({"stream": true})),
    );
    let whole = server.open("/v1/completions", &endless());
    let begun = read_some(&mut streamed);
    assert!(begun.starts_with("HTTP/1.1 200"), "{begun}");
    server.wait_for("two requests", || server.get("/load").1["server_load"] == 2);
    let started = Instant::now();
    server.signal("INT");
    let text = rest(streamed);
    assert!(
        text.contains("event: error"),
        "{}",
        &text[text.len().saturating_sub(400)..]
    );
    assert!(text.contains("shutting_down") && !text.contains("[DONE]"));
    let refused = rest(whole);
    assert!(refused.starts_with("HTTP/1.1 503"), "{refused}");
    assert!(server.wait().success());
    assert!(started.elapsed() < Duration::from_secs(20));
}

#[test]
fn slow_clients_are_cut() {
    let model = ChatModel::new(1);
    let server = Running::start(
        model.path(),
        &[
            "--header-timeout",
            "0.3",
            "--body-timeout",
            "0.3",
            "--max-connections",
            "40",
        ],
    );
    let cut = |text: &str| {
        let mut stream = TcpStream::connect(&server.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        write!(stream, "{text}").unwrap();
        let started = Instant::now();
        let answer = rest(stream);
        assert!(
            started.elapsed() < Duration::from_secs(20),
            "{text:?} was waited for"
        );
        answer
    };
    // Nothing at all, half a head, half a body, and a connection that idles after its answer.
    cut("");
    cut("POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-");
    let answer =
        cut("POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{\"pr");
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    let answer = cut("GET /health HTTP/1.1\r\nhost: x\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let large = format!(
        "GET /health HTTP/1.1\r\nhost: x\r\nx-large: {}\r\n\r\n",
        "x".repeat(40_000)
    );
    let mut stream = TcpStream::connect(&server.address).unwrap();
    // It may be cut before all is written.
    let _ = stream.write_all(large.as_bytes());
    let answer = rest(stream);
    assert!(
        answer.is_empty() || answer.starts_with("HTTP/1.1 431"),
        "{answer}"
    );

    // As many slow ones as there is room for: they make way.
    let slow: Vec<TcpStream> = (0..40)
        .map(|_| TcpStream::connect(&server.address).unwrap())
        .collect();
    assert_eq!(server.get("/health").0, 200);
    drop(slow);
}

#[test]
fn options_come_from_a_file_and_the_environment_too() {
    let model = ChatModel::new(1);
    let file = model.path().join("serve.toml");
    std::fs::write(
        &file,
        "best-of = 3\nserved-model-name = [\"file\", \"other\"]\ncors-origin = \"https://a.example\"\nmax-candidates = 8\n",
    )
    .unwrap();
    let option = file.to_str().unwrap().to_string();
    let server = Running::start(
        model.path(),
        &["--config", &option, "--served-model-name", "flag"],
    );
    let answer = server.answer("/v1/completions", json!({"prompt": "Hi", "max_tokens": 2}));
    assert_eq!(answer["podium"]["best_of"], 3);
    assert_eq!(answer["model"], "flag");
    assert_eq!(
        server
            .post("/v1/completions", &json!({"prompt": "Hi", "n": 9}))
            .0,
        400
    );

    let refused = |options: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_podium"));
        command
            .args(["serve", "--port", "0", "--model"])
            .arg(model.path())
            .args(options);
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{options:?}");
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(message.lines().count(), 1, "{message}");
        message
    };
    std::fs::write(&file, "best-of = 3\nbestof = 3\n").unwrap();
    let message = refused(&["--config", &option]);
    assert!(
        message.contains("line 2: unknown field `bestof`"),
        "{message}"
    );
    assert!(refused(&["--best-of", "0"]).contains("--best-of must be between 1 and 1024, not 0"));
    assert!(refused(&["--select", "beam"]).contains("--select beam"));
    assert!(refused(&["--ranker", "x.ranker"]).contains("--ranker NAME=x.ranker"));
    assert!(refused(&["--drain-timeout", "-1"]).contains("--drain-timeout must be between"));
    assert!(refused(&["--api-key", ""]).contains("--api-key must not be empty"));
}

#[test]
fn other_origins_are_closed_unless_named() {
    let model = ChatModel::new(1);
    let asked = |server: &Running, origin: &str| {
        let mut stream = TcpStream::connect(&server.address).unwrap();
        write!(
            stream,
            "GET /health HTTP/1.1\r\nhost: x\r\norigin: {origin}\r\nconnection: close\r\n\r\n"
        )
        .unwrap();
        rest(stream)
            .to_lowercase()
            .contains("access-control-allow-origin")
    };
    let closed = Running::start(model.path(), &[]);
    assert!(!asked(&closed, "https://a.example"));
    let open = Running::start(model.path(), &["--cors-origin", "https://a.example"]);
    assert!(asked(&open, "https://a.example"));
    assert!(!asked(&open, "https://b.example"));
}

#[test]
fn keep_alive_and_events_parse() {
    let model = ChatModel::new(1);
    let server = Running::start(model.path(), &[]);
    let mut stream = server.open("/v1/completions", &json!({"prompt": "Hi", "stream": true}));
    let mut text = String::new();
    while !text.contains("[DONE]") {
        text += &read_some(&mut stream);
    }
    assert!(text.to_lowercase().contains("x-request-id: req-"));
    assert!(text.contains("text/event-stream"));
    assert!(!parse_events(&text.replace('\r', "")).is_empty());
}

#[test]
fn bench_serve_measures_a_server() {
    let model = ChatModel::new(1);
    let server = Running::start(model.path(), &["--api-key", "secret"]);
    let url = format!("http://{}", server.address);
    let bench = |options: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_podium"));
        command.args([
            "bench-serve",
            "--url",
            &url,
            "--requests",
            "6",
            "--rate",
            "100",
        ]);
        command
            .args(["--max-tokens", "5", "--ignore-eos", "--json"])
            .args(options);
        command.output().unwrap()
    };
    for (options, candidates) in [(&[][..], 1), (&["--best-of", "3"][..], 3)] {
        let output = bench(&[&["--api-key", "secret"], options].concat());
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(
            (&report["requests"], &report["failed"]),
            (&json!(6), &json!(0))
        );
        assert_eq!(report["completion_tokens"], 6 * 5 * candidates);
        for row in ["time_to_first_token_s", "inter_token_s", "time_to_best_s"] {
            let (median, most) = (report[row]["p50"].as_f64(), report[row]["max"].as_f64());
            assert!(median.unwrap() > 0.0 && median <= most, "{row}: {report}");
        }
    }
    let output = bench(&["--api-key", "wrong"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("status 401"));
}
