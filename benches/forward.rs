//! The whole forward pass: a random-weight model in SmolLM2's shape, in bf16, from a temporary
//! folder. Prefill of 512 tokens, and decode steps with logits for N candidates behind them.
//!
//! Throughput is tokens: those of the prompt, or one for each candidate.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use podium::backend::cpu::Cpu;
use podium::backend::cpu::simd::Isa;
use podium::backend::{Batch, Group, PAGE_LEN, PageId, Segment};
use podium::model::files::ModelFiles;
use podium::model::forward::{Depth, Model};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use std::path::Path;

const LAYERS: usize = 30;
const HIDDEN_SIZE: usize = 576;
const INTERMEDIATE_SIZE: usize = 1536;
const KEY_WIDTH: usize = 192;
const VOCAB_SIZE: usize = 49_152;
const PROMPT: usize = 512;
/// Tokens that a candidate has written, the one of this step included.
const OWN: usize = 32;

fn config() -> String {
    format!(
        r#"{{"model_type": "llama", "vocab_size": {VOCAB_SIZE}, "hidden_size": {HIDDEN_SIZE},
            "intermediate_size": {INTERMEDIATE_SIZE}, "num_hidden_layers": {LAYERS},
            "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "tie_word_embeddings": true}}"#
    )
}

/// Random bf16 numbers of either sign, from 2⁻⁷ to 2⁻⁴ in size; norms are 1.
fn write_model(folder: &Path) {
    let mut shapes = vec![
        (
            "model.embed_tokens.weight".to_string(),
            vec![VOCAB_SIZE, HIDDEN_SIZE],
        ),
        ("model.norm.weight".to_string(), vec![HIDDEN_SIZE]),
    ];
    for layer in 0..LAYERS {
        for (part, shape) in [
            ("self_attn.q_proj", vec![HIDDEN_SIZE, HIDDEN_SIZE]),
            ("self_attn.k_proj", vec![KEY_WIDTH, HIDDEN_SIZE]),
            ("self_attn.v_proj", vec![KEY_WIDTH, HIDDEN_SIZE]),
            ("self_attn.o_proj", vec![HIDDEN_SIZE, HIDDEN_SIZE]),
            ("mlp.gate_proj", vec![INTERMEDIATE_SIZE, HIDDEN_SIZE]),
            ("mlp.up_proj", vec![INTERMEDIATE_SIZE, HIDDEN_SIZE]),
            ("mlp.down_proj", vec![HIDDEN_SIZE, INTERMEDIATE_SIZE]),
            ("input_layernorm", vec![HIDDEN_SIZE]),
            ("post_attention_layernorm", vec![HIDDEN_SIZE]),
        ] {
            shapes.push((format!("model.layers.{layer}.{part}.weight"), shape));
        }
    }
    let mut state = 1u64;
    let mut number = |norm: bool| {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        let bits = (state >> 40) as u16;
        // Sign and fraction at random, and one of three exponents.
        let small = bits & 0x807f | (120 + (bits >> 8) % 3) << 7;
        if norm { 0x3f80 } else { small }
    };
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = shapes
        .into_iter()
        .map(|(name, shape)| {
            let norm = shape.len() == 1;
            let len: usize = shape.iter().product();
            let bytes = (0..len).flat_map(|_| number(norm).to_le_bytes()).collect();
            (name, shape, bytes)
        })
        .collect();
    let views = tensors.iter().map(|(name, shape, bytes)| {
        let view = TensorView::new(Dtype::BF16, shape.clone(), bytes);
        (name, view.expect("as many bytes as the shape says"))
    });
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors"))
        .expect("the temporary folder has room for 270 MB");
    std::fs::write(folder.join("config.json"), config()).expect("the folder can be written");
}

fn tokens(count: usize) -> Vec<u32> {
    let token = |i| (i * 7919 % VOCAB_SIZE) as u32;
    (0..count).map(token).collect()
}

fn pages(next: &mut PageId, tokens: usize) -> Vec<PageId> {
    let first = *next;
    *next += tokens.div_ceil(PAGE_LEN) as PageId;
    (first..*next).collect()
}

fn bench(criterion: &mut Criterion) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    write_model(folder.path());
    let files = ModelFiles::open(folder.path()).expect("the model that was just written");
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let cpu = Cpu::new(threads, Isa::best()).expect("threads start");
    let model = Model::load(cpu, &files, &mut |_| {}).expect("the model that was just written");
    let mut state = model.state().expect("there is memory");
    let depth = Depth {
        layers: LAYERS,
        capture: &[],
    };
    let mut next = 0;
    let prefix = pages(&mut next, PROMPT);
    let prompt = Batch {
        tokens: tokens(PROMPT),
        groups: vec![Group {
            segments: vec![Segment {
                pages: prefix.clone(),
                start: 0,
                rows: PROMPT,
            }],
            ..Group::default()
        }],
    };

    let mut group = criterion.benchmark_group(format!("forward/{}", Isa::best().name()));
    group.sample_size(10);
    group.throughput(Throughput::Elements(PROMPT as u64));
    group.bench_function(BenchmarkId::new("prefill", PROMPT), |bencher| {
        bencher.iter(|| model.forward(&mut state, &prompt, depth).expect("it runs"));
    });
    for n in [1, 8, 32, 100] {
        let mut next = next;
        let own: Vec<Vec<PageId>> = (0..n).map(|_| pages(&mut next, OWN)).collect();
        let candidates = |start: usize, rows: usize| Batch {
            tokens: tokens(n * rows),
            groups: vec![Group {
                prefix: prefix.clone(),
                prefix_len: PROMPT,
                segments: own
                    .iter()
                    .map(|pages| Segment {
                        pages: pages.clone(),
                        start,
                        rows,
                    })
                    .collect(),
            }],
        };
        model
            .forward(&mut state, &candidates(0, OWN), depth)
            .expect("it runs");
        let step = candidates(OWN - 1, 1);
        let every_row: Vec<u32> = (0..n as u32).collect();
        group.throughput(Throughput::Elements(n as u64));
        group.bench_function(BenchmarkId::new("decode", format!("N {n}")), |bencher| {
            bencher.iter(|| {
                model.forward(&mut state, &step, depth).expect("it runs");
                model.logits(&mut state, &every_row).map(|_| ())
            });
        });
    }
}

criterion_group!(benches, bench);
criterion_main!(benches);
