//! Scoring N candidates of one prompt with a listwise and a pointwise ranker of the usual shape
//! (width 64, 4 heads, feed-forward 128, standardised features).
//!
//! Throughput is in multiply-adds (`elem/s`): those of the projection, the block and the
//! attention, which are to be held against this machine's peak.
//!
//! A step of training (16 groups of 100 candidates, hidden size 4096, bf16) is also held against the
//! peak of multiply-adds measured in the same run: the share is printed.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use podium::backend::cpu::limits;
use podium::backend::cpu::simd::Isa;
use podium::backend::cpu::team::Team;
use podium::ranker::train::{Features, Group, Loss, TrainOptions, Trainer};
use podium::ranker::{
    FeaturePosition, Normalization, Ranker, RankerConfig, RankerKind, RankerTensor, Relevance,
};

const WIDTH: usize = 64;
const FEED_FORWARD: usize = 128;

/// Numbers in -1..1 that are the same every time.
fn numbers(len: usize) -> Vec<f32> {
    (0..len as u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / 8_388_608.0 - 1.0)
        .collect()
}

fn config(kind: RankerKind, hidden_size: usize) -> RankerConfig {
    RankerConfig {
        format_version: 1,
        name: "bench".into(),
        task: None,
        kind,
        hidden_size,
        projection_width: Some(WIDTH),
        heads: (kind == RankerKind::Listwise).then_some(4),
        feed_forward_width: Some(FEED_FORWARD),
        relevance: Some(Relevance::Dot),
        layer: 18,
        layers: 30,
        feature_position: FeaturePosition::LastToken,
        normalization: Normalization::Standardized,
        extra_inputs: Vec::new(),
        model_name: "none".into(),
        model_fingerprint: "none".into(),
        training: Default::default(),
        metrics: Default::default(),
    }
}

fn ranker(kind: RankerKind, hidden_size: usize) -> Ranker {
    let config = config(kind, hidden_size);
    let tensors: BTreeMap<String, RankerTensor> = config
        .tensor_shapes()
        .into_iter()
        .map(|(name, shape)| {
            let mut data = numbers(shape.iter().product());
            if name.ends_with(".scale") {
                data.iter_mut().for_each(|value| *value = value.abs() + 0.5);
            }
            (name.to_owned(), RankerTensor { shape, data })
        })
        .collect();
    Ranker::new(config, tensors).expect("the tensors are made to the shapes that are asked for")
}

/// Multiply-adds of one row: the projection, and what follows it.
fn work_of_a_row(kind: RankerKind, hidden_size: usize, rows: usize) -> [usize; 2] {
    let attention = match kind {
        RankerKind::Listwise => 4 * WIDTH * WIDTH + 2 * rows * WIDTH,
        _ => 0,
    };
    [hidden_size * WIDTH, 2 * WIDTH * FEED_FORWARD + attention]
}

fn score(criterion: &mut Criterion) {
    for (kind, name) in [
        (RankerKind::Listwise, "listwise"),
        (RankerKind::Pointwise, "pointwise"),
    ] {
        let mut group = criterion.benchmark_group(format!("ranker/{name}"));
        for hidden_size in [576, 4096] {
            let ranker = ranker(kind, hidden_size);
            let prompt = numbers(hidden_size);
            for n in [8, 100, 1000] {
                let candidates = numbers(n * hidden_size);
                let rows = n + 1;
                let work = rows * work_of_a_row(kind, hidden_size, rows).iter().sum::<usize>();
                group.throughput(Throughput::Elements(work as u64));
                group.bench_function(
                    BenchmarkId::new(format!("hidden {hidden_size}"), format!("N {n}")),
                    |bencher| {
                        bencher.iter(|| ranker.score(&prompt, &candidates, &[]));
                    },
                );
            }
        }
        group.finish();
    }
}

/// Steps of training. A step multiplies with the projection twice, forward and for its gradient, and
/// with everything behind it three times.
fn train(criterion: &mut Criterion) {
    const GROUPS: usize = 16;
    const CANDIDATES: usize = 100;
    const HIDDEN_SIZE: usize = 4096;
    let bf16 = |len: usize| -> Vec<[u8; 2]> {
        let upper_half = |x: f32| ((x.to_bits() >> 16) as u16).to_le_bytes();
        numbers(len).into_iter().map(upper_half).collect()
    };
    let candidates = bf16(GROUPS * CANDIDATES * HIDDEN_SIZE);
    let prompts = bf16(GROUPS * HIDDEN_SIZE);
    let keys: Vec<String> = (0..GROUPS).map(|group| group.to_string()).collect();
    let groups = || -> Vec<Group> {
        let rows = candidates.chunks(CANDIDATES * HIDDEN_SIZE);
        let rows = keys.iter().zip(prompts.chunks(HIDDEN_SIZE)).zip(rows);
        rows.map(|((key, prompt), candidates)| Group {
            key,
            prompt: Features::Bf16(prompt),
            candidates: Features::Bf16(candidates),
            labels: (0..CANDIDATES).map(|i| f32::from(i % 5 == 0)).collect(),
            extra: Vec::new(),
        })
        .collect()
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let team = Team::new(threads).expect("threads start");
    let peak = limits::measure(&team, Isa::best()).fma_peak / 2.0;
    for (kind, name) in [
        (RankerKind::Listwise, "listwise"),
        (RankerKind::Pointwise, "pointwise"),
    ] {
        let options = TrainOptions {
            loss: Loss::Listwise,
            // Longer than anybody measures: the schedule never ends.
            epochs: 1 << 30,
            batch: GROUPS,
            group_size: (CANDIDATES, CANDIDATES),
            dropout: 0.0,
            validation: 0.0,
            ..TrainOptions::of(kind)
        };
        let mut trainer = Trainer::new(config(kind, HIDDEN_SIZE), options, groups(), None)
            .expect("every group has a right and a wrong candidate");
        let rows = CANDIDATES + 1;
        let [projection, block] = work_of_a_row(kind, HIDDEN_SIZE, rows);
        let work = GROUPS * rows * (2 * projection + 3 * block);
        let mut group = criterion.benchmark_group("ranker/train");
        group.throughput(Throughput::Elements(work as u64));
        let (mut steps, mut time) = (0, Duration::ZERO);
        group.bench_function(name, |bencher| {
            bencher.iter_custom(|iterations| {
                let started = Instant::now();
                for _ in 0..iterations {
                    trainer.epoch().expect("the loss stays finite");
                }
                let elapsed = started.elapsed();
                (steps, time) = (steps + iterations, time + elapsed);
                elapsed
            });
        });
        group.finish();
        if steps > 0 {
            let rate = steps as f64 * work as f64 / time.as_secs_f64();
            println!(
                "ranker/train/{name}: {:.1} of {:.1} G multiply-adds/s, {:.0} %",
                rate / 1e9,
                peak / 1e9,
                100.0 * rate / peak
            );
        }
    }
}

criterion_group!(benches, score, train);
criterion_main!(benches);
