//! The commands, run as a user runs them: what they print and what they write.
//!
//! `tests/cli_bad_input.rs` has what they refuse.

#[path = "support/chat_model.rs"]
mod chat_model;

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use assert_cmd::Command;
use assert_cmd::cargo::cargo_bin_cmd;
use chat_model::{ChatModel, HIDDEN_SIZE};
use podium::ranker::ExtraInput;
use safetensors::SafeTensors;
use serde_json::{Value, json};

fn podium(model: &ChatModel, arguments: &[&str]) -> Command {
    let mut command = cargo_bin_cmd!("podium");
    command.args(arguments).arg("--model").arg(model.path());
    command.timeout(Duration::from_secs(120));
    command
}

/// Standard output of a command that must succeed.
fn stdout(mut command: Command) -> String {
    let output = command.assert().success().get_output().clone();
    String::from_utf8(output.stdout).unwrap()
}

fn json_of(model: &ChatModel, arguments: &[&str]) -> Value {
    let mut command = podium(model, arguments);
    command.arg("--json");
    serde_json::from_str(&stdout(command)).unwrap()
}

fn lines(text: &str) -> Vec<Value> {
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn numbers(value: &Value) -> Vec<f64> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|number| number.as_f64().unwrap())
        .collect()
}

fn first_highest(numbers: &[f64]) -> u64 {
    let highest = numbers.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    numbers
        .iter()
        .position(|&number| number == highest)
        .unwrap() as u64
}

#[test]
fn generate_prints_the_object_of_the_contract() {
    let model = ChatModel::new(1);
    let report = json_of(
        &model,
        &[
            "generate",
            "Hello",
            "--n",
            "3",
            "--max-tokens",
            "5",
            "--seed",
            "4",
        ],
    );
    assert_eq!(report["prompt"], "Hello");
    assert_eq!(
        report["messages"],
        json!([{"role": "user", "content": "Hello"}])
    );
    assert_eq!(report["strategy"], "logprob");
    assert_eq!(report["seed"], 4);
    let candidates = report["candidates"].as_array().unwrap();
    assert_eq!(candidates.len(), 3);
    let mut tokens = 0;
    for (index, candidate) in candidates.iter().enumerate() {
        assert_eq!(candidate["index"], index);
        assert!(candidate["text"].is_string());
        assert!(candidate["score"].is_null());
        let length = candidate["token_ids"].as_array().unwrap().len();
        let reason = candidate["finish_reason"].as_str().unwrap();
        assert!(length == 5 && reason == "length" || length < 5 && reason == "stop");
        let (sum, mean) = (&candidate["cumulative_logprob"], &candidate["mean_logprob"]);
        let (sum, mean) = (sum.as_f64().unwrap(), mean.as_f64().unwrap());
        assert!(sum < 0.0 && (sum - mean * length as f64).abs() < 1e-9);
        tokens += length;
    }
    assert_eq!(report["usage"]["completion_tokens"], tokens);
    let means: Vec<f64> = candidates
        .iter()
        .map(|c| c["mean_logprob"].as_f64().unwrap())
        .collect();
    assert_eq!(report["selected"], first_highest(&means));
    for timing in ["prefill_s", "decode_s", "rank_s", "decode_tokens_per_s"] {
        assert!(
            report["timings"][timing].as_f64().unwrap() >= 0.0,
            "{timing}"
        );
    }
}

#[test]
fn a_seed_fixes_every_candidate_whatever_n_and_threads_are() {
    let model = ChatModel::new(1);
    let candidates = |n: &str, threads: &str| {
        let arguments = [
            "generate",
            "Hi",
            "--n",
            n,
            "--threads",
            threads,
            "--max-tokens",
            "12",
            "--seed",
            "9",
        ];
        json_of(&model, &arguments)["candidates"]
            .as_array()
            .unwrap()
            .clone()
    };
    let many = candidates("7", "2");
    assert_eq!(candidates("7", "1"), many);
    assert_eq!(candidates("2", "1"), many[..2]);
    let texts: std::collections::HashSet<_> = many.iter().map(|c| c["text"].to_string()).collect();
    assert!(texts.len() > 1, "candidates differ");
}

#[test]
fn the_chosen_text_alone_goes_to_standard_output() {
    let model = ChatModel::new(1);
    let arguments = [
        "generate",
        "Hi",
        "--n",
        "4",
        "--max-tokens",
        "6",
        "--seed",
        "2",
    ];
    let report = json_of(&model, &arguments);
    let chosen = &report["candidates"][report["selected"].as_u64().unwrap() as usize];
    let text = chosen["text"].as_str().unwrap();
    let output = podium(&model, &arguments)
        .assert()
        .success()
        .get_output()
        .clone();
    assert_eq!(
        String::from_utf8(output.stdout).unwrap(),
        format!("{text}\n")
    );
    let work = String::from_utf8(output.stderr).unwrap();
    assert!(
        work.contains("tokens/s") && work.contains("seed 2"),
        "{work}"
    );

    let all = stdout(podium(&model, &[&arguments[..], &["--all"]].concat()));
    for candidate in report["candidates"].as_array().unwrap() {
        assert!(all.contains(candidate["text"].as_str().unwrap()));
    }
    let marked: Vec<&str> = all
        .lines()
        .filter(|line| line.ends_with(", chosen"))
        .collect();
    assert_eq!(marked.len(), 1, "{all}");
    assert!(
        marked[0].starts_with(&format!("* [{}] ", report["selected"])),
        "{}",
        marked[0]
    );
}

#[test]
fn prompts_come_from_standard_input_too() {
    let model = ChatModel::new(1);
    let arguments = ["--n", "1", "--max-tokens", "4", "--seed", "1"];
    let expected = stdout(podium(
        &model,
        &[&["generate", "Hello"], &arguments[..]].concat(),
    ));
    for command in [&["generate"][..], &["generate", "-"]] {
        let mut piped = podium(&model, &[command, &arguments[..]].concat());
        piped.write_stdin("Hello\n");
        assert_eq!(stdout(piped), expected);
    }
}

#[test]
fn raw_prompts_have_no_template_around_them() {
    let model = ChatModel::new(1);
    let tokens = |arguments: &[&str]| {
        let base = ["generate", "Hello", "--n", "1", "--max-tokens", "1"];
        let report = json_of(&model, &[&base[..], arguments].concat());
        report["usage"]["prompt_tokens"].as_u64().unwrap()
    };
    let (raw, chat) = (tokens(&["--raw"]), tokens(&[]));
    assert!(raw < chat, "{raw} < {chat}");
    assert_eq!(tokens(&["--chat"]), chat);
    assert!(chat < tokens(&["--system", "Be brief."]));
}

#[test]
fn sampling_is_as_the_command_says_else_as_the_model_recommends() {
    let model = ChatModel::new(1);
    let temperature = |arguments: &[&str]| {
        let base = ["generate", "Hello", "--n", "1", "--max-tokens", "1", "-v"];
        let mut command = podium(&model, &[&base[..], arguments].concat());
        let output = command.assert().success().get_output().clone();
        let log = String::from_utf8(output.stderr).unwrap();
        let (_, rest) = log.split_once("temperature: ").unwrap();
        rest.split_once(',').unwrap().0.to_string()
    };
    assert_eq!(temperature(&[]), "0.9");
    assert_eq!(temperature(&["--temperature", "0.25"]), "0.25");
    let recommended = model.path().join("generation_config.json");
    for nonsense in [
        "{\"eos_token_id\": [1, 2]}",
        "{\"eos_token_id\": [1, 2], \"temperature\": 0.0}",
    ] {
        std::fs::write(&recommended, nonsense).unwrap();
        assert_eq!(temperature(&[]), "0.7");
    }
}

#[test]
fn stop_strings_cut_the_answer() {
    let model = ChatModel::new(1);
    let generate = |stop: &[&str]| {
        let base = [
            "generate",
            "Hello",
            "--n",
            "1",
            "--max-tokens",
            "20",
            "--seed",
            "1",
        ];
        json_of(&model, &[&base[..], stop].concat())["candidates"][0].clone()
    };
    let free = generate(&[]);
    let text = free["text"].as_str().unwrap();
    let (place, stop) = text.char_indices().nth(4).unwrap();
    let stop = stop.to_string();
    let place = text.find(&stop).unwrap_or(place);
    let cut = generate(&["--stop", &stop]);
    assert_eq!(cut["text"], text[..place]);
    assert_eq!(cut["finish_reason"], "stop");
}

#[test]
fn a_ranker_scores_and_chooses() {
    let model = ChatModel::new(1);
    let ranker = model.ranker("mine", &[]);
    let base = [
        "generate",
        "Hello",
        "--n",
        "5",
        "--max-tokens",
        "6",
        "--ranker",
    ];
    let arguments = [&base[..], &[ranker.to_str().unwrap()]].concat();
    let report = json_of(&model, &arguments);
    assert_eq!(report["strategy"], "ranker");
    assert_eq!(report["ranker"], "mine");
    let scores: Vec<f64> = report["candidates"]
        .as_array()
        .unwrap()
        .iter()
        .map(|candidate| candidate["score"].as_f64().unwrap())
        .collect();
    assert_eq!(report["selected"], first_highest(&scores));
    assert!(
        scores.iter().any(|score| *score != scores[0]),
        "scores differ"
    );
    let report = json_of(&model, &[&arguments[..], &["--select", "first"]].concat());
    assert_eq!(
        (&report["strategy"], &report["selected"]),
        (&json!("first"), &json!(0))
    );
}

#[test]
fn every_strategy_answers() {
    let model = ChatModel::new(1);
    for strategy in [
        "first",
        "greedy",
        "beam",
        "majority",
        "logprob",
        "self-certainty",
    ] {
        let base = [
            "generate",
            "Hello",
            "--n",
            "3",
            "--max-tokens",
            "6",
            "--select",
        ];
        let report = json_of(&model, &[&base[..], &[strategy]].concat());
        assert_eq!(report["strategy"], strategy);
        let candidates = report["candidates"].as_array().unwrap().len();
        assert!((report["selected"].as_u64().unwrap() as usize) < candidates);
    }
}

/// Tensor of a feature file, as rows.
fn feature_rows(path: &Path, name: &str) -> Vec<Vec<f32>> {
    let bytes = std::fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let numbers = tensors.tensor(name).unwrap();
    let (rows, _) = numbers.data().as_chunks::<4>();
    let numbers: Vec<f32> = rows
        .iter()
        .map(|&bytes| f32::from_le_bytes(bytes))
        .collect();
    numbers.chunks(HIDDEN_SIZE).map(<[f32]>::to_vec).collect()
}

#[test]
fn items_of_a_file_are_answered_scored_and_turned_into_features() {
    let model = ChatModel::new(1);
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let items = [
        json!({"id": "a", "prompt": "One two", "reference": "three", "labels": [1]}),
        json!({"prompt": "Red", "stop": "e", "key": {"deep": [1, null]}}),
        json!({"id": 7, "messages": [{"role": "user", "content": "Hi"}]}),
        json!({"id": "d", "prompt_token_ids": [5, 6, 7]}),
    ];
    let text: String = items.iter().map(|item| format!("{item}\n")).collect();
    std::fs::write(path("items.jsonl"), text).unwrap();
    let arguments = [
        "generate",
        "--input",
        &path("items.jsonl"),
        "--output",
        &path("candidates.jsonl"),
        "--features",
        &path("decoded.safetensors"),
        "--layer",
        "3",
        "--n",
        "4",
        "--max-tokens",
        "7",
        "--seed",
        "5",
    ];
    assert_eq!(stdout(podium(&model, &arguments)), "");
    let written = lines(&std::fs::read_to_string(path("candidates.jsonl")).unwrap());
    assert_eq!(written.len(), 4);
    assert_eq!(written[0]["reference"], "three");
    assert!(
        written[0].get("labels").is_none(),
        "labels of other candidates are gone"
    );
    assert_eq!(
        written[1]["id"], 1,
        "an item without an id is called by its number"
    );
    assert_eq!(written[1]["key"], items[1]["key"]);
    assert_eq!(written[2]["messages"], items[2]["messages"]);
    let mut seeds = std::collections::HashSet::new();
    for line in &written {
        for field in [
            "candidates",
            "candidate_token_ids",
            "mean_logprob",
            "length",
        ] {
            assert_eq!(line[field].as_array().unwrap().len(), 4, "{field}");
        }
        for field in ["cumulative_logprob", "self_certainty", "finish_reasons"] {
            assert_eq!(line[field].as_array().unwrap().len(), 4, "{field}");
        }
        seeds.insert(line["seed"].as_u64().unwrap());
    }
    assert_eq!(seeds.len(), 4);
    for text in written[1]["candidates"].as_array().unwrap() {
        assert!(!text.as_str().unwrap().contains('e'));
    }

    // The same item alone, with the seed that its line reports, gives the same candidates.
    let seed = written[0]["seed"].to_string();
    let alone = json_of(
        &model,
        &[
            "generate",
            "--raw",
            "One two",
            "--n",
            "4",
            "--max-tokens",
            "7",
            "--seed",
            &seed,
        ],
    );
    for (index, candidate) in alone["candidates"].as_array().unwrap().iter().enumerate() {
        assert_eq!(
            candidate["token_ids"],
            written[0]["candidate_token_ids"][index]
        );
    }

    // Scoring the written lines gives the log-probabilities that decoding saw.
    let scored = lines(&stdout(podium(
        &model,
        &["score", "--logprobs", &path("candidates.jsonl")],
    )));
    for (line, scored) in written.iter().zip(&scored) {
        assert_eq!(line["id"], scored["id"]);
        assert_eq!(line["candidate_token_ids"], scored["token_ids"]);
        let decoded = numbers(&line["cumulative_logprob"]);
        let logprobs = scored["token_logprobs"].as_array().unwrap();
        for (decoded, logprobs) in decoded.iter().zip(logprobs) {
            // The same float32 operations, row by row; sums of a few numbers.
            let sum: f64 = numbers(logprobs).iter().sum();
            assert!((decoded - sum).abs() < 1e-4, "{decoded} {sum}");
        }
    }

    // And features taken while decoding are those of the text.
    let output = path("given.safetensors");
    let arguments = [
        "features",
        &path("candidates.jsonl"),
        "-o",
        &output,
        "--layer",
        "0.75",
    ];
    assert_eq!(stdout(podium(&model, &arguments)), "");
    for tensor in ["prompt", "candidates"] {
        let decoded = feature_rows(Path::new(&path("decoded.safetensors")), tensor);
        let given = feature_rows(Path::new(&output), tensor);
        assert_eq!(decoded.len(), if tensor == "prompt" { 4 } else { 16 });
        assert_eq!(decoded.len(), given.len());
        for (decoded, given) in decoded.iter().zip(&given) {
            for (a, b) in decoded.iter().zip(given) {
                assert!((a - b).abs() <= 1e-5 * (1.0 + b.abs()), "{tensor}: {a} {b}");
            }
        }
    }
    let bytes = std::fs::read(&output).unwrap();
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let metadata = metadata.metadata().clone().unwrap();
    assert_eq!(
        (&*metadata["layer"], &*metadata["hidden_size"]),
        ("3", "32")
    );
}

/// Many items side by side: each as alone, in their order; those before a bad one are written.
#[test]
fn many_items_are_answered_side_by_side() {
    let model = ChatModel::new(1);
    let items: String = (0..40)
        .map(|i| format!("{{\"prompt\":\"{}\"}}\n", "One two ".repeat(1 + i % 7)))
        .collect();
    let run = |options: &[&str], input: &str| {
        let base = ["generate", "--input", "-", "--n", "9", "--seed", "5"];
        let mut command = podium(&model, &[&base[..], options].concat());
        command.write_stdin(input.to_string());
        command
    };
    for options in [
        &["--max-tokens", "11"][..],
        &["--max-tokens", "5", "--select", "beam"],
    ] {
        let together = lines(&stdout(run(options, &items)));
        assert_eq!(together.len(), 40);
        for (number, line) in together.iter().enumerate() {
            assert_eq!(line["id"], number);
            let alone = json_of(
                &model,
                &[
                    &[
                        "generate",
                        "--raw",
                        line["prompt"].as_str().unwrap(),
                        "--n",
                        "9",
                    ][..],
                    &["--seed", &line["seed"].to_string()],
                    options,
                ]
                .concat(),
            );
            let texts: Vec<&Value> = alone["candidates"]
                .as_array()
                .unwrap()
                .iter()
                .map(|candidate| &candidate["text"])
                .collect();
            assert_eq!(json!(texts), line["candidates"], "item {number}");
            if number > 4 {
                break;
            }
        }
    }
    let too_long = format!("{{\"prompt\":\"{}\"}}\n", "far too long ".repeat(2000));
    let bad = run(
        &["--max-tokens", "11"],
        &[&items[..], &too_long, &items].concat(),
    )
    .assert()
    .code(1);
    let output = bad.get_output();
    assert_eq!(lines(&String::from_utf8_lossy(&output.stdout)).len(), 40);
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(message.contains("standard input:41: "), "{message}");
}

/// Whoever waits for one answer before asking for the next gets it.
#[test]
fn items_through_a_pipe_are_answered_as_they_come() {
    use std::io::{BufRead, BufReader, Write};
    use std::process::{Command, Stdio};
    let model = ChatModel::new(1);
    let mut process = Command::new(env!("CARGO_BIN_EXE_podium"))
        .args([
            "generate",
            "--input",
            "-",
            "--n",
            "2",
            "--max-tokens",
            "3",
            "--model",
        ])
        .arg(model.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = process.stdin.take().unwrap();
    let mut answers = BufReader::new(process.stdout.take().unwrap()).lines();
    for number in 0..5 {
        writeln!(input, "{{\"prompt\":\"Number {number}\"}}").unwrap();
        let answer: Value = serde_json::from_str(&answers.next().unwrap().unwrap()).unwrap();
        assert_eq!(answer["prompt"], format!("Number {number}"));
    }
    drop(input);
    assert!(process.wait().unwrap().success());
}

#[test]
fn plain_prompts_become_chats_where_asked() {
    let model = ChatModel::new(1);
    let arguments = [
        "generate",
        "--input",
        "-",
        "--chat",
        "--system",
        "S",
        "--n",
        "1",
        "--max-tokens",
        "2",
    ];
    let mut command = podium(&model, &arguments);
    command.write_stdin("{\"prompt\":\"Hi\"}\n");
    let line = lines(&stdout(command)).remove(0);
    assert!(line.get("prompt").is_none());
    let messages = json!([{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]);
    assert_eq!(line["messages"], messages);
}

#[test]
fn score_ranks_given_candidates_as_generate_does() {
    let model = ChatModel::new(1);
    let ranker = model.ranker("both", &[ExtraInput::MeanLogprob, ExtraInput::Length]);
    let ranker = ranker.to_str().unwrap();
    let base = [
        "generate",
        "--input",
        "-",
        "--n",
        "6",
        "--max-tokens",
        "9",
        "--seed",
        "3",
    ];
    let mut command = podium(&model, &[&base[..], &["--ranker", ranker]].concat());
    command.write_stdin("{\"id\":\"x\",\"prompt\":\"Hello you\"}\n");
    let mut written = lines(&stdout(command)).remove(0);
    let score = |line: &Value| {
        let mut command = podium(&model, &["score", "-", "--ranker", ranker]);
        command.write_stdin(format!("{line}\n"));
        lines(&stdout(command)).remove(0)
    };
    let close = |scored: &Value| {
        let (given, found) = (numbers(&written["scores"]), numbers(&scored["scores"]));
        // Extra inputs are rounded on the way through text; scores are of the order of one.
        given
            .iter()
            .zip(&found)
            .all(|(given, found)| (given - found).abs() < 1e-4)
    };
    let scored = score(&written);
    assert!(close(&scored));
    assert_eq!(scored["selected"], written["selected"]);
    assert!(scored.get("token_logprobs").is_none());
    // Without them, they are computed.
    let mut bare = written.clone();
    for field in ["mean_logprob", "length"] {
        bare.as_object_mut().unwrap().remove(field);
    }
    assert!(close(&score(&bare)));
    // Given ones count: other numbers, other scores.
    written["length"] = json!([1, 9, 1, 9, 1, 9]);
    written["mean_logprob"] = json!([-9, -1, -1, -9, -5, -5]);
    let other = score(&written);
    assert_ne!(numbers(&other["scores"]), numbers(&scored["scores"]));
}

#[test]
fn commands_explain_themselves_with_examples() {
    for command in ["generate", "score", "features", "bench", "devices"] {
        let mut help = cargo_bin_cmd!("podium");
        help.args([command, "--help"]);
        let text = stdout(help);
        assert!(
            text.contains("Examples:") && text.contains(&format!("podium {command}")),
            "{text}"
        );
        assert!(
            text.lines().all(|line| line.chars().count() <= 100),
            "{text}"
        );
    }
}

#[test]
fn devices_tell_what_there_is() {
    let mut command = cargo_bin_cmd!("podium");
    command.args(["devices", "--threads", "3", "--json"]);
    let devices: Value = serde_json::from_str(&stdout(command)).unwrap();
    assert_eq!(devices["cpu"]["threads"], 3);
    let sets = devices["cpu"]["instruction_sets"].as_array().unwrap();
    assert!(sets.contains(&devices["cpu"]["instruction_set"]));
    let architectures = devices["cuda"]["architectures"].as_array().unwrap();
    assert_eq!(devices["cuda"]["built"], !architectures.is_empty());
    let mut command = cargo_bin_cmd!("podium");
    command.arg("devices");
    let text = stdout(command);
    assert!(text.contains("\ncuda     ") && text.contains("\nemulate  "));
}

#[test]
fn bench_reports_rates_and_their_share_of_the_limits() {
    let model = ChatModel::new(1);
    // Pages enough that a candidate's next one begins new memory of the cache.
    let base = [
        "bench",
        "--n",
        "1,16",
        "--prompt-tokens",
        "20",
        "--steps",
        "33",
        "--rounds",
        "1",
    ];
    let report = json_of(&model, &base);
    let limits = &report["limits"];
    for limit in ["read_gb_per_s", "copy_gb_per_s", "fma_gflop_per_s"] {
        assert!(limits[limit].as_f64().unwrap() > 0.1, "{limits}");
    }
    let decode = report["decode"].as_array().unwrap();
    assert_eq!(decode.len(), 2);
    for measured in decode.iter().chain([&report["prefill"]]) {
        let number = |name: &str| measured[name].as_f64().unwrap();
        assert!(number("tokens_per_s") > 0.0);
        let share = number("gflop_per_s") / limits["fma_gflop_per_s"].as_f64().unwrap();
        assert!((number("share_of_fma_peak") / share - 1.0).abs() < 1e-9);
        assert!(share < 1.0, "nothing is faster than the machine: {share}");
        let (matmul, attention) = ("matmul_share_of_time", "attention_share_of_time");
        assert!(number(matmul) > 0.0 && number(attention) > 0.0);
        assert!(number(matmul) + number(attention) < 1.0);
    }
    assert_eq!(report["ranker"].as_array().unwrap().len(), 3);
    let memory = |name: &str| report["memory"][name].as_u64().unwrap();
    assert!(memory("model_bytes") >= report["weight_bytes"].as_u64().unwrap());
    assert!(memory("kv_bytes") > 0);
    if cfg!(target_os = "linux") {
        assert!(memory("peak_bytes") > memory("model_bytes") + memory("kv_bytes"));
    }
    assert!(stdout(podium(&model, &base)).contains("decode, N = 16"));
}

#[cfg(unix)]
#[test]
fn a_reader_that_goes_away_ends_the_command_quietly() {
    let model = ChatModel::new(1);
    let mut child = std::process::Command::new(assert_cmd::cargo::cargo_bin!("podium"))
        .args(["generate", "Hello", "--all", "--max-tokens", "5", "--model"])
        .arg(model.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
}

#[cfg(unix)]
#[test]
fn a_signal_keeps_the_items_that_are_done() {
    use std::io::{BufRead, BufReader};
    let model = ChatModel::with_context(3, 1 << 20);
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    // The first ends with its first character, the second goes on as in the test below.
    let characters: Vec<String> = (' '..='~').map(String::from).collect();
    let chat = json!([{"role": "user", "content": "Hello"}]);
    let items = [
        json!({"prompt": "Hi", "stop": characters}),
        json!({"messages": chat}),
    ];
    std::fs::write(path("items"), format!("{}\n{}\n", items[0], items[1])).unwrap();
    for (signal, features) in [("INT", "features-int"), ("TERM", "features-term")] {
        let mut child = std::process::Command::new(assert_cmd::cargo::cargo_bin!("podium"))
            .args([
                "generate",
                "--input",
                &path("items"),
                "--features",
                &path(features),
            ])
            .args([
                "--max-tokens",
                "500000",
                "--n",
                "2",
                "--temperature",
                "0",
                "--model",
            ])
            .arg(model.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut written = BufReader::new(child.stdout.take().unwrap()).lines();
        let first: Value = serde_json::from_str(&written.next().unwrap().unwrap()).unwrap();
        assert_eq!(first["candidates"].as_array().unwrap().len(), 2);
        send(signal, &child);
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(
            message,
            "podium: interrupted: wrote the first 1 of 2 items\n"
        );
        assert!(written.next().is_none());
        assert_eq!(
            feature_rows(Path::new(&path(features)), "candidates").len(),
            2
        );
    }
    // No temporary file is left.
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 3);
}

#[cfg(unix)]
fn send(signal: &str, child: &std::process::Child) {
    let process = child.id().to_string();
    let sent = std::process::Command::new("kill")
        .args(["-s", signal, &process])
        .status();
    assert!(sent.unwrap().success());
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_with_the_texts_so_far() {
    use std::io::{BufRead, BufReader};
    // More tokens than anybody waits for.
    let model = ChatModel::with_context(3, 1 << 20);
    let mut child = std::process::Command::new(assert_cmd::cargo::cargo_bin!("podium"))
        .args([
            "generate",
            "Hello",
            "--max-tokens",
            "500000",
            "--n",
            "2",
            // The most probable tokens of this model go round in a circle without an end token.
            "--temperature",
            "0",
            "-v",
            "--json",
            "--model",
        ])
        .arg(model.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut messages = BufReader::new(child.stderr.take().unwrap()).lines();
    // Said right before Ctrl-C is caught.
    while !messages.next().unwrap().unwrap().contains("prompt tokens") {}
    std::thread::sleep(Duration::from_millis(500));
    send("INT", &child);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let last = messages.last().unwrap().unwrap();
    assert_eq!(last, "podium: interrupted: these are the texts so far");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let candidate = &report["candidates"][0];
    assert!(candidate["token_ids"].as_array().unwrap().len() < 500_000);
}
