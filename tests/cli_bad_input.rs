//! What the commands refuse: each with one clear line on standard error, nothing on standard output,
//! the right exit status, and no panic.

#[path = "support/chat_model.rs"]
mod chat_model;

use std::path::Path;
use std::time::Duration;

use assert_cmd::Command;
use assert_cmd::cargo::cargo_bin_cmd;
use chat_model::{ChatModel, VOCAB_SIZE};
use serde_json::{Value, json};

/// A command without a model of its own: none in the cache either.
fn podium(arguments: &[&str]) -> Command {
    let mut command = cargo_bin_cmd!("podium");
    command
        .args(arguments)
        .env("PODIUM_CACHE", "/nonexistent")
        .timeout(Duration::from_secs(60));
    command
}

/// The one line that a command fails with.
#[track_caller]
fn complaint(mut command: Command, status: i32) -> String {
    let output = command.assert().code(status).get_output().clone();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "");
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(message.lines().count(), 1, "{message}");
    assert!(message.starts_with("podium: "), "{message}");
    assert!(!message.contains("panic"), "{message}");
    message
}

#[track_caller]
fn refuses(command: Command, status: i32, expected: &str) {
    let message = complaint(command, status);
    assert!(
        message.contains(expected),
        "expected {expected:?} in {message:?}"
    );
}

fn with(model: &Path, arguments: &[&str]) -> Command {
    let mut command = podium(arguments);
    command.arg("--model").arg(model);
    command
}

fn with_input(model: &Path, arguments: &[&str], input: impl Into<Vec<u8>>) -> Command {
    let mut command = with(model, arguments);
    command.write_stdin(input);
    command
}

#[test]
fn models_that_are_not_there_or_broken() {
    refuses(podium(&["generate", "Hi"]), 1, "scripts/demo");
    refuses(
        with(Path::new("/nonexistent/model"), &["generate", "Hi"]),
        1,
        "/nonexistent/model",
    );
    refuses(
        with(Path::new("no-such-model"), &["generate", "Hi"]),
        1,
        "no-such-model",
    );

    let model = ChatModel::new(1);
    let weights = model.path().join("model.safetensors");
    let whole = std::fs::read(&weights).unwrap();
    for length in [0, 7, 100, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&weights, &whole[..length]).unwrap();
        refuses(
            with(model.path(), &["generate", "Hi"]),
            1,
            "model.safetensors",
        );
    }
    std::fs::write(&weights, &whole).unwrap();
    std::fs::remove_file(model.path().join("tokenizer.json")).unwrap();
    refuses(with(model.path(), &["generate", "Hi"]), 1, "tokenizer.json");
    std::fs::remove_file(&weights).unwrap();
    complaint(with(model.path(), &["generate", "Hi"]), 1);
    std::fs::remove_file(model.path().join("config.json")).unwrap();
    refuses(with(model.path(), &["generate", "Hi"]), 1, "config.json");
}

#[test]
fn models_of_another_kind() {
    let model = ChatModel::new(1);
    let path = model.path().join("config.json");
    let config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let mut other = config.clone();
    other["model_type"] = json!("mamba");
    std::fs::write(&path, other.to_string()).unwrap();
    refuses(
        with(model.path(), &["generate", "Hi"]),
        1,
        "unknown architecture \"mamba\"",
    );
    let mut other = config.clone();
    other["hidden_size"] = json!(64);
    std::fs::write(&path, other.to_string()).unwrap();
    refuses(with(model.path(), &["generate", "Hi"]), 1, "shape");
    std::fs::write(&path, "{").unwrap();
    refuses(with(model.path(), &["generate", "Hi"]), 1, "config.json");
}

#[test]
fn weights_that_are_not_numbers() {
    let model = ChatModel::new(1);
    let weights = model.path().join("model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let last = bytes.len() - 4;
    bytes[last..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&weights, bytes).unwrap();
    refuses(with(model.path(), &["generate", "Hi"]), 1, "NaN");
}

#[test]
fn numbers_that_make_no_sense() {
    let model = ChatModel::new(1);
    for (arguments, expected) in [
        (&["--n", "0"][..], "--n must be between 1 and 1024, not 0"),
        (&["--n", "1000000"], "--n must be between 1 and 1024"),
        (&["--max-tokens", "0"], "--max-tokens must be at least 1"),
        (&["--temperature", "nan"], "--temperature NaN"),
        (&["--temperature", "-1"], "--temperature -1"),
        (&["--temperature", "inf"], "--temperature inf"),
        (&["--top-p", "0"], "--top-p 0"),
        (&["--top-p", "nan"], "--top-p NaN"),
        (&["--min-p", "2"], "--min-p 2"),
        (&["--repetition-penalty", "0"], "--repetition-penalty 0"),
        (&["--stop", ""], "stop"),
        (&["--threads", "0"], "--threads must be between 1 and"),
        (
            &["--threads", "99999999"],
            "--threads must be between 1 and",
        ),
        (&["--select", "ranker"], "needs a ranker"),
    ] {
        let arguments = [&["generate", "Hi"], arguments].concat();
        refuses(with(model.path(), &arguments), 2, expected);
    }
    for arguments in [
        &["--rounds", "0"][..],
        &["--n", "0"],
        &["--steps", "0"],
        &["--steps", "9999999"],
    ] {
        let arguments = [&["bench"], arguments].concat();
        refuses(with(model.path(), &arguments), 2, arguments[1]);
    }
}

#[test]
fn values_that_are_none() {
    let layer = |layer| ["features", "x.jsonl", "-o", "y", "--layer", layer];
    for (arguments, expected) in [
        (&["generate", "Hi", "--n", "-3"][..], "'-3'"),
        (
            &["generate", "Hi", "--n", "99999999999999999999999"],
            "'99999999999999999999999'",
        ),
        (&["generate", "Hi", "--temperature", "warm"], "'warm'"),
        (
            &["generate", "Hi", "--device", "gpu"],
            "give auto, cpu, cuda, cuda:INDEX or emulate",
        ),
        (
            &["generate", "Hi", "--dtype", "bf16"],
            "in eight bits (q8, fp8)",
        ),
        (
            &["generate", "Hi", "--dtype", "fp8"],
            "--dtype fp8 is for --device cuda",
        ),
        (&layer("0"), "give a layer's number"),
        (&layer("1.5"), "give a layer's number"),
    ] {
        refuses(podium(arguments), 2, expected);
    }
}

/// What needs more than a line: usage, or the values that there are.
#[test]
fn commands_that_are_none() {
    for (arguments, expected) in [
        (
            &["generate", "Hi", "--select", "best"][..],
            "self-certainty",
        ),
        (
            &["generate", "Hi", "--raw", "--chat"],
            "cannot be used with",
        ),
        (
            &["generate", "Hi", "--input", "x.jsonl"],
            "cannot be used with",
        ),
        (&["generate", "--features", "x.safetensors"], "--input"),
        (&["features", "x.jsonl"], "--output"),
        (&["score", "x.jsonl"], "--ranker"),
        (&["paint"], "'paint'"),
        (&[], "Usage"),
    ] {
        let output = podium(arguments).assert().code(2).get_output().clone();
        let message = String::from_utf8(output.stderr).unwrap();
        assert!(
            message.contains(expected),
            "expected {expected:?} in {message:?}"
        );
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn devices_that_this_build_does_not_have() {
    let model = ChatModel::new(1);
    // With a driver or without one.
    let output = with(model.path(), &["generate", "Hi", "--device", "cuda:999"])
        .output()
        .unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        message.contains("no CUDA driver on this machine")
            || message.contains("there is no CUDA device 999"),
        "{message}"
    );
    assert_eq!(message.lines().count(), 1);
    refuses(
        with(model.path(), &["bench", "--device", "emulate"]),
        2,
        "podium bench measures the CPU",
    );
    let mut command = with(model.path(), &["generate", "Hi"]);
    command.env("PODIUM_ISA", "mmx");
    refuses(command, 2, "PODIUM_ISA=mmx: this processor runs");
}

#[test]
fn prompts_that_cannot_be_answered() {
    let model = ChatModel::new(1);
    refuses(
        with(model.path(), &["generate", ""]),
        2,
        "the prompt is empty",
    );
    refuses(
        with_input(model.path(), &["generate"], ""),
        2,
        "the prompt is empty",
    );
    refuses(
        with_input(model.path(), &["generate", "-"], "\n"),
        2,
        "the prompt is empty",
    );
    refuses(
        with_input(model.path(), &["generate"], b"\xff\xfe".to_vec()),
        1,
        "not UTF-8",
    );
    let long = "many words ".repeat(400);
    refuses(
        with(model.path(), &["generate", &long]),
        1,
        "the model's context holds 256",
    );

    std::fs::write(model.path().join("tokenizer_config.json"), "{}").unwrap();
    for option in ["--chat", "--system=S"] {
        refuses(
            with(model.path(), &["generate", "Hi", option]),
            1,
            "no chat template",
        );
    }
    let template = json!({"chat_template": "{% if"});
    std::fs::write(
        model.path().join("tokenizer_config.json"),
        template.to_string(),
    )
    .unwrap();
    refuses(
        with(model.path(), &["generate", "Hi"]),
        1,
        "--raw does without it",
    );
    with(
        model.path(),
        &["generate", "Hi", "--raw", "--max-tokens", "1"],
    )
    .assert()
    .success();
}

#[test]
fn rankers_that_are_unknown_or_for_something_else() {
    let (model, other) = (ChatModel::new(1), ChatModel::new(2));
    let generate = |ranker: &str| {
        with(
            model.path(),
            &["generate", "Hi", "--max-tokens", "2", "--ranker", ranker],
        )
    };
    refuses(generate("no-such-ranker"), 1, "no-such-ranker");
    refuses(
        generate("/no/such/file.safetensors"),
        1,
        "/no/such/file.safetensors: no such file",
    );
    let foreign = other.ranker("foreign", &[]);
    refuses(generate(foreign.to_str().unwrap()), 1, "fingerprint");
    let model_weights = model.path().join("model.safetensors");
    refuses(generate(model_weights.to_str().unwrap()), 1, "not a ranker");

    let own = model.ranker("own", &[]);
    let own = own.to_str().unwrap();
    let item = json!({"prompt": "Hi", "candidates": ["a", "b"]}).to_string();
    let score = |layer: &str| {
        with_input(
            model.path(),
            &["score", "-", "--ranker", own, "--layer", layer],
            item.clone(),
        )
    };
    refuses(score("3"), 1, "reads features taken after layer 2");
    score("2").assert().success();
    score("0.5").assert().success();

    let whole = std::fs::read(own).unwrap();
    std::fs::write(own, &whole[..whole.len() / 2]).unwrap();
    refuses(generate(own), 1, "own.ranker");
}

#[test]
fn lines_of_candidate_files() {
    let model = ChatModel::new(1);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("items.jsonl");
    let path = path.to_str().unwrap();
    let good = json!({"prompt": "Hi", "candidates": ["a"]}).to_string();
    let long: String = "many words ".repeat(400);
    for (line, expected) in [
        ("{\"prompt\":".to_string(), "not a JSON object"),
        ("[]".to_string(), "not a JSON object"),
        (json!({"candidates": ["a"]}).to_string(), "it has no prompt"),
        (json!({"prompt": "Hi"}).to_string(), "it has no candidates"),
        (
            json!({"prompt": "Hi", "candidates": "a"}).to_string(),
            "`candidates`",
        ),
        (
            json!({"prompt": long, "candidates": ["a"]}).to_string(),
            "the model's context holds 256",
        ),
        (
            json!({"prompt": "Hi", "candidates": [long]}).to_string(),
            "the model's context holds 256",
        ),
        (
            json!({"prompt_token_ids": [], "candidates": ["a"]}).to_string(),
            "the prompt is empty",
        ),
        (
            json!({"prompt_token_ids": [VOCAB_SIZE], "candidates": ["a"]}).to_string(),
            "the prompt has the token id 701, and the model's vocabulary ends at 700",
        ),
        (
            json!({"prompt": "Hi", "candidate_token_ids": [[1], [2, 4294967295u32]]}).to_string(),
            "candidate 1 has the token id 4294967295",
        ),
        (
            json!({"messages": [], "candidates": ["a"]}).to_string(),
            "at least one message",
        ),
    ] {
        std::fs::write(path, format!("{good}\n\n{line}\n{good}\n")).unwrap();
        let features = folder.path().join("f.safetensors");
        let arguments = ["features", path, "-o", features.to_str().unwrap()];
        let message = complaint(with(model.path(), &arguments), 1);
        assert!(
            message.contains("items.jsonl:3: ") && message.contains(expected),
            "{message}"
        );
        assert!(!features.exists(), "no half-written file is left");
        let scores = folder.path().join("scores.jsonl");
        let arguments = [
            "score",
            path,
            "--logprobs",
            "--output",
            scores.to_str().unwrap(),
        ];
        let message = complaint(with(model.path(), &arguments), 1);
        assert!(
            message.contains("items.jsonl:3: ") && message.contains(expected),
            "{message}"
        );
        assert!(!scores.exists());
    }
    let names: Vec<_> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(names, ["items.jsonl"], "no temporary file is left");

    // Standard input is named as such.
    let arguments = ["score", "-", "--logprobs"];
    refuses(
        with_input(model.path(), &arguments, "\nx\n"),
        1,
        "standard input:2: not a JSON object",
    );
    let arguments = ["generate", "--input", "-"];
    refuses(
        with_input(model.path(), &arguments, "{\"prompt\":\"\"}"),
        1,
        "standard input:1: ",
    );
}

#[test]
fn layers_and_files_that_are_not_there() {
    let model = ChatModel::new(1);
    let folder = tempfile::tempdir().unwrap();
    let items = folder.path().join("items.jsonl");
    let items = items.to_str().unwrap();
    std::fs::write(
        items,
        json!({"prompt": "Hi", "candidates": ["a"]}).to_string(),
    )
    .unwrap();
    let features = folder.path().join("f.safetensors");
    let features = features.to_str().unwrap();
    let layer = ["features", items, "-o", features, "--layer", "5"];
    refuses(
        with(model.path(), &layer),
        2,
        "layer 5 does not exist: the model has layers 1 to 4",
    );
    refuses(
        with(
            model.path(),
            &["features", "/no/items.jsonl", "-o", features],
        ),
        1,
        "cannot read /no/items.jsonl",
    );
    for output in ["/no/such/folder/f", folder.path().to_str().unwrap()] {
        let expected = format!("cannot write {output}");
        refuses(
            with(model.path(), &["features", items, "-o", output]),
            1,
            &expected,
        );
        refuses(
            with(model.path(), &["score", items, "--logprobs", "-o", output]),
            1,
            &expected,
        );
        refuses(
            with(model.path(), &["generate", "--input", items, "-o", output]),
            1,
            &expected,
        );
        let arguments = ["generate", "--input", items, "--features", output];
        refuses(with(model.path(), &arguments), 1, &expected);
    }
}
