//! `podium train` and `podium eval`, run as a user runs them, on collections in which a direction of
//! the features says what is right.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use assert_cmd::Command;
use assert_cmd::cargo::cargo_bin_cmd;
use podium::ranker::{Ranker, RankerKind};
use podium::tasks::collection::{CollectionInfo, CollectionWriter, FeatureDtype};
use serde_json::{Value, json};

const HIDDEN_SIZE: usize = 24;
const N: usize = 12;

/// SplitMix64, in -1..1.
fn number(state: &mut u64) -> f32 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 40) as f32 / (1 << 23) as f32 - 1.0
}

/// A collection of layers 2 and 3; only layer 2 knows anything. Items are called `first`, `first + 1`, …
fn collection(folder: &Path, first: usize, items: usize, dtype: FeatureDtype) {
    let info = CollectionInfo {
        format: 1,
        task: "planted".into(),
        model: "a model".into(),
        fingerprint: "0123".into(),
        layers: 4,
        hidden_size: HIDDEN_SIZE,
        feature_layers: vec![2, 3],
        dtype,
        items,
        n: Some(N),
        seed: Some(0),
        sampling: Default::default(),
        data: "planted.jsonl".into(),
        data_sha256: None,
        verifier: None,
    };
    let mut writer = CollectionWriter::open(folder, info).unwrap();
    for item in first..first + items {
        let mut state = item as u64 * 1_000_003;
        let mut row = || -> Vec<f32> { (0..HIDDEN_SIZE).map(|_| number(&mut state)).collect() };
        let labels: Vec<usize> = (0..N)
            .map(|i| usize::from((i * 7 + item) % 5 == 0))
            .collect();
        let prompt = [row(), row()];
        let candidates: Vec<[Vec<f32>; 2]> = labels
            .iter()
            .map(|&label| {
                let (mut known, other) = (row(), row());
                known[0] += 1.5 * label as f32;
                known[1] -= 1.5 * label as f32;
                [known, other]
            })
            .collect();
        let rows: Vec<&[Vec<f32>]> = candidates.iter().map(|rows| &rows[..]).collect();
        let line = json!({
            "id": format!("item {item}"),
            "key": format!("key {item}"),
            "prompt": "Which?",
            "candidates": labels.iter().map(|label| format!("answer {label}")).collect::<Vec<_>>(),
            "answers": (0..N).map(|i| format!("{}", i % 4)).collect::<Vec<_>>(),
            "labels": labels,
            "mean_logprob": (0..N).map(|i| -0.1 * i as f32).collect::<Vec<_>>(),
        });
        writer
            .push(line.as_object().unwrap(), &prompt, &rows)
            .unwrap();
    }
    writer.finish().unwrap();
}

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Folder {
        let folder = Folder(tempfile::tempdir().unwrap());
        collection(&folder.path("train"), 0, 120, FeatureDtype::Bf16);
        collection(&folder.path("test"), 1000, 60, FeatureDtype::F32);
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// `podium` in this folder.
    fn podium(&self, arguments: &[&str]) -> Command {
        let mut command = cargo_bin_cmd!("podium");
        command
            .current_dir(&self.0)
            .args(arguments)
            .timeout(Duration::from_secs(120));
        command
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let output = self
            .podium(arguments)
            .arg("--json")
            .assert()
            .success()
            .get_output()
            .clone();
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn refusal(&self, arguments: &[&str], status: i32) -> String {
        let output = self
            .podium(arguments)
            .assert()
            .code(status)
            .get_output()
            .clone();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(text.lines().count(), 1, "{text}");
        text
    }
}

/// Accuracy of a strategy at the largest N.
fn accuracy(evaluation: &Value, strategy: &str) -> f64 {
    let curves = evaluation["collections"][0]["curves"].as_array().unwrap();
    let curve = curves
        .iter()
        .find(|curve| curve["strategy"] == strategy)
        .unwrap();
    curve["accuracy"]
        .as_array()
        .unwrap()
        .last()
        .unwrap()
        .as_f64()
        .unwrap()
}

#[test]
fn a_ranker_is_trained_and_measured() {
    let folder = Folder::new();
    for kind in ["pointwise", "listwise", "linear"] {
        let file = format!("{kind}.safetensors");
        let options = [
            "train",
            "train",
            "-o",
            &file,
            "--kind",
            kind,
            "--layer",
            "2",
            "--learning-rate",
            "0.005",
            "--dropout",
            "0.1",
        ];
        let trained = folder.json(&[&options[..], &["--plot", "loss.svg"]].concat());
        assert_eq!(
            (&trained["kind"], &trained["layer"]),
            (&json!(kind), &json!(2))
        );
        assert_eq!(trained["held_out_items"], 18);
        assert!(folder.path("loss.svg").exists());
        let ranker = Ranker::load(&folder.path(&file)).unwrap();
        assert_eq!(ranker.config().task.as_deref(), Some("planted"));
        assert_eq!(ranker.config().training["seed"], 0);

        let measured = folder.json(&[
            "eval", "test", "--ranker", &file, "--train", "train", "--plot", "n.png",
        ]);
        let of = |strategy: &str| accuracy(&measured, strategy);
        // A fifth are right; the planted direction stands far out.
        assert!(of(kind) > 0.5, "{kind}: {}", of(kind));
        assert_eq!(of("oracle"), 1.0);
        assert!(of("first") < 0.25 && of("majority") < 0.5);
        assert!(of("mean log-probability") < 0.5 && of("answer prior") < 0.5);
        assert!(folder.path("n.png").exists());
        let gains = measured["collections"][0]["gains"].as_array().unwrap();
        assert_eq!(
            gains.len(),
            4,
            "no gain over the oracle or over itself: {gains:?}"
        );
        for gain in gains {
            assert_eq!(gain["ranker"], kind);
            let last = |field: &str| gain[field].as_array().unwrap().last().unwrap().as_f64();
            let [by, low, high] = ["gain", "low", "high"].map(|field| last(field).unwrap());
            assert!((by - (of(kind) - of(gain["over"].as_str().unwrap()))).abs() < 1e-9);
            assert!(0.0 < low && low < by && by < high, "{gain}");
        }
    }
    let measured = folder.json(&[
        "eval",
        "test",
        "test",
        "--ranker",
        "pointwise.safetensors",
        "linear.safetensors",
    ]);
    let transfer = &measured["transfer"];
    assert_eq!(transfer["n"], N);
    assert_eq!(transfer["rankers"]["linear"].as_array().unwrap().len(), 2);
}

/// What `eval` writes for other programs is what `collect` reads of theirs.
#[test]
fn candidates_are_written_in_other_forms() {
    let folder = Folder::new();
    let train = ["train", "train", "-o", "r.safetensors", "--epochs", "2"];
    folder.podium(&train).assert().success();
    let lines = |form: &str| -> Vec<Value> {
        let export = format!("{form}=out.jsonl");
        let arguments = [
            "eval",
            "test",
            "--ranker",
            "r.safetensors",
            "--export",
            &export,
        ];
        folder.podium(&arguments).assert().success();
        let text = std::fs::read_to_string(folder.path("out.jsonl")).unwrap();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    };
    let learn = lines("search-and-learn");
    assert_eq!(learn.len(), 60);
    let scores: Vec<f64> = serde_json::from_value(learn[0]["agg_scores"].clone()).unwrap();
    assert_eq!(scores.len(), N);
    let best = (0..N)
        .max_by(|&a, &b| scores[a].total_cmp(&scores[b]))
        .unwrap();
    assert_eq!(learn[0]["pred"], learn[0]["completions"][best]);
    assert_eq!(learn[0]["scores"][best], json!([scores[best]]));

    let bench = lines("reward-bench");
    let count = |line: &Value, name: &str| line[name].as_array().unwrap().len();
    for line in &bench {
        assert_eq!(count(line, "chosen") + count(line, "rejected"), N);
        assert_eq!(line["num_correct"], count(line, "chosen"));
        assert!(
            line["chosen"]
                .as_array()
                .unwrap()
                .iter()
                .all(|text| text == "answer 1")
        );
        assert_eq!(count(line, "scores"), N);
    }
    let export = ["eval", "test", "--export", "evalplus=out.jsonl"];
    let text = folder.refusal(&export, 1);
    assert!(
        text.contains("test, item \"item 1000\": it has no `task_id`"),
        "{text}"
    );
    let export = ["eval", "test", "--export", "csv=out.csv"];
    folder.podium(&export).assert().code(2);
}

/// Changes the lines of a collection; items count from 0.
fn change_lines(folder: &Path, change: impl Fn(usize, &mut Value)) {
    let path = folder.join("candidates.jsonl");
    let text = std::fs::read_to_string(&path).unwrap();
    let changed: String = text
        .lines()
        .enumerate()
        .map(|(item, line)| {
            let mut line = serde_json::from_str(line).unwrap();
            change(item, &mut line);
            format!("{line}\n")
        })
        .collect();
    std::fs::write(path, changed).unwrap();
}

#[test]
fn samples_for_evalplus_have_its_task_and_every_candidate() {
    let folder = Folder::new();
    change_lines(&folder.path("test"), |item, line| {
        line["task_id"] = json!(format!("HumanEval/{item}"));
    });
    let export = ["eval", "test", "--export", "evalplus=out.jsonl"];
    folder.podium(&export).assert().success();
    let samples = std::fs::read_to_string(folder.path("out.jsonl")).unwrap();
    let samples: Vec<Value> = samples
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let lines = std::fs::read_to_string(folder.path("test/candidates.jsonl")).unwrap();
    let mut expected = Vec::new();
    for (item, line) in lines.lines().enumerate() {
        let line: Value = serde_json::from_str(line).unwrap();
        for text in line["candidates"].as_array().unwrap() {
            expected.push(json!({"task_id": format!("HumanEval/{item}"), "completion": text}));
        }
    }
    assert_eq!(expected.len(), 60 * N);
    assert_eq!(samples, expected);
}

#[test]
fn the_greedy_answer_is_measured_where_every_item_has_it() {
    let folder = Folder::new();
    let right = |item: usize| f64::from(u8::from(item.is_multiple_of(3)));
    change_lines(&folder.path("test"), |item, line| {
        line["greedy"] = json!({"text": "answer", "label": right(item)});
    });
    let measured = folder.json(&["eval", "test"]);
    assert_eq!(accuracy(&measured, "greedy"), 20.0 / 60.0);
    change_lines(&folder.path("test"), |item, line| {
        if item == 7 {
            line.as_object_mut().unwrap().remove("greedy");
        }
    });
    let measured = folder.json(&["eval", "test"]);
    let curves = measured["collections"][0]["curves"].as_array().unwrap();
    assert!(curves.iter().all(|curve| curve["strategy"] != "greedy"));
}

#[test]
fn items_of_training_are_not_measured() {
    let folder = Folder::new();
    collection(&folder.path("mixed"), 1050, 20, FeatureDtype::F32);
    let measured = folder.json(&["eval", "mixed", "--train", "test"]);
    let measured = &measured["collections"][0];
    assert_eq!(
        (&measured["items"], &measured["seen_in_training"]),
        (&json!(10), &json!(10))
    );
    let refusal = folder.refusal(&["eval", "train", "--train", "train"], 1);
    assert!(
        refusal.contains("every one of its 120 items occurs in the training"),
        "{refusal}"
    );
}

#[test]
fn a_sweep_keeps_the_best() {
    let folder = Folder::new();
    let trained = folder.json(&[
        "train",
        "train",
        "-o",
        "best.safetensors",
        "--epochs",
        "12",
        "--learning-rate",
        "0.005",
        "--sweep",
        "layer=3,2",
        "projection-width=16,32",
    ]);
    assert_eq!(trained["runs"].as_array().unwrap().len(), 4);
    assert_eq!(trained["layer"], 2, "the other layer is noise");
    let left: Vec<_> = std::fs::read_dir(folder.path(""))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.contains("checkpoint"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_ranker_goes_on_with_new_data() {
    let folder = Folder::new();
    let train = |more: &[&str]| {
        folder.json(
            &[
                &[
                    "train",
                    "train",
                    "--epochs",
                    "8",
                    "--learning-rate",
                    "0.005",
                ],
                more,
            ]
            .concat(),
        )
    };
    train(&["--layer", "2", "--kind", "listwise", "-o", "a.safetensors"]);
    train(&["--init", "a.safetensors", "-o", "b.safetensors"]);
    let [a, b] =
        ["a.safetensors", "b.safetensors"].map(|file| Ranker::load(&folder.path(file)).unwrap());
    assert_eq!(b.config().kind, RankerKind::Listwise);
    assert_eq!(b.config().layer, 2);
    assert_eq!(
        a.tensors()["normalization.candidate.mean"],
        b.tensors()["normalization.candidate.mean"]
    );
    assert_ne!(
        a.tensors()["projection.weight"],
        b.tensors()["projection.weight"]
    );
    folder
        .podium(&[
            "train",
            "train",
            "--init",
            "a.safetensors",
            "--kind",
            "linear",
            "-o",
            "c.safetensors",
        ])
        .assert()
        .code(2);
}

/// Killed again and again without a warning, a run that is resumed ends with the bytes of one that
/// was left alone. `PODIUM_KILLS` says how often.
#[test]
fn killed_at_any_moment_it_ends_with_the_same_file() {
    let folder = Folder::new();
    let arguments = |output: &'static str| {
        [
            "train",
            "train",
            "-o",
            output,
            "--name",
            "r",
            "--kind",
            "listwise",
            "--epochs",
            "150",
            "--patience",
            "150",
            "--sweep",
            "layer=2,3",
        ]
    };
    folder
        .podium(&arguments("whole.safetensors"))
        .assert()
        .success();
    let kills = std::env::var("PODIUM_KILLS");
    let kills = kills.ok().and_then(|k| k.parse().ok()).unwrap_or(12);
    let mut state = 7;
    let (mut killed, mut ended, mut had_checkpoint) = (0, 0, 0);
    while killed < kills {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_podium"));
        command
            .current_dir(&folder.0)
            .args(arguments("killed.safetensors"))
            .arg("--resume");
        let mut child = command
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let wait = 20.0 + 180.0 * (1.0 + number(&mut state));
        std::thread::sleep(Duration::from_millis(wait as u64));
        let result = child.try_wait().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        if let Some(status) = result {
            assert!(status.success());
            ended += 1;
            let files = ["whole.safetensors", "killed.safetensors"];
            let [whole, killed] = files.map(|file| std::fs::read(folder.path(file)).unwrap());
            assert!(whole == killed);
            std::fs::remove_file(folder.path("killed.safetensors")).unwrap();
            continue;
        }
        killed += 1;
        had_checkpoint += usize::from(folder.path("killed.safetensors.checkpoint-0").exists());
    }
    assert!(had_checkpoint > 0, "no run came as far as a checkpoint");
    eprintln!(
        "killed {killed} times, {had_checkpoint} behind a checkpoint, came to the end {ended} times before"
    );
    folder
        .podium(&arguments("killed.safetensors"))
        .arg("--resume")
        .assert()
        .success();
    let [whole, killed] = ["whole.safetensors", "killed.safetensors"]
        .map(|file| std::fs::read(folder.path(file)).unwrap());
    assert!(whole == killed);
}

/// A full disk: the message names it, the last checkpoint stays as it was, and is gone on from.
#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_keeps_the_last_checkpoint() {
    let folder = Folder::new();
    let arguments = |output: &'static str| {
        let long = ["--epochs", "100", "--patience", "100", "--name", "r"];
        [&["train", "train", "-o", output][..], &long].concat()
    };
    folder
        .podium(&arguments("whole.safetensors"))
        .assert()
        .success();

    let checkpoint = folder.path("full.safetensors.checkpoint-0");
    let mut started = std::process::Command::new(env!("CARGO_BIN_EXE_podium"))
        .current_dir(&folder.0)
        .args(arguments("full.safetensors"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    while !checkpoint.exists() && started.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_millis(1));
    }
    started.kill().unwrap();
    started.wait().unwrap();
    let good = std::fs::read(&checkpoint).unwrap();
    assert!(good.len() > 4096);

    // Files that cannot grow stand for a disk that cannot hold them: 4 KiB each.
    let mut full = Command::new("sh");
    full.args(["-c", "trap '' XFSZ; ulimit -f 8; exec \"$@\"", "sh"]);
    full.current_dir(&folder.0)
        .arg(env!("CARGO_BIN_EXE_podium"))
        .args(arguments("full.safetensors"))
        .arg("--resume")
        .timeout(Duration::from_secs(120));
    let output = full.assert().code(1).get_output().clone();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("cannot write"), "{said}");
    assert!(said.contains("full.safetensors.checkpoint-0"), "{said}");
    assert!(std::fs::read(&checkpoint).unwrap() == good);
    let left = |entry: std::io::Result<std::fs::DirEntry>| entry.unwrap().file_name();
    let mut left: Vec<_> = std::fs::read_dir(folder.path(""))
        .unwrap()
        .map(left)
        .collect();
    left.sort();
    assert_eq!(
        left,
        [
            "full.safetensors.checkpoint-0",
            "test",
            "train",
            "whole.safetensors"
        ],
        "nothing half-written is left"
    );

    folder
        .podium(&arguments("full.safetensors"))
        .arg("--resume")
        .assert()
        .success();
    let [whole, full] = ["whole.safetensors", "full.safetensors"]
        .map(|file| std::fs::read(folder.path(file)).unwrap());
    assert!(whole == full);
}

#[test]
fn what_makes_no_sense_is_said_in_one_line() {
    let folder = Folder::new();
    std::fs::write(folder.path("other.checkpoint-0"), "not one").unwrap();
    let output = ["train", "train", "-o", "x.safetensors"];
    let with = |more: &[&'static str]| [&output[..], more].concat();
    for (arguments, status, expected) in [
        (
            with(&["--layer", "4"]),
            1,
            "no features of layer 4, only of 2, 3",
        ),
        (with(&["--sweep", "epochs=3"]), 2, "sweeps go over layer"),
        (with(&["--dropout", "1"]), 2, "dropout is 1"),
        (with(&["--projection-width", "60"]), 1, "multiple of 16"),
        (with(&["--extra-inputs", "length"]), 1, "has no length"),
        (with(&["--plot", "x.gif"]), 2, ".svg or .png"),
        (
            with(&["--group-size", "9-3"]),
            2,
            "or a range, such as 8-32",
        ),
        (
            vec!["train", "nowhere", "-o", "x.safetensors"],
            1,
            "nowhere is not a collection",
        ),
        (
            vec!["train", "train", "-o", "nowhere/x.safetensors"],
            1,
            "cannot write nowhere/x.safetensors",
        ),
        (
            vec!["train", "train", "-o", "other", "--resume"],
            1,
            "not a checkpoint of a training run",
        ),
        (
            vec!["eval", "test", "--ranker", "nowhere.safetensors"],
            1,
            "cannot read ranker",
        ),
        (
            vec!["eval", "test", "--ranker", "gcd"],
            1,
            "no built-in ranker is called `gcd`",
        ),
    ] {
        let text = folder.refusal(&arguments, status);
        assert!(text.contains(expected), "{text}");
    }
}
