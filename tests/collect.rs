//! `podium collect`, run as a user runs it, with a tiny random model.

#[allow(dead_code, reason = "rankers are for other tests")]
#[path = "support/chat_model.rs"]
mod chat_model;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command as Process, Stdio};
use std::time::{Duration, Instant};

use assert_cmd::Command;
use assert_cmd::cargo::cargo_bin_cmd;
use chat_model::{ChatModel, HIDDEN_SIZE, LAYERS};
use podium::tasks::collection::{Collection, FeatureDtype};
use predicates::prelude::*;
use predicates::str::contains;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Shards of about four items.
const SHARD_BYTES: &str = "2000";

struct Task {
    model: ChatModel,
    folder: TempDir,
}

impl Task {
    /// Items whose answers a random model sometimes gives by chance: one of the letters that it may
    /// begin with.
    fn new(items: usize) -> Task {
        let task = Task {
            model: ChatModel::new(1),
            folder: tempfile::tempdir().unwrap(),
        };
        let line = |i: usize| {
            json!({"id": format!("i{i}"), "key": format!("k{i}"), "task": "letters",
                "prompt": format!("Question {i}:"), "reference": ["a", "b", "e"], "stop": " "})
        };
        task.data("data.jsonl", (0..items).map(line));
        task
    }

    fn data(&self, name: &str, lines: impl Iterator<Item = Value>) -> PathBuf {
        let text: String = lines.map(|line| format!("{line}\n")).collect();
        fs::write(self.path(name), text).unwrap();
        self.path(name)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn arguments(&self, output: &str) -> Vec<String> {
        let path = |name: &str| self.path(name).display().to_string();
        [
            "collect",
            "--task",
            "exact",
            "--data",
            &path("data.jsonl"),
            "-o",
            &path(output),
            "--n",
            "3",
            "--max-tokens",
            "6",
            "--threads",
            "2",
            "--layers",
            "2,0.75",
            "--model",
            &self.model.path().display().to_string(),
        ]
        .map(str::to_string)
        .to_vec()
    }

    fn command(&self, output: &str) -> Command {
        let mut command = cargo_bin_cmd!("podium");
        command.args(self.arguments(output));
        command.env("PODIUM_SHARD_BYTES", SHARD_BYTES);
        command.timeout(Duration::from_secs(120));
        command
    }
}

fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    for place in [folder.to_path_buf(), folder.join("features")] {
        for entry in fs::read_dir(place).unwrap().flatten() {
            if entry.path().is_file() {
                let name = entry.file_name().into_string().unwrap();
                files.insert(name, fs::read(entry.path()).unwrap());
            }
        }
    }
    files
}

/// The same files with the same bytes.
fn assert_same(found: &BTreeMap<String, Vec<u8>>, expected: &BTreeMap<String, Vec<u8>>) {
    let names = |files: &BTreeMap<String, Vec<u8>>| files.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(found), names(expected));
    for (name, bytes) in expected {
        assert!(found[name] == *bytes, "{name} differs");
    }
}

fn lines(folder: &Path) -> Vec<Value> {
    let text = fs::read_to_string(folder.join("candidates.jsonl")).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn a_collection_holds_what_generate_writes() {
    let task = Task::new(7);
    task.command("out")
        .arg("--greedy")
        .assert()
        .success()
        .stdout(contains("7 items, 21 candidates"));
    let collection = Collection::open(&task.path("out")).unwrap();
    let info = &collection.info;
    assert_eq!(
        (info.task.as_str(), info.items, info.n),
        ("letters", 7, Some(3))
    );
    assert_eq!((info.layers, info.hidden_size), (LAYERS, HIDDEN_SIZE));
    assert_eq!(info.feature_layers, [2, 3]);
    assert_eq!(info.dtype, FeatureDtype::Bf16);
    assert_eq!(info.sampling["max_tokens"], 6);
    assert_eq!(info.verifier.as_deref(), Some("exact"));

    // The same candidates and float32 features by the command that has nothing to do with tasks.
    let mut generate = cargo_bin_cmd!("podium");
    let path = |name: &str| task.path(name).display().to_string();
    generate.args([
        "generate",
        "--input",
        &path("data.jsonl"),
        "--output",
        &path("g.jsonl"),
        "--n",
        "3",
        "--max-tokens",
        "6",
        "--seed",
        "0",
        "--features",
        &path("g.safetensors"),
        "--layer",
        "2",
        "--model",
        &task.model.path().display().to_string(),
    ]);
    generate.assert().success();
    let generated = fs::read_to_string(task.path("g.jsonl")).unwrap();
    let features = fs::read(task.path("g.safetensors")).unwrap();
    let features = safetensors::SafeTensors::deserialize(&features).unwrap();
    let floats = |name: &str| -> Vec<f32> {
        let data = features.tensor(name).unwrap();
        data.data()
            .as_chunks()
            .0
            .iter()
            .map(|&b| f32::from_le_bytes(b))
            .collect()
    };
    let (prompts, candidates) = (floats("prompt"), floats("candidates"));
    let layer = collection.layer(2).unwrap();
    let mut row = 0;
    for (number, (line, expected)) in lines(&task.path("out"))
        .iter()
        .zip(generated.lines())
        .enumerate()
    {
        let expected: Value = serde_json::from_str(expected).unwrap();
        for field in [
            "id",
            "prompt",
            "candidates",
            "candidate_token_ids",
            "mean_logprob",
            "seed",
            "length",
        ] {
            assert_eq!(line[field], expected[field], "{field}");
        }
        let item = &collection.items()[number];
        assert_eq!(item.key, format!("k{number}"));
        for (k, text) in line["candidates"].as_array().unwrap().iter().enumerate() {
            let answer = text
                .as_str()
                .unwrap()
                .trim()
                .trim_end_matches('.')
                .to_lowercase();
            assert_eq!(
                item.labels[k] == 1.0,
                ["a", "b", "e"].contains(&&answer[..])
            );
        }
        assert!(line["greedy"]["text"].is_string() && line["greedy"]["label"].is_number());
        // bf16 keeps 8 significant bits.
        let close = |stored: &[f32], exact: &[f32]| {
            let pairs = stored.iter().zip(exact);
            pairs.for_each(|(s, e)| assert!((s - e).abs() <= e.abs() / 256.0, "{s} {e}"));
        };
        close(
            &layer.prompt(number).to_vec(),
            &prompts[number * HIDDEN_SIZE..][..HIDDEN_SIZE],
        );
        let n = item.labels.len();
        close(
            &layer.candidates(number).to_vec(),
            &candidates[row * HIDDEN_SIZE..][..n * HIDDEN_SIZE],
        );
        row += n;
    }
}

#[test]
fn candidates_from_elsewhere_keep_their_labels() {
    let task = Task::new(1);
    task.data(
        "data.jsonl",
        [
            json!({"prompt": "p", "candidates": ["x", "yy", ""], "labels": [0.5, 1, 0], "length": [1, 2, 0]}),
            json!({"prompt": "q", "candidate_token_ids": [[5, 6]], "labels": [1]}),
        ]
        .into_iter(),
    );
    let arguments = task.arguments("out").into_iter();
    let arguments = arguments.map(|a| if a == "exact" { "labels".into() } else { a });
    let mut command = cargo_bin_cmd!("podium");
    command
        .args(arguments)
        .args(["--feature-dtype", "f32"])
        .assert()
        .success();
    let collection = Collection::open(&task.path("out")).unwrap();
    assert_eq!(collection.info.n, None);
    assert_eq!(collection.items()[0].labels, [0.5, 1.0, 0.0]);
    assert_eq!(collection.items()[0].length, Some(vec![1.0, 2.0, 0.0]));
    let means = collection.items()[0].mean_logprob.clone().unwrap();
    assert!(
        means[0] < 0.0 && means[1] < 0.0 && means[2] == 0.0,
        "{means:?}"
    );
    // An empty candidate ends where its prompt does.
    let layer = collection.layer(3).unwrap();
    assert_eq!(
        layer.candidates(0).row(2).to_vec(),
        layer.prompt(0).to_vec()
    );
    assert_ne!(
        layer.candidates(0).row(0).to_vec(),
        layer.prompt(0).to_vec()
    );
    assert_eq!(collection.items()[1].labels, [1.0]);
    assert_eq!(collection.texts(1).unwrap().len(), 1);
}

/// Candidates of other programs: RewardBench 2's and search-and-learn's lines, evalplus's samples.
#[test]
fn candidates_in_other_forms_are_read() {
    let task = Task::new(1);
    let run = |kind: &str, output: &str, more: &[String]| {
        let mut arguments = task.arguments(output);
        arguments[2] = kind.to_string();
        cargo_bin_cmd!("podium").args(arguments).args(more).assert()
    };
    let texts = |output: &str| lines(&task.path(output))[0]["candidates"].clone();
    let labels = |output: &str| {
        let collection = Collection::open(&task.path(output)).unwrap();
        collection.items()[0].labels.clone()
    };
    let bench = json!({"id": "7", "prompt": "p", "chosen": ["good"], "rejected": ["bad", "worse"],
        "subset": "Math", "num_correct": 1});
    task.data("data.jsonl", [bench].into_iter());
    run("labels", "bench", &[]).success();
    assert_eq!(texts("bench"), json!(["good", "bad", "worse"]));
    assert_eq!(labels("bench"), [1.0, 0.0, 0.0]);

    let learn = json!({"problem": "1 + 2?", "answer": "3", "completions": ["is 3", "is 4"]});
    task.data("data.jsonl", [learn].into_iter());
    run("math", "learn", &[]).success();
    assert_eq!(labels("learn"), [1.0, 0.0]);

    let problem = json!({"task_id": "T/0", "prompt": "def f():\n", "entry_point": "f",
        "test": "def check(f): assert f() == 1", "reference": "1"});
    task.data("data.jsonl", [problem].into_iter());
    let samples = [
        json!({"task_id": "T/0", "completion": "    return 1\n"}),
        json!({"task_id": "T/0", "solution": "def f():\n    return 2\n"}),
    ];
    let samples = task.data("samples.jsonl", samples.into_iter());
    let samples = ["--samples".to_string(), samples.display().to_string()];
    run("exact", "plus", &samples).success();
    assert_eq!(texts("plus"), json!(["    return 1\n", "    return 2\n"]));
    task.data(
        "samples.jsonl",
        [json!({"task_id": "T/1", "completion": "x"})].into_iter(),
    );
    run("exact", "none", &samples)
        .failure()
        .stderr(contains("data.jsonl:1:").and(contains("has no sample of T/0")));
    fs::write(task.path("samples.jsonl"), "{}\n").unwrap();
    run("exact", "none", &samples)
        .failure()
        .stderr(contains("samples.jsonl:1: it has no `task_id`"));
}

#[test]
fn an_external_command_verifies() {
    let task = Task::new(3);
    let arguments = task
        .arguments("out")
        .into_iter()
        .map(|a| if a == "exact" { "command".into() } else { a });
    let mut command = cargo_bin_cmd!("podium");
    command.args(arguments);
    command.args(["--verifier", "while read -r line; do case \"$line\" in *'\"key\":\"k1\"'*) echo 0.5;; *) echo no;; esac; done"]);
    command.assert().success();
    let collection = Collection::open(&task.path("out")).unwrap();
    let labels: Vec<&[f32]> = collection
        .items()
        .iter()
        .map(|item| &item.labels[..])
        .collect();
    assert_eq!(labels, [[0.0; 3], [0.5; 3], [0.0; 3]]);
}

#[test]
fn bad_input_is_refused_in_one_line() {
    let task = Task::new(3);
    let refused = |mut command: Command, expected: &str| {
        let one_line = predicate::function(|text: &str| text.trim_end().lines().count() == 1);
        command
            .assert()
            .failure()
            .stderr(contains(expected.to_string()).and(one_line));
    };
    task.command("train").assert().success();
    // Items that were trained on.
    let mut command = task.command("test");
    command.arg("--disjoint-from").arg(task.path("train"));
    refused(command, "data.jsonl:1: the item \"k0\" is in");
    assert!(!task.path("test").exists());
    // Other settings.
    let mut command = task.command("train");
    command.args(["--seed", "5"]);
    refused(
        command,
        "was begun with seed 0, and now it is 5: give the same options",
    );
    // A folder of other files.
    fs::create_dir(task.path("other")).unwrap();
    fs::write(task.path("other/notes"), "").unwrap();
    refused(task.command("other"), "holds other files");
    // Layers.
    let mut command = task.command("new");
    command.args(["--layers", "5"]);
    assert!(command.assert().failure().get_output().stdout.is_empty());
    // Lines.
    let good = json!({"prompt": "p", "reference": "a"});
    for (line, expected) in [
        ("{", "data.jsonl:2: not a JSON object"),
        ("{\"prompt\":\"p\"}", "data.jsonl:2: it has no right answer"),
        ("{\"reference\":\"p\"}", "data.jsonl:2: it has no prompt"),
        (
            "{\"prompt\":\"p\",\"reference\":{}}",
            "data.jsonl:2: the right answer must be",
        ),
    ] {
        fs::write(task.path("data.jsonl"), format!("{good}\n{line}\n")).unwrap();
        refused(task.command("new"), expected);
    }
    fs::remove_file(task.path("data.jsonl")).unwrap();
    refused(task.command("new"), "cannot read");
    assert!(!task.path("new").exists());
}

/// Kills the command at many random moments; between two of them nothing that was whole is lost, and
/// what comes of it in the end is what an undisturbed run makes. `PODIUM_KILLS` says how many.
#[test]
fn killed_at_any_moment_it_ends_with_the_same_files() {
    let kills: usize = std::env::var("PODIUM_KILLS")
        .ok()
        .and_then(|k| k.parse().ok())
        .unwrap_or(40);
    let task = Task::new(24);
    let started = Instant::now();
    task.command("undisturbed").assert().success();
    let whole_run = started.elapsed();
    let expected = files(&task.path("undisturbed"));
    assert!(expected.len() > 5, "several shards");

    let output = task.path("out");
    let (mut killed, mut finished, mut before) = (0, 0, 0);
    while killed < kills {
        let mut child = Process::new(assert_cmd::cargo::cargo_bin!("podium"))
            .args(task.arguments("out"))
            .env("PODIUM_SHARD_BYTES", SHARD_BYTES)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let moment = podium::backend::random::uniform(1, killed as u32, finished);
        std::thread::sleep(whole_run.mul_f32(moment));
        let ended = child.try_wait().unwrap();
        child.kill().unwrap();
        let result = child.wait_with_output().unwrap();
        let complaint = String::from_utf8_lossy(&result.stderr).into_owned();
        match ended {
            Some(status) => {
                assert!(status.success(), "{complaint}");
                finished += 1;
                assert_same(&files(&output), &expected);
                fs::remove_dir_all(&output).unwrap();
                before = 0;
            }
            None => {
                killed += 1;
                let text = fs::read_to_string(output.join("candidates.jsonl")).unwrap_or_default();
                let items = text.matches('\n').count();
                assert!(items >= before, "{items} items after {before}");
                before = items;
            }
        }
    }
    task.command("out").assert().success();
    assert_same(&files(&output), &expected);
    eprintln!(
        "killed {killed} times, came to the end {} times",
        finished + 1
    );
}

/// A full disk: the message names it, and what was whole is gone on with.
#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_keeps_what_was_whole() {
    let task = Task::new(12);
    task.command("undisturbed").assert().success();
    // Files that cannot grow stand for a disk that cannot hold them: 4 KiB each.
    let mut full = Command::new("sh");
    full.args(["-c", "trap '' XFSZ; ulimit -f 8; exec \"$@\"", "sh"]);
    full.arg(assert_cmd::cargo::cargo_bin!("podium"));
    full.args(task.arguments("out"));
    full.env("PODIUM_SHARD_BYTES", SHARD_BYTES);
    full.timeout(Duration::from_secs(120));
    full.assert().failure().stderr(contains("cannot write"));
    let text = fs::read_to_string(task.path("out/candidates.jsonl")).unwrap();
    assert!(text.contains('\n'), "some items are whole");
    task.command("out").assert().success();
    assert_same(&files(&task.path("out")), &files(&task.path("undisturbed")));
}
