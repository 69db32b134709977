//! Time to sample one row, on one core: vocabularies of SmolLM2 and of Qwen2.5, logits as a model
//! gives them (a few tokens stand out) and nearly flat ones (the worst case of every filter).

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use podium::backend::cpu::sample::sample;
use podium::backend::cpu::softmax::statistics;
use podium::backend::random::uniform;
use podium::backend::sampling::{SampleRow, SamplingParams};

const ROWS: usize = 16;

/// Normally distributed logits, with a few raised tokens if `peaked`.
fn logits(vocab_size: usize, deviation: f32, peaked: bool, row: u32) -> Vec<f32> {
    let mut logits: Vec<f32> = (0..vocab_size as u32)
        .map(|token| {
            let radius = (-2.0 * (1.0 - uniform(u64::from(row), 0, token)).ln()).sqrt();
            let angle = std::f32::consts::TAU * uniform(u64::from(row), 1, token);
            deviation * radius * angle.cos()
        })
        .collect();
    if peaked {
        for rank in 0..20 {
            let token = uniform(u64::from(row), 2, rank) * vocab_size as f32;
            logits[token as usize] = 20.0 - 0.5 * rank as f32;
        }
    }
    logits
}

fn sampling(criterion: &mut Criterion) {
    let off = SamplingParams::default();
    let cases = [
        (
            "greedy",
            SamplingParams {
                temperature: 0.0,
                ..off.clone()
            },
        ),
        ("plain", off.clone()),
        (
            "top_p",
            SamplingParams {
                temperature: 0.7,
                top_p: 0.95,
                ..off.clone()
            },
        ),
        (
            "top_k",
            SamplingParams {
                temperature: 0.7,
                top_k: 50,
                ..off.clone()
            },
        ),
        (
            "all",
            SamplingParams {
                repetition_penalty: 1.1,
                temperature: 0.7,
                top_k: 50,
                top_p: 0.95,
                min_p: 0.05,
            },
        ),
    ];
    for vocab_size in [49_152, 151_936] {
        let mut group = criterion.benchmark_group(format!("sample/{vocab_size}"));
        group
            .measurement_time(Duration::from_secs(2))
            .warm_up_time(Duration::from_millis(500));
        group.throughput(Throughput::Elements(1));
        for (shape, deviation, peaked) in [("peaked", 2.0, true), ("flat", 1.0, false)] {
            let rows: Vec<Vec<f32>> = (0..ROWS)
                .map(|row| logits(vocab_size, deviation, peaked, row as u32))
                .collect();
            group.bench_function(BenchmarkId::new("statistics", shape), |bencher| {
                let mut next = 0;
                bencher.iter(|| {
                    next = (next + 1) % ROWS;
                    black_box(statistics(&rows[next]))
                });
            });
            for (name, params) in &cases {
                group.bench_function(BenchmarkId::new(*name, shape), |bencher| {
                    let mut position = 0;
                    bencher.iter(|| {
                        position += 1;
                        let row = SampleRow {
                            row: 0,
                            params,
                            seed: 1,
                            candidate: 0,
                            position,
                            prompt: &[1, 2, 3, 4],
                            answer: &[5, 6, 7, 8],
                            logit_bias: &[],
                            top_logprobs: 0,
                        };
                        black_box(sample(&rows[position as usize % ROWS], &row))
                    });
                });
            }
        }
        group.finish();
    }
}

criterion_group!(benches, sampling);
criterion_main!(benches);
