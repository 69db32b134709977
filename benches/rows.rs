//! The operations beside the products and the attention, in SmolLM2's shape: norm and interleaving of
//! a product's inputs, rotation and append to the KV cache, embedding, log-probabilities.
//!
//! Throughput is the bytes that an operation must read and write.

use criterion::measurement::WallTime;
use criterion::{
    BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main,
};
use podium::backend::cpu::Cpu;
use podium::backend::cpu::inputs::{Form, Inputs};
use podium::backend::cpu::rows::{Rows, Vector};
use podium::backend::cpu::simd::Isa;
use podium::backend::random::uniform;
use podium::backend::{Attention, Backend, Batch, Group, KvShape, Norm, PAGE_LEN, Segment};
use podium::model::config::Rope;
use podium::model::tensor::{Dtype, Tensor};
use std::borrow::Cow;
use std::hint::black_box;

const HIDDEN_SIZE: usize = 576;
const VOCAB_SIZE: usize = 49_152;
const SHAPE: KvShape = KvShape {
    layers: 30,
    heads: 9,
    kv_heads: 3,
    head_dim: 64,
};
const ROWS: [usize; 5] = [1, 8, 32, 100, 512];

fn filled(rows: usize, width: usize) -> Rows {
    let mut filled = Rows::new(rows, width);
    for row in 0..rows {
        for (i, x) in filled.row_mut(row).iter_mut().enumerate() {
            *x = 8.0 * uniform(1, row as u32, i as u32) - 4.0;
        }
    }
    filled
}

/// One token each of so many sequences.
fn batch(rows: usize) -> Batch {
    let segments = (0..rows).map(|row| Segment {
        pages: vec![row as u32],
        start: row % PAGE_LEN,
        rows: 1,
    });
    let tokens = (0..rows).map(|row| (row * 7919 % VOCAB_SIZE) as u32);
    Batch {
        tokens: tokens.collect(),
        groups: vec![Group {
            segments: segments.collect(),
            ..Group::default()
        }],
    }
}

fn group<'a>(criterion: &'a mut Criterion, name: &str, cpu: &Cpu) -> BenchmarkGroup<'a, WallTime> {
    let mut group = criterion.benchmark_group(format!("{name}/{}", cpu.isa().name()));
    group.sample_size(20);
    group
}

fn cpu() -> Cpu {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    Cpu::new(threads, Isa::best()).expect("threads start")
}

fn norm_and_interleave(criterion: &mut Criterion) {
    let cpu = cpu();
    let weight = Vector::new(&[1.5; HIDDEN_SIZE]);
    let norm = Norm {
        weight: &weight,
        epsilon: 1e-5,
    };
    let mut group = group(criterion, "norm_interleave", &cpu);
    for (rows, form) in ROWS
        .map(|rows| [(rows, Form::Float), (rows, Form::Quantised)])
        .concat()
    {
        let x = filled(rows, HIDDEN_SIZE);
        let mut inputs = Inputs::default();
        group.throughput(Throughput::Bytes((2 * rows * HIDDEN_SIZE * 4) as u64));
        group.bench_function(BenchmarkId::new(format!("{form:?}"), rows), |bencher| {
            bencher.iter(|| inputs.fill(cpu.team(), cpu.isa(), form, (&x, None, Some(&norm))));
        });
    }
}

fn rope_append(criterion: &mut Criterion) {
    let cpu = cpu();
    let rope = Rope {
        frequencies: (0..32).map(|i| 1e5f32.powf(-i as f32 / 32.0)).collect(),
        attention_factor: 1.0,
    };
    let mut group = group(criterion, "rope_append", &cpu);
    for rows in ROWS {
        let mut kv = cpu.kv_cache(SHAPE).expect("there is memory");
        let plan = cpu
            .plan(&batch(rows), None, &[&rope], &mut kv)
            .expect("there is memory");
        let width = (SHAPE.heads + 2 * SHAPE.kv_heads) * SHAPE.head_dim;
        let mut qkv = filled(rows, width);
        // Queries and keys are read and written, values read; keys and values go to the cache.
        let numbers = 2 * SHAPE.heads + (2 + 1 + 2) * SHAPE.kv_heads;
        group.throughput(Throughput::Bytes(
            (4 * rows * numbers * SHAPE.head_dim) as u64,
        ));
        group.bench_function(BenchmarkId::from_parameter(rows), |bencher| {
            let mut layer = 0;
            bencher.iter(|| {
                layer = (layer + 1) % SHAPE.layers;
                let attention = Attention {
                    layer,
                    scale: 0.125,
                    softcap: None,
                    window: None,
                    rope: &rope,
                    query_norm: None,
                    key_norm: None,
                };
                // Rotations keep lengths, so the numbers stay what they are however often.
                cpu.rope_append(&plan, &attention, &mut qkv, &mut kv);
            });
        });
    }
}

fn embed(criterion: &mut Criterion) {
    let cpu = cpu();
    for dtype in [Dtype::BF16, Dtype::Q8_0] {
        let bytes = VOCAB_SIZE * dtype.row_bytes(HIDDEN_SIZE).expect("whole blocks");
        let table = Tensor {
            dtype,
            shape: vec![VOCAB_SIZE, HIDDEN_SIZE],
            // Small and finite in any format.
            data: Cow::Owned(vec![0x20; bytes]),
        };
        let table = cpu.matrix(&[table]).expect("there is memory");
        let mut group = group(criterion, &format!("embed/{dtype:?}"), &cpu);
        for rows in ROWS {
            let mut kv = cpu.kv_cache(SHAPE).expect("there is memory");
            let plan = cpu
                .plan(&batch(rows), None, &[], &mut kv)
                .expect("there is memory");
            let mut out = Rows::new(rows, HIDDEN_SIZE);
            let read = rows * bytes / VOCAB_SIZE;
            group.throughput(Throughput::Bytes((read + 4 * rows * HIDDEN_SIZE) as u64));
            group.bench_function(BenchmarkId::from_parameter(rows), |bencher| {
                bencher.iter(|| cpu.embed(&plan, &table, 1.0, &mut out));
            });
        }
    }
}

fn logprobs(criterion: &mut Criterion) {
    let cpu = cpu();
    let mut group = group(criterion, "token_logprobs", &cpu);
    for rows in [1, 8, 32, 100] {
        let logits = filled(rows, VOCAB_SIZE);
        let tokens: Vec<u32> = (0..rows as u32).collect();
        group.throughput(Throughput::Bytes((4 * rows * VOCAB_SIZE) as u64));
        group.bench_function(BenchmarkId::from_parameter(rows), |bencher| {
            bencher.iter(|| black_box(cpu.token_logprobs(&logits, &tokens)));
        });
    }
}

criterion_group!(benches, norm_and_interleave, rope_append, embed, logprobs);
criterion_main!(benches);
