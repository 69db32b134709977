//! Opening whole models: folders of Hugging Face's layout, GGUF files by the reference writer, and
//! what happens when they are damaged.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use podium::model::config::Activation;
use podium::model::default_model;
use podium::model::error::ModelError;
use podium::model::files::{ModelFiles, TextSource};
use podium::model::tensor::{Dtype, check_finite};
use proptest::prelude::*;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

/// The weights of `tests/reference/gguf_samples.py`: number `i` of tensor number `s`.
fn weight(s: usize, i: usize) -> f32 {
    let number = (7919 * i as i64 + 104_729 * s as i64) % 2003 - 1001;
    number as f32 / 1024.0
}

fn golden(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(file)
}

/// A tiny Llama and the tensors that it must have.
fn llama() -> (Value, BTreeMap<String, Vec<usize>>) {
    let config = json!({
        "model_type": "llama", "vocab_size": 24, "hidden_size": 16, "intermediate_size": 20,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "eos_token_id": 2,
    });
    let mut tensors = BTreeMap::from([
        ("model.embed_tokens.weight".to_string(), vec![24, 16]),
        ("model.norm.weight".to_string(), vec![16]),
        ("lm_head.weight".to_string(), vec![24, 16]),
    ]);
    for layer in 0..2 {
        for (module, shape) in [
            ("self_attn.q_proj", vec![16, 16]),
            ("self_attn.k_proj", vec![8, 16]),
            ("self_attn.v_proj", vec![8, 16]),
            ("self_attn.o_proj", vec![16, 16]),
            ("mlp.gate_proj", vec![20, 16]),
            ("mlp.up_proj", vec![20, 16]),
            ("mlp.down_proj", vec![16, 20]),
            ("input_layernorm", vec![16]),
            ("post_attention_layernorm", vec![16]),
        ] {
            tensors.insert(format!("model.layers.{layer}.{module}.weight"), shape);
        }
    }
    (config, tensors)
}

/// What a test writes into a safetensors file.
struct Stored {
    dtype: safetensors::Dtype,
    shape: Vec<usize>,
    data: Vec<u8>,
}

fn stored(shapes: &BTreeMap<String, Vec<usize>>) -> BTreeMap<String, Stored> {
    let tensor = |(s, (name, shape)): (usize, (&String, &Vec<usize>))| {
        let data = (0..shape.iter().product())
            .flat_map(|i| weight(s, i).to_le_bytes())
            .collect();
        let tensor = Stored {
            dtype: safetensors::Dtype::F32,
            shape: shape.clone(),
            data,
        };
        (name.clone(), tensor)
    };
    shapes.iter().enumerate().map(tensor).collect()
}

fn write_safetensors<'a>(path: &Path, tensors: impl IntoIterator<Item = (&'a String, &'a Stored)>) {
    let views = tensors.into_iter().map(|(name, tensor)| {
        let view = TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.data).unwrap();
        (name.clone(), view)
    });
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

fn write_json(path: &Path, value: &Value) {
    std::fs::write(path, value.to_string()).unwrap();
}

/// The tiny Llama in a folder, after `change`.
fn folder(change: impl FnOnce(&mut Value, &mut BTreeMap<String, Stored>)) -> tempfile::TempDir {
    let (mut config, shapes) = llama();
    let mut tensors = stored(&shapes);
    change(&mut config, &mut tensors);
    let folder = tempfile::tempdir().unwrap();
    write_json(&folder.path().join("config.json"), &config);
    write_safetensors(&folder.path().join("model.safetensors"), &tensors);
    folder
}

/// The one line that opening gives instead of a model.
fn refusal(path: &Path) -> String {
    let message = ModelFiles::open(path).unwrap_err().to_string();
    assert!(!message.contains('\n'), "{message}");
    message
}

#[test]
fn a_folder_opens_and_every_tensor_is_what_was_written() {
    let folder = folder(|_, tensors| {
        // One tensor of each other precision that folders have.
        let norm = tensors.get_mut("model.norm.weight").unwrap();
        norm.dtype = safetensors::Dtype::BF16;
        norm.data = [0x80, 0x3f].repeat(16);
        let norm = tensors.get_mut("model.layers.0.input_layernorm.weight");
        let norm = norm.unwrap();
        norm.dtype = safetensors::Dtype::F16;
        norm.data = [0x00, 0xc0].repeat(16);
    });
    let model = ModelFiles::open(folder.path()).unwrap();
    let (_, shapes) = llama();
    assert_eq!(
        model.tensor_names().collect::<Vec<_>>(),
        shapes.keys().collect::<Vec<_>>()
    );
    for (s, (name, shape)) in shapes.iter().enumerate() {
        let tensor = model.tensor(name).unwrap();
        assert_eq!(tensor.shape, *shape);
        check_finite(name, &tensor).unwrap();
        let expected: Vec<f32> = match name.as_str() {
            "model.norm.weight" => vec![1.0; 16],
            "model.layers.0.input_layernorm.weight" => vec![-2.0; 16],
            _ => (0..tensor.rows() * tensor.columns())
                .map(|i| weight(s, i))
                .collect(),
        };
        assert_eq!(tensor.to_f32(), expected, "{name}");
    }
    assert!(
        model
            .optional_tensor("model.layers.0.self_attn.q_proj.bias")
            .unwrap()
            .is_none()
    );
    assert!(matches!(
        model.tensor("model.layers.2.input_layernorm.weight"),
        Err(ModelError::MissingTensor { .. })
    ));
    assert!(matches!(model.text_source(), TextSource::Folder(path) if path == folder.path()));
    assert_eq!(model.config().eos_token_ids, [2]);
    assert_eq!(
        model.name(),
        folder.path().file_name().unwrap().to_str().unwrap()
    );
}

#[test]
fn shards_are_found_through_their_index() {
    let (config, shapes) = llama();
    let tensors = stored(&shapes);
    let whole = folder(|_, _| {});
    let sharded = tempfile::tempdir().unwrap();
    let path = |name: &str| sharded.path().join(name);
    write_json(&path("config.json"), &config);
    let mut weight_map = serde_json::Map::new();
    for shard in 0..3 {
        let file = format!("model-{shard}.safetensors");
        let part: Vec<_> = tensors.iter().skip(shard).step_by(3).collect();
        for (name, _) in &part {
            weight_map.insert((*name).clone(), json!(file));
        }
        write_safetensors(&path(&file), part);
    }
    let index = path("model.safetensors.index.json");
    write_json(&index, &json!({"metadata": {}, "weight_map": weight_map}));

    let model = ModelFiles::open(sharded.path()).unwrap();
    let single = ModelFiles::open(whole.path()).unwrap();
    for name in shapes.keys() {
        let (a, b) = (model.tensor(name).unwrap(), single.tensor(name).unwrap());
        assert_eq!(a.data, b.data, "{name}");
    }
    // How the weights are cut into files does not matter.
    assert_eq!(model.fingerprint(), single.fingerprint());

    for (file, problem) in [
        (json!("../model-0.safetensors"), "is not the name of a file"),
        (json!("/etc/passwd"), "is not the name of a file"),
        (json!(".."), "is not the name of a file"),
        (json!(7), "is not the name of a file"),
        (json!("model-9.safetensors"), "no such file"),
        (json!("model-0.safetensors"), "model.norm.weight"),
    ] {
        let mut weight_map = weight_map.clone();
        weight_map["model.norm.weight"] = file;
        write_json(&index, &json!({"weight_map": weight_map}));
        let message = refusal(sharded.path());
        assert!(message.contains(problem), "{message}");
    }
    write_json(&index, &json!({}));
    assert!(refusal(sharded.path()).contains("weight_map"));
}

#[test]
fn what_contradicts_the_configuration_is_named() {
    type Change = fn(&mut Value, &mut BTreeMap<String, Stored>);
    let cases: [(Change, &[&str]); 8] = [
        (
            |config, _| config["intermediate_size"] = json!(24),
            &["model.layers.0.mlp", "[20, 16]", "[24, 16]"],
        ),
        (
            |config, _| config["num_hidden_layers"] = json!(3),
            &["model.layers.2", "not there"],
        ),
        (
            |config, _| config["num_hidden_layers"] = json!(1),
            &["model.layers.1", "1 layers"],
        ),
        (
            // Heads of 128 numbers, unless told otherwise.
            |config, _| config["model_type"] = json!("qwen3"),
            &["self_attn.q_proj", "[16, 16]", "[512, 16]"],
        ),
        (
            |config, _| config["attention_bias"] = json!(true),
            &["self_attn.q_proj.bias", "not there"],
        ),
        (
            |_, tensors| {
                let norm = tensors.get_mut("model.norm.weight").unwrap();
                norm.dtype = safetensors::Dtype::I32;
            },
            &["model.norm.weight", "I32", "BF16"],
        ),
        (
            |_, tensors| {
                tensors.remove("lm_head.weight");
            },
            &["lm_head.weight", "not there"],
        ),
        (
            |config, _| config["vocab_size"] = json!(25),
            &["embed_tokens", "[24, 16]", "[25, 16]"],
        ),
    ];
    for (change, named) in cases {
        let folder = folder(change);
        let message = refusal(folder.path());
        for named in named {
            assert!(message.contains(named), "{message} does not say: {named}");
        }
    }
}

#[test]
fn tied_embeddings_are_what_transformers_makes_of_them() {
    // Both there and different: not tied.
    let model = folder(|config, _| config["tie_word_embeddings"] = json!(true));
    let model = ModelFiles::open(model.path()).unwrap();
    assert!(!model.config().tie_word_embeddings);
    assert!(model.optional_tensor("lm_head.weight").unwrap().is_some());
    // Both there and equal, or one of them: tied.
    for keep in [
        &["model.embed_tokens.weight", "lm_head.weight"][..],
        &["model.embed_tokens.weight"],
        &["lm_head.weight"],
    ] {
        let model = folder(|config, tensors| {
            config["tie_word_embeddings"] = json!(true);
            let embedding = tensors.remove("model.embed_tokens.weight").unwrap();
            tensors.remove("lm_head.weight");
            for name in keep {
                let copy = Stored {
                    dtype: embedding.dtype,
                    shape: embedding.shape.clone(),
                    data: embedding.data.clone(),
                };
                tensors.insert(name.to_string(), copy);
            }
        });
        let model = ModelFiles::open(model.path()).unwrap();
        assert!(model.config().tie_word_embeddings, "{keep:?}");
        assert!(model.optional_tensor("lm_head.weight").unwrap().is_none());
        assert!(model.tensor("model.embed_tokens.weight").is_ok());
    }
}

#[test]
fn paths_that_hold_no_model_say_what_is_missing() {
    let folder = folder(|_, _| {});
    let path = |name: &str| folder.path().join(name);
    assert!(refusal(&path("absent")).contains("no such file or folder"));
    assert!(refusal(&path("model.safetensors")).contains("name the folder"));
    assert!(refusal(&path("config.json")).contains("name the folder"));

    std::fs::remove_file(path("config.json")).unwrap();
    assert!(refusal(folder.path()).contains("config.json: no such file"));
    std::fs::write(path("config.json"), "{\"model_type\": ").unwrap();
    assert!(refusal(folder.path()).contains("not the JSON expected"));
    std::fs::write(path("config.json"), "[".repeat(100_000)).unwrap();
    assert!(refusal(folder.path()).contains("not the JSON expected"));
    std::fs::remove_file(path("model.safetensors")).unwrap();
    write_json(&path("config.json"), &llama().0);
    assert!(refusal(folder.path()).contains("no weights"));
    std::fs::remove_file(path("config.json")).unwrap();
    assert!(refusal(folder.path()).contains("no model"));

    std::fs::copy(golden("tiny-llama.gguf"), path("a.gguf")).unwrap();
    assert_eq!(
        ModelFiles::open(folder.path()).unwrap().name(),
        "Tiny Llama"
    );
    std::fs::copy(golden("tiny-llama.gguf"), path("b.GGUF")).unwrap();
    assert!(refusal(folder.path()).contains("2 .gguf files"));
    std::fs::write(path("c.bin"), "neither").unwrap();
    assert!(refusal(&path("c.bin")).contains("not a GGUF file"));
    std::fs::write(path("d.gguf"), "").unwrap();
    assert!(refusal(&path("d.gguf")).contains("ends"));
}

/// A safetensors file with this header, and so many bytes of data.
fn with_header(header: &Value, data: usize) -> Vec<u8> {
    let header = header.to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

#[test]
fn damaged_safetensors_headers_are_named() {
    let folder = folder(|_, _| {});
    let weights = folder.path().join("model.safetensors");
    let tensor = |shape: &[u64], from: u64, to: u64| json!({"dtype": "F32", "shape": shape, "data_offsets": [from, to]});
    for (bytes, named) in [
        (
            with_header(
                &json!({"a": tensor(&[4], 0, 16), "b": tensor(&[4], 8, 24)}),
                24,
            ),
            "tensors a and b overlap",
        ),
        (
            with_header(
                &json!({"a": tensor(&[4], 0, 16), "b": tensor(&[4], 20, 36)}),
                36,
            ),
            "4 bytes before tensor b belong to none",
        ),
        (
            with_header(&json!({"a": tensor(&[5], 0, 16)}), 16),
            "tensor a of shape [5] and dtype F32 needs 20 bytes",
        ),
        (
            with_header(&json!({"a": tensor(&[4], 16, 0)}), 16),
            "16 bytes before tensor a",
        ),
        (
            with_header(&json!({"a": tensor(&[u64::MAX, 2], 0, 16)}), 16),
            "beyond any memory",
        ),
        (
            with_header(&json!({"a": tensor(&[1 << 58], 0, 1 << 60)}), 16),
            "is truncated",
        ),
        (
            with_header(&json!({"a": tensor(&[4], 0, 16)}), 17),
            "1 bytes follow the last tensor",
        ),
        (
            with_header(&json!({"a": tensor(&[4], 0, 16)}), 15),
            "is truncated",
        ),
        (
            with_header(
                &json!({"a": {"dtype": "F33", "shape": [], "data_offsets": [0, 0]}}),
                0,
            ),
            "F33",
        ),
        (with_header(&json!([]), 0), "bad header"),
        (u64::MAX.to_le_bytes().to_vec(), "not a safetensors file"),
        (vec![8; 7], "is truncated"),
        (vec![], "is truncated"),
    ] {
        std::fs::write(&weights, bytes).unwrap();
        let message = refusal(folder.path());
        assert!(message.contains(named), "{message} does not say: {named}");
    }
}

#[test]
fn safetensors_cut_anywhere_are_truncated() {
    let folder = folder(|_, _| {});
    let weights = folder.path().join("model.safetensors");
    let whole = std::fs::read(&weights).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(&weights)
        .unwrap();
    // Some places within the data, and every byte of the header.
    for len in (header..whole.len())
        .step_by(97)
        .rev()
        .chain((0..header).rev())
    {
        file.set_len(len as u64).unwrap();
        let message = refusal(folder.path());
        assert!(message.contains("is truncated"), "cut at {len}: {message}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn damaged_safetensors_never_panic(
        changes in prop::collection::vec((0..2200usize, any::<u8>()), 1..6),
    ) {
        let folder = folder(|_, _| {});
        let weights = folder.path().join("model.safetensors");
        let mut bytes = std::fs::read(&weights).unwrap();
        for (at, byte) in changes {
            bytes[at] = byte;
        }
        std::fs::write(&weights, bytes).unwrap();
        if let Ok(model) = ModelFiles::open(folder.path()) {
            for name in model.tensor_names() {
                model.tensor(name).unwrap();
            }
        }
    }

    #[test]
    fn damaged_gguf_samples_never_panic(
        changes in prop::collection::vec((0..4096usize, any::<u8>()), 1..6),
    ) {
        let mut bytes = std::fs::read(golden("tiny-llama.gguf")).unwrap();
        for (at, byte) in changes {
            bytes[at] = byte;
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        std::fs::write(&path, bytes).unwrap();
        if let Ok(model) = ModelFiles::open(&path) {
            for name in model.tensor_names() {
                model.tensor(name).unwrap();
            }
            model.fingerprint();
        }
    }
}

#[test]
fn a_llama_by_the_reference_writer_has_its_rows_put_back() {
    let model = ModelFiles::open(&golden("tiny-llama.gguf")).unwrap();
    let config = model.config();
    assert_eq!(
        (
            config.hidden_size,
            config.intermediate_size,
            config.vocab_size,
            config.layers
        ),
        (32, 32, 16, 2)
    );
    assert_eq!((config.heads, config.kv_heads, config.head_dim), (4, 2, 8));
    assert_eq!(config.max_position_embeddings, 512);
    assert_eq!(config.rms_norm_eps, 1e-5);
    assert!(!config.tie_word_embeddings);
    assert_eq!(config.eos_token_ids, [2, 3]);
    assert_eq!(config.activation, Activation::Silu);
    // 500000^(-i/4), divided by the numbers of rope_freqs.weight.
    let frequencies = &config.attention[1].rope.frequencies;
    for (i, divisor) in [1.0, 1.0, 2.5, 8.0].into_iter().enumerate() {
        let expected = 500_000f64.powf(-(i as f64) / 4.0) / divisor;
        let error = f64::from(frequencies[i]) / expected - 1.0;
        assert!(error.abs() < 3e-7, "{} and {expected}", frequencies[i]);
    }

    let mut biases = 0;
    for (s, name) in model.tensor_names().enumerate() {
        let tensor = model.tensor(name).unwrap();
        check_finite(name, &tensor).unwrap();
        let columns = tensor.columns();
        let row = |row: usize| (0..columns).map(move |i| weight(s, row * columns + i));
        let widened = tensor.to_f32();
        biases += usize::from(name.ends_with(".bias"));
        for (i, ours) in widened.chunks(tensor.columns()).enumerate() {
            // Q8_0 rounds to 1/127 of the block's largest number, and that scale to float16.
            let largest = row(i).fold(0f32, |m, x| m.max(x.abs()));
            let tolerance = match tensor.dtype {
                Dtype::Q8_0 => largest * (0.5 / 127.0 + 1.0 / 2048.0),
                _ => 0.0,
            };
            for (ours, expected) in ours.iter().zip(row(i)) {
                assert!((ours - expected).abs() <= tolerance, "{name}, row {i}");
            }
        }
    }
    assert_eq!(biases, 6);
    assert_eq!(
        model
            .tensor("model.layers.1.self_attn.q_proj.weight")
            .unwrap()
            .dtype,
        Dtype::Q8_0
    );

    let TextSource::Gguf(metadata) = model.text_source() else {
        panic!("a GGUF file has its text side in its metadata");
    };
    let tokens = metadata.strings("tokenizer.ggml.tokens").unwrap().unwrap();
    assert_eq!((tokens.len(), tokens[3]), (16, "<3é>"));
    let types = metadata.i32s("tokenizer.ggml.token_type").unwrap().unwrap();
    assert_eq!((types[0], types[15]), (1, 3));
    let scores = metadata.f32s("tokenizer.ggml.scores").unwrap().unwrap();
    assert_eq!(scores[15], -7.5);
    assert_eq!(
        metadata.bool("tokenizer.ggml.add_bos_token").unwrap(),
        Some(true)
    );
    assert_eq!(
        metadata.u32("tokenizer.ggml.bos_token_id").unwrap(),
        Some(1)
    );
    assert_eq!(
        metadata.string("tokenizer.ggml.model").unwrap(),
        Some("gpt2")
    );
}

#[test]
fn a_gemma_by_the_reference_writer_has_its_windows_and_norms() {
    let model = ModelFiles::open(&golden("tiny-gemma3.gguf")).unwrap();
    let config = model.config();
    assert!(config.tie_word_embeddings);
    assert!(!config.norm_weight_plus_one, "the converter has added it");
    assert_eq!(config.activation, Activation::GeluTanh);
    assert_eq!(config.embedding_scale, 32f32.sqrt());
    assert_eq!(config.attention_scale, 0.25);
    assert_eq!(model.name(), "tiny-gemma3");
    for (layer, attention) in config.attention.iter().enumerate() {
        let (window, first, second) = match layer {
            5 => (None, 1.0 / 8.0, 1e6f32.powf(-1.0 / 8.0) / 8.0),
            _ => (Some(4), 1.0, 1e4f32.powf(-1.0 / 8.0)),
        };
        assert_eq!(attention.window, window, "layer {layer}");
        assert_eq!(attention.rope.frequencies[0], first, "layer {layer}");
        let error = attention.rope.frequencies[1] / second - 1.0;
        assert!(error.abs() < 1e-6, "layer {layer}");
    }
    let mut norms = 0;
    let mut matrices = BTreeMap::new();
    for (s, name) in model.tensor_names().enumerate() {
        let tensor = model.tensor(name).unwrap();
        if name.ends_with("norm.weight") {
            norms += 1;
            let expected: Vec<f32> = (0..tensor.columns()).map(|i| weight(s, i) + 1.0).collect();
            assert_eq!(tensor.to_f32(), expected, "{name}");
        } else {
            *matrices.entry(tensor.dtype.name()).or_insert(0) += 1;
            // Four bits for numbers between -1 and 1.
            for (i, ours) in tensor.to_f32().iter().enumerate() {
                assert!((ours - weight(s, i)).abs() < 0.13, "{name}, number {i}");
            }
        }
    }
    assert_eq!(norms, 7 * 6 + 1);
    assert_eq!(matrices.len(), 5, "{matrices:?}");
}

#[test]
fn the_bytes_of_all_tensors_are_those_of_each() {
    for file in ["tiny-llama.gguf", "tiny-gemma3.gguf"] {
        let model = ModelFiles::open(&golden(file)).unwrap();
        let names = model.tensor_names();
        let bytes: usize = names
            .map(|name| model.tensor(name).unwrap().data.len())
            .sum();
        assert_eq!(model.tensor_bytes(), bytes as u64, "{file}");
    }
}

#[test]
fn fingerprints_tell_models_apart_and_stay() {
    let fingerprint = |path: &Path| ModelFiles::open(path).unwrap().fingerprint();
    let plain = fingerprint(folder(|_, _| {}).path());
    assert_eq!(plain, fingerprint(folder(|_, _| {}).path()));
    assert!(plain.len() == 16 && plain.chars().all(|c| c.is_ascii_hexdigit()));
    let others = [
        fingerprint(folder(|config, _| config["rms_norm_eps"] = json!(1e-6)).path()),
        fingerprint(
            folder(|_, tensors| tensors.get_mut("model.norm.weight").unwrap().data[0] ^= 1).path(),
        ),
        fingerprint(&golden("tiny-llama.gguf")),
        fingerprint(&golden("tiny-gemma3.gguf")),
    ];
    assert!(!others.contains(&plain));
    // Where the model may run and stop says nothing about its features.
    let elsewhere = folder(|config, _| {
        config["max_position_embeddings"] = json!(128);
        config["eos_token_id"] = json!([2, 3]);
    });
    assert_eq!(plain, fingerprint(elsewhere.path()));
    // Rankers carry fingerprints: one that changed would orphan them.
    assert_eq!(fingerprint(&golden("tiny-llama.gguf")), "36a806168f640697");
}

/// `PODIUM_TEST_MODEL`, or the default model; none on a machine that has neither.
fn real_model() -> Option<PathBuf> {
    let path = match std::env::var_os("PODIUM_TEST_MODEL") {
        Some(path) => PathBuf::from(path),
        None => default_model::expected_path().ok()?,
    };
    if !path.is_file() {
        eprintln!(
            "skipped: {} is not there (scripts/demo fetches it)",
            path.display()
        );
        return None;
    }
    Some(path)
}

#[test]
fn smollm2_opens() {
    let Some(path) = real_model() else { return };
    let model = ModelFiles::open(&path).unwrap();
    let config = model.config();
    assert_eq!(config.architecture, "llama");
    assert_eq!((config.layers, config.hidden_size), (30, 576));
    assert_eq!((config.heads, config.kv_heads, config.head_dim), (9, 3, 64));
    assert_eq!(
        (config.vocab_size, config.max_position_embeddings),
        (49_152, 8192)
    );
    assert!(config.tie_word_embeddings);
    assert_eq!(config.eos_token_ids, [2]);
    let mut bytes = 0;
    let started = std::time::Instant::now();
    for name in model.tensor_names() {
        let tensor = model.tensor(name).unwrap();
        bytes += tensor.data.len();
        check_finite(name, &tensor).unwrap();
    }
    eprintln!(
        "{bytes} bytes of weights checked in {:?}",
        started.elapsed()
    );
    assert_eq!(model.tensor_names().count(), 272);
}
