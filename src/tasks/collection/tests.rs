//! A collection is written, interrupted, gone on with, and read.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use proptest::prelude::*;
use serde_json::json;

use super::*;

const LAYERS: [usize; 2] = [2, 5];
const WIDTH: usize = 3;

fn info(items: usize, dtype: FeatureDtype) -> CollectionInfo {
    CollectionInfo {
        format: FORMAT,
        task: "t".into(),
        model: "m".into(),
        fingerprint: "0123".into(),
        layers: 6,
        hidden_size: WIDTH,
        feature_layers: LAYERS.to_vec(),
        dtype,
        items,
        n: None,
        seed: Some(7),
        sampling: json!({"temperature": 0.5}).as_object().unwrap().clone(),
        data: "data.jsonl".into(),
        data_sha256: None,
        verifier: None,
    }
}

/// Small whole numbers, which bf16 holds exactly.
fn row(item: usize, candidate: usize, layer: usize) -> Vec<f32> {
    (0..WIDTH)
        .map(|i| (item * 11 + candidate * 5 + layer * 3 + i) as f32 - 60.0)
        .collect()
}

fn candidates_of(item: usize) -> usize {
    [2, 0, 3, 1][item % 4]
}

fn line(item: usize) -> Map<String, Value> {
    let n = candidates_of(item);
    let texts: Vec<String> = (0..n).map(|k| format!("text {item} {k}\n")).collect();
    let labels: Vec<usize> = (0..n).map(|k| k % 2).collect();
    let numbers: Vec<f64> = (0..n).map(|k| -0.5 * k as f64).collect();
    let line = json!({
        "id": format!("i{item}"), "prompt": format!("p{item}"), "candidates": texts, "labels": labels,
        "answers": vec![json!(null); n], "mean_logprob": numbers, "reference": item,
    });
    line.as_object().unwrap().clone()
}

fn push(writer: &mut CollectionWriter, item: usize) -> Result<(), CollectionError> {
    let of = |candidate| LAYERS.map(|layer| row(item, candidate, layer)).to_vec();
    let candidates: Vec<_> = (1..=candidates_of(item)).map(of).collect();
    let candidates: Vec<&[Vec<f32>]> = candidates.iter().map(|c| &c[..]).collect();
    writer.push(&line(item), &of(0), &candidates)
}

/// Goes on with a collection, or begins it, until it holds `until` items; shards of about four.
fn write(folder: &Path, items: usize, until: usize) {
    let info = info(items, FeatureDtype::Bf16);
    let mut writer = CollectionWriter::with_shards_of(folder, info, 120).unwrap();
    for item in writer.items()..until {
        push(&mut writer, item).unwrap();
    }
    if until == items {
        writer.finish().unwrap();
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

#[test]
fn what_was_written_is_read() {
    for dtype in [FeatureDtype::Bf16, FeatureDtype::F32] {
        let folder = tempfile::tempdir().unwrap();
        let mut writer =
            CollectionWriter::with_shards_of(folder.path(), info(9, dtype), 120).unwrap();
        for item in 0..9 {
            push(&mut writer, item).unwrap();
        }
        writer.finish().unwrap();
        let names: Vec<String> = files(folder.path()).into_keys().collect();
        assert!(
            names.contains(&"00001.safetensors".to_string()),
            "{names:?}"
        );
        assert!(
            !names.iter().any(|name| name.ends_with(".part")),
            "{names:?}"
        );

        let collection = Collection::open(folder.path()).unwrap();
        assert_eq!(collection.info, info(9, dtype));
        assert_eq!(collection.items().len(), 9);
        for (number, item) in collection.items().iter().enumerate() {
            let n = candidates_of(number);
            assert_eq!(item.id, json!(format!("i{number}")));
            assert_eq!(item.key, format!("p{number}"));
            assert_eq!(item.reference, Some(json!(number)));
            let labels: Vec<f32> = (0..n).map(|k| (k % 2) as f32).collect();
            assert_eq!(item.labels, labels);
            assert_eq!(item.answers, vec![None; n]);
            assert_eq!(item.mean_logprob.as_ref().unwrap().len(), n);
            assert_eq!((&item.length, &item.self_certainty), (&None, &None));
            assert_eq!(collection.line(number).unwrap(), line(number));
            for layer in LAYERS {
                let features = collection.layer(layer).unwrap();
                assert_eq!(features.prompt(number).to_vec(), row(number, 0, layer));
                let candidates = features.candidates(number);
                assert_eq!(candidates.len(), n);
                for k in 0..n {
                    assert_eq!(candidates.row(k).to_vec(), row(number, 1 + k, layer));
                }
            }
        }
        assert_eq!(collection.texts(2).unwrap()[1], "text 2 1\n");
        assert_eq!(
            collection.layer(3).unwrap_err().to_string(),
            format!(
                "{} has no features of layer 3, only of 2, 5",
                folder.path().display()
            )
        );
    }
}

#[test]
fn an_empty_answer_is_none() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), 1, 1);
    let path = dir.path().join(CANDIDATES);
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("[null,null]", "[\" \",\"7\"]")).unwrap();
    let collection = Collection::open(dir.path()).unwrap();
    assert_eq!(collection.items()[0].answers, [None, Some("7".into())]);
}

#[test]
fn bf16_is_rounded_to_the_nearest() {
    let folder = tempfile::tempdir().unwrap();
    let mut info = info(1, FeatureDtype::Bf16);
    info.feature_layers = vec![1];
    let mut writer = CollectionWriter::open(folder.path(), info).unwrap();
    let line = json!({"prompt": "p", "candidates": [], "labels": []});
    let prompt = vec![vec![1.0 + 0.75 / 128.0, -2981.3, 3.0e-39]];
    writer
        .push(line.as_object().unwrap(), &prompt, &[])
        .unwrap();
    writer.finish().unwrap();
    let collection = Collection::open(folder.path()).unwrap();
    let stored = collection.layer(1).unwrap().prompt(0).to_vec();
    // 8 significant bits: relative error at most 2^-9; 3e-39 is subnormal, with 2^-133 as its unit.
    assert_eq!(stored[0], 1.0 + 1.0 / 128.0);
    assert!((stored[1] / prompt[0][1] - 1.0).abs() <= 1.0 / 512.0);
    assert!((f64::from(stored[2]) - 3.0e-39).abs() <= 2f64.powi(-134));
}

#[test]
fn an_unfinished_collection_says_how_far_it_is() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), 9, 6);
    let message = Collection::open(folder.path()).unwrap_err().to_string();
    assert!(
        message.contains("holds 6 of 9 items: run the same"),
        "{message}"
    );
    let writer = CollectionWriter::open(folder.path(), info(9, FeatureDtype::Bf16)).unwrap();
    assert_eq!(writer.lines().unwrap().count(), 6);
    assert_eq!(writer.lines().unwrap().nth(5).unwrap().unwrap(), line(5));
    let message = writer.finish().unwrap_err().to_string();
    assert!(message.contains("holds 6 of 9 items"), "{message}");
}

#[test]
fn a_finished_collection_stays_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), 7, 7);
    let before = files(folder.path());
    write(folder.path(), 7, 7);
    assert_eq!(files(folder.path()), before);
}

#[test]
fn a_collection_grows() {
    let whole = tempfile::tempdir().unwrap();
    write(whole.path(), 11, 11);
    let whole = Collection::open(whole.path()).unwrap();
    for (begun, until) in [(6, 6), (6, 3), (6, 0)] {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), begun, until);
        write(folder.path(), 9, until.max(7));
        write(folder.path(), 11, 11);
        let grown = Collection::open(folder.path()).unwrap();
        assert_eq!(grown.info, whole.info);
        assert_eq!(grown.items(), whole.items());
        for layer in LAYERS {
            let (grown, whole) = (grown.layer(layer).unwrap(), whole.layer(layer).unwrap());
            for item in 0..11 {
                assert_eq!(grown.prompt(item).to_vec(), whole.prompt(item).to_vec());
                assert_eq!(
                    grown.candidates(item).to_vec(),
                    whole.candidates(item).to_vec()
                );
            }
        }
        let message =
            CollectionWriter::open(folder.path(), info(9, FeatureDtype::Bf16)).unwrap_err();
        assert!(
            message
                .to_string()
                .contains("was begun with items 11, and now it is 9"),
            "{message}"
        );
    }
}

#[test]
fn other_settings_other_writers_and_other_files_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let open = |info| CollectionWriter::open(folder.path(), info);
    let writer = open(info(9, FeatureDtype::Bf16)).unwrap();
    let message = open(info(9, FeatureDtype::Bf16)).unwrap_err().to_string();
    assert!(
        message.ends_with("is being written by another podium collect"),
        "{message}"
    );
    drop(writer);
    let mut other = info(9, FeatureDtype::Bf16);
    other.seed = Some(8);
    let message = open(other).unwrap_err().to_string();
    assert!(
        message.contains("was begun with seed 7, and now it is 8"),
        "{message}"
    );

    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("thesis.tex"), "").unwrap();
    let error = CollectionWriter::open(folder.path(), info(9, FeatureDtype::Bf16)).unwrap_err();
    assert!(error.to_string().contains("holds other files"), "{error}");
    assert!(!folder.path().join("features").exists());
}

#[test]
fn features_that_do_not_fit_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = CollectionWriter::open(folder.path(), info(1, FeatureDtype::F32)).unwrap();
    let good = vec![vec![0.0; WIDTH]; 2];
    let line = json!({"prompt": "p", "candidates": ["x"], "labels": [1]});
    let line = line.as_object().unwrap();
    for (prompt, candidates) in [
        (vec![vec![0.0; WIDTH]], vec![&good[..]]),
        (good.clone(), vec![]),
        (good.clone(), vec![&[][..]]),
        (vec![vec![0.0; WIDTH + 1]; 2], vec![&good[..]]),
    ] {
        let error = writer.push(line, &prompt, &candidates).unwrap_err();
        assert!(
            error.to_string().contains("item 0 cannot be stored"),
            "{error}"
        );
    }
    assert_eq!(writer.items(), 0);
    assert_eq!(
        fs::read(folder.path().join("candidates.jsonl")).unwrap(),
        b""
    );
}

/// What is wrong with a finished collection after `damage`.
fn complaint(damage: impl Fn(&Path)) -> String {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), 6, 6);
    damage(folder.path());
    let message = Collection::open(folder.path()).unwrap_err().to_string();
    assert!(!message.contains('\n'), "{message}");
    message.replace(&folder.path().display().to_string(), "DIR")
}

#[test]
fn damage_is_named_with_its_place() {
    let edit = |name: &'static str, from: &'static str, to: &'static str| {
        move |folder: &Path| {
            let path = folder.join(name);
            let text = fs::read_to_string(&path).unwrap();
            assert!(text.contains(from));
            fs::write(path, text.replacen(from, to, 1)).unwrap();
        }
    };
    for (message, expected) in [
        (
            complaint(|folder| fs::remove_file(folder.join(INFO)).unwrap()),
            "DIR is not a collection: it has no collection.json",
        ),
        (
            complaint(edit(INFO, "\"format\": 1", "\"format\": 2")),
            "DIR/collection.json: format 2: this podium reads format 1",
        ),
        (
            complaint(edit(INFO, "\"hidden_size\": 3", "\"hidden_size\": 0")),
            "DIR/collection.json: hidden_size must be at least 1",
        ),
        (
            complaint(edit(INFO, "\"layers\": 6", "\"layers\": 4")),
            "DIR/collection.json: feature_layers must be ascending numbers from 1 to 4",
        ),
        (
            complaint(edit(INFO, "\"hidden_size\": 3", "\"hidden_size\": 4")),
            "DIR/features/00000.safetensors: layer.2.prompt is BF16 [",
        ),
        (
            complaint(edit(CANDIDATES, "\"labels\":[0,1,0]", "\"labels\":[0,1]")),
            "DIR/candidates.jsonl:3: 2 `labels` for 3 candidates",
        ),
        (
            complaint(edit(CANDIDATES, "\"labels\":[0,1,0]", "\"labels\":[0,x]")),
            "DIR/candidates.jsonl:3: expected value",
        ),
        (
            complaint(edit(CANDIDATES, "[null,null,null]", "[null,null]")),
            "DIR/candidates.jsonl:3: `answers` has 2 entries for 3 candidates",
        ),
        (
            complaint(edit(
                CANDIDATES,
                "\"candidates\":[\"text 0 0\\n\",",
                "\"candidates\":[",
            )),
            "DIR/candidates.jsonl:1: 2 `labels` for 1 candidates",
        ),
        (
            complaint(|folder| {
                let path = folder.join(CANDIDATES);
                let text = fs::read_to_string(&path).unwrap();
                let without_first = text.split_once('\n').unwrap().1.to_string();
                fs::write(path, without_first).unwrap();
            }),
            "DIR/features/00000.safetensors: its item 0 does not belong to line 1",
        ),
        (
            complaint(|folder| {
                let path = folder.join("features/00000.safetensors");
                let bytes = fs::read(&path).unwrap();
                fs::write(path, &bytes[..bytes.len() - 1]).unwrap();
            }),
            "DIR/features/00000.safetensors: ",
        ),
        (
            complaint(|folder| fs::remove_file(folder.join("features/00001.safetensors")).unwrap()),
            "of 6 items: run the same podium collect again",
        ),
    ] {
        assert!(message.contains(expected), "{message}\n{expected}");
    }
}

#[test]
fn what_an_item_is_by_content() {
    let key = |line: Value| content_key(line.as_object().unwrap());
    assert_eq!(key(json!({"key": "gcd 2 4", "prompt": "p"})), "gcd 2 4");
    assert_eq!(key(json!({"key": [2, 4], "prompt": "p"})), "[2,4]");
    assert_eq!(key(json!({"key": null, "prompt": "p"})), "p");
    let chat = json!({"messages": [
        {"role": "system", "content": "s"}, {"role": "user", "content": "p"},
    ]});
    assert_eq!(key(chat), "p");
    assert_eq!(key(json!({"prompt_token_ids": [1, 2]})), "[1,2]");
}

proptest! {
    // Each case brings some twenty files to the disk.
    #![proptest_config(ProptestConfig::with_cases(24))]
    /// Wherever a writer is stopped, and whatever of its last writes did not reach the disk, going
    /// on ends with the files that an undisturbed writer makes.
    #[test]
    fn any_interruption_ends_with_the_same_files(
        stops in prop::collection::vec((0usize..14, 0u64..400, 0u64..400, any::<bool>()), 1..6),
    ) {
        const ITEMS: usize = 14;
        let undisturbed = tempfile::tempdir().unwrap();
        write(undisturbed.path(), ITEMS, ITEMS);
        let folder = tempfile::tempdir().unwrap();
        for (until, part_cut, line_cut, garble) in stops {
            write(folder.path(), ITEMS, until);
            // Loses the end of the files that are not sealed.
            let features = folder.path().join("features");
            let part = fs::read_dir(&features).unwrap().flatten().map(|entry| entry.path());
            let part = part.filter(|path| path.extension().unwrap() == "part").last().unwrap();
            let sealed_lines: usize = fs::read_dir(&features).unwrap().flatten()
                .filter(|entry| entry.path().extension().unwrap() == "safetensors")
                .map(|entry| {
                    let bytes = fs::read(entry.path()).unwrap();
                    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
                    tensors.tensor("offsets").unwrap().shape()[0] - 1
                })
                .sum();
            let mut bytes = fs::read(&part).unwrap();
            let keep = (bytes.len() as u64).saturating_sub(part_cut) as usize;
            if garble && let Some(byte) = bytes.get_mut(keep) {
                *byte ^= 1;
            } else {
                bytes.truncate(keep);
            }
            fs::write(&part, bytes).unwrap();
            let path = folder.path().join("candidates.jsonl");
            let text = fs::read(&path).unwrap();
            let sealed: usize = text.split_inclusive(|&b| b == b'\n').take(sealed_lines)
                .map(<[u8]>::len).sum();
            let keep = text.len().saturating_sub(line_cut as usize).max(sealed);
            fs::write(&path, &text[..keep]).unwrap();
            // A temporary file of a whole file that was being written.
            fs::write(features.join(".podium-abc"), "half").unwrap();
        }
        write(folder.path(), ITEMS, ITEMS);
        prop_assert_eq!(files(folder.path()), files(undisturbed.path()));
    }
}
