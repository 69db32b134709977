//! Hostile and damaged files, built byte by byte.

use std::path::Path;

use proptest::prelude::*;

use super::metadata::GgufMetadata;
use super::parser::{Parsed, parse};
use crate::model::error::ModelError;
use crate::model::tensor::Dtype;

const GOLDEN: &[u8] = include_bytes!("../../../tests/golden/tiny-llama.gguf");

fn parse_bytes(bytes: &[u8]) -> Result<Parsed, ModelError> {
    parse(Path::new("test.gguf"), bytes)
}

/// Number of a string in the format; others stand where they are used.
const STRING: u32 = 8;
const ARRAY: u32 = 9;
const U32: u32 = 4;

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

/// Writes a file of keys (name, type, bytes of the value) and tensors.
#[derive(Clone)]
struct Writer {
    version: u32,
    keys: Vec<(String, u32, Vec<u8>)>,
    tensors: Vec<TensorInfo>,
    data: Vec<u8>,
}

#[derive(Clone)]
struct TensorInfo {
    name: String,
    /// Fastest first, as in the file.
    dimensions: Vec<u64>,
    dtype: u32,
    offset: u64,
}

impl Writer {
    /// Two float32 tensors: `a` of [2, 3] and `b` of [4].
    fn sound() -> Self {
        let tensor = |name: &str, dimensions: &[u64], offset| TensorInfo {
            name: name.to_string(),
            dimensions: dimensions.to_vec(),
            dtype: 0,
            offset,
        };
        Writer {
            version: 3,
            keys: vec![("general.architecture".to_string(), STRING, string("llama"))],
            tensors: vec![tensor("a", &[3, 2], 0), tensor("b", &[4], 32)],
            data: (0..48).collect(),
        }
    }

    fn key(mut self, name: &str, value_type: u32, value: Vec<u8>) -> Self {
        self.keys.push((name.to_string(), value_type, value));
        self
    }

    fn change(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.keys.len() as u64).to_le_bytes());
        for (name, value_type, value) in &self.keys {
            out.extend(string(name));
            out.extend(value_type.to_le_bytes());
            out.extend(value);
        }
        for tensor in &self.tensors {
            out.extend(string(&tensor.name));
            out.extend((tensor.dimensions.len() as u32).to_le_bytes());
            for dimension in &tensor.dimensions {
                out.extend(dimension.to_le_bytes());
            }
            out.extend(tensor.dtype.to_le_bytes());
            out.extend(tensor.offset.to_le_bytes());
        }
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(&self.data);
        out
    }

    fn problem(&self) -> String {
        let message = parse_bytes(&self.bytes()).unwrap_err().to_string();
        assert!(!message.contains('\n'), "{message}");
        message
    }
}

#[test]
fn a_sound_file_of_either_version_parses() {
    for version in [2, 3] {
        let bytes = Writer::sound().change(|w| w.version = version).bytes();
        let parsed = parse_bytes(&bytes).unwrap();
        let a = &parsed.tensors["a"];
        assert_eq!(a.shape, [2, 3]);
        assert_eq!(a.dtype, Dtype::F32);
        assert_eq!(bytes[a.range.clone()], (0..24).collect::<Vec<u8>>());
        let b = &parsed.tensors["b"];
        assert_eq!(bytes[b.range.clone()], (32..48).collect::<Vec<u8>>());
    }
}

#[test]
fn damage_is_named() {
    let sound = Writer::sound;
    let list = |element: u32, len: u64| [&element.to_le_bytes()[..], &len.to_le_bytes()].concat();
    let nested = (0..5).fold(list(U32, 0), |inner, _| [list(ARRAY, 1), inner].concat());
    for (writer, named) in [
        (sound().change(|w| w.version = 1), "version 1"),
        (sound().change(|w| w.version = 3 << 24), "big-endian"),
        (
            sound().key("general.architecture", STRING, string("qwen2")),
            "general.architecture stands there twice",
        ),
        (
            sound().change(|w| w.tensors[1].name = "a".into()),
            "tensor a stands there twice",
        ),
        (
            sound().change(|w| w.tensors[1].offset = 0),
            "tensors b and a overlap",
        ),
        (
            sound().change(|w| w.tensors[1].offset = 33),
            "not aligned to 32",
        ),
        (
            sound().change(|w| w.tensors[1].offset = 64),
            "tensor b ends at byte",
        ),
        (
            sound().change(|w| w.tensors[1].offset = u64::MAX - 31),
            "tensor b of shape [4] is beyond any memory",
        ),
        (
            sound().change(|w| w.tensors[0].dimensions = vec![u64::MAX, 2]),
            "beyond any memory",
        ),
        (
            sound().change(|w| w.tensors[0].dimensions = vec![1 << 40, 1 << 40]),
            "beyond any memory",
        ),
        (
            sound().change(|w| w.tensors[0].dimensions = vec![1, 1 << 40]),
            "tensor a ends at byte",
        ),
        (
            sound().change(|w| w.tensors[0].dimensions = vec![]),
            "0 dimensions",
        ),
        (
            sound().change(|w| w.tensors[0].dimensions = vec![1; 5]),
            "5 dimensions",
        ),
        (sound().change(|w| w.tensors[0].dtype = 11), "Q3_K"),
        (sound().change(|w| w.tensors[0].dtype = 99), "GGUF type 99"),
        (
            sound().change(|w| w.tensors[0].dtype = 8),
            "not whole blocks of Q8_0",
        ),
        (
            sound().key("general.alignment", U32, 24u32.to_le_bytes().into()),
            "general.alignment",
        ),
        (
            sound().key("general.alignment", U32, vec![0; 4]),
            "general.alignment",
        ),
        (sound().key("x", 13, vec![]), "x is of unknown type 13"),
        (sound().key("x", 7, vec![2]), "neither true nor false"),
        (sound().key("x", ARRAY, nested), "nested too deep"),
        (
            sound().key("x", ARRAY, list(U32, u64::MAX)),
            "leads out of the file",
        ),
        (
            sound().key("x", ARRAY, list(STRING, 1 << 40)),
            "leads out of the file",
        ),
        (
            sound().key("x", STRING, u64::MAX.to_le_bytes().into()),
            "leads out of the file",
        ),
    ] {
        let problem = writer.problem();
        assert!(problem.contains(named), "{problem} does not say: {named}");
    }
    // A count that no file of this size can hold.
    for at in [8, 16] {
        let mut bytes = Writer::sound().bytes();
        bytes[at..at + 8].fill(0xff);
        assert!(parse_bytes(&bytes).is_err());
    }
    assert!(
        parse_bytes(b"GGML....")
            .unwrap_err()
            .to_string()
            .contains("not a GGUF file")
    );
}

#[test]
fn a_file_cut_anywhere_is_an_error() {
    let whole = parse_bytes(GOLDEN).unwrap();
    let end = whole.tensors.values().map(|t| t.range.end).max().unwrap();
    // Bytes after the last tensor are padding.
    for len in 0..end {
        let error = parse_bytes(&GOLDEN[..len]).unwrap_err().to_string();
        assert!(
            error.contains("fetch it again") || error.contains("leads out of the file"),
            "cut at {len}: {error}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Whatever a damaged header says, the parser returns, and what it accepts lies in the file.
    #[test]
    fn damaged_headers_never_panic(
        changes in prop::collection::vec((0..4096usize, any::<u8>()), 1..8),
        wide in prop::option::of((0..512usize, any::<u64>())),
    ) {
        let mut bytes = GOLDEN.to_vec();
        for (at, byte) in changes {
            bytes[at] = byte;
        }
        if let Some((at, number)) = wide {
            bytes[at * 8..at * 8 + 8].copy_from_slice(&number.to_le_bytes());
        }
        if let Ok(parsed) = parse_bytes(&bytes) {
            for tensor in parsed.tensors.values() {
                prop_assert!(tensor.range.end <= bytes.len());
            }
            let metadata = GgufMetadata {
                path: Path::new("test.gguf"),
                bytes: &bytes,
                values: &parsed.values,
            };
            for key in metadata.keys() {
                let _ = metadata.string(key);
                let _ = metadata.strings(key);
                let _ = metadata.f32s(key);
                let _ = metadata.u32(key);
            }
            let _ = super::config::parse(metadata, &parsed.tensors, None);
        }
    }
}

#[test]
fn values_are_read_by_type_whatever_their_width() {
    let list = |element: u32, len: u64, bytes: &[u8]| {
        [&element.to_le_bytes()[..], &len.to_le_bytes(), bytes].concat()
    };
    let bytes = Writer::sound()
        .key("u8", 0, vec![200])
        .key("i8", 1, vec![0xff])
        .key("u16", 2, 60_000u16.to_le_bytes().into())
        .key("i32", 5, 7i32.to_le_bytes().into())
        .key("u64", 10, u64::MAX.to_le_bytes().into())
        .key("f32", 6, 0.5f32.to_le_bytes().into())
        .key("f64", 12, 0.25f64.to_le_bytes().into())
        .key("yes", 7, vec![1])
        .key(
            "bad",
            STRING,
            [&2u64.to_le_bytes()[..], &[0xc3, 0x28]].concat(),
        )
        .key(
            "words",
            ARRAY,
            list(STRING, 2, &[string("é"), string("")].concat()),
        )
        .key("flags", ARRAY, list(7, 3, &[1, 0, 1]))
        .key("none", ARRAY, list(6, 0, &[]))
        .bytes();
    let parsed = parse_bytes(&bytes).unwrap();
    let metadata = GgufMetadata {
        path: Path::new("test.gguf"),
        bytes: &bytes,
        values: &parsed.values,
    };
    assert_eq!(metadata.u32("u8").unwrap(), Some(200));
    assert_eq!(metadata.u32("u16").unwrap(), Some(60_000));
    assert_eq!(metadata.u32("i32").unwrap(), Some(7));
    assert!(metadata.u32("i8").is_err());
    assert!(metadata.u32("u64").is_err());
    assert!(metadata.u32("f32").is_err());
    assert_eq!(metadata.f32("f32").unwrap(), Some(0.5));
    assert_eq!(metadata.f32("f64").unwrap(), Some(0.25));
    assert_eq!(metadata.bool("yes").unwrap(), Some(true));
    assert_eq!(metadata.bool("absent").unwrap(), None);
    assert!(metadata.string("bad").is_err());
    assert!(metadata.string("yes").is_err());
    assert_eq!(metadata.strings("words").unwrap().unwrap(), ["é", ""]);
    assert_eq!(
        metadata.bools("flags").unwrap().unwrap(),
        [true, false, true]
    );
    assert!(metadata.f32s("none").unwrap().unwrap().is_empty());
    assert!(metadata.i32s("none").is_err());
    assert!(metadata.strings("flags").is_err());
}

/// The metadata of a small model, to be changed by the tests below.
fn model(architecture: &str) -> Writer {
    let number = |n: u32| n.to_le_bytes().to_vec();
    let mut writer = Writer::sound();
    writer.keys[0].2 = string(architecture);
    writer.tensors[0].name = "token_embd.weight".to_string();
    for (key, value) in [
        ("embedding_length", 32),
        ("block_count", 7),
        ("attention.head_count", 4),
        ("feed_forward_length", 64),
        ("context_length", 128),
    ] {
        writer = writer.key(&format!("{architecture}.{key}"), U32, number(value));
    }
    writer.key(
        &format!("{architecture}.attention.layer_norm_rms_epsilon"),
        6,
        1e-5f32.to_le_bytes().into(),
    )
}

fn config(writer: &Writer) -> Result<crate::model::config::ModelConfig, ModelError> {
    let bytes = writer.bytes();
    let parsed = parse_bytes(&bytes).unwrap();
    let metadata = GgufMetadata {
        path: Path::new("test.gguf"),
        bytes: &bytes,
        values: &parsed.values,
    };
    super::config::parse(metadata, &parsed.tensors, None).map(|(config, ..)| config)
}

#[test]
fn what_a_file_leaves_out_has_the_defaults_of_llama_cpp() {
    let llama = config(&model("llama")).unwrap();
    assert_eq!(
        (llama.kv_heads, llama.head_dim, llama.vocab_size),
        (4, 8, 2)
    );
    assert!(llama.tie_word_embeddings);
    assert!(llama.eos_token_ids.is_empty());
    assert_eq!(llama.attention[0].rope.frequencies[1], 0.1);

    let window = 16u32.to_le_bytes().to_vec();
    let windows = |writer: &Writer| -> Vec<Option<usize>> {
        let config = config(writer).unwrap();
        config.attention.iter().map(|layer| layer.window).collect()
    };
    let mistral = model("llama").key("llama.attention.sliding_window", U32, window.clone());
    assert_eq!(windows(&mistral), [Some(16); 7]);
    let gemma2 = model("gemma2");
    let alternating: Vec<_> = (0..7).map(|i| (i % 2 == 0).then_some(4096)).collect();
    assert_eq!(windows(&gemma2), alternating);
    let caps = config(&gemma2).unwrap();
    assert_eq!(caps.attention_softcap, Some(50.0));
    assert_eq!(caps.logit_softcap, Some(30.0));
    let gemma3 = model("gemma3").key("gemma3.attention.sliding_window", U32, window);
    let sixth: Vec<_> = (0..7).map(|i| (i != 5).then_some(16)).collect();
    assert_eq!(windows(&gemma3), sixth);
    assert!(config(&model("gemma3")).is_err());
}

#[test]
fn metadata_that_cannot_be_a_model_is_refused() {
    let number = |n: u32| n.to_le_bytes().to_vec();
    for (writer, named) in [
        (model("mamba"), "mamba"),
        (
            model("llama").change(|w| {
                w.keys.retain(|(key, ..)| key != "llama.block_count");
            }),
            "llama.block_count: missing",
        ),
        (
            model("llama").key("llama.attention.head_count_kv", U32, number(3)),
            "4 query heads",
        ),
        (
            model("llama").key("llama.attention.key_length", U32, number(0)),
            "llama.attention.key_length",
        ),
        (
            model("llama").key("llama.attention.key_length", U32, number(1 << 30)),
            "llama.attention.key_length",
        ),
        (
            model("llama").key("llama.rope.dimension_count", U32, number(4)),
            "llama.rope.dimension_count",
        ),
        (
            model("llama").key("llama.rope.freq_base", 6, f32::NAN.to_le_bytes().into()),
            "llama.rope.freq_base",
        ),
        (
            model("llama").key("llama.rope.scaling.type", STRING, string("longrope")),
            "longrope",
        ),
        (
            model("llama").key("llama.expert_count", U32, number(8)),
            "mixtures",
        ),
        (
            model("llama").key("split.count", 2, vec![3, 0]),
            "split over many files",
        ),
        (
            model("llama").key("llama.vocab_size", STRING, string("many")),
            "llama.vocab_size",
        ),
    ] {
        let message = config(&writer).unwrap_err().to_string();
        assert!(message.contains(named), "{message} does not say: {named}");
        assert!(!message.contains('\n'), "{message}");
    }
}

#[test]
fn yarn_and_linear_scaling_match_those_of_config_json() {
    use crate::model::rope::{RopeScaling, rope};
    let scaled = |keys: &[(&str, f32)], kind: &str| {
        let mut writer = model("qwen2").key("qwen2.rope.scaling.type", STRING, string(kind));
        for (key, number) in keys {
            writer = writer.key(
                &format!("qwen2.rope.scaling.{key}"),
                6,
                number.to_le_bytes().into(),
            );
        }
        writer.key(
            "qwen2.rope.scaling.original_context_length",
            U32,
            64u32.to_le_bytes().into(),
        )
    };
    let linear = config(&scaled(&[("factor", 4.0)], "linear")).unwrap();
    assert_eq!(
        linear.attention[0].rope,
        rope(10_000.0, 8, &RopeScaling::Linear { factor: 4.0 })
    );
    let yarn = config(&scaled(&[("factor", 4.0)], "yarn")).unwrap();
    assert_eq!(
        yarn.attention[0].rope,
        rope(
            10_000.0,
            8,
            &RopeScaling::Yarn {
                factor: 4.0,
                attention_factor: None,
                beta_fast: 32.0,
                beta_slow: 1.0,
                original_context: 64.0,
                truncate: true,
            }
        )
    );
    assert!(config(&scaled(&[], "yarn")).is_err());
    assert!(config(&scaled(&[("factor", 4.0), ("attn_factor", 2.0)], "yarn")).is_err());
}

#[test]
fn interleaved_rows_return_to_their_places() {
    // Two heads of four rows: as stored 0, 2, 1, 3 of each.
    let stored = [0, 0, 2, 2, 1, 1, 3, 3, 4, 4, 6, 6, 5, 5, 7, 7];
    let ordered: Vec<u8> = (0..8).flat_map(|row| [row, row]).collect();
    assert_eq!(super::rows_in_order(&stored, 8, 2), ordered);
}
