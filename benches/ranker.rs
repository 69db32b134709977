//! Scoring N candidates of one prompt with a listwise and a pointwise ranker of the usual shape
//! (width 64, 4 heads, feed-forward 128, standardised features).
//!
//! Throughput is in multiply-adds (`elem/s`): those of the projection, the block and the
//! attention, which are to be held against this machine's peak.

use std::collections::BTreeMap;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
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

fn ranker(kind: RankerKind, hidden_size: usize) -> Ranker {
    let config = RankerConfig {
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
    };
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

fn bench(criterion: &mut Criterion) {
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
                let rows = (n + 1) as u64;
                let (width, wide) = (WIDTH as u64, FEED_FORWARD as u64);
                let attention = if kind == RankerKind::Listwise {
                    4 * width * width + 2 * rows * width
                } else {
                    0
                };
                let work = rows * (hidden_size as u64 * width + 2 * width * wide + attention);
                group.throughput(Throughput::Elements(work));
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

criterion_group!(benches, bench);
criterion_main!(benches);
