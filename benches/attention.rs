//! Attention in SmolLM2's shape: N candidates behind a shared prefix, and the prefill of a prompt.
//!
//! Throughput of a decode step is the bytes of keys and values that it must read, the prefix's once
//! for all candidates; of the prefill it is prompt tokens a layer. Layers are taken in turn, so keys
//! and values come from where a forward pass finds them.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use podium::backend::cpu::Cpu;
use podium::backend::cpu::rows::{Rows, Vector};
use podium::backend::cpu::simd::Isa;
use podium::backend::random::uniform;
use podium::backend::{Attention, Backend, Batch, Group, KvShape, PAGE_LEN, PageId, Segment};
use podium::model::config::Rope;

const SHAPE: KvShape = KvShape {
    layers: 30,
    heads: 9,
    kv_heads: 3,
    head_dim: 64,
};
/// Tokens that a candidate has written, the one of this step included.
const OWN: usize = 32;

fn attention(rope: &Rope, layer: usize) -> Attention<'_, Vector> {
    Attention {
        layer,
        scale: 0.125,
        softcap: None,
        window: None,
        rope,
        query_norm: None,
        key_norm: None,
    }
}

fn rope() -> Rope {
    Rope {
        frequencies: (0..32).map(|i| 1e5f32.powf(-i as f32 / 32.0)).collect(),
        attention_factor: 1.0,
    }
}

fn qkv(rows: usize) -> Rows {
    let mut qkv = Rows::new(rows, (SHAPE.heads + 2 * SHAPE.kv_heads) * SHAPE.head_dim);
    for row in 0..rows {
        for (i, x) in qkv.row_mut(row).iter_mut().enumerate() {
            *x = uniform(1, row as u32, i as u32) - 0.5;
        }
    }
    qkv
}

fn pages(next: &mut PageId, tokens: usize) -> Vec<PageId> {
    let first = *next;
    *next += tokens.div_ceil(PAGE_LEN) as PageId;
    (first..*next).collect()
}

fn batch(groups: Vec<Group>) -> Batch {
    let segments = groups.iter().flat_map(|group| &group.segments);
    Batch {
        tokens: vec![0; segments.map(|segment| segment.rows).sum()],
        groups,
    }
}

/// Appends keys and values of a batch in every layer.
fn append(cpu: &Cpu, kv: &mut <Cpu as Backend>::KvCache, batch: &Batch) {
    let rope = rope();
    let plan = cpu
        .plan(batch, None, &[&rope], kv)
        .expect("there is memory");
    let mut qkv = qkv(batch.tokens.len());
    for layer in 0..SHAPE.layers {
        cpu.rope_append(&plan, &attention(&rope, layer), &mut qkv, kv);
    }
}

fn bench(criterion: &mut Criterion) {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let cpu = Cpu::new(threads, Isa::best()).expect("threads start");
    let mut group = criterion.benchmark_group(format!("attention/{}", cpu.isa().name()));
    group.sample_size(20);
    let rope = rope();
    for prefix_len in [512, 4096] {
        let mut kv = cpu.kv_cache(SHAPE).expect("there is memory");
        let mut next = 0;
        let prefix = pages(&mut next, prefix_len);
        let whole = Group {
            segments: vec![Segment {
                pages: prefix.clone(),
                start: 0,
                rows: prefix_len,
            }],
            ..Group::default()
        };
        append(&cpu, &mut kv, &batch(vec![whole]));
        let candidates = |rows: usize, start: usize, pages: &[Vec<PageId>]| {
            let segments = pages.iter().map(|pages| Segment {
                pages: pages.clone(),
                start,
                rows,
            });
            batch(vec![Group {
                prefix: prefix.clone(),
                prefix_len,
                segments: segments.collect(),
            }])
        };
        for n in [1, 8, 32, 100] {
            let mut next = next;
            let own: Vec<Vec<PageId>> = (0..n).map(|_| pages(&mut next, OWN)).collect();
            append(&cpu, &mut kv, &candidates(OWN, 0, &own));
            let step = candidates(1, OWN - 1, &own);
            let plan = cpu
                .plan(&step, None, &[&rope], &mut kv)
                .expect("there is memory");
            let (qkv, mut out) = (qkv(n), Rows::new(n, SHAPE.heads * SHAPE.head_dim));
            let keys_and_values = 2 * (prefix_len + n * OWN) * SHAPE.kv_heads * SHAPE.head_dim;
            group.throughput(Throughput::Bytes(4 * keys_and_values as u64));
            let id = BenchmarkId::new(format!("prefix {prefix_len}"), format!("N {n}"));
            group.bench_function(id, |bencher| {
                let mut layer = 0;
                bencher.iter(|| {
                    layer = (layer + 1) % SHAPE.layers;
                    cpu.attention(&plan, &attention(&rope, layer), &qkv, &kv, &mut out);
                });
            });
        }
    }

    let tokens = 512;
    let mut kv = cpu.kv_cache(SHAPE).expect("there is memory");
    let prompt = batch(vec![Group {
        segments: vec![Segment {
            pages: pages(&mut 0, tokens),
            start: 0,
            rows: tokens,
        }],
        ..Group::default()
    }]);
    append(&cpu, &mut kv, &prompt);
    let plan = cpu
        .plan(&prompt, None, &[&rope], &mut kv)
        .expect("there is memory");
    let (qkv, mut out) = (qkv(tokens), Rows::new(tokens, SHAPE.heads * SHAPE.head_dim));
    group.throughput(Throughput::Elements(tokens as u64));
    group.bench_function(BenchmarkId::new("prefill", tokens), |bencher| {
        let mut layer = 0;
        bencher.iter(|| {
            layer = (layer + 1) % SHAPE.layers;
            cpu.attention(&plan, &attention(&rope, layer), &qkv, &kv, &mut out);
        });
    });
}

criterion_group!(benches, bench);
criterion_main!(benches);
